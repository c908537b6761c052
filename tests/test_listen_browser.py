"""The page of workflows.listen in a real browser, with the command behind it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from browser import Browser, browser
from listening import Command, Listener, make_export

RATE = 4_000
STATE = (
    "({...document.documentElement.dataset, status: find('status').textContent, problem: find('problem').textContent})"
)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("listen") / "tiny", RATE)


@pytest.fixture(scope="module")
def command(export: Path) -> Iterator[Command]:
    with Command(f"--model={export}", "--listeners=2") as command:
        yield command


def wait(browser: Browser, true: Callable[[dict[str, Any]], object], seconds: float = 60) -> dict[str, Any]:
    """The page's state, once something is true of it."""
    end = time.monotonic() + seconds
    while True:
        state = browser.evaluate(STATE)
        state |= {name: float(state[name]) for name in ("starved", "total", "speed", "ahead", "stream", "position")}
        if true(state):
            return state
        assert time.monotonic() < end, (state, browser.problems)
        time.sleep(0.05)


def press(browser: Browser, name: str) -> None:
    browser.evaluate(f"find({name!r}).click()")


def turn(browser: Browser, name: str, value: float | str) -> None:
    browser.evaluate(f"find({name!r}).value = {value!r}; find({name!r}).oninput?.(); find({name!r}).onchange?.()")


def opened(browser: Browser, command: Command, **options: Any) -> None:
    browser.problems.clear()
    browser.open(command.url, **options)


def heard(browser: Browser) -> np.ndarray:
    """int16 samples that were heard, oldest first."""
    floats = browser.evaluate("[...past.subarray(0, total)]")
    return np.round(np.array(floats) * 32_768).astype(np.int16)


def test_it_plays_what_the_model_makes_and_saves_it(chromium: Browser, command: Command, tmp_path: Path) -> None:
    opened(chromium, command)
    assert wait(chromium, lambda s: True)["status"] == "Press play."
    press(chromium, "play")
    state = wait(chromium, lambda s: s["total"] > 3 * RATE)
    assert state["state"] == "playing" and state["starved"] == 0 and state["speed"] > 0
    press(chromium, "play")
    wait(chromium, lambda s: s["state"] == "paused")
    total = wait(chromium, lambda s: True)["total"]
    time.sleep(0.3)
    assert wait(chromium, lambda s: True)["total"] == total  # it does not play on
    sound = heard(chromium)
    with Listener(command.url) as listener:
        stream, _ = listener.begin(seed=0)
        np.testing.assert_array_equal(sound, listener.hear(stream, len(sound))[: len(sound)])
    colours = "new Set(find(%r).getContext('2d').getImageData(find(%r).width - 200, 0, 200, 80).data).size"
    assert chromium.evaluate(colours % ("spectrogram", "spectrogram")) > 20
    assert chromium.evaluate(colours % ("waveform", "waveform")) > 2

    chromium.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    press(chromium, "save")
    path = tmp_path / "tiny_last_minute.wav"
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    saved, rate = soundfile.read(path, dtype="int16")
    assert rate == RATE and soundfile.info(path).subtype == "PCM_16"
    np.testing.assert_array_equal(saved, sound)

    press(chromium, "play")
    wait(chromium, lambda s: s["total"] > total and s["state"] == "playing")
    assert chromium.problems == []


def test_controls_change_the_sound_at_once(chromium: Browser, command: Command) -> None:
    """What was made ahead is made again: the stream is one whose settings changed between two pieces."""
    opened(chromium, command)
    press(chromium, "play")
    wait(chromium, lambda s: s["ahead"] > 2)
    change = (
        "find('top_p').value = 0.05; const start = Math.round(position + LATER * rate); sendSettings(); [total, start]"
    )
    before, start = chromium.evaluate(change)
    wait(chromium, lambda s: s["total"] > before + 4 * RATE)
    sound = heard(chromium)
    with Listener(command.url) as listener:
        stream, _ = listener.begin(seed=0)
        plain = listener.hear(stream, len(sound))[: len(sound)]
        changed = int(np.argmax(sound != plain))  # the first sample that differs
        # Settings change between two pieces: at the first behind `start`, or a later one where the machine is busy.
        piece, same = RATE // 10, False
        for kept in range(-(-start // piece) * piece, changed + 1, piece):
            stream, _ = listener.begin(seed=0)
            listener.send("settings", stream=0, start=0, temperature=1, top_p=1)
            again = listener.hear(stream, kept)
            listener.send("settings", stream=stream, start=kept, temperature=1, top_p=0.05)
            again = listener.hear(stream, len(sound), again)[: len(sound)]
            same = same or np.array_equal(sound, np.concatenate([plain[:changed], again[changed:]]))
        assert same
    assert start <= changed < before + 2 * RATE  # long before what was made ahead, above 2 s, is played
    print(f"settings act {(changed - before) / RATE:.2f} s later")
    turn(chromium, "top_p", 1)
    stream, start = wait(chromium, lambda s: True)["stream"], wait(chromium, lambda s: True)["total"]
    turn(chromium, "seed", 7)
    state = wait(chromium, lambda s: s["stream"] > stream and s["position"] > RATE)
    assert state["total"] > start
    press(chromium, "again")
    wait(chromium, lambda s: s["stream"] > state["stream"] and s["position"] > RATE / 2)
    assert chromium.evaluate("find('seed').value") != "7"
    assert chromium.problems == []


GIVE = """(async () => {
  const data = new DataTransfer();
  data.items.add(new File([%s], %r));
  find("file").files = data.files;
  await find("file").onchange();
})()"""


def give(browser: Browser, content: str, name: str = "beginning.wav") -> None:
    browser.evaluate(GIVE % (content, name))


def test_prompts(chromium: Browser, command: Command) -> None:
    """Bad ones are told, and the stream plays on; a file and the microphone are continued."""
    opened(chromium, command)
    press(chromium, "play")
    wait(chromium, lambda s: s["state"] == "playing")
    for content, said in (
        ("wav(new Float32Array(8000))", "The prompt is silent"),
        ("'no audio at all'", "The prompt is not audio"),
        ("''", "The prompt is empty"),
        ("wav(new Float32Array(61 * rate).map((_, i) => Math.sin(i)))", "longer than 60 s"),
        ("new Uint8Array(50_000_001)", "at most 50 MB"),
    ):
        give(chromium, content)
        state = wait(chromium, lambda s: True)
        assert said in state["problem"] and state["stream"] == 1
    first = wait(chromium, lambda s: s["state"] == "playing")["total"]
    wait(chromium, lambda s: s["total"] > first)

    give(chromium, "wav(new Float32Array(2 * rate).map((_, i) => Math.sin(i / 5)))")
    state = wait(chromium, lambda s: s["stream"] == 2 and s["position"] > 2.5 * RATE)
    assert state["problem"] == ""
    assert "s of beginning.wav" in chromium.evaluate("find('prompt').textContent")
    assert chromium.evaluate("waves.given.includes(1)")
    press(chromium, "record")  # Chromium's own microphone beeps once a second
    assert wait(chromium, lambda s: chromium.evaluate("!!recorder"))["state"] == "paused"
    time.sleep(2.5)
    press(chromium, "record")
    state = wait(chromium, lambda s: s["stream"] == 3 and s["position"] > RATE)
    assert state["problem"] == "" and "the recording" in chromium.evaluate("find('prompt').textContent")
    press(chromium, "forget")
    press(chromium, "again")
    wait(chromium, lambda s: s["stream"] == 4 and s["position"] > RATE)
    assert chromium.evaluate("lead") == 0
    assert [problem for problem in chromium.problems if "400" not in problem] == []


def test_what_a_page_cannot_do_is_said(chromium: Browser, command: Command) -> None:
    opened(chromium, command)
    chromium.evaluate("delete window.AudioWorkletNode")
    press(chromium, "play")
    assert "no AudioWorklet" in wait(chromium, lambda s: s["problem"])["problem"]
    opened(chromium, command)
    chromium.evaluate(
        "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotAllowedError') }"
    )
    press(chromium, "record")
    assert "no microphone" in wait(chromium, lambda s: s["problem"])["problem"]
    opened(chromium, command)
    chromium.evaluate("Object.defineProperty(window, 'isSecureContext', { value: false }); 0")
    press(chromium, "play")
    assert "ssh -L" in wait(chromium, lambda s: s["problem"])["problem"]


def test_a_server_that_goes_away(chromium: Browser, export: Path) -> None:
    with Command(f"--model={export}", "--listeners=1") as command:
        opened(chromium, command)
        press(chromium, "play")
        wait(chromium, lambda s: s["state"] == "playing" and s["total"] > RATE)
        chromium.evaluate(
            "window.other = new WebSocket(new URL('stream', location).href.replace('http', 'ws')); "
            "new Promise(done => other.onmessage = ({data}) => done(window.said = data))"
        )
        assert "the one place is taken" in chromium.evaluate("said")
        assert command.interrupt()[0] == 0
        state = wait(chromium, lambda s: s["state"] == "idle")
        assert "The server has gone" in state["problem"]
        press(chromium, "play")
        assert (
            "does not answer"
            in wait(chromium, lambda s: "does not" in s["problem"] and s["state"] == "idle")["problem"]
        )


@pytest.mark.parametrize("to_the_end", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["says so", "plays"])
def test_a_model_slower_than_real_time_says_so_and_buffers(chromium: Browser, tmp_path: Path, to_the_end: bool) -> None:
    with Command(f"--model={make_export(tmp_path / 'slow', 192_000)}") as command:
        assert any("it will stop to buffer" in line for line in command.lines)
        opened(chromium, command)
        press(chromium, "play")
        state = wait(chromium, lambda s: s["state"] == "buffering" and s["ahead"] > 0)
        assert "slower than it plays: buffering" in state["status"] and "of 4 s" in state["status"]
        assert state["total"] == 0 and state["speed"] < 1
        if to_the_end:
            state = wait(chromium, lambda s: s["state"] == "playing", 600)
            assert state["ahead"] > 2
            wait(chromium, lambda s: s["starved"] == 1 and s["state"] == "buffering", 60)
        assert chromium.problems == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1_200, 390, 320])
def test_it_fits_a_screen_and_a_phone(
    chromium: Browser, command: Command, tmp_path: Path, width: int, dark: bool
) -> None:
    opened(chromium, command, width=width, dark=dark)
    press(chromium, "play")
    wait(chromium, lambda s: s["total"] > RATE)
    wide = chromium.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    colour = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour.strip("rgb()").split(", "))) < 180) == dark
    chromium.screenshot(tmp_path / "page.png", whole=True)
    assert chromium.problems == []


@pytest.mark.slow
def test_a_minute_without_an_interruption(chromium: Browser, command: Command) -> None:
    opened(chromium, command)
    press(chromium, "play")
    state = wait(chromium, lambda s: s["total"] > 60 * RATE, 200)
    assert state["starved"] == 0 and chromium.problems == []


@pytest.mark.slow
def test_ten_minutes_of_the_model_in_the_box_for_two(tmp_path: Path) -> None:
    """HARMONIC_LISTEN_MINUTES=10, as it is by default; -s shows the figures."""
    minutes = float(os.environ.get("HARMONIC_LISTEN_MINUTES", "10"))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with browser(tmp_path / "one") as one, browser(tmp_path / "two") as two:
        started = time.monotonic()
        with Command("--listeners=2") as command:
            for listener in (one, two):
                opened(listener, command)
                press(listener, "play")
                wait(listener, lambda s: s["total"] > 0, 120)
                print(f"\n{time.monotonic() - started:.1f} s from the command to this listener's first sound", end="")
            seconds, states = 60 * minutes, []
            for listener in (one, two):
                states.append(wait(listener, lambda s: s["total"] > seconds * 16_000, seconds + 300))
                total, gaps, speed = (states[-1][name] for name in ("total", "starved", "speed"))
                print(
                    f"\n{total / 16_000:.0f} s heard, {gaps:.0f} interruptions, made {speed:.1f} times as fast", end=""
                )
            print(f"\nload {os.getloadavg()}")
            assert all(state["starved"] == 0 for state in states) and one.problems == two.problems == []

"""The report in a real browser: on a screen and on phones, in light and dark, with sound."""

import re
from pathlib import Path

import pytest
from browser import LOOK, Browser
from pages import SECONDS, make_run

from harmonic.report import build_report

PLAY = """(async () => {
  const players = [...document.querySelectorAll("audio")], heads = [...document.querySelectorAll(".playhead")];
  const moves = player => new Promise((done, fail) => {
    player.addEventListener("timeupdate", () => player.currentTime > 0.05 && done());
    setTimeout(() => fail("it stands still at " + player.currentTime), 20000);
  });
  await players[5].play();
  await moves(players[5]);
  await players[0].play();
  await moves(players[0]);
  for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);  // the playhead moves in frames
  return {
    times: [players[5].currentTime, players[0].currentTime],
    paused: players[5].paused,
    head: [heads[0].style.opacity, parseFloat(heads[0].style.left)],
  };
})()"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(make_run(tmp_path_factory.mktemp("finished") / "run")).parent


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1_200, 390, 320])
def test_a_browser_shows_the_report(
    finished: Path,
    chromium: Browser,
    tmp_path: Path,
    width: int,
    dark: bool,
) -> None:
    """Offline, on a screen and on phones, in light and dark: all sounds load, all pictures show, nothing sticks out."""
    chromium.open(finished / "report.html", width=width, dark=dark)
    seen = chromium.evaluate(LOOK)
    seconds = [*SECONDS, *[0.3] * 6]
    assert seen["durations"] == pytest.approx(seconds, abs=0.01)
    assert len(seen["pictures"]) == 12 and all(size > 20 for size in seen["pictures"])
    assert seen["overflow"] == 0 and seen["wide"] == []
    assert all(size > 150 for size in seen["widths"])
    (page, _), (_, ink) = seen["colours"]
    assert (brightness(page) < 60) == dark and (brightness(ink) > 200) == dark
    chromium.screenshot(tmp_path / "page.png", whole=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert chromium.problems == []


def test_a_browser_plays_the_sounds(finished: Path, chromium: Browser) -> None:
    """play() advances, the playhead with it, and one sound at a time."""
    chromium.open(finished / "report.html")
    seen = chromium.evaluate(PLAY)
    assert min(seen["times"]) > 0.05 and seen["paused"]
    assert seen["head"][0] == "1" and seen["head"][1] > 0
    assert chromium.problems == []

"""The report is one page that needs nothing else, and says what the run's files say."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pages import Page, curves, make_run, sound, write

from harmonic import audio
from harmonic.errors import UserError
from harmonic.published import RESULTS
from harmonic.report import build_report
from harmonic.report.page import SoundBudget

PUBLISHED = {
    dataset: [f"{row.value('bits_per_sample'):.3f}" for row in RESULTS if row.dataset == dataset and row.paper]
    for dataset in ("sc09", "beethoven", "youtubemix")
}
HOSTILE = "<script>alert('x')</script>\"&amp; </style>"
# Attributes through which a page loads or leads somewhere.
REFERENCES = {"src", "href", "srcset", "poster", "data", "action", "background", "xlink:href"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("finished") / "run")
    build_report(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A fresh run's folder for a test to spoil."""
    return make_run(tmp_path / "run")


def without_samples(run: Path) -> Path:
    shutil.rmtree(run / "samples")
    (run / "nearest.json").unlink()
    (run / "sound.json").unlink(missing_ok=True)
    return run


def test_every_sample_has_a_player_with_its_exact_samples(finished: Path) -> None:
    page = Page(finished / "report.html")
    entries = json.loads((finished / "samples" / "samples.json").read_text())["samples"]
    players = page.all("audio")
    assert len(entries) == 6 and len(players) == 6 + 2 * 3  # and three pairs of nearest excerpts
    for number, (player, entry) in enumerate(zip(players, entries, strict=False)):
        assert "controls" in player
        original = finished / "samples" / entry["file"]
        kind, _, code = player["src"].partition(";base64,")
        assert kind == ("data:audio/flac" if number == 5 else "data:audio/wav")  # the last one is long
        content = base64.b64decode(code, validate=True)
        if number < 5:
            assert content == original.read_bytes()
            continue
        assert len(content) < 0.9 * original.stat().st_size
        ours, theirs = (soundfile.read(file, dtype="int16") for file in (io.BytesIO(content), original))
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
    pictures = [base64.b64decode(image["src"].partition(",")[2]) for image in page.all("img")]
    assert len(pictures) == len(set(pictures)) == 12
    assert all(picture.startswith(b"\x89PNG") and len(picture) < 25_000 for picture in pictures)


def test_the_page_loads_nothing(finished: Path) -> None:
    page = Page(finished / "report.html")
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "use")
        for key, value in attributes.items():
            if key in REFERENCES:
                assert re.match(r"data:(audio/wav|audio/flac|image/png);base64,[A-Za-z0-9+/]+=*$", value), key
            assert key == "src" or "//" not in value, (tag, key)
    for code in (page.text["style"], page.text["script"]):
        assert not re.search(r"//|url\(|@import|fetch|XMLHttp", code)
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    digest = base64.b64encode(hashlib.sha256(page.text["script"][:-1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_page_says_what_the_files_say(finished: Path) -> None:
    page = Page(finished / "report.html")
    for words in (
        "On the test split of sc09 this model needs",
        "0.877 less than a Markov model, 3.277 less than the histogram entropy",
        "3.877 less than a uniform guess",
        "Markov model 5.000",
        "Histogram entropy 7.400",
        "Uniform 8.000",
        "step 300, best checkpoint, ema weights, 15 recordings, 123,456 samples",
        "Step 300 of 300",
        "0.75 s · 3.250 bits per sample",  # the first continuation
        "Prompt: seven/clip_2.wav",
        "494,412,303",
        "139,072",
        "4,155",  # the median training speed
        "4,321",
        "10,037",  # evaluated samples per second
        "86 min",
        "python -m workflows.full_run --config=sc09",
        '"learning_rate": 0.002',
        "of the way from recordings to noise",
        "0 is as near to the test split as training recordings are",
        "4,000 0.25 6,288 -12.5 81.2% 6.2% 2.25 2,000 (1,900 to 2,100) 0.00 6,288",
        "24,000 2.75 6,288 81.2%",  # white noise, of no level
        "step 300, 16 clips, each of 4 s, temperature 0.9, top_p 1.",
        "A note of seven.",
        "1 4,000 0.400 1 4,500 0.450",
        "Nearest: temperature 0.8, top-p 1. Other pairs within chance of it: 1.",
        "12.5% of the generated excerpts are as close to a training recording as a copy would be;",
        "of the held-out recordings' excerpts 0.0% are.",
        "25.0% are closer than 95% of the held-out ones.",
        "140 1.50 2.00 2.50 3.25 4.00 12.5%",
        "158 shorter recordings are left out.",
        "generated.wav, from 0.25 s",
        "seven/train_1.wav, from 0.12 s",
        "0.30 s · 3.50 dB apart",
        "Held-out, test",
        "Longer streams: 2 of 4 streams run away, the first after 6 s",
        "-14.5 2.000 -13.5 2.125 -11.5 2.375",
        "0.5 3.875 -9.5 3.250",
        "python -m workflows.listen --workdir=",
        "Generated at step 300, temperature 0.8.",
        "512 21.25 3.50 4.00 12.00 1.234",
        "140 15.75",
        "1.99 5.13 42.57 0.740",  # SaShiMi
        *PUBLISHED["sc09"],
    ):
        assert words in page.words, words
    assert [a["style"] for a in page.all("i") if a["class"] == "mark"] == ["left:50.00%"] * 2
    widths = [float(r["width"].rstrip("%")) for r in page.all("rect") if "class" not in r]
    assert widths == pytest.approx([51.54, 62.5, 92.5, 100])
    assert len([p for p in page.all("path") if p["class"] == "dot"]) == 3 + 4  # validations and contexts
    assert len([p for p in page.all("path") if p["class"] == "base"]) == 3 + 1  # baselines, drift of the recordings
    assert [p["class"] for p in curves(page)] == ["raw", "smooth", "smooth", "smooth"]
    heights = [y for _, y in points(curves(page)[-1])]
    assert len(heights) == 4 and heights == sorted(heights)  # bits of the generated clips fall: lines go down


def points(line: dict[str, str]) -> list[tuple[float, float]]:
    """The points of a curve."""
    found = [point.split(",") for point in line["d"].removeprefix("M").split()]
    return [(float(x), float(y)) for x, y in found]


def with_contexts(run: Path, *rows: tuple[float, float]) -> Path:
    evaluation = json.loads((run / "evaluation.json").read_text())
    contexts = [{"context_seconds": at, "bits_per_sample": bits, "whole": False} for at, bits in rows]
    contexts[-1]["whole"] = True
    evaluation["test"]["contexts"] = contexts
    write(run / "evaluation.json", evaluation)
    return without_samples(run)


def test_what_context_is_worth(run: Path) -> None:
    rows = [(1.0, 4.5), (8.0, 4.25), (60.0, 4.125), (60.032, 4.1234)]
    page = Page(build_report(with_contexts(run, *rows)))
    assert "What context is worth" in page.text["h2"]
    for words in ("Bits per sample on the test split, by context", "1 s 8 s 60 s 60.032 s (whole)"):
        assert words in page.words, words
    for cell in ("4.500", "+0.377", "4.250", "+0.127", "4.125", "+0.002", "4.123", "+0.000"):
        assert cell in page.text["td"].split(), cell
    # Below the loss curve's two, the line through the dots; from 1 to 8 is as far as from 8 to 64.
    x, y = zip(*points(curves(page)[2]), strict=True)
    assert (x[1] - x[0]) / (x[2] - x[1]) == pytest.approx(math.log(8) / math.log(7.5), rel=1e-3)
    assert (y[1] - y[0]) / (y[2] - y[1]) == pytest.approx(2, rel=1e-2)
    dots = [p["d"] for p in page.all("path") if p["class"] == "dot"][3:]
    assert dots == [f"M{a:.1f} {b:.1f}h.01" for a, b in zip(x, y, strict=True)]
    # 60 and 60.032 s would lie on one another.
    styles = [s["style"] for s in page.all("span") if s.get("class", "").startswith("x")][-3:]
    assert [float(style[len("left:") : -1]) for style in styles] == pytest.approx([a / 10 for a in x[:3]], abs=0.01)


@pytest.mark.parametrize("contexts", [None, [], [{"context_seconds": 1.0, "bits_per_sample": 4.0}], "many", [1, 2]])
def test_one_context_is_no_comparison(run: Path, contexts: object) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["test"]["contexts"] = contexts
    write(run / "evaluation.json", evaluation)
    assert "What context is worth" not in Page(build_report(without_samples(run))).words


def test_a_worse_model_is_called_worse(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["test"]["bits_per_sample"] = 5.5
    write(run / "evaluation.json", evaluation)
    words = Page(build_report(without_samples(run))).words
    assert "0.500 more than a Markov model, 1.900 less than the histogram entropy" in words


@pytest.mark.parametrize("dataset", ["beethoven", "youtubemix", "demo"])
def test_published_figures_stand_beside_the_same_data_set(run: Path, dataset: str) -> None:
    write(run / "config.json", {"name": "mine", "data": {"dataset": dataset}})
    words = Page(build_report(without_samples(run))).words
    assert ("as published" in words) == (dataset in PUBLISHED)
    for known, rows in PUBLISHED.items():
        assert all((bits in words) == (known == dataset) for bits in rows)


def test_what_comes_from_a_file_is_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name=HOSTILE, label=HOSTILE)
    for file in (
        "evaluation.json",
        "summary.json",
        "samples/samples.json",
        "sound.json",
        "nearest.json",
        "perceptual.json",
    ):
        # Every string that the page might show, and keys too.
        text = (run / file).read_text()
        for plain in ("best", "ema", "hub", "cpu", "level 0", "prepare", "python -m", "train"):
            text = text.replace(f'"{plain}', json.dumps(HOSTILE + plain)[:-1])
        (run / file).write_text(text)
    page = Page(build_report(run))
    assert len(page.all("script")) == 1
    assert "alert" not in page.text["script"]
    assert len(page.all("style")) == 1
    assert page.text["title"].strip() == f"{HOSTILE}: HarmonicRNN report"
    assert page.text["h1"].strip() == HOSTILE
    assert f"Prompt: {HOSTILE}/clip_2.wav" in page.words
    assert f"{HOSTILE}level 0" in page.words
    labels = {player["aria-label"] for player in page.all("audio")}
    assert labels == {HOSTILE, "sample 0000", "sample 0001", "Generated", "Held-out, test", "Nearest in training"}


def test_a_run_that_is_still_training(run: Path) -> None:
    for file in ("evaluation.json", "summary.json", "sound.json", "perceptual.json"):
        (run / file).unlink()
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write('{"kind": "train", "step": 310, "lo')  # being written
    page = Page(build_report(without_samples(run)))
    assert "This run has not been evaluated yet. Validation at step 300: 3.967 bits" in page.words
    assert "Nothing has been generated yet." in page.words
    assert not page.all("audio")
    (run / "metrics.jsonl").write_text("")
    assert "No training step has been logged yet." in Page(build_report(run)).words


def test_steps_that_a_resumed_run_logs_again_count_once(run: Path) -> None:
    lines = [(10, 8.0), (20, 7.0), (20, math.nan), (30, 6.0), (20, 5.0)]
    entries = [{"kind": "train", "step": step, "loss": loss} for step, loss in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = Page(build_report(without_samples(run)))
    heights = [y for _, y in points(curves(page)[0])]
    assert len(heights) == 3
    assert heights[0] < heights[2] < heights[1]  # 8, 6, 5 bits


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl"])
def test_a_needed_file_that_is_missing_is_named(run: Path, file: str) -> None:
    (run / file).unlink()
    with pytest.raises(UserError, match=re.escape(file)) as caught:
        build_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "file",
    [
        *("config.json", "metrics.jsonl", "evaluation.json", "summary.json", "samples/samples.json"),
        *("sound.json", "perceptual.json", "nearest.json"),
    ],
)
@pytest.mark.parametrize(("text", "line"), [('{\n"a": }\n', 2), ("\n[1]\n", 1)])
def test_a_corrupt_file_is_named_with_its_line(run: Path, file: str, text: str, line: int) -> None:
    if file == "metrics.jsonl":
        text, line = '{"kind": "train"}\n' + text.replace("\n", "") + "\n", 2
    (run / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{file}, line {line}: ")):
        build_report(run)


@pytest.mark.parametrize(
    "name",
    ["../config.json", "/etc/hostname", "a/b.wav", "..", "a\\b.wav", "", "a\0", None, 3],
)
def test_only_plain_names_inside_the_folder_are_read(run: Path, name: object) -> None:
    write(run / "samples" / "samples.json", {"samples": [{"kind": "real", "file": name}]})
    with pytest.raises(UserError, match=r"samples\.json names the file"):
        build_report(run)


@pytest.mark.parametrize("content", [None, b"not audio", b""])
def test_a_missing_or_broken_recording_is_named(run: Path, content: bytes | None) -> None:
    path = run / "samples" / "real_0001.wav"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"real_0001\.wav"):
        build_report(run)


@pytest.mark.parametrize("waveform", [np.zeros(16_000), sound(0.01, 500), sound(40, 300)])
def test_silent_short_and_long_recordings_can_be_drawn(run: Path, waveform: np.ndarray) -> None:
    audio.write_wav(run / "samples" / "a.wav", waveform)
    write(run / "samples" / "samples.json", {"samples": [{"kind": "other", "file": "a.wav"}]})
    page = Page(build_report(run))
    assert len(page.all("audio")) == len(page.all("img")) == 1 + 6
    assert f"{len(waveform) / 16_000:.2f} s" in page.words


def test_the_report_is_whole_or_absent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_report(without_samples(run))
    before = (run / "report.html").read_bytes()
    (run / "summary.json").unlink()

    def fail(*paths: object) -> None:
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError, match=r"cannot write .*report\.html: disk gone"):
            build_report(run)
    assert (run / "report.html").read_bytes() == before
    files = {"config.json", "evaluation.json", "metrics.jsonl", "perceptual.json", "report.html", "nearest"}
    assert {path.name for path in run.iterdir()} == files


def test_the_same_folder_gives_the_same_bytes(finished: Path) -> None:
    before = (finished / "report.html").read_bytes()
    assert build_report(str(finished)) == finished / "report.html"
    assert (finished / "report.html").read_bytes() == before
    assert not list(finished.glob("*.partial"))


@pytest.mark.parametrize("name", ["../config.json", "..", "", None])
def test_nearest_sounds_lie_in_their_own_folder(run: Path, name: object) -> None:
    found = json.loads((run / "nearest.json").read_text())
    found["generated"][0]["nearest_file"] = name
    write(run / "nearest.json", found)
    with pytest.raises(UserError, match=r"nearest\.json names the file .* run python -m workflows.nearest again"):
        build_report(run)


@pytest.mark.parametrize(
    "wrong", [{"groups": 3}, {"seconds": "many"}, {"groups": {"generated": 1}}, {"generated": [1]}]
)
def test_strange_findings_are_left_out(run: Path, wrong: dict[str, Any]) -> None:
    found = {**json.loads((run / "nearest.json").read_text()), **wrong}
    write(run / "nearest.json", found)
    write(run / "perceptual.json", {"generated": {"fid": "low"}, "rejected": None, "train": [1]})
    sound_of = json.loads((run / "sound.json").read_text())
    strange = {
        "share": "far",
        "drift": [{"start": 0}, 3],
        "longer": {"rows": [{}, 3]},
        "choice": {"rows": 1},
        "notes": 5,
        "seed": None,
    }
    rows = {"generated": {"distance": 10**400, "frames": "many"}, "train": [1], "white_noise": None}
    write(run / "sound.json", {**sound_of, **strange, "rows": rows})
    words = Page(build_report(run)).words
    assert "Perceptual figures" not in words and "Listening" in words
    assert (
        "How it sounds" in words
        and "of the way from recordings" not in words
        and "Drift" not in words
        and "Longer" not in words
    )
    write(run / "sound.json", {"choice": sound_of["choice"]})  # of a run that has only been chosen for
    words = Page(build_report(run)).words
    assert "Nearest: temperature 0.8" in words and "A frame has" not in words
    write(run / "sound.json", {**sound_of, "rows": 3, "choice": None})
    assert "How it sounds" not in Page(build_report(run)).words


def test_long_sounds_are_linked_to(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into the page is beside it; what fits is in it, though it comes later."""
    audio.write_wav(run / "samples" / "long one.wav", sound(20, 300))
    samples = json.loads((run / "samples" / "samples.json").read_text())
    samples["samples"].insert(0, {"kind": "sample", "file": "long one.wav"})
    write(run / "samples" / "samples.json", samples)
    whole = build_report(run).stat().st_size
    monkeypatch.setattr(SoundBudget.__init__, "__defaults__", (260_000,))
    page = Page(build_report(run))
    assert (run / "report.html").stat().st_size < whole - 260_000
    assert len(page.all("audio")) == 12
    assert [link["href"] for link in page.all("a")] == ["samples/long%20one.wav"]
    assert "Too long for this page:" in page.words
    assert len(page.all("img")) == 13  # its pictures are there


def test_a_run_made_step_by_step_says_how_to_make_it_again(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    del summary["command"]
    write(run / "summary.json", {**summary, "versions": {"jax": "0.10.2"}})
    manifest = {"dataset": "sc09", "source": "my sc09.zip", "fingerprint": "f" * 64, "window_length": 16_000}
    write(run / "manifest.json", {**manifest, "hop_length": 16_000, "trim_silence": 40.0, "loudness": None})
    words = Page(build_report(run)).words
    assert "python -m pipelines.prepare --dataset sc09 --source 'my sc09.zip'" in words
    assert "--window_length=16000 --hop_length=16000 --trim_silence=40.0" in words
    assert f"python -m workflows.full_run --config={run}/config.json --workdir={run}-again" in words
    assert f"the data set's fingerprint is {'f' * 64}; jax 0.10.2." in words

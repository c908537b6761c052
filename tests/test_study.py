"""Studies: what their configs are, what is said of their figures, and the page."""

import copy
import csv
import io
import json
import math

import jax
import numpy as np
import pytest
from browser import LOOK, Browser
from pages import Page, curves

from configs.ablations import SIZES, load_study, study_names
from harmonic import audio
from harmonic.config import Config, config_names, load_config
from harmonic.errors import UserError
from harmonic.models import make
from harmonic.models.costs import count
from harmonic.report.inputs import number
from harmonic.study.folder import write_study
from harmonic.study.plan import Published, Run, Study
from harmonic.study.results import findings, rows
from harmonic.study.tables import csv_text, markdown, tables

HOSTILE = "<script>alert('x')</script>|\"&amp; </style>"


# The configs.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["datasets", "embedding", "groups", "pooling", "recipe"])
def test_runs_of_a_study_differ_in_one_thing(name, size):
    study = load_study(name, size)
    assert name in study_names() and study.name == name
    parts = {
        "groups": {"model"},
        "pooling": {"model"},
        "embedding": {"model"},
        "datasets": {"data", "train", "evaluate"},
        "recipe": {"model", "data", "train"},
    }
    first, *others = (run.config for run in study.runs)
    for config in others:
        differing = {part for part in ("model", "data", "train", "evaluate", "mesh", "seed")
                     if getattr(config, part) != getattr(first, part)}  # fmt: skip
        assert differing and differing <= parts[name]
    assert len({run.config.name for run in study.runs}) == len(study.runs)


@pytest.mark.parametrize("size", SIZES)
def test_runs_of_the_recipe_see_as_many_samples(size):
    def samples(config):
        starts = [0, *(stage.start for stage in config.train.stages), config.train.steps]
        stages = [config.at(start) for start in starts[:-1]]
        each = [stage.train.global_batch_size * stage.data.window_length for stage in stages]
        return sum(n * (stop - start) for n, start, stop in zip(each, starts[:-1], starts[1:], strict=True))

    runs = {run.name: run.config for run in load_study("recipe", size).runs}
    for config in runs.values():
        assert samples(config) == pytest.approx(samples(runs["found"]), rel=1e-3)


def parameters(config):
    return count(jax.eval_shape(make(config.model).init, jax.random.key(0)))


def test_paper_sizes_have_the_published_parameters():
    """The exact counts that the paper's code gives; blocks are 36 however they are pooled."""
    for name in ("groups", "pooling", "embedding"):
        for run in load_study(name, "paper").runs:
            if run.published.parameters:
                assert parameters(run.config) == run.published.parameters
    pooling = {run.name: run.config for run in load_study("pooling", "paper").runs}
    without = 7_272_704 - 4_864
    assert parameters(pooling["none"]) == without
    assert parameters(pooling["one"]) == without + 2 * (2 * 128 + 128)
    for size, blocks in (("paper", 36), ("small", 10)):
        for run in load_study("pooling", size).runs:
            *outer, inner = run.config.model.level_blocks
            assert 2 * sum(outer) + inner == blocks
    assert pooling["one"].model.level_blocks == (12, 12) and pooling["one"].model.pool_factors == (2,)


def test_published_values():
    told = {
        name: {r.name: r.published.bits_per_sample for r in load_study(name, "small").runs} for name in study_names()
    }
    assert told["groups"] == {"dense": 1.956, "four": 1.848, "diagonal": 1.854}
    assert told["pooling"] == {"baseline": 1.854, "one": 1.853, "none": 1.852}
    assert told["embedding"] == {"sinusoidal": 1.854, "linear": None, "learned": None, "learned_dropout": None}
    assert told["datasets"] == {"sc09": 1.854, "beethoven": 0.915, "youtubemix": 1.324}


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("absent", "small", ["unknown study 'absent'", "groups"]),
        ("groups", "huge", ["unknown size 'huge'", "paper or small"]),
        ("absent.py", "small", ["absent.py does not exist"]),
        ("{place}/empty.py", "small", ["no get_study(size)"]),
        ("{place}/wrong.py", "small", ["returned int"]),
    ],
)
def test_a_study_that_is_none(tmp_path, name, size, words):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "wrong.py").write_text("def get_study(size): return 1")
    with pytest.raises(UserError) as caught:
        load_study(name.format(place=tmp_path), size)
    assert all(word in str(caught.value) for word in words)


def test_a_study_is_no_config():
    assert not [name for name in config_names() if "ablations" in name or name in study_names()]
    with pytest.raises(UserError, match=r"workflows\.ablate --study=groups"):
        load_config("ablations/groups")


@pytest.mark.parametrize(("names", "baseline"), [([], ""), (["a", "a"], ""), (["a/b"], ""), (["a"], "b")])
def test_a_study_needs_plain_names_and_a_baseline_of_its_own(names, baseline):
    with pytest.raises(UserError, match="study 's'"):
        Study("s", "S", "", "", baseline, tuple(Run(name, name, Config(), Published()) for name in names))


# What is said of the figures.


def result(seed, bits, **more):
    curve = [[step, 8 * math.exp(-step / 300) + bits] for step in range(60, 601, 60)]
    return {
        "seed": seed, "folder": f"run/seed_{seed}", "steps": 600, "validation": curve, "dataset": "sc09", "step": 600,
        "test_samples": 1_000, "bits_per_sample": bits, "markov_bits": 4.5, "best_validation": bits, "platform": "cpu",
        "parameters": 1_000, "trained_per_second": 50.0, "generated_per_second": 100.0, "perceptual": None,
        "clip": None, **more,
    }  # fmt: skip


def make_study(seeds=(0, 1), **runs):
    """A study of a baseline and runs (measured bits by seed, published bits)."""
    all_runs = {"base": ((3.0,) * len(seeds), 1.854), **runs}
    return {
        "study": "s", "size": "small", "title": "A study", "reproduces": "table 1", "note": "A note.",
        "kinds": ["harmonic_rnn"],
        "baseline": "base", "seeds": list(seeds), "command": "python -m workflows.ablate --study=s", "platform": "cpu",
        "runs": [
            {
                "name": name, "title": name.title(),
                "published": {"bits_per_sample": told, "epochs_per_hour": 10.0, "generated_per_second": 1_000},
                "results": [result(seed, bits) for seed, bits in zip(seeds, measured, strict=True)],
            }
            for name, (measured, told) in all_runs.items()
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("measured", "published", "verdict"),
    [
        ((3.1, 3.2), 1.956, "same direction"),
        ((2.9, 2.8), 1.956, "opposite direction"),
        ((3.1, 2.8), 1.956, "undecided: seeds differ in the sign"),
        ((3.1, 3.2), 1.853, "published as about equal"),
        ((3.001, 3.002), 1.853, "about equal, as published"),
        ((3.1, 3.2), None, ""),
    ],
)
def test_a_verdict_says_whether_the_paper_holds(measured, published, verdict):
    study = make_study(other=(measured, published))
    base, other = rows(study)
    assert base.gap is None and base.verdict == ""
    assert other.gap.mean == pytest.approx(np.mean(measured) - 3) and other.verdict == verdict
    (sentence,) = (line for line in findings(study) if line.startswith("Other"))
    assert (f"{verdict}." in sentence) if verdict else "ublished" not in sentence


def test_runs_are_compared_seed_by_seed():
    """A run that is better by the same in every seed is better for sure, however far the seeds lie apart."""
    study = make_study(other=((2.9, 4.9), 1.8))
    study["runs"][0]["results"][1]["bits_per_sample"] = 5.0
    other = rows(study)[1]
    assert (other.gap.low, other.gap.high) == pytest.approx((-0.1, -0.1))
    assert other.verdict == "same direction" and "2.000 bits apart" in " ".join(findings(study))


def test_one_seed_is_called_one_seed():
    assert "One seed each" in " ".join(findings(make_study(seeds=(0,), other=((3.1,), 1.956))))
    assert "One seed each" not in " ".join(findings(make_study(other=((3.1, 3.2), 1.956))))


def test_figures_are_marked_as_measured_or_published():
    study = make_study(other=((3.1, 3.3), 1.956))
    heard = {"step": 600, "generated": {"fid": 2.5, "is": 4.5}, "rejected": None}
    study["runs"][1]["results"][0]["perceptual"] = heard
    for seed in (0, 1):
        study["runs"][1]["results"][seed]["sound"] = {
            "share": 0.25 + seed,
            "distance": 4_000.0,
            "longer": {"away": 0.5},
        }
    study["runs"][0]["results"][0]["sound"] = {"share": None, "distance": None}
    for table in tables(study):
        assert all("easured" in head or "ublished" in head for head in table.head[1:] if head != "Direction")
    text = markdown(study)
    gap = "+0.200 (+0.100 to +0.300) | +0.102 | same direction |"
    assert f"| Other | 3.200 (3.100 to 3.300) | 1.956 | {gap}" in text
    assert "| Other | 2.50 | 4.50 |" in text and study["command"] in text
    lines = list(csv.DictReader(io.StringIO(csv_text(study))))
    assert [line["run"] for line in lines] == ["base", "base", "other", "other"]
    assert lines[2]["measured_bits_per_sample"] == "3.1" and lines[2]["published_bits_per_sample"] == "1.956"
    assert float(lines[2]["measured_difference"]) == pytest.approx(0.1) and lines[0]["measured_difference"] == ""
    assert lines[2]["measured_fid"] == "2.5" and lines[3]["measured_fid"] == ""
    assert "| Other | 0.75 (0.25 to 1.25) | 4,000 | 0.50 |" in text and "How it sounds: the Fréchet distance" in text
    assert lines[3]["measured_sound_share"] == "1.25" and lines[2]["measured_sound_distance"] == "4000"
    assert lines[0]["measured_sound_share"] == ""
    assert lines[2]["published_epochs_per_hour"] == "10" and lines[2]["state"] == "done"


def test_nothing_measured_is_nothing_said():
    study = make_study(other=((3.1, 3.3), 1.956))
    for run in study["runs"]:
        run["results"] = [{"seed": r["seed"], "folder": "f", "steps": 600, "validation": []} for r in run["results"]]
    assert "0 of 2 runs have been evaluated so far." in findings(study)
    assert [table.caption for table in tables(study)] == ["Test likelihood, bits per sample"]
    assert "to come" in csv_text(study)


# The page.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = make_study(first=((3.1, 3.2), 1.956), second=((2.9, 3.01), 1.848), third=((3.3, 3.4), None))
    clip = {"kind": "sample", "file": "sample_0000.wav", "bits_per_sample": 2.5}
    for run in study["runs"]:
        for one in run["results"]:
            one |= {"folder": f"{run['name']}/seed_{one['seed']}", "clip": clip}
            samples = folder / one["folder"] / "samples"
            samples.mkdir(parents=True)
            audio.write_wav(samples / "sample_0000.wav", 0.5 * np.sin(0.1 * np.arange(4_000)))
    failed = study["runs"][3]["results"][1]
    failed["error"] = f"it broke {HOSTILE}"
    write_study(folder, study)
    return folder


def test_the_page_says_what_the_study_found(finished):
    page = Page(finished / "study.html")
    assert "First: 0.150 bits above Base; published 0.102 above: same direction." in page.words
    assert f"it broke {HOSTILE}" in page.words and "alert" not in page.text.get("script", "")
    assert len(page.all("audio")) == 8 and len(curves(page)) == 8
    links = [a["href"] for a in page.all("a")]
    assert links[0] == "base/seed_0/report.html" and len(links) == 7  # not of the one that failed
    labels = [svg.get("aria-label", "") for svg in page.all("svg")]
    assert "First: measured +0.150, published +0.102" in labels and "Third: measured +0.350" in labels
    (policy,) = (m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_a_study_without_a_baseline_shows_its_runs_as_they_are(tmp_path):
    study = {**make_study(other=((1.0, 1.2), 0.915)), "baseline": ""}
    write_study(tmp_path, study)
    labels = [svg.get("aria-label", "") for svg in Page(tmp_path / "study.html").all("svg")]
    assert "Base: measured 3.000, published 1.854" in labels and "Other: measured 1.100, published 0.915" in labels
    assert "to the baseline" not in (tmp_path / "study.md").read_text()


def test_the_files_are_whole_and_the_same_again(finished, tmp_path):
    names = ["study.csv", "study.html", "study.json", "study.md"]
    assert sorted(path.name for path in finished.iterdir() if path.is_file()) == names
    before = {name: (finished / name).read_bytes() for name in names}
    study = json.loads(before["study.json"])
    write_study(finished, copy.deepcopy(study))
    assert {name: (finished / name).read_bytes() for name in names} == before
    study["runs"][0]["results"][0]["clip"]["file"] = "../secret.wav"
    with pytest.raises(UserError, match="not a plain name"):
        write_study(finished, study)
    assert {name: (finished / name).read_bytes() for name in names} == before


@pytest.mark.parametrize(("width", "dark"), [(1_200, False), (390, True), (320, False)])
def test_a_browser_shows_the_study(finished, chromium: Browser, tmp_path, width, dark):
    chromium.open(finished / "study.html", width=width, dark=dark)
    seen = chromium.evaluate(LOOK)
    assert seen["durations"] == pytest.approx([0.25] * 8, abs=0.01) and len(seen["pictures"]) == 8
    assert seen["overflow"] == 0 and seen["wide"] == []
    assert chromium.problems == []


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), True, "1", None, [1]], ids=range(8))
def test_what_is_not_a_finite_number_is_none(value):
    assert number({"a": {"b": value}}, "a", "b") is None and number({"a": {"b": 2}}, "a", "b") == 2.0

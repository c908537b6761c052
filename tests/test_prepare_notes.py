"""What prepare and inspect say of recordings that are read and are not as they should be, and of files left out."""

import functools
import io
import json

import numpy as np
import pytest
import soundfile
from archives import mine, wav, write_folder, write_zip
from mains import refused_main, run_main

from harmonic import audio, records
from pipelines import build, inspect, prepare
from pipelines.build import PrepareSpec
from pipelines.sources.layouts import DATA_SETS
from pipelines.sources.splits import split_by_hash


@pytest.fixture
def run(capsys):
    return functools.partial(run_main, capsys, prepare.main)


@pytest.fixture
def refused(capsys):
    return functools.partial(refused_main, capsys, prepare.main)


def test_notes_are_in_the_manifest_and_told_by_both_commands(run, capsys, tmp_path):
    files = mine() | {"short.wav": wav()[:-8], "0/notes.txt": b"text"}
    source = write_folder(tmp_path / "f", files)
    status, out, _ = run("--dataset", "mine", "--source", source, "--output_dir", tmp_path)
    manifest = records.load_manifest(tmp_path / "mine")
    split = split_by_hash([*mine(), "short.wav"])["short.wav"]
    assert manifest.noted == (records.Noted("short.wav", split, "is 8 bytes shorter than its header claims"),)
    assert manifest.left_out == (records.LeftOut("files of other kinds", 1, "0/notes.txt"),)
    lines = [
        f"noted short.wav ({split}): is 8 bytes shorter than its header claims",
        "left out: files of other kinds: 1 (0/notes.txt)",
    ]
    assert status == 0 and all(line in out.splitlines() for line in lines)
    _, shown, _ = run_main(capsys, inspect.main, tmp_path / "mine")
    assert all(line in shown.splitlines() for line in lines)
    _, shown, _ = run_main(capsys, inspect.main, tmp_path / "mine", "--format=json")
    assert json.loads(shown)["manifest"]["noted"][0]["recording"] == "short.wav"


def test_a_manifest_without_notes_has_the_text_that_it_had_before(tmp_path):
    build.prepare(PrepareSpec("mine", str(write_folder(tmp_path / "f", mine())), str(tmp_path)))
    raw = json.loads((tmp_path / "mine/manifest.json").read_text())
    assert list(raw)[-4:] == ["split_rule", "splits", "skipped", "checksum"]


def test_an_unreadable_recording_alone_in_its_split(run, refused, tmp_path):
    good = {f"{i}.wav": wav(2_000, seed=i) for i in range(5)}
    alone = next(
        name
        for name in (f"bad{i}.wav" for i in range(1_000))
        if list((splits := split_by_hash([*good, name])).values()).count(splits[name]) == 1
    )
    source = write_zip(tmp_path / "a.zip", good | {alone: b"no sound"})
    argv = ["--dataset", "mine", "--source", source, "--output_dir", tmp_path]
    assert "; give other recordings, or --allow_skipped to split the others anew" in refused(*argv)
    status, out, _ = run(*argv, "--allow_skipped")
    manifest = records.load_manifest(tmp_path / "mine")
    assert status == 0 and [s.recording for s in manifest.skipped] == [alone] and f"skipped {alone}" in out
    found = {
        row.id: name
        for name, part in manifest.splits.items()
        for shard in part.shards
        for row in records.read_index(tmp_path / "mine", shard)
    }
    assert found == split_by_hash(good)
    write_zip(source, {f"{i}.wav": b"no sound" for i in range(3)} | {"3.wav": wav(), "4.wav": wav()})
    assert "2 recordings can be read, and at least 3 are needed" in refused(*argv, "--allow_skipped", "--overwrite")


# Recordings without sound.

STEP = 1 / 32_768


def sound(samples, subtype="PCM_16"):
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV", subtype=subtype)
    return file.getvalue()


TONE = 0.2 * np.sin(np.arange(4_000) / 7)
SILENT = {
    "zeros.wav": (sound(np.zeros(4_000)), "holds no sound: all its samples are equal"),
    "constant.wav": (sound(np.full(4_000, 0.25)), "holds no sound: all its samples are equal"),
    "dither.wav": (sound(np.tile([0, STEP, 0, -STEP], 1_000)), "holds no sound: its peak is -90 dBFS"),
    "cancels.wav": (
        sound(np.stack([TONE, -TONE * (1 + 1e-6)], 1), "FLOAT"),
        "holds no sound: its peak is -1",
    ),
}


def tokens_of(folder):
    from harmonic.data import Dataset

    splits = [Dataset(folder).split(name) for name in records.SPLITS]
    return {row.id: split.read(i)[:, 0] for split in splits for i, row in enumerate(split.recordings)}


@pytest.mark.parametrize("options", [(), ("--loudness=-23",), ("--encoding=linear",)], ids=str)
def test_silence_is_told_and_is_the_level_of_zero(run, tmp_path, options):
    """Not a constant at full scale, nor rounding noise at full scale."""
    files = mine(4) | {name: data for name, (data, _) in SILENT.items()} | {"quiet.wav": sound(100 * STEP * TONE)}
    source = write_folder(tmp_path / "f", files)
    status, out, _ = run("--dataset", "mine", "--source", source, "--output_dir", tmp_path, *options)
    noted = {n.recording: n.note for n in records.load_manifest(tmp_path / "mine").noted}
    assert status == 0 and sorted(noted) == sorted(SILENT)
    zero = int(audio.encode(np.zeros(1), "linear" if "linear" in str(options) else "mu_law", low=-1, high=1)[0])
    tokens = tokens_of(tmp_path / "mine")
    for name, (_, note) in SILENT.items():
        assert noted[name].startswith(note) and f"noted {name} (" in out
        assert set(tokens[name].tolist()) == {zero}
    assert len(set(tokens["quiet.wav"].tolist())) > 5  # a quiet recording is none


def test_the_published_formula_stays(run, tmp_path):
    files = {f"beethoven/{i}.wav": wav(seed=i) for i in range(20)} | {"beethoven/3.wav": SILENT["zeros.wav"][0]}
    source = write_zip(tmp_path / "a.zip", files)
    status, out, _ = run("--dataset", "beethoven", "--source", source, "--output_dir", tmp_path)
    assert status == 0 and "noted 3.wav (train): holds no sound: all its samples are equal" in out
    assert set(tokens_of(tmp_path / "beethoven")["3.wav"].tolist()) == {0}


def test_the_published_data_sets_are_those_of_the_pipelines():
    assert {name for name, found in DATA_SETS.items() if found.repo} == set(audio.PUBLISHED)

"""What prepare and inspect say of recordings that are read and are not as they should be, and of files left out."""

import functools
import json

import pytest
from archives import mine, wav, write_folder, write_zip
from mains import refused_main, run_main
from prepared import TWO_PROCESSES

from harmonic import records
from pipelines import build, inspect, prepare
from pipelines.build import PrepareSpec
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
        "left out: 1 files of other kinds (0/notes.txt)",
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


@pytest.mark.parametrize("options", [(), TWO_PROCESSES])
def test_an_unreadable_recording_alone_in_its_split(run, refused, tmp_path, options):
    good = {f"{i}.wav": wav(2_000, seed=i) for i in range(5)}
    alone = next(
        name
        for name in (f"bad{i}.wav" for i in range(1_000))
        if list(splits := split_by_hash([*good, name]).values()).count(splits[name]) == 1
    )
    source = write_zip(tmp_path / "a.zip", good | {alone: b"no sound"})
    argv = ["--dataset", "mine", "--source", source, "--output_dir", tmp_path, *options]
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

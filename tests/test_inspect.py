"""Inspecting and verifying prepared data sets: figures by hand, sound back from them, every damaged byte found."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from archives import wav, write_folder
from mains import ROOT, refused_main, run_main
from memory_files import FILES
from prepared import read_folder

from harmonic import audio, records
from harmonic.errors import UserError
from pipelines import inspect
from pipelines.audio.waveform import measure
from pipelines.build import PrepareSpec, prepare
from pipelines.console import clock
from pipelines.inspection import survey
from pipelines.inspection.verify import Verifier

LENGTHS = [2_000, 350, 700, 1_401, 90, 3_000, 1_999, 640, 1_000, 777, 1_234, 20]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of several shards and records a recording, one recording skipped, and what it was made of."""
    folder = tmp_path_factory.mktemp("inspect")
    files = {f"a/{i:02d}.wav": wav(length, seed=i) for i, length in enumerate(LENGTHS)} | {"b/bad.wav": wav()[:-100]}
    spec = PrepareSpec(
        *("mine", str(write_folder(folder / "f", files)), str(folder)),
        **{"window_length": 500, "hop_length": 250, "record_length": 600, "num_shards": 2},
    )
    prepare(spec)
    return folder / "mine", files


@pytest.fixture
def copy(prepared, tmp_path):
    return Path(shutil.copytree(prepared[0], tmp_path / "copy"))


@pytest.fixture
def run(capsys):
    return functools.partial(run_main, capsys, inspect.main)


@pytest.fixture
def refused(capsys):
    return functools.partial(refused_main, capsys, inspect.main)


def problems(folder, manifest=None):
    found = []
    checked = Verifier(str(folder), manifest or records.load_manifest(folder), found.append).run()
    assert checked.problems == len(found) and all("\n" not in line for line in found)
    return found


def flip(path, place, bit=0x10):
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bit]))


# What is shown.


def test_figures_are_those_of_the_recordings(run, prepared):
    folder, files = prepared
    status, out, _ = run(folder, "--format=json")
    assert status == 0
    shown = json.loads(out)
    manifest = records.load_manifest(folder)
    assert shown["manifest"]["fingerprint"] == manifest.fingerprint
    waveforms = {name: audio.read_audio(io.BytesIO(data))[0] for name, data in files.items() if "bad" not in name}
    waveforms = {name.removeprefix("a/"): waveform for name, waveform in waveforms.items()}
    tokens = np.concatenate([audio.encode(waveform, "mu_law") for waveform in waveforms.values()])
    assert shown["survey"]["tokens"] == np.bincount(tokens, minlength=256).tolist()
    shares = np.bincount(tokens) / len(tokens)
    entropy = -sum(share * np.log2(share) for share in shares if share)
    assert shown["survey"]["entropy"] == pytest.approx(entropy)
    assert shown["survey"]["records"] == sum(-(-length // 600) for length in LENGTHS)
    levels = {name: 20 * np.log10(np.sqrt(np.mean(w.astype("f8") ** 2))) for name, w in waveforms.items()}
    by_level = sorted(levels, key=levels.get)
    assert [row["recording"] for row in shown["survey"]["quietest"]] == [f"a/{n}" for n in by_level[:5]]
    assert [row["recording"] for row in shown["survey"]["loudest"]] == [f"a/{n}" for n in by_level[::-1][:5]]
    assert shown["survey"]["loudest"][0]["level"] == pytest.approx(max(levels.values()), abs=0.006)
    for name, values in shown["survey"]["durations"].items():
        lengths = [row.length for shard in manifest.splits[name].shards for row in records.read_index(folder, shard)]
        assert values == [np.quantile(lengths, q, method="inverted_cdf") / 16_000 for q in survey.QUANTILES]


def test_text(run, prepared):
    folder, _ = prepared
    status, out, _ = run(folder)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"mine in {folder}: mu_law, 256 levels, 16,000 Hz, windows of 500 samples every 250"
    manifest = records.load_manifest(folder)
    train = manifest.splits["train"]
    row = next(line.split() for line in lines if line.startswith("train "))
    size = sum(shard.bytes + shard.index_bytes for shard in train.shards)
    assert row[1:] == [
        *(str(train.recordings), str(train.windows), f"{train.samples:,}", clock(train.samples / 16_000)),
        *(str(len(train.shards)), f"{size:,}", str(sum(s.split == "train" for s in manifest.skipped))),
    ]
    assert "durations" in out and "bits of entropy" in out and "loudest" in out and "quietest" in out
    assert re.search(r"^skipped b/bad.wav \(\w+\): is cut short", out, re.MULTILINE)


def test_a_histogram_as_text():
    assert survey.plot([0, 1, 2, 4], height=4) == ["   #", "   #", "  ##", " ###", "0  3"]
    lines = survey.plot(range(256))
    assert len(lines) == 9 and {len(line) for line in lines[:-1]} <= set(range(65)) and lines[-1] == f"0{255:>63}"


def test_only_some_records_of_a_large_data_set_are_read(prepared, monkeypatch):
    folder, _ = prepared
    manifest = records.load_manifest(folder)
    monkeypatch.setattr(survey, "_HISTOGRAM_RECORDS", 7)
    found = survey.survey(str(folder), manifest, lambda done, total: None)
    total = sum(shard.records for split in manifest.splits.values() for shard in split.shards)
    assert found.records == -(-total // -(-total // 7)) and 0 < sum(found.tokens) <= 600 * found.records


def test_clock():
    assert [clock(s) for s in (0, 59.5, 3_600, 360_001)] == ["0:00:00", "0:01:00", "1:00:00", "100:00:01"]
    assert clock(59.9996, 3) == "0:01:00.000" and clock(1.5, 3) == "0:00:01.500"


# Sound.


def test_windows_are_written_as_they_stand(run, prepared, tmp_path):
    folder, files = prepared
    status, out, _ = run(folder, "--play=6", "--output_dir", tmp_path / "listen", "--format=json")
    assert status == 0
    played = json.loads(out)["played"]
    assert len(played) == 6 == len(list((tmp_path / "listen").iterdir())) == len({row["file"] for row in played})
    for row in played:
        assert row["split"] == "train"
        whole = audio.read_audio(io.BytesIO(files[row["recording"]]))[0]
        decoded = audio.decode(audio.encode(whole, "mu_law"), "mu_law")
        start, length = round(row["start_seconds"] * 16_000), round(row["seconds"] * 16_000)
        assert start % 250 == 0 and 0 < length <= 500 and (length == 500 or start + length == len(whole))
        written, rate = soundfile.read(row["file"])
        assert rate == 16_000
        np.testing.assert_allclose(written, decoded[start : start + length], atol=1 / 32_000)
    total = records.load_manifest(folder).splits["test"].windows
    _, out, _ = run(folder, "--play=1000", "--split=test", "--output_dir", tmp_path / "all", "--format=json")
    assert len(json.loads(out)["played"]) == total


def test_a_whole_recording_is_written(run, refused, prepared, tmp_path):
    folder, files = prepared
    status, out, _ = run(folder, "--recording=a/05.wav", "--output_dir", tmp_path)
    assert status == 0 and out.splitlines()[-1] == f"{tmp_path}/a_05.wav  a/05.wav 0:00:00.000 - 0:00:00.188"
    whole = audio.read_audio(io.BytesIO(files["a/05.wav"]))[0]
    written, _ = soundfile.read(tmp_path / "a_05.wav")
    np.testing.assert_allclose(written, audio.decode(audio.encode(whole, "mu_law"), "mu_law"), atol=1 / 32_000)
    assert os.listdir(tmp_path) == ["a_05.wav"]


def test_names_cannot_leave_the_folder():
    for name in ("../../etc/passwd", "/etc/passwd", "..", "a/../../b.wav", "\0", ".hidden", "ü" * 300):
        plain = inspect._plain(name)
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,80}", plain), name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: DIR"),
        (["--play=-1"], "--play=-1 must be a number of windows, from 1 on"),
        (["--play=x"], "argument --play: invalid int value: 'x'"),
        (["--split=dev"], "argument --split: invalid choice: 'dev'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_bad_arguments(refused, prepared, argv, message):
    assert message in refused(*([prepared[0]] if argv else []), *argv)


def test_what_is_not_there(capsys, run, refused, prepared, tmp_path):
    assert "holds no data set: manifest.json is missing" in refused(tmp_path)
    folder = prepared[0]

    def error(*argv):
        assert inspect.main([str(folder), *argv, "--output_dir", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "has no recording c.wav; names are like a/" in error("--recording=c.wav")
    assert "recording b/bad.wav was skipped when the data set was prepared: it is cut short" in error(
        "--recording=b/bad.wav"
    )
    (tmp_path / "out").write_text("")
    assert re.fullmatch(r"error: cannot write to .*/out: .*, or give another --output_dir\n", error("--play=1"))


# Verification.


def test_a_whole_data_set_is_verified(run, prepared):
    folder, _ = prepared
    before = read_folder(folder)
    status, out, err = run(folder, "--verify")
    count = sum(-(-length // 600) for length in LENGTHS)
    files = len(before) - 2  # but for the manifest and the config
    assert (status, err) == (0, "") and out.splitlines()[-1] == (
        f"verified: {files} files, {count} records, {sum(LENGTHS):,} samples, all as they were written"
    )
    assert read_folder(folder) == before
    seen = []
    Verifier(str(folder), records.load_manifest(folder), print, lambda *progress: seen.append(progress)).run()
    assert seen == sorted(seen) and len(seen) > count and seen[-1][0] == seen[-1][1]
    shown = json.loads(run(folder, "--verify", "--format=json")[1])["verified"]
    assert shown == {"files": files, "records": count, "samples": sum(LENGTHS), "problems": []}


def test_each_damaged_record_is_named(capsys, copy):
    shard = max(records.load_manifest(copy).splits["train"].shards, key=lambda shard: shard.records)
    path = copy / shard.file
    data, places = path.read_bytes(), []
    rows = list(records.read_index(copy, shard))
    # Where the compressed records stand in the file, by what their bytes decode to when they are flipped there.
    for place in range(64, len(data), 90):
        if any(data[place : place + 90]):
            places.append(place)
    named = set()
    for place in places:
        flip(path, place)
        found = problems(copy)
        flip(path, place)
        assert found[0] == f"{shard.file} does not match its checksum"
        for line in found[1:]:
            match = re.fullmatch(
                rf"{shard.file}: record (\d+) \((a/\d\d\.wav) from sample (\d+)\) is damaged: .+"
                rf"|{shard.file} cannot be opened, nor any of its {shard.records} records: .+",
                line,
            )
            assert match, line
            if match[1]:
                named.add((int(match[1]), match[2], int(match[3])))
    expected = [(row.id, piece * 600) for row in rows for piece in range(row.records)]
    assert named == {(number, *where) for number, where in enumerate(expected)}
    flip(path, places[1])
    assert inspect.main([str(copy), "--verify"]) == 2
    out, err = capsys.readouterr()
    assert err == "" and re.fullmatch(
        r"damaged: [23] problems; whole are \d+ files, \d+ records, [\d,]+ samples", out.splitlines()[-1]
    )
    assert inspect.main([str(copy), "--verify", "--format=json"]) == 2
    assert json.loads(capsys.readouterr().out)["verified"]["problems"] == problems(copy)


def every_flip(copy, name, places, manifest=None):
    path = copy / name
    before = path.read_bytes()
    for place in places:
        flip(path, place, 1 << place % 8)
        try:
            assert any(line.startswith(name) for line in problems(copy, manifest)), place
        except UserError as error:
            assert name == "manifest.json" and "manifest.json cannot be read" in str(error)
        else:
            assert name != "manifest.json"
        flip(path, place, 1 << place % 8)
    assert path.read_bytes() == before and problems(copy, manifest) == []


def test_every_flipped_byte_is_found(copy):
    """All of the manifest and the indices; of the shards, which are mostly padding, one in a few hundred."""
    for name, data in read_folder(copy).items():
        if name != "config.py":
            step = 2_039 if name.endswith(".array_record") else 7
            every_flip(copy, name, range(0, len(data), step))


@pytest.mark.slow
def test_every_flipped_byte_is_found_of_all(tmp_path):
    files = {f"{i}.wav": wav(900, seed=i) for i in range(3)}
    spec = PrepareSpec("mine", str(write_folder(tmp_path / "f", files)), str(tmp_path), record_length=600)
    prepare(spec)
    manifest, whole = records.load_manifest(spec.folder), read_folder(spec.folder)
    for split, part in manifest.splits.items():
        only = dataclasses.replace(manifest, splits={split: part})
        (shard,) = part.shards
        folder = write_folder(tmp_path / split, {name: whole[name] for name in (shard.file, shard.index_file)})
        for name in (shard.file, shard.index_file):
            every_flip(folder, name, range(len(whole[name])), only)


def test_files_that_are_missing_cut_superfluous_or_swapped(copy, tmp_path):
    manifest = records.load_manifest(copy)
    first, second = manifest.splits["train"].shards
    whole = read_folder(copy)

    def damaged(change):
        change()
        found = problems(copy)
        shutil.rmtree(copy)
        write_folder(copy, whole)
        assert problems(copy) == []
        return found

    def swap(left, right):
        names = [copy / left, copy / right, copy / "between"]
        for source, target in ((0, 2), (1, 0), (2, 1)):
            names[source].rename(names[target])

    for shard in (first, second):
        assert damaged((copy / shard.file).unlink) == [f"{shard.file} is missing"]
        assert damaged((copy / shard.index_file).unlink) == [f"{shard.index_file} is missing"]
    for size in (0, 10, first.bytes // 2, first.bytes - 1):
        found = damaged(lambda size=size: os.truncate(copy / first.file, size))
        assert found[0] == f"{first.file} has {size} bytes, not the {first.bytes} of the manifest"
    found = damaged(lambda: os.truncate(copy / first.index_file, first.index_bytes - 1))
    assert found == [
        f"{first.index_file} has {first.index_bytes - 1} bytes, not the {first.index_bytes} of the manifest"
    ]
    for extra in ("train-00002-of-00003.array_record", "mine.recordings.jsonl", "_partial-" + "0" * 32):
        assert damaged((copy / extra).touch) == [f"{extra} is superfluous: the manifest does not list it"]
    assert damaged((copy / "notes.txt").touch) == []
    found = damaged(lambda: swap(first.file, second.file))
    for shard in (first, second):
        assert f"{shard.file} does not match its checksum" in found
        assert any(line.startswith(f"{shard.file}: record 0 (") and "not" in line for line in found)
    found = damaged(lambda: swap(first.index_file, second.index_file))
    assert {line.split()[0] for line in found} == {first.index_file, second.index_file}
    with pytest.raises(UserError, match="there is no data set in"):
        damaged((copy / "manifest.json").unlink)


def test_what_the_checksums_cannot_tell(copy):
    """A data set whose files match their checksums, and that still is not what its manifest and indices say."""
    manifest = records.load_manifest(copy)
    shard = manifest.splits["train"].shards[0]
    index = (copy / shard.index_file).read_bytes()
    rows = [json.loads(line) for line in index.splitlines()]
    name = rows[0]["id"]

    def forged(shard_changes=None, split_changes=None, **row_changes):
        lines = [json.dumps(rows[0] | row_changes), *(json.dumps(row) for row in rows[1:])]
        data = "".join(f"{line}\n" for line in lines).encode()
        (copy / shard.index_file).write_bytes(data)
        raw = json.loads(manifest.to_json())
        raw["splits"]["train"] |= split_changes or {}
        raw["splits"]["train"]["shards"][0] |= {
            **{"index_bytes": len(data), "index_sha256": hashlib.sha256(data).hexdigest()},
            **(shard_changes or {}),
        }
        splits = {
            of: records.Split(**(split | {"shards": tuple(records.Shard(**one) for one in split["shards"])}))
            for of, split in raw["splits"].items()
        }
        (copy / "manifest.json").write_text(dataclasses.replace(manifest, splits=splits).to_json())
        return "\n".join(problems(copy))

    assert forged() == ""
    assert f"record 0 ({name} from sample 0) is damaged: its label is None, not one" in forged(label="one")
    assert "its recording is a/" in forged(id="a/99.wav")
    assert "its recording_length is" in forged(length=rows[0]["length"] + 1)
    assert f"{shard.index_file}: {name} has {rows[0]['records'] + 9} records for" in forged(
        records=rows[0]["records"] + 9
    )
    assert f"{shard.index_file}: " in forged(records=10**15)
    assert "not the 999 of the manifest" in forged({"samples": 999})
    assert "not the 999999 of the manifest" in forged({"longest": 999_999})
    assert "manifest.json: train has 1 windows, its shards" in forged(None, {"windows": 1})
    assert f"{shard.file} has {shard.records} records, not the 99 of the manifest" in forged({"records": 99})


def test_a_remote_data_set(run, copy, tmp_path):
    FILES.clear()
    try:
        remote = "memory://bucket/mine"
        FILES.update({f"{remote}/{name}": data for name, data in read_folder(copy).items()})
        local, away = (run(folder, "--format=json")[1] for folder in (copy, remote))
        assert json.loads(away)["survey"] == json.loads(local)["survey"]
        assert run(remote, "--verify", "--play=2", "--output_dir", tmp_path / "listen")[0] == 0
        assert len(os.listdir(tmp_path / "listen")) == 2
        shard, other = records.load_manifest(copy).splits["train"].shards
        data = bytearray(FILES[f"{remote}/{shard.file}"])
        data[len(data) // 3] ^= 1
        FILES[f"{remote}/{shard.file}"] = bytes(data)
        del FILES[f"{remote}/{other.index_file}"]
        found = []
        Verifier(remote, records.load_manifest(copy), found.append).run()
        assert found[0] == f"{shard.file} does not match its checksum" and f"{other.index_file} is missing" in found
    finally:
        FILES.clear()


def test_command_line(prepared):
    command = [sys.executable, "-m", "pipelines.inspect", str(prepared[0])]
    done = subprocess.run([*command, "--verify"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "verified: " in done.stdout
    code = "import sys, pipelines.inspect; print(sorted({'jax', 'grain', 'apache_beam'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_a_wav_cannot_hold_becomes_rf64(run, prepared, tmp_path, monkeypatch):
    """4 GiB of samples are too many to write here: the limit is lowered instead."""
    options = (prepared[0], "--recording", "a/05.wav", "--output_dir")
    assert run(*options, tmp_path / "wav")[0] == 0
    monkeypatch.setattr(inspect, "_LARGEST_WAV", 100)
    assert run(*options, tmp_path / "rf64")[0] == 0
    (short,), (long,) = ((tmp_path / kind).iterdir() for kind in ("wav", "rf64"))
    assert (soundfile.info(short).format, soundfile.info(long).format) == ("WAV", "RF64")
    assert long.read_bytes()[:4] == b"RF64"
    np.testing.assert_array_equal(soundfile.read(long)[0], soundfile.read(short)[0])
    with open(long, "rb") as file, measure(file) as waveform:  # which reads it as a source, too
        assert waveform.length == len(soundfile.read(short)[0])

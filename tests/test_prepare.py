"""Preparing whole data sets: the library function, the command line, runners, options, what stands there already."""

import functools
import hashlib
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from archives import beethoven, mine, sc09, wav, write_folder, write_zip
from hub_server import Hub, hub_environment
from mains import ROOT, refused_main, run_main
from prepared import TWO_PROCESSES, read_folder, shards_of, subprocess_of

from harmonic import audio, records
from harmonic import loudness as levels
from pipelines import build, prepare
from pipelines.beam import graph
from pipelines.build import PrepareSpec


@pytest.fixture
def run(capsys):
    return functools.partial(run_main, capsys, prepare.main)


@pytest.fixture
def refused(capsys):
    return functools.partial(refused_main, capsys, prepare.main)


# What comes out.


def test_published_layouts(run, tmp_path):
    for name, files, counts in (
        ("sc09", sc09(), (9, 1, 2)),
        ("beethoven", beethoven(), (17, 1, 2)),
        ("youtubemix", {f"youtube_mix/out{i:03d}.wav": wav() for i in range(20)}, (17, 1, 2)),
    ):
        status, out, _ = run(
            "--dataset", name, "--source", write_zip(tmp_path / "a.zip", files), "--output_dir", tmp_path
        )
        assert status == 0
        manifest = records.load_manifest(tmp_path / name)
        assert tuple(split.recordings for split in manifest.splits.values()) == counts
        assert manifest.encoding == ("linear" if name == "beethoven" else "mu_law")
        assert manifest.window_length == {"sc09": 16_000, "beethoven": 128_000, "youtubemix": 960_512}[name]
        assert [line.split()[:2] for line in out.splitlines()[3:6]] == [
            [split, str(count)] for split, count in zip(records.SPLITS, counts, strict=True)
        ]


def test_every_recording_is_there_as_quantised_by_hand(tmp_path):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    files = sc09()
    spec = PrepareSpec("sc09", str(write_folder(tmp_path / "f", files)), str(tmp_path / "out"), record_length=300)
    manifest = build.prepare(spec)
    seen = {}
    for split in manifest.splits.values():
        assert split.samples == sum(shard.samples for shard in split.shards)
        for shard in split.shards:
            source = ArrayRecordDataSource(str(Path(spec.folder) / shard.file))
            pieces = [records.decode_record(source[i]) for i in range(len(source))]
            assert len(pieces) == shard.records
            for row in records.read_index(spec.folder, shard):
                own = [piece for piece in pieces if piece.recording == row.id]
                assert [piece.offset for piece in own] == list(range(0, row.length, 300))
                assert {piece.label for piece in own} == {row.label} == {row.id.split("/")[0]}
                seen[row.id] = np.concatenate([piece.tokens for piece in own])[:, 0]
    assert len(seen) == 12
    for name, tokens in seen.items():
        waveform, _ = audio.read_audio(io.BytesIO(files[f"sc09/{name}"]))
        np.testing.assert_array_equal(tokens, audio.encode(waveform, "mu_law"))


def test_options_of_the_data_set(run, tmp_path):
    source = write_folder(tmp_path / "f", mine())
    assert run(
        *("--dataset", "mine", "--source", source, "--output_dir", tmp_path, "--encoding", "linear"),
        *("--num_levels", 1024, "--window_length", 1000, "--record_length", 500, "--num_shards", 3),
    )[0] == 0  # fmt: skip
    manifest = records.load_manifest(tmp_path / "mine")
    assert (manifest.encoding, manifest.num_levels, manifest.token_dtype) == ("linear", 1024, "uint16")
    assert (manifest.window_length, manifest.record_length) == (1000, 500)
    assert sum(split.recordings for split in manifest.splits.values()) == 12
    assert len(manifest.splits["train"].shards) in (2, 3)
    # Rates of 8, 16 and 24 kHz, 2,000 samples each: 4,000, 2,000 and 1,333 or 1,334 at 16 kHz.
    assert abs(sum(split.samples for split in manifest.splits.values()) - 4 * (4_000 + 2_000 + 1_333.3)) < 4


def test_the_same_bytes_from_zip_and_folder_and_two_processes(tmp_path):
    files = {f"tape/{name}": data for name, data in mine(30).items()} | {"tape/0/bad.wav": wav()[:500]}
    archive, folder = write_zip(tmp_path / "a.zip", files), write_folder(tmp_path / "f", files)
    outputs = []
    for i, (source, options) in enumerate(
        [(archive, ()), (folder, ()), (folder, ()), (archive, TWO_PROCESSES), (archive, ())]
    ):
        spec = PrepareSpec("mine", str(source), str(tmp_path / str(i)), num_shards=4)
        manifest = build.prepare(spec, options)
        outputs.append((manifest, shards_of(spec.folder)))
        assert manifest == records.load_manifest(spec.folder)
        assert [s.recording for s in manifest.skipped] == ["tape/0/bad.wav"]
    assert len(outputs[0][1]) > 8
    for _, shards in outputs[1:]:
        assert shards == outputs[0][1]
    assert outputs[0][0] == outputs[3][0] == outputs[4][0]  # of the same source, the manifest as well
    assert outputs[0][0].splits == outputs[1][0].splits


def test_demo_needs_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("--dataset", "demo")
    assert status == 0 and out.startswith("demo in data/demo: mu_law, 256 levels, 16,000 Hz")
    assert sum(s.recordings for s in records.load_manifest(tmp_path / "data/demo").splits.values()) == 96


# Options.


def all_recordings(folder):
    manifest = records.load_manifest(folder)
    return {
        row.id: (split, row)
        for split, part in manifest.splits.items()
        for shard in part.shards
        for row in records.read_index(folder, shard)
    }


def splits_of(folder):
    return {name: split for name, (split, _) in all_recordings(folder).items()}


def test_windows_are_counted_with_the_hop(run, tmp_path):
    source = write_folder(tmp_path / "f", mine())
    for hop in (400, 1_000, 1_700):
        argv = ["--dataset", "mine", "--source", source, "--output_dir", tmp_path / str(hop), "--window_length", 1_000]
        status, out, _ = run(*argv, "--hop_length", hop)
        assert status == 0 and (f"windows of 1,000 samples every {hop:,}" in out) == (hop != 1_000)
        manifest = records.load_manifest(tmp_path / str(hop) / "mine")
        assert manifest.hop_length == hop
        for name, split in manifest.splits.items():
            lengths = [row.length for of, row in all_recordings(tmp_path / str(hop) / "mine").values() if of == name]
            starts = [s for n in lengths for s in range(0, n, hop) if s == 0 or s - hop + 1_000 < n]
            assert split.windows == len(starts)


def test_splits_by_shares(run, tmp_path):
    """Most of the recordings, then all of them: no recording changes its split, and none is in two."""
    files, argv = mine(60), ["--dataset", "mine", "--output_dir", tmp_path, "--source", tmp_path / "f"]
    write_folder(tmp_path / "f", dict(list(files.items())[:50]))
    assert run(*argv, "--splits=0.5,0.2,0.3")[0] == 0
    before = splits_of(tmp_path / "mine")
    write_folder(tmp_path / "f", files)
    assert run(*argv, "--splits=0.5,0.2,0.3", "--overwrite")[0] == 0
    after = splits_of(tmp_path / "mine")
    assert len(after) == 60 and before.items() <= after.items()
    # The number that the name's SHA-256 is, by hand.
    number = int(hashlib.sha256(b"0/0.wav").hexdigest()[:16], 16) / 2**64
    assert after["0/0.wav"] == ("train" if number < 0.5 else "validation" if number < 0.7 else "test")
    counts = [sum(split == name for split in after.values()) for name in records.SPLITS]
    assert 20 <= counts[0] <= 40 and counts[1] >= 4 and counts[2] >= 8
    # The default shares are the default.
    run(*argv, "--overwrite")
    default = read_folder(tmp_path / "mine")
    assert run(*argv, "--splits=0.88,0.06,0.06")[0] == 0
    assert run(*argv, "--splits=0.88,0.06,0.06", "--overwrite")[0] == 0 and read_folder(tmp_path / "mine") == default


def test_a_small_collection_has_all_splits(run, tmp_path):
    for count in (3, 4, 5):
        source = write_folder(tmp_path / str(count), mine(count))
        argv = ["--dataset", "mine", "--source", source, "--output_dir", tmp_path / f"{count}o"]
        assert run(*argv, "--splits", "0.98,0.01,0.01")[0] == 0
        assert sorted(set(splits_of(tmp_path / f"{count}o/mine").values())) == ["test", "train", "validation"]


def test_splits_by_lists(run, refused, tmp_path):
    source, lists = write_folder(tmp_path / "f", mine()), {}
    for name, text in (("v", "./0/0.wav\n1/1.wav\n\n"), ("t", "2/2.wav\r\n0/3.wav"), ("t2", "2/2.wav"), ("none", "\n")):
        lists[name] = tmp_path / name
        lists[name].write_bytes(text.encode())
    argv = ["--dataset", "mine", "--source", source, "--output_dir", tmp_path]
    both = ["--validation_list", lists["v"], "--test_list", lists["t"]]
    status, out, _ = run(*argv, *both)
    assert status == 0 and "splits by lists" in out
    found = splits_of(tmp_path / "mine")
    assert {name for name in found if found[name] == "validation"} == {"0/0.wav", "1/1.wav"}
    assert {name for name in found if found[name] == "test"} == {"2/2.wav", "0/3.wav"} and len(found) == 12
    assert run(*argv, *both)[0] == 0
    other = ["--validation_list", lists["v"], "--test_list", lists["t2"]]
    assert "split_rule lists" in refused(*argv, *other)
    (tmp_path / "absent").write_text("0/0.wav\n7/7.wav\n8/8.wav\n")
    (tmp_path / "every").write_text("\n".join(set(found) - {"0/0.wav", "1/1.wav"}))
    for flags, message in (
        (both[:2], "--validation_list is given without --test_list; every data set has both splits"),
        ([*both[:2], "--test_list", tmp_path / "gone"], "gone cannot be read: No such file or directory; give a text"),
        ([*both[:2], "--test_list", lists["none"]], "none names no recordings; every split needs at least one"),
        ([*both[:2], "--test_list", lists["v"]], "0/0.wav is in both"),
        (
            [*both[2:], "--validation_list", tmp_path / "absent"],
            "names 2 recordings that are not there, 7/7.wav the first",
        ),
        ([*both[:2], "--test_list", tmp_path / "every"], "the validation and test lists name every recording"),
        ([*both, "--splits", "0.8,0.1,0.1"], "are two ways to split; give one of them"),
    ):
        assert message in refused(*argv[:-1], tmp_path / "new", *flags)
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]


def test_published_splits_stay(refused, tmp_path):
    source = write_zip(tmp_path / "a.zip", beethoven())
    line = refused("--dataset", "beethoven", "--source", source, "--splits", "0.8,0.1,0.1", "--output_dir", tmp_path)
    assert line.startswith(
        "error: beethoven has its own splits, which its published figures are for: leave out --splits"
    )


def test_trimming_and_loudness(tmp_path):
    """As librosa and the levels by hand, the same bytes on two processes, each option another data set to train on."""
    files = {}
    for i in range(6):
        noise = np.random.default_rng(i).normal(0, 0.01 * (i + 1), 12_000)
        file = io.BytesIO()
        soundfile.write(file, np.concatenate([np.zeros(5_000), noise, np.zeros(7_000)]), 16_000, "FLOAT", format="WAV")
        files[f"{i}.wav"] = file.getvalue()
    source = str(write_folder(tmp_path / "f", files))
    manifests = []
    for number, (options, more) in enumerate(
        [((), {}), ((), {"trim_silence": 30}), ((), {"trim_silence": 30, "loudness": -23}), (TWO_PROCESSES, {})]
    ):
        more = more or ({"trim_silence": 30, "loudness": -23} if options else {})
        manifests.append(build.prepare(PrepareSpec("mine", source, str(tmp_path / str(number)), **more), options))
    assert manifests[3] == manifests[2] and read_folder(tmp_path / "3/mine") == read_folder(tmp_path / "2/mine")
    assert len({manifest.fingerprint for manifest in manifests}) == 3
    assert [(m.trim_silence, m.loudness) for m in manifests[:3]] == [(None, None), (30.0, None), (30.0, -23.0)]
    for i, (_, row) in enumerate(sorted(all_recordings(tmp_path / "2/mine").values(), key=lambda of: of[1].id)):
        whole = audio.read_audio(io.BytesIO(files[row.id]))[0]
        kept, (start, stop) = librosa.effects.trim(whole, top_db=30)
        assert (row.length, row.cut_front, row.cut_back) == (len(kept), start, 24_000 - stop)
        assert 1 / row.high == pytest.approx(
            levels.gain(lambda kept=kept: iter([kept]), abs(kept).max(), -23), rel=1e-3
        )
        assert row.level == pytest.approx(20 * np.log10(0.01 * (i + 1)) + 10 * np.log10(12_000 / len(kept)), abs=0.2)


@pytest.mark.parametrize("options", [{}, {"loudness": -30}, {"trim_silence": 40}, {"encoding": "linear"}], ids=str)
def test_a_prompt_is_scaled_as_the_recordings_are(tmp_path, options):
    """As a prompt, a recording has the tokens that it was prepared to: whole, or its beginning."""
    from harmonic.data import Dataset
    from harmonic.voice import Codec

    files = {f"{i}.wav": wav(9_000, seed=i) for i in range(3)}
    late = np.concatenate([np.zeros(8_000), 0.3 * np.sin(np.arange(20_000) / 9) + 0.1]).astype("f4")
    for name, samples, rate, format in (
        ("late.wav", late, 16_000, "WAV"),
        ("stereo.wav", np.stack([late, late**2], 1), 44_100, "WAV"),
        ("late.mp3", late, 44_100, "MP3"),
        ("late.flac", late, 22_050, "FLAC"),
        ("silence.wav", 0 * late, 16_000, "WAV"),
        ("constant.wav", 0 * late + 0.25, 16_000, "WAV"),
    ):
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format=format)
        files[name] = file.getvalue()
    source = write_folder(tmp_path / "f", files)
    spec = PrepareSpec("mine", str(source), str(tmp_path), **options)
    build.prepare(spec)
    dataset, seen = Dataset(spec.folder), set()
    for name in records.SPLITS:
        split = dataset.split(name)
        codec = Codec.of(split.manifest)
        for i, recording in enumerate(split.recordings):
            path, tokens = source / recording.id, split.read(i)
            np.testing.assert_array_equal(codec.prompt(path, resample=True), tokens, recording.id)
            part = codec.prompt(path, resample=True, seconds=0.25)
            np.testing.assert_array_equal(part, tokens[:4_000], recording.id)
            if recording.source_rate == 16_000:
                np.testing.assert_array_equal(codec.prompt(audio.read_audio(path)[0]), tokens)
            seen.add(recording.id)
    assert seen == set(files)


# The config of one's own.


def test_a_config_is_written_that_trains_at_once(run, tmp_path, monkeypatch):
    from harmonic.config import load_config
    from harmonic.data import Dataset, train_batches

    monkeypatch.chdir(tmp_path)
    source = write_folder(tmp_path / "f", mine())
    argv = ["--dataset", "mine", "--source", source]
    flags = ["--encoding", "linear", "--num_levels", 1024, "--window_length", 1_500, "--hop_length", 500]
    status, out, _ = run(*argv, *flags)
    assert status == 0
    assert out.splitlines()[-1] == "train on it: python -m workflows.train --config=data/mine/config.py"
    text = (tmp_path / "data/mine/config.py").read_text()
    assert max(map(len, text.splitlines())) <= 120
    config = load_config("data/mine/config.py")
    assert (config.name, config.data.dataset, config.data.encoding, config.data.num_levels) == (
        *("mine", "mine", "linear"),
        1024,
    )
    assert (config.data.window_length, config.data.hop_length) == (128, 0)  # short ones, whatever the data set's are
    batch = next(train_batches(Dataset("data/mine"), config))
    assert batch["tokens"].shape == (config.train.global_batch_size, 128, 1) and batch["tokens"].max() > 255
    # Longer at the end, but no longer than the recordings are.
    stages = config.train.stages
    assert [(stage.window_length, stage.global_batch_size) for stage in stages] == [(256, 8), (1_024, 2)]
    assert 0 < stages[0].start < stages[1].start < config.train.steps
    short = {f"s/{i}.wav": wav(500, seed=i) for i in range(3)}
    assert run("--dataset", "short", "--source", write_folder(tmp_path / "s", short), "--output_dir", "other")[0] == 0
    first, last = load_config("other/short/config.py").train.stages
    assert first.window_length == 256 < last.window_length <= 500


@pytest.mark.slow
def test_the_printed_command_trains(tmp_path):
    source = write_folder(tmp_path / "f", mine())
    process = subprocess_of("--dataset", "mine", "--source", source, "--output_dir", tmp_path / "d", "--loudness=-23")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    command = shlex.split(out.splitlines()[-1].removeprefix("train on it: "))
    command = [sys.executable, *command[1:], "--set=train.steps=2", f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "trained to step 2, best validation" in done.stdout, done.stderr


def test_the_config_is_made_again_unless_somebody_changed_it(run, refused, tmp_path):
    source = write_folder(tmp_path / "f", mine())
    argv = ["--dataset", "mine", "--source", source, "--output_dir", tmp_path]
    _, out, _ = run(*argv)
    path, last = tmp_path / "mine/config.py", out.splitlines()[-1]
    assert last == f"train on it: python -m workflows.train --config={path} --data_dir={tmp_path}"
    first = path.read_bytes()
    path.unlink()
    assert run(*argv)[1] == out and path.read_bytes() == first
    assert run(*argv, "--overwrite")[1] == out and path.read_bytes() == first
    assert run(*argv, "--overwrite", "--num_levels", 500)[0] == 0
    assert b"num_levels=500," in path.read_bytes()
    path.write_bytes(path.read_bytes() + b"# mine\n")
    assert run(*argv, "--overwrite", "--num_levels", 900)[0] == 0
    assert path.read_bytes().endswith(b"# mine\n") and b"num_levels=500," in path.read_bytes()
    # Of a published one there is none; configs/ has it.
    assert run(
        "--dataset", "beethoven", "--source", write_zip(tmp_path / "b.zip", beethoven()), "--output_dir", tmp_path
    )
    assert not (tmp_path / "beethoven/config.py").exists()


def test_what_stands_whole_needs_no_source(run, refused, tmp_path):
    source = write_folder(tmp_path / "f", mine())
    argv = ["--dataset", "mine", "--output_dir", tmp_path]
    options = ["--window_length", 900, "--trim_silence", 50, "--splits", "0.6,0.2,0.2"]
    status, out, _ = run(*argv, "--source", source, *options)
    assert status == 0
    (source / "0/0.wav").unlink()
    assert run(*argv) == (0, out, "") and run(*argv, *options) == (0, out, "")
    assert "trim_silence 50.0, not 40.0" in refused(*argv, "--trim_silence", 40)
    assert "give --source" in refused(*argv, "--overwrite")


# What stands there already.


def test_a_whole_data_set_is_left_alone(tmp_path, monkeypatch):
    spec = PrepareSpec("mine", str(write_folder(tmp_path / "f", mine())), str(tmp_path))
    manifest = build.prepare(spec)
    monkeypatch.setattr(graph, "run", None)
    assert build.prepare(spec) == manifest


def test_a_lost_shard_is_made_again(tmp_path):
    spec = PrepareSpec("mine", str(write_folder(tmp_path / "f", mine())), str(tmp_path))
    build.prepare(spec)
    before = read_folder(spec.folder)
    (tmp_path / "mine" / next(name for name in before if name.endswith(".array_record"))).unlink()
    build.prepare(spec)
    assert read_folder(spec.folder) == before


def test_another_data_set_is_not_taken_for_it(refused, run, tmp_path):
    source = write_folder(tmp_path / "f", mine())
    argv = ["--dataset", "mine", "--source", source, "--output_dir", tmp_path]
    assert run(*argv)[0] == 0
    before = read_folder(tmp_path / "mine")
    for more, difference in (
        (["--encoding", "linear"], "encoding mu_law, not linear"),
        (["--num_levels", 16], "num_levels 256, not 16"),
        (["--window_length", 10], "window_length 128000, not 10"),
        (["--record_length", 10], "record_length 131072, not 10"),
        (["--hop_length", 10], "hop_length 128000, not 10"),
        (["--trim_silence", 40], "trim_silence none, not 40.0"),
        (["--loudness", -23], "loudness none, not -23.0"),
        (["--splits", "0.8,0.1,0.1"], "split_rule default, not hash 0.8,0.1,0.1"),
    ):
        line = refused(*argv, *more)
        assert f"holds a data set with {difference}; give --overwrite to replace it, or another --output_dir" in line
    (source / "0/0.wav").write_bytes(wav(seed=99))
    assert "holds a data set with other recordings (source" in refused(*argv)
    assert read_folder(tmp_path / "mine") == before
    assert run(*argv, "--overwrite", "--num_levels", 16)[0] == 0
    assert records.load_manifest(tmp_path / "mine").num_levels == 16


def test_a_damaged_manifest_wants_overwrite(refused, run, tmp_path):
    argv = ["--dataset", "mine", "--source", write_folder(tmp_path / "f", mine()), "--output_dir", tmp_path]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/manifest.json").write_text("{")
    assert "manifest.json cannot be read" in refused(*argv)
    assert run(*argv, "--overwrite")[0] == 0


def test_a_run_that_fails_with_overwrite_leaves_no_manifest(refused, run, tmp_path):
    source = write_zip(tmp_path / "a.zip", beethoven())
    argv = ["--dataset", "beethoven", "--source", source, "--output_dir", tmp_path]
    assert run(*argv)[0] == 0
    write_zip(source, beethoven() | {"beethoven/3.wav": wav()[:99]})
    assert "3.wav is cut short" in refused(*argv, "--overwrite")
    assert read_folder(tmp_path / "beethoven") == {}


# Processes, progress, the hub.


def test_command_line(tmp_path):
    source = write_zip(tmp_path / "a.zip", mine())
    process = subprocess_of("--dataset", "mine", "--source", source, "--output_dir", tmp_path, *TWO_PROCESSES)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and err == ""
    assert [line.split()[0] for line in out.splitlines() if line] == ["mine", "split", *records.SPLITS, "train"]
    process = subprocess_of("--dataset", "mine", "--source", tmp_path / "absent", "--output_dir", tmp_path)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    sources = "a folder, an archive (zip or tar), a URL or hf:USER/NAME"
    assert err == f"error: --source {tmp_path}/absent is missing; give hub, or {sources}\n"


def test_neither_jax_nor_what_it_takes_is_imported():
    code = (
        "import sys, pipelines.prepare, pipelines.build; light = 'apache_beam' not in sys.modules\n"
        "import pipelines.beam.steps; print(light, sorted({'jax', 'flax', 'grain'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def test_from_the_hub_and_again_without_a_network(tmp_path):
    data = write_zip(tmp_path / "a.zip", sc09()).read_bytes()
    argv = ["--dataset", "sc09", "--output_dir", tmp_path]
    with Hub({"sc09.zip": data}) as hub:
        env = hub_environment(hub.url, tmp_path / "home")
        process = subprocess_of(*argv, env=env)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    assert json.loads((tmp_path / "sc09/manifest.json").read_text())["source"] == "hub"
    # The hub has gone, and so has the cache: the data set is whole, and nobody is asked.
    again = subprocess_of(*argv, env=env | {"HF_HOME": str(tmp_path / "other")})
    assert again.communicate(timeout=100) == (out, "") and again.returncode == 0
    refused = subprocess_of(*argv, "--overwrite", env=env | {"HF_HOME": str(tmp_path / "other")})
    _, err = refused.communicate(timeout=100)
    assert refused.returncode == 2 and err.startswith("error: cannot download sc09.zip from") and err.count("\n") == 1

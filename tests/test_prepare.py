"""Preparing whole data sets: the library function, the command line, runners, bad input, kills."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_sources import Hub, hub_environment

from harmonic import audio, records
from harmonic.errors import UserError
from pipelines import build, prepare, transforms
from pipelines.build import PrepareSpec

ROOT = Path(__file__).parent.parent
TWO_PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def wav(samples=800, rate=16_000, channels=1, seed=0):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).normal(0, 0.1, (samples, channels)), rate, format="WAV")
    return file.getvalue()


def sc09(count=6):
    files = {f"sc09/{d}/{i}.wav": wav(700 + 10 * i, seed=i) for d in ("zero", "one") for i in range(count)}
    return files | {"sc09/validation_list.txt": b"zero/0.wav\n", "sc09/testing_list.txt": b"one/0.wav\none/1.wav\n"}


def beethoven(count=20):
    return {f"beethoven/{i}.wav": wav(seed=i) for i in range(count)}


def mine(count=12):
    return {f"{i % 3}/{i}.wav": wav(2_000, 8_000 * (1 + i % 3), 1 + i % 2, i) for i in range(count)}


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read_folder(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shards_of(folder):
    return {name: data for name, data in read_folder(folder).items() if name != "manifest.json"}


@pytest.fixture
def run(capsys):
    """Runs main in this process; returns (exit status, standard output, the one line of error)."""

    def run(*argv):
        status = prepare.main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if status:
            lines = err.splitlines()
            assert len(lines) == 1 and lines[0].startswith("error: "), err
        return status, out, err

    return run


@pytest.fixture
def refused(run):
    """Runs main, expects exit status 2, and returns the line."""

    def refused(*argv):
        status, out, err = run(*argv)
        assert status == 2 and not out
        return err

    return refused


def subprocess_of(*argv, env=None, **more):
    command = [sys.executable, "-m", "pipelines.prepare", *map(str, argv)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


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
        [(archive, ()), (folder, ()), (folder / "tape", ()), (archive, TWO_PROCESSES), (archive, ())]
    ):
        spec = PrepareSpec("mine", str(source), str(tmp_path / str(i)), num_shards=4)
        manifest = build.prepare(spec, options)
        outputs.append((manifest, shards_of(spec.folder)))
        assert manifest == records.load_manifest(spec.folder)
        assert [s.recording for s in manifest.skipped] == ["0/bad.wav"]
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


# What stands there already.


def test_a_whole_data_set_is_left_alone(tmp_path, monkeypatch):
    spec = PrepareSpec("mine", str(write_folder(tmp_path / "f", mine())), str(tmp_path))
    manifest = build.prepare(spec)
    monkeypatch.setattr(build, "_run", None)
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


# Recordings that cannot be read.


def float_wav(*values):
    file = io.BytesIO()
    soundfile.write(file, np.array(values, np.float32), 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


BAD = {
    "0/cut.wav": wav()[:-100],
    "0/empty.wav": b"",
    "0/nan.wav": float_wav(0, np.nan),
    "0/none.wav": wav(0),
    "0/slow.wav": wav(rate=500),
    "0/text.wav": b"text" * 100,
    "0/video.m4a": b"\0\0\0\x20ftypM4A " * 20,
}


def test_bad_recordings_of_ones_own_are_skipped_and_reported(run, tmp_path):
    source = write_zip(tmp_path / "a.zip", mine(60) | BAD)
    data = bytearray(source.read_bytes())
    data[data.index(mine()["1/1.wav"]) + 700] ^= 1
    source.write_bytes(data)
    status, out, _ = run("--dataset", "mine", "--source", source, "--output_dir", tmp_path)
    assert status == 0
    manifest = records.load_manifest(tmp_path / "mine")
    reasons = {skipped.recording: skipped.reason for skipped in manifest.skipped}
    assert reasons.pop("1/1.wav") == "is damaged in the archive: Bad CRC-32 for file '1/1.wav'"
    assert sorted(reasons) == sorted(BAD)
    assert sum(split.recordings for split in manifest.splits.values()) == 59
    for name, reason in reasons.items():
        assert f"skipped {name} ({next(s.split for s in manifest.skipped if s.recording == name)}): {reason}" in out


@pytest.mark.parametrize("options", [(), TWO_PROCESSES])
def test_bad_recordings_of_a_published_set_stop_it(refused, run, tmp_path, options):
    source = write_zip(tmp_path / "a.zip", beethoven() | {"beethoven/7.wav": wav()[:99], "beethoven/8.wav": b""})
    argv = ["--dataset", "beethoven", "--source", source, "--output_dir", tmp_path, *options]
    assert refused(*argv) == (
        "error: 2 recordings of beethoven cannot be read: 7.wav is cut short: 99 bytes, and its header claims 1644; "
        "8.wav is empty; get the archive again, or give --allow_skipped to leave them out\n"
    )
    assert read_folder(tmp_path / "beethoven") == {}
    if not options:
        assert run(*argv, "--allow_skipped")[0] == 0
        assert "give --allow_skipped to use it as it is, or --overwrite" in refused(*argv)
        assert run(*argv, "--allow_skipped")[0] == 0


def test_splits_without_recordings(refused, tmp_path):
    argv = ["--output_dir", tmp_path, "--source", tmp_path / "a.zip", "--dataset"]
    write_zip(tmp_path / "a.zip", beethoven(5))
    assert "has no recordings for split validation; give the whole" in refused(*argv, "beethoven")
    write_zip(tmp_path / "a.zip", sc09() | {"sc09/testing_list.txt": b""})
    assert "has no recordings for split test" in refused(*argv, "sc09")
    write_zip(tmp_path / "a.zip", {f"{i}.wav": b"" for i in range(3)})
    assert "none of the recordings of split train can be read: " in refused(*argv, "mine")
    assert not (tmp_path / "mine").exists() or read_folder(tmp_path / "mine") == {}


# Bad flags, sources and outputs.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --dataset"),
        (["--dataset", "My Music"], "--dataset 'My Music' cannot be a folder's name"),
        (["--dataset", "mine"], "for recordings of your own give --source"),
        (["--dataset", "demo", "--encoding", "alaw"], "argument --encoding: invalid choice: 'alaw'"),
        (["--dataset", "demo", "--window_length", "0"], "--window_length must be a whole number from 1"),
        (["--dataset", "demo", "--window_length", "8k"], "invalid int value: '8k'"),
        (["--dataset", "demo", "--record_length", "-1"], "--record_length must be a whole number from 1"),
        (["--dataset", "demo", "--num_levels", "65537"], "--num_levels must be a whole number from 2 to 65,536"),
        (["--dataset", "demo", "--num_shards", "0"], "--num_shards must be a whole number from 1"),
        (["--dataset", "demo", "--output_dir", ""], "--output_dir is empty"),
        (["--dataset", "demo", "--output_dir", "nowhere://x"], "cannot write to nowhere://x/demo: Unable to get"),
        (["--dataset", "demo", "--sorce", "x"], "unknown argument --sorce; see --help"),
        (["--dataset", "demo", "--sorce=x"], "unknown argument --sorce=x"),
        (["--dataset", "demo", "extra"], "unknown argument extra"),
        (["--dataset", "demo", "--enc", "linear"], "unknown argument --enc"),
        (["--dataset", "demo", "--runner"], "argument --runner: expected one argument"),
        (["--dataset", "demo", "--runner=NoRunner"], "--runner=NoRunner is not a runner of Beam's"),
        (["--dataset", "demo", "--direct_num_workers=x"], "argument --direct_num_workers: invalid int value: 'x'"),
        (["--dataset", "demo", "--direct_num_workers=2"], "needs --direct_running_mode=multi_processing"),
        (["--dataset", "demo", "--direct_running_mode=multi_threading"], "loses records; use multi_processing"),
        (["--dataset", "demo", "--direct_running_mode", "multi_threading"], "loses records; use multi_processing"),
        (["--dataset", "demo", "--source", "/does/not/exist"], "--source /does/not/exist is missing"),
        (["--dataset", "sc09", "--source", "synth"], "makes the demo's recordings"),
        (["--dataset", "mine", "--source", "hub"], "mine is not on the hub"),
    ],
)
def test_bad_arguments(refused, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*argv)
    assert list(tmp_path.iterdir()) == []


def test_direct_runner_stands_for_the_in_process_one():
    for given in ([], ["--runner=DirectRunner"], ["--runner", "directrunner"], ["--direct_num_workers=1"]):
        assert [o for o in build.beam_options(given) if o.startswith("--runner=")][-1] == "--runner=FnApiRunner"


def test_outputs_that_cannot_be_written(refused, tmp_path):
    source = write_zip(tmp_path / "a.zip", mine())
    (tmp_path / "file").write_text("")
    argv = ["--dataset", "mine", "--source", source, "--output_dir"]
    assert "cannot write to" in refused(*argv, tmp_path / "file")
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid():  # root may write anywhere
        assert "Permission denied; make it writable" in refused(*argv, tmp_path / "locked")


def test_a_full_disk_while_running(refused, tmp_path, monkeypatch):
    from pipelines import array_record_io

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(array_record_io, "_create", lambda path: Full())
    source = write_zip(tmp_path / "a.zip", mine())
    line = refused("--dataset", "mine", "--source", source, "--output_dir", tmp_path)
    assert (
        line
        == f"error: cannot write to {tmp_path}/mine: no space is left; make room there, or give another --output_dir\n"
    )
    assert read_folder(tmp_path / "mine") == {}


def test_a_runner_that_loses_recordings_is_noticed(refused, tmp_path, monkeypatch):
    keyed = transforms.KeyByShard.process
    monkeypatch.setattr(transforms.KeyByShard, "process", lambda self, r: () if r.id == "0/0.wav" else keyed(self, r))
    source = write_zip(tmp_path / "a.zip", mine())
    line = refused("--dataset", "mine", "--source", source, "--output_dir", tmp_path)
    assert "the runner lost recordings of split" in line
    assert read_folder(tmp_path / "mine") == {}


def test_faults_of_the_program_keep_their_trace(tmp_path, monkeypatch):
    def fault(*_):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(transforms, "measure", fault)
    with pytest.raises(Exception, match="a fault"):
        build.prepare(PrepareSpec("mine", str(write_zip(tmp_path / "a.zip", mine())), str(tmp_path)))
    assert read_folder(tmp_path / "mine") == {}


def test_user_errors_are_found_in_what_runners_wrap_around_them():
    text = "Traceback...\nharmonic.errors.UserError: one line [while running 'WriteShard']\n\nmore"
    assert str(build.unwrap(RuntimeError(text))) == "one line"
    inner = UserError("another [while running 'X']")
    outer = RuntimeError("wrapped")
    outer.__cause__ = inner
    assert str(build.unwrap(outer)) == "another"
    assert build.unwrap(ValueError("x")) is None


# Processes, progress, kills, the hub.


def test_command_line(tmp_path):
    source = write_zip(tmp_path / "a.zip", mine())
    process = subprocess_of("--dataset", "mine", "--source", source, "--output_dir", tmp_path, *TWO_PROCESSES)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and err == ""
    assert [line.split()[0] for line in out.splitlines() if line] == ["mine", "split", *records.SPLITS]
    process = subprocess_of("--dataset", "mine", "--source", tmp_path / "absent", "--output_dir", tmp_path)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    assert err == f"error: --source {tmp_path}/absent is missing; give hub, or the path of a zip archive or a folder\n"


def test_neither_jax_nor_what_it_takes_is_imported():
    code = (
        "import sys, pipelines.prepare, pipelines.build; light = 'apache_beam' not in sys.modules\n"
        "import pipelines.transforms; print(light, sorted({'jax', 'flax', 'grain'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def test_progress_lines(monkeypatch):
    clock = iter([0.0, 1.0, 6.0, 7.0, 66.0])
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    line = prepare.ProgressLine(stream)
    for done in (1, 60, 70, 3_300):
        line(done, 3_600)
    line.close()
    assert stream.getvalue().splitlines() == [
        "60 of 3,600 recordings, 10.0 a second, 5 min 54 s left",
        "3,300 of 3,600 recordings, 50.0 a second, 6 s left",
    ]
    assert [prepare.duration(s) for s in (0, 59.4, 60, 3_599, 7_800)] == [
        *("0 s", "59 s", "1 min 00 s", "59 min 59 s", "2 h 10 min")
    ]


def test_progress_is_reported_while_running(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_POLL_SECONDS", 0.001)
    seen = []
    spec = PrepareSpec("mine", str(write_zip(tmp_path / "a.zip", mine(40))), str(tmp_path))
    build.prepare(spec, progress=lambda done, total: seen.append((done, total)))
    assert seen and all(total == 40 for _, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and 0 < seen[-1][0] <= 40


def stop_in_the_middle(tmp_path, options, stop):
    """Starts a run in a process of its own and sends it a signal. Returns (source, folder, status, errors)."""
    files = {f"{i}.wav": wav(44_100 * 5, 44_100, 2, i) for i in range(30)}
    source = write_folder(tmp_path / "f", files)
    argv = ["--dataset", "mine", "--source", source, "--output_dir", tmp_path / "killed", "--num_shards", 4, *options]
    # Whoever runs the tests may ignore SIGINT (a shell does for what it starts in the background), and we inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess_of(*argv)
    signal.signal(signal.SIGINT, before)
    folder = tmp_path / "killed/mine"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size >= 3 for path in folder.glob("_partial-*/progress")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    return source, folder, process.returncode, err


@pytest.mark.parametrize("options", [[], TWO_PROCESSES])
def test_an_interrupt_says_how_to_go_on(tmp_path, options):
    _, folder, status, err = stop_in_the_middle(tmp_path, options, signal.SIGINT)
    assert status == 130 and "interrupted; run the same command again\n" in err
    assert not any(path.suffix in (".json", ".array_record") for path in folder.iterdir())


@pytest.mark.parametrize("options", [[], TWO_PROCESSES])
def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path, options):
    source, folder, status, _ = stop_in_the_middle(tmp_path, options, signal.SIGKILL)
    assert status == -signal.SIGKILL
    left = sorted(path.name for path in folder.iterdir())
    assert len(left) == 1 and left[0].startswith("_partial-")
    time.sleep(1 if options else 0)  # its workers notice, and leave
    spec = PrepareSpec("mine", str(source), str(tmp_path / "killed"), num_shards=4)
    with pytest.raises(UserError, match="no data set stands in"):
        records.load_manifest(folder)
    build.prepare(spec)
    other = PrepareSpec("mine", str(source), str(tmp_path / "whole"), num_shards=4)
    build.prepare(other)
    assert read_folder(folder) == read_folder(other.folder)


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

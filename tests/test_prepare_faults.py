"""Preparing, where something is wrong: recordings, flags, disks, runners; interrupts and kills."""

import contextlib
import functools
import io
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from archives import beethoven, mine, sc09, wav, write_folder, write_zip
from mains import refused_main, run_main
from prepared import TWO_PROCESSES, read_folder, subprocess_of

from harmonic import records
from harmonic.errors import UserError
from pipelines import build, prepare
from pipelines.beam import runners, sharding, sink, steps, workers
from pipelines.build import PrepareSpec


@pytest.fixture
def run(capsys):
    return functools.partial(run_main, capsys, prepare.main)


@pytest.fixture
def refused(capsys):
    return functools.partial(refused_main, capsys, prepare.main)


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
        (["--dataset", "demo", "--hop_length", "0"], "--hop_length must be a whole number from 1"),
        (["--dataset", "demo", "--trim_silence", "0"], "--trim_silence must be from 1 to 200 dB, got 0"),
        (["--dataset", "demo", "--trim_silence=nan"], "--trim_silence must be from 1 to 200 dB, got nan"),
        (["--dataset", "demo", "--loudness", "3"], "--loudness must be from -70 to 0 LUFS, got 3"),
        (["--dataset", "demo", "--loudness=loud"], "argument --loudness: invalid float value: 'loud'"),
        (["--dataset", "demo", "--splits=0.8,0.2"], "--splits=0.8,0.2 must be three shares above 0"),
        (["--dataset", "demo", "--splits=1,0,0"], "--splits=1,0,0 must be three shares above 0"),
        (["--dataset", "demo", "--splits=0.8,0.1,0.2"], "validation and test that add up to 1, such as 0.88,0.06,0.06"),
        (["--dataset", "demo", "--splits=nan,nan,nan"], "must be three shares above 0"),
        (["--dataset", "demo", "--splits=a,b,c"], "argument --splits: invalid shares value: 'a,b,c'"),
        (["--dataset", "demo", "--splits=0.8,0.1,0.1"], "demo has its own splits, which its published figures are for"),
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
        assert [o for o in runners.beam_options(given) if o.startswith("--runner=")][-1] == "--runner=FnApiRunner"


def test_outputs_that_cannot_be_written(refused, tmp_path):
    source = write_zip(tmp_path / "a.zip", mine())
    (tmp_path / "file").write_text("")
    argv = ["--dataset", "mine", "--source", source, "--output_dir"]
    assert "cannot write to" in refused(*argv, tmp_path / "file")
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid():  # root may write anywhere
        assert "Permission denied; make it writable" in refused(*argv, tmp_path / "locked")


def test_a_full_disk_while_running(refused, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink, "create_file", lambda path: Full())
    source = write_zip(tmp_path / "a.zip", mine())
    line = refused("--dataset", "mine", "--source", source, "--output_dir", tmp_path)
    assert (
        line
        == f"error: cannot write to {tmp_path}/mine: no space is left; make room there, or give another --output_dir\n"
    )
    assert read_folder(tmp_path / "mine") == {}


def test_a_runner_that_loses_recordings_is_noticed(refused, tmp_path, monkeypatch):
    group = sharding.group_by_shard

    def lossy(*given):
        rows = group(*given)
        rows[0][2].pop()
        return rows

    monkeypatch.setattr(sharding, "group_by_shard", lossy)
    source = write_zip(tmp_path / "a.zip", mine())
    line = refused("--dataset", "mine", "--source", source, "--output_dir", tmp_path)
    assert "the runner lost recordings of split" in line
    assert read_folder(tmp_path / "mine") == {}


def test_faults_of_the_program_keep_their_trace(tmp_path, monkeypatch):
    def fault(*_, **__):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(steps, "measure", fault)
    with pytest.raises(Exception, match="a fault"):
        build.prepare(PrepareSpec("mine", str(write_zip(tmp_path / "a.zip", mine())), str(tmp_path)))
    assert read_folder(tmp_path / "mine") == {}


def test_user_errors_are_found_in_what_runners_wrap_around_them():
    text = "Traceback...\nharmonic.errors.UserError: one line [while running 'WriteShard']\n\nmore"
    assert str(runners.unwrap(RuntimeError(text))) == "one line"
    inner = UserError("another [while running 'X']")
    outer = RuntimeError("wrapped")
    outer.__cause__ = inner
    assert str(runners.unwrap(outer)) == "another"
    assert runners.unwrap(ValueError("x")) is None


# Interrupts and kills.


def stop_in_the_middle(tmp_path, options, stop):
    """Starts a run in a process of its own and stops it by a signal, or by a function of the process. Returns (source,
    folder, status, errors)."""
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
    stop(process) if callable(stop) else process.send_signal(stop)
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
    with pytest.raises(UserError, match="there is no data set in"):
        records.load_manifest(folder)
    build.prepare(spec)
    other = PrepareSpec("mine", str(source), str(tmp_path / "whole"), num_shards=4)
    build.prepare(other)
    assert read_folder(folder) == read_folder(other.folder)


def below(pid):
    """Children of a process, and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            if int(rest.split()[1]) == pid:
                found += [int(name.split()[0]), *below(int(name.split()[0]))]
    return found


def servers_and_workers(process):
    """The processes that are forked from the server of workers, and itself, in this order."""
    found = [pid for pid in below(process.pid) if b"import serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return sorted(found, key=lambda pid: -len(below(pid)) or pid)[::-1]


def test_a_lost_worker_is_told_and_the_next_run_goes_on(tmp_path):
    killed = []

    def kill(process):
        killed.extend(servers_and_workers(process))
        os.kill(killed[0], signal.SIGKILL)

    source, folder, status, err = stop_in_the_middle(tmp_path, TWO_PROCESSES, kill)
    assert len(killed) == 3 and status == 2
    (line,) = (line for line in err.splitlines() if "recordings" not in line)
    assert line.startswith("error: a worker process was lost: it was killed, or no memory was left; run the same")
    assert read_folder(folder) == {} and not any(Path(f"/proc/{pid}").exists() for pid in killed)
    spec = PrepareSpec("mine", str(source), str(tmp_path / "killed"), num_shards=4)
    other = PrepareSpec("mine", str(source), str(tmp_path / "whole"), num_shards=4)
    build.prepare(spec, TWO_PROCESSES)
    build.prepare(other)
    assert read_folder(folder) == read_folder(other.folder)


def test_workers_that_have_begun_need_no_server(tmp_path):
    _, folder, status, _ = stop_in_the_middle(
        tmp_path, TWO_PROCESSES, lambda process: os.kill(servers_and_workers(process)[-1], signal.SIGKILL)
    )
    assert status == 0 and records.load_manifest(folder).splits["train"].recordings


def test_a_server_of_workers_that_cannot_start_is_not_waited_for(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(workers, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(workers, "__name__", "no_such_module")
    source = write_zip(tmp_path / "a.zip", mine())
    with pytest.raises(UserError, match="a worker process was lost"):
        build.prepare(PrepareSpec("mine", str(source), str(tmp_path)), TWO_PROCESSES)
    assert read_folder(tmp_path / "mine") == {}
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def test_an_interrupt_of_a_terminal_reaches_all_and_one_speaks(tmp_path):
    def interrupt(process):
        for pid in (*below(process.pid), process.pid):
            os.kill(pid, signal.SIGINT)

    _, folder, status, err = stop_in_the_middle(tmp_path, TWO_PROCESSES, interrupt)
    assert status == 130 and [line for line in err.splitlines() if "recordings" not in line] == [
        "interrupted; run the same command again"
    ]
    assert read_folder(folder) == {}


def test_workers_start_whatever_the_length_of_the_temporary_folder_s_name(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(workers.tempfile, "tempdir", str(deep))
    manifest = build.prepare(
        PrepareSpec("mine", str(write_zip(tmp_path / "a.zip", mine())), str(tmp_path)), TWO_PROCESSES
    )
    assert sum(split.recordings for split in manifest.splits.values()) == 12
    assert list(deep.iterdir()) == []

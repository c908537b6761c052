"""Prepares a data set: validates, returns what is already whole, or else assembles the Beam graph and runs it.

    manifest = prepare(PrepareSpec("youtubemix", source="/data/youtube_mix.zip"))

The graph: names of recordings, keyed by shard → GroupByKey (of names alone) → one step a shard that reads, quantises
and writes it → one step that counts, publishes and writes the manifest. The audio itself is never shuffled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shlex
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from harmonic.audio import ENCODINGS, MAX_LEVELS, SAMPLE_RATE, token_dtype
from harmonic.errors import UserError
from harmonic.records import SPLITS, Manifest
from pipelines.array_record_io import (
    clear,
    create_folder,
    import_beam,
    is_local,
    join,
    missing_files,
    one_line,
    read_manifest,
    stage_folder,
)
from pipelines.sources import DATA_SETS, DataSet, Source, SourceRecording, data_set, open_source

SHARD_BYTES = 32 << 20  # of source for each shard
MAX_RECORD_LENGTH = 1 << 24
DEFAULT_RUNNER = "FnApiRunner"
_POLL_SECONDS = 0.5

Progress = Callable[[int, int], None]  # (recordings done, recordings in all)


@dataclasses.dataclass(frozen=True)
class PrepareSpec:
    """What to prepare. None stands for the data set's own default.

    Attributes:
      dataset: demo, sc09, beethoven, youtubemix, or a name of one's own.
      source: `hub`, `synth`, or the path of a zip archive or a folder.
      output_dir: the data set's folder is made in it; local, or of a file system that Beam knows.
      encoding: mu_law or linear.
      window_length: samples of the usual training window; windows are counted with it.
      record_length: longest piece of a recording in a record, in samples.
      num_levels: 2 to 65,536.
      num_shards: at most so many of each split; by the source's size if None.
      allow_skipped: accept recordings that cannot be read, also of a published data set.
      overwrite: replace what another spec or source left in the folder.
    """

    dataset: str
    source: str | None = None
    output_dir: str = "data"
    encoding: str | None = None
    window_length: int | None = None
    record_length: int = 131_072
    num_levels: int = 256
    num_shards: int | None = None
    allow_skipped: bool = False
    overwrite: bool = False

    @property
    def folder(self) -> str:
        """The data set's folder."""
        return join(self.output_dir, self.dataset)


def prepare(spec: PrepareSpec, options: Sequence[str] = (), progress: Progress | None = None) -> Manifest:
    """Prepares a data set, unless it stands already whole in `spec.folder`, and returns its manifest.

    Args:
      spec: what to prepare.
      options: Beam's, as on the command line; the runner is the in-process FnApiRunner if they name none.
      progress: called now and then from another thread while a local runner works.

    Raises:
      UserError: a bad value, option, source or output folder; the message is one line.
    """
    dataset, spec = resolve(spec)
    options = beam_options(options)
    folder = os.path.abspath(os.path.expanduser(spec.folder)) if is_local(spec.folder) else spec.folder
    existing = None if spec.overwrite else read_manifest(folder)
    # The hub's archive is taken at its word, so that a data set that is whole needs no network.
    if existing is not None and existing.source == spec.source == "hub":
        fingerprint = existing.fingerprint
        source = None
    else:
        source = open_source(dataset, str(spec.source))
        fingerprint = source.fingerprint()
    described = describe(spec, fingerprint)
    if existing is not None:
        check_same(existing, described, folder)
        if not missing_files(folder, existing):
            from_before = dataset.complete and not spec.allow_skipped and existing.skipped
            if from_before:
                raise UserError(
                    f"{folder} lacks {len(existing.skipped)} recordings that could not be read; give --allow_skipped "
                    "to use it as it is, or --overwrite to prepare it again"
                )
            return existing
    source = source or open_source(dataset, str(spec.source))
    try:
        return _run(spec, dataset, source, describe(spec, source.fingerprint()), folder, options, progress)
    finally:
        source.close()


def resolve(spec: PrepareSpec) -> tuple[DataSet, PrepareSpec]:
    """The data set, and the spec with its defaults filled in.

    Raises:
      UserError: a value that cannot be.
    """
    dataset = data_set(spec.dataset)
    source = spec.source
    if source is None:
        if dataset.repo is None and dataset.name != "demo":
            raise UserError(
                f"--dataset {dataset.name} is not one of {', '.join(DATA_SETS)}; for recordings of your own give "
                "--source, the path of a zip archive or a folder"
            )
        source = "hub" if dataset.repo else "synth"
    spec = dataclasses.replace(
        spec,
        source=source,
        encoding=dataset.encoding if spec.encoding is None else spec.encoding,
        window_length=dataset.window_length if spec.window_length is None else spec.window_length,
    )
    if spec.encoding not in ENCODINGS:
        raise UserError(f"--encoding must be one of {', '.join(ENCODINGS)}, got {spec.encoding!r}")
    for name, low, high in (
        ("window_length", 1, 1 << 40),
        ("record_length", 1, MAX_RECORD_LENGTH),
        ("num_levels", 2, MAX_LEVELS),
        ("num_shards", 1, 99_999),
    ):
        value = getattr(spec, name)
        if value is None and name == "num_shards":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise UserError(f"--{name} must be a whole number from {low:,} to {high:,}, got {value!r}")
    if not spec.output_dir:
        raise UserError("--output_dir is empty; give a folder")
    return dataset, spec


def describe(spec: PrepareSpec, fingerprint: str) -> Manifest:
    """The manifest of a resolved spec, without what only the run can tell."""
    return Manifest(
        dataset=spec.dataset,
        source=str(spec.source),
        fingerprint=fingerprint,
        sample_rate=SAMPLE_RATE,
        encoding=str(spec.encoding),
        num_levels=spec.num_levels,
        token_dtype=token_dtype(spec.num_levels).name,
        channels=1,
        window_length=int(spec.window_length or 0),
        record_length=spec.record_length,
        splits={},
    )


def check_same(existing: Manifest, wanted: Manifest, folder: str) -> None:
    """Refuses to take one data set for another.

    Raises:
      UserError: names the first difference.
    """
    for field in ("dataset", "encoding", "num_levels", "window_length", "record_length", "sample_rate", "fingerprint"):
        old, new = getattr(existing, field), getattr(wanted, field)
        if old != new:
            what = f"{field} {old}, not {new}"
            if field == "fingerprint":
                what = f"other recordings (source {existing.source}, fingerprint {old[:12]}, not {new[:12]})"
            raise UserError(
                f"{folder} holds a data set with {what}; give --overwrite to replace it, or another --output_dir"
            )


def beam_options(arguments: Sequence[str]) -> list[str]:
    """Checks arguments that are meant for Beam, and adds the defaults that work without a network and in silence.

    DirectRunner stands for FnApiRunner: it first tries to download another runner, and hangs where it cannot.

    Raises:
      UserError: an argument that Beam does not know, or that loses records.
    """
    defaults = [f"--runner={DEFAULT_RUNNER}", "--default_sdk_harness_log_level=CRITICAL"]
    if not arguments:
        return defaults  # without Beam's import: a second or more
    import_beam()
    from apache_beam.options import pipeline_options as po
    from apache_beam.runners.runner import create_runner

    class Parser(po._BeamArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{one_line(message)}; see --help, and Beam's own options")

    parser = Parser(allow_abbrev=False, add_help=False)
    for cls in {str(cls): cls for cls in po.PipelineOptions.__subclasses__()}.values():
        cls._add_argparse_args(parser)
    known, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; see --help, and Beam's own options")
    if known.direct_running_mode == "multi_threading":
        raise UserError("--direct_running_mode=multi_threading loses records; use multi_processing")
    workers = known.direct_num_workers
    if workers not in (None, 1) and known.direct_running_mode != "multi_processing":
        raise UserError(f"--direct_num_workers={workers} needs --direct_running_mode=multi_processing")
    runner = known.runner
    if runner is None or runner.lower() in ("directrunner", "switchingdirectrunner"):
        runner = DEFAULT_RUNNER
    try:
        create_runner(runner)
    except ImportError as error:
        raise UserError(f"--runner={runner} cannot be imported; its extra may be missing: {one_line(error)}") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"--runner={runner} is not a runner of Beam's: {one_line(error)}") from error
    return [*defaults, *arguments, f"--runner={runner}"]


def build(
    pipeline: Any,
    source: Source,
    recordings: Sequence[SourceRecording],
    described: Manifest,
    *,
    folder: str,
    run: str,
    num_shards: int | None = None,
    complete: bool = False,
    progress: str | None = None,
) -> Any:
    """Adds the whole graph to `pipeline`.

    Args:
      pipeline: a `beam.Pipeline`.
      source: opens the recordings, on the workers.
      recordings: what it lists.
      described: from `describe`.
      folder: the data set's folder.
      run: 32 hexadecimal digits, different for every run.
      num_shards: as in `PrepareSpec`.
      complete: whether a recording that cannot be read is an error.
      progress: a local file that gets one byte a recording, or None.

    Returns:
      A collection of one element, the manifest that was written.
    """
    import apache_beam as beam

    from pipelines import transforms

    counts = transforms.shard_counts(recordings, SHARD_BYTES, num_shards)
    listed = {split: sum(recording.split == split for recording in recordings) for split in SPLITS}
    return (
        pipeline
        | "Recordings" >> beam.Create(list(recordings), reshuffle=False)
        | "KeyByShard" >> beam.ParDo(transforms.KeyByShard(counts))
        | "Group" >> beam.GroupByKey()
        | "WriteShard" >> beam.ParDo(transforms.WriteShard(source, counts, described, folder, run, progress))
        | "Gather" >> beam.combiners.ToList()
        | "Publish" >> beam.ParDo(transforms.Publish(listed, described, folder, run, complete))
    )


def _run(
    spec: PrepareSpec,
    dataset: DataSet,
    source: Source,
    described: Manifest,
    folder: str,
    options: list[str],
    progress: Progress | None,
) -> Manifest:
    recordings = source.list()
    for split in SPLITS:
        if not any(recording.split == split for recording in recordings):
            raise UserError(f"source {spec.source} has no recordings for split {split}; give the whole data set")
    import_beam()
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

    pipeline_options = PipelineOptions(options)
    pipeline_options.view_as(SetupOptions).save_main_session = False
    create_folder(folder)
    clear(folder)
    run = uuid.uuid4().hex
    with _quiet(), _watch(progress, len(recordings), stage_folder(folder, run)) as progress_file:
        try:
            pipeline = beam.Pipeline(_local_runner(pipeline_options), options=pipeline_options)
            build(
                pipeline,
                source,
                recordings,
                described,
                folder=folder,
                run=run,
                num_shards=spec.num_shards,
                complete=dataset.complete and not spec.allow_skipped,
                progress=progress_file,
            )
            pipeline.run().wait_until_finish()
        except BaseException as error:
            with contextlib.suppress(UserError):
                clear(folder, run)
            user_error = unwrap(error)
            if user_error is not None:
                raise user_error from error
            if re.search(r"^KeyboardInterrupt\b", str(error), re.MULTILINE):  # Beam wraps this, too
                raise KeyboardInterrupt from error
            raise
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"the runner ended without an error and without a data set in {folder}; use another --runner")
    return manifest


# A worker process. Beam's own command lets it log to stderr until it has read the options, which never reach it, and
# lets it work on, for as long as its share takes, when the process that started it has been killed.
_WORKER = """
import logging, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: leave when the parent has
handler = logging.StreamHandler()
handler.setLevel(logging.CRITICAL)
logging.getLogger().addHandler(handler)
def leave_with_parent():
    while os.getppid() == int(sys.argv[1]):
        time.sleep(0.5)
    os._exit(1)
threading.Thread(target=leave_with_parent, daemon=True).start()
from apache_beam.runners.worker import sdk_worker_main
sys.stderr = open(os.devnull, "w")  # to where it prints every error that it reports anyway
try:
    sdk_worker_main.main([])
except BaseException:
    os._exit(1)
os._exit(0)  # not through the interpreter's end, where native modules tell of objects that an error left
"""


def _local_runner(options: Any) -> Any:
    """The FnApiRunner, where it is wanted with worker processes, with processes that keep quiet; else None."""
    from apache_beam.options.pipeline_options import DirectOptions, StandardOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    direct = options.view_as(DirectOptions)
    if options.view_as(StandardOptions).runner != DEFAULT_RUNNER or direct.direct_running_mode != "multi_processing":
        return None
    direct.direct_running_mode = "in_memory"  # that is: do not set the environment again
    command = f"exec {shlex.join([sys.executable, '-c', _WORKER, str(os.getpid())])}"
    return FnApiRunner(default_environment=SubprocessSDKEnvironment.from_command_string(command))


def unwrap(error: BaseException) -> UserError | None:
    """The UserError that a runner wrapped in its own errors, as an object or only as text; None if there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return UserError(_without_step(str(seen)))
        if isinstance(seen, ValueError) and str(seen).startswith("Pipeline has validation"):
            return UserError(f"{one_line(seen)}; see Beam's own options")
        found = re.search(r"^(?:harmonic\.errors\.)?UserError: (.+)$", str(seen), re.MULTILINE)
        if found:
            return UserError(_without_step(found[1]))
        seen = seen.__cause__ or seen.__context__
    return None


def _without_step(message: str) -> str:
    return re.sub(r" \[while running .*", "", message, flags=re.DOTALL)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back Beam's logging, which repeats every error with its stack trace and warns of what is meant."""
    names = ("apache_beam", "root")
    levels = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _watch(progress: Progress | None, total: int, stage: str) -> Iterator[str | None]:
    """A file for workers to note each recording in, and a thread that reports its length."""
    if progress is None:
        yield None
        return
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="harmonic-progress-") as folder:
        # A local run's file stands with its shards, so that the next run clears it away if this one is killed.
        path = join(stage, "progress") if is_local(stage) else join(folder, "progress")

        def report() -> None:
            while not stop.wait(_POLL_SECONDS):
                with contextlib.suppress(OSError):
                    progress(min(os.path.getsize(path), total), total)

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        try:
            yield path
        finally:
            stop.set()
            thread.join()

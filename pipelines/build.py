"""Prepares a data set: validates, returns what is already whole, or else assembles the Beam graph and runs it.

    manifest = prepare(PrepareSpec("youtubemix", source="/data/youtube_mix.zip"))

The graph: shards, each a list of names of recordings → spread over the workers → one step a shard that reads, quantises
and writes it → one step that counts, publishes and writes the manifest. The audio itself is never shuffled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harmonic.audio import ENCODINGS, MAX_LEVELS, SAMPLE_RATE, token_dtype
from harmonic.errors import UserError
from harmonic.locks import writing
from harmonic.records import SPLITS, Manifest
from pipelines.beam.runners import (
    beam_options,
    check_output,
    local_runner,
    quiet,
    runner_of,
    unwrap,
    wants_processes,
)
from pipelines.beam.sink import (
    clear,
    clear_stages,
    create_folder,
    import_beam,
    is_local,
    join,
    missing_files,
    read_manifest,
    stage_folder,
    uncollected,
)
from pipelines.beam.workers import LocalWorkers
from pipelines.own_config import remove_config, write_config
from pipelines.sources import DATA_SETS, DataSet, Source, SourceRecording, data_set, open_source
from pipelines.sources.remote import shown
from pipelines.sources.splits import DEFAULT_RULE, DEFAULT_SHARES, SplitRule, split_rule

SHARD_BYTES = 32 << 20  # of source for each shard
# of each split. The manifest lists them all, and one step holds it: 40 MB of text at most for a split.
MAX_SHARDS = 65_536
# A longer listing does not travel with the job, which Dataflow would refuse: it is staged beside the shards.
MAX_IN_GRAPH = 20_000
_LISTING_ROWS = 20_000  # recordings in each of its files
MAX_RECORD_LENGTH = 1 << 24
_POLL_SECONDS = 0.5

# (recordings done, recordings in all, seconds of audio done, share of the source's bytes that is done)
Progress = Callable[[int, int, float, float], None]


@dataclasses.dataclass(frozen=True)
class PrepareSpec:
    """What to prepare. None stands for the data set's own default.

    Attributes:
      dataset: demo, sc09, beethoven, youtubemix, or a name of one's own.
      source: `hub`, `synth`, `hf:USER/NAME`, or a folder or an archive (zip, tar): a path or a URL.
      output_dir: the data set's folder is made in it; local, or of a file system that Beam knows.
      encoding: mu_law or linear.
      window_length: samples of the usual training window; windows are counted with it.
      hop_length: samples from the start of one such window to the next; the window's length if None.
      splits: shares of train, validation and test, by a hash of the names, for recordings of one's own.
      validation_list, test_list: or files that name the recordings of these splits, one a line.
      trim_silence: cut off leading and trailing silence that many dB below the loudest frame; None leaves it.
      loudness: bring recordings to that loudness in LUFS, and to one scale; None scales each by its own extremes.
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
    hop_length: int | None = None
    splits: tuple[float, ...] | None = None
    validation_list: str | None = None
    test_list: str | None = None
    trim_silence: float | None = None
    loudness: float | None = None
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
    data_set(spec.dataset)  # its name is a folder's
    folder = os.path.abspath(os.path.expanduser(spec.folder)) if is_local(spec.folder) else spec.folder
    existing = None if spec.overwrite else read_manifest(folder)
    whole = existing is not None and not missing_files(folder, existing)
    # Where one's own recordings came from, and how they were prepared, need not be said again.
    as_it_stands = whole and spec.source is None and spec.dataset not in DATA_SETS
    if existing is not None and as_it_stands:
        spec = _as_it_stands(spec, existing)
    dataset, spec = resolve(spec)
    with contextlib.ExitStack() as stack:
        workers = None
        if not whole and wants_processes(options):  # at once: it takes as long as all that comes before the run
            workers = stack.enter_context(LocalWorkers())
        return _prepare(dataset, spec, folder, existing, whole, as_it_stands, beam_options(options), workers, progress)


def _prepare(
    dataset: DataSet,
    spec: PrepareSpec,
    folder: str,
    existing: Manifest | None,
    whole: bool,
    as_it_stands: bool,
    options: list[str],
    workers: LocalWorkers | None,
    progress: Progress | None,
) -> Manifest:
    runner = runner_of(options)
    check_output(folder, runner)
    rule = _split_rule(spec, dataset)
    # The hub's archive is taken at its word, so that a data set that is whole needs no network.
    if existing is not None and (as_it_stands or existing.source == spec.source == "hub"):
        fingerprint = existing.fingerprint
        source = None
    else:
        source, fingerprint = _open(spec, dataset, rule, runner)
    if existing is not None:
        asked_rule = existing.split_rule if as_it_stands and rule.name == DEFAULT_RULE else rule.name
        check_same(existing, describe(spec, fingerprint, asked_rule), folder)
        if whole:
            from_before = dataset.complete and not spec.allow_skipped and existing.skipped
            if from_before:
                raise UserError(
                    f"{folder} lacks {len(existing.skipped)} recordings that could not be read; give --allow_skipped "
                    "to use it as it is, or --overwrite to prepare it again"
                )
            with contextlib.suppress(UserError), _alone(folder):  # it may lie where nothing can be written
                clear_stages(folder)  # of a run that was killed when all was written
                write_config(folder, existing)
            return existing
    if source is None:
        source, fingerprint = _open(spec, dataset, rule, runner)
    try:
        described = describe(spec, fingerprint, rule.name)
        create_folder(folder)
        with _alone(folder):
            if not spec.overwrite and read_manifest(folder) != existing:
                raise UserError(f"another run has just written {folder}; run the same command again")
            return _run(spec, dataset, source, rule, described, folder, options, workers, progress)
    finally:
        source.close()


def _open(spec: PrepareSpec, dataset: DataSet, rule: SplitRule, runner: str) -> tuple[Source, str]:
    """The source and its fingerprint."""
    with uncollected():  # a listing can be long
        source = open_source(dataset, str(spec.source), runner)
        return source, _fingerprint(source, spec, rule)


def _alone(folder: str) -> contextlib.AbstractContextManager[None]:
    """Holds a local folder against other runs, by a file beside it: within stand the data set's files alone."""
    if not is_local(folder):
        return contextlib.nullcontext()  # publishing notices
    return writing(folder, file=join(os.path.dirname(folder), f".{os.path.basename(folder)}.lock"))


def _as_it_stands(spec: PrepareSpec, existing: Manifest) -> PrepareSpec:
    """The spec with what it does not say filled in from a manifest."""
    default = PrepareSpec("")
    names = ("source", "encoding", "window_length", "hop_length", "trim_silence", "loudness", "record_length")
    unsaid = [name for name in (*names, "num_levels") if getattr(spec, name) == getattr(default, name)]
    return dataclasses.replace(spec, **{name: getattr(existing, name) for name in unsaid})


def _split_rule(spec: PrepareSpec, dataset: DataSet) -> SplitRule:
    rule = split_rule(spec.splits, spec.validation_list, spec.test_list)
    if rule.name == DEFAULT_RULE:
        return rule
    if dataset.name in DATA_SETS:
        flag = "--splits" if rule.shares else "--validation_list and --test_list"
        raise UserError(
            f"{dataset.name} has its own splits, which its published figures are for: leave out {flag}, or prepare the "
            "recordings under a --dataset name of your own"
        )
    return SplitRule() if rule.shares == DEFAULT_SHARES and not str(spec.source).startswith("hf:") else rule


def _fingerprint(source: Source, spec: PrepareSpec, rule: SplitRule) -> str:
    """The source's own, and with it the options that decide which samples are trained on, but for their defaults."""
    options = {
        "hop_length": spec.hop_length if spec.hop_length != spec.window_length else None,
        "trim_silence": spec.trim_silence,
        "loudness": spec.loudness,
        "split_rule": rule.name if rule.name != DEFAULT_RULE else None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return source.fingerprint()
    return hashlib.sha256(json.dumps([source.fingerprint(), given]).encode()).hexdigest()


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
                "--source, a folder, an archive (zip or tar), a URL or hf:USER/NAME"
            )
        source = "hub" if dataset.repo else "synth"
    window_length = dataset.window_length if spec.window_length is None else spec.window_length
    spec = dataclasses.replace(
        spec,
        source=source,
        encoding=dataset.encoding if spec.encoding is None else spec.encoding,
        window_length=window_length,
        hop_length=window_length if spec.hop_length is None else spec.hop_length,
    )
    if spec.encoding not in ENCODINGS:
        raise UserError(f"--encoding must be one of {', '.join(ENCODINGS)}, got {spec.encoding!r}")
    for name, low, high in (
        ("window_length", 1, 1 << 40),
        ("hop_length", 1, 1 << 40),
        ("record_length", 1, MAX_RECORD_LENGTH),
        ("num_levels", 2, MAX_LEVELS),
        ("num_shards", 1, 99_999),
    ):
        value = getattr(spec, name)
        if value is None and name == "num_shards":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise UserError(f"--{name} must be a whole number from {low:,} to {high:,}, got {value!r}")
    for name, low_db, high_db, unit in (("trim_silence", 1, 200, "dB"), ("loudness", -70, 0, "LUFS")):
        value = getattr(spec, name)
        if value is not None and not low_db <= value <= high_db:  # nor NaN
            raise UserError(f"--{name} must be from {low_db} to {high_db} {unit}, got {value:g}")
    if not spec.output_dir:
        raise UserError("--output_dir is empty; give a folder")
    return dataset, spec


def describe(spec: PrepareSpec, fingerprint: str, rule: str = DEFAULT_RULE) -> Manifest:
    """The manifest of a resolved spec, without what only the run can tell."""
    return Manifest(
        dataset=spec.dataset,
        source=shown(str(spec.source)),  # without what it may be signed with
        fingerprint=fingerprint,
        sample_rate=SAMPLE_RATE,
        encoding=str(spec.encoding),
        num_levels=spec.num_levels,
        token_dtype=token_dtype(spec.num_levels).name,
        channels=1,
        window_length=int(spec.window_length or 0),
        hop_length=int(spec.hop_length or spec.window_length or 0),
        record_length=spec.record_length,
        trim_silence=None if spec.trim_silence is None else float(spec.trim_silence),
        loudness=None if spec.loudness is None else float(spec.loudness),
        split_rule=rule,
        splits={},
    )


def check_same(existing: Manifest, wanted: Manifest, folder: str) -> None:
    """Refuses to take one data set for another.

    Raises:
      UserError: names the first difference.
    """
    for field in (
        *("dataset", "encoding", "num_levels", "window_length", "hop_length", "record_length", "sample_rate"),
        *("trim_silence", "loudness", "split_rule", "fingerprint"),
    ):
        old, new = ("none" if value is None else value for value in (getattr(existing, field), getattr(wanted, field)))
        if old != new:
            what = f"{field} {old}, not {new}"
            if field == "fingerprint":
                what = f"other recordings (source {existing.source}, fingerprint {old[:12]}, not {new[:12]})"
            raise UserError(
                f"{folder} holds a data set with {what}; give --overwrite to replace it, or another --output_dir"
            )


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
      progress: a local file that gets entries of what was done, or None.

    Returns:
      A collection of one element, the manifest that was written.
    """
    import apache_beam as beam

    from pipelines.beam import steps as transforms

    counts = transforms.shard_counts(recordings, SHARD_BYTES, num_shards, MAX_SHARDS)
    listed = {split: sum(recording.split == split for recording in recordings) for split in SPLITS}
    shards = transforms.group_by_shard(recordings, counts)
    if len(recordings) <= MAX_IN_GRAPH:
        listed_shards = pipeline | "Shards" >> beam.Create(shards, reshuffle=False)
    else:
        files = transforms.stage_listing(folder, run, shards, _LISTING_ROWS)
        listed_shards = (
            pipeline | "Listing" >> beam.Create(files) | "ReadListing" >> beam.FlatMap(transforms.read_listing)
        )
    return (
        listed_shards
        | "Spread" >> beam.Reshuffle()
        | "WriteShard" >> beam.ParDo(transforms.WriteShard(source, counts, described, folder, run, progress))
        | "Gather" >> beam.combiners.ToList()
        | "Publish" >> beam.ParDo(transforms.Publish(listed, described, folder, run, complete))
    )


def _run(
    spec: PrepareSpec,
    dataset: DataSet,
    source: Source,
    rule: SplitRule,
    described: Manifest,
    folder: str,
    options: list[str],
    workers: LocalWorkers | None,
    progress: Progress | None,
) -> Manifest:
    recordings = rule.apply(source.list())
    for split in SPLITS:
        if not any(recording.split == split for recording in recordings):
            raise UserError(
                f"source {spec.source} has no recordings for split {split}; "
                + ("give the whole data set" if dataset.name in DATA_SETS else "add recordings, or cut a long one")
            )
    import_beam()
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

    pipeline_options = PipelineOptions(options)
    pipeline_options.view_as(SetupOptions).save_main_session = False
    remove_config(folder)
    clear(folder)
    run = uuid.uuid4().hex
    with quiet(), _watch(progress, recordings, stage_folder(folder, run)) as progress_file:
        try:
            pipeline = beam.Pipeline(local_runner(pipeline_options, workers), options=pipeline_options)
            with uncollected():
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
            if workers is not None and workers.lost(wait=0.0 if isinstance(error, KeyboardInterrupt) else 1.0):
                raise UserError(
                    "a worker process was lost: it was killed, or no memory was left; run the same command again, with "
                    "fewer --direct_num_workers if need be"
                ) from error
            if re.search(r"^KeyboardInterrupt\b", str(error), re.MULTILINE):  # Beam wraps this, too
                raise KeyboardInterrupt from error
            raise
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"the runner ended without an error and without a data set in {folder}; use another --runner")
    write_config(folder, manifest)
    return manifest


@contextlib.contextmanager
def _watch(progress: Progress | None, recordings: Sequence[SourceRecording], stage: str) -> Iterator[str | None]:
    """A file for workers to note what they did in, and a thread that reports it."""
    if progress is None:
        yield None
        return
    from pipelines.beam.steps import PROGRESS_ENTRY

    stop = threading.Event()
    total, size = len(recordings), max(sum(recording.size for recording in recordings), 1)
    with tempfile.TemporaryDirectory(prefix="harmonic-progress-") as folder:
        # A local run's file stands with its shards, so that the next run clears it away if this one is killed.
        path = join(stage, "progress") if is_local(stage) else join(folder, "progress")

        def report() -> None:
            read, sums = 0, [0, 0, 0]
            while not stop.wait(_POLL_SECONDS):
                with contextlib.suppress(OSError):
                    with open(path, "rb") as file:
                        file.seek(read)
                        data = file.read()
                    data = data[: len(data) // PROGRESS_ENTRY.size * PROGRESS_ENTRY.size]
                    read += len(data)
                    sums = [sum(values) for values in zip(sums, *PROGRESS_ENTRY.iter_unpack(data), strict=True)]
                    # What a worker had to do again counts twice.
                    done, source_bytes = min(sums[0], total), min(sums[1] / size, 1.0)
                    progress(done, total, sums[2] / SAMPLE_RATE, source_bytes)

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        try:
            yield path
        finally:
            stop.set()
            thread.join()

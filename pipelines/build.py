"""Prepares a data set: returns one that is whole already, or else opens the source and runs the Beam graph.

    manifest = prepare(PrepareSpec("youtubemix", source="/data/youtube_mix.zip"))

A recording's way is straight: `pipelines.sources` opens it, `pipelines.audio` makes tokens of it, `pipelines.beam`
writes them into a shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence

from harmonic.audio import ENCODINGS, MAX_LEVELS, SAMPLE_RATE, token_dtype
from harmonic.errors import Unreadable, UserError
from harmonic.locks import writing
from harmonic.records import SPLITS, Manifest, Skipped
from pipelines.beam.loading import import_beam, uncollected
from pipelines.beam.progress import Progress
from pipelines.beam.runners import (
    DEFAULT_RUNNER,
    beam_options,
    check_output,
    is_elsewhere,
    runner_of,
    wants_processes,
)
from pipelines.beam.sink import clear, clear_stages, create_folder, missing_files, read_manifest
from pipelines.beam.workers import LocalWorkers
from pipelines.own_config import remove_config, write_config
from pipelines.paths import is_local, join
from pipelines.sources import open_source
from pipelines.sources.base import Source, SourceRecording
from pipelines.sources.layouts import DATA_SETS, AudioFiles, DataSet, data_set
from pipelines.sources.remote import shown
from pipelines.sources.splits import DEFAULT_RULE, DEFAULT_SHARES, SplitRule, split_by_hash, split_rule

MAX_RECORD_LENGTH = 1 << 24


@dataclasses.dataclass(frozen=True)
class PrepareSpec:
    """What to prepare. None means the data set's own default.

    Attributes:
      dataset: demo, sc09, beethoven, youtubemix, or a name of one's own.
      source: `hub`, `synth`, `hf:USER/NAME`, or a folder or an archive (zip, tar): a path or a URL.
      output_dir: the data set's folder is made in it; local, or of a file system that Beam knows.
      encoding: mu_law or linear.
      window_length: samples of the usual training window; windows are counted with it.
      hop_length: samples from the start of one such window to the next; the window's length if None.
      splits: shares of train, validation and test, by a hash of the names, for recordings of one's own.
      validation_list, test_list: or files that name the recordings of these splits, one a line.
      trim_silence: cut off leading and trailing silence that many dB below the loudest frame; None does not trim.
      loudness: bring recordings to that loudness in LUFS, and to one scale; None scales each by its own extremes.
      record_length: longest piece of a recording in a record, in samples.
      num_levels: 2 to 65,536.
      num_shards: at most so many of each split; by the source's size if None.
      allow_skipped: accept recordings that cannot be read also in a published data set, or as the only ones of a split.
      overwrite: replace a data set that another spec or source left in the folder.
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
    """Prepares a data set, unless `spec.folder` holds it whole already, and returns its manifest.

    Args:
      spec: what to prepare.
      options: Beam's, as on the command line; the runner is the in-process FnApiRunner if they name none.
      progress: called now and then from another thread while a local runner works.

    Raises:
      UserError: a bad value, option, source or output folder; the message is one line.
    """
    data_set(spec.dataset)  # refuses a name that cannot be a folder's
    folder = os.path.abspath(os.path.expanduser(spec.folder)) if is_local(spec.folder) else spec.folder
    existing = None if spec.overwrite else read_manifest(folder)
    whole = existing is not None and not missing_files(folder, existing)
    # For a whole data set of one's own, the source and the options need not be given again.
    reused = existing is not None and whole and spec.source is None and spec.dataset not in DATA_SETS
    if existing is not None and reused:
        spec = _completed(spec, existing)
    dataset, spec = resolve(spec)
    with contextlib.ExitStack() as stack:
        workers = None
        if not whole and wants_processes(options):  # first, since it takes as long as everything else before the run
            workers = stack.enter_context(LocalWorkers(preload="pipelines.beam.steps"))
        options = beam_options(options)
        runner = runner_of(options)
        check_output(folder, runner)
        rule = _split_rule(spec, dataset)
        opened = None
        if existing is not None:
            # A whole data set from the hub needs no network: the archive is assumed to be the same.
            if not reused and not existing.source == spec.source == "hub":
                opened = _open(spec, dataset, rule, runner, stack)
            fingerprint = opened[1] if opened else existing.fingerprint
            asked_rule = existing.split_rule if reused and rule.name == DEFAULT_RULE else rule.name
            check_same(existing, new_manifest(spec, fingerprint, asked_rule), folder)
            if whole:
                return _kept(existing, folder, complete=dataset.complete and not spec.allow_skipped)
        source, fingerprint = opened or _open(spec, dataset, rule, runner, stack)
        manifest = dataclasses.replace(new_manifest(spec, fingerprint, rule.name), left_out=source.left_out())
        create_folder(folder)
        with _alone(folder):
            if not spec.overwrite and read_manifest(folder) != existing:
                raise UserError(f"another run has just written {folder}; run the same command again")
            recordings = _recordings(source, rule, spec)
            if spec.allow_skipped and rule.lists is None and isinstance(dataset.layout, AudioFiles):
                recordings, unreadable = _fill_splits(source, rule, recordings)
                manifest = dataclasses.replace(manifest, skipped=unreadable)
            import_beam()
            from pipelines.beam import graph

            remove_config(folder)
            clear(folder)
            graph.run(
                source,
                recordings,
                manifest,
                folder=folder,
                options=options,
                num_shards=spec.num_shards,
                complete=dataset.complete and not spec.allow_skipped,
                workers=workers,
                progress=progress,
            )
            written = read_manifest(folder)
            if written is None:
                raise UserError(
                    f"the runner ended without an error and without a data set in {folder}; use another --runner"
                )
            write_config(folder, written)
            return written


def _completed(spec: PrepareSpec, existing: Manifest) -> PrepareSpec:
    """The spec with everything that it leaves at its default filled in from a manifest."""
    default = PrepareSpec("")
    names = ["source", "encoding", "window_length", "hop_length", "trim_silence", "loudness", "record_length"]
    unsaid = [name for name in (*names, "num_levels") if getattr(spec, name) == getattr(default, name)]
    return dataclasses.replace(spec, **{name: getattr(existing, name) for name in unsaid})


def _open(
    spec: PrepareSpec, dataset: DataSet, rule: SplitRule, runner: str, stack: contextlib.ExitStack
) -> tuple[Source, str]:
    """The source, which `stack` closes, and the data set's fingerprint."""
    with uncollected():  # a listing can be long
        source = open_source(
            dataset,
            str(spec.source),
            download=runner == DEFAULT_RUNNER,
            unseen_by=runner if is_elsewhere(runner) else None,
        )
        stack.callback(source.close)
        return source, _fingerprint(source, spec, rule)


def _fingerprint(source: Source, spec: PrepareSpec, rule: SplitRule) -> str:
    """The source's fingerprint, and with it all options that decide what is trained on and are not the defaults."""
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


def _kept(existing: Manifest, folder: str, complete: bool) -> Manifest:
    """The manifest of a data set that is whole already."""
    if complete and existing.skipped:
        raise UserError(
            f"{folder} lacks {len(existing.skipped)} recordings that could not be read; give --allow_skipped "
            "to use it as it is, or --overwrite to prepare it again"
        )
    with contextlib.suppress(UserError), _alone(folder):  # the folder may not be writable
        clear_stages(folder)  # of a run that was killed after it had written everything
        write_config(folder, existing)
    return existing


def _alone(folder: str) -> contextlib.AbstractContextManager[None]:
    """Locks a local folder against other runs. The lock file is beside it: the folder holds the data set alone."""
    if not is_local(folder):
        return contextlib.nullcontext()  # `publish` notices another run
    return writing(folder, file=join(os.path.dirname(folder), f".{os.path.basename(folder)}.lock"))


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


def _recordings(source: Source, rule: SplitRule, spec: PrepareSpec) -> Sequence[SourceRecording]:
    """The source's listing, with recordings in every split."""
    recordings = rule.apply(source.list())
    for split in SPLITS:
        if not any(recording.split == split for recording in recordings):
            raise UserError(
                f"source {spec.source} has no recordings for split {split}; "
                + ("give the whole data set" if spec.dataset in DATA_SETS else "add recordings, or cut a long one")
            )
    return recordings


def _fill_splits(
    source: Source, rule: SplitRule, recordings: Sequence[SourceRecording]
) -> tuple[Sequence[SourceRecording], tuple[Skipped, ...]]:
    """The recordings without those of a split of which none can be read, split anew; and these.

    Small data sets may have a split with a single recording. Usually one recording of each split is read here.
    """
    from pipelines.audio.waveform import measure

    skipped: list[Skipped] = []
    while True:
        for split in SPLITS:
            failed = []
            for recording in sorted((r for r in recordings if r.split == split), key=lambda r: (r.size, r.id)):
                try:
                    with source.open(recording.id) as file, measure(file):
                        break
                except Unreadable as error:
                    failed.append(Skipped(recording.id, split, str(error)))
            else:
                break
        else:
            return recordings, tuple(skipped)
        gone = {f.recording for f in failed}
        left = [recording for recording in recordings if recording.id not in gone]
        if len(left) < len(SPLITS):
            raise UserError(
                f"{len(left)} recordings can be read, and at least 3 are needed: {failed[0].recording} "
                f"{failed[0].reason}; add recordings, or cut a long one"
            )
        skipped += failed
        splits = split_by_hash((recording.id for recording in left), rule.shares or DEFAULT_SHARES)
        recordings = [dataclasses.replace(recording, split=splits[recording.id]) for recording in left]


def resolve(spec: PrepareSpec) -> tuple[DataSet, PrepareSpec]:
    """The data set, and the spec with its defaults filled in.

    Raises:
      UserError: a value is out of its bounds.
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
        if value is not None and not low_db <= value <= high_db:  # false for NaN as well
            raise UserError(f"--{name} must be from {low_db} to {high_db} {unit}, got {value:g}")
    if not spec.output_dir:
        raise UserError("--output_dir is empty; give a folder")
    return dataset, spec


def new_manifest(spec: PrepareSpec, fingerprint: str, rule: str = DEFAULT_RULE) -> Manifest:
    """The manifest of a resolved spec before the run, which fills in splits and skipped recordings."""
    return Manifest(
        dataset=spec.dataset,
        source=shown(str(spec.source)),  # without a password or signature
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
    fields = ["dataset", "encoding", "num_levels", "window_length", "hop_length", "record_length", "sample_rate"]
    fields += ["trim_silence", "loudness", "split_rule", "fingerprint"]
    for field in fields:
        old, new = ("none" if value is None else value for value in (getattr(existing, field), getattr(wanted, field)))
        if old != new:
            what = f"{field} {old}, not {new}"
            if field == "fingerprint":
                what = f"other recordings (source {existing.source}, fingerprint {old[:12]}, not {new[:12]})"
            raise UserError(
                f"{folder} holds a data set with {what}; give --overwrite to replace it, or another --output_dir"
            )

"""The Beam graph of preparing a data set, and its run.

Shards, each a list of names of recordings -> spread over the workers -> one step a shard that reads, quantises and
writes it -> one step that checks the counts, publishes the shards and writes the manifest. Audio is never shuffled.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

from harmonic.errors import UserError
from harmonic.records import SPLITS, Manifest
from pipelines.beam import sharding
from pipelines.beam.loading import uncollected
from pipelines.beam.progress import Progress, watched
from pipelines.beam.runners import local_runner, quiet, unwrap
from pipelines.beam.sink import clear, stage_folder
from pipelines.beam.steps import Publish, WriteShard
from pipelines.beam.workers import LocalWorkers
from pipelines.sources.base import Source, SourceRecording

SHARD_BYTES = 32 << 20  # of source for each shard
# of each split. The manifest lists all shards, and one step holds it: 40 MB of text at most for a split.
MAX_SHARDS = 65_536
# Dataflow would refuse a job that holds a longer listing: the listing is then staged beside the shards.
MAX_IN_GRAPH = 20_000
_LISTING_ROWS = 20_000  # recordings in each file of a staged listing


def build(
    pipeline: beam.Pipeline,
    source: Source,
    recordings: Sequence[SourceRecording],
    manifest: Manifest,
    *,
    folder: str,
    run: str,
    num_shards: int | None = None,
    complete: bool = False,
    progress: str | None = None,
) -> Any:
    """Adds the whole graph to a pipeline.

    Args:
      pipeline: to add it to.
      source: opens the recordings, on the workers.
      recordings: the source's listing.
      manifest: the data set's properties, without splits and skipped recordings.
      folder: the data set's folder.
      run: 32 hexadecimal digits, different for every run.
      num_shards: at most so many of each split; by the source's size if None.
      complete: whether a recording that cannot be read is an error.
      progress: a local file to which workers append their progress, or None.

    Returns:
      A collection of one element, the manifest as it was written.
    """
    counts = sharding.shard_counts(recordings, SHARD_BYTES, num_shards, MAX_SHARDS)
    listed = {split: sum(recording.split == split for recording in recordings) for split in SPLITS}
    rows = sharding.group_by_shard(recordings, counts)
    if len(recordings) <= MAX_IN_GRAPH:
        listing = pipeline | "Shards" >> beam.Create(rows, reshuffle=False)
    else:
        files = sharding.stage_listing(folder, run, rows, _LISTING_ROWS)
        listing = pipeline | "Listing" >> beam.Create(files) | "ReadListing" >> beam.FlatMap(sharding.read_listing)
    return (
        listing
        | "Spread" >> beam.Reshuffle()
        | "WriteShard" >> beam.ParDo(WriteShard(source, counts, manifest, folder, run, progress))
        | "Gather" >> beam.combiners.ToList()
        | "Publish" >> beam.ParDo(Publish(listed, manifest, folder, run, complete))
    )


def run(
    source: Source,
    recordings: Sequence[SourceRecording],
    manifest: Manifest,
    *,
    folder: str,
    options: Sequence[str],
    num_shards: int | None,
    complete: bool,
    workers: LocalWorkers | None,
    progress: Progress | None,
) -> None:
    """Runs the graph to its end; a failed run's files are removed.

    Args:
      source, recordings, manifest, folder, num_shards, complete: as for `build`.
      options: from `beam_options`.
      workers: local worker processes, or None.
      progress: called now and then from another thread, or None.

    Raises:
      UserError: the first that a worker raised, or a worker process was lost.
    """
    pipeline_options = PipelineOptions(list(options))
    pipeline_options.view_as(SetupOptions).save_main_session = False
    run_id = uuid.uuid4().hex
    with quiet(), watched(progress, recordings, stage_folder(folder, run_id)) as progress_file:
        try:
            pipeline = beam.Pipeline(local_runner(pipeline_options, workers), options=pipeline_options)
            with uncollected():
                build(
                    pipeline,
                    source,
                    recordings,
                    manifest,
                    folder=folder,
                    run=run_id,
                    num_shards=num_shards,
                    complete=complete,
                    progress=progress_file,
                )
            pipeline.run().wait_until_finish()
        except BaseException as error:
            with contextlib.suppress(UserError):
                clear(folder, run_id)
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

"""A published data set is added by one object: a toy layout whose splits and labels are in a CSV, as MAESTRO's are."""

import csv
import dataclasses
import io
import re

import pytest
from archives import wav, write_folder, write_zip
from prepared import TWO_PROCESSES, read_folder

from harmonic import records
from harmonic.errors import UserError
from pipelines import build
from pipelines.build import PrepareSpec
from pipelines.sources import layouts, open_source
from pipelines.sources.layouts import DataSet, Layout, Misfit


@dataclasses.dataclass(frozen=True)
class Table(Layout):
    """Recordings are the rows of a CSV file beside them."""

    file: str

    def root(self, paths):
        roots = [path.removesuffix(self.file) for path in paths if path.split("/")[-1] == self.file]
        if len(roots) != 1:
            raise Misfit(f"holds {len(roots)} files {self.file}")
        return roots[0]

    def recordings(self, ids, read):
        rows = csv.DictReader(io.StringIO(read(self.file)))
        found = {row["audio_filename"]: (row["split"], row["composer"]) for row in rows}
        if absent := sorted(found.keys() - set(ids)):
            raise Misfit(f"lacks {absent[0]}", "get it again")
        return found


PIANO = DataSet("piano", Table("piano.csv"), "linear", 500, complete=True)
COMPOSERS = {"train": ("Bach", "Liszt"), "validation": ("Bach",), "test": ("Liszt",)}
ROWS = [
    (f"200{i}/{split}-{composer}.wav", split, composer)
    for split, composers in COMPOSERS.items()
    for i, composer in enumerate(composers)
]


def files(rows=ROWS, top="piano-v1/"):
    table = "\r\n".join(["composer,split,audio_filename", *(f"{c},{s},{name}" for name, s, c in rows)])
    sounds = {f"{top}{name}": wav(1_000 + 100 * i, seed=i) for i, (name, _, _) in enumerate(ROWS)}
    return sounds | {f"{top}piano.csv": table.encode(), f"{top}2000/unlisted.wav": wav(), f"{top}README": b""}


def test_splits_and_labels_of_a_table(tmp_path):
    archive = open_source(PIANO, str(write_zip(tmp_path / "a.zip", files())))
    assert sorted((r.id, r.split, r.label) for r in archive.list()) == sorted(ROWS)
    assert open_source(PIANO, str(write_folder(tmp_path / "f", files(top="")))).list() == archive.list()


def test_the_table_is_part_of_the_fingerprint(tmp_path):
    def fingerprint(files):
        return open_source(PIANO, str(write_zip(tmp_path / "a.zip", files))).fingerprint()

    first = fingerprint(files())
    assert fingerprint(files() | {"piano-v1/README": b"text", "piano-v1/2000/unlisted.wav": b""}) == first
    assert fingerprint(files([(ROWS[0][0], "test", "Bach"), *ROWS[1:]])) != first
    assert fingerprint(files() | {f"piano-v1/{ROWS[0][0]}": wav(999)}) != first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a.wav": wav()}, "holds 0 files piano.csv; give the archive or folder of piano"),
        (files() | {"b/piano.csv": b""}, "holds 2 files piano.csv; give"),
        (files([("x.wav", "train", "Bach")]), "lacks x.wav; get it again"),
        (files([]), "holds no recordings; give the archive or folder of piano"),
        (files() | {"piano-v1/piano.csv": b"\xff"}, "piano.csv in {source} cannot be read: 'utf-8' codec"),
    ],
)
def test_misfits_are_told_with_the_source_and_a_way_out(tmp_path, given, message):
    source = write_zip(tmp_path / "a.zip", given)
    expected = message.format(source=source) if "{" in message else f"{source} {message}"
    with pytest.raises(UserError, match=re.escape(expected)):
        open_source(PIANO, str(source)).list()


@pytest.mark.parametrize("options", [(), TWO_PROCESSES])
def test_a_data_set_of_that_layout_is_prepared(tmp_path, monkeypatch, options):
    monkeypatch.setitem(layouts.DATA_SETS, "piano", PIANO)
    source = str(write_zip(tmp_path / "a.zip", files()))
    manifest = build.prepare(PrepareSpec("piano", source, str(tmp_path)), options)
    assert (manifest.encoding, manifest.window_length) == ("linear", 500)
    labels = {
        (row.id, split, row.label)
        for split, part in manifest.splits.items()
        for shard in part.shards
        for row in records.read_index(tmp_path / "piano", shard)
    }
    assert labels == set(ROWS)
    assert "config.py" not in read_folder(tmp_path / "piano")  # as for other published data sets

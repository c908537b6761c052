"""Hostile input: whatever is read, nothing but the documented errors comes out, and nothing is written elsewhere.

    HARMONIC_FUZZ=full python -m pytest tests/test_fuzz.py -s      # at least 10,000 new cases, and their number

Without that variable each test has a few cases, the same ones every time.
"""

import bz2
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import resource
import shutil
import tempfile
import zipfile
import zlib

import hostile
import numpy as np
import pytest
import soundfile
from archives import wav, write_zip
from hostile import CASES, JSON, TEXT, changed_json, damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from mains import run_main

from harmonic import config, data, records
from harmonic.config import Config, load_config
from harmonic.errors import Unreadable, UserError
from pipelines import prepare
from pipelines.audio.waveform import measure
from pipelines.beam import sink
from pipelines.beam.sink import ShardWriter
from pipelines.inspection import verify
from pipelines.sources import open_source
from pipelines.sources.layouts import data_set

DOCUMENTED = (UserError, Unreadable)


@pytest.fixture(scope="module", autouse=True)
def counted_and_bounded():
    """Prints how many cases there were; all of them together may not take much more memory than their start."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\n{CASES.total():,} cases in {len(CASES)} tests; peak memory grew by {grown:.0f} MB: {dict(CASES)}")
    assert grown < 400
    if hostile.FULL and len(CASES) > 10:  # all of them, not a few chosen ones
        assert CASES.total() >= 10_000


@pytest.fixture
def case(request):
    """Counts a case, in the test's name."""
    return lambda: CASES.update([request.node.name])


def one_line_of(error):
    text = str(error)
    assert text and "\n" not in text and len(text) < 2_000
    return text


# Records, indices, manifests.

RECORD = records.Record("zero/a.wav", 131_072, 131_172, np.arange(100, dtype=np.uint8)[:, None], "zero")


@fuzz(2_000)
@given(st.data())
def test_record(case, draw):
    case()
    encoded = records.encode_record(RECORD)
    changed = draw.draw(damaged(encoded))
    try:
        decoded = records.decode_record(changed)
    except records.RecordError as error:
        one_line_of(error)
        assert changed != encoded
    else:
        assert changed == encoded and decoded.recording == RECORD.recording


@fuzz(1_500)
@given(st.data())
def test_record_with_a_right_checksum_and_any_header(case, draw):
    case()
    encoded = records.encode_record(RECORD)
    size = int.from_bytes(encoded[4:8], "little")
    header = draw.draw(changed_json(json.loads(encoded[8 : 8 + size])) | JSON)
    text = draw.draw(st.just(json.dumps(header).encode()) | st.just(b"[" * 100_000) | damaged(encoded[8 : 8 + size]))
    size = draw.draw(st.just(len(text)) | st.integers(0, 2**32 - 1))
    body = b"HRN1" + size.to_bytes(4, "little") + text + encoded[8 + size : -4]
    body += zlib.crc32(body).to_bytes(4, "little")
    for verified in (True, False):
        try:
            record = records.decode_record(body, verify=verified)
        except records.RecordError as error:
            one_line_of(error)
        else:
            assert isinstance(record.recording, str) and record.tokens.ndim == 2 and record.tokens.nbytes <= len(body)
            assert type(record.offset) is type(record.recording_length) is int


@functools.cache
def small_dataset():
    """A data set of three splits, a shard of two recordings each, written without Beam: its folder, and manifest."""
    folder = tempfile.TemporaryDirectory(prefix="harmonic-fuzz-")
    splits = {}
    for number, split in enumerate(records.SPLITS):
        with ShardWriter(folder.name, "0" * 32, 50) as writer:
            for i, length in enumerate((230, 90)):
                tokens = np.random.default_rng(10 * number + i).integers(0, 256, (length, 1), np.uint8)
                for at in range(0, length, 100):
                    writer.write(records.Record(f"{i}.wav", at, length, tokens[at : at + 100]))
                writer.end_recording(records.Recording(f"{i}.wav", length, -(-length // 100), None, -0.5, 0.5, 16_000))
            shard, staged = writer.stage(sink.shard_name(split, 0, 1))
        for path, name in zip(staged, (shard.file, shard.index_file), strict=True):
            os.rename(path, os.path.join(folder.name, name))
        splits[split] = records.Split(shard.recordings, shard.windows, shard.samples, (shard,))
    os.rmdir(sink.stage_folder(folder.name, "0" * 32))
    manifest = records.Manifest(
        "mine", "f", "0" * 64, 16_000, "mu_law", 256, "uint8", 1, 50, 50, 100, None, None, "default", splits
    )
    return folder, manifest


def sealed(raw):
    """A manifest's text with a checksum that is right, whatever it says."""
    body = {key: value for key, value in raw.items() if key != "checksum"} if isinstance(raw, dict) else raw
    if not isinstance(body, dict):
        return json.dumps(body)
    checksum = hashlib.sha256(json.dumps(body, indent=2).encode()).hexdigest()
    return json.dumps({**body, "checksum": checksum}, indent=2) + "\n"


def read_all(folder, split="train"):
    """What training reads: every window of a split."""
    windows = data.Windows(data.Dataset(folder).split(split), 50)
    assert len(windows) < 10_000
    return [(windows[i]["tokens"].tobytes(), int(windows[i]["length"])) for i in range(len(windows))]


@pytest.fixture
def laid_out(tmp_path):
    """A function that lays out the small data set with some of its files replaced; returns its folder."""
    folder, manifest = small_dataset()

    def lay(**replaced):
        target = tempfile.mkdtemp(dir=tmp_path)
        texts = {records.MANIFEST_NAME: manifest.to_json().encode()} | replaced
        for name in os.listdir(folder.name):
            if name not in texts:
                os.link(os.path.join(folder.name, name), os.path.join(target, name))
        for name, content in texts.items():
            with open(os.path.join(target, name), "wb") as file:
                file.write(content)
        return target

    return lay


@fuzz(900)
@given(st.data())
def test_manifest(case, laid_out, draw):
    case()
    text = small_dataset()[1].to_json()
    changed = draw.draw(
        damaged(text.encode())
        | changed_json(json.loads(text)).map(lambda raw: sealed(raw).encode())
        | JSON.map(lambda raw: sealed(raw).encode())
    )
    folder = laid_out(**{records.MANIFEST_NAME: changed})
    before = sorted(os.listdir(folder))
    try:
        manifest = records.load_manifest(folder)
        for split in manifest.splits.values():
            for shard in split.shards:
                assert {os.path.dirname(shard.file), os.path.dirname(shard.index_file)} == {""}
        sink.missing_files(folder, manifest)
        if sum(split.windows for split in manifest.splits.values()) < 1_000:
            read_all(folder)
    except UserError as error:
        one_line_of(error)
    assert sorted(os.listdir(folder)) == before


def index_rows():
    folder, manifest = small_dataset()
    with open(os.path.join(folder.name, manifest.splits["train"].shards[0].index_file), "rb") as file:
        return [json.loads(line) for line in file]


def index_of(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@fuzz(900)
@given(st.data())
def test_index_that_the_manifest_vouches_for(case, laid_out, draw):
    """The worst an index can be: changed, and the manifest sealed again to match it."""
    case()
    rows = index_rows()
    vouched_for(laid_out, draw.draw(damaged(index_of(rows)) | changed_json(rows).map(index_of)))


@pytest.mark.parametrize("name", ["a" * 5_000, "a\nb", "\ud800", ""], ids=["long", "newline", "surrogate", "empty"])
def test_index_with_a_name_that_is_not_the_records(laid_out, name):
    first, *others = index_rows()
    vouched_for(laid_out, index_of([{**first, "id": name}, *others]))


def vouched_for(laid_out, changed):
    _, manifest = small_dataset()
    (shard,) = manifest.splits["train"].shards
    vouched = dataclasses.replace(shard, index_bytes=len(changed), index_sha256=hashlib.sha256(changed).hexdigest())
    splits = manifest.splits | {"train": dataclasses.replace(manifest.splits["train"], shards=(vouched,))}
    text = dataclasses.replace(manifest, splits=splits).to_json().encode()
    place = laid_out(**{records.MANIFEST_NAME: text, shard.index_file: changed})
    try:
        if sum(row.length for row in records.read_index(place, vouched)) < 100_000:
            read_all(place)
    except UserError as error:
        one_line_of(error)
    problems = []
    verify.Verifier(place, records.load_manifest(place), problems.append).run()
    assert problems or [dataclasses.asdict(row) for row in records.read_index(place, vouched)]


@fuzz(600)
@given(st.data())
def test_shard(case, laid_out, draw):
    """A damaged shard is read as it was written, or not at all; --verify names every one that differs."""
    case()
    folder, manifest = small_dataset()
    (shard,) = manifest.splits["train"].shards
    with open(os.path.join(folder.name, shard.file), "rb") as file:
        whole = file.read()
    heart = [i for i in range(len(whole)) if whole[i]]  # most of the 64 KiB are zeros that fill a block up
    changed = bytearray(whole)
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.sampled_from(heart) | st.integers(0, len(whole) - 1))
        changed[at] ^= draw.draw(st.integers(1, 255))
    place = laid_out(**{shard.file: bytes(changed)})
    try:
        assert read_all(place) == read_all(folder_of_small())
    except UserError as error:
        one_line_of(error)
    problems = []
    verify.Verifier(place, manifest, problems.append).run()
    assert bool(problems) == (bytes(changed) != whole)


@functools.cache
def folder_of_small():
    folder, manifest = small_dataset()
    with open(os.path.join(folder.name, records.MANIFEST_NAME), "w") as file:
        file.write(manifest.to_json())
    return folder.name


# Configs.


@fuzz(1_200)
@given(st.data())
def test_config_file(case, tmp_path, draw):
    case()
    text = Config().to_json()
    changed = draw.draw(
        damaged(text.encode()) | changed_json(json.loads(text)).map(lambda raw: json.dumps(raw).encode())
    )
    (tmp_path / "c.json").write_bytes(changed)
    try:
        loaded = load_config(str(tmp_path / "c.json"))
    except UserError as error:
        one_line_of(error)
    else:
        assert config.from_dict(json.loads(loaded.to_json())) == loaded


FIELDS = [
    f"{section}.{name}" if isinstance(values, dict) else section
    for section, values in dataclasses.asdict(Config()).items()
    for name in (values if isinstance(values, dict) else ("",))
]
BAD_LITERALS = (
    *("1e999", "-1", "9" * 400, "9" * 5_000, "(" * 500, "()", "[1,[2]]", "{}", "nan", "1_0", "0x10"),
    *("\0", "'", "\n"),
)
LITERALS = st.sampled_from(BAD_LITERALS) | JSON.map(repr) | st.text(max_size=20)


def overridden(assignment):
    try:
        changed = config.override(Config(), [assignment])
    except UserError as error:
        one_line_of(error)
    else:
        assert config.from_dict(json.loads(changed.to_json())) == changed


@fuzz(1_500)
@given(st.sampled_from(FIELDS) | TEXT, LITERALS, st.booleans())
def test_overrides(case, field, value, sane):
    case()
    overridden(f"{field}={value}" if sane else f"{value}{field}")


def test_every_field_with_every_bad_literal():
    for field in FIELDS:
        for value in (*BAD_LITERALS, f"-{'9' * 400}", f"1,{'9' * 400}"):
            overridden(f"{field}={value}")


@fuzz(300)
@given(TEXT | st.text(max_size=5).map(lambda text: f"{text}.json") | st.text(alphabet="./ab\0", max_size=8))
def test_config_names(case, name):
    case()
    try:
        load_config(name)
    except UserError as error:
        one_line_of(error)


# Sounds.

SOUNDS = (wav(60), wav(50, 44_100, 2), wav(40, 8_000, 1))


def measured(content):
    """What becomes of an audio file: None if it is refused."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        try:
            with measure(file) as waveform:
                pieces = [tokens for _, tokens in waveform.pieces("mu_law", 256, 1_000)]
        except DOCUMENTED as error:
            one_line_of(error)
            return None
    assert sum(map(len, pieces)) == waveform.length <= 17 * 8 * len(content) + 10_000
    return pieces


@fuzz(1_200)
@given(st.data())
def test_damaged_sounds(case, draw):
    case()
    measured(draw.draw(st.sampled_from((*SOUNDS, *other_sounds())).flatmap(damaged)))


@functools.cache
def other_sounds():
    made = []
    for format in ("FLAC", "OGG", "AIFF", "AU", "W64", "RF64", "CAF", "MP3"):
        file = io.BytesIO()
        file.name = "x"
        soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, 300), 16_000, format=format)
        made.append(file.getvalue())
    return tuple(made)


@fuzz(1_500)
@given(hostile.wav_with_any_head())
def test_any_wav_head(case, content):
    case()
    measured(content)


@pytest.mark.parametrize(
    "channels, rate", [(65_535, 16_000), (2**16 - 1, 2**32 - 1), (0, 16_000), (1, 0), (1, 2**32 - 1)]
)
def test_absurd_heads(channels, rate):
    head = np.array([1, channels], "<u2").tobytes() + np.array([rate, 0], "<u4").tobytes() + b"\0\0\x10\0"
    body = b"WAVEfmt " + (16).to_bytes(4, "little") + head + b"data" + (100).to_bytes(4, "little") + bytes(100)
    assert measured(b"RIFF" + len(body).to_bytes(4, "little") + body) is None


# Archives.


def open_all(path):
    """Everything in an archive: {name: bytes, or None where it is refused}; None if the archive is."""
    try:
        source = open_source(data_set("mine"), str(path))
    except UserError as error:
        one_line_of(error)
        return None
    contents = {}
    try:
        for recording in source.list():
            try:
                with source.open(recording.id) as file:
                    contents[recording.id] = file.read()
                    measured(contents[recording.id])
            except Unreadable as error:
                one_line_of(error)
                contents[recording.id] = None
    except UserError as error:
        one_line_of(error)
    finally:
        source.close()
    return contents


@pytest.fixture
def nothing_elsewhere(tmp_path, monkeypatch):
    """A folder for the archive; whatever is read, the folders around it stay as they are."""
    inside = tmp_path / "a" / "b" / "c"
    (tmp_path / "tmp").mkdir()
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield inside
    found = {os.path.relpath(os.path.join(f, n), tmp_path) for f, d, names in os.walk(tmp_path) for n in (*d, *names)}
    assert found <= {"a", "a/b", "a/b/c", "a/b/c/archive", "tmp"}, found
    assert not os.path.exists("/absolute.wav") and not os.path.exists("/tmp/up.wav")


ZIPPED = {f"tape/{i}.wav": sound for i, sound in enumerate((*SOUNDS, wav(900, seed=5)))}


@fuzz(600)
@given(st.data())
def test_damaged_zip(case, nothing_elsewhere, draw):
    """Members that come out of a damaged archive are what went in."""
    case()
    path = nothing_elsewhere / "archive"
    write_zip(path, ZIPPED)
    path.write_bytes(draw.draw(damaged(path.read_bytes())))
    for content in (open_all(path) or {}).values():
        assert content in (None, *ZIPPED.values())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@fuzz(500)
@given(hostile.zip_members(SOUNDS))
def test_hostile_zip(case, nothing_elsewhere, packed):
    case()
    (nothing_elsewhere / "archive").write_bytes(packed)
    for content in (open_all(nothing_elsewhere / "archive") or {}).values():
        assert content in (None, *SOUNDS)


@fuzz(500)
@given(hostile.tar_members(SOUNDS), st.data())
def test_hostile_tar(case, nothing_elsewhere, packed, draw):
    case()
    kind = draw.draw(st.sampled_from((bytes, bytes, gzip.compress, bz2.compress, lzma.compress)))
    packed = kind(packed)
    if whole := draw.draw(st.booleans()):
        content = packed
    else:
        content = draw.draw(damaged(packed))
    (nothing_elsewhere / "archive").write_bytes(content)
    for found in (open_all(nothing_elsewhere / "archive") or {}).values():
        if whole or kind is not bytes:  # which carry a checksum of all
            assert found in (None, *SOUNDS)


def test_hostile_names_go_through_prepare_and_stay_in_the_output(tmp_path, capsys, nothing_elsewhere):
    with zipfile.ZipFile(nothing_elsewhere / "archive", "w") as archive:
        for i, name in enumerate(
            ("../../up.wav", "/absolute.wav", "a/../../b.wav", "\u202ex\n.wav", "plain.wav", "~/h.wav")
        ):
            archive.writestr(name, wav(100 + i, seed=i))
    out = tempfile.mkdtemp()
    status, text, _ = run_main(
        capsys, prepare.main, "--dataset", "mine", "--source", nothing_elsewhere / "archive", "--output_dir", out
    )
    assert status == 0 and "plain.wav" not in text
    manifest = records.load_manifest(os.path.join(out, "mine"))
    listed = {name for split in manifest.splits.values() for s in split.shards for name in (s.file, s.index_file)}
    assert {*listed, "manifest.json", "config.py"} == set(os.listdir(os.path.join(out, "mine")))
    shutil.rmtree(out)

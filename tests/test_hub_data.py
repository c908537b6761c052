"""`hf:` sources: what `datasets` says of a repository, and rows and files read out of it, from a hub on loopback."""

import contextlib
import csv
import io
import json
import pickle
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import parquet, wav
from hub_server import COMMIT, Fault, Hub, take_for_the_hub

from harmonic.errors import Unreadable, UserError
from pipelines.sources import open_source
from pipelines.sources.layouts import data_set


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """(files, ...) -> a hub that this process takes for the hub."""
    with contextlib.ExitStack() as stack:

        def serve(files, **options):
            hub = stack.enter_context(Hub(files, **options))
            take_for_the_hub(monkeypatch, hub, tmp_path / str(id(hub)))
            return hub

        yield serve


def open_hf(source="hf:some/thing"):
    return open_source(data_set("mine"), source)


def read_all(source):
    found = {}
    twin = pickle.loads(pickle.dumps(source))
    for recording in source.list():
        with twin.open(recording.id) as file:
            found[recording.id] = file.read()
    twin.close()
    return found


SPLIT = {
    "data/train-00000-of-00002.parquet": parquet(range(10)),
    "data/train-00001-of-00002.parquet": parquet(range(10, 17)),
    "data/validation-00000-of-00001.parquet": parquet(range(17, 20)),
    "data/test-00000-of-00001.parquet": parquet(range(20, 22)),
}


def test_rows_with_their_own_splits_and_labels(serve):
    serve(SPLIT, token="hf_secret")
    source = open_hf()
    recordings = source.list()
    assert [r.split for r in recordings] == ["test"] * 2 + ["train"] * 17 + ["validation"] * 3
    assert [r.id for r in recordings][2:14:11] == [
        "data/train-00000-of-00002.parquet/0",
        "data/train-00001-of-00002.parquet/1",
    ]
    numbers = [20, 21, *range(17), 17, 18, 19]
    assert [r.label for r in recordings] == [["no", "yes"][n % 2] for n in numbers]
    assert {r.group for r in recordings if "00000-of-00002" in r.id} == {
        f"data/train-00000-of-00002.parquet#{group}" for group in range(3)
    }
    assert all(2_000 < r.size < 5_000 for r in recordings)
    assert list(read_all(source).values()) == [wav(1000 + n, seed=n) for n in numbers]
    assert source.fingerprint() == open_hf().fingerprint() != open_hf(f"hf:some/thing:default@{COMMIT}").fingerprint()


def test_a_row_group_is_read_once_and_not_in_one_piece(serve):
    hub = serve({"train.parquet": parquet(range(200), 100, compression="none")})
    source = open_hf()
    recordings = source.list()
    hub.requests.clear()
    for recording in recordings[100:]:
        source.open(recording.id).close()
    audio = sum(len(wav(1000 + n, seed=n)) for n in range(100, 200))
    assert len(hub.gets()) <= 6 and hub.sent() < 1.2 * audio + 70_000
    # Backwards and far apart it still gives what was asked for.
    for row in (150, 3, 199, 150, 149, 0):
        with source.open(f"train.parquet/{row}") as file:
            assert file.read() == wav(1000 + row, seed=row)
    source.close()


@pytest.mark.parametrize("names", [("train",), ("train", "test"), ("train", "validation"), ("all",), ("test",)])
def test_splits_that_it_lacks_are_drawn_by_hash(serve, names):
    files = {
        f"data/{name}-00000-of-00001.parquet": parquet(range(60 * i, 60 * i + 60), 60) for i, name in enumerate(names)
    }
    if names == ("all",):
        files |= {
            "README.md": b"---\nconfigs:\n- config_name: x\n  data_files:\n  - split: all\n    path: data/*\n---\n"
        }
    serve(files)
    splits = {r.id: r.split for r in open_hf().list()}
    assert set(splits.values()) == {"train", "validation", "test"}
    if len(names) == 2:
        assert all(split == names[1] for id, split in splits.items() if names[1] in id)
        assert list(splits.values()).count(names[1]) == 60
    assert splits == {r.id: r.split for r in open_hf().list()}


def test_splits_of_other_names_are_left_out_with_a_warning(serve, caplog):
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split in ("train.clean", "dev", "invalidated"):
        readme += f"  - split: {split}\n    path: {split}.parquet\n"
    files = {
        f"{name}.parquet": parquet(range(i, i + 20)) for i, name in enumerate(("train.clean", "dev", "invalidated"))
    }
    serve(files | {"README.md": f"{readme}---\n".encode()})
    splits = {r.id.split(".parquet")[0]: r.split for r in open_hf().list() if r.split != "test"}
    assert splits == {"train.clean": "train", "dev": "validation"}
    assert "hf:some/thing: splits that are left out: invalidated" in caplog.text


def test_columns_that_do_not_say_that_they_are_audio(serve):
    serve({"train.parquet": parquet(range(8), typed=False, column="sound")})
    source = open_hf()
    assert [r.label for r in source.list()] == ["0", "1"] * 4
    assert list(read_all(source).values()) == [wav(1000 + n, seed=n) for n in range(8)]
    table = pa.table({"audio": [wav(10 + n, seed=n) for n in range(5)] + [None]})
    file = io.BytesIO()
    pq.write_table(table, file)
    serve({"train.parquet": file.getvalue()})
    source = open_hf()
    with source.open("train.parquet/4") as row:
        assert row.read() == wav(14, seed=4)
    assert [r.label for r in source.list()] == [None] * 6
    with pytest.raises(Unreadable, match="has a row that holds no audio"):
        source.open("train.parquet/5")


def test_a_network_that_fails_for_a_while(serve):
    data = {"train.parquet": parquet(range(200), 200, compression="none")}
    hub = serve(data)
    source = open_hf()
    recordings = source.list()
    source.close()
    hub.faults[:] = [
        None,
        Fault(status=503),
        None,
        Fault(after=50_000),
        Fault(status=429),
        Fault(after=90_000, reset=True),
    ]
    assert len(recordings) == 200
    for recording in recordings:
        with source.open(recording.id) as file:
            number = int(recording.id.rpartition("/")[2])
            assert file.read() == wav(1000 + number, seed=number)
    assert not hub.faults
    source.close()
    hub.faults[:] = [None] * 2 + [Fault(after=0)] * 50
    with pytest.raises(UserError, match=r"train\.parquet: the connection broke off; try again later"):
        for recording in recordings:
            source.open(recording.id)


def test_damaged_rows_are_told(serve):
    data = bytearray(parquet(range(20), 20, compression="none", write_page_checksum=True))
    data[data.index(b"RIFF") + 300] ^= 1
    serve({"train.parquet": bytes(data)})
    source = open_hf()
    with pytest.raises(UserError, match=r"train\.parquet cannot be read at row 3: .*checksum"):
        source.open("train.parquet/3")


# Audio files.


def folder_files():
    places = [f"{split}/{label}/{i}.wav" for split in ("train", "test") for label in ("cat", "dog") for i in range(4)]
    return {place: wav(100, seed=number) for number, place in enumerate(places)}


def test_audio_files_with_folders_for_labels(serve):
    files = folder_files()
    serve(files)
    source = open_hf()
    assert read_all(source) == files
    assert {(r.id, r.label, r.size) for r in source.list()} == {(n, n.split("/")[1], len(d)) for n, d in files.items()}
    splits = {r.id: r.split for r in source.list()}
    assert set(splits.values()) == {"train", "validation", "test"}
    assert {id for id, split in splits.items() if split == "test"} == {id for id in files if id.startswith("test")}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_audio_files_with_a_table_of_labels(serve, kind):
    files = {f"data/{i}.wav": wav(100, seed=i) for i in range(6)} | {"data/deeper/6.wav": wav(100, seed=6)}
    rows = [{"file_name": name.removeprefix("data/"), "text": "", "label": f"of {name}"} for name in [*files][1:]]
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["file_name", "text", "label"])
        writer.writeheader()
        writer.writerows(rows)
        table = text.getvalue()
    else:
        table = "".join(json.dumps(row) + "\n" for row in rows)
    serve(files | {f"data/metadata.{kind}": table.encode()})
    labels = {r.id: r.label for r in open_hf().list()}
    assert labels.pop("data/0.wav") is None
    assert labels == {name: f"of {name}" for name in [*files][1:]}


# Refusals.


def refusal(source="hf:some/thing"):
    with pytest.raises(UserError) as error:
        open_hf(source).list()
    assert "\n" not in str(error.value) and "hf_secret" not in str(error.value)
    return str(error.value)


def test_repositories_that_are_refused(serve):
    serve({"train.parquet": parquet(range(2))})
    assert refusal() == "hf:some/thing holds 2 recordings: at least 3 are needed, one for each split"
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"] * 5}), table)
    serve({"train.parquet": table.getvalue()})
    assert refusal() == "hf:some/thing has no column of audio, only text"
    table = io.BytesIO()
    pq.write_table(pa.table({"audio": [{"array": [0.1]}] * 5}), table)
    serve({"train.parquet": table.getvalue()})
    assert "the column of audio of hf:some/thing holds array and no bytes" in refusal()
    serve({"train.parquet": b"PAR1" * 100})
    assert "train.parquet cannot be read as Parquet" in refusal()
    other = io.BytesIO()
    pq.write_table(pa.table({"audio": [wav(10)] * 5}), other)
    serve({"train-0.parquet": parquet(range(5)), "train-1.parquet": other.getvalue()})
    assert "train-1.parquet cannot be read as Parquet: " in refusal()
    serve({"train.csv": b"a,b\n1,2\n"})
    assert "hf:some/thing is stored as Csv, and only Parquet and audio files are read here" in refusal()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.wav", wav(10))
    hub = serve({"data/train.zip": packed.getvalue()})
    assert (
        f"holds an archive of recordings; give --source {hub.url}/datasets/some/thing/resolve/{COMMIT}/data/train.zip"
        in (refusal())
    )
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in "xy")
    serve(
        {f"{name}.parquet": parquet(range(9)) for name in "xy"}
        | {"README.md": f"---\nconfigs:\n{configs}---\n".encode()}
    )
    assert "it has several configurations, give one, such as hf:some/thing:NAME" in refusal()
    assert open_hf("hf:some/thing:y").list()[0].id == "y.parquet/0"


def test_nothing_is_left_of_a_closed_hub(serve):
    """The system gives the port of one test's hub to another's."""
    port = 0
    for name in "xyz":
        readme = f"---\nconfigs:\n- config_name: all\n  data_files: {name}.parquet\n---\n".encode()
        hub = serve({f"{name}.parquet": parquet(range(9)), "README.md": readme}, port=port)
        assert open_hf().list()[0].id == f"{name}.parquet/0"
        hub.__exit__()
        port = int(hub.url.rsplit(":")[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "another"}, "does not know the token that it was given"),
        ({"status": 403, "code": "GatedRepo"}, "asks for permission to read"),
        ({"status": 404, "code": "RepoNotFound"}, "there is no such data set, or no permission to see it"),
    ],
)
def test_no_leave_and_no_such_repository(serve, options, message):
    serve({"train.parquet": parquet(range(9))}, **options)
    assert message in refusal()


def test_no_connection(serve):
    hub = serve({})
    hub.__exit__()
    assert refusal().startswith("cannot open hf:some/thing: there is no connection (Connection refused); try again")

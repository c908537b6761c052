"""harmonic.hub: models pushed to a hub and fetched from it over HTTP; what is said where that fails."""

import pytest
from huggingface_hub import constants
from model_hub_server import TOKENS, ModelHub, take_for_models

from harmonic import hub
from harmonic.errors import UserError

WANTED = ("config.json", "model.safetensors")
FILES = {
    "config.json": b'{"library_name": "harmonic-rnn", "config": {}}',
    "model.safetensors": b"w" * 9_000,
    "README.md": b"---\ntags: [audio]\n---\n",
    "sample_0.wav": b"sound",
}


@pytest.fixture
def the_hub(monkeypatch, tmp_path):
    with ModelHub(TOKENS) as server:
        take_for_models(monkeypatch, server, tmp_path)
        yield server


@pytest.fixture
def folder(tmp_path):
    """What is pushed, and a file that is none of it."""
    path = tmp_path / "export"
    path.mkdir()
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    (path / "notes.txt").write_text("mine")
    return path


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line and "secret" not in line
    return line


def test_only_what_is_wanted_is_fetched_of_any_revision(the_hub):
    the_hub.add("a/b", {**FILES, "modeling.py": b"", "pytorch_model.bin": b""})
    the_hub.repos["a/b"]["commits"].append({**FILES, "model.safetensors": b"newer"})
    expected = {name: FILES[name] for name in WANTED}
    assert read(hub.fetch("a/b", WANTED)) == {**expected, "model.safetensors": b"newer"}
    assert read(hub.fetch("a/b", WANTED, f"{1:040x}")) == expected
    assert {path.rsplit("/", 1)[-1] for _, path in the_hub.requests if "/resolve/" in path} == set(WANTED)


def test_what_the_hub_refuses(the_hub, monkeypatch):
    the_hub.add("a/b", FILES)
    line = refused(hub.fetch, "a/none", WANTED)
    assert line.startswith(f"there is no folder a/none here and no model {the_hub.url}/a/none that may be read (401)")
    assert "has no revision 'v2'" in refused(hub.fetch, "a/b", WANTED, "v2")
    monkeypatch.setenv("HF_TOKEN", "hf_reads_secret")
    assert "that may be read (404)" in refused(hub.fetch, "a/none", WANTED)
    for status, code, said, line in (
        (401, "", "Invalid credentials in Authorization header", "does not know the token"),
        (403, "GatedRepo", "", "needs permission to read: accept its terms"),
        (403, "", "", "the token gives no permission to read"),
        (500, "", "out of order", "answers with status 500 (out of order); try again later"),
    ):
        the_hub.status, the_hub.code, the_hub.said = status, code, said
        assert line in refused(hub.fetch, "a/other", WANTED)


def test_without_a_connection(the_hub, monkeypatch):
    """What the cache holds is used; what it does not is refused."""
    the_hub.add("a/b", FILES)
    cached = hub.fetch("a/b", WANTED)
    asked = len(the_hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("a/b", WANTED) == cached
    assert "a/none is not in the cache, and HF_HUB_OFFLINE is set" in refused(hub.fetch, "a/none", WANTED)
    assert "HF_HUB_OFFLINE is set" in refused(hub.check_push, "a/b")
    assert len(the_hub.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.fetch("a/b", WANTED) == cached
    line = refused(hub.fetch, "a/none", WANTED)
    assert "127.0.0.1:9/a/none cannot be reached (ConnectError) and is not in the cache" in line


def test_who_may_push(the_hub, folder, monkeypatch):
    for name in ("tiny", "a/b/c", "a/b c", ""):
        assert "write USER/NAME" in refused(hub.check_push, name)
    assert "there is no token to push to a/b with; log in with `hf auth login`" in refused(hub.check_push, "a/b")
    monkeypatch.setenv("HF_TOKEN", "hf_reads_secret")
    assert "the token gives no permission to write to" in refused(hub.push, folder, "a/b", [*FILES])
    monkeypatch.setenv("HF_TOKEN", "hf_forgotten_secret")
    assert "does not know the token" in refused(hub.push, folder, "a/b", [*FILES])
    assert not the_hub.repos
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "127.0.0.1:9/a/b cannot be reached (ConnectError); check" in refused(hub.push, folder, "a/b", [*FILES])


def test_what_a_push_leaves(the_hub, folder, monkeypatch):
    """What was named and nothing else; samples of an earlier push go; other models stay unless told otherwise."""
    monkeypatch.setenv("HF_TOKEN", "hf_writes_secret")
    assert hub.push(folder, "a/b", [*FILES], private=True) == f"{the_hub.url}/a/b/commit/{2:040x}"
    assert the_hub.repos["a/b"]["private"] and the_hub.files("a/b") == FILES | {".gitattributes": b""}
    the_hub.files("a/b")["sample_3.wav"] = b"stale"
    hub.push(folder, "a/b", [*FILES])
    assert the_hub.files("a/b") == FILES | {".gitattributes": b""}

    the_hub.add("a/gpt", theirs := {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b""})
    assert "holds something else than a HarmonicRNN export" in refused(hub.push, folder, "a/gpt", [*FILES])
    assert "is public; make it private" in refused(hub.push, folder, "a/gpt", [*FILES], private=True)
    assert the_hub.files("a/gpt") == theirs
    hub.push(folder, "a/gpt", [*FILES], overwrite=True)
    assert the_hub.files("a/gpt") == FILES


def test_a_licence_that_the_hub_does_not_know(the_hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writes_secret")
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    line = refused(hub.push, folder, "a/b", [*FILES])
    assert '"license" must be one of' in line and "is --license one that the hub knows?" in line
    assert the_hub.files("a/b") == {".gitattributes": b""}

"""Dataflow without a network: the job's graph, what it sends, what its container needs; buckets against an emulator."""

import importlib.metadata
import io
import json
import pickle
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
import soundfile
from apache_beam.internal import pickler
from apache_beam.options.pipeline_options import PipelineOptions, WorkerOptions
from apache_beam.portability.api import beam_runner_api_pb2 as api
from hub_server import Hub, take_for_the_hub
from packaging.requirements import Requirement

from harmonic import records
from harmonic.errors import UserError
from pipelines import build, prepare
from pipelines.beam import graph, steps
from pipelines.beam.runners import beam_options, runner_of
from pipelines.build import PrepareSpec
from pipelines.sources import open_source
from pipelines.sources.layouts import data_set

ROOT = Path(__file__).parent.parent
DATAFLOW = [
    "--runner=DataflowRunner",
    "--project=fake",
    "--region=europe-west4",
    "--temp_location=gs://fake/tmp",  # without one, credentials are looked for, for half a minute
    "--sdk_container_image=registry.example/fake/worker:1",
    "--max_num_workers=20",
    "--dry_run=True",
]


def wav(samples=800, rate=16_000, seed=0):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).normal(0, 0.1, samples), rate, format="WAV")
    return file.getvalue()


FILES = {f"{i % 3}/{i}.wav": wav(2_000 + i, 8_000 * (1 + i % 3), i) for i in range(12)}


def zip_bytes(files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return packed.getvalue()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A gated hub that this process takes for the hub."""
    with Hub({"beethoven.zip": zip_bytes({f"beethoven/{i}.wav": wav() for i in range(20)})}, token="hf_secret") as hub:
        take_for_the_hub(monkeypatch, hub, tmp_path)
        yield hub


def test_the_job_s_graph(hub):
    options = beam_options(DATAFLOW)
    assert runner_of(options) == "DataflowRunner"
    source = open_source(data_set("beethoven"), "hub", download=False)
    recordings = source.list()
    manifest = build.new_manifest(PrepareSpec("beethoven", "hub", encoding="linear", window_length=1_000), "f")
    pipeline = beam.Pipeline(options=PipelineOptions(options))
    graph.build(pipeline, source, recordings, manifest, folder="gs://fake/data/beethoven", run="0" * 32, num_shards=3)
    job = pipeline.run().job
    assert job.options.view_as(WorkerOptions).max_num_workers == 20
    proto = job.proto_pipeline

    # Beam's own container of the worker image, and the steps that graph.py draws; the audio is in none of it.
    (environment,) = proto.components.environments.values()
    payload = api.DockerPayload.FromString(environment.payload)
    assert payload.container_image == "registry.example/fake/worker:1"
    names = {transform.unique_name for transform in proto.components.transforms.values()}
    assert {"Shards", "Spread", "WriteShard", "Gather", "Publish"} <= names
    sent = proto.SerializeToString()
    assert b"RIFF" not in sent and len(sent) < 100_000
    # Credentials do not travel: not in the graph, not in what is pickled within it.
    found = [
        pickler.loads(api.ParDoPayload.FromString(t.spec.payload).do_fn.payload)[0]
        for t in proto.components.transforms.values()
        if t.unique_name in ("WriteShard", "Publish")
    ]
    assert {type(step) for step in found} == {steps.WriteShard, steps.Publish}
    assert b"hf_secret" not in sent and not any(b"hf_secret" in pickle.dumps(step) for step in found)
    # What a worker unpacks reads its member by itself.
    (step,) = (step for step in found if isinstance(step, steps.WriteShard))
    before = len(hub.requests)
    with step._source.open("7.wav") as file:
        assert file.read() == wav()
    assert len(hub.requests) > before
    step.teardown()
    source.close()


def test_what_the_workers_of_dataflow_cannot_see_is_refused(capsys, tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_bytes(FILES))
    argv = ["--dataset", "mine", "--source", str(tmp_path / "a.zip"), *DATAFLOW]
    assert prepare.main(argv) == 2
    assert "the workers of DataflowRunner do not see" in (error := capsys.readouterr().err)
    assert "give --output_dir gs://bucket/folder" in error
    with pytest.raises(UserError, match=r"do not see .*a\.zip; give a URL such as gs://bucket/mine\.zip"):
        open_source(data_set("mine"), str(tmp_path / "a.zip"), unseen_by="DataflowRunner")


# Buckets.


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of an emulator's as Beam and fsspec see it, without credentials."""
    from apache_beam.internal.gcp import auth
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    address = f"http://127.0.0.1:{server._api._httpd.socket.getsockname()[1]}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # there is no machine of Google's to ask
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setattr(auth, "get_service_credentials", lambda _: None)  # it would look for half a minute
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()  # which remembers the last one's address
    yield gcsfs.GCSFileSystem(token="anon", use_listings_cache=False)
    server.stop()


def test_from_a_bucket_into_a_bucket(bucket, tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_bytes(FILES))
    bucket.pipe("bucket/a.zip", zip_bytes(FILES))
    for name, data in FILES.items():
        bucket.pipe(f"bucket/in/{name}", data)
    local = build.prepare(PrepareSpec("mine", str(tmp_path / "a.zip"), str(tmp_path / "out"), num_shards=3))
    for source in ("gs://bucket/a.zip", "gs://bucket/in"):
        spec = PrepareSpec("mine", source, f"gs://bucket/out-{source[-2:]}", num_shards=3)
        manifest = build.prepare(spec)
        assert manifest.splits == local.splits
        folder = spec.folder.removeprefix("gs://")
        found = {path.rpartition("/")[2]: bucket.cat(path) for path in bucket.find(folder)}
        here = {path.name: path.read_bytes() for path in (tmp_path / "out/mine").iterdir()}
        assert found.keys() == here.keys()
        shards = [name for name in here if records.SPLITS[0] in name or "array_record" in name]
        assert len(shards) > 4 and all(found[name] == here[name] for name in shards)
        assert build.prepare(spec) == manifest  # which stands there whole
        bucket.rm(f"{folder}/{shards[0]}")
        assert build.prepare(spec) == manifest
        assert bucket.cat(f"{folder}/{shards[0]}") == here[shards[0]]


def test_a_launch_up_to_the_submission(bucket):
    bucket.pipe("bucket/a.zip", zip_bytes(FILES))
    with pytest.raises(UserError, match="ended without an error and without a data set in gs://bucket/out/mine"):
        build.prepare(PrepareSpec("mine", "gs://bucket/a.zip", "gs://bucket/out"), DATAFLOW)  # a dry run


# The container.


def requirements():
    return [
        Requirement(line) for line in (ROOT / "pipelines/dataflow/requirements.txt").read_text().split("\n") if line
    ]


def test_the_container_s_requirements_are_the_project_s():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = [*project["dependencies"], *project["optional-dependencies"]["gcp"]]
    assert {str(requirement) for requirement in requirements()} <= {str(Requirement(line)) for line in ours}
    text = (ROOT / "pipelines/dataflow/Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+)", text, re.MULTILINE)
    assert all((ROOT / path).exists() for path in copied) and "libsndfile1" in text
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.removesuffix("*") for package in packages["find"]["include"]} <= set(copied)


def closure(requirements):
    """The names of all distributions that these bring along."""
    found, left = {}, list(requirements)
    while left:
        requirement = left.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if requirement.extras <= found.get(name, {None}) and name in found:
            continue
        found.setdefault(name, set()).update(requirement.extras)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # another system's
            continue
        for need in map(Requirement, needs):
            extras = requirement.extras or {""}
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(need)
    return set(found)


# Refuses what the container will not have, then prepares: in the process itself, as a worker of Dataflow's does.
WORKER = """
import importlib.abc, json, sys
absent = set(json.loads(sys.argv[1]))
class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"not in the container: {name}", name=name)
sys.meta_path.insert(0, Only())
from pipelines.sources import hf
from pipelines.build import PrepareSpec, prepare
options = {"trim_silence": 60.0, "loudness": -23.0}
manifest = prepare(PrepareSpec("mine", sys.argv[2], sys.argv[3], **options))
print(sum(split.recordings for split in manifest.splits.values()))
print("jax" in sys.modules)
"""


def test_the_container_has_what_workers_need(tmp_path):
    names = closure(requirements())
    assert {"soundfile", "apache-beam", "google-cloud-storage", "aiohttp", "cffi"} <= names and "jax" not in names
    owners = importlib.metadata.packages_distributions()
    absent = [top for top, owned in owners.items() if not {re.sub(r"[-_.]+", "-", o).lower() for o in owned} & names]
    absent = [top for top in absent if top not in ("harmonic", "pipelines")]
    assert {"jax", "flax", "datasets", "pandas", "librosa"} <= set(absent)
    with Hub({"a.zip": zip_bytes(FILES)}) as hub:
        command = [sys.executable, "-c", WORKER, json.dumps(absent), f"{hub.url}/plain/a.zip", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "12\nFalse\n", done.stderr

"""Eight CPU devices, a strict JAX, programs that compile quickly, and the fixtures that several test files share.

HARMONIC_OPTIMISED=1 compiles programs as a user's run does; the README's test command sets it for the tests marked
`laws`, which hold the models' laws, and kernels to their references.
"""

import gc
import importlib.util
import mmap
import os
import tempfile
from pathlib import Path


def _knows(flag):
    """Whether this jaxlib has a flag of XLA's, which ends a process whose XLA_FLAGS has others."""
    (library,) = Path(importlib.util.find_spec("jaxlib").origin).parent.glob("libjax_common.*")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b"\0" + flag.encode() + b"\0") >= 0


_FLAGS = {"xla_force_host_platform_device_count": "8"}
if not os.environ.get("HARMONIC_OPTIMISED"):
    # Compiling takes most of a test's time: without LLVM's optimisations, and with XLA's older emitters of fusions, it
    # takes half of that.
    _FLAGS |= {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": "false"}
gc.set_threshold(200_000)  # collecting cycles is a quarter of tracing
_ASKED = (os.environ.get("XLA_FLAGS", ""), *(f"--{flag}={value}" for flag, value in _FLAGS.items() if _knows(flag)))
os.environ["XLA_FLAGS"] = " ".join(_ASKED)
os.environ["JAX_PLATFORMS"] = "cpu"
# A JAX that refuses implicit promotion, also in the processes that tests start.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Tests and the processes that they start compile the same programs again and again.
_CACHE = os.path.join(tempfile.gettempdir(), f"harmonic-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def few_programs():
    """A compiled program holds up to 1,600 memory mappings, of which Linux grants a process 65,530."""
    yield
    try:
        with open("/proc/self/maps", "rb") as file:
            mappings = file.read().count(b"\n")
    except OSError:
        return
    if mappings > 20_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision within a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def make_dataset():
    """(folder, name, lengths of recordings at 16 kHz, ...) -> the folder of a data set prepared from WAV files."""

    def make(folder, name, lengths, *, source=None, **spec):
        import soundfile

        from pipelines.build import PrepareSpec, prepare

        recordings = folder / "recordings"
        recordings.mkdir(parents=True)
        numbers = np.random.default_rng(1)
        for i, length in enumerate(lengths):
            time = np.arange(length) / 16_000
            tone = 0.3 * np.sin(2 * np.pi * numbers.uniform(100, 1_000) * time) + 0.01 * numbers.standard_normal(length)
            soundfile.write(recordings / f"{i:03d}.wav", tone, 16_000, subtype="PCM_16")
        prepare(PrepareSpec(dataset=name, source=str(recordings), output_dir=str(folder / "data"), **spec))
        return folder / "data" / name

    return make


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, make_dataset):
    """A prepared data set of twelve short recordings."""
    lengths = [900, 350, 700, 401, 90, 1_200, 640, 1_000, 777, 20, 333, 444]
    return make_dataset(tmp_path_factory.mktemp("tiny"), "tiny", lengths)


@pytest.fixture(scope="session")
def reference_run(tiny_data, tmp_path_factory):
    """The folder of a run that was never interrupted; for reading."""
    from tiny import config

    from harmonic.train import train

    workdir = tmp_path_factory.mktemp("run") / "reference"
    assert train(config(), tiny_data, workdir).step == 6
    return workdir


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A real browser; its tests are skipped where there is none."""
    from browser import browser

    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened

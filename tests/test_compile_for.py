"""Programs for devices that are not there: names, errors and logs everywhere; compiling where the packages are.

pip install -e '.[tpu]' -e '.[cuda12]'
python -m pytest -m slow tests/test_compile_for.py
"""

import importlib.util
import re

import pytest
from tiny import config as tiny_config

from harmonic import compile_for as module
from harmonic.compile_for import compile_for, read_ptxas
from harmonic.config import load_config, override
from harmonic.describe import memory
from harmonic.devices import DEVICES, target
from harmonic.errors import UserError


def test_names():
    assert (target("cuda:h100").topology, target("cuda:h100").size, target("cuda:h100").platform) == ((1, 1), 1, "gpu")
    assert (target("cuda:a100:1x8").size, target("tpu:v4").topology, target("tpu:v4:4x4x4").size) == (8, (2, 2, 1), 64)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda:k80", "cuda:a100, cuda:h100"),
        ("h100", "no such device"),
        ("tpu:v5e:2x2x1", "2 numbers, such as tpu:v5e:1x1"),
        ("tpu:v4:4x0x4", "3 numbers"),
    ],
)
def test_names_that_are_refused(name, said):
    with pytest.raises(UserError, match=re.escape(said)):
        target(name)


@pytest.mark.parametrize("name", DEVICES)
def test_the_table_is_plausible(name):
    device = DEVICES[name]
    assert 8 << 30 <= device.memory and 0.5e12 <= device.bandwidth and target(name).topology_name == device.smallest
    assert 1e14 <= device.operations["float32"] <= device.operations["bfloat16"]
    if device.gpu is not None:
        text = device.gpu.target_config(device)
        assert text.count("{") == text.count("}") and f"device_memory_size: {device.memory}" in text


def test_architectures():
    found = {name: device.gpu.architecture for name, device in DEVICES.items() if device.gpu}
    assert found == {"cuda:a100": "sm_80", "cuda:h100": "sm_90a", "cuda:h200": "sm_90a", "cuda:b200": "sm_100a"}


@pytest.mark.parametrize(("name", "extra"), [("tpu:v4", "tpu"), ("cuda:h100", "cuda12")])
def test_a_missing_package_is_named(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=re.escape(f"pip install -e '.[{extra}]'")):
        compile_for(tiny_config(), target(name))


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)


def test_a_mesh_of_too_many_devices(packages):
    config = override(load_config("sc09"), ["mesh.seq=8", "mesh.data=2"])
    with pytest.raises(UserError, match=r"asks for 16 devices, but cuda:h100:1x8 has 8"):
        compile_for(config, target("cuda:h100:1x8"))


LOGS = [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.0G of 15.75G hbm. Exceeded hbm capacity",
     f"holds {40 << 30:,} bytes, but TPU v5e has {16 << 30:,}"),
    ("ABORTED: Internal error when accessing libtpu multi-process lockfile. Run \"$ sudo rm /tmp/libtpu_lockfile\"",
     "another process holds libtpu's lock"),
    ("Traceback\nharmonic.errors.UserError: mesh.seq=0 is impossible\n", "mesh.seq=0 is impossible"),
]  # fmt: skip


@pytest.mark.parametrize(("log", "said"), LOGS)
def test_logs_of_what_a_user_can_mend(log, said):
    error = module._failure(load_config("sc09"), target("tpu:v5e"), log)
    assert isinstance(error, UserError) and said in str(error)


def test_what_is_said_to_fit_fits():
    """By the formula, scaled as the compiled program differs from it."""
    config = override(load_config("sc09"), ["train.segment_length=16000"])
    held = 2 * memory(config)["total"]
    assert held > DEVICES["tpu:v5e"].memory
    line = str(module._does_not_fit(config, target("tpu:v5e"), "train", held))
    batch = int(re.search(r"global_batch_size=(\d+)", line)[1])
    fitting = memory(override(config, [f"train.global_batch_size={batch}"]))["total"]
    assert batch < config.train.global_batch_size and 2 * fitting <= DEVICES["tpu:v5e"].memory


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scan_forward' for 'sm_90a'
ptxas info    : Function properties for scan_forward
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 0 barriers, 424 bytes cmem[0]
ptxas info    : Compiling entry function 'scan_backward' for 'sm_90a'
ptxas info    : Function properties for scan_backward
    64 bytes stack frame, 72 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 64 bytes cumulative stack size, 456 bytes cmem[0]
"""


def test_what_ptxas_says():
    assert read_ptxas(PTXAS) == {
        "scan_forward": {"registers": 96, "spilled": 0},
        "scan_backward": {"registers": 255, "spilled": 108},
    }


def compiled(name, **options):
    """The tiny config, compiled for a device where the packages for it are installed."""
    modules, extra = module._WHEELS[target(name).device.platform]
    if not any(map(importlib.util.find_spec, modules)):
        pytest.skip(f"compiling for {name} needs: pip install -e '.[{extra}]'")
    return compile_for(tiny_config(), target(name), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cuda:h100", "tpu:v5e"])
def test_a_training_step_is_compiled_and_read(name):
    told = compiled(name)
    assert 0 < told["held"]["temporaries"] < told["held"]["total"] < told["held"]["device"]
    assert told["moved"]["read"] > told["held"]["arguments"] and told["kernels"]["a_step"] > 50
    own = told["own_kernels"]
    # Two levels of one block and an inner one: the scan runs forward, again, and backward.
    assert own["scan_forward"]["runs"] == 2 * own["scan_backward"]["runs"] > 0
    if name.startswith("cuda"):
        assert all(kernel["spilled"] == 0 < kernel["registers"] for kernel in own.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cuda:h100", "tpu:v5e"])
def test_generation_is_compiled_and_read(name):
    told = compiled(name, what="generate", streams=2)
    assert told["samples"] == 2 * module.CHUNK
    by_depth = told["kernels"]["by_depth"]
    assert set(by_depth) >= {"0", "1"} and 1 < by_depth["1"] <= told["kernels"]["a_sample"]

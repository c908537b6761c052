"""How a kernel is picked by name and platform, and what the machine code's handler answers to XLA."""

import ctypes
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llvmlite import ir

from harmonic import kernels
from harmonic.errors import UserError
from harmonic.kernels import reference
from harmonic.kernels.cpu import ffi, llvm
from harmonic.kernels.target import compiling_for, platform

needs_machine_code = pytest.mark.skipif(not ffi.available(), reason="XLA does not take machine code here")


def doors(**options):
    """Every door once, with small inputs."""
    one = jnp.ones((1, 2, 1))
    state = (jnp.ones((1, 1)), jnp.ones((1, 1)))
    bias = jnp.ones(1)
    return {
        "linear_scan": lambda: kernels.linear_scan((one, one), (one, one), state, **options),
        "cg_lru": lambda: kernels.cg_lru(jnp.ones((1, 2, 4)), jnp.ones(4), bias, bias, state, **options),
        "gated_gelu": lambda: kernels.gated_gelu(one, bias, one, bias, **options),
        "block_step": lambda: kernels.block_step(32, 32, jnp.float32, **options),
    }


@pytest.mark.parametrize("door", doors())
def test_every_door_refuses_names_that_it_cannot_run(door):
    with pytest.raises(UserError, match=r"no kernel implementation 'fast': use one of auto, reference, "):
        doors(implementation="fast")[door]()
    with compiling_for("gpu"):
        for name, where in (("native", "cpu"), ("pallas_tpu", "cpu, tpu")):
            with pytest.raises(UserError, match=rf"{name}.* on gpu .*\(it is for {where}\): use auto, .*pallas_gpu$"):
                doors(implementation=name)[door]()


def test_auto_goes_by_platform():
    assert platform() == "cpu"
    picked = {}
    for name in ("gpu", "tpu"):
        with compiling_for(name):
            picked[name] = [kernels.pick("auto", *of_scan) for of_scan in ((160, None), (1, None), (1, "seq"))]
            assert kernels.block_step(32, 32, jnp.float32) is kernels.plain_step
    assert picked == {name: [f"pallas_{name}", "associative", f"pallas_{name}"] for name in ("gpu", "tpu")}
    assert platform() == "cpu"


def test_without_machine_code_one_line_says_so_once(monkeypatch, caplog):
    native = kernels.KERNELS["native"]._replace(obstacle=lambda: "XLA is too new for this test")
    monkeypatch.setitem(kernels.KERNELS, "native", native)
    with caplog.at_level(logging.WARNING):
        assert [kernels.pick("auto"), kernels.pick("auto", 160)] == ["chunked", "chunked"]
    assert [record.getMessage() for record in caplog.records] == [
        "machine code is off, and kernels are several times slower: XLA is too new for this test"
    ]
    with pytest.raises(UserError, match="too new for this test"):
        kernels.pick("native")
    assert kernels.block_step(32, 32, jnp.float32) is kernels.plain_step


def test_a_kernel_is_one_module_and_one_entry(monkeypatch):
    """A module with `linear_scan` alone: `cg_lru` computes the gates beside it, other doors take the plain form."""
    calls = []

    def linear_scan(x, a, h0, axis):
        calls.append(x[0].dtype)
        return reference.linear_scan(x, a, h0)

    toy = types.SimpleNamespace(linear_scan=linear_scan)
    monkeypatch.setitem(kernels.KERNELS, "toy", kernels.Kernel(lambda: toy))
    for (name, call), expected in zip(
        doors(implementation="toy").items(), doors(implementation="reference").values(), strict=True
    ):
        if name != "block_step":
            jax.tree.map(np.testing.assert_array_equal, call(), expected())
    assert calls == [jnp.float32, jnp.float32]


@pytest.mark.parametrize(
    ("numbers", "taken"), [((0, 3), True), ((0, 4), True), ((0, 2), False), ((1, 3), False), ((), False)], ids=str
)
def test_later_minor_versions_of_the_interface_are_taken(tmp_path, monkeypatch, numbers, taken):
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        "".join(f"#define XLA_FFI_API_{k} {v}\n" for k, v in zip(("MAJOR", "MINOR"), numbers, strict=False))
    )
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    obstacle = ffi.obstacle.__wrapped__()
    assert (obstacle is None) == taken
    assert taken or (".".join(map(str, numbers)) in obstacle)


def twice(code):
    """(x [batch, time, channels], any [rows, channels]) -> 2 x."""
    with code.each_recording() as b, code.loop(0, code.time) as t:
        row = code.row(b, t)
        code.each_channel(lambda c: code.store(2.0 * code.load(0, row, c), 2, row, c))


def words(*values):
    """int64s; of arrays their addresses."""
    return (ctypes.c_int64 * len(values))(*(ctypes.addressof(v) if isinstance(v, ctypes.Array) else v for v in values))


@needs_machine_code
def test_only_a_metadata_extension_is_answered_without_computing():
    """The frame as XLA lays it out: {size, extension, api, context, stage, arguments, results}."""
    address = llvm.compile_module(ffi.build(twice, "float32", 1), ffi.target_name(twice, "float32", 1))
    handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
    x, y = (ctypes.c_float * 6)(1, 2, 3, 4, 5, 6), (ctypes.c_float * 6)()
    dims, state_dims = words(1, 2, 3), words(1, 3)
    x_buffer, y_buffer = (words(48, 0, 11, v, 3, dims) for v in (x, y))
    state_buffer = words(48, 0, 11, 0, 2, state_dims)
    arguments, results = words(x_buffer, state_buffer), words(y_buffer)

    def call(extension):
        frame = words(160, extension, 0, 0, 3, 40, 0, 2, 0, arguments, 40, 0, 1, 0, results, 24, 0, 0, 0, 0)
        assert handler(ctypes.addressof(frame)) is None

    metadata = words(0, 0, 0, 0, 0)
    call(words(32, 1, 0, metadata))
    assert metadata[:] == [0, 0, 0, 3 << 32, 0] and y[:] == [0.0] * 6  # version 0.3
    metadata = words(0, 0, 0, 0, 0)
    call(words(32, 2, 0, metadata))
    assert metadata[:] == [0] * 5 and y[:] == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]


@needs_machine_code
def test_writers_of_one_name_in_two_modules_do_not_collide():
    def write_constant(number, module):
        def constant(code):
            with code.each_recording() as b:
                code.each_channel(lambda c: code.store(code.constant(number), 2, b, c))

        constant.__module__ = module
        return constant

    x, state = jnp.zeros((1, 1, 5)), jnp.zeros((1, 5))
    for number, module in ((3.0, "one"), (4.0, "other")):
        target = ffi.register(write_constant(number, module), "float32", 1)
        y = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(x.shape, x.dtype))(x, state)
        assert y.ravel().tolist() == [number] * 5
    with pytest.raises(Exception, match=r"constant\.float32\.1"):
        ffi.register(write_constant(5.0, "other"), "float32", 1)


@needs_machine_code
def test_what_is_compiled_can_be_read():
    module = ffi.build(twice, "float64", 1)
    assert isinstance(module, ir.Module) and "fmul" in str(module)
    assert "twice.float64.1.job" in llvm.assembly(module)

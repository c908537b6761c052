"""What a program moves: the reader on programs whose traffic is known by hand."""

import jax
import jax.numpy as jnp
import pytest

from harmonic import hlo, traffic

# 256 floats are 1,024 bytes. The loop runs 5 times: it cuts a row from a table, writes a row into another, and calls a
# kernel of the project; after it come a product with a workspace, and a loop that ends when a number says so.
PROGRAM = """\
HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=1

%cut (p0: f32[5,256], p1: s32[]) -> f32[256] {
  %p0 = f32[5,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,256}
  ROOT %flat = f32[256]{0} bitcast(%row)
}

%put (q0: f32[5,256], q1: f32[256], q2: s32[]) -> f32[5,256] {
  %q0 = f32[5,256]{1,0} parameter(0)
  %q1 = f32[256]{0} parameter(1)
  %q2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %flat.1 = f32[1,256]{1,0} bitcast(%q1)
  ROOT %in_place = f32[5,256]{1,0} dynamic-update-slice(%q0, %flat.1, %q2, %zero.1)
}

%next (r0: s32[]) -> s32[] {
  %r0 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %sum = s32[] add(%r0, %one)
}

%body (carry: (s32[], f32[5,256], f32[5,256])) -> (s32[], f32[5,256], f32[5,256]) {
  %carry = (s32[], f32[5,256]{1,0}, f32[5,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %table = f32[5,256]{1,0} get-tuple-element(%carry), index=1
  %made = f32[5,256]{1,0} get-tuple-element(%carry), index=2
  %cut_fusion = f32[256]{0} fusion(%table, %i), kind=kLoop, calls=%cut
  %ours = f32[256]{0} custom-call(%cut_fusion), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="scan_forward/pallas_call"}
  %put_fusion = f32[5,256]{1,0} fusion(%made, %ours, %i), kind=kLoop, calls=%put
  %next_fusion = s32[] fusion(%i), kind=kLoop, calls=%next
  ROOT %out = (s32[], f32[5,256]{1,0}, f32[5,256]{1,0}) tuple(%next_fusion, %table, %put_fusion)
}

%condition (carry.1: (s32[], f32[5,256], f32[5,256])) -> pred[] {
  %carry.1 = (s32[], f32[5,256]{1,0}, f32[5,256]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

%double (carry.2: (s32[], f32[256])) -> (s32[], f32[256]) {
  %carry.2 = (s32[], f32[256]{0}) parameter(0)
  %left = s32[] get-tuple-element(%carry.2), index=0
  %v = f32[256]{0} get-tuple-element(%carry.2), index=1
  %twice = f32[256]{0} add(%v, %v)
  ROOT %out.1 = (s32[], f32[256]{0}) tuple(%left, %twice)
}

%until (carry.3: (s32[], f32[256])) -> pred[] {
  %carry.3 = (s32[], f32[256]{0}) parameter(0)
  %left.1 = s32[] get-tuple-element(%carry.3), index=0
  ROOT %more = pred[] compare(%left.1, %left.1), direction=LT
}

ENTRY %main (x: f32[5,256], n: s32[]) -> f32[256] {
  %x = f32[5,256]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %start = s32[] constant(0)
  %copy = f32[5,256]{1,0} copy(%x)
  %loop = (s32[], f32[5,256]{1,0}, f32[5,256]{1,0}) while(%tuple.1), condition=%condition, body=%body, \
{"known_trip_count":{"n":"5"}}
  %tuple.1 = (s32[], f32[5,256]{1,0}, f32[5,256]{1,0}) tuple(%start, %x, %copy)
  %result = f32[5,256]{1,0} get-tuple-element(%loop), index=2
  %gemm = (f32[256]{0}, s8[4194304]{0}) custom-call(%result), custom_call_target="__cublas$gemm"
  %vector = f32[256]{0} get-tuple-element(%gemm), index=0
  %tuple.2 = (s32[], f32[256]{0}) tuple(%n, %vector)
  %loop.1 = (s32[], f32[256]{0}) while(%tuple.2), condition=%until, body=%double
  ROOT %last = f32[256]{0} get-tuple-element(%loop.1), index=1
}
"""
ROW = 256 * 4


def test_kernels_of_a_known_program():
    found = {k.name: k for k in traffic.kernels(PROGRAM, unknown=lambda depth: 7)}
    assert {name: (k.runs, k.read, k.written, k.unknown) for name, k in found.items()} == {
        "copy": (1, 5 * ROW, 5 * ROW, 0),
        "cut_fusion": (5, ROW + 4, ROW, 0),
        "ours": (5, ROW, ROW, 0),
        "put_fusion": (5, ROW + 4, ROW, 0),
        "next_fusion": (5, 4, 4, 0),
        "gemm": (1, 5 * ROW, ROW, 0),
        "more": (7, 8, 1, 1),
        "twice": (7, 2 * ROW, ROW, 1),
    }
    assert found["ours"].kind == "__gpu$xla.gpu.triton" and found["ours"].op_name == "scan_forward/pallas_call"


def test_loops_of_unknown_length_are_refused():
    with pytest.raises(ValueError, match=r"loop\.1"):
        traffic.kernels(PROGRAM)


CHIP = """\
HloModule jit_g, is_scheduled=true

ENTRY %main (x: f32[12,1]) -> f32[12,1] {
  %x = f32[12,1]{1,0:T(8,128)} parameter(0)
  %fetch = (f32[12,1]{1,0:T(8,128)S(1)}, f32[12,1]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[12,1]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %sine = f32[12,1]{1,0:T(8,128)S(1)} sine(%near)
  ROOT %out = f32[12,1]{1,0:T(8,128)} cosine(%sine)
}
"""


def test_memory_on_the_chip_costs_nothing():
    """Tiles of 8 x 128 fill [12, 1] up to [16, 128]."""
    full = 16 * 128 * 4
    found = {k.name: (k.read, k.written) for k in traffic.kernels(CHIP, on_chip=True)}
    assert found == {"fetch": (full, 0), "sine": (0, 0), "out": (0, full)}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[8,128]{1,0}", [(4_096, 0)]),
        ("bf16[3,5]{0,1:T(8,128)(2,1)S(1)}", [(8 * 128 * 2, 1)]),  # the first axis is the innermost
        ("(pred[], /*index=1*/s4[3]{0})", [(1, 0), (2, 0)]),
        ("u32[]{:S(2)}", [(4, 2)]),
    ],
)
def test_array_bytes(shape, expected):
    assert list(hlo.array_bytes(shape)) == expected


def test_a_scan_moves_each_row_once():
    """Read from a real program: what it moves grows by rows, not by the arrays that they are cut from."""

    def run(x):
        return jax.lax.scan(lambda h, row: ((h + row) * 0.5,) * 2, jnp.zeros(1_000), x)[1]

    def moved(rows):
        compiled = jax.jit(run).lower(jax.ShapeDtypeStruct((rows, 1_000), jnp.float32)).compile()
        return sum(k.runs * k.moved for k in traffic.kernels(compiled))

    short, middle, long = map(moved, (10, 20, 30))
    assert long - middle == middle - short < 10 * 12 * 4_000

"""What kernels promise without TVM: packing, legality, the reference, the cases of conformance."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hwmpq import targets
from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import encoding_named, format_named, known_formats
from hwmpq.kernels import Call, best, candidates, kernel_named, why_not
from hwmpq.kernels.build import compile_cell
from hwmpq.kernels.cases import _ways, grid, kinds, subset
from hwmpq.kernels.cover import pairwise
from hwmpq.kernels.decode import Decoder, decoder
from hwmpq.kernels.micro import Micro, micros
from hwmpq.kernels.micro.cuda import ThreadMicro, WarpMicro
from hwmpq.kernels.nests import nests
from hwmpq.kernels.nests.gemm import Packing
from hwmpq.kernels.nests.image import Geometry
from hwmpq.kernels.reference import accumulate
from hwmpq.kernels.sample import draw
from hwmpq.types import LAYER_OPS, Workload

AVX2 = targets.load("x86-avx2").features
ALL = targets.load("x86-amx").features
NESTS = {nest.name: nest for nest in nests()}
#: Those of CPUs: what a GPU multiplies lies otherwise.
VECTORS = [m for m in micros() if not isinstance(m, WarpMicro | ThreadMicro)]


def conv(cin: int, cout: int, k: int = 3, groups: int = 1, **more: int) -> Workload:
    op = "depthwise" if groups == cin == cout > 1 else "conv2d"
    sizes = dict(
        n=1, h=5, w=6, cin=cin, cout=cout, kh=k, kw=k, sh=1, sw=1, pt=0, pl=0, pb=0, pr=0, dh=1,
        dw=1, groups=groups,
    )  # fmt: skip
    return Workload.make(op, "", **(sizes | more))


LINEAR = Workload.make("linear", "", m=3, k=17, n=33)
MATMUL = Workload.make("matmul", "", b=2, m=3, k=5, n=7, trans_b=1)


# packing


def field(packed: NDArray[Any], vector: int, at: int, width: int, d: Decoder) -> int:
    """Element `at` of a vector, found in memory without the packer's code."""
    if d.unit == 1:
        return int(packed[vector * width + at])
    bits = 8 * d.rows // d.unit
    block, inside = divmod(vector, d.unit)
    row, code, low = block * d.rows, 0, 0
    for part in (4, 2, 1):  # a code is cut into fields of these widths, the low bits first
        if bits - low < part:
            continue
        per_byte = 8 // part
        byte = int(packed[(row + inside // per_byte) * width + at])
        code |= (byte >> (inside % per_byte * part) & ((1 << part) - 1)) << low
        row += d.unit // per_byte
        low += part
    return code - (1 << bits) if code >> (bits - 1) else code


def random_codes(encoding: str, shape: tuple[int, ...]) -> NDArray[Any]:
    kind = encoding_named(encoding)
    low, high = int(kind.qmin), int(kind.qmax)
    return np.random.default_rng(0).integers(low, high + 1, shape).astype(np.int8)


@pytest.mark.parametrize(
    "micro", [m for m in VECTORS if m.acc_dtype == "int32"], ids=lambda m: m.name
)
@pytest.mark.parametrize("encoding", ["s8", "s7", "s6", "s5", "s4", "s3", "s2"])
@pytest.mark.parametrize(
    "work",
    [LINEAR, conv(3, 17), conv(3, 9, dw=2), conv(6, 21, groups=3), conv(1, 1, 1), conv(33, 8, 2)],
    ids=lambda w: "-".join(str(size) for _, size in w.dims),
)
def test_every_packed_weight_is_where_the_loops_read_it(
    micro: Micro, encoding: str, work: Workload
) -> None:
    d = decoder(encoding, micro.w_dtype)
    assert d is not None
    codes = random_codes(encoding, work.weight_shape)
    packed = NESTS["conv2d"].pack(codes, work, micro, d)
    g = Geometry.of(work)
    p = Packing.of(g, micro, d.unit)
    gin = g.cin // g.groups
    assert packed.dtype == d.memory
    assert packed.size == g.groups * p.vectors * p.steps * p.width * d.rows // d.unit
    wide = codes.reshape(g.groups, g.gout, gin, g.kh, g.kw)
    seen = 0
    for group, out, c, i, j in np.ndindex(wide.shape):
        tap, offset = (i, j * gin + c) if g.merged else (i * g.kw + j, c)
        step = tap * p.per_segment + offset // micro.kstep
        vector = (group * p.vectors + out // micro.lanes) * p.steps + step
        at = out % micro.lanes * micro.kstep + offset % micro.kstep
        got = field(packed, vector, at, p.width, d)
        assert got == wide[group, out, c, i, j]
        seen += got != 0
    vectors = g.groups * p.vectors * p.steps
    there = sum(
        field(packed, v, at, p.width, d) != 0 for v in range(vectors) for at in range(p.width)
    )
    assert there == seen, "padding must be zero"


@pytest.mark.parametrize("encoding", ["s8", "s7", "s6", "s5", "s4", "s3", "s2"])
@pytest.mark.parametrize("channels", [3, 8, 17])
def test_depthwise_packing(encoding: str, channels: int) -> None:
    nest, work = NESTS["depthwise"], conv(channels, channels, groups=channels)
    for micro in (m for m in VECTORS if m.acc_dtype == "int32"):
        d = decoder(encoding, nest.weight_dtype(micro))
        assert d is not None
        codes = random_codes(encoding, work.weight_shape)
        packed = nest.pack(codes, work, micro, d)
        steps = -(-(-(-3 // micro.kstep) * 3) // d.unit) * d.unit
        width = micro.lanes * micro.kstep
        for c, (i, j) in product(range(channels), np.ndindex(3, 3)):
            vector = c // micro.lanes * steps + i // micro.kstep * 3 + j
            at = c % micro.lanes * micro.kstep + i % micro.kstep
            got = field(packed, vector, at, width, d)
            assert got == codes[c, 0, i, j]


def test_constants_are_padded_per_group() -> None:
    micro = next(m for m in VECTORS if m.lanes == 8)
    values = np.arange(1, 7, dtype=np.float32)
    padded = NESTS["conv2d"].pad(values, conv(6, 6, groups=2), micro)
    assert padded.tolist() == [1, 2, 3, 0, 0, 0, 0, 0, 4, 5, 6, 0, 0, 0, 0, 0]


# legality


@pytest.mark.parametrize(
    ("work", "fmt", "features", "reason"),
    [
        (LINEAR, "w4a8.g64", AVX2, "multiplies codes, to which group scales cannot be applied"),
        (LINEAR, "e4m3", AVX2, "does not decode e4m3 activations"),
        (LINEAR, "e3m2", AVX2, "does not decode e3m2 activations"),
        (MATMUL, "w4a8", AVX2, "runs in floats and w8a8"),
        (MATMUL, "w8.bf16", AVX2, "both operands of a matmul are activations"),
        (LINEAR, "w8a8", frozenset(), r"no kernel for linear .* avx2_madd16 \(needs avx2\)"),
    ],
)
def test_why_not(work: Workload, fmt: str, features: frozenset[str], reason: str) -> None:
    assert best(work, format_named(fmt), features) is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(why_not(work, format_named(fmt), features))


def test_maddubs_takes_what_cannot_overflow() -> None:
    names = [k.micro.name for k in candidates(LINEAR, format_named("w8a8"), AVX2)]
    assert names == ["avx2_madd16"]
    assert best(LINEAR, format_named("w8a7"), AVX2) is not None
    for name in known_formats():
        fmt = format_named(name)
        for kernel in candidates(LINEAR, fmt, AVX2):
            run = kernel.micro.run_length(fmt)
            assert 2 * fmt.activation.qmax * fmt.weight.qmax * run <= 32767


def test_legality_and_operands_need_no_tvm() -> None:
    code = (
        "import sys\n"
        "from hwmpq import targets\n"
        "from hwmpq.kernels import cases, kernel_named, why_not\n"
        "from hwmpq.kernels.sample import draw\n"
        "features = targets.load('x86-avx2').features\n"
        "case = cases.subset(features)[0]\n"
        "call = case.call\n"
        "kernel = kernel_named(case.kernel, call.workload, call.format, features)\n"
        "sample = draw(call, 0)\n"
        "kernel.parameters(call, sample.weight, sample.epilogue)\n"
        "kernel.cell(call), kernel.schedule(call), kernel.execution(call.format)\n"
        "why_not(call.workload, call.format, frozenset())\n"
        "assert not {'tvm', 'tvm_ffi', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_such_kernel() -> None:
    with pytest.raises(InputError, match=r"no such kernel for linear in w8a8: got x; allowed: con"):
        kernel_named("x", LINEAR, format_named("w8a8"), AVX2)


# the reference


def naive(w: Workload, x: NDArray[Any], weight: NDArray[Any], zero: int) -> NDArray[Any]:
    (oh, ow), gin = w.out_hw, w["cin"] // w["groups"]
    out = np.zeros((w["n"], oh, ow, w["cout"]), np.int64)
    for n, y, z, o in np.ndindex(out.shape):
        first = o // (w["cout"] // w["groups"]) * gin
        for c, i, j in np.ndindex(weight.shape[1:]):
            row = y * w["sh"] + i * w["dh"] - w["pt"]
            column = z * w["sw"] + j * w["dw"] - w["pl"]
            inside = 0 <= row < w["h"] and 0 <= column < w["w"]
            value = int(x[n, row, column, first + c]) if inside else zero
            out[n, y, z, o] += value * int(weight[o, c, i, j])
    return out


@pytest.mark.parametrize(
    "work",
    [
        conv(2, 3, sh=2, sw=2, pb=1, pr=1, n=2),
        conv(4, 6, 2, groups=2, dh=2, pt=2, pl=1),
        conv(3, 3, groups=3, sw=3, pl=2, pr=1),
    ],
    ids=["stride", "groups", "depthwise"],
)
def test_convolution_is_its_definition(work: Workload) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (work["n"], work["h"], work["w"], work["cin"])).astype(np.uint8)
    weight = rng.integers(-127, 128, work.weight_shape).astype(np.int8)
    acc = accumulate(work, x, weight, 77)
    assert acc.dtype == np.int64
    np.testing.assert_array_equal(acc, naive(work, x, weight, 77))


def test_matmul_takes_the_zero_point_off() -> None:
    a = np.array([[[5, 7]]], np.uint8)
    b = np.array([[[1, -2]]], np.int8)
    for trans_b, operand in ((1, b), (0, b.transpose(0, 2, 1))):
        work = Workload.make("matmul", "", b=1, m=1, k=2, n=1, trans_b=trans_b)
        assert accumulate(work, a, operand, 3).tolist() == [[[(5 - 3) - 2 * (7 - 3)]]]


def test_integers_have_one_right_answer_and_floats_a_narrow_range() -> None:
    def answer(fmt: str, out: str, residual: str) -> Any:
        f = format_named(fmt)
        return draw(Call(LINEAR, f, f.activation.name, out, residual), 1).answer

    for out, residual in (("u8", "u8"), ("u8", "fp32"), ("u4", ""), ("fp32", "")):
        exact = answer("w8a8", out, residual)
        assert (exact.low == exact.high).all()
    loose = answer("fp32", "fp32", "fp32")
    assert (loose.low < loose.high).any()
    assert np.abs(loose.high - loose.low).max() < 1e-4 * np.abs(loose.right).max()
    assert loose.wrong(loose.right) is None
    text = loose.wrong(loose.right + (np.arange(loose.right.size).reshape(3, 33) == 40))
    assert text.startswith("1 of 99 elements differ, the first at (1, 7): ")


# the cases


def test_pairwise_covers_every_pair_with_few_rows() -> None:
    factors = {"a": range(4), "b": "xyz", "c": (True, False), "d": range(5)}
    rows = pairwise(factors)
    for one, two in combinations(factors, 2):
        seen = {(row[one], row[two]) for row in rows}
        assert seen == set(product(factors[one], factors[two]))
    assert len(rows) <= 24 and rows == pairwise(factors)
    together = {(0, "x"), (1, "x"), (2, "y"), (3, "z"), (3, "x")}
    rows = pairwise(factors, together)
    assert {(row["a"], row["b"]) for row in rows} == together
    for one, two in combinations(factors, 2):
        seen = {(row[one], row[two]) for row in rows}
        assert seen == set(product(factors[one], factors[two])) or (one, two) == ("a", "b")


def test_the_subset_holds_every_kernel_of_every_target() -> None:
    found = map(targets.load, targets.names())
    for features, formats in {(target.features, kinds(target)) for target in found}:
        cases = subset(features, formats)
        assert len(set(cases)) == len(cases)
        used = {case.kernel.split(".")[1] for case in cases}
        assert used == {m.name for m in micros() if m.requires <= features}
        for op in LAYER_OPS:
            kernels = {kernel for kernel, _ in _ways(op, features, formats)}
            assert {case.kernel for case in cases if case.call.workload.op == op} == kernels


def test_the_grid_holds_every_kernel_in_every_format() -> None:
    pairs = {(case.kernel, case.call.format.name) for case in grid(AVX2)}
    for work, fmt in product((LINEAR, MATMUL, conv(3, 3), conv(3, 3, groups=3)), known_formats()):
        for kernel in candidates(work, format_named(fmt), AVX2):
            assert (kernel.name, fmt) in pairs


def test_extreme_samples_are_extreme() -> None:
    call = Call(LINEAR, format_named("w4a8"), "u8", "u8")
    for values, weight in (("most", 7), ("least", -7)):
        sample = draw(call, 0, values)
        assert sample.weight is not None
        assert (sample.x == 255).all() and (sample.weight == weight).all()


# requests that cannot be built


def request(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "layer", "workload": LINEAR.to_json(), "format": "w8a8", "x": "u8", "out": "u8",
        "threads": 1, "kernel": "conv2d.avx2_madd16.s8", "target": "x86-avx2", "folder": "/none",
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"kind": "lair"}, UnknownName, "unknown kind of cell: got 'lair'; allowed: layer"),
        ({"speed": 1}, InputError, "unknown key in request for a layer's cell: got speed"),
        ({"x": "u4"}, InputError, "encoding of x of a w8a8 linear: got 'u4'; allowed: u8"),
        ({"b": "s8"}, InputError, "encoding of b of a w8a8 linear: got 's8'"),
        ({"out": "u9"}, UnknownName, "unknown encoding: got 'u9'"),
        ({"kernel": "magic"}, InputError, "no such kernel for linear in w8a8: got magic"),
        ({"schedule": "99x9.rows"}, InputError, r"schedule of conv2d.+: got 99x9.rows; allowed: "),
        ({"schedule": "6x2"}, InputError, "schedule: got '6x2'; allowed: such as 6x2.vectors"),
        ({"target": "x86"}, UnknownName, "unknown target: got 'x86'"),
    ],
)
def test_requests_refused(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        compile_cell(request(**changes))


def test_a_request_that_lacks_something() -> None:
    asked = request()
    del asked["out"], asked["kernel"]
    with pytest.raises(InputError, match="lacks: got kernel, out"):
        compile_cell(asked)

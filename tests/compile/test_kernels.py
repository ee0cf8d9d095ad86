"""Kernels compiled and run on this CPU against the numpy reference; through a worker, timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hwmpq import targets
from hwmpq.errors import InputError
from hwmpq.formats import encoding_named, format_named
from hwmpq.kernels import Call, candidates, why_not
from hwmpq.kernels import conformance as conf
from hwmpq.kernels.build import compile_cell, export, library
from hwmpq.kernels.cases import Case, subset
from hwmpq.kernels.codes import from_f32, memory_dtype
from hwmpq.kernels.decode import decoder
from hwmpq.kernels.emulate import EmulatedIR
from hwmpq.kernels.epilogue import EpilogueEmitter
from hwmpq.kernels.ir import IR
from hwmpq.kernels.micro.avx2_int import MaddBytes
from hwmpq.kernels.micro.avx512_bf16 import DOT
from hwmpq.kernels.nests import gemm, winograd_loops
from hwmpq.measure import Cell, Protocol, WorkerProcess, time_block
from hwmpq.types import Workload

HOST = targets.native()
SHIPPED = map(targets.load, targets.names())
OTHERS = [t for t in SHIPPED if t != HOST and not t.foreign and not t.gpu]
#: Kernels run a few at a time, so that a failure names few and the suite stays parallel.
CHUNKS = 12
CONV = Workload.make(
    "conv2d", "bias+relu", n=1, h=8, w=9, cin=17, cout=33, kh=3, kw=3, sh=1, sw=1, pt=1, pl=1,
    pb=1, pr=1, dh=1, dw=1, groups=1,
)  # fmt: skip


def failures(cases: Sequence[Case], target: targets.Target) -> str:
    found = ((case, conf.check(case, target)) for case in cases)
    return "\n".join(f"{case}: {wrong}" for case, wrong in found if wrong)


# passes over a reduction that is larger than the L1 cache


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("fmt", ["fp32", "w8a8", "w4a8"])
def test_reduction_in_several_passes(
    fmt: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd rows, so that blocks overlap; depths differ between formats, so all passes are small."""
    monkeypatch.setattr(gemm, "_PASS", 2048)
    monkeypatch.setattr(gemm, "_RESIDENT", 0)
    depths: list[bool] = []
    whole = gemm.Emitter._depth

    def depth(emitter: gemm.Emitter, count: int) -> int:
        found = whole(emitter, count)
        depths.append(found < emitter.p.steps)
        return found

    monkeypatch.setattr(gemm.Emitter, "_depth", depth)
    work = Workload.make(
        "conv2d", "bias+add+relu", n=2, h=9, w=11, cin=128, cout=40, kh=3, kw=3, sh=1, sw=1, pt=1,
        pl=1, pb=1, pr=1, dh=1, dw=1, groups=groups,
    )  # fmt: skip
    x = format_named(fmt).activation.name
    call = Call(work, format_named(fmt), x, x, x)
    found = candidates(work, call.format, HOST.features)
    kernel = next(k for k in found if k.nest.name != "winograd")
    assert conf.check(Case(kernel.name, call), HOST) is None
    if kernel.micro.name.startswith("avx2"):
        assert any(depths)


@pytest.mark.skipif("avx2" not in HOST.features, reason="the winograd nest has a kernel of AVX2")
@pytest.mark.parametrize("values", ["most", "least"])
@pytest.mark.parametrize("schedule", ["best", "turned"])
def test_winograd_is_exact_up_to_its_last_channel(
    values: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest sums that it may make, and weights that are transformed piece by piece."""
    monkeypatch.setattr(winograd_loops, "_PANEL", 32 * 1024)
    work = Workload.make(
        "conv2d", "bias+add+relu", n=2, h=5, w=6, cin=1840, cout=9, kh=3, kw=3, sh=1, sw=1, pt=1,
        pl=1, pb=1, pr=1, dh=1, dw=1, groups=1,
    )  # fmt: skip
    call = Call(work, format_named("w8a8"), "u8", "u8", "u8")
    case = Case("winograd.avx2_madd16.s8", call, schedule, values)
    assert conf.check(case, HOST) is None


# conformance


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_pairwise_subset_on_this_cpu(chunk: int) -> None:
    wrong = failures(subset(HOST.features)[chunk::CHUNKS], HOST)
    assert not wrong, f"\n{wrong}"


def absent(target: targets.Target) -> dict[str, list[Case]]:
    """micro-kernel -> cases, of the kernels whose instructions this CPU lacks."""
    found: dict[str, list[Case]] = {}
    for case in subset(target.features, ("fp32", "w4.bf16", "w8a8", "w4a8")):
        work, fmt = case.call.workload, case.call.format
        (kernel,) = (k for k in candidates(work, fmt, target.features) if k.name == case.kernel)
        if conf.how(kernel) == conf.EMULATED:
            found.setdefault(kernel.micro.name, []).append(case)
    return found


def test_emulated_intrinsics() -> None:
    """A sample of the kernels that this CPU cannot run: 4 cases of each micro-kernel."""
    done: set[str] = set()
    for target in OTHERS:
        for micro, cases in absent(target).items():
            if micro not in done:
                done.add(micro)
                wrong = failures(cases[:: -(-len(cases) // 4)], target)
                assert not wrong, f"\n{target.name}, {conf.EMULATED}:\n{wrong}"
    if not done:
        pytest.skip("this CPU has the instructions of every kernel")


def test_emulated_dot_product_is_the_instruction() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, 64).astype(np.uint8)
    w = rng.integers(-128, 128, 64).astype(np.int8)
    acc = rng.integers(-(2**31), 2**31, 16).astype(np.int32)
    a[:8], w[:4], w[4:8], acc[:2] = 255, -128, 127, (2**31 - 1, 2**31 - 1)

    def body(ir: IR, src: Sequence[Any], out: Any) -> None:
        sums, left, right = (
            ir.load(buffer, 0, size) for buffer, size in zip(src, (16, 64, 64), strict=True)
        )
        name = "llvm.x86.avx512.vpdpbusd.512"
        ir.store(out, 0, ir.intrinsic(name, "int32x16", sums, left, right), 16)

    got = run(body, [acc, a, w], np.zeros(16, np.int32), EmulatedIR())
    terms = (a.astype(np.int64) * w).reshape(16, 4).sum(1)
    np.testing.assert_array_equal(got, (acc + terms).astype(np.int32))


def test_emulated_bf16_dot_is_the_instruction() -> None:
    rng = np.random.default_rng(0)
    a, w = (rng.integers(0x3C00, 0x4400, 32).astype(np.uint16) for _ in range(2))
    a[::3] |= 0x8000
    acc = rng.standard_normal(16).astype(np.float32)

    def body(ir: IR, src: Sequence[Any], out: Any) -> None:
        sums, left, right = (
            ir.load(buffer, 0, size) for buffer, size in zip(src, (16, 32, 32), strict=True)
        )
        ir.store(out, 0, ir.external(DOT, "float32x16", sums, left, right), 16)

    got = run(body, [acc, a, w], np.zeros(16, np.float32), EmulatedIR())
    x, y = (
        (v.astype(np.uint32) << 16).view(np.float32).astype(np.float64).reshape(16, 2)
        for v in (a, w)
    )
    odd = (acc + x[:, 1] * y[:, 1]).astype(np.float32)
    np.testing.assert_array_equal(got, (odd + x[:, 0] * y[:, 0]).astype(np.float32))


def linear(fmt: str, **sizes: int) -> Call:
    f = format_named(fmt)
    return Call(Workload.make("linear", "bias", **sizes), f, f.activation.name, "fp32")


@pytest.mark.parametrize("fmt", ["w8a8", "w8a7", "w8a4", "w4a8", "w2a8", "w2a2"])
@pytest.mark.parametrize("values", ["most", "least"])
def test_no_sum_overflows(fmt: str, values: str) -> None:
    call = linear(fmt, m=2, k=301, n=9)
    for kernel in candidates(call.workload, call.format, HOST.features):
        assert conf.check(Case(kernel.name, call, values=values), HOST) is None


@pytest.mark.parametrize("fmt", ["w8a7", "w4a8"])
def test_one_dot_more_would_overflow(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees it, and the run lengths are the longest possible ones."""
    exact = MaddBytes.run_length
    monkeypatch.setattr(MaddBytes, "run_length", lambda self, f: exact(self, f) + 1)
    call = linear(fmt, m=2, k=301, n=9)
    (kernel,) = (
        k
        for k in candidates(call.workload, call.format, HOST.features)
        if k.micro.name == "avx2_maddubs"
    )
    wrong = conf.check(Case(kernel.name, call, values="most"), HOST)
    assert wrong is not None and "elements differ" in wrong


def test_a_write_behind_the_output_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    store = EpilogueEmitter.store

    def shifted(self: Any, ir: IR, acc: Any, channel: Any, at: Any, *sizes: int) -> None:
        store(self, ir, acc, channel, at + 1, *sizes)

    monkeypatch.setattr(EpilogueEmitter, "store", shifted)
    call = linear("fp32", m=2, k=4, n=9)
    kernel = candidates(call.workload, call.format, HOST.features)[0]
    wrong = conf.check(Case(kernel.name, call), HOST)
    assert wrong == "wrote behind the end of its output"


# the parts


def run(
    body: Callable[[IR, Sequence[Any], Any], None],
    inputs: Sequence[NDArray[Any]],
    out: NDArray[Any],
    ir: IR | None = None,
) -> NDArray[Any]:
    """Run one emitted body over flat arrays and return the filled `out`."""
    import tvm

    ir = ir or IR()
    with ir.function():
        buffers = [ir.arg(f"a{i}", a.size, str(a.dtype)) for i, a in enumerate((*inputs, out))]
        body(ir, buffers[:-1], buffers[-1])
    module = library({"main": ir.result()}, HOST).jit()
    result = tvm.runtime.tensor(out)
    module["main"](*(tvm.runtime.tensor(a) for a in inputs), result)
    return np.asarray(result.numpy())


@pytest.mark.parametrize("encoding", ["s8", "s7", "s6", "s5", "s4", "s3", "s2"])
@pytest.mark.parametrize("dtype", ["int8", "int16", "float32"])
def test_decoders_give_every_code_back(encoding: str, dtype: str) -> None:
    d = decoder(encoding, dtype)
    assert d is not None
    width, vectors = 32, 8 * d.unit
    kind = encoding_named(encoding)
    everything = np.arange(int(kind.qmin), int(kind.qmax) + 1)
    codes = np.resize(everything, (vectors, width)).astype(np.int8)
    packed = d.pack(codes)
    assert packed.nbytes == codes.size * kind.bits // 8

    def body(ir: IR, src: Sequence[Any], out: Any) -> None:
        with ir.loop(vectors // d.unit) as block:
            d.expand(ir, src[0], block * d.rows * width, out, block * d.unit * width, width)

    got = run(body, [packed], np.zeros(codes.size, dtype))
    np.testing.assert_array_equal(got, codes.reshape(-1).astype(dtype))


@pytest.mark.parametrize("encoding", ["bf16", "fp16"])
def test_every_16_bit_pattern_is_decoded(encoding: str) -> None:
    d = decoder(encoding, "float32")
    assert d is not None
    bits = np.arange(2**16, dtype=np.uint16)
    values = encoding_named(encoding).dequantize(bits)
    numbers = np.isfinite(values)

    def body(ir: IR, src: Sequence[Any], out: Any) -> None:
        with ir.loop(bits.size // 8) as block:
            d.expand(ir, src[0], block * 8, out, block * 8, 8)

    got = run(body, [d.pack(bits.reshape(-1, 8))], np.zeros(bits.size, np.float32))
    np.testing.assert_array_equal(got[numbers].view(np.uint32), values[numbers].view(np.uint32))


@pytest.mark.parametrize("encoding", ["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_every_8_bit_float_is_decoded(encoding: str, dtype: str) -> None:
    """uint16 holds the same number in bf16."""
    d = decoder(encoding, dtype)
    assert d is not None
    codes = np.arange(256, dtype=np.uint8)
    values = encoding_named(encoding).dequantize(codes)
    numbers = np.isfinite(values)

    def body(ir: IR, src: Sequence[Any], out: Any) -> None:
        with ir.loop(codes.size // 8) as block:
            d.expand(ir, src[0], block * 8, out, block * 8, 8)

    got = run(body, [d.pack(codes.reshape(-1, 8))], np.zeros(codes.size, dtype))
    read = got if dtype == "float32" else encoding_named("bf16").dequantize(got)
    np.testing.assert_array_equal(read[numbers].view(np.uint32), values[numbers].view(np.uint32))


@pytest.mark.parametrize("encoding", ["bf16", "fp16"])
def test_floats_are_stored_as_formats_rounds_them(encoding: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    bits[:512] = (bits[:512] & 0xFFFF0000) | 0x8000  # halfway cases of bf16
    bits[512:1024] = (bits[512:1024] & 0x8FFFE000) | 0x38001000  # and of fp16
    bits[:4] = np.array([0, 2**31, 0x7F800000, 0xFF800000])  # zeros and infinities
    values = bits.view(np.float32)
    values = np.where(np.isnan(values), np.float32(1), values)

    def body(ir: IR, src: Sequence[Any], out: Any) -> None:
        with ir.loop(values.size // 8) as block:
            ir.store(out, block * 8, from_f32(ir, ir.load(src[0], block * 8, 8), encoding, 8), 8)

    got = run(body, [values], np.zeros(values.size, memory_dtype(encoding)))
    np.testing.assert_array_equal(got, encoding_named(encoding).quantize(values))


# code for other CPUs, and cells


@pytest.mark.parametrize(
    ("target", "kernel", "fmt", "wanted"),
    [
        ("x86-avx512-vnni", "conv2d.avx512_vnni.s8", "w8a8", "vpdpbusd"),
        ("x86-avx512-vnni", "conv2d.avx512_vnni.s4", "w4a8", "vpdpbusd"),
        ("x86-amx", "conv2d.avxvnni.s8", "w8a8", "vpdpbusd"),
        ("x86-avx2", "conv2d.avx2_maddubs.s4", "w4a8", "vpmaddubsw"),
        ("x86-avx2", "conv2d.avx2_madd16.s8", "w8a8", "vpmaddwd"),
        ("x86-avx2", "conv2d.avx2_fma.fp32", "fp32", "vfmadd231ps"),
    ],
)
def test_the_instruction_is_emitted(
    worker: WorkerProcess, target: str, kernel: str, fmt: str, wanted: str
) -> None:
    payload = {"workload": CONV.to_json(), "format": fmt, "kernel": kernel, "target": target}
    function = {"function": "hwmpq.kernels.conformance:mnemonics", "payload": payload}
    counts = worker.call("call", function, 120.0)["counts"]
    assert counts.get(wanted, 0) > 0, counts


LINEAR = Workload.make("linear", "bias+add", m=3, k=65, n=33)
MATMUL = Workload.make("matmul", "scale", b=2, m=5, k=16, n=17, trans_b=1)


def request(work: Workload, fmt: str, folder: Path, **changes: Any) -> dict[str, Any]:
    f = format_named(fmt)
    found = candidates(work, f, HOST.features)
    assert found, why_not(work, f, HOST.features)
    return {
        "kind": "layer", "workload": work.to_json(), "format": fmt, "x": f.activation.name,
        "out": f.activation.name, "residual": "", "b": "" if work.has_weight else f.weight.name,
        "threads": 1, "kernel": found[0].name, "schedule": None, "target": HOST.name,
        "folder": str(folder), "seed": 1,
    } | changes  # fmt: skip


def test_cells_are_built_and_timed(worker: WorkerProcess, tmp_path: Path) -> None:
    requests = {
        "conv": request(CONV, "w8a8", tmp_path / "conv"),
        "linear": request(LINEAR, "fp32", tmp_path / "linear", residual="fp32"),
        "half": request(LINEAR, "bf16", tmp_path / "half", residual="bf16"),
        "matmul": request(MATMUL, "w8a8", tmp_path / "matmul"),
    }
    cells = []
    for key, payload in requests.items():
        function = {"function": "hwmpq.kernels.build:compile_cell", "payload": payload}
        built = worker.call("call", function, 120.0)
        assert built.pop("seconds") > 0 and len(built.pop("cell")) == 16
        cells.append(Cell.from_json({"key": key, **built}))
    assert cells[0].roles == ("input", "weight", "weight", "weight", "weight", "output")
    assert cells[0].atol == 0 and 0 < cells[1].atol < 1e-3 and cells[2].atol <= 1
    assert "weight" not in cells[3].roles
    for timing in time_block(cells, Protocol(rounds=6, epoch_s=0.001), worker):
        assert not timing.error and len(timing.samples_s) > 0, timing.error


def test_a_schedule_changes_the_cell(tmp_path: Path) -> None:
    plain = request(CONV, "w8a8", tmp_path / "cell")
    best = candidates(CONV, format_named("w8a8"), HOST.features)[0].schedule(
        Call(CONV, format_named("w8a8"), "u8", "u8")
    )
    same = compile_cell(plain)["cell"]
    assert compile_cell(plain | {"schedule": best.text})["cell"] == same
    assert compile_cell(plain | {"schedule": "1x1.vectors"})["cell"] != same
    names = {path.name for path in (tmp_path / "cell").iterdir()}
    assert names == {"args.safetensors", "cell.so", "expected.safetensors"}


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"no C compiler to link a kernel with.*Install gcc"):
        export(None, tmp_path / "cell.so", HOST)

"""Kernels of GPUs without one: compiled for the chip and inspected, and run on this CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hwmpq import targets
from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.kernels import Call, Kernel, candidates, glue, why_not
from hwmpq.kernels import conformance as conf
from hwmpq.kernels.cases import Case, kinds, subset
from hwmpq.kernels.cuda import check as gpu
from hwmpq.kernels.cuda import compiler, emulate, source
from hwmpq.kernels.glue import GlueCall, Operand
from hwmpq.launches import Launch
from hwmpq.requantize import Quantizer
from hwmpq.types import Workload

A100, L4, H100 = (targets.load(f"cuda-sm{n}") for n in (80, 89, 90))
BIG = Workload.make("linear", "bias", m=4096, k=4096, n=4096)
needs_nvrtc = pytest.mark.skipif(compiler.missing(), reason="needs NVRTC: the extra `cuda`")
needs_gxx = pytest.mark.skipif(not emulate.possible(), reason="needs g++")


def kernel(fmt: str, target: targets.Target, work: Workload = BIG) -> Kernel:
    return candidates(work, format_named(fmt), target.features)[0]


def made(kernel: Kernel, fmt: str, target: targets.Target, last: bool = False) -> compiler.Compiled:
    """Machine code of the default tile, or of the last one that is offered, of the big product."""
    f = format_named(fmt)
    call = Call(BIG, f, f.activation.name, "u8" if f.is_integer else "fp32")
    if last:
        largest = max(kernel.schedules(call), key=lambda s: (s.rows * s.vectors, s.order))
        kernel = kernel.scheduled(largest, call)
    return compiler.compiled(source.build({"main": kernel.emit(call)}, target), target)


@needs_nvrtc
@needs_gxx
@pytest.mark.parametrize(
    "name",
    [
        "gemm.mma_int8.s4",
        "gemm.mma_bf16.s8",
        "gemm.mma_fp16.s4",
        "gemm.mma_e4m3_widened",
        "gemv.mma_int8.s8",
        "gemv.mma_fp16.s4",
        "depthwise.thread_int",
    ],
)
def test_sample_of_the_pairwise_subset(name: str) -> None:
    cases = [c for c in subset(H100.features, kinds(H100)) if name in c.kernel]
    case = cases[len(cases) // 2]
    assert conf.check(case, H100) is None, str(case)


@needs_nvrtc
@needs_gxx
def test_attention_takes_the_zero_point_off_by_column_sums() -> None:
    work = Workload.make("matmul", "", b=2, m=17, k=33, n=20, trans_b=0)
    f = format_named("w8a8")
    case = Case(kernel("w8a8", A100, work).name, Call(work, f, "u8", "u8", b="s8"))
    assert conf.check(case, A100) is None


@needs_nvrtc
@pytest.mark.parametrize(
    ("fmt", "target", "mnemonic"),
    [("w8a8", H100, "IMMA"), ("fp16", A100, "HMMA"), ("e4m3", L4, "QMMA"), ("fp32", H100, "FFMA")],
)
def test_machine_code_multiplies_by_tensor_cores_and_spills_nothing(
    fmt: str, target: targets.Target, mnemonic: str
) -> None:
    for last in (False, True):
        code = made(kernel(fmt, target), fmt, target, last)
        assert gpu.inspected(code, "main_kernel", cores=fmt != "fp32") == ""
    assert compiler.instructions(code.cubin)[mnemonic] >= 32


@needs_nvrtc
def test_spills_and_missing_tensor_cores_are_found() -> None:
    kept = 'extern "C" __global__ void __launch_bounds__(32) k(int* p, int n) {'
    code = kept + "int a[99]; for (int i = 0; i < n; ++i) a[p[i]] = i; p[0] = a[p[n]]; }"
    found = compiler.compiled(code, H100)
    assert "bytes on the stack" in gpu.inspected(found, "k", cores=False)
    plain = compiler.compiled(kept + "p[0] = n; }", H100)
    assert gpu.inspected(plain, "k", cores=True) == "no mma instruction"


@needs_gxx
@pytest.mark.parametrize(
    ("body", "ended"),
    [
        ("if (threadIdx.x < 40) __syncthreads();", "threads wait for others that never come"),
        ("copy_async<4>(x_ptr + 1, x_ptr);", "copies that nobody waited for"),
        ("copy_async<4>(x_ptr + 1, x_ptr); copy_commit(); copy_wait<0>();", ""),
    ],
)
def test_the_emulator_sees_forgotten_waits(body: str, ended: str) -> None:
    head = 'extern "C" __global__ void __launch_bounds__(64) k(int* __restrict__ x_ptr)'
    x = np.array([7, 0], np.int32)
    launch = Launch("k", (1, 1), 64, 0, (0,), 0, 2, "int32")
    assert emulate.briefly(f"{head} {{ {body} }}").run_on(launch, [x]) == ended
    assert ended or x.tolist() == [7, 7]


@needs_nvrtc
@needs_gxx
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("gelu", (5, 37)),
        *(("softmax", (5, size)) for size in (1, 3, 7, 16, 31, 37, 197)),
        ("softmax", (3, 11, 2)),
        *(("layer_norm", (35, size)) for size in (5, 33, 192)),
    ],
)
def test_glue_is_bit_for_bit_that_of_a_cpu(op: str, shape: tuple[int, ...]) -> None:
    import tvm

    rows, outs = Operand(shape, "plain", "fp32"), []
    rng = np.random.default_rng(0)
    x = rng.standard_normal(rows.size).astype(np.float32)
    constants = {role: rng.random(shape[-1]).astype("f4") for role in ("weight", "bias")}
    attrs = json.dumps({"eps": 1e-5} if op == "layer_norm" else {})
    for width in (32, 4):
        call = GlueCall(op, attrs, (rows,), Operand(shape, "plain", "fp32"), False, width)
        packed = glue.parameters(call, constants, [Quantizer(), Quantizer()])
        outs.append(np.zeros(call.out.size, np.float32))
        if call.grid:
            given = gpu.Run("main", [x, *packed, outs[-1]], cores=False)
            assert gpu.run({"main": glue.emit(call)}, H100, [given]) == [""]
        else:
            given = [tvm.runtime.tensor(a) for a in (x, *packed, outs[-1])]
            tvm.compile(glue.emit(call), target=tvm.target.Target({"kind": "llvm"}))["main"](*given)
            outs[-1] = given[-1].numpy()
    assert outs[0].any() and np.array_equal(*outs)


def test_eight_bit_floats_are_multiplied_as_they_are_where_the_chip_does() -> None:
    e4m3 = format_named("e4m3")
    assert kernel("e4m3", L4).execution(e4m3) == "native"
    assert kernel("e4m3", H100).execution(e4m3) == "storage-only"
    assert "no kernel" in (why_not(BIG, e4m3, frozenset()) or "")
    assert "mma_fp16 multiplies activations in fp16" in (why_not(BIG, e4m3, A100.features) or "")


def test_group_scales_need_whole_lines() -> None:
    conv = Workload.make(
        "conv2d", "", n=1, h=8, w=8, cin=64, cout=64, kh=3, kw=3, sh=1, sw=1, pt=1, pl=1, pb=1,
        pr=1, dh=1, dw=1, groups=1,
    )  # fmt: skip
    for work, fmt in ((conv, "w4.fp16.g64"), (BIG, "w4.fp16.g8")):
        reason = why_not(work, format_named(fmt), H100.features)
        assert "whole lines of 32 input channels" in (reason or "")
    assert why_not(BIG, format_named("w4.fp16.g128"), H100.features) is None


def test_a_check_without_the_compiler_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "missing", lambda: True)
    with pytest.raises(InputError, match=r"no compiler for GPUs.*pip install 'hwmpq\[cuda\]'"):
        gpu.check_tools()

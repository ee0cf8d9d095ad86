"""The kernels' own pipeline and TVM's whole one give code generation the same to do."""

from __future__ import annotations

from typing import Any

import pytest

from hwmpq import targets
from hwmpq.formats import format_named
from hwmpq.kernels import Call, kernel_named, passes
from hwmpq.types import Workload

LINEAR = Workload.make("linear", "bias", m=17, k=129, n=65)
MATMUL = Workload.make("matmul", "", b=3, m=5, k=33, n=17, trans_b=1)
SIZES = dict(n=1, h=9, w=8, kh=3, kw=3, sh=2, sw=2, pt=1, pl=1, pb=1, pr=1, dh=1, dw=1)
CONV = Workload.make("conv2d", "bias+relu", cin=17, cout=33, groups=1, **SIZES)
DEPTHWISE = Workload.make("depthwise", "bias+relu", cin=33, cout=33, groups=33, **SIZES)


@pytest.mark.parametrize(
    ("target", "kernel", "workload", "fmt"),
    [
        ("x86-avx2", "conv2d.avx2_fma.s3", LINEAR, "w3.bf16.g8"),
        ("x86-avx2", "depthwise.avx2_madd16.s8", DEPTHWISE, "w8a8"),
        ("x86-avx2", "matmul.avx2_madd16.s8", MATMUL, "w8a8"),
        ("x86-avx512-vnni", "conv2d.avx512_vnni.s4", CONV, "w4a8"),
        ("arm-neoverse-n2", "conv2d.neon_fma.fp32", CONV, "fp32"),
        ("riscv64-v", "depthwise.rvv_wmacc.s8", DEPTHWISE, "w8a8"),
    ],
)
def test_code_is_generated_from_the_same(
    target: str, kernel: str, workload: Workload, fmt: str
) -> None:
    from tvm_ffi import structural_equal

    machine, form = targets.load(target), format_named(fmt)
    b = "" if workload.has_weight else form.weight.name
    out = "u8" if form.is_integer else "fp32"
    call = Call(workload, form, form.activation.name, out, b=b, threads=2)
    found = kernel_named(kernel, workload, form, machine.features)
    function = found.emit(call, all_threads=True)
    (mine, few), (whole, all_) = (
        lowered(function, machine, name) for name in (passes.pipeline(), "default")
    )
    assert structural_equal(mine, whole, map_free_vars=True)
    assert len(few) < len(all_) / 2


def lowered(function: Any, target: targets.Target, pipeline: str) -> tuple[Any, list[str]]:
    """What `tvm.compile` hands to LLVM, and the passes that made it."""
    import tvm

    names: list[str] = []

    @tvm.ir.instrument.pass_instrument
    class Note:
        def run_before_pass(self, _module: Any, info: Any) -> None:
            names.append(info.name)

    hardware = tvm.target.Target(dict(target.tvm))
    bound = tvm.tirx.transform.BindTarget(hardware.with_host(hardware))
    run, host, _device = tvm.tirx.get_tir_pipeline(pipeline)
    with tvm.transform.PassContext(instruments=[Note()]):
        return host()(run(bound(tvm.IRModule({"main": function})))), names

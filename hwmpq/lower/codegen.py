"""TVM's own part: lowering what has no annotation, planning memory, generating code."""

from __future__ import annotations

from typing import Any

from hwmpq.targets import Target


def compile_module(module: Any, target: Target) -> Any:
    """A tvm Executable for the target.

    Unannotated operators are legalised, fused and run through a schedule that parallelises the
    outer and vectorises the inner loop: none is shipped on TVM's scalar default.
    """
    import tvm
    from tvm import relax

    hardware = tvm.target.Target(dict(target.tvm))

    @tvm.transform.module_pass(opt_level=0, name="hwmpq.RelaxPipeline")  # type: ignore[untyped-decorator,unused-ignore]
    def pipeline(mod: Any, _context: Any) -> Any:
        with hardware:
            return tvm.transform.Sequential(
                [
                    relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
                    relax.transform.ToNonDataflow(),
                    relax.transform.RemovePurityChecking(),
                    relax.transform.CallTIRRewrite(),
                    relax.transform.StaticPlanBlockMemory(),
                    relax.transform.LowerAllocTensor(),
                    relax.transform.KillAfterLastUse(),
                    relax.transform.LowerRuntimeBuiltin(),
                    relax.transform.ComputePrimValue(),
                    relax.transform.VMShapeLower(),
                    relax.transform.AttachGlobalSymbol(),
                ]
            )(mod)

    return relax.build(module, hardware, relax_pipeline=pipeline)

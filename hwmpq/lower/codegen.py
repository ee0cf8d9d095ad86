"""TVM's own part: lowering what has no annotation, planning memory, generating code."""

from __future__ import annotations

from typing import Any

from hwmpq.kernels import passes
from hwmpq.lower.fallback import fallback_schedule
from hwmpq.targets import Target


def compile_module(
    module: Any, target: Target, threads: int = 1, system_lib: bool = False
) -> tuple[Any, int]:
    """A tvm Executable for the target, and the bytes of activations that its plan allocates.

    system_lib: its objects announce themselves to TVM's runtime in the program they are part of.
    Unannotated operators are legalised and run through `fallback_schedule`: none is shipped on
    TVM's scalar default.
    """
    import tvm
    from tvm import relax

    given = frozenset(v.name_hint for v in module.get_global_vars())
    planned = []

    @tvm.transform.module_pass(opt_level=0, name="hwmpq.PlannedMemory")  # type: ignore[untyped-decorator,unused-ignore]
    def note_memory(mod: Any, _context: Any) -> Any:
        planned.append(storage_bytes(mod["main"]))
        return mod

    hardware = tvm.target.Target(dict(target.tvm))

    @tvm.transform.module_pass(opt_level=0, name="hwmpq.RelaxPipeline")  # type: ignore[untyped-decorator,unused-ignore]
    def pipeline(mod: Any, _context: Any) -> Any:
        with hardware:
            return tvm.transform.Sequential(
                [
                    relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
                    fallback_schedule(target.vector_bytes, threads, given),
                    plan_memory(),
                    note_memory,
                    relax.transform.LowerAllocTensor(),
                    relax.transform.KillAfterLastUse(),
                    relax.transform.LowerRuntimeBuiltin(),
                    relax.transform.ComputePrimValue(),
                    relax.transform.VMShapeLower(),
                    relax.transform.AttachGlobalSymbol(),
                ]
            )(mod)

    built = relax.build(
        module, hardware, relax_pipeline=pipeline, tir_pipeline=passes.pipeline(),
        system_lib=system_lib,
    )  # fmt: skip
    return built, planned[-1]


def plan_memory() -> Any:
    """TVM passes: kernels are called on planned memory and write to their last argument."""
    import tvm
    from tvm import relax

    return tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
        ]
    )


def storage_bytes(main: Any) -> int:
    """Sum of the storages that the memory plan allocates in a function."""
    total = 0
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if getattr(getattr(value, "op", None), "name", "") == "relax.memory.alloc_storage":
                total += int(value.args[0].values[0])
    return total

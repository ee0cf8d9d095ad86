"""The TIR passes by which functions of `IR` are compiled: of TVM's default pipeline those that
change them, in its order.

They are loops over flat buffers of types that the CPU has, with their vectors written out: no
blocks, threads of a GPU, virtual threads, software pipelines, fp8 or bf16 variables, whose passes
only walk over them. CompactBufferAllocation is left out although it finds something: a few elements
at the end of the Winograd nest's scratch memory. A module that holds any other function takes TVM's
whole pipeline.
"""

from __future__ import annotations

from typing import Any

NAME = "hwmpq"
#: Attribute of the functions that this pipeline is for.
MARK = "hwmpq.loops"


def pipeline() -> str:
    """Its name, for `tir_pipeline` of `tvm.compile` and `relax.build`: known to TVM from now on."""
    import tvm

    tvm.tirx.register_tir_pipeline(NAME, _made)
    return NAME


def _made() -> tuple[Any, Any, Any]:
    """The pipeline, and TVM's own last passes over code of the host and of devices."""
    import tvm

    whole, host, device = tvm.tirx.get_tir_pipeline("default")

    @tvm.transform.module_pass(opt_level=0, name="hwmpq.Loops")  # type: ignore[untyped-decorator,unused-ignore]
    def run(module: Any, _context: Any) -> Any:
        only = all(_is_loops(function) for function in module.functions.values())
        return (tvm.transform.Sequential(_passes()) if only else whole)(module)

    return run, host, device


def _is_loops(function: Any) -> bool:
    """Whether a function, which has its target, is one of `IR`, for a CPU."""
    return MARK in function.attrs and function.attrs["target"].kind.name == "llvm"


def _passes() -> list[Any]:
    from tvm.s_tir import transform as s_tir
    from tvm.tirx import transform as tirx

    return [
        s_tir.CanonicalizeLoop(),  # a thread's part begins elsewhere than at 0
        s_tir.StmtSimplify(),  # indices, before loops of one round go: it knows their bounds
        s_tir.LowerOpaqueBlock(),  # loops of one round
        tirx.FlattenBuffer(),  # declares arguments and views by their flat data, as codegen reads
        tirx.StorageRewrite(),  # locals that are never alive together share memory
        s_tir.StmtSimplify(),
        tirx.RemoveNoOp(),  # values that nothing reads
        s_tir.RenormalizeSplitPattern(),  # quotients and remainders of sums
        tirx.StmtSimplify(),
        s_tir.RewriteUnsafeSelect(),  # both sides of a Select are computed: no read out of bounds
        tirx.CommonSubexprElim(),
        tirx.AnnotateEntryFunc(),  # what a library of one function calls `main`
        tirx.MakePackedAPI(),  # arguments as the runtime hands them over, and their checks
    ]

"""A schedule for operators that have no kernel of ours: never TVM's scalar default.

Works on schedulable TIR (what LegalizeOps makes): every block's outer spatial loops are fused and
run in parallel, its innermost spatial loop is split by the vector width and vectorised, provided
the block's stores are contiguous there. A block that a step does not apply to keeps its loops.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def fallback_schedule(vector_bytes: int, threads: int, given: Collection[str] = ()) -> Any:
    """TVM module pass over the schedulable PrimFuncs that legalisation made.

    given: names of functions that were there before: kernels of ours, and the user's own.
    """
    import tvm
    from tvm import s_tir

    lanes = vector_bytes // 4

    @tvm.transform.module_pass(opt_level=0, name="hwmpq.FallbackSchedule")  # type: ignore[untyped-decorator,unused-ignore]
    def run(module: Any, _context: Any) -> Any:
        result = tvm.IRModule(dict(module.functions), attrs=module.attrs)
        for variable, function in module.functions.items():
            if variable.name_hint in given:
                continue
            if not isinstance(function, tvm.tirx.PrimFunc) or not _has_root(function):
                continue
            schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
            for block in _blocks(schedule):
                _spread(schedule, block, lanes, threads)
            result[variable] = schedule.mod["main"].with_attr("global_symbol", variable.name_hint)
        return result

    return run


def _has_root(function: Any) -> bool:
    """Whether a function is made of schedulable blocks; ours are plain loops."""
    return type(function.body).__name__ == "SBlockRealize"


def _blocks(schedule: Any) -> list[Any]:
    root = schedule.get_sblock("root")
    return list(schedule.get_child_blocks(root))


def _spread(schedule: Any, block: Any, lanes: int, threads: int) -> None:
    from tvm.s_tir.schedule import ScheduleError

    kinds = [int(var.iter_type) for var in schedule.get(block).iter_vars]
    loops = list(schedule.get_loops(block))
    if len(loops) != len(kinds):
        return
    data_parallel = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 0]
    if not data_parallel:
        return
    try:
        reduction = [loop for loop in loops if all(loop is not d for d in data_parallel)]
        inner = data_parallel[-1]
        extent = schedule.get(inner).extent
        vector = None
        if int(extent) % lanes == 0:
            outer, vector = schedule.split(inner, [None, lanes])
            data_parallel[-1] = outer
        order = [*data_parallel, *reduction, *([vector] if vector is not None else [])]
        schedule.reorder(*order)
        if threads > 1:
            schedule.parallel(schedule.fuse(*data_parallel))
        if vector is not None:
            schedule.vectorize(vector)
    except ScheduleError:
        return  # this block's pattern does not allow the step: it stays as far as it got

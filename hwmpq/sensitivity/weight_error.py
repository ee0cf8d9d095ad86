"""`weight-error`, the control: how far rounding moves a layer's own operands, the rest ignored.

‖Q(W) − W‖² / ‖W‖² + ‖Q(x) − x‖² / ‖x‖², x: the fp32 input over all samples; for a matmul the same
of its two operands. One fp32 run for all cells together.
"""

from __future__ import annotations

from collections.abc import Iterator

from hwmpq.sensitivity.rounding import errors
from hwmpq.sensitivity.task import Cells, Estimate, Task
from hwmpq.types import Sensitivity

LOSSES = ()


def ESTIMATOR(task: Task) -> Sensitivity:
    """Relative squared error of the operands per cell, ≥ 0."""
    wanted = task.singles()
    open_ = task.open(wanted)

    def found() -> Iterator[tuple[Cells, Estimate]]:
        moved = errors(task, open_)
        for cells in open_:
            weight = moved.weight[cells]
            total = sum(operand.ratio for operand in moved.operands[cells])
            yield cells, Estimate(total + (weight.ratio if weight else 0.0))

    known = task.fill(wanted, found(), dict.fromkeys(open_, 1.0))
    return task.result(known, "weight-error", "relative-squared-error")

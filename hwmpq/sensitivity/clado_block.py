"""`clado-block`: measured pair terms inside a block and to the next block only; see `pairs`.

A block ends where a single tensor carries all that later nodes need, so residual and attention
blocks are one each, and in a plain chain every layer is. The restriction is BRECQ's (arXiv
2102.05426), widened by the next block.
"""

from __future__ import annotations

from hwmpq.graph import Graph
from hwmpq.sensitivity.pairs import measured_pairs
from hwmpq.sensitivity.rerun import alive_between
from hwmpq.sensitivity.task import Task
from hwmpq.types import Sensitivity


def blocks(graph: Graph) -> dict[str, int]:
    """layer -> number of its block, in execution order; blocks without layers are not counted."""
    number, filled = 0, False
    found = {}
    for node, alive in zip(graph.nodes, list(alive_between(graph))[1:], strict=True):
        if node.is_layer:
            found[node.name] = number
            filled = True
        if len(alive) == 1 and filled:
            number, filled = number + 1, False
    return found


def ESTIMATOR(task: Task) -> Sensitivity:
    """ΔL per cell as `measured`, and the terms of pairs that are at most one block apart."""
    block = blocks(task.graph)

    def near(one: str, other: str) -> bool:
        return abs(block[one] - block[other]) <= 1

    return measured_pairs(task, "clado-block", near)

"""`clado-block`: measured pair terms inside a block and to the next block only; see `pairs`.

Blocks are residual or attention blocks, or single layers in a plain chain. The restriction is
BRECQ's (arXiv 2102.05426), widened by the next block.
"""

from __future__ import annotations

from itertools import pairwise

from hwmpq.graph import Graph
from hwmpq.quantize.blocks import block_ends
from hwmpq.sensitivity.pairs import measured_pairs
from hwmpq.sensitivity.task import Task
from hwmpq.types import Sensitivity

PAIRS = True


def blocks(graph: Graph) -> dict[str, int]:
    """layer -> number of its block, in execution order; blocks without layers are not counted."""
    return {
        node.name: number
        for number, (start, stop) in enumerate(pairwise([0, *block_ends(graph)]))
        for node in graph.nodes[start:stop]
        if node.is_layer
    }


def ESTIMATOR(task: Task) -> Sensitivity:
    """ΔL per cell as `measured`, and the terms of pairs that are at most one block apart."""
    block = blocks(task.graph)

    def near(one: str, other: str) -> bool:
        return abs(block[one] - block[other]) <= 1

    return measured_pairs(task, "clado-block", near)

"""`clado`: the pair terms of all pairs of layers, measured (CLADO, arXiv 2307.05657); see `pairs`.

B·L + B²·L(L−1)/2 runs for B formats and L layers, each from where it first differs from another
run (see `rerun`), which a chain of layers makes a third of the layers.
"""

from __future__ import annotations

from hwmpq.sensitivity.pairs import measured_pairs
from hwmpq.sensitivity.task import Task
from hwmpq.types import Sensitivity

PAIRS = True


def ESTIMATOR(task: Task) -> Sensitivity:
    """ΔL per cell as `measured`, and the terms of all pairs of cells."""
    return measured_pairs(task, "clado", lambda one, other: True)

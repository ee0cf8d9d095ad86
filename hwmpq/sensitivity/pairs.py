"""Pair terms by measuring: the loss with two layers in a format, less what each costs alone.

C_ii = 2·D_i, C_ij = D_ij − D_i − D_j, where D is the increase of the mean calibration loss, so that
½ xᵀCx is exact for up to two quantized layers (CLADO, arXiv 2307.05657, as in its public code).
Options of one layer never meet: their term is 0, as are the terms of pairs not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

import numpy as np

from hwmpq.sensitivity.measured import loss_increase
from hwmpq.sensitivity.rerun import Runs
from hwmpq.sensitivity.task import Cells, Estimate, Task
from hwmpq.types import FloatArray, Sensitivity


def measured_pairs(task: Task, estimator: str, related: Callable[[str, str], bool]) -> Sensitivity:
    """Singles, and the pairs of all cells of layers that are `related`."""
    singles = task.singles()
    pairs = [
        (*a, *b)
        for a, b in combinations(singles, 2)
        if a[0][0] != b[0][0] and related(task.layers[a[0][0]], task.layers[b[0][0]])
    ]
    runs = Runs(task)
    found = runs.estimates([*singles, *pairs], loss_increase(task, runs.reference))
    terms = pair_terms(task, found)
    return task.result(found, estimator, task.loss.name, runs.tally, terms)


def pair_terms(task: Task, found: Mapping[Cells, Estimate]) -> tuple[FloatArray, FloatArray]:
    """The matrix C and its standard errors, [(L·F), (L·F)], from increases of the loss."""
    size = len(task.layers) * len(task.formats)
    terms, error = np.zeros((2, size, size))
    for cells, estimate in found.items():
        rows = [i * len(task.formats) + j for i, j in cells]
        if len(cells) == 1:
            term = Estimate(2 * estimate.value, 2 * estimate.error)
        else:
            term = _interaction(estimate, *(found[(cell,)] for cell in cells))
        terms[rows[0], rows[-1]] = terms[rows[-1], rows[0]] = term.value
        error[rows[0], rows[-1]] = error[rows[-1], rows[0]] = term.error
    return terms, error


def _interaction(both: Estimate, one: Estimate, other: Estimate) -> Estimate:
    groups = np.subtract(both.groups, one.groups) - np.array(other.groups)
    return Estimate.grouped(both.value - one.value - other.value, groups.tolist())

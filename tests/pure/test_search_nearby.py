"""The choices near a relaxed minimum: all of them, at their value, or said to be incomplete."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hwmpq import search
from hwmpq.search.instances import pairs
from hwmpq.search.nearby import Near, near
from hwmpq.search.relaxation import convexify, minimise
from hwmpq.types import FloatArray

LEGAL = np.ones((6, 3), bool)
LEGAL[1, 2] = LEGAL[4, 0] = LEGAL[5, 1:] = False


def posed(seed: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """A matrix of low rank, two rows and their limits."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(18, 4))
    matrix = root @ root.T + 0.1 * np.diag(rng.random(18))
    for d in range(6):
        matrix[3 * d : 3 * d + 3, 3 * d : 3 * d + 3] *= np.eye(3)
    return matrix, rng.random((2, 18)), np.array([3.2, 3.4])


def oracle(
    matrix: FloatArray, rows: FloatArray, limits: FloatArray
) -> dict[tuple[int, ...], float]:
    found = {}
    for index in itertools.product(*(np.flatnonzero(row) for row in LEGAL)):
        cells = 3 * np.arange(6) + np.array(index)
        if (rows[:, cells].sum(1) <= limits).all():
            found[tuple(int(i) for i in index)] = float(matrix[np.ix_(cells, cells)].sum())
    return found


def asked(
    seed: int, share: float, width: int, through: bool
) -> tuple[Near, dict[tuple[int, ...], float]]:
    """What is found below the value that a share of all choices is below, and those choices."""
    matrix, rows, limits = posed(seed)
    form = convexify(matrix, LEGAL, rows, limits, np.inf)
    assert form is not None
    relaxed = minimise(form, LEGAL, rows, limits)
    assert relaxed is not None
    every = oracle(matrix, rows, limits)
    below = float(np.quantile(list(every.values()), share))
    found = near(form, relaxed, LEGAL, rows, limits, below, width, through)
    return found, {index: value for index, value in every.items() if value < below}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_every_choice_below_the_value_is_found(seed: int, share: float) -> None:
    found, expected = asked(seed, share, 10**6, False)
    assert found.complete and expected
    values = {tuple(c): v for c, v in zip(found.choices.tolist(), found.values, strict=True)}
    assert expected.keys() <= values.keys() <= oracle(*posed(seed)).keys()
    for index, value in expected.items():
        assert values[index] == pytest.approx(value, rel=1e-6)
    assert (np.diff(found.values) >= 0).all()


def test_too_many_partial_choices_are_said() -> None:
    stopped, _ = asked(0, 0.5, 2, False)
    assert not stopped.complete and not len(stopped.choices)
    found, expected = asked(0, 0.5, 2, True)
    assert not found.complete and 0 < len(found.choices) <= 2
    assert found.values[0] <= np.median(list(expected.values()))


def test_a_hundred_layers_are_proven_at_the_first_node() -> None:
    found = search.solve(pairs(100), "iqp", 60.0)
    assert found.status == "optimal" and found.objective == pytest.approx(8.69774, rel=1e-6)

"""Few rows of a new device, where another device's model is there to start from; S5 judges it.

There are three ways: the rows alone; the prior at their speed; the prior with new trees for what is
left. Which does best on shapes of the rows that it has not seen is the one taken, so a prior that
does not fit is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hwmpq.predict.boost import DEFAULTS, Point, Settings
from hwmpq.predict.metrics import metrics
from hwmpq.predict.rows import Row, Table, folds
from hwmpq.targets import Target

SHOTS = (0, 10, 50, 200)
#: Fewest rows that a model is trained on without a prior.
_ALONE = 10
#: Folds that the ways are judged on.
_FOLDS = 5


def ways(prior: Point, seed: int, settings: Settings) -> Mapping[str, Callable[[Table], Point]]:
    """The ways from a table to a model."""
    return {
        "alone": lambda table: Point.fit(table, seed, settings),
        "scaled": prior.scaled,
        "stacked": lambda table: prior.stacked(table, seed, settings),
    }


def best_way(prior: Point, table: Table, seed: int, settings: Settings) -> str:
    """The way with the least mean |log(time / prediction)| on shapes that it was not fitted on;
    the prior's speed alone where there is one shape."""
    groups = len(set(table.group))
    if groups < 2:
        return "scaled"
    enough = len(table) >= _ALONE
    open_ = {n: fit for n, fit in ways(prior, seed, settings).items() if enough or n != "alone"}
    count = min(_FOLDS, groups)
    fold = folds(table.group.tolist(), count, seed)
    off = dict.fromkeys(open_, 0.0)
    for held in range(count):
        known, asked = table.part(fold != held), table.part(fold == held)
        for name, fit in open_.items():
            p = fit(known).seconds(asked.x, asked.terms)
            off[name] += float(np.abs(np.log(asked.y / p)).sum())
    return min(off, key=lambda name: off[name])


def fitter(
    table: Table, seed: int, settings: Settings, prior: Point | None
) -> Callable[[Table], Point]:
    """How to train on the table and on parts of it: by the best way from the prior, if any."""
    if prior is None:
        return lambda part: Point.fit(part, seed, settings)
    return ways(prior, seed, settings)[best_way(prior, table, seed, settings)]


def shots(
    prior: Point, rows: Sequence[Row], target: Target, counts: Sequence[int] = SHOTS,
    seed: int = 0, settings: Settings = DEFAULTS,
) -> dict[int, Mapping[str, Mapping[str, Any]]]:  # fmt: skip
    """{k: {'chosen' and each way: metrics}}: models of k rows of the target and of the prior, all
    judged on the same half of its shapes. 'chosen' has the 'way' beside its metrics. Without rows
    the prior is all there is.

    The halves are dealt by hashes of the shapes; the k rows are a random draw of cells of the other
    half, the same cells for every k and then more. A k that the half has no rows for is left out.
    """
    table = Table.of(rows, target)
    half = folds(table.group.tolist(), 2, seed)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(half == 1))
    test = table.part(half == 0)

    def judged(model: Point) -> Mapping[str, Any]:
        return metrics(test.y, model.seconds(test.x, test.terms), test.group)

    found: dict[int, Mapping[str, Mapping[str, Any]]] = {}
    for k in counts:
        if k > len(order):
            continue
        if not k:
            found[k] = {"chosen": {**judged(prior), "way": "prior"}}
            continue
        known = table.rows_at(order[:k])
        told = {name: judged(fit(known)) for name, fit in ways(prior, seed, settings).items()}
        way = best_way(prior, known, seed, settings)
        found[k] = {"chosen": {**told[way], "way": way}, **told}
    return found

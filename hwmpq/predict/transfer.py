"""S5: how few rows of a new device do, where another device's model is there to start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hwmpq.predict.boost import DEFAULTS, Point, Settings
from hwmpq.predict.metrics import metrics
from hwmpq.predict.rows import Row, Table, folds
from hwmpq.targets import Target

SHOTS = (0, 10, 50, 200)
#: Fewest rows that a model is trained on without a prior.
_ALONE = 10


def shots(
    prior: Point, rows: Sequence[Row], target: Target, counts: Sequence[int] = SHOTS,
    seed: int = 0, settings: Settings = DEFAULTS,
) -> dict[int, Mapping[str, Mapping[str, float]]]:  # fmt: skip
    """{k: {'prior' | 'alone': metrics}}: a model continued from the prior on k rows of the target,
    and one of these rows alone, both judged on the same half of its shapes.

    The halves are dealt by hashes of the shapes; the k rows are a random draw of cells of the other
    half, the same cells for every k and then more. A k that the half has no rows for is left out.
    """
    table = Table.of(rows, target)
    half = folds(table.group.tolist(), 2, seed)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(half == 1))
    test = table.part(half == 0)
    found: dict[int, Mapping[str, Mapping[str, float]]] = {}
    for k in counts:
        if k > len(order):
            continue
        known = table.rows_at(order[:k])
        models = {"prior": prior.adapted(known, seed, settings)}
        if k >= _ALONE:
            models["alone"] = Point.fit(known, seed, settings)
        found[k] = {
            name: metrics(test.y, model.seconds(test.x, test.terms), test.group)
            for name, model in models.items()
        }
    return found

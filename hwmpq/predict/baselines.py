"""What the predictor must beat: each trains on one table and predicts another, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hwmpq.predict.boost import Point, Settings, factors, load, nonnegative, ratios, train
from hwmpq.predict.features import F32, NAMES, PARTS
from hwmpq.predict.rows import Table
from hwmpq.types import FloatArray

Baseline = Callable[[Table, Table, int, Settings], FloatArray]
_SHAPE = [NAMES.index(name) for name in PARTS["shape"]]


def _macs(table: Table) -> FloatArray:
    return np.array([item.macs for item in table.done])


def _bytes(table: Table) -> FloatArray:
    return np.array([item.nbytes for item in table.done])


def _bops(table: Table) -> FloatArray:
    bits = [fmt.weight.bits * fmt.activation.bits for fmt in table.formats]
    return np.asarray(_macs(table) * np.array(bits))


def _roofline(table: Table) -> FloatArray:
    return np.array([item.roofline for item in table.done])


def _line(quantity: Callable[[Table], FloatArray]) -> Baseline:
    """a + b · quantity with a, b ≥ 0 by relative least squares."""

    def predict(known: Table, asked: Table, seed: int, settings: Settings) -> FloatArray:
        def columns(table: Table) -> FloatArray:
            return np.column_stack([np.full(len(table), scale), quantity(table)])

        scale = float(np.median(quantity(known)))
        found = nonnegative(columns(known) / known.y[:, None], np.ones(len(known)), 2000)
        return np.asarray(columns(asked) @ found)

    return predict


def _scaled_roofline(known: Table, asked: Table, seed: int, settings: Settings) -> FloatArray:
    """max(compute, bytes) times the median ratio seen."""
    return _roofline(asked) * float(np.median(known.y / _roofline(known)))


def _nearest(known: Table, asked: Table, seed: int, settings: Settings) -> FloatArray:
    """The time of the nearest shape in the same format (else any), scaled by the MACs.

    Nearest: Euclidean in the features of the shape, of the same operator where there is one.
    """
    found = np.empty(len(asked))
    macs = _macs(known)
    for i, row in enumerate(asked.rows):
        distance = np.sum((known.x[:, _SHAPE] - asked.x[i, _SHAPE]) ** 2, axis=1)
        other_op = np.array([other.workload.op != row.workload.op for other in known.rows])
        other_format = np.array([other.format != row.format for other in known.rows])
        at = int(np.argmin(distance + 1e6 * other_op + 1e3 * other_format))
        found[i] = known.y[at] * asked.done[i].macs / macs[at]
    return found


def _forest(known: Table, asked: Table, seed: int, settings: Settings) -> FloatArray:
    """A random forest on the log of the time, with our features (nn-Meter's model class)."""
    return np.exp(_trees(known.x, np.log(known.y), asked.x, seed, settings))


def _trees(x: F32, y: FloatArray, asked: F32, seed: int, settings: Settings) -> FloatArray:
    """What a random forest of y on x says for `asked`."""
    import xgboost

    options = {
        "objective": "reg:squarederror", "tree_method": "hist", "nthread": 1, "seed": seed,
        "eta": 1.0, "max_depth": 16, "subsample": 0.8, "colsample_bynode": 0.33,
        "num_parallel_tree": settings.forest, "lambda": 0.0, "min_child_weight": 1.0,
        "verbosity": 0,
    }  # fmt: skip
    forest = xgboost.train(options, xgboost.DMatrix(x, y, nthread=1), 1)
    return np.asarray(forest.predict(xgboost.DMatrix(asked, nthread=1)), np.float64)


def _nn_meter(known: Table, asked: Table, seed: int, settings: Settings) -> FloatArray:
    """nn-Meter's predictor on the same rows (MobiSys 2021): a random forest per kind of kernel, of
    image, channels, window, stride, FLOPs and parameters. It knows no number formats, so each
    format of a kernel counts as a kind of its own; a kind without rows gets all rows."""
    found = np.empty(len(asked))
    kinds = [np.array([(r.workload.op, r.format) for r in t.rows], object) for t in (known, asked)]
    x, y, target = _nn_meter_features(known), np.log(known.y), _nn_meter_features(asked)
    for kind in {tuple(kind) for kind in kinds[1]}:
        own, here = ((column == np.array(kind, object)).all(axis=1) for column in kinds)
        own = own if own.any() else np.ones(len(known), bool)
        found[here] = _trees(x[own], y[own], target[here], seed, settings)
    return np.exp(found)


def _nn_meter_features(table: Table) -> F32:
    """[n, 7], of the tables of nn-Meter's paper; a layer without an image has 1 x 1 ones."""
    rows = []
    for work in table.done:
        g = work.g
        weights = g.cin // g.groups * g.cout * g.kh * g.kw
        rows.append([g.h, g.cin, g.cout, g.kh, g.sh, 2 * work.macs, weights])
    return np.array(rows, np.float32)


def _static(known: Table, asked: Table, seed: int, settings: Settings) -> FloatArray:
    """The static terms with fitted factors, without trees."""
    return np.asarray(load(known) * (asked.terms @ factors(known)))


def ours(known: Table, asked: Table, seed: int, settings: Settings) -> FloatArray:
    """The predictor's point model."""
    return Point.fit(known, seed, settings).seconds(asked.x, asked.terms)


def without(part: str) -> Baseline:
    """The point model without one part of the features (its static estimate stays)."""
    names = [name for key, values in PARTS.items() if key != part for name in values]
    keep = [NAMES.index(name) for name in names]

    def predict(known: Table, asked: Table, seed: int, settings: Settings) -> FloatArray:
        found = factors(known)
        ratio = np.log(known.quiet / (known.terms @ found))
        booster = train(known.x[:, keep], ratio, known.weight, seed, settings, names)
        static = load(known) * (asked.terms @ found)
        return np.asarray(static * np.exp(ratios(booster, asked.x[:, keep], names)))

    return predict


BASELINES: Mapping[str, Baseline] = {
    "macs": _line(_macs),
    "bytes": _line(_bytes),
    "bops": _line(_bops),
    "roofline": _scaled_roofline,
    "nearest": _nearest,
    "forest": _forest,
    "nn-meter": _nn_meter,
    "static": _static,
}

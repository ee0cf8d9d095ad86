"""Judging predictions on cells whose shapes the model has not seen, beside baselines.

S1, new shapes: the groups are dealt into folds; every row is predicted once.
S2, new networks: one network is left out at a time, and every shape that occurs in it.
S3, new formats: one format is left out at a time on half of the shapes, and judged there.
All models see the same rows. A choice among formats needs tau_format; a budget, bias and p90.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.predict.baselines import BASELINES, Baseline, ours, without
from hwmpq.predict.boost import DEFAULTS, Settings
from hwmpq.predict.features import PARTS
from hwmpq.predict.metrics import errors, interval, metrics
from hwmpq.predict.model import band
from hwmpq.predict.rows import Row, Table, folds
from hwmpq.targets import Target
from hwmpq.types import FloatArray

Split = Literal["S1", "S2", "S3"]
SPLITS: tuple[Split, ...] = ("S1", "S2", "S3")
Mask = NDArray[np.bool_]
#: Upper ends, in seconds, of the classes of time that are reported apart.
DECADES = {"below 10 us": 1e-5, "10 to 100 us": 1e-4, "0.1 to 1 ms": 1e-3, "above 1 ms": np.inf}


def evaluate(
    rows: Sequence[Row], target: Target, seed: int = 0, settings: Settings = DEFAULTS,
    splits: Sequence[Split] = SPLITS, ablate: bool = False, draws: int = 500,
) -> dict[str, Any]:  # fmt: skip
    """{rows, groups, self_agreement, splits: {split: {model: {metric: value, 'interval': {metric:
    (low, high)}}}}, coverage, strata}; models: hwmpq and BASELINES, with `ablate` also 'no PART'.

    A split that the rows do not allow (no network names, one format) is left out. self_agreement:
    the most that any predictor can show. coverage: share of S1 within the band of the other folds.
    """
    table = Table.of(rows, target)
    models: dict[str, Baseline] = {"hwmpq": ours, **BASELINES}
    if ablate:
        models |= {f"no {part}": without(part) for part in PARTS}
    result: dict[str, Any] = {
        "rows": len(table),
        "groups": len(set(table.group)),
        "self_agreement": self_agreement(rows),
        "splits": {},
    }
    for split in splits:
        cuts = list(_cuts(table, split, seed, settings))
        if not cuts:
            continue
        found = {name: _predicted(table, cuts, model, seed, settings) for name, model in
                 models.items()}  # fmt: skip
        result["splits"][split] = {
            name: _judged(table, p, seed, draws) for name, p in found.items()
        }
        if split == "S1":
            result["coverage"] = _coverage(table, found["hwmpq"], seed, settings)
            result["strata"] = _strata(table, found["hwmpq"])
    return result


def as_text(result: Mapping[str, Any]) -> str:
    """The result as a plain text table, one block per split."""
    head = ("rmspe_pct", "within_5_pct", "within_10_pct", "p90_pct", "bias_pct", "tau",
            "tau_format", "r2_log")  # fmt: skip
    lines = [f"{result['rows']} rows, {result['groups']} shapes"]
    if result["self_agreement"]:
        pairs = (f"{k} {v:.1f}" for k, v in result["self_agreement"].items())
        lines.append("measurement against itself: " + ", ".join(pairs))
    for split, models in result["splits"].items():
        lines += ["", f"{split:<14}" + "".join(f"{name:>15}" for name in head)]
        for name, values in models.items():
            lines.append(f"{name:<14}" + "".join(f"{values[key]:>15.2f}" for key in head))
        for key, (low, high) in models["hwmpq"]["interval"].items():
            if key in ("rmspe_pct", "within_10_pct"):
                lines.append(f"  hwmpq {key}: 95 % interval {low:.2f} to {high:.2f}")
    if "coverage" in result:
        lines += ["", f"band: {100 * result['coverage']:.1f} % of times inside"]
        for name, values in result["strata"].items():
            near, p90 = values["within_10_pct"], values["p90_pct"]
            lines.append(
                f"  {name:<16}{values['rows']:>6.0f} rows, within 10 %: {near:.1f}, p90 {p90:.1f} %"
            )
    return "\n".join(lines) + "\n"


def self_agreement(rows: Sequence[Row]) -> dict[str, float]:
    """Percent of rows whose odd and even samples have medians within 5 and 10 percent, of rows
    with eight samples or more; empty without any. Within one session: an upper bound on what
    measuring again would show."""
    halves = [
        (np.median(row.samples_s[::2]), np.median(row.samples_s[1::2]))
        for row in rows
        if len(row.samples_s) >= 8
    ]
    if not halves:
        return {}
    one, two = np.array(halves).T
    found = errors(one, two)
    return {key: found[key] for key in ("within_5_pct", "within_10_pct")}


def _cuts(table: Table, split: Split, seed: int, settings: Settings) -> Iterator[tuple[Mask, Mask]]:
    """(rows to train on, rows to predict) of each cut; both never share a group, S3 a format."""
    if split == "S1":
        fold = folds(table.group.tolist(), settings.folds, seed)
        for held in range(settings.folds):
            yield _useful(fold != held, fold == held)
    elif split == "S2":
        names = sorted({name for row in table.rows for name in row.networks})
        for name in names if len(names) > 1 else ():
            test = np.array([name in row.networks for row in table.rows])
            occurs = np.isin(table.group, np.unique(table.group[test]))
            if not occurs.all():
                yield _useful(~occurs, test)
    elif split == "S3":
        half = folds(table.group.tolist(), 2, seed)
        names = sorted({row.format for row in table.rows})
        for name in names if len(names) > 1 else ():
            own = np.array([row.format == name for row in table.rows])
            if (own & (half == 0)).any():
                yield _useful(~own & (half == 1), own & (half == 0))
    else:
        raise InputError("split", split, SPLITS)


def _useful(train: Mask, test: Mask) -> tuple[Mask, Mask]:
    if not train.any() or not test.any():
        raise InputError(
            "rows of a split", f"{train.sum()} to train, {test.sum()} to judge", "some of both",
            "Measure more shapes and formats.",
        )  # fmt: skip
    return train, test


def _predicted(
    table: Table, cuts: Sequence[tuple[Mask, Mask]], model: Baseline, seed: int, settings: Settings
) -> FloatArray:
    """Seconds [n], nan for rows in no test part; the geometric mean for a row in several."""
    total, count = np.zeros(len(table)), np.zeros(len(table))
    for train, test in cuts:
        p = model(table.part(train), table.part(test), seed, settings)
        total[test] += np.log(np.maximum(p, 1e-12))
        count[test] += 1
    with np.errstate(invalid="ignore"):
        return np.asarray(np.exp(total / count))


def _judged(table: Table, p: FloatArray, seed: int, draws: int) -> dict[str, Any]:
    use = ~np.isnan(p)
    y, p, group = table.y[use], p[use], table.group[use]
    return {**metrics(y, p, group), "rows": int(use.sum()),
            "interval": interval(y, p, group, seed, draws)}  # fmt: skip


def _coverage(table: Table, p: FloatArray, seed: int, settings: Settings) -> float:
    """Share of rows within the band made of the other folds' residuals."""
    residual = np.log(table.y / p)
    fold = folds(table.group.tolist(), settings.folds, seed)
    inside = np.zeros(len(table), bool)
    for held in range(settings.folds):
        low, high = band(residual[fold != held], table.group[fold != held], settings.coverage)
        inside |= (fold == held) & (residual >= low) & (residual <= high)
    return float(inside.mean())


def _strata(table: Table, p: FloatArray) -> dict[str, dict[str, float]]:
    """Errors by class of time, operator, format and bound, with their numbers of rows."""
    compute = np.array([d.macs / d.peak / d.speedup >= d.memory_cycles for d in table.done])
    labels = [
        [next(name for name, end in DECADES.items() if value < end) for value in table.y],
        [row.workload.op for row in table.rows],
        [row.format for row in table.rows],
        ["compute-bound" if bound else "memory-bound" for bound in compute],
    ]
    found: dict[str, dict[str, float]] = {}
    for column in labels:
        for name in dict.fromkeys(sorted(column)):
            here = np.array([label == name for label in column])
            found[name] = {"rows": float(here.sum()), **errors(table.y[here], p[here])}
    return found

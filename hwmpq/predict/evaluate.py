"""Judging predictions on cells whose shapes the model has not seen, beside baselines.

S1, new shapes: the groups are dealt into folds; every row is predicted once.
S2, new networks: one family is left out at a time, and every shape that occurs in it.
S3, new formats: one format is left out at a time on half of the shapes, and judged there.
S4, new time: as S1, judged on what cells that were timed twice took the other time.
S5, new device: `transfer.shots`, which needs another target's model.
Who is on which side is told by hashes of group keys, before any fit. All models see the same rows.
A choice among formats needs tau_format; a budget, bias and p90. This is level L1, layers; blocks
and whole networks are in `levels`, decisions need a device: tools/bench/decisions.py.
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
from hwmpq.predict.metrics import errors, interval, metrics, over_seeds
from hwmpq.predict.rows import Row, Table, folds
from hwmpq.predict.spread import Spread
from hwmpq.targets import Target
from hwmpq.types import FloatArray

Split = Literal["S1", "S2", "S3", "S4"]
SPLITS: tuple[Split, ...] = ("S1", "S2", "S3", "S4")
Mask = NDArray[np.bool_]
#: Upper ends, in seconds, of the classes of time that are reported apart.
DECADES = {"below 10 us": 1e-5, "10 to 100 us": 1e-4, "0.1 to 1 ms": 1e-3, "above 1 ms": np.inf}
#: Shares of the times that upper ends are judged for.
QUANTILES = (0.5, 0.8, 0.9, 0.95)
#: A stratum of fewer rows is not called the worst.
_FEW = 20


def evaluate(
    rows: Sequence[Row], target: Target, seed: int = 0, settings: Settings = DEFAULTS,
    splits: Sequence[Split] = SPLITS, ablate: bool = False, draws: int = 500, seeds: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """{rows, groups, noise_ceiling, splits: {split: {model: {metric: value, 'interval': {metric:
    (low, high)}}}}, coverage, quiet, strata, worst, points}; models: hwmpq and BASELINES, with
    `ablate` also 'no PART'.

    A split that the rows do not allow (no families, one format, no cell timed twice) is left out.
    noise_ceiling: the most that any predictor can show. With S1: coverage, shares within the band
    and below the upper ends ('upper 0.8') that the other folds give; quiet: errors against the
    least samples; points: [(measured, predicted, operator, format)]. seeds: so many models of ours,
    each with folds of its own; their values are means, and 'spread' has each metric's standard
    deviation over them.
    """
    table = Table.of(rows, target)
    models: dict[str, Baseline] = {"hwmpq": ours, **BASELINES}
    if ablate:
        models |= {f"no {part}": without(part) for part in PARTS}
    result: dict[str, Any] = {
        "rows": len(table),
        "groups": len(set(table.group)),
        "noise_ceiling": noise_ceiling(rows),
        "splits": {},
    }
    for split in splits:
        cuts = list(_cuts(table, split, seed, settings))
        if not cuts:
            continue
        y = _truth(table, split)
        found = {
            name: _predicted(table, cuts, model, seed, settings) for name, model in models.items()
        }
        judged = {name: _judged(table, y, p, seed, draws) for name, p in found.items()}
        more = [
            _judged(table, y, _predicted(table, list(_cuts(table, split, s, settings)), ours, s,
                                         settings), s, 0)
            for s in range(seed + 1, seed + seeds)
        ]  # fmt: skip
        result["splits"][split] = {**judged, "hwmpq": over_seeds(judged["hwmpq"], more)}
        if split == "S1":
            p = found["hwmpq"]
            result["coverage"] = _coverage(table, p, seed, settings)
            result["quiet"] = errors(table.quiet, p * float(np.median(table.quiet / table.y)))
            result["strata"] = _strata(table, p)
            result["worst"] = _worst(result["strata"])
            result["points"] = [
                (float(y[i]), float(p[i]), row.workload.op, row.format)
                for i, row in enumerate(rows)
            ]
    return result


def as_text(result: Mapping[str, Any]) -> str:
    """The result as a plain text table, one block per split."""
    head = ("rmspe_pct", "within_5_pct", "within_10_pct", "p90_pct", "bias_pct", "tau",
            "tau_format", "r2_log")  # fmt: skip
    lines = [f"{result['rows']} rows, {result['groups']} shapes"]
    ceiling = result["noise_ceiling"]
    told = "noise ceiling: " + ", ".join(f"{k} {v:.1f}" for k, v in ceiling.items())
    for split, models in result["splits"].items():
        lines += ["", f"{split:<14}" + "".join(f"{name:>15}" for name in head)]
        for name, values in models.items():
            lines.append(f"{name:<14}" + "".join(f"{values[key]:>15.2f}" for key in head))
        ours = models["hwmpq"]
        for key, (low, high) in ours["interval"].items():
            if key in ("rmspe_pct", "within_10_pct"):
                spread = ours.get("spread", {}).get(key)
                over = "" if spread is None else f"; over seeds ± {spread:.2f}"
                lines.append(f"  hwmpq {key}: 95 % interval {low:.2f} to {high:.2f}{over}")
        if ceiling:
            lines.append(f"  {told}")
    if "coverage" in result:
        quiet = result["quiet"]
        lines += [
            "",
            f"band: {100 * result['coverage']['band']:.1f} % of times inside; below upper ends: "
            + ", ".join(
                f"{100 * result['coverage'][_upper(q)]:.1f} of {100 * q:g} %" for q in QUANTILES
            ),
            f"against the least samples: within 10 %: {quiet['within_10_pct']:.1f}, "
            f"rmspe {quiet['rmspe_pct']:.1f} %",
        ]
        for name, values in result["strata"].items():
            near, p90 = values["within_10_pct"], values["p90_pct"]
            worst = "  worst" if name == result["worst"] else ""
            lines.append(
                f"  {name:<16}{values['rows']:>6.0f} rows, within 10 %: {near:.1f}, "
                f"p90 {p90:.1f} %{worst}"
            )
    return "\n".join(lines) + "\n"


def noise_ceiling(rows: Sequence[Row]) -> dict[str, float]:
    """How well measuring agrees with itself, in percent, as a prediction is judged: cells timed
    again in another block, else (one session only, an upper bound) odd samples against even ones,
    of cells with eight or more. `cells` of them; empty without any."""
    twice = [(row.again_s[-1], row.latency_s) for row in rows if row.again_s]
    halves = [
        (float(np.median(row.samples_s[::2])), float(np.median(row.samples_s[1::2])))
        for row in rows
        if len(row.samples_s) >= 8
    ]
    pairs = twice or halves
    if not pairs:
        return {}
    one, two = np.array(pairs).T
    found = errors(one, two)
    keys = ("within_5_pct", "within_10_pct", "rmspe_pct")
    return {"cells": float(len(pairs)), **{key: found[key] for key in keys}}


def _truth(table: Table, split: Split) -> FloatArray:
    """The seconds that a split judges by: [n]."""
    if split != "S4":
        return table.y
    return np.array([row.again_s[-1] if row.again_s else np.nan for row in table.rows])


def _cuts(table: Table, split: Split, seed: int, settings: Settings) -> Iterator[tuple[Mask, Mask]]:
    """(rows to train on, rows to predict) of each cut; both never share a group, S3 a format."""
    if split == "S4" and not any(row.again_s for row in table.rows):
        return
    if split in ("S1", "S4"):
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


def _judged(table: Table, y: FloatArray, p: FloatArray, seed: int, draws: int) -> dict[str, Any]:
    """draws: of the bootstrap; 0: no intervals."""
    use = ~(np.isnan(p) | np.isnan(y))
    y, p, group = y[use], p[use], table.group[use]
    found: dict[str, Any] = {**metrics(y, p, group), "rows": int(use.sum())}
    return {**found, "interval": interval(y, p, group, seed, draws)} if draws else found


def _coverage(table: Table, p: FloatArray, seed: int, settings: Settings) -> dict[str, float]:
    """Share of rows within the band, and below each upper end, made of the other folds' rows."""
    residual = np.log(table.y / p)
    fold = folds(table.group.tolist(), settings.folds, seed)
    held_by = {name: np.zeros(len(table), bool) for name in ("band", *map(_upper, QUANTILES))}
    for held in range(settings.folds):
        test, known = fold == held, fold != held
        spread = Spread.fit(
            table.x[known], residual[known], table.group[known], seed, settings.folds,
            settings.coverage,
        )  # fmt: skip
        ends = spread.band(table.x[test])
        held_by["band"][test] = (residual[test] >= ends[:, 0]) & (residual[test] <= ends[:, 1])
        for q in QUANTILES:
            held_by[_upper(q)][test] = residual[test] <= spread.upper(table.x[test], q)
    return {name: float(inside.mean()) for name, inside in held_by.items()}


def _upper(q: float) -> str:
    return f"upper {q:g}"


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


def _worst(strata: Mapping[str, Mapping[str, float]]) -> str:
    """The stratum with the fewest times within 10 %, among those with enough rows."""
    enough = {name: v for name, v in strata.items() if v["rows"] >= _FEW} or strata
    return min(enough, key=lambda name: enough[name]["within_10_pct"])

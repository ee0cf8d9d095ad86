"""From the store to a folder of `cost_models/`: which rows are taken, and how far they are trusted.

Taken: times measured on one machine, with kernels as this program emits them. Each cell counts
once, its newest row; what it took before is kept beside it, for the noise ceiling. Left out, with
the number in the report: failures, cells without samples, and kernels that this program does not
know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.kernels import CODEGEN_VERSION
from hwmpq.measure.store import Row as StoreRow
from hwmpq.measure.store import Store
from hwmpq.predict.analytic import resolve
from hwmpq.predict.boost import DEFAULTS, Settings
from hwmpq.predict.evaluate import as_text, evaluate
from hwmpq.predict.metrics import METRICS
from hwmpq.predict.model import Predictor
from hwmpq.predict.rows import Row
from hwmpq.targets import Target, data_folder

#: Stage and key of the fact that says which families of networks hold a sampled shape.
FAMILIES = ("shape families", "all")
#: Relative error that no measurement is thought to be below: it bounds the ratio of two weights.
_NOISE = 0.02


@dataclass(frozen=True)
class Selection:
    """Rows for one machine, the toolchain of the newest, and why others were left out."""

    rows: tuple[Row, ...]
    fingerprint: str
    toolchain: Mapping[str, str]
    left_out: Mapping[str, int]


def weight_of(samples_s: Sequence[float], disturbance: float = 0.0) -> float:
    """Trust in the median of the samples, in (0, 1]: floor² / (floor² + its relative variance).

    The variance is taken from the median absolute deviation (1.4826 MAD is one sigma of a normal
    distribution) over the number of samples; disturbance: the relative standard error that the
    quality flags of the timing stand for (measure.stats.disturbance).
    """
    middle = float(np.median(samples_s))
    sigma = 1.4826 * float(np.median(np.abs(np.asarray(samples_s) - middle))) / middle
    return _NOISE**2 / (_NOISE**2 + sigma**2 / len(samples_s) + disturbance**2)


def select(
    rows: Iterable[StoreRow], target: Target, fingerprint: str = "",
    families: Mapping[str, Sequence[str]] | None = None,
) -> Selection:  # fmt: skip
    """The rows of one machine that a model may be trained on.

    families: workload key -> families of networks that hold it, for S2. Raises InputError when no
    row is left, or rows of several machines are there and none is named.
    """
    left: Counter[str] = Counter()
    good: list[StoreRow] = []
    for row in rows:
        reason = _why_left_out(row, target)
        if reason:
            left[reason] += 1
        else:
            good.append(row)
    machines = Counter(row.fingerprint for row in good)
    if not good or (fingerprint and fingerprint not in machines):
        raise InputError(
            f"measured rows of {target.name} for a cost model",
            f"{len(good)} that can be used ({_told(left) or 'none left out'})", None,
            f"Measure cells on this target first{' and machine' if fingerprint else ''}.",
        )  # fmt: skip
    if not fingerprint and len(machines) > 1:
        raise InputError(
            f"rows of {target.name} from several machines",
            ", ".join(f"{name} ({count})" for name, count in sorted(machines.items())),
            "one", "Name one with --fingerprint.",
        )  # fmt: skip
    machine = fingerprint or next(iter(machines))
    mine = [row for row in good if row.fingerprint == machine]
    cells: dict[tuple[str, str, str, int], list[StoreRow]] = {}
    for row in sorted(mine, key=lambda row: row.created):
        m = row.measurement
        cells.setdefault((m.workload.key, m.format, m.kernel, m.threads), []).append(row)
    left.update({"another machine": len(good) - len(mine)})
    toolchain = max(mine, key=lambda row: row.created).toolchain
    return Selection(
        tuple(_row(cells[cell], families or {}) for cell in sorted(cells)), machine,
        {str(k): str(v) for k, v in toolchain.items()}, {k: n for k, n in left.items() if n},
    )  # fmt: skip


def train(
    store: Store, target: Target, folder: Path | None = None, seed: int = 0,
    fingerprint: str = "", settings: Settings = DEFAULTS, ablate: bool = False,
    prior: Predictor | None = None,
) -> tuple[Predictor, str]:  # fmt: skip
    """Train on the store's rows, judge, and write the folder (default: cost_models/<target>).

    prior: another target's model to start from, for few rows. Returns the predictor and a plain
    text report. Raises as `select` and `Predictor.fit`.
    """
    rows = store.rows(target.name, "measured")
    chosen = select(rows, target, fingerprint, families_in(store))
    predictor = Predictor.fit(
        chosen.rows, target, seed, settings, chosen.fingerprint, chosen.toolchain, prior
    )
    result = evaluate(chosen.rows, target, seed, settings, ablate=ablate)
    told: dict[str, dict[str, float]] = {
        f"{split}.{model}": {key: float(values[key]) for key in METRICS}
        for split, models in result["splits"].items()
        for model, values in models.items()
    }
    told["coverage"] = result["coverage"]
    told["noise ceiling"] = {**result["noise_ceiling"]}
    judged = replace(predictor, errors=told)
    judged.save(folder or data_folder("cost_models") / target.name)
    report = as_text(result)
    if chosen.left_out:
        report += f"left out: {_told(chosen.left_out)}\n"
    return judged, report


def _why_left_out(row: StoreRow, target: Target) -> str:
    m = row.measurement
    if m.error:
        return "failed"
    if not m.samples_s or m.source != "measured":
        return "no measured time"
    if m.quality.get("schedule"):
        return "not in its default schedule"
    if row.target != target.name:
        return "another target"
    code = str(row.toolchain.get("codegen", ""))
    if code not in ("", str(CODEGEN_VERSION)):
        return "code of another version"
    try:
        resolve(m.kernel, m.workload, format_named(m.format), target)
    except InputError:
        return "a format or kernel that is not known here"
    return ""


def families_in(store: Store) -> Mapping[str, Sequence[str]]:
    """Workload key -> families of networks, of the shapes that `cost-model sample` drew."""
    found: Mapping[str, Sequence[str]] | None = store.fact(*FAMILIES)
    return found or {}


def _row(rows: Sequence[StoreRow], families: Mapping[str, Sequence[str]]) -> Row:
    """The rows of one cell, oldest first."""
    m = rows[-1].measurement
    steady = tuple(map(float, m.steady_s))
    return Row(
        m.workload, m.format, m.kernel, m.threads, m.latency_s,
        weight_of(steady, float(m.quality.get("disturbance", 0.0))),
        tuple(families.get(m.workload.key, ())), steady,
        tuple(row.measurement.latency_s for row in rows[:-1]),
    )  # fmt: skip


def _told(left: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left.items()) if count)

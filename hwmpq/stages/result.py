"""What a run hands back: the contract's JSON, rows for the table, the frontier."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hwmpq import artifact, toolchain
from hwmpq.artifact.folder import replace_folder
from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.measure.environment import hardware
from hwmpq.search import solve
from hwmpq.stages.bench import Attempt
from hwmpq.stages.budget import parse_latency
from hwmpq.stages.build import Made
from hwmpq.stages.choose import loss_of, within
from hwmpq.stages.job import Job, Options
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.menu import Menu
from hwmpq.stages.place import check_place, was_met
from hwmpq.stages.predicted import spread
from hwmpq.stages.pricing import unknown_cells
from hwmpq.stages.timing import Timed
from hwmpq.stages.verify import Accuracy
from hwmpq.types import Assignment, Problem, Solution

EXIT_CODES = {
    "met": 0, "error": 2, "infeasible": 3, "missed": 4, "accuracy": 5, "slower": 6,
}  # fmt: skip


@dataclass(frozen=True)
class LayerRow:
    """One line of the final table. options: format -> seconds of the cell; why_not: format ->
    reason where there is none; latency_source: 'measured' or 'predicted', of the chosen cell;
    measured_s: what it took inside the artifact."""

    name: str
    op: str
    shape: str
    format: str
    kernel: str
    execution: str
    loss: float
    predicted_s: float | None
    options: Mapping[str, float]
    why_not: Mapping[str, str]
    latency_source: str = "measured"
    measured_s: float | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """json: the contract's result.json; problem: to solve again from the same facts; evidence: of
    `stages.evidence`."""

    json: dict[str, Any]
    rows: list[LayerRow]
    frontier: list[dict[str, Any]]
    exit_code: int
    problem: Problem | None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """Whether the budgets were met, in the contract's words."""
        return str(self.json["status"])

    @property
    def assignment(self) -> Assignment:
        return dict(self.json.get("assignment", {}))

    @property
    def artifact(self) -> Path:
        return Path(self.json["artifact"])

    def report(self, path: str | Path) -> Path:
        """Write the report: FILE.html, .md or .json."""
        from hwmpq.report import Content, write

        rows = [asdict(row) for row in self.rows]
        write(Content(self.json, rows, self.frontier, self.evidence), Path(path))
        return Path(path)

    def solve(self, latency: float | str | None = None, solver: str = "ilp") -> Solution:
        """The best plan for another latency from the same facts; nothing is measured.

        latency: seconds, or a budget as `quantize` takes it. Raises InputError.
        """
        if self.problem is None:
            raise InputError("a dry run has no problem to solve", next="Run it without dry_run.")
        if latency == "fastest":
            return solve(replace(self.problem, minimize="latency_s"), solver)
        seconds = self._seconds(latency) if isinstance(latency, str) else latency
        return solve(within(self.problem, seconds), solver)

    def _seconds(self, text: str) -> float:
        limit = parse_latency(text)
        assert limit is not None
        if limit.seconds is not None:
            return limit.seconds
        timed = self.json["baselines"]
        if limit.of not in timed:
            raise InputError(f"budget relative to {limit.of!r}", None, list(timed))
        return float((limit.ratio or 1.0) * timed[limit.of]["latency_s"])

    def write(self, out: Path, made: Path) -> None:
        """Put result.json, report.html and the artifact into `out`, replaced as a whole.

        A result that was met is not replaced by one that was not: that goes to `<out>.<status>`.
        The artifact's manifest tells the times and the accuracy too.
        """
        place = out
        if was_met(out) and self.exit_code != 0:
            place = out.with_name(f"{out.name}.{self.json['status']}")
        check_place(place)
        self.json["artifact"] = str(place / "artifact")
        self.json["report"] = str(place / "report.html")
        aside = made.parent / "result"
        try:
            artifact.add_facts(made, {name: self.json[name] for name in ("latency_s", "accuracy")})
            self.json["nbytes"]["artifact"] = artifact.nbytes(made)
            aside.mkdir()
            os.replace(made, aside / "artifact")
            (aside / "result.json").write_text(json.dumps(self.json, indent=1) + "\n")
            more = {
                "version": 1, "rows": [asdict(row) for row in self.rows],
                "frontier": self.frontier, "evidence": self.evidence,
            }  # fmt: skip
            (aside / "rows.json").write_text(json.dumps(more, indent=1) + "\n")
            self.report(aside / "report.html")
            replace_folder(aside, place)
        except OSError as error:
            raise InputError(
                f"cannot write the result to {out}", error.strerror or error, None,
                "Free some space or choose another --out.",
            ) from error  # fmt: skip


def layer_rows(
    job: Job, menu: Menu, facts: LatencyFacts, problem: Problem, assignment: Mapping[str, str]
) -> list[LayerRow]:
    """One row per layer of the plan."""
    losses = loss_of(problem, assignment)
    unknown = unknown_cells(job.network, facts)
    rows = []
    for layer in job.network.layers:
        fmt = assignment[layer.name]
        kernel = menu.kernels[layer.name][fmt]
        options, source = {}, "measured"
        for name in menu.kernels[layer.name]:
            cell = facts.cell(layer.workload, name)
            if cell is not None and not cell.error:
                options[name] = cell.latency_s
                source = cell.source if name == fmt else source
        rows.append(
            LayerRow(
                layer.name,
                layer.workload.op,
                shape_text(layer.workload),
                fmt,
                kernel.name,
                kernel.execution(format_named(fmt)),
                losses[layer.name],
                options.get(fmt),
                options,
                menu.reasons[layer.name] | unknown[layer.name],
                source,
            )
        )
    return rows


def shape_text(workload: Any) -> str:
    """A short shape, as people write it."""
    w = workload
    if w.op in ("conv2d", "depthwise"):
        groups = f" g{w['groups']}" if w["groups"] > 1 and w.op == "conv2d" else ""
        stride = f" /{w['sh']}" if w["sh"] > 1 else ""
        return f"{w['cin']}x{w['h']}x{w['w']} > {w['cout']}, {w['kh']}x{w['kw']}{stride}{groups}"
    if w.op == "linear":
        return f"{w['m']}x{w['k']} > {w['n']}"
    return f"{w['b']} x {w['m']}x{w['k']}x{w['n']}"


def result_json(
    job: Job, *, status: str, ambiguous: bool, assignment: Assignment, rows: list[LayerRow],
    predicted_s: float, predicted_interval: tuple[float, float], own: Timed,
    limit_s: float | None, statistic: str, baselines: dict[str, dict[str, Any]],
    accuracy: Accuracy, solution: Solution, told: Mapping[str, Any], rounds: int,
    seconds: dict[str, float], out: Path, made: Made, split: str, new_timings: int,
    failures: dict[str, str], estimator: str,
) -> dict[str, Any]:  # fmt: skip
    """The contract's result.json."""
    o = job.options
    manifest = json.loads((made.path / "manifest.json").read_text())
    return {
        "version": 1,
        "status": status,
        "ambiguous": ambiguous,
        "model": o.model,
        "target": job.target.name,
        "device": job.device.name,
        "threads": o.threads,
        "seed": o.seed,
        "assignment": assignment,
        "kernels": {
            r.name: {
                "kernel": r.kernel,
                "execution": r.execution,
                "latency_source": r.latency_source,
            }
            for r in rows
        },
        "latency_s": {
            "budget": limit_s,
            "statistic": statistic,
            "predicted": predicted_s,
            "predicted_interval": None if job.estimated else list(predicted_interval),
            "measured": None if job.estimated else own.latency_s,
            "measured_interval": None if job.estimated else list(own.interval),
        },
        "baselines": baselines,
        "accuracy": accuracy.to_json(),
        "parity": accuracy.parity(),
        "nbytes": {
            "weights": made.weight_bytes,
            "artifact": artifact.nbytes(made.path),
            "peak_memory": manifest["nbytes"]["peak_memory"],
        },
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "method": o.method,
        "choice": dict(told),
        "seconds": {
            name: seconds.get(name, 0.0)
            for name in (
                "trace",
                "sensitivity",
                "profile",
                "predict",
                "search",
                "compile",
                "verify",
            )
        },
        "rounds": rounds,
        "artifact": str(out / "artifact"),
        "report": str(out / "report.html"),
        "data": split,
        "sensitivity": estimator,
        "new_timings": new_timings,
        "failures": failures,
        "options": changed(o),
        "environment": {
            "quality": {k: v for k, v in own.quality.items() if k != "rounds"},
            "fingerprint": job.fingerprint,
            "machine": None if job.times_elsewhere else hardware(),
            "versions": toolchain.versions(),
            "date": time.strftime("%Y-%m-%d %H:%M"),
        },
    }


def changed(options: Options) -> dict[str, Any]:
    """What the user asked for beside the defaults: field of Options -> value."""
    return {
        f.name: list(value) if isinstance(value, tuple) else value
        for f in fields(options)
        if (value := getattr(options, f.name)) != f.default and f.name != "model"
    }


def predicted_interval(job: Job, attempt: Attempt, latency: LatencyFacts) -> tuple[float, float]:
    """The error of prices of artifacts that were left out of their fit, on either side, and what
    the bands of predicted cells add."""
    centre = attempt.predicted_s
    below, above = spread(job, attempt.made.assignment, latency)
    error = latency.residual
    return max(centre * (1 - error) + below, 0.0), centre * (1 + error) + above


def status_of(attempt: Attempt, accuracy: Accuracy, max_drop: float | None) -> str:
    """The contract's word for how the plan did, by its precedence."""
    if not attempt.within_limit:
        return "missed"
    if max_drop is not None and accuracy.drop > max_drop:
        return "accuracy"
    if attempt.own.interval[0] > attempt.timed["fp32"].interval[1]:
        return "slower"
    return "met"

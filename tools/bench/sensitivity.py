"""Which sensitivity estimator chooses best? Plans for size budgets, and what they are worth.

    python tools/bench/sensitivity.py --out cells.jsonl --store cells.sqlite \\
        --net zoo:resnet20_cifar npz:train.npz npz:test.npz weights.safetensors \\
        --menu w2a8,w4a8,w8a8=2.25,2.5,2.75,3,3.5,4,5,6 --menu w4a4,w8a8=4.5,5,6 --draws 5

A budget is an average of bits per weight. For every net, menu and draw of calibration images each
method proposes a plan for each budget, on one and the same quantizers; the plan's accuracy is that
of the exact simulator on the test images. `uniform` is the widest format everywhere that fits,
`random` many feasible plans. Every cell is written to --out at once, the estimators' items to
--store: started again, it goes on. The table on stdout has means over the draws with their standard
errors; --plot writes them as a picture (SVG).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import record

from hwmpq import methods
from hwmpq.formats import format_named
from hwmpq.methods.study import Study
from hwmpq.quantizers import Quantizers
from hwmpq.search import random, solve
from hwmpq.search.evaluate import choice_of
from hwmpq.stages import facts
from hwmpq.stages.job import Images, Job, Options, load_images, open_job
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.menu import Menu, make_menu, uniform
from hwmpq.stages.verify import float_logits, simulated
from hwmpq.types import Assignment, Problem, Sensitivity, digest

#: Estimators with pair terms; the quadratic solver answers for them.
PAIRED = ("clado", "clado-block", "clado-gn")
DIAGONAL = ("hessian-trace", "fisher", "measured", "output-error", "weight-error")
METHODS = (*PAIRED, *DIAGONAL, "auto", "uniform", "random")
#: They take the same runs of one cell each; the pair terms of the other two need these runs too.
SINGLES = ("clado-gn", "measured", "output-error")
SOLVE_S = 60.0


class Shown:
    """Notes of the parts, among them the estimators' forecasts, go to stderr."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        yield lambda _: None

    def note(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Log:
    """Rows on disk, one JSON object per line, by their key."""

    path: Path
    rows: dict[str, dict[str, Any]]

    @staticmethod
    def open(path: Path) -> Log:
        lines = path.read_text().splitlines() if path.exists() else []
        return Log(path, {row["key"]: row for row in map(json.loads, lines)})

    def add(self, key: str, **row: Any) -> dict[str, Any]:
        self.rows[key] = {"key": key, **row}
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]


@dataclass(frozen=True, eq=False)
class Case:
    """A net with a menu. problem: sizes and legal cells; reference: float's outputs on the test."""

    name: str
    job: Job
    images: Images
    menu: Menu
    quantizers: Quantizers
    problem: Problem
    reference: Any


def main() -> None:
    words = arguments()
    facts.SENSITIVITY_IMAGES = facts.SENSITIVITY_LARGE = words.images
    log = Log.open(words.out)
    for net in words.net:
        for menu in words.menu:
            formats, bits = menu.split("=")
            case = opened(net, formats, words)
            with case.job.store:
                run(case, [float(b) for b in bits.split(",")], words, log)
    rows = [row for row in log.rows.values() if "accuracy" in row]
    found = tables(rows)
    record.show(*found)
    record.write(words.json, *found)
    if words.plot:
        words.plot.write_text(picture(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", nargs="+", action="append", required=True, metavar="WORD",
                        help="MODEL CALIB_DATA TEST_DATA [WEIGHTS]; once per net")  # fmt: skip
    parser.add_argument("--menu", action="append", required=True, metavar="FORMATS=BITS",
                        help="formats, and average bits per weight; once per menu")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--images", type=int, default=1024, help="of a calibration draw")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--random", type=int, default=20, help="random plans per budget")
    parser.add_argument("--test", type=int, help="take only so many test images")
    parser.add_argument("--target", default="native")
    record.option(parser)
    return parser.parse_args()


def opened(net: Sequence[str], formats: str, words: argparse.Namespace) -> Case:
    model, calib, test, *weights = net
    options = Options(
        model, weights=weights[0] if weights else None, calib_data=calib, data=test,
        formats=("fp32", *formats.split(",")), calib=words.images, eval=words.test,
        store=words.store, target=words.target, max_time=np.inf,
    )  # fmt: skip
    job = open_job(methods.settle(options), Shown(), here=False)
    images = load_images(job)
    menu = make_menu(job.network, job.target, options.formats)
    narrow = menu.legal & (np.array(menu.formats) != "fp32")
    legal = np.where(narrow.any(1)[:, None], narrow, menu.legal)
    problem = Problem(
        job.network.names, menu.formats, np.zeros(legal.shape), nbytes=sizes(job, menu),
        legal=legal,
    )  # fmt: skip
    return Case(
        f"{model} {formats}", job, images, menu, facts.calibrate(job, images, menu), problem,
        float_logits(job, images.test, "test images"),
    )  # fmt: skip


def sizes(job: Job, menu: Menu) -> Any:
    """Bytes of every cell, [L, F]."""
    rows = [
        [format_named(f).nbytes(la.workload.weight_shape, la.bias) for f in menu.formats]
        if la.workload.has_weight else [0] * len(menu.formats)
        for la in job.network.layers
    ]  # fmt: skip
    return np.array(rows, float)


def run(case: Case, bits: Sequence[float], words: argparse.Namespace, log: Log) -> None:
    """All missing cells, budget by budget of one estimate."""
    missing = []
    for method in words.methods.split(","):
        many = {"uniform": 1, "random": words.random}.get(method, words.draws)
        for number, share in product(range(many), bits):
            key = digest([case.name, case.job.key, method, number, share, words.images,
                          case.images.test.digest])  # fmt: skip
            if key not in log.rows:
                missing.append((method, number, share, key))
    start = time.perf_counter()
    for done, (method, number, share, key) in enumerate(missing, 1):
        cell(case, method, number, share, key, log)
        left = len(missing) - done
        minutes = (time.perf_counter() - start) / done * left / 60
        case.job.progress.note(
            f"{case.name}: {method} {number} at {share:g} bits; {left} cells left, "
            f"about {minutes:.0f} min"
        )


def cell(case: Case, method: str, number: int, bits: float, key: str, log: Log) -> None:
    """One plan and its accuracy; a plan that was judged before is not judged again."""
    budget = {"nbytes": bytes_of(case, bits)}
    plan, cost = proposed(case, method, number, replace(case.problem, budgets=budget), log)
    if not plan:
        log.add(key, net=case.name, method=method, draw=number, bits=bits, plan=None)
        return
    judged = digest([case.job.key, case.images.test.digest, plan])
    if judged not in log.rows:
        found = simulated(case.job, plan, case.quantizers, case.images.test, case.reference)
        log.add(judged, top1=found.simulated, drop=found.drop)
    log.add(
        key, net=case.name, method=method, draw=number, bits=bits, plan=plan,
        accuracy=log.rows[judged]["top1"], drop=log.rows[judged]["drop"], **cost,
    )  # fmt: skip


def bytes_of(case: Case, bits: float) -> float:
    """The size of the net with so many bits per weight: between those of its uniform plans."""
    assert case.problem.nbytes is not None
    whole = case.problem.nbytes.sum(0)
    known = sorted(
        (format_named(f).weight.bits, size)
        for f, size in zip(case.menu.formats, whole, strict=True)
    )
    return float(np.interp(bits, *zip(*known, strict=True)))


def proposed(
    case: Case, method: str, number: int, problem: Problem, log: Log
) -> tuple[Assignment, dict[str, float]]:
    """A plan within the budget ({} where there is none), with seconds and image passes it took."""
    if method == "uniform":
        return widest(case, problem), {"seconds": 0.0, "passes": 0.0}
    if method == "random":
        indices = [*random.samples(problem, number + 1, 0)][number:]
        plan = choice_of(problem, indices[0]) if indices else {}
        return plan, {"seconds": 0.0, "passes": 0.0}
    images = drawn(case, number)
    if method == "auto":
        own, cost = estimated(case, images, "output-error", number, log)
        made = facts.Facts(images, case.menu, case.quantizers, own, LatencyFacts({}, {}))
        study, start = Study(case.job, made), time.perf_counter()
        plan = methods.choose(study, with_losses(problem, own)).solution.choice
        # Candidates of other estimators and the judged plans count by their seconds alone.
        return plan, {**cost, "seconds": cost["seconds"] + time.perf_counter() - start}
    found, cost = estimated(case, images, method, number, log)
    solver = "iqp" if method in PAIRED else "ilp"
    return solve(with_losses(problem, found), solver, SOLVE_S).choice, cost


def drawn(case: Case, number: int) -> Images:
    """Other calibration images than the first draw's; never a held-out one."""
    if not number:
        return case.images
    rest = np.setdiff1d(np.arange(len(case.images.pool)), case.images.held)
    order = np.random.default_rng(number).permutation(rest)[: len(case.images.calib)]
    picked = case.images.pool.subset(np.sort(order), f"{case.images.pool.name} [draw {number}]")
    return replace(case.images, calib=picked)


def estimated(
    case: Case, images: Images, name: str, number: int, log: Log
) -> tuple[Sensitivity, dict[str, float]]:
    """The estimate, from the store where it was made before, and what it costs alone: runs that
    estimators share are counted for each of them, as they took when they were made."""
    shared = {"seconds": 0.0, "passes": 0.0}
    if name in PAIRED and name not in SINGLES:
        _, shared = estimated(case, images, SINGLES[0], number, log)
    job = replace(case.job, options=replace(case.job.options, sensitivity=name))
    start = time.perf_counter()
    found = facts.sensitivities(job, images, case.menu, case.quantizers)
    runs = "singles" if name in SINGLES else name
    key = digest(["cost", case.name, case.job.key, runs, number, images.calib.digest])
    row = log.rows.get(key) or log.add(
        key, seconds=time.perf_counter() - start,
        passes=found.samples * max(found.layer_runs / len(found.layers), 1.0),
    )  # fmt: skip
    return found, {of: row[of] + before for of, before in shared.items()}


def with_losses(problem: Problem, found: Sensitivity) -> Problem:
    loss = np.where(problem.legal, found.loss, 0.0)
    return replace(problem, loss=loss, pair_loss=found.pair_loss)


def widest(case: Case, problem: Problem) -> Assignment:
    """The largest uniform plan within the budget."""
    best: tuple[float, Assignment] = (0.0, {})
    for name in case.menu.formats:
        plan, _ = uniform(case.menu, case.job.network, name)
        rows = [case.menu.formats.index(plan[layer]) for layer in problem.layers]
        assert problem.nbytes is not None
        size = float(problem.nbytes[np.arange(len(rows)), rows].sum())
        if best[0] < size <= problem.budgets["nbytes"]:
            best = (size, plan)
    return best[1]


def means(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[float, tuple[Any, ...]]]:
    """(net and menu, method) -> bits -> mean accuracy, its standard error over the draws, best."""
    values: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in rows:
        at = values.setdefault((row["net"], row["method"]), {})
        at.setdefault(row["bits"], []).append(row["accuracy"])

    def of(v: list[float]) -> tuple[Any, ...]:
        return np.mean(v), np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else np.nan, max(v)

    return {name: {bits: of(v) for bits, v in at.items()} for name, at in values.items()}


def tables(rows: Sequence[Mapping[str, Any]]) -> list[record.Table]:
    """Per net and menu: a row per method, a column per budget; seconds and passes per draw."""
    made, found = [], means(rows)
    for net in dict.fromkeys(net for net, _ in found):
        bits = sorted({b for (n, _), at in found.items() if n == net for b in at})
        lines = []
        for method in (m for n, m in found if n == net):
            at = found[net, method]
            own = [row for row in rows if (row["net"], row["method"]) == (net, method)]
            cost = [f"{np.mean([row[k] for row in own]):.0f}" for k in ("seconds", "passes")]
            lines.append((method, *(_mean(at[b]) if b in at else "" for b in bits), *cost))
        columns = ("method", *(f"{b:g} bits" for b in bits), "seconds", "passes")
        made.append(record.Table(columns, lines, f"{net}: top-1 at average bits per weight"))
    return made


def _mean(found: Sequence[float]) -> str:
    """A mean accuracy with its standard error, where there is one."""
    mean, error = found[:2]
    return f"{mean:.2f} ± {error:.2f}" if np.isfinite(error) else f"{mean:.2f}"


def picture(rows: Sequence[Mapping[str, Any]], width: int = 560, height: int = 380) -> str:
    """Top-1 over average bits as SVG: a panel per net and menu, a line per method."""
    found = means(rows)
    nets = list(dict.fromkeys(net for net, _ in found))
    named = list(dict.fromkeys(method for _, method in found))
    parts = []
    for panel, net in enumerate(nets):
        lines = {method: at for (n, method), at in found.items() if n == net}
        bits = [b for at in lines.values() for b in at]
        best = [at[b][0] for at in lines.values() for b in at]
        left, wide = panel * width + 50, width - 180
        spans = [max(np.ptp(values), 1e-9) for values in (bits, best)]

        def place(b: float, y: float) -> str:
            x = left + wide * (b - min(bits)) / spans[0]  # noqa: B023
            return f"{x:.1f},{height - 40 - (height - 80) * (y - min(best)) / spans[1]:.1f}"  # noqa: B023

        parts.append(f'<text x="{left}" y="20">{net}: top-1 {min(best):.1f} to {max(best):.1f} %, '
                     f'{min(bits):g} to {max(bits):g} bits per weight</text>')  # fmt: skip
        for method, at in lines.items():
            color = f"hsl({360 * named.index(method) // len(named)},70%,40%)"
            points = " ".join(place(b, at[b][0]) for b in sorted(at))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
            y = 50 + 18 * named.index(method)
            parts.append(f'<text x="{left + wide + 10}" y="{y}" fill="{color}">{method}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(nets)}" height="{height}"'
    return f'{head} font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'


if __name__ == "__main__":
    main()

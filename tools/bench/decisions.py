"""Are the choices right? Random latency budgets, the plans chosen for them, and a pool of rivals.

    python tools/bench/decisions.py --out decisions.json --budgets 30 --pool 100 \\
        --model zoo:digits_cnn digits --model zoo:resnet20_cifar npz:train.npz weights.safetensors

For every model: budgets drawn evenly (in the logarithm) between the fastest plan and fp32, each
answered by the closed loop of `hwmpq quantize`; then every chosen plan is timed once more, beside
fp32, together with a pool: all assignments where they are few, else random ones and exact plans for
disturbed prices. All times are ratios to fp32 in the same interleaved run.

met: the fresh time is within the budget. overshoot: what it takes beyond, as a share of the budget.
regret: the share of its time that the fastest timed plan of no more (estimated) loss would save.
Every answer and every block of times is saved at once; started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq.errors import InfeasibleError
from hwmpq.measure import WorkerProcess
from hwmpq.pipeline import closed_loop, gather
from hwmpq.search import solve
from hwmpq.search.evaluate import evaluate, index_of
from hwmpq.stages.bench import Bench, Clock, limit_seconds
from hwmpq.stages.budget import parse_latency
from hwmpq.stages.choose import within
from hwmpq.stages.ground import Ground, survey
from hwmpq.stages.job import Options, Silent, load_images, open_job
from hwmpq.types import Assignment

#: Plans that are compiled and timed together, beside the baselines.
BLOCK = 8
#: Relative standard deviation of the disturbed prices of rival plans.
DISTURBED = 0.15


@dataclass
class Log:
    """What is known so far, on disk after every change."""

    path: Path
    data: dict[str, Any]

    @staticmethod
    def open(path: Path) -> Log:
        return Log(path, json.loads(path.read_text()) if path.exists() else {})

    def save(self) -> None:
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(self.data, indent=1))
        os.replace(part, self.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", nargs="+", action="append", required=True, metavar="WORD",
        help="MODEL CALIB_DATA [WEIGHTS]; once per model",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", type=int, default=30)
    parser.add_argument("--pool", type=int, default=100)
    parser.add_argument("--formats", default="")
    parser.add_argument("--target", default="native")
    parser.add_argument("--store")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    log = Log.open(words.out)
    for model, data, *weights in words.model:
        options = Options(
            model, weights=weights[0] if weights else None, calib_data=data, target=words.target,
            formats=tuple(filter(None, words.formats.split(","))), seed=words.seed, calib=64,
            search="ilp", store=words.store,
        )  # fmt: skip
        run(options, words.budgets, words.pool, log)
    summary = {model: figures(rows) for model, rows in log.data.items()}
    print(json.dumps({"seed": words.seed, "models": summary}, indent=1))
    for model, found in summary.items():
        print(text(model, found), file=sys.stderr)


def run(options: Options, budgets: int, pool: int, log: Log) -> None:
    """Answer the budgets that are missing, then time the chosen plans and the pool."""
    rows = log.data.setdefault(options.model, {"answers": [], "times": []})
    job = open_job(options, Silent())
    clock = Clock()
    with job.store, tempfile.TemporaryDirectory() as folder, WorkerProcess(threads=1) as worker:
        bench = Bench(job, gather(job, clock, load_images(job)), clock, Path(folder), worker)
        ground = survey(bench)
        began = time.monotonic()
        ratios = drawn(ground, budgets, options.seed)
        for number in range(len(rows["answers"]), budgets):
            rows["answers"].append(answered(bench, ground, float(ratios[number])))
            log.save()
            forecast(options.model, "budgets", number + 1, budgets, began)
        plans = [a["plan"] for a in rows["answers"] if a["plan"]]
        plans += rivals(bench, ground, pool, options.seed)
        waiting = list({key(p): p for p in plans if key(p) not in known(rows)}.values())
        began = time.monotonic()
        for begin in range(0, len(waiting), BLOCK):
            rows["times"] += timed(bench, ground, waiting[begin : begin + BLOCK])
            log.save()
            forecast(options.model, "plans timed", begin + BLOCK, len(waiting), began)


def drawn(ground: Ground, count: int, seed: int) -> np.ndarray:
    """Budgets as shares of fp32's time, from just above the fastest plan's to fp32's."""
    fastest = solve(replace(ground.problem, minimize="latency_s"))
    least = float(fastest.latency_s or 0.0) / ground.first["fp32"].latency_s
    low, high = np.log(min(1.05 * least, 0.99)), 0.0
    return np.exp(np.random.default_rng(seed).uniform(low, high, count))


def answered(bench: Bench, ground: Ground, ratio: float) -> dict[str, Any]:
    """What the closed loop chooses for a budget, and the price of the first answer."""
    bench.limit = parse_latency(f"{ratio:.6f}x")
    first = solve(within(ground.problem, limit_seconds(bench.limit, ground.first)))
    try:
        best, rounds = closed_loop(bench, ground)
    except InfeasibleError:
        return {"budget": ratio, "plan": None, "first": None, "rounds": 0}
    plan = best.attempt.made.assignment
    return {"budget": ratio, "plan": plan, "first": first.choice or None, "rounds": rounds}


def rivals(bench: Bench, ground: Ground, count: int, seed: int) -> list[Assignment]:
    """All assignments where they are at most `count`, else half random, half exact for prices that
    are disturbed and budgets drawn at random."""
    problem, chance = ground.problem, np.random.default_rng(seed)
    assert problem.legal is not None and problem.latency_s is not None
    able = [[f for f, legal in zip(problem.formats, row, strict=True) if legal]
            for row in problem.legal]  # fmt: skip
    if np.prod([len(names) for names in able], dtype=float) <= count:
        return [dict(zip(problem.layers, choice, strict=True)) for choice in product(*able)]
    found = []
    for i in range(count):
        if i % 2:
            found.append(
                {n: str(chance.choice(a)) for n, a in zip(problem.layers, able, strict=True)}
            )
            continue
        factors = np.exp(chance.normal(0, DISTURBED, problem.latency_s.shape))
        other = replace(problem, latency_s=problem.latency_s * factors)
        ratio = drawn(ground, 1, int(chance.integers(1 << 31)))[0]
        solution = solve(within(other, float(ratio) * ground.first["fp32"].latency_s))
        if solution.choice:
            found.append(solution.choice)
    return found


def timed(bench: Bench, ground: Ground, plans: Sequence[Assignment]) -> list[dict[str, Any]]:
    """Time plans in one run with the baselines."""
    numbers = bench.facts.quantizers
    bench.limit = None
    attempts = bench.attempt([(plan, numbers) for plan in plans], ground.latency)
    rows = []
    for attempt in attempts:
        fp32, plan = attempt.timed["fp32"].latency_s, attempt.made.assignment
        values = evaluate(ground.problem, index_of(ground.problem, plan))
        rows.append({
            "plan": plan, "ratio": attempt.own.latency_s / fp32, "loss": float(values.of("loss")),
            "predicted": attempt.predicted_s / fp32, "noisy": attempt.own.quality.get("noisy"),
        })  # fmt: skip
    return rows


def key(plan: Mapping[str, str]) -> str:
    return json.dumps(plan, sort_keys=True)


def known(rows: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Plan -> its fresh time."""
    return {key(row["plan"]): row for row in rows["times"]}


def figures(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Shares and means over the budgets, with 95 % intervals."""
    times = known(rows)
    answers = [a for a in rows["answers"] if a["plan"] and key(a["plan"]) in times]
    if not answers:
        return {"budgets": 0}
    over, regrets = [], []
    for answer in answers:
        own = times[key(answer["plan"])]
        over.append(max(own["ratio"] / answer["budget"] - 1, 0.0))
        least = min(row["ratio"] for row in times.values() if row["loss"] <= own["loss"] + 1e-12)
        regrets.append(1 - least / own["ratio"])
    errors = np.abs([row["predicted"] / row["ratio"] - 1 for row in times.values()])
    met = [value == 0 for value in over]
    return {
        "budgets": len(answers), "infeasible": len(rows["answers"]) - len(answers),
        "met": float(np.mean(met)), "met_interval": wilson(sum(met), len(met)),
        "overshoot_mean": float(np.mean(over)), "overshoot_interval": bootstrap(over),
        "overshoot_max": max(over), "regret_mean": float(np.mean(regrets)),
        "regret_interval": bootstrap(regrets), "regret_max": max(regrets),
        "rounds": float(np.mean([a["rounds"] for a in answers])),
        "first_answer_kept": float(np.mean([a["plan"] == a["first"] for a in answers])),
        "plans_timed": len(times), "price_error_median": float(np.median(errors)),
        "price_within_10_percent": float(np.mean(errors <= 0.1)),
    }  # fmt: skip


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson, JASA 22, 1927)."""
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * np.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return float(max(middle - half, 0.0)), float(min(middle + half, 1.0))


def bootstrap(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of a mean by resampling."""
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(axis=1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def forecast(model: str, what: str, done: int, count: int, began: float) -> None:
    left = (time.monotonic() - began) / done * max(count - done, 0)
    print(f"{model}: {min(done, count)} of {count} {what}, about {left / 60:.0f} min left",
          file=sys.stderr, flush=True)  # fmt: skip


def text(model: str, found: Mapping[str, Any]) -> str:
    """A line of the table."""
    if not found["budgets"]:
        return f"{model}: no answers"
    percent = {
        name: f"{100 * found[name]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        for name, (low, high) in (
            ("met", found["met_interval"]),
            ("overshoot_mean", found["overshoot_interval"]),
            ("regret_mean", found["regret_interval"]),
        )
    }
    return (
        f"{model}: {found['budgets']} budgets, met {percent['met']}, overshoot "
        f"{percent['overshoot_mean']} (max {100 * found['overshoot_max']:.1f} %), regret "
        f"{percent['regret_mean']} (max {100 * found['regret_max']:.1f} %), "
        f"{found['rounds']:.1f} rounds, {found['plans_timed']} plans timed"
    )


if __name__ == "__main__":
    main()

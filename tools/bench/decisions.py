"""Are the choices right? Random latency budgets, the plans chosen for them, and a pool of rivals.

    python tools/bench/decisions.py --out decisions.json --store decisions.sqlite \\
        --model zoo:digits_cnn digits --model zoo:resnet20_cifar npz:train.npz weights.safetensors

For every model: budgets drawn evenly (in the logarithm) between the fastest plan and fp32, each
answered by the closed loop of `hwmpq quantize`; then all plans that were compiled meanwhile, and a
pool of random ones and of exact ones for disturbed prices, are timed once more. All times are
ratios to fp32 in the same interleaved run; a run that was disturbed is repeated.

met: the fresh time is within the budget. overshoot: what it takes beyond, as a share of the budget.
regret: the share of its time that a plan of no more (estimated) loss would save: the fastest one by
the times so far, compared with the chosen one in a further run of both, for the fastest of many is
the luckiest too.
Every answer and every block of times is saved at once; started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch

from hwmpq.errors import InfeasibleError
from hwmpq.measure import WorkerProcess
from hwmpq.measure.store import Store
from hwmpq.methods.study import Study
from hwmpq.methods.trials import candidates
from hwmpq.pipeline import closed_loop, gather
from hwmpq.quantizers import Quantizers
from hwmpq.search import solve
from hwmpq.search.evaluate import evaluate, index_of
from hwmpq.stages.bench import Bench, Clock, limit_seconds
from hwmpq.stages.budget import parse_latency
from hwmpq.stages.build import Made, model_bytes
from hwmpq.stages.choose import within
from hwmpq.stages.ground import Ground, survey
from hwmpq.stages.job import Images, Job, Options, Silent, load_images, open_job
from hwmpq.types import Assignment

#: Plans that are timed together, beside the baselines.
BLOCK = 8
#: Relative standard deviation of the disturbed prices of rival plans.
DISTURBED = 0.15
#: Times that a disturbed run is repeated.
REPEATS = 3
#: Held-out images: losses are compared, not believed.
HELD_OUT = 32


class Shelf(Bench):
    """A bench that compiles every plan once, several at a time where they are known beforehand."""

    def __init__(self, *words: Any):
        super().__init__(*words)
        self.samples = {name: images[:1] for name, images in self.samples.items()}
        self.made: dict[str, Made] = {}

    def compile(self, assignment: Assignment, name: str, quantizers: Quantizers) -> Made:
        if key(assignment) not in self.made:
            self.made[key(assignment)] = super().compile(assignment, name, quantizers)
        return self.made[key(assignment)]

    def prepare(self, plans: Iterable[Assignment]) -> None:
        """Compile plans on all cores, in copies of this process: TVM's builders know no threads."""
        missing = {key(plan): plan for plan in plans if key(plan) not in self.made}
        names = [f"shelf{place}" for place in range(len(self.made), len(self.made) + len(missing))]
        todo = list(zip(missing.values(), names, strict=True))
        cores = os.cpu_count() or 1
        children = [self._copy(todo[core::cores]) for core in range(min(cores, len(todo)))]
        for child in children:
            if os.waitpid(child, 0)[1]:
                raise RuntimeError("a plan could not be compiled")
        for plan, name in todo:
            made = Made(self.folder / name, plan, model_bytes(self.job, plan))
            self.made[key(plan)] = made

    def _copy(self, todo: Sequence[tuple[Assignment, str]]) -> int:
        """The id of a copy of this process that compiles plans and ends."""
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            torch.set_num_threads(1)  # the pool of the others was not copied
            self.job = replace(self.job, store=Store.open(self.job.options.store))
            for plan, name in todo:
                self.compile(plan, name, self.facts.quantizers)
            status = 0
        except Exception:  # reported here: nothing else of the copy comes back
            traceback.print_exc()
        os._exit(status)


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
    parser.add_argument("--pool", type=int, default=24, help="rivals beside what was compiled")
    parser.add_argument("--formats", default="")
    parser.add_argument("--target", default="native")
    parser.add_argument("--store")
    parser.add_argument("--seed", type=int, default=0)
    record.option(parser)
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
    found = table(summary)
    record.show(found, file=sys.stderr)
    record.write(words.json, found)


def run(options: Options, budgets: int, pool: int, log: Log) -> None:
    """Answer the budgets that are missing, then time the chosen plans and the pool."""
    rows = log.data.setdefault(options.model, {"answers": [], "times": [], "again": []})
    job = open_job(options, Silent())
    clock = Clock()
    with job.store, tempfile.TemporaryDirectory() as folder, WorkerProcess(threads=1) as worker:
        bench = Shelf(job, gather(job, clock, some_images(job)), clock, Path(folder), worker)
        ground = survey(bench)
        progress = Progress(options.model)
        if "least" not in rows:
            fastest = solve(replace(ground.problem, minimize="latency_s")).choice
            rows["least"] = timed(bench, ground, [fastest])[0]["ratio"]
        ratios = drawn(rows["least"], budgets, options.seed)[len(rows["answers"]) :]
        progress.of("first plans", bench.prepare, first_plans(bench, ground, ratios))
        for number, ratio in enumerate(ratios, 1):
            rows["answers"].append(answered(bench, ground, ratio))
            log.save()
            progress.note("budgets", number, len(ratios))
        others = rivals(ground, rows["least"], pool, options.seed)
        progress.of("pool", bench.prepare, others)
        chosen = [a["plan"] for a in rows["answers"] if a["plan"]]
        plans = chosen + others + [made.assignment for made in bench.made.values()]
        progress.start()
        for part, done, count in blocks(plans, rows["times"]):
            rows["times"] += timed(bench, ground, part)
            log.save()
            progress.note("plans", done, count)
        rivaled = [plan for a in rows["answers"] if a["plan"] for plan in pair(rows, a["plan"])]
        progress.start()
        for part, done, count in blocks(rivaled, rows["again"]):
            rows["again"] += timed(bench, ground, part)
            log.save()
            progress.note("plans once more", done, count)


def some_images(job: Job) -> Images:
    images = load_images(job)
    count = min(HELD_OUT, len(images.holdout))
    return replace(images, holdout=images.holdout.subset(np.arange(count)))


def blocks(
    plans: Sequence[Assignment], rows: Sequence[Mapping[str, Any]]
) -> Iterable[tuple[list[Assignment], int, int]]:
    """The plans that are in no row, by BLOCK: (plans, how many with these, how many in all)."""
    have = known(rows)
    waiting = list({key(p): p for p in plans if key(p) not in have}.values())
    for begin in range(0, len(waiting), BLOCK):
        part = waiting[begin : begin + BLOCK]
        yield part, begin + len(part), len(waiting)


def first_plans(bench: Bench, ground: Ground, ratios: Sequence[float]) -> list[Assignment]:
    """What the closed loop compiles in its first round for these budgets."""
    study, found = Study(bench.job, bench.facts), []
    for ratio in ratios:
        bench.limit = parse_latency(f"{ratio:.6f}x")
        problem = within(ground.problem, limit_seconds(bench.limit, ground.first))
        try:
            found += [plan.solution.choice for plan in candidates(study, problem, ())]
        except InfeasibleError:
            continue  # `answered` will count it
    return found


def drawn(least: float, count: int, seed: int) -> list[float]:
    """Budgets as shares of fp32's time, from just above the fastest plan's to fp32's."""
    low = np.log(min(1.05 * least, 0.99))
    return [float(v) for v in np.exp(np.random.default_rng(seed).uniform(low, 0.0, count))]


def answered(bench: Bench, ground: Ground, ratio: float) -> dict[str, Any]:
    """What the closed loop chooses for a budget, and the price of the first answer."""
    bench.limit = parse_latency(f"{ratio:.6f}x")
    first = solve(within(ground.problem, limit_seconds(bench.limit, ground.first)))
    try:
        best, rounds = closed_loop(bench, ground)
    except InfeasibleError:
        return {"budget": ratio, "plan": None, "first": None, "rounds": 0, "met": False}
    plan, met = best.attempt.made.assignment, best.attempt.within_limit
    return {
        "budget": ratio, "plan": plan, "first": first.choice or None, "rounds": rounds, "met": met,
    }  # fmt: skip


def rivals(ground: Ground, least: float, count: int, seed: int) -> list[Assignment]:
    """Half random, half exact for prices that are disturbed and budgets drawn at random."""
    problem, chance = ground.problem, np.random.default_rng(seed)
    assert problem.legal is not None and problem.latency_s is not None
    able = [[f for f, legal in zip(problem.formats, row, strict=True) if legal]
            for row in problem.legal]  # fmt: skip
    found = []
    for i, ratio in enumerate(drawn(least, count, seed + 1)):
        if i % 2:
            found.append(
                {n: str(chance.choice(a)) for n, a in zip(problem.layers, able, strict=True)}
            )
            continue
        factors = np.exp(chance.normal(0, DISTURBED, problem.latency_s.shape))
        other = replace(problem, latency_s=problem.latency_s * factors)
        solution = solve(within(other, ratio * ground.first["fp32"].latency_s))
        if solution.choice:
            found.append(solution.choice)
    return found


def timed(bench: Bench, ground: Ground, plans: Sequence[Assignment]) -> list[dict[str, Any]]:
    """Time plans in one run with the baselines; again, a few times, where it was disturbed."""
    numbers = bench.facts.quantizers
    bench.limit = None
    attempts = bench.attempt([(plan, numbers) for plan in plans], ground.latency)
    for _ in range(REPEATS):
        if not any(attempt.own.quality["noisy"] for attempt in attempts):
            break
        attempts = bench.again(attempts)
    rows = []
    for attempt in attempts:
        fp32, plan = attempt.timed["fp32"].latency_s, attempt.made.assignment
        values = evaluate(ground.problem, index_of(ground.problem, plan))
        rows.append({
            "plan": plan, "ratio": attempt.own.latency_s / fp32, "loss": float(values.of("loss")),
            "predicted": attempt.predicted_s / fp32, "noisy": attempt.own.quality["noisy"],
        })  # fmt: skip
    return rows


def key(plan: Mapping[str, str]) -> str:
    return json.dumps(plan, sort_keys=True)


def known(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Plan -> its row."""
    return {key(row["plan"]): row for row in rows}


def pair(rows: Mapping[str, Any], plan: Assignment) -> tuple[Assignment, Assignment]:
    """A chosen plan and the fastest of no more loss by the first times: itself, if none is."""
    times = known(rows["times"])
    most = times[key(plan)]["loss"] + 1e-12
    best = min((row for row in rows["times"] if row["loss"] <= most), key=lambda row: row["ratio"])
    return plan, best["plan"]


def figures(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Shares and means over the budgets, with 95 % intervals."""
    times, again = known(rows["times"]), known(rows["again"])
    answers = [a for a in rows["answers"] if a["plan"]]
    quiet = [
        a for a in answers
        if not times[key(a["plan"])]["noisy"]
        and not any(again[key(plan)]["noisy"] for plan in pair(rows, a["plan"]))
    ]  # fmt: skip
    if not quiet:
        return {"budgets": 0, "noisy": len(answers)}
    over, regrets = [], []
    for answer in quiet:
        over.append(max(times[key(answer["plan"])]["ratio"] / answer["budget"] - 1, 0.0))
        own, rival = (again[key(plan)]["ratio"] for plan in pair(rows, answer["plan"]))
        regrets.append(max(1 - rival / own, 0.0))
    errors = np.abs([row["predicted"] / row["ratio"] - 1 for row in times.values()])
    met = [value == 0 for value in over]
    return {
        "budgets": len(quiet), "infeasible": len(rows["answers"]) - len(answers),
        "noisy": len(answers) - len(quiet), "promised": float(np.mean([a["met"] for a in quiet])),
        "met": float(np.mean(met)), "met_interval": wilson(sum(met), len(met)),
        "overshoot_mean": float(np.mean(over)), "overshoot_interval": bootstrap(over),
        "overshoot_max": max(over), "regret_mean": float(np.mean(regrets)),
        "regret_interval": bootstrap(regrets), "regret_max": max(regrets),
        "rounds": float(np.mean([a["rounds"] for a in quiet])),
        "first_answer_kept": float(np.mean([a["plan"] == a["first"] for a in quiet])),
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


class Progress:
    """What is done of a model, and how long the rest of a stage will take."""

    def __init__(self, model: str):
        self.model = model
        self.start()

    def start(self) -> None:
        self.began = time.monotonic()

    def of(
        self, what: str, work: Callable[[list[Assignment]], None], plans: list[Assignment]
    ) -> None:
        """Do something with plans as a stage of its own."""
        self.start()
        work(plans)
        self.note(what, len(plans), len(plans))
        self.start()

    def note(self, what: str, done: int, count: int) -> None:
        spent = time.monotonic() - self.began
        left = spent / max(done, 1) * (count - done)
        print(f"{self.model}: {done} of {count} {what} in {spent:.0f} s, about {left:.0f} s left",
              file=sys.stderr, flush=True)  # fmt: skip


def table(summary: Mapping[str, Mapping[str, Any]]) -> record.Table:
    """A column per model; figures with their intervals."""
    columns = {name: _column(found) for name, found in summary.items() if found["budgets"]}
    names = list(next(iter(columns.values()), ()))
    rows = [(name, *(column[name] for column in columns.values())) for name in names]
    return record.Table(("quantity", *columns), rows)


def _column(found: Mapping[str, Any]) -> dict[str, str]:
    def of(name: str, interval: str) -> str:
        low, high = found[interval]
        return f"{found[name]:.1%} [{low:.1%}, {high:.1%}]"

    return {
        "budgets": str(found["budgets"]),
        "met": of("met", "met_interval"),
        "overshoot": of("overshoot_mean", "overshoot_interval"),
        "worst overshoot": f"{found['overshoot_max']:.1%}",
        "regret": of("regret_mean", "regret_interval"),
        "worst regret": f"{found['regret_max']:.1%}",
        "rounds": f"{found['rounds']:.1f}",
        "plans timed": str(found["plans_timed"]),
        "prices within 10 %": f"{found['price_within_10_percent']:.0%}",
    }


if __name__ == "__main__":
    main()

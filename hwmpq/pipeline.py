"""The whole story, top to bottom: from a trained model to a measured mixed-precision artifact.

open_job          the model becomes one canonical graph
make_menu         which formats each layer may take on the target
calibrate         scales, zero points, rounded weights
profile           seconds of every cell, measured, into the store
sensitivities     how much the loss grows per layer and format
make_problem      arrays; solve: the plan that is proven best
make_artifact     compiled; timed beside the fp32 and uniform artifacts; its accuracy measured
and, where measured and predicted disagree, corrected and solved again
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwmpq.errors import InfeasibleError
from hwmpq.quantizers import Quantizers
from hwmpq.stages import budget as budgets
from hwmpq.stages.build import Made, make_artifact
from hwmpq.stages.choose import (
    Point,
    fastest_within_drop,
    frontier_rows,
    least_loss,
    make_problem,
    walk_frontier,
    within,
)
from hwmpq.stages.facts import calibrate, monotone_violations, sensitivities
from hwmpq.stages.job import Images, Job, Options, Progress, Silent, load_images, open_job
from hwmpq.stages.latency import LatencyFacts, fit_overhead, price, profile, table
from hwmpq.stages.menu import Menu, make_menu, uniform
from hwmpq.stages.result import EXIT_CODES, LayerRow, Result, layer_rows, result_json
from hwmpq.stages.timing import Timed, time_artifacts, torch_eager_s
from hwmpq.stages.verify import (
    Accuracy,
    deployed_outputs,
    float_logits,
    measure_accuracy,
    score,
    simulated_drop,
)
from hwmpq.types import Assignment, Problem, Sensitivity

__all__ = ["EXIT_CODES", "LayerRow", "Options", "Progress", "Result", "quantize_model"]

MAX_ROUNDS = 5
#: Uniform artifacts that every plan is compared with, where the target runs them.
BASELINES = ("fp32", "w8a8", "bf16")
#: Predicted and measured may differ by this share before the plan is corrected and solved again.
TOLERANCE = 0.10


@dataclass
class Clock:
    """Seconds spent in each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


@dataclass(frozen=True, eq=False)
class Facts:
    """All that is known before anything is chosen."""

    images: Images
    menu: Menu
    quantizers: Quantizers
    loss: Sensitivity
    latency: LatencyFacts


def gather(job: Job, clock: Clock, images: Images | None = None) -> Facts:
    """Menu, calibration, cell times and sensitivities; what the store has is not made again."""
    images = images or load_images(job)
    o = job.options
    menu = make_menu(job.network, job.target, o.formats, o.pins, o.ties)
    with clock.time("sensitivity"):
        quantizers = calibrate(job, images, menu)
    with clock.time("profile"):
        latency = profile(job, menu)
    with clock.time("sensitivity"):
        loss = sensitivities(job, images, menu, quantizers)
    strange = monotone_violations(loss)
    if strange.cells:
        job.progress.note(f"loss not monotone in bits: {', '.join(strange.cells[:5])}")
    return Facts(images, menu, quantizers, loss, latency)


@dataclass(frozen=True, eq=False)
class Attempt:
    """A compiled plan and how it did."""

    made: Made
    predicted_s: float
    timed: dict[str, Timed]
    limit_s: float | None

    @property
    def own(self) -> Timed:
        return self.timed["plan"]

    @property
    def within_limit(self) -> bool:
        return self.limit_s is None or self.own.interval[1] <= self.limit_s

    @property
    def ambiguous(self) -> bool:
        low, high = self.own.interval
        return self.limit_s is not None and low <= self.limit_s < high


class Bench:
    """Compiles plans beside the uniform artifacts and times them together."""

    def __init__(self, job: Job, facts: Facts, clock: Clock, folder: Path):
        self.job, self.facts, self.clock, self.folder = job, facts, clock, folder
        count = min(4, len(facts.images.calib))
        self.samples = facts.images.calib.batch(range(count))
        self.baselines: dict[str, Made] = {}
        self.tried: dict[str, Attempt] = {}
        self.statistic = "median"

    def compile(self, assignment: Assignment, name: str) -> Made:
        with self.clock.time("compile"), self.job.progress.stage(f"compile {name}", None):
            return make_artifact(
                self.job, assignment, self.facts.quantizers, self.folder / name, self.samples
            )

    def add_baselines(self) -> None:
        """Build fp32 and the uniform artifacts that the target can run."""
        for name in BASELINES:
            if name in self.facts.menu.formats or name == "fp32":
                assignment, _ = uniform(self.facts.menu, self.job.network, name)
                self.baselines[name] = self.compile(assignment, name)

    def time(self, plan: Made | None = None) -> dict[str, Timed]:
        folders = {name: made.path for name, made in self.baselines.items()}
        if plan is not None:
            folders["plan"] = plan.path
        with self.clock.time("verify"), self.job.progress.stage("time the artifacts", None):
            return time_artifacts(self.job, folders, self.statistic)

    def attempt(
        self, assignment: Assignment, latency: LatencyFacts, limit: budgets.Latency | None
    ) -> Attempt:
        """Compile a plan and time it in one run with the baselines."""
        made = self.compile(assignment, f"plan{len(self.tried)}")
        timed = self.time(made)
        done = Attempt(
            made, price(self.job, assignment, latency), timed, limit_seconds(limit, timed)
        )
        self.tried[made.path.name] = done
        return done


def limit_seconds(limit: budgets.Latency | None, timed: dict[str, Timed]) -> float | None:
    """The budget in seconds, relative ones from the artifacts timed in the same run."""
    from hwmpq.errors import InputError

    if limit is None or limit.fastest:
        return None
    if limit.seconds is not None:
        return limit.seconds
    if limit.of not in timed:
        raise InputError(
            f"budget relative to {limit.of!r}", None, [n for n in timed if n != "plan"]
        )
    assert limit.ratio is not None
    return limit.ratio * timed[limit.of].latency_s


def quantize_model(
    options: Options, progress: Progress | None = None, images: Images | None = None,
    job: Job | None = None,
) -> Result:  # fmt: skip
    """The main job. Raises HwmpqError for bad input, an impossible budget or a lost device."""
    progress = progress or Silent()
    clock = Clock()
    limit = budgets.parse_latency(options.latency)
    budgets.parse_size(options.max_size, 0)
    with clock.time("trace"):
        job = job or open_job(options, progress)
    full = sum(la.parameters + la.bias for la in job.network.layers) * 4
    size = budgets.parse_size(options.max_size, full)
    facts = gather(job, clock, images)
    if options.dry_run:
        return _forecast(job, facts, clock)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hwmpq-", dir=out.parent) as folder:
        bench = Bench(job, facts, clock, Path(folder))
        bench.statistic = limit.statistic if limit else "median"
        bench.add_baselines()
        first = bench.time()
        measured = [(m.assignment, first[n].latency_s) for n, m in bench.baselines.items()]
        latency = fit_overhead(job, facts.latency, measured)
        with clock.time("search"):
            problem = make_problem(
                job, facts.menu, facts.loss, table(job, facts.menu, latency), size
            )
            points = walk_frontier(job, problem)
        job.progress.note(f"frontier of {len(points)} plans")
        by_drop = limit is None or limit.fastest
        if by_drop and not (size is not None and limit is None and options.max_drop is None):
            plan = _fastest(job, facts, clock, bench, latency, points)
        else:
            plan = _least_loss(job, facts, clock, bench, latency, problem, limit, first)
        return _finish(job, facts, clock, bench, latency, problem, points, plan, out)


@dataclass(frozen=True, eq=False)
class Plan:
    """The accepted (or best) attempt, its accuracy, rounds taken and what the solver proved."""

    attempt: Attempt
    accuracy: Accuracy
    rounds: int
    objective: float | None
    bound: float | None
    gap: float | None


def _reference(job: Job, facts: Facts) -> Any:
    return float_logits(job, facts.images.test, "the test images")


def _least_loss(
    job: Job, facts: Facts, clock: Clock, bench: Bench, latency: LatencyFacts, problem: Problem,
    limit: budgets.Latency | None, first: dict[str, Timed],
) -> Plan:  # fmt: skip
    """Least loss within the budgets; the measured time decides, and corrects the prediction."""
    seconds = limit_seconds(limit, first)
    allowed = seconds
    best: tuple[Attempt, Any] | None = None
    rounds = 0
    while rounds < MAX_ROUNDS:
        with clock.time("search"):
            try:
                solution = least_loss(job, within(problem, allowed))
            except InfeasibleError:
                if best is None:
                    raise
                break
        rounds += 1
        attempt = bench.attempt(solution.choice, latency, limit)
        if best is None or _better(attempt, best[0]):
            best = (attempt, solution)
        if attempt.within_limit:
            break
        assert allowed is not None and attempt.limit_s is not None
        # What the plan took beyond its price is taken off the next plan's allowance.
        excess = attempt.own.interval[1] / attempt.limit_s
        reached = float(solution.latency_s or allowed)
        allowed = min(allowed, reached) / excess * 0.995
        job.progress.note(
            f"round {rounds}: measured {attempt.own.latency_s * 1e3:.3g} ms against a limit of "
            f"{attempt.limit_s * 1e3:.3g} ms; solving again"
        )
    assert best is not None
    attempt, solution = best
    with clock.time("verify"):
        accuracy = measure_accuracy(
            job, attempt.made.path, attempt.made.assignment, facts.quantizers, facts.images.test,
            _reference(job, facts),
        )  # fmt: skip
    return Plan(attempt, accuracy, rounds, solution.objective, solution.bound, solution.gap)


def _better(new: Attempt, old: Attempt) -> bool:
    """Within the limit beats outside; outside, the faster one."""
    if new.within_limit != old.within_limit:
        return new.within_limit
    return new.own.latency_s < old.own.latency_s


def _fastest(
    job: Job, facts: Facts, clock: Clock, bench: Bench, latency: LatencyFacts,
    points: list[Point],
) -> Plan:  # fmt: skip
    """The fastest plan within the drop: judged by simulation, then on the artifact itself."""
    max_drop = 1.0 if job.options.max_drop is None else job.options.max_drop
    holdout = facts.images.holdout
    with clock.time("search"):
        reference = float_logits(job, holdout, "held-out images")

        def drop(assignment: Assignment) -> float:
            return simulated_drop(job, assignment, facts.quantizers, holdout, reference)

        index = fastest_within_drop(points, drop, max_drop)
    with clock.time("verify"):
        test = _reference(job, facts)
    rounds = 0
    while True:
        rounds += 1
        point = points[index]
        attempt = bench.attempt(point.assignment, latency, None)
        with clock.time("verify"):
            accuracy = measure_accuracy(
                job, attempt.made.path, attempt.made.assignment, facts.quantizers,
                facts.images.test, test,
            )  # fmt: skip
        enough = accuracy.drop <= max_drop
        if enough or rounds >= MAX_ROUNDS or index + 1 >= len(points):
            return Plan(attempt, accuracy, rounds, point.loss, point.loss, 0.0)
        job.progress.note(
            f"round {rounds}: drop {accuracy.drop:.2f} points is above {max_drop:g}; "
            "taking the next slower plan"
        )
        index += 1


def _finish(
    job: Job, facts: Facts, clock: Clock, bench: Bench, latency: LatencyFacts, problem: Problem,
    points: list[Point], plan: Plan, out: Path,
) -> Result:  # fmt: skip
    """Baselines' accuracy, the verdict, the artifact in its place."""
    attempt = plan.attempt
    reference = _reference(job, facts)
    baselines = {}
    with clock.time("verify"):
        eager = torch_eager_s(job)
        for name, made in bench.baselines.items():
            outputs = deployed_outputs(job, made.path, facts.images.test, f"uniform {name}")
            baselines[name] = {
                "latency_s": attempt.timed[name].latency_s,
                "accuracy": score(job, outputs, reference, facts.images.test),
                "nbytes": made.weight_bytes,
                "others": uniform(facts.menu, job.network, name)[1],
            }
    if eager is not None:
        baselines["fp32"]["vs_torch_eager"] = eager / attempt.timed["fp32"].latency_s
    status = _status(job, attempt, plan.accuracy)
    rows = layer_rows(job, facts.menu, latency, problem, attempt.made.assignment)
    json = result_json(
        job, status=status, ambiguous=attempt.ambiguous, assignment=attempt.made.assignment,
        rows=rows, predicted_s=attempt.predicted_s, tolerance=TOLERANCE, own=attempt.own,
        limit_s=attempt.limit_s, statistic=bench.statistic, baselines=baselines,
        accuracy=plan.accuracy, objective=plan.objective, bound=plan.bound, gap=plan.gap,
        rounds=plan.rounds, seconds=clock.seconds, out=out, made=attempt.made,
        split=facts.images.split, new_timings=facts.latency.new_timings,
        failures=facts.latency.failures, estimator=facts.loss.estimator,
    )  # fmt: skip
    result = Result(json, rows, frontier_rows(points), EXIT_CODES[status], problem)
    result.write(out, attempt.made.path)
    return result


def _status(job: Job, attempt: Attempt, accuracy: Accuracy) -> str:
    if not attempt.within_limit:
        return "missed"
    max_drop = job.options.max_drop
    if max_drop is None and job.options.latency in (None, "fastest") and not job.options.max_size:
        max_drop = 1.0
    if max_drop is not None and accuracy.drop > max_drop:
        return "accuracy"
    if attempt.own.interval[0] > attempt.timed["fp32"].interval[1]:
        return "slower"
    return "met"


def _forecast(job: Job, facts: Facts, clock: Clock) -> Result:
    """What a run would do, without compiling networks."""
    rows = [
        LayerRow(
            la.name, la.workload.op, "", "", "", "", 0.0, None, {}, facts.menu.reasons[la.name]
        )
        for la in job.network.layers
    ]
    json = {
        "version": 1, "status": "met", "dry_run": True, "model": job.options.model,
        "target": job.target.name, "device": job.device.name, "formats": list(facts.menu.formats),
        "layers": len(job.network.layers), "new_timings": facts.latency.new_timings,
        "seconds": clock.seconds,
    }  # fmt: skip
    return Result(json, rows, [], 0, None)

"""The whole story, top to bottom: from a trained model to a measured mixed-precision artifact.

open_job          the model becomes one canonical graph
make_menu         which formats each layer may take on the target
calibrate         scales, zero points, rounded weights
profile           seconds of every cell, measured, into the store; fill_in: or predicted
sensitivities     how much the loss grows per layer and format
make_problem      arrays; choose: the method's plan, with what the solver proved
Bench             compiled; timed beside the fp32 and uniform artifacts; its accuracy measured
and, where measured and predicted disagree, corrected and solved again
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwmpq import methods
from hwmpq.errors import InfeasibleError, InputError
from hwmpq.measure import WorkerProcess
from hwmpq.methods.study import Chosen, Study
from hwmpq.stages import budget as budgets
from hwmpq.stages import imported
from hwmpq.stages.bench import Attempt, Bench, Clock, baseline_names, limit_seconds
from hwmpq.stages.choose import (
    Point,
    fastest_within_drop,
    frontier_rows,
    make_problem,
    walk_frontier,
    within,
)
from hwmpq.stages.facts import Facts, calibrate, monotone_violations, sensitivities
from hwmpq.stages.job import Images, Job, Options, Progress, Silent, load_images, open_job
from hwmpq.stages.latency import LatencyFacts, profile, timer
from hwmpq.stages.menu import make_menu
from hwmpq.stages.place import check_place, workshop
from hwmpq.stages.predicted import fill_in
from hwmpq.stages.pricing import fit_overhead, overhead_key, table
from hwmpq.stages.result import (
    EXIT_CODES,
    LayerRow,
    Result,
    forecast,
    layer_rows,
    predicted_interval,
    result_json,
    status_of,
)
from hwmpq.stages.timing import Timed
from hwmpq.stages.verify import Accuracy, float_logits, simulated_drop
from hwmpq.types import Assignment, Problem

__all__ = ["EXIT_CODES", "LayerRow", "Options", "Progress", "Result", "quantize_model"]

MAX_ROUNDS = 5


def quantize_model(
    options: Options, progress: Progress | None = None,
    images: Callable[[Job], Images] = load_images, model: Any = None,
) -> Result:  # fmt: skip
    """The main job. Raises HwmpqError for bad input, an impossible budget or a lost device.

    images, model: where they do not come from the options (`hwmpq.quantize`); model: a LoadedModel.
    """
    options = methods.settle(options)
    limit = budgets.parse_latency(options.latency)
    budgets.parse_size(options.max_size, 0)
    if not options.dry_run:
        check_place(Path(options.out))
    clock = Clock()
    with clock.time("trace"):
        job = open_job(options, progress or Silent(), model)
    with job.store:
        facts = gather(job, clock, images(job))
        if options.dry_run:
            return forecast(job, facts.menu, facts.latency, clock.seconds)
        with (
            workshop(Path(options.out)) as folder,
            timer(job, WorkerProcess) as worker,
        ):
            return _build(Bench(job, facts, clock, folder, worker, limit))


def gather(job: Job, clock: Clock, images: Images) -> Facts:
    """Menu, calibration, cell times and sensitivities; what the store has is not made again."""
    o = job.options
    menu = make_menu(job.network, job.target, o.formats, o.pins, o.ties)
    limit = budgets.parse_latency(o.latency)
    if limit and limit.of not in baseline_names(menu):
        raise InputError(f"budget relative to {limit.of!r}", None, baseline_names(menu))
    with clock.time("sensitivity"):
        quantizers = calibrate(job, images, menu)
    with clock.time("profile"):
        latency = profile(job, menu)
    with clock.time("predict"):
        latency = fill_in(job, menu, imported.fill_in(job, latency))
    with clock.time("sensitivity"):
        loss = sensitivities(job, images, menu, quantizers)
    strange = monotone_violations(loss)
    if strange:
        job.progress.note(f"loss not monotone in bits: {', '.join(strange[:5])}")
    return Facts(images, menu, quantizers, loss, latency)


@dataclass(frozen=True, eq=False)
class Ground:
    """What every choice rests on. first: the baselines' times; latency: with the overhead."""

    first: dict[str, Timed]
    latency: LatencyFacts
    problem: Problem


def survey(bench: Bench) -> Ground:
    """Time the baselines unless the store knows, fit the overhead, put the problem together.

    The overhead is kept in the store, for `hwmpq search`, where it rests on measured cells alone.
    """
    job, facts = bench.job, bench.facts
    size = budgets.parse_size(job.options.max_size, fp32_bytes(job))
    first = bench.first_times()
    measured = [(plan, first[name].latency_s) for name, plan in bench.uniforms().items()]
    latency = fit_overhead(job, facts.latency, measured)
    if all(cell.source == "measured" for cell in facts.latency.layers.values()):
        job.store.put_fact("overhead", overhead_key(job), [latency.overhead_s, latency.speed])
    with bench.clock.time("search"):
        problem = make_problem(job, facts.menu, facts.loss, table(job, facts.menu, latency), size)
    return Ground(first, latency, problem)


def fp32_bytes(job: Job) -> int:
    """Bytes of the layers' parameters in fp32: what relative sizes are relative to."""
    return 4 * sum(layer.parameters + layer.bias for layer in job.network.layers)


@dataclass(frozen=True, eq=False)
class Plan:
    """The accepted (or best) attempt, how it was chosen, its accuracy and the rounds taken."""

    attempt: Attempt
    chosen: Chosen
    accuracy: Accuracy
    rounds: int


def _build(bench: Bench) -> Result:
    """Choose, compile, measure, and put the result in its place."""
    job = bench.job
    ground = survey(bench)
    with bench.clock.time("search"):
        points = walk_frontier(job, ground.problem)
    job.progress.note(f"frontier of {len(points)} plans")
    max_drop = drop_limit(job.options, bench.limit)
    if max_drop is not None and (bench.limit is None or bench.limit.fastest):
        plan = _fastest(bench, ground, points, max_drop)
    else:
        plan = _least_loss(bench, ground)
    return _finish(bench, ground, points, plan, max_drop)


def drop_limit(options: Options, limit: budgets.Latency | None) -> float | None:
    """--max-drop; 1 point where no budget says what to choose by, and None where one does."""
    if options.max_drop is not None:
        return options.max_drop
    chosen_by_drop = options.max_size is None if limit is None else limit.fastest
    return 1.0 if chosen_by_drop else None


def _least_loss(bench: Bench, ground: Ground) -> Plan:
    """Least loss within the budgets; the measured time decides, and corrects the prediction."""
    job = bench.job
    allowed = limit_seconds(bench.limit, ground.first)
    study = Study(job, bench.facts)
    best: tuple[Attempt, Chosen] | None = None
    rounds = 0
    while rounds < MAX_ROUNDS:
        with bench.clock.time("search"):
            try:
                chosen = methods.choose(study, within(ground.problem, allowed))
            except InfeasibleError:
                if best is None:
                    raise
                break
        rounds += 1
        attempt = bench.attempt(chosen.solution.choice, chosen.quantizers, ground.latency)
        if best is None or attempt.better_than(best[0]):
            best = (attempt, chosen)
        if attempt.within_limit:
            break
        assert allowed is not None and attempt.limit_s is not None
        # What the plan took beyond its price is taken off the next plan's allowance.
        excess = attempt.own.interval[1] / attempt.limit_s
        reached = float(chosen.solution.latency_s or allowed)
        allowed = min(allowed, reached) / excess * 0.995
        job.progress.note(
            f"round {rounds}: measured {attempt.own.latency_s * 1e3:.3g} ms against a limit of "
            f"{attempt.limit_s * 1e3:.3g} ms; solving again"
        )
    assert best is not None
    attempt, chosen = best
    return Plan(attempt, chosen, bench.accuracy(attempt.made, chosen.quantizers), rounds)


def _fastest(bench: Bench, ground: Ground, points: list[Point], max_drop: float) -> Plan:
    """The fastest plan within the drop: judged by simulation, then on the artifact itself.

    The frontier says how fast; the method chooses the plan that is as fast.
    """
    job, facts = bench.job, bench.facts
    holdout = facts.images.holdout
    with bench.clock.time("search"):
        reference = float_logits(job, holdout, "held-out images")

        def drop(assignment: Assignment) -> float:
            return simulated_drop(job, assignment, facts.quantizers, holdout, reference)

        index = fastest_within_drop(points, drop, max_drop)
    study = Study(job, facts)
    rounds = 0
    while True:
        rounds += 1
        with bench.clock.time("search"):
            chosen = methods.choose(study, within(ground.problem, points[index].latency_s))
        attempt = bench.attempt(chosen.solution.choice, chosen.quantizers, ground.latency)
        accuracy = bench.accuracy(attempt.made, chosen.quantizers)
        enough = accuracy.drop <= max_drop
        if enough or rounds >= MAX_ROUNDS or index + 1 >= len(points):
            return Plan(attempt, chosen, accuracy, rounds)
        job.progress.note(
            f"round {rounds}: drop {accuracy.drop:.2f} points is above {max_drop:g}; "
            "taking the next slower plan"
        )
        index += 1


def _finish(
    bench: Bench, ground: Ground, points: list[Point], plan: Plan, max_drop: float | None
) -> Result:
    """Baselines' accuracy, the verdict, the artifact in its place."""
    job, facts, attempt = bench.job, bench.facts, plan.attempt
    out = Path(job.options.out)
    baselines = bench.baseline_rows(attempt.timed)
    status = status_of(attempt, plan.accuracy, max_drop)
    rows = layer_rows(job, facts.menu, ground.latency, ground.problem, attempt.made.assignment)
    json = result_json(
        job, status=status, ambiguous=attempt.ambiguous, assignment=attempt.made.assignment,
        rows=rows, predicted_s=attempt.predicted_s,
        predicted_interval=predicted_interval(job, attempt, ground.latency), own=attempt.own,
        limit_s=attempt.limit_s, statistic=bench.statistic, baselines=baselines,
        accuracy=plan.accuracy, solution=plan.chosen.solution, told=plan.chosen.told,
        rounds=plan.rounds, seconds=bench.clock.seconds, out=out, made=attempt.made,
        split=facts.images.split, new_timings=facts.latency.new_timings,
        failures=facts.latency.failures, estimator=facts.loss.estimator,
    )  # fmt: skip
    result = Result(json, rows, frontier_rows(points), EXIT_CODES[status], ground.problem)
    result.write(out, attempt.made.path)
    return result

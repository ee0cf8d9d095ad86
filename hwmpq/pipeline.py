"""The whole story, top to bottom: from a trained model to a measured mixed-precision artifact.

open_job          the model becomes one canonical graph
make_menu         which formats each layer may take on the target
calibrate         scales, zero points, rounded weights
profile           seconds of every cell, measured, into the store; fill_in: or predicted
sensitivities     how much the loss grows per layer and format
survey            whole artifacts timed, prices fitted on them, arrays for the solver
candidates        the method's plan, with what the solver proved, and the exact ones beside it
Bench             compiled; timed beside the fp32 and uniform artifacts; its accuracy measured
refitted          what they took corrects the prices; solved again until the plan stays the same
confirmed         the best few timed once more, afresh
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmpq import methods
from hwmpq.errors import InfeasibleError, InputError
from hwmpq.measure import WorkerProcess
from hwmpq.methods.study import Chosen, Study
from hwmpq.methods.trials import Frozen, Trial, attempt_all, candidates, confirmed, fastest, frozen
from hwmpq.report import learning
from hwmpq.stages import budget as budgets
from hwmpq.stages import imported
from hwmpq.stages.bench import Attempt, Bench, Clock, baseline_names, limit_seconds
from hwmpq.stages.cells import timer
from hwmpq.stages.choose import (
    Point,
    fastest_within_drop,
    frontier_rows,
    refined,
    walk_frontier,
    within,
)
from hwmpq.stages.evidence import evidence, with_measured
from hwmpq.stages.facts import Facts, calibrate, monotone_violations, sensitivities
from hwmpq.stages.forecast import forecast
from hwmpq.stages.ground import Ground, measured, refitted, survey
from hwmpq.stages.job import (
    Images,
    Job,
    Options,
    Progress,
    Silent,
    load_images,
    open_job,
    train_folder,
)
from hwmpq.stages.latency import profile
from hwmpq.stages.menu import make_menu
from hwmpq.stages.place import check_place, workshop
from hwmpq.stages.predicted import fill_in
from hwmpq.stages.pricing import price
from hwmpq.stages.result import (
    EXIT_CODES,
    LayerRow,
    Result,
    layer_rows,
    predicted_interval,
    result_json,
    status_of,
)
from hwmpq.stages.reuse import explained
from hwmpq.stages.verify import Accuracy, Jury
from hwmpq.types import Assignment

if TYPE_CHECKING:
    from hwmpq.quantize.judge import Judgement

__all__ = ["EXIT_CODES", "LayerRow", "Options", "Progress", "Result", "quantize_model"]

MAX_ROUNDS = 5
#: Times that the method may look for a plan that is faster than the frontier's: each is a search.
FASTER = 2


def quantize_model(
    options: Options, progress: Progress | None = None,
    images: Callable[[Job], Images] = load_images, model: Any = None,
) -> Result:  # fmt: skip
    """The main job. Raises HwmpqError for bad input, an impossible budget or a lost device.

    images, model: where they do not come from the options (`hwmpq.quantize`); model: a LoadedModel.
    """
    options = methods.settle(options)
    budgets.parse_sums(options.max_size, options.max_bops)
    if not options.dry_run:
        check_place(Path(options.out))
    clock = Clock()
    if design := methods.named(options.method).design:
        with clock.time("search"):
            model, options = design(options, progress or Silent(), images, model)
    limit = budgets.parse_latency(options.latency)
    with clock.time("trace"):
        job = open_job(options, progress or Silent(), model)
    with job.store:
        if options.dry_run:
            return forecast(job, images(job), clock.seconds)
        facts = gather(job, clock, images(job))
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
    cache = explained(job, menu, images)
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
    return Facts(images, menu, quantizers, loss, latency, cache)


@dataclass(frozen=True, eq=False)
class Plan:
    """The accepted (or best) attempt, how it was chosen, its accuracy and the rounds taken;
    judged: plans whose drop was simulated on held-out images."""

    attempt: Attempt
    chosen: Chosen
    accuracy: Accuracy
    rounds: int
    judged: Mapping[Frozen, Judgement] = field(default_factory=dict)


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
    sums = options.max_size or options.max_bops
    chosen_by_drop = not sums if limit is None else limit.fastest
    return 1.0 if chosen_by_drop else None


def _least_loss(bench: Bench, ground: Ground) -> Plan:
    """Least loss within the budgets."""
    best, rounds = closed_loop(bench, ground)
    accuracy = bench.accuracy(best.attempt.made, best.chosen.quantizers)
    return Plan(best.attempt, best.chosen, accuracy, rounds)


def closed_loop(bench: Bench, ground: Ground) -> tuple[Trial, int]:
    """The best plan within the budgets by its measured times, and the rounds it took.

    In each a few plans are timed, their times correct the prices, and the problem is solved again,
    until the plan stays the same. The best few are then timed afresh, and the search goes on below
    the limit if none of them stays within it. Raises InfeasibleError.
    """
    study = Study(bench.job, bench.facts)
    tried: list[Trial] = []
    settled: Assignment | None = None
    allowed, rounds = limit_seconds(bench.limit, ground.first), 0
    while rounds < MAX_ROUNDS:
        problem = within(ground.problem, allowed)
        known = {frozen(trial.attempt.made.assignment) for trial in tried}
        with bench.clock.time("search"):
            try:
                wanted = study.solve(problem).choice
                plans = [] if wanted == settled else candidates(study, problem, known)
            except InfeasibleError:
                if not tried:
                    raise
                wanted, plans = {}, fastest(study, problem, known)
                if not plans or min(tried, key=Trial.order).attempt.within_limit:
                    break
        if not plans:
            tried = confirmed(bench, tried)
            if tried[0].attempt.within_limit:
                break
            settled, allowed = None, _below(bench, ground, tried[0].attempt, allowed)
            continue
        better = measured(bench, ground, [plan.solution.choice for plan in plans])
        if better is not None:
            ground, settled = better, None
            continue
        rounds += 1
        trials = attempt_all(bench, study, ground.latency, plans)
        tried += trials
        ground = refitted(bench, ground, [trial.attempt for trial in trials])
        own = trials[0].attempt  # of the method's plan
        settled = wanted if own.within_limit else None
        if not own.within_limit:
            allowed = _below(bench, ground, own, allowed)
    return confirmed(bench, tried)[0], rounds


def _below(bench: Bench, ground: Ground, late: Attempt, allowed: float | None) -> float:
    """What the next plan is allowed to cost, where one that was allowed took too long: what that
    took beyond its price is taken off."""
    assert allowed is not None and late.limit_s is not None
    bench.job.progress.note(
        f"measured {late.own.latency_s * 1e3:.3g} ms against a limit of {late.limit_s * 1e3:.3g} "
        "ms; solving again"
    )
    reached = price(bench.job, late.made.assignment, ground.latency)
    return min(allowed, reached) / late.share * 0.995


def _fastest(bench: Bench, ground: Ground, points: list[Point], max_drop: float) -> Plan:
    """The fastest plan within the drop: judged by simulation, then on the artifact itself.

    The frontier says how fast; the method's plan that is as fast drops less than the frontier's,
    so it may be allowed to be faster still.
    """
    job, facts = bench.job, bench.facts
    study = Study(job, facts)
    with bench.clock.time("search"):
        jury = Jury(job, facts.quantizers, facts.images.jury, max_drop)
        index = fastest_within_drop(points, lambda plan: jury.judge(plan).drop, max_drop)
        points, index = refined(ground.problem, points, index, jury.allows)
        chosen = methods.choose(study, within(ground.problem, points[index].latency_s))
        for _ in range(min(index, FASTER)):
            if not study.time_for():
                break
            faster = methods.choose(study, within(ground.problem, points[index - 1].latency_s))
            if not jury.allows(faster.solution.choice, faster.quantizers):
                break
            chosen, index = faster, index - 1
    rounds = 0
    while True:
        rounds += 1
        [trial] = attempt_all(bench, study, ground.latency, [chosen])
        accuracy = bench.accuracy(trial.attempt.made, trial.chosen.quantizers)
        enough = accuracy.drop <= max_drop
        if enough or rounds >= MAX_ROUNDS or index + 1 >= len(points):
            return Plan(trial.attempt, trial.chosen, accuracy, rounds, jury.judged)
        job.progress.note(
            f"round {rounds}: drop {accuracy.drop:.2f} points is above {max_drop:g}; "
            "taking the next slower plan"
        )
        index += 1
        with bench.clock.time("search"):
            chosen = methods.choose(study, within(ground.problem, points[index].latency_s))


def _finish(
    bench: Bench, ground: Ground, points: list[Point], plan: Plan, max_drop: float | None
) -> Result:
    """Baselines' accuracy, the verdict, the artifact in its place."""
    job, facts, attempt = bench.job, bench.facts, plan.attempt
    out = Path(job.options.out)
    baselines = bench.baseline_rows(attempt.timed)
    status = status_of(attempt, plan.accuracy, max_drop)
    proof = evidence(bench, ground, attempt) | _recorded(job)
    rows = layer_rows(job, facts.menu, ground.latency, ground.problem, attempt.made.assignment)
    rows = with_measured(rows, proof["steps"])
    json = result_json(
        job, status=status, ambiguous=attempt.ambiguous, assignment=attempt.made.assignment,
        rows=rows, predicted_s=attempt.predicted_s,
        predicted_interval=predicted_interval(job, attempt, ground.latency), own=attempt.own,
        limit_s=attempt.limit_s, statistic=bench.statistic, baselines=baselines,
        accuracy=plan.accuracy, solution=plan.chosen.solution, told=plan.chosen.told,
        rounds=plan.rounds, seconds=bench.clock.seconds, out=out, made=attempt.made,
        split=facts.images.split, new_timings=facts.latency.new_timings,
        failures=facts.latency.failures, estimator=facts.loss.estimator,
    ) | facts.cache  # fmt: skip
    curve = frontier_rows(points)
    for point in curve:
        if judged := plan.judged.get(frozen(point["assignment"])):
            point |= {"drop": judged.drop, "n": judged.n}
    result = Result(json, rows, curve, EXIT_CODES[status], ground.problem, proof)
    result.write(out, attempt.made.path)
    return result


def _recorded(job: Job) -> dict[str, Any]:
    """How a method that trains came to its plan, where it has kept that."""
    if not methods.named(job.options.method).trained:
        return {}
    from hwmpq.methods.fliqs.loop import POLICY, SCALARS

    folder = Path(train_folder(job.options))
    policy = folder / POLICY
    return learning.recorded(policy, folder / SCALARS) if policy.is_file() else {}

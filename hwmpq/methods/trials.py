"""Plans to be compiled and timed together: the method's own, and the exact ones right beside it.

A price is an estimate, so the plan that fits a budget best by price need not be the one that does
so by time: a plan that is priced a little above may turn out to be within it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from hwmpq import methods
from hwmpq.methods.study import Chosen, Study
from hwmpq.search import solve
from hwmpq.stages.bench import Attempt, Bench
from hwmpq.stages.choose import within
from hwmpq.stages.job import solver_of
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.refine import refine
from hwmpq.types import Assignment, Problem

#: The latency budgets, as shares of the one that is asked, for the exact plans beside the method's.
BESIDE = (1.03, 0.97)
#: Seconds for one of them.
SOLVE_S = 10.0
#: So many of the best are timed again, until the best of all has been timed TIMED times.
CONFIRMED = 3
TIMED = 3

Frozen = frozenset[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan that was compiled and timed, once or more. loss: its true loss on held-out images."""

    chosen: Chosen
    attempts: tuple[Attempt, ...]
    loss: float

    @property
    def attempt(self) -> Attempt:
        """The timing that comes closest to the limit, or goes farthest beyond it."""
        return max(self.attempts, key=lambda attempt: attempt.share)

    def order(self) -> tuple[bool, float]:
        """Least first: within the limit the least loss, outside the least seconds."""
        late = not self.attempt.within_limit
        return late, self.attempt.share if late else self.loss


def frozen(plan: Assignment) -> Frozen:
    """The plan as a key."""
    return frozenset(plan.items())


def candidates(study: Study, problem: Problem, tried: Collection[Frozen]) -> list[Chosen]:
    """The method's plan, and those beside it that were not tried, as long as there is time.

    Raises InfeasibleError naming the best possible plans.
    """
    own = methods.choose(study, problem)
    found = {frozen(own.solution.choice): own}
    limit = problem.budgets.get("latency_s")
    for share in BESIDE:
        if limit is None or not study.time_for(len(found) + 1):
            break
        near = within(problem, share * limit)
        solution = study.candidate(near, solver_of(study.job.options), SOLVE_S)
        if solution is not None and frozen(solution.choice) not in tried:
            key = frozen(solution.choice)
            found.setdefault(key, Chosen(solution, study.facts.quantizers, {}))
    return list(found.values())


def fastest(study: Study, problem: Problem, tried: Collection[Frozen]) -> list[Chosen]:
    """The plan of the least price, unless it was tried: where no price is within the budget, a time
    may still be."""
    rest = {name: limit for name, limit in problem.budgets.items() if name != "latency_s"}
    solution = solve(replace(problem, minimize="latency_s", budgets=rest))
    if not solution.choice or frozen(solution.choice) in tried:
        return []
    return [Chosen(solution, study.facts.quantizers, {})]


def attempt_all(
    bench: Bench, study: Study, latency: LatencyFacts, plans: list[Chosen]
) -> list[Trial]:
    """Compile the plans after post-training quantization, time them in one run, and judge the loss
    that they were chosen by."""
    with bench.clock.time("search"):
        numbers = [
            refine(study.job, study.facts.images, p.solution.choice, p.quantizers) for p in plans
        ]
    plans = [replace(plan, quantizers=q) for plan, q in zip(plans, numbers, strict=True)]
    attempts = bench.attempt([(p.solution.choice, p.quantizers) for p in plans], latency)
    with bench.clock.time("search"):
        losses = [_loss(study, plan) for plan in plans]
    return [
        Trial(plan, (attempt,), loss)
        for plan, attempt, loss in zip(plans, attempts, losses, strict=True)
    ]


def confirmed(bench: Bench, trials: Sequence[Trial]) -> list[Trial]:
    """The trials, best first, by further timings of the best where there is a limit.

    Of several plans that lie near it, the one within it was also the lucky one of its run; and runs
    differ by more than the epochs of one of them tell.
    """
    ranked = sorted(trials, key=Trial.order)
    while ranked[0].attempt.limit_s is not None and len(ranked[0].attempts) < TIMED:
        best, rest = ranked[:CONFIRMED], ranked[CONFIRMED:]
        again = bench.again([trial.attempt for trial in best])
        fresh = [
            replace(trial, attempts=(*trial.attempts, attempt))
            for trial, attempt in zip(best, again, strict=True)
        ]
        ranked = sorted([*fresh, *rest], key=Trial.order)
    return ranked


def _loss(study: Study, plan: Chosen) -> float:
    told = plan.told.get("measured_loss")
    return study.judge(plan.solution.choice).loss if told is None else float(told)

"""`auto`, the default: estimates propose plans, the true loss decides.

1. The job's estimator and the free controls propose a plan each; where they disagree, or where few
   bits are chosen, Gauss-Newton singles and pairs propose two more.
2. Each proposer is asked again under slightly tighter budgets: where the estimate is wrong, the
   plan next to its best one may be the better one.
3. All are judged by their true loss on held-out images, the likely ones first.
4. A short local search goes on from the best one, on the true loss.

Judging ends when the time is up; the best plan so far is kept. A user who names an estimator or a
solver gets the plan of just that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from hwmpq.formats import format_named
from hwmpq.methods.nearby import neighbours
from hwmpq.methods.study import Chosen, Method, Study, by_estimate
from hwmpq.search.evaluate import answer, evaluate, index_of
from hwmpq.types import Assignment, Problem, Solution

#: Propose for nothing: one runs no image, the other has the runs of the job's own estimator.
CONTROLS = ("weight-error", "measured")
#: Proposes where it matters how layers act together.
PAIRS = "clado-gn"
#: Pair terms matter at so few bits (CLADO's claim: at 2 to 3, little at 4 to 8).
FEW_BITS = 4
#: Shares of the budgets under which every proposer is asked once more.
TIGHTER = (0.97, 0.93)
#: Plans that the local search may judge, and seconds of a proposal by the quadratic solver.
MOVES = 16
QUADRATIC_S = 10.0


def choose(study: Study, problem: Problem) -> Chosen:
    """The plan of the least true loss among those proposed and judged."""
    if study.job.options.sensitivity or study.job.options.search:
        return by_estimate(study, problem)
    first = study.solve(problem)
    plans = _proposals(study, problem, first)
    losses = _rank(study, plans)
    best = min(losses, key=lambda name: losses[name])
    choice, loss, moves = _improve(study, problem, plans[best], losses[best])
    told = {"candidates": losses, "best": best, "moves": moves, "measured_loss": loss}
    study.job.progress.note(
        f"{len(losses)} of {len(plans)} candidate plans judged: {best} is best; "
        f"{moves} moves of the local search helped"
    )
    return Chosen(_solution(problem, first, choice), study.facts.quantizers, told)


def _proposals(study: Study, problem: Problem, first: Solution) -> dict[str, Assignment]:
    """Proposer -> plan, each plan once, the likely ones first."""
    own = study.facts.loss.estimator
    plans = {own: first.choice}
    asked = [(own, problem, "ilp")]
    asked += [(name, study.with_losses_of(name, problem), "ilp") for name in CONTROLS]
    for one in asked[1:]:
        _propose(study, plans, *one)
    if len({*map(_frozen, plans.values())}) > 1 or _few_bits(first.choice):
        paired = study.with_losses_of(PAIRS, problem)
        asked += [(PAIRS, paired, "ilp"), (f"{PAIRS} with pairs", paired, "iqp")]
        for one in asked[-2:]:
            _propose(study, plans, *one)
    for share in TIGHTER:
        for name, posed, solver in asked:
            budgets = {budget: share * value for budget, value in posed.budgets.items()}
            _propose(study, plans, f"{name} × {share}", replace(posed, budgets=budgets), solver)
    once = {_frozen(plan): name for name, plan in reversed(plans.items())}
    return {name: plan for name, plan in plans.items() if once[_frozen(plan)] == name}


def _propose(
    study: Study, plans: dict[str, Assignment], name: str, problem: Problem, solver: str
) -> None:
    found = study.candidate(problem, solver, QUADRATIC_S)
    if found is not None:
        plans[name] = found.choice


def _frozen(plan: Assignment) -> tuple[str, ...]:
    return tuple(plan.values())


def _few_bits(plan: Assignment) -> bool:
    formats = map(format_named, set(plan.values()))
    return any(min(f.weight.bits, f.activation.bits) <= FEW_BITS for f in formats)


def _rank(study: Study, plans: Mapping[str, Assignment]) -> dict[str, float]:
    """Proposer -> true loss, of those that there is time for; of the first one always."""
    losses: dict[str, float] = {}
    with study.job.progress.stage("judge the candidates", len(plans)) as advance:
        for name, plan in plans.items():
            if losses and not study.time_for():
                break
            found = study.judge(plan)
            losses[name] = found.loss
            if len(losses) == 1:
                most = min(found.seconds * (len(plans) + MOVES), study.budget_s)
                study.job.progress.note(
                    f"judging {len(plans)} candidate plans and up to {MOVES} moves on "
                    f"{study.images} held-out images, {most:.0f} s at most"
                )
            advance(1)
    return losses


def _improve(
    study: Study, problem: Problem, plan: Assignment, loss: float
) -> tuple[Assignment, float, int]:
    """The plan after moves that lower its true loss: it, its loss, how many moves."""
    moves, seen = 0, {_frozen(plan)}

    def unseen(plan: Assignment) -> Iterator[Assignment]:
        return (other for other in neighbours(problem, plan) if _frozen(other) not in seen)

    left = unseen(plan)
    with study.job.progress.stage("local search on the loss", MOVES) as advance:
        for _ in range(MOVES):
            other = next(left, None)
            if other is None or not study.time_for():
                break
            seen.add(_frozen(other))
            found = study.judge(other).loss
            advance(1)
            if found < loss:
                plan, loss, moves = other, found, moves + 1
                left = unseen(plan)
    return plan, loss, moves


def _solution(problem: Problem, first: Solution, choice: Assignment) -> Solution:
    """The plan with its estimated loss against the bound that the solver proved for it."""
    if choice == first.choice:
        return first
    index = index_of(problem, choice)
    assert np.isfinite(evaluate(problem, index).of(problem.minimize))
    return answer(problem, index, "feasible", first.seconds, first.bound)


METHOD = Method(choose)

"""One plan from what the store knows; nothing is measured or written."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import methods
from hwmpq.errors import InputError
from hwmpq.search import alternatives, conflicts, prices, solve
from hwmpq.search.evaluate import QUANTITIES, evaluate, index_of
from hwmpq.search.problem_file import write_problem
from hwmpq.stages import budget as budgets
from hwmpq.stages import imported
from hwmpq.stages.choose import (
    fastest_within_drop,
    given_limits,
    infeasible,
    make_problem,
    solver_limit_s,
    walk_frontier,
    within,
)
from hwmpq.stages.facts import calibrate, stored_sensitivities
from hwmpq.stages.fit import overhead_key
from hwmpq.stages.job import (
    Images,
    Job,
    Options,
    Progress,
    Silent,
    load_images,
    open_job,
    solver_of,
)
from hwmpq.stages.latency import LatencyFacts, profile
from hwmpq.stages.menu import Menu, make_menu, uniform
from hwmpq.stages.predicted import fill_in
from hwmpq.stages.pricing import price, table
from hwmpq.stages.result import layer_rows
from hwmpq.stages.reuse import explained
from hwmpq.stages.verify import float_logits, simulated_drop
from hwmpq.types import Assignment, Problem, Sensitivity, Solution


def search_model(
    options: Options, progress: Progress | None = None, explain: bool = False,
    save: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One plan within the budgets, from stored facts alone: nothing is measured or written.

    Relative latencies are of the predicted price of the uniform plan. With --max-drop a plan is
    judged by simulation; without --latency it is then the fastest within the drop. An impossible
    budget is status 'infeasible', with the least that can be had and which budgets contradict.
    explain: solve once more for each layer's next better and next worse format, and beside each
    budget for its price. save: where the problem goes, for `hwmpq solve`. Raises InputError.
    """
    options = methods.settle(options)
    limit = budgets.parse_latency(options.latency)
    sums = budgets.parse_sums(options.max_size, options.max_bops)
    if limit is None and not sums and options.max_drop is None:
        allowed = "--latency, --max-size, --max-bops, --max-drop: one or more"
        raise InputError("no budget", None, allowed)
    job = open_job(options, progress or Silent())
    with job.store:
        images = load_images(job)
        menu = make_menu(job.network, job.target, options.formats, options.pins, options.ties)
        cache = explained(job, menu, images)
        facts = known_latencies(job, menu)
        loss = _known_losses(job, images, menu)
        seconds = limit_of_prices(job, menu, facts, limit)
        problem = within(priced_problem(job, menu, loss, facts), seconds)
        if limit is not None and limit.fastest and options.max_drop is None:
            problem = replace(problem, minimize="latency_s")
        if save:
            write_problem(problem, save)
        asked = (solver_of(options), solver_limit_s(job), options.seed)
        solution = solve(problem, *asked)
        told: dict[str, Any] = {
            "version": 1, "status": solution.status, "model": options.model,
            "target": job.target.name, "threads": options.threads, "minimize": problem.minimize,
            "budget": dict(problem.budgets), "overhead_s": facts.overhead_s,
            "estimator": loss.estimator, **cache,
        }  # fmt: skip
        if solution.status == "infeasible":
            error, why = infeasible(problem, solution), conflicts.conflict(problem, *asked[1:])
            told["conflict"] = why and asdict(why)
            return told | {"least": dict(solution.least), "error": error.to_json()}
        if not solution.choice:
            return told | {"bound": solution.bound, "seconds": solution.seconds}
        choice = solution.choice
        drop: dict[str, float] = {}
        if options.max_drop is not None:
            by_drop = limit is None or limit.fastest
            choice, drop = _judged(job, images, menu, problem, solution, by_drop)
            if drop["drop"] > options.max_drop:
                told["status"] = "accuracy"
        found = _explained(job, menu, facts, loss, problem, solution, choice)
        if explain and choice == solution.choice:
            beside = prices.prices(problem, solution, *asked)
            found["prices"] = {name: asdict(price) for name, price in beside.items()}
            steps = alternatives.explain(problem, solution, *asked)
            for row in found["rows"]:
                near = steps[row["name"]]
                row["steps"] = [asdict(s) for s in (near.up, near.down) if s is not None]
    return told | drop | found


def known_latencies(job: Job, menu: Menu) -> LatencyFacts:
    """Times that were measured, imported or can be predicted, with the overhead last fitted."""
    facts = imported.fill_in(job, profile(job, menu, measure=False))
    facts = fill_in(job, menu, facts)
    return replace(facts, **(job.store.fact("overhead", overhead_key(job)) or {}))


def _known_losses(job: Job, images: Images, menu: Menu) -> Sensitivity:
    """Raises InputError when the store has no loss of any format but fp32."""
    loss = stored_sensitivities(job, images, menu)
    narrow = [f != "fp32" for f in menu.formats]
    if any(narrow) and not np.isfinite(loss.loss[:, narrow]).any():
        raise InputError(
            f"sensitivities ({loss.estimator}) for these images in the store", "none", None,
            "Run `hwmpq sensitivity` first, with the same data options and seed.",
        )  # fmt: skip
    return loss


def limit_of_prices(
    job: Job, menu: Menu, facts: LatencyFacts, limit: budgets.Latency | None
) -> float | None:
    """The latency budget in seconds. Raises InputError when its reference has no known price."""
    if limit is None or limit.ratio is None:
        return None if limit is None else limit.seconds
    if limit.of not in menu.formats:
        raise InputError(f"budget relative to {limit.of!r}", None, menu.formats)
    whole = price(job, uniform(menu, job.network, limit.of)[0], facts)
    if not np.isfinite(whole):
        raise InputError(
            f"the price of {limit.of}, of which the budget is a part", "unknown", None,
            "Run `hwmpq profile` first, or give the budget in seconds.",
        )  # fmt: skip
    return limit.ratio * whole


def priced_problem(job: Job, menu: Menu, loss: Sensitivity, facts: LatencyFacts) -> Problem:
    """Raises InputError when what every plan needs was never measured."""
    found = table(job, menu, facts)
    if not np.isfinite(found.fixed_s):
        raise InputError(
            "operators between the layers have no measured time", next="Run `hwmpq profile` first."
        )
    return make_problem(job, menu, loss, found, given_limits(job))


def _judged(
    job: Job, images: Images, menu: Menu, problem: Problem, solution: Solution, by_drop: bool
) -> tuple[Assignment, dict[str, float]]:
    """The plan and its simulated drop on held-out images; by_drop: the fastest plan within
    --max-drop instead of the solution."""
    quantizers = calibrate(job, images, menu)
    reference = float_logits(job, images.holdout, "held-out images")

    def drop(assignment: Assignment) -> float:
        return simulated_drop(job, assignment, quantizers, images.holdout, reference)

    choice = solution.choice
    if by_drop:
        points = walk_frontier(job, problem)
        choice = points[fastest_within_drop(points, drop, job.options.max_drop or 0.0)].assignment
    return choice, {"drop": drop(choice)}


def _explained(
    job: Job, menu: Menu, facts: LatencyFacts, loss: Sensitivity, problem: Problem,
    solution: Solution, choice: Assignment,
) -> dict[str, Any]:  # fmt: skip
    """The plan with its sums; rows: what each layer could take instead, and what that changes."""
    values = evaluate(problem, index_of(problem, choice))
    changes = marginals(problem, choice)
    rows = []
    for row in layer_rows(job, menu, facts, problem, choice):
        reasons = dict(row.why_not)
        losses = loss.loss[job.network.names.index(row.name)]
        for fmt, value in zip(menu.formats, losses, strict=True):
            if not np.isfinite(value):
                reasons.setdefault(fmt, "no loss in the store: run `hwmpq sensitivity`")
        rows.append(asdict(row) | {"why_not": reasons, "marginal": changes[row.name]})
    same = choice == solution.choice
    return {
        "assignment": choice, "loss": float(values.of("loss")),
        "latency_s": float(values.of("latency_s")), "nbytes": float(values.of("nbytes")),
        "bops": float(values.of("bops")), "objective": float(values.of(problem.minimize)),
        "bound": solution.bound if same else None, "gap": solution.gap if same else None,
        "seconds": solution.seconds, "rows": rows,
    }  # fmt: skip


def marginals(problem: Problem, choice: Assignment) -> dict[str, dict[str, dict[str, float]]]:
    """Layer -> other legal format -> quantity -> change of the whole, were that layer (with those
    tied to it) in that format. Formats that a neighbour rules out are left out."""
    index = index_of(problem, choice)
    base = evaluate(problem, index)
    place = {name: i for i, name in enumerate(problem.layers)}
    legal = np.ones((len(index), len(problem.formats)), bool)
    if problem.legal is not None:
        legal = np.asarray(problem.legal, bool)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in problem.layers}
    for name, i in place.items():
        tied = [place[n] for group in problem.ties if name in group for n in group] or [i]
        for j, fmt in enumerate(problem.formats):
            if j == index[i] or not legal[tied, j].all():
                continue
            other = index.copy()
            other[tied] = j
            values = evaluate(problem, other)
            change = {q: float(values.of(q) - base.of(q)) for q in QUANTITIES}
            if np.isfinite(list(change.values())).all():
                found[name][fmt] = change
    return found

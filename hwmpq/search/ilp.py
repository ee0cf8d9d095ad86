"""Exact solver: a mixed-integer program over decisions and transitions, with proof.

Decision d takes format a when x[d, a] = 1. A transition e = (p, c) has y[e, a, b] with
Σ_b y[e, a, b] = x[p, a] and Σ_a y[e, a, b] = x[c, b]: the tightest linear form of the product
(the local polytope; Wainwright and Jordan 2008, section 4). Cells ruled out by Lagrangian bounds
(`bounds`) are left out. HiGHS does the rest through OR-Tools MathOpt; of its peers there, HiGHS was
the fastest on chains of 200 layers × 8 formats (SCIP ×3, CP-SAT unsolved after 30 s).
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np

from hwmpq.errors import InputError
from hwmpq.search.bounds import Reduced, reduce
from hwmpq.search.decisions import Decisions, merge
from hwmpq.search.evaluate import ROUNDING, IndexArray, answer, table
from hwmpq.search.moves import feasible, sums
from hwmpq.search.quiet import stdout_to_stderr
from hwmpq.types import Problem, Solution

#: HiGHS prunes by absolute tolerances of 1e-6: the largest cost is scaled to this.
COST = 1e5
#: How often a choice that breaks a budget by rounding is cut off before budgets are tightened.
CUTS = 25
#: Cells beyond one of each decision that a first program is given.
CORE = 60


def solve(
    problem: Problem, time_limit_s: float, seed: int, near: IndexArray | None = None
) -> Solution:
    """Least Σ of `problem.minimize` within the budgets, proven; `pair_loss` is not looked at.

    near: a choice [L] to start from, the answer of a similar problem. Status feasible: with gap,
    the time was up. Raises InputError when the minimised table is absent.
    """
    start = time.perf_counter()
    if table(problem, problem.minimize) is None:
        raise InputError(
            "ilp minimises the loss table alone, and it is absent", next="Use the solver iqp."
        )
    deadline = start + time_limit_s
    decisions = merge(problem)
    if not decisions.legal.any(1).all():
        return Solution("infeasible", {}, seconds=time.perf_counter() - start)
    starts = [] if near is None else [decisions.gather(near)]
    reduced = reduce(problem, decisions, deadline, starts)
    if not reduced.infeasible and not _closed(problem, reduced):
        reduced = _focused(problem, reduced, deadline, seed)
    index, bound, proven = reduced.incumbent, reduced.bound, reduced.infeasible
    if not proven and not _closed(problem, reduced):
        index, bound, proven = _branch(problem, reduced, deadline, seed)
    seconds = time.perf_counter() - start
    if index is None and proven:
        return Solution("infeasible", {}, seconds=seconds, least=_least(problem, deadline, seed))
    if index is None:
        known = bound if math.isfinite(bound) else None
        return Solution("timeout", {}, bound=known, seconds=seconds)
    proven = proven or _closed(problem, reduced)
    status: Any = "optimal" if proven else "feasible"
    return answer(problem, decisions.expand(index), status, seconds, bound)


def _closed(problem: Problem, reduced: Reduced) -> bool:
    """Does the relaxation's bound already prove the choice it found?"""
    if reduced.incumbent is None:
        return False
    value = sums(problem, reduced.decisions, reduced.incumbent)[problem.minimize]
    return value - reduced.bound <= ROUNDING * abs(value)


def _least(problem: Problem, deadline: float, seed: int) -> dict[str, float]:
    """The least reachable value of each budgeted quantity alone (a lower bound if time is up)."""
    least = {}
    for name in problem.budgets:
        left = max(1.0, deadline - time.perf_counter())
        alone = replace(problem, minimize=name, budgets={}, pair_loss=None)
        found = solve(alone, left, seed)
        value = found.objective if found.status == "optimal" else found.bound
        if value is not None:
            least[name] = value
    return least


def _focused(problem: Problem, reduced: Reduced, deadline: float, seed: int) -> Reduced:
    """With the best choice out of the likeliest cells, which rules out most of the others: the
    core of a knapsack problem (Pisinger, Operations Research 47, 1999)."""
    core, left = reduced.core(CORE), deadline - time.perf_counter()
    if core is None or left <= 0:
        return reduced
    _, index, _ = Program(problem, core).run(0.3 * left, seed)
    if index is None or not feasible(problem, reduced.decisions, index):
        return reduced
    value, known = (
        math.inf if one is None else sums(problem, reduced.decisions, one)[problem.minimize]
        for one in (index, reduced.incumbent)
    )
    return reduced.offered(index, value) if value < known else reduced


def _branch(
    problem: Problem, reduced: Reduced, deadline: float, seed: int
) -> tuple[IndexArray | None, float, bool]:
    """Branch and bound on what is left: (best choice [D], bound, proven?)."""
    program = Program(problem, reduced.decisions)
    best, bound = reduced.incumbent, reduced.bound
    value = math.inf
    if best is not None:
        value = sums(problem, reduced.decisions, best)[problem.minimize]
    for attempt in range(2 * CUTS):
        left = deadline - time.perf_counter()
        if left <= 0:
            break
        outcome, index, lower = program.run(left, seed)
        if outcome == "infeasible":
            # nothing better than the choice at hand; with tightened budgets this proves nothing
            return best, value if attempt < CUTS else bound, attempt < CUTS
        if attempt < CUTS:
            bound = max(bound, lower)
        if index is None:
            break
        if feasible(problem, reduced.decisions, index):
            reached = sums(problem, reduced.decisions, index)[problem.minimize]
            if reached < value:
                best, value = index, reached
            return best, bound, outcome == "optimal" and attempt < CUTS
        program.cut(index)
        if attempt >= CUTS - 1:
            program.tighten()
    return best, bound, False


class Program:
    """The MathOpt model of one problem."""

    def __init__(self, problem: Problem, decisions: Decisions):
        from ortools.math_opt.python import mathopt

        self.mathopt = mathopt
        self.model = mathopt.Model()
        self.legal = decisions.legal
        self.settled = decisions.legal.sum(1) == 1
        self.x: dict[tuple[int, int], Any] = {}  # of the decisions that are open
        cells = np.nonzero(decisions.legal & ~self.settled[:, None])
        for d, a in zip(*map(np.ndarray.tolist, cells), strict=True):
            self.x[d, a] = self.model.add_binary_variable()
        for row in self._rows():
            if row:
                self.model.add_linear_constraint(mathopt.fast_sum(row) == 1.0)
        self.y: dict[tuple[int, int, int], Any] = {}
        for e, (p, c) in enumerate(decisions.ends.tolist()):
            self._join(e, p, c, decisions)
        self.limits: list[Any] = []
        for name, budget in problem.budgets.items():
            self._limit(decisions, name, budget)
        terms, self.offset, _ = self._terms(decisions, problem.minimize)
        self.unit = max((cost for _, cost in terms), default=1.0) / COST
        self.model.minimize(mathopt.fast_sum(v * (cost / self.unit) for v, cost in terms))

    def also(self, decisions: Decisions, latency_s: float) -> None:
        """Hold a latency budget under the tables and transitions of one more device."""
        self.y = {}
        for e, (p, c) in enumerate(decisions.ends.tolist()):
            self._join(e, p, c, decisions)
        self._limit(decisions, "latency_s", latency_s)

    def _limit(self, decisions: Decisions, name: str, budget: float) -> None:
        terms, offset, rounding = self._terms(decisions, name)
        # the slack is the unit: HiGHS's absolute tolerance becomes relative to it
        slop = rounding + ROUNDING * abs(budget)
        room = max(0.0, budget - offset)
        unit = max(room, slop)
        if unit > 0:
            row = self.mathopt.fast_sum(variable * (cost / unit) for variable, cost in terms)
            limit = (room + slop) / unit
            self.limits.append(self.model.add_linear_constraint(row <= limit))

    def _rows(self) -> list[list[Any]]:
        rows: list[list[Any]] = [[] for _ in self.legal]
        for (d, _), variable in self.x.items():
            rows[d].append(variable)
        return rows

    def _join(self, e: int, p: int, c: int, decisions: Decisions) -> None:
        """Variables of transition e, with both marginal constraints; the open end's own ones where
        the other is settled."""
        pairs = np.argwhere(decisions.allowed[e]).tolist()
        every = len(pairs) == int(self.legal[p].sum() * self.legal[c].sum())
        if every and (self.settled[p] or self.settled[c]):
            if not (self.settled[p] and self.settled[c]):
                for a, b in pairs:
                    self.y[e, a, b] = self.x[(p, a) if self.settled[c] else (c, b)]
            return
        for a, b in pairs:
            self.y[e, a, b] = self.model.add_variable(lb=0.0, ub=1.0)
        for end, node in ((0, p), (1, c)):
            for f in np.flatnonzero(self.legal[node]).tolist():
                row = [self.y[e, pair[0], pair[1]] for pair in pairs if pair[end] == f]
                total = self.mathopt.fast_sum(row)
                self.model.add_linear_constraint(total == self.x.get((node, f), 1.0))

    def _terms(self, decisions: Decisions, name: str) -> tuple[list[Any], float, float]:
        """Non-negative costs over x and y, what was taken off them, and its rounding error."""
        cells = np.where(decisions.legal, decisions.tables[name], np.inf)
        low = cells.min(1)
        costs = cells - low[:, None]
        terms = [(v, float(costs[key])) for key, v in self.x.items() if costs[key] > 0]
        offset = float(low.sum()) + decisions.constant[name]
        size = float(np.abs(low).sum()) + abs(decisions.constant[name])
        if name == "latency_s":
            edges = np.where(decisions.allowed, decisions.edge_latency_s, np.inf)
            base = edges.min((1, 2), initial=np.inf)
            edges = edges - base[:, None, None]
            terms += [(v, float(edges[key])) for key, v in self.y.items() if edges[key] > 0]
            offset += float(base.sum())
            size += float(np.abs(base).sum())
        return terms, offset, ROUNDING * size

    def run(self, seconds: float, seed: int) -> tuple[str, IndexArray | None, float]:
        """('optimal' | 'infeasible' | 'stopped', choice [D], lower bound of the objective)."""
        from ortools.math_opt.solvers import highs_pb2

        reason = self.mathopt.TerminationReason
        highs = highs_pb2.HighsOptionsProto()
        for option in ("mip_feasibility_tolerance", "primal_feasibility_tolerance"):
            highs.double_options[option] = 1e-9
        parameters = self.mathopt.SolveParameters(
            time_limit=timedelta(seconds=seconds),
            relative_gap_tolerance=1e-9,
            absolute_gap_tolerance=0.0,
            random_seed=seed % 2**31,
            highs=highs,
        )
        highs_type = self.mathopt.SolverType.HIGHS
        with stdout_to_stderr():
            result = self.mathopt.solve(self.model, highs_type, params=parameters)
        ended = result.termination.reason
        if ended in (reason.INFEASIBLE, reason.INFEASIBLE_OR_UNBOUNDED):
            return "infeasible", None, math.inf
        lower = result.termination.objective_bounds.dual_bound * self.unit + self.offset
        if not result.has_primal_feasible_solution():
            return "stopped", None, lower
        values = result.variable_values()
        index = self.legal.argmax(1)
        for (d, a), variable in self.x.items():
            if values[variable] > 0.5:
                index[d] = a
        return "optimal" if ended == reason.OPTIMAL else "stopped", index, lower

    def cut(self, index: IndexArray) -> None:
        """Forbid exactly this choice [D]."""
        chosen = [self.x[d, int(index[d])] for d in np.flatnonzero(~self.settled).tolist()]
        self.model.add_linear_constraint(self.mathopt.fast_sum(chosen) <= len(chosen) - 1.0)

    def tighten(self) -> None:
        """Lower every budget by 1e-9 of its slack."""
        for row in self.limits:
            row.upper_bound -= 1e-9


SOLVER = solve

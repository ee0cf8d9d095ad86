"""Exact solver of pair losses: branch and bound on the semidefinite bound of each node.

Every node convexifies the quadratic anew over the cells that are still open (`relaxation`). The
tangent plane at the relaxed minimum, with the prices of the budgets, is a problem without pairs:
its minimum over the transitions (`elimination`) is the node's bound, safe whatever the interior
point's rounding, and closes every cell through which nothing can be better. A node also lists the
choices near its relaxed minimum (`nearby`): all that could be better, which settles it, or too many
of them, and then it is branched on. The incumbent comes from a multi-start local search, from these
choices and from rounding.

The negative eigenvalues of C need no repair here, as the convexification is exact at every choice;
so `none` is the default policy, and objective and raw_objective agree. Under `clip` and `shift` the
repaired objective is bounded, and its best choice is polished on the raw one, so a gap may stay.
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hwmpq.search import ilp
from hwmpq.search.bounds import MARGIN, close, size
from hwmpq.search.decisions import Decisions, merge
from hwmpq.search.elimination import order_of, relax
from hwmpq.search.evaluate import IndexArray, choice_of, evaluate, index_of, limit
from hwmpq.search.local import Quadratic, descend, multi_start, settle
from hwmpq.search.moves import feasible
from hwmpq.search.nearby import near
from hwmpq.search.pairs import Policy, mended, merged
from hwmpq.search.relaxation import Form, Relaxed, convexify, minimise
from hwmpq.search.transport import flat_plane, plane_at
from hwmpq.types import BoolArray, FloatArray, Problem, Solution

#: Proven means: within this share of the objective.
GAP = 1e-6
#: A form is made anew when this share of the cells that were open is left.
ANEW = 0.7
#: Transition planes that one node may add, and that are kept.
PLANES, MOST_PLANES = 6, 12
#: Partial choices kept at a node, and at the first one, which goes on with the best where there are
#: more, and whose best choices, so many, local search starts from.
WIDTH, FIRST_WIDTH, SETTLED = 4000, 20000, 8
#: A round that raises the bound by less than this share of what is missing is the node's last.
SLOW = 0.05
#: The name of the tangent plane among the tables.
_GOAL = "tangent"


def solve(problem: Problem, time_limit_s: float, seed: int, policy: Policy = "none") -> Solution:
    """Least xᵀCx, C = pair_loss, within the budgets; with proof, or with gap when time is up.

    Without pairs, or when another quantity is minimised, this is ilp.
    """
    if problem.pair_loss is None or problem.minimize != "loss":
        return ilp.solve(problem, time_limit_s, seed)
    from threadpoolctl import threadpool_limits

    start = time.perf_counter()
    with threadpool_limits(1, "blas"):  # matrices this small: threads cost more than they bring
        search = _Search(problem, mended(problem.pair_loss, policy), start + time_limit_s, seed)
        first = search.open(0.3 * time_limit_s)
        if first is not None:
            return replace(first, seconds=time.perf_counter() - start)
        search.run()
        index = search.best
        assert index is not None  # open() gave an answer where there was none
        if policy != "none":
            raw = Quadratic(merged(problem.pair_loss, search.root), search.quadratic.width)
            index = descend(problem, search.root, raw, index)
    return search.answer(index, time.perf_counter() - start)


@dataclass(frozen=True, eq=False)
class _Node:
    """Open cells and pairs, the shares x [D, F] of the relaxed minimum, the proven bound; the
    convex form it stems from, and how many cells were open beyond one each when that was made."""

    decisions: Decisions
    x: FloatArray
    bound: float
    form: Form | None
    born: int


@dataclass(frozen=True, eq=False)
class _Rows:
    """Budgets as rows: cells [R, D·F] @ x ≤ limits [R], each in its unit [R]; the latency stands
    once per transition plane."""

    names: list[str]
    units: FloatArray
    cells: FloatArray
    limits: FloatArray


class _Search:
    """One branch and bound: the incumbent, the open nodes and what all nodes share."""

    def __init__(self, problem: Problem, matrix: FloatArray, deadline: float, seed: int):
        self.problem, self.deadline, self.seed = problem, deadline, seed
        self.root = merge(problem)
        self.quadratic = Quadratic(merged(matrix, self.root), len(problem.formats))
        self.best: IndexArray | None = None
        self.value = math.inf
        self.weight = np.sqrt(np.abs(np.diagonal(self.quadratic.matrix))).reshape(
            self.root.legal.shape
        )
        self.bound = -math.inf
        self.nodes = 0
        self.order = order_of(self.root)
        self.planes: list[FloatArray] = []
        if "latency_s" in problem.budgets and len(self.root.ends):
            self.planes = [flat_plane(self.root)]

    def open(self, seconds: float) -> Solution | None:
        """Find a first incumbent; the answer at once where there is no choice, or no time."""
        start = time.perf_counter()
        own = np.diagonal(np.asarray(self.problem.pair_loss)).reshape(len(self.problem.layers), -1)
        loss = own if self.problem.loss is None else np.where(
            np.isfinite(self.problem.loss), own, np.nan
        )  # fmt: skip
        easy = replace(self.problem, pair_loss=None)
        if "loss" not in self.problem.budgets:
            easy = replace(easy, loss=loss)
        found = ilp.solve(easy, max(0.5, seconds), self.seed)
        if not found.choice:
            return found if found.status == "infeasible" else Solution("timeout", {})
        layers = index_of(self.problem, found.choice)
        first = self.root.gather(layers)
        until = min(self.deadline, start + seconds)
        best = multi_start(self.problem, self.root, self.quadratic, [first], self.seed, until)
        self._offer(first if best is None else best)
        return None

    def run(self) -> None:
        """Branch, the least bound first, until the gap is closed or the time is up."""
        root = self._node(self.root, None)
        heap = [] if root is None else [(root.bound, 0, root)]
        while heap and heap[0][0] < self._enough() and time.perf_counter() < self.deadline:
            _, _, node = heapq.heappop(heap)
            for part in _halves(node, self.weight):
                made = self._node(part, node)
                if made is not None:
                    heapq.heappush(heap, (made.bound, self.nodes, made))
        # what was cut off holds nothing below this, as the value only falls
        self.bound = min([self._enough(), *(bound for bound, _, _ in heap)])

    def answer(self, index: IndexArray, seconds: float) -> Solution:
        """The Solution of a choice [D], which polishing may have moved off the proven one."""
        reached = self.quadratic.value(index)
        bound = min(self.bound, reached)
        gap = (reached - bound) / max(abs(reached), 1e-12)
        layers = self.root.expand(index)
        values = evaluate(self.problem, layers)
        rest: dict[str, Any] = {
            name: None if (value := getattr(values, name)) is None else float(value)
            for name in ("raw_objective", "latency_s", "nbytes", "bops")
        }
        status: Any = "optimal" if gap <= 1.001 * GAP else "feasible"
        known = math.isfinite(bound)
        return Solution(
            status, choice_of(self.problem, layers), reached, bound=bound if known else None,
            gap=gap if known else None, seconds=seconds, **rest,
        )  # fmt: skip

    def _enough(self) -> float:
        """A bound that leaves nothing to be found."""
        return self.value - GAP * max(abs(self.value), 1e-12)

    def _offer(self, index: IndexArray) -> None:
        value = self.quadratic.value(index)
        if value < self.value:
            self.best, self.value = index, value

    def _settle(self, start: IndexArray) -> None:
        """Offer the local optimum reached from a choice."""
        found = settle(self.problem, self.root, self.quadratic, start)
        if found is not None:
            self._offer(found)

    def _node(self, decisions: Decisions, parent: _Node | None) -> _Node | None:
        """Bound what is open and close what cannot be better; None when nothing better is left."""
        self.nodes += 1
        bound = -math.inf if parent is None else parent.bound
        form, born = (None, 0) if parent is None else (parent.form, parent.born)
        x = np.where(decisions.legal, 1.0, 0.0)
        planes, closed = 0, False
        while time.perf_counter() < self.deadline:
            decisions = self._within_budgets(decisions)
            if not decisions.legal.any(1).all():
                return None
            spare = int(decisions.legal.sum()) - len(decisions.legal)
            if spare == 0:
                index = decisions.legal.argmax(1)
                if feasible(self.problem, self.root, index):
                    self._offer(index)
                return None
            rows = self._rows(decisions)
            if form is None or spare < ANEW * born:
                born = spare
                form = convexify(
                    self.quadratic.matrix, decisions.legal, rows.cells, rows.limits, self.deadline
                ) or form  # fmt: skip
            if form is None:
                break
            found = minimise(form, decisions.legal, rows.cells, rows.limits)
            if found is None:
                break
            x, before, legal = found.x, bound, decisions.legal
            bound, decisions = self._bounded(decisions, found, rows, bound)
            if bound >= self._enough():
                return None
            if self.nodes < 20 or self.nodes % 8 == 0:
                self._settle(np.where(decisions.legal, x, -1.0).argmax(1))
            slow = bound - before <= SLOW * (self._enough() - bound)
            if planes == PLANES or slow or not self._add_plane(x):
                closed = self._tried(form, found, legal, rows)
                break
            planes += 1
        return None if closed else _Node(decisions, x, bound, form, born)

    def _tried(self, form: Form, found: Relaxed, legal: BoolArray, rows: _Rows) -> bool:
        """Offer the choices near the relaxed minimum. Returns whether nothing better is left."""
        first = self.nodes == 1
        tried = near(
            form, found, legal, rows.cells, rows.limits, self._enough(),
            FIRST_WIDTH if first else WIDTH, first,
        )  # fmt: skip
        for index in tried.choices[tried.values < self.value]:
            if feasible(self.problem, self.root, index):
                self._offer(index)
                break
        if first:
            for index in tried.choices[:SETTLED]:
                self._settle(index)
        return tried.complete

    def _within_budgets(self, decisions: Decisions) -> Decisions:
        """Close the cells with which one of the budgets cannot be met."""
        for name, budget in self.problem.budgets.items():
            if decisions.legal.any(1).all():
                least = relax(decisions, self.order, {name: 1.0})
                slop = MARGIN * (abs(budget) + size(decisions, least.index, {name: 1.0}))
                decisions = close(decisions, least, limit(budget) + slop)
        return decisions

    def _rows(self, decisions: Decisions) -> _Rows:
        names, cells, units = [], [], []
        for name in self.problem.budgets:
            for plane in self.planes if name == "latency_s" and self.planes else (0.0,):
                table = np.where(decisions.legal, decisions.tables[name] + plane, 0.0)
                names.append(name)
                units.append(float(np.ptp(table, axis=1).sum()) or 1.0)
                cells.append(table.reshape(-1) / units[-1])
        limits = [
            (limit(self.problem.budgets[name]) - decisions.constant[name]) / unit
            for name, unit in zip(names, units, strict=True)
        ]
        flat = np.array(cells).reshape(-1, decisions.legal.size)
        return _Rows(names, np.array(units), flat, np.array(limits))

    def _bounded(
        self, decisions: Decisions, found: Relaxed, rows: _Rows, bound: float
    ) -> tuple[float, Decisions]:
        """The bound by the tangent plane and the prices, and what it leaves open."""
        weights = {_GOAL: 1.0}
        for name, price in zip(rows.names, found.price / rows.units, strict=True):
            weights[name] = weights.get(name, 0.0) + float(price)
        tables = {**decisions.tables, _GOAL: np.where(decisions.legal, found.slope, 0.0)}
        constant = {**decisions.constant, _GOAL: found.level}
        least = relax(replace(decisions, tables=tables, constant=constant), self.order, weights)
        if not math.isfinite(least.value):
            return math.inf, decisions
        budgets = self.problem.budgets
        shift = sum(weights[name] * limit(budgets[name]) for name in budgets)
        full = replace(decisions, tables=tables, constant=constant)
        slop = MARGIN * (abs(shift) + size(full, least.index, weights))
        bound = max(bound, least.value - shift - 1e-3 * slop)
        return bound, close(decisions, least, self._enough() + shift + slop)

    def _add_plane(self, x: FloatArray) -> bool:
        """One more row for the transitions where x is still below their cost."""
        if not self.planes:
            return False
        plane = plane_at(self.root, x)
        reached = max(float((p * x).sum()) for p in self.planes)
        if float((plane * x).sum()) - reached <= 1e-4 * abs(reached):
            return False
        self.planes = [*self.planes, plane][-MOST_PLANES:]
        return True


def _halves(node: _Node, weight: FloatArray) -> tuple[Decisions, Decisions]:
    """The decision whose doubt matters most: its likeliest format alone, and all other open ones.

    weight: [D, F], the size of a cell's own error. Without it, tiny layers that are half decided
    are branched on, and the bound hardly moves.
    """
    legal = node.decisions.legal
    x = np.where(legal, node.x, 0.0)
    doubt = (x * (1.0 - x) * weight).sum(1) + 1e-9 * weight.max()
    d = int(np.where(legal.sum(1) > 1, doubt, -1.0).argmax())
    one = legal.copy()
    one[d] = False
    one[d, int(np.where(legal[d], x[d], -1.0).argmax())] = True
    other = legal.copy()
    other[d] &= ~one[d]
    return node.decisions.restricted(one), node.decisions.restricted(other)


SOLVER = solve

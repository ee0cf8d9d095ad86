"""A Problem with its ties merged: one decision per tie group, one edge per pair of decisions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hwmpq.search.evaluate import QUANTITIES, IndexArray, table
from hwmpq.types import BoolArray, FloatArray, Problem


@dataclass(frozen=True, eq=False)
class Decisions:
    """D decisions over F formats and E edges between them.

    of_layer: [L], the decision of each layer. tables: [D, F] sums over the tied layers, 0 where
    illegal. legal: [D, F]. ends: [E, 2], first < second. edge_latency_s: [E, F, F], first's format
    × second's, 0 where not allowed. allowed: [E, F, F]. constant: what no choice changes.
    """

    of_layer: IndexArray
    tables: dict[str, FloatArray]
    legal: BoolArray
    ends: IndexArray
    edge_latency_s: FloatArray
    allowed: BoolArray
    constant: dict[str, float]

    def expand(self, index: IndexArray) -> IndexArray:
        """Format numbers per decision [..., D] -> per layer [..., L]."""
        return index[..., self.of_layer]

    def gather(self, index: IndexArray) -> IndexArray:
        """Format numbers per layer [L] -> per decision [D]: of its last layer."""
        found = np.zeros(len(self.legal), np.intp)
        found[self.of_layer] = index
        return found

    def restricted(self, legal: BoolArray) -> Decisions:
        """The same with fewer legal cells [D, F]."""
        first, second = self.ends.T
        allowed = self.allowed & legal[first][:, :, None] & legal[second][:, None, :]
        return replace(self, legal=legal, allowed=allowed)


def merge(problem: Problem) -> Decisions:
    """Merge tied layers: costs add up, legality intersects, inner transitions join the tables.

    Edges that cost nothing and forbid nothing are dropped.
    """
    of_layer = _groups(problem)
    count, width = int(of_layer.max()) + 1, len(problem.formats)
    given = {name: cells for name in QUANTITIES if (cells := table(problem, name)) is not None}
    usable = np.ones((len(of_layer), width), bool)
    if problem.legal is not None:
        usable &= np.asarray(problem.legal, bool)
    for cells in given.values():
        usable &= np.isfinite(cells)
    legal = np.ones((count, width), bool)
    np.logical_and.at(legal, of_layer, usable)
    tables = {}
    for name, cells in given.items():
        tables[name] = np.zeros((count, width))
        np.add.at(tables[name], of_layer, np.where(usable, cells, 0.0))

    joined: dict[tuple[int, int], FloatArray] = {}
    place = {name: i for i, name in enumerate(problem.layers)}
    for move in problem.transitions:
        a, b = int(of_layer[place[move.source]]), int(of_layer[place[move.target]])
        cost = np.asarray(move.latency_s, np.float64)
        if a == b:
            own = np.diagonal(cost)
            legal[a] &= np.isfinite(own)
            tables["latency_s"][a] += np.where(np.isfinite(own), own, 0.0)
            continue
        key, cost = ((a, b), cost) if a < b else ((b, a), cost.T)
        joined[key] = joined.get(key, 0.0) + cost
    for cells in tables.values():
        cells[~legal] = 0.0
    keep = {
        key: cost for (key, cost) in joined.items() if cost[legal[key[0]]][:, legal[key[1]]].any()
    }
    ends = np.array(list(keep), np.intp).reshape(-1, 2)
    costs = np.array(list(keep.values())).reshape(-1, width, width)
    allowed = np.isfinite(costs) & legal[ends[:, 0]][:, :, None] & legal[ends[:, 1]][:, None, :]
    constant = {name: problem.fixed_latency_s if name == "latency_s" else 0.0 for name in tables}
    return Decisions(
        of_layer, tables, legal, ends, np.where(allowed, costs, 0.0), allowed, constant
    )


def _groups(problem: Problem) -> IndexArray:
    """The decision of each layer, numbered by first layer; overlapping ties join."""
    place = {name: i for i, name in enumerate(problem.layers)}
    leader = list(range(len(problem.layers)))

    def find(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    for group in problem.ties:
        for name in group[1:]:
            a, b = sorted((find(place[group[0]]), find(place[name])))
            leader[b] = a
    roots = [find(i) for i in range(len(leader))]
    number = {root: n for n, root in enumerate(sorted(set(roots)))}
    return np.array([number[root] for root in roots], np.intp)

"""The least sum over decisions and edges, exactly, with the least value through every cell.

Nonserial dynamic programming (Bertelè and Brioschi 1972): a decision with at most two neighbours is
minimised out, and what it costs becomes a table of theirs. Independent ones go at once, so a chain
of 1000 decisions takes ten rounds of array operations, not 1000; the sweep back gives the least sum
through every cell and every pair. Edges that no such order takes in are left out, those of the
narrowest cost range, and count with their least entry: the result is then a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hwmpq.search.decisions import Decisions
from hwmpq.search.evaluate import IndexArray
from hwmpq.types import FloatArray


@dataclass(frozen=True, eq=False)
class Side:
    """Tables between eliminated decisions and one neighbour of each: slot [n], turned [n]: the
    neighbour is the table's first axis."""

    slot: IndexArray
    turned: IndexArray

    def read(self, tables: FloatArray) -> FloatArray:
        """[n, F of the eliminated, F of the neighbour]."""
        found = tables[self.slot]
        return np.where(self.turned[:, None, None] == 1, found.swapaxes(1, 2), found)

    def write(self, tables: FloatArray, values: FloatArray) -> None:
        turned = np.where(self.turned[:, None, None] == 1, values.swapaxes(1, 2), values)
        tables[self.slot] = turned


@dataclass(frozen=True, eq=False)
class Leaves:
    """Decisions [n] eliminated with one neighbour each."""

    own: IndexArray
    near: IndexArray
    side: Side


@dataclass(frozen=True, eq=False)
class Links:
    """Decisions [n] eliminated between two neighbours each; joined: the table of those two, which
    gets what they cost."""

    own: IndexArray
    near: IndexArray
    far: IndexArray
    side: Side
    other: Side
    joined: Side


@dataclass(frozen=True, eq=False)
class Order:
    """rounds: what is eliminated, step by step. roots [R]: what is left, without neighbours.
    slots: tables, the edges first. others: edges that are left out."""

    rounds: tuple[tuple[Leaves, Links], ...]
    roots: IndexArray
    slots: int
    others: IndexArray


@dataclass(frozen=True, eq=False)
class Least:
    """The least sum, its choice [D], and the least sum through each cell [D, F] and each pair
    [E, F, F]; -inf for the allowed pairs of an edge that was left out."""

    value: float
    index: IndexArray
    through: FloatArray
    through_edge: FloatArray


def order_of(decisions: Decisions) -> Order:
    """An elimination order of width two, over as many edges as it can take."""
    costs = decisions.edge_latency_s
    reach = costs.max((1, 2)) - costs.min((1, 2))
    kept = dict.fromkeys(range(len(decisions.ends)))
    while True:
        game = _Elimination(len(decisions.legal), decisions.ends, kept, reach)
        core = game.play()
        if not core:
            break
        for edges in core[: max(1, len(core) // 8)]:
            for edge in edges:
                kept.pop(edge, None)
    others = np.array([e for e in range(len(reach)) if e not in kept], np.intp)
    return Order(tuple(game.rounds), np.array(game.roots, np.intp), len(game.sources), others)


class _Elimination:
    """The order in names only. sources: per table the edges it stems from."""

    def __init__(self, count: int, ends: IndexArray, kept: Mapping[int, None], reach: FloatArray):
        self.reach = reach
        self.ends: list[tuple[int, int]] = [(a, b) for a, b in ends.tolist()]
        self.sources: list[frozenset[int]] = [frozenset((e,)) for e in range(len(ends))]
        self.near: list[dict[int, int]] = [{} for _ in range(count)]
        for edge in kept:
            a, b = self.ends[edge]
            self.near[a][b] = self.near[b][a] = edge
        self.rounds: list[tuple[Leaves, Links]] = []
        self.roots: list[int] = []

    def play(self) -> list[frozenset[int]]:
        """Eliminate all that has at most two neighbours. Returns what is in the way, as sets of
        edges, the one that is missed least first; [] when all is done."""
        left = list(range(len(self.near)))
        while left:
            now: list[int] = []
            held: set[int] = set()
            for d in left:
                if len(self.near[d]) <= 2 and d not in held:
                    now.append(d)
                    held.update(self.near[d])
            if not now:
                slots = {slot for d in left for slot in self.near[d].values()}
                cost = {slot: sum(self.reach[e] for e in self.sources[slot]) for slot in slots}
                return [self.sources[slot] for slot in sorted(slots, key=lambda s: (cost[s], s))]
            self._round(now)
            gone = set(now)
            left = [d for d in left if d not in gone]
        return []

    def _round(self, now: list[int]) -> None:
        leaves: list[tuple[int, ...]] = []
        links: list[tuple[int, ...]] = []
        for d in now:
            beside = sorted(self.near[d].items())
            for other, _ in beside:
                del self.near[other][d]
            sides = [n for _, slot in beside for n in (slot, int(self.ends[slot][1] == d))]
            if len(beside) == 2:
                (a, first), (b, second) = beside
                joined = self._join(a, b, self.sources[first] | self.sources[second])
                links.append((d, a, b, *sides, joined, int(self.ends[joined][0] == b)))
            elif beside:
                leaves.append((d, beside[0][0], *sides))
            else:
                self.roots.append(d)
        one = np.array(leaves, np.intp).reshape(-1, 4).T
        two = np.array(links, np.intp).reshape(-1, 9).T
        self.rounds.append(
            (
                Leaves(one[0], one[1], Side(one[2], one[3])),
                Links(two[0], two[1], two[2], Side(two[3], two[4]), Side(two[5], two[6]),
                      Side(two[7], two[8])),
            )
        )  # fmt: skip

    def _join(self, a: int, b: int, sources: frozenset[int]) -> int:
        """The table of two decisions that gets what one between them costs."""
        slot = self.near[a].get(b)
        if slot is None:
            slot = len(self.ends)
            self.ends.append((a, b))
            self.sources.append(frozenset())
            self.near[a][b] = self.near[b][a] = slot
        self.sources[slot] |= sources
        return slot


def edge_costs(decisions: Decisions, weight: float) -> FloatArray:
    """[E, F, F], inf for a pair that is not allowed."""
    return np.where(decisions.allowed, weight * decisions.edge_latency_s, np.inf)


def relax(
    decisions: Decisions, order: Order, weights: Mapping[str, float], through_all: bool = True
) -> Least:
    """Minimise the weighted sum of the quantities: one sweep out, one back.

    through_all: also the least through each cell and pair; all -inf otherwise.
    """
    local = np.where(decisions.legal, 0.0, np.inf)
    for name, weight in weights.items():
        local += weight * decisions.tables[name]
    costs = edge_costs(decisions, weights.get("latency_s", 0.0))
    rest = float(costs[order.others].min((1, 2), initial=np.inf).sum())
    rest += sum(weight * decisions.constant[name] for name, weight in weights.items())
    width = local.shape[1]
    tables = np.concatenate([costs, np.zeros((order.slots - len(costs), width, width))])
    bags = []
    for leaves, links in order.rounds:
        one = local[leaves.own][:, :, None] + leaves.side.read(tables)
        two = (links.side.read(tables) + local[links.own][:, :, None])[:, :, :, None]
        two = two + links.other.read(tables)[:, :, None, :]
        sent, joined = one.min(1, initial=np.inf), two.min(1, initial=np.inf)
        np.add.at(local, leaves.near, sent)
        turned = links.joined.turned[:, None, None] == 1
        np.add.at(tables, links.joined.slot, np.where(turned, joined.swapaxes(1, 2), joined))
        bags.append((one, sent, two, joined))

    least = local[order.roots].min(1)
    value = float(least.sum() + rest)
    index = local.argmin(1)
    if not math.isfinite(value):  # forbidden transitions leave no choice
        return Least(value, index, np.full_like(local, np.inf), np.full_like(costs, np.inf))
    for (leaves, links), (one, _, two, _) in zip(order.rounds[::-1], bags[::-1], strict=True):
        n = np.arange(len(leaves.own))
        index[leaves.own] = one[n, :, index[leaves.near]].argmin(1)
        n = np.arange(len(links.own))
        index[links.own] = two[n, :, index[links.near], index[links.far]].argmin(1)
    if not through_all:
        return Least(value, index, np.full_like(local, -np.inf), np.full_like(costs, -np.inf))

    through = np.full_like(local, np.inf)
    through[order.roots] = local[order.roots] + (value - least)[:, None]
    passing = np.full_like(tables, np.inf)
    passing[: len(costs)][decisions.allowed] = -np.inf
    for (leaves, links), (one, sent, two, joined) in zip(
        order.rounds[::-1], bags[::-1], strict=True
    ):
        pair = one + _beyond(through[leaves.near], sent)[:, None, :]
        through[leaves.own] = pair.min(2)
        leaves.side.write(passing, pair)
        triple = two + _beyond(links.joined.read(passing), joined)[:, None]
        near, far = triple.min(3), triple.min(2)
        through[links.own] = near.min(2)
        links.side.write(passing, near)
        links.other.write(passing, far)
    return Least(value, index, through, passing[: len(costs)])


def _beyond(through: FloatArray, sent: FloatArray) -> FloatArray:
    """What all but the eliminated decision adds; where that one has no choice, nothing."""
    return through - np.where(np.isfinite(sent), sent, 0.0)

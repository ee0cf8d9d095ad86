"""Pairwise covers: few combinations in which any two levels of any two factors meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

Pair = tuple[int, int, int, int]


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows that hold every pair of levels of two factors at least once; always the same ones.

    Greedy: the first pair not yet covered starts a row; each other factor takes the level that
    covers the most new pairs with those already set, of equal ones the least used.
    Source: D. Cohen et al., "The AETG System", IEEE Trans. Softw. Eng. 23 (1997), section 4.
    """
    names, levels = list(factors), [list(values) for values in factors.values()]
    open_pairs: dict[Pair, None] = {}  # a set in a fixed order
    for i, j in combinations(range(len(names)), 2):
        for a in range(len(levels[i])):
            for b in range(len(levels[j])):
                open_pairs[i, a, j, b] = None
    used = [[0] * len(values) for values in levels]
    rows: list[dict[str, Any]] = []
    while open_pairs:
        row = _row(next(iter(open_pairs)), open_pairs, used)
        for (i, a), (j, b) in combinations(sorted(row.items()), 2):
            open_pairs.pop((i, a, j, b), None)
        for i, a in row.items():
            used[i][a] += 1
        rows.append({name: levels[i][row[i]] for i, name in enumerate(names)})
    return rows


def _row(start: Pair, open_pairs: Mapping[Pair, None], used: list[list[int]]) -> dict[int, int]:
    """factor -> level, beginning with a pair."""
    row = {start[0]: start[1], start[2]: start[3]}

    def gain(factor: int, level: int) -> int:
        pairs = (
            (i, a, factor, level) if i < factor else (factor, level, i, a) for i, a in row.items()
        )
        return sum(pair in open_pairs for pair in pairs)

    for factor, counts in enumerate(used):
        if factor not in row:
            row[factor] = max(
                range(len(counts)), key=lambda level: (gain(factor, level), -counts[level], -level)
            )
    return row

"""Pairwise covers: few combinations in which any two levels of any two factors meet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Pair = tuple[int, int, int, int]


def pairwise(
    factors: Mapping[str, Sequence[Any]], first_two: Collection[tuple[Any, Any]] | None = None
) -> list[dict[str, Any]]:
    """Rows that hold every pair of levels of two factors at least once; always the same ones.

    first_two: the pairs of levels of the first two factors that go together, at least one of
    every level; None: all do.

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
    never = {
        (0, a, 1, b)
        for a, b in product(range(len(levels[0])), range(len(levels[1])))
        if first_two is not None and (levels[0][a], levels[1][b]) not in first_two
    }
    for pair in never:
        del open_pairs[pair]
    used = [[0] * len(values) for values in levels]
    rows: list[dict[str, Any]] = []
    while open_pairs:
        row = _row(next(iter(open_pairs)), open_pairs, never, used)
        for (i, a), (j, b) in combinations(sorted(row.items()), 2):
            open_pairs.pop((i, a, j, b), None)
        for i, a in row.items():
            used[i][a] += 1
        rows.append({name: levels[i][row[i]] for i, name in enumerate(names)})
    return rows


def _row(
    start: Pair, open_pairs: Collection[Pair], never: Collection[Pair], used: list[list[int]]
) -> dict[int, int]:
    """factor -> level, beginning with a pair."""
    row = {start[0]: start[1], start[2]: start[3]}

    def pairs(factor: int, level: int) -> Iterator[Pair]:
        for i, a in row.items():
            yield (i, a, factor, level) if i < factor else (factor, level, i, a)

    def worth(factor: int, level: int) -> tuple[bool, int, int, int]:
        gain = sum(pair in open_pairs for pair in pairs(factor, level))
        fits = not any(pair in never for pair in pairs(factor, level))
        return fits, gain, -used[factor][level], -level

    for factor, counts in enumerate(used):
        if factor not in row:
            row[factor] = max(range(len(counts)), key=lambda level: worth(factor, level))
    return row

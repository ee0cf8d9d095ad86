"""The solvers' bars: seconds and gaps of iqp, ilp and the frontier on generated problems.

    python tools/bench/solvers.py [--time-limit 60] [--only iqp|ilp|frontier]

CPU seconds stand beside wall seconds: on a shared machine the first are the fair ones.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import numpy as np

from hwmpq import search
from hwmpq.search.pareto import frontier
from hwmpq.types import FloatArray, Problem, Transition

#: Layers, rank of the pair matrix (None: dense), bar.
PAIRS = (
    (53, None, "proven to 1e-4 in 3 s"),
    (72, None, "proven to 1e-4 in 10 s"),
    (100, None, "gap at most 1 % in 60 s"),
    (53, 40, "gap at most 1 % in 60 s"),
)


def pair_problem(count: int, rank: int | None, seed: int = 0) -> Problem:
    """CLADO-like: heavy-tailed errors that fall with the bits, correlated across layers.

    rank: the matrix is nothing but this many random factors; None: 8 factors and a diagonal.
    """
    rng = np.random.default_rng(seed)
    scale = (np.exp(rng.normal(0, 1.2, count))[:, None] * [1.0, 0.12, 0.002]).reshape(-1)
    factor = rng.normal(size=(3 * count, rank or 8))
    overlap: FloatArray = factor @ factor.T
    root = np.sqrt(np.diagonal(overlap))
    overlap = overlap / np.outer(root, root)
    if rank is None:
        overlap = 0.25 * overlap + 0.75 * np.eye(3 * count)
    nbytes = rng.lognormal(0, 1, count)[:, None] * [2.0, 4.0, 8.0]
    return Problem(
        tuple(f"layer{i}" for i in range(count)), ("2", "4", "8"), nbytes=nbytes,
        pair_loss=np.sqrt(np.outer(scale, scale)) * overlap,
        budgets={"nbytes": float(nbytes[:, 1].sum())},
    )  # fmt: skip


def chain(count: int, width: int = 8, seed: int = 0) -> Problem:
    """Latency falls and loss grows with fewer bits; a change of format costs time; some ties."""
    rng = np.random.default_rng(seed)
    bits = np.array([32, 16, 16, 8, 8, 6, 4, 2.0])[:width]
    shape = (count, width)
    loss = rng.lognormal(0, 2, count)[:, None] * 2.0 ** (-bits / 2) * rng.uniform(0.7, 1.3, shape)
    time_s = rng.lognormal(0, 1, count)[:, None] * bits / 32 * rng.uniform(0.7, 1.3, shape) * 1e-4
    names = tuple(f"layer{i}" for i in range(count))
    moves = tuple(
        Transition(a, b, rng.uniform(0, 2e-5, (width, width))) for a, b in itertools.pairwise(names)
    )
    ties = tuple((names[i], names[i + 3]) for i in range(0, count - 3, 20))
    low, high = time_s.min(1).sum(), time_s.max(1).sum()
    budget = {"latency_s": float(low + 0.3 * (high - low))}
    return Problem(names, tuple(f"f{i}" for i in range(width)), loss, time_s,
                   transitions=moves, ties=ties, budgets=budget)  # fmt: skip


def timed(what: str, bar: str, run: Callable[[], str]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    told = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what:<34} {wall:7.2f} s wall {cpu:7.2f} s CPU  {told}  (bar: {bar})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--only", choices=["iqp", "ilp", "frontier"])
    words = parser.parse_args()
    limit = words.time_limit

    def solved(problem: Problem, solver: str) -> str:
        found = search.solve(problem, solver, limit)
        return f"{found.status} {found.objective:.6g} gap {found.gap if found.gap else 0:.2e}"

    solved(chain(4), "ilp")  # load the libraries
    if words.only in (None, "iqp"):
        for count, rank, bar in PAIRS:
            kind = "dense" if rank is None else f"rank {rank}"
            made = pair_problem(count, rank)
            timed(f"iqp {count} layers, {kind}", bar, lambda made=made: solved(made, "iqp"))
    if words.only in (None, "ilp"):
        long = chain(1000)
        timed("ilp 1000 layers x 8 formats", "optimal in 2 s", lambda: solved(long, "ilp"))
    if words.only in (None, "frontier"):
        short = chain(60)
        timed(
            "frontier 60 layers x 8 formats", "1 s per point",
            lambda: f"{len(frontier(short, points=20, time_limit_s=limit))} points of 20",
        )  # fmt: skip


if __name__ == "__main__":
    main()

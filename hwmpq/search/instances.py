"""Generated problems with the structure of real ones: what solvers are timed and tested on."""

from __future__ import annotations

import itertools

import numpy as np

from hwmpq.types import FloatArray, Problem, Transition


def pairs(
    count: int, common: float = 0.25, factors: int = 8, noise: float = 0.0, seed: int = 0
) -> Problem:
    """CLADO-like: heavy-tailed errors that fall with the bits, correlated across layers.

    common: the share of the correlations that stems from `factors` random factors; near 1 the
    matrix is of low rank. noise: of a symmetric error, relative to each entry's scale, that makes
    it indefinite.
    """
    rng = np.random.default_rng(seed)
    scale = (np.exp(rng.normal(0, 1.2, count))[:, None] * [1.0, 0.12, 0.002]).reshape(-1)
    factor = rng.normal(size=(3 * count, factors))
    overlap: FloatArray = factor @ factor.T
    root = np.sqrt(np.diagonal(overlap))
    overlap = common * overlap / np.outer(root, root) + (1.0 - common) * np.eye(3 * count)
    nbytes = rng.lognormal(0, 1, count)[:, None] * [2.0, 4.0, 8.0]
    if noise:
        error = rng.normal(size=overlap.shape)
        overlap = overlap + noise * (error + error.T)
    return Problem(
        tuple(f"layer{i}" for i in range(count)), ("2", "4", "8"), nbytes=nbytes,
        pair_loss=np.sqrt(np.outer(scale, scale)) * overlap,
        budgets={"nbytes": float(nbytes[:, 1].sum())},
    )  # fmt: skip


def chain(
    count: int, width: int = 8, budgets: tuple[str, ...] = ("latency_s",), tied: bool = False,
    share: float = 0.3, seed: int = 0,
) -> Problem:  # fmt: skip
    """Latency falls and loss grows with fewer bits; every change of format costs time.

    tied: every twentieth layer agrees with the third one after it. share: how far each budget lies
    from the least to the greatest sum of its table.
    """
    rng = np.random.default_rng(seed)
    bits = np.array([32, 16, 16, 8, 8, 6, 4, 2.0])[:width]
    shape = (count, width)
    loss = rng.lognormal(0, 2, count)[:, None] * 2.0 ** (-bits / 2) * rng.uniform(0.7, 1.3, shape)
    time_s = rng.lognormal(0, 1, count)[:, None] * bits / 32 * rng.uniform(0.7, 1.3, shape) * 1e-4
    names = tuple(f"layer{i}" for i in range(count))
    moves = tuple(
        Transition(a, b, rng.uniform(0, 2e-5, (width, width))) for a, b in itertools.pairwise(names)
    )
    ties = tuple((names[i], names[i + 3]) for i in range(0, count - 3, 20)) if tied else ()
    tables = {
        "loss": loss, "latency_s": time_s,
        "nbytes": rng.lognormal(0, 1, count)[:, None] * bits * rng.uniform(0.95, 1.05, shape),
        "bops": rng.lognormal(0, 1, count)[:, None] * bits**2,
    }  # fmt: skip
    low, high = ({n: float(of(t, 1).sum()) for n, t in tables.items()} for of in (np.min, np.max))
    limits = {name: (1 - share) * low[name] + share * high[name] for name in budgets}
    return Problem(
        names, tuple(f"f{i}" for i in range(width)), **tables,
        transitions=moves, ties=ties, budgets=limits,
    )  # fmt: skip

"""Transitions in a convex relaxation: planes below their cost, from optimal transport.

The least cost of an edge over all joint shares with marginals x_p and x_c is convex in them. Any
potentials α, β with α_a + β_b ≤ c_ab give a plane α·x_p + β·x_c below it, which is exact at the
marginals that they are optimal for (Kantorovich duality); their sum over the edges is one row.
"""

from __future__ import annotations

import numpy as np

from hwmpq.search.decisions import Decisions
from hwmpq.types import FloatArray


def flat_plane(decisions: Decisions) -> FloatArray:
    """A plane [D, F] below the transitions' cost: half of each cell's least to either side."""
    costs = np.where(decisions.allowed, decisions.edge_latency_s, np.inf)
    plane = np.zeros(decisions.legal.shape)
    for end, axis in ((0, 2), (1, 1)):
        least = costs.min(axis, initial=np.inf)
        half = np.where(np.isfinite(least), 0.5 * least, 0.0)
        np.add.at(plane, decisions.ends[:, end], half)
    return plane


def plane_at(decisions: Decisions, x: FloatArray) -> FloatArray:
    """The plane [D, F] that touches the transitions' cost at the shares x [D, F].

    Forbidden pairs count with the greatest allowed cost of their edge, which keeps the plane below.
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    width = decisions.legal.shape[1]
    edge, a, b = (part.reshape(-1) for part in np.indices(decisions.allowed.shape))
    top = np.where(decisions.allowed, decisions.edge_latency_s, 0.0).max((1, 2))
    costs = np.where(decisions.allowed, decisions.edge_latency_s, top[:, None, None])
    unit = float(top.max()) or 1.0
    count = len(edge)
    spots = np.concatenate([2 * edge * width + a, (2 * edge + 1) * width + b])
    lines = np.tile(np.arange(count), 2)
    size = 2 * len(decisions.ends) * width
    sums = coo_array((np.ones(2 * count), (lines, spots)), (count, size)).tocsr()
    worth = x[decisions.ends].reshape(-1)
    found = linprog(-worth, A_ub=sums, b_ub=costs.reshape(-1) / unit, bounds=(-2.0, 2.0))
    if not found.success:
        return flat_plane(decisions)
    potentials = unit * found.x.reshape(-1, 2, width)
    # what the solver's tolerance left above a cost is taken off, so that the plane stays below
    over = potentials[:, 0, :, None] + potentials[:, 1, None, :] - costs
    potentials[:, 0] -= np.maximum(0.0, over.max((1, 2)))[:, None]
    plane = np.zeros(decisions.legal.shape)
    np.add.at(plane, decisions.ends, potentials)
    return plane

"""The pair losses of a Problem: what is minimised, and their merging onto decisions."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from hwmpq.errors import UnknownName
from hwmpq.search.decisions import Decisions
from hwmpq.types import FloatArray

#: clip: negative eigenvalues become 0 (CLADO). shift: the least eigenvalue is taken off the
#: diagonal, which adds the same to every choice. none: the matrix as it is.
Policy = Literal["clip", "shift", "none"]


def mended(matrix: FloatArray, policy: Policy) -> FloatArray:
    """The matrix [N, N] under a policy for its negative eigenvalues. Raises UnknownName."""
    if policy not in get_args(Policy):
        raise UnknownName("policy for negative eigenvalues", policy, get_args(Policy))
    matrix = 0.5 * (matrix + matrix.T)
    if policy == "none":
        return matrix
    values, vectors = np.linalg.eigh(matrix)
    if policy == "shift":
        return np.asarray(matrix - min(0.0, float(values[0])) * np.eye(len(matrix)))
    clipped = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return np.asarray(0.5 * (clipped + clipped.T))


def merged(matrix: FloatArray, decisions: Decisions) -> FloatArray:
    """[L·F, L·F] per layer -> [D·F, D·F] per decision with the same xᵀCx at every choice.

    Pairs that no choice takes together, and illegal cells, become 0.
    """
    count, width = decisions.legal.shape
    whole = np.asarray(matrix, np.float64).reshape(len(decisions.of_layer), width, -1)
    rows = np.zeros((count, width, whole.shape[2]))
    np.add.at(rows, decisions.of_layer, whole)
    found = np.zeros((count, width, count, width))
    columns = rows.reshape(count, width, -1, width)
    np.add.at(found.transpose(2, 0, 1, 3), decisions.of_layer, columns.transpose(2, 0, 1, 3))
    own = np.arange(count)
    found[own, :, own, :] *= np.eye(width)
    legal = decisions.legal.reshape(-1)
    flat = found.reshape(count * width, count * width)
    return np.asarray(np.where(legal[:, None] & legal, flat, 0.0))

"""`clado`: losses of layers and of pairs of layers, solved as an integer quadratic program.

CLADO (arXiv 2307.05657) clips the negative eigenvalues of the pairs' matrix so that its solver can
take it. Ours convexifies each node of its search and takes the matrix as it is (the policy 'none'
of `search.pairs`), so that the objective xᵀCx = 2·ΔL and the raw objective are one. The estimator
says how the pairs are found.
"""

from __future__ import annotations

from hwmpq.methods.study import Method, by_estimate

METHOD = Method(by_estimate, ("clado", "clado-block", "clado-gn"), "iqp")

"""`hawq`: the mean curvature of every layer times its rounding error, solved exactly.

HAWQ-V2 (arXiv 1911.03852, section 3) for the losses, HAWQ-V3 (2011.10680, section 3.4) for the
integer linear program, here over measured seconds.
"""

from __future__ import annotations

from hwmpq.methods.study import Method, by_estimate

METHOD = Method(by_estimate, ("hessian-trace",), "ilp")

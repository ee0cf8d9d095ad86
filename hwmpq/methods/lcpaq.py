"""`lcpaq`: curvature, pruned options, an integer program, then the numbers' own hyperparameters.

After LCPAQ (arXiv 2402.17706), whose text gives no formulas: the losses are HAWQ-V2's; a layer's
options that are no better than another one in loss, latency, bytes and bit operations are dropped;
the rest is solved exactly under the budgets; and what is not decided by a format, how the numbers
are calibrated, is searched on a cheap proxy (`proxy`). The definition of the last two is ours.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np

from hwmpq.methods import proxy
from hwmpq.methods.study import Chosen, Method, Study
from hwmpq.search.decisions import Decisions, merge
from hwmpq.types import BoolArray, Problem


def choose(study: Study, problem: Problem) -> Chosen:
    """The proven best plan by the estimate, with the best setting of its numbers."""
    legal = undominated(problem)
    found = study.solve(replace(problem, legal=legal))
    setting, report = proxy.search(study, found.choice)
    assert problem.legal is not None
    told = {
        "options": int(problem.legal.sum()), "options_kept": int(legal.sum()),
        "setting": asdict(setting), "measured_loss": study.judge(found.choice, setting).loss,
        "proxy": report,
    }  # fmt: skip
    return Chosen(found, study.quantizers(setting, found.choice), told)


def undominated(problem: Problem) -> BoolArray:
    """[L, F]: the legal cells without those that another one of the layer beats in every table.

    Transitions count: a cell beats another only if no neighbour's format makes it dearer. So no
    best plan is lost, but for one of equal values.
    """
    decisions = merge(problem)
    legal = decisions.legal.copy()
    for d, row in enumerate(decisions.legal):
        costs = _costs(decisions, d)
        for f in np.flatnonzero(row):
            others = [g for g in np.flatnonzero(legal[d]) if g != f]
            legal[d, f] = not any((costs[g] <= costs[f]).all() for g in others)
    return np.asarray(legal[decisions.of_layer])


def _costs(decisions: Decisions, d: int) -> np.ndarray:
    """All that a format of decision d costs, [F, ...]: its cells, and its transitions by what the
    neighbour takes."""
    columns = [cells[d][:, None] for cells in decisions.tables.values()]
    dear = np.where(decisions.allowed, decisions.edge_latency_s, np.inf)
    for (first, second), edge in zip(decisions.ends, dear, strict=True):
        if d == first:
            columns.append(edge)
        elif d == second:
            columns.append(edge.T)
    return np.concatenate(columns, axis=1)


METHOD = Method(choose, ("hessian-trace",), "ilp")

"""The policy and how it learns: REINFORCE (Williams 1992) with a moving baseline.

After FLIQS (arXiv 2308.03290), whose public code gives the formulas: every row of the space is a
categorical of its own, softmax of its logits, which start at 0.5. The reward of a plan is

    R = q − β_c · Σ over budgets |1 − C / C_target|           (absolute: TuNAS, arXiv 2008.06120)

and the policy descends on −(R − R̄) · mean log p(plan) + β_H(t) · mean H(p) by Adam. β_H rises from
0 to β_max with a cosine: the penalty on entropy forces a decision in the end.

Only q needs training, and costs are arithmetic. So q is that of the one plan that a step trains,
less its exponential average from the first step on, while the cost's part of the same gradient is
the mean over DRAWS plans, less their own mean: the same expectation with less noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hwmpq.methods.fliqs.settings import Settings
from hwmpq.methods.fliqs.space import IntArray
from hwmpq.search.evaluate import IndexArray, evaluate
from hwmpq.types import BoolArray, FloatArray, Problem

LOGIT = 0.5
#: Plans that a step weighs the costs of; the first of them is trained.
DRAWS = 64
#: Options are drawn with no lesser probability than this.
LEAST_PROBABILITY = 1e-8


def shares(problem: Problem, plans: IndexArray) -> dict[str, FloatArray]:
    """Budget -> C / C_target of plans, format numbers [.., L]."""
    values = evaluate(problem, plans)
    return {name: values.of(name) / target for name, target in problem.budgets.items()}


def gaps(used: Mapping[str, FloatArray]) -> FloatArray:
    """Σ over budgets |1 − C / C_target|. used: as `shares` gives them."""
    return np.asarray(np.sum([abs(1 - share) for share in used.values()], 0))


class Policy:
    """allowed: [R, O]. steps: of the whole run, of which the settings' shares are taken.

    The step's number and the seed decide what is drawn: a run that goes on draws as one that was
    never stopped, and all ranks of a parallel run draw alike.
    """

    def __init__(self, allowed: BoolArray, steps: int, settings: Settings):
        self.settings, self.steps = settings, steps
        self.warmup = round(settings.warmup * steps)
        self.baseline: float | None = None
        self._allowed = torch.from_numpy(allowed)
        #: Rows where there is anything to decide.
        self._open = self._allowed.sum(1) > 1
        self.logits = torch.full(allowed.shape, LOGIT, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], settings.policy_rate)

    def draw(self, step: int) -> IntArray:
        """The options of a step's plans, [DRAWS, R]: uniform while warming up, then by policy."""
        if step < self.warmup:
            p = self._allowed.double().numpy()
        else:
            p = self.probabilities().clip(min=LEAST_PROBABILITY) * self._allowed.numpy()
        ends = np.cumsum(p / p.sum(1, keepdims=True), 1)
        random = np.random.default_rng([self.settings.seed, step, 2])
        spot = random.random((DRAWS, len(p), 1))
        # The sum's rounding error must not lead behind the last allowed option.
        last = p.shape[1] - 1 - np.argmax(p[:, ::-1] > 0, 1)
        return np.asarray(np.minimum((spot >= ends).sum(2), last))

    def learn(self, step: int, drawn: IntArray, quality: float, away: FloatArray) -> None:
        """Take what the plans drawn at a step, [DRAWS, R], are worth.

        quality: q of the first of them; away: of each, how far its costs are from the targets.
        """
        average = self.settings.average
        before = quality if self.baseline is None else self.baseline
        self.baseline = average * before + (1 - average) * quality
        if step < self.warmup or not self._open.any():
            return
        log_p = self._log_p()[self._open]
        likely = log_p.gather(1, torch.from_numpy(drawn.T)[self._open]).mean(0)
        beyond = torch.from_numpy(away - away.mean()) / (len(away) - 1)
        loss = self.settings.cost * (beyond * likely).sum()
        loss = loss - (quality - self.baseline) * likely[0]
        loss = loss + self.penalty(step) * _entropies(log_p).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def penalty(self, step: int) -> float:
        """β_H of a step."""
        if step < self.warmup:
            return 0.0
        passed = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.settings.entropy * (1 - math.cos(math.pi * min(1.0, passed))) / 2

    def probabilities(self) -> FloatArray:
        """[R, O]."""
        return np.exp(self.log_probabilities())

    def log_probabilities(self) -> FloatArray:
        """[R, O]; -inf where not allowed."""
        return np.asarray(self._log_p().detach().numpy())

    def entropy(self) -> float:
        """Mean over the rows that have a choice, as a share of the uniform draw's; 0: decided."""
        if not self._open.any():
            return 0.0
        most = self._allowed.sum(1)[self._open].double().log()
        return float((_entropies(self._log_p()[self._open]) / most).mean().detach())

    def best(self) -> IntArray:
        """The most probable options, [R]."""
        return np.asarray(self.log_probabilities().argmax(1))

    def _log_p(self) -> Tensor:
        return self.logits.masked_fill(~self._allowed, -math.inf).log_softmax(1)


def _entropies(log_p: Tensor) -> Tensor:
    """Of each row, in nats."""
    known = log_p.masked_fill(log_p == -math.inf, 0.0)
    return -(log_p.exp() * known).sum(1)

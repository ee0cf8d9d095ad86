"""Scores: one number per sample of a network's outputs; metrics and losses, by name or the user's.

A user's score is a function (outputs, batch) -> [N], named as `package.module:callable`. Metrics
are better when higher: `top1` (100 if the label is hit), `agreement` (100 if the class is float's),
`sqnr` (dB of signal over noise of the outputs, at most 120: about the resolution of fp32, and what
float has by definition). Losses are worse when higher, in nats, of the softmax of the outputs:
`cross-entropy` with the labels, `kl`, the Kullback-Leibler divergence KL(float ‖ outputs).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hwmpq.data import named_object
from hwmpq.errors import InputError, UnknownName

_SQNR_CAP = 120.0


@dataclass(frozen=True, eq=False)
class Batch:
    """What a score may know of the samples. reference: the float model's first output, [N, ...];
    labels: int64 [N], or None."""

    reference: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Score:
    """A function (outputs [N, ...], batch) -> one number per sample, and what it is called.

    kind: 'metric' or 'loss'.
    """

    kind: str
    name: str
    function: Callable[[Tensor, Batch], Tensor]

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The scores, fp64 [N]. Raises InputError for another shape or type, missing labels, and
        where finite outputs have no finite score."""
        what = f"{self.kind} {self.name}"
        found = self.function(outputs, batch)
        if not isinstance(found, Tensor) or found.is_complex():
            got = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"result of {what}", got, "a real torch.Tensor")
        if found.shape != outputs.shape[:1]:
            allowed = f"{tuple(outputs.shape[:1])}, one number per sample"
            raise InputError(f"shape of the result of {what}", tuple(found.shape), allowed)
        scores = found.double()
        wrong = ~torch.isfinite(scores.detach())
        if wrong.any() and bool(torch.isfinite(outputs.detach()).all()):
            first = int(wrong.nonzero()[0])
            got = f"{float(scores[first])} for sample {first}, {int(wrong.sum())} in all"
            raise InputError(f"result of {what} is not finite", got, "finite numbers")
        return scores


def find_score(kind: str, word: str, known: Mapping[str, Score]) -> Score:
    """A score of `known`, or the user's function. Raises UnknownName, InputError."""
    if ":" not in word:
        if word not in known:
            raise UnknownName(kind, word, known, "Or give package.module:callable.")
        return known[word]
    function = named_object(word)
    if not callable(function):
        got = type(function).__name__
        raise InputError(f"{kind} {word}", got, "a function (outputs, batch) -> one per sample")
    return Score(kind, word, function)


def source_key(word: str) -> str:
    """What a stored result that used the score depends on: its name, and for a user's function the
    SHA-256 of the file that defines its module."""
    if ":" not in word:
        return word
    named_object(word)
    path = sys.modules[word.partition(":")[0]].__file__
    return f"{word} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}" if path else word


def default_metric(labels: object) -> Score:
    """`top1` with labels, `agreement` without."""
    return METRICS["agreement" if labels is None else "top1"]


def default_loss(labels: object) -> Score:
    """`cross-entropy` with labels, `kl` without."""
    return LOSSES["kl" if labels is None else "cross-entropy"]


def _labels(name: str, batch: Batch, other: str) -> Tensor:
    if batch.labels is None:
        raise InputError(f"{name} without labels", next=f"Use {other}.")
    return batch.labels


def _classes(outputs: Tensor) -> Tensor:
    return outputs.flatten(1).argmax(1)


def _top1(outputs: Tensor, batch: Batch) -> Tensor:
    return 100.0 * (_classes(outputs) == _labels("metric top1", batch, "the metric agreement"))


def _agreement(outputs: Tensor, batch: Batch) -> Tensor:
    return 100.0 * (_classes(outputs) == _classes(batch.reference))


def _sqnr(outputs: Tensor, batch: Batch) -> Tensor:
    signal = batch.reference.double().flatten(1).square().sum(1)
    noise = (outputs.double() - batch.reference.double()).flatten(1).square().sum(1)
    ratio = signal / noise.clamp(min=1e-300)
    return (10 * torch.log10(ratio.clamp(min=1e-300))).clamp(max=_SQNR_CAP)


def _cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    labels = _labels("loss cross-entropy", batch, "the loss kl")
    return F.nll_loss(_log_softmax(outputs), labels, reduction="none")


def _kl(outputs: Tensor, batch: Batch) -> Tensor:
    truth = _log_softmax(batch.reference)
    return (truth.exp() * (truth - _log_softmax(outputs))).sum(1)


def _log_softmax(outputs: Tensor) -> Tensor:
    return outputs.double().flatten(1).log_softmax(1)


METRICS = {
    name: Score("metric", name, function)
    for name, function in (("top1", _top1), ("agreement", _agreement), ("sqnr", _sqnr))
}
LOSSES = {
    name: Score("loss", name, function)
    for name, function in (("cross-entropy", _cross_entropy), ("kl", _kl))
}

"""One-shot search, whatever is searched for: each step draws rows, trains what they stand for, and
pays the policy.

What a run leaves in its folder: checkpoint.safetensors, scalars.csv, policy.json, and plots.html at
its end. A run that was killed goes on from its last checkpoint, on one process bit by bit as one
that was never stopped.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hwmpq.data import DataSet
from hwmpq.errors import InputError
from hwmpq.graph import Graph
from hwmpq.methods.fliqs.policy import Policy, gaps
from hwmpq.methods.fliqs.ranks import Ranks
from hwmpq.methods.fliqs.settings import Settings
from hwmpq.methods.fliqs.space import IntArray
from hwmpq.quantize import checkpoint
from hwmpq.quantize.finetune import Course
from hwmpq.report import training as plots
from hwmpq.stages.job import Progress, so_far
from hwmpq.types import BoolArray, FloatArray, digest

#: Part of a run's key: raise it when the search changes.
VERSION = 2
CHECKPOINT, SCALARS, POLICY, PLOTS = (
    "checkpoint.safetensors", "scalars.csv", "policy.json", "plots.html"
)  # fmt: skip

Row = dict[str, float]
Note = Callable[[int, int], None]


class Subject(Protocol):
    """What is searched for. allowed: [R, O] options of each row; rows: what each decides; options:
    their names; parameters: all that is trained, by a name that a file can hold."""

    @property
    def allowed(self) -> BoolArray: ...
    @property
    def rows(self) -> list[str]: ...
    @property
    def options(self) -> list[list[str]]: ...
    @property
    def parameters(self) -> Mapping[str, Tensor]: ...
    def shares(self, drawn: IntArray) -> dict[str, FloatArray]:
        """Budget -> C / C_target of drawn rows [N, R]."""

    def network(self, drawn: IntArray, delayed: bool) -> Callable[[Tensor], Sequence[Tensor]]:
        """What rows [R] stand for, to be trained. delayed: activations are not rounded."""


@dataclass(frozen=True, eq=False)
class Ended:
    """A finished run. rows: one per step; seconds: of this process, without what was resumed."""

    policy: Policy
    rows: list[Row]
    seconds: float


def run(
    subject: Subject, teacher: Graph, data: DataSet, settings: Settings, folder: Path, asked: Any,
    ranks: Ranks, device: str, note: Note,
) -> Ended:  # fmt: skip
    """Train on `data`, or go on in `folder`. asked: JSON that tells this run from others there,
    beside data and settings. note: called with (steps done, of).

    Raises InputError for a folder of another run, and where the loss is no number any more.
    """
    began = time.perf_counter()
    this = _Run(subject, teacher, data, settings, folder, asked, ranks, device)
    while len(this.rows) < this.training.steps:
        this.step()
        note(len(this.rows), this.training.steps)
    if ranks.rank == 0:
        plots.html(this.rows, this.told(), folder / PLOTS)
    return Ended(this.policy, this.rows, time.perf_counter() - began)


@contextmanager
def shown(progress: Progress, name: str, steps: int) -> Iterator[Note]:
    """A `note` that shows how far a run of so many steps is."""
    with progress.stage(name, steps) as advance:
        yield so_far(advance)


def device_of(ranks: Ranks) -> str:
    """Several ranks are for machines without a GPU."""
    return "cuda" if torch.cuda.is_available() and ranks.count == 1 else "cpu"


class _Run:
    def __init__(
        self, subject: Subject, teacher: Graph, data: DataSet, settings: Settings, folder: Path,
        asked: Any, ranks: Ranks, device: str,
    ):  # fmt: skip
        self.subject, self.settings, self.folder, self.ranks = subject, settings, folder, ranks
        self.training = settings.training(len(data))
        if min(self.training.batch, len(data)) % ranks.count:
            raise InputError("--train batch", self.training.batch, f"a multiple of {ranks.count}")
        self.course = Course(teacher, data, self.training, device)
        self.optimizer = torch.optim.Adam(subject.parameters.values(), settings.rate)
        self.policy = Policy(subject.allowed, self.training.steps, settings)
        self.rows: list[Row] = []
        self.shots: list[tuple[int, list[list[float]]]] = []
        self.key = digest([
            VERSION, asdict(settings), asked, data.digest,
            [float(np.sum(c, dtype=np.float64)) for c in teacher.constants.values()],
        ])  # fmt: skip
        self._resume()

    def step(self) -> None:
        """Draw, train, pay."""
        k = len(self.rows)
        drawn = self.policy.draw(k)
        delayed = k < round(self.settings.delay * self.training.steps)
        network = self.subject.network(drawn[0], delayed)
        taught = self.course.step(network, self.optimizer, k, self._gradients, self.ranks.part)
        loss, accuracy, *of_float = self.ranks.mean_of(*astuple(taught))
        # What the batch alone makes hard or easy says nothing about the plan.
        gained = {"loss": of_float[0] - loss, "accuracy": accuracy - of_float[1]}
        quality, shares = gained[self.settings.quality], self.subject.shares(drawn)
        away = gaps(shares)
        self.policy.learn(k, drawn, quality, away)
        self.rows.append({
            "step": k + 1, "loss": loss, "accuracy": accuracy,
            "reward": quality - self.settings.cost * float(away[0]),
            "entropy": self.policy.entropy(), "penalty": self.policy.penalty(k),
            **{f"{name} / target": float(share[0]) for name, share in shares.items()},
        })  # fmt: skip
        if (k + 1) % self.training.checkpoint == 0 or k + 1 == self.training.steps:
            self._save()

    def told(self) -> dict[str, Any]:
        """What the rows decide, their options, and the probabilities [shots, R, O]."""
        return {
            "rows": self.subject.rows, "options": self.subject.options,
            "steps": [step for step, _ in self.shots],
            "probabilities": [shot for _, shot in self.shots],
        }  # fmt: skip

    def _gradients(self) -> None:
        """Equal on all ranks, and no longer than allowed."""
        own = [p for p in self.subject.parameters.values() if p.grad is not None]
        self.ranks.mean(p.grad for p in own if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(own, self.settings.clip)

    def _save(self) -> None:
        probabilities: FloatArray = self.policy.probabilities()
        self.shots.append((len(self.rows), probabilities.round(4).tolist()))
        if self.ranks.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        told = {"rows": self.rows, "baseline": self.policy.baseline, "shots": self.shots}
        checkpoint.write(
            self.folder / CHECKPOINT, self._parameters, self._optimizers, self.key, told
        )
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.rows[0]))
        writer.writeheader()
        writer.writerows(self.rows)
        _write(self.folder / SCALARS, table.getvalue())
        _write(self.folder / POLICY, json.dumps(self.told()))

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if path.exists():
            told = checkpoint.read(path, self._parameters, self._optimizers, self.key)
            self.rows, self.policy.baseline = told["rows"], told["baseline"]
            self.shots = [(step, shot) for step, shot in told["shots"]]

    @property
    def _parameters(self) -> dict[str, Tensor]:
        return {**self.subject.parameters, "policy": self.policy.logits}

    @property
    def _optimizers(self) -> list[torch.optim.Adam]:
        return [self.optimizer, self.policy.optimizer]


def _write(path: Path, text: str) -> None:
    """Aside, then renamed."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)

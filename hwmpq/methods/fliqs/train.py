"""One-shot search: each step draws a plan, trains the shared weights under it, pays the policy.

What a run leaves in its folder: problem.json (the costs it was searched on, so that a run that
goes on is judged by the same), checkpoint.safetensors, scalars.csv, policy.json, and plots.html at
its end. A run that was killed goes on from its last checkpoint, on one process bit by bit as one
that was never stopped.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwmpq.data import DataSet
from hwmpq.errors import InputError
from hwmpq.graph import Graph
from hwmpq.methods.fliqs.policy import Policy, cost_gap
from hwmpq.methods.fliqs.ranks import Ranks, joined
from hwmpq.methods.fliqs.settings import Settings
from hwmpq.methods.fliqs.shared import Shared
from hwmpq.methods.fliqs.space import Space, space_of, with_blocks
from hwmpq.quantize import checkpoint
from hwmpq.quantize.finetune import Course
from hwmpq.quantizers import Quantizers
from hwmpq.report import training as plots
from hwmpq.search.evaluate import choice_of
from hwmpq.search.problem_file import read_problem, write_problem
from hwmpq.types import Assignment, FloatArray, Problem, digest

#: Part of a run's key: raise it when the search changes.
VERSION = 1
CHECKPOINT, PROBLEM, SCALARS, POLICY, PLOTS = (
    "checkpoint.safetensors", "problem.json", "scalars.csv", "policy.json", "plots.html"
)  # fmt: skip

Row = dict[str, float]


@dataclass(frozen=True, eq=False)
class Searched:
    """A finished run. rows: one per step; seconds: of this process, without what was resumed."""

    shared: Shared
    space: Space
    policy: Policy
    problem: Problem
    rows: list[Row]
    seconds: float

    @property
    def best(self) -> Assignment:
        """The most probable plan, whatever it costs: the paper's result."""
        return choice_of(self.problem, self.space.formats(self.policy.best()))

    def likelihood(self, problem: Problem) -> Problem:
        """The problem of the most probable plan within given budgets: losses are −log p. It is
        `best` wherever that is within them."""
        log_p = self.space.spread(self.policy.log_probabilities(), len(problem.formats))
        able = np.isfinite(log_p)
        legal = able if problem.legal is None else able & problem.legal
        # Adding 0.0: no negative zeros.
        return replace(
            problem, loss=np.where(able, -log_p, 0.0) + 0.0, legal=legal, pair_loss=None,
            ties=(*problem.ties, *self.problem.ties),
        )  # fmt: skip


def search(
    graph: Graph,
    problem: Problem,
    quantizers: Quantizers,
    data: DataSet,
    settings: Settings,
    folder: Path,
    asked: Any = None,
    note: Callable[[int, int], None] = lambda done, of: None,
) -> Searched:
    """Train on `data` towards the problem's budgets, or go on in `folder`.

    quantizers: calibrated for all formats of the problem; its losses are not looked at. asked: JSON
    that tells this run from others in its folder, beside model, menu, data and settings.
    Raises InputError without a budget, for a folder of another run, and where the loss is no number
    any more.
    """
    if not problem.budgets:
        raise InputError(
            "one-shot search without a target", None,
            ["--latency", "--max-size", "--max-bops"], "Its reward compares costs with targets.",
        )  # fmt: skip
    began = time.perf_counter()
    with joined() as ranks:
        run = _Run(graph, problem, quantizers, data, settings, folder, asked, ranks)
        while len(run.rows) < run.training.steps:
            run.step()
            note(len(run.rows), run.training.steps)
        run.finish()
    seconds = time.perf_counter() - began
    return Searched(run.shared, run.space, run.policy, run.problem, run.rows, seconds)


class _Run:
    def __init__(
        self, graph: Graph, problem: Problem, quantizers: Quantizers, data: DataSet,
        settings: Settings, folder: Path, asked: Any, ranks: Ranks,
    ):  # fmt: skip
        self.settings, self.folder, self.ranks = settings, folder, ranks
        self.training = settings.training(len(data))
        if min(self.training.batch, len(data)) % ranks.count:
            raise InputError("--train batch", self.training.batch, f"a multiple of {ranks.count}")
        # Several ranks are for machines without a GPU.
        device = "cuda" if torch.cuda.is_available() and ranks.count == 1 else "cpu"
        self.shared = Shared(graph, quantizers, device)
        self.course = Course(graph, data, self.training, device)
        self.optimizer = torch.optim.Adam(self.shared.parameters.values(), settings.rate)
        # Losses are what training finds out.
        none = np.zeros((len(problem.layers), len(problem.formats)))
        costs = replace(problem, loss=none, pair_loss=None)
        self.problem = self._kept(
            with_blocks(costs, graph) if settings.decide == "block" else costs
        )
        self.space = space_of(self.problem, settings.separate)
        self.policy = Policy(self.space.allowed, self.training.steps, settings)
        self.rows: list[Row] = []
        self.shots: list[tuple[int, list[list[float]]]] = []
        self.key = digest([
            VERSION, asdict(settings), problem.layers, problem.formats, sorted(problem.budgets),
            asked, data.digest,
            [float(np.sum(c, dtype=np.float64)) for c in self.shared.graph.constants.values()],
        ])  # fmt: skip
        self._resume()

    def step(self) -> None:
        """Draw, train, pay."""
        k = len(self.rows)
        drawn = self.policy.draw(k)
        plan = self.space.formats(drawn)
        delayed = k < round(self.settings.delay * self.training.steps)
        simulator = self.shared.simulator(choice_of(self.problem, plan), delayed)
        loss, accuracy = self.ranks.mean_of(
            *self.course.step(simulator, self.optimizer, k, self._gradients, self.ranks.part)
        )
        costs = cost_gap(self.problem, plan)
        reward = self.policy.reward(-loss if self.settings.quality == "loss" else accuracy, costs)
        self.policy.learn(k, drawn, reward)
        self.rows.append({
            "step": k + 1, "loss": loss, "accuracy": accuracy, "reward": reward,
            "entropy": self.policy.entropy(), "penalty": self.policy.penalty(k),
            **{f"{name} / target": cost for name, cost in costs.items()},
        })  # fmt: skip
        if (k + 1) % self.training.checkpoint == 0 or k + 1 == self.training.steps:
            self._save()

    def finish(self) -> None:
        """The plots."""
        if self.ranks.rank == 0:
            plots.html(self.rows, self._policy(), self.folder / PLOTS)

    def _gradients(self) -> None:
        """Equal on all ranks, and no longer than allowed."""
        own = [p for p in self.shared.parameters.values() if p.grad is not None]
        self.ranks.mean(p.grad for p in own if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(own, self.settings.clip)

    def _kept(self, problem: Problem) -> Problem:
        """What the run in this folder began with, or this problem for a new one."""
        path = self.folder / PROBLEM
        if (self.folder / CHECKPOINT).exists():
            return read_problem(path)
        if self.ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_problem(problem, path)
        return problem

    def _policy(self) -> dict[str, Any]:
        """What the rows decide, their options, and the probabilities [shots, R, O]."""
        decisions = [
            ", ".join(self.problem.layers[i] for i in np.flatnonzero(self.space.of_layer == d))
            for d in range(int(self.space.of_layer.max()) + 1)
        ]
        words = [""] if self.space.format_of is None else [" (weights)", " (activations)"]
        return {
            "rows": [name + word for word in words for name in decisions],
            "options": [
                self.space.options(self.problem, axis)
                for axis in range(len(words)) for _ in decisions
            ],
            "steps": [step for step, _ in self.shots],
            "probabilities": [shot for _, shot in self.shots],
        }  # fmt: skip

    def _save(self) -> None:
        probabilities: FloatArray = self.policy.probabilities()
        self.shots.append((len(self.rows), probabilities.round(4).tolist()))
        if self.ranks.rank:
            return
        told = {"rows": self.rows, "baseline": self.policy.baseline, "shots": self.shots}
        checkpoint.write(
            self.folder / CHECKPOINT, self._parameters, self._optimizers, self.key, told
        )
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.rows[0]))
        writer.writeheader()
        writer.writerows(self.rows)
        _write(self.folder / SCALARS, table.getvalue())
        _write(self.folder / POLICY, json.dumps(self._policy()))

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if path.exists():
            told = checkpoint.read(path, self._parameters, self._optimizers, self.key)
            self.rows, self.policy.baseline = told["rows"], told["baseline"]
            self.shots = [(step, shot) for step, shot in told["shots"]]

    @property
    def _parameters(self) -> dict[str, torch.Tensor]:
        return {**self.shared.parameters, "policy": self.policy.logits}

    @property
    def _optimizers(self) -> list[torch.optim.Adam]:
        return [self.optimizer, self.policy.optimizer]


def _write(path: Path, text: str) -> None:
    """Aside, then renamed."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)

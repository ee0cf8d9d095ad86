"""The search for formats: one network's weights, trained under every plan that is drawn.

problem.json joins what a run leaves in its folder: the costs it was searched on, so that a run that
goes on is judged by the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hwmpq.data import DataSet
from hwmpq.errors import InputError
from hwmpq.graph import Graph
from hwmpq.methods.fliqs import loop
from hwmpq.methods.fliqs.policy import shares
from hwmpq.methods.fliqs.ranks import Ranks, joined
from hwmpq.methods.fliqs.searched import Searched
from hwmpq.methods.fliqs.settings import Settings
from hwmpq.methods.fliqs.shared import Shared
from hwmpq.methods.fliqs.space import IntArray, Space, space_of, with_blocks
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.search.evaluate import choice_of
from hwmpq.search.problem_file import read_problem, write_problem
from hwmpq.types import BoolArray, FloatArray, Problem

PROBLEM = "problem.json"


def search(
    graph: Graph,
    problem: Problem,
    quantizers: Quantizers,
    data: DataSet,
    settings: Settings,
    folder: Path,
    asked: Any = None,
    note: loop.Note = lambda done, of: None,
) -> Searched:
    """Train on `data` towards the problem's budgets, or go on in `folder`.

    quantizers: calibrated for all formats of the problem; its losses are not looked at. asked: JSON
    that tells this run from others in its folder, beside model, menu, data and settings.
    Raises InputError without a budget, and as `run` does.
    """
    if not problem.budgets:
        raise InputError(
            "one-shot search without a target", None,
            ["--latency", "--max-size", "--max-bops"], "Its reward compares costs with targets.",
        )  # fmt: skip
    with joined() as ranks:
        device = loop.device_of(ranks)
        shared = Shared(graph, quantizers, device)
        # Losses are what training finds out.
        none = np.zeros((len(problem.layers), len(problem.formats)))
        costs = replace(problem, loss=none, pair_loss=None)
        if settings.decide == "block":
            costs = with_blocks(costs, graph)
        plans = _Plans(shared, _kept(costs, folder, ranks), settings.separate)
        of_problem = [problem.layers, problem.formats, sorted(problem.budgets)]
        ended = loop.run(
            plans, shared.graph, data, settings, folder, [of_problem, asked], ranks, device, note
        )
    return Searched(shared, plans.space, ended.policy, plans.problem, ended.rows, ended.seconds)


def _kept(problem: Problem, folder: Path, ranks: Ranks) -> Problem:
    """What the run in this folder began with, or this problem for a new one."""
    path = folder / PROBLEM
    if (folder / loop.CHECKPOINT).exists():
        return read_problem(path)
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_problem(problem, path)
    return problem


class _Plans:
    """The `Subject` of such a search."""

    def __init__(self, shared: Shared, problem: Problem, separate: bool):
        self.shared, self.problem = shared, problem
        self.space: Space = space_of(problem, separate)
        self._halves = [" (weights)", " (activations)"] if separate else [""]

    @property
    def allowed(self) -> BoolArray:
        return self.space.allowed

    @property
    def _decisions(self) -> list[str]:
        return [
            ", ".join(self.problem.layers[i] for i in np.flatnonzero(self.space.of_layer == d))
            for d in range(int(self.space.of_layer.max()) + 1)
        ]

    @property
    def rows(self) -> list[str]:
        return [name + half for half in self._halves for name in self._decisions]

    @property
    def options(self) -> list[list[str]]:
        return [
            self.space.options(self.problem, axis)
            for axis in range(len(self._halves)) for _ in self._decisions
        ]  # fmt: skip

    @property
    def parameters(self) -> dict[str, Tensor]:
        return self.shared.parameters

    def shares(self, drawn: IntArray) -> dict[str, FloatArray]:
        return shares(self.problem, self.space.formats(drawn))

    def network(self, drawn: IntArray, delayed: bool) -> Simulator:
        plan = choice_of(self.problem, self.space.formats(drawn))
        return self.shared.simulator(plan, delayed)

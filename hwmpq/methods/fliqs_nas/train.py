"""The search for an architecture and its formats, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwmpq.data import DataSet
from hwmpq.errors import InputError
from hwmpq.frontend.torch_export import trace
from hwmpq.graph import Graph
from hwmpq.methods.fliqs import loop
from hwmpq.methods.fliqs.policy import Policy
from hwmpq.methods.fliqs.ranks import joined
from hwmpq.methods.fliqs.searched import most_probable
from hwmpq.methods.fliqs.settings import Settings
from hwmpq.methods.fliqs.space import IntArray, Space
from hwmpq.methods.fliqs_nas.drawn import Drawn
from hwmpq.methods.fliqs_nas.found import Found, taken
from hwmpq.methods.fliqs_nas.network import Architecture
from hwmpq.methods.fliqs_nas.prices import Prices
from hwmpq.methods.fliqs_nas.shared import SharedWeights
from hwmpq.methods.fliqs_nas.space import graph_of
from hwmpq.search import solve
from hwmpq.stages.choose import infeasible
from hwmpq.types import BoolArray, FloatArray, Problem

#: Training from the start: longer and with larger steps than for formats alone.
DEFAULTS = Settings(epochs=60.0, rate=3e-3)
#: Images that the BatchNorms of what was found get their statistics from.
STATISTICS = 2048


def search(
    teacher: Graph, prices: Prices, legal: BoolArray, budgets: Mapping[str, float], data: DataSet,
    settings: Settings, folder: Path, asked: Any = None,
    note: loop.Note = lambda done, of: None,
) -> Found:  # fmt: skip
    """Train on `data` towards the budgets, or go on in `folder`.

    teacher: whose answers are learned beside the labels; legal: [slots, formats]. The architecture
    is the most probable one, its formats the most probable ones within the budgets.
    Raises InputError without a budget or for separate decisions, InfeasibleError where that
    architecture is too large in any formats, and as `run` does.
    """
    if not budgets:
        raise InputError("search for a network without a target", None,
                         ["--latency", "--max-size", "--max-bops"])  # fmt: skip
    if settings.separate:
        raise InputError("--train separate", settings.separate, "false, to search for a network")
    training = settings.training(len(data))
    with joined() as ranks:
        device = loop.device_of(ranks)
        images = torch.from_numpy(data.batch(range(min(STATISTICS, len(data)))))
        shared = SharedWeights(prices.space, prices.formats, images, settings.seed, device)
        networks = _Networks(shared, prices, legal, budgets, settings.decide == "block")
        of_space = [repr(prices.space), prices.formats, legal.tolist(), dict(budgets)]
        ended = loop.run(
            networks, teacher, data, settings, folder, [of_space, asked], ranks, device, note
        )
    architecture, problem, log_p = networks.best(ended.policy)
    solution = most_probable(problem, log_p, solve)
    if not solution.choice:
        raise infeasible(problem, solution)
    module = taken(shared, architecture, solution.choice, torch.split(images, training.batch))
    graph = trace(module, (images[:1],))
    told = {
        "steps": len(ended.rows), "seconds": ended.seconds, "entropy": ended.policy.entropy(),
        "architecture": asdict(architecture),
    }  # fmt: skip
    return Found(shared, architecture, module, graph, problem, log_p, solution, told)


class _Networks:
    """The `Subject`: rows of formats, one of each layer or block, then those of the space."""

    def __init__(
        self, shared: SharedWeights, prices: Prices, legal: BoolArray,
        budgets: Mapping[str, float], blocks: bool,
    ):  # fmt: skip
        self.shared, self.prices, self.budgets = shared, prices, budgets
        self.space = prices.space
        owners = [_block(name) if blocks else name for name in prices.slots]
        self._decisions = list(dict.fromkeys(owners))
        self._of_slot = np.array([self._decisions.index(owner) for owner in owners], np.intp)
        own = [legal[self._of_slot == d].all(0) for d in range(len(self._decisions))]
        widths = [len(prices.formats), *map(len, self.space.options)]
        self._allowed = np.zeros((len(own) + len(self.space.options), max(widths)), bool)
        self._allowed[: len(own), : len(prices.formats)] = own
        for row, options in zip(self._allowed[len(own) :], self.space.options, strict=True):
            row[: len(options)] = True

    @property
    def allowed(self) -> BoolArray:
        return self._allowed

    @property
    def rows(self) -> list[str]:
        return [*self._decisions, *self.space.rows]

    @property
    def options(self) -> list[list[str]]:
        formats = [list(self.prices.formats) for _ in self._decisions]
        return formats + [[str(option) for option in options] for options in self.space.options]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return self.shared.parameters

    def shares(self, drawn: IntArray) -> dict[str, FloatArray]:
        formats, picks = drawn[:, self._of_slot], drawn[:, len(self._decisions) :]
        return {
            name: self.prices.costs(name, picks, formats) / budget
            for name, budget in self.budgets.items()
        }

    def network(self, drawn: IntArray, delayed: bool) -> Drawn:
        architecture = self.space.architecture(drawn[len(self._decisions) :])
        graph = graph_of(architecture, self.space.image[1:])
        formats = dict(zip(self.prices.slots, drawn[self._of_slot], strict=True))
        plan = {node.name: self.prices.formats[formats[node.name]] for node in graph.layers}
        return Drawn(self.shared, graph, plan, delayed)

    def best(self, policy: Policy) -> tuple[Architecture, Problem, FloatArray]:
        """The most probable architecture, the problem of its formats, and their log p, [L, F]."""
        picks = policy.best()[len(self._decisions) :]
        problem = replace(self.prices.problem(picks), budgets=dict(self.budgets))
        of_layer = self._of_slot[[self.prices.slots.index(name) for name in problem.layers]]
        groups = [np.flatnonzero(of_layer == d) for d in np.unique(of_layer)]
        ties = [tuple(problem.layers[i] for i in group) for group in groups if len(group) > 1]
        log_p = policy.log_probabilities()[:, : len(problem.formats)]
        own = Space(self.allowed, of_layer).spread(log_p, len(problem.formats))
        return self.space.architecture(picks), replace(problem, ties=tuple(ties)), own


def _block(layer: str) -> str:
    """'stages.1.0.expand.conv' -> 'stages.1.0'; others are blocks of their own."""
    return ".".join(layer.split(".")[:3]) if layer.startswith("stages.") else layer

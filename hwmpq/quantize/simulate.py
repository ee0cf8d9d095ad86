"""The simulator: what the compiled artifact computes for an assignment, in torch on the CPU.

Every tensor is held as it is *stored* (`StoragePlan.stored`), re-encoded to what each reader
demands (`StoragePlan.demand`), and dropped behind its last reader. How numbers are computed is
`exact` (the judge of parity and accuracy: integer accumulators, single fp32 products) or `fast`
(differentiable); this file only walks the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hwmpq.errors import InputError
from hwmpq.graph import Graph, Node
from hwmpq.quantize.exact import Exact
from hwmpq.quantize.fast import Fast
from hwmpq.quantize.feed import Inputs, named, samples
from hwmpq.quantize.interpret import Constants, Param
from hwmpq.quantize.rebatch import rebatch
from hwmpq.quantizers import Quantizers
from hwmpq.resolve import Resolved, resolve

Observe = Callable[[str, Tensor], None]
Mode = Literal["exact", "fast"]


class Arithmetic(Protocol):
    """How a mode computes; documented in `Exact`."""

    def store(self, tensor: str, value: Tensor) -> Tensor: ...
    def read(self, node: Node, index: int, held: Tensor) -> Tensor: ...
    def layer(self, node: Node, args: Sequence[Tensor]) -> Tensor: ...
    def glue(self, node: Node, args: Sequence[Tensor]) -> Tensor: ...


@dataclass
class State:
    """A run between two nodes: `at` is the next node's index, `held` the tensors still needed."""

    batch: int
    at: int
    held: dict[str, Tensor]

    def copy(self) -> State:
        """An independent continuation; the tensors are shared, nothing writes into them."""
        return State(self.batch, self.at, dict(self.held))


class Simulator:
    """Runs a graph under an assignment.

    quantizers: scales, zero points and rounded weights (`calibrate`). parameters: constants that
    replace the graph's in mode 'fast' (name -> tensor; gradients reach them). device: where mode
    'fast' computes. arithmetic: what computes, instead of the mode's own (training has others).
    Raises InputError when assignment, layers and quantizers do not fit together.
    """

    def __init__(
        self,
        graph: Graph,
        assignment: Mapping[str, str],
        quantizers: Quantizers,
        mode: Mode = "exact",
        parameters: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
        arithmetic: Callable[[Resolved, Param], Arithmetic] | None = None,
    ):
        if mode not in ("exact", "fast"):
            raise InputError("mode of the simulator", mode, ["exact", "fast"])
        if parameters and mode == "exact":
            raise InputError("parameters in mode exact", None, None, "Its weights are quantizers'.")
        self.resolved = resolve(graph, assignment, quantizers)
        self.graph = graph = self.resolved.graph
        constants = Constants(graph, device)

        def param(name: str) -> Tensor:
            return parameters[name] if parameters and name in parameters else constants(name)

        self._does: Arithmetic
        if arithmetic is not None:
            self._does = arithmetic(self.resolved, param)
        elif mode == "exact":
            self._does = Exact(self.resolved, param)
        else:
            self._does = Fast(self.resolved, param, parameters or ())
        readers = {t: i for i, node in enumerate(graph.nodes) for t in node.inputs}
        self._drop: list[list[str]] = [[] for _ in graph.nodes]
        for tensor, index in readers.items():
            if tensor not in graph.outputs:
                self._drop[index].append(tensor)

    def __call__(self, inputs: Inputs, observe: Observe | None = None) -> list[Tensor]:
        """fp32 outputs in the order of `graph.outputs`.

        observe: called with every tensor's name and what is stored of it: codes in mode 'exact' if
        it is an integer, else values.
        """
        state = self.begin(inputs, observe)
        self.advance(state, observe=observe)
        return self.outputs(state)

    def begin(self, inputs: Inputs, observe: Observe | None = None) -> State:
        """The state before the first node."""
        held = {}
        for name, value in named(self.graph, inputs).items():
            held[name] = self._does.store(name, value)
            if observe:
                observe(name, held[name])
        return State(samples(inputs), 0, held)

    def advance(
        self, state: State, stop: int | None = None, observe: Observe | None = None
    ) -> None:
        """Run the nodes from `state.at` up to, not including, `stop` (all by default)."""
        nodes = rebatch(self.graph, state.batch).nodes
        for index in range(state.at, len(nodes) if stop is None else stop):
            node, args = nodes[index], self.operands(state)
            result = (self._does.layer if node.is_layer else self._does.glue)(node, args)
            if observe:
                observe(node.name, result)
            state.held[node.name] = result
            for tensor in self._drop[index]:
                state.held.pop(tensor, None)
            state.at = index + 1

    def operands(self, state: State) -> list[Tensor]:
        """What the next node reads, in the encodings it demands."""
        node = self.graph.nodes[state.at]
        return [
            self._does.read(node, i, state.held[tensor]) for i, tensor in enumerate(node.inputs)
        ]

    def outputs(self, state: State) -> list[Tensor]:
        """The outputs of a finished run."""
        return [state.held[name] for name in self.graph.outputs]

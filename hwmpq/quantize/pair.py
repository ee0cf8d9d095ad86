"""A float and a rounded run of the same images, side by side, node by node.

What corrections and reconstructions work on: they change the rounded run's weights and biases as it
goes along, so that each layer sees what its corrected predecessors really hand on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from hwmpq.graph import Graph, Node
from hwmpq.quantize.fast import Fast
from hwmpq.quantize.feed import Inputs
from hwmpq.quantize.interpret import Constants, Param, linear_part
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.resolve import Resolved


class Adjusted(Fast):
    """Mode 'fast' with weights and biases, by layer, that may change between two calls."""

    def __init__(
        self,
        resolved: Resolved,
        param: Param,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
    ):
        super().__init__(resolved, param)
        self._weights, self._biases = weights, biases

    def weight(self, node: Node) -> Tensor:
        """The adjusted weight, else the quantizers'."""
        own = self._weights.get(node.name)
        return super().weight(node) if own is None else own

    def bias(self, node: Node) -> Tensor:
        """The adjusted bias, else the quantizers'."""
        own = self._biases.get(node.name)
        return super().bias(node) if own is None else own


class Pair:
    """weights, biases: layer -> tensor, to be written; floats, rounded: the runs' states, one per
    batch, which stand before the same node between two calls."""

    def __init__(
        self,
        graph: Graph,
        assignment: Mapping[str, str],
        quantizers: Quantizers,
        batches: Sequence[Inputs],
    ):
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        everywhere = dict.fromkeys(assignment, "fp32")
        self.float = Simulator(graph, everywhere, quantizers, "fast")
        adjusted = partial(Adjusted, weights=self.weights, biases=self.biases)
        self.rounded = Simulator(graph, assignment, quantizers, "fast", arithmetic=adjusted)
        self.graph = self.rounded.graph
        self.constants = Constants(self.graph)
        self.float_states = [self.float.begin(batch) for batch in batches]
        self.rounded_states = [self.rounded.begin(batch) for batch in batches]

    def products(self, node: Node, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch, for a conv2d or linear both runs stand before: float's sums of products, and
        those of the rounded inputs with `weight`; both without bias."""
        own = self.constants(node.params["weight"])
        for f, r in zip(self.float_states, self.rounded_states, strict=True):
            x, y = self.float.operands(f)[0], self.rounded.operands(r)[0]
            yield linear_part(node, x, own), linear_part(node, y, weight)

    def advance_float(self, stop: int) -> None:
        """Run float up to the node with this index."""
        for state in self.float_states:
            self.float.advance(state, stop)

    def advance_rounded(self, stop: int) -> None:
        """Run the rounded network up to the node with this index."""
        for state in self.rounded_states:
            self.rounded.advance(state, stop)

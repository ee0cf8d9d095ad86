"""One network's weights under every plan.

Memory: one model. A step holds the weights, their gradients and two moments, whatever the menu;
each format adds its scales, and one byte per weight of its calibration. There are no branches: a
plan is a way to round the same weights.

BatchNorms are folded before the search begins, into weights and biases that go on being trained.
So there are no statistics that formats would have to share, and none to estimate again: what a
plan's rounding shifts, the biases learn.

Integer scales are learned, one per (layer, weight encoding) and (tensor, encoding), from the range
of least squared error: a narrow format is not led astray by what a wide one needs. Small floats
keep the scale of their calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hwmpq.formats import format_named
from hwmpq.graph import Graph
from hwmpq.quantize.finetune import fixed_roots, log_step, settled, trained_constants
from hwmpq.quantize.learned import Learned
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers


class Wide(Learned):
    """`Learned` while the activations' rounding is still delayed: only weights are rounded."""

    def _rounded(self, tensor: str, value: Tensor, encoding: str) -> Tensor:
        return value


class Shared:
    """The trained parameters. quantizers: calibrated for every format of the menu."""

    def __init__(self, graph: Graph, quantizers: Quantizers, device: torch.device | str = "cpu"):
        self.graph, self.device = quantizers.graph(graph), device
        # A correction belongs to one format's rounding; the shared biases learn instead.
        self._start = replace(quantizers, biases={})
        self._constants = {
            name: torch.tensor(value, device=device).requires_grad_()
            for name, value in trained_constants(self.graph).items()
        }
        self._weight_steps: dict[tuple[str, str], Tensor] = {}
        for (layer, name), weight in sorted(quantizers.weights.items()):
            fmt = format_named(name)
            if fmt.weight.kind == "int" and fmt.group is None and weight.scale is not None:
                key = layer, fmt.weight.name
                self._weight_steps.setdefault(key, log_step(weight.scale, device))
        fixed = fixed_roots(self.graph)
        self._steps = {
            key: log_step(quantizer.scale, device)
            for key, quantizer in sorted(quantizers.activations.items())
            if key[0] not in fixed
        }

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All that is trained, by a name that a file can hold."""
        return {
            **{f"{name}|constant": p for name, p in self._constants.items()},
            **{f"{'|'.join(key)}|weight step": p for key, p in self._weight_steps.items()},
            **{f"{'|'.join(key)}|step": p for key, p in self._steps.items()},
        }

    def simulator(self, assignment: Mapping[str, str], delayed: bool = False) -> Simulator:
        """The network under an assignment, in mode 'fast'. delayed: activations are not rounded."""
        make = partial(
            Wide if delayed else Learned, trained=self._constants,
            weight_steps=self._weight_steps_of(assignment), steps=self._steps,
        )  # fmt: skip
        return Simulator(
            self.graph, assignment, self._start, "fast", self._constants, self.device, make
        )

    def quantizers(self, assignment: Mapping[str, str]) -> Quantizers:
        """The numbers of an assignment as they are now, without any further training."""
        return settled(
            self.graph, assignment, self._start, self._constants,
            self._weight_steps_of(assignment), self._steps,
        )  # fmt: skip

    def _weight_steps_of(self, assignment: Mapping[str, str]) -> dict[str, Tensor]:
        found = {}
        for layer, name in assignment.items():
            fmt = format_named(name)
            step = self._weight_steps.get((layer, fmt.weight.name))
            if fmt.group is None and step is not None:
                found[layer] = step
        return found

"""One set of weights for all architectures and formats.

Memory: one model, the largest. A drawn architecture computes with slices of its parameters.

BatchNorms keep the statistics of each batch while they train: whatever channels, kernels and
formats lie before one, what comes behind is alike. So a tensor's range hardly depends on what was
drawn, and its integer scale is learned once per encoding. What was found gets statistics of its
own, from training images under its own formats, when it is taken out (`found.taken`).

A weight's integer scale is a learned share of each channel's largest weight, so that it follows the
slice. As scales are per channel, a BatchNorm folded into the rounded weights changes the scales and
no code: what was trained is what is built.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable

import numpy as np
import torch
from torch import Tensor

from hwmpq.formats import Format, encoding_named, format_named
from hwmpq.methods.fliqs_nas.network import Network
from hwmpq.methods.fliqs_nas.space import ArchitectureSpace, graph_of
from hwmpq.quantize.fast import straight_through
from hwmpq.quantize.learned import stepped
from hwmpq.requantize import Quantizer
from hwmpq.storage import is_integer

Key = tuple[str, str]
#: Where ranges begin: behind ReLU6; behind a BatchNorm alone, in deviations; of means of ReLU6.
_RANGES = {"relu": (0.0, 6.0), "norm": (-4.0, 4.0), "mean": (0.0, 3.0)}


class SharedWeights:
    """The parameters. formats: the menu; images: for the range of the input."""

    def __init__(
        self, space: ArchitectureSpace, formats: Iterable[str], images: Tensor, seed: int,
        device: str = "cpu",
    ):  # fmt: skip
        self.space, self.device = space, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start = Network(space.largest)
        self._weights = {name: _trained(p, device) for name, p in start.named_parameters()}
        menu = [format_named(name) for name in formats]
        graph = graph_of(space.largest, space.image[1:])
        self._weight_steps = {
            (node.name, fmt.weight.name): _trained(math.log(1 - 1 / (fmt.weight.qmax + 1)), device)
            for node in graph.layers for fmt in menu if _learns(fmt)
        }  # fmt: skip
        reads = {fmt.activation.name for fmt in menu}
        # Residual operands between integer layers.
        encodings = sorted({e for e in reads if is_integer(e)} | {"u8"})
        low, high = float(images.min()), float(images.max())
        ranges = {"x": (min(low, 0.0), max(high, 0.0)), "mean": _RANGES["mean"]}
        for node in graph.layers:
            ranges[node.name] = _RANGES["relu" if node.attrs["act"] else "norm"]
        self._zeros: dict[Key, int] = {}
        self._steps: dict[Key, Tensor] = {}
        for tensor, (low, high) in ranges.items():
            for name in encodings:
                scale = (high - low) / float(encoding_named(name).qmax)
                self._zeros[tensor, name] = round(-low / scale)
                self._steps[tensor, name] = _trained(math.log(scale), device)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All that is trained, by a name that a file can hold."""
        return {
            **{f"{name}|weight": p for name, p in self._weights.items()},
            **{f"{'|'.join(key)}|weight step": p for key, p in self._weight_steps.items()},
            **{f"{'|'.join(key)}|step": p for key, p in self._steps.items()},
        }

    def part(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The slice of a parameter: the first channels, the middle of a kernel."""
        whole = self._weights[name]
        kernel = zip(whole.shape[2:], shape[2:], strict=True)
        return whole[(*map(slice, shape[:2]), *(_middle(n, m) for n, m in kernel))]

    def weight_scale(self, layer: str, fmt: Format, weight: Tensor) -> Tensor | None:
        """Of a layer's weight in a format, [out]; None where it is not learned."""
        if not _learns(fmt):
            return None
        scale: Tensor = fmt.max_scale(weight.detach())
        return scale * self._weight_steps[layer, fmt.weight.name].exp()

    def rounded(self, tensor: str, value: Tensor, encoding: str) -> Tensor:
        """A tensor's values in an encoding."""
        if encoding == "fp32":
            return value
        kind = encoding_named(encoding)
        if not is_integer(encoding):
            return straight_through(value, kind.fake(value))
        key = tensor, encoding
        return stepped(value, self._steps[key].exp(), self._zeros[key], kind)

    def activations(self, tensors: Container[str]) -> dict[Key, Quantizer]:
        """The quantizers of these tensors."""
        return {
            key: Quantizer(float(np.float32(step.detach().exp().item())), self._zeros[key])
            for key, step in self._steps.items() if key[0] in tensors
        }  # fmt: skip


def _trained(value: Tensor | float, device: str) -> Tensor:
    start = torch.as_tensor(value, dtype=torch.float32).detach()
    return start.to(device, copy=True).requires_grad_()


def _learns(fmt: Format) -> bool:
    """Is the scale of its weights learned?"""
    return fmt.weight.kind == "int" and fmt.group is None


def _middle(whole: int, part: int) -> slice:
    start = (whole - part) // 2
    return slice(start, start + part)

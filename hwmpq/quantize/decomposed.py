"""A model with its number formats as a torch.export program in PT2E's operators: `exported`.

PT2E, torch's quantization of exported programs, writes float operators between
`quantized_decomposed.quantize_*` and `dequantize_*` with ranges, scales and zero points of their
own, so formats may differ from layer to layer. Weights are stored as their codes. Floats of 16 and
8 bits, which it has no operator for, are conversions there and back. As in `export.onnx_qdq`, a
residual is added before rounding instead of after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwmpq.errors import InputError
from hwmpq.formats import Format, encoding_named
from hwmpq.graph import Graph, Node
from hwmpq.quantize.fast import Fast
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.storage import is_integer

_TYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}  # fmt: skip


def exported(
    graph: Graph, assignment: Mapping[str, str], quantizers: Quantizers
) -> torch.export.ExportedProgram:
    """The program, for inputs of the graph's shapes.

    Raises InputError where torch lacks the operators or a type for an activation's encoding, and
    when assignment, layers and quantizers do not fit together.
    """
    try:
        from torch.ao.quantization.fx import _decomposed  # noqa: F401 (it registers the operators)
    except ImportError as error:
        raise InputError("this torch has no PT2E operators", torch.__version__) from error
    module = _Module(Simulator(graph, assignment, quantizers, arithmetic=_Decomposed)).eval()
    example = tuple(torch.zeros(graph.tensors[name]) for name in graph.inputs)
    with torch.no_grad():
        module(*example)  # constants are made now: none is to be made by the traced program
        return torch.export.export(module, example)


class _Module(nn.Module):
    """A simulator to be traced."""

    def __init__(self, simulator: Simulator):
        super().__init__()
        self.simulator = simulator

    def forward(self, *inputs: Tensor) -> Any:
        names = self.simulator.graph.inputs
        found = self.simulator(dict(zip(names, inputs, strict=True)))
        return found[0] if len(found) == 1 else tuple(found)


class _Decomposed(Fast):
    """The arithmetic of mode 'fast', in PT2E's operators."""

    def weight(self, node: Node) -> Tensor:
        """What decodes a conv2d's or linear's weight."""
        layer = self._resolved.layers[node.name]
        fmt, rounded = layer.format, layer.weight
        assert rounded is not None
        codes = self._kept(node, "codes", lambda: _codes(fmt, rounded.codes))
        if rounded.scale is None:
            return codes.float()
        shape = rounded.codes.shape
        scale = self._kept(node, "scale", lambda: _channels(rounded.scale, len(codes)))
        zero = self._kept(node, "zero", lambda: torch.zeros(scale.shape, dtype=torch.int32))
        return _decoded(fmt, codes, scale, zero)[:, : math.prod(shape[1:])].reshape(shape)

    def bias(self, node: Node) -> Tensor:
        """A layer's bias, in the steps of an integer accumulator."""
        layer = self._resolved.layers[node.name]
        if layer.bias_steps is None:
            return super().bias(node)
        codes, step = layer.bias_steps
        return self._kept(node, "bias", lambda: codes.astype(np.float32) * step)

    def _kept(self, node: Node, role: str, make: Callable[[], Any]) -> Tensor:
        if (node.name, role) not in self._own:
            made = make()
            self._own[node.name, role] = made if isinstance(made, Tensor) else _tensor(made)
        return self._own[node.name, role]

    def _rounded(self, tensor: str, value: Tensor, encoding: str) -> Tensor:
        if encoding == "fp32":
            return value
        kind = encoding_named(encoding)
        if is_integer(encoding):
            q = self._resolved.quantizer(tensor, encoding)
            dtype = torch.int8 if kind.qmin < 0 else torch.uint8
            how = q.scale, q.zero, int(kind.qmin), int(kind.qmax), dtype
            ops = torch.ops.quantized_decomposed
            found: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(value, *how), *how)
            return found
        if encoding not in _TYPES:
            raise InputError(
                f"torch has no type for tensor {tensor!r}", encoding, ["integers", "fp32", *_TYPES],
                "Choose another format for the layers that read it.",
            )  # fmt: skip
        return value.clamp(kind.qmin, kind.qmax).to(_TYPES[encoding]).float()


def _codes(fmt: Format, codes: Any) -> Tensor:
    """Codes of a weight: int8 or narrow floats; with a scale as rows, whole groups of them."""
    if fmt.weight.kind == "int":
        values = _tensor(codes)
    else:  # floats of less than 8 bits are all e4m3 numbers
        narrow = torch.float8_e4m3fn if fmt.weight.bits < 8 else torch.float32
        values = _tensor(fmt.weight.dequantize(codes)).to(_TYPES.get(fmt.weight.name, narrow))
    if not fmt.weight.scaled:
        return values
    rows = values.flatten(1)
    return F.pad(rows, (0, -rows.shape[1] % (fmt.group or 1)))


def _decoded(fmt: Format, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """fp32 rows."""
    if fmt.weight.kind == "float":
        per_group = scale.reshape(len(codes), -1, 1)
        blocks = codes.float().reshape(*per_group.shape[:2], -1)
        return (blocks * per_group).flatten(1)
    ops, ends = torch.ops.quantized_decomposed, (int(fmt.weight.qmin), int(fmt.weight.qmax))
    found: Tensor
    if fmt.group is None:
        found = ops.dequantize_per_channel(codes, scale, zero, 0, *ends, torch.int8)
    else:
        found = ops.dequantize_per_channel_group(
            codes, scale, zero, *ends, torch.int8, fmt.group, torch.float32
        )
    return found


def _channels(scale: Any, channels: int) -> Any:
    """One scale per channel where one is for all."""
    return np.broadcast_to(scale, (channels,)) if np.ndim(scale) == 0 else scale


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.require(array, None, ["C", "W"]))

"""The canonical graph with its number formats as an ONNX model in Q/DQ form: `qdq_model`.

Every operator stays a float operator; what the storage rule rounds stands between them, computed
from the numbers that simulator and lowering use:
  integer tensors     QuantizeLinear, DequantizeLinear; behind a Clip where the ONNX type is wider
                      (less than 8 bits, and the signed encodings, which are narrow)
  float tensors       Cast there and back, which saturates in fp8; a Clip does it for bf16 and fp16
  weights             DequantizeLinear of their codes, per channel or in blocks; Cast of bf16, fp16
  bias                behind an integer accumulator int32 codes in the accumulator's own steps
A runtime may fuse this into integer kernels; where it does not, it computes the same in fp32. Two
things differ from the simulator in the last place: a runtime divides by a scale instead of
multiplying by its reciprocal, and a residual is added before rounding instead of after.

Source of the types: ONNX operator reference, QuantizeLinear, DequantizeLinear and Cast, opset 21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from hwmpq.errors import InputError
from hwmpq.export.onnx import WRITERS, Writer, assembled
from hwmpq.formats import Encoding, encoding_named
from hwmpq.graph import Graph, Node
from hwmpq.quantizers import Quantizers
from hwmpq.resolve import Resolved, resolve
from hwmpq.storage import is_integer

#: The oldest with 4-bit types and blocks of weights.
OPSET = 21
#: ONNX's type of a float encoding.
_CASTS = {"bf16": "BFLOAT16", "fp16": "FLOAT16", "e4m3": "FLOAT8E4M3FN", "e5m2": "FLOAT8E5M2"}
#: What holds the weights of a float encoding; the small floats are all e4m3 numbers.
_HOLDERS: dict[str, Any] = {
    "fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16,
    "e5m2": ml_dtypes.float8_e5m2,
    **dict.fromkeys(("e4m3", "e3m2", "e2m3", "e2m1"), ml_dtypes.float8_e4m3fn),
}  # fmt: skip


def qdq_model(graph: Graph, assignment: Mapping[str, str], quantizers: Quantizers) -> Any:
    """An onnx.ModelProto that has passed ONNX's own checker.

    Raises InputError naming every tensor whose encoding ONNX has no type for, and when assignment,
    layers and quantizers do not fit together.
    """
    resolved = resolve(graph, assignment, quantizers)
    _check(resolved)
    writer = _QdqWriter(resolved)
    for node in resolved.graph.nodes:
        reads = tuple(writer.read(node, index) for index in range(len(node.inputs)))
        WRITERS[node.op](writer, replace(node, inputs=reads))
    return assembled(writer, OPSET)


def _check(resolved: Resolved) -> None:
    used = [*resolved.plan.stored.items()]
    for node in resolved.graph.nodes:
        used += [(t, resolved.plan.demand[node.name, i]) for i, t in enumerate(node.inputs)]
    able = ("fp32", *_CASTS)
    wrong = {f"{t} in {e}": None for t, e in used if not is_integer(e) and e not in able}
    if wrong:
        raise InputError(
            "ONNX cannot round a tensor to this encoding", ", ".join(wrong),
            f"integers, {', '.join(able)}", "Choose another format for the layers that read it.",
        )  # fmt: skip


def _container(encoding: Encoding) -> tuple[Any, int]:
    """ONNX's 8-bit type of an integer encoding, and what is added to its codes there.

    Eight signed bits become unsigned ones: on x86 without VNNI, ONNX Runtime adds two products
    u8 · s8 in 16 bits, which saturates (its documentation, "Quantize ONNX models").
    """
    if encoding.qmin < 0 and encoding.bits < 8:
        return np.int8, 0
    return np.uint8, 128 if encoding.qmin < 0 else 0


def _weight_container(encoding: Encoding) -> tuple[Any, int]:
    """The type of a weight's codes, and what is added to them.

    ONNX has 2-bit types too, and 4-bit ones for activations: not used, since graph optimizers of
    ONNX Runtime 1.31 stumble over the former behind a weight and over the latter behind a Clip.
    """
    if encoding.kind == "float":
        return _HOLDERS[encoding.name], 0
    return (ml_dtypes.int4, 0) if encoding.bits <= 4 else _container(encoding)


class _QdqWriter(Writer):
    """Reads and weights as the formats have them; every operator writes fp32."""

    def __init__(self, resolved: Resolved):
        super().__init__(resolved.graph)
        self.resolved = resolved

    def read(self, node: Node, index: int) -> str:
        """The ONNX tensor with the values of an operand in the demanded encoding."""
        return self._values(node.inputs[index], self.resolved.plan.demand[node.name, index])

    def _values(self, tensor: str, encoding: str) -> str:
        """What is stored of a tensor, rounded to the encoding; written once."""
        stored = self.resolved.plan.stored[tensor]
        source = tensor if encoding == stored else self._values(tensor, stored)
        name = f"{tensor}.{encoding}"
        if encoding == "fp32" or name in self.shapes:
            return source if encoding == "fp32" else name
        self.shapes[name] = self.shapes[tensor]
        round_it = self._quantized if is_integer(encoding) else self._cast
        return round_it(tensor, source, encoding_named(encoding), name)

    def _quantized(self, tensor: str, source: str, encoding: Encoding, name: str) -> str:
        q = self.resolved.quantizer(tensor, encoding.name)
        dtype, offset = _container(encoding)
        limits = ml_dtypes.iinfo(dtype)
        if (encoding.qmin + offset, encoding.qmax + offset) != (limits.min, limits.max):
            low, high = ((code - q.zero) * q.scale for code in (encoding.qmin, encoding.qmax))
            source = self._clipped(source, low, high, name)
        scale = self.constant(f"{name}.scale", q.scale)
        zero = self.constant(f"{name}.zero", q.zero + offset, dtype)
        codes = self.emit("QuantizeLinear", [source, scale, zero], f"{name}.codes")
        return self.emit("DequantizeLinear", [codes, scale, zero], name)

    def _cast(self, tensor: str, source: str, encoding: Encoding, name: str) -> str:
        from onnx import TensorProto

        saturates = {"saturate": 1} if encoding.bits == 8 else {}
        if not saturates:
            source = self._clipped(source, encoding.qmin, encoding.qmax, name)
        kind = TensorProto.DataType.Value(_CASTS[encoding.name])
        narrow = self.emit("Cast", [source], f"{name}.narrow", to=kind, **saturates)
        return self.emit("Cast", [narrow], name, to=TensorProto.FLOAT)

    def _clipped(self, source: str, low: float, high: float, name: str) -> str:
        ends = [self.constant(f"{name}.{k}", v) for k, v in (("low", low), ("high", high))]
        return self.emit("Clip", [source, *ends], f"{name}.clipped")

    def weight(self, node: Node, turned: bool = False) -> str:
        """A layer's weight: its codes, and what decodes them; turned: its transpose."""
        layer = self.resolved.layers[node.name]
        assert layer.weight is not None
        fmt, codes = layer.format, layer.weight.codes
        dtype, offset = _weight_container(fmt.weight)
        values = fmt.weight.dequantize(codes) + np.float32(offset)
        name = node.params["weight"] + (".T" if turned else "")
        if layer.weight.scale is None:
            return self._plain_weight(name, values.T if turned else values, dtype)
        scale, attrs = np.asarray(layer.weight.scale), {}
        if fmt.group is not None:  # scales run along the rows of [out, K]
            values, attrs["block_size"] = values.reshape(len(values), -1), fmt.group
        if turned:
            values, scale = values.T, scale.T
        if scale.ndim:
            attrs["axis"] = int((fmt.group is not None) != turned)
        parts = [
            self.constant(f"{name}.codes", values, dtype),
            self.constant(f"{name}.scale", scale),
        ]
        if offset:
            parts.append(self.constant(f"{name}.zero", np.full(scale.shape, offset), dtype))
        if values.ndim == codes.ndim:
            return self.emit("DequantizeLinear", parts, name, **attrs)
        rows = self.emit("DequantizeLinear", parts, f"{name}.rows", **attrs)
        shape = self.constant(f"{name}.shape", codes.shape, np.int64)
        return self.emit("Reshape", [rows, shape], name)

    def _plain_weight(self, name: str, values: Any, dtype: Any) -> str:
        """A weight without a scale."""
        from onnx import TensorProto

        if dtype is np.float32:
            return self.constant(name, values)
        narrow = self.constant(f"{name}.narrow", values, dtype)
        return self.emit("Cast", [narrow], name, to=TensorProto.FLOAT)

    def bias(self, node: Node) -> list[str]:
        """A layer's bias, if it has one: as the quantizers have it for the layer's format."""
        layer = self.resolved.layers[node.name]
        if layer.bias is None:
            return []
        name = node.params["bias"]
        if layer.bias_steps is None:
            return [self.constant(name, layer.bias)]
        codes, step = layer.bias_steps
        parts = [
            self.constant(f"{name}.codes", codes, np.int32),
            self.constant(f"{name}.scale", step),
        ]
        return [self.emit("DequantizeLinear", parts, name, axis=0)]

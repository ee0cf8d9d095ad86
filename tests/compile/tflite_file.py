"""A float TFLite file, written table by table with the schema's own package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
import tflite

#: Operator -> its number, and the table of its options.
_OPERATORS = {
    "conv": (tflite.BuiltinOperator.CONV_2D, "Conv2DOptions"),
    "depthwise": (tflite.BuiltinOperator.DEPTHWISE_CONV_2D, "DepthwiseConv2DOptions"),
    "add": (tflite.BuiltinOperator.ADD, "AddOptions"),
    "max_pool": (tflite.BuiltinOperator.MAX_POOL_2D, "Pool2DOptions"),
    "concat": (tflite.BuiltinOperator.CONCATENATION, "ConcatenationOptions"),
    "pad": (tflite.BuiltinOperator.PAD, "PadOptions"),
    "mean": (tflite.BuiltinOperator.MEAN, "ReducerOptions"),
    "linear": (tflite.BuiltinOperator.FULLY_CONNECTED, "FullyConnectedOptions"),
}


class File:
    """Tensors and operators in the making; buffer 0 is empty, as the format wants it."""

    def __init__(self) -> None:
        self.builder = flatbuffers.Builder(1 << 16)
        self.names: list[str] = []
        self.tensors: list[int] = []
        self.operators: list[int] = []
        self.buffers = [self._table("Buffer")]

    def tensor(self, name: str, shape: Sequence[int], values: np.ndarray | None = None) -> str:
        """With values a constant; float unless they are int32."""
        buffer = 0
        if values is not None:
            raw = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
            buffer = len(self.buffers)
            self.buffers.append(self._table("Buffer", Data=self.builder.CreateNumpyVector(raw)))
        whole = values is not None and values.dtype == np.int32
        self.tensors.append(
            self._table(
                "Tensor",
                Shape=self._ints(shape),
                Buffer=buffer,
                Type=tflite.TensorType.INT32 if whole else tflite.TensorType.FLOAT32,
                Name=self.builder.CreateString(name),
            )
        )
        self.names.append(name)
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        return self.tensor(name, values.shape, values)

    def apply(self, op: str, inputs: Sequence[str], output: str, **options: int) -> str:
        """An operator on tensors by name; `output` is described already."""
        kind = _OPERATORS[op][1]
        made = self._table(kind, **options)
        self.operators.append(
            self._table(
                "Operator",
                OpcodeIndex=list(_OPERATORS).index(op),
                Inputs=self._ints(map(self.names.index, inputs)),
                Outputs=self._ints([self.names.index(output)]),
                BuiltinOptionsType=getattr(tflite.BuiltinOptions, kind),
                BuiltinOptions=made,
            )
        )
        return output

    def model(self, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
        """The file, read again: a tflite.Model."""
        graph = self._table(
            "SubGraph", Tensors=self._tables(self.tensors),
            Operators=self._tables(self.operators),
            Inputs=self._ints(map(self.names.index, inputs)),
            Outputs=self._ints(map(self.names.index, outputs)),
        )  # fmt: skip
        codes = [
            self._table("OperatorCode", DeprecatedBuiltinCode=code, BuiltinCode=code, Version=1)
            for code, _ in _OPERATORS.values()
        ]
        whole = self._table(
            "Model", Version=3, OperatorCodes=self._tables(codes),
            Subgraphs=self._tables([graph]), Buffers=self._tables(self.buffers),
        )  # fmt: skip
        self.builder.Finish(whole, file_identifier=b"TFL3")
        return tflite.Model.GetRootAsModel(bytes(self.builder.Output()), 0)

    def _table(self, name: str, **fields: int) -> int:
        module = importlib.import_module(f"tflite.{name}")
        getattr(module, f"{name}Start")(self.builder)
        for field, value in fields.items():
            getattr(module, f"{name}Add{field}")(self.builder, value)
        found: int = getattr(module, f"{name}End")(self.builder)
        return found

    def _ints(self, values: Any) -> int:
        found: int = self.builder.CreateNumpyVector(np.asarray(list(values), np.int32))
        return found

    def _tables(self, offsets: Sequence[int]) -> int:
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        found: int = self.builder.EndVector()
        return found

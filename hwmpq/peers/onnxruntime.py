"""ONNX Runtime, CPU provider: a float file as it is, an int8 one quantized by its own tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.peers import check_precision, need, noise
from hwmpq.targets import host_features

PRECISIONS = ("fp32", "int8")
_PROVIDERS = ["CPUExecutionProvider"]


def load(settings: Mapping[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    """settings: "file" (.onnx), "precision", "threads". Raises InputError."""
    session = _session(settings)
    import onnxruntime

    inputs = session.get_inputs()
    arrays = noise([item.shape for item in inputs])
    feeds = {item.name: array for item, array in zip(inputs, arrays, strict=True)}
    description = {"version": onnxruntime.__version__, "precision": settings["precision"]}
    return lambda: session.run(None, feeds), description


def outputs(settings: Mapping[str, Any]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Of a one-input model: the first output for a batch. Raises InputError."""
    session = _session(settings)
    (given,) = session.get_inputs()

    def first(batch: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = session.run(None, {given.name: batch})[0]
        return found

    return first


def _session(settings: Mapping[str, Any]) -> Any:
    need("onnxruntime")
    import onnxruntime

    check_precision("onnxruntime", settings["precision"], PRECISIONS)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(settings["file"], options, providers=_PROVIDERS)


def quantize(float_file: Path, int8_file: Path, images: NDArray[np.float32]) -> None:
    """Write the QDQ form of a one-input float model: u8 activations, s8 weights per channel.

    images: [N, C, H, W], normalized; they give the ranges (min and max). Weights have 7 bits where
    the CPU has no VNNI, since u8 · s8 sums saturate there. Source: ONNX Runtime's documentation,
    "Quantize ONNX models", on reduce_range.
    """
    need("onnx", "onnxruntime")
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = int8_file.with_suffix(".prepared.onnx")
    quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
    (given,) = InferenceSession(str(float_file), providers=_PROVIDERS).get_inputs()
    quantize_static(
        str(prepared),
        str(int8_file),
        _Reader(given.name, given.shape[0], images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not host_features() & {"avx512vnni", "avxvnni"},
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


class _Reader:
    """Calibration batches in the form that ONNX Runtime asks for them: `get_next` until None."""

    def __init__(self, name: str, batch: int, images: NDArray[np.float32]):
        self._batches = self._walk(name, batch, images)

    def _walk(
        self, name: str, batch: int, images: NDArray[np.float32]
    ) -> Iterator[dict[str, NDArray[np.float32]]]:
        for at in range(0, len(images) - batch + 1, batch):
            yield {name: images[at : at + batch]}

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)

"""OpenVINO on the CPU: latency hint, one stream; int8 is the QDQ file of ONNX Runtime's tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.peers import check_precision, need, noise

#: Precision -> OpenVINO's inference precision; in int8 what is not quantized runs in f32.
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


def load(settings: Mapping[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    """settings: "file" (.onnx), "precision", "threads".

    Raises InputError, also for a precision that this CPU has no instructions for: OpenVINO would
    silently take another one.
    """
    compiled = _compiled(settings)
    import openvino

    request = compiled.create_infer_request()
    arrays = noise([port.shape for port in compiled.inputs])
    for i, array in enumerate(arrays):
        request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
    description = {"version": openvino.__version__, "precision": settings["precision"]}
    return request.infer, description


def outputs(settings: Mapping[str, Any]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Of a one-input model: the first output for a batch. Raises InputError."""
    compiled = _compiled(settings)

    def first(batch: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = compiled(batch)[0]
        return found

    return first


def _compiled(settings: Mapping[str, Any]) -> Any:
    need("openvino")
    import openvino

    precision = settings["precision"]
    check_precision("openvino", precision, tuple(PRECISIONS))
    core = openvino.Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in able:
        raise InputError("OpenVINO has no bf16 on this CPU", "bf16", [w for w in PRECISIONS
                         if w != "bf16"])  # fmt: skip
    return core.compile_model(
        core.read_model(settings["file"]),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": settings["threads"],
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "ENABLE_CPU_PINNING": False,  # the timing protocol pins
        },
    )

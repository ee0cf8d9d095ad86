"""Compiling a glue kernel into a folder that `hwmpq.measure` can time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import tensors
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.glue import emit
from hwmpq.kernels.glue.call import GlueCall, Operand, parameters
from hwmpq.requantize import Quantizer
from hwmpq.storage import is_integer


def to_json(call: GlueCall) -> dict[str, Any]:
    return asdict(call)


def from_json(data: Mapping[str, Any]) -> GlueCall:
    def operand(value: Mapping[str, Any]) -> Operand:
        return Operand(tuple(value["shape"]), value["layout"], value["encoding"])

    inputs = tuple(operand(item) for item in data["inputs"])
    return GlueCall(**{**data, "inputs": inputs, "out": operand(data["out"])})


def compile_cell(request: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's `call`: request {"call": to_json(...), "target", "folder", "seed"}; the answer has
    the fields of `measure.Cell`. Its numbers are checked by the conformance suite, not here: a glue
    kernel has no wrong result that would be faster on one input than on another."""
    from hwmpq import targets
    from hwmpq.kernels.build import export_cell

    call = from_json(request["call"])
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(int(request.get("seed", 0)))
    arrays = [_random(rng, operand) for operand in call.inputs]
    quantizers = [
        Quantizer(0.05, 3) if is_integer(o.encoding) else Quantizer()
        for o in (*call.inputs, call.out)
    ]
    constants = {role: _constant(rng, call) for role in call.roles}
    packed = parameters(call, constants, quantizers)
    out = np.zeros(call.out.size, memory_dtype(call.out.encoding))
    every = [*arrays, *packed, out]
    tensors.save(folder / "args.safetensors", {str(i): a for i, a in enumerate(every)})
    roles = ["input"] * (len(every) - 1) + ["output"]
    return {
        **export_cell(emit(call), targets.load(request["target"]), every, folder),
        "args": str(folder / "args.safetensors"), "roles": roles, "expected": "", "atol": 0.0,
        "rtol": 0.0,
    }  # fmt: skip


def _random(rng: np.random.Generator, operand: Operand) -> Any:
    dtype = memory_dtype(operand.encoding)
    if dtype == "float32":
        return rng.standard_normal(operand.size).astype(np.float32)
    if dtype == "uint16":  # bit patterns of moderate numbers
        return (rng.standard_normal(operand.size).astype(np.float32).view(np.uint32) >> 16).astype(
            np.uint16
        )
    return rng.integers(0, 100, operand.size).astype(dtype)


def _constant(rng: np.random.Generator, call: GlueCall) -> Any:
    """A parameter of the right length: per channel, or of the result's shape."""
    if call.op in ("add", "mul"):
        return rng.standard_normal(call.out.shape).astype(np.float32)
    axis = 1 if call.op == "batch_affine" else -1
    return rng.standard_normal(call.out.shape[axis]).astype(np.float32)

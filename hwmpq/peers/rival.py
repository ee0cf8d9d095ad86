"""The user's float model in the files that other runtimes read, and as programs to be timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError, UnknownName
from hwmpq.graph import Graph
from hwmpq.peers import NAMES, need


@dataclass(frozen=True)
class Rival:
    """model, weights, input_shape: as for `load_model`; files: precision -> its .onnx file."""

    model: str
    weights: str | None = None
    input_shape: tuple[int, ...] | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    def program(
        self, runtime: str, precision: str = "fp32", threads: int = 1, compiled: bool = False
    ) -> tuple[str, dict[str, Any]]:
        """The `function` and `settings` of a program cell. Raises InputError, UnknownName."""
        if runtime not in NAMES:
            raise UnknownName("runtime", runtime, NAMES)
        settings: dict[str, Any] = {"precision": precision, "threads": threads}
        if runtime == "torch":
            settings |= {"model": self.model, "weights": self.weights, "compiled": compiled,
                         "input_shape": self.input_shape}  # fmt: skip
        else:
            need(runtime)
            kind = "int8" if precision == "int8" else "fp32"
            if kind not in self.files:
                raise InputError(f"no {kind} file of {self.model}", runtime, sorted(self.files))
            settings["file"] = str(self.files[kind])
        return f"hwmpq.peers.{runtime}:load", settings

    def outputs(self, runtime: str, threads: int = 1) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """The float model of one input as a function from a batch of its own size to the first
        output for it. Raises InputError, UnknownName."""
        program, settings = self.program(runtime, threads=threads)
        module = importlib.import_module(program.partition(":")[0])
        found: Callable[[NDArray[Any]], NDArray[Any]] = module.outputs(settings)
        return found


def write_files(
    graph: Graph, folder: Path, images: NDArray[np.float32] | None = None
) -> dict[str, Path]:
    """The graph as float ONNX, and with calibration images [N, C, H, W] also in int8 (QDQ)."""
    need("onnx")
    from hwmpq.export.onnx import onnx_model
    from hwmpq.peers.onnxruntime import quantize

    files = {"fp32": folder / "float.onnx"}
    files["fp32"].write_bytes(onnx_model(graph).SerializeToString())
    if images is not None:
        files["int8"] = folder / "int8.onnx"
        quantize(files["fp32"], files["int8"], images)
    return files

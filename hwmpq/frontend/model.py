"""A model by the name the user gives it: `zoo:NAME`, `package.module:callable`, or a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from hwmpq import zoo
from hwmpq.data import Normalization, call_named
from hwmpq.errors import InputError
from hwmpq.frontend.onnx_import import load_onnx
from hwmpq.frontend.pt2 import load_pt2
from hwmpq.frontend.torch_export import from_exported, trace
from hwmpq.graph import Graph
from hwmpq.zoo.weights import load_into

FORMS = ("zoo:NAME", "package.module:callable", "file.pt2", "file.onnx")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model and what is known of its input.

    example: one float32 tensor per input; normalization: (mean, std) of x/255, or None when
    unknown; classes: None when unknown. fixed_batch: the program runs on batches of the example's
    size only.
    """

    program: nn.Module | ExportedProgram
    example: tuple[torch.Tensor, ...]
    name: str
    normalization: Normalization | None = None
    classes: int | None = None
    fixed_batch: bool = False

    @property
    def module(self) -> nn.Module:
        """The float model as a callable torch module, in eval mode, for any batch size."""
        program = self.program
        module = program.module() if isinstance(program, ExportedProgram) else program.eval()
        return _InBatches(module, len(self.example[0])) if self.fixed_batch else module

    def graph(self) -> Graph:
        """The canonical graph. Raises as `torch_export.trace` does."""
        if isinstance(self.program, ExportedProgram):
            return from_exported(self.program)
        return trace(self.program, self.example)


class _InBatches(nn.Module):
    """Runs a module of one input on batches of `size`; the last batch repeats its last sample."""

    def __init__(self, module: nn.Module, size: int):
        super().__init__()
        self.module, self.size = module, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's first output for every sample."""
        found = []
        for start in range(0, len(x), self.size):
            part = x[start : start + self.size]
            missing = self.size - len(part)
            result = self.module(torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]))
            result = result if isinstance(result, torch.Tensor) else result[0]
            found.append(result[: len(part)])
        return torch.cat(found)


def load_model(
    spec: str, weights: Path | None = None, input_shape: Sequence[int] | None = None
) -> LoadedModel:
    """Load a model; `package.module:callable` runs the user's code, nothing else does.

    weights: safetensors or tensors-only state dict; input_shape: (N, C, H, W), needed for a
    callable, replaces the batch size and image size of a zoo model.
    Raises: UnknownName, UnsafeFile, InputError.
    """
    if spec.startswith("zoo:"):
        return _from_zoo(spec, weights, input_shape)
    if spec.endswith(".pt2"):
        return _from_file(spec, weights, input_shape)
    if spec.endswith(".onnx"):
        return _from_onnx(spec, weights, input_shape)
    if spec.endswith((".pt", ".pth", ".ckpt", ".safetensors")):
        raise InputError(
            "this kind of model file cannot be read", spec, FORMS,
            "Save the program with torch.export.save, or give its state dict as --weights.",
        )  # fmt: skip
    if ":" not in spec:
        raise InputError("unknown form of model", repr(spec), FORMS)
    return _from_callable(spec, weights, input_shape)


def _example(shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    if not shape or any(size < 1 for size in shape):
        raise InputError("input shape", tuple(shape), "positive sizes N,C,H,W")
    return (torch.zeros(tuple(shape)),)


def _from_zoo(spec: str, weights: Path | None, shape: Sequence[int] | None) -> LoadedModel:
    found = zoo.build(spec.removeprefix("zoo:"), weights)
    example = _example(shape or found.input_shape)
    return LoadedModel(found.module, example, spec, (found.mean, found.std), found.classes)


def _from_file(spec: str, weights: Path | None, shape: Sequence[int] | None) -> LoadedModel:
    if weights is not None:
        raise InputError("weights for a .pt2 file", weights, "none: the file holds its own")
    program = load_pt2(Path(spec))
    if program.example_inputs is None:
        raise InputError(
            "exported program without example inputs", spec,
            next="Save it by torch.export.save(torch.export.export(model, example), FILE).",
        )  # fmt: skip
    args, kwargs = program.example_inputs
    example = (*args, *kwargs.values())
    if shape is not None and tuple(shape) != tuple(example[0].shape):
        raise InputError("input shape", tuple(shape), f"{tuple(example[0].shape)}, as exported")
    return LoadedModel(program, example, Path(spec).stem, fixed_batch=True)


def _from_onnx(spec: str, weights: Path | None, shape: Sequence[int] | None) -> LoadedModel:
    if weights is not None:
        raise InputError("weights for a .onnx file", weights, "none: the file holds its own")
    module, example = load_onnx(Path(spec), shape)
    return LoadedModel(module, example, Path(spec).stem, fixed_batch=True)


def _from_callable(spec: str, weights: Path | None, shape: Sequence[int] | None) -> LoadedModel:
    module = call_named(spec)
    if not isinstance(module, nn.Module):
        raise InputError(f"result of {spec}", type(module).__name__, "torch.nn.Module")
    if shape is None:
        raise InputError("no input shape", spec, next="Give --input-shape, such as 1,3,224,224.")
    if weights is not None:
        load_into(module, weights)
    return LoadedModel(module, _example(shape), spec)

"""A small compiled network that the tests write as an artifact."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hwmpq import artifact, lower, targets, tensors, toolchain
from hwmpq.artifact.folder import write_json
from hwmpq.artifact.golden import checksum
from hwmpq.formats import encoding_named
from hwmpq.frontend.relax_module import relax_module
from hwmpq.frontend.torch_export import trace
from hwmpq.kernels.codes import memory_dtype
from hwmpq.lower.layout import NHWC, layouts
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.simulate import Simulator
from hwmpq.targets import FEATURES

TARGET = targets.native()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv1(x))
        return self.fc(nn.functional.max_pool2d(self.conv2(x) + x, 4).flatten(1))


class Two(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 1, 1), nn.Linear(4, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = torch.relu(self.conv(x)), self.fc(y)
        return (x * y[:, :, None, None]).mean((2, 3)), y


class Made:
    """A compiled net and what is needed to write it as an artifact."""

    def __init__(self, assignment: Mapping[str, str]):
        torch.manual_seed(2)
        self.images = torch.randn(6, 3, 8, 8)
        self.graph = trace(Net().eval(), (self.images[:1],))
        self.assignment = dict(assignment)
        quantizers = calibrate(self.graph, [self.images], sorted(set(assignment.values())))
        self.built = lower.build(relax_module(self.graph), assignment, quantizers, TARGET)
        self.simulator = Simulator(self.graph, assignment, quantizers)

    def golden(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Two samples: inputs, outputs, checksums of what is stored."""
        stored, layout = self.simulator.resolved.plan.stored, layouts(self.graph)
        arrays, checks = {}, {"samples": "2"}
        for k in range(2):

            def observe(name: str, value: torch.Tensor, k: int = k) -> None:
                held = value.numpy()
                if layout[name] == NHWC:
                    held = held.transpose(0, 2, 3, 1)
                if memory_dtype(stored[name]) == "uint16":
                    held = encoding_named(stored[name]).quantize(held)
                checks[f"{k}.{name}"] = checksum(held.astype(memory_dtype(stored[name])))

            x = self.images[k : k + 1]
            arrays[f"{k}.input.x"] = x.numpy()
            with torch.inference_mode():
                arrays[f"{k}.output.{self.graph.outputs[0]}"] = self.simulator(x, observe)[
                    0
                ].numpy()
        return arrays, checks

    def manifest(self) -> dict[str, Any]:
        return {
            "versions": toolchain.versions(),
            "target": {
                "name": TARGET.name, "tvm": dict(TARGET.tvm), "features": sorted(TARGET.features),
                "cpu_flags": sorted({f for w in TARGET.features for f in FEATURES[w].flags}),
            },
            "threads": 1,
            "inputs": [{"name": "x", "shape": [1, 3, 8, 8], "dtype": "float32"}],
            "outputs": [{"name": self.graph.outputs[0], "shape": [1, 5], "dtype": "float32"}],
            "assignment": self.assignment,
            "calls": list(self.built.calls),
            "parameters": list(self.built.parameters),
        }  # fmt: skip

    def writers(self) -> dict[str, Callable[[Path], None]]:
        return {
            "model.so": lambda p: self.built.executable.export_library(str(p)),
            "parameters.safetensors": lambda p: tensors.save(p, self.built.parameters),
            "golden.safetensors": lambda p: tensors.save(p, *self.golden()),
            "assignment.json": lambda p: write_json(p, self.assignment),
        }

    def save(self, folder: Path, **changes: Callable[[Path], None]) -> None:
        writers = {**self.writers(), **{k.replace("_", "."): v for k, v in changes.items()}}
        artifact.save(folder, self.manifest(), writers)


def full(_path: Path) -> None:
    """Writing on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")

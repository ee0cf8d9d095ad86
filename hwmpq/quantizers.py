"""Quantizers: scales and zero points of tensors, rounded weights and biases of layers.

A value beside the assignment, made alike by calibration, AdaRound, QAT and FLIQS, and the only
source of numbers for the simulator and the lowering. numpy; saved as `quantizers.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.formats import QuantizedWeight
from hwmpq.graph import Graph
from hwmpq.requantize import Quantizer
from hwmpq.tensors import load, save

VERSION = 2
F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Quantizers:
    """activations: (tensor, encoding) -> Quantizer, integers only, by `StoragePlan.root`;
    weights: (layer, format name) -> codes and scale, rounded once by its Format;
    biases: (layer, format name) -> what replaces the layer's bias there, fp32 [channels];
    constants: name -> what replaces the graph's constant in every format (`graph`)."""

    activations: Mapping[tuple[str, str], Quantizer] = field(default_factory=dict)
    weights: Mapping[tuple[str, str], QuantizedWeight] = field(default_factory=dict)
    biases: Mapping[tuple[str, str], F32] = field(default_factory=dict)
    constants: Mapping[str, F32] = field(default_factory=dict)

    def graph(self, graph: Graph) -> Graph:
        """The graph with the constants that these numbers were made for."""
        return replace(graph, constants={**graph.constants, **self.constants})

    def activation(self, tensor: str, encoding: str) -> Quantizer:
        """Raises InputError when the tensor was not calibrated for the encoding."""
        try:
            return self.activations[tensor, encoding]
        except KeyError:
            known = sorted({e for t, e in self.activations if t == tensor})
            raise InputError(
                f"tensor {tensor!r} has no quantizer for {encoding}", None, known or "none",
                "Calibrate again with this encoding among the formats.",
            ) from None  # fmt: skip

    def weight(self, layer: str, format_name: str) -> QuantizedWeight:
        """Raises InputError when the layer's weights were not rounded to the format."""
        try:
            return self.weights[layer, format_name]
        except KeyError:
            known = sorted({f for name, f in self.weights if name == layer})
            raise InputError(
                f"layer {layer!r} has no rounded weights for {format_name}", None, known or "none",
                "Calibrate again with this format in the menu.",
            ) from None  # fmt: skip

    def only(self, assignment: Mapping[str, str]) -> Quantizers:
        """Without the weights and biases of formats that the assignment does not use."""
        weights = {k: v for k, v in self.weights.items() if assignment.get(k[0]) == k[1]}
        biases = {k: v for k, v in self.biases.items() if assignment.get(k[0]) == k[1]}
        return replace(self, weights=weights, biases=biases)

    def save(self, path: Path) -> None:
        """Write a safetensors file (aside, then renamed)."""
        tensors: dict[str, NDArray[Any]] = {}
        for (layer, fmt), weight in self.weights.items():
            tensors[f"{layer}|{fmt}|codes"] = np.ascontiguousarray(weight.codes)
            if weight.scale is not None:
                tensors[f"{layer}|{fmt}|scale"] = np.ascontiguousarray(weight.scale)
        for (layer, fmt), bias in self.biases.items():
            tensors[f"{layer}|{fmt}|bias"] = bias
        for name, value in self.constants.items():
            tensors[f"{name}||constant"] = value
        table = [[t, e, float(q.scale), q.zero] for (t, e), q in sorted(self.activations.items())]
        metadata = {"version": str(VERSION), "activations": json.dumps(table)}
        save(path, tensors, metadata)

    @staticmethod
    def load(path: Path) -> Quantizers:
        """Read a file made by `save`. Raises InputError on anything else."""
        tensors, metadata = load(path)
        if metadata.get("version") != str(VERSION):
            raise InputError(
                f"{path} is no quantizers file of this version",
                metadata.get("version"),
                VERSION,
                "Make it again with this version of hwmpq.",
            )
        rows = json.loads(metadata["activations"])
        activations = {(t, e): Quantizer(float(s), int(z)) for t, e, s, z in rows}
        weights, biases, constants = {}, {}, {}
        for name, value in tensors.items():
            layer, fmt, role = name.rsplit("|", 2)
            if role == "codes":
                weights[layer, fmt] = QuantizedWeight(value, tensors.get(f"{layer}|{fmt}|scale"))
            elif role == "bias":
                biases[layer, fmt] = value
            elif role == "constant":
                constants[layer] = value
        return Quantizers(activations, weights, biases, constants)

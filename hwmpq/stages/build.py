"""An assignment compiled into an artifact folder, with golden samples of the exact simulator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import artifact, tensors, toolchain
from hwmpq.artifact.folder import write_json
from hwmpq.artifact.golden import SAMPLES, checksum
from hwmpq.formats import format_named
from hwmpq.graph import Graph
from hwmpq.kernels import Kernel, best
from hwmpq.kernels.build import export
from hwmpq.kernels.codes import memory_dtype
from hwmpq.lower.layout import NHWC, layouts
from hwmpq.quantizers import Quantizers
from hwmpq.stages.job import Job
from hwmpq.stages.schedule import timed_kernel
from hwmpq.targets import FEATURES
from hwmpq.types import Assignment


@dataclass(frozen=True, eq=False)
class Made:
    """A written artifact and the assignment in it."""

    path: Path
    assignment: Assignment
    weight_bytes: int


def model_bytes(job: Job, assignment: Mapping[str, str]) -> int:
    """Packed weights, scales, zero points and biases of the layers, in bytes."""
    return sum(
        format_named(assignment[la.name]).nbytes(la.workload.weight_shape, la.bias)
        for la in job.network.layers
        if la.workload.has_weight
    )


def make_artifact(
    job: Job,
    assignment: Assignment,
    quantizers: Quantizers,
    folder: Path,
    samples: np.ndarray,
    facts: Mapping[str, Any] | None = None,
) -> Made:
    """Compile and write. samples: [N, C, H, W] inputs to make golden samples of.

    facts: further entries of the manifest (latency_s, accuracy, ...).
    """
    from hwmpq import lower
    from hwmpq.frontend.relax_module import relax_module

    own = quantizers.only(assignment)
    kernels = _kernels(job, assignment)
    schedules = {name: k.timed.text for name, k in kernels.items() if k.timed}
    built = lower.build(
        relax_module(job.graph), assignment, own, job.target, job.options.threads,
        schedules=schedules,
    )  # fmt: skip
    golden, checks = _golden(job.graph, assignment, own, samples, built.calls)
    weight_bytes = model_bytes(job, assignment)
    manifest = {
        "model": job.options.model,
        "versions": toolchain.versions(),
        "target": {
            "name": job.target.name,
            "tvm": dict(job.target.tvm),
            "features": sorted(job.target.features),
            "cpu_flags": sorted({f for w in job.target.features for f in FEATURES[w].flags}),
        },
        "threads": job.options.threads,
        "inputs": [_described(job, name) for name in job.graph.inputs],
        "outputs": [
            {"name": n, "shape": list(job.graph.tensors[n]), "dtype": "float32"}
            for n in job.graph.outputs
        ],
        "assignment": assignment,
        "kernels": {name: _told(k, assignment[name]) for name, k in kernels.items()},
        "calls": list(built.calls),
        "parameters": list(built.parameters),
        "nbytes": {
            "weights": weight_bytes,
            "parameters": sum(int(a.nbytes) for a in built.parameters.values()),
            "peak_memory": built.peak_memory,
        },
        **(facts or {}),
    }
    artifact.save(
        folder,
        manifest,
        {
            "model.so": lambda p: export(built.executable, p, job.target),
            "parameters.safetensors": lambda p: tensors.save(p, built.parameters),
            "golden.safetensors": lambda p: tensors.save(p, golden, checks),
            "assignment.json": lambda p: write_json(p, assignment),
            "quantizers.safetensors": own.save,
        },
    )
    return Made(folder, dict(assignment), weight_bytes)


def _described(job: Job, name: str) -> dict[str, Any]:
    shape = list(job.graph.tensors[name])
    entry: dict[str, Any] = {"name": name, "shape": shape, "dtype": "float32"}
    if len(shape) == 4:
        entry["layout"] = "NCHW"
    if job.model.normalization is not None:
        mean, std = job.model.normalization
        entry["normalization"] = {"of": "x/255", "mean": list(mean), "std": list(std)}
    return entry


def _kernels(job: Job, assignment: Mapping[str, str]) -> dict[str, Kernel]:
    """Layer -> its kernel, with the schedule that timing chose."""
    found = {}
    for layer in job.network.layers:
        fmt = format_named(assignment[layer.name])
        kernel = best(layer.workload, fmt, job.target.features)
        assert kernel is not None, layer.name
        found[layer.name] = timed_kernel(job, kernel, layer.workload, fmt)
    return found


def _told(kernel: Kernel, fmt: str) -> dict[str, str]:
    """What the manifest says of a kernel; schedule: where it is not the default one."""
    schedule = {"schedule": kernel.timed.text} if kernel.timed else {}
    return {
        "kernel": kernel.name, "execution": kernel.execution(format_named(fmt)), **schedule
    }  # fmt: skip


def _golden(
    graph: Graph, assignment: Assignment, quantizers: Quantizers, samples: np.ndarray,
    calls: tuple[str, ...],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:  # fmt: skip
    """Inputs, outputs and checksums of stored tensors, by the exact simulator."""
    import torch

    from hwmpq.quantize.simulate import Simulator

    simulator = Simulator(graph, assignment, quantizers)
    layout = layouts(graph)
    stored = simulator.resolved.plan.stored
    arrays: dict[str, np.ndarray] = {}
    count = min(SAMPLES, len(samples))
    checks: dict[str, str] = {"samples": str(count), "version": "1"}
    written = set(calls)
    batch = graph.tensors[graph.inputs[0]][0]
    for k in range(count):
        x = np.repeat(samples[k : k + 1], batch, axis=0)

        def observe(name: str, value: Any, k: int = k) -> None:
            if name in written:
                checks[f"{k}.{name}"] = checksum(
                    _in_memory(value.numpy(), stored[name], layout[name])
                )

        with torch.inference_mode():
            outputs = simulator(torch.from_numpy(x), observe)
        arrays[f"{k}.input.{graph.inputs[0]}"] = x
        for name, value in zip(graph.outputs, outputs, strict=True):
            arrays[f"{k}.output.{name}"] = value.numpy().astype(np.float32)
    return arrays, checks


def _in_memory(value: np.ndarray, encoding: str, layout: str) -> np.ndarray:
    """Codes or values as the artifact holds them, flat."""
    from hwmpq.formats import encoding_named

    if layout == NHWC:
        value = value.transpose(0, 2, 3, 1)
    dtype = memory_dtype(encoding)
    flat = np.ascontiguousarray(value).reshape(-1)
    if dtype == "uint16":
        return np.asarray(encoding_named(encoding).quantize(flat.astype(np.float32)))
    return flat.astype(dtype)


def read_assignment(path: Path) -> Assignment:
    """An assignment file: {layer: format}. Raises InputError."""
    from hwmpq.errors import InputError

    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read assignment {path}", error) from error
    if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
        raise InputError(f"assignment {path}", type(data).__name__, "{layer: format}")
    return data

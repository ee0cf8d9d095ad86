"""An assignment compiled into an artifact folder, with golden samples of the exact simulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwmpq import artifact, tensors, toolchain
from hwmpq.artifact.folder import write_json
from hwmpq.artifact.golden import SAMPLES, checksum
from hwmpq.artifact.manifest import (
    CUBIN,
    GOLDEN,
    LAUNCHES,
    LIBRARY,
    PARAMETERS,
    TEXT,
    parts,
)
from hwmpq.formats import format_named
from hwmpq.graph import Graph
from hwmpq.kernels import Kernel, best
from hwmpq.kernels.build import archive, export
from hwmpq.kernels.codes import memory_dtype
from hwmpq.lower.layout import NHWC, layouts
from hwmpq.quantizers import Quantizers
from hwmpq.stages.job import Job
from hwmpq.stages.schedule import timed_kernel
from hwmpq.targets import Target, vocabulary
from hwmpq.types import Assignment

if TYPE_CHECKING:
    from hwmpq import lower

_OBJECTS = "model.a"


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
    samples: Mapping[str, np.ndarray],
    sizes: Mapping[int, Job] | None = None,
    system_lib: bool = False,
) -> Made:
    """Compile and write.

    samples: [N, ...] of each input, to make golden samples of. sizes: the same job at further batch
    sizes, each of which gets a library of its own; what is packed alike is kept once. system_lib:
    also the objects to link into a program, as `model.a`; of `job` alone.
    """
    own = quantizers.only(assignment)
    kernels, built = _compiled(job, assignment, own)
    others = {size: _compiled(other, assignment, own)[1] for size, other in (sizes or {}).items()}
    own_library = _library(job)
    parameters, batches = _shared(job, built, others)
    golden, checks = _golden(job.graph, assignment, own, samples, built.calls)
    weight_bytes = model_bytes(job, assignment)
    manifest = {
        "model": job.options.model,
        "versions": toolchain.versions(),
        "target": {
            "name": job.target.name,
            "tvm": dict(job.target.tvm),
            "features": sorted(job.target.features),
            "cpu_flags": sorted({f for w in job.target.features for f in vocabulary()[w].flags}),
        },
        "threads": job.options.threads,
        "inputs": [_input(job, name, golden) for name in job.graph.inputs],
        "outputs": [_described(job, name, "output", golden) for name in job.graph.outputs],
        **({"library": own_library} if own_library != LIBRARY else {}),
        **({"batches": batches} if batches else {}),
        **({"machine_code": asdict(built.executable.compiled.facts)} if job.target.gpu else {}),
        "assignment": assignment,
        "kernels": {name: _told(k, assignment[name]) for name, k in kernels.items()},
        "calls": list(built.calls),
        "parameters": list(built.parameters),
        "nbytes": {
            "weights": weight_bytes,
            "parameters": sum(int(a.nbytes) for a in parameters.values()),
            "peak_memory": max(one.peak_memory for one in (built, *others.values())),
        },
    }
    libraries = {own_library: built} | {_library(job, size): one for size, one in others.items()}
    writers: dict[str, Callable[[Path], None]] = {}
    for name, one in libraries.items():
        writers |= _written(name, one, job.target)
    if system_lib:
        writers[_OBJECTS] = partial(_archive, job, assignment, own)
    artifact.save(
        folder,
        manifest,
        writers
        | {
            PARAMETERS: lambda p: tensors.save(p, parameters),
            GOLDEN: lambda p: tensors.save(p, golden, checks),
            "assignment.json": lambda p: write_json(p, assignment),
            "quantizers.safetensors": own.save,
        },
    )
    return Made(folder, dict(assignment), weight_bytes)


def _compiled(
    job: Job, assignment: Assignment, own: Quantizers, system_lib: bool = False
) -> tuple[dict[str, Kernel], lower.Built]:
    """Layer -> its kernel, with the schedule that timing chose; and the whole network of them."""
    from hwmpq import lower
    from hwmpq.frontend.relax_module import relax_module

    kernels = {}
    for layer in job.network.layers:
        fmt = format_named(assignment[layer.name])
        kernel = best(layer.workload, fmt, job.target.features)
        assert kernel is not None, layer.name
        kernels[layer.name] = timed_kernel(job, kernel, layer.workload, fmt)
    schedules = {name: k.timed.text for name, k in kernels.items() if k.timed}
    return kernels, lower.build(
        relax_module(job.graph), assignment, own, job.target, job.options.threads,
        schedules=schedules, system_lib=system_lib,
    )  # fmt: skip


def _archive(job: Job, assignment: Assignment, own: Quantizers, path: Path) -> None:
    """The network once more, as objects to link into a program. Raises InputError."""
    built = _compiled(job, assignment, own, system_lib=True)[1]
    archive(built.executable, path, job.target)


def _written(name: str, built: lower.Built, target: Target) -> dict[str, Callable[[Path], None]]:
    """What writes the files of a library."""
    if not target.gpu:
        return {name: partial(_export, built, target)}
    files, network = parts(name), built.executable
    return {
        files[CUBIN]: lambda path: _keep(path, network.compiled.cubin),
        files[TEXT]: lambda path: _keep(path, network.text.encode()),
        files[LAUNCHES]: lambda path: write_json(path, network.launches.to_json()),
    }


def _export(built: lower.Built, target: Target, path: Path) -> None:
    export(built.executable, path, target)


def _keep(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _library(job: Job, size: int | None = None) -> str:
    """size: of a further batch."""
    stem = "model" if size is None else f"model.{size}"
    return stem + (CUBIN if job.target.gpu else Path(LIBRARY).suffix)


def _shared(
    job: Job, first: lower.Built, others: Mapping[int, lower.Built]
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """All parameters by name, and the manifest's entries of the further batch sizes.

    A parameter that another batch size has packed otherwise gets a name of its own.
    """
    arrays, batches = dict(first.parameters), []
    for size, built in others.items():
        names = []
        for name, array in built.parameters.items():
            same = name in arrays and _equal(arrays[name], array)
            names.append(name if same else f"{name}@{size}")
            arrays[names[-1]] = array
        batches.append({"size": size, "library": _library(job, size), "parameters": names})
    return arrays, batches


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)


def _input(job: Job, name: str, golden: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """An input; `range` is what its normalization makes of images where it is known."""
    entry = _described(job, name, "input", golden)
    if job.model.normalization is not None:
        mean, std = (np.asarray(part, np.float64) for part in job.model.normalization)
        entry["normalization"] = {"of": "x/255", "mean": mean.tolist(), "std": std.tolist()}
        entry["range"] = [float((-mean / std).min()), float(((1 - mean) / std).max())]
    return entry


def _described(job: Job, name: str, kind: str, golden: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """An input or output; range: the least and the largest finite value in the golden samples."""
    shape = list(job.graph.tensors[name])
    arrays = [array.ravel() for key, array in golden.items() if key.endswith(f".{kind}.{name}")]
    values = np.concatenate(arrays)
    finite = values[np.isfinite(values)]
    return {
        "name": name, "shape": shape, "dtype": "float32",
        **({"layout": "NCHW"} if len(shape) == 4 else {}),
        **({"range": [float(finite.min()), float(finite.max())]} if finite.size else {}),
    }  # fmt: skip


def _told(kernel: Kernel, fmt: str) -> dict[str, str]:
    """What the manifest says of a kernel; schedule: where it is not the default one."""
    schedule = {"schedule": kernel.timed.text} if kernel.timed else {}
    return {
        "kernel": kernel.name, "execution": kernel.execution(format_named(fmt)), **schedule
    }  # fmt: skip


def _golden(
    graph: Graph, assignment: Assignment, quantizers: Quantizers,
    samples: Mapping[str, np.ndarray], calls: tuple[str, ...],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:  # fmt: skip
    """Inputs, outputs and checksums of stored tensors, by the exact simulator."""
    import torch

    from hwmpq.quantize.simulate import Simulator

    simulator = Simulator(graph, assignment, quantizers)
    layout = layouts(graph)
    stored = simulator.resolved.plan.stored
    arrays: dict[str, np.ndarray] = {}
    count = min(SAMPLES, *map(len, samples.values()))
    checks: dict[str, str] = {"samples": str(count), "version": "1"}
    written = set(calls)
    for k in range(count):
        given = {
            name: np.repeat(samples[name][k : k + 1], graph.tensors[name][0], axis=0)
            for name in graph.inputs
        }

        def observe(name: str, value: Any, k: int = k) -> None:
            if name in written:
                checks[f"{k}.{name}"] = checksum(
                    _in_memory(value.numpy(), stored[name], layout[name])
                )

        with torch.inference_mode():
            outputs = simulator({n: torch.from_numpy(x) for n, x in given.items()}, observe)
        arrays |= {f"{k}.input.{name}": x for name, x in given.items()}
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

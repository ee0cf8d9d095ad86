"""Variants of a task, run by the workers of a pool: each holds the model once.

The task goes to them as files, and what comes back are outputs, so every estimator makes of them
what it makes of its own runs: the same numbers, whoever ran.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwmpq import tensors
from hwmpq.errors import DeviceError, InputError
from hwmpq.executor import Pool
from hwmpq.graph import Graph, Node
from hwmpq.quantize.scores import LOSSES
from hwmpq.quantizers import Quantizers
from hwmpq.sensitivity.rerun import Branch, Outputs, Runs
from hwmpq.sensitivity.task import Cells, Task

#: Parts per worker, at least: the last ones leave the others idle for one part's time at most.
PARTS = 4
#: At most so many variants of a part, and bytes of their outputs, more or less: what is found is
#: kept part by part.
PART_VARIANTS, PART_BYTES = 64, 64 * 2**20
#: Longest time of a part.
DEADLINE_S = 4 * 3600.0
_TASK, _QUANTIZERS, _SAMPLES, _OUTPUTS = (
    "task.json", "quantizers.safetensors", "samples.safetensors", "outputs.safetensors",
)  # fmt: skip
_GRAPH, _CONSTANTS = "graph.json", "constants.safetensors"


def shared_out(
    runs: Runs, schedule: Sequence[Branch], pool: Pool
) -> Iterator[tuple[Cells, Outputs]]:
    """Every variant of the schedule with its outputs in one batch, as workers find them.

    Raises InputError for samples on another device than the CPU, and what a worker raised.
    """
    task, work = runs.task, runs.work(schedule)
    shapes = [(task.samples, *task.graph.tensors[name][1:]) for name in task.graph.outputs]
    nbytes = 4 * sum(map(prod, shapes))
    most = max(1, min(PART_VARIANTS, PART_BYTES // nbytes))
    parts = divided(schedule, work, max(PARTS * len(pool.workers), ceil(len(work) / most)))
    with tempfile.TemporaryDirectory(prefix="hwmpq-") as folder:
        given, made = Path(folder) / "task", Path(folder) / "parts"
        write(task, given)
        payloads = [
            {"reads": [str(given)], "folder": str(made / str(i)), "cells": part}
            for i, part in enumerate(parts)
        ]
        for i, found in pool.map(f"{__name__}:outputs", payloads, DEADLINE_S):
            if isinstance(found, DeviceError):
                raise found
            runs.layer_runs += found["layer_runs"]
            runs.whole_runs += len(parts[i])
            arrays, _ = tensors.load(made / str(i) / _OUTPUTS)
            shutil.rmtree(made / str(i))
            for k, cells in enumerate(parts[i]):
                each = [torch.tensor(arrays[f"{k} {n}"]) for n in range(len(shapes))]
                yield cells, [each]


def divided(
    schedule: Sequence[Branch], work: Mapping[Cells, float], count: int
) -> list[list[Cells]]:
    """At most `count` parts of about equal work, each of neighbours in the schedule, as these have
    most in common."""
    order = [
        cells
        for branch in schedule
        for cells in (*(pair for _, pair in branch.leaves), *([branch.base] * branch.own))
    ]
    parts: list[list[Cells]] = [[] for _ in range(count)]
    total, spent = sum(work.values()), 0.0
    for cells in order:
        parts[min(int(spent / total * count), count - 1)].append(cells)
        spent += work[cells]
    return [part for part in parts if part]


def outputs(payload: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's part. reads: a folder of `write`; folder: gets the outputs; cells: the variants,
    whose outputs are named by their place here and by their own."""
    runs = _held(*payload["reads"])
    wanted = {tuple((i, j) for i, j in cells): k for k, cells in enumerate(payload["cells"])}
    before, arrays = runs.layer_runs, {}
    for cells, batches in runs.run(runs.schedule(wanted)):
        for n, parts in enumerate(zip(*batches, strict=True)):
            arrays[f"{wanted[cells]} {n}"] = torch.cat(parts).numpy()
    folder = Path(payload["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    tensors.save(folder / _OUTPUTS, arrays)
    return {"layer_runs": runs.layer_runs - before}


@lru_cache(1)
def _held(folder: str) -> Runs:
    """The task of a folder, which every part of it uses again."""
    return Runs(read(Path(folder)))


def write(task: Task, folder: Path) -> None:
    """Files of all that running variants needs. Raises InputError for samples not on the CPU."""
    if task.device.type != "cpu":
        raise InputError("samples for workers", str(task.device), "cpu")
    folder.mkdir()
    write_graph(task.graph, folder)
    told = {"layers": task.layers, "formats": task.formats, "batch": task.batch}
    (folder / _TASK).write_text(json.dumps(told))
    task.quantizers.save(folder / _QUANTIZERS)
    tensors.save(folder / _SAMPLES, {name: x.numpy() for name, x in task.inputs.items()})


def read(folder: Path) -> Task:
    """A task that runs the same variants as the written one; it knows no labels and saves nothing.

    Raises InputError for files that are not those of `write`.
    """
    told = json.loads((folder / _TASK).read_text())
    samples, _ = tensors.load(folder / _SAMPLES)
    return Task(
        graph=read_graph(folder),
        quantizers=Quantizers.load(folder / _QUANTIZERS),
        inputs={name: torch.tensor(x) for name, x in samples.items()},
        labels=None,
        layers=tuple(told["layers"]),
        formats=tuple(told["formats"]),
        legal=np.ones((len(told["layers"]), len(told["formats"])), bool),
        progress=None,
        done=lambda item: None,
        save=None,
        forecast=None,
        batch=told["batch"],
        seed=0,
        loss=LOSSES["kl"],
    )


def write_graph(graph: Graph, folder: Path) -> None:
    """Its files in the folder."""
    told = {
        "nodes": [asdict(node) for node in graph.nodes], "inputs": graph.inputs,
        "outputs": graph.outputs, "tensors": graph.tensors,
    }  # fmt: skip
    (folder / _GRAPH).write_text(json.dumps(told))
    tensors.save(folder / _CONSTANTS, graph.constants)


def read_graph(folder: Path) -> Graph:
    """What `write_graph` wrote. Raises InputError for other files."""
    told = json.loads((folder / _GRAPH).read_text())
    constants, _ = tensors.load(folder / _CONSTANTS)
    return Graph(
        tuple(told["inputs"]), tuple(told["outputs"]),
        tuple(Node(**{**node, "inputs": tuple(node["inputs"])}) for node in told["nodes"]),
        {name: tuple(shape) for name, shape in told["tensors"].items()}, constants,
    )  # fmt: skip

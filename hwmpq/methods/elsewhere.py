"""A plan in several settings, run by the workers of a pool: each holds network and images once.

What comes back are outputs, of which the caller makes losses as it does of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hwmpq import tensors
from hwmpq.data import DataSet
from hwmpq.errors import DeviceError
from hwmpq.executor import Pool
from hwmpq.graph import Graph
from hwmpq.quantize.judge import predict
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.sensitivity.elsewhere import read_graph, write_graph
from hwmpq.stages.pool import pool_of

if TYPE_CHECKING:
    from hwmpq.stages.job import Job

#: Images of an item.
IMAGES = 64
#: Longest time of an item.
DEADLINE_S = 3600.0
_IMAGES, _NUMBERS, _OUTPUTS = "images.safetensors", "quantizers.safetensors", "outputs.safetensors"


@dataclass(frozen=True)
class Holders:
    """Workers that hold one network and its images. folder: of their files."""

    pool: Pool
    folder: Path

    def outputs(
        self, plan: Mapping[str, str], numbers: Mapping[str, Callable[[], Quantizers]], start: int,
        stop: int,
    ) -> Iterator[tuple[str, Tensor, float]]:  # fmt: skip
        """(name, first output of the images from start to stop, seconds) of each of the numbers.

        The names are folders', and those of equal numbers of one plan. Raises what a worker raised.
        """
        for name, make in numbers.items():
            own = self.folder / name
            if not own.exists():
                own.mkdir()
                make().only(plan).save(own / _NUMBERS)
        items = [(name, i) for name in numbers for i in range(start, stop, IMAGES)]
        with tempfile.TemporaryDirectory() as made:
            folders = [Path(made) / name / str(i) for name, i in items]
            payloads = [
                {
                    "reads": [str(self.folder / "task"), str(self.folder / name)],
                    "folder": str(folder), "plan": dict(plan), "start": i,
                    "stop": min(i + IMAGES, stop),
                }
                for (name, i), folder in zip(items, folders, strict=True)
            ]  # fmt: skip
            seconds = dict.fromkeys(numbers, 0.0)
            for number, found in self.pool.map(f"{__name__}:run", payloads, DEADLINE_S):
                if isinstance(found, DeviceError):
                    raise found
                seconds[items[number][0]] += found["seconds"]
            parts: dict[str, list[Tensor]] = {name: [] for name in numbers}
            for (name, _), folder in zip(items, folders, strict=True):
                parts[name].append(torch.tensor(tensors.load(folder / _OUTPUTS)[0]["outputs"]))
        for name, own_parts in parts.items():
            yield name, torch.cat(own_parts), seconds[name]


@contextmanager
def holders(job: Job, images: DataSet) -> Iterator[Holders | None]:
    """The workers of --executor for the job's network and these images; None for 'serial'."""
    with pool_of(job) as pool, tempfile.TemporaryDirectory(prefix="hwmpq-") as name:
        if pool is None:
            yield None
            return
        task = Path(name) / "task"
        task.mkdir()
        write_graph(job.graph, task)
        scales = {"mean": np.array(images.mean), "std": np.array(images.std)}
        tensors.save(task / _IMAGES, {"images": images.images, **scales})
        yield Holders(pool, Path(name))


def run(payload: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's item. reads: the folders of network and images, and of the numbers; plan; start,
    stop: of the images; folder: gets the outputs."""
    began = time.perf_counter()
    task, numbers = payload["reads"]
    graph, images = _held(task)
    simulator = Simulator(graph, payload["plan"], Quantizers.load(Path(numbers) / _NUMBERS))
    outputs = predict(simulator, images.subset(range(payload["start"], payload["stop"])))
    folder = Path(payload["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    tensors.save(folder / _OUTPUTS, {"outputs": outputs.numpy()})
    return {"seconds": time.perf_counter() - began}


@lru_cache(1)
def _held(folder: str) -> tuple[Graph, DataSet]:
    """What `holders` wrote, which every item uses again."""
    arrays, _ = tensors.load(Path(folder) / _IMAGES)
    mean, std = (tuple(map(float, arrays[name])) for name in ("mean", "std"))
    return read_graph(Path(folder)), DataSet(arrays["images"], None, mean, std, "held-out images")

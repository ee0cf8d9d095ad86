"""A network small enough to be quantized in seconds, and ways to stop and to speed up a run.

As a program (`python tiny_job.py STORE OUT STAGE ITEM`): quantizes it, and stands still at the
given item of the given stage until it is killed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import hwmpq
from hwmpq.pipeline import Result


class Tiny(nn.Module):
    """Two layers on 16×16 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def quantize_tiny(**more: Any) -> Result:
    words: dict[str, Any] = {
        "calib": "digits#train", "eval": "digits#test", "calib_count": 16, "eval_count": 32,
        "formats": ["fp32", "w8a8"], "latency": "20x",
    }  # fmt: skip
    words |= more
    return hwmpq.quantize(tiny(), torch.zeros(1, 1, 16, 16), words.pop("calib"), **words)


class Halt:
    """Progress that says 'here' at an item of a stage, and waits there for its end."""

    def __init__(self, stage: str, item: int):
        self.at, self.item = stage, item

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        count = 0

        def advance(items: int) -> None:
            nonlocal count
            count += items
            if name.startswith(self.at) and count >= self.item:
                self.wait()

        if name.startswith(self.at) and not self.item:
            self.wait()
        yield advance

    def note(self, text: str) -> None:
        pass

    def wait(self) -> None:
        print("here", flush=True)
        time.sleep(600)


class SharedWorker:
    """Stands for `WorkerProcess`, so that the runs of a test file start TVM once in a worker."""

    def __init__(self) -> None:
        from hwmpq.measure import WorkerProcess

        self.worker = WorkerProcess(threads=1)

    def __call__(self, prefix: Any = (), *, threads: int = 1) -> SharedWorker:
        assert threads == 1 and not prefix
        return self

    def __enter__(self) -> Any:
        return self.worker

    def __exit__(self, *_: object) -> None:
        pass


def main(store: str, out: str, stage: str, item: str) -> None:
    hwmpq.trace(tiny(), (torch.zeros(1, 1, 16, 16),))  # loads what is slow before the start
    input()
    formats = ["fp32", "w8a8", "w4a8"]
    quantize_tiny(store=store, out=out, formats=formats, progress=Halt(stage, int(item)))
    print("finished", flush=True)


if __name__ == "__main__":
    from hwmpq import pipeline  # noqa: F401  (all that is slow is loaded before the start is given)

    main(*sys.argv[1:])

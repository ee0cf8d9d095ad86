"""A network small enough to be quantized in seconds, and a way to stop a run.

As a program (`python tiny_job.py STORE OUT`): quantizes it again and again, each time standing
still at an item of a stage until it is killed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import hwmpq
from hwmpq.pipeline import Result

FORMATS = ["fp32", "w8a8", "w4a8"]


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
    """Progress that says its process's number at an item of a stage, and waits there."""

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
        print(os.getpid(), flush=True)
        time.sleep(600)


def main(store: str, out: str) -> None:
    """For each line STAGE:ITEM: a run in a fork, so that what is slow is loaded once."""
    import tvm  # noqa: F401

    hwmpq.trace(tiny(), (torch.zeros(1, 1, 16, 16),))
    for line in sys.stdin:
        stage, item = line.split(":")
        pid = os.fork()
        if pid == 0:
            progress = Halt(stage, int(item))
            quantize_tiny(store=store, out=out, formats=FORMATS, progress=progress)
            os._exit(0)
        print(f"ended by {os.waitpid(pid, 0)[1]}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

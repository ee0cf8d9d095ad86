"""What a GPU runs: kernels one after the other, and the memory that they work on.

A value between those who compile (`kernels`, `lower`) and those who run (`artifact`, `measure`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq.errors import InputError, in_words

_MOST_BYTES = 2**36


@dataclass(frozen=True)
class Launch:
    """One kernel. blocks: along x and y; threads, shared_bytes: of a block; arguments: numbers of
    buffers as the kernel takes them; writes: that of its result, of so many elements of dtype."""

    kernel: str
    blocks: tuple[int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[int, ...]
    writes: int
    size: int
    dtype: str


@dataclass(frozen=True)
class Launches:
    """arch: the chip's, such as 'sm_90'; buffers: bytes of each; inputs, parameters, outputs:
    numbers of those that hold them."""

    arch: str
    buffers: tuple[int, ...]
    inputs: tuple[int, ...]
    parameters: tuple[int, ...]
    outputs: tuple[int, ...]
    launches: tuple[Launch, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def parse(raw: bytes, of: Path) -> Launches:
        """Raises InputError for what is no such list, or leads outside its memory."""
        try:
            told = json.loads(raw)
            buffers, inputs, parameters, outputs = (
                tuple(map(int, told[name]))
                for name in ("buffers", "inputs", "parameters", "outputs")
            )
            calls = tuple(map(_launch, told["launches"]))
            found = Launches(told["arch"], buffers, inputs, parameters, outputs, calls)
            found._check()
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(f"damaged list of launches of {of}", in_words(error)) from error
        return found

    def _check(self) -> None:
        """Raises ValueError, IndexError, TypeError."""
        _need(self.arch.startswith("sm_"), "arch")
        _need(all(0 < nbytes <= _MOST_BYTES for nbytes in self.buffers), "bytes of a buffer")
        for launch in self.launches:
            _need(launch.kernel.isidentifier(), "name of a kernel")
            _need(prod(launch.blocks) > 0 and 0 < launch.threads <= 1024, "grid")
            _need(0 <= launch.shared_bytes < 2**20, "shared memory")
            nbytes = launch.size * np.dtype(launch.dtype).itemsize
            _need(0 < nbytes <= self.buffers[launch.writes], "size of a result")
        listed = (self.inputs, self.parameters, self.outputs)
        self._inside(number for numbers in listed for number in numbers)
        self._inside(i for launch in self.launches for i in (*launch.arguments, launch.writes))

    def _inside(self, numbers: Iterable[int]) -> None:
        _need(all(0 <= number < len(self.buffers) for number in numbers), "number of a buffer")


def _launch(told: dict[str, Any]) -> Launch:
    x, y = told["blocks"]
    return Launch(**{**told, "blocks": (x, y), "arguments": tuple(told["arguments"])})


def _need(good: bool, what: str) -> None:
    if not good:
        raise ValueError(what)

"""A kernel with a known answer: a device that computes and times it is fit for use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import tensors
from hwmpq.measure import kernel
from hwmpq.measure.protocol import Cell

_SOURCE = """
@T.prim_func(s_tir=True)
def main(a: T.Buffer((256,), "int32"), w: T.Buffer((256,), "int32"), c: T.Buffer((256,), "int32")):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    for i in T.serial(256):
        c[i] = a[i] * w[i] + 7
"""


def make(folder: Path, target: Mapping[str, Any]) -> Cell:
    """Compile it into a new folder. target: TVM's description of the device's target."""
    kernel.export_loop(folder / "loop", "main", 3, target)
    (folder / "probe.so").write_bytes(kernel.library(_SOURCE, target))
    numbers = np.arange(256, dtype=np.int32)
    tensors.save(folder / "args", {"0": numbers, "1": numbers[::-1].copy(), "2": 0 * numbers})
    tensors.save(folder / "right", {"2": numbers * numbers[::-1] + 7})
    return Cell(
        "probe", roles=("input", "weight", "output"), loop=str(folder / "loop"),
        library=str(folder / "probe.so"), args=str(folder / "args"), expected=str(folder / "right"),
    )  # fmt: skip

"""Estimated cycles per 1000 MACs of matrix products on ARM cores, by their own micro-kernels.

    python tools/bench/arm_cycles.py [--sizes 128,512] [--json F.json]

A linear layer of size × size × size, as it is shipped: biases, requantization, activations packed
by the call. Counted under QEMU, costed by llvm-mca (`hwmpq.measure.static_model`): nothing here was
timed on a chip. floor: by the target's peak. tvm: TVM schedules written by hand for that
instruction, at 128, by the same model; they store bare sums, and the last one is given packed
activations.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hwmpq import targets
from hwmpq.errors import HwmpqError
from hwmpq.formats import format_named
from hwmpq.kernels import Call, candidates
from hwmpq.kernels.build import export, in_call_order, library
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.sample import draw
from hwmpq.measure import static_model
from hwmpq.types import Workload

#: Target, format, micro-kernel, and what the hand-written TVM schedule takes.
ROWS: tuple[tuple[str, str, str, float | None], ...] = (
    ("arm-cortex-a72", "fp32", "neon_fma", 266.0),
    ("arm-cortex-a72", "w8a8", "neon_smull", 154.0),
    ("arm-cortex-a72", "w4a8", "neon_smull", None),
    ("arm-cortex-a76", "fp32", "neon_fma", 145.0),
    ("arm-cortex-a76", "w8a8", "neon_sdot", 52.0),
    ("arm-cortex-a76", "w4a8", "neon_sdot", None),
    ("arm-neoverse-n2", "fp32", "neon_fma", None),
    ("arm-neoverse-n2", "w8a8", "neon_usdot", None),
    ("arm-neoverse-n2", "w8a8", "neon_usmmla", 19.0),
    ("arm-neoverse-n2", "bf16", "neon_bfdot", None),
    ("arm-neoverse-n2", "bf16", "neon_bfmmla", None),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="128,512")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    try:
        rows = [row(*given, sizes) for given in ROWS]
    except HwmpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps({"version": 1, "rows": rows}, indent=1) + "\n")
    table = Table("target", "format", "kernel", "floor", *(f"{s}^3" for s in sizes), "tvm")
    for one in rows:
        cells = [f"{one['cycles'][str(size)]:.1f}" for size in sizes]
        beside = "" if one["tvm"] is None else f"{one['tvm']:.0f}"
        names = (one["target"], one["format"], one["micro"], f"{one['floor']:.1f}")
        table.add_row(*names, *cells, beside)
    Console().print(table)
    return 0


def row(name: str, fmt: str, micro: str, tvm: float | None, sizes: list[int]) -> dict[str, Any]:
    """Cycles per 1000 MACs at every size."""
    target = targets.load(name)
    peaks = {"fp32": "fp32.fp32", "bf16": "bf16.bf16"}
    floor = 1000 / target.peaks[peaks.get(fmt, "u8.s8")]
    cycles = {str(size): estimated(target, fmt, micro, size) for size in sizes}
    print(f"{name} {fmt} {micro}: {cycles}", file=sys.stderr)
    return {
        "target": name, "format": fmt, "micro": micro, "floor": floor, "cycles": cycles, "tvm": tvm,
    }  # fmt: skip


def estimated(target: targets.Target, name: str, micro: str, size: int) -> float:
    """Cycles per 1000 MACs of one layer."""
    fmt = format_named(name)
    layer = Workload.make("linear", "bias", m=size, n=size, k=size)
    call = Call(layer, fmt, fmt.activation.name, "u8" if fmt.is_integer else fmt.activation.name)
    [kernel] = [k for k in candidates(layer, fmt, target.features) if k.micro.name == micro]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.so"
        export(library(kernel.emit(call), target), path, target)
        arguments = in_call_order(kernel, call, draw(call, 0))
        out = np.zeros(size * size, memory_dtype(call.out))
        found, _ = static_model.estimate(path, [*arguments, out], target)
    return found.cycles / layer.macs * 1000


if __name__ == "__main__":
    sys.exit(main())

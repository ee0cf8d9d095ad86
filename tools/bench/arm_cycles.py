"""Estimated cycles per 1000 MACs of matrix products on ARM cores, by their own micro-kernels.

    python tools/bench/arm_cycles.py [--sizes 128,512] [--json F.json]

A linear layer of size × size × size, as it is shipped: biases, requantization, activations packed
by the call. Counted under QEMU, costed by llvm-mca (`hwmpq.measure.static_model`): nothing here was
timed on a chip. floor: by the target's peak. deeper: what the products alone take, from 128 × 128 ×
128 to twice that depth. tvm: TVM schedules written by hand for that instruction, at 128, by the
same model; they store bare sums, and the last one is given packed activations: it compares with
deeper. Requantizing sums of 128 products takes a Neoverse N2 10 cycles per 1000 of them, 8 of which
its one converter of fp32 is busy with: SCVTF and FCVTNS, 2 cycles each for four sums.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import record

from hwmpq import targets
from hwmpq.errors import HwmpqError
from hwmpq.formats import format_named
from hwmpq.kernels import Call, candidates
from hwmpq.kernels.build import export, in_call_order, library
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.sample import draw
from hwmpq.measure import static_model
from hwmpq.types import Workload

#: The size of the hand-written ones.
_SHORT = 128
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
    record.option(parser)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    try:
        rows = [row(*given, sizes) for given in ROWS]
    except HwmpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    columns = ("target", "format", "kernel", "floor", *(f"{s}^3" for s in sizes), "deeper", "tvm")
    table = record.Table(columns, [_cells(one) for one in rows])
    record.show(table)
    record.write(args.json, table, rows=rows)
    return 0


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    cycles = [one["floor"], *one["cycles"].values(), one["deeper"]]
    beside = "" if one["tvm"] is None else f"{one['tvm']:.0f}"
    return one["target"], one["format"], one["micro"], *(f"{c:.1f}" for c in cycles), beside


def row(name: str, fmt: str, micro: str, tvm: float | None, sizes: list[int]) -> dict[str, Any]:
    """Cycles per 1000 MACs at every size."""
    target = targets.load(name)
    peaks = {"fp32": "fp32.fp32", "bf16": "bf16.bf16"}
    floor = 1000 / target.peaks[peaks.get(fmt, "u8.s8")]
    cycles = {str(size): estimated(target, fmt, micro, size, size) for size in sizes}
    once, twice = (estimated(target, fmt, micro, _SHORT, depth) for depth in (_SHORT, 2 * _SHORT))
    deeper = 2 * twice - once
    print(f"{name} {fmt} {micro}: {cycles}, deeper {deeper}", file=sys.stderr)
    return {
        "target": name, "format": fmt, "micro": micro, "floor": floor, "cycles": cycles,
        "deeper": deeper, "tvm": tvm,
    }  # fmt: skip


def estimated(target: targets.Target, name: str, micro: str, size: int, depth: int) -> float:
    """Cycles per 1000 MACs of one layer of size × size results."""
    fmt = format_named(name)
    layer = Workload.make("linear", "bias", m=size, n=size, k=depth)
    call = Call(layer, fmt, fmt.activation.name, "u8" if fmt.is_integer else fmt.activation.name)
    [kernel] = [k for k in candidates(layer, fmt, target.features) if k.micro.name == micro]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.so"
        export(library({"main": kernel.emit(call)}, target), path, target)
        arguments = in_call_order(kernel, call, draw(call, 0))
        out = np.zeros(size * size, memory_dtype(call.out))
        found, _ = static_model.estimate(path, [*arguments, out], target)
    return found.cycles / layer.macs * 1000


if __name__ == "__main__":
    sys.exit(main())

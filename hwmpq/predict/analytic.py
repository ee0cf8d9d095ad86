"""What a cell has to do, counted in cycles: the static half of the prediction.

`Work.terms` are cycles of one core under nominal costs; the fit gives each a factor (seconds per
nominal cycle) and XGBoost learns the ratio of the measured time to their weighted sum, a bounded
and scale-free quantity (as NeuSight predicts utilisation: ASPLOS 2025, arXiv 2407.13853). The
nominal costs only need the right shape: their sizes are fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from hwmpq.errors import InputError
from hwmpq.formats import Format
from hwmpq.kernels import Call, Kernel, Schedule, kernel_named
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.nests.depthwise import EDGE
from hwmpq.kernels.nests.gemm import Packing, pixels_of
from hwmpq.kernels.nests.image import Geometry
from hwmpq.kernels.nests.tiling import Tiling
from hwmpq.kernels.nests.toom import POINTS, SIDE
from hwmpq.kernels.nests.winograd import Winograd, cycles
from hwmpq.predict.loops import copy_cycles, depthwise_loops, gemm_loops
from hwmpq.targets import Caches, Target
from hwmpq.types import FloatArray, Workload

#: compute: dots, by the micro-kernel's own estimate. crowded: those of blocks that share the row
#: loop with another block and with channels that fill no vector: their sums leave the registers.
#: block: to begin a block of sums. epilogue: requantization and stores of whole vectors. tail:
#: stores of single channels. copy: the padded or widened input. decode: unpacking the weights.
#: operand: packing operand b. restream: weight tiles that do not stay in L1. weights, activations:
#: bytes from the level they lie in. call: 1.
TERMS = (
    "compute", "crowded", "block", "epilogue", "tail", "copy", "decode", "operand", "restream",
    "weights", "activations", "call",
)  # fmt: skip
#: Nominal cycles of one call of a kernel with its set-up.
_CALL = 200.0
#: Nominal bytes per cycle from L2, L3 and memory; twice the vector width from L1.
_L2, _L3, _MEMORY = 32.0, 12.0, 4.0
_ITEM = {"float32": 4, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True, eq=False)
class Work:
    """A cell in numbers. Bytes are as they lie in memory; weights packed. peak: MACs per cycle.

    kdepth: reduction steps per output as executed, with padding (elements); lanes_padded: output
    channels as executed; copied: elements of the scratch input; tile_bytes: decoded weights of one
    vector block; parallel: iterations that threads share; speedup: what they can gain at most.
    terms: [TERMS] nominal cycles.
    """

    g: Geometry
    schedule: Schedule
    macs: float
    in_bytes: float
    weight_bytes: float
    out_bytes: float
    residual_bytes: float
    peak: float
    kdepth: int
    lanes_padded: int
    copied: int
    tile_bytes: float
    parallel: int
    speedup: float
    terms: FloatArray

    @property
    def nbytes(self) -> float:
        return self.in_bytes + self.weight_bytes + self.out_bytes + self.residual_bytes

    @property
    def memory_cycles(self) -> float:
        """Every byte once, from where it lies."""
        return self.term("weights") + self.term("activations")

    def term(self, name: str) -> float:
        """Nominal cycles of one of TERMS."""
        return float(self.terms[TERMS.index(name)])

    @property
    def roofline(self) -> float:
        """Cycles: the larger of the multiplies at their peak and the bytes at their bandwidth."""
        return max(self.macs / self.peak / self.speedup, self.memory_cycles)


def cell_call(workload: Workload, fmt: Format, threads: int) -> Call:
    """The call a latency cell stands for: tensors in the format's own encoding (design 4)."""
    own = fmt.activation.name
    residual = own if "add" in workload.epilogue.split("+") else ""
    b = "" if workload.has_weight else fmt.weight.name
    return Call(workload, fmt, own, own, residual, b, threads)


def resolve(kernel: Kernel | str, workload: Workload, fmt: Format, target: Target) -> Kernel:
    """The kernel of that name. Raises InputError when the target does not run the cell with it."""
    if isinstance(kernel, Kernel):
        return kernel
    return kernel_named(kernel, workload, fmt, target.features)


def bandwidth(nbytes: float, caches: Caches, vector_bytes: int) -> float:
    """Nominal bytes per cycle of data of this size that is walked through again and again."""
    if nbytes <= caches.l1d:
        return 2.0 * vector_bytes
    return _L2 if nbytes <= caches.l2 else _L3 if nbytes <= caches.l3 else _MEMORY


def peak_macs(fmt: Format, kernel: Kernel, target: Target) -> float:
    """Multiply-accumulates per cycle: of the operand pair as stored, else as multiplied, else of
    its family. Raises InputError when the target states none of them."""
    micro = kernel.micro
    family = "fp32.fp32" if micro.acc_dtype == "float32" else "u8.s8"
    multiplied = "s16.s16" if micro.w_dtype == "int16" else family
    for pair in (f"{fmt.activation.name}.{fmt.weight.name}", multiplied, family):
        if pair in target.peaks:
            return target.peaks[pair]
    raise InputError(
        f"peaks of target {target.name}", sorted(target.peaks), family, "Add it to the target file."
    )


def work(workload: Workload, fmt: Format, kernel: Kernel, target: Target, threads: int = 1) -> Work:
    """Count what the kernel does for the workload by its default schedule."""
    found = _direct(workload, fmt, kernel, target, threads)
    if isinstance(kernel.nest, Winograd):
        return _transformed(found, workload, fmt, kernel, target, threads)
    return found


def _transformed(
    direct: Work, workload: Workload, fmt: Format, kernel: Kernel, target: Target, threads: int
) -> Work:
    """The work of a kernel that multiplies transformed operands, from that of one that does not."""
    t = Tiling.of(workload, kernel.micro, kernel.decoder.unit)
    schedule, micro = direct.schedule, kernel.micro
    spent = cycles(t, schedule, micro, fmt)
    by_channels = schedule.order == "vectors"
    block, vectors = t.block(schedule), min(schedule.vectors, t.vectors)
    parallel = max(t.vectors // vectors, 1) if by_channels else -(-t.tiles // block)
    speedup = parallel / -(-parallel // threads)
    caches, wide = target.caches, target.vector_bytes
    written = direct.out_bytes + direct.residual_bytes
    moved = sum(n / bandwidth(n, caches, wide) for n in (direct.in_bytes, written))
    nominal = dict(zip(TERMS, direct.terms, strict=True)) | {
        "compute": spent.products / speedup,
        "crowded": 0.0,
        "block": 0.0,
        "copy": direct.term("copy") + spent.data / speedup,
        "decode": spent.weights / speedup,
        "epilogue": spent.results / speedup,
        "restream": spent.stream / speedup,
        "activations": moved / speedup,
    }
    return replace(
        direct,
        peak=direct.peak * 9 * SIDE**2 / POINTS,
        kdepth=t.used * micro.kstep * POINTS // SIDE**2,
        tile_bytes=float((vectors if by_channels else t.vectors) * t.steps * t.width * POINTS * 2),
        parallel=parallel,
        speedup=speedup,
        terms=np.array([nominal[name] for name in TERMS]),
    )


def _direct(workload: Workload, fmt: Format, kernel: Kernel, target: Target, threads: int) -> Work:
    """The work of a kernel that multiplies every weight with every input under it."""
    call = cell_call(workload, fmt, threads)
    schedule, micro = kernel.schedule(call), kernel.micro
    g, depthwise = Geometry.of(workload), workload.op == "depthwise"
    packing = Packing.of(g, micro, kernel.decoder.unit)
    vectors = -(-g.cout // micro.lanes) if depthwise else packing.vectors
    steps = g.kh * g.kw if depthwise else packing.steps
    lanes_padded = vectors * micro.lanes * (1 if depthwise else g.groups)
    copied = _copied(call, kernel, g, packing, depthwise)
    weights, out = prod(workload.weight_shape), prod(workload.out_shape)
    weight_bytes = float(fmt.weight.packed_nbytes(weights))
    if not workload.has_weight:
        weight_bytes = float(weights * _ITEM[memory_dtype(call.b)])
    act = _ITEM[memory_dtype(call.x)]
    in_bytes = float(prod(workload.in_shape) * act)
    residual_bytes = float(out * act if call.residual else 0)
    parallel = _parallel(g, schedule, vectors, workload)
    speedup = parallel / -(-parallel // threads)
    width = _ITEM[kernel.nest.weight_dtype(micro)]
    per_step = micro.lanes if depthwise else packing.width
    tile_bytes = float(min(schedule.vectors, vectors) * steps * per_step * width)
    decoded = 0.0 if kernel.decoder.identity else float(lanes_padded * steps * per_step)
    decoded /= micro.lanes
    operand = 0.0  # one element at a time (nests/operand.py)
    if not workload.has_weight:
        decoded, operand = 0.0, float(g.n * packing.vectors * packing.steps * packing.width)
    again = 0.0
    if tile_bytes > target.caches.l1d:
        rows = min(schedule.rows, g.out[1] if depthwise else pixels_of(workload))
        again = lanes_padded * steps * micro.kstep * width * g.n * prod(g.out) / rows
        again /= bandwidth(tile_bytes, target.caches, target.vector_bytes)
    passes = -(-vectors // schedule.vectors) if schedule.order == "vectors" else 1
    caches, wide = target.caches, target.vector_bytes
    # weights are rotated through more than twice the L2 (design section 4, a latency cell)
    cold = max(weight_bytes, 2.0 * caches.l2 + 1) if workload.has_weight else weight_bytes
    read = in_bytes * passes / bandwidth(in_bytes, caches, wide)
    written = out * act + residual_bytes
    loops = depthwise_loops(call, kernel, g) if depthwise else gemm_loops(call, kernel, g)
    nominal = {
        **{name: cycles / speedup for name, cycles in loops.items()},
        "copy": copy_cycles(g, micro.vector_bytes // _ITEM[micro.a_dtype]) if copied else 0.0,
        "decode": decoded / micro.vector_bytes,
        "operand": operand,
        "restream": again / speedup,
        "weights": weight_bytes / bandwidth(cold, caches, wide),
        "activations": (read + written / bandwidth(written, caches, wide)) / speedup,
        "call": _CALL,
    }
    return Work(
        g, schedule, float(workload.macs), in_bytes, weight_bytes, float(out * act),
        residual_bytes, peak_macs(fmt, kernel, target), steps * micro.kstep, lanes_padded, copied,
        tile_bytes, parallel, speedup, np.array([nominal[name] for name in TERMS]),
    )  # fmt: skip


def _copied(call: Call, kernel: Kernel, g: Geometry, packing: Packing, depthwise: bool) -> int:
    """Elements of the scratch input, 0 where the input is read in place (image.copy_padded)."""
    micro = kernel.micro
    dtype, over = micro.a_dtype, packing.per_segment * micro.kstep > g.segment
    height, width = g.padded
    padded = (height, width) != (g.h, g.w)
    if depthwise:
        dtype = "float32" if micro.acc_dtype == "float32" else "uint8"
        over = g.cin % micro.lanes != 0
        padded = g.out[0] - inner_rows(g) > EDGE
    if memory_dtype(call.x) == dtype and not over and not padded:
        return 0
    return g.n * height * width * g.cin


def inner_rows(g: Geometry) -> int:
    """Rows of the result whose windows lie between the first and the last row of the image."""
    last = g.h + g.pt - (g.kh - 1) * g.dh
    return sum(g.pt <= y * g.sh < last for y in range(g.out[0]))


def inner_columns(g: Geometry) -> int:
    """As `inner_rows`, of the columns."""
    last = g.w + g.pl - (g.kw - 1) * g.dw
    return sum(g.pl <= x * g.sw < last for x in range(g.out[1]))


def _parallel(g: Geometry, schedule: Schedule, vectors: int, workload: Workload) -> int:
    """Iterations of the loop that runs in parallel (nests/gemm.py and nests/depthwise.py)."""
    if not workload.has_weight:
        return g.n
    if workload.op == "depthwise":
        return g.out[0]
    if schedule.order == "vectors":
        return max(vectors // schedule.vectors, 1)
    return max(pixels_of(workload) // schedule.rows, 1)

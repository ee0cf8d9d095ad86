"""The tile of a block of threads: how many pixels, channels, warps and lines under way."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from hwmpq.kernels.cuda.decode import LINE
from hwmpq.kernels.micro.cuda import WarpMicro
from hwmpq.kernels.nests import Call, Schedule
from hwmpq.kernels.nests.image import Geometry

_ROWS, _EIGHTS, _STAGES = (16, 32, 64, 128, 256), (4, 8, 16), (4, 3, 2)
#: Shared memory that a block may have on every chip from 8.0 on, and its threads at most here.
#: Source: CUDA C++ Programming Guide, technical specifications (8.6 and 8.9: 99 KiB).
_MEMORY, _THREADS = 99 * 1024, 256
#: Multiprocessors that the estimate is made for: those of an A100.
_PROCESSORS = 108
#: Cycles of a line that no other work hides: barrier, addresses, the first products' latency.
_LINE_CYCLES = 60


@dataclass(frozen=True)
class Tile:
    """rows: pixels; eights: channels / 8; stages: lines of the reduction in shared memory."""

    rows: int
    eights: int
    stages: int

    @staticmethod
    def of(schedule: Schedule) -> Tile:
        return Tile(schedule.rows, schedule.vectors, int(schedule.order.removeprefix("stages")))

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.rows, self.eights, f"stages{self.stages}")

    @property
    def channels(self) -> int:
        return self.eights * 8

    @property
    def warp_rows(self) -> int:
        """Pixels of one warp, which has 32 channels."""
        return 64 if self.rows >= 128 else min(self.rows, 32)

    @property
    def warps(self) -> tuple[int, int]:
        """Along the pixels and along the channels."""
        return self.rows // self.warp_rows, self.eights // 4

    @property
    def threads(self) -> int:
        return self.warps[0] * self.warps[1] * 32

    @property
    def stage_bytes(self) -> int:
        """Of one line: as long as if nothing were packed."""
        return (self.rows + self.channels) * LINE


def tiles(call: Call, micro: WarpMicro) -> list[Tile]:
    """All that fit, by estimated time: waves of blocks, each as long as what it multiplies or
    copies; a tile larger than the work costs what nobody needs of it."""
    g = Geometry.of(call.workload)
    pixels = g.out[0] * g.out[1] * (g.n if call.workload.has_weight else 1)
    batch = g.groups if call.workload.has_weight else g.n

    # What the chip converts first takes registers, and so do the places under a window: beside the
    # sums of 64 pixels there is no room for both.
    crowded = micro.widened and g.kh * g.kw > 1

    def cost(tile: Tile) -> float:
        blocks = ceil(pixels / tile.rows) * ceil(g.gout / tile.channels) * batch
        products = tile.rows * tile.channels * micro.kstep / micro.speed
        copies = (tile.rows + tile.channels) * LINE / 64  # bytes of a processor's cycle, from L2
        waves = max(1.0, blocks / _PROCESSORS)
        return waves * (max(products, copies) + _LINE_CYCLES / tile.stages)

    found = [
        tile
        for rows in _ROWS
        for eights in _EIGHTS
        for stages in _STAGES
        if (tile := Tile(rows, eights, stages)).threads <= _THREADS
        and tile.stage_bytes * stages <= _MEMORY
        and (tile.warp_rows <= 32 or not crowded)
    ]
    return sorted(found, key=cost)

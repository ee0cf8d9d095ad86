"""How a 3 × 3 convolution of stride 1 is cut into tiles (nest `winograd`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Schedule
from hwmpq.kernels.nests.image import Geometry
from hwmpq.kernels.nests.toom import POINTS, SIDE
from hwmpq.types import Workload

#: Bytes of transformed inputs of a block of tiles: they stay beside the weights that pass by.
_BLOCK = 48 * 1024


@dataclass(frozen=True)
class Tiling:
    """The convolution as tiles: `down` × `across` of each image, the last ones end with the image.

    g: with margins up to a whole tile; out: results of an image; vectors: of output channels;
    steps: reduction steps, padded to whole blocks of the decoder; used: those that hold weights;
    width: weights of a step of a vector; depth: inputs of a tile at a point, whole vectors.
    """

    g: Geometry
    out: tuple[int, int]
    down: int
    across: int
    vectors: int
    used: int
    steps: int
    width: int
    depth: int

    @staticmethod
    def of(workload: Workload, micro: Micro, unit: int) -> Tiling:
        g = Geometry.of(workload)
        oh, ow = g.out
        used = -(-g.cin // micro.kstep)
        steps = -(-used // unit) * unit
        width = micro.lanes * micro.kstep
        return Tiling(
            replace(g, pb=g.pb + max(SIDE - oh, 0), pr=g.pr + max(SIDE - ow, 0)), (oh, ow),
            -(-oh // SIDE), -(-ow // SIDE), -(-g.cout // micro.lanes), used, steps, width,
            -(-steps * micro.kstep // width) * width,
        )  # fmt: skip

    @property
    def tiles(self) -> int:
        return self.g.n * self.down * self.across

    def block(self, schedule: Schedule) -> int:
        """Tiles that are transformed and multiplied together."""
        if schedule.order == "vectors":
            return self.tiles
        size = schedule.rows * POINTS * self.depth * 2
        return min(schedule.rows * max(_BLOCK // size, 1), self.tiles)

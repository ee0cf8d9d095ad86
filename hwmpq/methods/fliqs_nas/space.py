"""The architectures to choose from: per stage a kernel size, an expansion, a width and a depth.

Every architecture is a part of the largest: the first channels of its layers, the middle of its
kernels, the first blocks of its stages. So a layer has one name in all that have it, and
`graph_of` makes an architecture's canonical graph as `frontend.trace` would make it of the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from hwmpq.graph import Graph, Node
from hwmpq.methods.fliqs.space import IntArray
from hwmpq.methods.fliqs_nas.network import Architecture, Stage

#: What a stage chooses from; depth: any number of its blocks.
KERNELS, EXPANSIONS, WIDTHS = (3, 5), (2, 4, 6), (0.5, 0.75, 1.0)
CHOICES = ("kernel", "expansion", "width", "depth")
#: MobileNetV2's: channels, blocks, stride.
_STAGES = (
    (16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)
)  # fmt: skip
#: From this image size on the stem halves it; no stage makes it smaller than _LEAST.
_LARGE, _LEAST = 64, 4
_STEM, _LAST = 32, 4


@dataclass(frozen=True)
class StageSpace:
    """The options of a stage."""

    kernels: tuple[int, ...]
    expansions: tuple[int, ...]
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    stride: int

    @property
    def options(self) -> tuple[tuple[int, ...], ...]:
        """In the order of CHOICES."""
        return self.kernels, self.expansions, self.channels, self.depths

    def chosen(self, picks: Sequence[int]) -> Stage:
        """picks: an option of each choice."""
        kernel, expansion, channels, blocks = (
            options[pick] for options, pick in zip(self.options, picks, strict=True)
        )
        return Stage(channels, blocks, kernel, expansion, self.stride)


@dataclass(frozen=True)
class ArchitectureSpace:
    """image: C, H, W; stem, last, classes: as in Architecture."""

    image: tuple[int, int, int]
    stem: tuple[int, int]
    stages: tuple[StageSpace, ...]
    last: int
    classes: int

    @property
    def options(self) -> tuple[tuple[int, ...], ...]:
        """Of every row: the choices of each stage."""
        return tuple(options for stage in self.stages for options in stage.options)

    @property
    def rows(self) -> list[str]:
        """What every row decides."""
        return [f"stages.{s} {word}" for s in range(len(self.stages)) for word in CHOICES]

    @property
    def largest(self) -> Architecture:
        """The architecture that all others are parts of."""
        picks = [int(np.argmax(options)) for options in self.options]
        return self.architecture(np.array(picks, np.intp))

    def architecture(self, picks: IntArray) -> Architecture:
        """picks: an option of each row."""
        each = picks.reshape(len(self.stages), len(CHOICES)).tolist()
        stages = [stage.chosen(own) for stage, own in zip(self.stages, each, strict=True)]
        return Architecture(self.image[0], self.stem, tuple(stages), self.last, self.classes)

    def cover(self) -> Iterator[IntArray]:
        """Picks that meet every layer with every shape it can have."""
        base = [int(np.argmax(options)) for options in self.options]
        width, depth = CHOICES.index("width"), CHOICES.index("depth")
        for s, stage in enumerate(self.stages):
            before = [0] if s == 0 else range(len(self.stages[s - 1].channels))
            own = [range(len(options)) for options in stage.options[:depth]]
            for narrow, *picks in product(before, *own):
                found = np.array(base, np.intp)
                if s:
                    found[(s - 1) * len(CHOICES) + width] = narrow
                found[s * len(CHOICES) :][:depth] = picks
                yield found


def space_for(image: tuple[int, int, int], classes: int) -> ArchitectureSpace:
    """MobileNetV2's stages, as many as the image has pixels for."""
    size = min(image[1:])
    stride = 2 if size >= _LARGE else 1
    size //= stride
    stages: list[StageSpace] = []
    for channels, blocks, step in _STAGES:
        if size // step < _LEAST:
            break
        size //= step
        widths = tuple(max(8, round(channels * w / 8) * 8) for w in WIDTHS)
        depths = tuple(range(1, blocks + 1))
        stages.append(StageSpace(KERNELS, EXPANSIONS, tuple(dict.fromkeys(widths)), depths, step))
    last = _LAST * max(stages[-1].channels)
    return ArchitectureSpace(image, (_STEM, stride), tuple(stages), last, classes)


def graph_of(architecture: Architecture, size: tuple[int, int]) -> Graph:
    """The canonical graph for images of a size, BatchNorms folded; its constants are zeros."""
    draft = _Draft(architecture.inputs, size)
    draft.conv("stem", architecture.stem[0], 3, architecture.stem[1])
    for s, stage in enumerate(architecture.stages):
        for b in range(stage.blocks):
            draft.block(f"stages.{s}.{b}", replace(stage, stride=1) if b else stage)
    draft.conv("last", architecture.last)
    return draft.finished(architecture.classes)


class _Draft:
    """A graph that grows at its last tensor."""

    def __init__(self, inputs: int, size: tuple[int, int]):
        self.at = "x"
        self.nodes: list[Node] = []
        self.tensors: dict[str, tuple[int, ...]] = {"x": (1, inputs, *size)}
        self.constants: dict[str, np.ndarray] = {}

    def conv(
        self, name: str, cout: int, kernel: int = 1, stride: int = 1, depthwise: bool = False,
        act: bool = True, residual: str = "",
    ) -> None:  # fmt: skip
        _, cin, *size = self.tensors[self.at]
        pad = kernel // 2
        attrs = {
            "stride": (stride,) * 2, "padding": (pad,) * 4, "dilation": (1, 1),
            "groups": cin if depthwise else 1, "residual": bool(residual),
        } | ({"act": "clamp", "act_lo": 0.0, "act_hi": 6.0} if act else {"act": ""})  # fmt: skip
        inputs = (self.at, residual) if residual else (self.at,)
        rows, columns = ((n + 2 * pad - kernel) // stride + 1 for n in size)
        weight = (cout, 1 if depthwise else cin, kernel, kernel)
        self._layer(f"{name}.conv", "conv2d", inputs, attrs, weight, (1, cout, rows, columns))

    def block(self, name: str, stage: Stage) -> None:
        entry, cin = self.at, self.tensors[self.at][1]
        adds = stage.stride == 1 and cin == stage.channels
        hidden = cin * stage.expansion
        self.conv(f"{name}.expand", hidden)
        self.conv(f"{name}.depthwise", hidden, stage.kernel, stage.stride, depthwise=True)
        self.conv(f"{name}.project", stage.channels, act=False, residual=entry if adds else "")

    def finished(self, classes: int) -> Graph:
        """With the mean and the classifier."""
        channels = self.tensors[self.at][1]
        self.nodes.append(Node("mean", "mean", (self.at,), {"axes": (2, 3), "keepdim": False}))
        self.tensors["mean"] = (1, channels)
        attrs = {"residual": False, "act": ""}
        self._layer("fc", "linear", ("mean",), attrs, (classes, channels), (1, classes))
        return Graph(("x",), ("fc",), tuple(self.nodes), self.tensors, self.constants)

    def _layer(
        self, name: str, op: str, inputs: tuple[str, ...], attrs: dict[str, object],
        weight: tuple[int, ...], result: tuple[int, ...],
    ) -> None:  # fmt: skip
        params = {role: f"{name}.{role}" for role in ("weight", "bias")}
        self.nodes.append(Node(name, op, inputs, attrs, params))
        self.tensors[name], self.at = result, name
        shapes = {"weight": weight, "bias": weight[:1]}
        for role, shape in shapes.items():
            self.constants[params[role]] = np.broadcast_to(np.float32(0), shape)

"""A network of inverted residuals (MobileNetV2, arXiv 1801.04381) with stages as they are given.

Plain PyTorch: a search for architectures writes this file out, with what it found at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """Blocks alike; the first of them takes the stride."""

    channels: int
    blocks: int
    kernel: int
    expansion: int
    stride: int


@dataclass(frozen=True)
class Architecture:
    """stem: channels and stride of the first convolution; last: channels before the mean."""

    inputs: int
    stem: tuple[int, int]
    stages: Sequence[Stage]
    last: int
    classes: int


class ConvNorm(nn.Module):
    """Convolution, BatchNorm and, if act, ReLU6."""

    def __init__(
        self, cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1,
        act: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(cout)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return F.relu6(y) if self.act else y


class Block(nn.Module):
    """Expand 1×1, depthwise, project 1×1; its input is added where the shapes agree."""

    def __init__(self, cin: int, cout: int, kernel: int, expansion: int, stride: int):
        super().__init__()
        hidden = cin * expansion
        self.expand = ConvNorm(cin, hidden)
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, hidden)
        self.project = ConvNorm(hidden, cout, act=False)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class Network(nn.Module):
    """Input [N, inputs, H, W] -> logits [N, classes]."""

    def __init__(self, of: Architecture):
        super().__init__()
        cin, stride = of.stem
        self.stem = ConvNorm(of.inputs, cin, 3, stride)
        self.stages = nn.ModuleList()
        for s in of.stages:
            blocks = []
            for b in range(s.blocks):
                stride = s.stride if b == 0 else 1
                blocks.append(Block(cin, s.channels, s.kernel, s.expansion, stride))
                cin = s.channels
            self.stages.append(nn.Sequential(*blocks))
        self.last = ConvNorm(cin, of.last)
        self.fc = nn.Linear(of.last, of.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        y: Tensor = self.fc(self.last(x).mean((2, 3)))
        return y

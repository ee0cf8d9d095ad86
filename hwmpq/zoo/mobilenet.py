"""MobileNetV2 (arXiv 1801.04381): torchvision's form, and TensorFlow's with BatchNorm folded."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

#: expansion, channels, blocks, stride
STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip


def _conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU6())


class InvertedResidual(nn.Module):
    """expand 1×1, depthwise 3×3, project 1×1; torchvision's key names."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int):
        super().__init__()
        hidden = cin * expansion
        parts: list[nn.Module] = [] if expansion == 1 else [_conv_bn(cin, hidden, 1)]
        parts += [
            _conv_bn(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        ]
        self.conv = nn.Sequential(*parts)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Input [N, 3, 224, 224]; state-dict keys as torchvision's."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        blocks: list[nn.Module] = [_conv_bn(3, 32, 3, 2)]
        cin = 32
        for expansion, cout, count, stride in STAGES:
            for i in range(count):
                blocks.append(InvertedResidual(cin, cout, stride if i == 0 else 1, expansion))
                cin = cout
        self.features = nn.Sequential(*blocks, _conv_bn(320, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return y


class FoldedConv(nn.Module):
    """Convolution with bias [and ReLU6]; stride 2 pads as TensorFlow's SAME: below and right."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, groups: int, act: bool):
        super().__init__()
        self.same = stride == 2
        padding = 0 if self.same else kernel // 2
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, groups=groups)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            x = F.pad(x, (0, 1, 0, 1))
        y: Tensor = self.conv(x)
        return F.relu6(y) if self.act else y


class FoldedBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, expansion: int):
        super().__init__()
        hidden = cin * expansion
        parts = [] if expansion == 1 else [FoldedConv(cin, hidden, 1, 1, 1, True)]
        parts += [
            FoldedConv(hidden, hidden, 3, stride, hidden, True),
            FoldedConv(hidden, cout, 1, 1, 1, False),
        ]
        self.layers = nn.Sequential(*parts)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2Folded(nn.Module):
    """Input [N, 3, 224, 224] in -1..1, as the TensorFlow weights want it."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.stem = FoldedConv(3, 32, 3, 2, 1, True)
        blocks, cin = [], 32
        for expansion, cout, count, stride in STAGES:
            for i in range(count):
                blocks.append(FoldedBlock(cin, cout, stride if i == 0 else 1, expansion))
                cin = cout
        self.blocks = nn.Sequential(*blocks)
        self.last = FoldedConv(320, 1280, 1, 1, 1, True)
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.last(self.blocks(self.stem(x))).mean((2, 3)))
        return y

"""Residual networks: for CIFAR (He et al. 2015, section 4.2; shortcut A) and for ImageNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CifarBlock(nn.Module):
    """3×3-3×3; the shortcut subsamples and pads channels with zeros (option A)."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.down = stride != 1 or cin != cout
        self.pad = (cout - cin) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.down:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNetCifar(nn.Module):
    """depth = 6·blocks + 2 layers; input [N, 3, 32, 32]."""

    def __init__(self, blocks: int, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(cin: int, cout: int, stride: int, blocks: int) -> nn.Sequential:
        rest = [CifarBlock(cout, cout, 1) for _ in range(blocks - 1)]
        return nn.Sequential(CifarBlock(cin, cout, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        y: Tensor = self.linear(x.mean((2, 3)))
        return y


class BasicBlock(nn.Module):
    """3×3-3×3, of ResNet-18."""

    expansion = 1

    def __init__(self, cin: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = _small(nn.BatchNorm2d(width))
        self.downsample = _projection(cin, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1-3×3-1×1, the stride in the 3×3 (ResNet-50 as torchvision has it)."""

    expansion = 4

    def __init__(self, cin: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = _small(nn.BatchNorm2d(4 * width))
        self.downsample = _projection(cin, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _small(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Residual branches start small, so that random weights stay well conditioned.

    After Goyal et al. (arXiv 1706.02677, section 5.1), who start them at zero.
    """
    nn.init.constant_(norm.weight, 0.25)
    return norm


def _projection(cin: int, cout: int, stride: int) -> nn.Sequential | None:
    if cin == cout and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class ResNet(nn.Module):
    """Input [N, 3, 224, 224]; state-dict keys as torchvision's."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], counts: tuple[int, ...], classes: int
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        cin, stages = 64, []
        for width, count, stride in zip((64, 128, 256, 512), counts, (1, 2, 2, 2), strict=True):
            blocks = []
            for i in range(count):
                blocks.append(block(cin, width, stride if i == 0 else 1))
                cin = block.expansion * width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(cin, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def resnet20_cifar() -> nn.Module:
    return ResNetCifar(3)


def resnet56_cifar() -> nn.Module:
    return ResNetCifar(9)


def resnet18() -> nn.Module:
    return ResNet(BasicBlock, (2, 2, 2, 2), 1000)


def resnet50() -> nn.Module:
    return ResNet(Bottleneck, (3, 4, 6, 3), 1000)

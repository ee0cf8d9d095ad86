"""A small network for scikit-learn's digits that has one of each: the embedded default model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsCnn(nn.Module):
    """Convolutions with BatchNorm, a depthwise one, a residual, a linear; about 6.3 M MACs.

    Input [N, 1, 16, 16] -> logits [N, 10].
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(32)
        self.conv1 = nn.Conv2d(32, 48, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(48)
        self.depthwise = nn.Conv2d(48, 48, 3, 2, 1, groups=48, bias=False)
        self.bn2 = nn.BatchNorm2d(48)
        self.pointwise = nn.Conv2d(48, 64, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, 1, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.depthwise(x)))
        x = F.relu(self.bn3(self.pointwise(x)))
        x = F.relu(self.bn4(self.conv2(x)) + x)
        y: Tensor = self.fc(x.mean((2, 3)))
        return y

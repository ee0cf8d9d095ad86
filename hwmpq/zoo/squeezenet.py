"""SqueezeNet 1.1 (arXiv 1602.07360 and its authors' later release), without BatchNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fire(nn.Module):
    """Squeeze 1×1, then expand 1×1 beside 3×3."""

    def __init__(self, cin: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(cin, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


class SqueezeNet11(nn.Module):
    """Input [N, 3, 224, 224]."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 2)
        sizes = (
            (64, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128),
            (256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256),
        )  # fmt: skip
        self.fires = nn.ModuleList([Fire(*size) for size in sizes])
        self.head = nn.Conv2d(512, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2)
        for i, fire in enumerate(self.fires):
            x = fire(x)
            if i in (1, 3):
                x = F.max_pool2d(x, 3, 2)
        return F.relu(self.head(x)).mean((2, 3))

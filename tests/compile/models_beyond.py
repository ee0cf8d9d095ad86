"""Small versions of model families that the zoo has not, with seeded random weights.

`MODELS` gives every one a name and the shapes of its inputs (without the batch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(
    cin: int, cout: int, k: int = 1, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    """Convolution, BatchNorm, activation."""
    parts = [nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False)]
    return nn.Sequential(*parts, nn.BatchNorm2d(cout), *([act] if act else []))


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate that sees the mean of each."""

    def __init__(self, channels: int, act: nn.Module, gate: nn.Module):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), act, gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze and excite, project (MBConv)."""

    def __init__(self, cin: int, cout: int, k: int, stride: int, act: nn.Module, se: nn.Module):
        super().__init__()
        wide = 3 * cin
        self.expand, self.depth = conv(cin, wide, act=act), conv(wide, wide, k, stride, wide, act)
        self.se, self.project = se, conv(wide, cout)
        self.skip = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.depth(self.expand(x))))
        return x + y if self.skip else y


def efficientnet() -> nn.Module:
    act = nn.SiLU()
    return nn.Sequential(
        conv(3, 16, 3, 2, act=act),
        InvertedResidual(16, 24, 5, 2, act, SqueezeExcite(48, act, nn.Sigmoid())),
        InvertedResidual(24, 24, 3, 1, act, SqueezeExcite(72, act, nn.Sigmoid())),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


def mobilenet_v3() -> nn.Module:
    act = nn.Hardswish()
    return nn.Sequential(
        conv(3, 16, 3, 2, act=act),
        InvertedResidual(16, 16, 5, 1, act, SqueezeExcite(48, nn.ReLU(), nn.Hardsigmoid())),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 48),
        act,
        nn.Linear(48, 10),
    )


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channels of the groups taken in turn."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleUnit(nn.Module):
    """Half of the channels pass by (v2); a grouped convolution before the shuffle (v1)."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.first = conv(half, half, act=nn.ReLU())
        self.depth = conv(half, half, 3, 1, half)
        self.grouped = conv(half, half, groups=2, act=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept, y = x.chunk(2, 1)
        y = self.grouped(shuffled(self.depth(self.first(y)), 2))
        return shuffled(torch.cat([kept, y], 1), 2)


def shufflenet() -> nn.Module:
    return nn.Sequential(
        conv(3, 24, 3, 2, act=nn.ReLU()),
        nn.MaxPool2d(3, 2, 1),
        ShuffleUnit(24),
        ShuffleUnit(24),
        conv(24, 32, 3, 2, 4, nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class DenseLayer(nn.Module):
    """BatchNorm and ReLU before the convolutions; the result is put beside the input."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 16, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        conv(3, 16, 3, 2, act=nn.ReLU()),
        nn.MaxPool2d(3, 2, 1),
        DenseLayer(16, 8),
        DenseLayer(24, 8),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1, bias=False),
        nn.AvgPool2d(2, 2),
        DenseLayer(16, 8),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise, then an MLP on channels-last pixels, scaled per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.up = nn.LayerNorm(channels), nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4),
        ChannelNorm(16, eps=1e-6),
        ConvNeXtBlock(16),
        ChannelNorm(16, eps=1e-6),
        nn.Conv2d(16, 32, 2, 2),
        ConvNeXtBlock(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(32),
        nn.Linear(32, 10),
    )


class WindowAttention(nn.Module):
    """Attention within windows, with a relative position bias and, where shifted, a mask."""

    mask: Tensor | None
    index: Tensor

    def __init__(self, dim: int, heads: int, window: int, mask: Tensor | None):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None, :] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attention = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attention = attention + bias.unsqueeze(0)
        if self.mask is not None:
            many = self.mask.shape[0]
            attention = attention.view(b // many, many, self.heads, n, n)
            attention = attention + self.mask.unsqueeze(1).unsqueeze(0)
            attention = attention.view(-1, self.heads, n, n)
        y = (attention.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        return self.proj(y)


def windows(x: Tensor, size: int) -> Tensor:
    """[n, h, w, c] -> [n · windows, size · size, c]."""
    n, h, w, c = x.shape
    x = x.view(n, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, c)


def shift_mask(h: int, w: int, size: int, shift: int) -> Tensor:
    """[windows, size², size²]: -100 between pixels that the shift brought together."""
    regions = torch.zeros(1, h, w, 1)
    cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for i, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        regions[:, rows, columns] = i
    parts = windows(regions, size).squeeze(-1)
    return (parts[:, None] != parts[:, :, None]).float() * -100.0


class SwinBlock(nn.Module):
    """On [n, h, w, c]."""

    def __init__(self, dim: int, hw: tuple[int, int], window: int, shift: int):
        super().__init__()
        self.window, self.shift = window, shift
        mask = shift_mask(*hw, window, shift) if shift else None
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim, 2, window, mask)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        s, shift = self.window, self.shift
        y = self.norm1(x)
        if shift:
            y = torch.roll(y, (-shift, -shift), (1, 2))
        y = self.attn(windows(y, s)).view(n, h // s, w // s, s, s, c)
        y = y.permute(0, 1, 3, 2, 4, 5).contiguous().view(n, h, w, c)
        if shift:
            y = torch.roll(y, (shift, shift), (1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Patches, a plain and a shifted block, merging of 2x2 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(SwinBlock(16, (8, 12), 4, 0), SwinBlock(16, (8, 12), 4, 2))
        self.norm, self.reduce = nn.LayerNorm(64), nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x).permute(0, 2, 3, 1))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.reduce(self.norm(torch.cat(corners, -1)))
        return self.head(x.mean((1, 2)))


class MobileViTBlock(nn.Module):
    """Convolutions around attention among the pixels of equal place in 2x2 patches."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.local = conv(channels, channels, 3, act=nn.SiLU())
        self.into = nn.Conv2d(channels, dim, 1, bias=False)
        self.layer = nn.TransformerEncoderLayer(
            dim, 2, 2 * dim, 0.0, F.silu, batch_first=True, norm_first=True
        )
        self.norm, self.out = nn.LayerNorm(dim), conv(dim, channels, act=nn.SiLU())
        self.fuse = conv(2 * channels, channels, 3, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(self.local(x))
        n, d, h, w = y.shape
        rows, columns = h // 2, w // 2
        y = y.reshape(n * d * rows, 2, columns, 2).transpose(1, 2)
        y = y.reshape(n, d, rows * columns, 4).transpose(1, 3).reshape(n * 4, rows * columns, d)
        y = self.norm(self.layer(y))
        y = y.view(n, 4, rows * columns, d).transpose(1, 3)
        y = y.reshape(n * d * rows, columns, 2, 2).transpose(1, 2).reshape(n, d, h, w)
        return self.fuse(torch.cat([x, self.out(y)], 1))


def mobilevit() -> nn.Module:
    return nn.Sequential(
        conv(3, 16, 3, 4, act=nn.SiLU()),
        MobileViTBlock(16, 16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def vgg() -> nn.Module:
    """No BatchNorm; a pooling to 2x2 and large linears."""
    features: list[nn.Module] = []
    for cin, cout in ((3, 16), (16, 16), (16, 24)):
        features += [nn.Conv2d(cin, cout, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
    return nn.Sequential(
        *features,
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(),
        nn.Linear(144, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(512, 10),
    )


class Aspp(nn.Module):
    """Dilated branches side by side, one of the whole image; the map is enlarged by two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, 3, 2, act=nn.ReLU())
        self.branches = nn.ModuleList(
            nn.Conv2d(16, 8, 3, padding=rate, dilation=rate) for rate in (1, 2, 4)
        )
        self.whole = nn.Conv2d(16, 8, 1)
        self.project, self.classes = conv(32, 16, act=nn.ReLU()), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        whole = F.relu(self.whole(F.adaptive_avg_pool2d(x, 1))).expand(-1, -1, *x.shape[2:])
        parts = [F.relu(branch(x)) for branch in self.branches]
        return F.interpolate(self.classes(self.project(torch.cat([*parts, whole], 1))), None, 2.0)


class TwoStreams(nn.Module):
    """Two images of unlike size in; class scores, a feature map and its two halves out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 12, 3, 2, act=nn.ReLU()), conv(1, 12, 3, act=nn.ReLU())
        self.mix, self.fc = nn.Conv2d(24, 16, 3), nn.Linear(16, 10)

    def forward(self, image: Tensor, depth: Tensor) -> tuple[Tensor, ...]:
        x = torch.cat([self.left(image), self.right(depth)], 1)
        y = self.mix(x)
        first, second = y.split([4, 12], 1)
        return self.fc(F.relu(y).mean((2, 3))), y, first, second


@dataclass(frozen=True)
class Model:
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]


_ODD, _EVEN = (3, 33, 31), (3, 48, 48)
MODELS = {
    "efficientnet": Model(efficientnet, (_ODD,)),
    "mobilenet_v3": Model(mobilenet_v3, (_ODD,)),
    "shufflenet": Model(shufflenet, (_ODD,)),
    "densenet": Model(densenet, (_ODD,)),
    "convnext": Model(convnext, (_EVEN,)),
    "swin": Model(Swin, ((3, 32, 48),)),
    "mobilevit": Model(mobilevit, ((3, 32, 48),)),
    "vgg": Model(vgg, ((3, 35, 31),)),
    "aspp": Model(Aspp, (_ODD,)),
    "two_streams": Model(TwoStreams, (_ODD, (1, 17, 16))),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The model in eval mode, BatchNorm with statistics that are not the neutral ones."""
    torch.manual_seed(seed)
    model = MODELS[name].build()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = 0.3 * torch.randn(part.num_features)
            part.running_var = torch.rand(part.num_features) + 0.5
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
    return model.eval()

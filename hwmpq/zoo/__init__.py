"""Model definitions in plain torch, each with its input shape and normalization.

`names()` lists them; `build(name, weights)` makes one. Importing this package loads no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmpq.errors import UnknownName

if TYPE_CHECKING:
    from torch import nn

Channels = tuple[float, ...]
#: mean and standard deviation per channel, of x/255
Normalization = tuple[Channels, Channels]

_DIGITS: Normalization = ((0.305,), (0.376,))
_IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TENSORFLOW: Normalization = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Entry:
    """Where a model is defined ('module:callable' in this package), and what it wants to see.

    keys: 'module:callable' that translates a weights file's keys to the module's.
    """

    definition: str
    input_shape: tuple[int, ...]
    normalization: Normalization
    classes: int
    shipped: str = ""
    keys: str = ""


@dataclass(frozen=True, eq=False)
class ZooModel:
    """A model ready to trace. mean, std: per channel, of x/255."""

    module: nn.Module
    input_shape: tuple[int, ...]
    mean: Channels
    std: Channels
    classes: int
    name: str


_CIFAR, _LARGE = (1, 3, 32, 32), (1, 3, 224, 224)

ENTRIES: dict[str, Entry] = {
    "digits_cnn": Entry(
        "digits:DigitsCnn", (1, 1, 16, 16), _DIGITS, 10, shipped="digits_cnn.safetensors"
    ),
    "resnet20_cifar": Entry("resnet:resnet20_cifar", _CIFAR, _IMAGENET, 10),
    "resnet56_cifar": Entry("resnet:resnet56_cifar", _CIFAR, _IMAGENET, 10),
    "resnet18": Entry("resnet:resnet18", _LARGE, _IMAGENET, 1000),
    "resnet50": Entry("resnet:resnet50", _LARGE, _IMAGENET, 1000),
    "mobilenet_v2": Entry("mobilenet:MobileNetV2", _LARGE, _IMAGENET, 1000),
    "mobilenet_v2_tf": Entry("mobilenet:MobileNetV2Folded", _LARGE, _TENSORFLOW, 1000),
    "squeezenet1_1": Entry("squeezenet:SqueezeNet11", _LARGE, _IMAGENET, 1000),
    "vit_tiny": Entry("vit:VisionTransformer", _LARGE, _IMAGENET, 1000, keys="vit:timm_key"),
}


def names() -> tuple[str, ...]:
    return tuple(ENTRIES)


def build(name: str, weights: Path | None = None) -> ZooModel:
    """Make a model in eval mode.

    weights: a file (see `weights.load_state_dict`); without one `digits_cnn` has its trained
    weights and every other model seeded random ones, good for speed and never for accuracy.
    Raises UnknownName; InputError for weights that do not fit.
    """
    from hwmpq.zoo.weights import initialize, load_into

    if name not in ENTRIES:
        raise UnknownName("zoo model", name, ENTRIES)
    entry = ENTRIES[name]
    module: nn.Module = _find(entry.definition)()
    if weights is None and entry.shipped:
        weights = Path(__file__).with_name(entry.shipped)
    if weights is None:
        initialize(module, entry.input_shape)
    else:
        load_into(module, weights, _find(entry.keys) if entry.keys else str)
    mean, std = entry.normalization
    return ZooModel(module.eval(), entry.input_shape, mean, std, entry.classes, name)


def _find(definition: str) -> Callable[..., Any]:
    module, _, name = definition.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found

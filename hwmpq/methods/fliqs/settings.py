"""What a one-shot search can be told: `--train 'epochs=2,rate=5e-4,...'`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from hwmpq.errors import InputError, UnknownName
from hwmpq.quantize.finetune import Settings as Training

QUALITIES = ("loss", "accuracy")
DECISIONS = ("layer", "block")
#: A policy needs this many steps to be sure of anything, however few the images.
LEAST_STEPS = 400


@dataclass(frozen=True)
class Settings:
    """Defaults are for runs of a few epochs; FLIQS's public code has entropy 0.5, average 0.99 and
    policy_rate 0.005 for long ones. In a short one the loss falls so fast that a slower baseline
    would call every plan good.

    epochs: over the training images, but LEAST_STEPS at least; steps: optimizer steps instead;
    batch: samples of a step; rate: of the weights (Adam, falling with a cosine to 0); clip: largest
    norm of their gradient; distill: share of the float model's answers in the loss; augment: random
    shifts, and mirrored.
    warmup: share of the steps that draw uniformly and leave the policy alone; delay: share of them
    that read activations as they are; policy_rate: Adam's, of the logits; quality: q of the reward,
    'loss' or 'accuracy'; cost: β_c; entropy: β_max; average: of the quality's baseline.
    decide: per 'layer' or 'block'; separate: weights' and activations' formats apart.
    checkpoint: steps between two.
    """

    epochs: float = 2.0
    steps: int | None = None
    batch: int = 64
    rate: float = 5e-4
    clip: float = 1.0
    distill: float = 0.5
    augment: bool = True
    warmup: float = 0.25
    delay: float = 0.1
    policy_rate: float = 0.05
    quality: str = "loss"
    cost: float = 1.0
    entropy: float = 0.1
    average: float = 0.95
    decide: str = "layer"
    separate: bool = False
    checkpoint: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup", "delay", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--train {name}", getattr(self, name), "0, or below 1")
        for name in ("epochs", "clip", "policy_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"--train {name}", getattr(self, name), "above 0")
        for name in ("cost", "entropy"):
            if not getattr(self, name) >= 0:
                raise InputError(f"--train {name}", getattr(self, name), "0 or more")
        for name, words in (("quality", QUALITIES), ("decide", DECISIONS)):
            if getattr(self, name) not in words:
                raise InputError(f"--train {name}", getattr(self, name), words)
        self.training(1)

    def training(self, images: int) -> Training:
        """How weights are trained on so many images. Raises InputError."""
        steps = self.steps
        if steps is None:
            each = round(self.epochs * images / max(1, min(self.batch, images)))
            steps = max(LEAST_STEPS, each)
        return Training(
            steps, self.batch, self.rate, self.distill, self.augment, self.checkpoint, self.seed
        )


def parsed(words: Sequence[str], seed: int, defaults: Settings | None = None) -> Settings:
    """'key=value' words as settings. Raises UnknownName and InputError."""
    kinds = get_type_hints(Settings)
    found: dict[str, Any] = {"seed": seed}
    for word in words:
        key, _, text = word.partition("=")
        if key not in kinds:
            raise UnknownName("setting of --train", key, [f.name for f in fields(Settings)])
        found[key] = _value(key, text, kinds[key])
    return replace(defaults or Settings(), **found)


def _value(key: str, text: str, kind: type) -> Any:
    one = next(iter(get_args(kind)), kind)
    try:
        if one is bool:
            return {"true": True, "false": False}[text]
        return one(text)
    except (KeyError, ValueError):
        allowed = "true or false" if one is bool else one.__name__
        raise InputError(f"--train {key}", repr(text), allowed) from None

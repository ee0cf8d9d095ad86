"""Training of `digits_cnn`: half a minute on one core, the same weights for the same seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hwmpq.zoo.digits import DigitsCnn


def train(
    images: Tensor, labels: Tensor, seed: int = 0, epochs: int = 12, batch: int = 64
) -> dict[str, Tensor]:
    """Train with shifts by up to two pixels; returns the state dict.

    images: [N, 1, 16, 16] normalized, labels: [N], both of `digits#train`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DigitsCnn().train()
        steps = epochs * (len(images) // batch)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for start in range(0, len(images) - batch + 1, batch):
                picked = order[start : start + batch]
                loss = F.cross_entropy(
                    model(_shifted(images[picked])), labels[picked], label_smoothing=0.05
                )
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}


def accuracy(state: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent. images: [N, 1, 16, 16] normalized, labels: [N]."""
    model = DigitsCnn().eval()
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        found = model(images).argmax(1)
    return 100.0 * float((found == labels).float().mean())


def _shifted(images: Tensor) -> Tensor:
    """Each batch moved by -2..2 pixels in both directions, the border repeated."""
    top, left = torch.randint(0, 5, (2,)).tolist()
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]

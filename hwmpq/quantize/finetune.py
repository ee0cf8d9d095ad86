"""Quantization-aware training of an assignment: weights, biases and step sizes together.

Loss: (1 − d) · cross-entropy with the labels + d · T² · KL(float ‖ rounded) at temperature T, the
float model being the teacher (Hinton et al., arXiv 1503.02531); d = 1 without labels. Adam, whose
rate falls with a cosine to 0. BatchNorms are folded, so there are no statistics to keep.

Deterministic for a seed: step k always sees the same samples, so that a run resumed from a
checkpoint (weights, moments and step) ends as one that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hwmpq.data import DataSet
from hwmpq.errors import InputError
from hwmpq.formats import QuantizedWeight, format_named
from hwmpq.graph import Graph
from hwmpq.quantize import checkpoint as checkpoints
from hwmpq.quantize.feed import named
from hwmpq.quantize.interpret import Constants, evaluate
from hwmpq.quantize.learned import Learned
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import F32, Quantizers
from hwmpq.requantize import Quantizer
from hwmpq.storage import quantizer_roots
from hwmpq.types import digest

VERSION = 2
#: Operators whose constants are trained; of others (tables, fixed factors) they stay.
_TRAINED_OPS = ("conv2d", "linear", "layer_norm", "batch_affine")
_TEMPERATURE = 2.0
#: Steps whose mean loss is told.
_TOLD = 50


@dataclass(frozen=True)
class Settings:
    """steps: optimizer steps; batch: samples of each; rate: Adam's, at first; distill: d;
    augment: random shifts by up to an eighth, and mirrored; checkpoint: steps between two.
    Raises InputError for what is out of range."""

    steps: int
    batch: int = 64
    rate: float = 1e-3
    distill: float = 0.5
    augment: bool = False
    checkpoint: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "1 or more")
        if not self.rate > 0:
            raise InputError("rate", self.rate, "above 0")
        if not 0 <= self.distill <= 1:
            raise InputError("distill", self.distill, "0 (labels only) to 1 (float only)")


@dataclass(frozen=True)
class Trained:
    """loss: mean of the last steps' losses; seconds: of this run, without what was resumed."""

    quantizers: Quantizers
    loss: float
    seconds: float


@dataclass(frozen=True)
class Taught:
    """A step's batch before the step: mean loss and accuracy, and the float model's on it.
    Without labels an accuracy is agreement with the float model."""

    loss: float
    accuracy: float
    float_loss: float
    float_accuracy: float


class Training:
    """The parameters of a run, and what they become."""

    def __init__(
        self,
        graph: Graph,
        assignment: Mapping[str, str],
        quantizers: Quantizers,
        settings: Settings,
    ):
        self.graph, self.settings = quantizers.graph(graph), settings
        self.assignment, self.start = dict(assignment), quantizers
        self.constants = self._constants()
        self.weight_steps = {
            node.name: log_step(scale)
            for node in self.graph.layers
            if "weight" in node.params
            for fmt in [format_named(assignment[node.name])]
            for scale in [quantizers.weight(node.name, fmt.name).scale]
            if fmt.weight.kind == "int" and fmt.group is None and scale is not None
        }
        self.steps: dict[tuple[str, str], Tensor] = {}
        self.simulator = self._simulator()
        self.key = digest([
            VERSION, asdict(settings), self.assignment, sorted(self.graph.constants),
            [float(np.sum(c, dtype=np.float64)) for c in self.graph.constants.values()],
        ])  # fmt: skip

    def _constants(self) -> dict[str, Tensor]:
        """Trained constants, a corrected bias in place of the graph's."""
        found = trained_constants(self.graph)
        for node in self.graph.layers:
            own = self.start.biases.get((node.name, self.assignment[node.name]))
            if own is not None and "bias" in node.params:
                found[node.params["bias"]] = own
        return {name: torch.tensor(value).requires_grad_() for name, value in found.items()}

    def _simulator(self) -> Simulator:
        make = partial(
            Learned, trained=self.constants, weight_steps=self.weight_steps, steps=self.steps
        )
        found = Simulator(
            self.graph, self.assignment, self.start, "fast", self.constants, arithmetic=make
        )
        plan, fixed = found.resolved.plan, fixed_roots(self.graph)
        used = [(t, e) for t, e in plan.stored.items()]
        used += [(n.inputs[i], e) for n in self.graph.nodes
                 for i in range(len(n.inputs)) for e in [plan.demand[n.name, i]]]  # fmt: skip
        for tensor, encoding in sorted(used):
            key = plan.root[tensor], encoding
            if key in self.start.activations and key[0] not in fixed:
                self.steps.setdefault(key, log_step(self.start.activations[key].scale))
        return found

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All that is trained, by a name that a file can hold."""
        return {
            **{f"{name}|constant": p for name, p in self.constants.items()},
            **{f"{layer}|weight step": p for layer, p in self.weight_steps.items()},
            **{f"{root}|{encoding}|step": p for (root, encoding), p in self.steps.items()},
        }

    def quantizers(self) -> Quantizers:
        """What the parameters stand for now."""
        return settled(
            self.graph, self.assignment, self.start, self.constants, self.weight_steps, self.steps
        )


def trained_constants(graph: Graph) -> dict[str, F32]:
    """The graph's constants that training changes."""
    return {
        name: graph.constants[name]
        for node in graph.nodes
        if node.op in _TRAINED_OPS
        for name in node.params.values()
    }


def fixed_roots(graph: Graph) -> frozenset[str]:
    """Quantizer roots whose scale is no matter of training: of softmax results."""
    root = quantizer_roots(graph)
    return frozenset(root[node.name] for node in graph.nodes if node.op == "softmax")


def log_step(scale: float | F32, device: torch.device | str = "cpu") -> Tensor:
    """The parameter that stands for a scale."""
    return torch.tensor(np.log(np.float32(scale)), device=device).requires_grad_()


def settled(
    graph: Graph,
    assignment: Mapping[str, str],
    start: Quantizers,
    constants: Mapping[str, Tensor],
    weight_steps: Mapping[str, Tensor],
    steps: Mapping[tuple[str, str], Tensor],
) -> Quantizers:
    """What trained parameters stand for under an assignment; what was not trained is `start`'s."""
    fresh = {name: p.detach().cpu().numpy().copy() for name, p in constants.items()}
    activations = dict(start.activations)
    for key, step in steps.items():
        activations[key] = Quantizer(float(step.detach().exp()), activations[key].zero)
    weights: dict[tuple[str, str], QuantizedWeight] = {}
    for node in graph.layers:
        if "weight" in node.params:
            fmt = format_named(assignment[node.name])
            learned = weight_steps.get(node.name)
            scale = start.weight(node.name, fmt.name).scale
            if learned is not None:
                scale = learned.detach().exp().cpu().numpy()
            value = fresh[node.params["weight"]]
            weights[node.name, fmt.name] = fmt.quantize_weight(value, scale)
    return Quantizers(activations, weights, {}, {**start.constants, **fresh})


class Course:
    """What a run is taught by: samples, and the float model's answers to them."""

    def __init__(
        self, graph: Graph, data: DataSet, settings: Settings, device: torch.device | str = "cpu"
    ):
        self.graph, self.data, self.settings, self.device = graph, data, settings, device
        self._teacher = Constants(graph, device)

    def step(
        self,
        network: Callable[[Tensor], Sequence[Tensor]],
        optimizer: torch.optim.Adam,
        k: int,
        adjust: Callable[[], None] = lambda: None,
        part: slice = slice(None),
    ) -> Taught:
        """Step k on a network of the optimizer's parameters: its first output is taught.

        adjust: what is done to the gradients first; part: of the step's samples. Raises InputError
        where the loss is no number any more.
        """
        whole, known = samples_of(self.data, self.settings, k)
        x = whole[part].to(self.device)
        labels = None if known is None else known[part].to(self.device)
        with torch.no_grad():
            wanted = evaluate(self.graph, named(self.graph, x), constants=self._teacher)
        soft = wanted[self.graph.outputs[0]].flatten(1)
        found = network(x)[0].flatten(1)
        loss = _loss(found, soft, labels, self.settings.distill)
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate * (1 + math.cos(math.pi * k / self.settings.steps)) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adjust()
        optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(f"loss of step {k}", value, "a number", "Use a smaller rate.")
        truth = soft.argmax(1) if labels is None else labels
        right, best = ((y.argmax(1) == truth).float().mean() for y in (found, soft))
        least = _loss(soft, soft, labels, self.settings.distill)
        return Taught(value, float(right), float(least), float(best))


def finetune(
    graph: Graph,
    assignment: Mapping[str, str],
    quantizers: Quantizers,
    data: DataSet,
    settings: Settings,
    checkpoint: Path | None = None,
    note: Callable[[int, float], None] = lambda done, loss: None,
) -> Trained:
    """Train on `data`; the result has the assignment's weights alone, and the graph's constants.

    checkpoint: file to go on from, and to write now and then. note: called with (steps done, loss).
    Raises InputError for a checkpoint of another run, and where the loss is no number any more.
    """
    run = Training(graph, assignment, quantizers, settings)
    optimizer = torch.optim.Adam(run.parameters.values(), settings.rate)
    losses: list[float] = []
    if checkpoint and checkpoint.exists():
        losses = checkpoints.read(checkpoint, run.parameters, [optimizer], run.key)
    course = Course(graph, data, settings)
    began = time.perf_counter()
    for k in range(len(losses), settings.steps):
        losses.append(course.step(run.simulator, optimizer, k).loss)
        if checkpoint and (k + 1) % settings.checkpoint == 0:
            checkpoints.write(checkpoint, run.parameters, [optimizer], run.key, losses)
        note(k + 1, losses[-1])
    seconds = time.perf_counter() - began
    return Trained(run.quantizers(), float(np.mean(losses[-_TOLD:])), seconds)


def samples_of(data: DataSet, settings: Settings, step: int) -> tuple[Tensor, Tensor | None]:
    """The batch of a step: every sample once per epoch, in a seeded order."""
    size = min(settings.batch, len(data))
    each = len(data) // size
    order = np.random.default_rng([settings.seed, step // each]).permutation(len(data))
    picked = order[step % each * size :][:size]
    x = torch.from_numpy(data.batch(picked))
    if settings.augment:
        x = augmented(x, np.random.default_rng([settings.seed, step, 1]))
    return x, None if data.labels is None else torch.from_numpy(data.labels[picked])


def augmented(x: Tensor, random: np.random.Generator) -> Tensor:
    """Each image [N, C, H, W] shifted by up to an eighth of its size, half of them mirrored."""
    height, width = x.shape[-2:]
    down, right = height // 8, width // 8
    padded = F.pad(x, (right, right, down, down))
    found = []
    for image in padded:
        top, left = random.integers(2 * down + 1), random.integers(2 * right + 1)
        part = image[:, top : top + height, left : left + width]
        found.append(part.flip(-1) if random.integers(2) else part)
    return torch.stack(found)


def _loss(found: Tensor, wanted: Tensor, labels: Tensor | None, distill: float) -> Tensor:
    share = 1.0 if labels is None else distill
    soft, truth = (F.log_softmax(y / _TEMPERATURE, 1) for y in (found, wanted))
    loss = share * _TEMPERATURE**2 * F.kl_div(soft, truth, log_target=True, reduction="batchmean")
    return loss if labels is None else loss + (1 - share) * F.cross_entropy(found, labels)

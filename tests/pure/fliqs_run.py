"""A network that a one-shot search learns in a second.

As a program (`python fliqs_run.py FOLDER`): searches in the folder, prints the policy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hwmpq.data import DataSet, checked, from_arrays
from hwmpq.formats import bops, format_named
from hwmpq.graph import Graph, Node, network_of
from hwmpq.methods.fliqs.searched import Searched
from hwmpq.methods.fliqs.settings import Settings
from hwmpq.methods.fliqs.train import search
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.interpret import evaluate
from hwmpq.types import Problem

C, SIZE, CLASSES = 8, 6, 4
MENU = ("w8a8", "w4a4", "w2a2")
SETTINGS = Settings(
    steps=40, batch=16, rate=2e-3, distill=1.0, augment=False, checkpoint=20, warmup=0.2
)


def network() -> Graph:
    """Two convolutions, the second with a residual; their mean; a linear layer."""
    rng = np.random.default_rng(3)
    shapes = {"a": (C, 3, 3, 3), "b": (C, C, 3, 3), "fc": (CLASSES, C)}
    constants = {}
    for name, shape in shapes.items():
        fan = int(np.prod(shape[1:]))
        constants[f"{name}.weight"] = rng.normal(0, (2 / fan) ** 0.5, shape).astype(np.float32)
        constants[f"{name}.bias"] = rng.normal(0, 0.1, shape[0]).astype(np.float32)
    attrs = {"stride": (1, 1), "padding": (1,) * 4, "dilation": (1, 1), "groups": 1, "act": "relu"}

    def params(name: str) -> dict[str, str]:
        return {"weight": f"{name}.weight", "bias": f"{name}.bias"}

    nodes = (
        Node("a", "conv2d", ("x",), attrs, params("a")),
        Node("b", "conv2d", ("a", "a"), {**attrs, "residual": True}, params("b")),
        Node("pooled", "mean", ("b",), {"axes": (2, 3), "keepdim": False}),
        Node("fc", "linear", ("pooled",), {}, params("fc")),
    )
    image = (1, C, SIZE, SIZE)
    tensors = {"x": (1, 3, SIZE, SIZE), "a": image, "b": image, "pooled": (1, C),
               "fc": (1, CLASSES)}  # fmt: skip
    return Graph(("x",), ("fc",), nodes, tensors, constants)


def data(graph: Graph, count: int = 96) -> DataSet:
    """Noise, labelled by the float network."""
    x = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    labels = evaluate(graph, {"x": x})["fc"].argmax(1)
    return checked(from_arrays(x.numpy(), labels.numpy()))


def posed(graph: Graph, menu: tuple[str, ...], share: float) -> Problem:
    """Bit operations; the target is a share of the first format's."""
    layers = network_of(graph).layers
    work = np.array([[bops(format_named(f), la.workload.macs) for f in menu] for la in layers])
    names = tuple(layer.name for layer in layers)
    budget = share * float(work[:, 0].sum())
    legal = np.ones(work.shape, bool)
    return Problem(names, menu, bops=work.astype(float), legal=legal, budgets={"bops": budget})


def run(
    folder: Path, settings: Settings = SETTINGS, menu: tuple[str, ...] = MENU, share: float = 0.3,
    note: Callable[[int, int], None] = lambda done, of: None,
) -> Searched:  # fmt: skip
    graph = network()
    images = data(graph)
    quantizers = calibrate(graph, [torch.from_numpy(images.batch(range(64)))], menu)
    return search(graph, posed(graph, menu, share), quantizers, images, settings, folder, note=note)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = run(Path(sys.argv[1]))
    print(found.policy.probabilities().tolist(), flush=True)

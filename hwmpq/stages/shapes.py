"""Shapes worth measuring for a cost model: those of the zoo as they are compiled, and relatives.

A relative has the operator, the epilogue and the window of a layer of the zoo, with its channels
and its image changed: nn-Meter's prior (MobiSys 2021). Channels that are multiples of 8, as in most
real networks, stay so; but some lie at the edges of alignment, and some are made so large or small
that their weights span the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from hwmpq import zoo
from hwmpq.targets import Caches
from hwmpq.types import Workload

#: Channels of a relative, as shares of those of its origin.
JITTER = (0.5, 1.2)
#: What divides the channels of real networks.
_STEP = 8
#: Of the relatives, this share has channels one beside a multiple of one of EDGES ...
_EDGE_SHARE, EDGES = 0.2, (8, 16, 32, 64)
#: ... and this share has weights of SPAN times the size of the L2 cache.
_CACHE_SHARE, SPAN = 0.2, (0.25, 4.0)
#: Chance that a relative also has another image.
_IMAGE_SHARE = 0.5
#: Larger cells take too long, or too much memory with their weights' copies.
MAX_MACS, MAX_ELEMENTS = 600_000_000, 8_000_000

Families = Mapping[Workload, tuple[str, ...]]


def zoo_shapes() -> Families:
    """The layers of every model of the zoo -> families of those that hold them. Loads torch."""
    from hwmpq.frontend.model import load_model
    from hwmpq.graph import network_of

    found: dict[Workload, set[str]] = {}
    for name, entry in zoo.ENTRIES.items():
        family = entry.definition.partition(":")[0]
        for layer in network_of(load_model(f"zoo:{name}", None, None).graph()).layers:
            found.setdefault(layer.workload, set()).add(family)
    return {workload: tuple(sorted(names)) for workload, names in found.items()}


def pool(origins: Families, caches: Caches, size: int, seed: int) -> Families:
    """The origins that are small enough, then relatives up to `size` shapes, each once.

    A relative belongs to the families of its origin: where one is held out, so are its relatives.
    The same arguments give the same pool, whatever the order of the origins.
    """
    rng = np.random.default_rng(seed)
    known = sorted(origins, key=lambda workload: workload.key)
    found: dict[Workload, set[str]] = {}
    for workload in known:
        if _fits(workload):
            found[workload] = set(origins[workload])
    for workload, names in _relatives(known, origins, caches, rng, 20 * size):
        if len(found) >= size:
            break
        if _fits(workload):
            found.setdefault(workload, set()).update(names)
    return {workload: tuple(sorted(names)) for workload, names in found.items()}


def _relatives(
    known: list[Workload], origins: Families, caches: Caches, rng: np.random.Generator, tries: int
) -> Iterator[tuple[Workload, tuple[str, ...]]]:
    # every kind of operator as often as its number of shapes to the power of a half: else the
    # many convolutions would leave a handful of the others
    kinds = [(w.op, max(w["kh"], w["kw"]) if w.op == "conv2d" else 0) for w in known]
    share = np.array([kinds.count(kind) ** -0.5 for kind in kinds])
    for _ in range(tries):
        origin = known[int(rng.choice(len(known), p=share / share.sum()))]
        yield relative(origin, caches, rng), origins[origin]


def relative(origin: Workload, caches: Caches, rng: np.random.Generator) -> Workload:
    """A shape like the origin."""
    dims, kind = dict(origin.dims), rng.random()
    scale = 1.0
    if kind > 1.0 - _CACHE_SHARE and origin.op in ("conv2d", "linear"):
        wanted = caches.l2 * float(np.exp(rng.uniform(*np.log(SPAN))))
        scale = (wanted / np.prod(origin.weight_shape)) ** 0.5

    def drawn(value: int) -> int:
        new = value * scale * rng.uniform(*JITTER)
        if kind < _EDGE_SHARE:
            edge = int(rng.choice(EDGES))
            return max(1, max(1, round(new / edge)) * edge + int(rng.integers(-1, 2)))
        step = 1 if value % _STEP else _STEP
        return max(1, round(new / step)) * step

    if origin.op in ("conv2d", "depthwise"):
        groups = dims["groups"]
        if origin.op == "depthwise":
            dims["cin"] = dims["cout"] = dims["groups"] = max(2, drawn(dims["cin"]))
        else:
            # an image's colours stay what they are
            if dims["cin"] > 4:
                dims["cin"] = drawn(dims["cin"] // groups) * groups
            dims["cout"] = drawn(dims["cout"] // groups) * groups
        if rng.random() < _IMAGE_SHARE:
            factor = rng.uniform(*JITTER)
            for side, window in (("h", "kh"), ("w", "kw")):
                dims[side] = max(dims[window], round(dims[side] * factor))
    else:
        dims["k"], dims["n"] = drawn(dims["k"]), drawn(dims["n"])
        if dims["m"] > 1 and rng.random() < _IMAGE_SHARE:
            dims["m"] = max(1, round(dims["m"] * rng.uniform(*JITTER)))
    return Workload.make(origin.op, origin.epilogue, **dims)


def _fits(workload: Workload) -> bool:
    tensors = (workload.in_shape, workload.weight_shape, workload.out_shape)
    return 0 < workload.macs <= MAX_MACS and sum(map(int, map(np.prod, tensors))) <= MAX_ELEMENTS

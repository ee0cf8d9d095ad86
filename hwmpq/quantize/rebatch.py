"""The canonical graph for another batch size than the traced one; plain Python.

The batch axis is followed from the inputs through every operator; where a tensor's dimension is
`pre · batch · post`, its `Place` is (axis, pre, post), and only that dimension changes. A reshape
keeps the number of elements before the batch axis, which finds it again in the target shape. Traced
with batch 1 several places may fit; they are tried, a dimension of its own and of the same index
first, until no operator works along the batch (slice, mean, softmax, concat, a reduced axis). Any
reading that passes computes every sample by itself, so all of them are right; a graph without one
is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from hwmpq.errors import InputError
from hwmpq.graph import Graph, Node


@dataclass(frozen=True)
class Place:
    """Where the batch lies in a tensor: dimension `axis` has size pre · batch · post."""

    axis: int
    pre: int = 1
    post: int = 1


#: tries of `rebatch` before it gives up on a graph with very many ambiguous reshapes
_MAX_TRIES = 20_000


@lru_cache(maxsize=8)
def rebatch(graph: Graph, batch: int) -> Graph:
    """The same graph for another batch size. Raises InputError where it mixes samples."""
    traced = graph.tensors[graph.inputs[0]][0]
    if batch == traced:
        return graph
    places: dict[str, Place | None] = {
        name: Place(0) if graph.tensors[name][:1] == (traced,) else None for name in graph.inputs
    }
    nodes: list[Node] = []
    options: list[Iterator[tuple[Node, Place | None]]] = []
    depth, reason = -1, ""
    for _ in range(_MAX_TRIES):
        if len(nodes) == len(graph.nodes):
            break
        node = graph.nodes[len(nodes)]
        if len(options) == len(nodes):
            options.append(_follow(graph, node, places, traced, batch))
        try:
            found, places[node.name] = next(options[-1])
            nodes.append(found)
        except (_Mixes, StopIteration) as error:
            if len(nodes) > depth:
                depth, reason = len(nodes), f"{node.name} ({node.op}): {error}"
            if not nodes:
                break
            options.pop()
            nodes.pop()
    if len(nodes) < len(graph.nodes):
        raise InputError(
            f"the model mixes the samples of a batch at {reason}",
            f"batch {batch}",
            f"the traced batch {traced}",
        )
    tensors = {
        name: _resized(shape, places[name], traced, batch) for name, shape in graph.tensors.items()
    }
    return replace(graph, nodes=tuple(nodes), tensors=tensors)


class _Mixes(Exception):
    """An operator works across the batch axis."""


def _resized(shape: Sequence[int], place: Place | None, traced: int, batch: int) -> tuple[int, ...]:
    if place is None:
        return tuple(shape)
    size = shape[place.axis] // traced * batch
    return (*shape[: place.axis], size, *shape[place.axis + 1 :])


def _follow(
    graph: Graph, node: Node, places: Mapping[str, Place | None], traced: int, batch: int
) -> Iterator[tuple[Node, Place | None]]:
    """The node for the new batch size with the place of the batch in its result: all readings.

    Raises _Mixes where there is none.
    """
    place = places.get(node.inputs[0]) if node.inputs else None
    if node.op == "rearrange" and place is not None:
        shape = graph.tensors[node.inputs[0]]
        for steps, end in _follow_steps(shape, node.attrs["steps"], place, traced, batch):
            if node.name not in graph.outputs or end.pre == end.post == 1:
                yield replace(node, attrs={**node.attrs, "steps": steps}), end
        return
    rank = len(graph.tensors[node.name])
    found = []
    for name in node.inputs:
        place = places[name]
        if place is not None:
            shift = 0 if node.op == "mean" else rank - len(graph.tensors[name])
            found.append(replace(place, axis=place.axis + shift))
    if not found:
        yield node, None
        return
    place = found[0]
    if any(other != place for other in found):
        raise _Mixes("its operands hold the batch in different places")
    _check_operands(graph, node, places, place, rank)
    if node.op == "mean" and not node.attrs["keepdim"]:
        place = replace(place, axis=place.axis - sum(a < place.axis for a in node.attrs["axes"]))
    yield node, place


def _check_operands(
    graph: Graph, node: Node, places: Mapping[str, Place | None], place: Place, rank: int
) -> None:
    """Raise _Mixes where the operator works along the batch axis or an operand lacks the batch."""
    along = {
        "linear": [rank - 1], "layer_norm": [rank - 1], "matmul": [rank - 2, rank - 1],
        "batch_affine": [1], "conv2d": [1, 2, 3], "max_pool2d": [2, 3], "avg_pool2d": [2, 3],
        "softmax": [node.attrs.get("axis")], "concat": [node.attrs.get("axis")],
        "mean": node.attrs.get("axes"),
        "pad": [i for i, pair in enumerate(node.attrs.get("pads", ())) if any(pair)],
    }.get(node.op, [])  # fmt: skip
    if place.axis in (along or ()):
        raise _Mixes("it works along the batch axis")
    fixed = [graph.tensors[name] for name in node.inputs if places[name] is None]
    if node.op in ("add", "mul") and "b" in node.params:
        fixed.append(graph.constants[node.params["b"]].shape)
    for shape in fixed:
        axis = place.axis - rank + len(shape)
        if axis >= 0 and shape[axis] != 1:
            raise _Mixes("an operand has a fixed size there")


def _follow_steps(
    shape: tuple[int, ...], steps: Sequence[Sequence[Any]], place: Place, traced: int, batch: int
) -> Iterator[tuple[list[list[Any]], Place]]:
    """The steps of a rearrange for the new batch size, and where they leave the batch."""
    if not steps:
        yield [], place
        return
    step, places = list(steps[0]), [place]
    match step:
        case ["permute", axes]:
            after = tuple(shape[i] for i in axes)
            places = [replace(place, axis=list(axes).index(place.axis))]
        case ["slice", axis, start, stop, stride]:
            if axis == place.axis:
                return
            after = (*shape[:axis], len(range(start, stop, stride)), *shape[axis + 1 :])
        case ["reshape", target]:
            after = tuple(target)
            places = _find(shape, after, place, traced)
        case ["expand", target]:
            after = tuple(target)
            if after[place.axis] != shape[place.axis]:
                return
    for chosen in places:
        if step[0] in ("reshape", "expand"):
            step = [step[0], list(_resized(after, chosen, traced, batch))]
        for rest, end in _follow_steps(after, steps[1:], chosen, traced, batch):
            yield [step, *rest], end


def _find(
    shape: tuple[int, ...], target: tuple[int, ...], place: Place, traced: int
) -> list[Place]:
    """Where the batch can lie after a reshape, most likely first: as many elements before it."""
    outer = math.prod(shape[: place.axis]) * place.pre
    fits = []
    for axis, size in enumerate(target):
        before = math.prod(target[:axis])
        pre = outer // before
        if before * pre == outer and size % (pre * traced) == 0:
            fits.append(Place(axis, pre, size // (pre * traced)))
    return sorted(fits, key=lambda p: (p.pre * p.post != 1, p.axis != place.axis, p.pre != 1))

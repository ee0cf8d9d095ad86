"""What users give a graph, as the tensors it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from hwmpq.errors import InputError
from hwmpq.graph import Graph

#: The only input of a graph, or all of them by name; fp32, any batch size.
Inputs = Tensor | Mapping[str, Tensor]
#: Larger tensors leave the cache, and their memory goes back to the system each time
#: (MobileNetV2 at 224, one x86 core: 19 ms per image with batches of 2, 36 ms with 8).
_TENSOR_BYTES = 10_000_000


def named(graph: Graph, inputs: Inputs) -> dict[str, Tensor]:
    """Inputs by name; images become channels-last in memory, where CPU convolutions are fastest.

    Raises InputError when names or element types do not fit.
    """
    if isinstance(inputs, Tensor):
        if len(graph.inputs) != 1:
            raise InputError("one tensor for several inputs", None, graph.inputs, "Name them.")
        inputs = {graph.inputs[0]: inputs}
    if set(inputs) != set(graph.inputs):
        raise InputError("names of the inputs", ", ".join(inputs), graph.inputs)
    wrong = {str(x.dtype) for x in inputs.values()} - {"torch.float32"}
    if wrong:
        raise InputError("element type of an input", ", ".join(wrong), "torch.float32")
    return {name: _images_last(inputs[name]) for name in graph.inputs}


def samples(inputs: Inputs) -> int:
    """The number of samples: the first dimension of the first input."""
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
    return int(first.shape[0])


def good_batch(graph: Graph) -> int:
    """Samples that run fastest together: the largest tensor stays within `_TENSOR_BYTES`."""
    traced = graph.tensors[graph.inputs[0]][0]
    largest = max(4 * prod(shape) // traced for shape in graph.tensors.values())
    return max(1, min(64, _TENSOR_BYTES // largest))


def _images_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

"""Networks that differ from fp32 in one layer: run only what the change can reach.

The nodes before the first one whose demands or storage leave fp32 compute what fp32 does. Cells are
therefore taken in the order of that node, behind a single fp32 run that is stopped there: only the
tensors alive at that point are kept. Should they need more than `LIMIT_BYTES`, nothing is kept and
every cell runs the whole network.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod

import torch
from torch import Tensor

from hwmpq.formats import format_named
from hwmpq.graph import Graph
from hwmpq.quantize.simulate import Simulator, State
from hwmpq.sensitivity.task import Cell, Task
from hwmpq.storage import plan

LIMIT_BYTES = 2 * 2**30


def fp32_outputs(task: Task) -> list[list[Tensor]]:
    """The fp32 outputs per batch."""
    simulator = _fp32(task)
    with torch.inference_mode():
        return [simulator(inputs) for inputs, _ in task.batches()]


def outputs_per_cell(task: Task) -> Iterator[tuple[Cell, list[list[Tensor]]]]:
    """Every open cell with its outputs per batch, cells in the order of their first change."""
    fp32 = _fp32(task)
    starts = {cell: first_change(task, cell) for cell in task.open_cells()}
    keep = alive_bytes(task.graph) * task.samples <= LIMIT_BYTES
    with torch.inference_mode():
        states = [fp32.begin(inputs) for inputs, _ in task.batches()]
    for cell in sorted(starts, key=lambda cell: (starts[cell], cell)):
        variant, start = _variant(task, cell), starts[cell]
        found = []
        with torch.inference_mode():
            for state, (inputs, _) in zip(states, task.batches(), strict=True):
                if start and keep:
                    fp32.advance(state, start)
                found.append(_finish(variant, state.copy() if start and keep else inputs))
        yield cell, found


def work_per_cell(task: Task) -> dict[Cell, float]:
    """Relative cost of each open cell: the elements written behind its first change."""
    sizes = [prod(task.graph.tensors[node.name]) for node in task.graph.nodes]
    return {cell: float(sum(sizes[first_change(task, cell) :])) for cell in task.open_cells()}


def first_change(task: Task, cell: Cell) -> int:
    """Index of the first node that weighs, reads or stores in other than fp32; 0 if an input of the
    graph is stored so."""
    graph = task.graph
    storage = plan(graph, {name: _reads(fmt) for name, fmt in task.only(cell).items()})
    if any(storage.stored[name] != "fp32" for name in graph.inputs):
        return 0
    for index, node in enumerate(graph.nodes):
        demands = [storage.demand[node.name, i] for i in range(len(node.inputs))]
        if {storage.stored[node.name], *demands} != {"fp32"} or node.name == task.layers[cell[0]]:
            return index
    raise KeyError(task.layers[cell[0]])


@cache
def _reads(format_name: str) -> tuple[str, str]:
    fmt = format_named(format_name)
    return fmt.activation.name, fmt.weight.name


def alive_bytes(graph: Graph) -> float:
    """The most bytes of fp32 tensors alive between two nodes, per sample."""
    last = {t: i for i, node in enumerate(graph.nodes) for t in node.inputs}
    size = {name: 4 * prod(shape) for name, shape in graph.tensors.items()}
    alive = set(graph.inputs)
    most = sum(size[name] for name in alive)
    for index, node in enumerate(graph.nodes):
        alive.add(node.name)
        alive -= {t for t in node.inputs if last[t] == index and t not in graph.outputs}
        most = max(most, sum(size[name] for name in alive))
    return most / graph.tensors[graph.inputs[0]][0]


def _finish(simulator: Simulator, begun: State | dict[str, Tensor]) -> list[Tensor]:
    state = begun if isinstance(begun, State) else simulator.begin(begun)
    simulator.advance(state)
    return simulator.outputs(state)


def _variant(task: Task, cell: Cell) -> Simulator:
    return Simulator(task.graph, task.only(cell), task.quantizers)


def _fp32(task: Task) -> Simulator:
    everywhere = dict.fromkeys((node.name for node in task.graph.layers), "fp32")
    return Simulator(task.graph, everywhere, task.quantizers)

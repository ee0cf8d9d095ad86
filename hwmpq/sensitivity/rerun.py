"""Networks that differ from each other in few layers: run only what a difference can reach.

Two variants compute the same up to the first node whose format, demands or storage differ between
them. A wanted pair of cells therefore branches off the run of one of its cells there, and that run
off the fp32 one: only the tensors alive at that point are kept, for any graph. Should they need
more than `LIMIT_BYTES`, nothing is kept and every variant runs the whole network.

A single cell's outputs are saved under a name that all estimators share (`Task.outputs_item`), so
that none runs what another one ran.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, chain
from math import prod

import torch
from torch import Tensor

from hwmpq.formats import format_named
from hwmpq.graph import Graph
from hwmpq.quantize.blocks import alive_between
from hwmpq.quantize.simulate import Simulator, State
from hwmpq.sensitivity.task import Cells, Estimate, Forecast, Task
from hwmpq.storage import plan

LIMIT_BYTES = 2 * 2**30
#: Outputs are saved up to this size.
SAVED_BYTES = 8 * 2**20
#: Batches' outputs: per batch, in the order of `graph.outputs`.
Outputs = list[list[Tensor]]


@dataclass(frozen=True)
class Branch:
    """A cell's run, from node `begin` of the fp32 run on, and the pairs that leave it at a node.

    own: whether its own outputs are wanted. leaves: (node index, pair), ascending.
    """

    base: Cells
    begin: int
    own: bool
    leaves: tuple[tuple[int, Cells], ...]


class Runs:
    """Runs of a task's variants that share what they have in common.

    layer_runs: layers run so far, each over all samples. whole_runs: outputs that came out.
    """

    def __init__(self, task: Task):
        self.task = task
        self.layer_runs = self.whole_runs = 0
        self.keep = 3 * alive_bytes(task.graph) * task.samples <= LIMIT_BYTES
        nodes = task.graph.nodes
        self._layers_before = [0, *accumulate(int(node.is_layer) for node in nodes)]
        self._marks: dict[Cells, list[tuple[str, ...]]] = {}
        self._seconds = 0.0

    @cached_property
    def reference(self) -> Outputs:
        """The fp32 outputs."""
        start = time.monotonic()
        outputs = self.finish(())
        self._seconds = time.monotonic() - start
        return outputs

    def estimates(
        self, wanted: Sequence[Cells], increase: Callable[[Outputs], Tensor]
    ) -> dict[Cells, Estimate]:
        """Of every wanted variant the mean of `increase`, which gives one value per sample."""
        open_ = self.task.open(wanted)
        saved = self.saved(open_)
        schedule = self.schedule(cells for cells in open_ if cells not in saved)
        self.announce(schedule)
        known = ((cells, Estimate.of(increase(self.load(cells)))) for cells in saved)
        found = ((cells, Estimate.of(increase(y))) for cells, y in self.outputs(schedule))
        work = dict.fromkeys(saved, 1.0) | self.work(schedule)
        return self.task.fill(wanted, chain(known, found), work)

    def saved(self, wanted: Iterable[Cells]) -> set[Cells]:
        """The single cells among them whose outputs an estimator saved."""
        alone = (cells for cells in wanted if len(cells) == 1)
        return {cells for cells in alone if self.task.done(self.task.outputs_item(cells))}

    def load(self, cells: Cells) -> Outputs:
        """The saved outputs, in one batch."""
        kept = self.task.done(self.task.outputs_item(cells))
        assert isinstance(kept, bytes)
        flat = torch.frombuffer(bytearray(kept), dtype=torch.float32).to(self.task.device)
        shapes = [(self.task.samples, *y.shape[1:]) for y in self.reference[0]]
        parts = flat.split_with_sizes([prod(shape) for shape in shapes])
        return [[part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]]

    def _save(self, cells: Cells, outputs: Outputs) -> None:
        whole = [torch.cat(batches).cpu().numpy() for batches in zip(*outputs, strict=True)]
        if sum(y.nbytes for y in whole) <= SAVED_BYTES:
            self.task.keep(self.task.outputs_item(cells), b"".join(y.tobytes() for y in whole))

    def schedule(self, wanted: Iterable[Cells]) -> list[Branch]:
        """In which order the variants run: branches in the order of their begin."""
        leaves: dict[Cells, list[tuple[int, Cells]]] = {}
        own: set[Cells] = set()
        for cells in wanted:
            if len(cells) == 1:
                own.add(cells)
                leaves.setdefault(cells, [])
            else:
                alone: list[Cells] = [(cell,) for cell in cells]
                base = min(alone, key=lambda one: (self.first_change(one), one))
                leaves.setdefault(base, []).append((self.difference(base, cells), cells))
        branches = []
        for base, pairs in leaves.items():
            begin = min([self.first_change(base), *(index for index, _ in pairs)])
            branches.append(Branch(base, begin, base in own, tuple(sorted(pairs))))
        return sorted(branches, key=lambda branch: (branch.begin, branch.base))

    def outputs(self, schedule: Sequence[Branch]) -> Iterator[tuple[Cells, Outputs]]:
        """Every variant of the schedule with its outputs, those of single cells saved."""
        from hwmpq.sensitivity.elsewhere import shared_out

        pool = self.task.pool
        found = shared_out(self, schedule, pool) if pool and schedule else self.run(schedule)
        for cells, outputs in found:
            if len(cells) == 1:
                self._save(cells, outputs)
            yield cells, outputs

    def run(self, schedule: Sequence[Branch]) -> Iterator[tuple[Cells, Outputs]]:
        """Every variant of the schedule with its outputs, by this process."""
        trunk = Trunk(self, ())
        for branch in schedule:
            limb = Trunk(self, branch.base, trunk.at(branch.begin))
            for index, cells in branch.leaves:
                yield cells, self.finish(cells, limb.at(index))
            if branch.own:
                yield branch.base, limb.finish()

    def finish(self, cells: Cells, states: list[State] | None = None) -> Outputs:
        """The outputs of a variant, from these states on (from the inputs by default)."""
        return Trunk(self, cells, states).finish()

    def announce(self, schedule: Sequence[Branch]) -> None:
        """Tell the task's `forecast`; seconds are those of the `reference`, in proportion."""
        if self.task.forecast:
            work = self.work(schedule)
            workers = len(self.task.pool.workers) if self.task.pool else 1
            seconds = self._seconds * sum(work.values()) / sum(_sizes(self.task.graph)) / workers
            whole = (self.whole_runs + len(work)) * self._layers_before[-1]
            self.task.forecast(Forecast(self.layer_runs + self.count(schedule), whole, seconds))

    @property
    def tally(self) -> tuple[int, int]:
        """Layer runs so far, and what they were if every variant had begun at the inputs."""
        return self.layer_runs, self.whole_runs * self._layers_before[-1]

    def count(self, schedule: Sequence[Branch]) -> int:
        """Layer runs of `outputs(schedule)`."""
        before, end = self._layers_before, len(self._layers_before) - 1
        if not self.keep:
            return sum(len(branch.leaves) + branch.own for branch in schedule) * before[end]
        total = before[max((branch.begin for branch in schedule), default=0)]
        for branch in schedule:
            last = end if branch.own else max(index for index, _ in branch.leaves)
            total += before[last] - before[branch.begin]
            total += sum(before[end] - before[index] for index, _ in branch.leaves)
        return total

    def work(self, schedule: Sequence[Branch]) -> dict[Cells, float]:
        """Relative cost of each variant: the elements written behind its branching point."""
        sizes = _sizes(self.task.graph)
        behind = [float(sum(sizes[i if self.keep else 0 :])) for i in range(len(sizes))]
        cost: dict[Cells, float] = {}
        for branch in schedule:
            cost |= {cells: behind[index] for index, cells in branch.leaves}
            if branch.own:
                cost[branch.base] = behind[branch.begin]
        return cost

    def first_change(self, cells: Cells) -> int:
        """Index of the first node that computes other than in fp32."""
        return self.difference((), cells)

    def difference(self, one: Cells, other: Cells) -> int:
        """Index of the first node where the variants differ; 0 also if an input is stored
        differently."""
        a, b = self._mark(one), self._mark(other)
        return next(max(i - 1, 0) for i, pair in enumerate(zip(a, b, strict=True)) if _unlike(pair))

    def _mark(self, cells: Cells) -> list[tuple[str, ...]]:
        """What decides how the inputs are stored (first), and how each node computes."""
        if cells in self._marks:
            return self._marks[cells]
        graph, assignment = self.task.graph, self.task.assignment(cells)
        storage = plan(graph, {name: _reads(fmt) for name, fmt in assignment.items()})
        marks = [tuple(storage.stored[name] for name in graph.inputs)]
        for node in graph.nodes:
            demands = [storage.demand[node.name, i] for i in range(len(node.inputs))]
            marks.append((assignment.get(node.name, ""), storage.stored[node.name], *demands))
        if len(cells) < 2:
            self._marks[cells] = marks
        return marks


class Trunk:
    """One variant's run over all batches, held at one node; others branch off it there."""

    def __init__(self, runs: Runs, cells: Cells, states: list[State] | None = None):
        self._runs = runs
        self._simulator: Simulator = runs.task.simulator(cells)
        self._states = states

    def at(self, index: int) -> list[State] | None:
        """Continuations from before node `index`; None where the inputs are the place to begin.

        Each call's index must be at least the last one's.
        """
        if index == 0 or not self._runs.keep:
            return None
        with torch.inference_mode():
            if self._states is None:
                self._states = [self._simulator.begin(x) for x, _ in self._runs.task.batches()]
            self._count(self._states[0].at, index)
            for state in self._states:
                self._simulator.advance(state, index)
        return [state.copy() for state in self._states]

    def finish(self) -> Outputs:
        """The outputs; a batch that has not begun is run alone, to keep nothing of it."""
        states, batches = self._states, self._runs.task.batches()
        self._runs.whole_runs += 1
        self._count(states[0].at if states else 0, len(self._runs.task.graph.nodes))
        found = []
        with torch.inference_mode():
            for number, (inputs, _) in enumerate(batches):
                state = states[number] if states else self._simulator.begin(inputs)
                self._simulator.advance(state)
                found.append(self._simulator.outputs(state))
        return found

    def _count(self, start: int, stop: int) -> None:
        before = self._runs._layers_before
        self._runs.layer_runs += before[stop] - before[start]


def alive_bytes(graph: Graph) -> float:
    """The most bytes of fp32 tensors alive between two nodes, per sample."""
    size = {name: 4 * prod(shape) for name, shape in graph.tensors.items()}
    most = max(sum(size[name] for name in alive) for alive in alive_between(graph))
    return most / graph.tensors[graph.inputs[0]][0]


def _sizes(graph: Graph) -> list[int]:
    return [prod(graph.tensors[node.name]) for node in graph.nodes]


def _unlike(pair: tuple[object, object]) -> bool:
    return pair[0] != pair[1]


@cache
def _reads(format_name: str) -> tuple[str, str]:
    fmt = format_named(format_name)
    return fmt.activation.name, fmt.weight.name

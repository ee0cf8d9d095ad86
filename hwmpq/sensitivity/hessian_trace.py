"""`hessian-trace`: mean curvature of the loss times squared rounding error (HAWQ-V2, 1911.03852).

½ · Tr(H_W)/n_W · ‖Q(W) − W‖², plus the same of every operand x that the layer reads in its format,
½ · Tr(H_x)/n_x · ‖Q(x) − x‖² with trace and error averaged over the samples. Traces by Hutchinson's
estimator, E[vᵀHv] with Rademacher v (Commun. Stat. Simul. 19(2), 1990): one product with the
Hessian of all weights and operands together gives every layer's own part, unbiased. The network is
as deployed: BatchNorm folded, nothing drawn but the probes.

Probes go on until half of the traces have a standard error within `TOLERANCE` of them, at least
`LEAST` and at most `MOST`. A trace may be negative where the loss is not at an optimum, and so may
the estimate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from hwmpq.graph import Graph, Node
from hwmpq.quantize.interpret import Param, apply, evaluate
from hwmpq.sensitivity.gradients import announce, summed_loss
from hwmpq.sensitivity.rounding import Errors, errors
from hwmpq.sensitivity.task import Cells, Estimate, Task
from hwmpq.types import FloatArray, Sensitivity

GRADIENTS = True
LEAST, MOST, TOLERANCE = 8, 64, 0.1
#: Probes that run side by side need at most so many bytes.
LIMIT_BYTES = 2**30
#: A forward pass, its gradient, and per probe the gradient of that: in layer runs.
_PASS, _PROBE = 3, 6
#: What a trace is taken of: (layer, operand), where -1 is the weight.
Place = tuple[str, int]


def ESTIMATOR(task: Task) -> Sensitivity:
    """The estimate per cell; its standard error is over probes, on the given samples."""
    wanted = task.singles()
    open_ = task.open(wanted)
    layers, at_once = len(task.graph.layers), probes_at_once(task)
    rounds, runs = MOST // at_once, 0
    announce(task, layers * (MOST * _PROBE + rounds * _PASS) if open_ else 0)

    def found() -> Iterator[tuple[Cells, Estimate]]:
        nonlocal runs
        traces = hutchinson(task, len(open_))
        probes = len(next(iter(traces.values())))
        runs = layers * (probes * _PROBE + probes // at_once * _PASS)
        moved = errors(task, open_)
        for cells in open_:
            yield cells, Estimate.over_probes(_damage(task, cells, traces, moved))

    cost = dict.fromkeys(open_, 1.0)
    known = task.fill(wanted, found() if open_ else iter(()), cost, ahead=rounds)
    return task.result(known, "hessian-trace", task.loss.name, (runs, runs))


def hutchinson(task: Task, behind: int = 0) -> dict[Place, FloatArray]:
    """Estimates of each place's trace, one per probe: of the mean loss over the samples for a
    weight; averaged over the samples of their losses' for an operand.

    behind: items that follow, for the progress.
    """
    places, most = _places(task.graph), MOST // probes_at_once(task)
    rounds: list[FloatArray] = []
    start = time.monotonic()
    while not _precise(rounds):
        name = f"probes|{len(rounds)}"
        kept = task.done(name)
        if kept is None:
            values = _round(task, len(rounds), places)
            task.keep(name, values.ravel().tolist())
        else:
            values = np.array([float(x) for x in kept]).reshape(-1, len(places))
        rounds.append(values)
        if task.progress:
            left = (time.monotonic() - start) / len(rounds) * (most - len(rounds))
            task.progress(len(rounds), most + behind, left)
    return dict(zip(places, np.concatenate(rounds).T, strict=True))


def probes_at_once(task: Task) -> int:
    """Probes whose tensors fit into memory together: 1, 2, 4 or 8."""
    traced = task.graph.tensors[task.graph.inputs[0]][0]
    one = 4 * 4 * sum(map(prod, task.graph.tensors.values())) // traced * task.batch
    fitting = max(1, min(8, LIMIT_BYTES // one))
    return 1 << (fitting.bit_length() - 1)


def _places(graph: Graph) -> list[Place]:
    found: list[Place] = []
    for node in graph.layers:
        found += [(node.name, i) for i in ((0, 1) if node.op == "matmul" else (-1, 0))]
    return found


def _precise(rounds: list[FloatArray]) -> bool:
    """rounds: traces, [probes, places] each."""
    if not rounds:
        return False
    values = np.concatenate(rounds)
    if not LEAST <= len(values) < MOST:
        return len(values) >= MOST
    error = values.std(0, ddof=1) / len(values) ** 0.5
    return bool(np.mean(error <= TOLERANCE * np.abs(values.mean(0))) >= 0.5)


def _round(task: Task, number: int, places: list[Place]) -> FloatArray:
    """vᵀHv of fresh probes, [probes, places]."""
    probes = probes_at_once(task)
    total = np.zeros((probes, len(places)))
    for batch, (inputs, labels) in enumerate(task.batches()):
        leaves, loss = _loss(task, inputs, labels)
        tensors = [leaves[place] for place in places]
        grads = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
        state = np.random.SeedSequence([task.seed, number, batch]).generate_state(1, np.uint64)
        generator = torch.Generator(task.device).manual_seed(int(state[0] >> 1))
        vectors = [_rademacher((probes, *x.shape), generator) for x in tensors]
        products = _hessian_times(grads, tensors, vectors)
        for column, (v, hv) in enumerate(zip(vectors, products, strict=True)):
            total[:, column] += (v * hv).flatten(1).sum(1, dtype=torch.float64).cpu().numpy()
    return total / task.samples


def _hessian_times(
    grads: tuple[Tensor, ...], tensors: list[Tensor], vectors: list[Tensor]
) -> tuple[Tensor, ...]:
    """H·v of every probe, where `grads` depend on anything at all."""
    able = [i for i, g in enumerate(grads) if g.requires_grad]
    return torch.autograd.grad(
        [grads[i] for i in able], tensors, [vectors[i] for i in able],
        is_grads_batched=True, materialize_grads=True,
    )  # fmt: skip


def _loss(
    task: Task, inputs: dict[str, Tensor], labels: Tensor | None
) -> tuple[dict[Place, Tensor], Tensor]:
    """The batch's summed loss, and what it is differentiated by: the weights, and zeros added to
    the operands."""
    leaves: dict[Place, Tensor] = {}

    def run(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
        args = list(args)
        for index in range(2 if node.op == "matmul" else 1):
            leaf = torch.zeros(args[index].shape, device=task.device, requires_grad=True)
            leaves[node.name, index] = leaf
            args[index] = args[index] + leaf
        if node.op == "matmul":
            return apply(node, args, param)
        role = node.params["weight"]
        weight = param(role).clone().requires_grad_()
        leaves[node.name, -1] = weight
        return apply(node, args, lambda name: weight if name == role else param(name))

    # Probes run batched over a new first axis, which torch refuses for channels-last tensors.
    inputs = {name: x.contiguous() for name, x in inputs.items()}
    overrides = {node.name: run for node in task.graph.layers}
    outputs = evaluate(task.graph, inputs, overrides=overrides, constants=task.constants)
    return leaves, summed_loss(task.loss, outputs[task.graph.outputs[0]], labels)


def _rademacher(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    draws = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return draws.float().mul_(2).sub_(1)


def _damage(task: Task, cells: Cells, traces: dict[Place, FloatArray], moved: Errors) -> FloatArray:
    """The cell's estimate by each probe."""
    name = task.layers[cells[0][0]]
    node = task.graph.node(name)
    total = np.zeros_like(next(iter(traces.values())))
    weight = moved.weight[cells]
    if weight is not None:
        count = task.graph.constants[node.params["weight"]].size
        total += traces[name, -1] / count * weight.noise / 2
    traced = task.graph.tensors[task.graph.inputs[0]][0]
    for index, operand in enumerate(moved.operands[cells]):
        count = prod(task.graph.tensors[node.inputs[index]]) // traced
        total += traces[name, index] / count * operand.noise / task.samples / 2
    return total

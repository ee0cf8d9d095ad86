"""`hessian-trace`: mean curvature of the loss times squared rounding error (HAWQ-V2, 1911.03852).

½ · Tr(H_W)/n_W · ‖Q(W) − W‖², plus the same of every operand x that the layer reads in its format,
½ · Tr(H_x)/n_x · ‖Q(x) − x‖² with trace and error averaged over the samples. Traces by Hutchinson's
estimator, E[vᵀHv] with Rademacher v (Commun. Stat. Simul. 19(2), 1990): one product with the
Hessian of all weights and operands together gives every layer's own part, unbiased. The network is
as deployed: BatchNorm folded, nothing drawn but the probes.

Where the outputs z are piecewise linear in every single one of them (`piecewise_linear`), its own
part of the Hessian is Jᵀ A J with J = dz/dx and A the Hessian of the loss in z, which cross entropy
and KL give as B Bᵀ. The trace is then E[‖Jᵀ B u‖²] with Rademacher u: the same number by a plain
gradient per probe, and without the noise that the layers' products with each other bring.

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
from hwmpq.quantize.scores import LOSSES as KNOWN
from hwmpq.sensitivity.gradients import announce, summed_loss
from hwmpq.sensitivity.rounding import Errors, errors
from hwmpq.sensitivity.task import Cells, Estimate, Task
from hwmpq.types import FloatArray, Sensitivity

GRADIENTS = True
LEAST, MOST, TOLERANCE = 8, 64, 0.1
#: Probes that run side by side need at most so many bytes.
LIMIT_BYTES = 2**30
#: In layer runs: a forward pass and, for products with the Hessian, its gradient; and per probe.
_PASS, _PROBE = 3, 6
_LINEAR_PASS, _LINEAR_PROBE = 1, 2
#: Operators whose result is piecewise linear in any one of its operands and weights.
_PIECEWISE_LINEAR = frozenset(
    ("conv2d", "linear", "add", "relu", "clamp", "max_pool2d", "avg_pool2d", "mean", "concat",
     "pad", "rearrange", "batch_affine", "constant")
)  # fmt: skip
#: What a trace is taken of: (layer, operand), where -1 is the weight.
Place = tuple[str, int]


def ESTIMATOR(task: Task) -> Sensitivity:
    """The estimate per cell; its standard error is over probes, on the given samples."""
    wanted = task.singles()
    open_ = task.open(wanted)
    at_once = probes_at_once(task)
    rounds, runs = MOST // at_once, 0
    announce(task, _layer_runs(task, MOST) if open_ else 0)

    def found() -> Iterator[tuple[Cells, Estimate]]:
        nonlocal runs
        traces = hutchinson(task, len(open_))
        runs = _layer_runs(task, len(next(iter(traces.values()))))
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


def piecewise_linear(task: Task) -> bool:
    """Are the outputs piecewise linear in every weight and operand, and is the loss one whose
    Hessian in the outputs is known?"""
    return task.loss in (KNOWN["cross-entropy"], KNOWN["kl"]) and all(
        node.op in _PIECEWISE_LINEAR or (node.op == "mul" and "b" in node.params)
        for node in task.graph.nodes
    )


def _layer_runs(task: Task, probes: int) -> int:
    """What so many probes cost."""
    linear = piecewise_linear(task)
    each, once = (_LINEAR_PROBE, _LINEAR_PASS) if linear else (_PROBE, _PASS)
    return len(task.graph.layers) * (probes * each + probes // probes_at_once(task) * once)


def probes_at_once(task: Task) -> int:
    """Probes of one forward pass; their tensors fit into memory together: 1, 2, 4 or 8."""
    if piecewise_linear(task):
        return LEAST
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
    """Estimates of the traces by fresh probes, [probes, places]."""
    probes = probes_at_once(task)
    total = np.zeros((probes, len(places)))
    linear = piecewise_linear(task)
    for batch, (inputs, labels) in enumerate(task.batches()):
        leaves, outputs = _run(task, inputs)
        state = np.random.SeedSequence([task.seed, number, batch]).generate_state(1, np.uint64)
        generator = torch.Generator(task.device).manual_seed(int(state[0] >> 1))
        tensors = [leaves[place] for place in places]
        if linear:
            total += _gauss_newton(outputs, tensors, probes, generator)
        else:
            loss = summed_loss(task.loss, outputs, labels)
            total += _hessian(loss, tensors, probes, generator)
    return total / task.samples


def _hessian(
    loss: Tensor, tensors: list[Tensor], probes: int, generator: torch.Generator
) -> FloatArray:
    """vᵀHv, [probes, tensors]; H: the Hessian of the loss in all tensors together."""
    grads = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
    vectors = [_rademacher((probes, *x.shape), generator) for x in tensors]
    products = _hessian_times(grads, tensors, vectors)
    sums = [
        (v * hv).flatten(1).sum(1, dtype=torch.float64)
        for v, hv in zip(vectors, products, strict=True)
    ]
    found: FloatArray = torch.stack(sums, 1).cpu().numpy()
    return found


def _gauss_newton(
    outputs: Tensor, tensors: list[Tensor], probes: int, generator: torch.Generator
) -> FloatArray:
    """‖Jᵀ B u‖², [probes, tensors]; B Bᵀ = diag(p) − p pᵀ with p the softmax of a sample, whatever
    its label."""
    logits = outputs.flatten(1)
    p = logits.detach().softmax(1)
    rows = []
    for u in _rademacher((probes, *p.shape), generator):
        root = p.sqrt() * u
        grads = torch.autograd.grad(
            logits, tensors, root - p * root.sum(1, keepdim=True),
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip
        rows.append([float(g.square().sum(dtype=torch.float64)) for g in grads])
    return np.array(rows)


def _hessian_times(
    grads: tuple[Tensor, ...], tensors: list[Tensor], vectors: list[Tensor]
) -> tuple[Tensor, ...]:
    """H·v of every probe, where `grads` depend on anything at all."""
    able = [i for i, g in enumerate(grads) if g.requires_grad]
    return torch.autograd.grad(
        [grads[i] for i in able], tensors, [vectors[i] for i in able],
        is_grads_batched=True, materialize_grads=True,
    )  # fmt: skip


def _run(task: Task, inputs: dict[str, Tensor]) -> tuple[dict[Place, Tensor], Tensor]:
    """What the batch's loss is differentiated by, the weights and zeros added to the operands, and
    the first output."""
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
    return leaves, outputs[task.graph.outputs[0]]


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

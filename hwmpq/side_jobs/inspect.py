"""What there is in a model, and what of it may run where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hwmpq import targets
from hwmpq.formats import format_named, known_formats
from hwmpq.graph import Graph, cut, network_of
from hwmpq.kernels import best, why_not
from hwmpq.stages.job import Options
from hwmpq.stages.result import shape_text
from hwmpq.types import Network


def inspect_model(options: Options, outputs: Sequence[str] = ()) -> dict[str, Any]:
    """Layers, glue and sizes of a model, and which formats the target's kernels run.

    Formats: those asked for, else all known ones that some kernel of some target runs.
    outputs: nodes to cut the model at. Raises UnsupportedModel naming every operator that cannot be
    taken, UnknownName.
    """
    from hwmpq.frontend.model import load_model

    target = targets.load(options.target)
    weights = Path(options.weights) if options.weights else None
    graph = load_model(options.model, weights, options.input_shape).graph()
    if outputs:
        graph = cut(graph, outputs)
    network = network_of(graph)
    formats = [format_named(name) for name in options.formats or _runnable(network)]
    layers = []
    for layer in network.layers:
        able, reasons = [], {}
        for fmt in formats:
            reason = why_not(layer.workload, fmt, target.features)
            if reason is None:
                able.append(fmt.name)
            else:
                reasons[fmt.name] = reason
        layers.append(
            {
                "name": layer.name, "op": layer.workload.op, "shape": shape_text(layer.workload),
                "macs": layer.workload.macs, "nbytes": 4 * (layer.parameters + layer.bias),
                "workload": layer.workload.key, "formats": able, "why_not": reasons,
                "source": graph.node(layer.name).source,
            }
        )  # fmt: skip
    return {
        "version": 1, "model": options.model, "target": target.name,
        "runs_here": not targets.satisfied_by_host(target), "layers": layers,
        "glue": [
            {"name": n.name, "op": n.op, "source": n.source} for n in graph.nodes if not n.is_layer
        ],
        "inputs": _tensors(graph, graph.inputs), "outputs": _tensors(graph, graph.outputs),
        "macs": sum(layer.workload.macs for layer in network.layers),
        "parameters": sum(layer.parameters + layer.bias for layer in network.layers),
    }  # fmt: skip


def _runnable(network: Network) -> list[str]:
    """Formats that a kernel runs on a machine with every feature, in some layer."""
    everything = frozenset(targets.vocabulary())
    workloads = {layer.workload for layer in network.layers}
    return [
        name for name in known_formats()
        if any(best(w, format_named(name), everything) for w in workloads)
    ]  # fmt: skip


def _tensors(graph: Graph, names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(graph.tensors[name])} for name in names]

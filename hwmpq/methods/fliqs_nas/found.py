"""What a search for architectures found, as files that other commands take.

network.py                the module: `build()` returns it with its weights
network.safetensors       its weights and BatchNorm statistics
assignment.json           layer -> format
quantizers.safetensors    the scales and rounded weights that were trained
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwmpq import tensors
from hwmpq.artifact.folder import write_json
from hwmpq.formats import format_named
from hwmpq.graph import Graph
from hwmpq.methods.fliqs_nas import network
from hwmpq.methods.fliqs_nas.drawn import Drawn, Statistics
from hwmpq.methods.fliqs_nas.network import Architecture, Network
from hwmpq.methods.fliqs_nas.shared import SharedWeights
from hwmpq.methods.fliqs_nas.space import graph_of
from hwmpq.quantizers import Quantizers
from hwmpq.types import FloatArray, Problem, Solution

MODULE, WEIGHTS, ASSIGNMENT, QUANTIZERS = (
    "network.py", "network.safetensors", "assignment.json", "quantizers.safetensors"
)  # fmt: skip

_BUILD = '''

#: What was found.
FOUND = {architecture!r}


def build() -> Network:
    """The network that was found, with the weights beside this file."""
    from pathlib import Path

    from safetensors.torch import load_file

    network = Network(FOUND)
    network.load_state_dict(load_file(Path(__file__).with_suffix(".safetensors")))
    return network.eval()
'''


@dataclass(frozen=True, eq=False)
class Found:
    """graph: the module's canonical one; problem, log_p [L, F]: of its formats; solution: the most
    probable plan within the budgets."""

    shared: SharedWeights
    architecture: Architecture
    module: Network
    graph: Graph
    problem: Problem
    log_p: FloatArray
    solution: Solution
    told: dict[str, Any]


def taken(
    shared: SharedWeights, architecture: Architecture, assignment: Mapping[str, str],
    batches: Iterable[Tensor],
) -> Network:  # fmt: skip
    """An ordinary module, its BatchNorms' statistics the mean of what they see in these batches
    under the assignment."""
    graph = graph_of(architecture, shared.space.image[1:])
    seen: list[Statistics] = []
    with torch.no_grad():
        for x in batches:
            seen.append({})
            Drawn(shared, graph, assignment, seen=seen[-1])(x.to(shared.device))
    found = Network(architecture).eval()
    for name, value in found.state_dict().items():
        layer, running, what = name.rpartition(".norm.running_")
        if running:
            each = [batch[f"{layer}.conv"][what == "var"] for batch in seen]
            value.copy_(torch.stack(each).mean(0))
        elif not name.endswith("num_batches_tracked"):
            value.copy_(shared.part(name, tuple(value.shape)).detach())
    return found


def numbers(shared: SharedWeights, graph: Graph, assignment: Mapping[str, str]) -> Quantizers:
    """The quantizers of an assignment; graph: the canonical one of what was `taken`."""
    weights = {}
    for node in graph.layers:
        fmt = format_named(assignment[node.name])
        value = torch.from_numpy(graph.constants[node.params["weight"]])
        scale = shared.weight_scale(node.name, fmt, value.to(shared.device))
        own = None if scale is None else scale.detach().cpu().numpy()
        weights[node.name, fmt.name] = fmt.quantize_weight(value.numpy(), own)
    return Quantizers(shared.activations(graph.tensors), weights)


def write(folder: Path, found: Found, quantizers: Quantizers) -> list[str]:
    """Write the files; returns their paths. quantizers: the `numbers` of its plan."""
    source = Path(network.__file__).read_text(encoding="utf-8")
    build = _BUILD.format(architecture=found.architecture)
    (folder / MODULE).write_text(source + build, encoding="utf-8")
    state = {name: value.numpy() for name, value in found.module.state_dict().items()}
    tensors.save(folder / WEIGHTS, state)
    write_json(folder / ASSIGNMENT, dict(found.solution.choice))
    quantizers.save(folder / QUANTIZERS)
    return [str(folder / name) for name in (MODULE, WEIGHTS, ASSIGNMENT, QUANTIZERS)]

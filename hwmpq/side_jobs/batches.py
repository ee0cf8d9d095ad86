"""A job at other batch sizes, for an artifact that takes several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hwmpq.errors import InputError
from hwmpq.graph import Graph, network_of
from hwmpq.stages.job import Job


def at_sizes(job: Job, sizes: Sequence[int]) -> dict[int, Job]:
    """The job at each batch size, the smallest first; without any, as it is.

    Raises InputError where the model cannot be traced at a size, or the batch is not the first
    dimension of every input and output.
    """
    jobs = {}
    for size in sorted(set(sizes)):
        graph = _graph(job, size)
        jobs[size] = replace(job, graph=graph, network=network_of(graph))
    if len(jobs) > 1:
        _check_rows([one.graph for one in jobs.values()], list(jobs))
    return jobs or {_size(job.graph): job}


def _size(graph: Graph) -> int:
    return (*graph.tensors[graph.inputs[0]], 1)[0]


def _graph(job: Job, size: int) -> Graph:
    from hwmpq.frontend.torch_export import trace

    own = _size(job.graph)
    if size == own:
        return job.graph
    if job.model.fixed_batch:
        raise InputError(
            f"--batch for {job.options.model}", size, f"{own}, as it was exported",
            "Give the model as zoo:NAME or package.module:callable.",
        )  # fmt: skip
    example = tuple(x[:1].repeat(size, *[1] * (x.ndim - 1)) for x in job.model.example)
    return trace(job.model.program, example)


def _check_rows(graphs: Sequence[Graph], sizes: Sequence[int]) -> None:
    first = graphs[0]
    for graph, size in zip(graphs, sizes, strict=True):
        for name in (*first.inputs, *first.outputs):
            found, wanted = graph.tensors.get(name), (size, *first.tensors[name][1:])
            if found is None or tuple(found) != wanted:
                raise InputError(f"{name} at batch size {size}", found, str(wanted))

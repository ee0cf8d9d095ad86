"""Where a graph can be cut: what is alive between its nodes, and the blocks in between."""

from __future__ import annotations

from collections.abc import Iterator

from hwmpq.graph import Graph


def alive_between(graph: Graph) -> Iterator[frozenset[str]]:
    """The tensors that later nodes or the caller still need: before the first node, then behind
    each one."""
    last = {t: i for i, node in enumerate(graph.nodes) for t in node.inputs}
    alive = set(graph.inputs)
    yield frozenset(alive)
    for index, node in enumerate(graph.nodes):
        alive.add(node.name)
        alive -= {t for t in node.inputs if last[t] == index and t not in graph.outputs}
        yield frozenset(alive)


def block_ends(graph: Graph) -> list[int]:
    """Index behind the last node of each block, in order.

    A block holds a layer at least, and ends where a single tensor carries all that later nodes
    need: residual and attention blocks are one each, and in a plain chain every layer is (BRECQ,
    arXiv 2102.05426). Glue behind the last such place belongs to the last block.
    """
    ends, filled = [], False
    for index, alive in enumerate(list(alive_between(graph))[1:]):
        filled = filled or graph.nodes[index].is_layer
        if len(alive) == 1 and filled:
            ends.append(index + 1)
            filled = False
    if filled or not ends:
        ends.append(len(graph.nodes))
    ends[-1] = len(graph.nodes)
    return ends

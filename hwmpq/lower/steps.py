"""What a compiled network does, step by step, before anything is emitted.

One walk over the graph under its storage plan decides every kernel call, every re-encoding and
every change of layout. `lower_annotated` emits these steps; the latency model prices them. Plain
Python: no tvm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.graph import Graph, Node, workload_of
from hwmpq.kernels import Call
from hwmpq.kernels.glue import GlueCall, Operand
from hwmpq.lower.layout import PLAIN, layouts, required
from hwmpq.storage import StoragePlan, keeps_encoding, plan
from hwmpq.targets import Target


@dataclass(frozen=True)
class Ref:
    """A tensor as it lies in memory."""

    tensor: str
    encoding: str
    layout: str


@dataclass(frozen=True)
class Step:
    """One binding of the compiled main.

    node: the operator it belongs to (for an 'encode' the reader that first asked for it);
    call: a layer's Call, a glue kernel's GlueCall, None for constants and opaque operators.
    """

    node: Node
    reads: tuple[Ref, ...]
    writes: Ref
    call: Call | GlueCall | None

    @property
    def is_encode(self) -> bool:
        return isinstance(self.call, GlueCall) and self.call.op == "encode"


@dataclass(frozen=True, eq=False)
class Schedule:
    """steps in order; outputs: what is handed out, fp32 and plain; plan: the storage plan."""

    steps: tuple[Step, ...]
    outputs: tuple[Ref, ...]
    plan: StoragePlan


def steps(
    graph: Graph, formats: Mapping[str, Format], target: Target, threads: int = 1
) -> Schedule:
    """The steps of a graph. formats: layer -> Format."""
    storage = plan(graph, {n: (f.activation.name, f.weight.name) for n, f in formats.items()})
    return _Walk(graph, formats, storage, target, threads).run()


class _Walk:
    def __init__(
        self, graph: Graph, formats: Mapping[str, Format], storage: StoragePlan,
        target: Target, threads: int,
    ):  # fmt: skip
        self.graph, self.formats, self.plan = graph, formats, storage
        self.target, self.threads = target, threads
        self.layout = layouts(graph)
        self.keeps = keeps_encoding(graph)
        self.ready: set[Ref] = set()
        self.steps: list[Step] = []

    def run(self) -> Schedule:
        for name in self.graph.inputs:
            self.ready.add(Ref(name, "fp32", PLAIN))
        for node in self.graph.nodes:
            self._node(node)
        last = self.graph.nodes[-1]
        outputs = tuple(self._read(last, Ref(n, "fp32", PLAIN)) for n in self.graph.outputs)
        return Schedule(tuple(self.steps), outputs, self.plan)

    def _stored(self, tensor: str) -> Ref:
        return Ref(tensor, self.plan.stored[tensor], self.layout[tensor])

    def _operand(self, ref: Ref) -> Operand:
        return Operand(self.graph.tensors[ref.tensor], ref.layout, ref.encoding)

    def _read(self, reader: Node, ref: Ref) -> Ref:
        """Make a tensor available in an encoding and layout, from what is stored of it."""
        if ref in self.ready:
            return ref
        stored = self._stored(ref.tensor)
        if stored not in self.ready:  # from outside: fp32 in torch's order, stored now
            arrived = Ref(ref.tensor, "fp32", PLAIN)
            self._glue(reader, "encode", {}, (arrived,), stored, False)
        if ref not in self.ready:
            shared = stored.encoding == ref.encoding
            self._glue(reader, "encode", {}, (stored,), ref, shared)
        return ref

    def _glue(
        self, node: Node, op: str, attrs: Mapping[str, object], reads: tuple[Ref, ...], out: Ref,
        shared: bool,
    ) -> None:  # fmt: skip
        call = GlueCall(
            op, json.dumps(attrs, sort_keys=True), tuple(self._operand(r) for r in reads),
            self._operand(out), shared, self.target.vector_bytes, self.threads,
            "avx2" in self.target.features,
        )  # fmt: skip
        self._add(Step(node, reads, out, call))

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self.ready.add(step.writes)

    def _node(self, node: Node) -> None:
        out = self._stored(node.name)
        if node.op == "constant":
            self._add(Step(node, (), out, None))
            return
        if node.op == "opaque":
            reads = tuple(self._read(node, Ref(t, "fp32", PLAIN)) for t in node.inputs)
            self._add(Step(node, reads, Ref(node.name, "fp32", PLAIN), None))
            return
        reads = tuple(
            self._read(
                node,
                Ref(
                    t,
                    self.plan.demand[node.name, i],
                    required(node, i, self.layout, self.graph) or self.layout[t],
                ),
            )
            for i, t in enumerate(node.inputs)
        )
        if node.is_layer:
            self._add(Step(node, reads, out, self._call(node, reads, out)))
            return
        shared = node.name in self.keeps or node.op == "concat"
        self._glue(node, node.op, dict(node.attrs), reads, out, shared)

    def _call(self, node: Node, reads: tuple[Ref, ...], out: Ref) -> Call:
        residual = reads[-1].encoding if node.attrs.get("residual") else ""
        b = reads[1].encoding if node.op == "matmul" else ""
        return Call(
            workload_of(node, self.graph), self.formats[node.name], reads[0].encoding,
            out.encoding, residual, b, self.threads,
        )  # fmt: skip

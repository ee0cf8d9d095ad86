"""Compiled glue kernels against the simulator's torch rules and numpy references.

Kernels are compiled and run in a child process, one case after the other, so that a crash of the
compiler is the failure of one case.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import encoding_named
from hwmpq.kernels import glue
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.glue import GlueCall, Operand
from hwmpq.kernels.glue.views import passes
from hwmpq.requantize import Quantizer
from hwmpq.storage import is_integer

Array = np.ndarray[Any, Any]
TARGET = {"kind": "llvm", "mcpu": "x86-64-v3"}


# ------------------------------------------------------------------ the child: compile and run


def _serve() -> None:
    """Read one request per line; answer 'ok' (outputs are in the file) or the error's text."""
    import tvm

    target = tvm.target.Target(TARGET)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            data = np.load(request["arguments"])
            arguments = [tvm.runtime.tensor(data[str(i)]) for i in range(len(data.files))]
            function = glue.emit(_call_from(request["call"]))
            tvm.compile(function, target=target)["main"](*arguments)
            np.save(request["result"], arguments[-1].numpy())
            answer = "ok"
        except Exception as error:  # the parent fails the case with this text
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


def _call_from(data: dict[str, Any]) -> GlueCall:
    def operand(d: dict[str, Any]) -> Operand:
        return Operand(tuple(d["shape"]), d["layout"], d["encoding"])

    inputs, out = tuple(operand(d) for d in data.pop("inputs")), operand(data.pop("out"))
    return GlueCall(inputs=inputs, out=out, **data)


class Child:
    """The process that compiles; started again after a crash."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def run(self, call: GlueCall, arguments: Sequence[Array]) -> Array:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        source, result = self.folder / "arguments.npz", self.folder / "result.npy"
        np.savez(source, **{str(i): a for i, a in enumerate(arguments)})
        request = {"call": asdict(call), "arguments": str(source), "result": str(result)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the compiler died with {self.process.wait()} at {call}"
        assert json.loads(line) == "ok", json.loads(line)
        return np.asarray(np.load(result))

    def close(self) -> None:
        if self.process is not None and self.process.stdin and self.process.stdout:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    held = Child(tmp_path_factory.mktemp("glue"))
    yield held
    held.close()


# ------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """One call: operator, logical shapes, and per operand an encoding and its quantizer."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    encodings: tuple[str, ...]  # of the inputs, then of the result
    attrs: dict[str, Any] = field(default_factory=dict)
    shared: bool = False
    layouts: str = ""  # one letter per operand, 'n' or 'p'; '' = images are nhwc
    constants: dict[str, tuple[int, ...]] = field(default_factory=dict)
    spread: float = 2.0
    threads: int = 1

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shapes[0]))
        return "-".join([self.op, shape, *self.encodings] + ["shared"] * self.shared)


QUANTIZERS = (Quantizer(0.031, 117), Quantizer(0.017, 40), Quantizer(0.043, 201))
SIGNED = Quantizer(0.021, 0)


def quantizers_of(case: Case) -> list[Quantizer]:
    """Of every operand and the result; all the same when they are shared."""
    found = []
    for index, encoding in enumerate(case.encodings):
        scale = QUANTIZERS[-1 if case.shared else index % 3]
        if not is_integer(encoding):
            scale = Quantizer()
        elif encoding[0] == "s":
            scale = SIGNED
        elif encoding != "u8":
            scale = Quantizer(scale.scale * 16, 5)
        found.append(scale)
    return found


def layout_of(case: Case, index: int, shape: Sequence[int]) -> str:
    if case.layouts:
        return {"n": "nhwc", "p": "plain"}[case.layouts[index]]
    return "nhwc" if len(shape) == 4 else "plain"


def values_of(codes: Array, encoding: str, q: Quantizer) -> Array:
    """fp32 values of codes or bit patterns."""
    return np.asarray(encoding_named(encoding).dequantize(codes, q.scale, q.zero))


def codes_of(values: Array, encoding: str, q: Quantizer) -> Array:
    return np.asarray(encoding_named(encoding).quantize(values, q.scale, q.zero))


def reference(case: Case, codes: list[Array], quantizers: list[Quantizer]) -> Array:
    """Codes (or bits) of the result by the simulator: its rules on codes, else its fp32 operators
    between decoding and encoding."""
    import torch

    from hwmpq.graph import Node
    from hwmpq.quantize import glue as rules
    from hwmpq.quantize.interpret import apply

    op = "rearrange" if case.op == "encode" else case.op
    attrs = case.attrs if op != "rearrange" else {"steps": case.attrs.get("steps", [])}
    node = Node("y", op, tuple("x" for _ in codes), attrs, {r: r for r in case.constants})
    constants = {r: torch.from_numpy(v) for r, v in constants_of(case).items()}
    *ins, out = list(zip(case.encodings, quantizers, strict=True))
    on_codes = is_integer(out[0]) and op in rules.RULES and not constants
    if on_codes and (case.shared or op == "add"):
        args = [
            torch.from_numpy((x if is_integer(e) else values_of(x, e, q)).astype(np.float32))
            for x, (e, q) in zip(codes, ins, strict=True)
        ]
        y = rules.RULES[op](node, args, ins, out).numpy()
        return y.astype(memory_dtype(out[0]))
    values = [values_of(x, e, q) for x, (e, q) in zip(codes, ins, strict=True)]
    y = apply(node, [torch.from_numpy(v) for v in values], constants.__getitem__).numpy()
    return codes_of(y, *out)


def constants_of(case: Case) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    return {r: rng.normal(0, 1, s).astype(np.float32) for r, s in case.constants.items()}


def run(child: Child, case: Case) -> tuple[Array, Array, GlueCall]:
    """(what the kernel stored, what the simulator stores), both in logical shape."""
    rng = np.random.default_rng(len(case.name))
    quantizers = quantizers_of(case)
    codes = []
    for shape, encoding, q in zip(case.shapes, case.encodings[:-1], quantizers, strict=False):
        codes.append(codes_of(rng.normal(0, case.spread, shape).astype(np.float32), encoding, q))
    want = reference(case, codes, quantizers)
    shapes = [*case.shapes, want.shape]
    operands = [
        Operand(tuple(s), layout_of(case, i, s), e)
        for i, (s, e) in enumerate(zip(shapes, case.encodings, strict=True))
    ]
    attrs = json.dumps(case.attrs, sort_keys=True)
    call = GlueCall(
        case.op, attrs, tuple(operands[:-1]), operands[-1], case.shared, threads=case.threads
    )
    flat = [
        np.ascontiguousarray(x.transpose(o.order)).reshape(-1)
        for x, o in zip(codes, operands, strict=False)
    ]
    out = np.full(want.size, 0x5B, memory_dtype(case.encodings[-1]))
    arguments = [*flat, *glue.parameters(call, constants_of(case), quantizers), out]
    got = child.run(call, arguments).reshape(call.out.physical)
    return got.transpose(np.argsort(call.out.order)), want, call


def steps_apart(got: Array, want: Array, encoding: str) -> float:
    """Largest distance: in codes of an integer, in units of the last place of a float, and for
    fp32 in units of 2^-23 of the value or of 1, whichever is larger."""
    if encoding == "fp32":
        a, b = got.astype(np.float64), want.astype(np.float64)
        return float((np.abs(a - b) / np.maximum(np.abs(b), 1.0)).max() * 2**23)
    if is_integer(encoding):
        return float(np.abs(got.astype(np.int64) - want.astype(np.int64)).max())
    ordered = [np.where(x < 0x8000, x.astype(np.int64), 0x8000 - x.astype(np.int64)) 
               for x in (got, want)]
    return float(np.abs(ordered[0] - ordered[1]).max())


if __name__ == "__main__":
    _serve()

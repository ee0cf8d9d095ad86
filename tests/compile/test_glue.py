"""Compiled glue kernels against the simulator, bit for bit, and against numpy references.

Kernels are compiled and run in a child process, one case after the other, so that a crash of the
compiler is the failure of one case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwmpq.formats import encoding_named
from hwmpq.kernels import glue
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.glue import GlueCall, Operand
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
                env={**os.environ, "TVM_NUM_THREADS": "2"},
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
    register: int = 32  # bytes

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shapes[0]))
        width = [f"{self.register}bytes"] if self.register != 32 else []
        return "-".join([self.op, shape, *self.encodings, *["shared"] * self.shared, *width])


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
    """Codes (or bits) of the result by the exact simulator: its rules on codes, else its fp32
    operators between decoding and encoding."""
    import torch

    from hwmpq.graph import Node
    from hwmpq.quantize import glue as rules
    from hwmpq.quantize.exact_math import apply

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


def run(child: Child, case: Case) -> tuple[Array, Array]:
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
        case.op, attrs, tuple(operands[:-1]), operands[-1], case.shared, case.register,
        case.threads, case.register >= 32,
    )  # fmt: skip
    flat = [
        np.ascontiguousarray(x.transpose(o.order)).reshape(-1)
        for x, o in zip(codes, operands, strict=False)
    ]
    out = np.full(want.size, 0x5B, memory_dtype(case.encodings[-1]))
    arguments = [*flat, *glue.parameters(call, constants_of(case), quantizers), out]
    got = child.run(call, arguments).reshape(call.out.physical)
    return got.transpose(np.argsort(call.out.order)), want


# ------------------------------------------------------------------ the grid

WINDOW = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1, 1, 1], "ceil": False}
WIDE = {"kernel": [2, 3], "stride": [1, 2], "padding": [0, 1, 0, 1], "ceil": False}
SHUFFLE = {
    "steps": [["reshape", [1, 2, 17, 5, 7]], ["permute", [0, 2, 1, 3, 4]],
              ["reshape", [1, 34, 5, 7]]]
}  # fmt: skip
QKV = {
    "steps": [["slice", 2, 192, 384, 1], ["reshape", [1, 197, 3, 64]], ["permute", [0, 2, 1, 3]]]
}
STRIDED = {"steps": [["slice", 2, 0, 9, 2], ["slice", 3, 0, 7, 2]]}
TWICE = {
    "steps": [["permute", [1, 0]], ["reshape", [3, 8]], ["slice", 1, 1, 7, 2],
              ["reshape", [1, 3, 3]], ["expand", [4, 3, 3]]]
}  # fmt: skip
PADS = {"pads": [[0, 0], [0, 3], [1, 2], [2, 1]], "value": 0.0}


def image(channels: int, height: int = 5, width: int = 7) -> tuple[int, ...]:
    return (1, channels, height, width)


def _elementwise() -> Iterator[Case]:
    """Each function three times: sizes and encodings rotate."""
    names = ("relu", "gelu", "silu", "hardswish", "sigmoid", "hardsigmoid", "tanh", "clamp")
    shapes = (image(33), (3, 7), image(65, 3, 3), (1, 17, 31), image(1), image(3))
    pairs = (("fp32", "fp32"), ("fp32", "u8"), ("u8", "bf16"), ("bf16", "fp16"), ("u8", "u8"))
    attrs = {"gelu": {"approximate": "none"}, "clamp": {"lo": -1.0, "hi": 1.5}}
    for i, name in enumerate(names):
        for j in range(3):
            shape, pair = shapes[(i + 2 * j) % 6], pairs[(2 * i + j) % 5]
            yield Case(name, (shape,), pair, attrs.get(name, {}), spread=3.0)
    yield Case("gelu", ((5, 65),), ("fp32", "fp32"), {"approximate": "tanh"}, spread=3.0)
    for shape, kind in ((image(65), "u8"), ((7, 3), "u4"), ((7, 9), "bf16")):
        yield Case("relu", (shape,), (kind, kind), shared=True)
        yield Case("clamp", (shape,), (kind, kind), attrs["clamp"], shared=True)


def _joined() -> Iterator[Case]:
    """add and mul: equal shapes, per channel, per pixel, of a lower rank, and a constant."""
    shapes = (
        (image(33), image(33)),
        (image(65), image(65, 1, 1)),
        (image(3), image(3)),
        (image(17), image(1)),
        ((2, 5, 31), (31,)),
        (image(7), (5, 7)),
    )
    kinds = (
        ("u8", "u8", "u8"),
        ("u8", "bf16", "u8"),
        ("fp32", "u8", "u8"),
        ("u8", "u8", "fp32"),
        ("bf16", "fp16", "bf16"),
        ("u8", "u4", "u4"),
        ("fp32", "fp32", "fp32"),
    )
    for i, kind in enumerate(kinds):
        yield Case("add", shapes[i % 6], kind)
        yield Case("add", shapes[(i + 1) % 6], kind)
        yield Case("mul", shapes[(i + 3) % 6], kind)
    yield Case("add", (image(9), image(9)), ("fp32", "u8", "fp32"), layouts="pnn")
    yield Case("add", ((2, 17, 12),), ("fp32", "fp32"), constants={"b": (1, 17, 12)})
    yield Case("mul", (image(12),), ("fp32", "u8"), constants={"b": (12, 1, 1)})
    for shape, kinds_ in ((image(17), ("fp32", "fp32")), ((3, 33), ("u8", "bf16"))):
        size = {"scale": (shape[1],), "shift": (shape[1],)}
        yield Case("batch_affine", (shape,), kinds_, constants=size)


def _rows() -> Iterator[Case]:
    kinds = (("fp32", "fp32"), ("fp32", "u8"), ("bf16", "bf16"), ("u8", "fp32"))
    for i, size in enumerate((1, 3, 7, 17, 31, 33, 65, 197)):
        shape, parameter = (2, 3, size), {"weight": (size,), "bias": (size,)}
        yield Case("softmax", (shape,), kinds[i % 4], {"axis": 2})
        if size > 1:
            attrs = {"eps": 1e-6}
            yield Case("layer_norm", (shape,), kinds[(i + 1) % 4], attrs, constants=parameter)
    yield Case("softmax", ((1, 3, 5, 5),), ("fp32", "u8"), {"axis": 3}, layouts="pp")
    for count, size in ((11, 50), (17, 7), (3, 2500)):  # several blocks of rows, and a rest
        parameter = {"weight": (size,), "bias": (size,)}
        yield Case("softmax", ((count, size),), ("fp32", "u8"), {"axis": 1})
        yield Case("layer_norm", ((count, size),), ("fp32", "u8"), {"eps": 1e-6},
                   constants=parameter)  # fmt: skip


def _windows() -> Iterator[Case]:
    kinds = (("u8", "u8"), ("fp32", "fp32"), ("bf16", "bf16"), ("u8", "u8"), ("fp32", "fp32"))
    for channels, kind in zip((1, 7, 31, 65, 33), kinds, strict=True):
        shape = (2, channels, 7, 9)
        yield Case("max_pool2d", (shape,), kind, WINDOW, shared=True)
        yield Case("avg_pool2d", (shape,), kind, {**WINDOW, "count_include_pad": False})
        yield Case("mean", (shape,), kind, {"axes": [2, 3], "keepdim": channels > 9})
    yield Case("max_pool2d", (image(17),), ("s8", "s8"), WIDE, shared=True)
    yield Case("max_pool2d", (image(17),), ("u8", "fp32"), WIDE)
    yield Case("avg_pool2d", (image(17),), ("fp32", "u8"), {**WIDE, "count_include_pad": True})
    for axes, keep in (([1], False), ([2], True), ([0, 2], False), ([0, 1, 2], True)):
        yield Case("mean", ((2, 50, 17),), ("fp32", "fp32"), {"axes": axes, "keepdim": keep})


def _moves() -> Iterator[Case]:
    for kind in ("u8", "bf16", "fp32"):
        pair = (kind, kind)
        yield Case("pad", (image(7),), pair, PADS, shared=True)
        yield Case("concat", (image(7), image(33)), (*pair, kind), {"axis": 1}, shared=True)
        yield Case("rearrange", (image(34),), pair, SHUFFLE, shared=True)
        yield Case("rearrange", (image(34, 9, 9),), pair, STRIDED, shared=True)
        flat = {"steps": [["reshape", [1, 34 * 63]]]}
        yield Case("rearrange", (image(34, 7, 9),), pair, flat, shared=True)
    yield Case("pad", (image(7),), ("fp32", "u8"), PADS)
    yield Case("concat", ((1, 1, 9), (2, 3, 9)), ("u8",) * 3, {"axis": 1}, shared=True)
    yield Case("concat", (image(3), image(5)), ("fp32", "u8", "u8"), {"axis": 1})
    yield Case("rearrange", ((1, 197, 576),), ("fp32", "s8"), QKV, layouts="pp")
    yield Case("rearrange", ((1, 197, 576),), ("u8", "u8"), QKV, layouts="pp")
    yield Case("rearrange", ((6, 4),), ("bf16", "fp32"), TWICE)
    turned = {"steps": [["permute", [0, 2, 1]]]}
    yield Case("rearrange", ((2, 33, 65),), ("fp32", "u8"), turned)
    yield Case("rearrange", ((2, 5, 65),), ("u8", "u8"), turned, shared=True)
    yield Case("rearrange", ((2, 65, 5),), ("u8", "u8"), turned, shared=True)
    for channels in (1, 2, 3, 4, 7, 17):
        yield Case("encode", (image(channels, 11, 13),), ("fp32", "u8"), layouts="pn")
    yield Case("encode", (image(3, 11, 13),), ("u8", "fp32"), layouts="np")
    yield Case("encode", (image(33),), ("u8", "u8"))
    yield Case("encode", (image(33),), ("u8", "u4"))
    yield Case("encode", (image(33),), ("fp16", "bf16"))
    for size, kind in ((8, "u8"), (23, "s8"), (41, "u8"), (64, "u4"), (100, "s8")):
        for spread in (9.0, 1e30):  # on both sides of the largest and of the least code
            yield Case("encode", ((size,),), ("fp32", kind), spread=spread)


def _threaded() -> Iterator[Case]:
    """Large enough for a parallel loop."""
    big = (1, 65, 41, 41)
    yield Case("relu", (big,), ("u8", "u8"), shared=True, threads=2)
    yield Case("encode", (big,), ("fp32", "u8"), layouts="pn", threads=2)
    yield Case("softmax", ((100, 197),), ("fp32", "fp32"), {"axis": 1}, threads=2)
    size = {"weight": (197,), "bias": (197,)}
    yield Case("layer_norm", ((91, 197),), ("fp32", "u8"), {"eps": 1e-6}, threads=2,
               constants=size)  # fmt: skip
    yield Case("max_pool2d", ((1, 65, 33, 33),), ("u8", "u8"), WINDOW, shared=True, threads=2)
    for shape in (big, (1, 20, 97, 61)):  # the channels of the second are too few to share
        yield Case("mean", (shape,), ("u8", "fp32"), {"axes": [2, 3], "keepdim": True}, threads=2)
    yield Case("add", ((1, 33, 67, 43),) * 2, ("u8", "fp32", "u8"), threads=2)


def _registers() -> Iterator[Case]:
    """The order of a sum is the same whatever the width of a register."""
    for register in (16, 64):
        more: dict[str, Any] = {"register": register}
        yield Case("gelu", ((3, 37),), ("fp32", "fp32"), {"approximate": "none"}, **more)
        yield Case("softmax", ((5, 197),), ("fp32", "fp32"), {"axis": 1}, **more)
        size = {"weight": (203,), "bias": (203,)}
        yield Case("layer_norm", ((5, 203),), ("fp32",) * 2, {"eps": 1e-6}, constants=size, **more)
        yield Case("encode", ((203,),), ("fp32", "u8"), spread=9.0, **more)
        yield Case("add", ((203,), (203,)), ("u8", "fp32", "u8"), spread=9.0, **more)
        for axes in ([2, 3], [1], [0, 1, 3]):
            attrs = {"axes": axes, "keepdim": True}
            yield Case("mean", ((2, 37, 5, 7),), ("fp32", "fp32"), attrs, **more)


CASES = [
    *_elementwise(), *_joined(), *_rows(), *_windows(), *_moves(), *_threaded(), *_registers(),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_agrees_with_the_simulator(child: Child, case: Case) -> None:
    got, want = run(child, case)
    np.testing.assert_array_equal(got, want)


def test_every_operator_is_in_the_grid() -> None:
    assert {case.op for case in CASES} == set(glue.operators())


def _normal(x: Array) -> Array:
    from scipy.special import ndtr

    return np.asarray(x * ndtr(x))


@pytest.mark.parametrize(
    ("op", "function", "absolute"),
    [
        ("gelu", _normal, 1e-7),
        ("tanh", np.tanh, 3e-7),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), 1.5e-7),
        ("silu", lambda x: x / (1 + np.exp(-x)), 2e-7),
    ],
)
def test_functions_over_their_whole_range(
    child: Child, op: str, function: Any, absolute: float
) -> None:
    """The error is at most `absolute` and two units in the last place of the result."""
    x = np.concatenate([np.linspace(-88, 88, 1 << 14), np.linspace(-6, 6, 1 << 14)])
    x = np.append(x, [0.0, 1e4, -1e4]).astype(np.float32)
    operand = Operand(x.shape, "plain", "fp32")
    call = GlueCall(op, json.dumps({"approximate": "none"}), (operand,), operand, False)
    got = child.run(call, [x, *glue.parameters(call, {}, [Quantizer()] * 2), np.zeros_like(x)])
    with np.errstate(over="ignore"):
        want = function(x.astype(np.float64))
    allowed = absolute + 2 * np.spacing(np.abs(want).astype(np.float32))
    assert (np.abs(got - want) <= allowed).all()


def test_softmax_of_masked_rows(child: Child) -> None:
    x = np.array([[0, -1e9, 5, -np.inf], [1e4, 0, -1e4, 1e4]], np.float32)
    operand = Operand(x.shape, "plain", "fp32")
    call = GlueCall("softmax", '{"axis": 1}', (operand,), operand, False)
    flat = x.reshape(-1)
    got = child.run(call, [flat, *glue.parameters(call, {}, [Quantizer()] * 2), np.zeros(8, "f4")])
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    np.testing.assert_allclose(got.reshape(2, 4), e / e.sum(1, keepdims=True), atol=1e-7)


if __name__ == "__main__":
    _serve()

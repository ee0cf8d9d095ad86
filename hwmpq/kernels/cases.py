"""What a conformance check runs: cases over shapes, formats and epilogues.

Factors, per operator: the kernel with its format, the sizes of the workload, the encodings of the
result and of the residual, bias and activation, threads, schedule, values. `grid` covers, for every
kernel and every format it takes, all pairs of the other factors; `subset`, for the test suite, all
pairs of all factors, with a kernel's parts as factors of their own and one format to a kernel. Both
are deterministic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hwmpq.formats import format_named, known_formats
from hwmpq.kernels import candidates, why_not
from hwmpq.kernels.cover import pairwise
from hwmpq.kernels.nests import Call
from hwmpq.kernels.sample import VALUES
from hwmpq.targets import Target
from hwmpq.types import LAYER_OPS, Workload

#: Formats of the subset: float inputs, group scales, small floats, integer weights, narrow
#: activations, narrow sums of one and of many dots.
KINDS = (
    "fp32", "bf16", "w4.fp16", "w3.bf16.g8", "e4m3.bf16", "w8a8", "w8a7", "w5a8", "w4a8", "w3a4",
    "w2a8",
)  # fmt: skip
#: Formats with groups of weights, for the grid: short groups and ones that span taps.
_GROUPED = ("w4.bf16.g8", "w3.fp16.g16", "e4m3.bf16.g64")
#: As KINDS, for GPUs: what tensor cores multiply, and what is decoded for them.
GPU_KINDS = (
    "fp32", "fp16", "bf16", "e4m3", "e5m2", "w8a8", "w4a8", "w2a8", "w8.bf16", "w4.fp16.g64",
)  # fmt: skip
#: Factors of an operator's sizes with their levels.
_Sizes = tuple[tuple[str, tuple[Any, ...]], ...]

_CHANNELS = (1, 3, 7, 17, 31, 33, 65)
#: (top, left, bottom, right): 'same' is half the window, (0, 0, 1, 1) TensorFlow's at stride 2.
_PADDINGS = ("same", (0, 0, 0, 0), (0, 0, 1, 1), (2, 0, 1, 3))
_IMAGE: dict[str, Sequence[Any]] = {
    "batch": (1, 2),
    "kernel": ((3, 3), (1, 1), (2, 5)),
    "stride": ((1, 1), (2, 2), (1, 2)),
    "dilation": ((1, 1), (2, 2), (1, 3)),
    "padding": _PADDINGS,
    "spare": ((4, 5), (0, 0), (1, 17)),  # rows and columns beyond the window
}
_SIZES: dict[str, dict[str, Sequence[Any]]] = {
    "conv2d": {"cin": _CHANNELS, "cout": _CHANNELS, "groups": (1, 1, 3), **_IMAGE},
    "depthwise": {"channels": _CHANNELS[1:], **_IMAGE},
    "linear": {"m": (1, 3, 17), "k": (1, 7, 64, 129), "n": (1, 10, 31, 65, 1000)},
    "matmul": {
        "batch": (1, 3), "m": (1, 5, 17), "k": (1, 16, 33), "n": (1, 17, 32, 65),
        "trans_b": (0, 1),
    },
}  # fmt: skip
_REST: dict[str, Sequence[Any]] = {
    "out": ("u8", "fp32", "bf16", "fp16", "u4", "s8"),
    "residual": ("", "u8", "fp32", "bf16"),
    "epilogue": ("", "bias", "bias+relu", "bias+clamp"),
    "threads": (1, 2),
    "schedule": ("best", "last", "turned"),
    "values": VALUES,
}


@dataclass(frozen=True)
class Case:
    """One kernel in one call. schedule: the best by estimate, the last one, or the best with its
    loops in the other order (a GPU's: one from the middle)."""

    kernel: str
    call: Call
    schedule: str = "best"
    values: str = "random"
    seed: int = 0

    def __str__(self) -> str:
        c = self.call
        dims = " ".join(f"{name}{size}" for name, size in c.workload.dims)
        way = f"{c.format.name}: {c.x}{' + ' + c.residual if c.residual else ''} -> {c.out}"
        return (
            f"{self.kernel} {way}, {dims} {c.workload.epilogue or 'plain'}, {self.schedule} "
            f"schedule, {c.threads} threads, {self.values} values, seed {self.seed}"
        )


def kinds(target: Target) -> tuple[str, ...]:
    """The formats of a target's subset."""
    return GPU_KINDS if target.gpu else KINDS


def subset(features: frozenset[str], formats: Iterable[str] = KINDS) -> list[Case]:
    """Every pair of levels of two factors, for all operators; each kernel in the first of the
    formats that it takes. A kernel's micro-kernel and its weight decoder are two factors."""
    found: list[Case] = []
    for op in LAYER_OPS:
        first: dict[str, str] = {}
        for kernel, fmt in _ways(op, features, formats):
            first.setdefault(kernel, fmt)
        alike: dict[tuple[str, _Sizes], dict[tuple[str, str], tuple[str, str]]] = {}
        for way in first.items():
            nest, micro, weights = way[0].split(".")
            sizes = _sizes(op, way, features)
            alike.setdefault((nest, sizes), {})[micro, weights] = way
        for (_, sizes), ways in alike.items():
            micros, decoders = (list(dict.fromkeys(parts)) for parts in zip(*ways, strict=True))
            kernels = {"micro": micros, "decoder": decoders}
            rows = pairwise({**kernels, **dict(sizes), **_REST}, ways)
            found += [_case(op, ways[r["micro"], r["decoder"]], r, i) for i, r in enumerate(rows)]
    return found


def grid(features: frozenset[str]) -> Iterator[Case]:
    """For every kernel × format × operator: every pair of levels of two other factors."""
    for op in LAYER_OPS:
        sizes: dict[str, _Sizes] = {}
        rows: dict[_Sizes, list[dict[str, Any]]] = {}
        for way in _ways(op, features, (*known_formats(), *_GROUPED)):
            if way[0] not in sizes:
                sizes[way[0]] = _sizes(op, way, features)
            key = sizes[way[0]]
            if key not in rows:
                rows[key] = pairwise({**dict(key), **_REST})
            for i, row in enumerate(rows[key]):
                yield _case(op, way, row, i)


def unsupported(features: frozenset[str]) -> dict[str, dict[str, str]]:
    """Operator -> format -> why no kernel runs it."""
    return {
        op: {
            name: reason
            for name in known_formats()
            if (reason := why_not(probe(op), format_named(name), features))
        }
        for op in LAYER_OPS
    }


def _ways(op: str, features: frozenset[str], formats: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(kernel name, format name) of every kernel for the operator."""
    for name in formats:
        for kernel in candidates(probe(op), format_named(name), features):
            yield kernel.name, name


def probe(op: str) -> Workload:
    """One that every kernel for the operator can run."""
    return _workload(op, {name: values[0] for name, values in _SIZES[op].items()}, "")


def _sizes(op: str, way: tuple[str, str], features: frozenset[str]) -> _Sizes:
    """The levels of the sizes that a kernel runs, each with the first ones of all others."""
    kernel, fmt = way
    first = {name: levels[0] for name, levels in _SIZES[op].items()}

    def runs(name: str, level: Any) -> bool:
        workload = _workload(op, {**first, name: level}, "")
        return any(k.name == kernel for k in candidates(workload, format_named(fmt), features))

    return tuple(
        (name, tuple(level for level in levels if runs(name, level)))
        for name, levels in _SIZES[op].items()
    )


def _case(op: str, way: tuple[str, str], row: Mapping[str, Any], seed: int) -> Case:
    kernel, fmt = way
    workload = _workload(op, row, row["epilogue"])
    call = call_of(workload, fmt, row["out"], row["residual"], row["threads"])
    return Case(kernel, call, row["schedule"], row["values"], seed)


def call_of(workload: Workload, name: str, out: str, residual: str = "", threads: int = 1) -> Call:
    """With the encodings of the format of that name."""
    fmt = format_named(name)
    b = "" if workload.has_weight else fmt.weight.name
    return Call(workload, fmt, fmt.activation.name, out, residual, b, threads)


def _workload(op: str, row: Mapping[str, Any], epilogue: str) -> Workload:
    if op == "linear":
        return Workload.make(op, epilogue, m=row["m"], k=row["k"], n=row["n"])
    if op == "matmul":
        sizes = {name: row[name] for name in ("m", "k", "n", "trans_b")}
        return Workload.make(op, epilogue, b=row["batch"], **sizes)
    if op == "depthwise":
        cin = cout = groups = row["channels"]
    else:
        groups = row["groups"]
        cin, cout = row["cin"] * groups, row["cout"] * groups
    (kh, kw), (sh, sw), (dh, dw) = row["kernel"], row["stride"], row["dilation"]
    window = (kh - 1) * dh + 1, (kw - 1) * dw + 1
    half = (window[0] // 2, window[1] // 2)
    pt, pl, pb, pr = half * 2 if row["padding"] == "same" else row["padding"]
    h, w = (max(1, size + more) for size, more in zip(window, row["spare"], strict=True))
    return Workload.make(
        op, epilogue, n=row["batch"], h=h, w=w, cin=cin, cout=cout, kh=kh, kw=kw, sh=sh, sw=sw,
        pt=pt, pl=pl, pb=pb, pr=pr, dh=dh, dw=dw, groups=groups,
    )  # fmt: skip

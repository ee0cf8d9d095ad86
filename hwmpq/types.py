"""The values that travel between the stages: frozen, plain, without framework objects.

Units: seconds and bytes. `L` = layers, `F` = formats, in the order of `Problem.layers`/`.formats`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Source = Literal["measured", "predicted", "static-model", "imported"]
Execution = Literal["native", "storage-only", "emulated"]

#: Operators that take a number format. `depthwise` is a conv2d with groups == cin == cout.
LAYER_OPS = ("conv2d", "depthwise", "linear", "matmul")


@dataclass(frozen=True)
class Workload:
    """All that the hardware sees of a layer; equal workloads are measured once.

    op: one of LAYER_OPS. dims: named sizes, sorted by name.
      conv2d, depthwise: n h w cin cout kh kw sh sw pt pl pb pr dh dw groups (input size h × w)
      linear: m k n;  matmul: b m k n trans_b (B is [b,n,k] when trans_b else [b,k,n])
    epilogue: '+'-joined words in order out of bias, add, relu, clamp, gelu, silu, hardswish, scale.
    """

    op: str
    dims: tuple[tuple[str, int], ...]
    epilogue: str = ""

    @staticmethod
    def make(op: str, epilogue: str = "", **dims: int) -> Workload:
        if op not in LAYER_OPS:
            raise ValueError(f"unknown op {op!r}; allowed: {LAYER_OPS}")
        return Workload(op, tuple(sorted((k, int(v)) for k, v in dims.items())), epilogue)

    def __getitem__(self, name: str) -> int:
        for key, value in self.dims:
            if key == name:
                return value
        raise KeyError(name)

    @property
    def out_hw(self) -> tuple[int, int]:
        """Output height and width of a conv2d or depthwise."""
        oh = (self["h"] + self["pt"] + self["pb"] - self["dh"] * (self["kh"] - 1) - 1) // self["sh"]
        ow = (self["w"] + self["pl"] + self["pr"] - self["dw"] * (self["kw"] - 1) - 1) // self["sw"]
        return oh + 1, ow + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        if self.op in ("conv2d", "depthwise"):
            oh, ow = self.out_hw
            per_pixel = self["cout"] * self["cin"] // self["groups"] * self["kh"] * self["kw"]
            return self["n"] * oh * ow * per_pixel
        if self.op == "linear":
            return self["m"] * self["k"] * self["n"]
        return self["b"] * self["m"] * self["k"] * self["n"]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight tensor in torch's layout; for a matmul that of its B operand."""
        if self.op in ("conv2d", "depthwise"):
            return (self["cout"], self["cin"] // self["groups"], self["kh"], self["kw"])
        if self.op == "linear":
            return (self["n"], self["k"])
        n, k = self["n"], self["k"]
        return (self["b"], n, k) if self["trans_b"] else (self["b"], k, n)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Logical (torch, NCHW) shape of the activation operand."""
        if self.op in ("conv2d", "depthwise"):
            return (self["n"], self["cin"], self["h"], self["w"])
        if self.op == "linear":
            return (self["m"], self["k"])
        return (self["b"], self["m"], self["k"])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Logical (torch, NCHW) shape of the result."""
        if self.op in ("conv2d", "depthwise"):
            return (self["n"], self["cout"], *self.out_hw)
        if self.op == "linear":
            return (self["m"], self["n"])
        return (self["b"], self["m"], self["n"])

    @property
    def has_weight(self) -> bool:
        return self.op != "matmul"

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "dims": dict(self.dims), "epilogue": self.epilogue}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Workload:
        reject_unknown("workload", data, {"op", "dims", "epilogue"})
        return Workload.make(data["op"], data.get("epilogue", ""), **data["dims"])

    @property
    def key(self) -> str:
        """A short stable hash of the workload."""
        return digest(self.to_json())


@dataclass(frozen=True)
class Layer:
    """A quantizable call: its module path, what the hardware sees of it, its tie group.

    parameters: fp32 weight elements; bias: fp32 bias elements (both 0 for a matmul).
    """

    name: str
    workload: Workload
    tie: str = ""
    parameters: int = 0
    bias: int = 0


@dataclass(frozen=True)
class Network:
    """Layers in execution order, and which layer's output reaches which other layer's input.

    edges: (producer layer, consumer layer, glue): layers joined by a tensor; glue = names of the
    carried operators on the way, empty when the tensor goes straight from one to the other.
    """

    layers: tuple[Layer, ...]
    edges: tuple[tuple[str, str, tuple[str, ...]], ...] = ()

    def layer(self, name: str) -> Layer:
        for item in self.layers:
            if item.name == name:
                return item
        raise KeyError(name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.layers)


#: layer name -> format name
Assignment = dict[str, str]


@dataclass(frozen=True)
class Measurement:
    """One cell timed on one device: raw per-call seconds of every kept epoch, or an error."""

    key: str
    workload: Workload
    format: str
    kernel: str
    threads: int
    samples_s: tuple[float, ...] = ()
    error: str = ""
    source: Source = "measured"
    quality: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steady_s(self) -> FloatArray:
        """The samples at the speed that the machine had when the session began: raw ones times
        quality's `speed_factor`, which a sentinel timed beside them gave."""
        return np.array(self.samples_s) * float(self.quality.get("speed_factor", 1.0))

    @property
    def latency_s(self) -> float:
        """Median of the steady samples. Raises ValueError for a failed measurement."""
        if self.error or not self.samples_s:
            raise ValueError(f"cell {self.workload.op} {self.format} has no time: {self.error}")
        return float(np.median(self.steady_s))


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """loss[l, f]: expected increase of the mean calibration loss (bigger = worse) when layer l
    reads and weighs in format f and all else is fp32; fp32 is exactly 0. nan: not estimated.

    pair_loss: as in Problem; 0 where a pair was not estimated. loss_error, pair_error: standard
    errors, nan where unknown. layer_runs: layers run for it, each over all samples (a backward pass
    counts as two), and layer_runs_without_reuse: if every run had begun at the inputs.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    loss: FloatArray
    estimator: str
    samples: int
    metric: str = "cross-entropy"
    pair_loss: FloatArray | None = None
    loss_error: FloatArray | None = None
    pair_error: FloatArray | None = None
    layer_runs: int = 0
    layer_runs_without_reuse: int = 0


@dataclass(frozen=True, eq=False)
class Transition:
    """Extra seconds when producer p is in format f_p and consumer c in f_c: latency_s[f_p, f_c]."""

    source: str
    target: str
    latency_s: FloatArray


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything a solver may know; arrays are [L, F].

    legal: False cells may not be chosen. pair_loss: [(L·F), (L·F)], symmetric, row l·F+f, with
    ΔL = ½ xᵀCx (CLADO's convention; arXiv 2307.05657). ties: groups of layers that must agree.
    minimize: 'loss' | 'latency_s' | 'nbytes' | 'bops'. budgets: upper limits under the same names.
    fixed_latency_s: the part of the latency that no choice changes.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    loss: FloatArray | None = None
    latency_s: FloatArray | None = None
    nbytes: FloatArray | None = None
    bops: FloatArray | None = None
    legal: BoolArray | None = None
    pair_loss: FloatArray | None = None
    transitions: tuple[Transition, ...] = ()
    fixed_latency_s: float = 0.0
    ties: tuple[tuple[str, ...], ...] = ()
    minimize: str = "loss"
    budgets: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Solution:
    """A solver's answer. gap = (objective − bound) / max(|objective|, 1e-12)."""

    status: Literal["optimal", "feasible", "infeasible", "timeout"]
    choice: Assignment
    objective: float | None = None
    raw_objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    latency_s: float | None = None
    nbytes: float | None = None
    bops: float | None = None
    seconds: float = 0.0
    #: for an infeasible problem: the least reachable value of each budgeted quantity
    least: Mapping[str, float] = field(default_factory=dict)


def reject_unknown(what: str, data: Mapping[str, Any], known: set[str]) -> None:
    """Raise InputError when `data` holds a key that `known` does not."""
    from hwmpq.errors import InputError

    extra = sorted(set(data) - known)
    if extra:
        raise InputError(f"unknown key in {what}", ", ".join(extra), sorted(known))


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

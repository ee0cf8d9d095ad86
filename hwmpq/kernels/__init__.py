"""Kernels: what can run a layer in a format on a target. The only judge of legality.

A kernel is a loop nest × a micro-kernel × a weight decoder, with the one epilogue. None is written
out: `candidates` composes those that fit, by `requires ⊆ features`, each part saying why not.
tvm is imported only when something is emitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.formats import Format
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.micro import Micro, micros
from hwmpq.kernels.nests import Call, Nest, Schedule, emit, least_cycles, nests
from hwmpq.kernels.nests.panel import pack_scales
from hwmpq.kernels.threads import pays
from hwmpq.requantize import Epilogue
from hwmpq.types import Execution, Workload, digest

__all__ = ["Call", "Kernel", "Schedule", "best", "candidates", "kernel_named", "why_not"]

#: Part of every cache key of a measured kernel: raise it when emitted code changes.
CODEGEN_VERSION = 7


@dataclass(frozen=True)
class Kernel:
    """A composition that can run a workload in a format. timed: the schedule that timing chose."""

    nest: Nest
    micro: Micro
    decoder: Decoder
    timed: Schedule | None = None

    @property
    def name(self) -> str:
        return f"{self.nest.name}.{self.micro.name}.{self.decoder.encoding}"

    @property
    def requires(self) -> frozenset[str]:
        return self.micro.requires

    def execution(self, fmt: Format) -> Execution:
        return self.micro.execution(fmt)

    def schedule(self, call: Call) -> Schedule:
        """The one that timing chose, else the best by estimate."""
        return self.timed or self.schedules(call)[0]

    def schedules(self, call: Call) -> list[Schedule]:
        """All that a call may have, best estimate first."""
        return self.nest.schedules(call, self.micro)

    def scheduled(self, schedule: Schedule, call: Call) -> Kernel:
        """This kernel with a schedule. Raises InputError for one that a call may not have."""
        known = self.schedules(call)
        if schedule not in known:
            raise InputError(f"schedule of {self.name}", schedule.text, [s.text for s in known])
        return replace(self, timed=None if schedule == known[0] else schedule)

    def emit(self, call: Call, all_threads: bool = False) -> Any:
        """TVM PrimFunc; arguments: x, weight (or b), [scales], multiplier, bias, scalars,
        [residual], out, all flat.

        all_threads: also where the work is over sooner than the thread pool begins.
        """
        schedule = self.schedule(call)
        if not (all_threads or pays(call.threads, least_cycles(call, self.micro))):
            call = replace(call, threads=1)
        return emit(self.nest, call, self.micro, self.decoder, schedule)

    def parameters(
        self,
        call: Call,
        codes: NDArray[Any] | None,
        epilogue: Epilogue,
        scales: NDArray[Any] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """The packed constant arguments, in call order after x (a matmul has no weight).

        scales: those of a format with groups, [cout, groups of a row].
        """
        packed, workload, bias = {}, call.workload, epilogue.bias
        if codes is not None:
            packed["weight"] = self.nest.pack(codes, workload, self.micro, self.decoder)
            if offset := self.micro.offset(call.format):
                bias = bias + offset * codes.reshape(len(codes), -1).sum(1, dtype=bias.dtype)
        if scales is not None:
            packed["scales"] = pack_scales(self.nest, scales, workload, self.micro)
        packed["multiplier"] = self.nest.pad(epilogue.multiplier, workload, self.micro)
        packed["bias"] = self.nest.pad(bias, workload, self.micro)
        packed["scalars"] = epilogue.scalars
        return packed

    def cell(self, call: Call) -> str:
        """A stable hash of what is emitted for a call."""
        schedule = self.schedule(call)
        return digest(
            [
                CODEGEN_VERSION, self.name, call.workload.to_json(), call.format.name, call.x,
                call.b, call.out, call.residual, call.threads, schedule.rows, schedule.vectors,
                schedule.order,
            ]
        )  # fmt: skip


@cache
def _kernels(features: frozenset[str]) -> tuple[tuple[Nest, Micro], ...]:
    able = [m for m in micros() if m.requires <= features]
    return tuple((n, m) for n in nests() for m in able if n.runs(m))


def candidates(workload: Workload, fmt: Format, features: frozenset[str]) -> list[Kernel]:
    """Kernels that run the workload in the format, best estimate first."""
    found: list[tuple[float, Kernel]] = []
    for nest, micro in _kernels(features):
        if _reason(nest, micro, workload, fmt) is None:
            weight = nest.decoder(fmt.weight.name, micro)
            assert weight is not None
            kernel = Kernel(nest, micro, weight)
            found.append((nest.estimate(workload, fmt, micro), kernel))
    return [k for _, k in sorted(found, key=lambda item: (item[0], item[1].name))]


def best(workload: Workload, fmt: Format, features: frozenset[str]) -> Kernel | None:
    """The first candidate, or None."""
    return next(iter(candidates(workload, fmt, features)), None)


def why_not(workload: Workload, fmt: Format, features: frozenset[str]) -> str | None:
    """None when some kernel runs the workload in the format, else every part's reason."""
    if candidates(workload, fmt, features):
        return None
    pairs = [p for p in _kernels(features) if workload.op in p[0].ops]
    if not pairs:
        missing = [m for m in micros() if not m.requires <= features]
        names = ", ".join(f"{m.name} (needs {'+'.join(sorted(m.requires))})" for m in missing)
        return f"no kernel for {workload.op} with the target's features; others: {names or 'none'}"
    return "; ".join(dict.fromkeys(_reason(n, m, workload, fmt) or "" for n, m in pairs))


def kernel_named(name: str, workload: Workload, fmt: Format, features: frozenset[str]) -> Kernel:
    """The candidate with this name. Raises InputError when it is none."""
    found = {k.name: k for k in candidates(workload, fmt, features)}
    if name not in found:
        raise InputError(f"no such kernel for {workload.op} in {fmt.name}", name, sorted(found))
    return found[name]


def _reason(nest: Nest, micro: Micro, workload: Workload, fmt: Format) -> str | None:
    if workload.op not in nest.ops:
        return f"the {nest.name} nest does not run {workload.op}"
    if fmt.group is not None and not nest.takes_scales(micro):
        return f"{micro.name} multiplies codes, to which group scales cannot be applied"
    if fmt.group is not None and not nest.grouped:
        return f"the {nest.name} nest applies no group scales"
    reason = micro.why_not(fmt) or nest.why_not(workload, fmt, micro)
    if reason:
        return reason
    if nest.decoder(fmt.weight.name, micro) is None:
        return f"no decoder from {fmt.weight.name} weights to {nest.weight_dtype(micro)}"
    return None

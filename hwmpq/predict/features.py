"""The features of a cell: one function for training and for use.

Sizes, bytes and cycles are log2 (0 for nothing), so that trees split by ratios; bits, flags, wastes
and remainders are plain. Which kernel runs a cell says more than any polish of its shape (PM2Lat,
2026), so the kernel's own schedule, padding and estimate are features.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log2

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.formats import Encoding, Format
from hwmpq.kernels import Kernel
from hwmpq.kernels.nests import nests
from hwmpq.kernels.nests.gemm import pixels_of
from hwmpq.predict.analytic import TERMS, Work, inner_columns, inner_rows, resolve, work
from hwmpq.targets import Target
from hwmpq.types import LAYER_OPS, Workload

#: Raise it when a name or the meaning of a value changes; a model of another version is refused.
FEATURES_VERSION = 3

F32 = NDArray[np.float32]
EPILOGUE = ("bias", "add", "relu", "clamp", "gelu", "silu", "hardswish", "scale")
_EXECUTIONS = ("native", "storage-only", "emulated")
_ITEM = {"float32": 4, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1}


def features(
    workload: Workload, fmt: Format, kernel: Kernel | str, target: Target, threads: int = 1
) -> F32:
    """The values of NAMES, float32 [len(NAMES)], all finite.

    Raises InputError when the target has no such kernel for the cell, or for an unknown epilogue.
    """
    found = resolve(kernel, workload, fmt, target)
    return of_work(
        workload, fmt, found, target, threads, work(workload, fmt, found, target, threads)
    )


def of_work(
    workload: Workload, fmt: Format, kernel: Kernel, target: Target, threads: int, done: Work
) -> F32:
    """`features` of a cell whose work is counted already."""
    parts = _parts(workload, fmt, kernel, target, threads, done)
    return np.array([v for part in parts.values() for v in part.values()], np.float32)


def _log(value: float) -> float:
    return log2(value) if value > 0 else 0.0


def _parts(
    workload: Workload, fmt: Format, kernel: Kernel, target: Target, threads: int, done: Work
) -> Mapping[str, Mapping[str, float]]:
    return {
        "op": _op(workload, kernel, done),
        "shape": _shape(workload, done),
        "format": _format(fmt),
        "kernel": _kernel(fmt, kernel, done),
        "work": _work(done, fmt),
        "cache": _cache(done, target),
        "alignment": _alignment(workload, kernel, done),
        "threads": {
            "threads": float(threads), "parallel": _log(done.parallel), "speedup": done.speedup
        },
    }  # fmt: skip


def _op(workload: Workload, kernel: Kernel, done: Work) -> dict[str, float]:
    present = workload.epilogue.split("+") if workload.epilogue else []
    unknown = [word for word in present if word not in EPILOGUE]
    if unknown:
        raise InputError(f"epilogue of {workload.op}", "+".join(unknown), EPILOGUE)
    g = done.g
    on_cpus = [nest.name for nest in nests() if not nest.on_gpu]  # no model is of a GPU yet
    return {
        **{f"op_{op}": float(workload.op == op) for op in LAYER_OPS},
        **{f"nest_{name}": float(kernel.nest.name == name) for name in on_cpus},
        "grouped": float(workload.op == "conv2d" and g.groups > 1),
        "pointwise": float(g.kh == g.kw == 1),
        **{f"epilogue_{word}": float(word in present) for word in EPILOGUE},
    }


def _shape(workload: Workload, done: Work) -> dict[str, float]:
    g = done.g
    oh, ow = g.out
    sizes = {
        "n": g.n, "h": g.h, "w": g.w, "cin": g.cin, "cout": g.cout, "kh": g.kh, "kw": g.kw,
        "sh": g.sh, "sw": g.sw, "dh": g.dh, "dw": g.dw, "groups": g.groups, "oh": oh, "ow": ow,
    }  # fmt: skip
    batch = g.groups * (1 if workload.has_weight else g.n)
    rows = (g.n if workload.has_weight else 1) * oh * ow
    depth = g.cin // g.groups * g.kh * g.kw
    return {
        **{name: _log(value) for name, value in sizes.items()},
        "padding": float(g.pt + g.pb + g.pl + g.pr),
        "trans_b": float(workload.op == "matmul" and workload["trans_b"]),
        "gemm_m": _log(rows),
        "gemm_n": _log(g.gout),
        "gemm_k": _log(depth),
        "gemm_batch": _log(batch),
    }


def _encoding(prefix: str, encoding: Encoding) -> dict[str, float]:
    floating = encoding.kind == "float"
    return {
        f"{prefix}_bits": float(encoding.bits),
        f"{prefix}_float": float(floating),
        f"{prefix}_exponent": float(encoding.bits - encoding.precision if floating else 0),
        f"{prefix}_mantissa": float(encoding.precision - 1 if floating else 0),
        f"{prefix}_scaled": float(encoding.scaled),
    }


def _format(fmt: Format) -> dict[str, float]:
    return {
        **_encoding("weight", fmt.weight),
        **_encoding("activation", fmt.activation),
        "accumulator_float": float(fmt.accumulator == "fp32"),
        "weight_only": float(fmt.weight_only),
        "scale_per_channel": float(fmt.granularity == "channel"),
        "scale_group": _log(fmt.group or 1),
        "weights_per_byte": 8.0 / fmt.weight.bits,
    }


def _kernel(fmt: Format, kernel: Kernel, done: Work) -> dict[str, float]:
    micro, block = kernel.micro, done.schedule
    return {
        **{f"is_{kind}": float(kernel.execution(fmt) == kind) for kind in _EXECUTIONS},
        "lanes": float(micro.lanes),
        "kstep": float(micro.kstep),
        "vector_bytes": float(micro.vector_bytes),
        "registers": float(micro.registers),
        "run_length": float(micro.run_length(fmt)),
        "multiplied_activation_bytes": float(_ITEM[micro.a_dtype]),
        "multiplied_weight_bytes": float(_ITEM[kernel.nest.weight_dtype(micro)]),
        "decodes": float(not kernel.decoder.identity),
        "decoder_unit": float(kernel.decoder.unit),
        "block_rows": float(block.rows),
        "block_vectors": float(block.vectors),
        "rows_outside": float(block.order == "rows"),
        "cycles_per_mac": micro.cycles(block.rows, block.vectors, fmt)
        / (block.rows * block.vectors * micro.lanes),
    }


def _work(done: Work, fmt: Format) -> dict[str, float]:
    compute = done.macs / done.peak / done.speedup
    return {
        "macs": _log(done.macs),
        "bops": _log(done.macs * fmt.weight.bits * fmt.activation.bits),
        "in_bytes": _log(done.in_bytes),
        "weight_bytes": _log(done.weight_bytes),
        "out_bytes": _log(done.out_bytes),
        "residual_bytes": _log(done.residual_bytes),
        "intensity": _log(done.macs / done.nbytes),
        "peak": _log(done.peak),
        "roofline": _log(done.roofline),
        "compute_bound": _log(compute / done.memory_cycles),
        "nominal": _log(float(done.terms.sum())),
        **{f"term_{name}": _log(1.0 + t) for name, t in zip(TERMS, done.terms, strict=True)},
        **{
            f"share_{name}": t / float(done.terms.sum())
            for name, t in zip(TERMS, done.terms, strict=True)
        },
    }


def _cache(done: Work, target: Target) -> dict[str, float]:
    levels = {"l1": target.caches.l1d, "l2": target.caches.l2, "l3": target.caches.l3}
    return {
        **{f"weights_{name}": _log(done.weight_bytes / size) for name, size in levels.items()},
        **{f"input_{name}": _log(done.in_bytes / size) for name, size in levels.items()},
        **{f"total_{name}": _log(done.nbytes / size) for name, size in levels.items()},
        "tile_l1": _log(done.tile_bytes / target.caches.l1d),
        "tile_l2": _log(done.tile_bytes / target.caches.l2),
    }


def _alignment(workload: Workload, kernel: Kernel, done: Work) -> dict[str, float]:
    g, lanes = done.g, kernel.micro.lanes
    depth = g.cin // g.groups * g.kh * g.kw
    oh, ow = g.out
    run = ow if workload.op == "depthwise" else pixels_of(workload)
    rows = min(done.schedule.rows, run)
    vectors = done.lanes_padded // lanes
    # the others lie over an edge of the image: depthwise kernels emit them one by one
    inside_h, inside_w = inner_rows(g), inner_columns(g)
    return {
        "lanes_rest": float(g.gout % lanes),
        "lane_waste": done.lanes_padded / g.cout - 1.0,
        "depth_waste": done.kdepth / depth - 1.0 if workload.op != "depthwise" else 0.0,
        "pixel_rest": float(run % rows),
        "pixel_blocks": _log(-(-run // rows)),
        "pixel_waste": -(-run // rows) * rows / run - 1.0,
        "edge_rows": float(oh - inside_h),
        "edge_columns": float(ow - inside_w),
        "edge_share": 1.0 - inside_h * inside_w / (oh * ow),
        "vector_rest": float(vectors % done.schedule.vectors),
        "vector_blocks": _log(-(-vectors // done.schedule.vectors)),
        "needs_copy": float(done.copied > 0),
        "copied": _log(done.copied),
        **{f"cin_mod_{m}": float(g.cin % m) for m in (4, 8, 16, 32)},
        **{f"cout_mod_{m}": float(g.cout % m) for m in (8, 16, 32, 64)},
    }


def _names() -> dict[str, tuple[str, ...]]:
    """Names by part, read off one call: there is no second list to keep in step."""
    from hwmpq.formats import format_named
    from hwmpq.kernels.decode import decoder
    from hwmpq.kernels.micro import micros
    from hwmpq.targets import Caches, TimingDefaults

    fmt = format_named("fp32")
    workload = Workload.make("linear", m=1, k=8, n=8)
    nest = next(n for n in nests() if "linear" in n.ops)
    micro = next(m for m in micros() if m.why_not(fmt) is None)
    weight = decoder("fp32", nest.weight_dtype(micro))
    assert weight is not None
    target = Target(
        "any", "", 0, {}, micro.requires, micro.vector_bytes, micro.registers,
        Caches(1, 1, 1), {"fp32.fp32": 1.0}, TimingDefaults(1, 1.0), {},
    )  # fmt: skip
    kernel = Kernel(nest, micro, weight)
    done = work(workload, fmt, kernel, target)
    parts = _parts(workload, fmt, kernel, target, 1, done)
    return {part: tuple(values) for part, values in parts.items()}


#: Names of the parts that an ablation leaves out, and what is in each.
PARTS: Mapping[str, tuple[str, ...]] = _names()
NAMES: tuple[str, ...] = tuple(name for names in PARTS.values() for name in names)

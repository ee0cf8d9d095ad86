"""Compiling kernels: into this process, and into a folder that `hwmpq.measure` can time."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq import targets
from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import encoding_named, format_named
from hwmpq.kernels import Kernel, guest, kernel_named, passes
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.cuda import cell
from hwmpq.kernels.ir import module_of
from hwmpq.kernels.nests import Call, Schedule
from hwmpq.kernels.sample import Sample, draw, stored
from hwmpq.targets import Target
from hwmpq.types import Workload, reject_unknown

Array = NDArray[Any]
_LAYER_KEYS = {
    "kind", "workload", "format", "x", "out", "residual", "b", "threads", "kernel", "schedule",
    "target", "folder", "seed",
}  # fmt: skip


def library(functions: Mapping[str, Any], target: Target) -> Any:
    """A TVM executable that holds PrimFuncs under these names."""
    import tvm

    hardware = tvm.target.Target(dict(target.tvm))
    return tvm.compile(module_of(functions), target=hardware, tir_pipeline=passes.pipeline())


def assembly(executable: Any) -> str:
    """The target's assembler text of what `library` compiled."""
    text: str = executable.mod.inspect_source("asm")
    return text


def export(executable: Any, path: Path, target: Target) -> None:
    """Write a shared library, aside first.

    Raises InputError without a C compiler of the target: TVM links its objects with one.
    """
    from tvm.support import cc

    aside = path.with_name(f".{os.getpid()}.{path.name}")
    if target.foreign:
        guest.link(executable, target.triple, aside)
    elif cc.get_cc() is None:
        raise InputError(
            "no C compiler to link a kernel with",
            allowed=("g++", "gcc", "clang++", "clang", "c++", "cc"),
            next="Install gcc, or name a compiler in CXX.",
        )
    else:
        executable.export_library(str(aside))
    os.replace(aside, path)


def export_cell(
    function: Any, target: Target, arrays: Sequence[Array], folder: Path
) -> dict[str, str]:
    """Write a kernel as files to be timed: the fields of `measure.Cell` that name them.

    arrays: what it is called on. Raises InputError without the compilers that this takes.
    """
    if target.gpu:
        return cell.export(function, target, arrays, folder)
    export(library({"main": function}, target), folder / "cell.so", target)
    return {"library": str(folder / "cell.so")}


def archive(executable: Any, path: Path, target: Target) -> None:
    """Write a static library, for the linker of a program.

    Raises InputError without the program that packs objects of the target.
    """
    from tvm.support import cc

    packer = f"{target.triple}-ar" if target.foreign else "ar"
    if shutil.which(packer) is None:
        raise InputError(f"packing objects needs {packer}", next="Install binutils.")
    executable.export_library(str(path), fcompile=cc.create_staticlib, ar=packer)


def in_call_order(kernel: Kernel, call: Call, sample: Sample) -> list[Array]:
    """The flat arguments of a kernel up to its output, which comes last."""
    constants = kernel.parameters(call, sample.weight, sample.epilogue, sample.scales)
    first = [sample.x] if sample.b is None else [sample.x, sample.b]
    rest = [] if sample.residual is None else [sample.residual]
    return [np.ascontiguousarray(a).reshape(-1) for a in (*first, *constants.values(), *rest)]


def compile_cell(request: Mapping[str, Any]) -> dict[str, Any]:
    """Build what a request describes into its folder and say how to time it: a worker's `call`.

    request: "kind": "layer" with "workload" (as JSON), "format", encodings "x", "out", "residual"
    and "b" ('' = none), "threads", "kernel", "schedule" (its text, None for the best by
    estimate), "target", "folder", "seed". Answers the fields of `measure.Cell` of those
    names ("library", "launches", "args", "expected", "roles", "features", "atol", "rtol"), the
    seconds that
    compiling took and "cell", the hash of what was compiled.
    Raises InputError for a request that cannot be built.
    """
    kind = str(request.get("kind", "layer"))
    if kind not in _KINDS:
        raise UnknownName("kind of cell", kind, _KINDS)
    answer: dict[str, Any] = _KINDS[kind](request)
    return answer


def _layer(request: Mapping[str, Any]) -> dict[str, Any]:
    reject_unknown("request for a layer's cell", request, _LAYER_KEYS)
    missing = sorted(_LAYER_KEYS - {"kind", "residual", "b", "schedule", "seed"} - set(request))
    if missing:
        raise InputError("request for a layer's cell lacks", ", ".join(missing))
    target = targets.load(request["target"])
    call = _call(request)
    kernel = kernel_named(request["kernel"], call.workload, call.format, target.features)
    if request.get("schedule"):
        kernel = kernel.scheduled(Schedule.parse(request["schedule"]), call)
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    arrays, files = _write_arguments(folder, kernel, call, int(request.get("seed", 0)))
    began = time.perf_counter()
    files |= export_cell(kernel.emit(call), target, arrays, folder)
    return {
        "seconds": time.perf_counter() - began, "cell": kernel.cell(call),
        "features": sorted(kernel.requires), **files,
    }  # fmt: skip


_KINDS = {"layer": _layer}


def _call(request: Mapping[str, Any]) -> Call:
    """Raises InputError for encodings that do not fit the format."""
    workload, fmt = Workload.from_json(request["workload"]), format_named(request["format"])
    b = request.get("b") or ""
    for name, got, right in (
        ("x", request["x"], fmt.activation.name),
        ("b", b, "" if workload.has_weight else fmt.weight.name),
    ):
        if got != right:
            raise InputError(f"encoding of {name} of a {fmt.name} {workload.op}", repr(got), right)
    residual, threads = request.get("residual") or "", int(request["threads"])
    for name in filter(None, (request["out"], residual)):
        encoding_named(name)
    return Call(workload, fmt, request["x"], request["out"], residual, b, threads)


def _write_arguments(
    folder: Path, kernel: Kernel, call: Call, seed: int
) -> tuple[list[Array], dict[str, Any]]:
    """The arguments, and the files of them and of what is expected; float results are given the
    rounding error that their sums may have.

    A 16-bit float result lies in memory as its bits, and these are compared: results are positive
    there, so that neighbouring numbers have neighbouring bits.
    """
    sample = draw(call, seed, positive=memory_dtype(call.out) == "uint16")
    arrays = in_call_order(kernel, call, sample)
    low, right, high = (
        stored(call.out, v).reshape(-1)
        for v in (sample.answer.low, sample.answer.right, sample.answer.high)
    )
    wide = right.astype(np.float64)
    atol = float(np.maximum(high - wide, wide - low).max())
    # A matmul's operands are both activations: read warm.
    first = 2 if sample.b is not None else 1
    parameters = len(arrays) - first - (sample.residual is not None)
    constant = "weight" if call.workload.has_weight else "input"
    roles = ["input"] * first + [constant] * parameters
    roles += ["input"] * (sample.residual is not None) + ["output"]
    arrays.append(np.zeros_like(right))
    _save(folder / "args.safetensors", {str(i): a for i, a in enumerate(arrays)})
    _save(folder / "expected.safetensors", {str(len(arrays) - 1): right})
    return arrays, {
        "args": str(folder / "args.safetensors"),
        "expected": str(folder / "expected.safetensors"),
        "roles": roles,
        "atol": atol,
        "rtol": 0.0,
    }


def _save(path: Path, tensors: Mapping[str, Array]) -> None:
    from safetensors.numpy import save

    aside = path.with_name(f".{os.getpid()}.{path.name}")
    aside.write_bytes(save({name: np.ascontiguousarray(a) for name, a in tensors.items()}))
    os.replace(aside, path)

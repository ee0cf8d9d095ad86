"""CUDA C of a PrimFunc, by TVM's code generator, without what it puts in front."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from hwmpq.kernels.cuda.ir import LAUNCH
from hwmpq.kernels.ir import module_of
from hwmpq.launches import Launch
from hwmpq.targets import Target

FOLDER = Path(__file__).parent
_PIPELINE = "hwmpq.cuda"
_FUNCTION = re.compile(
    r'extern "C" __global__ void __launch_bounds__\((\d+)(?:, 1)?\) (\w+)\(([^)]*)\)'
)
#: The declaration of the memory that a block shares.
SHARED = re.compile(r"extern __shared__ __align__\(\d+\) uchar (\w+)\[\];")


@dataclass(frozen=True)
class Kernel:
    """One function that a grid runs. arguments: (type, name) in order."""

    name: str
    threads: int
    arguments: tuple[tuple[str, str], ...]

    @property
    def names(self) -> list[str]:
        """Of the arguments, as the PrimFunc has them; the order is the kernel's own."""
        return [name.removesuffix("_ptr") for _, name in self.arguments]


def prelude(instructions: str) -> str:
    """What stands before a kernel: the instructions of 'device' or 'host'."""
    return "".join((FOLDER / f"{part}.cuh").read_text() for part in (instructions, "common"))


def kernels_of(code: str) -> list[Kernel]:
    """The kernels that a text declares."""
    found = {}
    for threads, name, arguments in _FUNCTION.findall(code):
        pairs = [re.sub(r"__restrict__", "", a).rsplit(None, 1) for a in arguments.split(",")]
        found[name] = Kernel(name, int(threads), tuple((t.strip(), n) for t, n in pairs))
    return list(found.values())


def body(code: str) -> str:
    """A text of TVM's without its own prelude."""
    return code[code.index('extern "C" __global__') :]


def build(functions: Mapping[str, Any], target: Target) -> str:
    """The CUDA C of PrimFuncs by name, without TVM's prelude: one kernel of each, not compiled.

    One block at a time may be all that a multiprocessor runs: unasked, the assembler makes room for
    more by keeping some registers in memory.
    """
    import tvm

    hardware = tvm.target.Target(dict(target.tvm), host={"kind": "llvm"})  # the CPU's part: unused
    executable = tvm.compile(module_of(functions), target=hardware, tir_pipeline=pipeline())
    code = body(executable.mod.imports[0].inspect_source())
    return re.sub(r"__launch_bounds__\((\d+)\)", r"__launch_bounds__(\1, 1)", code)


def launch(function: Any, kernel: Kernel, numbers: Sequence[int]) -> Launch:
    """Of a PrimFunc of `CudaIR`. kernel: its own; numbers: of the buffers that it is called on, in
    the PrimFunc's order, the result's last."""
    x, y, shared_bytes = (int(n) for n in function.attrs[LAUNCH])
    names = [str(parameter.name) for parameter in function.params]
    given = dict(zip(names, numbers, strict=True))
    out = function.params[-1]
    return Launch(
        kernel.name, (x, y), kernel.threads, shared_bytes,
        tuple(given[name] for name in kernel.names), numbers[-1],
        prod(int(extent) for extent in out.shape), str(out.dtype),
    )  # fmt: skip


@cache
def pipeline() -> str:
    """Name of the passes that kernels of `CudaIR` need. TVM's own would shrink shared memory to
    what its index analysis sees, and put barriers of its own between ours."""
    import tvm
    from tvm import s_tir, tirx
    from tvm.tirx import compilation_pipeline

    passes = tvm.transform.Sequential(
        [
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            s_tir.transform.UnifyThreadBinding(),
            s_tir.transform.LowerOpaqueBlock(),
            tirx.transform.StmtSimplify(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.NarrowDataType(32),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.UnrollLoop(),
            tirx.transform.StmtSimplify(),
            tirx.transform.VerifyMemory(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
        ]
    )

    @tvm.transform.module_pass(opt_level=0, name=_PIPELINE)  # type: ignore[untyped-decorator,unused-ignore]
    def run(module: Any, _context: Any) -> Any:
        return passes(module)

    compilation_pipeline.register_tir_pipeline(
        _PIPELINE,
        lambda: (
            run,
            compilation_pipeline.finalize_host_passes,
            compilation_pipeline.finalize_device_passes,
        ),
    )
    return _PIPELINE

"""Networks on NVIDIA GPUs: machine code, a list of launches, and the chip's driver.

    model.cubin   machine code of all kernels, by NVRTC
    model.json    the launches in order, and the memory that they work on (`hwmpq.launches`)
    model.cu      the text that the machine code was made from; runs emulated where no GPU is

The driver's own library, libcuda.so.1, is all that is needed beside numpy. Why not TVM's virtual
machine: its CUDA runtime cannot be loaded without a driver, so that nothing of an artifact could be
tried on another machine; it wants a CUDA runtime library beside it; and it asks for memory and
calls the host for every kernel, where a GPU wants a network launched at once. A list of launches on
memory planned when it was compiled is captured once and replayed as one graph, and the same list
runs emulated (`hwmpq.kernels.cuda.emulate`) launch by launch on any CPU.
"""

from __future__ import annotations

from hwmpq.artifact.cuda.program import CudaProgram, Machine, programs

__all__ = ["CudaProgram", "Machine", "programs"]

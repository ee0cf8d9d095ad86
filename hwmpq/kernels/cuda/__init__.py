"""What only NVIDIA chips have: the builder of their kernels, their instructions, their compiler.

`ir` builds a PrimFunc that a grid of threads runs; `device.cuh` holds the instructions that it
calls, in PTX, `host.cuh` what their manual says they do, in C++; `common.cuh` what is made of them.
`source` makes CUDA C of a PrimFunc, `compiler` makes machine code of that without a GPU, `emulate`
runs the same text on this CPU.
"""

"""The words by which targets and kernels of this package meet."""

from hwmpq.targets import Feature

#: The flags are those of /proc/cpuinfo by which the chip is known; this one plays on any AVX2 CPU.
FEATURES = {"example-mul16": Feature("16-bit products of an example chip", ("avx2",))}

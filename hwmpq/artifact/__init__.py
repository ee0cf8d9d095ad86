"""The deployable artifact: a folder that runs with numpy and the TVM runtime alone.

    manifest.json        what it is (below); lists the SHA-256 of every other file
    model.so             the compiled library (a Relax VM executable)
    parameters.safetensors   packed weights, in the order of manifest["parameters"]
    golden.safetensors   inputs and outputs of the exact simulator, checksums of every tensor
    assignment.json, quantizers.safetensors   to build it again, elsewhere or changed

manifest.json, version 1: version, kind "hwmpq-artifact", versions {hwmpq, tvm, tvm-ffi}, target
{name, tvm, features, cpu_flags}, threads, inputs and outputs [{name, shape, dtype, layout,
normalization}], assignment {layer: format}, kernels {layer: {kernel, execution, and schedule where
timing chose another than the default}}, calls (tensor written by each kernel call, in order),
parameters (names in order), latency_s, accuracy, nbytes, files {name: sha256}.

Hashes find damage, not malice: loading an artifact runs its author's native code.
"""

from __future__ import annotations

from hwmpq.artifact.folder import read_manifest, save
from hwmpq.artifact.golden import Replay, replay
from hwmpq.artifact.run import Artifact, load

__all__ = ["Artifact", "Replay", "load", "read_manifest", "replay", "save"]

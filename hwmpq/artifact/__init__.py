"""The deployable artifact: a folder that runs with numpy and the TVM runtime alone.

    manifest.json        what it is (below); holds the SHA-256 of every file but itself and
    manifest.sig         optional: ed25519 signature, 64 bytes, over the bytes of manifest.json
    model.so             the compiled library (a Relax VM executable); model.4.so: for batches of 4
    model.cubin, model.cu, model.json   instead, for an NVIDIA GPU (see `hwmpq.artifact.cuda`)
    parameters.safetensors   packed weights, by the names in manifest["parameters"]
    golden.safetensors   inputs and outputs of the exact simulator, checksums of every tensor
    assignment.json, quantizers.safetensors   to build it again, elsewhere or changed
    model.a              optional: objects to link into a program (compile --system-lib)

manifest.json, version 1, needs: version, kind "hwmpq-artifact", target {name, cpu_flags: [...]},
threads, inputs and outputs [{name, shape, dtype}], assignment {layer: format}, calls (tensor
written by each kernel call, in order), parameters (names in order), interface (SHA-256 of inputs,
outputs, calls, parameters and batches, see manifest.py), files {name: sha256}. For further batch
sizes: batches [{size, library, parameters}]; the size is then the first extent of every input and
output. For a GPU: library "model.cubin". It also tells: model, versions, target's tvm and features,
layout, range and normalization of inputs and outputs, kernels {layer: {kernel, execution, and
schedule where timing chose another than the default}}, machine_code of a GPU (what an inspection
found), nbytes, and what `quantize` found, as in result.json: latency_s, accuracy. A reader ignores
entries that it does not know; what would mislead an old reader raises `version`.

Refused, always before native code is loaded: another version; an entry missing or of another type;
a name twice in one JSON object; a file missing, changed, or not listed; a link, a pipe or a device
instead of a file; a file name that leaves the folder; a CPU without a flag; with a key required,
no signature or another one. Bytes are read once: those that were checked are those that are loaded.

The folder may be moved, copied and renamed. The same model, assignment, quantizers, target and
versions give the same bytes, but for latency_s. Threads: those it was built for, unless the loader
is told another number; fewer where the process may use fewer cores.

Hashes find damage, not malice: loading an unsigned artifact runs whoever's native code it is.
"""

from __future__ import annotations

from hwmpq.artifact.folder import add_facts, nbytes, read_manifest, save, sign
from hwmpq.artifact.golden import Replay, replay
from hwmpq.artifact.run import Artifact, load

__all__ = [
    "Artifact", "Replay", "add_facts", "load", "nbytes", "read_manifest", "replay", "save", "sign",
]  # fmt: skip

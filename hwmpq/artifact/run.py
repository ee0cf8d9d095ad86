"""Loading and running an artifact: numpy arrays in, numpy arrays out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq import targets, tensors, tile_permission, toolchain
from hwmpq.artifact import native, pool, signature
from hwmpq.artifact.contents import Contents, open_artifact
from hwmpq.artifact.manifest import GOLDEN, LIBRARY, PARAMETERS
from hwmpq.errors import InputError

Array = NDArray[Any]
#: Names of our kernels in a compiled library begin so; those that TVM makes do not.
KERNEL_PREFIX = "hwmpq_"


def load(
    path: str | Path, require_signature: str | Path | None = None, threads: int | None = None
) -> Artifact:
    """Check an artifact and load it; the bytes that were checked are the bytes that are loaded.

    require_signature: the file of the public key that must have signed it, beside the one that
    HWMPQ_REQUIRE_SIGNATURE names. threads: another number than it was built for, if that is more
    than one. Raises InputError when files were changed, added or taken away, the version is
    unknown, the signature missing or wrong, this CPU lacks a feature, or Linux refuses one: always
    before any native code of it is loaded.
    """
    contents = open_artifact(Path(path), signature.required(require_signature))
    target, built_for = contents.manifest["target"], contents.manifest["threads"]
    if threads is not None and (threads < 1 or built_for == 1 < threads):
        raise InputError(
            "threads", threads, "1" if built_for == 1 else "1 or more",
            f"The artifact was built for {built_for}; `--threads` of compile says for how many.",
        )  # fmt: skip
    _check_cpu(target)
    kept = {}
    for name in contents.manifest["files"]:
        raw = contents.file(name)
        if name in (LIBRARY, PARAMETERS):
            kept[name] = raw
    parameters = _parameters(contents, kept[PARAMETERS])
    tile_permission.ask(target["cpu_flags"])
    toolchain.check()
    return Artifact(contents, kept[LIBRARY], parameters, threads or built_for)


def _parameters(contents: Contents, raw: bytes) -> list[Array]:
    """In the order in which the library takes them. Raises InputError where one is missing."""
    arrays, _ = tensors.parse(raw, contents.path / PARAMETERS)
    names = contents.manifest["parameters"]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(f"{PARAMETERS} of artifact {contents.path} lacks a tensor", missing[0])
    return [arrays[name] for name in names]


def _check_cpu(target: Mapping[str, Any]) -> None:
    flags = targets.cpu_flags()
    if not flags:
        return  # this system does not tell: the library itself is the next check
    missing = sorted(set(target["cpu_flags"]) - flags)
    if missing:
        raise InputError(
            f"this CPU cannot run an artifact for {target['name']}",
            f"no {', '.join(missing)}", None, "Compile it for a target this CPU satisfies.",
        )  # fmt: skip


class Artifact:
    """A loaded artifact: call it with numpy arrays in the order of the model's inputs.

    Any thread may call it; a lock makes them take turns. Threads that shall run at the same time
    load one each.
    """

    def __init__(self, contents: Contents, code: bytes, parameters: Sequence[Array], threads: int):
        import tvm
        from tvm.runtime.vm import VirtualMachine

        self.path, self.manifest, self._contents = contents.path, contents.manifest, contents
        library = native.library(code, contents.path)
        self._machine: Callable[[], Any] = lambda: VirtualMachine(library, tvm.cpu())
        self._vm = self._machine()
        self._tensor = tvm.runtime.tensor
        self._parameters = [self._tensor(array) for array in parameters]
        self._lock = threading.Lock()
        self._threads = threads

    def __call__(self, *inputs: Array) -> Array | list[Array]:
        """Run once. Raises InputError for a wrong number, shape or dtype of inputs."""
        checked = self._checked(inputs)
        self._take_threads()
        with self._lock:
            result = self._vm["main"](*checked, *self._parameters)
        outputs = [result] if hasattr(result, "numpy") else list(result)
        arrays = [o.numpy() for o in outputs]
        return arrays[0] if len(arrays) == 1 else arrays

    def named(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run with inputs by name; outputs by name."""
        names = [entry["name"] for entry in self.manifest["inputs"]]
        if set(inputs) != set(names):
            raise InputError("names of the inputs", sorted(inputs), names)
        result = self(*(inputs[n] for n in names))
        arrays = result if isinstance(result, list) else [result]
        outputs = [entry["name"] for entry in self.manifest["outputs"]]
        return dict(zip(outputs, arrays, strict=True))

    def run_samples(self, images: Array, progress: Callable[[int], None] | None = None) -> Array:
        """First output for each sample of a batch [N, ...] of a one-input model."""
        shape = self.manifest["inputs"][0]["shape"]
        rows = []
        for at in range(0, len(images), shape[0]):
            part = images[at : at + shape[0]]
            count = len(part)
            if count < shape[0]:
                part = np.concatenate([part, np.repeat(part[-1:], shape[0] - count, 0)])
            result = self(np.ascontiguousarray(part, np.float32))
            rows.append((result[0] if isinstance(result, list) else result)[:count])
            if progress:
                progress(count)
        return np.concatenate(rows)

    def bench_callable(self, *inputs: Array) -> Callable[[], object]:
        """A function that runs once, in this thread, on prepared inputs (default: seeded noise)."""
        if not inputs:
            rng = np.random.default_rng(0)
            shapes = [entry["shape"] for entry in self.manifest["inputs"]]
            inputs = tuple(rng.standard_normal(s).astype(np.float32) for s in shapes)
        self._take_threads()
        self._vm.set_input("main", *self._checked(inputs), *self._parameters)
        invoke = self._vm.invoke_stateful
        return lambda: invoke("main")

    def golden(self) -> tuple[dict[str, Array], dict[str, str]]:
        """The golden samples and the checksums. Raises InputError where they were changed."""
        if GOLDEN not in self.manifest["files"]:
            raise InputError(f"artifact {self.path} has no golden samples")
        return tensors.parse(self._contents.file(GOLDEN), self.path / GOLDEN)

    def trace(self, *inputs: Array) -> list[tuple[str, Array]]:
        """Run once and give every tensor that a kernel wrote, in order: (name, flat contents)."""
        seen: list[Array] = []

        def after(_function: object, name: str, before: bool, _result: object, *args: Any) -> int:
            if not before and name.startswith(KERNEL_PREFIX):
                seen.append(args[-1].numpy().copy())
            return 0

        checked = self._checked(inputs)
        machine = self._machine()  # an instrument cannot be taken off again
        machine.set_instrument(after)
        self._take_threads()
        with self._lock:
            machine["main"](*checked, *self._parameters)
        return list(zip(self.manifest["calls"], seen, strict=True))

    def _take_threads(self) -> None:
        if self.manifest["threads"] > 1:  # else there are no parallel loops in it
            pool.use(self._threads)

    def _checked(self, inputs: Sequence[Array]) -> list[Any]:
        expected = self.manifest["inputs"]
        if len(inputs) != len(expected):
            raise InputError("number of inputs", len(inputs), len(expected))
        for array, entry in zip(inputs, expected, strict=True):
            if list(array.shape) != list(entry["shape"]) or str(array.dtype) != entry["dtype"]:
                raise InputError(
                    f"input {entry['name']!r}", f"{array.dtype} {list(array.shape)}",
                    f"{entry['dtype']} {list(entry['shape'])}",
                )  # fmt: skip
        return [self._tensor(np.ascontiguousarray(a)) for a in inputs]

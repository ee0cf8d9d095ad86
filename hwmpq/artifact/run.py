"""Loading and running an artifact: numpy arrays in, numpy arrays out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq import tensors, tile_permission, toolchain
from hwmpq.artifact import pool
from hwmpq.artifact.folder import read_manifest
from hwmpq.errors import InputError

Array = NDArray[Any]
#: Names of our kernels in a compiled library begin so; those that TVM makes do not.
KERNEL_PREFIX = "hwmpq_"


def load(path: str | Path) -> Artifact:
    """Check an artifact and load it.

    Raises InputError when files were changed, the version is unknown, this CPU lacks a feature, or
    Linux refuses one: always before any native code of it is loaded.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    _check_cpu(manifest["target"])
    tile_permission.ask(manifest["target"]["cpu_flags"])
    toolchain.check()
    return Artifact(folder, manifest)


def _check_cpu(target: Mapping[str, Any]) -> None:
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        return  # no such file on this system: the library itself is the next check
    missing = sorted(set(target["cpu_flags"]) - flags)
    if missing:
        raise InputError(
            f"this CPU cannot run an artifact for {target['name']}",
            f"no {', '.join(missing)}", None, "Compile it for a target this CPU satisfies.",
        )  # fmt: skip


class Artifact:
    """A loaded artifact: call it with numpy arrays in the order of the model's inputs.

    Not to be called from two threads at once (a lock makes them wait).
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        import tvm
        from tvm.runtime.vm import VirtualMachine

        self.path, self.manifest = folder, manifest
        library = tvm.runtime.load_module(str(folder / "model.so"))
        self._machine: Callable[[], Any] = lambda: VirtualMachine(library, tvm.cpu())
        self._vm = self._machine()
        arrays, _ = tensors.load(folder / "parameters.safetensors")
        self._parameters = [tvm.runtime.tensor(arrays[n]) for n in manifest["parameters"]]
        self._tensor = tvm.runtime.tensor
        self._lock = threading.Lock()
        self._threads = int(manifest.get("threads", 1))

    def __call__(self, *inputs: Array) -> Array | list[Array]:
        """Run once. Raises InputError for a wrong number, shape or dtype of inputs."""
        checked = self._checked(inputs)
        pool.use(self._threads)
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
        pool.use(self._threads)
        self._vm.set_input("main", *self._checked(inputs), *self._parameters)
        invoke = self._vm.invoke_stateful
        return lambda: invoke("main")

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
        pool.use(self._threads)
        with self._lock:
            machine["main"](*checked, *self._parameters)
        return list(zip(self.manifest["calls"], seen, strict=True))

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

"""Loading and running an artifact: numpy arrays in, numpy arrays out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq import targets, tensors, tile_permission, toolchain
from hwmpq.artifact import native, pool, signature
from hwmpq.artifact.contents import Contents, open_artifact
from hwmpq.artifact.manifest import GOLDEN, PARAMETERS, libraries
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
    than one; its loops are cut into as many parts as it was built for, so more stay idle. Raises
    InputError when files were changed, added or taken away, the version is unknown, the signature
    missing or wrong, this CPU lacks a feature, or Linux refuses one: always before any native code
    of it is loaded.
    """
    contents = open_artifact(Path(path), signature.required(require_signature))
    target, built_for = contents.manifest["target"], contents.manifest["threads"]
    if threads is not None and (threads < 1 or built_for == 1 < threads):
        raise InputError(
            "threads", threads, "1" if built_for == 1 else "1 or more",
            f"The artifact was built for {built_for}; `--threads` of compile says for how many.",
        )  # fmt: skip
    _check_cpu(target)
    names = libraries(contents.manifest)
    kept = {}
    for name in contents.manifest["files"]:
        raw = contents.file(name)
        if name == PARAMETERS or name in names.values():
            kept[name] = raw
    parameters = _parameters(contents, kept[PARAMETERS])
    tile_permission.ask(target["cpu_flags"])
    toolchain.check()
    code = {size: kept[name] for size, name in names.items()}
    return Artifact(contents, code, parameters, threads or built_for)


def _parameters(contents: Contents, raw: bytes) -> dict[str, Array]:
    """By name. Raises InputError where one that a library takes is missing."""
    arrays, _ = tensors.parse(raw, contents.path / PARAMETERS)
    for entry in (contents.manifest, *contents.manifest.get("batches", ())):
        missing = [name for name in entry["parameters"] if name not in arrays]
        if missing:
            raise InputError(f"{PARAMETERS} of artifact {contents.path} lacks a tensor", missing[0])
    return arrays


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


@dataclass(frozen=True, eq=False)
class _Program:
    """What was compiled for one batch size. machine: makes another VM of it; parameters: in the
    order in which `main` takes them after the inputs."""

    machine: Callable[[], Any]
    vm: Any
    parameters: list[Any]


class Artifact:
    """A loaded artifact: call it with numpy arrays in the order of the model's inputs.

    sizes: the batch sizes it was compiled for; a call takes the library of its inputs' size.
    Any thread may call it; a lock makes them take turns. Threads that shall run at the same time
    load one each.
    """

    def __init__(
        self, contents: Contents, code: Mapping[int, bytes], parameters: Mapping[str, Array],
        threads: int,
    ):  # fmt: skip
        import tvm

        self.path, self.manifest, self._contents = contents.path, contents.manifest, contents
        self.sizes = tuple(code)
        self._tensor = tvm.runtime.tensor
        # Batch sizes share what is packed alike for them.
        shared = {name: self._tensor(array) for name, array in parameters.items()}
        entries = (self.manifest, *self.manifest.get("batches", ()))
        self._programs = {
            size: _program(raw, contents.path, [shared[name] for name in entry["parameters"]])
            for (size, raw), entry in zip(code.items(), entries, strict=True)
        }
        self._lock = threading.Lock()
        self._threads = threads

    def __call__(self, *inputs: Array) -> Array | list[Array]:
        """Run once. Raises InputError for a wrong number, shape or dtype of inputs."""
        program, checked = self._prepared(inputs)
        self._take_threads()
        with self._lock:
            result = program.vm["main"](*checked, *program.parameters)
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
        """First output for each sample of a batch [N, ...] of a one-input model, N being any."""
        rows, at = [], 0
        while at < len(images):
            fitting = [size for size in self.sizes if size <= len(images) - at]
            size = max(fitting, default=min(self.sizes))
            part = images[at : at + size]
            count = len(part)
            if count < size:
                part = np.concatenate([part, np.repeat(part[-1:], size - count, 0)])
            result = self(np.ascontiguousarray(part, np.float32))
            rows.append((result[0] if isinstance(result, list) else result)[:count])
            at += count
            if progress:
                progress(count)
        return np.concatenate(rows)

    def bench_callable(self, *inputs: Array) -> Callable[[], object]:
        """A function that runs once, in this thread, on prepared inputs (default: seeded noise)."""
        program, checked = self._prepared(inputs or self._noise())
        self._take_threads()
        program.vm.set_input("main", *checked, *program.parameters)
        invoke = program.vm.invoke_stateful
        return lambda: invoke("main")

    def call_seconds(self, longest_s: float = 0.1) -> list[float]:
        """Least seconds of every kernel call inside runs on seeded noise, at the first batch size,
        in the order of the manifest's `calls`: each finds the caches as the one before it left
        them. 15 runs; fewer, but 3, once they took `longest_s`."""
        stamps: list[float] = []

        def tick(_function: object, name: str, _before: bool, _result: object, *_: Any) -> int:
            if name.startswith(KERNEL_PREFIX):
                stamps.append(time.perf_counter())
            return 0

        program, checked = self._prepared(self._noise(), self.sizes[:1])
        machine = program.machine()  # an instrument cannot be taken off again
        machine.set_instrument(tick)
        machine.set_input("main", *checked, *program.parameters)
        self._take_threads()
        machine.invoke_stateful("main")  # the first run loads what is loaded on demand
        found: list[Array] = []
        began = time.perf_counter()
        while len(found) < 15 and (len(found) < 3 or time.perf_counter() - began < longest_s):
            stamps.clear()
            machine.invoke_stateful("main")
            found.append(np.diff(stamps)[::2])
        return [float(seconds) for seconds in np.min(found, axis=0)]

    def golden(self) -> tuple[dict[str, Array], dict[str, str]]:
        """The golden samples and the checksums. Raises InputError where they were changed."""
        if GOLDEN not in self.manifest["files"]:
            raise InputError(f"artifact {self.path} has no golden samples")
        return tensors.parse(self._contents.file(GOLDEN), self.path / GOLDEN)

    def trace(self, *inputs: Array) -> list[tuple[str, Array]]:
        """Run once, at the first batch size, and give every tensor that a kernel wrote, in order:
        (name, flat contents)."""
        seen: list[Array] = []

        def after(_function: object, name: str, before: bool, _result: object, *args: Any) -> int:
            if not before and name.startswith(KERNEL_PREFIX):
                seen.append(args[-1].numpy().copy())
            return 0

        program, checked = self._prepared(inputs, self.sizes[:1])
        machine = program.machine()  # an instrument cannot be taken off again
        machine.set_instrument(after)
        self._take_threads()
        with self._lock:
            machine["main"](*checked, *program.parameters)
        return list(zip(self.manifest["calls"], seen, strict=True))

    def _noise(self) -> tuple[Array, ...]:
        """Inputs that are the same at every call."""
        chance = np.random.default_rng(0)
        shapes = [entry["shape"] for entry in self.manifest["inputs"]]
        return tuple(chance.standard_normal(s).astype(np.float32) for s in shapes)

    def _take_threads(self) -> None:
        if self.manifest["threads"] > 1:  # else there are no parallel loops in it
            pool.use(self._threads)

    def _prepared(
        self, inputs: Sequence[Array], sizes: Sequence[int] | None = None
    ) -> tuple[_Program, list[Any]]:
        """What runs inputs of this batch size, one of `sizes` (all), and the inputs as tensors.

        Raises InputError."""
        expected, able = self.manifest["inputs"], list(sizes or self.sizes)
        if len(inputs) != len(expected):
            raise InputError("number of inputs", len(inputs), len(expected))
        for array, entry in zip(inputs, expected, strict=True):
            shapes = {size: self._shape(entry, size) for size in able}
            able = [size for size, shape in shapes.items() if list(array.shape) == shape]
            if not able or str(array.dtype) != entry["dtype"]:
                raise InputError(
                    f"input {entry['name']!r}", f"{array.dtype} {list(array.shape)}",
                    f"{entry['dtype']} {' or '.join(map(str, shapes.values()))}",
                )  # fmt: skip
        return self._programs[able[0]], [self._tensor(np.ascontiguousarray(a)) for a in inputs]

    def _shape(self, entry: Mapping[str, Any], size: int) -> list[int]:
        """Of an input at a batch size."""
        shape = list(entry["shape"])
        return shape if size == self.sizes[0] else [size, *shape[1:]]


def _program(code: bytes, of: Path, parameters: list[Any]) -> _Program:
    """Raises InputError where TVM or the system does not take the library."""
    import tvm
    from tvm.runtime.vm import VirtualMachine

    library = native.library(code, of)

    def machine() -> Any:
        return VirtualMachine(library, tvm.cpu())

    return _Program(machine, machine(), parameters)

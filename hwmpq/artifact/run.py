"""Loading and running an artifact: numpy arrays in, numpy arrays out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hwmpq import targets, tensors, tile_permission, toolchain
from hwmpq.artifact import cuda, pool, relax_vm, signature
from hwmpq.artifact.contents import Contents, open_artifact
from hwmpq.artifact.cuda import Machine, driver
from hwmpq.artifact.manifest import CUBIN, GOLDEN, LAUNCHES, PARAMETERS, libraries, parts
from hwmpq.errors import InputError

Array = NDArray[Any]


class Program(Protocol):
    """What was compiled for one batch size, ready to run."""

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """The outputs."""
        ...

    def bench(self, inputs: Sequence[Array]) -> Callable[[], object]:
        """A function that runs once on inputs that lie ready."""
        ...

    def trace(self, inputs: Sequence[Array]) -> list[Array]:
        """What every kernel call of one run wrote, flat, in order."""
        ...

    def call_seconds(self, inputs: Sequence[Array], longest_s: float) -> list[float]:
        """Least seconds of every kernel call of 15 runs; of fewer, but 3, once they took that."""
        ...


def load(
    path: str | Path, require_signature: str | Path | None = None, threads: int | None = None,
    machine: Machine | None = None,
) -> Artifact:  # fmt: skip
    """Check an artifact and load it; the bytes that were checked are the bytes that are loaded.

    require_signature: the file of the public key that must have signed it, beside the one that
    HWMPQ_REQUIRE_SIGNATURE names. threads: another number than it was built for, if that is more
    than one; its loops are cut into as many parts as it was built for, so more stay idle. machine:
    what runs the kernels of an artifact for a GPU, the first GPU here by default. Raises
    DeviceError where there is none; InputError when files were changed, added or taken away, the
    version is unknown, the signature missing or wrong, this CPU lacks a feature, or Linux refuses
    one: always before any native code of it is loaded.
    """
    contents = open_artifact(Path(path), signature.required(require_signature))
    target, built_for = contents.manifest["target"], contents.manifest["threads"]
    if threads is not None and (threads < 1 or built_for == 1 < threads):
        raise InputError(
            "threads", threads, "1" if built_for == 1 else "1 or more",
            f"The artifact was built for {built_for}; `hwmpq compile --threads N` builds it for N.",
        )  # fmt: skip
    _check_cpu(target)
    names = libraries(contents.manifest)
    wanted = {PARAMETERS, *(part for name in names.values() for part in parts(name).values())}
    kept = {}
    for name in contents.manifest["files"]:
        raw = contents.file(name)
        if name in wanted:
            kept[name] = raw
    parameters = _parameters(contents, kept[PARAMETERS])
    tile_permission.ask(target["cpu_flags"])
    programs = _programs(contents, names, kept, parameters, machine)
    return Artifact(contents, programs, threads or built_for)


def _programs(
    contents: Contents, names: Mapping[int, str], kept: Mapping[str, bytes],
    parameters: Mapping[str, Array], machine: Machine | None,
) -> Mapping[int, Program]:  # fmt: skip
    """Batch size -> what runs it. names: of the libraries; kept: their files' contents."""
    manifest, files = contents.manifest, {size: parts(name) for size, name in names.items()}
    entries = (manifest, *manifest.get("batches", ()))
    taken = {size: entry["parameters"] for size, entry in zip(names, entries, strict=True)}
    first = next(iter(names))
    if CUBIN not in files[first]:
        if machine is not None:
            raise InputError(f"artifact {contents.path}", "one for a CPU", "one for a GPU")
        toolchain.check()
        code = {size: kept[name] for size, name in names.items()}
        return relax_vm.programs(code, taken, parameters, contents.path)
    machine = machine or driver.gpu()
    pairs = {
        size: (kept[found[machine.suffix]], kept[found[LAUNCHES]]) for size, found in files.items()
    }

    def shapes(kind: str, size: int) -> list[list[int]]:
        return [_shape(entry, size, first) for entry in manifest[kind]]

    ends = {size: (shapes("inputs", size), shapes("outputs", size)) for size in names}
    return cuda.programs(machine, pairs, taken, parameters, ends, contents.path)


def _parameters(contents: Contents, raw: bytes) -> dict[str, Array]:
    """By name. Raises InputError where one that a library takes is missing."""
    arrays, _ = tensors.parse(raw, contents.path / PARAMETERS)
    for entry in (contents.manifest, *contents.manifest.get("batches", ())):
        missing = [name for name in entry["parameters"] if name not in arrays]
        if missing:
            raise InputError(f"{PARAMETERS} of artifact {contents.path} lacks {missing[0]}")
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


class Artifact:
    """A loaded artifact: call it with numpy arrays in the order of the model's inputs.

    sizes: the batch sizes it was compiled for; a call takes the library of its inputs' size.
    Any thread may call it; a lock makes them take turns. Threads that shall run at the same time
    load one each.
    """

    def __init__(self, contents: Contents, programs: Mapping[int, Program], threads: int):
        self.path, self.manifest, self._contents = contents.path, contents.manifest, contents
        self.sizes, self._programs = tuple(programs), dict(programs)
        self._lock = threading.Lock()
        self._threads = threads

    def __call__(self, *inputs: Array) -> Array | list[Array]:
        """Run once. Raises InputError for a wrong number, shape or dtype of inputs."""
        program, checked = self._prepared(inputs)
        self._take_threads()
        with self._lock:
            arrays = program.run(checked)
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

        def first(part: Array) -> Array:
            result = self(np.ascontiguousarray(part, np.float32))
            return result[0] if isinstance(result, list) else result

        return in_batches(first, self.sizes, images, progress)

    def bench_callable(self, *inputs: Array, size: int | None = None) -> Callable[[], object]:
        """A function that runs once, in this thread, on prepared inputs; without any, on seeded
        noise of a batch size, the first where none is given."""
        program, checked = self._prepared(inputs or self._noise(size or self.sizes[0]))
        self._take_threads()
        return program.bench(checked)

    @property
    def on_gpu(self) -> bool:
        """Is it one for a GPU?"""
        return isinstance(self._programs[self.sizes[0]], cuda.CudaProgram)

    def gpu_seconds(self, size: int | None = None) -> Callable[[int], float]:
        """A function of how many runs: the seconds that they take by the GPU's own clock, on seeded
        noise of a batch size, the first where none is given. Raises InputError on a CPU."""
        program, checked = self._prepared(self._noise(size or self.sizes[0]))
        if not isinstance(program, cuda.CudaProgram):
            raise InputError(f"a GPU's clock for artifact {self.path}", "one for a CPU")
        return program.seconds(checked)

    def call_seconds(self, longest_s: float = 0.1) -> list[float]:
        """Least seconds of every kernel call inside runs on seeded noise, at the first batch size,
        in the order of the manifest's `calls`: each finds the caches as the one before it left
        them. 15 runs; fewer, but 3, once they took `longest_s`."""
        program, checked = self._prepared(self._noise(self.sizes[0]))
        self._take_threads()
        return program.call_seconds(checked, longest_s)

    def golden(self) -> tuple[dict[str, Array], dict[str, str]]:
        """The golden samples and the checksums. Raises InputError where they were changed."""
        if GOLDEN not in self.manifest["files"]:
            raise InputError(f"artifact {self.path} has no golden samples")
        return tensors.parse(self._contents.file(GOLDEN), self.path / GOLDEN)

    def trace(self, *inputs: Array) -> list[tuple[str, Array]]:
        """Run once, at the first batch size, and give every tensor that a kernel wrote, in order:
        (name, flat contents)."""
        program, checked = self._prepared(inputs, self.sizes[:1])
        self._take_threads()
        with self._lock:
            seen = program.trace(checked)
        return list(zip(self.manifest["calls"], seen, strict=True))

    def _noise(self, size: int) -> tuple[Array, ...]:
        """Inputs of a batch size, the same at every call."""
        chance = np.random.default_rng(0)
        shapes = [_shape(entry, size, self.sizes[0]) for entry in self.manifest["inputs"]]
        return tuple(chance.standard_normal(s).astype(np.float32) for s in shapes)

    def _take_threads(self) -> None:
        if self.manifest["threads"] > 1:  # else there are no parallel loops in it
            pool.use(self._threads)

    def _prepared(
        self, inputs: Sequence[Array], sizes: Sequence[int] | None = None
    ) -> tuple[Program, list[Array]]:
        """What runs inputs of this batch size, one of `sizes` (all), and the inputs for it.

        Raises InputError."""
        expected, able = self.manifest["inputs"], list(sizes or self.sizes)
        if len(inputs) != len(expected):
            raise InputError("number of inputs", len(inputs), len(expected))
        for array, entry in zip(inputs, expected, strict=True):
            shapes = {size: _shape(entry, size, self.sizes[0]) for size in able}
            able = [size for size, shape in shapes.items() if list(array.shape) == shape]
            if not able or str(array.dtype) != entry["dtype"]:
                raise InputError(
                    f"input {entry['name']!r}", f"{array.dtype} {list(array.shape)}",
                    f"{entry['dtype']} {' or '.join(map(str, shapes.values()))}",
                )  # fmt: skip
        return self._programs[able[0]], [np.ascontiguousarray(a) for a in inputs]


def _shape(entry: Mapping[str, Any], size: int, first: int) -> list[int]:
    """Of an input or output at a batch size. first: the one that the manifest gives shapes for."""
    shape = list(entry["shape"])
    return shape if size == first else [size, *shape[1:]]


def in_batches(
    run: Callable[[Array], Array], sizes: Sequence[int], images: Array,
    progress: Callable[[int], None] | None = None,
) -> Array:  # fmt: skip
    """What a function of so many samples at once, one of `sizes`, gives for any number of them.

    What is left in the end is filled up with its last sample."""
    rows, at = [], 0
    while at < len(images):
        fitting = [size for size in sizes if size <= len(images) - at]
        size = max(fitting, default=min(sizes))
        part = images[at : at + size]
        count = len(part)
        if count < size:
            part = np.concatenate([part, np.repeat(part[-1:], size - count, 0)])
        rows.append(run(part)[:count])
        at += count
        if progress:
            progress(count)
    return np.concatenate(rows)

"""What a manifest must hold before anything of an artifact is used: its JSON, entry by entry."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

VERSION = 1
KIND = "hwmpq-artifact"
LIBRARY, PARAMETERS, GOLDEN = "model.so", "parameters.safetensors", "golden.safetensors"
#: Of an artifact for a GPU: machine code, its text, the list of launches (`artifact.cuda`).
CUBIN, TEXT, LAUNCHES = ".cubin", ".cu", ".json"
#: Types that a tensor at the border of the network may have.
DTYPES = (
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32",
    "uint16", "uint8", "bool",
)  # fmt: skip
_MOST_THREADS = 1024
_MOST_ELEMENTS = 2**31


def parse(raw: bytes) -> Any:
    """JSON in UTF-8, strictly: a name twice in one object, NaN and half a character (a lone
    surrogate) are no JSON here. Raises ValueError, RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    def no_number(text: str) -> None:
        raise ValueError(f"{text} is no number")

    found = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=no_number)
    json.dumps(found, ensure_ascii=False).encode()
    return found


def interface(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a caller relies on: a line for each input, output, call and parameter, in
    order, and the library where it is not the usual one, then for each further batch size and its
    parameters. It stands in the manifest itself
    and finds entries that were changed or exchanged."""
    lines = []
    for kind in ("inputs", "outputs"):
        for entry in manifest[kind]:
            shape = ",".join(map(str, entry["shape"]))
            lines.append(f"{kind} {entry['name']} {entry['dtype']} {shape}\n")
    if "library" in manifest:
        lines.append(f"library {manifest['library']}\n")
    for kind in ("calls", "parameters"):
        lines += [f"{kind} {name}\n" for name in manifest[kind]]
    for batch in manifest.get("batches", ()):
        lines.append(f"batch {batch['size']} {batch['library']}\n")
        lines += [f"parameters {name}\n" for name in batch["parameters"]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def libraries(manifest: Mapping[str, Any]) -> dict[int, str]:
    """Batch size -> file of the library for it; the first is that of `inputs`, in any artifact."""
    first = manifest["inputs"][0]["shape"][:1] or [1]
    own = manifest.get("library", LIBRARY)
    return {first[0]: own} | {b["size"]: b["library"] for b in manifest.get("batches", ())}


def parts(library: str) -> dict[str, str]:
    """The files that make a library, by suffix: a GPU's has also its text and its launches."""
    path = Path(library)
    suffixes = (CUBIN, TEXT, LAUNCHES) if path.suffix == CUBIN else (path.suffix,)
    return {suffix: str(path.with_suffix(suffix)) for suffix in suffixes}


def wrong(manifest: Mapping[str, Any]) -> list[str]:
    """The entries that are missing though needed, of another type or out of range."""
    told = {key: good for key, good in _TOLD.items() if key in manifest}
    found = [key for key, good in {**_NEEDED, **told}.items() if not good(manifest.get(key))]
    return found or ([] if _batches_fit(manifest) else ["batches"])


def _batches_fit(manifest: Mapping[str, Any]) -> bool:
    """Do the batch sizes differ, and can every input and output be so long?"""
    sizes = [batch["size"] for batch in manifest.get("batches", ())]
    shapes = [entry["shape"] for kind in ("inputs", "outputs") for entry in manifest[kind]]
    firsts = {shape[0] if shape else 0 for shape in shapes}
    largest = max(sizes, default=0)
    return not sizes or (
        len(firsts) == 1 and _are_different([*firsts, *sizes])
        and all(math.prod(shape[1:]) * largest <= _MOST_ELEMENTS for shape in shapes)
    )  # fmt: skip


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and min(value) >= " "


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _are_different_names(value: Any) -> bool:
    return _are_names(value) and _are_different(value)


def _are_different(names: Iterable[object]) -> bool:
    listed = list(names)
    return len(set(listed)) == len(listed)


def _is_tensor(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_name(value.get("name")):
        return False
    shape = value.get("shape")
    if not isinstance(shape, list) or value.get("dtype") not in DTYPES:
        return False
    count = 1
    for extent in shape:
        if type(extent) is not int or not 0 < extent <= _MOST_ELEMENTS:
            return False
        count *= extent
    return count <= _MOST_ELEMENTS


def _are_tensors(value: Any) -> bool:
    good = isinstance(value, list) and bool(value) and all(map(_is_tensor, value))
    return good and _are_different(entry["name"] for entry in value)


def _is_target(value: Any) -> bool:
    return (
        isinstance(value, dict) and _is_name(value.get("name"))
        and _are_names(value.get("cpu_flags"))
    )  # fmt: skip


def _is_batch(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_name(value.get("library")):
        return False
    size = value.get("size")
    return (
        type(size) is int and 0 < size <= _MOST_ELEMENTS
        and _are_different_names(value.get("parameters"))
    )  # fmt: skip


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


_NEEDED: dict[str, Callable[[Any], bool]] = {
    "target": _is_target,
    "threads": lambda value: type(value) is int and 0 < value <= _MOST_THREADS,
    "inputs": _are_tensors,
    "outputs": _are_tensors,
    "assignment": lambda value: isinstance(value, dict) and all(map(_is_name, value.values())),
    "calls": _are_names,
    "parameters": _are_different_names,
    "files": lambda value: isinstance(value, dict),
    "interface": _is_hash,
}
#: Not needed, but used or shown where they are.
_TOLD: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("versions", "latency_s", "accuracy"), lambda value: isinstance(value, dict)),
    "kernels": lambda value: (
        isinstance(value, dict) and all(isinstance(told, dict) for told in value.values())
    ),
    "batches": lambda value: isinstance(value, list) and all(map(_is_batch, value)),
    "library": _is_name,
}

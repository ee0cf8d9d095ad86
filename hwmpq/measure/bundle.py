"""A bundle: kernels, random inputs, how to time them, and a runner, in one .tar.gz for a machine
that cannot be reached from here; and the one result file that comes back.

    runner.py     starts hwmpq/measure/runner.py, which explains itself
    hwmpq/        the project's own timing modules, unchanged (`kit`)
    bundle.json   {hwmpq_bundle, target, toolchain, protocol, blocks: [[key]], files: {name:
                  [nbytes, sha256]}, cells: [{key, cell: fields of `Cell`, row: what it is}]}
    cells/N/      library, arguments, expected outputs, loop; of a GPU's kernel its launch instead

It names no model, layer, user or host, and holds no weights: the arguments are random.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hwmpq.errors import InputError, in_words
from hwmpq.measure import kit
from hwmpq.measure.protocol import Cell, CellTiming, Protocol
from hwmpq.measure.runner import MANIFEST, VERSION, parse, read_limited
from hwmpq.types import reject_unknown

#: No call of a kernel ends before this, in seconds, or lasts as long as that.
PLAUSIBLE_S = (1e-9, 600.0)
_AGAIN = "Copy result.json again, or run the bundle again there."
_RUNNER = """\
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from hwmpq.measure.runner import main

sys.exit(main(sys.argv[1:]))
"""
_KEYS = {
    "hwmpq_result", "bundle", "fingerprint", "hardware", "conditions", "manifest", "timings",
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A cell and what it is: row is plain JSON and comes back with the times."""

    cell: Cell
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What a bundle's run gave. origin: its name in the store; rows: what was timed, and how it
    went."""

    origin: str
    fingerprint: str
    target: str
    toolchain: Mapping[str, str]
    threads: int
    rows: Sequence[tuple[Mapping[str, Any], CellTiming]]


def pack(
    path: Path, blocks: Sequence[Sequence[Packed]], protocol: Protocol, target: str,
    toolchain: Mapping[str, str],
) -> str:  # fmt: skip
    """Write the bundle aside, then rename; returns its SHA-256 name. Same content, same bytes.

    Raises InputError where it cannot be written.
    """
    files = {"runner.py": _RUNNER.encode(), **kit.files()}
    cells = []
    for number, item in enumerate(packed for block in blocks for packed in block):
        cell, held = _gathered(item.cell, f"cells/{number}")
        files |= held
        cells.append({"key": cell.key, "cell": cell.to_json(), "row": dict(item.row)})
    manifest = {
        "hwmpq_bundle": VERSION, "target": target, "toolchain": dict(toolchain),
        "protocol": protocol.to_json(), "cells": cells,
        "blocks": [[packed.cell.key for packed in block] for block in blocks],
        "files": {name: [len(data), _sha256(data)] for name, data in sorted(files.items())},
    }  # fmt: skip
    files[MANIFEST] = json.dumps(manifest, sort_keys=True).encode()
    aside = path.with_name(f"{path.name}.part")
    try:
        with (
            aside.open("wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for name, data in sorted(files.items()):
                entry = tarfile.TarInfo(name)  # no owner, no date
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError("cannot write the bundle", f"{path} ({error.strerror})") from error
    return _sha256(files[MANIFEST])


def is_result(path: Path) -> bool:
    """Does the file begin as a result does?"""
    with path.open("rb") as file:
        return file.read(16).startswith(b'{"hwmpq_result"')


def read_result(path: Path) -> Result:
    """A result file, which may have been written by anyone.

    Raises UnsafeFile for a link, InputError for one that is too long, damaged or not plausible.
    """
    found = parse(read_limited(path), path)
    try:
        reject_unknown("result", found, _KEYS)
        manifest = found["manifest"]
        if found["hwmpq_result"] != VERSION or manifest["hwmpq_bundle"] != VERSION:
            raise InputError(f"result {path}", found["hwmpq_result"], f"version {VERSION}")
        if _sha256(json.dumps(manifest, sort_keys=True).encode()) != found["bundle"]:
            raise InputError(f"result {path}: its manifest is not that of the bundle", next=_AGAIN)
        name = found["fingerprint"]
        if not re.fullmatch(r"[\w-]{1,80}", name, re.ASCII):
            raise InputError(f"fingerprint in result {path}", repr(name), "letters, digits, - _")
        rows = {item["key"]: item["row"] for item in manifest["cells"]}
        timings = [_plausible(key, item) for key, item in found["timings"].items()]
        return Result(
            f"bundle:{found['bundle'][:16]}:{name}", name, str(manifest["target"]),
            {str(k): str(v) for k, v in manifest["toolchain"].items()},
            Protocol.from_json(manifest["protocol"]).threads,
            [(rows[timing.key], timing) for timing in timings],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"damaged result {path}", in_words(error), next=_AGAIN) from error


def _plausible(key: str, data: Mapping[str, Any]) -> CellTiming:
    timing = CellTiming.from_json(data)
    low, high = PLAUSIBLE_S
    for value in timing.samples_s:
        if not low <= value <= high:
            raise InputError(f"time of {key}", value, f"{low:g} to {high:g} s")
    if timing.key != key or not isinstance(timing.error, str):
        raise InputError("key of a timing", timing.key, key)
    if bool(timing.samples_s) == bool(timing.error):
        raise InputError(f"timing of {key}", timing.error, "times, or an error")
    return timing


def _gathered(cell: Cell, place: str) -> tuple[Cell, dict[str, bytes]]:
    """The cell with its files' names in the bundle, and the files."""
    names: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for field in ("library", "launches", "args", "expected"):
        if path := getattr(cell, field):
            names[field] = f"{place}/{field}{Path(path).suffix}"
            files[names[field]] = Path(path).read_bytes()
    if cell.loop:
        names["loop"] = f"{place}/loop"
        for file in Path(cell.loop).iterdir():
            files[f"{place}/loop/{file.name}"] = file.read_bytes()
    return replace(cell, **names), files


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

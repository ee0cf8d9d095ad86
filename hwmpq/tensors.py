"""Safetensors files with numpy alone: an artifact must load where nothing else is installed.

The format: 8 bytes little-endian length of a JSON header, the header (name -> dtype, shape, byte
offsets), the raw bytes (the format section of safetensors' README).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError, in_words

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
#: Narrow floats that numpy has no type for, with ml_dtypes' names.
_NARROW = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_NAMES = {np.dtype(v): k for k, v in _DTYPES.items()}
_HEADER_LIMIT = 100 * 2**20


def save(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write aside, then rename. Raises OSError where the disk does not take it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    blobs, offset = [], 0
    for name, tensor in tensors.items():
        data = np.asarray(tensor, order="C")
        data = data.astype(data.dtype.newbyteorder("<"), copy=False)
        end = offset + data.nbytes
        header[name] = {
            "dtype": _NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [offset, end],
        }
        blobs.append(data.tobytes())
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for blob in blobs:
                file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors and metadata of a file. Raises InputError for another or a damaged kind of file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"not a readable safetensors file: {path}", error.strerror) from error
    return parse(raw, path)


def parse(raw: bytes, path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors and metadata of a file's bytes; bf16 and fp8 need ml_dtypes, which an artifact does
    not. Raises InputError for another or a damaged kind of file."""
    try:
        (size,) = struct.unpack_from("<Q", raw)
        if size > min(len(raw) - 8, _HEADER_LIMIT):
            raise ValueError(f"header of {size} bytes in a file of {len(raw)}")
        header = json.loads(raw[8 : 8 + size])
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        body = memoryview(raw)[8 + size :]
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, shape = _dtype(entry["dtype"]), tuple(entry["shape"])
            if not 0 <= begin <= end <= len(body) or end - begin != _nbytes(shape, dtype):
                raise ValueError(f"offsets of {name!r} do not fit")
            tensors[name] = np.frombuffer(body[begin:end], dtype).reshape(shape)
    except (
        ImportError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
        struct.error,
    ) as error:  # fmt: skip
        raise InputError(f"not a readable safetensors file: {path}", in_words(error)) from error
    return tensors, metadata


def _dtype(name: str) -> np.dtype[Any]:
    if name not in _NARROW:
        return np.dtype(_DTYPES[name])
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _NARROW[name]))
    return dtype


def _nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count * dtype.itemsize

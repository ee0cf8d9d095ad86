"""Messages between a parent and its worker: a 4-byte big-endian length, then one JSON object.

JSON and a length limit, never pickle: what a worker on another machine answers is only ever data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import IO, Any

from hwmpq.errors import DeviceError

#: Longest message in bytes, in both directions.
LIMIT_BYTES = 64 << 20
_HEADER = struct.Struct(">I")


class FrameError(DeviceError):
    """The stream does not carry frames: cut off, too long, or not a JSON object."""


def write(stream: IO[bytes], message: Mapping[str, Any]) -> None:
    """Send one message and flush. Raises FrameError when it is longer than LIMIT_BYTES."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > LIMIT_BYTES:
        raise FrameError("message too long", f"{len(body)} bytes", f"{LIMIT_BYTES} bytes")
    stream.write(_HEADER.pack(len(body)) + body)
    stream.flush()


def read(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message, or None at a clean end. Blocks. Raises FrameError."""
    header = stream.read(_HEADER.size)
    if not header:
        return None
    if len(header) < _HEADER.size:
        raise FrameError("message cut off in its length", header)
    (length,) = _HEADER.unpack(header)
    if length > LIMIT_BYTES:
        raise FrameError(
            "message too long, or text where a message belongs",
            f"{length} bytes, beginning {header!r}",
            f"{LIMIT_BYTES} bytes",
        )
    body = stream.read(length)
    if len(body) < length:
        raise FrameError("message cut off", f"{len(body)} of {length} bytes")
    try:
        message = json.loads(body)
    except ValueError as error:
        raise FrameError("message is not JSON", str(error)) from None
    if not isinstance(message, dict):
        raise FrameError("message is not a JSON object", type(message).__name__)
    return message

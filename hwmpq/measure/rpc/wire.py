"""What TVM's RPC says before a session begins, with deadlines: handshake, tracker messages.

Source: tvm.rpc.base, tvm.rpc.server and tvm.rpc.tracker of TVM 0.27. Every function here raises
OSError: for silence, a closed connection, and anything that is not the protocol.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any, Self

MAGIC, MISMATCH, TRACKER_MAGIC = 0xFF271, 0xFF273, 0x2F271
#: Longest key and tracker message, in bytes.
KEY_BYTES, LIMIT_BYTES = 256, 1 << 20
#: Seconds until a tracker must have answered what it can answer at once.
ANSWER_S = 5.0
_SUCCESS, _PUT, _REQUEST, _UPDATE_INFO, _SUMMARY, _PENDING = 0, 3, 4, 5, 6, 7
_PAIR, _WORD = struct.Struct("<ii"), struct.Struct("<i")

Place = tuple[str, int]


def place(text: str) -> Place:
    """'HOST:PORT' -> (host, port)."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def receive(sock: socket.socket, nbytes: int, until: float) -> bytes:
    """Exactly so many bytes before `until`, a time of time.monotonic()."""
    data = b""
    while len(data) < nbytes:
        sock.settimeout(max(until - time.monotonic(), 1e-3))
        piece = sock.recv(nbytes - len(data))
        if not piece:
            raise ConnectionError("closed by the other side")
        data += piece
    return data


def greet(sock: socket.socket, ticket: str, key: str, until: float) -> None:
    """The server's part of the handshake. ticket: what the client must name; key: who we are."""
    magic, length = _PAIR.unpack(receive(sock, _PAIR.size, until))
    if magic != MAGIC or not 0 < length <= KEY_BYTES:
        raise ConnectionError(f"no client of TVM's RPC: began with {magic:#x}, {length} bytes")
    told = receive(sock, length, until).decode(errors="replace").split()
    if told[:1] != [f"client:{ticket}"]:
        sock.sendall(_WORD.pack(MISMATCH))
        raise ConnectionError("named another key")
    own = f"server:{key}".encode()
    sock.sendall(_PAIR.pack(MAGIC, len(own)) + own)
    sock.settimeout(None)


class Tracker:
    """A connection to TVM's tracker."""

    def __init__(self, address: Place):
        self._sock = socket.create_connection(address, ANSWER_S)
        try:
            self._sock.sendall(_WORD.pack(TRACKER_MAGIC))
            answer = receive(self._sock, _WORD.size, time.monotonic() + ANSWER_S)
            if answer != _WORD.pack(TRACKER_MAGIC):
                raise ConnectionError("not a tracker")
        except OSError:
            self._sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The tracker forgets what this connection offered."""
        self._sock.close()

    def register(self, key: str, port: int) -> None:
        """Say who will offer itself on this connection."""
        self._done([_UPDATE_INFO, {"key": f"server:{key}", "addr": [None, port]}])

    def offer(self, key: str, port: int, ticket: str) -> None:
        """Offer one session to whoever names the ticket."""
        self._done([_PUT, key, [port, ticket], None])

    def pending(self) -> list[str]:
        """The tickets that were offered and have not been handed out."""
        return [str(ticket) for ticket in self._list(self._ask([_PENDING]))]

    def servers(self, key: str) -> tuple[list[Place], list[str]]:
        """Where the servers of that key are, busy or free; and every key that is there."""
        code, told = self._list(self._ask([_SUMMARY]), 2)
        if code != _SUCCESS or not isinstance(told, dict):
            raise ConnectionError("the tracker's summary is none")
        found: list[Place] = []
        keys: set[str] = set()
        for entry in self._list(told.get("server_info")):
            name = str(entry.get("key", "")).removeprefix("server:")
            keys.add(name)
            if name == key:
                host, port = self._list(entry.get("addr"), 2)
                found.append((str(host), int(port)))
        return found, sorted(keys)

    def request(self, key: str, patience_s: float) -> tuple[Place, str]:
        """A free server and its ticket, as soon as there is one."""
        code, value = self._list(self._ask([_REQUEST, key, "", 1], patience_s), 2)
        host, port, ticket = self._list(value, 3)
        if code != _SUCCESS:
            raise ConnectionError(f"the tracker refused with {code}")
        return (str(host), int(port)), str(ticket)

    def _done(self, message: list[Any]) -> None:
        if self._ask(message) != _SUCCESS:
            raise ConnectionError("the tracker refused")

    def _ask(self, message: list[Any], patience_s: float | None = None) -> Any:
        until = time.monotonic() + (ANSWER_S if patience_s is None else patience_s)
        body = json.dumps(message).encode()
        self._sock.sendall(_WORD.pack(len(body)) + body)
        (length,) = _WORD.unpack(receive(self._sock, _WORD.size, until))
        if not 0 < length <= LIMIT_BYTES:
            raise ConnectionError(f"a message of {length} bytes from the tracker")
        try:
            return json.loads(receive(self._sock, length, until))
        except (ValueError, RecursionError):
            raise ConnectionError("the tracker's answer is not JSON") from None

    @staticmethod
    def _list(value: Any, length: int | None = None) -> list[Any]:
        if not isinstance(value, list) or length not in (None, len(value)):
            raise ConnectionError(f"an answer of another form from the tracker: {value!r:.80}")
        return value

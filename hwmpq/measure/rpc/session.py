"""One session of the server, in a process of its own: `python -m hwmpq.measure.rpc.session FD`.

Beside TVM's own functions for files and modules the client finds three, with which it runs one
command here and is its terminal: a session has the rights of whoever started the server.

| function    | does                                                                       |
|-------------|----------------------------------------------------------------------------|
| hwmpq.start | run this line in a shell                                                   |
| hwmpq.say   | write bytes to its stdin; none = close it                                  |
| hwmpq.hear  | b'' = nothing for a while, b'o...' its stdout, b'e...' its stderr, b'x...' |
|             | its exit status, after all that it said                                    |
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

from hwmpq import toolchain

#: How long `hear` waits; also how soon a client that went away is noticed, in seconds.
WAIT_S = 1.0
_PIECE_BYTES = 1 << 18


class Command:
    """The one command of a session."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def start(self, line: str) -> None:
        """python3 is, where nobody says otherwise, the one that the server runs on."""
        folder = os.path.dirname(sys.executable)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PATH", "")]))
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            str(line), shell=True, env={**os.environ, "PATH": path},
            stdin=pipe, stdout=pipe, stderr=pipe,
        )  # fmt: skip
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def say(self, data: Any) -> None:
        """data: bytes, of TVM's own type."""
        if self._process is None or self._process.stdin is None:
            raise RuntimeError("no command has been started")
        with contextlib.suppress(BrokenPipeError, ValueError):  # that it ended is heard
            self._process.stdin.write(bytes(data))
            self._process.stdin.flush()
            if not len(data):
                self._process.stdin.close()

    def hear(self) -> bytes:
        try:
            return self._said.get(timeout=WAIT_S)
        except queue.Empty:
            return b""

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None and process.stderr is not None
        errors = threading.Thread(target=self._pump, args=(process.stderr, b"e"), daemon=True)
        errors.start()
        self._pump(process.stdout, b"o")
        errors.join()
        code = process.wait()
        self._said.put(b"x%d" % (code if code >= 0 else 128 - code))

    def _pump(self, stream: IO[bytes], kind: bytes) -> None:
        while data := stream.read1(_PIECE_BYTES):  # type: ignore[attr-defined]
            self._said.put(kind + data)


def main(words: Sequence[str]) -> None:
    """Serve the connection until the client leaves; the command then sees its pipes close."""
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    with toolchain.without_torch():
        import tvm_ffi
        from tvm.rpc import _ffi_api, server

    command = Command()
    for name in ("start", "say", "hear"):
        tvm_ffi.register_global_func(f"hwmpq.{name}", getattr(command, name))
    folder = server._server_env("")
    os.chdir(folder.temp_dir)
    _ffi_api.ServerLoop(int(words[0]))


if __name__ == "__main__":
    main(sys.argv[1:])

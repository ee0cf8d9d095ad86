"""`python -m hwmpq.measure.rpc.client HOST:PORT LINE`: runs the line on the device, as ssh would.

stdin, stdout, stderr and the exit status are those of the line; 255 = no connection, or it was
lost. The key comes in the environment. TVM's calls cannot be cut short, so whoever starts this
kills it at a deadline.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from typing import Any

from hwmpq import toolchain
from hwmpq.measure.rpc import wire

#: Name of the setting that holds the key, or the tracker's ticket.
KEY = "HWMPQ_RPC_KEY"
#: Exit status for a connection that failed, as of ssh.
LOST = 255
_PIECE_BYTES = 1 << 18
#: Before the device is asked whether its worker spoke, our side gets this long to say more. Whoever
#: was answered mostly does; and while nobody speaks, the device is woken only once a second.
_TURN_S = 0.01


def main(words: Sequence[str]) -> int:
    """The program; returns its exit code."""
    (host, port), line = wire.place(words[0]), words[1]
    sink = os.dup(1)
    os.dup2(2, 1)  # stray prints of libraries
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    with toolchain.without_torch():
        from tvm import rpc

    try:
        session = rpc.connect(host, port, os.environ.pop(KEY, ""))
        start, say, hear = map(session.get_function, ("hwmpq.start", "hwmpq.say", "hwmpq.hear"))
    except AttributeError:
        return _lost(words[0], "no server of hwmpq's: start it by `hwmpq devices serve`")
    except Exception as error:
        return _lost(words[0], error)
    try:
        start(line)
        return _carry(say, hear, sink)
    except Exception as error:
        return _lost(words[0], error)


def _carry(say: Any, hear: Any, sink: int) -> int:
    """Be the line's terminal until it ends; returns its exit status."""
    more = True
    while True:
        while more and select.select([0], [], [], _TURN_S)[0]:
            data = os.read(0, _PIECE_BYTES)
            say(data)
            more = bool(data)
        said = bytes(hear())
        kind, data = said[:1], said[1:]
        if kind == b"x":
            return int(data)
        while data:
            data = data[os.write(sink if kind == b"o" else 2, data) :]


def _lost(address: str, error: object) -> int:
    print(f"{address}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    return LOST


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # a connection that was lost cannot be closed properly

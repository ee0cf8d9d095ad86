"""TVM's tracker in this process, on a socket of ours: it hands servers' tickets to clients."""

from __future__ import annotations

import os
import secrets
import socket
import sys

from hwmpq.errors import InputError


def serve(listening: socket.socket) -> None:
    """Until interrupted. Raises InputError without tornado, which TVM's tracker runs on."""
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # as in `session`
    try:
        from tvm.rpc import tracker
    except ImportError as error:
        raise InputError(
            "TVM's tracker needs tornado", str(error).splitlines()[0],
            next="Run: pip install 'hwmpq[rpc]'",
        ) from None  # fmt: skip
    with listening:
        tracker._tracker_server(listening, secrets.token_hex(16))

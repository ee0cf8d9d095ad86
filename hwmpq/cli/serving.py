"""Offering this machine to others, and the tracker where they find it; needs no typer."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import InputError

SERVER_PORT, TRACKER_PORT = 9091, 9190
#: The longest session, in seconds.
SESSION_S = 3600.0


def serve_machine(
    key: str, tracker: str, host: str, port: int, session_s: float, trusted: bool
) -> Answer:
    """Run a server until interrupted. Raises InputError, DeviceError for a port that is taken."""
    from hwmpq.measure.rpc import wire
    from hwmpq.measure.rpc.server import Server, check_host

    check_host(host, trusted)
    try:
        address = wire.place(tracker) if tracker else None
    except ValueError:
        raise InputError("--tracker", tracker, "HOST:PORT") from None
    server = Server(key, host, port, address, session_s, _log)
    where = f", offered at {tracker}" if tracker else ""
    _log(f"serving {key!r} on {host}:{server.port}{where}")
    _until_stopped(server.serve)
    return Answer({"version": VERSION, "host": host, "port": server.port, "key": key})


def run_tracker(host: str, port: int, trusted: bool) -> Answer:
    """Run TVM's tracker until interrupted. Raises as `serve_machine`."""
    from hwmpq.measure.rpc import tracker
    from hwmpq.measure.rpc.server import check_host, listen

    check_host(host, trusted)
    listening = listen(host, port)
    port = listening.getsockname()[1]
    _log(f"tracker on {host}:{port}")
    _until_stopped(lambda: tracker.serve(listening))
    return Answer({"version": VERSION, "host": host, "port": port})


def _until_stopped(body: Callable[[], None]) -> None:
    """Ctrl-C and a polite kill are its proper end."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        body()
    except KeyboardInterrupt:
        _log("stopped")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""The worker program `python -m hwmpq.measure.worker [NAME=VALUE ...]`: frames on stdin, stdout.

Settings on the command line enter the environment before anything heavy is imported, so they hold
behind any command prefix (`ssh HOST`, `qemu-aarch64`, ...). A request is {"op", "payload"}; the
answer is any number of {"progress": ...}, then {"result": ...} or {"failed": {type, text, trace}}.

| op   | payload                                             | result                            |
|------|-----------------------------------------------------|-----------------------------------|
| ping | anything                                            | {"pid"}                           |
| time | see `hwmpq.measure.timing.run_block`                | {"cells": [...]}                  |
| call | {"function": "hwmpq.module:name", "payload": {...}} | the dict that name(payload) gives |
"""

from __future__ import annotations

import faulthandler
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hwmpq.errors import InputError, UnknownName
from hwmpq.measure import frames, onsite
from hwmpq.measure.public import public_function

Progress = Callable[[Mapping[str, Any]], None]


def ping(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Proof of life."""
    return {"pid": os.getpid()}


def time(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Time a block of cells."""
    from hwmpq.measure.timing import run_block

    return run_block(payload, progress)


def call(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Run a public function that is defined in this package: dict in, dict out.

    Raises InputError for anything outside the package.
    """
    path = str(payload["function"])
    result = public_function(path)(payload.get("payload", {}))
    if not isinstance(result, dict):
        raise InputError(f"{path} must return a dict", type(result).__name__)
    return result


OPS: dict[str, Callable[[Mapping[str, Any], Progress], dict[str, Any]]] = {
    "ping": ping,
    "time": time,
    "call": call,
}


def answer(request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Run one request; an exception becomes a {"failed": ...} answer."""
    try:
        name = str(request.get("op"))
        if name not in OPS:
            raise UnknownName("op", name, OPS)
        return {"result": OPS[name](request.get("payload", {}), progress)}
    except Exception as error:
        kind, trace = type(error).__name__, traceback.format_exc()
        return {"failed": {"type": kind, "text": str(error), "trace": trace}}


def main(settings: Sequence[str]) -> None:
    """Serve until the parent closes our stdin; also dies in mid-op when the parent is gone."""
    os.environ.update(dict(item.split("=", 1) for item in settings))
    onsite.sweep()
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # stray prints of libraries go to stderr, not between the frames
    faulthandler.enable()
    threading.Thread(target=_exit_with_parent, args=(source.fileno(),), daemon=True).start()
    while (request := frames.read(source)) is not None:
        reply = answer(request, lambda note: frames.write(sink, {"progress": note}))
        try:
            frames.write(sink, reply)
        except (frames.FrameError, TypeError, ValueError) as error:
            failure = {"type": type(error).__name__, "text": str(error), "trace": ""}
            frames.write(sink, {"failed": failure})
    onsite.leave()


def _exit_with_parent(descriptor: int) -> None:
    """Wait, without ever waking up, until the other end of the pipe is closed."""
    poll = select.poll()
    poll.register(descriptor, select.POLLHUP)
    poll.poll()
    onsite.leave()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])

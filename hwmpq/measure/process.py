"""The parent's handle on a worker program: start, call with a deadline, survive its death."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from hwmpq.errors import DeviceError, WorkerCrashed, WorkerFailed, WorkerTimeout
from hwmpq.measure import frames

_STDERR_LINES = 30
_ROOT = Path(__file__).resolve().parents[2]


class WorkerProcess:
    """One worker, started at the first call and again after a crash; one call at a time.

    prefix: a command that runs the rest somewhere else (`("ssh", "board")`). threads: size of TVM's
    thread pool, fixed for the life of the process. env: further settings of the child. log: gets
    every line of its stderr. python: the interpreter there.
    """

    def __init__(
        self,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log: Callable[[str], None] | None = None,
        *,
        threads: int = 1,
        python: str = sys.executable,
    ):
        self.settings = {
            "TVM_NUM_THREADS": str(threads),
            "OMP_NUM_THREADS": str(threads),
            "TVM_BIND_THREADS": os.environ.get("TVM_BIND_THREADS", "0"),
            **(env or {}),
        }
        pairs = [f"{name}={value}" for name, value in self.settings.items()]
        # -P: the current folder is not searched for modules
        self.command = [*prefix, python, "-P", "-m", "hwmpq.measure.worker", *pairs]
        self._env = {**os.environ, **self.settings}
        if not prefix:  # here, it is the same hwmpq as ours, installed or not
            paths = [str(_ROOT), self._env.get("PYTHONPATH", "")]
            self._env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        #: What a worker reads before its first request.
        self.preamble = b""
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._reader: threading.Thread | None = None
        self._lock = threading.Lock()
        self._greeted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def call(
        self,
        op: str,
        payload: Mapping[str, Any],
        deadline_s: float,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Run an op and return its result. Each progress frame starts the deadline anew.

        Raises WorkerTimeout, WorkerCrashed, WorkerFailed, FrameError.
        """
        with self._lock:
            process = self._start()
            try:
                return self._converse(process, op, payload, deadline_s, on_progress)
            except WorkerFailed:
                raise
            except BaseException:
                self._end(process, 0.0)
                raise

    def close(self) -> None:
        """End the worker, gently at first. The next call starts a new one."""
        if self._process is not None:
            self._end(self._process, 2.0)

    @property
    def running(self) -> bool:
        """Is there a worker? Else the next call starts one."""
        return self._process is not None and self._process.poll() is None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        if self._process is not None:
            self._end(self._process, 0.0)
        self._stderr.clear()
        try:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._env,
                start_new_session=True,  # its own process group: killing reaches its children too
            )
        except OSError as error:
            raise DeviceError(
                f"cannot start the worker by {self.command[0]}", error.strerror
            ) from None
        self._reader = threading.Thread(target=self._drain, args=(process.stderr,), daemon=True)
        self._reader.start()
        self._process = process
        self._greeted = False
        return process

    def _converse(
        self,
        process: subprocess.Popen[bytes],
        op: str,
        payload: Mapping[str, Any],
        deadline_s: float,
        on_progress: Callable[[dict[str, Any]], None] | None,
    ) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        with _Watchdog(process, deadline_s) as watchdog:
            with contextlib.suppress(BrokenPipeError):  # its death is seen by the read below
                if not self._greeted:
                    process.stdin.write(self.preamble)
                    self._greeted = True
                frames.write(process.stdin, {"op": op, "payload": payload})
            while (message := _read(process.stdout, watchdog)) is not None:
                watchdog.restart()
                if "progress" not in message:
                    break
                if on_progress is not None:
                    on_progress(_part(message, "progress"))
        if message is None:
            raise self._obituary(process, op, watchdog)
        if "failed" in message:
            failure = _part(message, "failed")
            words = (str(failure.get(name, "")) for name in ("type", "text", "trace"))
            raise WorkerFailed(op, *words)
        return _part(message, "result")

    def _obituary(
        self, process: subprocess.Popen[bytes], op: str, watchdog: _Watchdog
    ) -> DeviceError:
        """Why there will be no answer."""
        self._end(process, 5.0)
        last = "\n".join(self._stderr)
        if watchdog.fired:
            return WorkerTimeout(f"no answer to {op!r}", f"{watchdog.deadline_s:g} s", next=last)
        code = process.returncode
        number = -code if code < 0 else code - 128  # a shell or ssh reports signals as 128 + n
        try:
            return WorkerCrashed(signal.Signals(number).name, last)
        except ValueError:
            return WorkerCrashed(f"exit status {code}", last)

    def _end(self, process: subprocess.Popen[bytes], patience_s: float) -> None:
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()  # the worker leaves when it sees this
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        _kill(process)
        process.wait()
        if self._reader is not None:
            self._reader.join(2.0)
        if process.stdout is not None:
            process.stdout.close()
        self._process = None

    def _drain(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                text = line.decode(errors="replace").rstrip()
                self._stderr.append(text)
                if self._log is not None:
                    self._log(text)


class _Watchdog:
    """Kills a process after `deadline_s` seconds without a restart; a blocked read then ends."""

    def __init__(self, process: subprocess.Popen[bytes], deadline_s: float):
        self.process = process
        self.deadline_s = deadline_s
        self.fired = False
        self._timer = threading.Timer(deadline_s, self._fire)

    def __enter__(self) -> _Watchdog:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def restart(self) -> None:
        self._timer.cancel()
        self._timer = threading.Timer(self.deadline_s, self._fire)
        self._timer.start()

    def _fire(self) -> None:
        self.fired = True
        _kill(self.process)


def _read(stream: IO[bytes], watchdog: _Watchdog) -> dict[str, Any] | None:
    try:
        return frames.read(stream)
    except frames.FrameError:
        if watchdog.fired or watchdog.process.poll() is not None:
            return None  # cut off by its death
        raise


def _part(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object in a message. Raises FrameError where there is none."""
    part = message.get(name)
    if not isinstance(part, dict):
        raise frames.FrameError(f"answer without its {name}", type(part).__name__, "an object")
    return part


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)

"""The server on a device: offers itself, at a tracker or alone, and gives each client a session.

It speaks TVM's protocol and nothing that a client does ends it: handshakes have a deadline, a
session is a process of its own. At a tracker one ticket at a time is valid, and its holder may have
several sessions; the next one is offered when all of them have ended. A server alone takes all that
come, and the lock that every timing holds keeps them apart.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hwmpq.errors import DeviceError, InputError
from hwmpq.measure.rpc import wire

#: A client must have said who it is within this time, in seconds.
HANDSHAKE_S = 3.0
#: A ticket that was handed out but not used for so long is replaced by a new one.
UNUSED_S = 4.0
#: How often the tracker is looked at.
_PERIOD_S = 1.0
#: Seconds without an answer until a client's machine is taken for dead: idle, interval, tries.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
_ROOT = Path(__file__).resolve().parents[3]


def check_host(host: str, trusted: bool) -> None:
    """Raises InputError for an address that others reach, unless the network is trusted."""
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host == "localhost"
    if not (inside or trusted):
        raise InputError(
            "address to listen on", host, "127.0.0.1, ::1, localhost",
            "RPC lets whoever reaches the port run programs here: use an ssh tunnel "
            "(docs/guides/devices.md), or add --trust-network.",
        )  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any. Raises DeviceError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        next = "Try another --port."
        raise DeviceError(f"cannot listen on {host}:{port}", error, next=next) from None


class Server:
    """port: where it listens. key: what clients and the tracker know it by; tracker: its address,
    None = alone. session_s: the longest session; log: gets a line for everything that happens."""

    def __init__(
        self, key: str, host: str = "127.0.0.1", port: int = 0, tracker: wire.Place | None = None,
        session_s: float = 3600.0, log: Callable[[str], None] = lambda line: None,
    ):  # fmt: skip
        self.key, self.session_s, self.log = key, session_s, log
        self._socket = listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._tracker = None if tracker is None else _Offer(self, tracker)
        self._stopped = threading.Event()
        self._sessions: set[subprocess.Popen[bytes]] = set()
        self._running, self._counting = 0, threading.Lock()

    def serve(self) -> None:
        """Until `stop`."""
        try:
            while not self._stopped.is_set():
                ticket = self._ticket()
                if self._tracker is not None and not ticket:
                    self._stopped.wait(_PERIOD_S)
                elif select.select([self._socket], [], [], _PERIOD_S)[0]:
                    self._accept(ticket)
        finally:
            self._socket.close()
            if self._tracker is not None:
                self._tracker.withdraw()
            self.stop()

    def stop(self) -> None:
        """End the server and its sessions, from another thread."""
        self._stopped.set()
        for process in list(self._sessions):
            _kill(process)

    def _ticket(self) -> str:
        """What a client must name now; '' = there is nothing to name."""
        if self._tracker is None:
            return self.key
        return self._tracker.ticket if self._running else self._tracker.renewed()

    def _accept(self, ticket: str) -> None:
        try:
            connection, address = self._socket.accept()
        except OSError as error:  # it has gone again, or there are too many open files
            self.log(f"nobody taken: {error}")
            return
        with connection:
            self._welcome(connection, address[0], ticket)

    def _welcome(self, connection: socket.socket, who: str, ticket: str) -> None:
        try:
            wire.greet(connection, ticket, self.key, time.monotonic() + HANDSHAKE_S)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        except OSError as error:
            self.log(f"{who} turned away: {error}")
            return
        with self._counting:
            self._running += 1
        threading.Thread(target=self._attend, args=(connection.dup(), who)).start()

    def _attend(self, connection: socket.socket, who: str) -> None:
        try:
            self._session(connection, who)
        finally:
            with self._counting:
                self._running -= 1
                if self._tracker is not None and not self._running:
                    self._tracker.ticket = ""

    def _session(self, connection: socket.socket, who: str) -> None:
        self.log(f"session of {who} begins")
        number = connection.fileno()
        command = [sys.executable, "-P", "-m", "hwmpq.measure.rpc.session", str(number)]
        paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        with connection:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[number],
                env={**os.environ, "PYTHONPATH": paths}, start_new_session=True,
            )  # fmt: skip
        self._sessions.add(process)
        limit = threading.Timer(self.session_s, _kill, [process])
        limit.start()
        code = process.wait()
        limit.cancel()
        _kill(process)  # what it had started
        self._sessions.discard(process)
        self.log(f"session of {who} ends" + (f" with status {code}" if code else ""))


class _Offer:
    """What the tracker knows of a server. ticket: of the next session, '' = none is offered."""

    def __init__(self, server: Server, address: wire.Place):
        self.ticket = ""
        self._server, self._address = server, address
        self._connection: wire.Tracker | None = None
        self._seen = 0.0

    def renewed(self) -> str:
        """The ticket that is valid now; a tracker that cannot be reached is tried again."""
        try:
            self._renew()
        except OSError as error:
            self._server.log(f"tracker {self._address[0]}:{self._address[1]}: {error}")
            self.withdraw()
        return self.ticket

    def withdraw(self) -> None:
        """Leave the tracker, which hands out none of our tickets any more."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self.ticket = None, ""

    def _renew(self) -> None:
        now = time.monotonic()
        if self._connection is None:
            self._connection = wire.Tracker(self._address)
            self._connection.register(self._server.key, self._server.port)
        if self.ticket and self.ticket in self._connection.pending():
            self._seen = now
        elif not self.ticket or now - self._seen > UNUSED_S:
            self.ticket = f"{self._server.key}:{secrets.token_hex(8)}"
            self._connection.offer(self._server.key, self._server.port, self.ticket)
            self._seen = now


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)

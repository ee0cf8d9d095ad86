"""A worker on whichever server of a device is fit for use: lease, probe, retry, quarantine."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hwmpq import targets
from hwmpq.devices import Device
from hwmpq.errors import DeviceError, WorkerCrashed, WorkerFailed
from hwmpq.measure import probe
from hwmpq.measure.process import WorkerProcess
from hwmpq.measure.protocol import CellTiming, Protocol
from hwmpq.measure.remote import RemoteWorker
from hwmpq.measure.rpc import client, wire

#: Deadlines in seconds: for a server that is fit for use; for connecting to one and starting its
#: worker; for its answer to the probe. What follows has those of every worker.
LEASE_S, CONNECT_S, PROBE_S = 60.0, 20.0, 30.0
#: A request at most so often on another server, because one was lost.
_TRIES = 6
#: Seconds that a server rests after its first failure; each one after that makes it four times.
REST_S, _MAX_REST_S = 1.0, 300.0
_PERIOD_S = 0.2


@dataclass
class Record:
    """What is held against a server: failures in a row, the last one's reason, and until when (of
    time.monotonic()) it is left alone."""

    failures: int
    until: float
    reason: str


class Pool:
    """The servers behind a device's address. All workers of this process share what is known."""

    def __init__(self, device: str, address: str, tracker: str, key: str):
        self.device, self.address, self.tracker, self.key = device, address, tracker, key
        self.records: dict[wire.Place, Record] = {}
        #: Leased server -> its ticket, and how many of our workers are there with it.
        self.held: dict[wire.Place, tuple[str, int]] = {}

    def lease(self, until: float) -> tuple[wire.Place, str]:
        """A server that is not resting, and its ticket. Raises DeviceError when there will be none
        before `until`; one look is always taken.

        Workers of one process share a server: replicas then time on the same machine.
        """
        while True:
            for place, (ticket, count) in self.held.items():
                if self._rested(place) < time.monotonic():
                    self.held[place] = (ticket, count + 1)
                    return place, ticket
            earliest = time.monotonic() + _PERIOD_S
            try:
                places, keys = self._places()
                rested = {place: self._rested(place) for place in places}
                if any(end < time.monotonic() for end in rested.values()):
                    place, ticket = self._request(until)
                    if self._rested(place) < time.monotonic():
                        self.held[place] = (ticket, 1)
                        return place, ticket
                    continue  # it offers itself again when nobody comes
                earliest = max(earliest, min(rested.values(), default=0.0))
                reason = "all rest after failures" if places else f"there: {', '.join(keys)}"
            except TimeoutError:
                reason = "all are in use, or the tracker is silent"
            except OSError as error:
                reason = f"the tracker: {error}"
            if earliest > until:
                raise self._nobody(reason)
            time.sleep(max(earliest - time.monotonic(), 0.0))

    def release(self, place: wire.Place) -> None:
        """A worker has left it."""
        ticket, count = self.held.pop(place, ("", 0))
        if count > 1:
            self.held[place] = (ticket, count - 1)

    def failed(self, place: wire.Place, error: DeviceError) -> None:
        """It rests, longer each time."""
        before = self.records.get(place)
        failures = before.failures + 1 if before else 1
        rest = min(REST_S * 4 ** (failures - 1), _MAX_REST_S)
        last = error.next.strip().splitlines()[-1:]  # of what the worker said on stderr
        reason = ": ".join([error.what, *([] if error.got is None else [str(error.got)]), *last])
        self.records[place] = Record(failures, time.monotonic() + rest, reason)

    def worked(self, place: wire.Place) -> None:
        """Nothing is held against it any more."""
        self.records.pop(place, None)

    def _places(self) -> tuple[list[wire.Place], list[str]]:
        if self.address:
            return [wire.place(self.address)], []
        with wire.Tracker(wire.place(self.tracker)) as tracker:
            return tracker.servers(self.key)

    def _request(self, until: float) -> tuple[wire.Place, str]:
        if self.address:
            return wire.place(self.address), self.key
        with wire.Tracker(wire.place(self.tracker)) as tracker:
            patience_s = max(until - time.monotonic(), wire.ANSWER_S)
            return tracker.request(self.key, patience_s)

    def _rested(self, place: wire.Place) -> float:
        record = self.records.get(place)
        return record.until if record else 0.0

    def _nobody(self, reason: str) -> DeviceError:
        known = "; ".join(
            f"{host}:{port} failed {record.failures} times, last: {record.reason}"
            for (host, port), record in self.records.items()
        )
        where = self.address or f"key {self.key!r} at {self.tracker}"
        return DeviceError(
            f"no server of device {self.device} is fit for use ({where})",
            "; ".join(filter(None, [reason, known])),
            next="Start one with `hwmpq devices serve`, or look there why it fails.",
        )


@functools.cache
def pool(device: str, address: str, tracker: str, key: str) -> Pool:
    """The one pool of that description."""
    return Pool(device, address, tracker, key)


class PoolWorker(RemoteWorker):
    """As RemoteWorker; each worker is that of a leased server, which has computed and timed a
    kernel with a known answer.

    A server that fails rests, and the request goes to another. What fails in the same place on two
    of them is the request's fault, not theirs. patience_s: how long
    a server is looked for; place: that of the lease.
    """

    def __init__(
        self, device: Device, log: Callable[[str], None] | None = None, *, threads: int = 1,
        patience_s: float = LEASE_S,
    ):  # fmt: skip
        super().__init__(device, log, threads=threads)
        self.patience_s = patience_s
        self.pool = pool(device.name, device.address, device.tracker, device.key)
        self.threads = threads
        self.place: wire.Place | None = None

    def call(
        self,
        op: str,
        payload: Mapping[str, Any],
        deadline_s: float,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def note(progress: dict[str, Any]) -> None:
            seen.clear()
            seen.update(progress)
            if on_progress is not None:
                on_progress(progress)

        blamed: set[Any] = set()
        reason: object = None
        for _ in range(_TRIES):
            self._lease()
            seen.clear()
            try:
                answer = super().call(op, payload, deadline_s, note)
            except WorkerFailed:
                raise
            except DeviceError as error:
                self._failed(error)
                if seen.get("key") in blamed and not _is_lost(error):
                    raise
                if not _is_lost(error):
                    blamed.add(seen.get("key"))
                reason = error.got
            else:
                if self.place is not None:
                    self.pool.worked(self.place)
                return answer
        raise DeviceError(
            f"device {self.device.name} was lost {_TRIES} times", reason,
            next="See `hwmpq devices`; then the same command again: it goes on.",
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        self._lease()
        return super().describe()

    def close(self) -> None:
        place, self.place = self.place, None
        if place is not None:
            self.pool.release(place)
        super().close()

    def _lease(self) -> None:
        """Have a worker on a server that passed the probe. Raises DeviceError."""
        until = time.monotonic() + self.patience_s
        while not self.running:
            self.close()
            (host, port), ticket = self.pool.lease(until)
            self.place = (host, port)
            there = replace(self.device, tracker="", address=f"{host}:{port}")
            self.command = there.command(self.arguments)
            self._env[client.KEY] = ticket
            try:
                WorkerProcess.call(self, "ping", {}, CONNECT_S)
                super().describe()
                self._probe()
            except DeviceError as error:
                self._failed(error)

    def _probe(self) -> None:
        target = targets.load(self.device.target).tvm if self.device.target else {"kind": "llvm"}
        plan = Protocol(rounds=1, epoch_s=1e-4, threads=self.threads, pin=False)
        with tempfile.TemporaryDirectory(prefix="hwmpq-") as folder:
            cell = probe.make(Path(folder), target)
            request = {"cells": [cell.to_json()], **plan.to_json()}
            (reply,) = super().call("time", request, PROBE_S)["cells"]
        if error := CellTiming.from_json(reply).error:
            raise DeviceError("the probe failed", error)

    def _failed(self, error: DeviceError) -> None:
        place = self.place
        with suppress(OSError):
            self.close()
        if place is not None:
            self.pool.failed(place, error)


def _is_lost(error: DeviceError) -> bool:
    """Was it the connection, not the worker behind it?"""
    return isinstance(error, WorkerCrashed) and error.cause == f"exit status {client.LOST}"

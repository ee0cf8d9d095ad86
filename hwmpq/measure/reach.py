"""The worker on a device that is not this machine, whatever the transport."""

from __future__ import annotations

from hwmpq.devices import Device
from hwmpq.measure.remote import RemoteWorker
from hwmpq.measure.rpc.pool import LEASE_S, PoolWorker


def reach(device: Device, *, threads: int = 1, patience_s: float = LEASE_S) -> RemoteWorker:
    """Nothing is connected before the first call. patience_s: how long a free server is waited for,
    where there are servers."""
    if device.transport == "rpc":
        return PoolWorker(device, threads=threads, patience_s=patience_s)
    return RemoteWorker(device, threads=threads)

"""What else the machine was doing while we timed: one lock, one core, and the gates of an epoch.

Linux counters; where the system has none of them, the reading is 0 and the gate stays open.
"""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: An epoch is thrown away when more than this share of it was stolen by the hypervisor ...
MAX_STEAL = 0.01
#: ... or spent off the core although it had work (one thread) ...
MAX_AWAY = 0.01
#: ... or (several threads, whose waiting cannot be told from preemption) when tasks anywhere on the
#: machine stood in line for a core for more than this share of it, or it was switched out oftener.
MAX_PRESSURE = 0.05
MAX_SWITCHES_PER_S = 100.0
#: A short piece of work takes so many times its least seconds, or less, on a core of one's own. (A
#: neighbour on the same physical core, as on a rented machine, was seen to make it 1.8 to 2.)
ALONE = 1.25
_ITERATIONS = 600
_least_s = float("inf")


@contextlib.contextmanager
def machine_lock(waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the machine-wide lock, so that two timings never overlap. waiting: called every 2 s."""
    import fcntl

    descriptor = _open_lock(lock_path())
    try:
        tries = 0
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if tries % 20 == 0:
                    waiting()
                tries += 1
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def lock_path() -> Path:
    """HWMPQ_TIMING_LOCK, else one file that all share."""
    given = os.environ.get("HWMPQ_TIMING_LOCK")
    return Path(given) if given else Path(tempfile.gettempdir()) / "hwmpq-timing.lock"


def is_locked() -> bool:
    """Does somebody hold the lock at this moment?"""
    import fcntl

    descriptor = _open_lock(lock_path())
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open_lock(path: Path) -> int:
    """Read-only where it exists (it may be another user's), never through a link."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o644)


@contextlib.contextmanager
def pinned(wanted: bool) -> Iterator[int | None]:
    """Run this thread on the last allowed core; yields its number, None where not pinned."""
    if not wanted or not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)


def alone() -> bool:
    """Has this thread's core nothing else to do at this moment?

    No counter tells of a neighbour on the other hardware thread of the core, nor does a chain of
    dependent instructions, such as a hash, notice one; an interpreter's many independent ones do.
    """
    global _least_s
    began = time.perf_counter()
    total = 0
    for i in range(_ITERATIONS):
        total += i * i
    seconds = time.perf_counter() - began
    _least_s = min(_least_s, seconds)
    return seconds <= ALONE * _least_s


def wait_until_alone(patience_s: float) -> bool:
    """Wait for a moment that finds the core alone, at most patience_s; whether there was one."""
    end = time.perf_counter() + patience_s
    while not (found := alone()) and time.perf_counter() < end:
        pass
    return found


@dataclass(frozen=True)
class Counters:
    """Readings at one moment: seconds, and involuntary context switches of this process."""

    wall_s: float
    cpu_s: float
    steal_s: float
    pressure_s: float
    switches: int

    @staticmethod
    def read(core: int | None) -> Counters:
        """core: count steal of this core only; None: of all."""
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        steal_s, pressure_s = _steal_s(core), _pressure_s()
        return Counters(time.perf_counter(), time.thread_time(), steal_s, pressure_s, switches)


@dataclass(frozen=True)
class Epoch:
    """One timed epoch and what disturbed it; steal, away, pressure: shares of its wall time."""

    per_call_s: float
    steal: float
    away: float
    pressure: float
    switches: int
    bad: bool

    @staticmethod
    def between(
        before: Counters, after: Counters, seconds: float, count: int, threads: int, *,
        crowded: bool = False,
    ) -> Epoch:  # fmt: skip
        """seconds: what `count` calls took; crowded: the core was somebody else's too."""
        wall = max(after.wall_s - before.wall_s, 1e-9)
        steal = (after.steal_s - before.steal_s) / wall
        away = max(0.0, 1 - (after.cpu_s - before.cpu_s) / wall) if threads == 1 else 0.0
        pressure = (after.pressure_s - before.pressure_s) / wall
        switches = after.switches - before.switches
        # One pinned thread knows its own delay exactly: wall minus CPU time. Pressure counts every
        # queue of the machine, also those of cores that we do not use, so it only judges the rest.
        if threads > 1:
            crowded = pressure > MAX_PRESSURE or switches > 1 + MAX_SWITCHES_PER_S * wall
        bad = crowded or steal > MAX_STEAL or away > MAX_AWAY
        return Epoch(seconds / count, steal, away, pressure, switches, bad)


def _steal_s(core: int | None) -> float:
    """Time the hypervisor gave to others, from /proc/stat (resolution: one tick, 10 ms)."""
    name = "cpu " if core is None else f"cpu{core} "
    with contextlib.suppress(OSError), open("/proc/stat") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _pressure_s() -> float:
    """Time in which some task waited for a core, from /proc/pressure/cpu."""
    with contextlib.suppress(OSError), open("/proc/pressure/cpu") as file:
        return int(file.readline().rpartition("total=")[2]) * 1e-6
    return 0.0

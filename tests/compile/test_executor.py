"""Workers of --executor give what this process gives, whatever happens to them."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_sensitivity_pairs import BATCH, FORMATS, legal, net

from hwmpq import executor, sensitivity
from hwmpq.errors import DeviceError, InputError, WorkerCrashed, WorkerFailed, WorkerTimeout
from hwmpq.executor import Pool, open_pool
from hwmpq.measure import WorkerProcess
from hwmpq.measure.worker import answer
from hwmpq.quantize.calibrate import calibrate
from hwmpq.types import Sensitivity


class Mortal(WorkerProcess):
    """Killed in the middle of its first call."""

    lives = 0

    def _start(self) -> Any:
        process = super()._start()
        self.lives += 1
        if self.lives == 1:
            threading.Timer(0.2, os.kill, (process.pid, signal.SIGKILL)).start()
        return process


@pytest.fixture(scope="module")
def estimate() -> Callable[..., Sensitivity]:
    """An estimator's name, and a pool or None -> what it finds on a small network."""
    graph = net()
    x = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    quantizers = calibrate(graph, [x], [*FORMATS, "w8a8", "bf16"])

    def run(name: str, pool: Pool | None = None) -> Sensitivity:
        return sensitivity.estimate(
            name, graph, quantizers, x, torch.arange(20) % 4, formats=FORMATS,
            legal=legal(graph), batch=BATCH, pool=pool,
        )  # fmt: skip

    return run


def same(one: Sensitivity, other: Sensitivity) -> bool:
    """To the bit, and by as many runs."""
    pairs = [
        (a, b)
        for a, b in (
            (one.loss, other.loss), (one.loss_error, other.loss_error),
            (one.pair_loss, other.pair_loss), (one.pair_error, other.pair_error),
        )
        if a is not None or b is not None
    ]  # fmt: skip
    return all(
        a is not None and b is not None and np.array_equal(a, b, equal_nan=True) for a, b in pairs
    )


def test_processes_find_the_same_and_one_may_die(estimate: Callable[..., Sensitivity]) -> None:
    mortal = Mortal()
    with Pool([mortal, WorkerProcess()]) as pool:
        assert same(estimate("clado", pool), estimate("clado"))
        assert mortal.lives > 1
        assert same(estimate("clado-gn", pool), estimate("clado-gn"))


def test_ray_finds_the_same_and_an_actor_may_die(
    estimate: Callable[..., Sensitivity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of them stays on the disk."""
    ray = pytest.importorskip("ray", reason="needs hwmpq[ray]")
    monkeypatch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # its sockets need short paths
    place = tmp_path / "actors"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with open_pool("ray", WorkerProcess, answer) as pool:
            first: Any = pool.workers[0]

            def kill() -> None:
                while first._actor is None:
                    time.sleep(0.01)
                ray.kill(first._actor)

            thread = threading.Thread(target=kill)
            thread.start()
            found = estimate("clado", pool)
            thread.join()
            assert len(pool.workers) == 2
            assert same(found, estimate("clado"))
            assert any(place.iterdir())
        end = time.monotonic() + 20
        while any(place.iterdir()):
            assert time.monotonic() < end, "the actors left something"
            time.sleep(0.05)
    finally:
        ray.shutdown()


class Scripted:
    """A worker whose n-th call raises the n-th error; the others give the payload back."""

    def __init__(self, *errors: DeviceError):
        self.errors = list(errors)
        self.calls = 0

    def call(self, op: str, payload: Any, deadline_s: float) -> dict[str, Any]:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return dict(payload)

    def close(self) -> None:
        self.errors = []


def test_what_becomes_of_an_item() -> None:
    def crash() -> WorkerCrashed:
        return WorkerCrashed("SIGKILL", "")

    payloads = [{"n": n} for n in range(7)]
    workers = [Scripted(crash(), crash()), Scripted()]
    found = dict(Pool(workers).map("f", payloads, 1.0))
    assert found == {n: {"function": "f", "payload": {"n": n}} for n in range(7)}
    assert sum(worker.calls for worker in workers) == 7 + 2

    for error in (WorkerFailed("call", "ValueError", "no", ""), WorkerTimeout("no answer")):
        worker = Scripted(error)
        assert list(Pool([worker]).map("f", [{}], 1.0)) == [(0, error)]
        assert worker.calls == 1  # the same again would end the same
    worker = Scripted(*(crash() for _ in range(executor.TRIES)))
    ((_, last),) = Pool([worker]).map("f", [{}], 1.0)
    assert isinstance(last, WorkerCrashed) and worker.calls == executor.TRIES
    with pytest.raises(DeviceError, match="cannot start"):
        list(Pool([Scripted(DeviceError("cannot start the worker"))]).map("f", [{}], 1.0))


class Stuck(Scripted):
    """Does not answer before it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = threading.Event()

    def call(self, op: str, payload: Any, deadline_s: float) -> dict[str, Any]:
        self.calls += 1
        self.closed.wait(60)
        raise WorkerCrashed("exit status 0", "")

    def close(self) -> None:
        self.closed.set()


def test_a_caller_that_leaves_takes_the_workers_along() -> None:
    stuck = Stuck()
    work = Pool([stuck, Scripted()]).map("f", [{"n": n} for n in range(9)], 60.0)
    next(work)
    work.close()  # type: ignore[attr-defined]
    assert stuck.closed.is_set() and stuck.calls == 1


@pytest.mark.parametrize("word", ["", "process", "processes:0", "processes:x", "ray:3", "ray://"])
def test_words_that_mean_nothing(word: str) -> None:
    with pytest.raises(InputError, match=r"--executor: got .*allowed: serial, processes"):
        executor.check(word)


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_pool("serial", Scripted, answer) is None
    three = open_pool("processes:3", Scripted, answer)
    assert three is not None and len(three.workers) == 3
    every = open_pool("processes", Scripted, answer)
    assert every is not None and len(every.workers) == len(os.sched_getaffinity(0))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"Run: pip install 'hwmpq\[ray\]'"):
        open_pool("ray", Scripted, answer)


def test_an_actor_gives_back_what_an_item_wrote(tmp_path: Path) -> None:
    """As on a machine that does not share our disk."""
    there = tmp_path / "there"

    def writes(request: Any, _: object) -> dict[str, Any]:
        folder = Path(request["payload"]["payload"]["folder"])
        assert folder != there
        (folder / "a.so").write_bytes(b"code")
        return {"result": {"library": str(folder / "a.so"), "seconds": 1.0}}

    request = {"op": "call", "payload": {"function": "f", "payload": {"folder": str(there)}}}
    reply, files = executor._Actor(writes).call(request, {})
    assert reply == {"result": {"library": str(there / "a.so"), "seconds": 1.0}}
    assert files == {"a.so": b"code"}


def test_an_actor_fetches_a_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def get(reference: str) -> dict[str, bytes]:
        fetched.append(reference)
        return {"a.txt": reference.encode()}

    def reads(request: Any, _: object) -> dict[str, Any]:
        folders = request["payload"]["payload"]["reads"]
        return {"result": {"texts": [(Path(name) / "a.txt").read_text() for name in folders]}}

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=get))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    actor = executor._Actor(reads)
    request = {"op": "call", "payload": {"function": "f", "payload": {"reads": ["/1", "/2"]}}}
    for _ in range(2):
        reply, files = actor.call(request, {"/1": ["one"], "/2": ["two"]})
        assert reply == {"result": {"texts": ["one", "two"]}} and files == {}
    assert fetched == ["one", "two"]

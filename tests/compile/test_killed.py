"""A run that is killed in the middle, three times: nothing that was measured is lost."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import tiny_job
from tiny_job import FORMATS, quantize_tiny

from hwmpq.measure.store import Store


class Runs:
    """Runs on one store, each in a process of its own (see `tiny_job`)."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill_at(self, stage: str, item: int) -> None:
        """Start one, wait until it halts there, kill -9; its worker must end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{stage}:{item}\n")
        self.process.stdin.flush()
        pid = int(self._line())
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, signal.SIGKILL)
        assert self._line() == "ended by 9"
        _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@contextmanager
def _runs(store: Path, out: Path) -> Iterator[Runs]:
    command = [sys.executable, tiny_job.__file__, str(store), str(out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield Runs(process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end, "a worker lives on"
        time.sleep(0.05)


def _rows(store: Path) -> tuple[int, int]:
    """Timed cells, and losses with the outputs they are of, in the store, read past hwmpq."""
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
        (cells,) = connection.execute(
            "select (select count(*) from measurements)"
            " + (select count(*) from facts where stage = 'glue')"
        ).fetchone()
        (losses,) = connection.execute(
            "select count(*) from facts where stage = 'sensitivity'"
        ).fetchone()
    return cells, losses


def test_killed_three_times_nothing_is_lost(shared_worker: None, tmp_path: Path) -> None:
    store, out = tmp_path / "store.sqlite", tmp_path / "out"
    with _runs(store, out) as runs:
        runs.kill_at("profile", 4)
        early_cells, losses = _rows(store)
        assert early_cells > 0 and losses == 0
        runs.kill_at("sensitivity", 2)
        cells, losses = _rows(store)
        assert cells > early_cells and 0 < losses < 8  # that of fp32 is 0 and not kept
        runs.kill_at("compile w8a8", 0)
        assert _rows(store) == (cells, 8)
    assert not out.exists()
    finished = quantize_tiny(store=store, out=out, formats=FORMATS, latency=None)
    assert finished.json["new_timings"] == 0 and _rows(store)[0] == cells
    with Store.open(store) as opened:
        assert {row.generation for row in opened.rows()} == {1}
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert not left, "work folders of killed runs stay"

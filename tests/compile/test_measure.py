"""Timing through a real worker: good cells beside crashing, hanging and wrong ones; no times."""

from __future__ import annotations

import itertools
import math
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from hwmpq import tensors
from hwmpq.errors import DeviceError, InputError
from hwmpq.measure import gates, kernel, stats, timing
from hwmpq.measure.process import WorkerCrashed, WorkerFailed, WorkerProcess
from hwmpq.measure.protocol import (
    Cell,
    CellTiming,
    Protocol,
    is_transient,
    pairs,
    time_block,
)

QUICK = Protocol(rounds=6, epoch_s=0.001, deadline_s=30)
ROLES = ("input", "weight", "output")
SIZE = 256

PRODUCT = """
@T.prim_func(s_tir=True)
def main(a: T.Buffer(({n},), "{d}"), w: T.Buffer(({n},), "{d}"), c: T.Buffer(({n},), "{d}")):
    T.func_attr({{"global_symbol": "main", "tirx.noalias": True}})
    for i in T.serial({n}):
        c[i] = a[i] * w[i]
"""
ENTRY = "int __tvm_ffi_main(void *self, const void *args, int count, void *result)"
BAD = {
    "crash": "volatile int *nowhere = 0; *nowhere = 1; return 0;",
    "hang": "for (;;) sleep(1);",
    "exit": "_exit(3);",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """product.so and half.so from TVM, one library per BAD entry from the C compiler, arguments."""
    import tvm

    path = tmp_path_factory.mktemp("cells")
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    for name, dtype in (("product", "int32"), ("half", "bfloat16")):
        function = tvm.script.from_source(PRODUCT.format(n=SIZE, d=dtype))
        module = tvm.compile(tvm.IRModule({"main": function}), target=target)
        module.export_library(str(path / f"{name}.so"))
    for name, body in BAD.items():
        source = f"#include <unistd.h>\n{ENTRY} {{ {body} }}\n"
        command = ["gcc", "-O1", "-shared", "-fPIC", "-xc", "-", "-o", str(path / f"{name}.so")]
        subprocess.run(command, input=source, text=True, check=True)
    rng = np.random.default_rng(0)
    a, w = rng.integers(-99, 99, (2, SIZE), dtype=np.int32)
    save(path / "args", {"0": a, "1": w, "2": np.zeros_like(a)})
    save(path / "right", {"2": a * w})
    save(path / "wrong", {"2": a * w + (np.arange(SIZE) == 5) * np.int32(3)})
    half = ml_dtypes.bfloat16
    save(path / "half_args", {str(i): x.astype(half) for i, x in enumerate((a, w, 0 * a))})
    save(path / "half_right", {"2": (a.astype(half) * w.astype(half)).astype(half)})
    return path


def save(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    safetensors.numpy.save_file(dict(tensors), path)


def product(folder: Path, key: str = "good", **options: Any) -> Cell:
    given = {"library": "product.so", "args": "args", "expected": "right"} | options
    files = {name: str(folder / given.pop(name)) for name in ("library", "args", "expected")}
    return Cell(key, **files, **({"roles": ROLES} | given))


def bad(folder: Path, kind: str) -> Cell:
    return product(folder, kind, library=f"{kind}.so")


# timing


def test_good_block(worker: WorkerProcess, folder: Path) -> None:
    cells = [
        product(folder, "cold"),
        product(folder, "warm", roles=("input", "input", "output")),
        product(folder, "half", library="half.so", args="half_args", expected="half_right"),
    ]
    results = time_block(cells, QUICK, worker)
    assert [item.key for item in results] == ["cold", "warm", "half"]
    for item in results:
        assert item.error == ""
        assert len(item.samples_s) >= 6 and all(value > 0 for value in item.samples_s)
        assert len(item.samples_s) + len(item.rejected_s) <= 2 * QUICK.rounds
        assert item.inner_count >= 1 and item.latency_s > 0
        quality = item.quality
        assert len(quality["rounds"]) == len(item.samples_s)
        assert len(quality["sentinel_s"]) == QUICK.rounds
        assert quality["call_overhead_s"] > 0 and quality["denormals"] in ("kept", "flushed")
        assert {"steal", "away", "switches", "drift", "noisy", "core"} <= set(quality)
        assert CellTiming.from_json(item.to_json()) == item
    assert results[0].quality["weight_copies"] == kernel.MAX_COPIES  # 1 KiB each
    assert results[1].quality["weight_copies"] == 1
    first, second = pairs(results[0], results[1])
    assert len(first) == len(second) > 0


def test_bad_cells_beside_a_good_one(worker: WorkerProcess, folder: Path) -> None:
    cells = [
        product(folder, "wrong", expected="wrong"),
        bad(folder, "crash"),
        product(folder, "close enough", expected="wrong", atol=3.0),
        bad(folder, "exit"),
        product(folder, "missing", library="nothing.so"),
        product(folder, "dtype", args="half_args", expected="half_right"),
        product(folder, "roles", roles=("input", "output")),
    ]
    results = {item.key: item for item in time_block(cells, QUICK, worker)}
    errors = {key: item.error for key, item in results.items()}
    wrong = "wrong numbers: argument 2: 1 of 256 elements differ, the first at 5: "
    assert errors["wrong"].startswith(wrong) and "largest difference 3 " in errors["wrong"]
    assert errors["crash"] == "crashed: SIGSEGV in step 'check'"
    assert errors["exit"] == "crashed: exit status 3 in step 'check'"
    assert "nothing.so" in errors["missing"]
    assert "TypeError" in errors["dtype"] or "dtype" in errors["dtype"]
    assert "arguments of roles" in errors["roles"]
    assert errors["close enough"] == "" and results["close enough"].samples_s
    assert results["crash"].samples_s == ()
    with pytest.raises(ValueError, match="SIGSEGV"):
        _ = results["crash"].latency_s


def test_hanging_cell(worker: WorkerProcess, folder: Path) -> None:
    quick = Protocol(rounds=6, epoch_s=0.001, deadline_s=5)
    cells = [bad(folder, "hang"), product(folder)]
    hung, good = time_block(cells, quick, worker)
    assert hung.error == "timed out after 5 s in step 'check'"
    assert good.error == "" and good.samples_s


def test_refused_requests(worker: WorkerProcess, folder: Path) -> None:
    with pytest.raises(WorkerFailed, match="distinct keys"):
        time_block([product(folder), product(folder)], QUICK, worker)
    with pytest.raises(WorkerFailed, match="another number of threads"):
        time_block([product(folder)], Protocol(threads=2), worker)
    with pytest.raises(InputError, match="at least 1"):
        Protocol(rounds=0)
    with pytest.raises(InputError, match="unknown key in cell"):
        Cell.from_json({"key": "a", "libary": "x"})
    with pytest.raises(InputError, match="kind of cell"):
        Cell.from_json({"key": "a", "kind": "magic"})
    with pytest.raises(InputError, match="positive seconds"):
        CellTiming.from_json(CellTiming("a", samples_s=(-1.0,)).to_json())


class Script(WorkerProcess):
    """A worker whose `time` calls do what the test says."""

    def __init__(self, *acts: Callable[[list[str], Any], list[str]]):
        super().__init__()
        self.acts = list(acts)
        self.blocks: list[list[str]] = []

    def call(self, op: str, payload: Any, deadline_s: float, on_progress: Any = None) -> Any:
        if op != "time":
            return {}
        keys = [cell["key"] for cell in payload["cells"]]
        self.blocks.append(keys)
        done = self.acts.pop(0)(keys, on_progress)
        return {"cells": [CellTiming(key, samples_s=(1.0,)).to_json() for key in done]}


@pytest.mark.parametrize(
    ("error", "may"),
    [
        ("crashed: SIGKILL in step 'time'", True), ("timed out after 5 s in step 'load'", True),
        ("compile: crashed: SIGKILL in step 'compile'", True),
        ("compile: call failed in the worker: got TVMError: no", False),
        ("wrong numbers: 3 of 10", False), ("InputError: arguments of x", False), ("", False),
    ],
)  # fmt: skip
def test_which_failures_may_pass(error: str, may: bool) -> None:
    assert is_transient(error) is may


def test_crash_in_the_rounds_is_found_by_running_each_alone() -> None:
    def crash(keys: list[str], note: Any) -> list[str]:
        note({"key": "a", "step": "check"})
        note({"step": "time", "round": 3})
        raise WorkerCrashed("SIGBUS", "")

    def fine(keys: list[str], note: Any) -> list[str]:
        return keys

    script = Script(crash, fine, crash, fine)
    results = time_block([Cell("a"), Cell("b"), Cell("c")], QUICK, script)
    assert [item.error for item in results] == ["", "crashed: SIGBUS in step 'time'", ""]
    assert script.blocks == [["a", "b", "c"], ["a"], ["b"], ["c"]]


class Liar(WorkerProcess):
    """A worker that answers what the test says."""

    def __init__(self, answer: dict[str, Any]):
        super().__init__()
        self.answer = answer

    def call(self, op: str, payload: Any, deadline_s: float, on_progress: Any = None) -> Any:
        return self.answer if op == "time" else {}


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0, "1"])
def test_a_time_that_cannot_be_one_is_a_failure_of_its_cell(seconds: Any) -> None:
    good = CellTiming("a", samples_s=(1.0,)).to_json()
    answer = {"cells": [good, {**good, "key": "b", "samples_s": [1.0, seconds]}]}
    a, b = time_block([Cell("a"), Cell("b")], QUICK, Liar(answer))
    assert a.samples_s == (1.0,) and not a.error
    assert b.samples_s == () and "time of b" in b.error and "positive seconds" in b.error


@pytest.mark.parametrize("cells", [None, 3, [], [{"key": "b"}], [{"key": "a"}], [3]])
def test_an_answer_about_something_else(cells: Any) -> None:
    with pytest.raises(DeviceError, match="answer of the worker about a"):
        time_block([Cell("a")], QUICK, Liar({"cells": cells}))


@pytest.mark.parametrize("step", [None, {"step": "lock"}])
def test_death_with_no_cell_in_hand_is_raised(step: dict[str, str] | None) -> None:
    def die(keys: list[str], note: Any) -> list[str]:
        if step:
            note(step)
        raise WorkerCrashed("SIGKILL", "")

    with pytest.raises(WorkerCrashed):
        time_block([Cell("a")], QUICK, Script(die))


# the parts of it


def test_latin_square() -> None:
    for size in (1, 2, 3, 6, 7):
        rows = timing.latin_square(size)
        assert all(sorted(row) == list(range(size)) for row in rows)
        assert all(sorted(column) == list(range(size)) for column in zip(*rows, strict=True))
    follows = [pair for row in timing.latin_square(6) for pair in itertools.pairwise(row)]
    assert len(set(follows)) == len(follows) == 30


def test_plan_copies() -> None:
    l2 = 512 << 10
    assert kernel.plan_copies(0, l2) == (1, False)
    assert kernel.plan_copies(1 << 10, l2) == (64, False)  # the cap: not cold, and it says so
    assert kernel.plan_copies(100 << 10, l2) == (11, True)
    assert kernel.plan_copies(1 << 20, l2) == (2, True)
    assert kernel.plan_copies(3 << 20, l2) == (1, True)
    assert kernel.plan_copies(40 << 20, 32 << 20) == (1, False)  # 64 MiB in all


def test_difference() -> None:
    a = np.array([1, 2, 3], dtype=np.int32)
    nan = np.array([np.nan, np.inf], dtype=np.float32)
    assert kernel.difference(a, a, 0, 0) is None
    assert kernel.difference(nan, nan, 0, 0) is None
    assert "1 of 2" in str(kernel.difference(nan, np.float32([0, np.inf]), 1, 1))
    assert "float32" in str(kernel.difference(a.astype(np.float32), a, 0, 0))
    assert "[3]" in str(kernel.difference(a, a[:2], 0, 0))
    assert kernel.difference(a * 1.05, a * 1.0, 0, 0.1) is None


def test_rotation_reaches_every_copy(folder: Path) -> None:
    """Each copy of the weights is really read: after changing copy 2, calls 0..3 show it."""
    cell = product(folder)
    loaded = kernel.load_kernel(cell)
    kernel.check_kernel(loaded, cell)  # copy 0
    args, seen = tensors.load(Path(cell.args))[0], []
    changed = loaded.rows[2][1]
    changed.copyfrom(np.zeros(SIZE, dtype=np.int32))
    for _ in range(3):
        loaded.run(1)  # copies 1, 2, 3
        seen.append(bool(np.array_equal(loaded.rows[0][2].numpy(), args["0"] * args["1"])))
    assert seen == [True, False, True]
    loaded.run(kernel.MAX_COPIES - 2)  # from copy 4 around to copy 1
    loaded.run(1)
    assert not loaded.rows[0][2].numpy().any()


def test_unwritten_output_is_noticed(folder: Path) -> None:
    """Right numbers given as arguments do not count: a kernel that does nothing is caught."""
    right = tensors.load(folder / "right")[0]["2"]
    save(folder / "full", {**tensors.load(folder / "args")[0], "2": right})
    cell = product(folder, args="full", roles=("input", "weight", "output"))
    loaded = kernel.load_kernel(cell)
    assert "elements differ" in str(kernel.difference(loaded.rows[0][2].numpy(), right, 0, 0))


def test_lock_is_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    waited, entered = threading.Event(), threading.Event()

    def second() -> None:
        with gates.machine_lock(waited.set):
            entered.set()

    thread = threading.Thread(target=second)
    with gates.machine_lock():
        thread.start()
        assert waited.wait(30) and not entered.is_set()
    thread.join(30)
    assert entered.is_set()


def test_gates() -> None:
    quiet = gates.Counters(0.0, 0.0, 0.0, 0.0, 0)

    def epoch(threads: int = 1, **after: Any) -> gates.Epoch:
        late = {"wall_s": 0.01, "cpu_s": 0.01, "steal_s": 0, "pressure_s": 0, "switches": 0}
        return gates.Epoch.between(quiet, gates.Counters(**(late | after)), 0.01, 10, threads)

    assert not epoch().bad and epoch().per_call_s == pytest.approx(0.001)
    assert epoch(steal_s=0.01).bad
    assert epoch(cpu_s=0.009).bad and not epoch(cpu_s=0.009, threads=2).bad
    assert epoch(pressure_s=0.002, threads=2).bad and not epoch(pressure_s=0.002).bad
    assert epoch(switches=9, threads=2).bad
    real = gates.Counters.read(None)
    assert real.wall_s > 0 and real.steal_s >= 0 and real.pressure_s >= 0


def test_disturbed_epochs_are_repeated_and_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every epoch refused the cap holds, and the cell is noisy rather than empty."""
    monkeypatch.setattr(gates, "MAX_AWAY", -1.0)
    runs: list[int] = []

    class Fake:
        def run(self, count: int) -> float:
            runs.append(count)
            return 1e-6 * count

    entry = timing.Entry(Cell("a"), Fake(), {}, per_call_s=1e-6, count=100)
    plan = replace(QUICK, best_of=2)
    shared = timing._rounds([entry], plan, None, lambda note: None)
    assert len(entry.rejected) == 2 * QUICK.rounds and not entry.kept
    assert set(runs[1:]) <= set(range(100, 121)) and len(set(runs)) > 3  # the jitter
    whole = timing._timing(entry, QUICK, shared)
    assert whole.quality["noisy"] and len(whole.samples_s) == 2 * QUICK.rounds
    result = timing._timing(entry, plan, shared)
    assert result.quality["noisy"] and len(result.samples_s) == stats.MIN_SAMPLES
    assert max(result.samples_s) <= sorted(e.per_call_s for _, e in entry.rejected)[5]


def test_shared_counts() -> None:
    def entries(*times: float, best_of: int = 1) -> list[timing.Entry]:
        made = []
        for value in times:
            made.append(timing.Entry(Cell(str(value)), timing.Calls(int), {}, per_call_s=value))
        timing._share_counts(made, Protocol(epoch_s=0.01, best_of=best_of))
        return made

    assert len({entry.count for entry in entries(1e-6, 2e-6, 9e-6)}) == 1
    assert [entry.count for entry in entries(1e-6, 1e-4, 1.0)] == [10_000, 100, 1]
    parts = entries(1e-6, 0.02, 1.0, best_of=5)
    assert [(e.count, e.parts) for e in parts] == [(2000, 5), (1, 2), (1, 1)]


def test_a_sample_is_the_least_part_and_crowded_unless_one_was_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([3e-3, 1e-3, 2e-3] * 4)

    class Fake:
        def run(self, count: int) -> float:
            return next(seconds)

    entry = timing.Entry(Cell("a"), Fake(), {}, per_call_s=1e-6, parts=3)
    monkeypatch.setattr(gates, "MAX_AWAY", 2.0)
    monkeypatch.setattr(gates, "MAX_STEAL", 2.0)
    looks = iter([False, True, False, True, True])
    monkeypatch.setattr(gates, "alone", lambda: next(looks))
    monkeypatch.setattr(gates, "wait_until_alone", lambda patience_s: next(looks))
    parts = Protocol(best_of=3)
    epoch = timing._epoch(entry, 1000, None, parts)
    assert epoch.per_call_s == pytest.approx(1e-6) and not epoch.bad
    looks = iter([True, False] * 3)
    assert timing._epoch(entry, 1000, None, parts).bad
    monkeypatch.setattr(gates, "MAX_PRESSURE", 2.0)
    monkeypatch.setattr(gates, "MAX_SWITCHES_PER_S", 1e9)
    for unwatched in (Protocol(best_of=3, threads=2), Protocol()):
        assert not timing._epoch(entry, 1000, None, unwatched).bad


def test_a_core_is_shared_where_the_same_work_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_least_s", float("inf"))
    assert gates.alone()
    monkeypatch.setattr(gates, "_least_s", 1e-9)
    began = time.perf_counter()
    assert not gates.wait_until_alone(0.01) and time.perf_counter() - began >= 0.01


def test_artifact_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact is anything with bench_callable(); the Python loop calls it as often as asked."""
    calls: list[int] = []
    whole = timing.Calls(lambda: calls.append(1))
    monkeypatch.setattr(timing, "_load_whole", lambda cell: (whole, {}))
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    payload = {"cells": [{"key": "a", "kind": "artifact", "path": "x"}], **QUICK.to_json()}
    notes: list[Mapping[str, Any]] = []
    (result,) = timing.run_block(payload, notes.append)["cells"]
    assert result["error"] == "" and len(result["samples_s"]) >= 6 and len(calls) > 100
    assert [note["step"] for note in notes if "key" in note] == ["load", "first run", "calibrate"]

"""Timing through a real worker: good cells beside crashing, hanging and wrong ones; no times."""

from __future__ import annotations

import io
import itertools
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from hwmpq import tensors
from hwmpq.errors import DeviceError, InputError
from hwmpq.measure import frames, gates, kernel, timing
from hwmpq.measure.process import WorkerCrashed, WorkerFailed, WorkerProcess, WorkerTimeout
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
    "abort": "abort();",
    "hang": "for (;;) sleep(1);",
    "exit": "_exit(3);",
}


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    with WorkerProcess() as process:
        yield process


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
        source = f"#include <stdlib.h>\n#include <unistd.h>\n{ENTRY} {{ {body} }}\n"
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


# frames


def test_frames_round_trip() -> None:
    stream = io.BytesIO()
    messages: list[dict[str, Any]] = [{"a": [1, 2.5, None]}, {}, {"text": "ü" * 1000}]
    for message in messages:
        frames.write(stream, message)
    stream.seek(0)
    assert [frames.read(stream) for _ in range(4)] == [*messages, None]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0", "cut off in its length"),
        (struct.pack(">I", 9) + b"{}", "2 of 9 bytes"),
        (b"Welcome to this machine", "text where a message belongs"),
        (struct.pack(">I", frames.LIMIT_BYTES + 1), "too long"),
        (struct.pack(">I", 2) + b"no", "not JSON"),
        (struct.pack(">I", 2) + b"[]", "not a JSON object"),
    ],
)
def test_frames_refuse(data: bytes, words: str) -> None:
    with pytest.raises(frames.FrameError, match=words):
        frames.read(io.BytesIO(data))


def test_frame_limit_on_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "LIMIT_BYTES", 10)
    stream = io.BytesIO()
    with pytest.raises(frames.FrameError, match="message too long"):
        frames.write(stream, {"text": "more than ten"})
    assert stream.getvalue() == b""


# the process


def test_ping_settings_and_restart() -> None:
    with WorkerProcess(env={"HWMPQ_TEST": "a=b"}, threads=2) as process:
        first = process.call("ping", {}, 60)["pid"]
        assert process.call("ping", {}, 60)["pid"] == first
        assert process.settings["TVM_NUM_THREADS"] == "2"
        if sys.platform == "linux":
            environ = Path(f"/proc/{first}/environ").read_bytes().split(b"\0")
            assert b"HWMPQ_TEST=a=b" in environ and b"OMP_NUM_THREADS=2" in environ
        killer = threading.Timer(0.2, os.kill, (first, signal.SIGKILL))
        killer.start()  # in the middle of a call: importing TVM takes longer than this
        with pytest.raises(WorkerCrashed, match="SIGKILL"):
            process.call("call", {"function": "hwmpq.measure.timing:get_ready"}, 60)
        killer.join()
        assert process.call("ping", {}, 60)["pid"] != first
        process.close()
        assert process.call("ping", {}, 60)["pid"] != first


def test_unknown_op_and_refused_functions(worker: WorkerProcess) -> None:
    pid = worker.call("ping", {}, 60)["pid"]
    with pytest.raises(WorkerFailed, match="unknown op"):
        worker.call("tiem", {}, 60)
    for function in (
        "os:system",
        "hwmpq.measure.worker:_exit_with_parent",
        "hwmpq.measure.process:signal.raise_signal",
        "hwmpq.measure.environment:Path",  # visible there, defined elsewhere
        "hwmpq.measure.environment:nothing",
    ):
        with pytest.raises(WorkerFailed, match="not a callable function") as caught:
            worker.call("call", {"function": function}, 60)
        assert caught.value.kind == "InputError"
    with pytest.raises(WorkerFailed, match="must return a dict"):
        worker.call("call", {"function": "hwmpq.types:digest", "payload": {"a": 1}}, 60)
    assert worker.call("ping", {}, 60)["pid"] == pid


def test_call(worker: WorkerProcess) -> None:
    answer = worker.call("call", {"function": "hwmpq.measure.timing:get_ready"}, 180)
    assert answer["fingerprint"] and answer["tvm"]


def test_stray_prints_go_to_stderr() -> None:
    """A prefix that talks on stderr first, and an op whose import prints on stdout."""
    lines: list[str] = []
    code = "import os, sys; print('hello', file=sys.stderr); os.execvp(sys.argv[1], sys.argv[1:])"
    with WorkerProcess((sys.executable, "-c", code), log=lines.append) as process:
        process._env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        assert process.call("ping", {}, 60)["pid"] > 0
        payload = {"function": "hwmpq.measure.worker:nothing"}
        with pytest.raises(WorkerFailed):
            process.call("call", payload, 60)
        process.close()
    assert lines[0] == "hello"


def test_banner_on_stdout_and_missing_program() -> None:
    talk = ("sh", "-c", "echo Welcome to this machine; exec sleep 60")
    with WorkerProcess(talk) as process, pytest.raises(frames.FrameError, match="Welc"):
        process.call("ping", {}, 60)
    with WorkerProcess(("no-such-program-here",)) as process:
        with pytest.raises(DeviceError, match=r"cannot start.*no-such-program-here"):
            process.call("ping", {}, 60)
    with WorkerProcess(("sh", "-c", "echo broken >&2; exit 5")) as process:
        with pytest.raises(WorkerCrashed, match=r"exit status 5\. broken"):
            process.call("ping", {}, 60)


def test_deadline_kills_the_whole_group(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = f"sleep 300 & echo $! > {note}; wait"
    with WorkerProcess(("sh", "-c", script)) as process:
        with pytest.raises(WorkerTimeout, match=r"no answer to 'ping': got 1 s"):
            process.call("ping", {}, 1)
    stat = Path(f"/proc/{int(note.read_text())}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("a grandchild lives on")


def test_worker_ends_with_its_parent() -> None:
    """A parent that is killed in the middle of an op leaves no worker behind."""
    code = (
        "import sys\n"
        "from hwmpq.measure.process import WorkerProcess\n"
        "w = WorkerProcess()\n"
        "print(w.call('ping', {}, 60)['pid'], flush=True)\n"
        "w.call('call', {'function': 'hwmpq.measure.timing:get_ready'}, 60)\n"
        "print('busy', flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the worker lives on")


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
        bad(folder, "abort"),
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
    assert errors["abort"] == "crashed: SIGABRT in step 'check'"
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
    shared = timing._rounds([entry], QUICK, None, lambda note: None)
    assert len(entry.rejected) == 2 * QUICK.rounds and not entry.kept
    assert set(runs[1:]) <= set(range(100, 121)) and len(set(runs)) > 3  # the jitter
    result = timing._timing(entry, QUICK.rounds, shared)
    assert result.quality["noisy"] and len(result.samples_s) == 2 * QUICK.rounds


def test_shared_counts() -> None:
    def entries(*times: float) -> list[timing.Entry]:
        made = []
        for value in times:
            made.append(timing.Entry(Cell(str(value)), timing.Calls(int), {}, per_call_s=value))
        timing._share_counts(made, 0.01)
        return made

    assert len({entry.count for entry in entries(1e-6, 2e-6, 9e-6)}) == 1
    assert [entry.count for entry in entries(1e-6, 1e-4, 1.0)] == [10_000, 100, 1]


def test_artifact_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact is anything with bench_callable(); the Python loop calls it as often as asked."""
    calls: list[int] = []
    monkeypatch.setattr(timing, "_load_whole", lambda cell: (lambda: calls.append(1), {}))
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    payload = {"cells": [{"key": "a", "kind": "artifact", "path": "x"}], **QUICK.to_json()}
    notes: list[Mapping[str, Any]] = []
    (result,) = timing.run_block(payload, notes.append)["cells"]
    assert result["error"] == "" and len(result["samples_s"]) >= 6 and len(calls) > 100
    assert [note["step"] for note in notes if "key" in note] == ["load", "first run", "calibrate"]

"""The worker process: frames, calls, restarts, deadlines, and what it leaves behind."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hwmpq.errors import DeviceError
from hwmpq.measure import frames
from hwmpq.measure.process import WorkerCrashed, WorkerFailed, WorkerProcess, WorkerTimeout

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


def test_the_runtime_starts_without_torch_and_takes_it_later() -> None:
    program = (
        "import sys\n"
        "from hwmpq import toolchain\n"
        "with toolchain.without_torch():\n"
        "    import tvm\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "assert tvm.runtime.from_dlpack(torch.ones(2)).numpy().tolist() == [1, 1]\n"
        "with toolchain.without_torch():\n"
        "    assert sys.modules['torch'] is torch\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

"""Devices elsewhere: a worker behind a stand-in for ssh, in an environment without hwmpq."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwmpq import tensors
from hwmpq.devices import Device
from hwmpq.errors import DeviceError, InputError
from hwmpq.measure import frames, kernel, remote
from hwmpq.measure.process import WorkerCrashed, WorkerFailed, WorkerTimeout
from hwmpq.measure.protocol import Cell, Protocol, time_block
from hwmpq.measure.remote import RemoteWorker

QUICK = Protocol(rounds=4, epoch_s=0.0005, deadline_s=30)
PRODUCT = """
@T.prim_func(s_tir=True)
def main(a: T.Buffer((64,), "int32"), w: T.Buffer((64,), "int32"), c: T.Buffer((64,), "int32")):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    for i in T.serial(64):
        c[i] = a[i] * w[i]
"""


@pytest.fixture(scope="module")
def device() -> Device:
    python = str(Path(sys.executable).resolve())  # outside the environment of the tests
    return Device("board", transport="ssh", address="board", python=python)


@pytest.fixture(scope="module")
def worker(board: Path, device: Device) -> Iterator[RemoteWorker]:
    with RemoteWorker(device) as process:
        yield process


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    import tvm

    folder = tmp_path_factory.mktemp("cell")
    target = {"kind": "llvm", "mcpu": "x86-64-v3"}
    module = tvm.IRModule({"main": tvm.script.from_source(PRODUCT)})
    built = tvm.compile(module, target=tvm.target.Target(target))
    built.export_library(str(folder / "cell.so"))
    kernel.export_loop(folder / "loop", "main", 3, target)
    a = np.arange(64, dtype=np.int32)
    tensors.save(folder / "args", {"0": a, "1": a, "2": 0 * a})
    tensors.save(folder / "right", {"2": a * a})
    names = {"library": "cell.so", "args": "args", "expected": "right", "loop": "loop"}
    files: dict[str, Any] = {name: str(folder / path) for name, path in names.items()}
    return Cell("product", roles=("input", "weight", "output"), **files)


def twice(folder: Path) -> str:
    """A kernel whose result is twice that of the product."""
    import tvm

    source = PRODUCT.replace("a[i] * w[i]", "a[i] * w[i] * 2")
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    module = tvm.IRModule({"main": tvm.script.from_source(source)})
    tvm.compile(module, target=target).export_library(str(folder / "twice.so"))
    return str(folder / "twice.so")


def left(board: Path) -> list[Path]:
    return list(board.glob("hwmpq-worker-*"))


# the worker


def test_a_block_is_timed_where_nothing_can_be_compiled(
    worker: RemoteWorker, cell: Cell, board: Path, tmp_path: Path
) -> None:
    tensors.save(tmp_path / "wrong", {"2": np.zeros(64, np.int32)})
    wrong = replace(cell, key="wrong", expected=str(tmp_path / "wrong"))
    good, other, bad = time_block([cell, replace(cell, key="other"), wrong], QUICK, worker)
    assert not good.error and len(good.samples_s) >= 4 and not other.error
    assert good.quality["call_overhead_s"] > 0
    assert bad.error.startswith("wrong numbers: argument 2: 63 of 64")
    (folder,) = left(board)
    assert folder.stat().st_mode & 0o777 == 0o700
    held = {str(p.relative_to(folder / "files")) for p in folder.glob("files/**/*")}
    assert {"0-library.so", "0-loop/loop.so", "2-expected"} <= held
    (again,) = time_block([replace(wrong, library=twice(tmp_path))], QUICK, worker)
    assert "0 for 0" not in again.error and "the first at 1: 2 for 0" in again.error
    assert not (folder / "files" / "1-library.so").exists()  # the block before is gone


def test_who_is_there(worker: RemoteWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    found = worker.describe()
    assert found["fingerprint"] and found["features"] and found["busy"] is False
    code = {"function": "hwmpq.measure.timing:get_ready", "payload": {"compiles": True}}
    with pytest.raises(WorkerFailed):  # there is no compiler there: the test above needs none
        worker.call("call", code, 60)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "device", replace(worker.device, fingerprint="x86_64-64c-0"))
        with pytest.raises(DeviceError, match="device board is another machine"):
            worker.describe()


def test_a_damaged_or_straying_file_is_refused(worker: RemoteWorker, board: Path) -> None:
    data = base64.b64encode(b"kernel").decode()
    right = hashlib.sha256(b"kernel").hexdigest()
    worker._function("onsite:empty", {})
    with pytest.raises(WorkerFailed, match="hash of a as it arrived"):
        worker._function("onsite:put", {"name": "a", "data": data, "sha256": right[::-1]})
    for name in ("../a", "/a", ".a", "a/b/c", "a/../b", ""):
        with pytest.raises(WorkerFailed, match="name of a file"):
            worker._function("onsite:put", {"name": name, "data": data, "sha256": right})
    (folder,) = left(board)
    assert not list(folder.glob("files/**/*"))
    worker._function("onsite:put", {"name": "a", "data": data[:4]})
    worker._function("onsite:put", {"name": "a", "data": data[4:], "sha256": right})
    assert (folder / "files" / "a").read_bytes() == b"kernel"


def test_a_crash_there_is_recorded_and_leaves_nothing(
    device: Device, board: Path, cell: Cell, tmp_path: Path
) -> None:
    entry = "int __tvm_ffi_main(void *s, const void *a, int n, void *r) { __builtin_trap(); }"
    crash = tmp_path / "crash.so"
    command = ["gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(crash)]
    subprocess.run(command, input=entry, text=True, check=True)
    with RemoteWorker(device) as process:
        bad, good = time_block(
            [replace(cell, key="crash", library=str(crash)), cell], QUICK, process
        )
        assert bad.error.startswith("crashed: SIG") and "'check'" in bad.error
        assert not good.error
        folders = left(board)
        assert all(alive(int(folder.name.split("-")[2])) for folder in folders)  # swept
        assert process._process is not None
        own = [f for f in folders if f"-{process.call('ping', {}, 30)['pid']}-" in f.name]
        assert len(own) == 1
    assert own[0] not in left(board)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_lost_connection_ends_the_call_and_the_worker(device: Device, board: Path) -> None:
    with RemoteWorker(device) as process:
        pid = process.call("ping", {}, 60)["pid"]
        assert process._process is not None
        threading.Timer(0.1, os.killpg, (process._process.pid, signal.SIGKILL)).start()
        with pytest.raises(WorkerCrashed, match="SIGKILL"):
            code = {"function": "hwmpq.measure.timing:get_ready", "payload": {}}
            process.call("call", code, 60)
        for _ in range(100):
            if not any(f"-{pid}-" in folder.name for folder in left(board)):
                return
            time.sleep(0.05)
        raise AssertionError("the worker there lives on")


def impostor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> RemoteWorker:
    """A worker whose ssh runs a shell script instead."""
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\n{script}\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return RemoteWorker(Device("b", transport="ssh", address="b"))


def framed(text: str) -> str:
    header = "".join(f"\\{byte:03o}" for byte in struct.pack(">I", len(text)))
    return f"printf '{header}{text}'; exec sleep 60"


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("exec sleep 60", WorkerTimeout, "no answer"),  # also never reads: the pipe is full
        (r"printf '\377\377\377\377'; exec sleep 60", frames.FrameError, "too long"),
        ("echo 'Permission denied' >&2; exit 255", WorkerCrashed, "255. Permission denied"),
        (framed("{}"), frames.FrameError, "without its result"),
        (framed('{"failed": 3}'), frames.FrameError, "without its failed"),
        (framed('{"result": {"fingerprint": "../x", "features": []}}'), DeviceError, "fingerprint"),
    ],
)
def test_a_peer_that_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, error: type, words: str
) -> None:
    monkeypatch.setattr(remote, "TRANSFER_DEADLINE_S", 1.0)
    with impostor(monkeypatch, tmp_path, script) as process, pytest.raises(error, match=words):
        if error is WorkerTimeout:
            process.preamble *= 9  # more than a pipe holds
        process.describe()


def test_a_model_is_quantized_for_another_machine(
    board: Path, device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiled here; timed there, and run there on the images, as this CPU is said to be unable."""
    from tiny_job import quantize_tiny

    from hwmpq import artifact, targets

    told = f'transport = "ssh"\naddress = "board"\npython = "{device.python}"\nlock = "lock"\n'
    file = tmp_path / "devices.toml"
    monkeypatch.setenv("HWMPQ_DEVICES", str(file))
    file.write_text(f"version = 1\n[devices.board]\n{told}")
    with pytest.raises(InputError, match="target of device board: got native"):
        quantize_tiny(device="board", store=tmp_path / "s.sqlite", out=tmp_path / "out")
    file.write_text(f'version = 1\n[devices.board]\n{told}target = "x86-avx2"\n')
    with monkeypatch.context() as patch:
        patch.setattr(targets, "satisfied_by_host", lambda target: ["sve"])
        patch.setattr(artifact, "load", lambda folder: pytest.fail("run here"))
        found = quantize_tiny(device="board", store=tmp_path / "s.sqlite", out=tmp_path / "out")
    assert found.json["accuracy"]["n"] == 32 and found.json["parity"]["top1_agreement"] == 100
    # Which of its plans is the faster one, other work on the machine may decide.
    assert found.json["status"] in ("met", "slower") and found.json["device"] == "board"
    assert {c["latency_source"] for c in found.json["kernels"].values()} == {"measured"}
    assert (board / "lock").exists()  # held where the timing was
    assert all(alive(int(folder.name.split("-")[2])) for folder in left(board))

"""Devices elsewhere: a worker behind a stand-in for ssh, in an environment without hwmpq; a bundle
run there; times taken in."""

from __future__ import annotations

import base64
import getpass
import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwmpq import side_jobs, tensors
from hwmpq.devices import Device
from hwmpq.errors import DeviceError, HwmpqError, InputError
from hwmpq.measure import frames, kernel, remote, runner
from hwmpq.measure.bundle import read_result
from hwmpq.measure.process import WorkerCrashed, WorkerFailed, WorkerTimeout
from hwmpq.measure.protocol import Cell, Protocol, time_block
from hwmpq.measure.remote import RemoteWorker
from hwmpq.measure.store import Store
from hwmpq.pipeline import Options
from hwmpq.stages import bundle, imported
from hwmpq.stages.job import Silent, open_job
from hwmpq.stages.latency import NOT_STORED, profile
from hwmpq.stages.menu import make_menu

QUICK = Protocol(rounds=4, epoch_s=0.0005, deadline_s=30)
PRODUCT = """
@T.prim_func(s_tir=True)
def main(a: T.Buffer((64,), "int32"), w: T.Buffer((64,), "int32"), c: T.Buffer((64,), "int32")):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    for i in T.serial(64):
        c[i] = a[i] * w[i]
"""
#: What a machine that runs kernels has beside Python.
NEEDED = ("numpy", "numpy.libs", "tvm", "tvm_ffi", "apache_tvm.libs", "typing_extensions.py")
#: As ssh and sshd: a shell in another session, folder and environment gets the words as one line;
#: what is said passes through here, and is cut off when this is killed.
SSH = """#!{python} -I
import os, subprocess, sys, threading

def pump(source, sink):
    while data := os.read(source, 65536):
        while data:
            data = data[os.write(sink, data):]
    os.close(sink)

line = " ".join(sys.argv[sys.argv.index("board") + 1:])
env = dict(PATH=os.environ["PATH"], HOME={home!r}, TMPDIR={home!r}, PYTHONPATH={site!r})
env["TVM_USE_RUNTIME_LIB"] = "1"
pipe = subprocess.PIPE
there = subprocess.Popen(
    ["sh", "-c", line], cwd={home!r}, env=env, stdin=pipe, stdout=pipe, start_new_session=True
)
threading.Thread(target=pump, args=(0, there.stdin.fileno()), daemon=True).start()
pump(there.stdout.fileno(), 1)
code = there.wait()
os._exit(code if code >= 0 else 128 - code)
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the other machine: its home, its packages in `site`; `ssh` leads there."""
    home = tmp_path_factory.mktemp("board")
    site = home / "site"
    site.mkdir()
    for folder in map(Path, sys.path):
        for name in (*NEEDED, "apache_tvm_ffi.libs", "ml_dtypes"):
            if name != "ml_dtypes" and (folder / name).exists() and not (site / name).exists():
                (site / name).symlink_to(folder / name)
    ssh = home / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH.format(python=sys.executable, home=str(home), site=str(site)))
    ssh.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
        yield home


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
    assert found.json["status"] == "met" and found.json["device"] == "board"
    assert {c["latency_source"] for c in found.json["kernels"].values()} == {"measured"}
    assert (board / "lock").exists()  # held where the timing was
    assert all(alive(int(folder.name.split("-")[2])) for folder in left(board))


# bundles


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    store = tmp_path_factory.mktemp("store") / "s.sqlite"
    formats = ("fp32", "w8a8")
    return Options("test_remote:net", target="x86-avx2", formats=formats, store=str(store))


def net() -> Any:
    """A network whose names must not travel."""
    import torch

    torch.manual_seed(0)
    layers = {"secretconv": torch.nn.Conv2d(1, 8, 3), "secretact": torch.nn.ReLU()}
    return torch.nn.Sequential(*layers.values(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4))


@pytest.fixture(scope="module")
def packed(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "out.tar"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        made = side_jobs.bundle_model(replace(options, input_shape=(1, 1, 8, 8)), path)
    assert made["cells"] >= 4 and made["failures"] == {}
    return path


def unpacked(packed: Path, folder: Path) -> Path:
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    return folder


def run_there(board: Path, folder: Path, *words: str, stop_after: int = 0) -> tuple[int, str]:
    """Run the bundle on the other machine; stop_after: kill it after so many lines."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(board / "site")}
    env |= {"TVM_USE_RUNTIME_LIB": "1", "TMPDIR": str(board), "HOME": str(board)}
    command = [str(Path(sys.executable).resolve()), str(folder / "runner.py"), *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=board
    ) as process:
        assert process.stdout is not None
        if stop_after:
            lines = [process.stdout.readline() for _ in range(stop_after)]
            process.kill()
            return process.wait(), "".join(lines)
        text = process.stdout.read()
    return process.returncode, text


@pytest.fixture(scope="module")
def result(board: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that was killed after its first block and started again."""
    folder = unpacked(packed, tmp_path_factory.mktemp("unpacked"))
    run_there(board, folder, stop_after=1)
    first = json.loads((folder / "result.json").read_text())["timings"]
    code, text = run_there(board, folder)
    assert code == 0, text
    last = json.loads((folder / "result.json").read_text())["timings"]
    assert 0 < len(first) < len(last)
    assert {key: last[key] for key in first} == first  # gone on, not begun again
    assert f"{len(last)} cells" in text and "block 1 " not in text
    return folder / "result.json"


def test_a_bundle_names_nobody(packed: Path) -> None:
    ours = ("secretconv", "test_remote", "net", "0.weight", tempfile.gettempdir(), str(Path.home()))
    with tarfile.open(packed) as tar:
        for entry in tar:
            assert entry.isfile() and (entry.uid, entry.mtime, entry.uname) == (0, 0, "")
            file = tar.extractfile(entry)
            assert file is not None
            data = file.read()
            if not entry.name.startswith(("hwmpq/", "runner.py")):  # the program itself
                found = [word for word in ours if re.search(rb"\b%b\b" % word.encode(), data)]
                assert not found, entry.name
            if entry.name == "bundle.json":
                told = data.decode()
                assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", told)
                assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", told)


def test_a_result_is_what_local_timing_gives(
    result: Path, options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    options = replace(options, input_shape=(1, 1, 8, 8), store=str(tmp_path / "a.sqlite"))
    with Store.open(options.store) as store:
        taken = bundle.take_in(store, result)
        assert {o.name for o in store.origins()} == {taken.origin}
        rows = {row.measurement.key: row for row in store.rows()}
        assert {row.origin for row in rows.values()} == {taken.origin}
        assert all(row.measurement.samples_s for row in rows.values())
    job = open_job(options, Silent())
    with job.store:
        menu = make_menu(job.network, job.target, options.formats, ())
        facts = profile(job, menu, measure=False)
        assert facts.new_timings == 0 and not facts.unknown and facts.glue
        assert {m.key for m in facts.layers.values()} == set(rows)
        assert all(m.source == "measured" for m in facts.layers.values())
        job.store.remove_origin(taken.origin)
        assert set(profile(job, menu, measure=False).unknown.values()) == {NOT_STORED}


def damaged(result: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    value = json.loads(result.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


def first_time(value: float) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        next(iter(data["timings"].values()))["samples_s"][0] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (first_time(float("nan")), "not a finite number"),
        (first_time(float("inf")), "not a finite number"),
        (first_time(1e-12), "allowed: 1e-09 to 600 s"),
        (first_time(-1.0), "positive seconds"),
        (first_time(1e9), "allowed: 1e-09 to 600 s"),
        (lambda d: d["manifest"].update(target="other"), "not that of the bundle"),
        (lambda d: d.update(fingerprint="../../etc"), "fingerprint"),
        (lambda d: d.update(more=1), "unknown key"),
        (lambda d: d.update(timings={"x": {}}), "damaged result"),
    ],
)
def test_a_damaged_result_is_refused(
    result: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    path = damaged(result, tmp_path / "r.json", change)
    with Store.open(tmp_path / "s.sqlite") as store:
        with pytest.raises(InputError, match=words):
            bundle.take_in(store, path)
        assert store.rows() == []


def test_links_and_long_files_are_refused(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(result)
    with pytest.raises(HwmpqError, match="a link"):
        read_result(link)
    monkeypatch.setattr(runner, "LIMIT_BYTES", 100)
    with pytest.raises(InputError, match="too long"):
        read_result(result)


def test_a_bundle_checks_itself(packed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = unpacked(packed, tmp_path / "b")
    manifest = runner.open_bundle(folder)[0]
    library = folder / next(name for name in manifest["files"] if name.endswith("library.so"))
    data = library.read_bytes()
    library.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match="damaged file"):
        runner.open_bundle(folder)
    library.unlink()
    with pytest.raises(InputError, match="a file of"):
        runner.open_bundle(folder)
    outside = tmp_path / "outside.so"
    outside.write_bytes(data)
    library.symlink_to(outside)
    with pytest.raises(HwmpqError, match="leads out"):
        runner.open_bundle(folder)
    for name in ("../outside.so", "/etc/passwd", "cells/../../outside.so"):
        manifest["files"] = {name: [len(data), hashlib.sha256(data).hexdigest()]}
        (folder / "bundle.json").write_text(json.dumps(manifest))
        with pytest.raises(HwmpqError, match="leads out"):
            runner.open_bundle(folder)


def test_a_result_of_another_machine_is_not_gone_on_with(
    result: Path, board: Path, tmp_path: Path, packed: Path
) -> None:
    folder = unpacked(packed, tmp_path / "b")
    damaged(result, folder / "result.json", lambda d: d.update(fingerprint="other"))
    code, text = run_there(board, folder)
    assert code == 2 and "has another fingerprint" in text and "Name another result" in text


# tables


def table_of(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["workload,format,latency_s", *lines, ""]))
    return path


def test_an_imported_table_fills_what_was_not_measured(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    options = replace(options, input_shape=(1, 1, 8, 8), store=str(tmp_path / "a.sqlite"))
    job = open_job(options, Silent())
    with job.store:
        workloads = [layer.workload for layer in job.network.layers]
        assert [imported.workload_of(imported.text_of(w)) for w in workloads] == workloads
        lines = [f"{imported.text_of(w)},w8a8,{1e-5 * (i + 1)}" for i, w in enumerate(workloads)]
        taken = side_jobs.import_times(options, table_of(tmp_path / "t.csv", *lines))
        assert taken["rows"] == taken["matched"] == len(workloads)
        menu = make_menu(job.network, job.target, options.formats, ())
        before = profile(job, menu, measure=False)
        after = imported.fill_in(job, before)
        found = after.cell(workloads[1], "w8a8")
        assert before.layers == {} and found is not None
        assert (found.source, found.latency_s) == ("imported", 2e-5)
        assert after.cell(workloads[1], "fp32") is None
        assert job.store.measurements(source="measured") == []  # what training reads
        job.store.remove_origin(taken["origin"])
        assert imported.fill_in(job, before).layers == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("linear m=1 k=8 n=8 relu,w8a8,nan", "line 2"),
        ("linear m=1 k=8 n=8 relu,w8a8,-1", "line 2"),
        ("linear m=1 k=8 n=8 relu,w8a8,1e99", "line 2"),
        ("linear m=1 k=8 relu,w8a8,1e-5", "line 2"),
        ("softmax m=1 k=8,w8a8,1e-5", "line 2"),
        ("linear m=1 k=8 n=8 relu,int8,1e-5", "int8"),
        ("linear m=1 k=8 n=8,w8a8,1e-5\nlinear m=1 k=8 n=8,w8a8,2e-5", "line 3.*second time"),
    ],
)
def test_bad_tables(line: str, words: str, tmp_path: Path) -> None:
    path = table_of(tmp_path / "t.csv", line)
    with pytest.raises(InputError, match=words):
        imported.read_table(path.read_bytes(), path, "x86-avx2")

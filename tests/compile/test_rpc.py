"""Devices behind TVM's RPC: a tracker and servers on the loopback address, and what goes wrong."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwmpq import targets, tensors
from hwmpq.devices import Device
from hwmpq.errors import DeviceError, InputError
from hwmpq.kernels import guest
from hwmpq.measure import emulated, fingerprint, probe
from hwmpq.measure.protocol import Cell, Protocol, time_block
from hwmpq.measure.remote import RemoteArtifact
from hwmpq.measure.rpc import pool as pools
from hwmpq.measure.rpc import server as servers
from hwmpq.measure.rpc import wire
from hwmpq.measure.rpc.pool import Pool, PoolWorker
from hwmpq.measure.rpc.server import Server, check_host
from hwmpq.measure.store import Store
from hwmpq.pipeline import Options
from hwmpq.stages.job import Silent, open_job
from hwmpq.stages.latency import profile
from hwmpq.stages.menu import make_menu

ROOT = Path(__file__).resolve().parents[2]
QUICK = Protocol(rounds=2, epoch_s=0.0005, deadline_s=20)


class Mute(Server):
    """Takes connections and says nothing."""

    def _welcome(self, connection: socket.socket, who: str, ticket: str) -> None:
        while connection.recv(4096):
            pass
        if self._tracker is not None:
            self._tracker.ticket = ""


class Slow(Server):
    """Needs a while for everything that it does itself."""

    def _session(self, connection: socket.socket, who: str) -> None:
        time.sleep(1.5)
        super()._session(connection, who)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)


@pytest.fixture(scope="module")
def tracker() -> Iterator[wire.Place]:
    """TVM's own, as `hwmpq devices tracker` runs it."""
    pytest.importorskip("tornado", reason="TVM's tracker needs tornado (extra rpc)")
    command = [sys.executable, "-m", "hwmpq.cli", "devices", "tracker", "--port", "0", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stderr is not None
        address = wire.place(process.stderr.readline().split()[-1])
        yield address
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=20)
        assert json.loads(told)["port"] == address[1] and process.returncode == 0


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return probe.make(tmp_path, {"kind": "llvm"})


def device(**more: Any) -> Device:
    return Device("boards", transport="rpc", **more)


def at(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


def registered(tracker: wire.Place, key: str, count: int) -> None:
    with wire.Tracker(tracker) as connection:
        for _ in range(200):
            if len(connection.servers(key)[0]) == count:
                return
            time.sleep(0.05)
    raise AssertionError("a server does not register")


# the whole of it


def net() -> Any:
    import torch

    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten())
    return torch.nn.Sequential(*layers, torch.nn.Linear(8 * 36, 4))


def test_a_pool_with_bad_servers_finishes_a_profile(
    tracker: wire.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server's sessions are killed again and again, one says nothing, one is slow."""
    file = tmp_path / "devices.toml"
    address = f"{tracker[0]}:{tracker[1]}"
    file.write_text(
        "version = 1\n[devices.pool]\n"
        f'transport = "rpc"\ntracker = "{address}"\nkey = "four"\ntarget = "x86-avx2"\n'
    )
    monkeypatch.setenv("HWMPQ_DEVICES", str(file))
    monkeypatch.setattr(pools, "CONNECT_S", 12.0)
    monkeypatch.setattr(pools, "REST_S", 15.0)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    lines: list[str] = []
    crashing = Server("four", tracker=tracker, session_s=0.6, log=lines.append)
    kinds = [crashing, Mute("four", tracker=tracker), Slow("four", tracker=tracker)]
    with ExitStack() as stack:
        for count, server in enumerate(kinds, 1):
            stack.enter_context(serving(server))
            registered(tracker, "four", count)  # so that the bad ones are met first
        stack.enter_context(serving(Server("four", tracker=tracker)))
        registered(tracker, "four", 4)
        store = str(tmp_path / "s.sqlite")
        options = Options(
            "test_rpc:net", device="pool", formats=("fp32", "w8a8"), store=store,
            input_shape=(1, 1, 8, 8), processes=2,
        )  # fmt: skip
        job = open_job(options, Silent(), here=False)
        with job.store:
            menu = make_menu(job.network, job.target, options.formats, ())
            facts = profile(job, menu)
    assert any("ends with status -9" in line for line in lines)
    known = pools.pool("pool", "", address, "four").records
    assert (tracker[0], crashing.port) in known and (tracker[0], kinds[1].port) in known
    assert "no answer to 'ping'" in known[tracker[0], kinds[1].port].reason
    wanted = {(x.workload.key, f) for x in job.network.layers for f in menu.kernels[x.name]}
    assert set(facts.layers) == wanted and len(wanted) >= 4
    with Store.open(store) as opened:
        rows = opened.rows()
    assert len(rows) == len(wanted) and {row.fingerprint for row in rows} == {fingerprint()}
    for row in rows:
        assert row.measurement.error == "" and len(row.measurement.samples_s) >= 5
        assert all(1e-8 < s < 1 for s in row.measurement.samples_s)


# one server


def trap(folder: Path) -> str:
    entry = "int __tvm_ffi_main(void *s, const void *a, int n, void *r) { __builtin_trap(); }"
    command = ["gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(folder / "trap.so")]
    subprocess.run(command, input=entry, text=True, check=True)
    return str(folder / "trap.so")


def test_a_crash_is_tried_twice_and_a_lost_session_again(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that crashes on two leases is the kernel's fault; the one that was being timed when
    the server was killed comes out well."""
    monkeypatch.setattr(pools, "REST_S", 0.05)
    lines: list[str] = []
    bad = replace(cell, key="bad", library=trap(tmp_path))
    with (
        serving(Server("", log=lines.append)) as server,
        PoolWorker(device(address=at(server), python=sys.executable)) as worker,
    ):
        killed = []

        def kill(progress: dict[str, Any]) -> None:
            if progress.get("step") == "time" and not killed:
                killed.append([process.kill() for process in server._sessions])

        request = {"cells": [cell.to_json()], **QUICK.to_json()}
        (answer,) = worker.call("time", request, 20, kill)["cells"]
        assert killed and not answer["error"] and answer["samples_s"]
        assert worker.pool.records == {}  # what was held against the server is forgotten
        assert sum("begins" in line for line in lines) == 2
        (failed,) = time_block([bad], QUICK, worker)
        assert re.fullmatch(r"crashed: SIG\w+ in step 'check'", failed.error)
        assert [record.failures for record in worker.pool.records.values()] == [2]
        assert sum("begins" in line for line in lines) == 3


def test_a_server_that_computes_wrongly_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The right answer is falsified: what the server computes is another one."""

    def falsified(folder: Path, target: Any) -> Cell:
        made = make(folder, target)
        tensors.save(Path(made.expected), {"2": np.zeros(256, np.int32)})
        return made

    make = probe.make
    monkeypatch.setattr(probe, "make", falsified)
    with serving(Server("")) as server:
        worker = PoolWorker(device(address=at(server), python=sys.executable), patience_s=0)
        with worker, pytest.raises(DeviceError, match="probe failed: wrong numbers: argument 2"):
            worker.describe()


def test_the_python_of_an_emulated_chip_behind_the_tracker(
    tracker: wire.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is leased, times the probe by a loop that was compiled for it, and runs no newer code."""
    target = targets.load("arm-cortex-a72")
    if not target.foreign or guest.missing(target) or not emulated.place().is_dir():
        pytest.skip("no emulated machine: run hwmpq devices setup arm-emulated")
    monkeypatch.setattr(pools, "CONNECT_S", 60.0)
    chip = replace(
        emulated.device("boards", target), transport="rpc", tracker=f"{tracker[0]}:{tracker[1]}",
        key="a72", emulated=False,
    )  # fmt: skip
    with serving(Server("a72", tracker=tracker)), PoolWorker(chip) as worker:
        newer = RemoteArtifact(worker, ROOT / "tests/golden/artifact-arm")
        with pytest.raises(DeviceError, match=r"cannot run .* for arm-cortex-a76.*asimddp"):
            newer.replay()


def test_a_stock_server_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run whatever it is given, but in itself."""
    stock = "import sys; sys.modules['torch'] = None; from tvm.rpc import _ffi_api; "
    stock += "_ffi_api.ServerLoop(int(sys.argv[1]))"
    popen = subprocess.Popen

    def start(command: list[str], **more: Any) -> Any:
        if "hwmpq.measure.rpc.session" in command:
            command = [sys.executable, "-c", stock, command[-1]]
        return popen(command, **more)

    monkeypatch.setattr(servers.subprocess, "Popen", start)
    with serving(Server("")) as server:
        worker = PoolWorker(device(address=at(server)), patience_s=0)
        with worker, pytest.raises(DeviceError, match="start it by `hwmpq devices serve`"):
            worker.describe()


# peers that are none


def hello(key: bytes, magic: int = wire.MAGIC, length: int | None = None) -> bytes:
    return struct.pack("<ii", magic, len(key) if length is None else length) + key


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (hello(b""), b""),
        (hello(b"client:k", length=1 << 30), b""),
        (hello(b"client:k", length=-1), b""),
        (b"GET / HTTP/1.1\r\n\r\n", b""),
        (hello(b"client:other"), struct.pack("<i", wire.MISMATCH)),
        (hello(b"client:"), struct.pack("<i", wire.MISMATCH)),
        (hello(b"\xff\xfe"), struct.pack("<i", wire.MISMATCH)),
        (b"", b""),  # silent
    ],
)
def test_a_bad_handshake_ends_itself_only(
    said: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(Server, "_session", lambda self, connection, who: connection.close())
    with serving(Server("k")) as server:
        with socket.create_connection(("127.0.0.1", server.port), 5) as peer:
            peer.sendall(said)
            with pytest.MonkeyPatch.context():
                assert _all(peer) == answer
        with socket.create_connection(("127.0.0.1", server.port), 5) as client:
            client.sendall(hello(b"client:k -timeout=10"))
            assert _all(client) == struct.pack("<ii", wire.MAGIC, 8) + b"server:k"


def _all(peer: socket.socket) -> bytes:
    data = b""
    try:
        while piece := peer.recv(4096):
            data += piece
    except ConnectionResetError:  # closed before all that we said was read
        pass
    return data


@contextmanager
def listening(body: Callable[[socket.socket], None]) -> Iterator[str]:
    """A TCP server that does `body` with each connection; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as own:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connection = own.accept()[0]
                except OSError:
                    return
                held.append(connection)
                try:
                    body(connection)
                except OSError:
                    pass

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{own.getsockname()[1]}"
        own.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def greet_then(data: bytes) -> Callable[[socket.socket], None]:
    def body(connection: socket.socket) -> None:
        connection.recv(4)
        connection.sendall(struct.pack("<i", wire.TRACKER_MAGIC) + data)

    return body


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda connection: None, "the tracker is silent"),
        (greet_then(b""), "the tracker is silent"),
        (greet_then(struct.pack("<i", 1 << 30)), "a message of 1073741824 bytes"),
        (greet_then(struct.pack("<i", 4) + b"nope"), "not JSON"),
        (greet_then(struct.pack("<i", 2) + b"[]"), "another form"),
        (greet_then(struct.pack("<i", 13) + b'[0, {"s": 1}]'), "another form"),
        (lambda connection: connection.sendall(b"HTTP"), "not a tracker"),
        (lambda connection: connection.close(), "closed by the other side|reset"),
    ],
)
def test_a_tracker_that_is_none(
    body: Callable[[socket.socket], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "ANSWER_S", 0.3)
    with listening(body) as address:
        began = time.monotonic()
        with pytest.raises(DeviceError, match=words):
            Pool("b", "", address, "k").lease(time.monotonic())
        assert time.monotonic() - began < 5


def test_no_tracker_and_no_device(tracker: wire.Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as own:
        free = f"127.0.0.1:{own.getsockname()[1]}"
    with pytest.raises(DeviceError, match=r"the tracker: .*refused.*hwmpq devices serve"):
        Pool("b", "", free, "k").lease(time.monotonic())
    with serving(Mute("other", tracker=tracker)):
        registered(tracker, "other", 1)
        nobody = Pool("b", "", f"{tracker[0]}:{tracker[1]}", "k")
        began = time.monotonic()
        with pytest.raises(DeviceError, match=r"key 'k' at 127.*there: .*other") as caught:
            nobody.lease(began + 0.5)
        assert 0.3 < time.monotonic() - began < 5 and caught.value.exit_code == 7


def test_an_unused_ticket_is_replaced_and_a_busy_server_waited_for(
    tracker: wire.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "UNUSED_S", 2.0)  # longer than what is between two leases
    monkeypatch.setattr(servers, "_PERIOD_S", 0.1)
    with serving(Server("busy", tracker=tracker)) as server:
        registered(tracker, "busy", 1)
        boards = Pool("b", "", f"{tracker[0]}:{tracker[1]}", "busy")
        place, first = boards.lease(time.monotonic() + 20)
        monkeypatch.setattr(wire, "ANSWER_S", 0.2)  # nobody else is there: it is not free at once
        with pytest.raises(DeviceError, match="all are in use"):
            Pool("b", "", boards.tracker, "busy").lease(time.monotonic())
        monkeypatch.setattr(wire, "ANSWER_S", 5.0)
        assert boards.lease(time.monotonic()) == (place, first)  # shared by our workers
        boards.release(place)
        boards.release(place)
        again, second = boards.lease(time.monotonic() + 20)
        assert place == again == ("127.0.0.1", server.port) and first != second
        boards.failed(place, DeviceError("x"))
        boards.failed(place, DeviceError("x"))
        with pytest.raises(DeviceError, match=r"all rest after failures; 127.* failed 2 times"):
            boards.lease(time.monotonic() + 1)  # it rests for longer than that


# the commands


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::", "board.lan"])
def test_only_the_loopback_address_unless_trusted(host: str) -> None:
    with pytest.raises(InputError, match=r"ssh tunnel.*--trust-network"):
        check_host(host, trusted=False)
    check_host(host, trusted=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_loopback_address(host: str) -> None:
    check_host(host, trusted=False)


def test_serve_refuses_the_network_and_a_taken_port() -> None:
    from hwmpq.cli.app import run

    assert run(["devices", "serve", "--key", "k", "--host", "0.0.0.0"]) == 2
    assert run(["devices", "tracker", "--host", "0.0.0.0"]) == 2
    assert run(["devices", "serve", "--key", "k", "--tracker", "nowhere"]) == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["devices", "serve", "--key", "k", "--port", port]) == 7

"""Device: how a machine is reached. Known devices stand in the user's `devices.toml`:

    version = 1

    [devices.bench-box]
    transport = "ssh"               # local (default), ssh, adb, rpc; exec: the prefix leads there
    address = "me@bench-box"        # for ssh; for adb the serial number, if there are several
    target = "x86-avx512-vnni"      # what to compile for when nobody says
    python = "/opt/tvm/bin/python"  # there, with numpy, apache-tvm and apache-tvm-ffi; python3
    cores = [2, 3]                  # pin the work to these (taskset); else wherever it is put
    prefix = ["numactl", "-m", "0"] # put before the worker's command line
    lock = "/tmp/bench.lock"        # a file there, held while timing; else one that all hwmpq share
    fingerprint = "x86_64-8c-1f..." # refuse any other machine; `hwmpq devices` shows it
    emulated = true                 # it gives the right numbers, its seconds mean nothing

    [devices.boards]                # any of the servers (`hwmpq devices serve`) at a tracker
    transport = "rpc"
    tracker = "127.0.0.1:9190"      # or address = "HOST:PORT" of one server
    key = "rpi5"                    # what the servers were started with

The file is searched in HWMPQ_DEVICES, else in the user's configuration folder. The device `local`,
this machine, always exists; the file may describe it more closely.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import platformdirs

from hwmpq.errors import DeviceError, InputError, UnknownName

VERSION = 1
#: Never ask for a password, give up on a silent host.
_SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5",
)  # fmt: skip


@dataclass(frozen=True)
class Device:
    """How one machine is reached.

    transport: 'local' starts the worker here, 'ssh' and 'adb' through these programs, 'exec' by the
    prefix, which leads to another environment (an emulator, a container), 'rpc' through a server of
    TVM's protocol. prefix: words put before the worker's command line. cores: logical CPUs to pin
    to, none = not pinned. lock: a file on the device that whoever uses it holds, '' = the one that
    all hwmpq share. python: the interpreter there, '' = ours, or python3 elsewhere. target: default
    target, '' = the machine's native. tracker, key: which servers, for rpc. fingerprint: of the one
    machine meant, '' = any. emulated: nothing is ever timed there.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    name: str
    transport: Literal["local", "ssh", "adb", "exec", "rpc"] = "local"
    address: str = ""
    prefix: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()
    lock: str = ""
    python: str = ""
    target: str = ""
    tracker: str = ""
    key: str = ""
    fingerprint: str = ""
    emulated: bool = False

    def __post_init__(self) -> None:
        rpc = self.transport == "rpc"
        if self.address and not re.fullmatch(r"[\w.:@%][\w.:@%-]*", self.address):
            raise ValueError("address: not the name of a machine")
        if bool(self.address) != (self.transport == "ssh") and self.transport not in ("adb", "rpc"):
            raise ValueError("address: for ssh needed, for adb and rpc possible, else not taken")
        if self.transport == "exec" and not self.prefix:
            raise ValueError("prefix: needed for exec")
        if rpc and bool(self.address) == bool(self.tracker):
            raise ValueError("rpc needs either the address of a server or that of a tracker")
        if rpc and not re.fullmatch(r"[\w.:%-]+:\d{1,5}", self.address or self.tracker):
            raise ValueError("rpc: an address is HOST:PORT")
        if not rpc and (self.tracker or self.key):
            raise ValueError("tracker, key: for rpc only")
        if not re.fullmatch(r"[\w.-]{0,80}", self.key) or (self.tracker and not self.key):
            raise ValueError("key: letters, digits, - _ . and not empty with a tracker")

    @property
    def remote(self) -> bool:
        """Is it another machine or environment, which sees neither our files nor our hwmpq?"""
        return self.transport != "local"

    @property
    def start(self) -> tuple[str, ...]:
        """Words before the interpreter, on the device."""
        lock = ("env", f"HWMPQ_TIMING_LOCK={self.lock}") if self.lock else ()
        pin = ("taskset", "-c", ",".join(map(str, self.cores))) if self.cores else ()
        return (*lock, *pin, *self.prefix)

    def there(self, arguments: Sequence[str]) -> list[str]:
        """The words, on the device, that run Python with these arguments."""
        python = self.python or ("python3" if self.remote else sys.executable)
        return [*self.start, python, *arguments]

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line, here, that runs Python with these arguments on the device; for rpc
        that of one server, whose ticket comes in the environment."""
        there = self.there(arguments)
        if self.transport == "ssh":  # all but exec hand one line to a shell
            return [*_SSH, self.address, shlex.join(there)]
        if self.transport == "rpc":
            client = [sys.executable, "-P", "-m", "hwmpq.measure.rpc.client"]
            return [*client, self.address, shlex.join(there)]
        if self.transport == "adb":
            choice = ("-s", self.address) if self.address else ()
            return ["adb", *choice, "shell", "-T", shlex.join(there)]
        return there

    def check_times(self) -> None:
        """Raises InputError where seconds mean nothing."""
        if self.emulated:
            raise InputError(
                "times of an emulated device", self.name, "a chip: ssh, adb or rpc",
                "An emulator proves numbers and instructions, not seconds: describe a board in "
                f"{path()} and name it with --device, or go by estimated cycles with "
                "--allow-estimates; `hwmpq compile` runs on this one.",
            )  # fmt: skip

    def recognize(self, fingerprint: str) -> None:
        """Raises DeviceError for another machine than the one that the description names."""
        if self.fingerprint and fingerprint != self.fingerprint:
            raise DeviceError(
                f"device {self.name} is another machine", fingerprint, self.fingerprint,
                "Its times belong to that machine only: correct the description, or the address.",
            )  # fmt: skip


def load(name: str = "local") -> Device:
    """The device of that name.

    Raises: UnknownName with the nearest names; InputError for a file that breaks the schema.
    """
    known = load_all()
    if name not in known:
        raise UnknownName("device", name, known, f"Devices are described in {path()}.")
    return known[name]


def load_all() -> dict[str, Device]:
    """Every known device by name. Raises: InputError naming the file and every broken rule."""
    from pydantic import TypeAdapter, ValidationError

    devices: dict[str, Device] = {}
    for name, entry in {"local": {}, **_entries(path())}.items():
        try:
            text = json.dumps({**entry, "name": name}, default=str)
            devices[name] = TypeAdapter(Device).validate_json(text)
        except ValidationError as error:
            broken = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise InputError(
                f"device {name!r} in {path()}", "; ".join(broken), next="Correct the file."
            ) from error
    return devices


def path() -> Path:
    """Where the user's devices are described; the file need not exist."""
    given = os.environ.get("HWMPQ_DEVICES")
    return Path(given) if given else platformdirs.user_config_path("hwmpq") / "devices.toml"


def append(device: Device) -> None:
    """Describe one more device in the file, which is made where there is none."""
    lines = [f"\n[devices.{device.name}]"]
    for field in fields(device):
        value = getattr(device, field.name)
        if field.name != "name" and value != field.default:
            # JSON's texts, lists and booleans are TOML's too
            lines.append(f"{field.name} = {json.dumps(value)}")
    path().parent.mkdir(parents=True, exist_ok=True)
    begun = path().exists()
    with path().open("a", encoding="utf-8") as file:
        file.write(("" if begun else f"version = {VERSION}\n") + "\n".join(lines) + "\n")


def _entries(file: Path) -> dict[str, dict[str, Any]]:
    if not file.exists() and "HWMPQ_DEVICES" not in os.environ:
        return {}
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"unreadable device file {file}", error, "a TOML file", "Correct it, or move it away."
        ) from error
    if data.pop("version", None) != VERSION:
        raise InputError(f"device file {file}", "no or another version", f"version = {VERSION}")
    devices: dict[str, dict[str, Any]] = data.pop("devices", {})
    if data:
        raise InputError(f"unknown key in device file {file}", ", ".join(data), "version, devices")
    if not isinstance(devices, dict) or not all(isinstance(e, dict) for e in devices.values()):
        raise InputError(f"device file {file}", "another value", "[devices.NAME] tables")
    for name, entry in devices.items():
        if "name" in entry:
            raise InputError(
                f"device {name!r} in {file} has a key `name`", next="The table names it: remove it."
            )
    return devices

"""Device: how a machine is reached. Known devices stand in the user's `devices.toml`:

    version = 1

    [devices.bench-box]
    target = "x86-avx512-vnni"      # optional: what to compile for when nobody says
    cores = [2, 3]                  # pin the work to these; left out: wherever the system puts it
    prefix = ["numactl", "-m", "0"] # put before the worker's command line

The file is searched in HWMPQ_DEVICES, else in the user's configuration folder. The device `local`,
this machine, always exists; the file may describe it more closely.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import platformdirs

from hwmpq.errors import InputError, UnknownName

VERSION = 1


@dataclass(frozen=True)
class Device:
    """How one machine is reached.

    transport: 'local' starts the worker here. prefix: words put before the worker's command line.
    cores: logical CPUs to pin to, none = not pinned. lock: the file that whoever uses the device
    holds, so that two runs never time at once. target: default target, '' = the machine's native.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    name: str
    lock: Path
    transport: Literal["local"] = "local"
    prefix: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()
    target: str = ""


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

    entries = {"local": {}, **_entries(path())}
    locks = platformdirs.user_state_path("hwmpq") / "locks"
    devices: dict[str, Device] = {}
    for name, entry in entries.items():
        try:
            text = json.dumps({"lock": locks / f"{name}.lock", **entry, "name": name}, default=str)
            devices[name] = TypeAdapter(Device).validate_json(text)
        except ValidationError as error:
            broken = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise InputError(f"device {name!r} in {path()}", "; ".join(broken)) from error
    return devices


def path() -> Path:
    """Where the user's devices are described; the file need not exist."""
    given = os.environ.get("HWMPQ_DEVICES")
    return Path(given) if given else platformdirs.user_config_path("hwmpq") / "devices.toml"


def _entries(file: Path) -> dict[str, dict[str, Any]]:
    if not file.exists() and "HWMPQ_DEVICES" not in os.environ:
        return {}
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"unreadable device file {file}", error) from error
    if data.pop("version", None) != VERSION:
        raise InputError(f"device file {file}", "no or another version", f"version = {VERSION}")
    devices: dict[str, dict[str, Any]] = data.pop("devices", {})
    if data:
        raise InputError(f"unknown key in device file {file}", ", ".join(data), "version, devices")
    if not isinstance(devices, dict) or not all(isinstance(e, dict) for e in devices.values()):
        raise InputError(f"device file {file}", "another value", "[devices.NAME] tables")
    for name, entry in devices.items():
        if "name" in entry:
            raise InputError(f"device {name!r} in {file}", "name", next="The table names it.")
    return devices

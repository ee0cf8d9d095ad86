"""`hwmpq doctor`: is all well here, what is missing, and what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hwmpq.cli.command import command
from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import HwmpqError, InputError

#: Extra -> a module that it brings, and what it is for.
_EXTRAS = {
    "onnx": ("onnx", "models from file.onnx, export to ONNX"),
    "bench": ("onnxruntime", "other runtimes beside ours"),
    "postgres": ("psycopg", "a store that a team shares"),
    "parquet": ("pyarrow", "the store as .parquet"),
    "rpc": ("tornado", "a pool of boards"),
    "ray": ("ray", "--executor ray"),
    "sign": ("cryptography", "signed artifacts"),
}
#: Bytes that a store and the artifacts of a few runs take.
_ROOM = 2 << 30


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    command(app, panel="This machine")(doctor)


def doctor(
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="The store to look at.")
    ] = None,
) -> Answer:
    """Check the installation: versions, the TVM pair, this CPU, a kernel compiled and run, the
    store; and tell what disturbs timing here and which extras are there.

    Each line says what to do about it. Exit code 0 when all is well, 7 for a store or device that
    cannot be used, else 2. A note is no failure.

    Example: hwmpq doctor
    """
    checks = [
        _checked("python", _python),
        _checked("packages", _packages),
        _checked("tvm pair", _tvm),
        _checked("target", _target),
        _checked("compiler", _compiler),
        _checked("kernel", _kernel),
        _checked("devices", _devices),
        _checked("store", lambda: _store(store)),
        _checked("disk", lambda: _disk(store)),
        *(Check("timing", True, doubt, note=True) for doubt in _doubts()),
        Check("other chips", True, _foreign(), note=True),
        Check("extras", True, _extras(), note=True),
    ]
    failed = [check for check in checks if not check.ok]
    width = max(len(check.name) for check in checks)
    lines = [f"{check.word:<4}  {check.name:<{width}}  {check.told}" for check in checks]
    lines.append(f"{len(failed)} of {len(checks)} FAIL" if failed else "All is well.")
    told = {
        "version": VERSION, "status": "error" if failed else "met",
        "checks": [check.json() for check in checks],
    }  # fmt: skip
    return Answer(told, "\n".join(lines), max((check.exit_code for check in failed), default=0))


@dataclass(frozen=True)
class Check:
    """A line. note: it is worth knowing and can be lived with."""

    name: str
    ok: bool
    told: str
    exit_code: int = 0
    note: bool = False

    @property
    def word(self) -> str:
        return "note" if self.note else "ok" if self.ok else "FAIL"

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name, "ok": self.ok, "note": self.note, "told": self.told,
            "exit_code": self.exit_code,
        }  # fmt: skip


def _checked(name: str, body: Callable[[], str]) -> Check:
    try:
        return Check(name, True, body())
    except HwmpqError as error:
        return Check(name, False, str(error), error.exit_code)
    except Exception as error:  # whatever a broken installation raises is the finding
        return Check(name, False, f"{type(error).__name__}: {error}", 2)


def _python() -> str:
    return f"{sys.version.split()[0]} at {sys.executable}"


def _packages() -> str:
    from hwmpq.toolchain import RECORDED, versions

    found = versions()
    missing = [name for name in RECORDED if name not in found]
    if missing:
        raise InputError(f"not installed: {', '.join(missing)}", next="Run: pip install hwmpq")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _tvm() -> str:
    from hwmpq import toolchain

    toolchain.check()
    import tvm

    return f"tvm {tvm.__version__} loads"


def _target() -> str:
    from hwmpq import targets

    return f"{targets.native().name} is native here"


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise InputError("no C++ compiler", "none of c++, g++, clang++", next="Install g++.")


def _kernel() -> str:
    from hwmpq import targets
    from hwmpq.measure import probe
    from hwmpq.measure.kernel import check_kernel, load_kernel

    with tempfile.TemporaryDirectory(prefix="hwmpq-") as folder:
        cell = probe.make(Path(folder), targets.native().tvm)
        check_kernel(load_kernel(cell), cell)
    return "one was compiled, linked and run: right numbers"


def _devices() -> str:
    from hwmpq import devices

    return ", ".join(devices.load_all())


def _store(where: str | None) -> str:
    from hwmpq.cli.stores import shown, sqlite_file
    from hwmpq.measure.store import Store

    file = sqlite_file(where)
    if file is not None and not file.exists():
        return f"{file}, not made yet"
    with Store.open(where) as store:
        return f"{shown(where)}, {len(store.measurements())} measurements"


def _disk(where: str | None) -> str:
    from hwmpq.cli.stores import sqlite_file

    file = sqlite_file(where)
    places = {"temporary files": Path(tempfile.gettempdir())}
    if file is not None:
        places["the store"] = next(p for p in file.absolute().parents if p.exists())
    free = {what: shutil.disk_usage(place).free for what, place in places.items()}
    for what, nbytes in free.items():
        if nbytes < _ROOM:
            raise InputError(
                f"room for {what}", f"{nbytes / 1e9:.1f} GB in {places[what]}",
                f"{_ROOM / 1e9:.1f} GB or more", "Make room, or set TMPDIR or HWMPQ_STORE.",
            )  # fmt: skip
    return ", ".join(f"{nbytes / 1e9:.0f} GB free for {what}" for what, nbytes in free.items())


def _doubts() -> list[str]:
    """What makes times of this machine hard to trust, now."""
    from hwmpq.measure.environment import conditions, doubts

    now = conditions()
    found = doubts(now)
    if now["virtual"]:
        found.append("a virtual machine: neighbours disturb it unseen, and clocks are not shown")
    if len(os.sched_getaffinity(0)) == 1:
        found.append("one core: timing and everything else share it")
    return found


def _foreign() -> str:
    from hwmpq import targets
    from hwmpq.kernels import guest

    foreign = [target for target in map(targets.load, targets.names()) if target.emulator]
    lacking = sorted({program for target in foreign for program in guest.missing(target)})
    if lacking:
        return f"kernels of ARM and RISC-V cannot be run: no {', '.join(lacking)}. {guest.DEBIAN}"
    return f"kernels of {len(foreign)} ARM and RISC-V targets can be run under QEMU"


def _extras() -> str:
    from importlib.util import find_spec

    lacking = [
        f"{name} ({use})" for name, (module, use) in _EXTRAS.items() if not find_spec(module)
    ]
    if not lacking:
        return "all are there"
    return f"not installed: {', '.join(lacking)}. To add one: pip install 'hwmpq[NAME]'"

"""What can be compiled for, and whether all is well here: targets, doctor."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hwmpq.cli.command import command
from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import HwmpqError

_PANEL = "This machine"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for body in (targets, doctor):
        command(app, panel=_PANEL)(body)


def targets() -> Answer:
    """The targets that can be compiled for, and whether this CPU can run them.

    A target is a TOML file of facts; more folders of them by HWMPQ_TARGET_PATH.

    Example: hwmpq targets --json
    """
    from hwmpq import targets as known

    rows: list[dict[str, Any]] = []
    for name in known.names():
        target = known.load(name)
        missing = known.satisfied_by_host(target)
        rows.append(
            {
                "name": name, "description": target.description, "rank": target.rank,
                "features": sorted(target.features), "runs_here": not missing, "missing": missing,
            }
        )  # fmt: skip
    best = max((r for r in rows if r["runs_here"]), key=lambda r: r["rank"], default=None)
    native = None if best is None else best["name"]

    def show(console: Any) -> None:
        from hwmpq.cli.tables import table

        cells = [
            [
                r["name"] + (" (native)" if r["name"] == native else ""),
                "yes" if r["runs_here"] else "lacks " + " ".join(r["missing"]),
                " ".join(r["features"]), r["description"],
            ]
            for r in rows
        ]  # fmt: skip
        console.print(table(["target", "runs here", "features", "what it is"], cells))

    return Answer({"version": VERSION, "native": native, "targets": rows}, show)


def doctor(
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="The store to look at.")
    ] = None,
) -> Answer:
    """Check the installation: versions, the TVM pair, this CPU, the compiler, the store.

    Each line says what to do about it. Exit code 0 when all is well, 7 for a store or device that
    cannot be used, else 2.

    Example: hwmpq doctor
    """
    checks = [
        _check("python", _python),
        _check("packages", _packages),
        _check("tvm pair", _tvm),
        _check("target", _target),
        _check("compiler", _compiler),
        _check("devices", _devices),
        _check("store", lambda: _store(store)),
    ]
    failed = [c for c in checks if not c["ok"]]
    width = max(len(c["name"]) for c in checks)
    lines = [f"{'ok  ' if c['ok'] else 'FAIL'}  {c['name']:<{width}}  {c['told']}" for c in checks]
    exit_code = max((int(c["exit_code"]) for c in failed), default=0)
    told = {"version": VERSION, "status": "error" if failed else "met", "checks": checks}
    return Answer(told, "\n".join(lines), exit_code)


def _check(name: str, body: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "told": body(), "exit_code": 0}
    except HwmpqError as error:
        return {"name": name, "ok": False, "told": str(error), "exit_code": error.exit_code}
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        return {"name": name, "ok": False, "told": told, "exit_code": 2}


def _python() -> str:
    return f"{sys.version.split()[0]} at {sys.executable}"


def _packages() -> str:
    from hwmpq.errors import InputError
    from hwmpq.toolchain import RECORDED, versions

    found = versions()
    missing = [name for name in RECORDED if name not in found]
    if missing:
        raise InputError("not installed", ", ".join(missing), next="Run: pip install hwmpq")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _tvm() -> str:
    from hwmpq import toolchain

    toolchain.check()
    import tvm

    return f"tvm {tvm.__version__} loads"


def _target() -> str:
    from hwmpq import targets as known

    return f"{known.native().name} is native here"


def _compiler() -> str:
    from hwmpq.errors import InputError

    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise InputError("no C++ compiler", "none of c++, g++, clang++", next="Install g++.")


def _devices() -> str:
    from hwmpq import devices as known

    return ", ".join(known.load_all())


def _store(where: str | None) -> str:
    from hwmpq.cli.stores import shown, sqlite_file
    from hwmpq.measure.store import Store

    file = sqlite_file(where)
    if file is not None and not file.exists():
        return f"{file}, not made yet"
    with Store.open(where) as store:
        return f"{shown(where)}, {len(store.measurements())} measurements"

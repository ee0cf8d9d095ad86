"""store ls, path, export, import, merge, remove, prune: look at the measurements and move them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hwmpq.cli import store_compare
from hwmpq.cli.command import command
from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import InputError

group = typer.Typer(
    help="Measurements and facts, kept for good: look at them, move them.", no_args_is_help=True
)
Url = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", help="File or URL; HWMPQ_STORE, else the user's own."),
]


def path(store: Url = None) -> Answer:
    """Where the store is; the file need not exist yet.

    Example: hwmpq store path
    """
    return Answer({"version": VERSION, "store": shown(store)}, shown(store))


def ls(store: Url = None) -> Answer:
    """What is in it: cells, failures and dates per target, machine and source.

    Example: hwmpq store ls
    """
    from hwmpq.measure.store import Store

    with Store.open(store) as opened:
        rows = opened.rows()
    groups: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for row in rows:
        m = row.measurement
        key = (row.target, row.fingerprint, m.source, row.origin)
        found = groups.setdefault(key, {"cells": 0, "failed": 0, "newest": 0.0, "formats": set()})
        found["cells"] += 1
        found["failed"] += bool(m.error)
        found["newest"] = max(found["newest"], row.created)
        found["formats"].add(m.format)
    names = ("target", "fingerprint", "source", "origin")
    told = [
        {**dict(zip(names, key, strict=True)), **value, "formats": sorted(value["formats"])}
        for key, value in sorted(groups.items())
    ]

    def show(console: Any) -> None:
        from hwmpq.cli.tables import table

        console.print(f"{shown(store)}: {len(rows)} cells", markup=False)
        cells = [
            [
                g["target"], g["fingerprint"], g["source"], g["origin"], str(g["cells"]),
                str(g["failed"]), time.strftime("%Y-%m-%d %H:%M", time.localtime(g["newest"])),
            ]
            for g in told
        ]  # fmt: skip
        console.print(table([*names, "cells", "failed", "newest"], cells))

    return Answer(
        {"version": VERSION, "store": shown(store), "cells": len(rows), "groups": told}, show
    )


Rows = Annotated[Path, typer.Argument(metavar="FILE", help="NAME.jsonl, NAME.csv or NAME.parquet.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it; without this, only list.")]


def export(file: Rows, store: Url = None) -> Answer:
    """Write every row of every generation to a file; import gives the same rows.

    The columns are the store's: samples are a JSON list of seconds per call.

    Example: hwmpq store export all.jsonl
    """
    from hwmpq.measure.store import Store

    with Store.open(store) as opened:
        count = opened.export_file(file)
    told = {"version": VERSION, "file": str(file), "rows": count}
    return Answer(told, f"{count} rows written to {file}")


def import_(file: Rows, store: Url = None) -> Answer:
    """Add the rows of an export that are not here yet: all of them or none.

    The result.json of a bundle is taken in too, under an origin of its own.

    Example: hwmpq store import all.jsonl
    """
    from hwmpq.measure.bundle import is_result
    from hwmpq.measure.store import Store

    if not file.is_file():
        raise InputError("no such store export", file, "a file made by `hwmpq store export`")
    if is_result(file):
        return _import_result(file, store)
    with Store.open(store) as opened:
        count = opened.import_file(file)
    told = {"version": VERSION, "file": str(file), "rows": count}
    return Answer(told, f"{count} new rows from {file}")


def _import_result(file: Path, store: str | None) -> Answer:
    from hwmpq.measure.store import Store
    from hwmpq.stages.bundle import take_in

    with Store.open(store) as opened:
        taken = take_in(opened, file)
    told = {
        "version": VERSION, "file": str(file), "rows": len(taken.rows), "origin": taken.origin,
        "fingerprint": taken.fingerprint, "target": taken.target,
    }  # fmt: skip
    return Answer(told, f"{len(taken.rows)} cells of {taken.fingerprint} as {taken.origin}")


def merge(
    into: Annotated[str, typer.Argument(metavar="A", help="The store that grows: file or URL.")],
    source: Annotated[str, typer.Argument(metavar="B", help="The store that is only read.")],
) -> Answer:
    """Add to store A the rows of store B that it does not have: all of them or none.

    Every generation keeps its date and its samples. Merging again changes nothing.

    Example: hwmpq store merge postgresql+psycopg://me@server/hwmpq board.sqlite
    """
    from hwmpq.measure.store import Store

    _must_exist(source)
    with Store.open(into) as a, Store.open(source) as b:
        count = a.merge(b)
        names = str(a.address), str(b.address)
    told = {"version": VERSION, "store": names[0], "from": names[1], "rows": count}
    return Answer(told, f"{count} new rows from {names[1]} in {names[0]}")


def remove(
    origin: Annotated[str, typer.Argument(metavar="ORIGIN", help="As `hwmpq store ls` names it.")],
    yes: Yes = False,
    store: Url = None,
) -> Answer:
    """Delete what one import brought, and nothing else. Lists it unless --yes.

    Example: hwmpq store remove board-7 --yes
    """
    from hwmpq.measure.store import Store

    with Store.open(store) as opened:
        found = opened.imported(origin)
        if yes:
            opened.remove_origin(origin)
    told = {
        "version": VERSION, "store": shown(store), "origin": origin,
        "measurements": found.measurements, "facts": found.facts, "done": yes,
    }  # fmt: skip
    rows = f"{found.measurements} measurements and {found.facts} facts of {origin}"
    return Answer(told, f"removed: {rows}" if yes else f"to remove: {rows}; --yes does it")


def prune(
    yes: Yes = False,
    failed: Annotated[bool, typer.Option("--failed", help="Also cells that failed.")] = False,
    backup: Annotated[
        Path | None,
        typer.Option("--backup", metavar="FILE.jsonl", help="Where the dropped rows are kept."),
    ] = None,
    store: Url = None,
) -> Answer:
    """Drop rows that a newer one has replaced. Lists them unless --yes.

    What is dropped is first written to a file that `hwmpq store import` takes back.

    Example: hwmpq store prune --yes
    """
    from hwmpq.measure.store import Store

    _must_exist(store)
    with Store.open(store) as opened:
        found = {"replaced by a newer row": opened.replaced()}
        if failed:
            found["failed"] = opened.failed()
        dropped = {reason: len(items) for reason, items in found.items() if items}
        told: dict[str, Any] = {
            "version": VERSION, "store": shown(store), "dropped": dropped,
            "done": False, "backup": None,
        }  # fmt: skip
        listed = ", ".join(f"{n} {what}" for what, n in dropped.items()) or "nothing"
        if not yes or not dropped:
            return Answer(told, f"to drop: {listed}" + ("" if yes else "; --yes does it"))
        kept = backup or _beside(opened.address.file)
        opened.drop([item for items in found.values() for item in items], kept)
    told |= {"done": True, "backup": str(kept)}
    return Answer(told, f"dropped: {listed}; they are kept in {kept}")


def shown(store: str | None) -> str:
    """The place of the store, without a password."""
    from hwmpq.measure.address import Address

    return str(Address.of(store))


def sqlite_file(store: str | None) -> Path | None:
    """The file of a SQLite store, which need not exist; None for another database."""
    from hwmpq.measure.address import Address

    return Address.of(store).file


def _must_exist(store: str | None) -> None:
    file = sqlite_file(store)
    if file is not None and not file.is_file():
        raise InputError("no such store", file, "a store's file, or a URL")


def _beside(file: Path | None) -> Path:
    """A new name: beside the store's file, or in the working folder for a server."""
    name = f"{file.name if file else 'store'}.{time.strftime('%Y%m%d-%H%M%S')}.dropped.jsonl"
    return (file.parent if file else Path.cwd()) / name


for _body in (path, ls, export, merge, remove, prune):
    command(group)(_body)
command(group, name="import")(import_)
command(group)(store_compare.compare)

"""store ls, export, import, prune, path: look at the measurements and move them."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from hwmpq.cli.command import command
from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import InputError, StoreError

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


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl")], store: Url = None
) -> Answer:
    """Write every row of every generation to a file, one JSON object per line.

    Example: hwmpq store export all.jsonl
    """
    from hwmpq.measure.store import Store

    with Store.open(store) as opened:
        count = opened.export_jsonl(file)
    told = {"version": VERSION, "file": str(file), "rows": count}
    return Answer(told, f"{count} rows written to {file}")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl")], store: Url = None
) -> Answer:
    """Add the rows of an export that are not here yet: all of them or none.

    Example: hwmpq store import all.jsonl
    """
    from hwmpq.measure.store import Store

    if not file.is_file():
        raise InputError("no such store export", file, "a file made by `hwmpq store export`")
    with Store.open(store) as opened:
        count = opened.import_jsonl(file)
    told = {"version": VERSION, "file": str(file), "rows": count}
    return Answer(told, f"{count} new rows from {file}")


def prune(
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, only list.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Also cells that failed.")] = False,
    store: Url = None,
) -> Answer:
    """Drop rows that a newer one has replaced. Lists them unless --yes; a backup stays.

    Only SQLite stores, and only while nothing else uses the store.

    Example: hwmpq store prune --yes
    """
    from hwmpq.measure.store import Store

    place = _file_to_prune(store)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".prune.") as folder:
        everything, rest = Path(folder) / "all.jsonl", Path(folder) / "rest.jsonl"
        with Store.open(store) as opened:
            total = opened.export_jsonl(everything)
        dropped = _drop(everything, rest, failed)
        told: dict[str, Any] = {
            "version": VERSION, "store": str(place), "rows": total,
            "dropped": dict(dropped), "done": False, "backup": None,
        }  # fmt: skip
        listed = ", ".join(f"{n} {what}" for what, n in dropped.items()) or "nothing"
        if not yes or not dropped:
            return Answer(told, f"to drop: {listed}" + ("" if yes else "; --yes does it"))
        pruned = Path(folder) / "pruned.sqlite"
        with Store.open(pruned) as new:
            kept = new.import_jsonl(rest)
        if kept != total - sum(dropped.values()):
            raise StoreError("the pruned store is not whole", kept, next="Nothing was changed.")
        backup = place.with_name(f"{place.name}.{time.strftime('%Y%m%d-%H%M%S')}.backup")
        for suffix in ("-wal", "-shm"):
            if Path(f"{place}{suffix}").exists() or Path(f"{pruned}{suffix}").exists():
                raise StoreError("the store is in use", place, next="End the other hwmpq first.")
        os.link(place, backup)
        os.replace(pruned, place)
    told |= {"done": True, "backup": str(backup)}
    return Answer(told, f"dropped: {listed}; the whole store as it was: {backup}")


def shown(store: str | None) -> str:
    """The place of the store, without a password."""
    from hwmpq.measure.store import default_path

    where = str(store or os.environ.get("HWMPQ_STORE") or default_path())
    if "://" in where and "@" in where:
        scheme, _, rest = where.partition("://")
        return f"{scheme}://***@{rest.rpartition('@')[2]}"
    return where


def sqlite_file(store: str | None) -> Path | None:
    """The file of a SQLite store, which need not exist; None for another database."""
    where = shown(store).removeprefix("sqlite:///")
    return None if "://" in where else Path(where).expanduser().absolute()


def _file_to_prune(store: str | None) -> Path:
    place = sqlite_file(store)
    if place is None:
        raise InputError("this kind of store cannot be pruned here", shown(store), "a SQLite file")
    if not place.is_file():
        raise InputError("no store yet", place)
    return place


def _drop(everything: Path, rest: Path, failed: bool) -> Counter[str]:
    """Copy the lines that stay; what was left out, by reason."""
    newest: dict[tuple[str, ...], tuple[float, int]] = {}
    for row in _rows(everything):
        newest[_key(row)] = max(newest.get(_key(row), (0.0, 0)), _age(row))
    dropped: Counter[str] = Counter()
    with rest.open("w", encoding="utf-8") as file, everything.open(encoding="utf-8") as source:
        file.write(next(source))
        for line in source:
            row = json.loads(line)
            if _age(row) != newest[_key(row)]:
                dropped["replaced by a newer row"] += 1
            elif failed and row.get("error"):
                dropped["failed"] += 1
            else:
                file.write(line)
    return dropped


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as source:
        next(source)
        yield from map(json.loads, source)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["table"], row.get("stage", ""), row["key"]


def _age(row: dict[str, Any]) -> tuple[float, int]:
    return row["created"], row["generation"]


command(group)(path)
command(group)(ls)
command(group)(export)
command(group, name="import")(import_)
command(group)(prune)

"""The store: every measurement and every costly fact, kept for good, each committed at once.

Rows are never changed or deleted. A second, different value under a key becomes a new generation;
reading gives the newest. So a crash at any point loses at most the row that was being written, and
`fresh` can ignore what is there without losing it. SQLite by default, PostgreSQL by URL.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import sqlalchemy as sa

from hwmpq.errors import InputError, StoreError
from hwmpq.measure import schema
from hwmpq.types import Measurement, Source, Workload, digest

_RETRIES = 5


@dataclass(frozen=True)
class Row:
    """A measurement and where it comes from. origin: 'local' or the bundle it was imported from;
    created: seconds since 1970."""

    measurement: Measurement
    target: str = ""
    fingerprint: str = ""
    toolchain: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "local"
    generation: int = 1
    created: float = 0.0


class Store:
    """An open store. fresh: what others wrote, or wrote before, is not read."""

    def __init__(self, engine: sa.Engine, fresh: bool = False):
        self._engine = engine
        self._fresh = fresh
        self._mine: set[tuple[str, ...]] = set()

    @staticmethod
    def open(where: str | Path | None = None, fresh: bool = False) -> Store:
        """Open or create. where: a file, a database URL, or None: $HWMPQ_STORE, else the user's
        data folder.

        Raises StoreError when it cannot be read, is no store, or is of a newer version.
        """
        where = where or os.environ.get("HWMPQ_STORE") or default_path()
        with _reported(_shown(str(where))):
            engine = schema.connect(str(where))
            try:
                schema.prepare(engine)
            except BaseException:
                engine.dispose()
                raise
        return Store(engine, fresh)

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # measurements

    def put(
        self,
        measurement: Measurement,
        target: str = "",
        fingerprint: str = "",
        toolchain: Mapping[str, Any] | None = None,
        origin: str = "local",
    ) -> None:
        """Save a measurement; on return it is committed. The same again changes nothing.

        Raises StoreError (disk full, locked, lost); then nothing of it was written.
        """
        values = {
            "key": measurement.key,
            "workload": _dump(measurement.workload.to_json()),
            "format": measurement.format,
            "kernel": measurement.kernel,
            "threads": measurement.threads,
            "samples": _dump(list(measurement.samples_s)),
            "error": measurement.error,
            "source": measurement.source,
            "quality": _dump(dict(measurement.quality)),
            "target": target,
            "fingerprint": fingerprint,
            "toolchain": _dump(dict(toolchain or {})),
            "origin": origin,
        }
        self._append(schema.measurements, values)

    def measurement(self, key: str) -> Measurement | None:
        """The newest measurement under the key."""
        row = self._newest(schema.measurements, (key,))
        return None if row is None else _row(row).measurement

    def measurements(
        self, target: str | None = None, source: Source | None = None
    ) -> list[Measurement]:
        """The newest measurement of every key, oldest first; failed ones too."""
        return [row.measurement for row in self.rows(target, source)]

    def rows(self, target: str | None = None, source: Source | None = None) -> list[Row]:
        """As `measurements`, with where each comes from."""
        table = schema.measurements
        query = sa.select(table).where(schema.is_newest(table)).order_by(table.c.created)
        with self._reading() as connection:
            found = [_row(item) for item in connection.execute(query).mappings()]
        return [
            row
            for row in found
            if (target is None or row.target == target)
            and (source is None or row.measurement.source == source)
            and self._visible((row.measurement.key,))
        ]

    # facts

    def put_fact(self, stage: str, key: str, value: Any) -> None:
        """Save a JSON value (nan allowed) or bytes under the stage and the key. Raises as `put`."""
        values: dict[str, Any] = {"stage": stage, "key": key, "value": None, "blob": None}
        if isinstance(value, bytes):
            values["blob"] = value
        else:
            values["value"] = _dump(value)
        self._append(schema.facts, values)

    def fact(self, stage: str, key: str) -> Any:
        """The newest value put under the stage and the key, or None."""
        row = self._newest(schema.facts, (stage, key))
        if row is None:
            return None
        return row["blob"] if row["value"] is None else json.loads(row["value"])

    # moving

    def export_jsonl(self, path: str | Path) -> int:
        """Write all rows of all generations, one JSON object per line; returns their number."""
        count = 0
        with _reported(str(path)), self._reading() as connection:
            part = Path(f"{path}.part")
            with part.open("w", encoding="utf-8") as file:
                file.write(json.dumps({"hwmpq_store": schema.VERSION}) + "\n")
                for name, table in schema.TABLES.items():
                    order = (table.c.created, table.c.generation)
                    for row in connection.execute(sa.select(table).order_by(*order)).mappings():
                        values = {"table": name, **row}
                        if isinstance(values.get("blob"), bytes):
                            values["blob"] = base64.b64encode(values["blob"]).decode()
                        file.write(json.dumps(values) + "\n")
                        count += 1
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        return count

    def import_jsonl(self, path: str | Path) -> int:
        """Add the rows of an export that are not here yet, all or none; returns their number.

        Into an empty store: identical rows. Raises InputError for a file of another kind.
        """
        with _reported(str(path)), open(path, encoding="utf-8") as file:
            lines = [_parse(line, path) for line in file if line.strip()]
            if not lines or lines[0].get("hwmpq_store") != schema.VERSION:
                head = lines[0] if lines else "an empty file"
                raise InputError(f"store export {path}", head, f"version {schema.VERSION}")
            with self._engine.begin() as connection:
                return sum(_merge(connection, values, path) for values in lines[1:])

    # inside

    def _append(self, table: sa.Table, values: dict[str, Any]) -> None:
        """Add a generation unless the newest one that may be read has this very content."""
        key = tuple(values[column.name] for column in schema.key_columns(table))
        with _reported(str(self._engine.url)):
            for attempt in range(_RETRIES):
                try:
                    with self._engine.begin() as connection:
                        self._append_once(connection, table, key, values)
                    break
                except sa.exc.IntegrityError:  # PostgreSQL: another writer took the generation
                    if attempt == _RETRIES - 1:
                        raise
        self._mine.add((table.name, *key))

    def _append_once(
        self,
        connection: sa.Connection,
        table: sa.Table,
        key: tuple[str, ...],
        values: dict[str, Any],
    ) -> None:
        content = _content(values)
        newest = schema.newest(connection, table, key)
        if newest is not None and newest["content"] == content and self._sees(table, key):
            return
        generation = 1 + schema.last_generation(connection, table, key)
        # a clock that was set back must not hide the newer row
        created = max(time.time(), newest["created"] + 1e-3 if newest else 0.0)
        row = {**values, "content": content, "generation": generation, "created": created}
        connection.execute(sa.insert(table).values(row))

    def _newest(self, table: sa.Table, key: tuple[str, ...]) -> Mapping[str, Any] | None:
        if not self._sees(table, key):
            return None
        with self._reading() as connection:
            return schema.newest(connection, table, key)

    def _sees(self, table: sa.Table, key: tuple[str, ...]) -> bool:
        return not self._fresh or (table.name, *key) in self._mine

    def _visible(self, key: tuple[str, ...]) -> bool:
        return self._sees(schema.measurements, key)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _reported(str(self._engine.url)):
            with self._engine.connect().execution_options(reading=True) as connection:
                yield connection


def default_path() -> Path:
    """The store in the user's data folder."""
    return Path(platformdirs.user_data_dir("hwmpq")) / "store.sqlite"


def _shown(where: str) -> str:
    """The place without a password."""
    if "://" not in where:
        return where
    try:
        return str(sa.make_url(where))
    except sa.exc.ArgumentError:
        return where.partition("://")[0] + "://..."


@contextlib.contextmanager
def _reported(where: str) -> Iterator[None]:
    """Turn the database's and the system's errors into StoreError with a next step."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, sqlite3.Error, ImportError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        text = str(cause)
        step = "Check that the file or the server can be reached and written."
        if "full" in text or "No space" in text:
            step = "Make room on the disk and start again: what was saved is kept."
        elif "locked" in text:
            step = "Another process holds the store: try again when it has finished."
        elif "malformed" in text or "not a database" in text:
            step = "Move the file away, or restore a backup; a new store is made in its place."
        raise StoreError(f"store {where}", text, next=step) from error


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _content(values: Mapping[str, Any]) -> str:
    """Hash of all that is in a row but its generation, date and origin."""
    plain = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in values.items()
        if name not in ("content", "generation", "created", "origin")
    }
    return digest(plain)


def _row(row: Mapping[Any, Any]) -> Row:
    measurement = Measurement(
        key=row["key"],
        workload=Workload.from_json(json.loads(row["workload"])),
        format=row["format"],
        kernel=row["kernel"],
        threads=row["threads"],
        samples_s=tuple(json.loads(row["samples"])),
        error=row["error"],
        source=row["source"],
        quality=json.loads(row["quality"]),
    )
    toolchain = json.loads(row["toolchain"])
    names = ("target", "fingerprint", "origin", "generation", "created")
    return Row(measurement, toolchain=toolchain, **{name: row[name] for name in names})


def _parse(line: str, path: str | Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"store export {path}", str(error), "one JSON object per line") from None
    if not isinstance(value, dict):
        raise InputError(f"store export {path}", line[:40], "one JSON object per line")
    return value


def _merge(connection: sa.Connection, values: dict[str, Any], path: str | Path) -> bool:
    """Insert an exported row unless some generation of its key has its content and date."""
    table = schema.TABLES.get(values.pop("table", ""))
    if table is None or set(values) != set(table.c.keys()):
        raise InputError(f"row in store export {path}", sorted(values), "the columns of a table")
    if isinstance(values.get("blob"), str):
        values["blob"] = base64.b64decode(values["blob"])
    if _content(values) != values["content"]:
        raise InputError(f"damaged row in store export {path}", values["key"])
    key = tuple(values[column.name] for column in schema.key_columns(table))
    generation = schema.free_generation(connection, table, key, values)
    if generation is None:
        return False
    connection.execute(sa.insert(table).values({**values, "generation": generation}))
    return True

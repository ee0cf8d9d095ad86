"""The store's tables, their version, and how an older store is brought up to it.

Version 1. A key's newest row is the one with the latest (created, generation).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hwmpq.errors import StoreError

VERSION = 1
_BUSY_S = 30.0

_metadata = sa.MetaData()
_version = sa.Table("hwmpq_schema", _metadata, sa.Column("version", sa.Integer, nullable=False))


def _text(name: str, **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=options.pop("nullable", False), **options)


def _history() -> tuple[sa.Column[Any], ...]:
    """Columns of every table: generation (from 1), content (hash of the row), created (seconds)."""
    return (
        sa.Column("generation", sa.Integer, primary_key=True, autoincrement=False),
        _text("content"),
        sa.Column("created", sa.Float(53), nullable=False),
    )


#: workload, samples, quality, toolchain: JSON. samples: seconds per call.
measurements = sa.Table(
    "measurements",
    _metadata,
    _text("key", primary_key=True),
    _text("workload"),
    _text("format"),
    _text("kernel"),
    sa.Column("threads", sa.Integer, nullable=False),
    _text("samples"),
    _text("error"),
    _text("source"),
    _text("quality"),
    _text("target"),
    _text("fingerprint"),
    _text("toolchain"),
    _text("origin"),
    *_history(),
)
#: Whatever a stage wants to find again: value (JSON) or blob.
facts = sa.Table(
    "facts",
    _metadata,
    _text("stage", primary_key=True),
    _text("key", primary_key=True),
    _text("value", nullable=True),
    sa.Column("blob", sa.LargeBinary, nullable=True),
    *_history(),
)
TABLES = {"measurements": measurements, "facts": facts}

#: from version -> step to the next one, run inside one transaction after a verified backup
MIGRATIONS: dict[int, Callable[[sa.Connection], None]] = {}


def connect(where: str) -> sa.Engine:
    """An engine for a file or a URL. SQLite: write-ahead log, one writer at a time, full sync."""
    if "://" not in where:
        path = Path(where).expanduser().absolute()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        where = sa.URL.create("sqlite", database=str(path)).render_as_string()
    engine = sa.create_engine(where)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def prepare(engine: sa.Engine) -> None:
    """Create the tables, or migrate, or refuse. Raises StoreError."""
    where = engine.url.render_as_string()
    with engine.begin() as connection:  # SQLite: the write lock keeps a second creator out
        if engine.dialect.name == "sqlite":
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if found != "ok":
                step = "Move the file away, or restore a backup; a new store is made in its place."
                raise StoreError(f"store {where} is damaged", found, next=step)
        names = set(sa.inspect(connection).get_table_names())
        if _version.name not in names:
            if names & set(TABLES):
                raise StoreError(
                    f"{where} is another program's database",
                    next="Choose another file with --store or HWMPQ_STORE.",
                )
            _metadata.create_all(connection)
            connection.execute(sa.insert(_version).values(version=VERSION))
            return
        version = int(connection.execute(sa.select(_version.c.version)).scalar_one())
    if version > VERSION:
        raise StoreError(
            f"store {where} was made by a newer hwmpq",
            f"version {version}",
            f"up to version {VERSION}",
            "Upgrade hwmpq, or choose another store with --store or HWMPQ_STORE.",
        )
    if version < VERSION:
        migrate(engine, version)


def migrate(engine: sa.Engine, version: int) -> None:
    """Bring an older store to VERSION: first a verified backup, then all steps or none.

    Raises StoreError when the backup fails, is impossible, or a step is missing.
    """
    where = engine.url.render_as_string()
    missing = [step for step in range(version, VERSION) if step not in MIGRATIONS]
    if missing or engine.dialect.name != "sqlite":
        raise StoreError(
            f"store {where} cannot be migrated here",
            f"version {version} in {engine.dialect.name}",
            f"SQLite stores from version {min(MIGRATIONS, default=VERSION)} on",
            "Export it with the hwmpq that made it and import that into a new store.",
        )
    back_up(Path(str(engine.url.database)), version)
    with engine.begin() as connection:
        # another process may have done it between our reading and this lock
        current = int(connection.execute(sa.select(_version.c.version)).scalar_one())
        for step in range(current, VERSION):
            MIGRATIONS[step](connection)
        connection.execute(sa.update(_version).values(version=VERSION))


def back_up(path: Path, version: int) -> Path:
    """Copy a SQLite store beside itself and compare every row. Raises StoreError."""
    copy = path.with_name(f"{path.name}.v{version}.{time.strftime('%Y%m%d-%H%M%S')}.backup")
    part = copy.with_name(copy.name + ".part")
    part.unlink(missing_ok=True)
    try:
        source, target = sqlite3.connect(path), sqlite3.connect(part)
        try:
            source.backup(target)
            same = list(source.iterdump()) == list(target.iterdump())
            healthy = target.execute("PRAGMA integrity_check").fetchone()[0]
        finally:
            source.close()
            target.close()
    except sqlite3.Error as error:
        raise StoreError(f"backup {part}", error, next="Nothing was changed.") from error
    if not same or healthy != "ok":
        raise StoreError(f"backup {part} differs from the store", healthy, next="Try again.")
    part.replace(copy)
    return copy


def key_columns(table: sa.Table) -> list[sa.Column[Any]]:
    """The primary key without the generation."""
    return [column for column in table.primary_key if column.name != "generation"]


def newest(
    connection: sa.Connection, table: sa.Table, key: tuple[str, ...]
) -> Mapping[str, Any] | None:
    """The newest row under the key."""
    order = (table.c.created.desc(), table.c.generation.desc())
    query = sa.select(table).where(_has(table, key)).order_by(*order).limit(1)
    row = connection.execute(query).mappings().first()
    return None if row is None else dict(row)


def last_generation(connection: sa.Connection, table: sa.Table, key: tuple[str, ...]) -> int:
    """The highest generation under the key, 0 where there is none."""
    query = sa.select(sa.func.max(table.c.generation)).where(_has(table, key))
    return connection.execute(query).scalar() or 0


def free_generation(
    connection: sa.Connection, table: sa.Table, key: tuple[str, ...], values: Mapping[str, Any]
) -> int | None:
    """Generation for an imported row: its own if free, else the next; None if it is here."""
    query = sa.select(table.c.generation, table.c.content, table.c.created)
    rows = connection.execute(query.where(_has(table, key))).all()
    if any(row.content == values["content"] and row.created == values["created"] for row in rows):
        return None
    taken = {row.generation for row in rows}
    wanted = int(values["generation"])
    return max(taken) + 1 if wanted in taken else wanted


def is_newest(table: sa.Table) -> sa.ColumnElement[bool]:
    """Condition: no later row under the same key."""
    other = table.alias()
    same = [other.c[column.name] == column for column in key_columns(table)]
    later = sa.or_(
        other.c.created > table.c.created,
        sa.and_(other.c.created == table.c.created, other.c.generation > table.c.generation),
    )
    return ~sa.exists(sa.select(sa.literal(1)).select_from(other).where(*same, later))


def _has(table: sa.Table, key: tuple[str, ...]) -> sa.ColumnElement[bool]:
    pairs = zip(key_columns(table), key, strict=True)
    return sa.and_(*(column == value for column, value in pairs))


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says, nowhere else
    connection.execute(f"PRAGMA busy_timeout = {int(_BUSY_S * 1000)}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: sa.Connection) -> None:
    """Writers take the lock at once, so that reading first cannot make them fail later."""
    reading = connection.get_execution_options().get("reading")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

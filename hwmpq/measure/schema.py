"""The store's tables, their version, and how an older store is brought up to it.

A key's newest row is the one with the latest (created, generation).
Version 1: the tables. Version 2: facts have an origin too.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hwmpq.errors import StoreError
from hwmpq.measure.address import Address
from hwmpq.measure.engine import DAMAGED

VERSION = 2
#: `origin` of rows that were made here, not imported.
LOCAL = "local"

_metadata = sa.MetaData()
_version = sa.Table("hwmpq_schema", _metadata, sa.Column("version", sa.Integer, nullable=False))


def _text(name: str, **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=options.pop("nullable", False), **options)


def _history() -> tuple[sa.Column[Any], ...]:
    """Columns of every table: origin (LOCAL, or what it was imported from), generation (from 1),
    content (hash of the row), created (seconds)."""
    return (
        _text("origin"),
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


def _facts_get_an_origin(connection: sa.Connection) -> None:
    connection.exec_driver_sql(
        f"ALTER TABLE facts ADD COLUMN origin TEXT NOT NULL DEFAULT '{LOCAL}'"
    )


#: from version -> step to the next one, run inside one transaction after a verified backup
MIGRATIONS: dict[int, Callable[[sa.Connection], None]] = {1: _facts_get_an_origin}


def prepare(engine: sa.Engine, address: Address) -> None:
    """Create the tables, or migrate, or refuse. Raises StoreError."""
    with engine.begin() as connection:  # the write lock keeps a second creator out
        if address.file is not None:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if found != "ok":
                raise StoreError(f"store {address} is damaged", found, next=DAMAGED)
        names = set(sa.inspect(connection).get_table_names())
        if _version.name not in names:
            if names & set(TABLES):
                raise StoreError(
                    f"{address} is another program's database",
                    next="Choose another store with --store or HWMPQ_STORE.",
                )
            _metadata.create_all(connection)
            connection.execute(sa.insert(_version).values(version=VERSION))
            return
        version = int(connection.execute(sa.select(_version.c.version)).scalar_one())
    if version > VERSION:
        raise StoreError(
            f"store {address} was made by a newer hwmpq",
            f"version {version}",
            f"up to version {VERSION}",
            "Upgrade hwmpq, or choose another store with --store or HWMPQ_STORE.",
        )
    if version < VERSION:
        migrate(engine, address, version)


def migrate(engine: sa.Engine, address: Address, version: int) -> None:
    """Bring an older store to VERSION: first a verified backup, then all steps or none.

    Raises StoreError when the backup fails or a step is missing.
    """
    if any(step not in MIGRATIONS for step in range(version, VERSION)):
        raise StoreError(
            f"store {address} cannot be migrated",
            f"version {version}",
            f"from version {min(MIGRATIONS)} on",
            "Export it with the hwmpq that made it and import that into a new store.",
        )
    if address.file is not None:
        back_up(address.file, version)
    with engine.begin() as connection:
        # another process may have done it between our reading and this lock
        current = int(connection.execute(sa.select(_version.c.version)).scalar_one())
        if address.file is None and current < VERSION:
            back_up_tables(connection, address, current)
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
        raise StoreError(
            f"cannot write backup {part}", error, next="Nothing was changed."
        ) from error
    if not same or healthy != "ok":
        raise StoreError(f"backup {part} differs from the store", healthy, next="Try again.")
    part.replace(copy)
    return copy


def back_up_tables(connection: sa.Connection, address: Address, version: int) -> str:
    """Copy a PostgreSQL store's tables into a schema of their own and compare every row.

    Part of the migration's transaction: both are there afterwards, or neither. Returns the
    schema's name. Raises StoreError.
    """
    schema = f"hwmpq_v{version}_{time.strftime('%Y%m%d_%H%M%S')}_backup"
    connection.exec_driver_sql(f'CREATE SCHEMA "{schema}"')
    for name in (_version.name, *TABLES):
        copy = f'"{schema}"."{name}"'
        connection.exec_driver_sql(f'CREATE TABLE {copy} AS TABLE "{name}"')
        both = (f"TABLE {a} EXCEPT ALL TABLE {b}" for a, b in ((copy, name), (name, copy)))
        query = " UNION ALL ".join(f"({part})" for part in both)
        differing = connection.exec_driver_sql(f"SELECT count(*) FROM ({query}) AS d").scalar_one()
        if differing:
            step = "Nothing was changed; try again."
            raise StoreError(f"backup {schema} in {address} differs", differing, next=step)
    return schema


def key_columns(table: sa.Table) -> list[sa.Column[Any]]:
    """The primary key without the generation."""
    return [column for column in table.primary_key if column.name != "generation"]


def key_of(table: sa.Table, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The row's key, without the generation."""
    return tuple(row[column.name] for column in key_columns(table))


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


def in_order(table: sa.Table) -> sa.Select[Any]:
    """All rows, oldest first."""
    return sa.select(table).order_by(table.c.created, table.c.generation, *key_columns(table))


#: What makes two rows under one key the same row: content, created, origin.
Stamp = tuple[str, float, str]


def stamp(row: Mapping[str, Any]) -> Stamp:
    """See Stamp."""
    return row["content"], row["created"], row["origin"]


def stamps(connection: sa.Connection, table: sa.Table) -> dict[tuple[str, ...], dict[int, Stamp]]:
    """Key -> generation -> stamp, of every row."""
    columns = [*table.primary_key, table.c.content, table.c.created, table.c.origin]
    found: dict[tuple[str, ...], dict[int, Stamp]] = {}
    for item in connection.execute(sa.select(*columns)).mappings():
        row = dict(item)
        found.setdefault(key_of(table, row), {})[row["generation"]] = stamp(row)
    return found


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

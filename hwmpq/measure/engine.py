"""Connections to a store's database, set up alike: whoever writes holds the one write lock."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from hwmpq.errors import InputError, StoreError
from hwmpq.measure.address import Address, network_file_system

_BUSY_S = 30.0
#: PostgreSQL's advisory lock of all hwmpq writers in a database; the number is arbitrary.
_WRITERS = 0x68776D7071
#: libpq's settings unless the URL has its own: a lost server is noticed, not waited for.
_LIBPQ = {"connect_timeout": "10", "tcp_user_timeout": "30000", "application_name": "hwmpq"}
_HOLDER = "Another process holds the store: try again when it has finished."
DAMAGED = "Move the file away, or restore a backup; a new store is made in its place."
_CHECK = "Check that the file or the server can be reached and written; what was saved is kept."
#: words in an error of the database or the system -> what to do
_STEPS = {
    "full": "Make room on the disk and start again: what was saved is kept.",
    "No space": "Make room on the disk and start again: what was saved is kept.",
    "locked": _HOLDER,
    "lock timeout": _HOLDER,
    "malformed": DAMAGED,
    "not a database": DAMAGED,
}


def connect(address: Address) -> sa.Engine:
    """An engine that has not connected yet; a file's folder is made.

    Raises InputError without the driver, StoreError on a network file system, OSError.
    """
    if address.file is None:
        return _postgres(address)
    kind = network_file_system(address.file)
    if kind is not None:
        raise StoreError(
            f"store {address} lies on a network file system, where SQLite's log is not safe", kind,
            "a file on a disk of this machine, or a PostgreSQL database",
            "Choose one with --store or HWMPQ_STORE.",
        )  # fmt: skip
    address.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = sa.create_engine(address.url)
    sa.event.listen(engine, "connect", _set_up_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextlib.contextmanager
def reported(address: Address) -> Iterator[None]:
    """Turn the database's and the system's errors into StoreError with a next step."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        text = str(getattr(error, "orig", None) or error).strip()
        step = next((step for words, step in _STEPS.items() if words in text), _CHECK)
        shown = address.without_secrets(text)
        raise StoreError(f"store {address}", shown, next=step) from None


def _postgres(address: Address) -> sa.Engine:
    url = address.url.set(query={**_LIBPQ, **address.url.query})
    try:
        engine = sa.create_engine(url, pool_pre_ping=True)
    except ModuleNotFoundError as error:
        raise InputError(
            "a PostgreSQL store needs psycopg", str(error),
            next="Run: pip install 'hwmpq[postgres]'",
        ) from None  # fmt: skip
    sa.event.listen(engine, "begin", _begin_postgres)
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says, nowhere else
    connection.execute(f"PRAGMA busy_timeout = {int(_BUSY_S * 1000)}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: sa.Connection) -> None:
    """Writers take the lock at once, so that reading first cannot make them fail later."""
    connection.exec_driver_sql("BEGIN" if _only_reads(connection) else "BEGIN IMMEDIATE")


def _begin_postgres(connection: sa.Connection) -> None:
    """The same one writer at a time; the lock ends with the transaction or the connection."""
    if not _only_reads(connection):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(_BUSY_S * 1000)}")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS})")


def _only_reads(connection: sa.Connection) -> bool:
    return bool(connection.get_execution_options().get("reading"))

"""The store: every measurement and every costly fact, kept for good, each committed at once.

Rows are never changed. A second, different value under a key becomes a new generation; reading
gives the newest. So a crash at any point loses at most the row that was being written, and `fresh`
can ignore what is there without losing it. Only `drop`, when the user asks, deletes rows, and what
it deletes is in a file by then. SQLite by default, PostgreSQL by URL.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hwmpq.errors import StoreError, UnknownName
from hwmpq.measure import exchange, schema
from hwmpq.measure.address import Address
from hwmpq.measure.engine import connect, reported
from hwmpq.measure.exchange import Item
from hwmpq.types import Measurement, Source, Workload

_BATCH = 500


@dataclass(frozen=True)
class Row:
    """A measurement and where it comes from. origin: 'local' or the bundle it was imported from;
    created: seconds since 1970."""

    measurement: Measurement
    target: str = ""
    fingerprint: str = ""
    toolchain: Mapping[str, Any] = field(default_factory=dict)
    origin: str = schema.LOCAL
    generation: int = 1
    created: float = 0.0


@dataclass(frozen=True)
class Origin:
    """What came from one place, all generations. newest: seconds since 1970."""

    name: str
    measurements: int
    facts: int
    newest: float


class Store:
    """An open store. fresh: what others wrote, or wrote before, is not read."""

    def __init__(self, engine: sa.Engine, address: Address, fresh: bool = False):
        self.address = address
        self._engine = engine
        self._fresh = fresh
        self._mine: set[tuple[str, ...]] = set()

    @staticmethod
    def open(where: str | Path | None = None, fresh: bool = False) -> Store:
        """Open or create. where: a file, a database URL, or None: $HWMPQ_STORE, else the user's
        data folder.

        Raises InputError for a wrong address; StoreError when it cannot be read, is no store, is
        of a newer version, or lies on a network file system.
        """
        address = Address.of(where)
        with reported(address):
            engine = connect(address)
            try:
                schema.prepare(engine, address)
            except BaseException:
                engine.dispose()
                raise
        return Store(engine, address, fresh)

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.address)!r})"

    # measurements

    def put(
        self,
        measurement: Measurement,
        target: str = "",
        fingerprint: str = "",
        toolchain: Mapping[str, Any] | None = None,
        origin: str = schema.LOCAL,
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
            "error": _storable(measurement.error),
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
            and self._sees(table, (row.measurement.key,))
        ]

    # facts

    def put_fact(self, stage: str, key: str, value: Any, origin: str = schema.LOCAL) -> None:
        """Save a JSON value (nan allowed) or bytes under the stage and the key. Raises as `put`."""
        values: dict[str, Any] = {"stage": stage, "key": key, "value": None, "blob": None}
        if isinstance(value, bytes):
            values["blob"] = value
        else:
            values["value"] = _dump(value)
        self._append(schema.facts, {**values, "origin": origin})

    def fact(self, stage: str, key: str) -> Any:
        """The newest value put under the stage and the key, or None."""
        row = self._newest(schema.facts, (stage, key))
        if row is None:
            return None
        return row["blob"] if row["value"] is None else json.loads(row["value"])

    def keys(self, stage: str) -> set[str]:
        """The keys of all facts of a stage."""
        column = schema.facts.c.key
        query = sa.select(column).where(schema.facts.c.stage == stage).distinct()
        with self._reading() as connection:
            found = connection.execute(query).scalars()
            return {key for key in found if self._sees(schema.facts, (stage, key))}

    # moving

    def export_file(self, path: str | Path) -> int:
        """Write all rows of all generations to a .jsonl, .csv or .parquet; returns their number."""
        with reported(self.address):
            return exchange.write(Path(path), self._select(lambda _: sa.true()))

    def import_file(self, path: str | Path) -> int:
        """Add the rows of an export that are not here yet, all or none; returns their number.

        Into an empty store: identical rows. Raises InputError for a file of another kind.
        """
        with reported(self.address):
            return self._add(exchange.read(Path(path)))

    def merge(self, other: Store) -> int:
        """Add the rows of another store that are not here yet, all or none; returns their number.

        All generations, with their dates and origins. Once more changes nothing.
        """
        return self._add(other._select(lambda _: sa.true()))

    # leaving

    def origins(self) -> list[Origin]:
        """Where the rows come from: 'local' and every import, by name."""
        found: dict[str, dict[str, Any]] = {}
        with self._reading() as connection:
            for name, table in schema.TABLES.items():
                query = sa.select(table.c.origin, sa.func.count(), sa.func.max(table.c.created))
                for origin, count, newest in connection.execute(query.group_by(table.c.origin)):
                    entry = found.setdefault(origin, {"newest": 0.0})
                    entry[name], entry["newest"] = count, max(entry["newest"], newest)
        return [
            Origin(name, entry.get("measurements", 0), entry.get("facts", 0), entry["newest"])
            for name, entry in sorted(found.items())
        ]

    def imported(self, name: str) -> Origin:
        """The origin of this name. Raises UnknownName for 'local' and for one that is not here."""
        known = {item.name: item for item in self.origins() if item.name != schema.LOCAL}
        if name not in known:
            raise UnknownName("import", name, known, "Only what was imported goes as one.")
        return known[name]

    def remove_origin(self, name: str) -> int:
        """Delete what was imported under the name; returns the number of rows.

        What these rows had replaced is the newest again; nothing else changes. Raises as
        `imported`.
        """
        self.imported(name)
        with reported(self.address), self._engine.begin() as connection:
            return sum(
                connection.execute(sa.delete(table).where(table.c.origin == name)).rowcount
                for table in schema.TABLES.values()
            )

    def replaced(self) -> list[Item]:
        """Rows that a newer one under their key has replaced."""
        return self._select(lambda table: ~schema.is_newest(table))

    def failed(self) -> list[Item]:
        """The newest rows of cells that failed."""
        error = schema.measurements.c.error
        return self._select(
            lambda t: sa.and_(schema.is_newest(t), error != ""), [schema.measurements.name]
        )

    def drop(self, items: Sequence[Item], backup: str | Path) -> None:
        """Delete the rows, all or none, when a file that `import_file` takes back holds them.

        Raises StoreError, also where the file does not read back as the rows.
        """
        path = Path(backup)
        with reported(self.address):
            exchange.write(path, items)
            if exchange.read(path) != list(items):
                raise StoreError(f"backup {path} differs", next="Nothing was deleted.")
            with self._engine.begin() as connection:
                for name, row in items:
                    table = schema.TABLES[name]
                    same = [
                        table.c[column.name] == row[column.name] for column in table.primary_key
                    ]
                    connection.execute(sa.delete(table).where(*same))

    # inside

    def _append(self, table: sa.Table, values: dict[str, Any]) -> None:
        """Add a generation unless the newest one that may be read has this very content."""
        key = schema.key_of(table, values)
        with reported(self.address), self._engine.begin() as connection:
            newest = schema.newest(connection, table, key)
            content = exchange.content(values)
            same = newest is not None and (newest["content"], newest["origin"]) == (
                content, values["origin"],
            )  # fmt: skip
            if not (same and self._sees(table, key)):
                # a clock that was set back must not hide the newer row
                created = max(time.time(), newest["created"] + 1e-3 if newest else 0.0)
                generation = 1 + schema.last_generation(connection, table, key)
                row = {"content": content, "generation": generation, "created": created}
                connection.execute(sa.insert(table).values({**values, **row}))
        self._mine.add((table.name, *key))

    def _add(self, items: Iterable[Item]) -> int:
        """Insert the rows but those of whose key some generation has their content, date, origin.

        A generation that is taken by another row: the next free one.
        """
        with reported(self.address), self._engine.begin() as connection:
            known = {name: schema.stamps(connection, t) for name, t in schema.TABLES.items()}
            new: dict[str, list[dict[str, Any]]] = {name: [] for name in schema.TABLES}
            for name, row in items:
                table = schema.TABLES[name]
                here = known[name].setdefault(schema.key_of(table, row), {})
                stamp = schema.stamp(row)
                if stamp in here.values():
                    continue
                wanted = row["generation"]
                generation = max(here) + 1 if wanted in here else wanted
                here[generation] = stamp
                new[name].append({**row, "generation": generation})
            for name, rows in new.items():
                for start in range(0, len(rows), _BATCH):
                    connection.execute(sa.insert(schema.TABLES[name]), rows[start : start + _BATCH])
        return sum(map(len, new.values()))

    def _newest(self, table: sa.Table, key: tuple[str, ...]) -> Mapping[str, Any] | None:
        if not self._sees(table, key):
            return None
        with self._reading() as connection:
            return schema.newest(connection, table, key)

    def _sees(self, table: sa.Table, key: tuple[str, ...]) -> bool:
        return not self._fresh or (table.name, *key) in self._mine

    def _select(
        self,
        condition: Callable[[sa.Table], sa.ColumnElement[bool]],
        names: Iterable[str] = tuple(schema.TABLES),
    ) -> list[Item]:
        with self._reading() as connection:
            return [
                (name, dict(row))
                for name in names
                for row in connection.execute(
                    schema.in_order(schema.TABLES[name]).where(condition(schema.TABLES[name]))
                ).mappings()
            ]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with reported(self.address):
            with self._engine.connect().execution_options(reading=True) as connection:
                yield connection


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _storable(text: str) -> str:
    """What a crashed program said, as every database takes it: no NUL, no lone surrogate."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


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

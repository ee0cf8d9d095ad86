"""All rows of a store as one file: .jsonl, .csv or .parquet. Each way and back is lossless.

JSON Lines: a line {"hwmpq_store": version}, then one object per row. CSV: the version and the table
stand in the first two columns; bytes are 'base64:...', an empty cell is no value. Parquet: the
version is in the file's metadata. Columns are the store's, so samples are a JSON list of seconds.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hwmpq.errors import InputError, in_words
from hwmpq.measure import schema
from hwmpq.types import digest

#: A row on its way: name of its table, values by column.
Item = tuple[str, dict[str, Any]]

_VERSION = "hwmpq_store"
_BYTES = "base64:"
_COLUMNS = {c.name: c for table in schema.TABLES.values() for c in table.columns}


def _kind(column: sa.Column[Any]) -> type:
    """Python's type of a column's values."""
    kinds = {sa.Integer: int, sa.Float: float, sa.LargeBinary: bytes}
    return next((kind for sql, kind in kinds.items() if isinstance(column.type, sql)), str)


def write(path: Path, items: Sequence[Item]) -> int:
    """Write the rows; the file appears when it is whole. Returns their number.

    Raises InputError for another suffix, OSError.
    """
    writer = _known(path, _WRITERS)
    part = path.with_name(f"{path.name}.part")
    try:
        writer(part, items)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return len(items)


def read(path: Path) -> list[Item]:
    """The rows of a file that `write` made, each checked against its own hash.

    Files of version 1, whose facts have no origin, are read too. Raises InputError for a file or
    row of another kind or a damaged one, OSError.
    """
    reader = _known(path, _READERS)
    try:
        return [_checked(name, values, path) for name, values in reader(path)]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(
            f"store export {path}", in_words(error), "a file of `hwmpq store export`"
        ) from None


def content(values: Mapping[str, Any]) -> str:
    """Hash of all that is in a row but its generation, date and origin."""
    plain = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in values.items()
        if name not in ("content", "generation", "created", "origin")
    }
    return digest(plain)


def _known(path: Path, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if path.suffix not in table:
        raise InputError("file of a store's rows", path, [f"NAME{suffix}" for suffix in table])
    return table[path.suffix]


def _checked(name: str, values: dict[str, Any], path: Path) -> Item:
    table = schema.TABLES.get(name)
    if name == "facts":
        values.setdefault("origin", schema.LOCAL)
    if table is None or set(values) != set(table.c.keys()):
        raise InputError(f"row in store export {path}", sorted(values), "the columns of a table")
    for column in table.columns:
        value, kind = values[column.name], _kind(column)
        if not (isinstance(value, kind) or (value is None and column.nullable)):
            raise InputError(f"{column.name} in store export {path}", repr(value), kind.__name__)
    if content(values) != values["content"] or values["generation"] < 1:
        raise InputError(f"damaged row in store export {path}", values["key"])
    return name, values


def _check_version(found: object, path: Path) -> None:
    if found not in range(1, schema.VERSION + 1):
        raise InputError(f"store export {path}", found, f"version 1 to {schema.VERSION}")


def _write_jsonl(path: Path, items: Sequence[Item]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({_VERSION: schema.VERSION}) + "\n")
        for name, row in items:
            values = {"table": name, **row}
            if isinstance(row.get("blob"), bytes):
                values["blob"] = base64.b64encode(row["blob"]).decode()
            file.write(json.dumps(values) + "\n")


def _read_jsonl(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8") as file:
        lines = (json.loads(line) for line in file if line.strip())
        head: dict[str, Any] = next(lines, {})
        _check_version(head.get(_VERSION, head or "an empty file"), path)
        for values in lines:
            if isinstance(values.get("blob"), str):
                values["blob"] = base64.b64decode(values["blob"], validate=True)
            yield values.pop("table"), values


def _write_csv(path: Path, items: Sequence[Item]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [_VERSION, "table", *_COLUMNS])
        writer.writeheader()
        for name, row in items:
            cells = {k: _BYTES + base64.b64encode(v).decode() if isinstance(v, bytes) else v
                     for k, v in row.items()}  # fmt: skip
            writer.writerow({_VERSION: schema.VERSION, "table": name, **cells})


def _read_csv(path: Path) -> Iterator[Item]:
    csv.field_size_limit(sys.maxsize)  # pair matrices are longer than the default allows
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if _VERSION not in (reader.fieldnames or ()):
            raise InputError(f"store export {path}", reader.fieldnames, f"a column {_VERSION}")
        for cells in reader:
            _check_version(int(cells[_VERSION]), path)
            table = schema.TABLES.get(cells["table"])
            names = set(_COLUMNS if table is None else table.c.keys()) & set(cells)
            yield cells["table"], {name: _from_cell(name, cells[name]) for name in names}


def _from_cell(name: str, cell: str) -> Any:
    column = _COLUMNS[name]
    if column.nullable and not cell:
        return None
    kind = _kind(column)
    if kind is bytes:
        return base64.b64decode(cell.removeprefix(_BYTES), validate=True)
    return kind(cell)


def _arrow() -> Any:
    """pyarrow. Raises InputError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        step = "Run: pip install 'hwmpq[parquet]'; or use .csv or .jsonl."
        raise InputError("Parquet files need pyarrow", str(error), next=step) from None
    return pyarrow


def _write_parquet(path: Path, items: Sequence[Item]) -> None:
    pa = _arrow()
    kinds = {int: pa.int64(), float: pa.float64(), bytes: pa.binary(), str: pa.string()}
    fields = [(name, kinds[_kind(column)]) for name, column in _COLUMNS.items()]
    form = pa.schema([("table", pa.string()), *fields], metadata={_VERSION: str(schema.VERSION)})
    rows = [{"table": name, **row} for name, row in items]
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema=form), path)


def _read_parquet(path: Path) -> Iterator[Item]:
    pa = _arrow()
    try:
        found = pa.parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"store export {path}", str(error), "a Parquet file") from None
    version = (found.schema.metadata or {}).get(_VERSION.encode(), b"0")
    _check_version(int(version), path)
    for values in found.to_pylist():
        name = values.pop("table")
        names = schema.TABLES[name].c.keys()
        yield name, {key: value for key, value in values.items() if key in names}


_WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}

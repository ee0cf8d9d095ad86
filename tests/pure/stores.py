"""A measurement for the tests of the store, and SQL past the store."""

from __future__ import annotations

import sqlalchemy as sa

from hwmpq.measure.address import Address
from hwmpq.types import Measurement, Workload

SAMPLE = Measurement(
    key="k0",
    workload=Workload.make("linear", "bias+relu", m=1, k=64, n=10),
    format="w8a8",
    kernel="gemm",
    threads=1,
    samples_s=(1.25e-6, 1.5e-6, 1 / 3e6),
    quality={"steal": 0.0, "rounds": [0, 1, 2]},
)


def execute(place: str, *statements: str) -> list[tuple[object, ...]]:
    """Run SQL past the store; the rows of the last statement."""
    plain = sa.create_engine(Address.of(place).url)
    with plain.begin() as connection:
        results = [connection.exec_driver_sql(text) for text in statements]
        rows = [tuple(row) for row in results[-1]] if results[-1].returns_rows else []
    plain.dispose()
    return rows


def generations(place: str, table: str = "measurements") -> int:
    ((count,),) = execute(place, f"select count(*) from {table}")
    assert isinstance(count, int)
    return count

"""Times from a vendor's simulator or lab: a table of workload × format, kept as `imported`.

A UTF-8 CSV file with these columns, in any order:

    workload   'conv2d n=1 h=16 w=16 cin=8 ... bias+relu': the operator, every size, the epilogue
    format     w8a8
    latency_s  seconds of one call, weights not in the cache
    threads    optional, 1

Such a time fills a cell that was never measured. It trains no cost model, and a plan that rests on
it is not met before its artifact was timed.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hwmpq.errors import InputError, UnknownName, in_words
from hwmpq.formats import format_named
from hwmpq.measure.bundle import PLAUSIBLE_S
from hwmpq.measure.runner import read_limited
from hwmpq.stages.job import Job
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.predicted import may_predict
from hwmpq.types import Measurement, Workload, digest

COLUMNS = ("workload", "format", "latency_s")
#: What stands for the kernel of such a cell.
KERNEL = "imported"


def text_of(workload: Workload) -> str:
    """The workload as a table writes it."""
    sizes = [f"{name}={size}" for name, size in workload.dims]
    return " ".join([workload.op, *sizes, *filter(None, [workload.epilogue])])


def workload_of(text: str) -> Workload:
    """The workload that a table names. Raises ValueError."""
    op, *words = text.split()
    epilogue = words.pop() if words and "=" not in words[-1] else ""
    return Workload.make(op, epilogue, **{n: int(v) for n, v in (w.split("=") for w in words)})


def import_table(job: Job, path: Path) -> dict[str, Any]:
    """Keep the rows of a table for the job's target, under an origin named after its content.

    Answers {"origin", "rows", "matched": how many of them this model can use}. Raises InputError
    naming the line of a bad row; then nothing was kept.
    """
    data = read_limited(path)
    origin = f"table:{hashlib.sha256(data).hexdigest()[:16]}"
    rows = read_table(data, path, job.target.name)
    for row in rows:
        job.store.put(row, job.target.name, origin=origin)
    ours = {layer.workload for layer in job.network.layers}
    matched = sum(r.workload in ours and r.threads == job.options.threads for r in rows)
    return {"origin": origin, "rows": len(rows), "matched": matched}


def read_table(data: bytes, path: Path, target: str) -> list[Measurement]:
    """The rows of a table, for a target. Raises InputError naming the line."""
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        extra = set(reader.fieldnames or ()) - {*COLUMNS, "threads"}
        if missing or extra:
            raise InputError(f"columns of {path}", reader.fieldnames, (*COLUMNS, "threads"))
        rows: dict[str, Measurement] = {}
        for entry in reader:
            row = _row(entry, f"{path}, line {reader.line_num}", target)
            if row.key in rows:
                raise InputError(
                    f"{path}, line {reader.line_num}", "a cell for the second time",
                    next="Leave one of them out.",
                )  # fmt: skip
            rows[row.key] = row
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"not a CSV table: {path}", error) from None
    return list(rows.values())


def fill_in(job: Job, facts: LatencyFacts) -> LatencyFacts:
    """The facts with imported times for cells without a measured one; that is never replaced."""
    layers, unknown = dict(facts.layers), dict(facts.unknown)
    workloads = {layer.workload.key: layer.workload for layer in job.network.layers}
    for key, reason in facts.unknown.items():
        place = _key(workloads[key[0]], key[1], job.options.threads, job.target.name)
        found = job.store.measurement(place) if may_predict(reason) else None
        if found is not None:
            layers[key] = found
            del unknown[key]
    return replace(facts, layers=layers, unknown=unknown)


def _row(entry: Mapping[str, Any], where: str, target: str) -> Measurement:
    try:
        workload, seconds = workload_of(entry["workload"]), float(entry["latency_s"])
        threads, fmt = int(entry.get("threads") or 1), format_named(entry["format"])
        macs = workload.macs
    except UnknownName as error:
        raise InputError(f"{where}: {error.what}", error.got, error.allowed, error.next) from None
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(where, in_words(error), "workload, format, seconds") from None
    low, high = PLAUSIBLE_S
    if not low <= seconds <= high or threads < 1 or macs < 1:
        raise InputError(where, f"{seconds} s", f"{low:g} to {high:g} s, real sizes, 1 thread")
    key = _key(workload, fmt.name, threads, target)
    return Measurement(key, workload, fmt.name, KERNEL, threads, (seconds,), source="imported")


def _key(workload: Workload, fmt: str, threads: int, target: str) -> str:
    return digest(["imported", workload.key, fmt, threads, target])

"""Every cell of a model packed for a machine that cannot be reached, and its times taken in."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwmpq.errors import InputError, in_words
from hwmpq.formats import format_named
from hwmpq.kernels import CODEGEN_VERSION, Kernel, Schedule
from hwmpq.kernels import glue as glue_kernels
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.kernels.glue.cell import from_json, to_json
from hwmpq.measure import Cell, CellTiming, WorkerProcess, toolchain
from hwmpq.measure.bundle import Packed, Result, pack, read_result
from hwmpq.measure.store import Store
from hwmpq.stages.cells import Builder, circumstances, glue_fact, glue_key, layer_key, protocol_of
from hwmpq.stages.job import Job
from hwmpq.stages.menu import Menu
from hwmpq.stages.schedule import cell_call, choice_fact, choice_key
from hwmpq.stages.tuning import fastest
from hwmpq.stages.walks import schedules
from hwmpq.types import Measurement, Workload, digest

#: More multiplications per second than any single device does: a time that implies more is none.
MAX_MACS_PER_S = 1e15


def make_bundle(job: Job, menu: Menu, path: Path) -> dict[str, Any]:
    """Compile every layer cell and glue kernel and pack them; the store is not looked at.

    With options.tune also so many schedules of every cell, the default one first.
    Answers {"bundle", "cells", "failures": what did not compile -> why, and is left out}.
    """
    tvm = dict(job.target.tvm)
    failures: dict[str, str] = {}
    blocks: list[list[Packed]] = []
    with (
        tempfile.TemporaryDirectory(prefix="hwmpq-") as folder,
        WorkerProcess(threads=job.options.threads) as worker,
        job.progress.stage("compile", None) as advance,
    ):
        builder = Builder(job, worker, Path(folder), with_loop=True)

        def add(block: list[Packed], what: str, cell: Cell | str, row: dict[str, Any]) -> None:
            if isinstance(cell, str):
                failures[what] = cell
            else:
                block.append(Packed(cell, row))
            advance(1)

        for workload, kernels in _workloads(job, menu).items():
            blocks.append([])
            for name, kernel in kernels.items():
                call = cell_call(workload, format_named(name), job.options.threads)
                for schedule in kernel.schedules(call)[: job.options.tune or 1]:
                    one = kernel.scheduled(schedule, call)
                    row = {
                        "kind": "layer", "workload": workload.to_json(), "format": name,
                        "kernel": kernel.name, "cell": one.cell(call), "tvm": tvm,
                        "schedule": schedule.text, "default": kernel.cell(call),
                    }  # fmt: skip
                    what = f"{workload.op} {name} {kernel.name} {schedule.text}"
                    add(blocks[-1], what, builder.layer(call, one, digest(row)), row)
        calls = _glue_calls(job, menu)
        for begin in range(0, len(calls), 8):
            blocks.append([])
            for glue in calls[begin : begin + 8]:
                row = {"kind": "glue", "call": to_json(glue), "tvm": tvm}
                key = digest(row)
                add(blocks[-1], f"glue {glue.op}", builder.glue({key: glue})[key], row)
        kept = [block for block in blocks if block]
        versions = toolchain(str(CODEGEN_VERSION))
        name = pack(path, kept, protocol_of(job), job.target.name, versions)
    return {"bundle": name, "cells": sum(map(len, kept)), "failures": failures}


def take_in(store: Store, path: Path) -> Result:
    """Keep the times of a bundle's result under its own origin, all or none of it read before.

    Raises InputError for a file that is no result, or holds what cannot be.
    """
    result = read_result(path)
    try:
        rows = [_stored(result, row, timing) for row, timing in result.rows]
        choices = _choices(result)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"damaged result {path}", in_words(error)) from error
    for row in rows:
        if isinstance(row, Measurement):
            store.put(row, result.target, result.fingerprint, result.toolchain, result.origin)
        else:
            store.put_fact("glue", *row, origin=result.origin)
    for key, fact in choices.items():
        store.put_fact("schedule", key, fact, origin=result.origin)
    return result


def _choices(result: Result) -> dict[str, dict[str, Any]]:
    """Key -> fact of the fastest schedule of every cell that came with its default and others."""
    tried: dict[str, list[tuple[bool, Schedule, Measurement]]] = {}
    for row, timing in result.rows:
        if "default" not in row:  # a glue kernel, or a layer of an older bundle
            continue
        stored = _stored(result, row, timing)
        assert isinstance(stored, Measurement)
        key = choice_key(str(row["default"]), row["tvm"], result.fingerprint)
        is_other = row["cell"] != row["default"]
        tried.setdefault(key, []).append((is_other, Schedule.parse(row["schedule"]), stored))
    facts = {}
    for key, found in tried.items():
        found.sort(key=lambda item: item[0])  # the default first
        is_other, schedules, times = zip(*found, strict=True)
        if len(found) > 1 and not is_other[0]:
            facts[key] = choice_fact(fastest(schedules, times), schedules)
    return facts


def _stored(
    result: Result, row: Mapping[str, Any], timing: CellTiming
) -> Measurement | tuple[str, dict[str, Any]]:
    """What the store takes: a measurement, or key and fact of a glue kernel."""
    if row["kind"] == "glue":
        call = from_json(row["call"])
        key = glue_key(glue_kernels.key(call), row["tvm"], result.fingerprint)
        made = circumstances(result.fingerprint, result.target, result.toolchain)
        return key, glue_fact(to_json(call), made, timing)
    workload, fmt = Workload.from_json(row["workload"]), format_named(row["format"])
    if timing.samples_s and workload.macs > MAX_MACS_PER_S * min(timing.samples_s):
        raise InputError(
            f"time of {workload.op} {fmt.name}", min(timing.samples_s),
            f"at least {workload.macs / MAX_MACS_PER_S:g} s",
        )  # fmt: skip
    is_default = row.get("default", row["cell"]) == row["cell"]
    schedule = {} if is_default else {"schedule": row["schedule"]}
    return Measurement(
        layer_key(str(row["cell"]), row["tvm"], result.fingerprint), workload, fmt.name,
        str(row["kernel"]), result.threads, timing.samples_s, timing.error,
        quality={**timing.quality, **schedule},
    )  # fmt: skip


def _workloads(job: Job, menu: Menu) -> dict[Workload, Mapping[str, Kernel]]:
    return {la.workload: menu.kernels[la.name] for la in reversed(job.network.layers)}


def _glue_calls(job: Job, menu: Menu) -> list[GlueCall]:
    """Each once; those that move no data take no time."""
    calls = {
        glue_kernels.key(step.call): step.call
        for schedule in schedules(job, menu)
        for step in schedule.steps
        if isinstance(step.call, GlueCall) and not glue_kernels.is_view(step.call)
    }
    return list(calls.values())

"""`--explain-cache`: which part of a key keeps what the store has from being used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hwmpq.cli
from hwmpq.formats import format_named
from hwmpq.kernels import CODEGEN_VERSION
from hwmpq.measure.store import Store
from hwmpq.pipeline import Options
from hwmpq.stages.cells import CellBench, LayerCell
from hwmpq.stages.facts import KEYS, SENSITIVITY_VERSION, asked, calibrate, sensitivities
from hwmpq.stages.job import Job, Silent, load_images, open_job
from hwmpq.stages.latency import known_glue, known_layers
from hwmpq.stages.menu import Menu, make_menu
from hwmpq.stages.reuse import explained
from hwmpq.stages.schedule import cell_call, keep_choice
from hwmpq.types import digest

FORMATS = ("fp32", "w8a8")
CELLS, LOSSES = 4, 2
ALIKE = "timed in another way (timing protocol, default schedule or compiler options)"
UNTOLD = "under a key whose parts were not kept"


class NoCompiler:
    """A builder of cells that all fail, which is a value like a time."""

    def layers(self, block: Sequence[LayerCell]) -> dict[str, str]:
        return self.glue({cell.key: cell for cell in block})

    def glue(self, calls: Mapping[str, Any]) -> dict[str, str]:
        return dict.fromkeys(calls, "compile: no compiler")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Options, list[Any]]:
    """The options of a network of two layers with a store that has all of it, and what was told
    before it was filled."""
    store = tmp_path_factory.mktemp("reuse") / "store.sqlite"
    options = Options(
        "tiny_job:tiny", input_shape=(1, 1, 16, 16), target="x86-avx2", formats=FORMATS,
        calib_data="digits#train", calib=16, store=str(store), explain_cache=True,
    )  # fmt: skip
    with (job := open_job(options, Silent())).store:
        menu, images = menu_of(job), load_images(job)
        told = explained(job, menu, images)["cache"]
        bench = CellBench(job, NoCompiler(), None, job.fingerprint)  # type: ignore[arg-type]
        bench.layers([cell for block in known_layers(job, menu)[1] for cell in block])
        bench.glue(known_glue(job, menu)[1])
        sensitivities(job, images, menu, calibrate(job, images, menu))
    return options, told


@pytest.fixture
def job(filled: tuple[Options, Any], tmp_path: Path) -> Iterator[Job]:
    """A job on a copy of the filled store."""
    options, _ = filled
    place = shutil.copy(str(options.store), tmp_path / "copy.sqlite")
    with (found := open_job(replace(options, store=str(place)), Silent())).store:
        yield found


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "empty.sqlite") as store:
        yield store


def menu_of(job: Job) -> Menu:
    return make_menu(job.network, job.target, FORMATS)


def told(job: Job, **options: Any) -> list[dict[str, Any]]:
    """What is told of a job with other options on the same store."""
    job = replace(job, options=replace(job.options, **options))
    found: list[dict[str, Any]] = explained(job, menu_of(job), load_images(job))["cache"]
    return found


def why(job: Job, **options: Any) -> list[dict[str, int]]:
    """Stage by stage: reason -> how many."""
    return [stage["why"] for stage in told(job, **options)]


def test_nothing_then_everything_is_there(job: Job, filled: tuple[Options, Any]) -> None:
    before = filled[1]
    glue = before[1]["new"]
    assert glue > 2
    numbers = {"layer cells": CELLS, "glue cells": glue, "sensitivities": LOSSES}
    assert before == [
        {"stage": stage, "reused": 0, "new": n,
         "why": {f"never {'estimated' if n == LOSSES else 'timed'}": n}}
        for stage, n in numbers.items()
    ]  # fmt: skip
    assert told(job) == [
        {"stage": stage, "reused": n, "new": 0, "why": {}} for stage, n in numbers.items()
    ]
    silent = replace(job, options=replace(job.options, explain_cache=False))
    assert explained(silent, menu_of(job), load_images(job)) == {}


def test_times_of_other_circumstances(job: Job) -> None:
    elsewhere = replace(job, fingerprint="riscv64-9c-0")
    machine = f"on another machine (fingerprint {job.fingerprint})"
    threads = "with another number of threads (1, now 2)"
    for found, reason in (
        (why(elsewhere), f"timed {machine}"),
        (why(job, threads=2), f"timed {threads}"),
        (why(elsewhere, threads=2), f"timed {machine}, {threads}"),
    ):
        layers, glue, losses = found
        assert layers == {reason: CELLS} and set(glue) == {reason} and not losses


def test_a_store_that_is_not_read(job: Job) -> None:
    with Store.open(str(job.options.store), fresh=True) as store:
        layers, glue, losses = why(replace(job, store=store), fresh=True)
    reason = "--fresh: the store is not read"
    assert layers == {reason: CELLS} and set(glue) == {reason} and losses == {reason: LOSSES}


def test_other_schedule_and_failures_that_may_pass(job: Job) -> None:
    layer, fmt = job.network.layer("conv"), format_named("w8a8")
    kernel, call = menu_of(job).kernels["conv"]["w8a8"], cell_call(layer.workload, fmt, 1)
    schedules = kernel.schedules(call)
    keep_choice(job, kernel, call, schedules[1], schedules)
    [row] = [r for r in job.store.rows() if (r.measurement.workload, r.measurement.format)
             == (layer.workload, "fp32")]  # fmt: skip
    crashed = replace(row.measurement, error="crashed: SIGKILL")
    job.store.put(crashed, row.target, row.fingerprint, row.toolchain)
    key = min(job.store.keys("glue"))
    job.store.put_fact("glue", key, {**job.store.fact("glue", key), "error": "timed out"})
    again = "failed in a way that may pass"
    layers, glue, _ = told(job)
    assert layers["why"] == {"timed with another schedule": 1, again: 1}
    assert layers["reused"] == CELLS - 2 and glue["why"] == {again: 1}


def test_times_of_other_versions(job: Job, empty: Store) -> None:
    for i, row in enumerate(job.store.rows()):
        old = {"codegen": "6"} if i else row.toolchain  # one of this version, by an old protocol
        cell = replace(row.measurement, key=f"old {i}")
        empty.put(cell, row.target, row.fingerprint, old)
        empty.put(replace(cell, key=f"far {i}", kernel="x"), "y", row.fingerprint, old)
    for key in job.store.keys("glue"):
        fact = job.store.fact("glue", key)
        del fact["circumstances"]
        empty.put_fact("glue", f"old {key}", fact)
    layers, glue, _ = why(replace(job, store=empty))
    kernels = f"timed by another version of the kernels (codegen 6, now {CODEGEN_VERSION})"
    assert layers == {kernels: CELLS - 1, ALIKE: 1}
    assert set(glue) == {f"timed {UNTOLD}"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ptq": ()}, "with another --ptq"),
        ({"calib": 20}, "on other calibration images"),
        ({"seed": 1}, "on other calibration images, with another --seed (0, now 1)"),
        ({"sensitivity": "weight-error"}, "by another estimator (output-error)"),
        ({"loss": "kl"}, "by another estimator (output-error), with another --loss"),
    ],
)
def test_losses_under_other_keys(job: Job, options: dict[str, Any], reason: str) -> None:
    job.store.put_fact(KEYS, "far", {"estimator": "fisher"})
    job.store.put_fact("sensitivity", "far|conv|w8a8", [1.0])
    layers, glue, losses = why(job, **options)
    assert not layers and not glue
    assert losses == {f"estimated {reason}": LOSSES}


def test_losses_of_other_weights_of_old_stores_and_pairs(job: Job, empty: Store) -> None:
    other = why(replace(job, key="0"))[2]
    assert other == {"estimated of another model or with other weights": LOSSES}
    *_, losses, pairs = told(job, sensitivity="clado-gn")
    assert losses["why"] == {"estimated by another estimator (output-error)": LOSSES}
    assert pairs == {"stage": "pairs", "reused": 0, "new": 1, "why": {"never estimated": 1}}
    for key in job.store.keys("sensitivity"):
        empty.put_fact("sensitivity", key, job.store.fact("sensitivity", key))
    empty.put_fact("sensitivity", "x|fc|w8a8", [1.0])
    assert told(replace(job, store=empty))[2]["reused"] == LOSSES  # as good as ever
    old = why(replace(job, store=empty), ptq=())[2]
    assert old == {f"estimated {UNTOLD}": LOSSES}


def test_the_parts_are_those_of_the_keys_that_stores_have(job: Job) -> None:
    images = load_images(job)
    _, seen, keys = asked(job, images)
    common = [SENSITIVITY_VERSION, job.key, seen.digest, images.calib.digest]
    assert keys.own == digest([*common, "output-error", "mse", ["bias"], 0, ""])
    assert keys.shared == digest([*common, "mse", ["bias"]])
    assert job.store.fact(KEYS, keys.own) == keys.parts


def test_the_table(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    line = "sensitivity tiny_job:tiny --input-shape 1,1,16,16 --target x86-avx2 --formats w8a8"
    line += f" --calib-data digits#train --calib 16 --store {job.options.store} --explain-cache"
    assert hwmpq.cli.main([*line.split(), "--sensitivity", "weight-error"]) == 0
    heads, row, *_ = (line.split() for line in capfd.readouterr().out.splitlines())
    assert heads == ["stage", "reused", "new", "why"]
    assert row == "sensitivities 0 2 2: estimated by another estimator (output-error)".split()

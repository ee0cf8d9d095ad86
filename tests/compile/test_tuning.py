"""Schedules timed against each other: which is chosen, what is kept, and that it is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hwmpq import side_jobs
from hwmpq.artifact import load, read_manifest, replay
from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.kernels import Schedule, best
from hwmpq.measure import CellTiming
from hwmpq.measure.bundle import Result
from hwmpq.pipeline import Options
from hwmpq.stages import bundle, latency, tuning
from hwmpq.stages.job import Silent, open_job
from hwmpq.stages.menu import make_menu
from hwmpq.stages.schedule import (
    cell_call,
    choice_fact,
    choice_key,
    keep_choice,
    timed_kernel,
)
from hwmpq.types import Measurement, Workload

pytestmark = pytest.mark.usefixtures("shared_worker")
FORMATS = ("fp32", "w8a8")
LINEAR = Workload.make("linear", "bias", m=12, k=64, n=32)


class Two(nn.Module):
    """On 16×16 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def two() -> Two:
    torch.manual_seed(0)
    return Two()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    store = tmp_path_factory.mktemp("tuning") / "store.sqlite"
    return Options(
        f"{__name__}:two", input_shape=(1, 1, 16, 16), target="x86-avx2", formats=FORMATS,
        calib_data="digits#train", store=str(store), calib=16, tune=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(options: Options) -> dict[str, Any]:
    return side_jobs.profile_model(options)


def test_every_schedule_is_timed_once(options: Options, tuned: dict[str, Any]) -> None:
    job = open_job(options, Silent())
    with job.store:
        menu = make_menu(job.network, job.target, FORMATS)
        spaces = tuning.spaces(job, menu, 3)
        assert tuned["tuned"] == len(spaces) >= 2
        for space in spaces:
            assert len(space.schedules) == 3 == len(set(space.schedules))
            for schedule in space.schedules:
                kernel = space.kernel.scheduled(schedule, space.call)
                key = latency.layer_key(kernel.cell(space.call), job.target.tvm, job.fingerprint)
                kept = job.store.measurement(key)
                assert kept is not None and not kept.error and kept.samples_s
                assert kept.quality.get("schedule") == (kernel.timed and kernel.timed.text)
    again = side_jobs.profile_model(options)
    assert again["tuned"] == again["new_timings"] == 0
    assert again["schedules"] == tuned["schedules"] and again["latency_s"] == tuned["latency_s"]
    assert side_jobs.profile_model(replace(options, tune=2))["tuned"] == 0


def test_the_chosen_schedule_is_priced_and_built(
    options: Options, tuned: dict[str, Any], tmp_path: Path
) -> None:
    job = open_job(options, Silent())
    layer = job.network.layer("conv")
    with job.store:
        space = next(
            s for s in tuning.spaces(job, make_menu(job.network, job.target, FORMATS), 3)
            if s.call.workload == layer.workload and s.call.format.name == "w8a8"
        )  # fmt: skip
        other = space.schedules[1]
        keep_choice(job, space.kernel, space.call, other, space.schedules)
        kernel = timed_kernel(job, space.kernel, layer.workload, format_named("w8a8"))
        assert kernel.timed == other and kernel.cell(space.call) != space.kernel.cell(space.call)
        kept = job.store.measurement(
            latency.layer_key(kernel.cell(space.call), job.target.tvm, job.fingerprint)
        )
    found = side_jobs.profile_model(options)
    assert kept is not None and found["latency_s"]["conv"]["w8a8"] == kept.latency_s
    assert found["schedules"]["conv"]["w8a8"] == other.text and found["new_timings"] == 0
    built = replace(options, out=str(tmp_path / "built"), calib_data="digits#train")
    side_jobs.compile_model(built, dict.fromkeys(("conv", "fc"), "w8a8"))
    manifest = read_manifest(tmp_path / "built")
    assert manifest["kernels"]["conv"]["schedule"] == other.text
    replayed = replay(load(tmp_path / "built"))
    assert replayed.exact and not replayed.first_difference and replayed.samples > 0


def test_without_timing_the_default(options: Options, tmp_path: Path) -> None:
    plain = replace(options, tune=0, store=str(tmp_path / "store.sqlite"))
    found = side_jobs.profile_model(plain)
    assert found["tuned"] == 0 and found["schedules"] == {}


def test_a_schedule_must_be_worth_it() -> None:
    schedules = [Schedule(6, 2), Schedule(4, 3), Schedule(1, 4, "rows")]

    def chosen(*seconds: float | None) -> Schedule:
        times = [
            Measurement(str(i), LINEAR, "fp32", "k", 1, error="crashed")
            if s is None else Measurement(str(i), LINEAR, "fp32", "k", 1, (s,))
            for i, s in enumerate(seconds)
        ]  # fmt: skip
        return tuning.fastest(schedules, times)

    assert chosen(1.0, 0.9, 0.8) == schedules[2]
    assert chosen(1.0, 0.98, 1.2) == schedules[0]
    assert chosen(1.0, 0.9, None) == schedules[1]
    assert chosen(None, 0.9, 0.8) == schedules[0]


def test_a_bundle_brings_its_choices(options: Options, tmp_path: Path) -> None:
    """The fastest schedule of a cell whose default came back; the default may come last."""
    job = open_job(options, Silent())
    kernel = best(LINEAR, format_named("fp32"), job.target.features)
    assert kernel is not None
    call = cell_call(LINEAR, format_named("fp32"), 1)
    schedules = kernel.schedules(call)[:3]
    tvm = dict(job.target.tvm)

    def rows(*taken: tuple[int, float]) -> Result:
        found = []
        for index, seconds in taken:
            cell = kernel.scheduled(schedules[index], call).cell(call)
            row = {"kind": "layer", "workload": LINEAR.to_json(), "format": "fp32",
                   "kernel": kernel.name, "cell": cell, "tvm": tvm,
                   "schedule": schedules[index].text, "default": kernel.cell(call)}  # fmt: skip
            found.append((row, CellTiming(cell, (seconds,))))
        return Result("o", job.fingerprint, job.target.name, {}, 1, found)

    with job.store:
        key = choice_key(kernel.cell(call), tvm, job.fingerprint)
        found = bundle._choices(rows((2, 0.5), (1, 0.8), (0, 1.0)))
        assert found == {key: choice_fact(schedules[2], [schedules[0], schedules[2], schedules[1]])}
        assert bundle._choices(rows((0, 1.0))) == bundle._choices(rows((1, 0.8), (2, 0.5))) == {}
        job.store.put_fact("schedule", key, found[key])
        chosen = timed_kernel(job, kernel, LINEAR, format_named("fp32"))
    assert chosen.timed == schedules[2]


def test_schedules_have_a_text() -> None:
    fmt = format_named("fp32")
    kernel = best(LINEAR, fmt, frozenset({"avx2", "fma"}))
    assert kernel is not None
    call = cell_call(LINEAR, fmt, 1)
    schedules = kernel.schedules(call)
    assert len({s.text for s in schedules}) == len(schedules) > 2
    assert {s.order for s in schedules} == {"rows", "vectors"}
    assert [Schedule.parse(s.text) for s in schedules] == schedules
    assert kernel.scheduled(schedules[0], call) == kernel
    with pytest.raises(InputError, match="schedule of conv2d"):
        kernel.scheduled(Schedule(99, 9), call)

"""Whole artifacts for another kind of machine, run there by an emulator; nothing is timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_job import quantize_tiny

import hwmpq
from hwmpq import devices, targets
from hwmpq.errors import InputError, WorkerTimeout
from hwmpq.kernels import guest
from hwmpq.measure import emulated, remote
from hwmpq.measure.reach import reach
from hwmpq.measure.remote import RemoteArtifact
from hwmpq.side_jobs import compile_model
from hwmpq.stages.job import Options

A72, A76 = (targets.load(f"arm-cortex-{n}") for n in ("a72", "a76"))
PLAN = {"conv": "w4a8", "fc": "w8a8"}


@pytest.fixture
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device a76."""
    file = tmp_path / "devices.toml"
    file.write_text("version = 1\n")
    monkeypatch.setenv("HWMPQ_DEVICES", str(file))
    devices.append(emulated.device("a76", A76))


def options(tmp_path: Path, **more: Any) -> Options:
    words: dict[str, Any] = {
        "input_shape": (1, 1, 16, 16), "calib_data": "digits#train", "calib": 16,
        "target": A76.name, "store": f"sqlite:///{tmp_path}/s.db", "out": str(tmp_path / "made"),
    }  # fmt: skip
    return Options("tiny_job:tiny", **(words | more))


def needs(programs: Sequence[str]) -> None:
    if not A76.foreign or programs:
        pytest.skip(f"nothing to emulate on this machine, or no {', '.join(programs)}")


def test_deployed_is_simulated(tmp_path: Path, chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(guest.missing(A76))
    if not emulated.place().is_dir():
        pytest.skip("no emulated machine: run hwmpq devices setup arm-emulated")
    found = compile_model(options(tmp_path), PLAN)
    assert found["kernels"]["conv"]["kernel"] == "conv2d.neon_sdot.s4"
    with reach(devices.load("a76")) as worker:
        deployed = RemoteArtifact(worker, tmp_path / "made")
        parity = deployed.replay()
        monkeypatch.setattr(remote, "IMAGE_DEADLINE_S", 1e-3)
        with pytest.raises(WorkerTimeout, match=r"got 0\.004 s"):  # of all four samples
            deployed.replay()
    assert (parity.samples, parity.max_abs, parity.first_difference) == (4, 0.0, "")


def test_compiled_without_a_device_it_is_not_run(tmp_path: Path) -> None:
    needs(guest.missing(A72))
    found = compile_model(options(tmp_path, target=A72.name), PLAN)
    assert found["parity"] is None
    assert found["kernels"]["conv"]["kernel"] == "conv2d.neon_smull.s4"
    with pytest.raises(InputError, match="this CPU cannot run an artifact for arm-cortex-a72"):
        hwmpq.load(tmp_path / "made")


def test_nothing_is_timed_on_an_emulator(tmp_path: Path, chip: None) -> None:
    def quantize(**words: Any) -> None:
        quantize_tiny(store=f"sqlite:///{tmp_path}/s.db", **words)

    with pytest.raises(InputError, match="times of an emulated device: got a76"):
        quantize(device="a76")
    with pytest.raises(InputError, match=r"this machine cannot run .*a76: .*Times need a chip"):
        quantize(target=A76.name)
    with pytest.raises(InputError, match="times of an emulated device"):
        reach(devices.load("a76")).call("time", {"cells": []}, 1.0)

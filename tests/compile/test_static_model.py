"""Cycles counted under an emulator and costed by LLVM, and what may be done with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_job import quantize_tiny

from hwmpq import targets, tensors
from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.kernels import candidates
from hwmpq.kernels.build import compile_cell
from hwmpq.measure import Cell, static_model
from hwmpq.measure.store import Store
from hwmpq.types import Workload

A76 = targets.load("arm-cortex-a76")


@pytest.fixture
def able() -> None:
    try:
        static_model.identity(A76)
    except InputError as error:
        pytest.skip(str(error))


def cell(folder: Path, fmt: str, micro: str) -> Cell:
    work, f = Workload.make("linear", "bias", m=4, k=64, n=32), format_named(fmt)
    [kernel] = [k for k in candidates(work, f, A76.features) if k.micro.name == micro]
    made = compile_cell(
        {
            "workload": work.to_json(), "format": fmt, "x": f.activation.name, "threads": 1,
            "out": "u8" if f.is_integer else "fp32", "kernel": kernel.name, "target": A76.name,
            "folder": str(folder),
        }
    )  # fmt: skip
    names = ("library", "args", "expected", "atol", "rtol")
    return Cell(micro, roles=tuple(made["roles"]), **{n: made[n] for n in names})


def test_counts_are_exact_and_rank_the_instructions(able: None, tmp_path: Path) -> None:
    macs, per = 4 * 64 * 32, {"neon_fma": ("fmla", 4), "neon_sdot": ("sdot", 16)}
    cycles = {}
    for micro, (mnemonic, products) in per.items():
        made = cell(tmp_path / micro, "fp32" if micro == "neon_fma" else "w8a8", micro)
        arrays, _ = tensors.load(Path(made.args))
        given = [arrays[str(i)] for i in range(len(arrays))]
        found, _ = static_model.estimate(Path(made.library), given, A76)
        assert found.mnemonics[mnemonic] * products == macs
        assert found == static_model.estimate(Path(made.library), given, A76)[0]
        cycles[micro] = found.cycles
        [timing] = static_model.time_cells([made], A76)
        assert A76.static_model is not None
        assert timing.latency_s == found.cycles / A76.static_model.clock_hz, timing.error
    assert macs / 32 < cycles["neon_sdot"] < cycles["neon_fma"] < macs


def test_what_ends_early_or_is_wrong_has_no_cycles(able: None, tmp_path: Path) -> None:
    made = cell(tmp_path, "w8a8", "neon_sdot")
    older = replace(A76, emulator=targets.load("arm-cortex-a72").emulator)
    [trapped] = static_model.time_cells([made], older)
    expected, _ = tensors.load(Path(made.expected))
    other = {name: np.full_like(array, 7) for name, array in expected.items()}
    tensors.save(Path(made.expected), other)
    [wrong] = static_model.time_cells([made], A76)
    assert "SIGILL" in trapped.error and wrong.error.startswith("wrong numbers")
    assert not trapped.samples_s and not wrong.samples_s


def test_what_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"riscv64-v cannot be estimated: got no \[static_model\]"):
        static_model.identity(targets.load("riscv64-v"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="got no llvm-mca; allowed: llvm-mca-19 or later"):
        static_model._llvm("mca")


def test_a_plan_by_estimates_says_so(able: None, tmp_path: Path) -> None:
    def quantize(**more: Any) -> Any:
        place = {"store": f"sqlite:///{tmp_path}/s.db", "out": tmp_path / "made"}
        return quantize_tiny(target=A76.name, formats=["fp32"], **place, **more)

    with pytest.raises(InputError, match="--allow-estimates goes by estimated cycles instead"):
        quantize()
    told = quantize(allow_estimates=True).json
    assert told["status"] == "met"
    times = told["latency_s"]
    assert times["predicted"] > 0 and times["measured"] is times["measured_interval"] is None
    assert {kernel["latency_source"] for kernel in told["kernels"].values()} == {"static-model"}
    assert told["accuracy"]["deployed"] is None and told["parity"]["top1_agreement"] is None
    with Store.open(f"sqlite:///{tmp_path}/s.db") as store:
        rows = store.rows(A76.name)
        assert rows and {row.measurement.source for row in rows} == {"static-model"}
        assert {row.fingerprint for row in rows} == {static_model.identity(A76)}

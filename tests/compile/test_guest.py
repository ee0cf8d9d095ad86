"""Kernels of other instruction sets: compiled for them, run as they are under their emulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwmpq import targets
from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.kernels import Call, candidates, guest, kernel_named
from hwmpq.kernels import conformance as conf
from hwmpq.kernels.build import export, library
from hwmpq.kernels.cases import Case, subset
from hwmpq.kernels.micro.neon_int import BytePairs
from hwmpq.measure.kernel import export_loop
from hwmpq.types import Workload

A72, A76, N2 = (targets.load(f"arm-{n}") for n in ("cortex-a72", "cortex-a76", "neoverse-n2"))
RISCV = targets.load("riscv64-v")
LINEAR = Workload.make("linear", "bias", m=3, k=37, n=9)


def needs(target: targets.Target) -> None:
    """Skip where programs of the target cannot be run."""
    if not target.foreign:
        pytest.skip(f"this machine is one for {target.name}: nothing is emulated")
    if lacking := guest.missing(target):
        pytest.skip(f"emulating {target.name} needs {', '.join(lacking)}")


def call(fmt: str, work: Workload = LINEAR, out: str = "u8") -> Call:
    f = format_named(fmt)
    b = "" if work.has_weight else f.weight.name
    return Call(work, f, f.activation.name, out, b=b)


def sample(target: targets.Target, micro: str, count: int) -> list[Case]:
    """Cases of the pairwise subset with a micro-kernel, evenly spread over the operators."""
    cases = [c for c in subset(target.features) if f".{micro}." in c.kernel]
    return cases[:: -(-len(cases) // count)]


@pytest.mark.parametrize(
    ("target", "micro"),
    [
        (A72, "neon_fma"), (A72, "neon_smull"), (A76, "neon_sdot"), (N2, "neon_usdot"),
        (N2, "neon_usmmla"), (N2, "neon_bfdot"), (N2, "neon_bfmmla"),
    ],
)  # fmt: skip
def test_sample_of_the_pairwise_subset(target: targets.Target, micro: str) -> None:
    needs(target)
    wrong = {str(case): conf.check(case, target) for case in sample(target, micro, 4)}
    assert not any(wrong.values()), {case: text for case, text in wrong.items() if text}


@pytest.mark.parametrize("out", ["fp32", "u8"])
def test_a_new_instruction_set_is_a_target_file_and_kernels(out: str) -> None:
    """Codes come from no truncating conversion: QEMU 7.2 fails at two of those in a row."""
    needs(RISCV)
    for fmt in ("fp32", "w8a8"):
        given = call(fmt, out=out)
        (kernel,) = candidates(LINEAR, given.format, RISCV.features)
        assert conf.check(Case(kernel.name, given), RISCV) is None


@pytest.mark.parametrize("fmt", ["w8a8", "w8a7", "w4a8", "w2a2"])
@pytest.mark.parametrize("values", ["most", "least"])
def test_no_sum_of_byte_products_overflows(fmt: str, values: str) -> None:
    needs(A72)
    given = call(fmt, Workload.make("linear", "", m=2, k=301, n=9), "fp32")
    (kernel,) = candidates(given.workload, given.format, A72.features)
    assert conf.check(Case(kernel.name, given, values=values), A72) is None


def test_one_product_more_would_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    needs(A72)
    exact = BytePairs.run_length
    monkeypatch.setattr(BytePairs, "run_length", lambda self, f: exact(self, f) + 1)
    given = call("w8a8", Workload.make("linear", "", m=2, k=301, n=9), "fp32")
    wrong = conf.check(Case("conv2d.neon_smull.s8", given, values="least"), A72)
    assert wrong is not None and "elements differ" in wrong


def test_an_instruction_that_the_chip_lacks_is_told() -> None:
    needs(A76)
    older = replace(A76, emulator=A72.emulator)
    found = conf.check(Case("conv2d.neon_sdot.s8", call("w8a8")), older)
    assert found is not None and found.startswith("ended by SIGILL (qemu: uncaught")


def test_a_kernel_that_ends_its_guest_takes_no_other_with_it() -> None:
    needs(A76)
    older = replace(A76, emulator=A72.emulator)
    kernels = {"conv2d.neon_sdot.s8": "w8a8", "conv2d.neon_fma.fp32": "fp32"}
    cases = [Case(name, call(fmt)) for name, fmt in kernels.items()]
    ends = conf.check_all([cases[1], *cases, cases[0], cases[1]], older)
    assert [end and end[:17] for end in ends] == [None, *["ended by SIGILL (", None] * 2]


def test_formats_that_differ_in_numbers_alone_share_their_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs(A76)
    compiled: list[list[str]] = []

    def counted(functions: dict[str, Any], target: targets.Target) -> Any:
        compiled.append(list(functions))
        return library(functions, target)

    monkeypatch.setattr(conf, "library", counted)
    cases = [Case("conv2d.neon_sdot.s8", call(fmt), seed=i) for i, fmt in
             enumerate(("w8a6", "w8a5", "w8a4"))]  # fmt: skip
    cases.append(Case("conv2d.neon_sdot.s8", call("w8a6", out="fp32")))
    assert conf.check_all(cases, A76) == [None] * 4
    assert compiled == [["kernel0", "kernel1"]]


@pytest.mark.parametrize(
    ("target", "kernel", "fmt", "wanted"),
    [
        (A72, "conv2d.neon_smull.s8", "w8a8", {"smull", "smlal", "sadalp"}),
        (A76, "conv2d.neon_sdot.s4", "w4a8", {"sdot"}),
        (N2, "conv2d.neon_usdot.s8", "w8a8", {"sudot"}),
        (N2, "conv2d.neon_usmmla.s4", "w4a8", {"usmmla"}),
        (N2, "conv2d.neon_bfdot.bf16", "bf16", {"bfdot"}),
        (N2, "conv2d.neon_bfmmla.bf16", "bf16", {"bfmmla"}),
        (A72, "conv2d.neon_fma.fp32", "fp32", {"fmla"}),
        (RISCV, "conv2d.rvv_wmacc.s8", "w8a8", {"vwmacc.vx"}),
    ],
)
def test_the_instruction_is_emitted(
    target: targets.Target, kernel: str, fmt: str, wanted: set[str]
) -> None:
    work = Workload.make("linear", "bias", m=16, k=128, n=64)
    text = conf.mnemonics(
        {"workload": work.to_json(), "format": fmt, "kernel": kernel, "target": target.name}
    )
    assert wanted <= set(text["counts"]), text


def test_the_loop_that_times_a_kernel_is_of_its_kind(tmp_path: Path) -> None:
    needs(A76)
    export_loop(tmp_path / "loop", "main", 3, A76.tvm)
    machines = {int.from_bytes(f.read_bytes()[18:20], "little") for f in tmp_path.glob("loop/*")}
    assert machines == {183}  # EM_AARCH64


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    kernel = kernel_named("conv2d.neon_fma.fp32", LINEAR, format_named("fp32"), A72.features)
    executable = library({"main": kernel.emit(call("fp32"))}, A72)
    with pytest.raises(InputError, match=r"needs qemu-aarch64-static, .*-gcc\. On Debian"):
        guest.run(executable, A72, [])
    with pytest.raises(InputError, match=r"linking for .* needs aarch64-linux-gnu-gcc"):
        export(executable, tmp_path / "x.so", A72)
    with pytest.raises(InputError, match="target x86-avx2 cannot be emulated: got no emulator"):
        guest.check_tools(targets.load("x86-avx2"))

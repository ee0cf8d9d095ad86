"""Targets: the shipped files, the schema, and what this CPU is found to be."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hwmpq import targets
from hwmpq.errors import InputError, UnknownName

FLAGS = {word: " ".join(feature.flags) for word, feature in targets.FEATURES.items()}
SHIPPED = [
    "arm-cortex-a53", "arm-cortex-a72", "arm-cortex-a76", "arm-neoverse-n2", "arm-pixel-6",
    "arm-raspberry-pi-4", "arm-raspberry-pi-5", "cuda-jetson-orin", "cuda-sm80", "cuda-sm89",
    "cuda-sm90", "riscv64-v", "x86-amx", "x86-avx-vnni", "x86-avx2", "x86-avx512-vnni",
]  # fmt: skip


def cpuinfo(*words: str) -> str:
    return "processor\t: 0\nflags\t\t: fpu " + " ".join(FLAGS[word] for word in words) + "\n"


def test_shipped_names() -> None:
    assert targets.names() == SHIPPED


@pytest.mark.parametrize("name", targets.names())
def test_shipped_file(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    assert target.features <= set(targets.FEATURES)
    assert target.vector_bytes * target.registers <= 4096
    assert 0 < target.caches.l1d <= target.caches.l2
    assert all(peak > 0 for peak in target.peaks.values())
    assert target.peaks["u8.s8"] > target.peaks["fp32.fp32"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.rank = 0  # type: ignore[misc]


def test_ranks_differ() -> None:
    ranks = [targets.load(name).rank for name in targets.names()]
    assert len(set(ranks)) == len(ranks)


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(
        UnknownName, match=r"unknown target: got 'x86-avx512'.*Nearest: .*x86-avx512-vnni"
    ):
        targets.load("x86-avx512")


def test_native_is_the_highest_rank_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SHIPPED:
        have = targets.load(name).features
        monkeypatch.setattr(targets, "host_features", lambda have=have: have)
        alike = [t for t in map(targets.load, SHIPPED) if t.features == have]
        best = max(alike, key=lambda target: target.rank).name
        assert targets.native().name == best
        assert targets.load("native").name == best


def test_native_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "host_features", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(InputError, match=r"no shipped target fits this CPU.*x86-avx2 lacks f16c;"):
        targets.native()
    assert targets.satisfied_by_host(targets.load("x86-avx2")) == ["f16c"]


@pytest.mark.parametrize("word", [w for w, f in targets.FEATURES.items() if f.flags and w != "v"])
def test_host_features_read_their_own_flags(word: str) -> None:
    assert targets.host_features(cpuinfo(word)) == {word}
    if " " in FLAGS[word]:  # every flag is needed
        assert not targets.host_features(cpuinfo(word).replace(f" {FLAGS[word].split()[-1]}", ""))


def test_host_features_of_other_makers() -> None:
    arm = "Features\t: fp asimd evtstrm fphp asimdhp asimddp i8mm bf16\nCPU part : 0xd40\n"
    assert targets.host_features(arm) == {"neon", "fp16", "dotprod", "i8mm", "bf16"}
    assert targets.host_features("isa\t\t: rv64imafdcv_zicsr_zvl128b\n") == {"v"}
    assert targets.host_features("isa\t\t: rv64imafdc_zicsr_sv48\n") == frozenset()
    assert targets.host_features("") == frozenset()


def test_host_features_of_this_machine() -> None:
    assert targets.host_features() <= set(targets.FEATURES)
    assert targets.host_features() == targets.host_features(Path("/proc/cpuinfo").read_text())


def test_foreign_targets_are_those_of_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    a76, avx2 = targets.load("arm-cortex-a76"), targets.load("x86-avx2")
    for machine, foreign in (("x86_64", True), ("aarch64", False), ("riscv64", True)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert a76.foreign is foreign and not avx2.foreign
    assert a76.emulator[0].startswith("qemu-aarch64") and not avx2.emulator


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An extra target folder holding `board.toml`, a copy of a shipped file."""
    extra = tmp_path / "extra"
    extra.mkdir()
    shipped = targets.data_folder("targets") / "x86-avx2.toml"
    (extra / "board.toml").write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setenv("HWMPQ_TARGET_PATH", str(extra))
    return extra


def test_extra_folder(folder: Path) -> None:
    board = targets.load("board")
    assert board == dataclasses.replace(targets.load("x86-avx2"), name="board")
    assert "board" in targets.names()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank = 10", "rank = 10\ncolour = 1", "colour: Unexpected"),
        ("rank = 10", "", "rank: Field required"),
        ("rank = 10", 'rank = "10"', "rank: Input should be a valid integer"),
        ("rank = 10", 'rank = 10\nname = "b"', "The file names it: remove it"),
        ("l2 =", "l4 =", "caches.l2: Field required; caches.l4: Unexpected"),
        ("rounds =", "times =", "protocol.times: Unexpected"),
        ('"fma"', '"fmaa"', "unknown feature in target file .*board.toml: got 'fmaa'.*fma"),
        ("peaks = ", "peak = ", "sources in target file .*board.toml"),
        ("rank = 10", "rank 10", "unreadable target file .*board.toml"),
    ],
)
def test_schema(folder: Path, old: str, new: str, message: str) -> None:
    path = folder / "board.toml"
    path.write_text(re.sub(rf"(?m)^{old}|{old}", new, path.read_text(), count=1))
    with pytest.raises(InputError, match=message):
        targets.load("board")


@pytest.mark.parametrize("name", ["x86-avx2", "native"])
def test_a_name_is_given_once(folder: Path, name: str) -> None:
    (folder / "board.toml").rename(folder / f"{name}.toml")
    with pytest.raises(InputError, match=f"target name '{name}' is taken"):
        targets.names()


def test_missing_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HWMPQ_TARGET_PATH", "/nowhere/at/all")
    with pytest.raises(InputError, match="no such folder of targets: got /nowhere/at/all"):
        targets.names()


def test_data_folders_hold_their_files() -> None:
    assert {path.stem for path in targets.data_folder("targets").glob("*.toml")} == set(SHIPPED)
    assert (targets.data_folder("cost_models") / "README.md").is_file()

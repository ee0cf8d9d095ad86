"""An artifact from elsewhere: kept from an older version, signed, damaged; called by threads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_tool
import numpy as np
import pytest

import hwmpq.cli
from hwmpq import artifact
from hwmpq.artifact import native, signature
from hwmpq.artifact.contents import Contents
from hwmpq.errors import InputError
from hwmpq.targets import host_features

ROOT = Path(__file__).resolve().parents[2]
KEPT, PUBLIC = ROOT / "tests/golden/artifact", ROOT / "tests/golden/artifact.pub"
needs_avx2 = pytest.mark.skipif(
    not {"avx2", "fma", "f16c"} <= host_features(), reason="the kept artifact is for x86-avx2"
)
COUNT = 160


mutations, threads = bench_tool.load("mutations"), bench_tool.load("threads")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "net"))


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key; the public one lies beside it."""
    place = tmp_path_factory.mktemp("keys") / "k"
    signature.keygen(place)
    return place


def public(key: Path) -> Path:
    return key.with_name(key.name + ".pub")


# -- kept from the version that wrote it -----------------------------------------------------------


@needs_avx2
def test_an_artifact_of_version_1_still_loads() -> None:
    loaded = artifact.load(KEPT, PUBLIC)
    assert artifact.replay(loaded) == artifact.Replay(2, 0.0, 100.0, True, "")
    assert loaded.manifest["assignment"] == {"conv1": "w8a8", "conv2": "w4a8", "fc": "w8a8"}


def test_an_artifact_of_a_later_version(copied: Path) -> None:
    path = copied / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match=r"unknown version: got 2; allowed: 1\. Use the hwmpq"):
        artifact.load(copied)


# -- signatures ------------------------------------------------------------------------------------


@needs_avx2
def test_signed_required_and_loaded(copied: Path, key: Path) -> None:
    with pytest.raises(InputError, match=r"signature of .* does not fit"):
        artifact.load(copied, public(key))  # signed by the key it was kept with
    artifact.sign(copied, key)
    artifact.load(copied, public(key))
    assert key.stat().st_mode & 0o777 == 0o600
    moved = copied.rename(copied.with_name("elsewhere"))
    artifact.load(moved, public(key))


def test_a_stripped_signature(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "manifest.sig").unlink()
    for words in ({"require_signature": PUBLIC}, {}):
        if not words:
            monkeypatch.setenv("HWMPQ_REQUIRE_SIGNATURE", str(PUBLIC))
        with pytest.raises(InputError, match="is not signed"):
            artifact.load(copied, **words)


def test_policy_and_caller_must_both_agree(
    copied: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact.sign(copied, key)
    monkeypatch.setenv("HWMPQ_REQUIRE_SIGNATURE", str(PUBLIC))
    with pytest.raises(InputError, match="does not fit"):
        artifact.load(copied, public(key))
    with pytest.raises(InputError, match="two keys are required at once"):
        signature.require(public(key))


def test_what_is_not_whole_is_not_signed(copied: Path, key: Path) -> None:
    (copied / "assignment.json").write_text("{}")
    with pytest.raises(InputError, match="was changed"):
        artifact.sign(copied, key)


@pytest.mark.parametrize("change", ["swap", "garbage", "missing", "private"])
def test_a_key_that_is_none(copied: Path, key: Path, tmp_path: Path, change: str) -> None:
    other = tmp_path / "key"
    if change == "swap":
        other = key
    elif change != "missing":
        other.write_bytes(b"-----BEGIN" if change == "garbage" else key.read_bytes())
    with pytest.raises(InputError, match="cannot read the public key"):
        artifact.load(copied, other)


def test_commands(
    copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HWMPQ_REQUIRE_SIGNATURE", "")  # put back afterwards
    new = tmp_path / "release"
    assert hwmpq.cli.main(["artifact", "keygen", str(new)]) == 0
    assert hwmpq.cli.main(["artifact", "keygen", str(new)]) == 2  # never over an old key
    capfd.readouterr()
    assert hwmpq.cli.main(["artifact", "sign", str(copied), "--key", str(new), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["signature"] == str(copied / "manifest.sig")
    required = ["inspect", str(copied), "--require-signature", f"{new}.pub"]
    assert hwmpq.cli.main(required) == 0
    (copied / "manifest.sig").unlink()
    assert hwmpq.cli.main(required) == 2
    assert "is not signed" in capfd.readouterr().err


# -- damage ----------------------------------------------------------------------------------------


def no_native_code(*_: Any) -> None:
    raise AssertionError("native code was loaded")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: (p / "more").write_text("x"), "does not list: got more"),
        (lambda p: (p / "sub").mkdir(), "does not list: got sub"),
        (lambda p: os.truncate(p / "model.so", 5000), "'model.so' .* was changed"),
        (lambda p: os.truncate(p / "manifest.json", 900), "is no artifact"),
        (lambda p: ((p / "model.so").unlink(), os.mkfifo(p / "model.so")), "so: got no plain file"),
        (lambda p: ((p / "model.so").unlink(), (p / "model.so").mkdir()), "so: got Is a directory"),
        (lambda p: edit(p, '"x"', '"y"'), "outputs, calls or parameters .* were changed"),
        (lambda p: edit(p, '"conv1.weight"', '"conv1.bias"'), "is damaged: no parameters"),
        (lambda p: edit(p, '"threads": 1', '"threads": true'), "is damaged: no threads"),
        (lambda p: edit(p, '"threads": 1', '"threads": 1, "threads": 1'), "stands twice"),
        (lambda p: edit(p, '"threads": 1', '"threads": NaN'), "NaN is no number"),
        (lambda p: edit(p, '"x86-avx2"', r'"\ud800"'), "is no artifact.*surrogates"),
    ],
)  # fmt: skip
def test_refused_before_native_code(
    copied: Path, damage: Callable[[Path], object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", no_native_code)
    damage(copied)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError, match=text):
        artifact.load(copied)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@needs_avx2
def test_what_was_checked_is_what_is_loaded(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that change between check and use change nothing."""
    want = mutations.outputs(artifact.load(KEPT))
    read = Contents.file

    def read_then_spoil(self: Contents, name: str) -> bytes:
        found = read(self, name)
        (self.path / name).write_bytes(b"spoiled")
        return found

    monkeypatch.setattr(Contents, "file", read_then_spoil)
    assert all(map(np.array_equal, mutations.outputs(artifact.load(copied)), want))


@needs_avx2
@pytest.mark.parametrize("required", [None, PUBLIC], ids=["unsigned", "signed"])
def test_mutations(required: Path | None) -> None:
    counts, wrong = mutations.compare(KEPT, COUNT, 7, required, ())
    assert wrong == [] and counts["refused"] > 0.7 * COUNT
    assert 0 < counts["equal"] or required


# -- threads ---------------------------------------------------------------------------------------


@needs_avx2
@pytest.mark.parametrize("shared", [True, False], ids=["one", "one each"])
def test_eight_threads(shared: bool) -> None:
    sets = [[artifact.load(KEPT)] for _ in range(1 if shared else 8)]
    wrong, before = threads.hammer(sets, 8, 50)
    more, after = threads.hammer(sets, 8, 400)
    assert wrong == more == 0 and after - before < 4 * 2**20


def test_threads_at_run_time() -> None:
    with pytest.raises(InputError, match="threads: got 2; allowed: 1"):
        artifact.load(KEPT, threads=2)

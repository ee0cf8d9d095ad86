"""An artifact from elsewhere: kept from an older version, signed, damaged, run without Python."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def tool(name: str) -> Any:
    """A program of tools/bench, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools/bench" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutations = tool("mutations")


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
        (lambda p: ((p / "model.so").unlink(), os.mkfifo(p / "model.so")), "lacks a file"),
        (lambda p: ((p / "model.so").unlink(), (p / "model.so").mkdir()), "lacks a file"),
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
    counts, wrong = mutations.compare(KEPT, COUNT, 7, required, None)
    assert wrong == [] and counts["refused"] > 0.7 * COUNT
    assert 0 < counts["equal"] or required


# -- threads ---------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@needs_avx2
@pytest.mark.parametrize("shared", [True, False], ids=["one", "one each"])
def test_eight_threads(shared: bool) -> None:
    loaded = [artifact.load(KEPT) for _ in range(1 if shared else 8)]
    inputs = np.random.default_rng(0).standard_normal((16, 1, 3, 8, 8)).astype(np.float32)
    want = [np.array(loaded[0](x)) for x in inputs]
    wrong: list[int] = []

    def work(number: int, calls: int) -> None:
        net = loaded[number % len(loaded)]
        for k in range(number, number + calls):
            if not np.array_equal(net(inputs[k % 16]), want[k % 16]):
                wrong.append(k)

    def all_at_once(calls: int) -> int:
        threads = [threading.Thread(target=work, args=(n, calls)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return resident()

    before = all_at_once(50)
    assert all_at_once(400) - before < 4 * 2**20 and wrong == []


def test_threads_at_run_time() -> None:
    with pytest.raises(InputError, match="threads: got 2; allowed: 1"):
        artifact.load(KEPT, threads=2)


# -- without Python --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/cpp, built."""
    lacking = [name for name in ("cmake", "g++") if not shutil.which(name)]
    if lacking or not Path("/usr/include/openssl/evp.h").exists():
        pytest.skip(f"no {lacking[0] if lacking else 'libssl-dev'} to build examples/cpp")
    place = tmp_path_factory.mktemp("cpp")
    settings = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    for command in (["cmake", "-S", ROOT / "examples/cpp", "-B", place, *settings],
                    ["cmake", "--build", place]):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return place / "hwmpq_runner"


@needs_avx2
def test_the_cpp_runner_computes_the_same(runner: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    x.tofile(tmp_path / "x.bin")
    words = ["--input", tmp_path / "x.bin", "--output", tmp_path / "y.bin"]
    subprocess.run([runner, "run", KEPT, *words, "--require-signature", PUBLIC], check=True)
    assert np.array_equal(np.fromfile(tmp_path / "y.bin", "<f4"), artifact.load(KEPT)(x).ravel())
    done = subprocess.run([runner, "bench", KEPT, "--rounds", "3"], capture_output=True, check=True)
    found = json.loads(done.stdout)["latency_s"]
    assert 0 < found["min"] <= found["median"] <= found["p90"] < 0.1 and found["samples"] == 3
    (tmp_path / "x.bin").write_bytes(b"short")
    failed = subprocess.run([runner, "run", KEPT, *words], capture_output=True, text=True)
    assert failed.returncode == 2 and "768 are expected" in failed.stderr


@needs_avx2
@pytest.mark.parametrize("required", [None, PUBLIC], ids=["unsigned", "signed"])
def test_the_cpp_runner_refuses_the_same(runner: Path, required: Path | None) -> None:
    _, wrong = mutations.compare(KEPT, COUNT // 2, 1000, required, runner)
    assert wrong == []

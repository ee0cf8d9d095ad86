"""examples/cpp, built for this machine and for ARM: it refuses and computes what Python does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import bench_tool
import numpy as np
import pytest
import tvm_ffi.libinfo

from hwmpq import artifact, targets, tensors
from hwmpq.artifact import run, signature
from hwmpq.measure import emulated

ROOT = Path(__file__).resolve().parents[2]
KEPT, PUBLIC = ROOT / "tests/golden/artifact", ROOT / "tests/golden/artifact.pub"
ARM = ROOT / "tests/golden/artifact-arm"
HEADERS = Path("/usr/include/openssl"), Path("/usr/include/x86_64-linux-gnu/openssl")
COUNT = 80
mutations = bench_tool.load("mutations")
needs_avx2 = pytest.mark.skipif(
    not {"avx2", "fma", "f16c"} <= targets.host_features(), reason="the artifact is for x86-avx2"
)


def build(place: Path, compiler: str, *settings: str) -> Path:
    """The program, installed into a folder with TVM's runtime; skips where tools are missing."""
    lacking = [name for name in ("cmake", compiler) if not shutil.which(name)]
    if lacking or not HEADERS[0].is_dir():
        pytest.skip(f"no {lacking[0] if lacking else 'libssl-dev'} to build examples/cpp")
    quick = ["-DCMAKE_CXX_FLAGS_RELEASE=-O0", "-DCMAKE_UNITY_BUILD=ON"]
    for command in (
        [
            "cmake",
            "-S",
            ROOT / "examples/cpp",
            "-B",
            place / "build",
            *quick,
            *settings,
            f"-DCMAKE_CXX_COMPILER={compiler}",
        ],
        ["cmake", "--build", place / "build"],
        ["cmake", "--install", place / "build", "--prefix", place / "runner"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(place / "build")
    return place / "runner/hwmpq_runner"


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cpp"), "g++", f"-DPython_EXECUTABLE={sys.executable}")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str | Path]]:
    """Chip -> the command of the program there. OpenSSL's headers are the same for both machines:
    little-endian, 64 bits."""
    if not shutil.which("qemu-aarch64-static"):
        pytest.skip("no qemu-aarch64-static to run examples/cpp for ARM")
    guest = emulated.place()
    if not guest.is_dir():
        pytest.skip("no emulated machine: run hwmpq devices setup arm-emulated")
    place = tmp_path_factory.mktemp("cpp-arm")
    (place / "openssl").mkdir()
    for header in (file for folder in HEADERS for file in folder.glob("*.h")):
        (place / "openssl" / header.name).symlink_to(header)
    program = build(
        place, "aarch64-linux-gnu-g++", "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DTVM_RUNTIME_DIR={guest}/wheels/tvm/lib",
        f"-DTVM_FFI_LIBRARY={guest}/wheels/tvm_ffi/lib/libtvm_ffi.so",
        f"-DTVM_FFI_INCLUDE_DIR={tvm_ffi.libinfo.find_include_path()}",
        f"-DOPENSSL_CRYPTO_LIBRARY={guest}/usr/lib/aarch64-linux-gnu/libcrypto.so.3",
        f"-DOPENSSL_INCLUDE_DIR={place}", f"-DARTIFACT={ARM}",
    )  # fmt: skip
    words = ["qemu-aarch64-static", "-L", guest]
    return {chip: [*words, "-cpu", f"cortex-{chip}", program] for chip in ("a72", "a76")}


@needs_avx2
def test_it_computes_the_same(runner: Path, tmp_path: Path) -> None:
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


def test_it_says_that_it_takes_none_for_a_gpu(runner: Path, tmp_path: Path) -> None:
    manifest = json.loads((KEPT / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"library": "model.cubin"}))
    refused = subprocess.run([runner, "check", tmp_path], capture_output=True, text=True)
    assert refused.returncode == 2 and "an artifact for a GPU" in refused.stdout


@needs_avx2
@pytest.mark.parametrize("required", [None, PUBLIC], ids=["unsigned", "signed"])
def test_it_refuses_the_same(runner: Path, required: Path | None) -> None:
    _, wrong = mutations.compare(KEPT, COUNT, 1000, required, [runner])
    assert wrong == []


@pytest.mark.parametrize("size", [1, 4])
def test_on_arm_it_computes_what_was_simulated(
    emulator: dict[str, list[str | Path]], tmp_path: Path, size: int
) -> None:
    """At both batch sizes of the artifact; a chip that lacks an instruction is told."""
    arrays, _ = tensors.load(ARM / "golden.safetensors")
    x, y = tmp_path / "x", tmp_path / "y"
    np.concatenate([arrays[f"{k}.input.x"] for k in range(size)]).tofile(x)
    subprocess.run([*emulator["a76"], "run", ARM, "--input", x, "--output", y], check=True)
    want = np.concatenate([arrays[f"{k}.output.fc"] for k in range(size)])
    assert np.array_equal(np.fromfile(y, "<f4"), want.ravel())
    if size == 1:  # the artifact that is a part of the program is of one batch size
        *words, program = emulator["a76"]
        whole = Path(program).with_name("hwmpq_model")
        subprocess.run([*words, whole, "run", "--input", x, "--output", tmp_path / "z"], check=True)
        assert (tmp_path / "z").read_bytes() == y.read_bytes()
    older = subprocess.run([*emulator["a72"], "check", ARM], capture_output=True, text=True)
    assert older.returncode == 2 and "artifact for arm-cortex-a76: no asimddp" in older.stdout


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_on_arm_it_refuses_the_same(
    emulator: dict[str, list[str | Path]], tmp_path: Path, signed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As Python does there: its checks are made here, and what was not refused is not run."""
    made, required = Path(shutil.copytree(ARM, tmp_path / "net")), None
    if signed:
        signature.keygen(tmp_path / "key")
        artifact.sign(made, tmp_path / "key")
        required = tmp_path / "key.pub"
    flags = frozenset(json.loads((ARM / "manifest.json").read_text())["target"]["cpu_flags"])
    monkeypatch.setattr(targets, "cpu_flags", lambda: flags)
    monkeypatch.setattr(run, "_programs", lambda *_: {})
    monkeypatch.setattr(mutations, "outputs", lambda _: [])
    counts, wrong = mutations.compare(made, COUNT, 2000, required, emulator["a76"])
    assert wrong == [] and counts["refused"] > COUNT / 2

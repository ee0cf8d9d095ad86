"""Whole networks for GPUs without one: compiled, run emulated, and by the driver's face of a test
double. The double's seconds are none: they are looked at here and kept nowhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwmpq import artifact, targets
from hwmpq.artifact.cuda import driver
from hwmpq.artifact.folder import write_json
from hwmpq.cli.artifact_jobs import verify_artifact
from hwmpq.errors import DeviceError, InputError
from hwmpq.formats import format_named
from hwmpq.kernels import Call, best, build
from hwmpq.kernels.cuda import compiler, emulate, source
from hwmpq.kernels.cuda.emulate import Emulator
from hwmpq.measure import Cell, Protocol, cuda
from hwmpq.measure.bundle import Packed, pack
from hwmpq.measure.kernel import WrongNumbers, check_kernel
from hwmpq.measure.store import Store
from hwmpq.pipeline import Options, quantize_model
from hwmpq.side_jobs import compile_model
from hwmpq.stages.bundle import take_in
from hwmpq.types import Workload

HERE, TARGET = Path(__file__).parent, "cuda-sm90"
H100 = targets.load(TARGET)
ASSIGNMENT = {"0": "fp16", "3": "w8a8"}
pytestmark = pytest.mark.skipif(
    compiler.missing() or not emulate.possible(), reason="needs NVRTC (the extra `cuda`) and g++"
)


def net() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("cuda")
    drawn = np.random.default_rng(0).standard_normal((8, 1, 6, 6)).astype(np.float32)
    np.savez(folder / "data.npz", images=drawn, mean=[0.0], std=[1.0])
    store, out, images = (str(folder / name) for name in ("s.sqlite", "artifact", "data.npz"))
    return Options(
        "test_cuda_artifact:net", input_shape=(1, 1, 6, 6), target=TARGET, ptq=(), store=store,
        calib_data=f"npz:{images}", out=out,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(options: Options) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        told = compile_model(options, ASSIGNMENT)
    assert told["parity"] is None
    return Path(options.out)


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 that is none."""
    folder = tmp_path_factory.mktemp("double")
    command = ["g++", "-std=c++17", "-shared", "-fPIC", str(HERE / "driver_double.cpp"), "-ldl"]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


def kernels_for(code: str, path: Path) -> Path:
    """What the double runs for the machine code of a text."""
    counts = [
        f'extern "C" {{ int count_{kernel.name} = {len(kernel.arguments)}; }}\n'
        for kernel in source.kernels_of(code)
    ]
    emulate.compile_library(code + "".join(counts), "-O0", path)
    return path


@pytest.fixture
def gpu(double: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[driver.Gpu]:
    """The double, without kernels."""
    monkeypatch.setattr(driver, "_LIBRARY", str(double / "libcuda.so.1"))
    forget()
    yield driver.gpu()
    forget()


def forget() -> None:
    """What was found out about this process's GPU."""
    for found in (driver._driver, driver.gpu, cuda.hardware):
        found.cache_clear()


def test_a_network_is_compiled_inspected_and_runs_emulated(made: Path) -> None:
    manifest = artifact.read_manifest(made)
    code = manifest["machine_code"]
    assert manifest["library"] == "model.cubin" and (code["spilled"], code["stack"]) == (0, 0)
    assert set(code["tensor_products"]) == {"f32.f16.f16.f32", "s32.u8.s8.s32"}
    answer = verify_artifact(str(made), emulated=True)
    assert answer.exit_code == 0 and answer.json["parity"]["top1_agreement"] == 100.0


def test_the_driver_runs_what_the_emulator_runs(
    made: Path, gpu: driver.Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernels = kernels_for((made / "model.cu").read_text(), tmp_path / "kernels.so")
    monkeypatch.setenv("HWMPQ_DRIVER_DOUBLE", str(kernels))
    emulated, there = artifact.load(made, machine=Emulator()), artifact.load(made)
    x = np.random.default_rng(1).standard_normal((1, 1, 6, 6)).astype(np.float32)
    wanted = emulated.trace(x)
    assert [name for name, _ in wanted] == there.manifest["calls"]
    for (_, right), (_, found) in zip(wanted, there.trace(x), strict=True):
        assert right.dtype == found.dtype and np.array_equal(right, found)
    assert np.array_equal(there(x), emulated(x)) and there(x).any()
    assert artifact.replay(there) == artifact.replay(emulated)
    there.bench_callable(x)()
    assert there.gpu_seconds()(3) > 0  # of the double: nothing but that a clock was asked
    assert len(there.call_seconds()) == len(wanted)
    with pytest.raises(InputError, match="seconds of an emulated GPU"):
        emulated.gpu_seconds()(1)


def test_code_for_another_chip_is_refused(made: Path, gpu: driver.Gpu, tmp_path: Path) -> None:
    gpu.capability = (8, 9)
    with pytest.raises(InputError, match=r"a test double cannot run .*code for sm_90.*sm_89"):
        artifact.load(made)
    assert cuda.identity()["features"] == ["sm80", "sm89"]
    gpu.capability = (9, 0)
    assert set(cuda.identity()["features"]) == H100.features
    with pytest.raises(InputError, match="does not take the machine code"):
        gpu.load(b"\177ELF" + bytes(60), tmp_path)


def test_launches_that_do_not_fit_the_parameters_are_refused(made: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(made, tmp_path / "a")
    told = json.loads((copied / "model.json").read_text())
    for number in told["parameters"]:
        told["buffers"][number] *= 2
    write_json(copied / "model.json", told)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["model.json"] = artifact.folder.sha256(copied / "model.json")
    write_json(copied / "manifest.json", manifest)
    with pytest.raises(InputError, match=r"launches of artifact .* other sizes than its tensors"):
        artifact.load(copied, machine=Emulator())


@pytest.mark.skipif(driver.present(), reason="there is a GPU")
def test_an_artifact_without_a_gpu_tells_the_next_step(made: Path) -> None:
    with pytest.raises(DeviceError, match=r"no NVIDIA driver.*--bundle.*--emulated"):
        artifact.load(made)


@pytest.mark.skipif(driver.present(), reason="there is a GPU")
def test_a_run_without_a_gpu_tells_the_next_step(options: Options, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot run target cuda-sm90.*--bundle out.tar.gz"):
        quantize_model(replace(options, out=str(tmp_path / "out")))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One kernel packed and unpacked, and beside it what the double runs for it."""
    folder = tmp_path_factory.mktemp("bundle")
    work, fmt, target = Workload.make("linear", "bias", m=4, k=64, n=8), "w8a8", H100
    kernel = best(work, format_named(fmt), target.features)
    assert kernel is not None
    call = Call(work, format_named(fmt), "u8", "u8")
    texts: list[str] = []
    original = compiler.compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compiled", lambda c, t: texts.append(c) or original(c, t))
        request = {
            "workload": work.to_json(), "format": fmt, "x": "u8", "out": "u8", "threads": 1,
            "kernel": kernel.name, "target": TARGET, "folder": str(folder / "cell"),
        }  # fmt: skip
        answer = build.compile_cell(request)
    fields = ("library", "launches", "args", "expected", "roles", "features", "atol", "rtol")
    cell = Cell.from_json({"key": "one", **{name: answer[name] for name in fields}})
    row = {
        "kind": "layer", "workload": work.to_json(), "format": fmt, "kernel": kernel.name,
        "cell": kernel.cell(call), "tvm": dict(target.tvm),
    }  # fmt: skip
    protocol = Protocol(rounds=2, epoch_s=0.01, pin=False)
    pack(folder / "out.tar.gz", [[Packed(cell, row)]], protocol, TARGET, {"codegen": "0"})
    assert (folder / "out.tar.gz").stat().st_size < 1 << 20
    with tarfile.open(folder / "out.tar.gz") as tar:
        tar.extractall(folder / "there", filter="data")
    kernels_for(texts[0], folder / "kernels.so")
    return folder


def run_there(bundle: Path, **settings: str) -> tuple[int, str]:
    """The bundle's program, where neither hwmpq nor TVM are."""
    import numpy

    site = bundle / "site"
    site.mkdir(exist_ok=True)
    for path in (Path(numpy.__path__[0]), Path(numpy.__path__[0]).parent / "numpy.libs"):
        if path.exists() and not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    python = str(Path(sys.executable).resolve())
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site), **settings}
    ran = subprocess.run(
        [python, str(bundle / "there" / "runner.py")], env=env, capture_output=True, text=True
    )
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.skipif(driver.present(), reason="there is a GPU")
def test_a_bundle_says_at_once_that_there_is_no_driver(bundle: Path) -> None:
    code, text = run_there(bundle)
    assert code == 7 and "no NVIDIA driver on this machine" in text
    assert not (bundle / "there" / "result.json").exists()


def test_a_bundles_times_come_back_under_the_gpus_name(
    bundle: Path, double: Path, tmp_path: Path
) -> None:
    found = {"LD_LIBRARY_PATH": str(double), "HWMPQ_DRIVER_DOUBLE": str(bundle / "kernels.so")}
    code, text = run_there(bundle, **found, HWMPQ_TIMING_LOCK=str(tmp_path / "lock"))
    assert code == 0, text
    told = json.loads((bundle / "there" / "result.json").read_text())
    assert told["fingerprint"].startswith("a-test-double-") and told["hardware"]["l2"] == 4096
    timing = told["timings"]["one"]
    assert timing["error"] == "" and timing["quality"]["gpu"]["name"] == "a test double"
    assert timing["quality"]["cold"] and timing["quality"]["weight_copies"] > 1
    with Store.open(str(tmp_path / "s.sqlite")) as store:  # thrown away: a double's are no times
        result = take_in(store, bundle / "there" / "result.json")
        (row,) = store.measurements()
    assert result.target == TARGET and row.samples_s == tuple(timing["samples_s"])


def test_a_kernel_is_checked_and_whole_graphs_are_timed(
    bundle: Path, gpu: driver.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HWMPQ_DRIVER_DOUBLE", str(bundle / "kernels.so"))
    there = bundle / "there"
    cell = Cell.from_json(json.loads((there / "bundle.json").read_text())["cells"][0]["cell"])
    files = ("library", "launches", "args", "expected")
    cell = replace(cell, **{name: str(there / getattr(cell, name)) for name in files})
    kernel = cuda.CudaKernel(cell)
    check_kernel(kernel, cell)
    # A graph takes a millisecond of the double's clock.
    assert kernel.run(1) == pytest.approx(1e-3 / kernel.calls)
    assert kernel.run(kernel.calls) == pytest.approx(1e-3) and kernel.calls >= 32
    with pytest.raises(WrongNumbers):
        check_kernel(kernel, replace(cell, expected=cell.args))

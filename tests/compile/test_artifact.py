"""The artifact: written whole or not at all, checked before use, run with numpy and TVM alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_artifact import TARGET, Made, Two, full

from hwmpq import artifact, lower, tensors
from hwmpq.artifact import native
from hwmpq.artifact.folder import write_json
from hwmpq.artifact.golden import checksum
from hwmpq.errors import InputError
from hwmpq.frontend.relax_module import relax_module
from hwmpq.frontend.torch_export import trace
from hwmpq.kernels.codes import memory_dtype
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.simulate import Simulator

torch.set_num_threads(1)
FILES = ("model.so", "parameters.safetensors", "golden.safetensors", "assignment.json")


@pytest.fixture(scope="module")
def made() -> Made:
    return Made({"conv1": "w8a8", "conv2": "w8a8", "fc": "w8a8"})


@pytest.fixture(scope="module")
def kept(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact on disk that no test changes."""
    folder = tmp_path_factory.mktemp("artifact") / "net"
    made.save(folder)
    return folder


@pytest.fixture
def copied(kept: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(kept, tmp_path / "net"))


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest in place."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.fixture
def no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a library is an error."""

    def refuse(*_: Any) -> None:
        raise AssertionError("native code was loaded")

    monkeypatch.setattr(native, "library", refuse)


def test_saved_loaded_called(made: Made, kept: Path) -> None:
    net = artifact.load(str(kept))
    for x in made.images.split(1):
        with torch.inference_mode():
            want = made.simulator(x)[0].numpy()
        found = net(x.numpy())
        assert isinstance(found, np.ndarray) and np.array_equal(found, want)
    named = net.named({"x": made.images[:1].numpy()})
    assert list(named) == list(made.graph.outputs)
    assert np.array_equal(net(made.images[:1].numpy()[:, :, ::-1, ::-1][:, :, ::-1, ::-1]),
                          named[made.graph.outputs[0]])  # fmt: skip
    steps: list[int] = []
    rows = net.run_samples(made.images.numpy(), steps.append)
    assert rows.shape == (6, 5) and steps == [1] * 6
    net.bench_callable()()
    inside = net.call_seconds()
    assert len(inside) == len(net.manifest["calls"]) and min(inside) > 0
    assert sorted(os.listdir(kept)) == sorted([*FILES, "manifest.json"])


def test_several_inputs_and_outputs(made: Made, kept: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {"x": torch.randn(1, 3, 8, 8), "y": torch.randn(1, 4)}
    graph = trace(Two().eval(), tuple(given.values()))
    plan = dict.fromkeys(("conv", "fc"), "w8a8")
    quantizers = calibrate(graph, [given], ["w8a8"])
    built = lower.build(relax_module(graph), plan, quantizers, TARGET)
    told = {
        kind: [{"name": n, "shape": list(graph.tensors[n]), "dtype": "float32"} for n in names]
        for kind, names in (("inputs", graph.inputs), ("outputs", graph.outputs))
    }
    told |= {"calls": list(built.calls), "parameters": list(built.parameters)}
    manifest = {**made.manifest(), **told, "assignment": plan}
    writers: dict[str, Callable[[Path], None]] = {
        "model.so": lambda p: built.executable.export_library(str(p)),
        "parameters.safetensors": lambda p: tensors.save(p, built.parameters),
    }
    artifact.save(tmp_path / "two", manifest, writers)
    other = artifact.load(kept)  # stays: a second library beside it must not be taken for it
    found = artifact.load(tmp_path / "two").named({k: v.numpy() for k, v in given.items()})
    want = Simulator(graph, plan, quantizers)(given)
    assert list(found) == list(graph.outputs) and len(found) == 2
    for got, exact in zip(found.values(), want, strict=True):
        assert np.array_equal(got, exact.numpy())
    assert artifact.replay(other).exact
    edited(tmp_path / "two", lambda m: m["inputs"].reverse())
    with pytest.raises(InputError, match=r"inputs, outputs, calls or parameters .* were changed"):
        artifact.load(tmp_path / "two")


SAVE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from made_artifact import Made
Made(dict.fromkeys(("conv1", "conv2", "fc"), "w8a8")).save(Path("again"))
"""


def test_the_same_bytes_from_another_process_and_place(kept: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONHASHSEED": "7", "TMPDIR": str(tmp_path)}
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", SAVE, here], env=env, cwd=tmp_path, check=True)
    again = tmp_path / "again"
    assert sorted(os.listdir(again)) == sorted(os.listdir(kept))
    for file in kept.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_results_do_not_share_memory(made: Made, kept: Path) -> None:
    net = artifact.load(kept)
    first = net(made.images[:1].numpy())
    assert isinstance(first, np.ndarray)
    copy = first.copy()
    net(made.images[1:2].numpy())
    assert np.array_equal(first, copy)


def test_the_manifest(made: Made, kept: Path) -> None:
    manifest = artifact.read_manifest(kept)
    assert (manifest["version"], manifest["kind"]) == (1, "hwmpq-artifact")
    assert manifest["assignment"] == made.assignment
    assert manifest["calls"][-1] == made.graph.outputs[0]
    assert set(manifest["files"]) == set(FILES)
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((kept / name).read_bytes()).hexdigest() == digest
    arrays, _ = tensors.load(kept / "parameters.safetensors")
    assert set(manifest["parameters"]) == set(arrays)
    assert {"conv1.weight", "conv2.bias", "fc.multiplier"} <= set(arrays)
    assert {"numpy", "apache-tvm"} <= set(manifest["versions"])
    assert {"name", "tvm", "features", "cpu_flags"} <= set(manifest["target"])


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ([], "number of inputs: got 0; allowed: 1"),
        ([np.zeros((1, 3, 8, 8), np.float64)], r"input 'x': got float64 \[1, 3, 8, 8\]; allowed:"),
        ([np.zeros((2, 3, 8, 8), np.float32)], r"got float32 \[2, 3, 8, 8\]; allowed: float32 \[1"),
    ],
)
def test_wrong_inputs(kept: Path, arrays: list[np.ndarray], text: str) -> None:
    net = artifact.load(kept)
    with pytest.raises(InputError, match=text):
        net(*arrays)
    with pytest.raises(InputError, match=r"names of the inputs: got y; allowed: x"):
        net.named({"y": np.zeros(1)})


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", ["first", "middle", "last", "cut", "longer"])
def test_a_changed_file(copied: Path, name: str, place: str, no_native_code: None) -> None:
    raw = bytearray((copied / name).read_bytes())
    if place == "cut":
        raw = raw[:-1]
    elif place == "longer":
        raw += b"\0"
    else:
        raw[{"first": 0, "middle": len(raw) // 2, "last": -1}[place]] ^= 1
    (copied / name).write_bytes(raw)
    with pytest.raises(InputError, match=f"file '{name}' of artifact .* was changed.*do not run"):
        artifact.load(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_and_a_link(copied: Path, name: str, no_native_code: None) -> None:
    (copied / name).rename(copied.parent / name)
    with pytest.raises(InputError, match=f"lacks {name}"):
        artifact.load(copied)
    (copied / name).symlink_to(copied.parent / name)
    with pytest.raises(InputError, match=f"lacks {name}: got Too many levels"):
        artifact.load(copied)


def damaged(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.update({key: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (damaged("version", 2), "unknown version: got 2; allowed: 1. Use the hwmpq that made it"),
        (damaged("kind", "other"), "is no artifact: got no kind 'hwmpq-artifact'"),
        (damaged("files", {}), "does not list model.so"),
        (damaged("files", None), "manifest of .* is damaged: no files"),
        (damaged("calls", 3), "is damaged: no calls"),
        (lambda m: m.pop("target"), "is damaged: no target"),
        (lambda m: m["files"].update({"../net/model.so": ""}), "got '../net/model.so'; allowed"),
        (lambda m: m["files"].update({"..": ""}), "got '..'; allowed: plain names"),
        (lambda m: m["files"].update({"a\\b": ""}), "allowed: plain names"),
        (lambda m: m["files"].update({"": ""}), "allowed: plain names"),
        (lambda m: m["files"].update({"more.bin": "0" * 64}), "lacks more.bin"),
        (lambda m: m["target"]["cpu_flags"].append("avx9000"),
         f"this CPU cannot run an artifact for {TARGET.name}: got no avx9000"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_refused(
    copied: Path, change: Callable[[dict[str, Any]], object], text: str, no_native_code: None
) -> None:
    edited(copied, change)
    with pytest.raises(InputError, match=text):
        artifact.load(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000, '"hwmpq-artifact"'])
def test_a_manifest_that_is_none(copied: Path, text: str, no_native_code: None) -> None:
    (copied / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is no artifact"):
        artifact.load(copied)
    (copied / "manifest.json").unlink()
    with pytest.raises(InputError, match="is no artifact"):
        artifact.load(copied)
    with pytest.raises(InputError, match="is no artifact"):
        artifact.load(copied / "not there")


# -- writing ---------------------------------------------------------------------------------------


def test_another_folder_is_not_replaced(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for place in (other, tmp_path / "file"):
        with pytest.raises(InputError, match=r"holds something else: got .*Choose another --out"):
            artifact.save(place, made.manifest(), {})
    (other / "manifest.json").write_text('{"kind": "other"}')
    with pytest.raises(InputError, match="holds something else"):
        artifact.save(other, made.manifest(), {})
    assert (other / "chapter.txt").read_text() == "years"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir() or p.name == "file") == [
        "file", "thesis",
    ]  # fmt: skip


def test_an_empty_folder_and_an_old_artifact_are_replaced(made: Made, tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "out"
    place.mkdir(parents=True)
    made.save(place)
    made.save(place, assignment_json=lambda p: write_json(p, {"new": "one"}))
    assert json.loads((place / "assignment.json").read_text()) == {"new": "one"}
    assert [p.name for p in place.parent.iterdir()] == ["out"]
    assert place.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "rename", "folder"])
def test_a_full_disk_leaves_the_old_artifact(
    made: Made, copied: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    others = sorted(p.name for p in copied.parent.iterdir())
    changes: dict[str, Callable[[Path], None]] = {}
    if name == "manifest.json":
        monkeypatch.setattr(os, "fsync", full)
    elif name == "rename":
        monkeypatch.setattr(os, "replace", lambda *_: full(copied))
    elif name == "folder":
        monkeypatch.setattr("tempfile.mkdtemp", lambda **_: full(copied))
    else:
        changes[name.replace(".", "_")] = full
    with pytest.raises(InputError, match=r"cannot write the artifact .*: got No space left.*Free"):
        made.save(copied, **changes)
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before
    assert sorted(p.name for p in copied.parent.iterdir()) == others


def test_a_writer_that_fails_leaves_nothing(made: Made, tmp_path: Path) -> None:
    def broken(_path: Path) -> None:
        raise ValueError("no compiler")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no compiler"):
        made.save(tmp_path / "out", model_so=broken)
    assert sorted(tmp_path.iterdir()) == before


# -- golden samples, traces, threads ---------------------------------------------------------------


def test_golden_samples_are_replayed_exactly(kept: Path) -> None:
    found = artifact.replay(artifact.load(kept))
    assert found == artifact.Replay(2, 0.0, 100.0, True, "")


def test_a_replay_names_the_first_tensor_that_differs(made: Made, copied: Path) -> None:
    arrays, metadata = tensors.load(copied / "golden.safetensors")
    metadata["0.conv2"] = "0" * 16
    outputs = {k: v + (k.startswith("1.output")) * np.float32(0.5) for k, v in arrays.items()}
    tensors.save(copied / "golden.safetensors", outputs, metadata)
    digest = hashlib.sha256((copied / "golden.safetensors").read_bytes()).hexdigest()
    edited(copied, lambda m: m["files"].update({"golden.safetensors": digest}))
    found = artifact.replay(artifact.load(copied))
    assert not found.exact and found.first_difference == "conv2"
    assert found.max_abs == pytest.approx(0.5, abs=1e-6) and found.top1_agreement == 100


def test_without_golden_samples(copied: Path) -> None:
    tensors.save(copied / "golden.safetensors", {})
    digest = hashlib.sha256((copied / "golden.safetensors").read_bytes()).hexdigest()
    edited(copied, lambda m: m["files"].update({"golden.safetensors": digest}))
    with pytest.raises(InputError, match="has no golden samples"):
        artifact.replay(artifact.load(copied))


@pytest.mark.parametrize("fmt", ["fp32", "w8a8", "bf16"])
def test_traces_have_names_and_what_is_stored(fmt: str, tmp_path: Path) -> None:
    made = Made(dict.fromkeys(("conv1", "conv2", "fc"), fmt))
    made.save(tmp_path / "net")
    net = artifact.load(tmp_path / "net")
    x = made.images[:1].numpy()
    before = net(x)
    traced = dict(net.trace(x))
    assert tuple(traced) == made.built.calls
    stored = made.simulator.resolved.plan.stored
    for name in made.assignment:
        assert traced[name].dtype == memory_dtype(stored[name])
        assert traced[name].size == np.prod(made.graph.tensors[name])
    assert np.array_equal(traced["fc"].reshape(1, 5), before) and np.array_equal(net(x), before)
    _, metadata = tensors.load(tmp_path / "net" / "golden.safetensors")
    if fmt == "w8a8":
        assert all(checksum(traced[n]) == metadata[f"0.{n}"] for n in made.assignment)


def test_threads_wait_for_each_other(made: Made, kept: Path) -> None:
    net = artifact.load(kept)
    inputs = [x.numpy() for x in made.images.split(1)]
    want = [net(x) for x in inputs]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for k in np.random.default_rng(seed).integers(0, len(inputs), 40):
            if not np.array_equal(net(inputs[k]), want[k]):
                wrong.append(int(k))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    net._lock.acquire()
    late = threading.Thread(target=net, args=(inputs[0],))
    late.start()
    time.sleep(0.05)
    assert late.is_alive()
    net._lock.release()
    late.join(10)
    assert not late.is_alive()


RUNTIME_ONLY = """
import sys

BLOCKED = {"torch", "pydantic", "scipy", "safetensors", "sqlalchemy", "ortools", "xgboost", "typer"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import numpy as np
import hwmpq

net = hwmpq.load(sys.argv[1])
x = np.load(sys.argv[2])
np.save(sys.argv[3], net(x))
from hwmpq.artifact import replay
print(replay(net).exact, BLOCKED & set(sys.modules))
"""


def test_the_runtime_library_and_numpy_are_enough(made: Made, kept: Path, tmp_path: Path) -> None:
    x = made.images[:1].numpy()
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "use.py").write_text(RUNTIME_ONLY)
    done = subprocess.run(
        [sys.executable, "-W", "error", tmp_path / "use.py", kept, tmp_path / "x.npy",
         tmp_path / "y.npy"],
        env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"}, cwd=tmp_path, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "True set()"
    assert np.array_equal(np.load(tmp_path / "y.npy"), artifact.load(kept)(x))

"""Artifacts for several batch sizes, and for models of several inputs, from the command that builds
them: each row is what the first size computes, and what the simulator says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_artifact import Two

from hwmpq import artifact, tensors
from hwmpq.artifact.manifest import interface
from hwmpq.cli.against import Against
from hwmpq.cli.artifact_bench import bench_artifact
from hwmpq.errors import InputError
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.side_jobs import compile_model
from hwmpq.stages.job import Options, Silent, open_job

PLAN = {"conv": "w8a8", "fc": "fp32"}


def options(folder: Path, model: str = "tiny_job:tiny", **more: Any) -> Options:
    words: dict[str, Any] = {
        "input_shape": (1, 1, 16, 16), "calib_data": "digits#train", "calib": 16,
        "store": f"sqlite:///{folder}/s.db", "out": str(folder / "made"),
    }  # fmt: skip
    return Options(model, **(words | more))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For batches of 2, 1 and 5."""
    folder = tmp_path_factory.mktemp("batches")
    found = compile_model(options(folder), PLAN, batch=(2, 1, 5))
    assert found["batch"] == [1, 2, 5] and found["parity"]["max_abs"] < 1e-5
    return folder / "made"


def test_every_row_is_that_of_one_sample(made: Path) -> None:
    net = artifact.load(made)
    x = np.random.default_rng(0).standard_normal((9, 1, 16, 16)).astype(np.float32)
    want = np.concatenate([np.asarray(net(row[None])) for row in x])
    for size in net.sizes:
        assert np.array_equal(net(x[:size]), want[:size])
    for count in (9, 4):
        assert np.array_equal(net.run_samples(x[:count]), want[:count])
    net.bench_callable(x[:5])()
    net.bench_callable(size=2)()
    with pytest.raises(InputError, match=r"allowed: float32 \[1, 1, 16, 16\] or \[2, 1, 16, 16\]"):
        net(x[:3])
    with pytest.raises(InputError, match=r"got float32 \[2, .*allowed: float32 \[1, 1, 16, 16\]$"):
        net.trace(x[:2])


def test_every_size_is_timed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the float model at that size."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    found = bench_artifact(str(made), rounds=2, against=Against("torch", "tiny_job:tiny")).json
    batches = [found, *found["batches"]]
    assert [batch["batch"] for batch in batches] == [1, 2, 5]
    assert len({batch["latency_s"]["median"] for batch in batches}) == 3
    assert all(batch["against"]["latency_s"]["median"] > 0 for batch in batches)


def test_sizes_share_what_is_packed_alike(made: Path) -> None:
    manifest = artifact.read_manifest(made)
    arrays, _ = tensors.load(made / "parameters.safetensors")
    first, (two, five) = set(manifest["parameters"]), manifest["batches"]
    assert [two["library"], five["library"]] == ["model.2.so", "model.5.so"]
    assert "conv.weight" in first & set(two["parameters"]) & set(five["parameters"])
    for batch in (two, five):
        for name in set(batch["parameters"]) - first:
            own, at, size = name.partition("@")
            assert at and int(size) == batch["size"]
            assert not np.array_equal(arrays[name], arrays[own])


def sizes(*given: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for batch, size in zip(manifest["batches"], given, strict=True):
            batch["size"] = size

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (sizes(1, 5), "is damaged: no batches"),
        (sizes(5, 5), "is damaged: no batches"),
        (sizes(2, 2**31), "is damaged: no batches"),
        (sizes(2, True), "is damaged: no batches"),
        (lambda m: m["outputs"][0].update(shape=[2, 10]), "is damaged: no batches"),
        (lambda m: m["batches"][0].update(library="model.9.so"), "does not list model"),
        (lambda m: m["batches"][1]["parameters"].append("w"), "lacks w$"),
    ],
)
def test_a_damaged_batch(
    made: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    path = Path(shutil.copytree(made, tmp_path / "net")) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest | {"interface": interface(manifest)}))
    with pytest.raises(InputError, match=text):
        artifact.load(path.parent)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"batches|were changed|does not list"):
        artifact.load(path.parent)


def test_several_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.zeros(1, 3, 8, 8), torch.zeros(1, 4)
    torch.export.save(torch.export.export(Two().eval(), example), tmp_path / "two.pt2")
    given = {"x": np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)}
    given["y"] = given["x"][:, 0, 0, :4].copy()
    np.savez(tmp_path / "two.npz", allow_pickle=False, **given)
    words = options(
        tmp_path, str(tmp_path / "two.pt2"), input_shape=None, calib_data=f"npz:{tmp_path}/two.npz"
    )
    plan = dict.fromkeys(("conv", "fc"), "w8a8")
    found = compile_model(words, plan)
    assert found["parity"]["exact"] and found["parity"]["samples"] == 4
    job = open_job(words, Silent(), timed=False)
    job.store.close()
    numbers = Quantizers.load(tmp_path / "made/quantizers.safetensors")
    one = {name: array[5:] for name, array in given.items()}
    want = Simulator(job.graph, plan, numbers)({n: torch.from_numpy(a) for n, a in one.items()})
    got = artifact.load(tmp_path / "made").named(one)
    assert all(map(np.array_equal, got.values(), [w.numpy() for w in want])) and len(got) == 2
    for changes, text in (
        ({"calib_data": "digits"}, r"model with several inputs: got digits; .*arrays x, y"),
        ({"ptq": ("affine",)}, "--ptq for a model with several inputs: got affine"),
    ):
        with pytest.raises(InputError, match=text):
            compile_model(Options(**{**vars(words), **changes}), plan)
    with pytest.raises(InputError, match=r"--batch for .*two\.pt2: got 2; allowed: 1, as it was"):
        compile_model(words, plan, batch=(1, 2))

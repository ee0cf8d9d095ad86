"""Every bad input ends in an error that says what is wrong, leaves nothing half-written, and a
store that opens."""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_job import quantize_tiny, tiny
from torch import Tensor, nn

import hwmpq
from hwmpq import artifact, targets, toolchain
from hwmpq.artifact import folder as artifact_folder
from hwmpq.errors import (
    HwmpqError,
    InfeasibleError,
    InputError,
    StoreError,
    UnknownName,
    UnsupportedModel,
)
from hwmpq.measure import exchange
from hwmpq.measure.store import Store
from hwmpq.pipeline import Options, Result, quantize_model
from hwmpq.stages import place as place_stage
from hwmpq.stages import result as result_stage


class Place:
    """A folder with a store and an output; `refused` checks what a failed run leaves there."""

    def __init__(self, folder: Path):
        self.folder, self.store, self.out = folder, folder / "store.sqlite", folder / "out"

    def cli_words(self, **more: Any) -> Options:
        words = {"model": "zoo:digits_cnn", "data": "digits", "latency": "0.7x"}
        return Options(**(words | more | {"store": str(self.store), "out": str(self.out)}))

    def refused(self, kind: type[HwmpqError], text: str, code: int, run: Any) -> HwmpqError:
        with pytest.raises(kind, match=text) as caught:
            run()
        assert caught.value.exit_code == code
        told = json.loads(json.dumps(caught.value.to_json()))
        assert set(told) == {"code", "what", "got", "allowed", "next"}
        assert not self.out.exists()
        assert not [p.name for p in self.folder.iterdir() if p.name.startswith(".")]
        with Store.open(self.store) as store:
            store.rows()
        return caught.value


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "data.npz", **arrays)
    return f"npz:{folder / 'data.npz'}"


# words

WORDS = [
    ({"target": "x86-avx3"}, UnknownName, r"unknown target.*'x86-avx3'.*Nearest: x86-avx2"),
    ({"device": "locl"}, UnknownName, r"unknown device.*'locl'.*Nearest: local"),
    ({"formats": ("w8a9",)}, UnknownName, r"unknown format.*'w8a9'.*Nearest: .*w8a8"),
    ({"model": "zoo:digits_cn"}, UnknownName, r"zoo model.*'digits_cn'.*Nearest: digits_cnn"),
    ({"model": "resnet18"}, InputError, r"form of model: got 'resnet18'; allowed: zoo:NAME"),
    ({"model": "none.such:model"}, InputError, r"cannot find none\.such:model"),
    ({"model": "no.pt2"}, InputError, r"no such model file: got no\.pt2"),
    ({"model": "old.pth"}, InputError, r"cannot be read: got old\.pth.*torch\.export\.save"),
    ({"pins": ("sten=w8a8",)}, UnknownName, r"layer pattern of --pin.*'sten'.*Nearest: stem"),
    ({"pins": ("stem=w8a9",)}, UnknownName, r"unknown format.*'w8a9'.*Nearest: .*w8a8"),
    ({"ties": ("cnv*",)}, UnknownName, r"layer pattern of --tie.*'cnv\*'.*Nearest: conv"),
    ({"method": "fliqs-nas", "max_drop": 1.0}, InputError, "budget of a search by fliqs-nas"),
    ({"search": "ilpp"}, UnknownName, r"unknown solver.*'ilpp'.*Nearest: .*ilp"),
    ({"sensitivity": "output-eror"}, UnknownName, r"estimator.*Nearest: output-error"),
    ({"metric": "top2"}, UnknownName, r"unknown metric.*'top2'.*Nearest: top1"),
    ({"latency": "2.5"}, InputError, r"latency budget: got '2\.5'; allowed: 2\.5ms"),
    ({"latency": "0.5x:w9"}, InputError, r"budget relative to 'w9'; allowed: fp32.*w8a8"),
    ({"max_size": "4"}, InputError, r"size budget: got '4'; allowed: 4MB"),
    ({"max_drop": float("nan")}, InputError, "--max-drop: got nan; allowed: 0 to 100"),
    ({"threads": 0}, InputError, "--threads: got 0; allowed: 1 or more"),
    ({"calib": 0}, InputError, "--calib: got 0; allowed: 1 or more"),
    ({"eval": 0}, InputError, "--eval: got 0; allowed: 1 or more"),
    ({"max_time": 0.0}, InputError, "--max-time: got 0"),
    ({"data": None}, InputError, "no data; allowed: digits"),
    ({"data": "digit"}, InputError, "unknown form of data: got 'digit'; allowed: digits"),
    ({"data": "npz:no.npz"}, InputError, r"no such data file: got no\.npz"),
    ({"weights": "no.safetensors"}, InputError, r"no\.safetensors"),
    ({"input_shape": (1, 1, 0, 16)}, InputError, r"input shape: got \(1, 1, 0, 16\)"),
]


@pytest.mark.parametrize(("words", "kind", "text"), WORDS, ids=lambda x: str(x)[:40])
def test_words(place: Place, words: dict[str, Any], kind: type[HwmpqError], text: str) -> None:
    place.refused(kind, text, 2, lambda: quantize_model(place.cli_words(**words)))


def test_target_that_this_machine_cannot_satisfy(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "host_features", lambda: frozenset({"avx2", "fma", "f16c"}))
    text = r"cannot run target x86-avx512-vnni: got no avx512.*; allowed: x86-avx2"
    run = lambda: quantize_model(place.cli_words(target="x86-avx512-vnni"))  # noqa: E731
    place.refused(InputError, text, 2, run)


@pytest.mark.parametrize(
    ("ffi", "text"),
    [
        ("0.1.15.post2", r"Schedule\.tensorize crashes.*tvm-ffi 0\.1\.15\.post2.*pip install"),
        ("0.1.13.post3", r"tvm cannot be imported.*tvm-ffi 0\.1\.13\.post3.*pip install"),
        ("", r"tvm cannot be imported.*\(not installed\).*pip install"),
    ],
)
def test_broken_tvm_pair(
    place: Place, monkeypatch: pytest.MonkeyPatch, ffi: str, text: str
) -> None:
    versions = {"apache-tvm": "0.27.0", "apache-tvm-ffi": ffi}
    monkeypatch.setattr(toolchain, "_version", versions.get)
    place.refused(InputError, text, 2, lambda: quantize_model(place.cli_words()))


# models


class Other(nn.Module):
    """Answers `body(x)`."""

    def __init__(self, body: Any):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return result


def refused_model(place: Place, model: nn.Module, kind: type[HwmpqError], text: str) -> None:
    x = torch.zeros(1, 1, 16, 16)
    words: dict[str, Any] = {"store": place.store, "out": place.out}
    place.refused(kind, text, 2, lambda: hwmpq.quantize(model, x, "digits", **words))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(place: Place, value: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.conv.weight[3, 0, 1, 1] = value
    refused_model(place, model, InputError, r"NaN or Inf.*conv\.weight")


def test_model_without_a_layer(place: Place) -> None:
    refused_model(place, Other(torch.relu), InputError, "no layer that takes a number format")


def test_unsupported_operators_are_named_together(place: Place) -> None:
    model = Other(lambda x: torch.cumsum(torch.fft.rfft(x).abs(), 1))
    refused_model(place, model, UnsupportedModel, r"(?s)fft.*cumsum.*test_bad_input\.py")


def test_control_flow_that_depends_on_values(place: Place) -> None:
    model = Other(lambda x: x * 2 if x.sum() > 0 else x)
    refused_model(place, model, UnsupportedModel, "cannot trace.*control flow")


def test_dynamic_shapes(place: Place) -> None:
    example = (torch.zeros(2, 1, 16, 16),)
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    file = place.folder / "dynamic.pt2"
    torch.export.save(torch.export.export(tiny().eval(), example, dynamic_shapes=shapes), file)
    run = lambda: quantize_model(place.cli_words(model=str(file)))  # noqa: E731
    place.refused(InputError, "symbolic sizes.*without dynamic_shapes", 2, run)


# data


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"labels": np.array([0, 1, 10, 2, 3])}, r"labels out of range: got 0 \.\. 10.*0 \.\. 9"),
        ({"labels": np.array([0, -1, 1, 2, 3])}, r"labels out of range: got -1 \.\. 3"),
        ({"labels": np.zeros(4, int)}, "labels: got 4 for 5 images"),
        ({"labels": np.zeros(5)}, r"labels: got float64 \(5,\); allowed: int"),
        ({"images": np.zeros((5, 28, 28, 1), np.uint8)},
         r"image size \(C, H, W\): got \(1, 28, 28\); allowed: \(1, 16, 16\)"),
        ({"images": np.zeros((0, 16, 16, 1), np.uint8)}, "data set is empty"),
        ({"images": np.zeros((3, 16, 16, 1), np.uint8)}, "images in .*: got 3; allowed: 4 or more"),
        ({"images": np.full((5, 1, 16, 16), np.inf, np.float32)}, "NaN or Inf in images"),
        ({"std": np.zeros(1)}, "normalization: .*positive std"),
    ],
    ids=lambda x: str(x)[:30],
)  # fmt: skip
def test_data(place: Place, arrays: dict[str, Any], text: str) -> None:
    good = {"images": np.zeros((5, 16, 16, 1), np.uint8), "mean": np.zeros(1), "std": np.ones(1)}
    spec = npz(place.folder, **(good | arrays))
    place.refused(InputError, text, 2, lambda: quantize_model(place.cli_words(data=spec)))


# store, disk, artifact


@pytest.fixture(scope="module")
def done(shared_worker: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished run's store, and the run."""
    folder = tmp_path_factory.mktemp("done")
    store = folder / "store.sqlite"
    return store, quantize_tiny(store=store, out=folder / "out")


@pytest.fixture
def known(place: Place, done: tuple[Path, Result]) -> Place:
    """A place whose store knows the tiny network."""
    with closing(sqlite3.connect(done[0])) as source, closing(sqlite3.connect(place.store)) as copy:
        source.backup(copy)
    return place


def test_store_of_a_newer_version(place: Place) -> None:
    Store.open(place.store).close()
    with closing(sqlite3.connect(place.store)) as connection:
        connection.execute("update hwmpq_schema set version = 99")
        connection.commit()
    before = place.store.read_bytes()
    with pytest.raises(StoreError, match="newer hwmpq: got version 99; allowed: up to") as caught:
        quantize_model(place.cli_words())
    assert caught.value.exit_code == 7
    assert place.store.read_bytes() == before and not place.out.exists()


def test_budget_below_the_fastest_plan(known: Place) -> None:
    words: dict[str, Any] = {"store": known.store, "out": known.out, "latency": 1e-9}
    text = r"no plan meets the budgets: got 1e-06 ms; allowed: at least .* ms.*fastest plan is"
    known.refused(InfeasibleError, text, 3, lambda: quantize_tiny(**words))


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "step",
    [(artifact_folder, "write_json"), (artifact_folder, "replace_folder"),
     (result_stage, "replace_folder"), (place_stage.tempfile, "mkdtemp")],
    ids=lambda step: f"{step[0].__name__}.{step[1]}",
)  # fmt: skip
def test_disk_full_while_the_result_is_saved(
    known: Place, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str]
) -> None:
    monkeypatch.setattr(*step, full)
    words: dict[str, Any] = {"store": known.store, "out": known.out}
    text = "cannot write .*No space left on device.*Free some space"
    known.refused(InputError, text, 2, lambda: quantize_tiny(**words))
    monkeypatch.undo()


def test_disk_full_while_a_time_is_saved(
    place: Place, shared_worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "content", full)
    words: dict[str, Any] = {"store": place.store, "out": place.out}
    text = "store .*No space left on device.*Make room.*what was saved is kept"
    place.refused(StoreError, text, 7, lambda: quantize_tiny(**words))


@pytest.mark.parametrize("name", ["model.so", "parameters.safetensors", "golden.safetensors"])
def test_artifact_with_one_byte_changed(
    done: tuple[Path, Result], tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(done[1].json["artifact"], copy)
    whole = bytearray((copy / name).read_bytes())
    whole[len(whole) // 2] ^= 1
    (copy / name).write_bytes(whole)
    with pytest.raises(InputError, match=rf"file '{name}' of artifact .* was changed.*do not run"):
        artifact.load(copy)

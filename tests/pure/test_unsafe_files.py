"""Files that would run code when opened are refused, and the code has not run."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwmpq import data, zoo
from hwmpq.errors import InputError, UnsafeFile
from hwmpq.frontend.model import load_model
from hwmpq.zoo.archive import check_pickle, read_archive, repack
from hwmpq.zoo.weights import load_state_dict


class Payload:
    """Writes a marker file when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture(scope="module")
def saved() -> bytes:
    """A small saved program."""
    buffer = io.BytesIO()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    torch.export.save(torch.export.export(model, (torch.randn(1, 3, 8, 8),)), buffer)
    return buffer.getvalue()


def tensor_archive(pickled: bytes) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer)
    members = read_archive(buffer.getvalue())
    return {k: pickled if k.endswith("data.pkl") else v for k, v in members.items()}


def changed(saved: bytes, folder: Path, **edits: Any) -> str:
    """The saved program with members replaced (bytes), edited (function of JSON) or added."""
    members = read_archive(saved)
    root = next(iter(members)).split("/")[0]
    for name, edit in edits["members"].items():
        full = f"{root}/{name}"
        if callable(edit):
            content = json.loads(members[full])
            edit(content)
            members[full] = json.dumps(content).encode()
        else:
            members[full] = edit
    path = folder / "net.pt2"
    path.write_bytes(repack(members))
    return str(path)


def test_the_payload_works(marker: Path) -> None:
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickled_code_in_a_state_dict(tmp_path: Path, marker: Path, protocol: int) -> None:
    evil = pickle.dumps({"w": Payload(marker)}, protocol=protocol)
    path = tmp_path / "w.pth"
    path.write_bytes(repack(tensor_archive(evil)))
    with pytest.raises(UnsafeFile, match="would run code when unpickled"):
        load_state_dict(path)
    with pytest.raises(UnsafeFile, match=r"safetensors"):
        zoo.build("digits_cnn", path)
    assert not marker.exists()


def test_bare_pickles_are_not_weights(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UnsafeFile, match="weights would have to be unpickled"):
        load_state_dict(path)
    torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFile, match="weights would have to be unpickled"):
        load_state_dict(path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(UnsafeFile, match=r"would run code when unpickled: got GLOBAL torch\.nn"):
        load_state_dict(path)
    assert not marker.exists()


def test_pickled_code_in_an_npz(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, images=np.array([Payload(marker)], dtype=object))
    with pytest.raises(UnsafeFile, match="data would have to be unpickled"):
        data.load(f"npz:{path}", ((0.5,), (0.5,)))
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UnsafeFile, match="data would have to be unpickled"):
        data.load(f"npz:{path}", ((0.5,), (0.5,)))
    assert not marker.exists()


def test_an_honest_program_is_taken(saved: bytes, tmp_path: Path) -> None:
    loaded = load_model(changed(saved, tmp_path, members={}))
    assert [node.name for node in loaded.graph().nodes] == ["0"]


def test_pickled_code_in_a_program(saved: bytes, tmp_path: Path, marker: Path) -> None:
    evil = pickle.dumps(Payload(marker), protocol=2)
    weights = "data/weights/model_weights_config.json"

    def unpickle(config: dict[str, Any]) -> None:
        config["config"]["0.weight"]["use_pickle"] = True

    def custom(config: dict[str, Any]) -> None:
        config["config"]["x"] = {"path_name": "custom_obj_0", "use_pickle": False}

    cases: list[dict[str, Any]] = [
        {"data/sample_inputs/model.pt": repack(tensor_archive(evil))},
        {"data/sample_inputs/model.pt": evil},
        {weights: unpickle, "data/weights/weight_0": repack(tensor_archive(evil))},
        {"data/weights/model.pt": repack(tensor_archive(evil))},
        {"data/constants/model_constants_config.json": custom, "data/constants/custom_obj_0": evil},
        {"data/aotinductor/model/evil.so": b"\x7fELF"},
    ]
    for members in cases:
        with pytest.raises(InputError) as caught:
            load_model(changed(saved, tmp_path, members=members))
        assert isinstance(caught.value, UnsafeFile) or "broken archive" in str(caught.value)
        assert not marker.exists()


def test_programs_that_would_run_code_without_pickle(
    saved: bytes, tmp_path: Path, marker: Path
) -> None:
    def operator(program: dict[str, Any]) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"

    def file(program: dict[str, Any]) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"

    def expression(program: dict[str, Any]) -> None:
        values = program["graph_module"]["graph"]["tensor_values"]["x"]
        values = values if isinstance(values, dict) else {}
        values["sizes"] = [{"as_expr": {"expr_str": f"__import__('os').mknod('{marker}')"}}]

    def tree(program: dict[str, Any]) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        signature["in_spec"] = '[1, {"type": "collections.defaultdict", "context": "{}"}]'

    def guards(program: dict[str, Any]) -> None:
        program["guards_code"] = [f"__import__('os').mknod('{marker}')"]

    def inputs(program: dict[str, Any]) -> None:
        values = program["graph_module"]["graph"]["tensor_values"]
        program["graph_module"]["graph"]["tensor_values"] = {"x": next(iter(values.values()))}

    for edit, text in (
        (operator, r"operator: got torch\.os\.system"),
        (file, r"operator: got torch\.ops\.aten\.from_file"),
        (lambda program: (inputs(program), expression(program)), "expression that would be"),
        (tree, r"container in a tree: got collections\.defaultdict"),
        (guards, "guard code"),
    ):
        with pytest.raises(UnsafeFile, match=text):
            load_model(changed(saved, tmp_path, members={"models/model.json": edit}))
    assert not marker.exists()


def test_symbolic_sizes_are_refused_before_torch_evaluates_them(tmp_path: Path) -> None:
    buffer, n = io.BytesIO(), torch.export.Dim("n", min=2, max=8)
    program = torch.export.export(
        nn.Conv2d(3, 4, 1), (torch.randn(2, 3, 4, 4),), dynamic_shapes=({0: n},)
    )
    torch.export.save(program, buffer)
    path = tmp_path / "net.pt2"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="symbolic sizes in the exported program"):
        load_model(str(path))


def test_members_that_reach_outside(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    for name in ("/etc/passwd", "a/../../b", "C:/b"):
        path.write_bytes(repack({**read_archive(saved), name: b""}))
        with pytest.raises(UnsafeFile, match="member outside the archive"):
            load_model(str(path))
    members = read_archive(saved)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for name, content in [*members.items(), next(iter(members.items()))]:
            archive.writestr(zipfile.ZipInfo(name), content)
    with pytest.raises(UnsafeFile, match="member named twice"):
        load_model(str(path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/models/model.json", "{}")
    with pytest.raises(UnsafeFile, match="compressed or encrypted"):
        load_model(str(path))


def test_files_that_are_no_programs(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    with pytest.raises(InputError, match="no such model file"):
        load_model(str(path))
    path.write_bytes(b"junk")
    with pytest.raises(InputError, match="broken archive"):
        load_model(str(path))
    path.write_bytes(repack({"a/b": b""}))
    with pytest.raises(InputError, match="no exported program"):
        load_model(str(path))


def test_pickle_opcodes() -> None:
    check_pickle(pickle.dumps({"a": [1, 2.5, None]}, protocol=2), "x")
    with pytest.raises(UnsafeFile, match="got GLOBAL __builtin__ eval"):
        check_pickle(pickle.dumps(eval, protocol=2), "x")
    with pytest.raises(UnsafeFile, match="STACK_GLOBAL"):
        check_pickle(pickle.dumps(eval, protocol=4), "x")
    with pytest.raises(UnsafeFile, match="pickle that cannot be read"):
        check_pickle(b"\xff\xff", "x")

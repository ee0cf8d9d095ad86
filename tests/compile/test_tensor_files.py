"""Safetensors files, written and read without safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hwmpq import tensors
from hwmpq.errors import InputError


def test_tensor_files_are_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    given: dict[str, np.ndarray] = {
        "f": rng.normal(size=(2, 3)).astype(np.float32), "empty": np.zeros((0, 4), np.uint8),
        "scalar": np.array(7, np.int32), "half": np.arange(5, dtype=np.uint16),
        "turned": np.arange(12, dtype=np.int8).reshape(3, 4).T, "bool": np.array([True, False]),
    }  # fmt: skip
    tensors.save(tmp_path / "mine", {**given, "big": given["f"].astype(">f4")}, {"a": "b"})
    theirs = load_file(tmp_path / "mine")
    assert np.array_equal(theirs["big"], given["f"])
    mine, metadata = tensors.load(tmp_path / "mine")
    assert metadata == {"a": "b"}
    for name, array in given.items():
        assert np.array_equal(theirs[name], array) and np.array_equal(mine[name], array)
        assert mine[name].dtype == theirs[name].dtype == array.dtype
    save_file({k: np.array(v, order="C") for k, v in given.items()}, tmp_path / "theirs")
    again, _ = tensors.load(tmp_path / "theirs")
    assert all(np.array_equal(again[k], v) for k, v in given.items())


@pytest.mark.parametrize(
    "header",
    [
        b"", b"[]", b"{", b"[" * 100_000, b'{"__metadata__": 3}', b'{"a": {}}', b'{"a": 5}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F8", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
    ],
    ids=lambda header: header[:60].decode(),
)  # fmt: skip
def test_damaged_tensor_files(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError, match="not a readable safetensors file"):
        tensors.load(path)
    path.write_bytes(b"\xff" * 8 + header)
    with pytest.raises(InputError, match="header of"):
        tensors.load(path)
    path.write_bytes(b"\1")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        tensors.load(path)

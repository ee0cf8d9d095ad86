"""Data sets: forms, normalization, splits, and every refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hwmpq import data
from hwmpq.errors import InputError

PLAIN: data.Normalization = ((0.5,), (0.5,))


def npz(folder: Path, **arrays: object) -> str:
    np.savez(folder / "d.npz", **arrays)  # type: ignore[arg-type]
    return f"npz:{folder / 'd.npz'}"


def bytes_images(n: int = 6, size: int = 4, channels: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def from_tests() -> data.DataSet:
    """Named by a spec below."""
    return data.DataSet(bytes_images(), np.arange(6), *PLAIN, name="")


def failing() -> data.DataSet:
    raise LookupError("no such folder of mine")


def test_digits_parts_are_disjoint_and_fixed() -> None:
    train, test = data.load("digits#train"), data.load("digits")
    assert (len(train), len(test)) == (1257, 540)
    assert test.digest == data.load("digits#test").digest != train.digest
    assert test.images.shape[1:] == (16, 16, 1) and test.images.max() == 255
    x = train.batch(range(len(train)))
    assert x.dtype == np.float32 and x.shape == (1257, 1, 16, 16)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    with pytest.raises(InputError, match="part of the digits: got val; allowed: train, test"):
        data.load("digits#val")


def test_bytes_are_scaled_and_normalized(tmp_path: Path) -> None:
    images = bytes_images(channels=3)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    found = data.load(npz(tmp_path, images=images, mean=mean, std=std), PLAIN)
    want = (images[[4, 1]].transpose(0, 3, 1, 2) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(
        std, (3, 1, 1)
    )
    np.testing.assert_allclose(found.batch([4, 1]), want, rtol=1e-5, atol=1e-6)
    assert found.shape == (3, 4, 4) and found.labels is None and found.mean == mean


def test_parts_of_one_file(tmp_path: Path) -> None:
    images = bytes_images()
    spec = npz(tmp_path, images=images[:4], test_images=images[4:], test_labels=[1, 0], labels=[0])
    found = data.load(f"{spec}#test", PLAIN)
    assert len(found) == 2 and found.labels is not None and list(found.labels) == [1, 0]


def test_float_images(tmp_path: Path) -> None:
    floats = np.random.default_rng(0).random((3, 1, 4, 4), dtype=np.float32)
    found = data.load(npz(tmp_path, images=floats), PLAIN, (1, 1, 4, 4))
    np.testing.assert_allclose(found.batch(range(3)), (floats - 0.5) / 0.5, rtol=1e-6)
    normal = floats * 4 - 2
    with pytest.raises(InputError, match=r"float images without mean and std: got .*; allowed: 0 "):
        data.load(npz(tmp_path, images=normal), PLAIN)
    spec = npz(tmp_path, images=normal, mean=[0.0], std=[1.0])
    np.testing.assert_array_equal(data.load(spec).batch([0]), normal[:1])


def test_imagefolder(tmp_path: Path) -> None:
    for label, name in enumerate(("ape", "bee")):
        (tmp_path / name).mkdir()
        for i, size in enumerate([(8, 8), (16, 10)]):
            image = Image.new("RGB", size, (100 * label, 10 * i, 255))
            image.save(tmp_path / name / f"{i}.png")
    rgb: data.Normalization = ((0.0,) * 3, (1.0,) * 3)
    found = data.load(f"imagefolder:{tmp_path}", rgb, (1, 3, 8, 8))
    assert found.labels is not None and list(found.labels) == [0, 0, 1, 1]
    assert found.images.shape == (4, 8, 8, 3) and list(found.images[3, 0, 0]) == [100, 10, 255]
    (tmp_path / "ape" / "2.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="broken image"):
        data.load(f"imagefolder:{tmp_path}", rgb, (1, 3, 8, 8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="image folder is empty"):
        data.load(f"imagefolder:{tmp_path / 'empty'}", rgb, (1, 3, 8, 8))
    with pytest.raises(InputError, match="no such image folder"):
        data.load("imagefolder:nowhere", rgb, (1, 3, 8, 8))
    with pytest.raises(InputError, match="needs the model's input shape and normalization"):
        data.load(f"imagefolder:{tmp_path}")


def test_callable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert len(data.load("test_data:from_tests")) == 6
    with pytest.raises(InputError, match=r"result of collections:OrderedDict: got OrderedDict"):
        data.load("collections:OrderedDict")
    with pytest.raises(InputError, match=r"cannot find no\.such:thing"):
        data.load("no.such:thing")
    with pytest.raises(InputError, match="test_data:failing raised an error: got LookupError: no"):
        data.load("test_data:failing")


def test_split_is_seeded_and_disjoint() -> None:
    whole = data.load("digits")
    calib, rest = data.split(whole, 100, seed=3)
    again, _ = data.split(whole, 100, seed=3)
    other, _ = data.split(whole, 100, seed=4)
    assert (len(calib), len(rest)) == (100, 440)
    assert calib.digest == again.digest != other.digest
    assert calib.labels is not None and rest.labels is not None and whole.labels is not None
    counts = np.bincount(calib.labels, minlength=10) + np.bincount(rest.labels, minlength=10)
    assert list(counts) == list(np.bincount(whole.labels, minlength=10))
    with pytest.raises(InputError, match="calibration images: got 540; allowed: 1 to 539"):
        data.split(whole, 540)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": bytes_images(0)}, "data set is empty"),
        ({"images": bytes_images()[0]}, r"images: got uint8 \(4, 4, 1\)"),
        ({"images": bytes_images().astype(np.int32)}, "images: got int32"),
        ({"images": np.full((1, 1, 4, 4), np.nan, np.float32)}, "NaN or Inf in images"),
        ({"images": bytes_images(size=5)}, r"image size .*: got \(1, 5, 5\); .* \(1, 4, 4\)"),
        ({"images": bytes_images(), "labels": [0] * 5}, "labels: got 5 for 6 images"),
        ({"images": bytes_images(), "labels": [0] * 5 + [3]}, r"out of range: got 0 \.\. 3"),
        ({"images": bytes_images(), "labels": [0] * 5 + [-1]}, "labels out of range: got -1"),
        ({"images": bytes_images(), "labels": [0.5] * 6}, "labels: got float64"),
        ({"images": bytes_images(), "mean": [0.0], "std": [0.0]}, "positive std"),
        ({"images": bytes_images(), "mean": [0.0, 1.0], "std": [1.0]}, "one per channel"),
        ({"pictures": bytes_images()}, "no array images in .*: got pictures"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        data.load(npz(tmp_path, **arrays), PLAIN, (1, 1, 4, 4), classes=3)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no normalization"):
        data.load(npz(tmp_path, images=bytes_images()))
    with pytest.raises(InputError, match="no such data file"):
        data.load("npz:nowhere.npz", PLAIN)
    with pytest.raises(InputError, match="unknown form of data: got 'cifar'; allowed: digits"):
        data.load("cifar")
    np.save(tmp_path / "a.npy", bytes_images())
    with pytest.raises(InputError, match="data file is no npz archive"):
        data.load(f"npz:{tmp_path / 'a.npy'}", PLAIN)
    whole = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="broken data file"):
        data.load(f"npz:{tmp_path / 'cut.npz'}", PLAIN)

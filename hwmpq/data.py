"""Data sets in the contract's forms: `load(spec)` -> DataSet; numpy, Pillow and scikit-learn.

  digits                   scikit-learn's digits, each pixel doubled to 16×16: the test part
                           (`digits#test`, 540 images) or the training part (`digits#train`, 1257)
  npz:FILE                 arrays images (uint8 [N, H, W, C] or float32 [N, C, H, W]), optional
                           labels (int [N]), mean, std; `npz:FILE#test` reads test_images, ...
  imagefolder:DIR          one folder per class, classes and files sorted by name
  package.module:callable  returns a DataSet

Normalization is (x − mean) / std with x = image / 255 for uint8 and x = image for float32; it is
the data's own, else the one given (the model's), else an error.
"""

from __future__ import annotations

import hashlib
import importlib
import traceback
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import HwmpqError, InputError, UnsafeFile

Channels = tuple[float, ...]
Normalization = tuple[Channels, Channels]

FORMS = ("digits", "npz:FILE", "npz:FILE#PART", "imagefolder:DIR", "package.module:callable")
#: mean and standard deviation of the digits' training part, of x/255
DIGITS: Normalization = ((0.305,), (0.376,))
_DIGITS_TEST = 540
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")


@dataclass(frozen=True, eq=False)
class DataSet:
    """Images with labels and normalization.

    images: uint8 [N, H, W, C] or float32 [N, C, H, W]; labels: int64 [N] or None;
    mean, std: [C]; digest: of images, labels and normalization.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64] | None
    mean: Channels
    std: Channels
    name: str
    digest: str = ""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of one image."""
        a, b, c = self.images.shape[1:]
        return (c, a, b) if self.images.dtype == np.uint8 else (a, b, c)

    def batch(self, indices: Sequence[int] | range | NDArray[Any]) -> NDArray[np.float32]:
        """Normalized images, float32 [len(indices), C, H, W]."""
        picked = self.images[np.asarray(indices, dtype=np.int64)]
        if picked.dtype == np.uint8:
            picked = picked.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255)
        mean = np.asarray(self.mean, np.float32).reshape(-1, 1, 1)
        std = np.asarray(self.std, np.float32).reshape(-1, 1, 1)
        return np.ascontiguousarray((picked - mean) / std, dtype=np.float32)

    def subset(self, indices: Sequence[int] | range | NDArray[Any], name: str = "") -> DataSet:
        """The images of `indices`, in that order."""
        where = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[where]
        part = replace(self, images=self.images[where], labels=labels, name=name or self.name)
        return replace(part, digest=_digest(part))


def load(
    spec: str,
    normalization: Normalization | None = None,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
) -> DataSet:
    """Read and check a data set.

    normalization: used where the data has none; input_shape: the model's (1, C, H, W), which the
    images must have (`imagefolder` resizes and crops to it); classes: labels must be below it.
    Raises: InputError saying what does not fit; UnsafeFile for arrays that would need unpickling.
    """
    if spec.split("#")[0] == "digits":
        found = _digits(spec)
    elif spec.startswith("npz:"):
        found = _npz(spec.removeprefix("npz:"), normalization)
    elif spec.startswith("imagefolder:"):
        folder = Path(spec.removeprefix("imagefolder:"))
        found = _imagefolder(folder, normalization, input_shape)
    elif ":" in spec:
        found = _call(spec)
    else:
        raise InputError("unknown form of data", repr(spec), FORMS)
    return checked(replace(found, name=spec), input_shape, classes)


def from_arrays(images: Any, labels: Any = None, name: str = "arrays") -> DataSet:
    """Arrays or torch tensors as a data set that is normalized already; `checked` completes it.

    images: float32 [N, C, H, W]; labels: int [N] or None. Raises InputError.
    """
    pixels = np.asarray(images)
    if pixels.dtype == np.float64:
        pixels = pixels.astype(np.float32)
    if pixels.ndim != 4 or pixels.dtype != np.float32:
        raise InputError(
            "images", f"{pixels.dtype} {pixels.shape}", "float32 [N, C, H, W], normalized",
            "For uint8 images give a hwmpq.data.DataSet, which has mean and std.",
        )  # fmt: skip
    found = None if labels is None else _labels(np.asarray(labels))
    return DataSet(pixels, found, (0.0,), (1.0,), name)


def checked(
    data: DataSet, input_shape: Sequence[int] | None = None, classes: int | None = None
) -> DataSet:
    """The data set with its digest. Raises InputError as `load` does."""
    _check(data, input_shape, classes)
    return replace(data, digest=_digest(data))


def split(dataset: DataSet, n_calib: int, seed: int = 0) -> tuple[DataSet, DataSet]:
    """Two disjoint parts, drawn with the seed: n_calib images, and the others.

    Raises InputError unless 0 < n_calib < len(dataset).
    """
    if not 0 < n_calib < len(dataset):
        raise InputError("calibration images", n_calib, f"1 to {len(dataset) - 1}")
    order = np.random.default_rng(seed).permutation(len(dataset))
    calib, rest = np.sort(order[:n_calib]), np.sort(order[n_calib:])
    return (
        dataset.subset(calib, f"{dataset.name} [calib {n_calib}, seed {seed}]"),
        dataset.subset(rest, f"{dataset.name} [rest of {n_calib}, seed {seed}]"),
    )


def _digits(spec: str) -> DataSet:
    from sklearn.datasets import load_digits

    part = spec.partition("#")[2] or "test"
    if part not in ("train", "test"):
        raise InputError("part of the digits", part, ["train", "test"])
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))
    where = order[:_DIGITS_TEST] if part == "test" else order[_DIGITS_TEST:]
    pixels = np.rint(bunch.images[where] * (255.0 / 16.0)).astype(np.uint8)
    images = pixels.repeat(2, axis=1).repeat(2, axis=2)[..., None]
    return DataSet(images, bunch.target[where].astype(np.int64), *DIGITS, name=spec)


def _npz(text: str, normalization: Normalization | None) -> DataSet:
    file, _, part = text.partition("#")
    path, prefix = Path(file), f"{part}_" if part else ""
    if not path.is_file():
        raise InputError("no such data file", path, FORMS)
    found = arrays(path)
    if f"{prefix}images" not in found:
        raise InputError(
            f"no array {prefix}images in {path}", ", ".join(found) or "no array",
            f"{prefix}images, and if known {prefix}labels, mean, std",
            "npz:FILE#PART reads PART_images and PART_labels.",
        )  # fmt: skip
    images, labels = found[f"{prefix}images"], found.get(f"{prefix}labels")
    if images.dtype == np.float64:
        images = images.astype(np.float32)
    mean, std = (found.get(f"{prefix}{key}", found.get(key)) for key in ("mean", "std"))
    if mean is not None and std is not None:
        normalization = (_channels(mean), _channels(std))
    else:
        _check_foreign(normalization, images, path)
        assert normalization is not None
    return DataSet(images, None if labels is None else _labels(labels), *normalization, name=text)


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an npz file, none of them unpickled."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError("data file is no npz archive", path, FORMS)
            return {name: np.asarray(archive[name]) for name in archive.files}
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise InputError("broken data file", f"{path} ({error})", "npz") from error
    except ValueError as error:
        if "pickle" not in str(error):
            raise InputError("broken data file", f"{path} ({error})", "npz") from error
        raise UnsafeFile(
            "data would have to be unpickled",
            path,
            "arrays of numbers",
            "Save arrays of numbers with numpy.savez.",
        ) from error


def _labels(labels: NDArray[Any]) -> NDArray[np.int64]:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError("labels", f"{labels.dtype} {labels.shape}", "int [N]")
    return labels.astype(np.int64)


def _channels(values: NDArray[Any]) -> Channels:
    return tuple(float(x) for x in np.asarray(values, np.float64).reshape(-1))


def _check_foreign(given: Normalization | None, images: NDArray[Any], path: Path) -> None:
    """Whether the model's normalization may be used for images that bring none."""
    hint = f"Store arrays mean and std in {path}; 0 and 1 if the images are normalized already."
    if given is None:
        got = f"neither {path} nor the model has one"
        raise InputError("no normalization", got, "mean and std per channel", hint)
    if images.dtype != np.float32 or not images.size or not np.isfinite(images).all():
        return
    low, high = images.min(), images.max()
    if low < 0 or high > 1:
        got = f"{low:.3g} .. {high:.3g}"
        raise InputError("float images without mean and std", got, "0 .. 1", hint)


def _imagefolder(
    folder: Path, normalization: Normalization | None, input_shape: Sequence[int] | None
) -> DataSet:
    if not folder.is_dir():
        raise InputError("no such image folder", folder, FORMS)
    if normalization is None or input_shape is None:
        raise InputError(
            "imagefolder needs the model's input shape and normalization", folder,
            next="Only models of the zoo have them: make an npz file with mean and std.",
        )  # fmt: skip
    classes = sorted(item for item in folder.iterdir() if item.is_dir())
    files = [
        (file, label)
        for label, item in enumerate(classes)
        for file in sorted(item.iterdir())
        if file.suffix.lower() in _IMAGE_SUFFIXES
    ]
    if not files:
        raise InputError("image folder is empty", folder, "one folder of images per class")
    channels, height, width = input_shape[-3:]
    images = np.stack([_image(file, channels, height, width) for file, _ in files])
    labels = np.array([label for _, label in files], dtype=np.int64)
    return DataSet(images, labels, *normalization, name=str(folder))


def _image(file: Path, channels: int, height: int, width: int) -> NDArray[np.uint8]:
    """One image, resized so that the crop is 7/8 of it unless it has the size: uint8 [H, W, C]."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError("broken image", f"{file} ({error})", _IMAGE_SUFFIXES) from error
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height) * 8 / 7
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def named_object(spec: str) -> object:
    """Import what `package.module:name` names. Raises InputError where there is none."""
    module, _, name = spec.partition(":")
    try:
        found: object = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"cannot find {spec}",
            error,
            "package.module:callable",
            "Its folder must be on Python's path (PYTHONPATH).",
        ) from error
    except Exception as error:  # the module is the user's: whatever it raises
        raise _raised(f"importing {module}", error) from error
    return found


def _raised(what: str, error: Exception) -> InputError:
    """What the user's own code raised; the next step is its traceback."""
    told = "".join(traceback.format_exception(error))
    return InputError(f"{what} raised an error", f"{type(error).__name__}: {error}", next=told)


def call_named(spec: str) -> object:
    """Import `package.module:callable` and call it. Raises InputError where there is none, or it
    raises an error."""
    function = named_object(spec)
    if not callable(function):
        raise InputError(spec, type(function).__name__, "a callable without arguments")
    try:
        result: object = function()
    except HwmpqError:
        raise
    except Exception as error:  # the function is the user's: whatever it raises
        raise _raised(f"calling {spec}", error) from error
    return result


def _call(spec: str) -> DataSet:
    found = call_named(spec)
    if not isinstance(found, DataSet):
        raise InputError(f"result of {spec}", type(found).__name__, "hwmpq.data.DataSet")
    return found


def _check(data: DataSet, input_shape: Sequence[int] | None, classes: int | None) -> None:
    images, labels = data.images, data.labels
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        allowed = "uint8 [N, H, W, C] or float32 [N, C, H, W]"
        raise InputError("images", f"{images.dtype} {images.shape}", allowed)
    if not len(images):
        raise InputError("data set is empty", data.name, "at least one image")
    if images.dtype == np.float32 and not np.isfinite(images).all():
        raise InputError("NaN or Inf in images", data.name, "finite numbers")
    if input_shape is not None and data.shape != tuple(input_shape[-3:]):
        raise InputError("image size (C, H, W)", data.shape, str(tuple(input_shape[-3:])))
    if {len(data.mean), len(data.std)} - {1, data.shape[0]}:
        got = f"{len(data.mean)} means, {len(data.std)} deviations"
        raise InputError("normalization", got, f"one per channel ({data.shape[0]})")
    if not all(np.isfinite(data.mean)) or not all(s > 0 and np.isfinite(s) for s in data.std):
        raise InputError("normalization", (data.mean, data.std), "finite means, positive std")
    if labels is None:
        return
    if len(labels) != len(images):
        raise InputError("labels", f"{len(labels)} for {len(images)} images", "one per image")
    if labels.min() < 0 or (classes is not None and labels.max() >= classes):
        upper = "" if classes is None else f" .. {classes - 1}"
        raise InputError("labels out of range", f"{labels.min()} .. {labels.max()}", f"0{upper}")


def _digest(data: DataSet) -> str:
    """First 16 hex digits of the SHA-256 of all that a result can depend on."""
    found = hashlib.sha256(repr((data.images.shape, str(data.images.dtype))).encode())
    found.update(np.ascontiguousarray(data.images).data)
    if data.labels is not None:
        found.update(np.ascontiguousarray(data.labels).data)
    found.update(repr((data.mean, data.std)).encode())
    return found.hexdigest()[:16]

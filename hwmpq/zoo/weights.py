"""Weights of a module: read safely, checked completely, or drawn at random with a seed."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from hwmpq.errors import InputError, UnsafeFile
from hwmpq.zoo.archive import check_tensor_archive, read_archive, repack


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a torch archive that holds tensors and nothing else.

    Raises: UnsafeFile for an archive that would have to be unpickled, before torch sees it;
    InputError for a missing or broken file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such weights file", path, "safetensors, tensors-only state dict")
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] == b"PK":
        return _load_archive(path)
    if head[:1] == b"\x80":
        raise UnsafeFile(
            "weights would have to be unpickled",
            path,
            "safetensors, tensors-only zip state dict",
            "Save them with safetensors.torch.save_file.",
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise InputError("broken weights file", f"{path} ({error})", "safetensors") from error


def _load_archive(path: Path) -> dict[str, Tensor]:
    members = read_archive(path)
    check_tensor_archive(members, str(path))
    try:
        found = torch.load(io.BytesIO(repack(members)), map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError("broken weights file", f"{path} ({error})", "a state dict") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise InputError("weights file holds no state dict", path, "name -> tensor")
    return {str(name): value for name, value in found.items()}


def load_into(module: nn.Module, path: Path, rename: Callable[[str], object] = str) -> None:
    """Load a file into a module. rename: the file's key -> the module's.

    Raises InputError that lists every missing, unexpected and misshapen key.
    """
    state = {str(rename(key)): value for key, value in load_state_dict(path).items()}
    own = module.state_dict()
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in optional]
    extra = [key for key in state if key not in own]
    lines = [f"missing {key}{_nearest(key, extra)}" for key in missing]
    lines += [f"unexpected {key}{_nearest(key, own)}" for key in extra]
    lines += [
        f"{key} has shape {tuple(value.shape)}, the model wants {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    if lines:
        raise InputError(
            f"weights do not fit the model ({len(lines)} differences)",
            "\n  " + "\n  ".join(lines),
            next=f"Check that {path} belongs to this model.",
        )
    module.load_state_dict(state, strict=False)


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f" (nearest: {near[0]})" if near else ""


def initialize(module: nn.Module, input_shape: tuple[int, ...], seed: int = 0) -> None:
    """Seeded random weights with activations of order one.

    Convolutions are drawn after He et al. (arXiv 1502.01852), linears with variance 1 / fan-in;
    BatchNorm statistics are those of two normal inputs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
            if isinstance(part, (nn.Conv2d, nn.Linear)) and part.bias is not None:
                nn.init.normal_(part.bias, std=0.02)
        for name, value in module.named_parameters():
            if name.endswith(("cls_token", "pos_embed")):
                nn.init.normal_(value, std=0.02)
        norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        if norms:
            _settle(module, norms, torch.randn(2, *input_shape[1:]))


def _settle(module: nn.Module, norms: list[nn.BatchNorm2d], x: Tensor) -> None:
    """Set the running statistics to those of one batch."""
    momenta = [part.momentum for part in norms]
    for part in norms:
        part.momentum = 1.0
    module.train()
    with torch.no_grad():
        module(x)
    module.eval()
    for part, momentum in zip(norms, momenta, strict=True):
        part.momentum = momentum

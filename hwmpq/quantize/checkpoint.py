"""A training run in a file: parameters, Adam's moments, and what the run tells of itself.

One safetensors file, written aside and renamed: a run that is killed finds its last whole state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwmpq import tensors
from hwmpq.errors import InputError


def write(
    path: Path,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Adam],
    key: str,
    told: Any,
) -> None:
    """key: digest of all that the run depends on; told: JSON. A parameter that no step has
    reached yet has no moments."""
    states = {p: s for optimizer in optimizers for p, s in optimizer.state.items()}
    held = {}
    for name, parameter in parameters.items():
        held[name] = parameter.detach().cpu().numpy()
        for part, value in states.get(parameter, {}).items():
            held[f"{name}|{part}"] = value.detach().cpu().numpy()
    tensors.save(path, held, {"key": key, "told": json.dumps(told)})


def read(
    path: Path, parameters: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Adam], key: str
) -> Any:
    """Load parameters and moments in place; returns what was told. Raises InputError for the file
    of another run."""
    held, metadata = tensors.load(path)
    if metadata.get("key") != key:
        raise InputError(
            f"checkpoint {path} of another run", metadata.get("key"), key,
            "Use another folder, or the settings it was made with.",
        )  # fmt: skip
    owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(held[name]))
            moments = {
                part: torch.tensor(held[f"{name}|{part}"])
                for part in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}|{part}" in held
            }
            if moments:
                step = moments.pop("step")
                moved = {part: value.to(parameter.device) for part, value in moments.items()}
                owners[parameter].state[parameter] = {"step": step, **moved}
    return json.loads(metadata["told"])

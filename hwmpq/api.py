"""`hwmpq.quantize`: the main job for a torch module and arrays of a Python program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmpq import data
from hwmpq.data import DataSet
from hwmpq.errors import InputError
from hwmpq.pipeline import Options, Progress, Result, quantize_model
from hwmpq.stages.job import Images, Job, classes, divide, input_shape

if TYPE_CHECKING:
    import torch


def quantize(
    model: torch.nn.Module,
    example_input: torch.Tensor | Sequence[torch.Tensor],
    calib: Any,
    *,
    eval: Any = None,
    target: str = "native",
    device: str = "local",
    allow_estimates: bool = False,
    latency: str | float | None = None,
    max_size: str | int | None = None,
    max_bops: str | None = None,
    max_drop: float | None = None,
    formats: Sequence[str] = (),
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
    method: str = "auto",
    search: str | None = None,
    sensitivity: str | None = None,
    metric: str = "",
    loss: str = "",
    calib_count: int = 256,
    eval_count: int | None = None,
    threads: int = 1,
    executor: str = "serial",
    seed: int = 0,
    store: str | Path | None = None,
    out: str | Path = "hwmpq-out",
    fresh: bool = False,
    max_time: float | None = None,
    progress: Progress | None = None,
) -> Result:
    """Quantize a torch module for a target within budgets; `hwmpq quantize` from Python.

    model: float32; left in the mode (training or not) it was in. example_input: float32
    [N, C, H, W] with the batch size to compile for, or a sequence of one tensor per argument.
    calib: images for scales, sensitivities and every choice: float32 [M, C, H, W], normalized, as
    array or tensor; or (images, labels) with labels int [M]; or a `hwmpq.data.DataSet`; or a name
    such as 'digits#train' or 'npz:FILE'. eval: the same, for the reported accuracy only; without it
    half of calib is set aside. Without labels the metric is agreement with float.

    latency: seconds or a budget such as '0.7x'; max_size: bytes or a budget such as '0.25x';
    max_bops: '2.5G' or '0.2x'; max_drop: accuracy points; calib_count, eval_count: at most so many
    images; max_time: seconds.
    The rest as the command's options of the same names. The result is written to `out`.
    Raises HwmpqError as `quantize_model` does.
    """
    from torch import nn

    from hwmpq.frontend.model import LoadedModel

    if not isinstance(model, nn.Module):
        raise InputError("model", type(model).__name__, "torch.nn.Module")
    modes = {module: module.training for module in model.modules()}
    name = type(model).__name__
    options = Options(
        model=name, target=target, device=device, allow_estimates=allow_estimates,
        latency=f"{latency:.12f}s" if isinstance(latency, (int, float)) else latency,
        max_size=f"{max_size}B" if isinstance(max_size, int) else max_size,
        max_bops=max_bops, max_drop=max_drop, formats=tuple(formats), pins=tuple(pins),
        ties=tuple(ties),
        method=method, search=search, sensitivity=sensitivity, metric=metric, loss=loss,
        calib=calib_count, eval=eval_count, threads=threads, executor=executor, seed=seed,
        store=None if store is None else str(store), out=str(out), fresh=fresh, max_time=max_time,
    )  # fmt: skip
    loaded = LoadedModel(model, _examples(example_input), name)
    try:
        return quantize_model(options, progress, lambda job: _given(job, calib, eval), loaded)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _examples(given: Any) -> tuple[torch.Tensor, ...]:
    import torch

    examples = (given,) if isinstance(given, torch.Tensor) else tuple(given)
    for item in examples:
        if not isinstance(item, torch.Tensor) or item.dtype != torch.float32:
            got = item.dtype if isinstance(item, torch.Tensor) else type(item).__name__
            raise InputError("example_input", got, "float32 tensors, one per argument of forward")
    return examples


def _given(job: Job, calib: Any, test: Any) -> Images:
    """The caller's images, checked against the model."""

    def read(given: Any, name: str) -> DataSet:
        if isinstance(given, str):
            return data.load(given, None, shape, labels_below)
        if not isinstance(given, DataSet):
            images, labels = given if isinstance(given, (tuple, list)) else (given, None)
            given = data.from_arrays(images, labels, name)
        return data.checked(given, shape, labels_below)

    shape, labels_below = input_shape(job.graph), classes(job)
    return divide(
        read(calib, "calib"), None if test is None else read(test, "eval"), job.options
    )  # fmt: skip

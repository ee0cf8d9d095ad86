"""PyTorch: the user's own float module, eager or through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from hwmpq.peers import check_precision, noise

if TYPE_CHECKING:
    from hwmpq.frontend.model import LoadedModel

PRECISIONS = ("fp32",)


def load(settings: Mapping[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    """settings: "model" (as for `load_model`), "weights" and "input_shape" or None, "precision",
    "threads", "compiled". The first call of a compiled module compiles it. Raises InputError."""
    import torch

    check_precision("torch", settings["precision"], PRECISIONS)
    torch.set_num_threads(settings["threads"])
    loaded = _loaded(settings)
    module: Callable[..., Any] = loaded.module
    if settings["compiled"]:
        import torch._inductor.config as inductor

        inductor.compile_threads = 1  # no helper processes that could run while others are timed
        module = torch.compile(module)
    inputs = [torch.from_numpy(array) for array in noise([x.shape for x in loaded.example])]

    def call() -> object:
        with torch.inference_mode():
            return module(*inputs)

    mode = "compile" if settings["compiled"] else "eager"
    return call, {"version": torch.__version__, "precision": "fp32", "mode": mode}


def outputs(settings: Mapping[str, Any]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Of a one-input model: the first output for a batch, computed eagerly. Raises InputError."""
    import torch

    module = _loaded(settings).module

    def first(batch: NDArray[Any]) -> NDArray[Any]:
        with torch.inference_mode():
            found = module(torch.from_numpy(batch))
        result: NDArray[Any] = (found if isinstance(found, torch.Tensor) else found[0]).numpy()
        return result

    return first


def _loaded(settings: Mapping[str, Any]) -> LoadedModel:
    from hwmpq.frontend.model import load_model

    weights = settings["weights"]
    return load_model(settings["model"], weights and Path(weights), settings["input_shape"])

"""PyTorch: the user's own float module, eager or through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hwmpq.peers import check_precision, noise

PRECISIONS = ("fp32",)


def load(settings: Mapping[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    """settings: "model" (as for `load_model`), "weights" and "input_shape" or None, "precision",
    "threads", "compiled". The first call of a compiled module compiles it. Raises InputError."""
    import torch

    from hwmpq.frontend.model import load_model

    check_precision("torch", settings["precision"], PRECISIONS)
    torch.set_num_threads(settings["threads"])
    weights = settings["weights"]
    loaded = load_model(settings["model"], weights and Path(weights), settings["input_shape"])
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

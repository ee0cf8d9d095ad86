"""Relax written by hand: two layers become integer kernels, an operator of our own stays itself.

python examples/tvm/hand_written.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax

from hwmpq import lower, targets
from hwmpq.frontend.relax_import import annotate
from hwmpq.graph import cut
from hwmpq.quantize.calibrate import calibrate

SHAPE = (1, 3, 16, 16)


def written() -> Any:
    """conv2d with bias and ReLU, a linear, and an operator that hwmpq does not know."""
    chance = np.random.default_rng(0)
    weight, bias, matrix = (
        relax.const(chance.normal(0, 0.3, size).astype(np.float32))
        for size in ((8, 3, 3, 3), (1, 8, 1, 1), (8, 5))
    )
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, weight, padding=[1, 1, 1, 1]))
            y = builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(y, bias))))
            y = builder.emit(relax.op.mean(y, [2, 3]))
            y = builder.emit(relax.op.matmul(y, matrix))
            out = builder.emit_output(relax.op.exp(y))
        builder.emit_func_output(out)
    return builder.get()


def quantized(module: Any, images: np.ndarray) -> tuple[Any, Any]:
    """The lowered module, to look at, and what runs it."""
    module = annotate()(module)
    graph = lower.graph_of(module)  # layers are called after their operators: conv2d, linear
    known = cut(graph, ["linear"])  # hwmpq can calibrate what it knows
    batches = [torch.from_numpy(image[None]) for image in images]
    quantizers = calibrate(known, batches, ["w8a8", "w4a8"])
    target = targets.native()
    assignment = {"conv2d": "w8a8", "linear": "w4a8"}
    passes = [lower.assign_formats(assignment), lower.lower_annotated(quantizers, target)]
    lowered = tvm.transform.Sequential(passes)(module)
    executable, _ = lower.compile_module(lowered, target)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return lowered, lambda x: machine["main"](tvm.runtime.tensor(x)).numpy()


if __name__ == "__main__":
    images = np.random.default_rng(1).normal(size=(8, *SHAPE[1:])).astype(np.float32)
    lowered, run = quantized(written(), images)
    lowered.show()
    print(run(images[:1]))

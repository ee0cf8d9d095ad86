"""An ONNX file, read by TVM's own front end, with hwmpq's passes in a pipeline beside TVM's.

    python examples/tvm/from_onnx.py model.onnx images.npy     (float32, N × the model's input)

Integer layers where images allow it; the rest of the model is whatever TVM makes of it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx
import torch
import tvm
from onnx import numpy_helper
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

from hwmpq import lower, targets
from hwmpq.frontend.relax_import import annotate
from hwmpq.quantize.calibrate import calibrate


def quantized(model: onnx.ModelProto, images: np.ndarray, fmt: str = "w8a8") -> Any:
    """numpy function: the model with every layer in one format, on this CPU."""
    module = from_onnx(model)
    weights = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    module = annotate(weights)(module)  # layers are called after their weights

    # The annotated module is a graph of named layers: what to quantize, and on which numbers.
    graph = lower.graph_of(module)
    batches = [torch.from_numpy(image[None]) for image in images]
    quantizers = calibrate(graph, batches, [fmt], steps=["bias"])
    assignment = {layer.name: fmt for layer in graph.layers}

    # Any of TVM's passes may stand before, between and behind ours; module.show() prints each step.
    target = targets.native()
    pipeline = tvm.transform.Sequential(
        [
            relax.transform.CanonicalizeBindings(),
            lower.assign_formats(assignment),
            lower.select_kernels(target),
            lower.lower_annotated(quantizers, target),
            relax.transform.DeadCodeElimination(),
        ]
    )
    executable, _ = lower.compile_module(pipeline(module), target)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return lambda x: machine["main"](tvm.runtime.tensor(x)).numpy()


if __name__ == "__main__":
    images = np.load(sys.argv[2], allow_pickle=False)
    print(quantized(onnx.load(sys.argv[1]), images[:64])(images[:1]))

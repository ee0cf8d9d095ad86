"""A float TFLite file, read by TVM's own front end, in one number format, by one call.

    pip install tflite
    python examples/tvm/from_tflite.py model.tflite images.npy     (float32, N × the model's input)

TFLite files are NHWC: `annotate` takes their convolutions and pools for what they are in NCHW, and
input and output stay as the file has them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tflite
import torch
import tvm
from tvm import relax
from tvm.relax.frontend.tflite import from_tflite

from hwmpq import lower, targets
from hwmpq.frontend.relax_import import annotate
from hwmpq.quantize.calibrate import calibrate


def constants(model: tflite.Model) -> dict[str, np.ndarray]:
    """The float tensors that lie in the file, by name: layers are called after their weights."""
    graph, found = model.Subgraphs(0), {}
    for tensor in map(graph.Tensors, range(graph.TensorsLength())):
        buffer = model.Buffers(tensor.Buffer())
        if tensor.Type() == tflite.TensorType.FLOAT32 and buffer.DataLength():
            values = buffer.DataAsNumpy().view(np.float32)
            found[tensor.Name().decode()] = values.reshape(tensor.ShapeAsNumpy())
    return found


def quantized(model: tflite.Model, images: np.ndarray, fmt: str = "w8a8") -> Any:
    """numpy function: the model with every layer in one format, on this CPU."""
    module = annotate(constants(model))(from_tflite(model))
    graph = lower.graph_of(module)
    batches = [torch.from_numpy(image[None]) for image in images]
    quantizers = calibrate(graph, batches, [fmt], steps=["bias"])
    assignment = {layer.name: fmt for layer in graph.layers}

    # All passes at once; packed weights become arguments, which may be kept in a file of their own.
    built = lower.build(module, assignment, quantizers, targets.native())
    machine = relax.VirtualMachine(built.executable, tvm.cpu())
    parameters = [tvm.runtime.tensor(array) for array in built.parameters.values()]
    return lambda x: machine["main"](tvm.runtime.tensor(x), *parameters).numpy()


if __name__ == "__main__":
    model = tflite.Model.GetRootAsModel(Path(sys.argv[1]).read_bytes(), 0)
    images = np.load(sys.argv[2], allow_pickle=False)
    print(quantized(model, images[:64])(images[:1]))

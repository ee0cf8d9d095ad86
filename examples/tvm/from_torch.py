"""A torch model, read by TVM's own front end, with a format for each layer.

    python examples/tvm/from_torch.py

The same module could have been made by `hwmpq.trace`, which also keeps the torch modules' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import tvm
from torch import nn
from tvm import relax
from tvm.ir.instrument import PassTimingInstrument
from tvm.relax.frontend.torch import from_exported_program

from hwmpq import lower, targets
from hwmpq.frontend.relax_import import annotate
from hwmpq.quantize.calibrate import calibrate


def quantized(model: nn.Module, images: torch.Tensor, assignment: Mapping[str, str]) -> Any:
    """numpy function: the model in the assignment's formats, on this CPU.

    images: [N, C, H, W], float32, to calibrate on.
    """
    program = torch.export.export(model.eval(), (images[:1],))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    module = annotate(weights)(from_exported_program(program))
    formats = sorted(set(assignment.values()))
    quantizers = calibrate(lower.graph_of(module), images.split(1), formats, steps=["bias"])
    target = targets.native()
    timing = PassTimingInstrument()
    with tvm.transform.PassContext(instruments=[timing]):
        module = lower.assign_formats(assignment)(module)
        module = lower.lower_annotated(quantizers, target)(module)
        print(timing.render())  # hwmpq's passes are passes like TVM's own
    executable, _ = lower.compile_module(module, target)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return lambda x: machine["main"](tvm.runtime.tensor(x))[0].numpy()


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    x = torch.randn(8, 3, 32, 32)
    run = quantized(net, x, {"0": "w8a8", "3": "w4a8", "7": "bf16"})
    with torch.no_grad():
        print("largest error:", np.abs(run(x[:1].numpy()) - net(x[:1]).numpy()).max())

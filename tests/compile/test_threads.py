"""An artifact for two threads takes two, by itself, in whatever thread it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hwmpq import side_jobs, targets
from hwmpq.formats import format_named
from hwmpq.kernels import Call, best, glue
from hwmpq.kernels import conformance as conf
from hwmpq.kernels.cases import Case
from hwmpq.kernels.glue import GlueCall, Operand
from hwmpq.pipeline import Options
from hwmpq.types import Workload

HOST = targets.native()
PROGRAM = """
import os, sys, threading
import numpy as np
import hwmpq
from tvm_ffi import get_global_func

allowed = os.sched_getaffinity(0)
one, two = (hwmpq.load(path) for path in sys.argv[1:])
x = np.random.default_rng(0).standard_normal((1, 1, 16, 16)).astype(np.float32)
same = []

def call():
    same.append(np.array_equal(one(x), two(x)) and np.array_equal(one(x), two(x)))
    print(get_global_func("runtime.NumThreads")())

call()
other = threading.Thread(target=call)
other.start()
other.join()
two.bench_callable(x)()
print(get_global_func("runtime.NumThreads")(), all(same), os.sched_getaffinity(0) == allowed)
"""


class Wide(nn.Module):
    """On 16×16 digits: the second convolution is worth two threads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(torch.relu(self.stem(x)))).mean((2, 3)))


def conv(op: str, side: int, cin: int, cout: int, kernel: int, groups: int = 1) -> Workload:
    at = kernel // 2
    return Workload.make(
        op, "bias+relu", n=1, h=side, w=side - 2, cin=cin, cout=cout, kh=kernel, kw=kernel, sh=1,
        sw=1, pt=at, pl=at, pb=at, pr=at, dh=1, dw=1, groups=groups,
    )  # fmt: skip


#: What threads share out: rows, channels, pixels, weights, and the images of a batched product.
SHARED = {
    "rows": conv("depthwise", 45, 24, 24, 3, 24),
    "channels": conv("depthwise", 9, 72, 72, 3, 72),
    "pixels": conv("conv2d", 19, 17, 33, 3),
    "weights": conv("conv2d", 5, 65, 70, 3),
    "images": Workload.make("matmul", "", b=2, m=31, k=17, n=33, trans_b=0),
}


@pytest.mark.parametrize("fmt", ["fp32", "w8a8"])
@pytest.mark.parametrize("what", SHARED)
def test_shares_cover_everything_once(what: str, fmt: str) -> None:
    found = format_named(fmt)
    x, b = found.activation.name, "" if SHARED[what].has_weight else found.weight.name
    call = Call(SHARED[what], found, x, x, b=b, threads=3)
    kernel = best(call.workload, found, HOST.features)
    assert kernel is not None
    for schedule in ("best", "turned"):
        assert conf.check(Case(kernel.name, call, schedule), HOST) is None


def wide() -> Wide:
    torch.manual_seed(0)
    return Wide()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_an_artifact_takes_its_threads(tmp_path: Path) -> None:
    for threads in (1, 2):
        options = Options(
            f"{__name__}:wide", input_shape=(1, 1, 16, 16), target="x86-avx2",
            calib_data="digits#train", calib=8, threads=threads,
            store=str(tmp_path / "store.sqlite"), out=str(tmp_path / str(threads)),
        )  # fmt: skip
        side_jobs.compile_model(options, dict.fromkeys(("stem", "conv", "fc"), "w8a8"))
    settings = {k: v for k, v in os.environ.items() if "THREADS" not in k}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "1"), str(tmp_path / "2")],
        env=settings, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["2", "2", "2", "True", "True"]


@pytest.mark.parametrize(("channels", "parallel"), [(8, False), (64, True)])
def test_a_short_layer_stays_in_one_thread(channels: int, parallel: bool) -> None:
    sizes = {"n": 1, "h": 16, "w": 16, "cin": channels, "cout": channels, "kh": 3, "kw": 3}
    rest = dict.fromkeys(("sh", "sw", "pt", "pl", "pb", "pr", "dh", "dw", "groups"), 1)
    workload = Workload.make("conv2d", "bias", **sizes, **rest)
    fmt = format_named("w8a8")
    kernel = best(workload, fmt, targets.load("x86-avx2").features)
    assert kernel is not None
    text = kernel.emit(Call(workload, fmt, "u8", "u8", threads=2)).script()
    assert ("T.parallel" in text) == parallel


@pytest.mark.parametrize(("op", "elements", "parallel"), [
    ("relu", 50_000, False), ("relu", 200_000, True), ("gelu", 10_000, False),
    ("gelu", 50_000, True),
])  # fmt: skip
def test_short_glue_stays_in_one_thread(op: str, elements: int, parallel: bool) -> None:
    x = Operand((elements,), "plain", "fp32")
    text = glue.emit(GlueCall(op, "{}", (x,), x, False, threads=2)).script()
    assert ("T.parallel" in text) == parallel

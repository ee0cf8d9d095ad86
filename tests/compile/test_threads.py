"""An artifact for two threads takes two, by itself, in whatever thread it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hwmpq import side_jobs
from hwmpq.pipeline import Options

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
    """On 16×16 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 64, 3, padding=1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


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
        side_jobs.compile_model(options, {"conv": "w8a8", "fc": "w8a8"})
    settings = {k: v for k, v in os.environ.items() if "THREADS" not in k}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "1"), str(tmp_path / "2")],
        env=settings, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["2", "2", "2", "True", "True"]

"""A loaded artifact in use: every call runs in the memory of the one before, and starts quickly."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hwmpq import artifact, side_jobs
from hwmpq.artifact.startup import start_up
from hwmpq.errors import InputError
from hwmpq.pipeline import Options


class Net(nn.Module):
    """On 16×16 digits; a padded copy, decoded weights and sums of passes are scratch memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 24, 3, padding=1), nn.Conv2d(24, 32, 3, padding=1)
        self.norm, self.fc = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(torch.relu(self.stem(x))))
        return torch.softmax(self.fc(self.norm(x.mean((2, 3)))), 1)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("steady")
    options = Options(
        f"{__name__}:net", input_shape=(1, 1, 16, 16), target="x86-avx2",
        calib_data="digits#train", calib=8, store=str(out / "store.sqlite"), out=str(out / "net"),
    )  # fmt: skip
    formats = {"stem": "w8a8", "conv": "w4a8", "fc": "fp32"}
    side_jobs.compile_model(options, formats)
    return out / "net"


class Allocated(ctypes.Structure):
    """glibc's struct mallinfo2: arena, hblks, hblkhd and uordblks among ten sizes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def allocated() -> dict[str, int]:
    """What C code holds: bytes taken from the system, mapped blocks, bytes in use."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        pytest.skip("this C library has no mallinfo2")
    function.restype = Allocated
    found: Any = function()
    return {name: getattr(found, name) for name in ("arena", "hblks", "hblkhd", "uordblks")}


def test_a_call_takes_no_memory(folder: Path) -> None:
    """None from the system, and it keeps none: not even the smallest block, of 32 bytes."""
    run, calls = artifact.load(folder).bench_callable(), 500
    for _ in range(20):
        run()
    before = allocated()
    for _ in range(calls):
        run()
    after = allocated()
    assert after.pop("uordblks") - before.pop("uordblks") < 32 * calls
    assert after == before


def test_tensors_lie_where_they_lay(folder: Path) -> None:
    loaded = artifact.load(folder)
    places: list[list[int]] = []

    def after(_function: object, name: str, before: bool, _result: object, *args: Any) -> int:
        if not before and name.startswith("hwmpq_"):
            places[-1].append(args[-1].numpy().ctypes.data)
        return 0

    program, inputs = loaded._prepared([torch.zeros(1, 1, 16, 16).numpy()])
    machine = program.machine()
    machine.set_instrument(after)
    machine.set_input("main", *program.tensors(inputs), *program.parameters)
    for _ in range(5):
        places.append([])
        machine.invoke_stateful("main")
    assert len(set(places[-1])) > 1 and places[2] == places[3] == places[4]


def test_start_up_is_told(folder: Path) -> None:
    found = start_up(folder)
    assert min(found.load, found.first_call, found.import_tvm) > 0, found
    with pytest.raises(InputError, match=r"did not start"):
        start_up(folder / "none")

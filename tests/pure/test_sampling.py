"""Which shapes are measured for a cost model, in what order, and that starting again goes on."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwmpq import targets
from hwmpq.errors import InputError
from hwmpq.predict import Settings
from hwmpq.predict.train import families_in, select
from hwmpq.stages import sampling
from hwmpq.stages.job import Job, Options, Silent
from hwmpq.stages.shapes import MAX_MACS, pool
from hwmpq.types import Measurement, Workload

AVX2 = targets.load("x86-avx2")
CONV = dict(
    n=1, h=14, w=14, cin=64, cout=96, kh=3, kw=3, sh=1, sw=1, pt=1, pl=1, pb=1, pr=1, dh=1, dw=1,
    groups=1,
)  # fmt: skip
ORIGINS = {
    Workload.make("conv2d", "bias+relu", **CONV): ("resnet",),
    Workload.make("depthwise", "bias", **{**CONV, "cin": 64, "cout": 64, "groups": 64}): ("mob",),
    Workload.make("linear", "bias", m=1, k=512, n=1000): ("resnet", "vit"),
    Workload.make("matmul", "scale", b=3, m=50, k=64, n=50, trans_b=1): ("vit",),
}


def test_a_pool_holds_origins_and_relatives_of_every_kind() -> None:
    found = pool(ORIGINS, AVX2.caches, 400, 3)
    assert len(found) == 400 and set(ORIGINS) <= set(found)
    assert found == pool(dict(reversed(ORIGINS.items())), AVX2.caches, 400, 3)
    assert found != pool(ORIGINS, AVX2.caches, 400, 4)
    for op in ("conv2d", "depthwise", "linear", "matmul"):
        assert sum(w.op == op for w in found) > 50
    assert all(0 < w.macs <= MAX_MACS for w in found)
    assert all(w.out_hw > (0, 0) for w in found if w.op in ("conv2d", "depthwise"))
    assert all(w["cin"] == w["groups"] for w in found if w.op == "depthwise")
    convs = [w for w in found if w.op == "conv2d"]
    assert {found[w] for w in convs} == {("resnet",)}  # held out together with their origin
    bytes_ = [float(np.prod(w.weight_shape)) for w in convs]
    assert min(bytes_) < AVX2.caches.l2 / 2 and max(bytes_) > 2 * AVX2.caches.l2
    assert any(w["cout"] % 16 in (1, 15) for w in convs)


class FakeBench:
    """Times by the number of multiplies; notes what it was asked for. limit: then it is killed."""

    def __init__(self, job: Job, limit: int = 10**9):
        self.job, self.limit, self.blocks = job, limit, []

    def layers(self, block: list[Any]) -> None:
        self.blocks.append(block)
        if len(self.blocks) > self.limit:
            raise KeyboardInterrupt
        for cell in block:
            base = 1e-6 + cell.call.workload.macs * 1e-11 * cell.call.format.weight.bits
            measured = Measurement(
                cell.key, cell.call.workload, cell.call.format.name, cell.kernel.name, 1,
                tuple(base * (1 + 0.01 * i) for i in range(9)),
            )  # fmt: skip
            self.job.store.put(measured, "x86-avx2", self.job.fingerprint, {})


def run(path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, limit: int = 10**9) -> Any:
    options = Options("", target="x86-avx2", store=str(path), formats=("fp32", "w8a8"))
    job = sampling.machine(options, Silent())
    bench = FakeBench(job, limit)

    @contextmanager
    def fake(_: Job) -> Any:
        yield bench

    monkeypatch.setattr(sampling, "_bench", fake)
    monkeypatch.setattr(sampling, "_QUICK", Settings(trees=8, depth=3, rate=0.3))
    with job.store as store:
        try:
            told = sampling.sample(job, ORIGINS, rows)
        except KeyboardInterrupt:
            return bench, None, None
        return bench, told, select(store.rows(), AVX2, "", families_in(store))


def test_a_sample_pairs_formats_repeats_some_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if targets.satisfied_by_host(AVX2):
        pytest.skip("the machine is not an x86-avx2")
    _, told, _ = run(tmp_path / "s.sqlite", monkeypatch, 40, limit=9)
    assert told is None  # killed after 9 blocks
    bench, told, chosen = run(tmp_path / "s.sqlite", monkeypatch, 40)
    assert told.rows == 40 and told.again == 6 and told.failed == 0 and told.new_timings == 22
    assert all(len({c.call.workload for c in block}) == 1 for block in bench.blocks)
    assert all(len(block) == 2 for block in bench.blocks)
    assert len(chosen.rows) == 34 and sum(bool(row.again_s) for row in chosen.rows) == 6
    assert all(row.networks for row in chosen.rows)
    sizes = [block[0].call.workload.macs for block in bench.blocks]
    assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)
    again, told, _ = run(tmp_path / "s.sqlite", monkeypatch, 40)
    assert not again.blocks and told.new_timings == 0 and told.again == 6
    with pytest.raises(InputError, match="--rows: got 5; allowed: 20 or more"):
        run(tmp_path / "s.sqlite", monkeypatch, 5)

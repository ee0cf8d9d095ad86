"""Tile and bf16 kernels: emulated against the reference, and compiled for CPUs that have them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from hwmpq import targets, tile_permission
from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.kernels import Call, Kernel, Schedule, candidates, kernel_named, why_not
from hwmpq.kernels import conformance as conf
from hwmpq.kernels.build import assembly, library
from hwmpq.kernels.cases import Case, subset
from hwmpq.kernels.micro import TileMicro
from hwmpq.kernels.micro.amx import MICROS
from hwmpq.kernels.micro.avx512_bf16 import DOT
from hwmpq.types import Workload

AMX = targets.load("x86-amx")
CONV = Workload.make(
    "conv2d", "bias+relu", n=1, h=8, w=9, cin=17, cout=33, kh=3, kw=3, sh=1, sw=1, pt=1, pl=1,
    pb=1, pr=1, dh=1, dw=1, groups=1,
)  # fmt: skip
WIDE = Workload.make(
    "conv2d", "bias+relu", n=1, h=14, w=14, cin=128, cout=64, kh=3, kw=3, sh=1, sw=1, pt=1, pl=1,
    pb=1, pr=1, dh=1, dw=1, groups=1,
)  # fmt: skip


def cases(fmt: str, micro: str) -> list[Case]:
    """Five of the subset, for one format and micro-kernel."""
    found = [c for c in subset(AMX.features, (fmt,)) if f".{micro}." in c.kernel]
    assert found
    return found[:: -(-len(found) // 5)]


@pytest.mark.parametrize(
    ("fmt", "micro"),
    [
        ("w8a8", "amx_int8"), ("w3a4", "amx_int8"), ("bf16", "amx_bf16"), ("w4.bf16", "amx_bf16"),
        ("e5m2.bf16", "amx_bf16"), ("bf16", "avx512_bf16"), ("e4m3.bf16", "avx512_bf16"),
    ],
)  # fmt: skip
def test_emulated_kernels(fmt: str, micro: str) -> None:
    if MICROS[0].requires | MICROS[1].requires <= targets.host_features():
        pytest.skip("this CPU has the instructions: test_kernels runs them")
    found = ((case, conf.check(case, AMX)) for case in cases(fmt, micro))
    wrong = "\n".join(f"{case}: {reason}" for case, reason in found if reason)
    assert not wrong, f"\n{wrong}"


@pytest.mark.parametrize("micro", MICROS, ids=lambda m: str(m.name))
def test_a_tile_too_few_is_seen(micro: TileMicro, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation obeys the configuration: with a row less, the last row is wrong."""
    configure = type(micro).configure

    def short(self: TileMicro, ir: Any, rows: int, steps: int) -> None:
        configure(self, ir, rows - 1, steps)

    fmt = format_named("w8a8" if micro.acc_dtype == "int32" else "bf16")
    work = Workload.make("linear", "bias", m=5, k=65, n=17)
    call = Call(work, fmt, fmt.activation.name, "fp32")
    name = f"tiles.{micro.name}.{fmt.weight.name}"
    assert conf.how(kernel_named(name, work, fmt, AMX.features)) == conf.EMULATED
    assert conf.check(Case(name, call), AMX) is None
    monkeypatch.setattr(type(micro), "configure", short)
    wrong = conf.check(Case(name, call), AMX)
    assert wrong is not None and "elements differ" in wrong


def compiled(kernel: Kernel, call: Call) -> list[str]:
    """Mnemonics in order, for the target itself."""
    text = assembly(library({"main": kernel.emit(call)}, AMX))
    return re.findall(r"^\s+(v?[a-z]\w+)\s", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("fmt", "micro", "product"),
    [
        ("w8a8", "amx_int8", "tdpbusd"),
        ("w4a8", "amx_int8", "tdpbusd"),
        ("bf16", "amx_bf16", "tdpbf16ps"),
        ("w4.bf16", "amx_bf16", "tdpbf16ps"),
    ],
)
def test_tiles_are_not_spilled(fmt: str, micro: str, product: str) -> None:
    """Four sums are stored once, and a product needs no more than one load."""
    f = format_named(fmt)
    (kernel,) = (k for k in candidates(WIDE, f, AMX.features) if k.micro.name == micro)
    call = Call(WIDE, f, f.activation.name, f.activation.name)
    assert kernel.schedule(call) == Schedule(32, 2)
    found = compiled(kernel, call)
    assert found.count(product) == found.count("tileloadd") > 0
    assert found.count("tilestored") == found.count("tilezero") == 4
    assert found.count("ldtilecfg") == found.count("tilerelease") == 1


@pytest.mark.parametrize("fmt", ["bf16", "w4.bf16", "e4m3.bf16"])
def test_vdpbf16ps_is_emitted_inline(fmt: str) -> None:
    f = format_named(fmt)
    (kernel,) = (k for k in candidates(CONV, f, AMX.features) if k.micro.name == "avx512_bf16")
    call = Call(CONV, f, "bf16", "bf16")
    text = assembly(library({"main": kernel.emit(call)}, AMX))
    assert text.count("vdpbf16ps") > 0 and DOT not in text


def test_packed_weights_are_decoded_block_by_block() -> None:
    """A panel holds the weights of one block of channels, not of the layer."""
    f = format_named("w4a8")
    kernel = kernel_named("tiles.amx_int8.s4", WIDE, f, AMX.features)
    call = Call(WIDE, f, "u8", "u8")
    text = str(kernel.emit(call).script())
    (panel,) = (int(n) for n in re.findall(r'alloc_buffer\(\((\d+),\), "int8"', text))
    assert panel == 9 * 128 * 32 < np.prod(WIDE.weight_shape)


def test_fastest_and_native() -> None:
    for fmt, name in (("w8a8", "tiles.amx_int8.s8"), ("bf16", "tiles.amx_bf16.bf16")):
        f = format_named(fmt)
        best = candidates(CONV, f, AMX.features)[0]
        assert (best.name, best.execution(f)) == (name, "native")
        # four products of 16 cycles take 16 steps further
        assert best.micro.cycles(32, 2, f) * 16 * best.micro.kstep == 4 * 16


def test_steps_of_a_segment_are_cut_evenly() -> None:
    int8 = MICROS[0]
    for steps in range(1, 600):
        depth, padded = int8.tile_depth(steps), int8.depth(steps)
        assert depth <= 16 and padded % depth == 0 and steps <= padded < steps + 16
        assert padded // depth == -(-steps // 16)


def test_group_scales_belong_to_floats() -> None:
    work = Workload.make("linear", "bias", m=1, k=64, n=16)
    reason = why_not(work, format_named("w4a8.g32"), AMX.features)
    assert reason is not None and "amx_int8 multiplies codes, to which group scales" in reason
    found = candidates(work, format_named("w4.bf16.g32"), AMX.features)
    assert {k.micro.name for k in found} == {"avx2_fma", "avx512_fma"}


def test_refused_permission_says_what_to_do() -> None:
    tile_permission.ask(["avx2"])
    if "amx-tile" in targets.host_features():
        pytest.skip("this CPU has tiles")
    with pytest.raises(InputError, match="refuses this process the AMX tile registers"):
        tile_permission.ask(["amx-tile"])

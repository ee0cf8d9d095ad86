"""The simulator's own arithmetic of float operators, without a compiler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hwmpq.errors import InputError
from hwmpq.formats import encoding_named
from hwmpq.graph import Node
from hwmpq.quantize import exact_math
from hwmpq.quantize.interpret import apply
from hwmpq.requantize import Quantizer


def none(name: str) -> torch.Tensor:
    raise KeyError(name)


@pytest.mark.parametrize(
    ("op", "attrs"),
    [("gelu", {"approximate": "none"}), ("gelu", {"approximate": "tanh"}), ("silu", {}),
     ("sigmoid", {}), ("tanh", {}), ("softmax", {"axis": 1})],
)  # fmt: skip
def test_codes_of_float_operators_need_few_steps(op: str, attrs: dict[str, object]) -> None:
    """Codes found from torch's own function are those of the kernels' arithmetic, of which it is
    nowhere further away than a part of what is allowed for."""
    node = Node("y", op, ("x",), attrs)
    generator = torch.Generator().manual_seed(3)
    for spread in (0.5, 3.0, 12.0):
        x = spread * torch.randn(3000, 60, generator=generator)
        exactly = exact_math.apply(node, [x], none)
        near = apply(node, [x], none)
        allowed = exact_math.CLOSE / 4 * (exactly.abs() + (op != "softmax"))
        assert bool(((exactly - near).abs() <= allowed + 1e-37).all())
        for scale in (1 / 255, 0.05):
            q = Quantizer(scale, 11)
            want = encoding_named("u8").quantize(exactly, q.scale, q.zero).float()
            assert torch.equal(exact_math.encoded(node, [x], none, ("u8", q)), want)
    few = x[:1, :3]  # nothing next to the middle of two codes
    assert exact_math.encoded(node, [few], none, ("u8", Quantizer(0.05, 11))).shape == (1, 3)
    images = x.reshape(30, 100, 6, 10).contiguous(memory_format=torch.channels_last)
    if op != "softmax":
        turned = exact_math.encoded(node, [images], none, ("u8", q))
        assert torch.equal(turned.reshape(x.shape), want)
        assert torch.equal(exact_math.apply(node, [images], none).reshape(x.shape), exactly)
    with pytest.raises(InputError, match="NaN"):
        exact_math.encoded(node, [x * math.nan], none, ("u8", q))


def test_the_order_of_a_sum() -> None:
    x = torch.randn(75, 5, generator=torch.Generator().manual_seed(1))
    partial = [x[j] + x[16 + j] + x[32 + j] + x[48 + j] for j in range(16)]
    for j in range(11):
        partial[5 + j] = partial[5 + j] + x[64 + j]
    while len(partial) > 1:
        half = len(partial) // 2
        partial = [partial[j] + partial[half + j] for j in range(half)]
    assert torch.equal(exact_math.summed(x), partial[0])
    assert torch.equal(exact_math.summed(x[:3]), x[0] + (x[1] + x[2]))
    assert torch.equal(exact_math.summed(x[:1]), x[0])


def test_both_ways_of_a_fused_multiply_add_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own where it rounds once, and fp64 elsewhere."""
    x = 3 * torch.randn(2**14 + 5, generator=torch.Generator().manual_seed(4))
    x[:4] = torch.tensor([0.0, -0.0, math.inf, -math.inf])
    functions = (
        exact_math.gelu,
        exact_math.gelu_tanh,
        exact_math.sigmoid,
        exact_math.tanh,
        lambda x: exact_math.softmax(x[5:].reshape(-1, 64)),
    )
    here = [function(x) for function in functions]
    monkeypatch.setattr(exact_math, "fuses", lambda: False)
    assert all(torch.equal(a, function(x)) for a, function in zip(here, functions, strict=True))


@pytest.mark.parametrize("fused", [None, False])
def test_a_fused_multiply_add_is_rounded_once(
    fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused is not None:
        monkeypatch.setattr(exact_math, "fuses", lambda: fused)
    a = torch.tensor([1 + 2**-12, 3.0, 1e30], dtype=torch.float32)
    c = torch.tensor([-1.0, -9.0, 1.0], dtype=torch.float32)
    fused = exact_math.fma(a, a, c)
    assert fused.tolist()[:2] == [2**-11 + 2**-24, 0.0] and math.isinf(fused[2])
    assert float((a * a + c)[0]) == 2**-11


def test_square_roots_are_rounded_correctly() -> None:
    x = torch.rand(1 << 14, generator=torch.Generator().manual_seed(2))
    assert np.array_equal(exact_math.sqrt(x).numpy(), np.sqrt(x.numpy()))

"""Glue without compiling: views, passes of elements, parameters, refusals, keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_glue import SHUFFLE, WINDOW, Array

from hwmpq.errors import InputError, UnknownName
from hwmpq.kernels import glue
from hwmpq.kernels.glue import GlueCall, Operand
from hwmpq.kernels.glue.views import passes
from hwmpq.requantize import Quantizer


def call_of(attrs: dict[str, Any], x: Operand, out: Operand, shared: bool = True) -> GlueCall:
    return GlueCall("rearrange", json.dumps(attrs), (x,), out, shared)


def test_patches_of_an_image_are_a_view() -> None:
    steps = {"steps": [["reshape", [1, 192, 196]], ["permute", [0, 2, 1]]]}
    x, out = Operand((1, 192, 14, 14), "nhwc", "u8"), Operand((1, 196, 192), "plain", "u8")
    assert glue.is_view(call_of(steps, x, out))
    assert not glue.is_view(call_of(steps, x, out, shared=False))  # another quantizer
    assert not glue.is_view(call_of(steps, x, Operand(out.shape, "plain", "fp32")))
    plain = Operand(x.shape, "plain", "u8")
    assert not glue.is_view(call_of(steps, plain, out))


def test_views_of_floats_and_of_one_pixel() -> None:
    x, out = Operand((2, 5, 1, 1), "nhwc", "fp32"), Operand((2, 5), "plain", "fp32")
    assert glue.is_view(call_of({"steps": [["reshape", [2, 5]]]}, x, out, shared=False))
    assert glue.is_view(GlueCall("encode", "{}", (x,), x, False))
    half = Operand((1, 5), "plain", "fp32")
    assert not glue.is_view(call_of({"steps": [["slice", 0, 0, 1, 1]]}, out, half))
    wide = Operand((4, 2, 5), "plain", "fp32")
    steps = {"steps": [["reshape", [1, 2, 5]], ["expand", [4, 2, 5]]]}
    assert not glue.is_view(call_of(steps, out, wide))


def moved(x: Array, steps: Sequence[Sequence[Any]]) -> Array:
    """The steps in numpy."""
    for name, *args in steps:
        if name == "slice":
            axis, *bounds = args
            x = x[(slice(None),) * axis + (slice(*bounds),)]
        else:
            move = {"reshape": np.reshape, "permute": np.transpose, "expand": np.broadcast_to}
            x = move[name](x, args[0])
    return x


def random_steps(rng: np.random.Generator, shape: Sequence[int]) -> list[list[Any]]:
    steps: list[list[Any]] = []
    for _ in range(5):
        kind = rng.choice(["reshape", "permute", "slice", "expand"])
        if kind == "permute":
            step: list[Any] = [kind, [int(a) for a in rng.permutation(len(shape))]]
        elif kind == "slice":
            axis = int(rng.integers(len(shape)))
            start = int(rng.integers(shape[axis]))
            step = [kind, axis, start, shape[axis], int(rng.integers(1, 3))]
        elif kind == "expand":
            step = [kind, [3 if n == 1 else n for n in shape]]
        else:
            primes = [p for n in shape for p in _factors(n)]
            cuts = sorted(rng.integers(0, len(primes) + 1, 2))
            order = [primes[i] for i in rng.permutation(len(primes))]
            groups = (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :])
            step = [kind, [int(np.prod(g, dtype=int)) for g in groups]]
        steps.append(step)
        shape = moved(np.empty(shape), [step]).shape
    return steps


def _factors(n: int) -> list[int]:
    for p in (2, 3, 5, 7):
        if n % p == 0:
            return [p, *_factors(n // p)]
    return [n] if n > 1 else []


@pytest.mark.parametrize("seed", range(40))
def test_passes_move_what_numpy_moves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = [int(n) for n in rng.choice([1, 2, 3, 4, 6, 10], 4)]
    source = Operand(tuple(shape), "nhwc" if seed % 2 else "plain", "u8")
    steps = random_steps(rng, shape)
    x = rng.permutation(source.size)
    logical = np.transpose(x.reshape(source.physical), np.argsort(source.order))
    want = moved(logical, steps)
    out = Operand(want.shape, "plain", "u8")
    for view in passes(source, steps, out):
        at = np.full((1,), view.offset)
        for extent, stride in view.atoms:
            at = at[..., None] + np.arange(extent) * stride
        x = x[at.reshape(-1)]
    assert (x == want.reshape(-1)).all()


def test_a_channel_shuffle_needs_one_pass() -> None:
    x = Operand((1, 34, 5, 7), "nhwc", "u8")
    assert len(passes(x, SHUFFLE["steps"], x)) == 1


def test_parameters_of_an_add() -> None:
    a, b = Operand((4,), "plain", "u8"), Operand((4,), "plain", "fp32")
    call = GlueCall("add", "{}", (a, b), a, False)
    scales = [Quantizer(0.1, 3), Quantizer(9.0, 9), Quantizer(0.7, 5)]
    first, second, out = glue.parameters(call, {}, scales)
    ratio = np.float32(np.float64(0.1) / np.float64(np.float32(0.7)))
    assert first.tolist() == [np.float32(0.1), 3, np.float32(1) / np.float32(0.1), ratio]
    assert second.tolist() == [1, 0, 1, 1]  # a float has no quantizer
    assert out[1] == 5


def test_refusals() -> None:
    x = Operand((1, 4, 3, 3), "nhwc", "fp32")
    with pytest.raises(UnknownName, match="glue operator"):
        glue.emit(GlueCall("sort", "{}", (x,), x, False))
    with pytest.raises(InputError, match=r"layout of a softmax: got nhwc; allowed: plain"):
        glue.emit(GlueCall("softmax", '{"axis": 3}', (x,), x, False))
    plain = Operand(x.shape, "plain", "fp32")
    with pytest.raises(InputError, match=r"layout of a max_pool2d: got plain; allowed: nhwc"):
        glue.emit(GlueCall("max_pool2d", json.dumps(WINDOW), (plain,), plain, False))
    with pytest.raises(InputError, match=r"layout of a tensor \(3, 4\): got nhwc"):
        Operand((3, 4), "nhwc", "fp32")
    with pytest.raises(InputError, match="shape that a rearrange leads to"):
        glue.is_view(call_of({"steps": []}, x, Operand((36,), "plain", "fp32")))
    call = GlueCall("mul", "{}", (x,), x, False)
    with pytest.raises(InputError, match="elements of scale"):
        glue.parameters(
            GlueCall("batch_affine", "{}", (x,), x, False), {"scale": np.ones(3)}, [Quantizer()] * 2
        )
    assert glue.parameters(call, {"b": np.float32(2)}, [Quantizer()] * 2)[-1].size == x.size


def test_keys_tell_calls_apart() -> None:
    x = Operand((1, 4, 3, 3), "nhwc", "u8")
    call = GlueCall("relu", "{}", (x,), x, True)
    others = [
        GlueCall("relu", "{}", (x,), x, False),
        GlueCall("relu", "{}", (x,), Operand(x.shape, "plain", "u8"), True),
        GlueCall("relu", "{}", (x,), x, True, threads=2),
    ]
    assert glue.key(call) == glue.key(GlueCall("relu", "{}", (x,), x, True))
    assert len({glue.key(c) for c in (call, *others)}) == 4

"""Format: the encodings of a layer's weights and of what it reads, and how weights are scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np

from hwmpq.errors import InputError
from hwmpq.formats.arrays import Array, cast, everywhere, like, namespace
from hwmpq.formats.encoding import Encoding

GROUP_SIZES = tuple(2**e for e in range(3, 11))
#: Clip ratios that `mse_scale` tries; the first one wins ties.
_CLIP_RATIOS = np.linspace(1.0, 0.2, 33, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """codes: shape of the weight, dtype of its encoding. scale: float32, see Format; or None."""

    codes: Array
    scale: Array | None


@dataclass(frozen=True)
class Format:
    """What a layer weighs in and reads in.

    Weights are [out, ...rest] with K = prod(rest); the shape of their float32 scale follows
    granularity: 'tensor' [], 'channel' [out], 'group' [out, ceil(K / group)], where the last group
    of a row may be short. Weight encodings that take no scale (16 bit and wider) have scale None.
    """

    name: str
    weight: Encoding
    activation: Encoding
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group: int | None = None

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group is not None):
            raise InputError(f"group of {self.granularity} format {self.name}", self.group)

    @property
    def accumulator(self) -> Literal["int32", "fp32"]:
        return "int32" if self.is_integer else "fp32"

    @property
    def is_integer(self) -> bool:
        return self.weight.kind == self.activation.kind == "int"

    @property
    def is_float(self) -> bool:
        return self.weight.kind == self.activation.kind == "float"

    @property
    def weight_only(self) -> bool:
        """Whether only the weights are narrow: activations are floats that take no scale."""
        return self.weight.scaled and not self.activation.scaled

    @property
    def rank(self) -> int:
        """Orders formats by precision, higher = more precise, distinct among the known formats.

        Compares, in turn: bits of the narrower and of the wider operand, activation bits,
        significant bits, fineness of the weight scale.
        """
        low, high = sorted((self.weight.bits, self.activation.bits))
        significant = self.weight.precision + self.activation.precision
        fineness = (
            2 + max(GROUP_SIZES) // self.group if self.group else self.granularity != "tensor"
        )
        rank = 0
        for digit in (low, high, self.activation.bits, significant, fineness):
            rank = rank * 256 + digit
        return rank

    def grouped(self, size: int) -> Format:
        """This format with one weight scale per `size` consecutive elements of a row.

        Raises InputError unless size is in GROUP_SIZES and the weights take a scale.
        """
        if not self.weight.scaled:
            raise InputError(f"format {self.name} has no weight scale to group", f"g{size}")
        if size not in GROUP_SIZES:
            raise InputError(f"group size of format {self.name}", size, GROUP_SIZES)
        return replace(self, name=f"{self.name}.g{size}", granularity="group", group=size)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a weight of `shape`."""
        if self.granularity == "tensor":
            return ()
        if self.group is None:
            return (shape[0],)
        return (shape[0], -(-prod(shape[1:]) // self.group))

    def max_scale(self, w: Array) -> Array:
        """The scale that just holds the largest magnitude: max|w| / qmax; 1 where all is zero.

        Raises InputError when w holds NaN or infinity.
        """
        blocks = self._blocks(cast(w, "float32"))
        xp = namespace(blocks)
        if not bool(xp.isfinite(blocks).all()):
            raise InputError("weight to be scaled", "NaN or infinity", "finite numbers")
        # A tensor as divisor: torch on a GPU multiplies by the reciprocal of a plain number.
        scale = xp.amax(xp.abs(blocks), axis=-1) / like(self.weight.qmax, blocks)
        return _usable(scale).reshape(self.scale_shape(w.shape))

    def mse_scale(self, w: Array) -> Array:
        """The scale of least squared rounding error among clip ratios 0.2 .. 1 of `max_scale`.

        Errors are summed in float64. Raises InputError when w holds NaN or infinity.
        """
        widest = self.max_scale(w)
        blocks = self._blocks(cast(w, "float32"))
        xp = namespace(blocks)
        widest = widest.reshape(*blocks.shape[:-1], 1)
        best, least = widest, xp.full_like(widest, float("inf"), dtype=xp.float64)
        for ratio in _CLIP_RATIOS:
            scale = _usable(widest * float(ratio))
            error = (self.weight.fake(blocks, scale) - blocks) ** 2
            total = xp.sum(error, axis=-1, keepdims=True, dtype=xp.float64)
            best = xp.where(total < least, scale, best)
            least = xp.minimum(total, least)
        return best.reshape(self.scale_shape(w.shape))

    def quantize_weight(self, w: Array, scale: Array | None = None) -> QuantizedWeight:
        """Codes and scale of float32 w [out, ...rest]; without `scale`, by `max_scale`.

        Raises InputError for a scale of the wrong shape, and as Encoding.quantize does.
        """
        if not self.weight.scaled:
            if scale is not None and not everywhere(scale, 1):
                raise InputError(f"weight scale of format {self.name}", scale, "None or ones")
            return QuantizedWeight(self.weight.quantize(w), None)
        scale = self.max_scale(w) if scale is None else like(scale, w)
        blocks = self._blocks(cast(w, "float32"))
        codes = self.weight.quantize(blocks, self._per_block(scale, w.shape, blocks.shape))
        return QuantizedWeight(self._unblock(codes, w.shape), scale)

    def dequantize_weight(self, q: QuantizedWeight, shape: Sequence[int] | None = None) -> Array:
        """The float32 weight of `shape` (that of the codes by default) that `q` stands for."""
        shape = tuple(q.codes.shape if shape is None else shape)
        if q.scale is None:
            return self.weight.dequantize(q.codes).reshape(shape)
        blocks = self._blocks(q.codes.reshape(shape))
        scale = self._per_block(like(q.scale, blocks), shape, blocks.shape)
        return self._unblock(self.weight.dequantize(blocks, scale), shape)

    def nbytes(self, shape: Sequence[int], bias: int = 0) -> int:
        """Bytes a layer's parameters take: packed rows, float32 scales, `bias` float32 elements.

        Adds the activation's own: scale and zero point (8) of an integer, scale (4) of a small
        float. shape: the weight's, in torch's layout.
        """
        weights = shape[0] * self.weight.packed_nbytes(prod(shape[1:]))
        scales = prod(self.scale_shape(shape)) if self.weight.scaled else 0
        zero_point = self.activation.kind == "int"
        return weights + 4 * (scales + bias + self.activation.scaled + zero_point)

    def _blocks(self, w: Array) -> Array:
        """w as [rows, blocks, elements that share a scale], short groups filled with zeros."""
        if self.granularity == "tensor":
            return w.reshape(1, 1, -1)
        rows = w.reshape(w.shape[0], -1)
        if self.group is None:
            return rows[:, None, :]
        size = min(self.group, rows.shape[1])
        xp = namespace(w)
        missing = -rows.shape[1] % size
        rows = xp.concatenate([rows, xp.zeros_like(rows[:, :missing])], axis=1)
        return rows.reshape(rows.shape[0], -1, size)

    def _unblock(self, blocks: Array, shape: Sequence[int]) -> Array:
        """The inverse of `_blocks` for a weight of `shape`."""
        if self.granularity == "tensor":
            return blocks.reshape(*shape)
        rows = blocks.reshape(blocks.shape[0], -1)
        return rows[:, : prod(shape[1:])].reshape(*shape)

    def _per_block(self, scale: Array, shape: Sequence[int], blocks: Sequence[int]) -> Array:
        """The scale of a weight of `shape`, shaped to multiply blocks."""
        expected = self.scale_shape(shape)
        if tuple(scale.shape) != expected:
            raise InputError(
                f"shape of the {self.name} scale of weight {tuple(shape)}",
                tuple(scale.shape),
                str(expected),
            )
        return scale.reshape(*blocks[:-1], 1)


def bops(fmt: Format, macs: int) -> int:
    """Bit operations: macs · weight bits · activation bits (Bayesian Bits, arXiv 2005.07093)."""
    return macs * fmt.weight.bits * fmt.activation.bits


def _usable(scale: Array) -> Array:
    """1 in place of scales below the smallest normal float32: their reciprocals may overflow."""
    xp = namespace(scale)
    tiny = float(np.finfo(np.float32).tiny)
    return xp.where(scale < tiny, xp.ones_like(scale), scale)

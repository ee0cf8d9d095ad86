"""Converters of the operators that only move elements: all become `rearrange` (or disappear), but
for a roll, which is a `concat` of two slices."""

from __future__ import annotations

from hwmpq.frontend.builder import Builder, Call, Converter, Pieces, Refusal, Value


def _tensor(call: Call) -> str:
    x = call["self"]
    if not isinstance(x, str):
        raise Refusal("a list of tensors where one is expected")
    return x


def identity(b: Builder, call: Call) -> Value:
    """dropout, contiguous, clone, ...: the tensor itself."""
    return _tensor(call) if "self" in call.args else str(call["input"])


def to(b: Builder, call: Call) -> Value:
    """A conversion that changes nothing."""
    if str(call.get("dtype", "torch.float32")) != "torch.float32":
        raise Refusal(f"conversion to {call['dtype']}: only float32 tensors are supported")
    return _tensor(call)


def dropout(b: Builder, call: Call) -> Value:
    if call["train"]:
        raise Refusal("dropout in training mode: export after model.eval()")
    return identity(b, call)


def reshape(b: Builder, call: Call) -> Value:
    """view, flatten, squeeze, unsqueeze, ...: the recorded result shape says it all."""
    return b.rearrange(call, _tensor(call), [["reshape", list(call.shape)]])


def permute(b: Builder, call: Call) -> Value:
    rank = len(call.shape)
    return b.rearrange(call, _tensor(call), [["permute", [d % rank for d in call["dims"]]]])


def transpose(b: Builder, call: Call) -> Value:
    rank = len(call.shape)
    axes = list(range(rank))
    i, j = call["dim0"] % rank, call["dim1"] % rank
    axes[i], axes[j] = axes[j], axes[i]
    return b.rearrange(call, _tensor(call), [["permute", axes]])


def reverse_axes(b: Builder, call: Call) -> Value:
    """t of a matrix, and numpy_T."""
    return b.rearrange(call, _tensor(call), [["permute", list(reversed(range(len(call.shape))))]])


def matrix_transpose(b: Builder, call: Call) -> Value:
    """mT: the last two axes."""
    *outer, i, j = range(len(call.shape))
    return b.rearrange(call, _tensor(call), [["permute", [*outer, j, i]]])


def expand(b: Builder, call: Call) -> Value:
    x = _tensor(call)
    shape = b.shape(x)
    padded = [1] * (len(call.shape) - len(shape)) + list(shape)
    return b.rearrange(call, x, [["reshape", padded], ["expand", list(call.shape)]])


def slice_(b: Builder, call: Call) -> Value:
    x = _tensor(call)
    axis = call["dim"] % len(call.shape)
    picked = slice(call.get("start"), call.get("end"), call["step"])
    start, stop, step = picked.indices(b.shape(x)[axis])
    return b.rearrange(call, x, [["slice", axis, start, stop, step]])


def select(b: Builder, call: Call) -> Value:
    x = _tensor(call)
    shape = b.shape(x)
    axis = call["dim"] % len(shape)
    i = call["index"] % shape[axis]
    steps = [["slice", axis, i, i + 1, 1], ["reshape", list(call.shape)]]
    return b.rearrange(call, x, steps)


def narrow(b: Builder, call: Call) -> Value:
    axis = call["dim"] % len(call.shape)
    start = call["start"]
    return b.rearrange(call, _tensor(call), [["slice", axis, start, start + call["length"], 1]])


def unbind(b: Builder, call: Call) -> Value:
    x = _tensor(call)
    shape = b.shape(x)
    axis = call["dim"] % len(shape)
    rest = [*shape[:axis], *shape[axis + 1 :]]
    steps = ([["slice", axis, i, i + 1, 1], ["reshape", rest]] for i in range(shape[axis]))
    return Pieces(x, tuple(steps))


def _cut(x: str, shape: tuple[int, ...], axis: int, sizes: list[int]) -> Pieces:
    steps, start = [], 0
    for size in sizes:
        steps.append([["slice", axis, start, start + size, 1]])
        start += size
    return Pieces(x, tuple(steps))


def split(b: Builder, call: Call) -> Value:
    """split and chunk, by piece size, number of pieces or list of sizes."""
    x = _tensor(call)
    shape = b.shape(x)
    axis = call["dim"] % len(shape)
    total = shape[axis]
    sizes = call.get("split_sizes", call.get("split_size"))
    if "chunks" in call.args:
        sizes = -(-total // call["chunks"])
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    return _cut(x, shape, axis, list(sizes))


def getitem(b: Builder, call: Call) -> Value:
    source, index = call["0"], call["1"]
    if isinstance(source, Pieces):
        return b.rearrange(call, source.source, source.steps[index])
    if isinstance(source, str) and index == 0:
        return source
    raise Refusal(f"result {index} of an operator that is taken with its first result only")


def pixel_shuffle(b: Builder, call: Call) -> Value:
    r = call["upscale_factor"]
    n, c, h, w = call.shape
    steps = [
        ["reshape", [n, c, r, r, h // r, w // r]],
        ["permute", [0, 1, 4, 2, 5, 3]],
        ["reshape", list(call.shape)],
    ]
    return b.rearrange(call, _tensor(call), steps)


def pixel_unshuffle(b: Builder, call: Call) -> Value:
    r = call["downscale_factor"]
    n, c, h, w = call.shape
    steps = [
        ["reshape", [n, c // r**2, h, r, w, r]],
        ["permute", [0, 1, 3, 5, 2, 4]],
        ["reshape", list(call.shape)],
    ]
    return b.rearrange(call, _tensor(call), steps)


def channel_shuffle(b: Builder, call: Call) -> Value:
    n, c, *size = call.shape
    groups = call["groups"]
    steps = [
        ["reshape", [n, groups, c // groups, *size]],
        ["permute", [0, 2, 1, *range(3, 3 + len(size))]],
        ["reshape", list(call.shape)],
    ]
    return b.rearrange(call, _tensor(call), steps)


def repeat(b: Builder, call: Call) -> Value:
    """repeat and tile: every axis gets a repeated one before it, and is joined with it."""
    x = _tensor(call)
    shape = b.shape(x)
    counts = list(call.get("repeats", call.get("dims")))
    counts = [1] * (len(call.shape) - len(counts)) + counts
    padded = [1] * (len(call.shape) - len(shape)) + list(shape)
    apart = [size for extent in padded for size in (1, extent)]
    wide = [size for pair in zip(counts, padded, strict=True) for size in pair]
    steps = [["reshape", apart], ["expand", wide], ["reshape", list(call.shape)]]
    return b.rearrange(call, x, steps)


#: torch rounds the place of a source pixel in fp32: from a factor of 41 on it can be a pixel off.
_LARGEST_FACTOR = 40


def upsample_nearest(b: Builder, call: Call) -> Value:
    """Every pixel is repeated; also `nearest-exact`, which is the same for whole factors."""
    x = str(call.get("input", call.get("self")))
    n, c, h, w = b.shape(x)
    oh, ow = call.shape[2:]
    if oh % h or ow % w or max(oh // h, ow // w) > _LARGEST_FACTOR:
        raise Refusal(
            f"nearest resize from {h}x{w} to {oh}x{ow}: only by whole factors up to "
            f"{_LARGEST_FACTOR}"
        )
    steps = [
        ["reshape", [n, c, h, 1, w, 1]],
        ["expand", [n, c, h, oh // h, w, ow // w]],
        ["reshape", [n, c, oh, ow]],
    ]
    return b.rearrange(call, x, steps)


def roll(b: Builder, call: Call) -> Value:
    """Along each axis: the last `shift` elements, then the others."""
    x = _tensor(call)
    shape = call.shape
    if not call["dims"]:
        raise Refusal("roll of the flattened tensor: name the axes")
    for shift, dim in zip(call["shifts"], call["dims"], strict=True):
        axis = dim % len(shape)
        size = shape[axis]
        cut = size - shift % size
        if cut == size:
            continue
        parts = [
            b.rearrange(call, x, [["slice", axis, start, stop, 1]], f"{call.name}_part")
            for start, stop in ((cut, size), (0, cut))
        ]
        x = b.glue(call, "concat", parts, {"axis": axis})
    return x


CONVERTERS: dict[str, Converter] = {
    **dict.fromkeys(
        ["aten.contiguous.default", "aten.clone.default", "aten.detach.default",
         "aten.alias.default", "aten.lift_fresh_copy.default"], identity,
    ),
    **dict.fromkeys(
        ["aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten._to_copy.default"], to,
    ),
    **dict.fromkeys(
        ["aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default"],
        dropout,
    ),
    **dict.fromkeys(
        ["aten.view.default", "aten.reshape.default", "aten._unsafe_view.default",
         "aten.flatten.using_ints", "aten.unflatten.int", "aten.squeeze.default",
         "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze.default"], reshape,
    ),
    **dict.fromkeys(["aten.t.default", "aten.numpy_T.default"], reverse_axes),
    **dict.fromkeys(["aten.mT.default", "aten.adjoint.default"], matrix_transpose),
    "aten.permute.default": permute,
    "aten.transpose.int": transpose,
    **dict.fromkeys(["aten.expand.default", "aten.broadcast_to.default"], expand),
    "aten.slice.Tensor": slice_,
    "aten.select.int": select,
    "aten.narrow.default": narrow,
    "aten.unbind.int": unbind,
    **dict.fromkeys(
        ["aten.split.Tensor", "aten.split.sizes", "aten.split_with_sizes.default",
         "aten.chunk.default"], split,
    ),
    "getitem": getitem,
    "aten.pixel_shuffle.default": pixel_shuffle,
    "aten.pixel_unshuffle.default": pixel_unshuffle,
    **dict.fromkeys(
        ["aten.channel_shuffle.default", "aten.native_channel_shuffle.default"], channel_shuffle
    ),
    **dict.fromkeys(["aten.repeat.default", "aten.tile.default"], repeat),
    **dict.fromkeys(
        ["aten.upsample_nearest2d.vec", "aten.upsample_nearest2d.default",
         "aten._upsample_nearest_exact2d.vec", "aten._upsample_nearest_exact2d.default"],
        upsample_nearest,
    ),
    "aten.roll.default": roll,
}  # fmt: skip

"""hwmpq.formats: rounding against ml_dtypes, numpy against torch, packing, scales, names."""

import subprocess
import sys
from math import prod

import ml_dtypes
import numpy as np
import pytest
import torch

from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import bops, encoding_named, format_named, known_formats, reciprocal, registry
from hwmpq.formats.encoding import Encoding
from hwmpq.formats.format import Format

ENCODINGS = [
    *("fp32", "bf16", "fp16", "e4m3", "e5m2", "e3m2", "e2m3", "e2m1"),
    *(f"u{b}" for b in range(2, 9)),
    *(f"s{b}" for b in range(2, 9)),
]
REFERENCE = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
NO_NAN = ["e3m2", "e2m3", "e2m1", *(e for e in ENCODINGS if e[0] in "us")]
FORMATS = [*known_formats(), "w4.bf16.g16", "w4a8.g8", "e4m3.g32", "w2.fp16.g1024"]
SCALED = [name for name in FORMATS if format_named(name).weight.scaled]
SHAPES = [(5, 3, 3, 3), (4, 7), (3, 1, 5, 5), (2, 33), (1, 1), (6,)]


def _random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _hard_values(encoding: Encoding) -> np.ndarray:
    """Every value of a float encoding, the ties between neighbours and the floats beside those."""
    dtype = REFERENCE[encoding.name]
    every = np.arange(2**encoding.bits, dtype=encoding.code_dtype).view(dtype).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    ties = (every[1:] / 2 + every[:-1] / 2).astype(np.float32)
    near = np.concatenate([every, ties])
    up, down = np.nextafter(near, np.float32(np.inf)), np.nextafter(near, -np.float32(np.inf))
    tiny = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38], np.float32)
    spread = _random((20000,)) * np.exp2(_random((20000,), 1) * 8)
    x = np.concatenate([near, up, down, tiny, spread]).astype(np.float32)
    return x[np.abs(x) <= encoding.qmax]


@pytest.mark.parametrize("name", REFERENCE)
def test_float_codes_are_those_of_ml_dtypes(name: str) -> None:
    encoding = encoding_named(name)
    x = _hard_values(encoding)
    expected = x.astype(REFERENCE[name])
    codes = encoding.quantize(x)
    assert codes.dtype == encoding.code_dtype
    np.testing.assert_array_equal(codes, expected.view(encoding.code_dtype))
    back = encoding.dequantize(codes)
    np.testing.assert_array_equal(back.view(np.int32), expected.astype(np.float32).view(np.int32))


@pytest.mark.parametrize("name", REFERENCE)
def test_every_float_code_decodes_as_in_ml_dtypes(name: str) -> None:
    encoding = encoding_named(name)
    codes = np.arange(2**encoding.bits, dtype=encoding.code_dtype)
    with np.errstate(invalid="ignore"):
        expected = codes.view(REFERENCE[name]).astype(np.float32)
    np.testing.assert_array_equal(encoding.dequantize(codes), expected)
    np.testing.assert_array_equal(encoding.dequantize(torch.from_numpy(codes)).numpy(), expected)


@pytest.mark.parametrize("name", [n for n in ENCODINGS if encoding_named(n).bits <= 8])
def test_rounding_is_to_the_nearest_value_and_idempotent(name: str) -> None:
    encoding = encoding_named(name)
    first, last = (
        (encoding.qmin, encoding.qmax) if encoding.kind == "int" else (0, 2**encoding.bits - 1)
    )
    codes = np.arange(int(first), int(last) + 1).astype(encoding.code_dtype)
    values = encoding.dequantize(codes)
    values = values[np.isfinite(values)]
    x = (_random((500,)) * encoding.qmax).clip(encoding.qmin, encoding.qmax).astype(np.float32)
    fake = encoding.fake(x)
    np.testing.assert_array_equal(np.abs(fake - x), np.abs(values[None] - x[:, None]).min(axis=1))
    np.testing.assert_array_equal(encoding.fake(fake), fake)


@pytest.mark.parametrize("name", ENCODINGS)
def test_numpy_and_torch_give_equal_bits(name: str) -> None:
    encoding = encoding_named(name)
    special = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, 1e-45, -3e-39, 3.4e38, -3.4e38, np.inf, -np.inf]
    x = np.concatenate([_random((4099,)) * np.float32(9), np.array(special, np.float32)])
    scale = np.abs(_random((4111,), 3)) + np.float32(0.01) if encoding.scaled else 1.0
    zero = np.arange(4111) % 5 if name[0] == "u" else 0
    codes = encoding.quantize(x, scale, zero)
    to_torch = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in (x, scale, zero)]
    torch_codes = encoding.quantize(*to_torch)
    assert isinstance(torch_codes, torch.Tensor)
    assert torch_codes.numpy().dtype == codes.dtype
    assert torch_codes.numpy().tobytes() == codes.tobytes()
    back = encoding.dequantize(codes, scale, zero)
    torch_back = encoding.dequantize(torch_codes, *to_torch[1:])
    assert back.dtype == np.float32 and torch_back.dtype == torch.float32
    assert torch_back.numpy().tobytes() == back.tobytes()
    assert encoding.fake(x, scale, zero).tobytes() == back.tobytes()
    assert encoding.fake(*to_torch).numpy().tobytes() == back.tobytes()
    mixed = encoding.quantize(to_torch[0], scale, zero)
    assert torch.equal(mixed, torch_codes)


@pytest.mark.parametrize("name", ["s8", "u4"])
def test_integers_are_one_float32_product_rounded_half_to_even(name: str) -> None:
    encoding = encoding_named(name)
    x, scale = _random((10007,)) * np.float32(5), np.float32(0.0371)
    zero = 7 if name == "u4" else 0
    inv = np.float32(1) / scale
    assert reciprocal(scale) == inv and reciprocal(0.0371) == inv
    expected = np.clip(np.rint(x * inv) + np.float32(zero), encoding.qmin, encoding.qmax)
    np.testing.assert_array_equal(encoding.quantize(x, float(scale), zero), expected)
    ties = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)
    signed = encoding_named("s8").quantize(ties)
    np.testing.assert_array_equal(signed, [0, 2, 2, 0, -2])


def test_scalars_gradients_and_other_dtypes() -> None:
    s8 = encoding_named("s8")
    assert s8.quantize(np.float32(2.5)) == 2 and s8.quantize(torch.tensor(3.5)) == 4
    assert s8.quantize(np.float64(1e300)) == 127
    leaf = torch.tensor([1.2, -200.0], requires_grad=True)
    codes = s8.quantize(leaf, torch.nn.Parameter(torch.tensor(0.5)))
    assert codes.tolist() == [2, -127] and not codes.requires_grad
    for name in ("bf16", "e4m3", "fp32"):
        assert not encoding_named(name).fake(leaf).requires_grad
    assert encoding_named("e4m3").quantize(torch.tensor([1.0], dtype=torch.bfloat16)) == 0x38
    frozen = np.array([0.5, 1.0], np.float32)
    frozen.flags.writeable = False
    assert s8.quantize(leaf, frozen).tolist() == [2, -127]


@pytest.mark.parametrize("name", [n for n in ENCODINGS if n != "fp32"])
def test_infinity_and_overflow_saturate(name: str) -> None:
    encoding = encoding_named(name)
    big = np.array([np.inf, -np.inf, 3.4e38, -3.4e38], np.float32)
    top, low = encoding.qmax, encoding.qmin
    expected = np.array([top, low, top, low], np.float32)
    np.testing.assert_array_equal(encoding.fake(big), expected)
    if encoding.scaled:
        small = encoding.quantize(np.array([1e30, -1e30], np.float32), 1e-20)
        np.testing.assert_array_equal(encoding.dequantize(small), expected[:2])


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_nan_is_kept_or_refused(name: str, make: type) -> None:
    encoding = encoding_named(name)
    x = make([1.0, float("nan"), -2.0])
    if name in NO_NAN:
        with pytest.raises(InputError, match=rf"cannot round to {name}: got NaN; allowed: numbers"):
            encoding.quantize(x)
    else:
        assert np.isnan(np.asarray(encoding.fake(x))).tolist() == [False, True, False]


def test_signed_integers_are_narrow() -> None:
    for bits in range(2, 9):
        encoding = encoding_named(f"s{bits}")
        top = 2 ** (bits - 1) - 1
        codes = encoding.quantize(np.array([-np.inf, -1e9, 1e9], np.float32))
        assert codes.tolist() == [-top, -top, top] and codes.dtype == np.int8
        assert (encoding.qmin, encoding.qmax) == (-top, top)
        assert encoding_named(f"u{bits}").qmax == 2**bits - 1


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, float("inf"), float("nan"), 1e-45, 1e300, np.array([1.0, 0.0])]
)
def test_bad_scales_are_refused(scale: object) -> None:
    with pytest.raises(InputError, match=r"scale: got .*; allowed: positive, finite"):
        encoding_named("s8").quantize(np.ones(2, np.float32), scale)
    with pytest.raises(InputError, match="scale: got"):
        encoding_named("s8").quantize(torch.ones(2), scale)


def test_floats_take_no_zero_point_and_wide_ones_no_scale() -> None:
    x = np.ones(3, np.float32)
    with pytest.raises(InputError, match="zero point of e4m3: got 3; allowed: 0"):
        encoding_named("e4m3").quantize(x, 1.0, 3)
    with pytest.raises(InputError, match=r"scale of bf16: got 0\.5; allowed: 1"):
        encoding_named("bf16").quantize(x, 0.5)
    np.testing.assert_array_equal(encoding_named("bf16").quantize(x, np.ones(3)), [0x3F80] * 3)


@pytest.mark.parametrize("length", [1, 3, 7, 17, 31, 33, 65])
@pytest.mark.parametrize("name", ENCODINGS)
def test_pack_round_trip(name: str, length: int) -> None:
    encoding = encoding_named(name)
    x = _random((2, 3, length), length) * np.float32(encoding.qmax if encoding.bits < 9 else 3)
    codes = encoding.quantize(x)
    packed = encoding.pack(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == (2, 3, encoding.packed_nbytes(length))
    assert encoding.packed_nbytes(length) == (length * encoding.bits + 7) // 8
    back = encoding.unpack(packed, length)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)
    padding = packed.shape[-1] * 8 - length * encoding.bits
    assert not np.any(packed[..., -1] >> (8 - padding)) if padding else True
    strided = encoding.pack(np.repeat(codes, 2, axis=-1)[..., ::2])
    np.testing.assert_array_equal(strided, packed)


@pytest.mark.parametrize("bits", range(2, 8))
def test_pack_layout(bits: int) -> None:
    encoding = encoding_named(f"s{bits}")
    codes = np.clip(np.arange(-8, 9), encoding.qmin, encoding.qmax).astype(np.int8)
    word = sum((int(c) % 2**bits) << (i * bits) for i, c in enumerate(codes))
    assert encoding.pack(codes).tobytes() == word.to_bytes(encoding.packed_nbytes(17), "little")
    if bits == 4:
        assert encoding.pack(np.array([1, -1, 3], np.int8)).tolist() == [0xF1, 0x03]
    with pytest.raises(InputError, match=rf"packed row of 9 s{bits} codes: got 1; allowed: "):
        encoding.unpack(np.zeros(1, np.uint8), 9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_weights(name: str, shape: tuple[int, ...]) -> None:
    """Round trip, error bound, scale shape, size, numpy against torch: for every known format."""
    fmt = format_named(name)
    w = _random(shape) * np.float32(0.1)
    w[0] = 0  # a zero channel
    q = fmt.quantize_weight(w)
    assert q.codes.shape == shape and q.codes.dtype == fmt.weight.code_dtype
    back = fmt.dequantize_weight(q)
    assert back.dtype == np.float32 and not back[0].any()
    row_max = np.abs(w.reshape(shape[0], -1)).max()
    step = 0.5 if fmt.weight.kind == "int" else fmt.weight.qmax / 2**fmt.weight.precision
    assert np.abs(back - w).max() <= row_max / fmt.weight.qmax * step * 1.001

    t = fmt.quantize_weight(torch.from_numpy(w))
    assert t.codes.numpy().tobytes() == q.codes.tobytes()
    assert fmt.dequantize_weight(t).numpy().tobytes() == back.tobytes()
    flat = fmt.dequantize_weight(type(q)(q.codes.reshape(shape[0], -1), q.scale), shape)
    assert flat.tobytes() == back.tobytes()

    packed = fmt.weight.pack(q.codes.reshape(shape[0], -1)).nbytes
    scales = 0 if q.scale is None else q.scale.nbytes
    own = 8 if fmt.activation.kind == "int" else 4 if fmt.activation.scaled else 0
    assert fmt.nbytes(shape, bias=shape[0]) == packed + scales + 4 * shape[0] + own
    if q.scale is None:
        assert not fmt.weight.scaled
        return
    assert q.scale.dtype == np.float32 and q.scale.shape == fmt.scale_shape(shape)
    assert t.scale.numpy().tobytes() == q.scale.tobytes()
    assert (q.scale > 0).all() and (q.scale[0] == 1).all()
    again = fmt.quantize_weight(w, q.scale)
    assert again.codes.tobytes() == q.codes.tobytes()


def test_scale_per_tensor_channel_and_group() -> None:
    s4, bf16 = encoding_named("s4"), encoding_named("bf16")
    w = np.array([[7, 0, 0, 0, 0, 0, 0, 14, 0.7], [0, 0, 0, 0, 0, 0, 0, 0, 2.1]], np.float32)
    expected = {"tensor": 2.0, "channel": [2, 0.3], "group": [[2, 0.1], [1, 0.3]]}
    for granularity, scale in expected.items():
        group = 8 if granularity == "group" else None
        fmt = Format("x", s4, bf16, granularity, group)  # type: ignore[arg-type]
        q = fmt.quantize_weight(w)
        np.testing.assert_allclose(q.scale, np.array(scale, np.float32), rtol=1e-6)
        assert q.scale.shape == fmt.scale_shape(w.shape)
        by_hand = np.broadcast_to(np.reshape(q.scale, (-1, 1)), (2, 1)) if not group else None
        if by_hand is not None:
            np.testing.assert_array_equal(q.codes, s4.quantize(w, by_hand))
            np.testing.assert_array_equal(fmt.dequantize_weight(q), s4.dequantize(q.codes, by_hand))
        else:
            per_element = q.scale[:, np.arange(9) // 8]
            np.testing.assert_array_equal(q.codes, s4.quantize(w, per_element))
    with pytest.raises(InputError, match=r"shape of the w4\.bf16 scale .*got \(3,\); .*\(2,\)"):
        format_named("w4.bf16").quantize_weight(w, np.ones(3, np.float32))
    with pytest.raises(InputError, match="group of channel format x: got 8"):
        Format("x", s4, bf16, "channel", 8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_cannot_be_scaled_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="weight to be scaled: got NaN or infinity"):
        format_named("w8a8").quantize_weight(np.array([[1.0, bad]], np.float32))


def test_tiny_channels_get_scale_one() -> None:
    w = np.array([[1e-40, 1e-42], [1e-37, 0]], np.float32)
    q = format_named("w8a8").quantize_weight(w)
    assert q.scale.tolist() == [1.0, 1.0] and not q.codes.any()


@pytest.mark.parametrize("name", SCALED)
def test_mse_scale_beats_max_scale(name: str) -> None:
    fmt = format_named(name)
    w = _random((6, 40)) ** 3
    w[2] = 0
    scale = fmt.mse_scale(w)
    assert scale.dtype == np.float32 and scale.shape == fmt.scale_shape(w.shape)
    assert fmt.mse_scale(torch.from_numpy(w)).numpy().tobytes() == scale.tobytes()

    def error(q_scale: np.ndarray) -> np.ndarray:
        back = fmt.dequantize_weight(fmt.quantize_weight(w, q_scale))
        return ((back - w).astype(np.float64) ** 2).sum(axis=1)

    best, plain = error(scale), error(fmt.max_scale(w))
    assert (best <= plain * (1 + 1e-6)).all()
    if fmt.weight.kind == "int" and fmt.weight.bits <= 4 and fmt.granularity == "channel":
        assert best.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("rounding", ["max_scale", "mse_scale"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_error_falls_with_bits(granularity: str, rounding: str) -> None:
    w = _random((16, 144))
    errors = []
    for bits in range(2, 9):
        group = 32 if granularity == "group" else None
        s = encoding_named(f"s{bits}")
        fmt = Format("x", s, encoding_named("bf16"), granularity, group)  # type: ignore[arg-type]
        q = fmt.quantize_weight(w, getattr(fmt, rounding)(w))
        errors.append(float(((fmt.dequantize_weight(q) - w) ** 2).mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3


def test_finer_scales_err_less() -> None:
    w = _random((16, 256)) * np.exp(_random((16, 256), 1))
    named = [format_named(n) for n in ("w4.bf16", "w4.bf16.g128", "w4.bf16.g32", "w4.bf16.g8")]
    fmts = [Format("t", named[0].weight, named[0].activation, "tensor"), *named]
    errors = [((f.dequantize_weight(f.quantize_weight(w)) - w) ** 2).sum() for f in fmts]
    assert errors == sorted(errors, reverse=True)
    ranks = [f.rank for f in fmts]
    assert ranks == sorted(set(ranks))


def test_registry_lists_every_format_once_by_rank() -> None:
    names = known_formats()
    assert names[0] == "fp32" and names[-1] == "w2a2" and len(set(names)) == len(names) == 74
    ranks = [format_named(n).rank for n in names]
    assert ranks == sorted(set(ranks), reverse=True)
    below = [n for n in names if n in ("fp32", "fp16", "bf16", "w8a8", "e4m3", "w4.bf16", "w4a4")]
    assert below == ["fp32", "fp16", "bf16", "w8a8", "e4m3", "w4.bf16", "w4a4"]
    for name in ENCODINGS:
        encoding = encoding_named(name)
        assert encoding.name == name and hash(encoding) == hash(encoding_named(name))


def test_what_a_name_means() -> None:
    w4a8, w4, fp8, fp32 = map(format_named, ("w4a8", "w4.bf16.g64", "e4m3", "fp32"))
    assert (w4a8.weight.name, w4a8.activation.name, w4a8.accumulator) == ("s4", "u8", "int32")
    assert w4a8.is_integer and not w4a8.is_float and not w4a8.weight_only
    assert (w4.name, w4.granularity, w4.group) == ("w4.bf16.g64", "group", 64)
    assert w4.weight_only and w4.accumulator == "fp32" and not (w4.is_float or w4.is_integer)
    assert fp8.is_float and not fp8.weight_only and format_named("e4m3.bf16").weight_only
    assert fp32.is_float and not fp32.weight_only and fp32.accumulator == "fp32"
    assert format_named("w4.bf16.g64") is w4 or format_named("w4.bf16.g64") == w4
    assert [bops(f, 10) for f in (w4a8, w4, fp8, fp32)] == [320, 640, 640, 10240]
    shape = (8, 16, 3, 3)
    weights = prod(shape)
    assert w4a8.nbytes(shape, 8) == weights // 2 + 4 * 8 + 4 * 8 + 8
    assert w4.nbytes(shape) == weights // 2 + 4 * 8 * 3
    assert fp32.nbytes(shape) == 4 * weights


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown format: got 'w8a9'; allowed: .*Nearest: .*w8a"):
        format_named("w8a9")
    with pytest.raises(UnknownName, match=r"Nearest: .*bf16.*\. A suffix such as '\.g64'"):
        format_named("bf61")
    with pytest.raises(UnknownName, match=r"unknown encoding: got 's9'; allowed: .*Nearest: .*s8"):
        encoding_named("s9")
    for name in ("w8a9.g64", "w4.bf16.g064", "w4.bf16.g64.g64", "w4.bf16.g", "W8A8", ""):
        with pytest.raises(UnknownName):
            format_named(name)
    with pytest.raises(InputError, match=r"group size of format w4\.bf16: got 48; allowed: 8, 16"):
        format_named("w4.bf16.g48")
    with pytest.raises(InputError, match="format bf16 has no weight scale to group: got g64"):
        format_named("bf16.g64")


def test_duplicates_are_refused() -> None:
    s8, u8 = encoding_named("s8"), encoding_named("u8")
    row = Format("mine", s8, u8)
    with pytest.raises(InputError, match="format 'mine' is defined twice: got a and b"):
        registry.collect([("a", [row]), ("b", [row])])
    other = type(s8)("s8", 8, -128, 127, "int8")
    with pytest.raises(InputError, match="encoding 's8' is defined twice: got a and b"):
        registry.collect([("a", [row]), ("b", [Format("yours", other, u8)])])


def test_entry_points_add_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "mine", "pkg:FORMATS"

        def __init__(self, format_name: str) -> None:
            self.format_name = format_name

        def load(self) -> tuple[Format, ...]:
            return (Format(self.format_name, encoding_named("s8"), encoding_named("u8")),)

    points = [Point("w8a8.mine")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    formats, _ = registry.collect(registry._families())
    assert "w8a8.mine" in formats and "fp32" in formats
    points.append(Point("w8a8"))
    with pytest.raises(
        InputError, match=r"'w8a8' .*twice: got .*integer and entry point mine = pk"
    ):
        registry.collect(registry._families())


def test_import_and_listing_load_no_heavy_library() -> None:
    code = (
        "import sys, hwmpq.formats as f; f.known_formats(); f.format_named('w4.bf16.g64')\n"
        "print([m for m in ('torch', 'ml_dtypes', 'tvm', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

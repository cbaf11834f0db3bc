"""Conversions between number formats, exact and rounded to nearest even unless they say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Kind:
    """A kind of fp8: bits of the mantissa, bias of the exponent, codes of the largest number, infinity and NaN."""

    mantissa: int
    bias: int
    largest: int
    infinity: int | None
    nans: tuple[int, ...]

    @property
    def signed_zero(self) -> bool:
        return 0x80 not in self.nans


FNUZ = {"fp8": Kind(3, 8, 0x7F, None, (0x80,)), "bf8": Kind(2, 16, 0x7F, None, (0x80,))}
OCP = {
    "fp8": Kind(3, 7, 0x7E, None, (0x7F, 0xFF)),
    "bf8": Kind(2, 15, 0x7B, 0x7C, (0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF)),
}
FP8_KINDS = {"gfx942": FNUZ, "gfx950": OCP}


def encode_fp8(x: Array, kind: Kind, rng: np.random.Generator) -> Array:
    """fp32 to codes, uint8. Nothing saturates: what rounds beyond the range gives infinity, or else NaN.

    Which NaN it gives is not to be relied upon, so each is one of those that the kind has, drawn at random.
    """
    magnitude = np.abs(x).astype(np.float64)
    lowest = 1 - kind.bias  # exponent of the smallest normal number, and of all below
    exponent = np.where(magnitude > 0, np.maximum(np.frexp(magnitude)[1] - 1, lowest), lowest)
    steps = np.rint(np.ldexp(magnitude, kind.mantissa - exponent))  # 2**mantissa or more of them, where it is normal
    code = np.where(np.isfinite(x), steps + (exponent - lowest) * 2.0**kind.mantissa, 0x100)
    beyond, nan = code > kind.largest, np.isnan(x)
    sign = np.signbit(x) & ((code > 0) | kind.signed_zero)
    result = np.where(beyond, kind.infinity or 0, code).astype(np.uint8) | sign.astype(np.uint8) << np.uint8(7)
    nan |= beyond & (kind.infinity is None)
    return np.where(nan, rng.choice(np.array(kind.nans, np.uint8), nan.shape), result) if nan.any() else result


def _decode(kind: Kind) -> Array:
    """The fp32 of each code."""
    codes = np.arange(256)
    exponent, fraction = (codes & 0x7F) >> kind.mantissa, codes & ((1 << kind.mantissa) - 1)
    steps = fraction + (exponent > 0) * 2**kind.mantissa
    values = np.ldexp(steps.astype(np.float64), np.maximum(exponent, 1) - kind.bias - kind.mantissa)
    values *= np.where(codes & 0x80, -1, 1)
    if kind.infinity is not None:
        values[kind.infinity], values[kind.infinity | 0x80] = np.inf, -np.inf
    values[list(kind.nans)] = np.nan
    return values.astype(np.float32)


def pack_halves(low: Array, high: Array) -> Array:
    """Two of 16 bits into 32."""
    return low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << np.uint32(16)


def to_fp16(x: Array) -> Array:
    return x.astype(np.float16)


def to_fp32(x: Array) -> Array:
    return x.astype(np.float32)


def to_fp64(x: Array) -> Array:
    return x.astype(np.float64)


def to_fp16_towards_zero(x: Array) -> Array:
    nearest = x.astype(np.float16)
    beyond = np.abs(nearest.astype(np.float32)) > np.abs(x)
    return (nearest.view(np.uint16) - beyond.astype(np.uint16)).view(np.float16)


def to_bf16(x: Array) -> Array:
    """uint16; a NaN keeps its upper bits and becomes quiet."""
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (np.where(np.isnan(x), bits | np.uint32(0x400000), rounded) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pair(function: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """The function of two, packed into 32 bits."""
    return lambda low, high: pack_halves(function(low), function(high))


def to_fp8_pair(kind: Kind) -> Callable[[Array, Array, np.random.Generator], Array]:
    """Two fp32 to two codes in 16 bits."""

    def encode(low: Array, high: Array, rng: np.random.Generator) -> Array:
        codes = (encode_fp8(x, kind, rng).astype(np.uint16) for x in np.broadcast_arrays(low, high))
        return next(codes) | next(codes) << np.uint16(8)

    return encode


def from_fp8(kind: Kind) -> Callable[[Array], Array]:
    """The lowest byte to fp32."""
    values = _decode(kind)
    return lambda words: values[words & np.uint32(0xFF)]


def from_fp8_pair(kind: Kind) -> Callable[[Array], Array]:
    """The two lowest bytes to two fp32, as one uint64."""
    codes = _decode(kind).view(np.uint32).astype(np.uint64)
    low, high = np.uint32(0xFF), np.uint32(8)
    return lambda words: codes[words & low] | codes[words >> high & low] << np.uint64(32)

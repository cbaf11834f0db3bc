"""What instructions compute: exact functions of arrays, for lanes and for waves alike.

Integer functions take and give the dtypes of the instruction's operands; sums wrap around as the hardware's do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray

# -------------------------------------------------------------------------------------------------------- integers


def wide(x: Array) -> Array:
    """To 64 bits, signed or unsigned as it was."""
    return x.astype(f"{x.dtype.kind}8")


def low_word(x: Array) -> Array:
    """The low 32 bits of 64."""
    return x.astype(f"{x.dtype.kind}4")


def high_word(x: Array) -> Array:
    """The high 32 bits of 64."""
    return (x >> x.dtype.type(32)).astype(f"{x.dtype.kind}4")


def add_carry(a: Array, b: Array, carry: Array | int = 0) -> tuple[Array, Array]:
    """Sum of 32-bit numbers, and the carry out."""
    total = wide(a) + b + (carry if isinstance(carry, int) else carry.astype(np.uint64))
    return low_word(total), high_word(total) != 0


def subtract_borrow(a: Array, b: Array, borrow: Array | int = 0) -> tuple[Array, Array]:
    """Difference of 32-bit numbers, and the borrow."""
    total = wide(a) - b - (borrow if isinstance(borrow, int) else borrow.astype(np.uint64))
    return low_word(total), high_word(total) != 0


def overflowing(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Of int32, with whether the result has more than 32 bits."""

    def both(a: Array, b: Array) -> tuple[Array, Array]:
        exact = function(wide(a), wide(b))
        return low_word(exact), low_word(exact) != exact

    return both


def multiply_add(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """a b + c, of 32, 32 and 64 bits, and what it carries into bit 64."""
    product = wide(a) * b
    total = product + c
    if product.dtype.kind == "u":
        return total, total < c
    carry = (total.view(np.uint64) < c.view(np.uint64)) ^ (product < 0)  # of both, extended to 65 bits
    return total, carry ^ (c < 0)


def _count(count: Array, value: Array) -> Array:
    """Of a shift count, only as many bits count as tell the bits of the value apart."""
    return (count & count.dtype.type(8 * value.itemsize - 1)).astype(value.dtype)


def shift_left(value: Array, count: Array) -> Array:
    return value << _count(count, value)


def shift_right(value: Array, count: Array) -> Array:
    """Fills with the sign where there is one."""
    return value >> _count(count, value)


def mask(width: Array, offset: Array) -> Array:
    """Ones: ``width`` of them, modulo the size, ``offset`` from the lowest."""
    one = width.dtype.type(1)
    return shift_left(shift_left(np.full_like(width, 1), width) - one, offset)


def bit_field(value: Array, offset: Array, width: Array) -> Array:
    """``width`` bits of the value, extended by its sign or by 0."""
    bits = 8 * value.itemsize
    width = np.minimum(width, width.dtype.type(bits)).astype(value.dtype)
    one, field = value.dtype.type(1), shift_right(value, offset)
    if value.dtype.kind == "u":
        return np.where(width < bits, field & ((one << width) - one), field)
    unused = value.dtype.type(bits) - width
    return np.where(width > 0, (field << unused) >> unused, value.dtype.type(0))


def bit(value: Array, index: Array) -> Array:
    """One bit, as bool."""
    return (shift_right(value, index) & value.dtype.type(1)) != 0


def reverse_bits(x: Array) -> Array:
    octets = np.ascontiguousarray(x)[..., None].view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")[..., ::-1]
    return np.packbits(bits, axis=-1, bitorder="little").view(x.dtype)[..., 0]


def lowest_one(x: Array) -> Array:
    """Index of the lowest bit that is set, -1 if none."""
    one = x.dtype.type(1)
    return np.where(x == 0, -1, np.bitwise_count(~x & (x - one)).astype(np.int32)).astype(np.int32)


def highest_one(x: Array) -> Array:
    """The same, counted from the highest bit."""
    return lowest_one(reverse_bits(x))


def highest_change(x: Array) -> Array:
    """How many bits from the highest on equal it, -1 if all do."""
    return highest_one((x ^ (x >> x.dtype.type(8 * x.itemsize - 1))).view(f"u{x.itemsize}"))


def median(a: Array, b: Array, c: Array) -> Array:
    """Of integers."""
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def truth_table(table: int) -> Callable[[Array, Array, Array], Array]:
    """The bitwise function of three whose value for bits a, b, c is bit 4a + 2b + c of the table."""

    def function(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a)
        for term in range(8):
            if table >> term & 1:
                result = result | (a if term & 4 else ~a) & (b if term & 2 else ~b) & (c if term & 1 else ~c)
        return result

    return function


def permute_bytes(high: Array, low: Array, selectors: Array) -> Array:
    """Each byte of a selector picks one of eight, or the sign of one in 8 .. 11, or 0, or 255 from 13 on."""
    data = wide(high) << np.uint64(32) | low
    result = np.zeros_like(data)
    for shift in map(np.uint64, range(0, 32, 8)):
        selector = wide(selectors) >> shift & np.uint64(0xFF)
        picked = data >> (np.minimum(selector, np.uint64(7)) << np.uint64(3)) & np.uint64(0xFF)
        if (selector >= 8).any():
            sign = data >> (((selector & np.uint64(3)) << np.uint64(4)) + np.uint64(15)) & np.uint64(1)
            constants = np.where(selector == 12, np.uint64(0), np.uint64(0xFF))
            picked = np.where(selector < 8, picked, np.where(selector < 12, sign * np.uint64(0xFF), constants))
        result |= picked << shift
    return low_word(result)


def lanes_below(bits: Array, total: Array, first: int) -> Array:
    """``total`` plus how many of the 32 bits, which stand for lanes from ``first`` on, are set and below a lane."""
    below = (np.clip(np.arange(64), first, first + 32) - first).astype(np.uint64)
    return total + np.bitwise_count(bits & low_word((np.uint64(1) << below) - np.uint64(1)))


# -------------------------------------------------------------------------------------------------- floating point


def _fused(a: Array, b: Array, c: Array) -> Array:
    """a b + c of fp32, in fp64 and rounded to odd: rounding that again, to fewer bits, is as good as rounding once.

    The product is exact in fp64. Where the sum is not, its last bit is set (Boldo and Melquiond, 2008).
    """
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)  # exact (Knuth's TwoSum); NaN where the sum is not finite
    bits = total.view(np.int64)
    even = (np.abs(error) > 0) & ((bits & 1) == 0)
    if even.any():
        bits += even * np.where((error > 0) == (total > 0), 1, -1)
    return total


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c in fp32, rounded once."""
    return _fused(a, b, c).astype(np.float32)


_QUIET = {np.dtype(np.float16): 1 << 9, np.dtype(np.float32): 1 << 22, np.dtype(np.float64): 1 << 51}


def bits_of(x: Array) -> Array:
    """The bits of floating-point numbers."""
    return x.view(f"u{x.itemsize}")


def is_signalling(x: Array) -> Array:
    return np.isnan(x) & (bits_of(x) & _QUIET[x.dtype] == 0)


def _quiet_first(result: Array, *sources: Array) -> Array:
    """``result``, or the first source that is a signalling NaN, made quiet: what IEEE mode asks for."""
    for source in reversed(sources):
        signalling = is_signalling(source)
        if signalling.any():
            result = np.where(signalling, (bits_of(source) | _QUIET[source.dtype]).view(source.dtype), result)
    return result


def minimum(a: Array, b: Array) -> Array:
    """The smaller one; -0 is smaller than 0, and a number wins over a quiet NaN."""
    return _quiet_first(np.where((a < b) | ((a == b) & np.signbit(a)) | np.isnan(b), a, b), a, b)


def maximum(a: Array, b: Array) -> Array:
    """The larger one, likewise."""
    return _quiet_first(np.where((a > b) | ((a == b) & np.signbit(b)) | np.isnan(b), a, b), a, b)


def median_float(a: Array, b: Array, c: Array) -> Array:
    """The one in the middle, or the smallest number where there is a NaN."""
    largest = maximum(maximum(a, b), c)
    result = np.where(largest == a, maximum(b, c), np.where(largest == b, maximum(a, c), maximum(a, b)))
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(nan, minimum(minimum(a, b), c), result) if nan.any() else result


def clamp(x: Array) -> Array:
    """To 0 .. 1; NaN becomes 0, as DX10_CLAMP has it."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    return np.where(x > zero, np.minimum(x, one), zero)


_TINY = np.finfo(np.float32).tiny


def _flush(x: Array) -> Array:
    """Denormal numbers of fp32 to the zero of their sign."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


def flushing(
    function: Callable[[Array, np.random.Generator], Array],
) -> Callable[[Array, np.random.Generator], Array]:
    """Of an fp32 function: neither takes nor gives denormal numbers, whatever the mode says of them."""
    return lambda x, rng: _flush(function(_flush(x), rng))


def approximation(function: Callable[[Array], Array]) -> Callable[[Array, np.random.Generator], Array]:
    """An fp32 function that the hardware gives with an error of at most an ulp: one of the numbers so near, at random.

    Zeros, infinities and NaNs stay, and nothing becomes one; what is normal stays so. Compilers count on the bound:
    their division of integers fails where v_rcp_f32 is off by more, say by an ulp from the correctly rounded value.
    """

    def perturbed(x: Array, rng: np.random.Generator) -> Array:
        exact = function(x.astype(np.float64))
        nearest = exact.astype(np.float32)
        other = (bits_of(nearest) + rng.integers(-1, 2, nearest.shape, np.int32).view(np.uint32)).view(np.float32)
        near = np.abs(other - exact) <= np.spacing(np.abs(nearest))
        near &= (np.abs(other) < _TINY) == (np.abs(nearest) < _TINY)
        return np.where(near & np.isfinite(other) & (other != 0) & (nearest != 0), other, nearest)

    return perturbed


def ldexp(x: Array, exponent: Array) -> Array:
    """x times a power of two, rounded once."""
    return np.ldexp(x.astype(np.float64), np.clip(exponent, -400, 400)).astype(x.dtype)


def frexp_exponent(x: Array) -> Array:
    return np.where(np.isfinite(x), np.frexp(x)[1], 0).astype(np.int32)


def frexp_mantissa(x: Array) -> Array:
    return np.frexp(x)[0]


def saturate(dtype: np.dtype) -> Callable[[Array], Array]:
    """Towards 0, to the nearest integer that there is, NaN to 0."""
    limits = np.iinfo(dtype)

    def convert(x: Array) -> Array:
        whole = np.trunc(x.astype(np.float64))
        return np.where(np.isnan(x), 0, np.clip(whole, limits.min, limits.max)).astype(dtype)

    return convert


def is_of_class(x: Array, classes: Array) -> Array:
    """Whether the bit is set that stands for the class of x.

    From the lowest: signalling NaN, quiet NaN, -inf, -normal, -denormal, -0, +0, +denormal, +normal, +inf.
    """
    magnitude, tiny = np.abs(x), np.finfo(x.dtype).tiny
    kind = (magnitude > 0).astype(np.uint32) + (magnitude >= tiny) + np.isinf(x)  # 0, denormal, normal, infinity
    index = np.where(np.signbit(x), 5 - kind, 6 + kind)
    return bit(classes, np.where(np.isnan(x), ~is_signalling(x), index).astype(np.uint32))


# -------------------------------------------------------------------------------------------------------- division
#
# v_div_scale scales numerator and denominator so that no step of the sequence leaves the normal range,
# v_div_fmas undoes it, v_div_fixup sees to the special cases. Quotients are correctly rounded only where the texts of
# the ISA documents are read with care: each deviation is said below.


def _exponent(x: Array) -> Array:
    return (bits_of(x) >> np.uint32(23) & np.uint32(0xFF)).astype(np.int32)


def _is_denormal(x: Array) -> Array:
    return (_exponent(x) == 0) & (x != 0)


def div_scale(x: Array, denominator: Array, numerator: Array) -> tuple[Array, Array]:
    """``x``, which is one of the others, scaled; and whether the quotient has to be scaled back.

    Where both the reciprocal and the quotient are denormal, the document scales the denominator up, to infinity.
    """
    inverse, quotient = _is_denormal(np.float32(1) / denominator), _is_denormal(numerator / denominator)
    is_denominator, is_numerator = (x == denominator).astype(np.int32), (x == numerator).astype(np.int32)
    cases = [  # (if, exponent of the scale, whether to scale back), in this order
        (_exponent(numerator) - _exponent(denominator) >= 96, 64 * is_denominator, True),
        (_is_denormal(denominator), 64, False),
        (inverse & quotient, -64 * is_denominator, True),
        (inverse, -64, False),
        (quotient, 64 * is_numerator, True),
        (_exponent(numerator) <= 23, 64, False),
    ]
    conditions, scales, flags = zip(*cases, strict=True)
    zero = (numerator == 0) | (denominator == 0)
    scaled = ldexp(x, np.select(conditions, scales, 0))
    return np.where(zero, np.float32(np.nan), scaled), np.select(conditions, flags, False) & ~zero


def div_fmas(a: Array, b: Array, c: Array, scaled: Array) -> Array:
    """The last step, scaled back: up where the denominator was scaled up, as the estimate ``c`` shows, else down.

    The document says by 2**32, which undoes nothing. There is one rounding: two would spoil denormal quotients.
    """
    scale = np.where(scaled, np.where(_exponent(c) > 127, 64, -64), 0)
    return np.ldexp(_fused(a, b, c), scale).astype(np.float32)


def div_fixup(quotient: Array, denominator: Array, numerator: Array) -> Array:
    """The quotient, or what the special cases make of it.

    One that overflowed arrives as infinity or, a step later, as NaN; the document asks the denominator about that.
    """
    sign = np.where(np.signbit(denominator) ^ np.signbit(numerator), np.float32(-1), np.float32(1))
    tiny = _exponent(numerator) - _exponent(denominator) < -150
    infinite, zero = sign * np.float32(np.inf), sign * np.float32(0)
    cases = [
        (np.isnan(numerator), numerator),
        (np.isnan(denominator), denominator),
        ((denominator == 0) & (numerator == 0), np.float32(np.nan)),
        (np.isinf(denominator) & np.isinf(numerator), np.float32(np.nan)),
        ((denominator == 0) | np.isinf(numerator), infinite),
        (np.isinf(denominator) | (numerator == 0) | tiny, zero),
        (~np.isfinite(quotient), infinite),
    ]
    conditions, values = zip(*cases, strict=True)
    return np.select(conditions, values, np.copysign(quotient, sign))


# ----------------------------------------------------------------------------------------------------- comparisons


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "ne": np.not_equal,
    "lg": lambda a, b: (a < b) | (a > b),  # false for NaN, unlike neq
    "o": lambda a, b: ~_unordered(a, b),
    "u": _unordered,
    "neq": np.not_equal,
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
}


def comparison(name: str) -> Callable[[Array, Array], Array]:
    """By the name that v_cmp and s_cmp use."""
    return _COMPARISONS[name]

"""Activations and codes in Triton: their bits to fp32 and back, in integer arithmetic.

Tensors reach the kernels as integers of their size, so that what is copied stays as it is. Triton's own casts
would not do: its interpreter truncates to bf16 and misrounds fp8, and chips lack conversions for the other vendor's
fp8 kinds. All kernels here are launched with ``enable_fp_fusion=False``: every product and sum is rounded by itself,
unless tl.fma is asked for.

A ``KIND`` is how an element is stored: "bf16", "fp16" or "fp32" (int16 or int32 bits), "fp8_e4m3fn", "fp8_e4m3fnuz" or
"fp8_e5m2" (uint8). ``HIP`` says that the code is for an AMD GPU, ``CONVERTS`` that the chip's own instructions round to
bf16 and to the fp8 kinds that are not FNUZ: NVIDIA's from sm_89 on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cache.layouts import FORMATS

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by an element's size: the dtype that its bits are passed as


def kind_of(dtype: object) -> str:
    """The KIND of a torch dtype."""
    return next(f.name for f in FORMATS.values() if f.dtype == dtype and not f.packed)


def bits(t: Tensor) -> Tensor:
    """The tensor's elements as integers: a view."""
    return t.view(BITS[t.element_size()])


@triton.jit
def div_rn(a, b, HIP: tl.constexpr):
    """a / b, correctly rounded.

    On AMD the compiler's sequence may leave the quotient an ulp too small where b's mantissa is all ones
    (csrc_hip/vendor.h): of it and the next number that one is right which leaves the smaller remainder.
    """
    q = tl.div_rn(a, b)
    if HIP:
        after = (q.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
        q = tl.where(tl.abs(tl.fma(-after, b, a)) < tl.abs(tl.fma(-q, b, a)), after, q)
    return q


@triton.jit
def quotient(x, scale, HIP: tl.constexpr, CONVERTS: tl.constexpr):
    """x / scale on its way to fp8: correctly rounded where fp8 tells it from zero and from its maximum.

    NVIDIA's division calls a slow path for zeros, which masked rows are. Two corrections of a product by the reciprocal
    round as well and never branch; csrc_common/fp8.h says why, and from where these bounds are.
    """
    if CONVERTS:
        s, magnitude = tl.abs(scale), tl.abs(x)
        shift = tl.where(s < 2.0**-60, 2.0**96, tl.where(s > 2.0**60, 2.0**-64, 1.0))
        divisor = s * shift
        reciprocal = tl.div_rn(1.0, divisor)
        a = tl.minimum(magnitude * shift, divisor * 2.0**17)
        q = a * reciprocal
        for _ in tl.static_range(2):
            q = tl.fma(tl.fma(-q, divisor, a), reciprocal, q)
        regular = (s > 0) & (s < float("inf")) & (x == x)
        q = tl.where(regular, q, magnitude * reciprocal)
        sign = (x.to(tl.int32, bitcast=True) ^ scale.to(tl.int32, bitcast=True)) & -0x80000000
        q = (q.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        q = div_rn(x, scale, HIP)
    return q


@triton.jit
def apart(x, HIP: tl.constexpr):
    """A product on its way to fp16, kept apart from the rounding.

    AMD's instruction for both adds a zero, which changes the sign of -0.
    """
    if HIP:
        x = tl.inline_asm_elementwise("", "=v,0", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def to_float(bits, KIND: tl.constexpr):
    """The fp32 values of elements; of fp8 before the scale."""
    if KIND == "bf16":
        x = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "fp16":
        x = bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == "fp32":
        x = bits.to(tl.float32, bitcast=True)
    else:
        # The code's exponent and mantissa at fp32's place are too small by the difference of the biases.
        MANTISSA: tl.constexpr = 2 if KIND == "fp8_e5m2" else 3
        UP: tl.constexpr = 2.0**112 if KIND == "fp8_e5m2" else (2.0**119 if KIND == "fp8_e4m3fnuz" else 2.0**120)
        code = bits.to(tl.int32)
        signed = ((code & 0x7F) << (23 - MANTISSA)) | ((code & 0x80) << 24)
        x = signed.to(tl.float32, bitcast=True) * UP
        nan = float("nan")
        if KIND == "fp8_e4m3fn":
            x = tl.where((code & 0x7F) == 0x7F, nan, x)
        elif KIND == "fp8_e4m3fnuz":
            x = tl.where(code == 0x80, nan, x)
        else:
            x = tl.where((code & 0x7F) == 0x7C, x * float("inf"), x)
            x = tl.where((code & 0x7F) > 0x7C, nan, x)
    return x


@triton.jit
def from_float(x, KIND: tl.constexpr, CONVERTS: tl.constexpr = False):
    """The bits of fp32 numbers as elements, rounded to nearest even; fp8 clamps to its finite range."""
    if KIND == "bf16" and CONVERTS:
        code = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    elif KIND == "bf16":
        u = x.to(tl.int32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        code = tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)
    elif KIND == "fp16":
        code = x.to(tl.float16).to(tl.int16, bitcast=True)
    elif KIND == "fp32":
        code = x.to(tl.int32, bitcast=True)
    elif CONVERTS and KIND == "fp8_e4m3fn" and x.numel % 4 == 0:
        code = _convert_four("e4m3", x)
    elif CONVERTS and KIND == "fp8_e5m2" and x.numel % 4 == 0:
        code = _convert_four("e5m2", x)
    else:
        code = _encode_fp8(x, KIND)
    return code


@triton.jit
def _convert_four(TYPE: tl.constexpr, x):
    two: tl.constexpr = "cvt.rn.satfinite." + TYPE + "x2.f32 "
    return tl.inline_asm_elementwise(
        "{ .reg .b16 a, b; " + two + "a, $2, $1; " + two + "b, $4, $3; mov.b32 $0, {a, b}; }",
        "=r,f,f,f,f",
        [x],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _encode_fp8(x, KIND: tl.constexpr):
    DROP: tl.constexpr = 21 if KIND == "fp8_e5m2" else 20  # mantissa bits to round away
    BIAS: tl.constexpr = 15 if KIND == "fp8_e5m2" else (8 if KIND == "fp8_e4m3fnuz" else 7)
    MAX: tl.constexpr = 57344.0 if KIND == "fp8_e5m2" else (240.0 if KIND == "fp8_e4m3fnuz" else 448.0)
    NAN: tl.constexpr = 0x80 if KIND == "fp8_e4m3fnuz" else 0x7F
    STEP: tl.constexpr = (128 - BIAS + DROP) << 23  # a number whose last mantissa bit is worth a subnormal step
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), MAX)
    u = magnitude.to(tl.int32, bitcast=True)
    step = tl.full(x.shape, STEP, tl.int32).to(tl.float32, bitcast=True)
    small = (magnitude + step).to(tl.int32, bitcast=True) - STEP  # the addition does the rounding
    normal = ((u + ((1 << (DROP - 1)) - 1) + ((u >> DROP) & 1)) >> DROP) - ((127 - BIAS) << (23 - DROP))
    code = tl.where(u < ((128 - BIAS) << 23), small, normal)
    code = tl.where((code == 0) & (KIND == "fp8_e4m3fnuz"), 0, code | sign)  # FNUZ has no negative zero
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, NAN, code).to(tl.uint8)


@triton.jit
def power_of_two_above(x):
    """The least power of two that is at least x, which is normal; infinity stays."""
    return ((x.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)

"""Vector instructions: every active lane computes on its own values, perhaps with SDWA's parts or DPP's neighbours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from . import alu, convert
from .code_object import Instruction, Operand
from .crosslane import Neighbours
from .operands import (
    EXEC_OPERAND,
    Operation,
    Read,
    Step,
    Write,
    combine,
    evaluate,
    operation,
    read_vector,
    write_half,
    write_part,
    write_vector,
)
from .state import TYPES, unpack

Array = np.ndarray
Function = Callable[..., Any]

_KEPT = {"old": 0, "other": 1}  # number of the operand that is read before it is written
_IMPLICIT: dict[str, Read] = {"vcc": lambda state: unpack(state.vcc), "rng": lambda state: state.rng}


def find(instruction: Instruction, arch: str) -> Step | None:
    """The step that executes the instruction, if it is one of these."""
    name, encoding = re.fullmatch(r"(.*?)(?:_(e32|e64|sdwa|dpp))?", instruction.mnemonic).groups()  # type: ignore
    if name in _PACKED:
        return _compile_packed(instruction, name)
    what = operations(arch).get(name)
    if what and (name, encoding) == ("v_cndmask_b32", "sdwa"):  # moves parts of words, which nothing can negate
        what = replace(what, destinations=("u32",), sources=("u32", "u32", "mask"))
    return _compile(instruction, what, encoding) if what else None


def _compile(instruction: Instruction, what: Operation, encoding: str | None) -> Step:
    modifiers, operands, function = dict(instruction.modifiers), list(instruction.operands), what.function
    if function is alu.truth_table:
        function = alu.truth_table(modifiers.pop("bitop3", 0))
    if modifiers.pop("clamp", False):
        if what.destinations not in (("f32",), ("f16",), ("f64",)):
            raise instruction.unknown("clamp of an integer")
        function = lambda *sources: alu.clamp(what.function(*sources))  # noqa: E731
    neighbours = Neighbours.take(instruction, modifiers) if encoding == "dpp" else None
    if neighbours and "mask" in what.destinations:
        raise instruction.unknown("DPP that sets bits of lanes")
    part = modifiers.pop("dst_sel", "DWORD"), modifiers.pop("dst_unused", "UNUSED_PAD")
    selects = [modifiers.pop(f"src{i}_sel", "DWORD") for i in range(len(what.sources))]
    halves = modifiers.pop("op_sel", (0,))
    if modifiers:
        raise instruction.unknown(f"modifiers {modifiers}")

    writes: list[Write] = []
    for type_ in what.destinations:
        operand = EXEC_OPERAND if type_ == "exec" else operands.pop(0)
        if type_ in ("mask", "exec"):
            writes.append(write_vector(instruction, operand, "mask"))
        elif part[0] != "DWORD":
            writes.append(write_part(instruction, operand, *part))
        elif type_ == "half":
            writes.append(write_half(instruction, operand, halves[-1]))
        elif halves[-1]:
            raise instruction.unknown("half of a whole destination")
        else:
            writes.append(write_vector(instruction, operand, type_))
    reads: list[Read] = []
    for i, (type_, select) in enumerate(zip(what.sources, selects, strict=True)):
        half = i < len(halves) - 1 and halves[i]
        if half and TYPES[type_].itemsize != 2:
            raise instruction.unknown("half of a whole operand")
        if type_ in _IMPLICIT:
            reads.append(_IMPLICIT[type_])
        elif type_ in _KEPT:
            reads.append(read_vector(instruction, instruction.operands[_KEPT[type_]], what.destinations[0]))
        else:
            reads.append(read_vector(instruction, operands.pop(0), type_, "WORD_1" if half else select))
    if operands:
        raise instruction.unknown(f"{len(operands)} operands too many")
    if neighbours:
        reads[0] = neighbours.read(reads[0])
    step = combine(writes, reads, function)
    return neighbours.step(step) if neighbours else step


# ------------------------------------------------------------------------------------------------------ the table


def _reverse(function: Function) -> Function:
    """With the first two operands exchanged."""
    return lambda a, b, *others: function(b, a, *others)


def _twice(function: Function) -> Function:
    """The result for two destinations."""
    return lambda *sources: (function(*sources),) * 2


def _of_three(function: Function) -> Function:
    return lambda a, b, c: function(function(a, b), c)


def _product24(part: Function) -> Function:
    """Of the lower 24 bits: their product's lower or upper word."""

    def function(a: Array, b: Array) -> Array:
        unused = a.dtype.type(8)
        return part(alu.wide(a << unused >> unused) * alu.wide(b << unused >> unused))

    return function


def _align(unit: int) -> Function:
    """Of two words, those 32 bits that start so many units of bits further up."""

    def function(high: Array, low: Array, count: Array) -> Array:
        shift = (count & np.uint32(32 // unit - 1)) * np.uint32(unit)
        return alu.low_word((alu.wide(high) << np.uint64(32) | low) >> shift)

    return function


def _byte(index: int) -> Function:
    return lambda x: (x >> np.uint32(8 * index) & np.uint32(0xFF)).astype(np.float32)


# By signature, then by mnemonic without the encoding.
_TABLE: dict[str, dict[str, Function]] = {
    "u32 = u32": {"v_mov_b32": lambda a: a, "v_not_b32": np.invert, "v_bfrev_b32": alu.reverse_bits},
    "u64 = u64": {"v_mov_b64": lambda a: a},
    "u32 u32 = old other": {"v_swap_b32": lambda a, b: (b.copy(), a.copy())},
    "f32 = f32 f32 mask": {"v_cndmask_b32": lambda a, b, which: np.where(which, b, a)},  # moves bits, but knows neg
    "u32 = u32 u32": {
        "v_and_b32": np.bitwise_and,
        "v_or_b32": np.bitwise_or,
        "v_xor_b32": np.bitwise_xor,
        "v_xnor_b32": lambda a, b: ~(a ^ b),
        "v_bfm_b32": alu.mask,
        "v_bcnt_u32_b32": lambda a, b: np.bitwise_count(a) + b,
        "v_mbcnt_lo_u32_b32": lambda a, b: alu.lanes_below(a, b, 0),
        "v_mbcnt_hi_u32_b32": lambda a, b: alu.lanes_below(a, b, 32),
        "v_lshlrev_b32": _reverse(alu.shift_left),
        "v_lshrrev_b32": _reverse(alu.shift_right),
        "v_mul_lo_u32": np.multiply,
        "v_mul_hi_u32": lambda a, b: alu.high_word(alu.wide(a) * b),
        "v_mul_u32_u24": _product24(alu.low_word),
        "v_mul_hi_u32_u24": _product24(alu.high_word),
    },
    "u32 = u32 u32 u32": {
        "v_or3_b32": lambda a, b, c: a | b | c,
        "v_and_or_b32": lambda a, b, c: a & b | c,
        "v_bfi_b32": lambda a, b, c: a & b | ~a & c,
        "v_bfe_u32": lambda a, b, c: alu.bit_field(a, b, c & np.uint32(31)),
        "v_perm_b32": alu.permute_bytes,
        "v_alignbit_b32": _align(1),
        "v_alignbyte_b32": _align(8),
        "v_add3_u32": lambda a, b, c: a + b + c,
        "v_xad_u32": lambda a, b, c: (a ^ b) + c,
        "v_add_lshl_u32": lambda a, b, c: alu.shift_left(a + b, c),
        "v_lshl_add_u32": lambda a, b, c: alu.shift_left(a, b) + c,
        "v_lshl_or_b32": lambda a, b, c: alu.shift_left(a, b) | c,
        "v_mad_u32_u24": lambda a, b, c: _product24(alu.low_word)(a, b) + c,
    },
    "i32 = i32 i32": {
        "v_mul_hi_i32": lambda a, b: alu.high_word(alu.wide(a) * b),
        "v_mul_i32_i24": _product24(alu.low_word),
        "v_mul_hi_i32_i24": _product24(alu.high_word),
    },
    "i32 = i32 i32 i32": {"v_mad_i32_i24": lambda a, b, c: _product24(alu.low_word)(a, b) + c},
    "i32 = i32 u32 u32": {"v_bfe_i32": lambda a, b, c: alu.bit_field(a, b, c & np.uint32(31))},
    "i32 = u32 i32": {"v_ashrrev_i32": _reverse(alu.shift_right)},
    "i32 = u32": {"v_ffbl_b32": alu.lowest_one, "v_ffbh_u32": alu.highest_one},
    "i32 = i32": {"v_ffbh_i32": alu.highest_change},
    "u64 = u32 u64": {"v_lshlrev_b64": _reverse(alu.shift_left), "v_lshrrev_b64": _reverse(alu.shift_right)},
    "i64 = u32 i64": {"v_ashrrev_i64": _reverse(alu.shift_right)},
    "u16 = u16 u16": {
        "v_lshlrev_b16": _reverse(alu.shift_left),
        "v_lshrrev_b16": _reverse(alu.shift_right),
        "v_mul_lo_u16": np.multiply,
    },
    "i16 = u16 i16": {"v_ashrrev_i16": _reverse(alu.shift_right)},
    "u16 = u16 u16 u16": {"v_mad_legacy_u16": lambda a, b, c: a * b + c},
    "i16 = i16 i16 i16": {"v_mad_legacy_i16": lambda a, b, c: a * b + c},
    "u32 mask = u32 u32": {
        "v_add_co_u32": alu.add_carry,
        "v_sub_co_u32": alu.subtract_borrow,
        "v_subrev_co_u32": _reverse(alu.subtract_borrow),
    },
    "u32 mask = u32 u32 mask": {
        "v_addc_co_u32": alu.add_carry,
        "v_subb_co_u32": alu.subtract_borrow,
        "v_subbrev_co_u32": _reverse(alu.subtract_borrow),
    },
    "u64 = u64 u32 u64": {"v_lshl_add_u64": lambda a, b, c: alu.shift_left(a, b & np.uint32(7)) + c},
    "u64 mask = u32 u32 u64": {"v_mad_u64_u32": alu.multiply_add},
    "i64 mask = i32 i32 i64": {"v_mad_i64_i32": alu.multiply_add},
    "f32 = f32": {"v_frexp_mant_f32": alu.frexp_mantissa},
    "i32 = f32": {"v_frexp_exp_i32_f32": alu.frexp_exponent, "v_cvt_i32_f32": alu.saturate(TYPES["i32"])},
    "u32 = f32": {"v_cvt_u32_f32": alu.saturate(TYPES["u32"])},
    "f32 = f32 i32": {"v_ldexp_f32": alu.ldexp},
    "f32 = f32 f32": {"v_mul_legacy_f32": lambda a, b: np.where((a == 0) | (b == 0), np.float32(0), a * b)},
    "f32 = f32 f32 f32": {
        "v_fma_f32": alu.fma,
        "v_fmamk_f32": alu.fma,
        "v_fmaak_f32": alu.fma,
        "v_med3_f32": alu.median_float,
        "v_div_fixup_f32": alu.div_fixup,
    },
    "f32 = f32 f32 old": {"v_fmac_f32": alu.fma},
    "f32 mask = f32 f32 f32": {"v_div_scale_f32": alu.div_scale},
    "f32 = f32 f32 f32 vcc": {"v_div_fmas_f32": alu.div_fmas},
    "f32 = f32 rng": {
        "v_rcp_f32": alu.flushing(alu.approximation(np.reciprocal)),
        "v_rcp_iflag_f32": alu.flushing(alu.approximation(np.reciprocal)),
        "v_sqrt_f32": alu.approximation(np.sqrt),
        "v_rsq_f32": alu.flushing(alu.approximation(lambda x: np.reciprocal(np.sqrt(x)))),
        "v_exp_f32": alu.approximation(np.exp2),
        "v_log_f32": alu.approximation(np.log2),
    },
    "f16 = f32": {"v_cvt_f16_f32": convert.to_fp16},
    "u32 = f16 f16": {"v_pack_b32_f16": convert.pack_halves},
    "u32 = f32 f32": {"v_cvt_pkrtz_f16_f32": convert.pair(convert.to_fp16_towards_zero)},
    "f64 = f32": {"v_cvt_f64_f32": convert.to_fp64},
    "f64 = u32": {"v_cvt_f64_u32": convert.to_fp64},
    "f64 = i32": {"v_cvt_f64_i32": convert.to_fp64},
    "f32 = f64": {"v_cvt_f32_f64": convert.to_fp32},
    "f32 = f16": {"v_cvt_f32_f16": convert.to_fp32},
    "f32 = i32": {"v_cvt_f32_i32": convert.to_fp32},
    "f32 = u32": {"v_cvt_f32_u32": convert.to_fp32, **{f"v_cvt_f32_ubyte{i}": _byte(i) for i in range(4)}},
}

_GFX950: dict[str, dict[str, Function]] = {
    "u32 = u32 u32 u32": {"v_bitop3_b32": alu.truth_table},
    "half = u16 u16 u16": {"v_bitop3_b16": alu.truth_table},
    "u32 = f32 f32": {
        "v_cvt_pk_f16_f32": convert.pair(convert.to_fp16),
        "v_cvt_pk_bf16_f32": convert.pair(convert.to_bf16),
    },
    "f32 = u16": {"v_cvt_f32_bf16": convert.from_bf16},
}


def _families() -> Iterator[tuple[str, dict[str, Function]]]:
    """What there is for several types."""
    rounding = {"rndne": np.rint, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc}
    for type_ in ("u16", "i16", "u32", "i32", "f16", "f32", "f64"):
        is_float = type_[0] == "f"
        least, most = (alu.minimum, alu.maximum) if is_float else (np.minimum, np.maximum)
        two = {"add": np.add, "min": least, "max": most}
        two |= {"sub": np.subtract} if type_ != "f64" else {}
        two |= {"subrev": _reverse(np.subtract)} if type_ in ("u16", "u32", "f16", "f32") else {}
        two |= {"mul": np.multiply} if is_float else {}
        three = {"min3": _of_three(least), "max3": _of_three(most)} if type_[1:] == "32" else {}
        three |= {"med3": alu.median} if type_ in ("u32", "i32") else {}
        for functions, sources in ((rounding if is_float else {}, 1), (two, 2), (three, 3)):
            signature = f"{type_} = " + f"{type_} " * sources
            yield signature, {f"v_{name}_{type_}": function for name, function in functions.items()}


_INTEGER_COMPARISONS = ("lt", "eq", "le", "gt", "ne", "ge")
_FLOAT_COMPARISONS = ("lt", "eq", "le", "gt", "lg", "ge", "o", "u", "nge", "nlg", "ngt", "nle", "neq", "nlt")


def _comparisons() -> Iterator[tuple[str, dict[str, Function]]]:
    """v_cmp sets bits of lanes, v_cmpx those of EXEC as well."""
    for type_ in TYPES:
        names = _FLOAT_COMPARISONS if type_[0] == "f" else _INTEGER_COMPARISONS
        tests = [(f"{name}_{type_}", f"{type_} {type_}", alu.comparison(name)) for name in names]
        if type_[0] == "f":
            tests.append((f"class_{type_}", f"{type_} u32", alu.is_of_class))
        for name, sources, test in tests:
            yield f"mask = {sources}", {f"v_cmp_{name}": test}
            yield f"mask exec = {sources}", {f"v_cmpx_{name}": _twice(test)}


def _fp8(arch: str) -> Iterator[tuple[str, dict[str, Function]]]:
    for name, kind in convert.FP8_KINDS[arch].items():
        yield "half = f32 f32 rng", {f"v_cvt_pk_{name}_f32": convert.to_fp8_pair(kind)}
        yield "f32 = u32", {f"v_cvt_f32_{name}": convert.from_fp8(kind)}
        yield "u64 = u32", {f"v_cvt_pk_f32_{name}": convert.from_fp8_pair(kind)}


@cache
def operations(arch: str) -> dict[str, Operation]:
    """By mnemonic, without the encoding."""
    only = _GFX950 if arch == "gfx950" else {}
    tables = [*_TABLE.items(), *_families(), *_comparisons(), *only.items(), *_fp8(arch)]
    return {name: operation(signature, f) for signature, table in tables for name, f in table.items()}


# --------------------------------------------------------------------------------------------------- packed fp32

_PACKED: dict[str, tuple[str, Function]] = {
    "v_pk_add_f32": ("f32", np.add),
    "v_pk_mul_f32": ("f32", np.multiply),
    "v_pk_fma_f32": ("f32", alu.fma),
    "v_pk_mov_b32": ("u32", np.copy),
}


def _compile_packed(instruction: Instruction, name: str) -> Step:
    """Two computations on pairs: op_sel picks the words that the lower one reads, op_sel_hi the upper one's."""
    type_, function = _PACKED[name]
    modifiers, (destination, *sources) = dict(instruction.modifiers), instruction.operands
    words = [modifiers.pop("op_sel", (0, 0, 0)), modifiers.pop("op_sel_hi", (1, 1, 1))]
    negated = [modifiers.pop("neg_lo", (0, 0, 0)), modifiers.pop("neg_hi", (0, 0, 0))]
    if modifiers:
        raise instruction.unknown(f"modifiers {modifiers}")
    values, writes = [], []
    for half in (0, 1):
        picked = list(zip(sources, words[half], negated[half]))  # noqa: B905
        if name == "v_pk_mov_b32":  # the lower word comes from the first source, the upper one from the second
            picked = [(sources[half], words[0][half], 0)]
        operands = [replace(_word(instruction, source, word), neg=bool(negate)) for source, word, negate in picked]
        values.append(evaluate([read_vector(instruction, operand, type_) for operand in operands], function))
        writes.append(write_vector(instruction, _word(instruction, destination, half), type_))
    return combine(writes, values, lambda lower, upper: (lower, upper))


def _word(instruction: Instruction, operand: Operand, index: int) -> Operand:
    """One register of a pair. What a constant's upper word is depends on the chip; 0 is 0."""
    if operand.kind in ("v", "s") and operand.count == 2:
        return replace(operand, value=operand.value + index, count=1)
    if index and operand.value != 0:
        raise instruction.unknown("the upper word of a constant")
    return operand

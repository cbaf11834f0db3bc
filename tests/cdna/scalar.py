"""Scalar instructions: one value per wave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import alu
from .code_object import Instruction, Operand
from .operands import EXEC_OPERAND, Operation, Read, Step, Write, combine, operation, read_scalar, write_scalar
from .state import TYPES

Array = np.ndarray
Function = Callable[..., Any]


def find(instruction: Instruction, arch: str) -> Step | None:
    """The step that executes the instruction, if it is one of :data:`OPERATIONS`."""
    what = OPERATIONS.get(instruction.mnemonic)
    if what is None:
        return None
    if instruction.modifiers:
        raise instruction.unknown(f"modifiers {list(instruction.modifiers)}")
    operands = list(instruction.operands)
    writes = [_write(instruction, type_, operands) for type_ in what.destinations]
    reads = [_read(instruction, type_, operands, what) for type_ in what.sources]
    if operands:
        raise instruction.unknown(f"{len(operands)} operands too many")
    return combine(writes, reads, what.function)


def _write(instruction: Instruction, type_: str, operands: list[Operand]) -> Write:
    if type_ == "scc":
        return lambda state, value: np.copyto(state.scc, value)
    if type_ == "exec":
        return write_scalar(instruction, EXEC_OPERAND, "u64")
    return write_scalar(instruction, operands.pop(0), type_)


def _read(instruction: Instruction, type_: str, operands: list[Operand], what: Operation) -> Read:
    if type_ == "scc":
        return lambda state: state.scc
    if type_ == "exec":
        return read_scalar(instruction, EXEC_OPERAND, "u64")
    if type_ == "old":
        return read_scalar(instruction, instruction.operands[0], what.destinations[0])
    operand = operands.pop(0)
    if type_.endswith("_k"):
        value = np.array([operand.value & 0xFFFF], np.uint16)
        value = value.view(np.int16).astype(np.int32) if type_ == "signed_k" else value.astype(np.uint32)
        return lambda state: value
    return read_scalar(instruction, operand, type_)


# ------------------------------------------------------------------------------------------------------ the table


def _flagged(function: Function) -> Function:
    """With SCC: whether the result is not 0."""

    def both(*sources: Array) -> tuple[Array, Array]:
        result = function(*sources)
        return result, result != 0

    return both


def _shift_add(shift: int) -> Function:
    def both(a: Array, b: Array) -> tuple[Array, Array]:
        total = (alu.wide(a) << np.uint64(shift)) + b
        return alu.low_word(total), alu.high_word(total) != 0

    return both


def _field(value: Array, field: Array) -> Array:
    """Where it starts in the lower bits, how wide it is from bit 16 on."""
    return alu.bit_field(value, field, field >> np.uint32(16) & np.uint32(0x7F))


def _pack(first: int, second: int) -> Function:
    """Two halves of words."""

    def pack(a: Array, b: Array) -> Array:
        a, b = a >> np.uint32(16 * first), b >> np.uint32(16 * second)
        return a & np.uint32(0xFFFF) | b << np.uint32(16)

    return pack


def _count(x: Array) -> Array:
    return np.bitwise_count(x).astype(np.int32)


_LOGIC: dict[str, Function] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
_EXEC_LOGIC: dict[str, Function] = {**_LOGIC, "andn1": lambda a, b: ~a & b, "orn1": lambda a, b: ~a | b}


def _on_exec(function: Function, saves: bool) -> Function:
    """The new EXEC; the destination gets the old one, or the new one as well."""

    def all_three(source: Array, exec_mask: Array) -> tuple[Array, Array, Array]:
        result = function(source, exec_mask)
        return exec_mask.copy() if saves else result, result, result != 0

    return all_three


# By signature, then by mnemonic.
_TABLE: dict[str, dict[str, Function]] = {
    "u32 scc = u32 u32": {
        "s_add_u32": alu.add_carry,
        "s_sub_u32": alu.subtract_borrow,
        **{f"s_lshl{n}_add_u32": _shift_add(n) for n in (1, 2, 3, 4)},
    },
    "u32 scc = u32 u32 scc": {"s_addc_u32": alu.add_carry, "s_subb_u32": alu.subtract_borrow},
    "u32 = u32 u32": {
        "s_mul_hi_u32": lambda a, b: alu.high_word(alu.wide(a) * b),
        "s_pack_ll_b32_b16": _pack(0, 0),
        "s_pack_lh_b32_b16": _pack(0, 1),
        "s_pack_hh_b32_b16": _pack(1, 1),
    },
    "i32 scc = i32 i32": {
        "s_add_i32": alu.overflowing(np.add),
        "s_sub_i32": alu.overflowing(np.subtract),
        "s_absdiff_i32": _flagged(lambda a, b: np.abs(a - b)),
    },
    "i32 = i32 i32": {"s_mul_i32": np.multiply, "s_mul_hi_i32": lambda a, b: alu.high_word(alu.wide(a) * b)},
    "i32 scc = i32": {"s_abs_i32": _flagged(np.abs)},
    "i32 = i32": {
        "s_sext_i32_i8": lambda a: a.astype(np.int8).astype(np.int32),
        "s_sext_i32_i16": lambda a: a.astype(np.int16).astype(np.int32),
        "s_flbit_i32": alu.highest_change,
    },
    "i32 = i64": {"s_flbit_i32_i64": alu.highest_change},
    "i32 = signed_k": {"s_movk_i32": lambda k: k},
    "i32 = signed_k old scc": {"s_cmovk_i32": lambda k, old, scc: np.where(scc, k, old)},
    "i32 scc = old signed_k": {"s_addk_i32": alu.overflowing(np.add)},
    "i32 = old signed_k": {"s_mulk_i32": np.multiply},
    "scc = u64 u64": {"s_cmp_eq_u64": np.equal, "s_cmp_lg_u64": np.not_equal},
    "u64 exec scc = u64 exec": {
        **{f"s_{name}_saveexec_b64": _on_exec(function, saves=True) for name, function in _EXEC_LOGIC.items()},
        **{f"s_{name}_wrexec_b64": _on_exec(_EXEC_LOGIC[name], saves=False) for name in ("andn1", "andn2")},
    },
}


def _by_size(bits: int) -> Iterator[tuple[str, dict[str, Function]]]:
    """What there is for 32 and for 64 bits."""
    u, i, b = f"u{bits}", f"i{bits}", f"b{bits}"
    one = TYPES[u].type(1)
    yield f"{u} = {u}", {f"s_mov_{b}": lambda a: a, f"s_brev_{b}": alu.reverse_bits}
    yield f"{u} = {u} old scc", {f"s_cmov_{b}": lambda a, old, scc: np.where(scc, a, old)}
    yield f"{u} = {u} {u} scc", {f"s_cselect_{b}": lambda a, b, scc: np.where(scc, a, b)}
    yield f"{u} scc = {u}", {f"s_not_{b}": _flagged(np.invert)}
    yield f"{u} scc = {u} {u}", {f"s_{name}_{b}": _flagged(function) for name, function in _LOGIC.items()}
    shifts = {f"s_lshl_{b}": alu.shift_left, f"s_lshr_{b}": alu.shift_right, f"s_bfe_{u}": _field}
    yield f"{u} scc = {u} u32", {name: _flagged(function) for name, function in shifts.items()}
    yield f"{i} scc = {i} u32", {f"s_ashr_{i}": _flagged(alu.shift_right), f"s_bfe_{i}": _flagged(_field)}
    yield f"{u} = u32 u32", {f"s_bfm_{b}": lambda width, offset: alu.mask(width.astype(TYPES[u]), offset)}
    yield f"scc = {u} u32", {f"s_bitcmp0_{b}": lambda a, n: ~alu.bit(a, n), f"s_bitcmp1_{b}": alu.bit}
    yield (
        f"{u} = u32 old",
        {
            f"s_bitset0_{b}": lambda n, old: old & ~alu.shift_left(np.full_like(old, one), n),
            f"s_bitset1_{b}": lambda n, old: old | alu.shift_left(np.full_like(old, one), n),
        },
    )
    counts = {f"s_bcnt0_i32_{b}": lambda a: _count(~a), f"s_bcnt1_i32_{b}": _count}
    yield f"i32 scc = {u}", {name: _flagged(function) for name, function in counts.items()}
    yield (
        f"i32 = {u}",
        {
            f"s_ff0_i32_{b}": lambda a: alu.lowest_one(~a),
            f"s_ff1_i32_{b}": alu.lowest_one,
            f"s_flbit_i32_{b}": alu.highest_one,
        },
    )


def _ordered() -> Iterator[tuple[str, dict[str, Function]]]:
    for type_, k in (("u32", "unsigned_k"), ("i32", "signed_k")):
        extremes = {"min": lambda a, b: (np.minimum(a, b), a < b), "max": lambda a, b: (np.maximum(a, b), a >= b)}
        yield f"{type_} scc = {type_} {type_}", {f"s_{name}_{type_}": both for name, both in extremes.items()}
        tests = {name: alu.comparison(name) for name in ("eq", "lg", "gt", "ge", "lt", "le")}
        yield f"scc = {type_} {type_}", {f"s_cmp_{name}_{type_}": test for name, test in tests.items()}
        yield f"scc = {type_} {k}", {f"s_cmpk_{name}_{type_}": test for name, test in tests.items()}


OPERATIONS = {
    mnemonic: operation(signature, function)
    for signature, functions in [*_TABLE.items(), *_by_size(32), *_by_size(64), *_ordered()]
    for mnemonic, function in functions.items()
}

"""Operands, resolved once into functions that read or write them, and instructions made of such.

An instruction is described by a signature and a function of arrays, for instance `"u32 mask = u32 u32"` and one that
gives sum and carry. A type is one of :data:`cdna.state.TYPES` or

- mask: one bit per lane, in two scalar registers, as bool;
- half: 16 bits, of which the destination's other half is kept;
- scc, vcc, exec: these registers, which are not among the operands of the text; vcc by lanes;
- old, other: what the first or second destination held before, as the first one's type;
- signed_k, unsigned_k: a 16-bit constant, extended to 32 bits;
- rng: the machine's random numbers.

Scalar operands are arrays [waves], or [1] for constants; vector operands [waves, 64], or [waves, 1] for a scalar
register, or [1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .code_object import Instruction, Operand
from .state import EXEC, LANES, TYPES, State, pack, unpack

Step = Callable[[State], None]
Read = Callable[[State], Any]
Write = Callable[[State, Any], None]

U16, U32, U64 = np.uint16, np.uint32, np.uint64


@dataclass(frozen=True)
class Operation:
    """What an instruction does: from values of ``sources`` to those of ``destinations``."""

    destinations: tuple[str, ...]
    sources: tuple[str, ...]
    function: Callable[..., Any]


def operation(signature: str, function: Callable[..., Any]) -> Operation:
    """For example ``operation("u32 scc = u32 u32", ...)``."""
    destinations, sources = signature.split("=")
    return Operation(tuple(destinations.split()), tuple(sources.split()), function)


def evaluate(reads: list[Read], function: Callable[..., Any]) -> Callable[[State], Any]:
    """The function of what is read."""
    if len(reads) == 1:
        (first,) = reads
        return lambda state: function(first(state))
    if len(reads) == 2:
        first, second = reads
        return lambda state: function(first(state), second(state))
    return lambda state: function(*[read(state) for read in reads])


def combine(writes: list[Write], reads: list[Read], function: Callable[..., Any]) -> Step:
    """The step that reads, computes and writes."""
    value = evaluate(reads, function)
    if len(writes) == 1:
        (write,) = writes
        return lambda state: write(state, value(state))

    def step(state: State) -> None:
        for write, result in zip(writes, value(state), strict=True):
            write(state, result)

    return step


# ----------------------------------------------------------------------------------------------- constants, scalars


@cache
def constant(operand: Operand, type_: str) -> np.ndarray:
    """[1]: the bits that the hardware puts in place of a constant, for an operand of that type.

    An integer is the same number in 16, 32 and 64 bits; a float is one of 16, 32 or 64 bits, whatever the instruction
    makes of the bits. A literal has 32 bits: the upper half of a double, the lower half of other 64 bits.
    """
    dtype = TYPES[type_]
    bits = 8 * dtype.itemsize
    value = operand.value
    if operand.kind == "float":
        return np.array([value], f"f{dtype.itemsize}").view(dtype)
    if operand.literal and type_ == "f64":
        value <<= 32
    if operand.literal and type_ == "i64" and value >> 31:
        value -= 1 << 32
    return np.array([value & ((1 << bits) - 1)], f"u{dtype.itemsize}").view(dtype)


_WORDS: dict[str, Read] = {
    "src_scc": lambda state: state.scc.astype(U32),
    "src_vccz": lambda state: (state.vcc == 0).astype(U32),
    "src_execz": lambda state: (state.exec_mask == 0).astype(U32),
}


def scalar_register(instruction: Instruction, operand: Operand, type_: str) -> int:
    """Its column in ``state.scalars[type_]``."""
    size = TYPES[type_].itemsize
    if operand.kind != "s" or operand.count * 4 != size or operand.value % operand.count:
        raise instruction.unknown(f"expected a scalar register of {size} bytes: {operand}")
    return operand.value // operand.count


def read_scalar(instruction: Instruction, operand: Operand, type_: str) -> Read:
    """[waves], or [1] for a constant."""
    if operand.neg or operand.abs or operand.sext:
        raise instruction.unknown("a modifier on a scalar operand")
    if operand.kind in ("integer", "float"):
        value = constant(operand, type_)
        return lambda state: value
    if operand.kind == "word" and operand.value in _WORDS and type_ in ("u32", "i32"):
        read = _WORDS[operand.value]
        return lambda state: read(state).view(TYPES[type_])
    column = scalar_register(instruction, operand, type_)
    return lambda state: state.scalars[type_][:, column]


def write_scalar(instruction: Instruction, operand: Operand, type_: str) -> Write:
    """Takes [waves] or [1]."""
    column = scalar_register(instruction, operand, type_)
    changes_exec = operand.value >= EXEC

    def write(state: State, value: np.ndarray) -> None:
        np.copyto(state.scalars[type_][:, column], value)
        if changes_exec:
            state.exec_changed()

    return write


# --------------------------------------------------------------------------------------------------------- vectors

_SELECTIONS = {"DWORD": (32, 0), **{f"BYTE_{i}": (8, i) for i in range(4)}, **{f"WORD_{i}": (16, i) for i in range(2)}}


def selection(instruction: Instruction, name: str) -> tuple[int, int]:
    """Width in bits, and which of that width, for an SDWA selector."""
    if name not in _SELECTIONS:
        raise instruction.unknown(f"the selector {name}")
    return _SELECTIONS[name]


def read_vector(instruction: Instruction, operand: Operand, type_: str, select: str = "DWORD") -> Read:
    """[waves, 64], with what SDWA selects of 32 bits and the modifiers applied."""
    if type_ == "mask":
        bits = read_scalar(instruction, operand, "u64")
        return lambda state: unpack(bits(state))
    width, index = selection(instruction, select)
    read = _read_lanes(instruction, operand, type_, width, index)
    if not (operand.neg or operand.abs):
        return read
    if type_[0] != "f":
        raise instruction.unknown("abs or neg of an integer")
    if operand.neg and operand.abs:
        return lambda state: np.negative(np.abs(read(state)))
    function = np.negative if operand.neg else np.abs
    return lambda state: function(read(state))


def _read_lanes(instruction: Instruction, operand: Operand, type_: str, width: int, index: int) -> Read:
    dtype = TYPES[type_]
    bits = 8 * dtype.itemsize
    if width < min(bits, 32):  # zero- or sign-extended
        if bits > 32 or type_[0] == "f":
            raise instruction.unknown(f"a part of an operand of type {type_}")
        part = ("i" if operand.sext else "u") + str(width // 8)
        whole = _read_lanes(instruction, _plain(operand), "u32", 32, 0)
        return lambda state: _part(whole(state), part, index).astype(dtype)
    if operand.kind == "v" and operand.count * 32 == max(bits, 32):
        row = operand.value
        if bits == 16:
            first = index if width == 16 else 0
            return lambda state: state.vectors[type_][row, :, first::2]
        if bits == 32:
            return lambda state: state.vectors[type_][row]
        return lambda state: join_words(state.vectors["u32"][row], state.vectors["u32"][row + 1]).view(dtype)
    if bits == 16 and operand.kind == "s":
        read = read_scalar(instruction, _plain(operand), "u32")
        first = index if width == 16 else 0
        return lambda state: _part(read(state)[:, None], dtype.str, first)
    if operand.kind in ("integer", "float"):
        value = constant(_plain(operand), type_)[:, None]
        return lambda state: value
    read = read_scalar(instruction, _plain(operand), type_)
    return lambda state: read(state)[:, None]


def _plain(operand: Operand) -> Operand:
    return Operand(operand.kind, operand.value, operand.count, operand.literal)


def _part(words: np.ndarray, dtype: str, index: int) -> np.ndarray:
    """The ``index``-th part of every word."""
    return np.ascontiguousarray(words).view(dtype)[:, index :: 4 // np.dtype(dtype).itemsize]


def join_words(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """uint64 of two uint32."""
    words = np.empty((*low.shape, 2), U32)
    words[..., 0], words[..., 1] = low, high
    return words.view(U64)[..., 0]


def write_vector(instruction: Instruction, operand: Operand, type_: str) -> Write:
    """Writes the active lanes; what is shorter than a register is zero-extended, but for `half`."""
    if type_ == "mask":
        column = scalar_register(instruction, operand, "u64")
        changes_exec = operand.value == EXEC

        def write_mask(state: State, value: np.ndarray) -> None:
            state.scalars["u64"][:, column] = pack_active(state, value)
            if changes_exec:
                state.exec_changed()

        return write_mask
    if type_ == "half":
        return write_half(instruction, operand, 0)
    dtype = TYPES[type_]
    row = operand.value
    if operand.kind != "v" or operand.count * 4 != max(dtype.itemsize, 4):
        raise instruction.unknown(f"expected a vector register of {dtype.itemsize} bytes: {operand}")
    if dtype.itemsize == 4:
        return lambda state, value: np.copyto(state.vectors[type_][row], value, where=state.active)
    if dtype.itemsize == 2:
        return lambda state, value: np.copyto(state.vectors["u32"][row], value.view(U16), where=state.active)

    def write_pair(state: State, value: np.ndarray) -> None:
        words = np.ascontiguousarray(value.astype(dtype, copy=False)).view(U32)
        np.copyto(state.vectors["u32"][row], words[:, 0::2], where=state.active)
        np.copyto(state.vectors["u32"][row + 1], words[:, 1::2], where=state.active)

    return write_pair


def write_half(instruction: Instruction, operand: Operand, index: int) -> Write:
    """Writes one half of the register and keeps the other."""
    if operand.kind != "v" or operand.count != 1:
        raise instruction.unknown(f"expected a vector register: {operand}")
    row = operand.value
    return lambda state, value: np.copyto(state.vectors["u16"][row, :, index::2], value.view(U16), where=state.active)


def write_part(instruction: Instruction, operand: Operand, select: str, unused: str) -> Write:
    """Writes what SDWA selects of the register; the rest becomes 0, or the sign above it, or is kept."""
    if operand.kind != "v" or operand.count != 1 or unused not in ("UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE"):
        raise instruction.unknown(f"a part of {operand}, {unused}")
    width, index = selection(instruction, select)
    unsigned, signed = f"u{width // 8}", f"i{width // 8}"
    step, row = 32 // width, operand.value

    def write(state: State, value: np.ndarray) -> None:
        register = state.vectors["u32"][row]
        part = value.view(f"u{value.itemsize}").astype(unsigned)
        words = register.copy() if unused == "UNUSED_PRESERVE" else np.zeros_like(register)
        if unused == "UNUSED_SEXT":
            words[...] = part.view(signed).astype(np.int32).view(U32) << U32(width * index)
        words.view(unsigned)[:, index::step] = part
        np.copyto(register, words, where=state.active)

    return write


def pack_active(state: State, lanes: np.ndarray) -> np.ndarray:
    """uint64 [waves]: bits of bool [waves, 64], 0 where a lane is not active."""
    lanes = lanes & state.active
    return pack(lanes if lanes.shape[1] == LANES else np.broadcast_to(lanes, (state.waves, LANES)))


EXEC_OPERAND = Operand("s", EXEC, 2)

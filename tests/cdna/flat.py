"""Instructions that access memory: scalar loads, global, flat and buffer accesses, and the LDS."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .code_object import Instruction, Operand
from .errors import MemoryFault
from .operands import Read, Step, read_scalar, read_vector
from .state import LANES, M0, State


class _Shape(NamedTuple):
    """What is accessed: elements of a type, ``count`` of them; ``half`` of the register, if not all of it."""

    type: np.dtype
    count: int = 1
    half: int | None = None


def _shapes() -> dict[str, dict[str, _Shape]]:
    """By verb and by what follows it."""
    words = {count: _Shape(np.dtype("u4"), count) for count in (1, 2, 3, 4)}
    dwords = {"dword" if count == 1 else f"dwordx{count}": shape for count, shape in words.items()}
    bits = {f"b{32 * count}": shape for count, shape in words.items()}
    types = {"ubyte": "u1", "sbyte": "i1", "ushort": "u2", "sshort": "i2", "byte": "u1", "short": "u2"}
    types |= {"u8": "u1", "i8": "i1", "u16": "u2", "i16": "i2", "b8": "u1", "b16": "u2"}
    short = {name: _Shape(np.dtype(type_)) for name, type_ in types.items()}
    halves = {"": None, "_d16": 0, "_d16_hi": 1}
    short = {name + suffix: s._replace(half=half) for name, s in short.items() for suffix, half in halves.items()}
    high = {name: shape for name, shape in short.items() if shape.half != 0}
    return {"load": dwords | short, "read": bits | short, "store": dwords | high, "write": bits | high}


_SHAPES = _shapes()
_OFF, _ZERO = Operand("word", "off"), Operand("integer", 0)


def find(instruction: Instruction, arch: str) -> Step | None:
    """The step that executes the instruction, if it is one of these."""
    match = re.fullmatch(r"(s|global|flat|buffer|ds)_(load|store|read|write)(2|2st64)?_(\w+)", instruction.mnemonic)
    if not match:
        return None
    kind, verb, twice, name = match.groups()
    if kind == "s" and verb == "load" and (size := re.fullmatch(r"dword(?:x(\d+))?", name)):
        return _scalar_load(instruction, int(size[1] or 1))
    shape = _SHAPES[verb].get(name)
    if not shape or kind == "s" or (kind == "ds") != (verb in ("read", "write")):
        return None
    if kind == "ds":
        return _local(instruction, verb, shape, twice)
    return (_buffer if kind == "buffer" else _global)(instruction, verb, shape)


def _modifiers(instruction: Instruction, **defaults: int | bool) -> dict[str, int]:
    if unknown := set(instruction.modifiers) - set(defaults):
        raise instruction.unknown(f"modifiers {unknown}")
    return defaults | instruction.modifiers


def _sum(constant: int, *parts: Read) -> Read:
    """The address: 64 bits, modulo 2**64."""
    start = np.uint64(constant % 2**64)

    def address(state: State) -> np.ndarray:
        total = start + parts[0](state)
        for part in parts[1:]:
            total = total + part(state)
        return total

    return address


def _scalar_load(instruction: Instruction, count: int) -> Step:
    to, base, offset = instruction.operands
    constant = _modifiers(instruction, offset=0)["offset"]
    if to.kind != "s" or to.count != count or to.value + count > M0:
        raise instruction.unknown(f"expected {count} scalar registers: {to}")
    columns = slice(to.value, to.value + count)
    start = read_scalar(instruction, base, "u64")
    if offset.kind == "integer":
        address = _sum(constant + offset.value, start)
    else:
        address = _sum(constant, start, read_scalar(instruction, offset, "u32"))

    def step(state: State) -> None:
        try:
            values = state.memory.load(address(state), 4, count)
        except MemoryFault as fault:
            raise _located(fault, instruction, state, fault.index * LANES) from None
        state.scalars["u32"][:, columns] = values.T

    return step


def _global(instruction: Instruction, verb: str, shape: _Shape) -> Step:
    """An address is a vector register pair, or a scalar one and a vector register; and a constant."""
    offset = _modifiers(instruction, offset=0, nt=False, sc0=False, sc1=False)["offset"]
    operands = list(instruction.operands)
    data = operands.pop(0 if verb == "load" else 1)
    vector, scalar = operands if instruction.mnemonic.startswith("global") else (*operands, _OFF)
    if scalar == _OFF:
        address = _sum(offset, read_vector(instruction, vector, "u64"))
    else:
        address = _sum(offset, read_vector(instruction, scalar, "u64"), read_vector(instruction, vector, "u32"))
    return _transfer(instruction, verb == "load", lambda state: state.memory, [(address, data, shape)])


_RAW = 0x27000  # the last word of a resource that is raw: elements of 32 bits, nothing added for the lane


def _buffer(instruction: Instruction, verb: str, shape: _Shape) -> Step:
    """An address is a resource's base (four scalar registers) and a scalar offset, a vector one, and a constant.

    The last two are held against the resource's size less the scalar offset: past it loads give 0, stores do nothing.
    """
    modifiers = _modifiers(instruction, offset=0, offen=False, nt=False, sc0=False, sc1=False)
    data, vector, resource, scalar = instruction.operands
    if resource.kind != "s" or resource.count != 4 or (vector == _OFF) == modifiers["offen"]:
        raise instruction.unknown("expected a resource, and an offset register where there is to be one")
    words = slice(resource.value, resource.value + 4)
    scalar_offset = read_scalar(instruction, scalar, "u32")
    offset = _sum(modifiers["offset"], read_vector(instruction, vector if modifiers["offen"] else _ZERO, "u32"))

    def address(state: State) -> np.ndarray:
        low, high = state.scalars["u32"][:, words].astype(np.uint64).T[:2]
        start = (low | high << np.uint64(32)) + scalar_offset(state)
        return np.broadcast_to(start[:, None] + offset(state), (state.waves, LANES))

    transfer = _transfer(instruction, verb == "load", lambda state: state.memory, [(address, data, shape)])

    def step(state: State) -> None:
        _, high, size, last = state.scalars["u32"][:, words].T
        if (high >> np.uint32(16)).any() or (last != _RAW).any() or (scalar_offset(state) > size).any():
            raise instruction.unknown("a resource that is not raw, or an offset past its end")
        first, end = offset(state), (size - scalar_offset(state)).astype(np.uint64)[:, None]
        active, inside = state.exec_lanes(), first < end
        if (active & inside & (first + np.uint64(shape.type.itemsize * shape.count) > end)).any():
            raise instruction.unknown("an access across the end")
        if verb == "load":
            for row in range(data.value, data.value + data.count):
                whole = state.vectors["u32"][row]
                register = whole if shape.half is None else state.vectors["u16"][row, :, shape.half :: 2]
                np.copyto(register, 0, where=active & ~inside)
        state.active = active & inside
        try:
            transfer(state)
        finally:
            state.exec_changed()

    return step


def _local(instruction: Instruction, verb: str, shape: _Shape, twice: str | None) -> Step:
    """One access, or two whose offsets count elements, or 64 of them."""
    offsets = _modifiers(instruction, **({"offset0": 0, "offset1": 0} if twice else {"offset": 0}))
    unit = shape.type.itemsize * shape.count * (64 if twice == "2st64" else 1) if twice else 1
    operands = list(instruction.operands)
    base = read_vector(instruction, operands.pop(1 if verb == "read" else 0), "u32")
    accesses = []
    for i, offset in enumerate(offsets.values()):
        data = operands[0 if verb == "read" else i]
        if twice and verb == "read":
            data = replace(data, value=data.value + i * shape.count, count=data.count // 2)
        accesses.append((_sum(offset * unit, _block_base, base), data, shape))
    return _transfer(instruction, verb == "read", lambda state: state.local, accesses)


def _block_base(state: State) -> np.ndarray:
    """Where the LDS of a wave's block starts, as :class:`cdna.memory.LocalMemory` counts."""
    return state.blocks.astype(np.uint64)[:, None] << np.uint64(40)


def _transfer(
    instruction: Instruction,
    loads: bool,
    space: Callable[[State], Any],
    accesses: list[tuple[Read, Operand, _Shape]],
) -> Step:
    """Loads or stores the registers of the active lanes, in one or two accesses."""
    for _, data, shape in accesses:
        if data.kind != "v" or data.count != shape.count:
            raise instruction.unknown(f"expected {shape.count} vector registers: {data}")

    def step(state: State) -> None:
        lanes = slice(None) if state.active is True else np.flatnonzero(state.active)
        addresses = [address(state).reshape(-1)[lanes] for address, _, _ in accesses]
        if not addresses[0].size:
            return
        try:
            for at, (_, data, shape) in zip(addresses, accesses, strict=True):
                registers = state.vectors["u32"][data.value : data.value + data.count].reshape(data.count, -1)
                access(space(state), at, registers, lanes, shape)
        except MemoryFault as fault:
            lane = np.arange(state.waves * LANES)[lanes][fault.index]
            raise _located(fault, instruction, state, lane) from None

    access = _load if loads else _store
    return step


def _load(memory: Any, addresses: np.ndarray, registers: np.ndarray, lanes: Any, shape: _Shape) -> None:
    values = memory.load(addresses, shape.type.itemsize, shape.count).view(shape.type)
    if shape.half is None:
        registers[:, lanes] = values.astype(f"{shape.type.kind}4").view(np.uint32)
    else:
        halves = registers.view(np.uint16)[:, shape.half :: 2]
        halves[:, lanes] = values.astype(f"{shape.type.kind}2").view(np.uint16)


def _store(memory: Any, addresses: np.ndarray, registers: np.ndarray, lanes: Any, shape: _Shape) -> None:
    values = registers[:, lanes] >> np.uint32(16 * (shape.half or 0))
    memory.store(addresses, shape.type.itemsize, values.astype(shape.type))


def _located(fault: MemoryFault, instruction: Instruction, state: State, lane: int) -> MemoryFault:
    wave, lane = divmod(int(lane), LANES)
    place = f"block {state.blocks[wave]}, wave {state.waves_in_block[wave]}, lane {lane}"
    fault.where = f"{state.kernel} at {instruction.address:#x}: {instruction.text}: {place}: "
    return fault

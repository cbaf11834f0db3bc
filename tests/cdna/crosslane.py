"""Instructions whose lanes read other lanes: DPP, swizzles, permutations, and moves between lanes and scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .code_object import Instruction, Operand
from .operands import Read, Step, read_scalar, write_scalar, write_vector
from .state import LANES, State

_LANE = np.arange(LANES)
_ROW, _IN_ROW = _LANE & ~15, _LANE & 15

# ------------------------------------------------------------------------------------------------------------- DPP

# For each control: the lane that a lane reads, given the modifier's value; -1 where there is none.
_CONTROLS: dict[str, Callable[[Any], np.ndarray]] = {
    "quad_perm": lambda order: (_LANE & ~3) + np.array(order)[_LANE & 3],
    "row_shl": lambda n: np.where(_IN_ROW + n < 16, _LANE + n, -1),
    "row_shr": lambda n: np.where(n <= _IN_ROW, _LANE - n, -1),
    "row_ror": lambda n: _ROW + (_IN_ROW - n) % 16,
    "row_mirror": lambda _: _ROW + 15 - _IN_ROW,
    "row_half_mirror": lambda _: (_LANE & ~7) + 7 - (_LANE & 7),
    "row_newbcast": lambda n: _ROW + n,
    "row_bcast": lambda n: np.where(n < _LANE, (_LANE & ~n) - 1, -1),
    "wave_shl": lambda n: np.where(_LANE + n < LANES, _LANE + n, -1),
    "wave_shr": lambda n: _LANE - n,
    "wave_rol": lambda n: (_LANE + n) % LANES,
    "wave_ror": lambda n: (_LANE - n) % LANES,
}


class Neighbours:
    """Data parallel primitives: the first source comes from another lane, and rows and banks may be left out.

    A lane whose source is missing or not active reads 0 if bound_ctrl is set, and is not written otherwise.
    """

    def __init__(self, control: str, value: Any, row_mask: int, bank_mask: int, bound_ctrl: bool):
        lanes = _CONTROLS[control](value)
        self._lanes, self._exists = np.maximum(lanes, 0), lanes >= 0
        self._enabled = (row_mask >> (_LANE >> 4) & bank_mask >> (_LANE >> 2 & 3) & 1) != 0
        self._zero_fills = bound_ctrl

    @staticmethod
    def take(instruction: Instruction, modifiers: dict[str, Any]) -> Neighbours:
        """Removes from the modifiers what is DPP's."""
        controls = [name for name in modifiers if name in _CONTROLS]
        if len(controls) != 1:
            raise instruction.unknown("the DPP control")
        masks = modifiers.pop("row_mask", 15), modifiers.pop("bank_mask", 15)
        # Either value of bound_ctrl in the text is the set bit.
        bound_ctrl = modifiers.pop("bound_ctrl", None) is not None
        return Neighbours(controls[0], modifiers.pop(controls[0]), *masks, bound_ctrl)

    def _valid(self, state: State) -> np.ndarray:
        return self._exists & state.exec_lanes()[:, self._lanes]

    def read(self, read: Read) -> Read:
        """What reads its source where the control says."""

        def neighbour(state: State) -> np.ndarray:
            value = read(state)
            return np.where(self._valid(state), value[:, self._lanes], value.dtype.type(0))

        return neighbour

    def step(self, step: Step) -> Step:
        """What writes only where there is something to write."""

        def masked(state: State) -> None:
            enabled = self._enabled if self._zero_fills else self._enabled & self._valid(state)
            state.active = state.exec_lanes() & enabled
            try:
                step(state)
            finally:
                state.exec_changed()

        return masked


# ---------------------------------------------------------------------------------------------- lanes and scalars


def _readlane(instruction: Instruction) -> Step:
    to, source, lane = instruction.operands
    read, select = _vector(instruction, source), read_scalar(instruction, lane, "u32")
    write = write_scalar(instruction, to, "u32")

    def step(state: State) -> None:
        lanes = np.broadcast_to(select(state) & np.uint32(63), state.waves)
        write(state, read(state)[np.arange(state.waves), lanes])

    return step


def _readfirstlane(instruction: Instruction) -> Step:
    to, source = instruction.operands
    read, write = _vector(instruction, source), write_scalar(instruction, to, "u32")

    def step(state: State) -> None:
        first = np.argmax(state.exec_lanes(), axis=1)  # 0 where no lane is active, which is right
        write(state, read(state)[np.arange(state.waves), first])

    return step


def _writelane(instruction: Instruction) -> Step:
    """Whether the lane is active does not matter."""
    to, source, lane = instruction.operands
    register = _vector(instruction, to)
    value, select = (read_scalar(instruction, operand, "u32") for operand in (source, lane))

    def step(state: State) -> None:
        lanes = np.broadcast_to(select(state) & np.uint32(63), state.waves)
        register(state)[np.arange(state.waves), lanes] = value(state)

    return step


def _swap(rows: int) -> Callable[[Instruction], Step]:
    """Odd rows of ``rows`` lanes of the first register against even rows of the second, active or not."""

    def build(instruction: Instruction) -> Step:
        first, second = (_vector(instruction, operand) for operand in instruction.operands)

        def step(state: State) -> None:
            odd = first(state).reshape(state.waves, -1, 2, rows)[:, :, 1]
            even = second(state).reshape(state.waves, -1, 2, rows)[:, :, 0]
            odd[...], even[...] = even.copy(), odd.copy()

        return step

    return build


# ------------------------------------------------------------------------------------- through the LDS's crossbar


def _swizzle(instruction: Instruction) -> Step:
    lanes = _swizzle_lanes(instruction)
    to, source = instruction.operands
    return _gather(instruction, to, source, lambda state: lanes)


def _swizzle_lanes(instruction: Instruction) -> np.ndarray:
    """Which lane each lane reads, from the offset as llvm-objdump puts it, or a number."""
    text = instruction.modifiers.get("offset", 0)
    if isinstance(text, int):
        if text >> 15:
            return (_LANE & ~3) + (text >> 2 * (_LANE & 3) & 3)
        return _by_masks(text & 31, text >> 5 & 31, text >> 10 & 31)
    mode, *arguments = text.removeprefix("swizzle(").removesuffix(")").split(",")
    if mode == "QUAD_PERM":
        return (_LANE & ~3) + np.array([int(lane) for lane in arguments])[_LANE & 3]
    if mode == "BITMASK_PERM":  # a letter for each bit of a lane: 0, 1, p(reserve), i(nvert)
        bits = arguments[0].strip('"')
        return _by_masks(*(int("".join("01"[bit in kinds] for bit in bits), 2) for kinds in ("pi", "1", "i")))
    sizes = [int(argument) for argument in arguments]
    if mode == "SWAP":
        return _by_masks(31, 0, sizes[0])
    if mode == "REVERSE":
        return _by_masks(31, 0, sizes[0] - 1)
    if mode == "BROADCAST":
        return _by_masks(32 - sizes[0], sizes[1], 0)
    raise instruction.unknown(f"the swizzle {mode}")


def _by_masks(and_: int, or_: int, xor: int) -> np.ndarray:
    return (_LANE & 32) | ((_LANE & and_ | or_) ^ xor)


def _bpermute(instruction: Instruction) -> Step:
    """Every lane says by an address, in bytes, which lane it reads."""
    to, address, source = instruction.operands
    return _gather(instruction, to, source, _addressed(instruction, address))


def _gather(instruction: Instruction, to: Operand, source: Operand, lanes: Callable[[State], np.ndarray]) -> Step:
    """Reads other lanes; those that are not active give 0."""
    read, write = _vector(instruction, source), write_vector(instruction, to, "u32")

    def step(state: State) -> None:
        at = np.broadcast_to(lanes(state), (state.waves, LANES))
        values = np.where(state.exec_lanes(), read(state), np.uint32(0))
        write(state, np.take_along_axis(values, at, axis=1))

    return step


def _permute(instruction: Instruction) -> Step:
    """Every active lane says which lane it writes; the highest wins, and who gets nothing gets 0."""
    to, address, source = instruction.operands
    lanes, read = _addressed(instruction, address), _vector(instruction, source)
    write = write_vector(instruction, to, "u32")

    def step(state: State) -> None:
        wave, lane = np.nonzero(state.exec_lanes())
        values = np.zeros((state.waves, LANES), np.uint32)
        values[wave, lanes(state)[wave, lane]] = read(state)[wave, lane]
        write(state, values)

    return step


def _addressed(instruction: Instruction, address: Operand) -> Callable[[State], np.ndarray]:
    read, offset = _vector(instruction, address), np.uint32(instruction.modifiers.get("offset", 0))
    return lambda state: ((read(state) + offset) // np.uint32(4) % np.uint32(LANES)).astype(np.int64)


def _vector(instruction: Instruction, operand: Operand) -> Read:
    """A whole vector register, to read or to write in place."""
    if operand.kind != "v" or operand.count != 1 or operand.neg or operand.abs:
        raise instruction.unknown(f"expected a vector register: {operand}")
    row = operand.value
    return lambda state: state.vectors["u32"][row]


_BUILDERS: dict[str, tuple[Callable[[Instruction], Step], set[str]]] = {
    "v_readlane_b32": (_readlane, set()),
    "v_readfirstlane_b32": (_readfirstlane, set()),
    "v_writelane_b32": (_writelane, set()),
    "v_permlane32_swap_b32": (_swap(32), set()),
    "v_permlane16_swap_b32": (_swap(16), set()),
    "ds_swizzle_b32": (_swizzle, {"offset"}),
    "ds_bpermute_b32": (_bpermute, {"offset"}),
    "ds_permute_b32": (_permute, {"offset"}),
}
_ONLY_GFX950 = {"v_permlane32_swap_b32", "v_permlane16_swap_b32"}


def find(instruction: Instruction, arch: str) -> Step | None:
    """The step that executes the instruction, if it is one of these."""
    name = instruction.mnemonic.removesuffix("_e32").removesuffix("_e64")
    if name not in _BUILDERS or (name in _ONLY_GFX950 and arch != "gfx950"):
        return None
    build, modifiers = _BUILDERS[name]
    if not modifiers.issuperset(instruction.modifiers):
        raise instruction.unknown(f"modifiers {instruction.modifiers}")
    return build(instruction)

"""The machine: decodes a kernel block by block, and runs all waves of a grid through it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from . import crosslane, flat, scalar, vector
from .code_object import Instruction, Kernel
from .errors import UnknownInstruction
from .memory import Memory
from .operands import Step
from .state import LANES, State, pack

__all__ = ["ARCHS", "State", "batches", "dispatch", "execute", "unknown"]

_WITHOUT_EFFECT = re.compile(r"(s_nop|s_sleep|s_setprio) \d+|s_waitcnt( (vm|lgkm|exp)cnt\(\d+\))+|v_nop(_e32|_e64)?")
_CONDITIONS: dict[str, Callable[[State], np.ndarray]] = {
    "s_cbranch_scc0": lambda state: ~state.scc,
    "s_cbranch_scc1": lambda state: state.scc,
    "s_cbranch_vccz": lambda state: state.vcc == 0,
    "s_cbranch_vccnz": lambda state: state.vcc != 0,
    "s_cbranch_execz": lambda state: state.exec_mask == 0,
    "s_cbranch_execnz": lambda state: state.exec_mask != 0,
}
_BRANCHES = {*_CONDITIONS, "s_branch"}
_ENDS_BLOCK = {*_BRANCHES, "s_barrier", "s_endpgm"}

ARCHS = ("gfx942", "gfx950")
BUDGET = 1_000_000  # barriers, and instructions from one to the next, counted once for all waves that are in step
BATCH = 512  # waves that run together, which bounds the room for their registers


def decode(instruction: Instruction, arch: str) -> Step | None:
    """The step that executes an instruction, branches and the like excepted; None if it has no effect."""
    if _WITHOUT_EFFECT.fullmatch(instruction.text):
        return None
    try:
        for family in (scalar, vector, crosslane, flat):
            if arch in ARCHS and (step := family.find(instruction, arch)):
                return step
    except (IndexError, ValueError) as error:
        raise instruction.unknown("the number of operands") from error
    raise instruction.unknown(f"not modelled on {arch}")


def unknown(kernel: Kernel) -> list[str]:
    """What a run that got everywhere would fail at: why, for each instruction that cannot be executed."""
    found = []
    try:
        Program(kernel)
    except UnknownInstruction as error:  # a branch to nowhere
        found.append(str(error))
    for instruction in {instruction.text: instruction for instruction in kernel.instructions}.values():
        try:
            if instruction.mnemonic not in _ENDS_BLOCK:
                decode(instruction, kernel.arch)
        except UnknownInstruction as error:
            found.append(str(error))
    return found


# -------------------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Block:
    """Instructions that follow each other: steps, perhaps a last one that decides what comes then."""

    steps: list[Step]
    last: str
    next: int
    target: int


class Program:
    """A kernel's instructions as basic blocks, each decoded when a wave first gets there."""

    def __init__(self, kernel: Kernel):
        self._instructions, self._arch = kernel.instructions, kernel.arch
        self._numbers = {instruction.address: i for i, instruction in enumerate(self._instructions)}
        self._targets = {i: self._target(x) for i, x in enumerate(self._instructions) if x.mnemonic in _BRANCHES}
        self._starts = set(self._targets.values())
        self._blocks: dict[int, Block] = {}

    def _target(self, instruction: Instruction) -> int:
        """Number of the instruction that is branched to."""
        distance = instruction.operands[0].value
        address = instruction.address + 4 + 4 * (distance - 0x10000 if distance & 0x8000 else distance)
        if address not in self._numbers:
            raise instruction.unknown("branches out of the kernel")
        return self._numbers[address]

    def at(self, offset: int) -> int:
        """Number of the instruction so many bytes behind the first."""
        return self._numbers[self._instructions[0].address + offset]

    def block(self, first: int) -> Block:
        """The block that starts with instruction number ``first``."""
        if first not in self._blocks:
            self._blocks[first] = self._decode(first)
        return self._blocks[first]

    def _decode(self, first: int) -> Block:
        steps = []
        for i in range(first, len(self._instructions)):
            instruction = self._instructions[i]
            if instruction.mnemonic in _ENDS_BLOCK:
                return Block(steps, instruction.mnemonic, i + 1, self._targets.get(i, -1))
            if step := decode(instruction, self._arch):
                steps.append(step)
            if i + 1 in self._starts:
                return Block(steps, "", i + 1, -1)
        raise self._instructions[-1].unknown("the kernel does not end")

    def run(self, state: State, start: int = 0) -> int:
        """Runs all waves to their end; gives the number of instructions, counted for each wave.

        At a barrier, waves wait until no other can go on: longer than they must, but every wave of their block has
        come, or ended. From one to the next, the waves of a block that has LDS go one after the other, in random order:
        what they pass to each other with no barrier between does not arrive.
        """
        ahead, executed = {start: [state]}, 0
        for _ in range(BUDGET):
            at_barrier: dict[int, list[State]] = {}
            for waiting in self._turns(ahead, state):
                executed += self._run_to_barrier(waiting, at_barrier)
            if not at_barrier:
                return executed
            ahead = at_barrier
        raise RuntimeError(f"{state.kernel}: no end after {BUDGET} barriers")

    @staticmethod
    def _turns(ahead: dict[int, list[State]], first: State) -> Iterator[dict[int, list[State]]]:
        """The waves in the order in which they go: by their number in the block, if they have LDS to share."""
        if not first.local.size:
            yield ahead
            return
        for number in first.rng.permutation(int(first.waves_in_block.max()) + 1):
            chosen = {}
            for at, states in ahead.items():
                masks = [state.waves_in_block == number for state in states]
                if some := [state.select(mask) for state, mask in zip(states, masks, strict=True) if mask.any()]:
                    chosen[at] = some
            yield chosen

    def _run_to_barrier(self, waiting: dict[int, list[State]], at_barrier: dict[int, list[State]]) -> int:
        """Runs waves until each has ended or come to a barrier; gives the number of instructions.

        Waves at the same instruction run together. Those that lag behind go first, so that waves that parted at a
        branch meet again where its ways do.
        """
        executed, budget = 0, BUDGET
        while waiting:
            first = min(waiting)
            state, block = State.join(waiting.pop(first)), self.block(first)
            for step in block.steps:
                step(state)
            executed += (block.next - first) * state.waves
            budget -= block.next - first
            if budget < 0:
                raise RuntimeError(f"{state.kernel}: no end after {BUDGET} instructions")
            if block.last == "s_barrier":
                at_barrier.setdefault(block.next, []).append(state)
            for number, waves in self._leave(state, block):
                waiting.setdefault(number, []).append(waves)
        return executed

    @staticmethod
    def _leave(state: State, block: Block) -> Iterator[tuple[int, State]]:
        """Where the waves go on."""
        if block.last == "":
            yield block.next, state
        elif block.last == "s_branch":
            yield block.target, state
        elif block.last in _CONDITIONS:
            taken = _CONDITIONS[block.last](state)
            if taken.all():
                yield block.target, state
            elif not taken.any():
                yield block.next, state
            else:
                yield block.target, state.select(taken)
                yield block.next, state.select(~taken)


@cache
def _program(kernel: Kernel) -> Program:
    return Program(kernel)


# ------------------------------------------------------------------------------------------------------ to the world


def execute(text: str, state: State, arch: str = "gfx942", memory: Memory | None = None) -> None:
    """Runs lines of assembly, as llvm-objdump spells them, one after the other; they cannot branch."""
    state.memory = memory or Memory()
    state.exec_changed()
    with np.errstate(all="ignore"):
        for line in text.splitlines():
            instruction = Instruction.parse(line.split("//")[0].strip())
            if instruction.mnemonic and (step := decode(instruction, arch)):
                step(state)


def batches(blocks: int, most: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The numbers of the blocks that run together, at most so many, and never all: drawn at random.

    Within a batch every load comes before a later store, whichever blocks they belong to. So what two blocks both
    read and write comes out as if there was one, and only shows where they run one after the other.
    """
    count = max(-(-blocks // most), min(blocks, 2))
    return np.array_split(rng.permutation(blocks), count) if blocks else []


def dispatch(
    kernel: Kernel,
    blocks: tuple[int, int, int],
    threads: tuple[int, int, int],
    kernarg: bytes,
    memory: Memory,
    rng: np.random.Generator,
) -> int:
    """Runs a kernel on a grid of ``blocks`` work-groups of ``threads`` work-items.

    Gives the number of instructions that were executed, counted for each wave.
    """
    if kernel.wavefront != LANES:
        raise UnknownInstruction(f"{kernel.name}: waves of {kernel.wavefront} lanes")
    arguments = np.frombuffer(kernarg, np.uint8).copy()
    waves, executed = -(-math.prod(threads) // LANES), 0
    # Firmware that preloads arguments enters behind 256 bytes in which older chips load them; both have to do.
    preloads = kernel.descriptor.preload[1] > 0 and bool(rng.integers(2))
    start = _program(kernel).at(256) if preloads else 0
    with np.errstate(all="ignore"), memory.also_readable(arguments.ctypes.data, arguments.size):
        for numbers in batches(math.prod(blocks), max(BATCH // waves, 1), rng):
            state = State(len(numbers) * waves, max(kernel.vgprs, 1), 108, kernel.lds_bytes, rng, numbers)
            state.memory, state.kernel = memory, kernel.name
            _initialise(state, kernel, blocks, threads, arguments, preloads)
            executed += _program(kernel).run(state, start)
    return executed


def _initialise(
    state: State,
    kernel: Kernel,
    blocks: tuple[int, int, int],
    threads: tuple[int, int, int],
    arguments: np.ndarray,
    preloads: bool,
) -> None:
    """The registers that the hardware sets before a wave starts."""
    descriptor = kernel.descriptor
    if descriptor.kernarg_pointer:
        state.scalars["u64"][:, 0] = arguments.ctypes.data
    if preloads:
        first, count = descriptor.preload
        words = arguments[4 * first : 4 * (first + count)].view(np.uint32)
        state.scalars["u32"][:, descriptor.user_sgprs - count : descriptor.user_sgprs] = words
    register = descriptor.user_sgprs
    for index, enabled in zip(_unravel(state.blocks, blocks), descriptor.block_ids, strict=True):
        if enabled:
            state.scalars["u32"][:, register] = index
            register += 1
    thread = state.waves_in_block[:, None] * LANES + np.arange(LANES)
    x, y, z = _unravel(thread, threads)
    state.vectors["u32"][0] = x | y << 10 | z << 20
    state.exec_mask = pack(thread < math.prod(threads))


def _unravel(index: np.ndarray, sizes: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Its x, y and z; x runs fastest."""
    rest, x = np.divmod(index, sizes[0])
    z, y = np.divmod(rest, sizes[1])
    return x, y, z

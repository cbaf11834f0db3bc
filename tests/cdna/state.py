"""The registers of some waves that execute the same instruction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .memory import LocalMemory, Memory

LANES = 64
VCC, M0, EXEC = 106, 124, 126  # numbers of scalar registers; SGPRs proper start at 0
_SCALARS = 128

# How instructions see a register, or two: unsigned, signed or floating point.
TYPES = {
    name: np.dtype(name[0] + str(int(name[1:]) // 8))
    for name in ["u16", "i16", "f16", "u32", "i32", "f32", "u64", "i64", "f64"]
}


class State:
    """``waves`` waves in step, whose registers hold random bits until they are written.

    They belong to the work-groups with the numbers ``blocks``, equally many to each, which has ``lds_bytes`` of LDS.

    Attributes:
        v: vector registers, uint32 [vgprs, waves * 64].
        s: scalar registers, uint32 [sgprs, waves]. VCC, M0 and EXEC lie among them, at their numbers in the ISA.
        exec_mask, vcc: uint64 [waves].
        scc: bool [waves].
        m0: uint32 [waves].
        vectors: type -> vector registers as that type, [vgprs, waves, 64]; twice as many lanes for 16 bits.
        scalars: type -> scalar registers as that type, [waves, 128]; half as many for 64 bits.
        active: where EXEC is set, [waves, 64], or True for everywhere. :meth:`exec_changed` brings it up to date.
        blocks, waves_in_block: which wave this is, [waves].
    """

    def __init__(
        self,
        waves: int = 1,
        vgprs: int = 256,
        sgprs: int = 108,
        lds_bytes: int = 0,
        rng: np.random.Generator | None = None,
        blocks: Sequence[int] | np.ndarray = (0,),
    ):
        self.rng = rng or np.random.default_rng(0)
        self.memory, self.kernel = Memory(), "assembly"
        self.local = LocalMemory(blocks, lds_bytes, self.rng)
        random = self.rng.integers(2**32, size=(vgprs, 1, LANES), dtype=np.uint32)
        vector = np.repeat(random, waves, axis=1)
        scalar = self.rng.integers(2**32, size=(waves, _SCALARS), dtype=np.uint32)
        block, wave = np.divmod(np.arange(waves), -(-waves // len(blocks)))
        self.sgprs = sgprs
        self._set(vector, scalar, self.rng.random(waves) < 0.5, np.asarray(blocks)[block], wave)
        self.exec_mask = 2**64 - 1

    def _set(
        self, vector: np.ndarray, scalar: np.ndarray, scc: np.ndarray, blocks: np.ndarray, waves_in_block: np.ndarray
    ) -> None:
        self._parts = vector, scalar, scc, blocks, waves_in_block
        self.waves = len(scc)
        self.vectors = {name: vector.view(dtype) for name, dtype in TYPES.items() if dtype.itemsize <= 4}
        self.scalars = {name: scalar.view(dtype) for name, dtype in TYPES.items()}
        self._scc, self.blocks, self.waves_in_block = scc, blocks, waves_in_block
        self.exec_changed()

    def _with(self, *parts: np.ndarray) -> State:
        other = object.__new__(State)
        for name in ("rng", "memory", "local", "kernel", "sgprs"):
            setattr(other, name, getattr(self, name))
        other._set(*parts)
        return other

    def select(self, waves: np.ndarray) -> State:
        """A copy of those waves where the mask is set."""
        vector, *others = self._parts
        return self._with(vector.compress(waves, axis=1), *(part[waves] for part in others))

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """The waves of all."""
        if len(states) == 1:
            return states[0]
        vectors, *others = zip(*(state._parts for state in states), strict=True)
        return states[0]._with(np.concatenate(vectors, axis=1), *map(np.concatenate, others))

    def exec_changed(self) -> None:
        """To be called after writing EXEC."""
        exec_mask = self.exec_mask
        self.active = True if (exec_mask == np.uint64(2**64 - 1)).all() else unpack(exec_mask)

    def exec_lanes(self) -> np.ndarray:
        """EXEC as bool [waves, 64]."""
        return unpack(self.exec_mask)

    @property
    def v(self) -> np.ndarray:
        return self.vectors["u32"].reshape(-1, self.waves * LANES)

    @v.setter
    def v(self, value: object) -> None:
        self.v[...] = value

    @property
    def s(self) -> np.ndarray:
        return self.scalars["u32"].T[: self.sgprs]

    @s.setter
    def s(self, value: object) -> None:
        self.s[...] = value

    @property
    def exec_mask(self) -> np.ndarray:
        return self.scalars["u64"][:, EXEC // 2]

    @exec_mask.setter
    def exec_mask(self, value: object) -> None:
        self.exec_mask[...] = value
        self.exec_changed()

    @property
    def vcc(self) -> np.ndarray:
        return self.scalars["u64"][:, VCC // 2]

    @vcc.setter
    def vcc(self, value: object) -> None:
        self.vcc[...] = value

    @property
    def m0(self) -> np.ndarray:
        return self.scalars["u32"][:, M0]

    @m0.setter
    def m0(self, value: object) -> None:
        self.m0[...] = value

    @property
    def scc(self) -> np.ndarray:
        return self._scc

    @scc.setter
    def scc(self, value: object) -> None:
        self._scc[...] = value


def unpack(masks: np.ndarray) -> np.ndarray:
    """uint64 [waves] to bool [waves, 64]: lane 0 is the lowest bit."""
    octets = np.ascontiguousarray(masks).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, bitorder="little").view(bool)


def pack(lanes: np.ndarray) -> np.ndarray:
    """bool [waves, 64] to uint64 [waves]."""
    return np.packbits(lanes, axis=1, bitorder="little").view(np.uint64)[:, 0]

"""The memory that a dispatch may touch: true addresses of this process, every access checked, as a sanitizer would."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from .errors import MemoryFault, UnknownInstruction

__all__ = ["LocalMemory", "Memory", "MemoryFault", "UnknownInstruction"]

Ranges = Iterable[tuple[int, int]]

# One view of the whole user address space, from its second page on, for each size of an element.
_BASE = 4096
_SPACE = np.frombuffer((ctypes.c_uint8 * (2**47 - 2 * _BASE)).from_address(_BASE), np.uint8)
_SPACES = {size: _SPACE.view(f"u{size}") for size in (1, 2, 4)}


class _Ranges:
    """Disjoint address ranges in rising order: those that overlap are one, those that only touch are not."""

    def __init__(self, ranges: Ranges):
        merged: list[list[int]] = []
        for start, size in sorted(ranges):
            if size and merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            elif size:
                merged.append([start, start + size])
        self.starts, self.ends = np.array(merged or [[0, 0]], np.uint64).T.copy()

    def outside(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Which accesses do not lie wholly inside one range; empty if none, as a glance at the extremes often tells."""
        first, last = addresses.min(), addresses.max()
        at = int(np.searchsorted(self.starts, first, "right")) - 1
        if at >= 0 and last <= self.ends[at] and self.ends[at] - last >= size:
            return addresses[:0]
        at = np.searchsorted(self.starts, addresses, "right").astype(np.int64) - 1
        starts, ends = self.starts[at], self.ends[at]
        return np.flatnonzero(~((at >= 0) & (addresses >= starts) & (addresses < ends) & (ends - addresses >= size)))

    def nearest(self, address: int) -> str:
        if not self.ends.any():
            return "there is no range"
        gaps = [(max(start - address, address - start - size + 1, 0), start, size) for start, size in self.pairs()]
        gap, start, size = min(gaps)
        return f"the nearest range is [{start:#x}, {start + size:#x}), {size} bytes, {gap} bytes away"

    def pairs(self) -> list[tuple[int, int]]:
        """As they came, but for those that overlapped."""
        return list(zip(self.starts.tolist(), (self.ends - self.starts).tolist(), strict=True))


class Memory:
    """Global memory. Ranges are (address, bytes); what is writable is readable too.

    An access of ``count`` elements has to lie wholly inside one range, at a multiple of the element's size.

    Attributes:
        bytes_read, bytes_written: how many have been asked for so far.
    """

    def __init__(self, readable: Ranges = (), writable: Ranges = ()):
        self.bytes_read = self.bytes_written = 0
        self._writable = _Ranges(writable)
        self._readable = _Ranges([*readable, *self._writable.pairs()])

    @contextmanager
    def also_readable(self, address: int, size: int) -> Iterator[None]:
        """For a while, there is one more range to read."""
        before = self._readable
        self._readable = _Ranges([*before.pairs(), (address, size)])
        try:
            yield
        finally:
            self._readable = before

    def load(self, addresses: np.ndarray, element: int, count: int = 1) -> np.ndarray:
        """[count, n] elements of ``element`` bytes, from n addresses on."""
        at = self._check("read", self._readable, addresses, element, count)
        self.bytes_read += at.size * element * count
        return _SPACES[element][at + np.arange(count)[:, None]]

    def store(self, addresses: np.ndarray, element: int, values: np.ndarray) -> None:
        """Writes [count, n] elements; where lanes meet at an address, which one wins is open, as it is on a GPU."""
        at = self._check("write", self._writable, addresses, element, len(values))
        self.bytes_written += values.size * element
        _SPACES[element][at + np.arange(len(values))[:, None]] = values

    def _check(self, kind: str, ranges: _Ranges, addresses: np.ndarray, element: int, count: int) -> np.ndarray:
        size = element * count
        for index in ranges.outside(addresses, size)[:1]:
            address = int(addresses[index])
            raise MemoryFault(kind, address, size, int(index), ranges.nearest(address))
        for index in np.flatnonzero(addresses & np.uint64(element - 1))[:1]:
            raise MemoryFault(kind, int(addresses[index]), size, int(index), f"not a multiple of {element}")
        return (addresses.astype(np.int64) - _BASE) >> (element.bit_length() - 1)


class LocalMemory:
    """LDS: ``size`` bytes for each of the work-groups with the numbers ``blocks``.

    An address here is block << 40 | offset.
    """

    def __init__(self, blocks: Sequence[int] | np.ndarray, size: int, rng: np.random.Generator):
        self.size, self._stride, self._blocks = size, -(-size // 4) * 4, np.sort(blocks)
        data = rng.integers(256, size=len(blocks) * self._stride, dtype=np.uint8)
        self._views = {element: data.view(f"u{element}") for element in (1, 2, 4)}

    def load(self, addresses: np.ndarray, element: int, count: int) -> np.ndarray:
        """As :meth:`Memory.load`."""
        return self._views[element][self._check("read", addresses, element, count)]

    def store(self, addresses: np.ndarray, element: int, values: np.ndarray) -> None:
        """As :meth:`Memory.store`."""
        self._views[element][self._check("write", addresses, element, len(values))] = values

    def _check(self, kind: str, addresses: np.ndarray, element: int, count: int) -> np.ndarray:
        blocks, offsets = np.divmod(addresses.astype(np.int64), 1 << 40)
        size = element * count
        for index in np.flatnonzero((offsets + size > self.size) | (offsets % element != 0))[:1]:
            why = f"LDS has {self.size} bytes, and addresses are multiples of {element}"
            raise MemoryFault(f"LDS {kind}", int(offsets[index]), size, int(index), why)
        places = np.searchsorted(self._blocks, blocks)
        return (places * self._stride + offsets) // element + np.arange(count)[:, None]

"""Where tensors lie in memory: do two of them share bytes, does one overlap itself?

Strides so irregular that nothing can be told count as an overlap. ``csrc_common/geometry.h`` is the twin in C++.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """The bytes of a tensor: the first, the one past the last, and its dimensions as (stride in bytes, size)."""

    begin: int
    end: int
    dims: tuple[tuple[int, int], ...]
    item: int

    @classmethod
    def of(cls, t: Tensor, width: int | None = None) -> Span | None:
        """That of a tensor, or of the first ``width`` elements of its last dimension; None where there are no bytes."""
        shape = t.shape if width is None else (*t.shape[:-1], width)
        if 0 in shape:
            return None
        item, begin = t.element_size(), t.data_ptr()
        dims = tuple((stride * item, size) for stride, size in zip(t.stride(), shape, strict=True) if size > 1)
        return cls(begin, begin + item + sum(stride * (size - 1) for stride, size in dims), dims, item)

    def within(self, period: int) -> int:
        """The bytes that it takes of every ``period``, counted from ``begin``."""
        return self.item + sum(stride * (size - 1) for stride, size in self.dims if stride % period)


def share_bytes(a: Span, b: Span) -> bool:
    """Whether two tensors may share a byte.

    Apart are those whose address ranges are, and those that lie side by side in every period of some stride: slices
    of one projection, views of one buffer that interleave by entry or by block.
    """
    if a.end <= b.begin or b.end <= a.begin:
        return False
    for period in {stride for stride, _ in (*a.dims, *b.dims) if stride > 0}:
        phase, own, other = (b.begin - a.begin) % period, a.within(period), b.within(period)
        if own <= phase and phase + other <= period:
            return False
    return True


def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of a tensor may share memory: by rising stride, each must step over the last."""
    if 0 in shape:
        return False
    extent = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride < extent:
            return True
        extent += stride * (size - 1)
    return False


@dataclass(frozen=True)
class Region:
    """A tensor among the arguments of a call: its name, its bytes, and whether they are written."""

    name: str
    span: Span
    mutated: bool


def overlaps(regions: Iterable[Region]) -> Iterator[tuple[Region, Region]]:
    """The pairs that may share bytes of which one is written, in the order in which they came."""
    for a, b in combinations(regions, 2):
        if (a.mutated or b.mutated) and share_bytes(a.span, b.span):
            yield a, b

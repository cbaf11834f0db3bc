"""Where tensors lie in memory: do two of them share bytes, does one overlap itself?

Strides so irregular that nothing can be told count as an overlap. ``csrc_common/geometry.h`` is the twin in C++.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from torch import Tensor

Dims = tuple[tuple[int, int], ...]  # (stride in bytes, size)


class Span(NamedTuple):
    """The bytes of a tensor: the first, its dimensions, and how many an element has."""

    begin: int
    dims: Dims
    item: int

    @classmethod
    def of(cls, t: Tensor, width: int | None = None) -> Span | None:
        """That of a tensor, or of the first ``width`` elements of its last dimension; None where there are no bytes."""
        shape = t.shape if width is None else (*t.shape[:-1], width)
        if 0 in shape:
            return None
        item = t.element_size()
        dims = tuple((stride * item, size) for stride, size in zip(t.stride(), shape, strict=True) if size > 1)
        return cls(t.data_ptr(), dims, item)


def _extent(dims: Dims, item: int) -> int:
    return item + sum(stride * (size - 1) for stride, size in dims)


def share_bytes(a: Span, b: Span) -> bool:
    """Whether two tensors may share a byte.

    Apart are those whose address ranges are, and those whose parts in one period of some stride are: slices of one
    projection, views of one buffer that interleave by entry or by block.
    """
    return _meet(a.dims, a.item, b.dims, b.item, b.begin - a.begin)


def _meet(a: Dims, item: int, b: Dims, other_item: int, distance: int) -> bool:
    """Whether what begins at 0 and what begins at ``distance`` may share a byte."""
    if distance >= _extent(a, item) or distance + _extent(b, other_item) <= 0:
        return False
    for period in {stride for stride, _ in (*a, *b) if stride > 0}:
        # What repeats with the period drops out, if what is left of both lies in one.
        own, other = (tuple(dim for dim in dims if dim[0] % period) for dims in (a, b))
        for phase in (distance % period, distance % period - period):
            end = max(_extent(own, item), phase + _extent(other, other_item))
            if end - min(phase, 0) <= period and not _meet(own, item, other, other_item, phase):
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

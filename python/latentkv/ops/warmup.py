"""Calls that only compile: the state that :func:`latentkv.providers.warm_up` sets, for this thread or task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_warming_up: ContextVar[bool] = ContextVar("latentkv.ops.warming_up", default=False)
_count = 0  # of warm-ups in all threads: asked first, for it costs least


def warming_up() -> bool:
    """Whether calls only compile. A graph that torch.compile traces does not know."""
    return _count > 0 and not torch.compiler.is_compiling() and _warming_up.get()


@contextmanager
def warm_up() -> Iterator[None]:
    """Calls within compile what they and others like them need, and write nothing.

    For an engine's start, before graphs are captured: call each op once, with tensors on the device, of the dtypes,
    head counts, layouts and alignment of strides that will serve. Values do not matter, and are not looked at. Where
    Triton serves, a call compiles and loads the kernels for every number of tokens, rows, sequences, blocks and
    columns of a block table, so that none of them compiles later: of ``gather_cache`` and ``convert_cache_`` those for
    few, some and many rows, and for up to 31, 1023 and more sequences; of ``mla_decode`` those for one share of each
    sequence and for several. int32 and int64 indices are kernels of their own. The compiled library and the reference
    have nothing to compile. Ops that return new tensors return them as they were allocated.

    It is the functions of latentkv, of its providers, of :mod:`latentkv.compat` and the layer ops of
    :mod:`latentkv.compile` that heed it. An op called as ``torch.ops.latentkv.<op>``, by hand or by a graph of
    torch.compile, runs where not Triton serves it.
    """
    global _count
    token = _warming_up.set(True)
    _count += 1
    try:
        yield
    finally:
        _count -= 1
        _warming_up.reset(token)

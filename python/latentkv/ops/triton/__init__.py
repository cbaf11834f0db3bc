"""The ops as Triton kernels, on the plain tensors of the torch ops: the provider ``triton``.

They give the bytes of :mod:`latentkv.ops.reference`. Where no native library was built they serve both vendors' GPUs;
TRITON_INTERPRET=1 runs them on a CPU, for tests.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..autograd import implementation
from ..checks import Call, checks_values, convert_slots, decode_slots, gather_slots
from ..checks import plan as check_plan
from ..warmup import warming_up
from .decode import decode_launches, device_limits, splits_for, tiles_for
from .indexer import indexer_launches
from .launch import Launch, Target
from .read import FEW_ROWS, LEAST_ROWS, WAYS, convert_launches, gather_launches, tokens_of
from .update import grouped_launches, update_launches


def _run(launches: Iterable[Launch]) -> None:
    for launch in launches:
        launch.run()


def _update(x: Call) -> None:
    if checks_values(x.device):
        check_plan(x)
    _run(update_launches(Target.of(x.device), x))


@implementation
def rope_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.rope_`."""
    _update(x)


@implementation
def write_cache_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.write_cache_`."""
    _update(x)


@implementation
def rope_write_cache_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.rope_write_cache_`."""
    _update(x)


@implementation
def decode_prologue(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.decode_prologue`."""
    _update(x)


@implementation
def write_cache_grouped_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.write_cache_grouped_`."""
    if checks_values(x.device):
        check_plan(x)
    _run(grouped_launches(Target.of(x.device), x))


@implementation
def write_indexer_cache_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.write_indexer_cache_`."""
    if checks_values(x.device):
        check_plan(x)
    _run(indexer_launches(Target.of(x.device), x))


@implementation
def gather_cache(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.gather_cache`."""
    target, rows, sequences = Target.of(x.device), len(x.out), len(x.block_table)
    if warming_up():
        for rows in (LEAST_ROWS, FEW_ROWS, FEW_ROWS + 1):
            for sequences in (1, WAYS.value, WAYS.value**2):
                _run(gather_launches(target, x, rows, sequences))
        return
    if checks_values(x.device):
        gather_slots(x)
    _run(gather_launches(target, x, rows, sequences))


@implementation
def convert_cache_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.convert_cache_`."""
    target, (runs, tokens) = Target.of(x.device), tokens_of(x)
    if warming_up():
        for rows in (LEAST_ROWS, FEW_ROWS, FEW_ROWS + 1):
            _run(convert_launches(target, x, rows))
        return
    if checks_values(x.device):
        convert_slots(x)
    _run(convert_launches(target, x, runs * tokens))


@implementation
def mla_decode(x: Call) -> tuple[Tensor, Tensor]:
    """See :meth:`latentkv.providers.Provider.mla_decode`."""
    target, (multiprocessors, shared_bytes) = Target.of(x.device), device_limits(x.device)
    tiles = tiles_for(target, shared_bytes, x.q.shape[1], x.q.element_size(), x.cache.format.quantised)
    out = x.q.new_empty((*x.q.shape[:2], x.sizes["L"]))
    lse = x.q.new_empty(x.q.shape[:2], dtype=torch.float32)
    if warming_up():
        for splits in (1, 2):
            _run(decode_launches(target, x, out, lse, tiles, splits))
        return out, lse
    if checks_values(x.device):
        for _ in decode_slots(x):
            pass
    _run(decode_launches(target, x, out, lse, tiles, splits_for(x, tiles, multiprocessors)))
    return out, lse

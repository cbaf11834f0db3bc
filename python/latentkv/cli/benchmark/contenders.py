"""Who can do an op: this library, in one launch or in several, and plain PyTorch under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from ... import providers
from ...ops.checks import QUERY_FORMATS
from ...ops.reference import encode, quantise, rotate
from ...ops.schemas import OP_NAMES
from .inputs import GROUPED, INDEXER, PROLOGUE, READS, Inputs, Layers, Prologue, Update
from .timing import Call

FUSED: Final = "rope_write_cache_"


@dataclass(frozen=True)
class Contender:
    """One way to do an op. ``bind`` makes the call on given inputs; ``ours`` owes the reference's bytes."""

    name: str
    bind: Callable[[Any], Call]
    ours: bool = False
    overlap: bool = True
    note: str = ""


class PeerError(Exception):
    """Why someone cannot be compared to."""


def provider_call(provider: providers.Provider, op: str, x: Inputs) -> Call:
    """The call of a provider's ``op`` on ``x``."""
    arguments, options = x.arguments(op)
    return partial(getattr(provider, op), *arguments, **options)


def torch_op_call(op: str, x: Inputs) -> Call:
    """The call of ``torch.ops.latentkv.<op>`` on ``x``: what the public function passes on."""
    calls: list[Call] = []
    ops = {name: getattr(torch.ops.latentkv, name) for name in OP_NAMES}
    record = {name: lambda *args, f=f: calls.append(partial(f, *args)) for name, f in ops.items()}
    provider_call(providers.Provider("recorder", record), op, x)()
    return calls[0]


def in_turn(*calls: Call) -> Call:
    """The calls, one after the other."""
    if len(calls) == 1:
        return calls[0]

    def call() -> None:
        for each in calls:
            each()

    return call


def pair_call(x: Update) -> Call:
    """The calls of our ``rope_`` and ``write_cache_``."""
    return in_turn(*(provider_call(providers.public, op, x) for op in ("rope_", "write_cache_")))


def layer_calls(x: Layers) -> Call:
    """A call of our ``write_cache_`` for every layer."""
    layers = zip(x.kv_c, x.k_pe, x.caches, strict=True)
    return in_turn(*(partial(providers.public.write_cache_, c, k, x.slots, cache) for c, k, cache in layers))


def plain_update(
    op: str,
    positions: Tensor | None,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    table: Tensor | None,
    slots: Tensor,
    pages: tuple[Tensor, ...],
    scale: Tensor | None,
    format: str,
    is_neox: bool,
) -> None:
    """An in-place op as engines write it in plain PyTorch, without checks or masks, for ``torch.compile``."""
    if op != "write_cache_" and positions is not None and table is not None:
        cos, sin = table[positions].float().chunk(2, -1)
        q_pe.copy_(rotate(q_pe, cos[:, None], sin[:, None], is_neox))
        k_pe.copy_(rotate(k_pe, cos, sin, is_neox))
    if op != "rope_":
        _plain_write(kv_c, k_pe, slots, pages, scale, format)


def plain_prologue(
    positions: Tensor | None,
    q_nope: Tensor,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    table: Tensor | None,
    slots: Tensor,
    pages: tuple[Tensor, ...],
    scale: Tensor | None,
    format: str,
    is_neox: bool,
    q_out: Tensor,
    q_scale: Tensor,
    kv_norm_weight: Tensor | None,
) -> None:
    """``decode_prologue`` in the same way; RMSNorm adds up in whatever order PyTorch does."""
    if positions is not None and table is not None:
        cos, sin = table[positions].float().chunk(2, -1)
        q_pe, k_pe = rotate(q_pe, cos[:, None], sin[:, None], is_neox), rotate(k_pe, cos, sin, is_neox)
    query = torch.cat([q_nope, q_pe], -1)
    if kind := QUERY_FORMATS.get(q_out.dtype):
        q_out.view(torch.uint8).copy_(quantise(query.float() * (1 / q_scale), kind))
    else:
        q_out.copy_(query)
    if kv_norm_weight is not None:
        normalised = torch.nn.functional.rms_norm(kv_c.float(), kv_c.shape[1:], kv_norm_weight.float(), 1e-6)
        kv_c = normalised.to(kv_c.dtype)
    _plain_write(kv_c, k_pe, slots, pages, scale, format)


def _plain_write(
    kv_c: Tensor, k_pe: Tensor, slots: Tensor, pages: tuple[Tensor, ...], scale: Tensor | None, format: str
) -> None:
    latent, rope = encode(kv_c, format, scale), encode(k_pe, format, scale)
    rows = (torch.cat([latent, rope], 1),) if len(pages) == 1 else (latent, rope)
    for page, row in zip(pages, rows, strict=True):
        page.view(row.dtype).flatten(0, 1)[slots] = row


def plain_call(function: Callable[..., None], op: str, x: Update) -> Call:
    """The call of :func:`plain_prologue` or :func:`plain_update`, which ``function`` is or compiles, on ``x``."""
    cache = (x.slots, x.cache.tensors, x.cache.scale, x.cache.layout.format, x.is_neox)
    if isinstance(x, Prologue):
        query = (x.q_out, x.q_scale, x.kv_norm_weight)
        return partial(function, x.positions, x.q_nope, x.q_pe, x.k_pe, x.kv_c, x.table, *cache, *query)
    return partial(function, op, x.positions, x.q_pe, x.k_pe, x.kv_c, x.table, *cache)


def compiled(op: str, packed: bool) -> Contender:
    """Plain PyTorch under ``torch.compile``, anew for every shape.

    Raises:
        PeerError: nobody has written the op in plain PyTorch.
    """
    if packed or op in (GROUPED, INDEXER, *READS):
        raise PeerError("no plain PyTorch for it here")
    torch.compiler.reset()  # Dynamo gives up on a function that it has compiled for too many shapes
    function = torch.compile(plain_prologue if op == PROLOGUE else plain_update, dynamic=False)
    return Contender("torch.compile", partial(plain_call, function, op))

"""Who can do an op: this library, fused and as a pair; plain PyTorch under ``torch.compile``; vLLM's ops."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from .. import providers
from ..layouts import FORMATS, CacheLayout
from ..ops import OP_NAMES
from ..reference import encode, rotate
from .inputs import Inputs
from .timing import Call

FUSED: Final = "rope_write_cache_"


@dataclass(frozen=True)
class Contender:
    """One way to do an op. ``bind`` makes the call on given inputs; ``ours`` owes the reference's bytes."""

    name: str
    bind: Callable[[Inputs], Call]
    ours: bool = False
    overlap: bool = True
    note: str = ""


def provider_call(provider: providers.Provider, op: str, x: Inputs) -> Call:
    """The call of a provider's ``op`` on ``x``."""
    if op == "rope_":
        return partial(provider.rope_, x.positions, x.q_pe, x.k_pe, x.table, is_neox=x.is_neox)  # type: ignore[arg-type]
    if op == "write_cache_":
        return partial(provider.write_cache_, x.kv_c, x.k_pe, x.slots, x.cache)
    args = (x.positions, x.q_pe, x.k_pe, x.kv_c, x.table, x.slots, x.cache)
    return partial(provider.rope_write_cache_, *args, is_neox=x.is_neox)


def torch_op_call(op: str, x: Inputs) -> Call:
    """The call of ``torch.ops.latentkv.<op>`` on ``x``."""
    rope = (x.positions, x.q_pe, x.k_pe, x.table, x.is_neox)
    write = (x.kv_c, x.k_pe, x.slots, x.cache.data, x.cache.rope_data, x.cache.scale, x.cache.layout.format)
    fused = (*rope[:3], x.kv_c, x.table, *write[2:], x.is_neox)
    return partial(getattr(torch.ops.latentkv, op), *dict(zip(OP_NAMES, (rope, write, fused), strict=True))[op])


def _both(first: Call, second: Call) -> Call:
    def call() -> None:
        first()
        second()

    return call


def pair_call(x: Inputs) -> Call:
    """The calls of our ``rope_`` and ``write_cache_``, one after the other."""
    public = providers.public
    return _both(provider_call(public, "rope_", x), provider_call(public, "write_cache_", x))


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
    """The op as engines write it in plain PyTorch, without checks or masks, for ``torch.compile``."""
    if op != "write_cache_" and positions is not None and table is not None:
        cos, sin = table[positions].float().chunk(2, -1)
        q_pe.copy_(rotate(q_pe, cos[:, None], sin[:, None], is_neox))
        k_pe.copy_(rotate(k_pe, cos, sin, is_neox))
    if op != "rope_":
        latent, rope = encode(kv_c, format, scale), encode(k_pe, format, scale)
        rows = (torch.cat([latent, rope], 1),) if len(pages) == 1 else (latent, rope)
        for page, row in zip(pages, rows, strict=True):
            page.view(row.dtype).flatten(0, 1)[slots] = row


def compiled(op: str) -> Contender:
    """:func:`plain_update` under ``torch.compile``, anew for every shape."""
    torch.compiler.reset()  # Dynamo gives up on a function that it has compiled for too many shapes
    update = torch.compile(plain_update, dynamic=False)

    def bind(x: Inputs) -> Call:
        cache = (x.slots, x.cache.tensors, x.cache.scale, x.cache.layout.format)
        return partial(update, op, x.positions, x.q_pe, x.k_pe, x.kv_c, x.table, *cache, x.is_neox)

    return Contender("torch.compile", bind)


class PeerError(Exception):
    """Why a peer cannot be compared to."""


class VLLM:
    """vLLM's ops: the installed package's, or those of its library ``_C_stable_libtorch.abi3.so`` at a path.

    Raises:
        PeerError: they cannot be loaded.
    """

    name = "vllm"

    def __init__(self, device: torch.device, library: Path | None = None) -> None:
        try:
            if library is None:
                self.version = str(importlib.import_module("vllm").__version__)
                importlib.import_module("vllm._custom_ops")
            else:
                torch.ops.load_library(library)
                self.version = str(library)
            self._fused = torch.ops._C_cache_ops.concat_and_cache_mla_rope_fused
            self._write = torch.ops._C_cache_ops.concat_and_cache_mla
            self._rotary = torch.ops._C.rotary_embedding
        except Exception as error:  # whatever a foreign package throws at import
            raise PeerError(first_line(error)) from error
        self._takes_views = self._rotates_views(device)

    def contenders(self, op: str, layout: CacheLayout, rotates: bool) -> list[Contender]:
        """vLLM's ways to do ``op``.

        Raises:
            PeerError: it has none.
        """
        if layout.placement != "concat" or layout.block_size == 1:
            raise PeerError("it writes concatenated rows in blocks of several only")
        if op != "write_cache_" and not rotates:
            raise PeerError("it has no op without rotation")
        note = "" if self._takes_views else "rotary_embedding rejects the strided q_pe: fed a contiguous copy"
        if op == "rope_":
            return [Contender("vllm", self._rope_call, note=note)]
        if op == "write_cache_":
            return [Contender("vllm", self._write_call)]
        pair = Contender("vllm pair", lambda x: _both(self._rope_call(x), self._write_call(x)), note=note)
        return [Contender("vllm fused", self._fused_call), pair]

    def _rotates_views(self, device: torch.device) -> bool:
        q = torch.zeros(1, 2, 192, dtype=torch.bfloat16, device=device)[..., 128:]
        zero, table = torch.zeros(1, dtype=torch.int64, device=device), q.new_ones(1, 64)
        try:
            self._rotary(zero, q, q[:, :1], 64, table, False)
        except RuntimeError:
            return False
        return True

    def _rope_call(self, x: Inputs) -> Call:
        query = x.q_pe if self._takes_views else x.q_pe.contiguous()
        key = x.k_pe.unsqueeze(1)
        return partial(self._rotary, x.positions, query, key, key.shape[-1], x.table, x.is_neox)

    def _cache(self, x: Inputs) -> tuple[Tensor, str]:
        cache, format = x.cache.data, x.cache.layout.format
        if not FORMATS[format].quantised:
            return cache, "auto"
        return cache.view(torch.uint8), "fp8_e5m2" if format == "fp8_e5m2" else "fp8"

    def _write_call(self, x: Inputs) -> Call:
        cache, dtype = self._cache(x)
        return partial(self._write, x.kv_c, x.k_pe, cache, x.slots, dtype, x.cache.scale)

    def _fused_call(self, x: Inputs) -> Call:
        rope = (x.positions, x.q_pe, x.k_pe, x.kv_c, x.table, x.is_neox)
        return partial(self._fused, *rope, x.slots, *self._cache(x), x.cache.scale)


def first_line(error: BaseException) -> str:
    """The message's first line, or the type's name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""The peers: vLLM's and FlashInfer's ops, out of their published packages."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ...cache.layouts import FORMATS, CacheLayout, MLACache
from ...ops.checks import INDEX_DIM
from .contenders import FUSED, Contender, PeerError, in_turn
from .inputs import CONVERT, GATHER, GROUPED, INDEXER, PROLOGUE, Gather, IndexerKeys, Layers, Prologue, Update
from .timing import Call

_NORM_EPS = 1e-6


class Peer(Protocol):
    """Someone to compare to."""

    name: ClassVar[str]
    version: str

    def contenders(self, op: str, variant: str, layout: CacheLayout, rotates: bool) -> list[Contender]:
        """Its ways to do ``op``; none where nobody would look for one.

        Raises:
            PeerError: why it has none.
        """


class VLLM:
    """vLLM's ops: the installed package's, or those of its library ``_C_stable_libtorch.abi3.so`` at a path.

    Raises:
        PeerError: they cannot be loaded.
    """

    name: ClassVar = "vllm"

    def __init__(self, device: torch.device, library: Path | None = None) -> None:
        try:
            if library is None:
                self.version = str(importlib.import_module("vllm").__version__)
                importlib.import_module("vllm._custom_ops")
            else:
                torch.ops.load_library(library)
                self.version = str(library)
            self._ops, self._cache_ops = torch.ops._C, torch.ops._C_cache_ops
            self._takes_views = self._rotates_views(device)
        except Exception as error:  # whatever a foreign package throws at import
            raise PeerError(first_line(error)) from error

    def contenders(self, op: str, variant: str, layout: CacheLayout, rotates: bool) -> list[Contender]:
        """See :meth:`Peer.contenders`."""
        if op == CONVERT:
            return []
        if layout.placement != "concat" or layout.block_size == 1:
            raise PeerError("it writes concatenated rows in blocks of several only")
        if not rotates and op in ("rope_", FUSED, INDEXER):
            raise PeerError("it has no op without rotation")
        if op == GATHER:
            return self._gatherers(layout)
        if layout.format == "fp8_model1" and op != "write_cache_":
            raise PeerError("it writes these rows in ops that do other work besides")
        note = "" if self._takes_views else "rotary_embedding rejects the strided q_pe: fed a contiguous copy"
        if op == "rope_":
            return [Contender("vllm", self._rope_call, note=note)]
        if op == "write_cache_":
            if layout.format == "fp8_model1":
                return [Contender("vllm", self._write_model1_call, note="rotates too, here by the angle 0")]
            return [Contender("vllm", self._write_call)]
        if op == GROUPED:
            return [Contender("vllm", self._grouped_call)]
        if op == INDEXER:
            return [Contender("vllm pair", self._indexer_calls)]
        if op == PROLOGUE:
            fused = Contender("vllm kimi-k3", self._prologue_call, note="fed a contiguous copy of kv_c")
            if variant == "norm":
                fused = Contender("vllm rms_norm + kimi-k3", self._prologue_call)
            return [fused, Contender("vllm chain", self._chain_calls, note=note)]
        pair = Contender("vllm pair", lambda x: in_turn(self._rope_call(x), self._write_call(x)), note=note)
        return [pair] if layout.packed else [Contender("vllm fused", self._fused_call), pair]

    def _gatherers(self, layout: CacheLayout) -> list[Contender]:
        """Its ops that gather rows into bf16; which sequence a token is of is worked out before the clock starts."""
        if layout.format == "fp8_ds_mla":
            return [Contender("vllm cp_gather_and_upconvert", self._upconvert_call)]
        if layout.packed:
            raise PeerError("it gathers no such rows")
        dequantises = Contender("vllm gather_and_maybe_dequant", self._gather_call)
        if FORMATS[layout.format].quantised:
            return [dequantises]
        return [dequantises, Contender("vllm cp_gather", self._copy_call)]

    def _gather_call(self, x: Gather) -> Call:
        cache, dtype = _cache(x.cache)
        sequences = torch.arange(len(x.lengths), dtype=torch.int32).repeat_interleave(torch.tensor(x.lengths))
        place = (x.block_table, x.cu_seq_lens, sequences.to(x.out.device), len(x.out))
        return partial(self._cache_ops.gather_and_maybe_dequant_cache, cache, x.out, *place, dtype, x.cache.scale, None)

    def _copy_call(self, x: Gather) -> Call:
        place = (x.block_table, x.cu_seq_lens, len(x.lengths), None)
        return partial(self._cache_ops.cp_gather_cache, x.cache.data, x.out, *place)

    def _upconvert_call(self, x: Gather) -> Call:
        place = (x.block_table, x.cu_seq_lens[:-1], len(x.lengths), None)
        return partial(self._cache_ops.cp_gather_and_upconvert_fp8_kv_cache, x.cache.data, x.out, *place)

    def _rotates_views(self, device: torch.device) -> bool:
        q = torch.zeros(1, 2, 192, dtype=torch.bfloat16, device=device)[..., 128:]
        zero, table = torch.zeros(1, dtype=torch.int64, device=device), q.new_ones(1, 64)
        key = q.new_zeros(1, 1, 64)
        try:
            self._ops.rotary_embedding(zero, q, key, 64, table, False)
        except RuntimeError:
            return False
        return True

    def _query(self, x: Update) -> Tensor:
        return x.q_pe if self._takes_views else x.q_pe.contiguous()

    def _rope_call(self, x: Update, query: Tensor | None = None) -> Call:
        key, query = x.k_pe.unsqueeze(1), self._query(x) if query is None else query
        return partial(self._ops.rotary_embedding, x.positions, query, key, key.shape[-1], x.table, x.is_neox)

    def _write_call(self, x: Update, kv_c: Tensor | None = None) -> Call:
        rows = (x.kv_c if kv_c is None else kv_c, x.k_pe)
        cache, dtype = _cache(x.cache)
        return partial(self._cache_ops.concat_and_cache_mla, *rows, cache, x.slots, dtype, x.cache.scale)

    def _write_model1_call(self, x: Update) -> Call:
        angles = torch.tensor([[1.0, 0.0]], device=x.kv.device).repeat_interleave(x.k_pe.shape[1] // 2, 1)
        rest = (x.slots, torch.zeros_like(x.slots), angles, x.cache.layout.block_size)
        return partial(self._ops.fused_deepseek_v4_kv_rope_insert, x.kv, x.cache.data, *rest)

    def _fused_call(self, x: Update) -> Call:
        rope = (x.positions, x.q_pe, x.k_pe, x.kv_c, x.table, x.is_neox)
        cache, dtype = _cache(x.cache)
        return partial(self._cache_ops.concat_and_cache_mla_rope_fused, *rope, x.slots, cache, dtype, x.cache.scale)

    def _grouped_call(self, x: Layers) -> Call:
        tensors, dtypes = zip(*map(_cache, x.caches), strict=True)
        addresses = torch.tensor([t.data_ptr() for t in tensors], device=x.slots.device)
        slots, strides = x.slots.expand(len(tensors), -1), tensors[0].stride()[:2]
        scales = None if dtypes[0] == "auto" else torch.cat([c.scale for c in x.caches if c.scale is not None])
        rest = (slots, x.caches[0].layout.block_size, *strides, scales, dtypes[0])
        return partial(self._cache_ops.concat_and_cache_mla_grouped, x.kv_c, x.k_pe, addresses, *rest)

    def _indexer_calls(self, x: IndexerKeys) -> Call:
        turn = (x.positions, x.k.unsqueeze(1), None, INDEX_DIM, x.table, x.is_neox)
        write = (x.k, x.cache, x.slots, INDEX_DIM, "ue8m0" if x.power_of_two else "")
        return in_turn(
            partial(self._ops.rotary_embedding, *turn), partial(self._cache_ops.indexer_k_quant_and_cache, *write)
        )

    def _norm_call(self, x: Prologue) -> tuple[Tensor, list[Call]]:
        """The latent vectors to write, and the call that makes them, if any."""
        if x.kv_norm_weight is None:
            return x.kv_c, []
        out = torch.empty_like(x.kv_c, memory_format=torch.contiguous_format)
        return out, [partial(self._ops.rms_norm, out, x.kv_c, x.kv_norm_weight, _NORM_EPS)]

    def _prologue_call(self, x: Prologue) -> Call:
        """Its one fused op, after RMSNorm if there is one. Its scales are reciprocals, and GPT-J its only rope."""
        if x.table is not None and x.is_neox:
            raise PeerError("it rotates pairs (2i, 2i + 1) only")
        kv_c, norm = self._norm_call(x)
        name, scales = "kv_cache_insert", list[Tensor]()
        if x.cache.layout.packed:
            name = "ds_mla_insert"
        elif FORMATS[x.cache.layout.format].quantised:
            name, scales = "kv_cache_fp8_insert", [1 / x.q_scale, 1 / _scale(x.cache)]
        fused = getattr(self._ops, f"fused_kimi_k3_mla_decode_q_concat_{name}")
        inputs = (x.q_nope, x.q_pe, kv_c.contiguous(), x.k_pe, x.q_out, x.cache.data, x.slots, *scales)
        return in_turn(*norm, partial(fused, *inputs, x.cache.layout.block_size, x.positions, x.table))

    def _chain_calls(self, x: Prologue) -> Call:
        """What an engine without fusion runs: RMSNorm, RoPE, concat, quantise, write."""
        kv_c, calls = self._norm_call(x)
        q_pe, query = self._query(x), x.q_out
        if x.table is not None:
            calls.append(self._rope_call(x, q_pe))
        if query.dtype != q_pe.dtype:
            query = torch.empty_like(x.q_out, dtype=q_pe.dtype)
        calls.append(partial(torch.cat, (x.q_nope, q_pe), -1, out=query))
        if query is not x.q_out:
            heads = (x.q_out.flatten(1), query.flatten(1))
            calls.append(partial(self._ops.static_scaled_fp8_quant, *heads, x.q_scale))
        return in_turn(*calls, self._write_call(x, kv_c))


class FlashInfer:
    """FlashInfer's fused RoPE, quantisation and append, of the installed package; it compiles on first use.

    Raises:
        PeerError: it cannot be imported.
    """

    name: ClassVar = "flashinfer"

    def __init__(self, device: torch.device) -> None:
        try:
            self.version = str(importlib.import_module("flashinfer").__version__)
            self._append = importlib.import_module("flashinfer.rope").rope_quantize_fp8_append_paged_kv_cache
        except Exception as error:  # whatever a foreign package throws at import
            raise PeerError(first_line(error)) from error

    def contenders(self, op: str, variant: str, layout: CacheLayout, rotates: bool) -> list[Contender]:
        """See :meth:`Peer.contenders`."""
        if op != PROLOGUE:
            return []
        if not rotates or variant or not FORMATS[layout.format].quantised:
            raise PeerError("its op does RoPE and plain fp8 rows only, without RMSNorm")
        note = "slots given as the positions of one request; scales are numbers of the host"
        overlap = Contender("flashinfer", partial(self._append_call, True), note=note)
        return [overlap, Contender("flashinfer, no overlap", partial(self._append_call, False), note=note)]

    def _append_call(self, overlap: bool, x: Prologue) -> Call:
        layout, slots = x.cache.layout, x.slots.int()
        pages = torch.arange(x.cache.num_blocks, dtype=torch.int32, device=slots.device)
        ends = torch.tensor([0, x.cache.num_blocks], dtype=torch.int32, device=slots.device)
        latent, rope = (layout.kv_lora_rank, layout.rope_dim)
        caches, heads = (t.split((latent, rope), -1) for t in (x.cache.data, x.q_out))
        activations = (x.q_pe, x.k_pe, x.q_nope, x.kv_c, None)
        place = (caches, pages, ends, torch.zeros_like(slots), slots)
        options: dict[str, Any] = {
            "is_neox": x.is_neox,
            "quant_scale_q": 1 / float(x.q_scale),
            "quant_scale_kv": 1 / float(_scale(x.cache)),
            "page_size": layout.block_size,
            "q_nope_out": heads[0],
            "q_rope_out": heads[1],
            "enable_pdl": overlap,
        }
        return partial(self._append, *activations, x.table, x.positions, *place, **options)


def _cache(cache: MLACache) -> tuple[Tensor, str]:
    """A cache and its format, as vLLM's writers take them."""
    format = cache.layout.format
    if cache.layout.packed:
        return cache.data, format
    if not FORMATS[format].quantised:
        return cache.data, "auto"
    return cache.data.view(torch.uint8), "fp8_e5m2" if format == "fp8_e5m2" else "fp8"


def _scale(cache: MLACache) -> Tensor:
    assert cache.scale is not None
    return cache.scale


def first_line(error: BaseException) -> str:
    """The message's first line, or the type's name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

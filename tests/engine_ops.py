"""Ops as engines register them, for graphs to be compiled from: the schemas of vLLM 0.33 on latentkv's arithmetic.

A stand-in is registered only where the process has no such op yet. Namespace ``latentkv_tests`` holds what a test's
graph needs besides: attention that says what it saw, and ops with and without side effects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from latentkv import MLACache
from latentkv.compat import vllm
from latentkv.compile import layer_index
from torch import Tensor

CACHES: dict[str, MLACache] = {}  # what attention finds by a layer's name, as an engine's forward context holds it
NOTES: list[int] = []  # the rows of each tensor that ``note`` was called with


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    offsets: Tensor | None = None,
) -> None:
    """FlashInfer's and AITER's ops as vLLM registers them."""
    assert offsets is None
    vllm.rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)


def unified_mla_kv_cache_update(
    kv_c_normed: Tensor, k_pe: Tensor, layer_name: str, kv_cache_dtype: str, k_scale: Tensor
) -> Tensor:
    return torch.ops.latentkv.layer_write_cache(kv_c_normed, k_pe, layer_index(layer_name))


def concat_and_cache_mla(
    kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slots: Tensor, dtype: str, scale: Tensor, skip_scale: bool = False
) -> None:
    """latentkv.compat's, but that latent vectors may be shorter than keys, which programs that are drawn make."""
    format = vllm.format_of(dtype, kv_c, kv_cache)
    torch.ops.latentkv.write_cache_(kv_c, k_pe, slots, kv_cache, None, None if skip_scale else scale, format)


def empty_like_latent(kv_c_normed: Tensor, *_: object) -> Tensor:
    return kv_c_normed.new_empty(0)


_ROTARY = (
    "(Tensor positions, Tensor(a1!) query, Tensor(a2!) key, SymInt head_size, Tensor cos_sin_cache, bool is_neox{})"
    " -> ()"
)
STAND_INS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any] | None]] = {
    "_C::rotary_embedding": (
        "(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox,"
        " int rope_dim_offset=0, bool inverse=False) -> ()",
        vllm.rotary_embedding,
        None,
    ),
    "vllm::flashinfer_rotary_embedding": (_ROTARY.format(""), rotary_embedding, None),
    "vllm::rocm_aiter_triton_rotary_embedding": (_ROTARY.format(", Tensor? offsets=None"), rotary_embedding, None),
    "vllm::unified_mla_kv_cache_update": (
        "(Tensor kv_c_normed, Tensor k_pe, str layer_name, str kv_cache_dtype, Tensor k_scale) -> Tensor",
        unified_mla_kv_cache_update,
        empty_like_latent,
    ),
    "_C_cache_ops::concat_and_cache_mla": (
        "(Tensor kv_c, Tensor k_pe, Tensor! kv_cache, Tensor slot_mapping, str kv_cache_dtype, Tensor scale,"
        " bool skip_scale=False) -> ()",
        concat_and_cache_mla,
        None,
    ),
}


def attention(
    q: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor,
    done: Tensor | None,
    cache: Tensor | None,
    layer: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What it saw: the query [N, H, P + R], the keys [N, L + R], and a number that tells the cache's bytes.

    ``done`` is what the update returned; the cache is an argument, or the one of ``layer``.
    """
    out, keys, seen = attention_fake(q, q_pe, kv_c, k_pe, done, cache, layer)
    out.copy_(q if q_pe is None else torch.cat([q, q_pe], -1))
    keys.copy_(torch.cat([kv_c.to(k_pe.dtype), k_pe.reshape(len(k_pe), -1)], -1))
    held = [cache] if cache is not None else list(CACHES[layer].tensors) if layer in CACHES else []
    codes = torch.cat([t.contiguous().view(torch.uint8).flatten() for t in held] or [seen.new_zeros(1)]).long()
    seen.copy_((codes * (torch.arange(len(codes), device=q.device) % 1009 + 1)).sum())
    return out, keys, seen


def attention_fake(
    q: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor,
    done: Tensor | None,
    cache: Tensor | None,
    layer: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    n, heads, width = q.shape
    out = q.new_empty(n, heads, width + (0 if q_pe is None else q_pe.shape[-1]))
    return out, k_pe.new_empty(n, kv_c.shape[-1] + k_pe.shape[-1]), q.new_empty(1, dtype=torch.long)


def note(x: Tensor) -> None:
    NOTES.append(x.shape[0])


def count(counter: Tensor) -> None:
    counter.add_(1)


TEST_OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any] | None]] = {
    "latentkv_tests::attention": (
        "(Tensor q, Tensor? q_pe, Tensor kv_c, Tensor k_pe, Tensor? done, Tensor? cache, str? layer)"
        " -> (Tensor, Tensor, Tensor)",
        attention,
        attention_fake,
    ),
    # Nobody sees what it does but the host: FX keeps it, and its place, only because it is registered as impure.
    "latentkv_tests::note": ("(Tensor x) -> ()", note, lambda x: None),
    "latentkv_tests::pure": ("(Tensor x) -> Tensor", lambda x: x.float() * 2, lambda x: x.float() * 2),
    "latentkv_tests::count_": ("(Tensor(a!) counter) -> ()", count, None),
}

_libraries: dict[str, torch.library.Library] = {}  # a library object must outlive its ops

for _name, (_schema, _op, _fake) in (STAND_INS | TEST_OPS).items():
    _namespace, _, _base = _name.partition("::")
    if hasattr(getattr(torch.ops, _namespace), _base):
        continue
    if _namespace not in _libraries:
        _libraries[_namespace] = torch.library.Library(_namespace, "FRAGMENT")
    # As vLLM registers them: inputs may be strided views.
    _libraries[_namespace].define(_base + _schema, tags=torch.Tag.needs_fixed_stride_order)
    for _key in ("CPU", "CUDA"):
        _libraries[_namespace].impl(_base, _op, _key)
    if _fake is not None:
        torch.library.register_fake(_name, _fake, lib=_libraries[_namespace])

torch.fx.node.has_side_effect(torch.ops.latentkv_tests.note.default)

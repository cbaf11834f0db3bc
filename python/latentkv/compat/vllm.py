"""vLLM's names and signatures (those of 0.33) on latentkv's ops, so that an engine can switch by an import.

They differ from vLLM's own ops where the contract of latentkv does: RoPE is computed in fp32 and rounded once, the
cos/sin table may have any floating dtype, every block size works, and bad arguments raise. The tiles of fp8_ds_mla are
e4m3fn on every platform, where vLLM's are FNUZ on gfx942.
"""

from __future__ import annotations

from torch import Tensor

from ..cache.layouts import FORMATS
from ..cache.platform import Platform
from ..ops.checks import called_as, fail
from ..providers import public

__all__ = ["concat_and_cache_mla", "concat_and_cache_mla_rope_fused", "rotary_embedding"]

_FORMATS = {"bfloat16": "bf16", "float16": "fp16", "fp8_e5m2": "fp8_e5m2", "fp8_ds_mla": "fp8_ds_mla"}
CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", *_FORMATS)
"""vLLM's words for the formats that are written here."""


def format_of(kv_cache_dtype: str, kv_c: Tensor, kv_cache: Tensor) -> str:
    """The format that vLLM's word means: ``auto`` is the activations' dtype, ``fp8`` the platform's e4m3."""
    if kv_cache_dtype == "auto":
        return next((f.name for f in FORMATS.values() if f.dtype == kv_c.dtype), str(kv_c.dtype))
    if kv_cache_dtype in ("fp8", "fp8_e4m3"):
        typed = (f.name for f in FORMATS.values() if f.name.startswith("fp8_e4m3") and f.dtype == kv_cache.dtype)
        return next(typed, Platform.detect().fp8_format)
    if kv_cache_dtype not in _FORMATS:
        raise ValueError(f"kv_cache_dtype: expected one of {', '.join(CACHE_DTYPES)}, got {kv_cache_dtype!r}")
    return _FORMATS[kv_cache_dtype]


def _check_widths(op: str, kv_c: Tensor, k_pe: Tensor) -> None:
    """vLLM's signatures do not say L and R, and two arguments that were exchanged would fill a row as well."""
    if kv_c.shape[-1:] < k_pe.shape[-1:]:
        expected = f"a latent vector longer than the rope key of k_pe ({k_pe.shape[-1]})"
        fail(op, "kv_c", expected, kv_c.shape[-1])


def concat_and_cache_mla_rope_fused(
    positions: Tensor,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    kv_cache_dtype: str,
    kv_cache_scale: Tensor,
) -> None:
    """Rotates q_pe [N, H, R] and k_pe [N, R] in place and writes rows into kv_cache [B, bs, L + R].

    See :meth:`latentkv.providers.Provider.rope_write_cache_`; masked rows (slot -1) are not rotated, as in vLLM.

    Args:
        kv_cache_dtype: auto, bfloat16, float16, fp8, fp8_e4m3, fp8_e5m2 or fp8_ds_mla (rows of 656 bytes).
        kv_cache_scale: one fp32 element; ignored by 16-bit and fp8_ds_mla rows.

    Raises:
        ValueError: unknown kv_cache_dtype.
        RuntimeError: an argument's device, dtype, shape or strides are off.
    """
    op = "concat_and_cache_mla_rope_fused"
    _check_widths(op, kv_c, k_pe)
    format = format_of(kv_cache_dtype, kv_c, kv_cache)
    with called_as(op, cache="kv_cache", scale="kv_cache_scale"):
        public._call(
            "rope_write_cache_", positions, q_pe, k_pe, kv_c, cos_sin_cache, slot_mapping, kv_cache, None,
            kv_cache_scale, format, is_neox,
        )  # fmt: skip


def concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    scale: Tensor,
    skip_scale: bool = False,
) -> None:
    """Writes rows [kv_c | k_pe] into kv_cache [B, bs, L + R]; see :meth:`latentkv.providers.Provider.write_cache_`.

    ``skip_scale`` stores convert(x) instead of convert(x / scale).
    """
    op = "concat_and_cache_mla"
    _check_widths(op, kv_c, k_pe)
    format = format_of(kv_cache_dtype, kv_c, kv_cache)
    with called_as(op, cache="kv_cache"):
        used = None if skip_scale else scale
        public._call("write_cache_", kv_c, k_pe, slot_mapping, kv_cache, None, used, format)


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """Rotates query and key in place: elements ``rope_dim_offset ..`` of every head, as many as the table has columns.

    Args:
        positions: [N].
        query, key: [N, heads * head_size] or [N, heads, head_size]; key may be None.
        head_size: elements of one head.
        cos_sin_cache: [max_position, R], R <= head_size - rope_dim_offset.
        is_neox: NeoX pairs, else GPT-J pairs.
        rope_dim_offset: where the rotated part of a head starts.
        inverse: turn back.

    Raises:
        RuntimeError: an argument's device, dtype, shape or strides are off.
    """
    op, stop = "rotary_embedding", rope_dim_offset + cos_sin_cache.shape[-1]
    if not 0 <= rope_dim_offset <= stop <= head_size:
        fail(op, "head_size", f"at least rope_dim_offset + R = {stop}", head_size)

    def heads(name: str, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.shape[1] % head_size == 0:
            x = x.view(x.shape[0], x.shape[1] // head_size, head_size)
        if x.dim() != 3 or x.shape[2] != head_size:
            fail(op, name, f"shape [N, heads * {head_size}] or [N, heads, {head_size}]", list(x.shape))
        return x[..., rope_dim_offset:stop]

    q, k = heads("query", query), None if key is None else heads("key", key)
    with called_as(op, q="query", k="key"):
        public._call("rope_", positions, q, k, cos_sin_cache, is_neox, inverse)

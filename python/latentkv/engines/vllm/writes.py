"""vLLM's cache write by latentkv, for models that do not use vLLM's MLA layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from ...cache.platform import Platform
from ...compat.vllm import concat_and_cache_mla

_SERVED = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")


def rebound(own: Callable[..., Any]) -> Callable[..., Any]:
    """``concat_and_cache_mla`` by latentkv; by vLLM's ``own`` for rows that latentkv does not write."""

    @wraps(own)
    def write(
        kv_c: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        scale: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        packed = kv_cache_dtype == "fp8_ds_mla" and Platform.detect().fp8_format == "fp8_e4m3fn"
        ours = packed or kv_cache_dtype in _SERVED
        (concat_and_cache_mla if ours else own)(
            kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, *args, **kwargs
        )

    return write

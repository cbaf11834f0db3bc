"""vLLM's cache write by latentkv, for models that do not use vLLM's MLA layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from ...cache.platform import Platform
from ...compat.vllm import CACHE_DTYPES, concat_and_cache_mla


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
        fnuz_tiles = kv_cache_dtype == "fp8_ds_mla" and Platform.detect().fp8_format == "fp8_e4m3fnuz"
        op = concat_and_cache_mla if kv_cache_dtype in CACHE_DTYPES and not fnuz_tiles else own
        op(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, *args, **kwargs)

    return write

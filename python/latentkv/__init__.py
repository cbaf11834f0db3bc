"""latentkv: the KV-cache update of multi-head latent attention (MLA), one kernel source for every vendor's GPU."""

from __future__ import annotations

from . import compile, providers
from .cache.backends import layout_for, select_backend
from .cache.layouts import CacheLayout, MLACache
from .cache.platform import Platform
from .models.rope_table import build_cos_sin_cache, softmax_scale
from .providers import public as _public

__version__ = "0.1.0"
__all__ = [
    "CacheLayout",
    "MLACache",
    "Platform",
    "build_cos_sin_cache",
    "compile",
    "convert_cache_",
    "decode_prologue",
    "gather_cache",
    "layout_for",
    "mla_decode",
    "providers",
    "rope_",
    "rope_write_cache_",
    "select_backend",
    "softmax_scale",
    "write_cache_",
    "write_cache_grouped_",
    "write_indexer_cache_",
]

rope_ = _public.rope_
write_cache_ = _public.write_cache_
rope_write_cache_ = _public.rope_write_cache_
decode_prologue = _public.decode_prologue
write_cache_grouped_ = _public.write_cache_grouped_
write_indexer_cache_ = _public.write_indexer_cache_
gather_cache = _public.gather_cache
convert_cache_ = _public.convert_cache_
mla_decode = _public.mla_decode

"""The ops that the pass knows, by name: those of latentkv and those that engines put into their graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..compat.vllm import format_of
from .layers import layer_index


@dataclass(frozen=True)
class RopeOp:
    """An op that rotates query and key in place: ``positions``, ``cos_sin_cache`` and ``is_neox`` it calls as we do.

    Attributes:
        q, k: the names of what it rotates; shapes [N, H, D], or [N, H * D] where it has a ``head_size`` D.
        rounding: ``ours``; ``contracts`` where the compiler may leave out the rounding of a product before the sum,
            which changes nothing if products are exact in fp32, as those of two 16-bit factors are; or ``unknown``.
    """

    q: str
    k: str
    rounding: Literal["ours", "contracts", "unknown"]

    def rotates(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this call turns forward, and at the plain positions."""
        return not kwargs.get("inverse") and kwargs.get("offsets") is None

    def rounds_as_ours(self, activations: torch.dtype, table: torch.dtype) -> bool:
        """Whether the results are ours, bit for bit."""
        exact = torch.float32 not in (activations, table)
        return self.rounding == "ours" or (self.rounding == "contracts" and exact)


ROPE_OPS = {
    "latentkv::rope_": RopeOp("q", "k", "ours"),
    "_C::rotary_embedding": RopeOp("query", "key", "contracts"),
    "vllm::flashinfer_rotary_embedding": RopeOp("query", "key", "unknown"),
    "vllm::rocm_aiter_triton_rotary_embedding": RopeOp("query", "key", "unknown"),
}


@dataclass(frozen=True)
class UpdateOp:
    """An op that writes cache rows.

    Attributes:
        kv_c: the name of the latent's argument (that of the key is ``k_pe`` in all).
        layer: the name of the argument that tells the layer, None where the cache is an argument.
        caches: the names of the cache tensors that it mutates, in the order of ours: cache, rope_cache.
    """

    kv_c: str = "kv_c"
    layer: str | None = None
    caches: tuple[str, ...] = ()


UPDATE_OPS = {
    "latentkv::layer_write_cache": UpdateOp(layer="layer"),
    "vllm::unified_mla_kv_cache_update": UpdateOp("kv_c_normed", layer="layer_name"),
    "latentkv::write_cache_": UpdateOp(caches=("cache", "rope_cache")),
    "_C_cache_ops::concat_and_cache_mla": UpdateOp(caches=("kv_cache",)),
}


def keep_updates() -> None:
    """Tells torch of the updates by layer that write, whatever becomes of the tensor that they return.

    Without it torch drops them where it can fold their result. Ops of others must have been registered before.
    """
    for name, op in UPDATE_OPS.items():
        namespace, _, base = name.partition("::")
        found = getattr(getattr(torch.ops, namespace), base, None) if op.layer else None
        if found is not None:
            torch.fx.node.has_side_effect(found.default)


def layer_of(name: Any) -> Any:
    """What the graph calls a layer: our integer (or a symbol for it), also for a layer that is known by its name."""
    return layer_index(name) if isinstance(name, str) else name


def format_and_scale(kwargs: Mapping[str, Any], kv_c: torch.Tensor, cache: torch.Tensor) -> tuple[str, Any]:
    """Of an update with a cache argument, what ours calls its format and scale.

    Raises:
        ValueError: vLLM's word for the format is unknown.
    """
    if "format" in kwargs:
        return kwargs["format"], kwargs["scale"]
    scale = None if kwargs.get("skip_scale") else kwargs["scale"]
    return format_of(kwargs["kv_cache_dtype"], kv_c, cache), scale

"""The MLA models that people serve: the dimensions that decide cache bytes, and their rotary settings.

Tensor parallelism divides ``heads``; the latent cache is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MODELS", "Model", "model"]


@dataclass(frozen=True)
class Model:
    """One model's attention.

    Attributes:
        name: its key in :data:`MODELS`.
        kv_lora_rank: L, elements of the latent vector.
        rope_dim: R, elements of the shared rope key.
        nope_dim: P, elements of a query head that are not rotated.
        heads: query heads of the whole model.
        rope: keywords for :func:`latentkv.build_cos_sin_cache`, or None where the R elements are not rotated.
        is_neox: pairs (i, i + R/2) if True, (2i, 2i + 1) if False.
    """

    name: str
    kv_lora_rank: int
    rope_dim: int
    nope_dim: int
    heads: int
    rope: Mapping[str, Any] | None = field(hash=False)
    is_neox: bool = False


def _plain(theta: float, max_position: int) -> dict[str, Any]:
    return {"qk_rope_head_dim": 64, "max_position_embeddings": max_position, "rope_theta": theta}


def _yarn(
    factor: float, theta: float = 1e4, original: int = 4096, beta_fast: float = 32.0, mscale: float = 1.0
) -> dict[str, Any]:
    """YaRN over all of its positions, with mscale = mscale_all_dim: cos and sin keep their size."""
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }
    return _plain(theta, int(factor * original)) | {"rope_parameters": scaling}


# Thetas and lengths follow the published configurations; no op's time or bytes depend on them.
MODELS: dict[str, Model] = {
    m.name: m
    for m in (
        Model("deepseek-v2-lite", 512, 64, 128, 16, _yarn(40.0, mscale=0.707)),
        Model("deepseek-v2", 512, 64, 128, 128, _yarn(40.0, mscale=0.707)),
        Model("deepseek-v3", 512, 64, 128, 128, _yarn(40.0)),
        # 448 + 64 elements fill plain rows as they do packed ones; the smaller V4 has 64 heads. The rope is
        # that of its uncompressed layers, with a table well short of the model's million positions.
        Model("deepseek-v4", 448, 64, 448, 128, _plain(1e4, 131072)),
        Model("glm-4.7-flash", 512, 64, 192, 20, _plain(1e6, 202752)),
        Model("glm-5", 512, 64, 192, 64, _plain(1e6, 202752)),
        Model("kimi-k2", 512, 64, 128, 64, _yarn(64.0, theta=5e4, beta_fast=1.0)),  # as of release 0905
        Model("kimi-k3", 512, 64, 128, 96, rope=None),
        Model("longcat-flash", 512, 64, 128, 64, _plain(1e7, 131072)),
        Model("mistral-4-small", 256, 64, 64, 32, _yarn(128.0, original=8192)),
    )
}

_ALIASES = {"deepseek-r1": "deepseek-v3"}


def model(name: str) -> Model:
    """The model of that name, in any case; ``deepseek-r1`` is known too.

    Raises:
        ValueError: the name is unknown.
    """
    key = name.lower()
    key = _ALIASES.get(key, key)
    if key not in MODELS:
        raise ValueError(f"model: name: expected one of {', '.join(sorted(MODELS | _ALIASES))}, got {name!r}")
    return MODELS[key]

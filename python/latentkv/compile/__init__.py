"""The side of torch.compile: cache-update ops that know a cache by its layer's name."""

from __future__ import annotations

from .layers import layer_index, step

__all__ = ["layer_index", "step"]

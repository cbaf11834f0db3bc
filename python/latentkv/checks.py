"""Argument checks for the providers written in Python: the rules and messages of ``csrc_common/arguments.h``.

Every failure is a RuntimeError that says the op, the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from .layouts import FORMATS, Format

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
INDEX_TYPES = (torch.int64, torch.int32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Arguments:
    """The checks of one call of ``op``, whose tensors must lie on ``device``."""

    op: str
    device: torch.device

    def fail(self, argument: str, expected: str, got: object) -> NoReturn:
        """Raises the error."""
        raise RuntimeError(f"latentkv.{self.op}: {argument}: expected {expected}, got {got}")

    def on_device(self, argument: str, t: Tensor) -> None:
        """The tensor lies on the op's device."""
        if t.device != self.device:
            self.fail(argument, f"a tensor on {self.device}", f"one on {t.device}")

    def dtype(self, argument: str, t: Tensor, types: Sequence[torch.dtype]) -> None:
        """The tensor has one of the dtypes."""
        if t.dtype not in types:
            self.fail(argument, f"dtype {' or '.join(map(_name, types))}", _name(t.dtype))

    def unit_stride(self, argument: str, t: Tensor) -> None:
        """The last dimension is contiguous."""
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            self.fail(argument, "a contiguous last dimension (stride 1)", f"stride {t.stride(-1)}")

    def tensor(self, argument: str, t: Tensor, types: Sequence[torch.dtype], **shape: int) -> None:
        """Device, dtype, shape (-1 matches any size) and stride of one tensor."""
        self.on_device(argument, t)
        self.dtype(argument, t, types)
        sizes = list(shape.values())
        if t.dim() != len(sizes) or any(e not in (-1, n) for e, n in zip(sizes, t.shape, strict=True)):
            text = ", ".join(name if size < 0 else f"{name}={size}" for name, size in shape.items())
            self.fail(argument, f"shape [{text}]", list(t.shape))
        self.unit_stride(argument, t)

    def no_overlap(self, argument: str, t: Tensor) -> None:
        """No two elements share memory: by rising stride, each dimension steps over what lies within it."""
        if t.numel() == 0:
            return
        extent = 1
        for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
            if stride < extent:
                self.fail(
                    argument,
                    "elements that do not overlap in memory",
                    f"strides {list(t.stride())} for shape {list(t.shape)}",
                )
            extent += stride * (size - 1)

    def cache(
        self, cache: Tensor, rope_cache: Tensor | None, scale: Tensor | None, format: str, kv_c: Tensor, k_pe: Tensor
    ) -> Format:
        """The cache tensors, their format and scale, against the activations to be written."""
        latent_dim, rope_dim = kv_c.shape[1], k_pe.shape[1]
        if format not in FORMATS:
            self.fail("format", "a known format name", repr(format))
        f = FORMATS[format]
        if not f.quantised and kv_c.dtype != f.dtype:
            self.fail("kv_c", f"dtype {_name(f.dtype)} for format {f.name}", _name(kv_c.dtype))
        parts = [("cache", cache, "L + R", latent_dim + rope_dim)]
        if rope_cache is not None:
            parts = [("cache", cache, "L", latent_dim), ("rope_cache", rope_cache, "R", rope_dim)]
        for name, t, what, row in parts:
            self.on_device(name, t)
            if t.dtype not in f.storage_dtypes:
                allowed = " or ".join(map(_name, f.storage_dtypes))
                self.fail(name, f"dtype {allowed} for format {f.name}", _name(t.dtype))
            if not (t.dim() == 3 or (t.dim() == 4 and t.shape[1] == 1)):
                self.fail(name, "shape [B, bs, C] or [B, 1, bs, C]", list(t.shape))
            if t.shape[-1] < row:
                self.fail(name, f"rows of at least {what}={row} elements", t.shape[-1])
            self.unit_stride(name, t)
            self.no_overlap(name, t)
        if rope_cache is not None:
            if (cache.shape[0], cache.shape[-2]) != (rope_cache.shape[0], rope_cache.shape[-2]):
                self.fail("rope_cache", f"the blocks of cache: {list(cache.shape)}", list(rope_cache.shape))
            if _share_bytes(cache, rope_cache, latent_dim, rope_dim):
                self.fail("rope_cache", "a tensor that shares no bytes with cache", "overlapping memory")
        if cache.shape[0] * cache.shape[-2] >= 2**31:
            self.fail("cache", "fewer than 2^31 rows", cache.shape[0] * cache.shape[-2])
        if scale is not None:
            self.on_device("scale", scale)
            self.dtype("scale", scale, (torch.float32,))
            if scale.numel() != 1:
                self.fail("scale", "one element", f"shape {list(scale.shape)}")
        return f


def _share_bytes(cache: Tensor, rope_cache: Tensor, latent_dim: int, rope_dim: int) -> bool:
    """Whether the latent rows of one tensor may share a byte with the rope rows of the other.

    Apart are tensors whose address ranges are, and views of one buffer that interleave by entry or by block.
    """
    blocks, entries, size = cache.shape[0], cache.shape[-2], cache.element_size()
    if blocks * entries * rope_dim == 0:
        return False
    block, entry = cache.stride(0) * size, cache.stride(-2) * size
    rope_block, rope_entry = rope_cache.stride(0) * size, rope_cache.stride(-2) * size
    offset = rope_cache.data_ptr() - cache.data_ptr()
    row, rope_row = latent_dim * size, rope_dim * size
    block_bytes, rope_block_bytes = (entries - 1) * entry + row, (entries - 1) * rope_entry + rope_row

    def side_by_side(period: int, a: int, b: int) -> bool:
        phase = offset % period
        return phase >= b and phase + a <= period

    if offset >= (blocks - 1) * block + block_bytes or -offset >= (blocks - 1) * rope_block + rope_block_bytes:
        return False
    same_blocks = block == rope_block or blocks == 1
    if same_blocks and entry == rope_entry > 0 == block % entry and side_by_side(entry, rope_row, row):
        return False
    return not (same_blocks and blocks > 1 and side_by_side(block, rope_block_bytes, block_bytes))

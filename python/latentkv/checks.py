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

    def dtype(self, argument: str, t: Tensor, types: Sequence[torch.dtype], purpose: str = "") -> None:
        """The tensor has one of the dtypes."""
        if t.dtype not in types:
            names = " or ".join(map(_name, dict.fromkeys(types)))
            self.fail(argument, f"dtype {names} {purpose}".rstrip(), _name(t.dtype))

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

    def format(self, name: str, kv_c: Tensor, k_pe: Tensor, names: tuple[str, str] = ("kv_c", "k_pe")) -> Format:
        """The format of that name, against the activations to be written."""
        if name not in FORMATS:
            self.fail("format", "a known format name", repr(name))
        f = FORMATS[name]
        if f.activation is not None:
            self.dtype(names[0], kv_c, (f.activation,), f"for format {name}")
        if f.packed:
            for argument, t, letter, size in zip(names, (kv_c, k_pe), "LR", f.packed.dims, strict=True):
                if t.shape[1] != size:
                    self.fail(argument, f"{letter}={size} for format {name}", t.shape[1])
        return f

    def cache(
        self,
        cache: Tensor,
        rope_cache: Tensor | None,
        scale: Tensor | None,
        f: Format,
        latent_dim: int,
        rope_dim: int,
        names: tuple[str, str, str] = ("cache", "rope_cache", "scale"),
    ) -> None:
        """The cache tensors and their scale, for rows of ``latent_dim`` and ``rope_dim`` elements."""
        latent_name, rope_name, scale_name = names
        own, row = (f.storage_dtypes, f"for format {f.name}"), latent_dim + rope_dim
        if f.packed:
            size = f.packed.row_bytes
            self.pages(latent_name, cache, size, f"{size} bytes", *own)
            self.byte_rows(latent_name, cache, size if f.packed.block_multiple else None)
            if rope_cache is not None:
                self.fail(rope_name, f"None {own[1]}", "a tensor")
        elif rope_cache is None:
            self.pages(latent_name, cache, row, f"L + R={row} elements", *own)
        else:
            self.pages(latent_name, cache, latent_dim, f"L={latent_dim} elements", *own)
            self.pages(rope_name, rope_cache, rope_dim, f"R={rope_dim} elements", *own)
            self.same_blocks(rope_name, rope_cache, latent_name, cache)
            if _share_bytes(cache, rope_cache, latent_dim, rope_dim):
                self.fail(rope_name, f"a tensor that shares no bytes with {latent_name}", "overlapping memory")
        self.capacity(latent_name, cache)
        if scale is not None:
            self.scale(scale_name, scale)

    def pages(
        self, argument: str, t: Tensor, size: int, text: str, types: Sequence[torch.dtype], purpose: str = ""
    ) -> None:
        """One cache tensor [B, bs, C] or [B, 1, bs, C] whose rows hold ``size`` elements, in words ``text``."""
        self.on_device(argument, t)
        self.dtype(argument, t, types, purpose)
        if not (t.dim() == 3 or (t.dim() == 4 and t.shape[1] == 1)):
            self.fail(argument, "shape [B, bs, C] or [B, 1, bs, C]", list(t.shape))
        if t.shape[-1] < size:
            self.fail(argument, f"rows of at least {text}", t.shape[-1])
        self.unit_stride(argument, t)
        self.no_overlap(argument, t)

    def byte_rows(self, argument: str, t: Tensor, apart: int | None) -> None:
        """Rows of mixed types, for access by 4 bytes; ``apart`` where those of a block must follow one another."""
        if apart is not None and t.shape[-2] > 1 and t.stride(-2) != apart:
            self.fail(argument, f"entries {apart} bytes apart, as scales lie after a block's rows", t.stride(-2))
        steps = [stride for stride, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1]
        if t.data_ptr() % 4 or any(step % 4 for step in steps):
            got = f"address {t.data_ptr() % 4} modulo 4 and strides {list(t.stride())}"
            self.fail(argument, "rows that start at a multiple of 4 bytes", got)

    def capacity(self, argument: str, t: Tensor) -> None:
        """The cache tensor's rows can be counted in 31 bits."""
        if t.shape[0] * t.shape[-2] >= 2**31:
            self.fail(argument, "fewer than 2^31 rows", t.shape[0] * t.shape[-2])

    def same_blocks(self, argument: str, t: Tensor, other_argument: str, other: Tensor) -> None:
        """Both cache tensors have as many blocks and entries."""
        if (t.shape[0], t.shape[-2]) != (other.shape[0], other.shape[-2]):
            self.fail(argument, f"the blocks of {other_argument}: {list(other.shape)}", list(t.shape))

    def scale(self, argument: str, t: Tensor) -> None:
        """One fp32 element on the device."""
        self.on_device(argument, t)
        self.dtype(argument, t, (torch.float32,))
        if t.numel() != 1:
            self.fail(argument, "one element", f"shape {list(t.shape)}")


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

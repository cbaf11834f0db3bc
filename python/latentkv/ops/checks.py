"""Argument checks for the providers written in Python: the rules and messages of ``csrc_common/arguments.h``.

Every failure is a RuntimeError that says the op, the argument, what was expected and what came. :class:`Arguments` has
the rules for single tensors; the functions below it are what the ops ask for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ..cache.layouts import FORMATS, Format

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
INDEX_TYPES = (torch.int64, torch.int32)
QUERY_FORMATS = {f.dtype: f for f in FORMATS.values() if f.quantised}
INDEX_DIM, INDEX_ROW_BYTES = 128, 132  # elements of an indexer key, and bytes of its cache row with the fp32 scale


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

    def known_format(self, argument: str, name: str) -> Format:
        """The format of that name."""
        if name not in FORMATS:
            self.fail(argument, "a known format name", repr(name))
        return FORMATS[name]

    def format(self, name: str, kv_c: Tensor, k_pe: Tensor, names: tuple[str, str] = ("kv_c", "k_pe")) -> Format:
        """The format of that name, against the activations to be written."""
        f = self.known_format("format", name)
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


# ----------------------------------------------------------------------------------------------- what the ops ask for


def check_rope(args: Arguments, positions: Tensor, q: Tensor, k: Tensor | None, table: Tensor) -> None:
    """The arguments of rope_."""
    args.tensor("q", q, ACTIVATIONS, N=-1, H=-1, R=-1)
    n, _, rope_dim = q.shape
    _check_positions(args, n, positions, table, rope_dim)
    if k is not None and k.dim() == 3:
        args.tensor("k", k, ACTIVATIONS, N=n, K=-1, R=rope_dim)
    elif k is not None:
        args.tensor("k", k, ACTIVATIONS, N=n, R=rope_dim)
    _check_pairs(args, {"q": q, "k": k}, q.dtype, mutated=True)


def check_update(
    args: Arguments,
    positions: Tensor | None,
    q_pe: Tensor | None,
    k_pe: Tensor,
    kv_c: Tensor,
    table: Tensor | None,
    slots: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    mutated: bool,
) -> Format:
    """What is written to a cache, and the cache; ``mutated``: q_pe and k_pe are rotated in place."""
    args.tensor("kv_c", kv_c, ACTIVATIONS, N=-1, L=-1)
    n, latent_dim = kv_c.shape
    if q_pe is not None:
        args.tensor("q_pe", q_pe, ACTIVATIONS, N=n, H=-1, R=-1)
    rope_dim = q_pe.shape[2] if q_pe is not None else k_pe.shape[-1] if k_pe.dim() else -1
    _check_positions(args, n, positions, table, rope_dim)
    args.tensor("k_pe", k_pe, ACTIVATIONS, N=n, R=rope_dim)
    _check_pairs(args, {"q_pe": q_pe, "k_pe": k_pe}, kv_c.dtype, mutated)
    _check_slots(args, n, slots)
    f = args.format(format, kv_c, k_pe)
    args.cache(cache, rope_cache, scale, f, latent_dim, rope_dim)
    return f


def check_query(
    args: Arguments,
    q_nope: Tensor | None,
    q_pe: Tensor,
    kv_c: Tensor,
    q_out: Tensor,
    q_rope_out: Tensor | None,
    q_scale: Tensor | None,
) -> None:
    """The query of decode_prologue, after :func:`check_update`."""
    (n, heads, rope_dim), latent_dim, dtype = q_pe.shape, kv_c.shape[1], kv_c.dtype
    if q_nope is not None:
        args.tensor("q_nope", q_nope, (dtype,), N=n, H=heads, L=latent_dim)
    width = {"L + R": latent_dim + rope_dim} if q_rope_out is None else {"L": latent_dim}
    args.tensor("q_out", q_out, (dtype, *QUERY_FORMATS), N=n, H=heads, **width)
    args.no_overlap("q_out", q_out)
    if q_rope_out is not None:
        args.tensor("q_rope_out", q_rope_out, (q_out.dtype,), N=n, H=heads, R=rope_dim)
        args.no_overlap("q_rope_out", q_rope_out)
    if q_scale is not None:
        args.scale("q_scale", q_scale)


def check_norm(args: Arguments, kv_c: Tensor, weight: Tensor | None, kv_c_out: Tensor | None) -> None:
    """RMSNorm of decode_prologue."""
    n, latent_dim = kv_c.shape
    if weight is not None:
        args.tensor("kv_norm_weight", weight, (kv_c.dtype, torch.float32), L=latent_dim)
    if kv_c_out is not None:
        if weight is None:
            args.fail("kv_c_out", "None without kv_norm_weight", "a tensor")
        args.tensor("kv_c_out", kv_c_out, (kv_c.dtype,), N=n, L=latent_dim)
        args.no_overlap("kv_c_out", kv_c_out)


def check_grouped(
    args: Arguments,
    kv_c: Sequence[Tensor],
    k_pe: Sequence[Tensor],
    slots: Tensor,
    caches: Sequence[Tensor],
    rope_caches: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    format: str,
) -> Format:
    """The arguments of write_cache_grouped_."""
    layers = len(kv_c)
    if not layers:
        args.fail("kv_c", "at least one tensor", "none")
    for name, given in (("k_pe", k_pe), ("caches", caches), ("rope_caches", rope_caches or caches), ("scales", scales)):
        if len(given) != layers:
            args.fail(name, f"G={layers} entries, as kv_c has", len(given))
    n, latent_dim, rope_dim = -1, -1, k_pe[0].shape[-1] if k_pe[0].dim() else -1
    for i, (latent, rope) in enumerate(zip(kv_c, k_pe, strict=True)):
        types = (kv_c[0].dtype,) if i else ACTIVATIONS
        args.tensor(f"kv_c[{i}]", latent, types, N=n, L=latent_dim)
        n, latent_dim = latent.shape
        args.tensor(f"k_pe[{i}]", rope, types, N=n, R=rope_dim)
        _check_pairs(args, {f"k_pe[{i}]": rope}, latent.dtype, mutated=False)
    _check_slots(args, n, slots)
    f = args.format(format, kv_c[0], k_pe[0], ("kv_c[0]", "k_pe[0]"))
    rope_parts: Sequence[Tensor | None] = rope_caches or [None] * layers
    for i, (cache, rope_cache, scale) in enumerate(zip(caches, rope_parts, scales, strict=True)):
        names = (f"caches[{i}]", f"rope_caches[{i}]", f"scales[{i}]")
        args.cache(cache, rope_cache, scale, f, latent_dim, rope_dim, names)
        args.same_blocks(names[0], cache, "caches[0]", caches[0])
    return f


def check_indexer(
    args: Arguments, k: Tensor, positions: Tensor | None, table: Tensor | None, slots: Tensor, cache: Tensor
) -> int:
    """The arguments of write_indexer_cache_; R, how many elements are rotated."""
    args.tensor("k", k, ACTIVATIONS, N=-1, D=INDEX_DIM)
    _check_positions(args, len(k), positions, table, -1)
    rope_dim = 0 if table is None else table.shape[1]
    if table is not None and rope_dim not in range(2, INDEX_DIM + 1, 2):
        args.fail("cos_sin_cache", f"an even R in 2 .. {INDEX_DIM}", rope_dim)
    _check_slots(args, len(k), slots)
    args.pages("cache", cache, INDEX_ROW_BYTES, f"{INDEX_ROW_BYTES} bytes", (torch.uint8,), "for format indexer")
    args.byte_rows("cache", cache, INDEX_ROW_BYTES)
    args.capacity("cache", cache)
    return rope_dim


def check_gather(
    args: Arguments,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    out: Tensor,
    latent_dim: int,
    seq_starts: Tensor | None,
) -> Format:
    """The arguments of gather_cache."""
    args.tensor("out", out, ACTIVATIONS, total=-1, width=-1)
    width = out.shape[1]
    if not 1 <= latent_dim <= width:
        args.fail("kv_lora_rank", f"a number in 1 .. {width}, the width of out", latent_dim)
    args.no_overlap("out", out)
    f = _check_stored(args, cache, rope_cache, scale, format, latent_dim, width - latent_dim)
    args.tensor("block_table", block_table, INDEX_TYPES, S=-1, max_blocks=-1)
    sequences = block_table.shape[0]
    args.tensor("cu_seq_lens", cu_seq_lens, INDEX_TYPES, **{"S + 1": sequences + 1})
    if seq_starts is not None:
        args.tensor("seq_starts", seq_starts, INDEX_TYPES, S=sequences)
    if out.shape[0] >= 2**31:
        args.fail("out", "fewer than 2^31 rows", out.shape[0])
    return f


def check_convert(
    args: Arguments,
    src: Tensor,
    src_rope: Tensor | None,
    src_scale: Tensor | None,
    src_format: str,
    dst: Tensor,
    dst_rope: Tensor | None,
    dst_scale: Tensor | None,
    dst_format: str,
    latent_dim: int,
    rope_dim: int,
    src_blocks: Tensor | None,
    dst_blocks: Tensor | None,
) -> tuple[Format, Format]:
    """The arguments of convert_cache_; the formats of src and dst."""
    for name, value, least in (("kv_lora_rank", latent_dim, 1), ("rope_dim", rope_dim, 0)):
        if value < least:
            args.fail(name, f"at least {least}", value)
    sides = (("src", src, src_rope, src_scale, src_format), ("dst", dst, dst_rope, dst_scale, dst_format))
    f, g = (
        _check_stored(args, cache, rope, scale, format, latent_dim, rope_dim, (name, f"{name}_rope", f"{name}_scale"))
        for name, cache, rope, scale, format in sides
    )
    for name, blocks in (("src_blocks", src_blocks), ("dst_blocks", dst_blocks)):
        if blocks is not None and blocks.dim() == 2:
            args.tensor(name, blocks, INDEX_TYPES, S=-1, blocks=-1)
        elif blocks is not None:
            args.tensor(name, blocks, INDEX_TYPES, blocks=-1)
    (runs, src_count), (dst_runs, dst_count) = block_counts(src, src_blocks), block_counts(dst, dst_blocks)
    if runs != dst_runs:
        args.fail("dst_blocks", f"S={runs} runs of blocks, as src_blocks has", dst_runs)
    src_size, dst_size = src.shape[-2], dst.shape[-2]
    # Blocks for the same number of tokens: some number needs just so many blocks of either size.
    fewest = max((src_count - 1) * src_size, (dst_count - 1) * dst_size) + 1
    if (src_count or dst_count) and fewest > min(src_count * src_size, dst_count * dst_size):
        expected = f"{-(-src_count * src_size // max(dst_size, 1))} blocks of {dst_size}"
        args.fail("dst_blocks", f"{expected}, for src_blocks has {src_count} of {src_size}", dst_count)
    if runs * src_count * src_size >= 2**31:
        args.fail("src_blocks", "fewer than 2^31 rows in all", runs * src_count * src_size)
    return f, g


def block_counts(cache: Tensor, blocks: Tensor | None) -> tuple[int, int]:
    """The runs of blocks that convert_cache_ goes through on one side, and the blocks of each."""
    if blocks is None:
        return 1, cache.shape[0]
    return (1, blocks.shape[0]) if blocks.dim() == 1 else (blocks.shape[0], blocks.shape[1])


def check_decode(
    args: Arguments,
    q: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    block_table: Tensor,
    seq_lens: Tensor,
    latent_dim: int,
) -> Format:
    """The arguments of mla_decode."""
    args.tensor("q", q, ACTIVATIONS, B=-1, H=-1, width=-1)
    batch, _, width = q.shape
    if not 1 <= latent_dim <= width:
        args.fail("kv_lora_rank", f"a number in 1 .. {width}, the width of q", latent_dim)
    f = _check_stored(args, cache, rope_cache, scale, format, latent_dim, width - latent_dim)
    if f.packed:
        args.fail("format", "one that is not packed", format)
    args.tensor("block_table", block_table, INDEX_TYPES, B=batch, max_blocks=-1)
    args.tensor("seq_lens", seq_lens, INDEX_TYPES, B=batch)
    return f


def _check_stored(
    args: Arguments,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    latent_dim: int,
    rope_dim: int,
    names: tuple[str, str, str] = ("cache", "rope_cache", "scale"),
) -> Format:
    """A cache that is read."""
    f = args.known_format("format" if names[0] == "cache" else f"{names[0]}_format", format)
    if f.packed and (latent_dim, rope_dim) != f.packed.dims:
        expected = f"(L, R)={f.packed.dims} for format {format}"
        args.fail("kv_lora_rank", expected, (latent_dim, rope_dim))
    args.cache(cache, rope_cache, scale, f, latent_dim, rope_dim, names)
    return f


def _check_positions(args: Arguments, n: int, positions: Tensor | None, table: Tensor | None, rope_dim: int) -> None:
    if (positions is None) != (table is None):
        missing = "positions" if positions is None else "cos_sin_cache"
        args.fail(missing, "a tensor, as for the other of positions and cos_sin_cache", "None")
    if positions is not None and table is not None:
        args.tensor("positions", positions, INDEX_TYPES, N=n)
        args.tensor("cos_sin_cache", table, ACTIVATIONS, max_position=-1, R=rope_dim)


def _check_pairs(args: Arguments, tensors: dict[str, Tensor | None], dtype: torch.dtype, mutated: bool) -> None:
    for name, t in tensors.items():
        if t is None:
            continue
        args.dtype(name, t, (dtype,))
        if t.shape[-1] % 2:
            args.fail(name, "an even rope dimension R", t.shape[-1])
        if mutated:
            args.no_overlap(name, t)


def _check_slots(args: Arguments, n: int, slots: Tensor) -> None:
    args.tensor("slot_mapping", slots, INDEX_TYPES, T=-1)
    if slots.shape[0] > n:
        args.fail("slot_mapping", f"at most N={n} entries", slots.shape[0])


# --------------------------------------------------------------------------------------------------- values of indices


def checks_values(device: torch.device) -> bool:
    """Whether slots, positions and block numbers are looked at: always on a CPU, on a GPU by ``LATENTKV_CHECKS=1``."""
    return device.type == "cpu" or os.environ.get("LATENTKV_CHECKS") == "1"


def outside(
    args: Arguments,
    rotates: Tensor,
    slots: Tensor | None,
    capacity: int,
    positions: Tensor | None,
    table: Tensor | None,
) -> Tensor:
    """Which rows have a slot past the capacity or, if one ``rotates``, a position outside the table; or it raises."""
    bad_slots = torch.zeros_like(rotates) if slots is None else slots >= capacity
    bad_positions = torch.zeros_like(rotates)
    if positions is not None and table is not None:
        bad_positions = rotates & ((positions < 0) | (positions >= table.shape[0]))
    if checks_values(rotates.device):
        if slots is not None and bad_slots.any():
            row = int(bad_slots.nonzero()[0])
            args.fail("slot_mapping", f"slots below the capacity of {capacity}", f"{int(slots[row])} at row {row}")
        if positions is not None and table is not None and bad_positions.any():
            row = int(bad_positions.nonzero()[0])
            args.fail("positions", f"values in 0 .. {table.shape[0] - 1}", f"{int(positions[row])} at row {row}")
    return bad_slots | bad_positions


def gather_slots(
    args: Arguments,
    cache: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    out: Tensor,
    seq_starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rows of ``out`` that gather_cache writes and the slot of each, -1 for a row without a block; or it raises."""
    if checks_values(cache.device):
        lengths = cu_seq_lens.diff()
        if cu_seq_lens[0] != 0 or (lengths < 0).any():
            args.fail("cu_seq_lens", "rising numbers from 0 on", cu_seq_lens.tolist())
        if cu_seq_lens[-1] > len(out):
            args.fail("out", f"at least {int(cu_seq_lens[-1])} rows, as cu_seq_lens ends there", len(out))
    rows = torch.arange(len(out), device=out.device)
    sequence = torch.searchsorted(cu_seq_lens[1:].contiguous().long(), rows, right=True)
    rows, sequence = (x[sequence < len(block_table)] for x in (rows, sequence))
    token = rows - cu_seq_lens[sequence] + (0 if seq_starts is None else seq_starts[sequence])
    return rows, _slots_of(args, "block_table", block_table, sequence, token, cache, missing=True)


def convert_slots(
    args: Arguments, src: Tensor, dst: Tensor, src_blocks: Tensor | None, dst_blocks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The slots in src and dst of every token of convert_cache_, -1 where there is none; or it raises."""
    runs, count = block_counts(src, src_blocks)
    tokens = min(count * src.shape[-2], block_counts(dst, dst_blocks)[1] * dst.shape[-2])
    run = torch.arange(runs, device=src.device).repeat_interleave(tokens)
    token = torch.arange(tokens, device=src.device).repeat(runs)
    slots, dst_slots = (
        _slots_of(args, name, _blocks(cache, blocks), run, token, cache, missing=False)
        for name, cache, blocks in (("src_blocks", src, src_blocks), ("dst_blocks", dst, dst_blocks))
    )
    return slots, dst_slots


def decode_slots(args: Arguments, cache: Tensor, block_table: Tensor, seq_lens: Tensor) -> Iterator[Tensor]:
    """For each sequence of mla_decode the slots of its tokens, -1 where there is none; or it raises."""
    for i, length in enumerate(seq_lens.tolist()):
        token = torch.arange(max(length, 0), device=cache.device)
        yield _slots_of(args, "block_table", block_table, torch.full_like(token, i), token, cache, missing=True)


def _blocks(cache: Tensor, blocks: Tensor | None) -> Tensor:
    """The block numbers [S, n] that convert_cache_ goes through on one side."""
    if blocks is None:
        return torch.arange(cache.shape[0], device=cache.device)[None]
    return blocks[None] if blocks.dim() == 1 else blocks


def _slots_of(
    args: Arguments, name: str, blocks: Tensor, sequence: Tensor, token: Tensor, cache: Tensor, missing: bool
) -> Tensor:
    """The slots of some sequences' tokens, by their blocks [S, n]; -1 where there is none, or it raises.

    ``missing``: a negative block number is a fault, too.
    """
    count, size = cache.shape[0], max(cache.shape[-2], 1)
    column = token // size
    inside = (token >= 0) & (column < blocks.shape[1])
    if missing and checks_values(cache.device) and not inside.all():
        row = int((~inside).nonzero()[0])
        expected = f"blocks for token {int(token[row])} of sequence {int(sequence[row])}, {size} tokens each"
        args.fail(name, expected, f"{blocks.shape[1]} blocks")
    if not blocks.shape[1]:
        return torch.full_like(token, -1)
    number = blocks[sequence, column.clamp(0, blocks.shape[1] - 1)].long()
    bad = inside & ((number >= count) | (missing & (number < 0)))
    if checks_values(cache.device) and bad.any():
        row = int(bad.nonzero()[0])
        at = f"{int(number[row])} at [{int(sequence[row])}, {int(column[row])}]"
        args.fail(name, f"block numbers in 0 .. {count - 1}", at)
    return torch.where(inside & (number >= 0) & (number < count), number * size + token % size, -1)

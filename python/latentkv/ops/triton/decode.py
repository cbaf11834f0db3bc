"""mla_decode: attention of one query per sequence over the paged latent cache, whose rows are key and value in one.

The tokens of a sequence are split into shares, so that few sequences fill a GPU, too (split-KV, as in Flash-Decoding).
:func:`attend` has a program per tile of heads and share. It loads a tile of rows once and uses it twice, for scores and
for the output, and the softmax is online (FlashAttention, arXiv:2205.14135). :func:`merge` adds the shares up.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import Call
from .codec import bits, from_float, kind_of, to_float
from .launch import Launch, Target
from .read import Blocks, decoded, of_blocks, part_pages
from .update import Heads, cdiv, power_of_two, scale_of, wait_for_producer

LOG2E = tl.constexpr(math.log2(math.e))
MERGE_COLUMNS, MERGE_SHARES = 64, 32  # of the output, and of the shares at a time: a program's tile of the merge
MAX_TOKENS = 2**31 - 2**16  # of a sequence: more than a cache has rows, and sums of it and a tile stay 32-bit


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def as_numbers(code, Q: tl.constexpr, INTERPRETED: tl.constexpr):
    """Bits of type Q as operands of tl.dot. The interpreter gets fp32 of the same values."""
    if INTERPRETED:
        y = to_float(code, Q)
    elif Q == "bf16":
        y = code.to(tl.bfloat16, bitcast=True)
    elif Q == "fp16":
        y = code.to(tl.float16, bitcast=True)
    else:
        y = code.to(tl.float32, bitcast=True)
    return y


@triton.jit
def operand(x, KIND: tl.constexpr, Q: tl.constexpr, INTERPRETED: tl.constexpr, CONVERTS: tl.constexpr):
    """Elements as operands of tl.dot, in the activations' type Q; codes of fp8 without their scale, which is exact.

    Elements of that type come as such, for then the compiler copies them to shared memory while it computes. The
    interpreter has them as bits.
    """
    if KIND != Q:
        x = from_float(decoded(x, KIND, CONVERTS), Q, CONVERTS)
    return x if KIND == Q and not INTERPRETED else as_numbers(x, Q, INTERPRETED)


@triton.jit
def bound(x, INTERPRETED: tl.constexpr):
    """A loop's bound. The interpreter's scalars are arrays of one element, and NumPy 2.4 makes no index of these."""
    return x.handle.data.item() if INTERPRETED else x


@triton.jit
def load_numbers(blocks, sequence, token, end, SIZE: tl.constexpr):
    """The block numbers of a sequence's tokens below ``end``; -1 where the table has none."""
    column = token // SIZE
    mask = (token < end) & (column < blocks.columns)
    return tl.load(blocks.numbers + sequence * blocks.run_stride + column, mask=mask, other=-1)


@triton.jit(
    do_not_specialize=["heads", "splits", "capacity", "run_stride", "columns", "limit"],
    do_not_specialize_on_alignment=["numbers", "seq_lens"],
)
def attend(
    q, cache, rope_cache, scale, numbers, run_stride, columns, limit, seq_lens, out, lse, sm_scale, heads, splits,
    capacity,
    L: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, ROPE_WIDTH: tl.constexpr, KIND: tl.constexpr,
    Q: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, INTERPRETED: tl.constexpr, CONVERTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a sequence over one share of its tokens: out [B, splits, H, L] and lse [B, splits, H].

    The lse of an empty share is -inf, and its out is not written unless it is the only one.
    """
    wait_for_producer(PDL)
    blocks = Blocks(numbers, run_stride, columns, limit)
    groups = tl.cdiv(heads, HEADS)
    share_of_all = tl.program_id(0) // groups  # one axis for all: the others end at 65535
    split, sequence = share_of_all % splits, (share_of_all // splits).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(seq_lens + sequence), 0), capacity).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), TOKENS) * TOKENS
    start = tl.minimum(split * share, length)
    end = tl.minimum(start + share, length)

    head = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    i, j, n = tl.arange(0, WIDTH), tl.arange(0, ROPE_WIDTH), tl.arange(0, TOKENS)
    real = (head < heads)[:, None]
    query = (q.data + sequence * q.token_stride + head.to(tl.int64) * q.head_stride)[:, None]
    q_latent = operand(tl.load(query + i[None, :], mask=real & (i < L)[None, :], other=0), Q, Q, INTERPRETED, CONVERTS)
    if R > 0:
        q_rope = tl.load(query + L + j[None, :], mask=real & (j < R)[None, :], other=0)
        q_rope = operand(q_rope, Q, Q, INTERPRETED, CONVERTS)
    unit = scale_of(scale)
    factor = sm_scale * LOG2E * unit  # scores are powers of two
    greatest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDTH], tl.float32)
    number = load_numbers(blocks, sequence, start + n, end, SIZE)
    for first in range(bound(start, INTERPRETED), bound(end, INTERPRETED), TOKENS):
        exists = (number >= 0) & (number < blocks.limit)
        block, entry = tl.where(exists, number, 0).to(tl.int64), ((first + n) % SIZE).to(tl.int64)
        rows = (cache.data + block * cache.block_stride + entry * cache.entry_stride)[:, None]
        latent = tl.load(rows + i[None, :], mask=exists[:, None] & (i < L)[None, :], other=0)
        latent = operand(latent, KIND, Q, INTERPRETED, CONVERTS)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        if R > 0:
            rows = (rope_cache.data + block * rope_cache.block_stride + entry * rope_cache.entry_stride)[:, None]
            rope = tl.load(rows + j[None, :], mask=exists[:, None] & (j < R)[None, :], other=0)
            rope = operand(rope, KIND, Q, INTERPRETED, CONVERTS)
            scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee")
        number = load_numbers(blocks, sequence, first + TOKENS + n, end, SIZE)  # ahead of its use
        scores = tl.where(exists[None, :], scores * factor, float("-inf"))
        now = tl.maximum(greatest, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - base[:, None])
        keep = tl.exp2(greatest - base)
        greatest = now
        total = total * keep + tl.sum(weights, 1)
        weights = as_numbers(from_float(weights, Q, CONVERTS), Q, INTERPRETED)
        acc = tl.dot(weights, latent, acc * keep[:, None], input_precision="ieee")

    at = (sequence * splits + split) * heads + head
    tl.store(lse + at, (greatest + tl.log2(total)) / LOG2E, mask=head < heads)
    if (start < end) | (splits == 1):
        result = acc * (unit / tl.where(total == 0, 1.0, total))[:, None]
        tl.store(out + at[:, None] * L + i[None, :], from_float(result, OUT, CONVERTS), mask=real & (i < L)[None, :])


@triton.jit(do_not_specialize=["heads", "splits"])
def merge(
    partial, partial_lse, out, lse, heads, splits,
    L: tl.constexpr, COLUMNS: tl.constexpr, SHARES: tl.constexpr, Q: tl.constexpr, INTERPRETED: tl.constexpr,
    CONVERTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS of out [B, H, L] and lse [B, H] for one sequence and head, of what :func:`attend` left of each share."""
    wait_for_producer(PDL)
    at = tl.program_id(0).to(tl.int64)
    sequence, head = at // heads, at % heads
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    greatest, total = float("-inf"), 0.0
    acc = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, bound(splits, INTERPRETED), SHARES):
        split = first + tl.arange(0, SHARES)
        share = (sequence * splits + split) * heads + head
        part = tl.load(partial_lse + share, mask=split < splits, other=float("-inf"))
        written = (part != float("-inf"))[:, None]
        x = tl.load(partial + share[:, None] * L + i[None, :], mask=written & (i < L)[None, :], other=0)
        now = tl.maximum(greatest, tl.max(part, 0))
        base = tl.where(now == float("-inf"), 0.0, now)
        weight = tl.exp(part - base)
        keep = tl.exp(greatest - base)
        greatest = now
        total = total * keep + tl.sum(weight, 0)
        acc = acc * keep + tl.sum(weight[:, None] * x, 0)
    tl.store(out + at * L + i, from_float(acc / tl.where(total == 0, 1.0, total), Q, CONVERTS), mask=i < L)
    if tl.program_id(1) == 0:
        tl.store(lse + at, greatest + tl.log(total))


# ------------------------------------------------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Tiles:
    """How a program of :func:`attend` works.

    Attributes:
        heads, tokens: of a tile, each at least 16.
        num_warps, num_stages: Triton's options.
        together: programs that a multiprocessor runs at once.
    """

    heads: int
    tokens: int
    num_warps: int
    num_stages: int
    together: int


def tiles_for(target: Target, shared_bytes: int, heads: int, q_bytes: int, quantised: bool) -> Tiles:
    """The tiles for so many heads.

    For up to 16 and for more than 32, and not fp32, they are on an H100 the fastest of those tried, or 12 % from it
    (docs/performance.md). The others have as few spilled registers as could be had for rows of 576 elements.
    """
    if q_bytes == 4:
        return Tiles(16, 16, 4 if target.hip else 8, 1, 1)
    if shared_bytes < 200 * 1024:
        return Tiles(32 if target.hip and heads > 16 and not quantised else 16, 32, 4, 1, 1)
    if heads <= 16:
        return Tiles(16, 64, 8, 3, 1)
    return Tiles(32, 32, 8, 3, 1) if heads <= 32 else Tiles(64, 64, 8, 2, 1)


@functools.cache
def split_count(programs: int, slots: int, most: int) -> int:
    """How many shares to make, up to ``most``: the fewest that keep the ``slots`` of a GPU about as busy as any."""
    most = max(1, min(most, max(slots // programs, 8)))
    rounds = {n: cdiv(programs * n, slots) / n for n in range(1, most + 1)}
    return next(n for n in rounds if rounds[n] <= 1.1 * min(rounds.values()))


def decode_launches(target: Target, x: Call, out: Tensor, lse: Tensor, tiles: Tiles, splits: int) -> list[Launch]:
    """The launches of mla_decode into ``out`` and ``lse``, with so many shares of each sequence's tokens."""
    q, cache = x.q, x.cache
    batch, heads, _ = q.shape
    if not batch or not heads:
        return []
    q_kind, rope_dim, size = kind_of(q.dtype), cache.rope_dim, cache.latent_dim
    interpreted = q.device.type == "cpu" and target == Target()
    latent, rope = cache.parts
    quantised = cache.format.quantised
    same = cache.format.name == q_kind and not interpreted
    element = torch.uint8 if quantised else q.dtype if same else bits(latent[:0]).dtype
    partial, partial_lse = bits(out), lse
    if splits > 1:
        partial = torch.empty((batch, splits, heads, size), dtype=torch.int32, device=q.device)
        partial_lse = torch.empty((batch, splits, heads), dtype=torch.float32, device=q.device)
    shared = {"heads": heads, "splits": splits, "L": size, "Q": q_kind, "CONVERTS": target.converts}
    shared |= {"INTERPRETED": interpreted, "PDL": target.pdl}
    args = shared | {
        "q": Heads(bits(q) if interpreted else q, q.stride(0), q.stride(1)),
        "cache": part_pages(latent, element),
        "rope_cache": part_pages(rope, element) if rope_dim else None,
        "scale": cache.scale,
        "seq_lens": x.seq_lens,
        "capacity": most_tokens(x),
        "out": partial,
        "lse": partial_lse,
        "sm_scale": float(x.sm_scale),
        "WIDTH": power_of_two(max(size, 16)),
        "R": rope_dim,
        "ROPE_WIDTH": power_of_two(max(rope_dim, 16)),
        "KIND": cache.format.name,
        "OUT": q_kind if splits == 1 else "fp32",
        "SIZE": max(cache.block_size, 1),
        "HEADS": tiles.heads,
        "TOKENS": tiles.tokens,
        **of_blocks("", cache, x.block_table),
    }
    programs = cdiv(heads, tiles.heads) * splits * batch
    launches = [Launch(attend, (programs,), args, tiles.num_warps, tiles.num_stages, target.pdl)]
    if splits > 1:
        args = shared | {
            "partial": partial.view(torch.float32),
            "partial_lse": partial_lse,
            "out": bits(out),
            "lse": lse,
            "COLUMNS": MERGE_COLUMNS,
            "SHARES": MERGE_SHARES,
        }
        grid = (batch * heads, cdiv(size, MERGE_COLUMNS))
        launches.append(Launch(merge, grid, args, target.num_warps, pdl=target.pdl))
    return launches


def most_tokens(x: Call) -> int:
    """Of a sequence, as far as the block table goes."""
    columns, size = int(x.block_table.shape[1]), int(x.cache.block_size)
    return min(columns * max(size, 1), MAX_TOKENS)


def splits_for(x: Call, tiles: Tiles, multiprocessors: int) -> int:
    """The shares to make of each sequence's tokens."""
    programs = x.q.shape[0] * cdiv(x.q.shape[1], tiles.heads)
    most = cdiv(most_tokens(x), tiles.tokens)
    return split_count(programs, multiprocessors * tiles.together, most) if programs else 1


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """The multiprocessors of a device, and the bytes of shared memory that a program may take."""
    if device.type == "cpu":
        return 4, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 64 * 1024)

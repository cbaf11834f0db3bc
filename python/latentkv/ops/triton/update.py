"""The MLA cache update in one launch: rotate query heads and the shared rope key, and write each token's latent vector
and rotated key into its row of a paged cache. In place, rotated heads go back where they came from; the decode prologue
puts the query together elsewhere, and may normalise the latent vector on the way.

A launch has parts, one after the other in its grid: latent vectors, keys, query heads, the query's latent parts. A
program takes a tile of 128 threads by 16 bytes or a few times that. Whatever it can ask for goes out at once: slot,
position, scale and activations; a row that turns out dead has only been read.

Tensors reach the kernels as :func:`codec.bits`, with their strides in elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...cache.layouts import FORMATS, Format
from ..checks import (
    Arguments,
    check_grouped,
    check_norm,
    check_query,
    check_rope,
    check_update,
    checks_values,
    outside,
)
from .codec import apart, bits, div_rn, from_float, kind_of, power_of_two_above, quotient, to_float
from .launch import Launch, Target

CHUNK = tl.constexpr(256)  # latent elements that a program takes of each of its tokens at a time: 32 partials by 8
LATENT_ROWS = 4  # tokens of a program with latent vectors: a warp each
KEY_ROWS = 16  # tokens of a program with keys, at most
PAIR_TILE = 2048  # elements of a tile of heads, about
NOPE_TILE = 2048  # elements of a tile of the query's latent parts, about
MAX_LAYERS = 20  # of a launch: the arguments of a kernel have 4 KB


class Vectors(NamedTuple):
    """[N, .]"""

    data: Tensor
    stride: int


class Heads(NamedTuple):
    """[N, H, .]"""

    data: Tensor
    token_stride: int
    head_stride: int


class Pages(NamedTuple):
    """Rows of a cache [B, bs, .]; bytes for packed formats."""

    data: Tensor
    block_stride: int
    entry_stride: int


# ------------------------------------------------------------------------------------------------------ rows and pairs


@triton.jit
def wait_for_producer(PDL: tl.constexpr):
    """Before memory that others share is touched. Only then is the next grid let go.

    What that reads before its own wait is older than this grid, and must not still be written by the one before.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def load_indices(indices, token, mask):
    """Slots or positions of tokens, int64; -1 without any."""
    if indices is None:
        values = tl.full(token.shape, -1, tl.int64)
    else:
        values = tl.load(indices + token, mask=mask, other=-1).to(tl.int64)
    return values


@triton.jit
def plan(slot, position, present, capacity, max_position, ROTATES: tl.constexpr, ROPE_MASKED: tl.constexpr):
    """What is done for tokens: whether they are alive, are rotated, are written.

    Not alive is one whose slot or position lies outside, or which is padding: a query that goes elsewhere is zero
    there, and nothing else happens.
    """
    in_cache = present & (slot >= 0) & (slot < capacity)
    alive = in_cache | (present & (slot < 0))
    rotate = alive if ROPE_MASKED else in_cache
    if ROTATES:
        in_table = (position >= 0) & (position < max_position)
        alive = tl.where(rotate, in_table, alive)
        rotate = rotate & in_table
    return alive, rotate, in_cache & alive


@triton.jit
def row_at(pages, slot, exists, BLOCK_SIZE: tl.constexpr):
    """Pointers to the rows of slots, those that exist."""
    at = tl.where(exists, slot, 0).to(tl.uint32)
    block, entry = (at // BLOCK_SIZE).to(tl.int64), (at % BLOCK_SIZE).to(tl.int64)
    return pages.data + block * pages.block_stride + entry * pages.entry_stride


@triton.jit
def scales_at(pages, slot, exists, BLOCK_SIZE: tl.constexpr, BYTES: tl.constexpr):
    """Pointers to the scales of slots, those that exist: BYTES for each, after all rows of a block."""
    at = tl.where(exists, slot, 0).to(tl.uint32)
    block, entry = (at // BLOCK_SIZE).to(tl.int64), (at % BLOCK_SIZE).to(tl.int64)
    return pages.data + block * pages.block_stride + BLOCK_SIZE * pages.entry_stride + entry * BYTES


@triton.jit
def load_pairs(rows, mask, DIM: tl.constexpr, HALF: tl.constexpr, IS_NEOX: tl.constexpr):
    """Both members [n, HALF] of the pairs in rows [n, 1] of DIM elements; HALF is DIM / 2 or the next power of two."""
    if IS_NEOX:
        i = tl.arange(0, HALF)[None, :]
        inside = mask & (i < DIM // 2)
        a = tl.load(rows + i, mask=inside, other=0)
        b = tl.load(rows + DIM // 2 + i, mask=inside, other=0)
    else:  # neighbours: one contiguous access
        i = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(rows + i, mask=mask & (i < DIM), other=0)
        a, b = tl.split(x.reshape(x.shape[0], HALF, 2))
    return a, b


@triton.jit
def store_pairs(rows, a, b, mask, DIM: tl.constexpr, HALF: tl.constexpr, IS_NEOX: tl.constexpr):
    """What :func:`load_pairs` loads."""
    if IS_NEOX:
        i = tl.arange(0, HALF)[None, :]
        inside = mask & (i < DIM // 2)
        tl.store(rows + i, a, mask=inside)
        tl.store(rows + DIM // 2 + i, b, mask=inside)
    else:
        i = tl.arange(0, 2 * HALF)[None, :]
        tl.store(rows + i, tl.join(a, b).reshape(a.shape[0], 2 * HALF), mask=mask & (i < DIM))


@triton.jit
def load_angles(
    table, position, mask, DIM: tl.constexpr, HALF: tl.constexpr, TABLE: tl.constexpr, INVERSE: tl.constexpr
):  # fmt: skip
    """cos and sin [n, HALF] of positions [n, 1]."""
    i = tl.arange(0, HALF)[None, :]
    row = table.data + tl.where(mask, position, 0) * table.stride + i
    inside = mask & (i < DIM // 2)
    cos = tl.load(row, mask=inside, other=0)
    sin = tl.load(row + DIM // 2, mask=inside, other=0)
    cos, sin = to_float(cos, TABLE), to_float(sin, TABLE)
    return cos, -sin if INVERSE else sin


@triton.jit
def turn(a, b, cos, sin, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """The bits of pairs, rotated: fp32, every product and sum rounded by itself, then one rounding."""
    x, y = to_float(a, KIND), to_float(b, KIND)
    return from_float(x * cos - y * sin, KIND, CONVERTS), from_float(y * cos + x * sin, KIND, CONVERTS)


@triton.jit
def scaled(x, factor, KIND: tl.constexpr, CODE: tl.constexpr, CONVERTS: tl.constexpr):
    """Bits as another code, times a factor; as they are where the code is their own."""
    return x if KIND == CODE else from_float(to_float(x, KIND) * factor, CODE, CONVERTS)


@triton.jit
def divided(x, scale, KIND: tl.constexpr, CODE: tl.constexpr, HIP: tl.constexpr, CONVERTS: tl.constexpr):
    """Bits as another code, divided by a scale; as they are where the code is their own."""
    return x if KIND == CODE else from_float(quotient(to_float(x, KIND), scale, HIP, CONVERTS), CODE, CONVERTS)


@triton.jit
def scale_of(scale):
    """The number at a pointer, 1 without one."""
    return 1.0 if scale is None else tl.load(scale)


@triton.jit
def greatest_magnitude(bits):
    """Along the last dimension of fp32 bits, of what is a number."""
    magnitude = bits & 0x7FFFFFFF
    greatest = tl.max(tl.where(magnitude > 0x7F800000, 0, magnitude), len(bits.shape) - 1)
    return greatest.to(tl.float32, bitcast=True)


# --------------------------------------------------------------------------------------------------- the latent vector


@triton.jit
def load_chunks(rows, mask, DIM: tl.constexpr):
    """Rows [n, 1] of DIM elements in chunks [n, CHUNK], zero past the end."""
    i = tl.arange(0, CHUNK)[None, :]
    chunks = ()
    for c in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        x = tl.load(rows + c * CHUNK + i, mask=mask & (c * CHUNK + i < DIM), other=0)
        chunks = chunks + (x,)  # type: ignore[assignment]  # noqa: RUF005 -- Triton has no (*chunks, x)
    return chunks


@triton.jit
def inverse_rms(chunks, eps, DIM: tl.constexpr, KIND: tl.constexpr, HIP: tl.constexpr):
    """1 / sqrt(mean of squares + eps) [n, CHUNK], the same for all of a row, in the order that all keep."""
    n: tl.constexpr = chunks[0].shape[0]
    total = tl.zeros([n, 32], tl.float32)
    for c in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        x = to_float(chunks[c], KIND)
        even, odd = tl.split((x * x).reshape(n, 32, 2, 2, 2))
        x04_26, x15_37 = tl.split(even), tl.split(odd)
        x04, x26, x15, x37 = tl.split(x04_26[0]), tl.split(x04_26[1]), tl.split(x15_37[0]), tl.split(x15_37[1])
        total = total + x04[0] + x15[0] + x26[0] + x37[0] + x04[1] + x15[1] + x26[1] + x37[1]
    lane = tl.arange(0, 32)[None, :].broadcast_to(n, 32)
    for step in tl.static_range(5):
        total = total + tl.gather(total, lane ^ (16 >> step), 1)
    root = tl.sqrt_rn(div_rn(total, tl.full([n, 32], DIM, tl.float32), HIP) + eps)
    s = div_rn(tl.full([n, 32], 1.0, tl.float32), root, HIP)
    return s[:, :, None].broadcast_to(n, 32, 8).reshape(n, CHUNK)


@triton.jit
def store_tiles(
    row, scales, x, c, write, DIM: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr, HIP: tl.constexpr,
    CONVERTS: tl.constexpr,
):  # fmt: skip
    """Chunk c of rows as tiles of e4m3fn, each with a power of two for a scale."""
    n: tl.constexpr = x.shape[0]
    tiles: tl.constexpr = CHUNK // TILE
    values = to_float(x, KIND).reshape(n, tiles, TILE)
    amax = greatest_magnitude(values.to(tl.int32, bitcast=True))
    scale = power_of_two_above(tl.maximum(div_rn(amax, tl.full(amax.shape, 448.0, tl.float32), HIP), 1e-4))
    codes = from_float(values * div_rn(1.0, scale, HIP)[:, :, None], "fp8_e4m3fn", CONVERTS)  # exact
    i = c * CHUNK + tl.arange(0, CHUNK)[None, :]
    tl.store(row + i, codes.reshape(n, CHUNK), mask=write & (i < DIM))
    t = c * tiles + tl.arange(0, tiles)[None, :]
    if TILE == 128:
        tl.store(scales.to(tl.pointer_type(tl.float32)) + t, scale, mask=write)
    else:  # seven exponents and a byte that pads them
        exponent = scale.to(tl.int32, bitcast=True) >> 23
        tl.store(scales + t, tl.where(t < DIM // TILE, exponent, 0).to(tl.uint8), mask=write)


@triton.jit
def latent_part(
    program, slots, positions, tokens, capacity, max_position, kv_c, weight, eps, kv_c_out, cache, scale,
    ROWS: tl.constexpr, L: tl.constexpr, KIND: tl.constexpr, CODE: tl.constexpr, TILE: tl.constexpr,
    WEIGHT: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROTATES: tl.constexpr, ROPE_MASKED: tl.constexpr,
    HIP: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """The latent vectors of ROWS tokens: into the cache, normalised if there is a weight."""
    token = program * ROWS + tl.arange(0, ROWS)
    present = token < tokens
    slot, position = load_indices(slots, token, present), load_indices(positions, token, present)
    chunks = load_chunks((kv_c.data + token.to(tl.int64) * kv_c.stride)[:, None], present[:, None], L)
    if weight is not None:
        weights = load_chunks(weight + tl.zeros([ROWS, 1], tl.int32), present[:, None], L)
        s = inverse_rms(chunks, eps, L, KIND, HIP)
    alive, _, write = plan(slot, position, present, capacity, max_position, ROTATES, ROPE_MASKED)
    row = row_at(cache, slot, write, BLOCK_SIZE)[:, None]
    scales = row + L
    if TILE == 64:
        scales = scales_at(cache, slot, write, BLOCK_SIZE, 8)[:, None]
    alive, write = alive[:, None], write[:, None]
    for c in tl.static_range((L + CHUNK - 1) // CHUNK):
        x = chunks[c]
        i = c * CHUNK + tl.arange(0, CHUNK)[None, :]
        if weight is not None:
            x = from_float(apart(to_float(x, KIND) * s * to_float(weights[c], WEIGHT), HIP), KIND, CONVERTS)
            if kv_c_out is not None:
                out = kv_c_out.data + token.to(tl.int64) * kv_c_out.stride
                tl.store(out[:, None] + i, x, mask=alive & (i < L))
        if TILE == 0:
            code = divided(x, scale, KIND, CODE, HIP, CONVERTS)
            tl.store(row + i, code, mask=write & (i < L))
        else:
            store_tiles(row, scales, x, c, write, L, KIND, TILE, HIP, CONVERTS)


# ------------------------------------------------------------------------------------------------- key and query heads


@triton.jit
def key_part(
    program, slots, positions, tokens, capacity, max_position, table, key, rope_cache, scale,
    ROWS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr, CODE: tl.constexpr,
    TILE: tl.constexpr, TABLE: tl.constexpr, ROPE_AT: tl.constexpr, BLOCK_SIZE: tl.constexpr, IS_NEOX: tl.constexpr,
    INVERSE: tl.constexpr, ROTATES: tl.constexpr, ROPE_MASKED: tl.constexpr, IN_PLACE: tl.constexpr,
    HIP: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """The rope keys of ROWS tokens: rotated, in place if that is asked for, and into the cache if there is one."""
    token = program * ROWS + tl.arange(0, ROWS)
    present = token < tokens
    slot, position = load_indices(slots, token, present), load_indices(positions, token, present)
    from_ = (key.data + token.to(tl.int64) * key.stride)[:, None]
    a, b = load_pairs(from_, present[:, None], R, HALF, IS_NEOX)
    _, rotate, write = plan(slot, position, present, capacity, max_position, ROTATES, ROPE_MASKED)
    rotate, write = rotate[:, None], write[:, None]
    if ROTATES:
        cos, sin = load_angles(table, position[:, None], rotate, R, HALF, TABLE, INVERSE)
        x, y = turn(a, b, cos, sin, KIND, CONVERTS)
        if IN_PLACE:
            store_pairs(from_, x, y, rotate, R, HALF, IS_NEOX)
        a, b = tl.where(rotate, x, a), tl.where(rotate, y, b)
    if rope_cache is not None:
        row = row_at(rope_cache, slot[:, None], write, BLOCK_SIZE) + ROPE_AT
        if TILE == 0:
            a, b = divided(a, scale, KIND, CODE, HIP, CONVERTS), divided(b, scale, KIND, CODE, HIP, CONVERTS)
        else:
            row = row.to(tl.pointer_type(tl.int16))
        store_pairs(row, a, b, write, R, HALF, IS_NEOX)


@triton.jit
def heads_part(
    program, slots, positions, tokens, capacity, max_position, table, heads, out, scale,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr,
    CODE: tl.constexpr, TABLE: tl.constexpr, IS_NEOX: tl.constexpr, INVERSE: tl.constexpr, ROTATES: tl.constexpr,
    ROPE_MASKED: tl.constexpr, HIP: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """BLOCK heads of one token, rotated: in place or, where there is an ``out``, there, zero where it is not alive."""
    groups: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    token = program // groups
    head = program % groups * BLOCK + tl.arange(0, BLOCK)[:, None]
    present, exists = token < tokens, head < HEADS
    slot, position = load_indices(slots, token, present), load_indices(positions, token, present)
    from_ = heads.data + token.to(tl.int64) * heads.token_stride + head.to(tl.int64) * heads.head_stride
    a, b = load_pairs(from_, exists & present, R, HALF, IS_NEOX)
    alive, rotate, _ = plan(slot, position, present, capacity, max_position, ROTATES, ROPE_MASKED)
    if ROTATES:
        cos, sin = load_angles(table, position, rotate, R, HALF, TABLE, INVERSE)
        x, y = turn(a, b, cos, sin, KIND, CONVERTS)
        if out is None:
            store_pairs(from_, x, y, exists & rotate, R, HALF, IS_NEOX)
        else:
            a, b = tl.where(rotate, x, a), tl.where(rotate, y, b)
    if out is not None:
        factor = div_rn(1.0, scale, HIP)
        a, b = scaled(a, factor, KIND, CODE, CONVERTS), scaled(b, factor, KIND, CODE, CONVERTS)
        to = out.data + token.to(tl.int64) * out.token_stride + head.to(tl.int64) * out.head_stride
        store_pairs(to, tl.where(alive, a, 0), tl.where(alive, b, 0), exists, R, HALF, IS_NEOX)


@triton.jit
def nope_part(
    program, slots, positions, tokens, capacity, max_position, nope, out, scale,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr,
    CODE: tl.constexpr, ROTATES: tl.constexpr, ROPE_MASKED: tl.constexpr, HIP: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """The latent parts of BLOCK heads of one token to the query.

    Those that are there already only become zero where the token is not alive, and a program has all heads.
    """
    groups: tl.constexpr = 1 if nope is None else (HEADS + BLOCK - 1) // BLOCK
    token = program // groups
    head = program % groups * BLOCK + tl.arange(0, BLOCK)[:, None]
    i = tl.arange(0, WIDTH)[None, :]
    present = token < tokens
    slot, position = load_indices(slots, token, present), load_indices(positions, token, present)
    to = out.data + token.to(tl.int64) * out.token_stride + i
    if nope is None:
        alive, _, _ = plan(slot, position, present, capacity, max_position, ROTATES, ROPE_MASKED)
        if alive == 0:
            zeros = tl.zeros([BLOCK, WIDTH], tl.int8).to(out.data.dtype.element_ty)
            for first in range(0, HEADS, BLOCK):
                each = first + head
                tl.store(to + each.to(tl.int64) * out.head_stride, zeros, mask=(each < HEADS) & (i < L))
    else:
        exists = (head < HEADS) & (i < L)
        from_ = nope.data + token.to(tl.int64) * nope.token_stride + head.to(tl.int64) * nope.head_stride + i
        x = tl.load(from_, mask=exists & present, other=0)
        alive, _, _ = plan(slot, position, present, capacity, max_position, ROTATES, ROPE_MASKED)
        code = scaled(x, div_rn(1.0, scale, HIP), KIND, CODE, CONVERTS)
        tl.store(to + head.to(tl.int64) * out.head_stride, tl.where(alive, code, 0), mask=exists)


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["rows", "tokens", "capacity", "max_position"])  # what varies makes no other kernel
def update_kernel(
    slots, positions, rows, tokens, capacity, max_position, table, kv_c, weight, eps, kv_c_out, key, query, more_heads,
    q_out, q_rope_out, nope, q_scale, cache, rope_cache, scale,
    HEADS: tl.constexpr, MORE_HEADS: tl.constexpr, L: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    KIND: tl.constexpr, CODE: tl.constexpr, TILE: tl.constexpr, QUERY: tl.constexpr, TABLE: tl.constexpr,
    WEIGHT: tl.constexpr, ROPE_AT: tl.constexpr, BLOCK_SIZE: tl.constexpr, LATENT_ROWS: tl.constexpr,
    KEY_ROWS: tl.constexpr, HEAD_BLOCK: tl.constexpr, MORE_BLOCK: tl.constexpr, NOPE_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, IS_NEOX: tl.constexpr, INVERSE: tl.constexpr, ROTATES: tl.constexpr,
    ROPE_MASKED: tl.constexpr, IN_PLACE: tl.constexpr, HIP: tl.constexpr, CONVERTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Whatever of the update there are tensors for; ``rows`` is N where a query goes elsewhere, else T."""
    wait_for_producer(PDL)
    program = tl.program_id(0)
    if kv_c is not None:
        programs = tl.cdiv(tokens, LATENT_ROWS)
        if program < programs:
            latent_part(
                program, slots, positions, tokens, capacity, max_position, kv_c, weight, eps, kv_c_out, cache,
                scale_of(scale), LATENT_ROWS, L, KIND, CODE, TILE, WEIGHT, BLOCK_SIZE, ROTATES, ROPE_MASKED, HIP,
                CONVERTS,
            )  # fmt: skip
        program -= programs
    if key is not None:
        programs = tl.cdiv(tokens, KEY_ROWS)
        if (program >= 0) & (program < programs):
            key_part(
                program, slots, positions, tokens, capacity, max_position, table, key, rope_cache, scale_of(scale),
                KEY_ROWS, R, HALF, KIND, CODE, TILE, TABLE, ROPE_AT, BLOCK_SIZE, IS_NEOX, INVERSE, ROTATES, ROPE_MASKED,
                IN_PLACE, HIP, CONVERTS,
            )  # fmt: skip
        program -= programs
    if query is not None:
        programs = rows * ((HEADS + HEAD_BLOCK - 1) // HEAD_BLOCK)
        if (program >= 0) & (program < programs):
            heads_part(
                program, slots, positions, tokens, capacity, max_position, table, query, q_rope_out, scale_of(q_scale),
                HEADS, HEAD_BLOCK, R, HALF, KIND, QUERY, TABLE, IS_NEOX, INVERSE, ROTATES, ROPE_MASKED, HIP, CONVERTS,
            )  # fmt: skip
        program -= programs
    if more_heads is not None and program >= 0:
        heads_part(
            program, slots, positions, tokens, capacity, max_position, table, more_heads, None, 1.0, MORE_HEADS,
            MORE_BLOCK, R, HALF, KIND, KIND, TABLE, IS_NEOX, INVERSE, ROTATES, ROPE_MASKED, HIP, CONVERTS,
        )  # fmt: skip
    if q_out is not None and program >= 0:
        nope_part(
            program, slots, positions, tokens, capacity, max_position, nope, q_out, scale_of(q_scale), HEADS,
            NOPE_BLOCK, L, WIDTH, KIND, QUERY, ROTATES, ROPE_MASKED, HIP, CONVERTS,
        )  # fmt: skip


@triton.jit
def _chosen(index, values):
    """The one of a tuple's pointers or numbers; as far as the compiler knows, any of them."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit(do_not_specialize=["tokens", "capacity"])
def grouped_kernel(
    slots, tokens, capacity, kv_c, keys, caches, rope_caches, scales,
    L: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr, CODE: tl.constexpr, TILE: tl.constexpr,
    ROPE_AT: tl.constexpr, BLOCK_SIZE: tl.constexpr, LATENT_ROWS: tl.constexpr, KEY_ROWS: tl.constexpr,
    SCALED: tl.constexpr, HIP: tl.constexpr, CONVERTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The rows of a few layers: tuples with an entry for each; ``scales`` with one for each of the layers SCALED."""
    wait_for_producer(PDL)
    layer, program = tl.program_id(1), tl.program_id(0)
    scale = 1.0
    if scales is not None:
        scale_at, has_scale = scales[0], layer == SCALED[0]
        for i in tl.static_range(1, len(SCALED)):
            scale_at = tl.where(layer == SCALED[i], scales[i], scale_at)
            has_scale = has_scale | (layer == SCALED[i])
        scale = tl.load(scale_at, mask=has_scale, other=1.0)
    programs = tl.cdiv(tokens, LATENT_ROWS)
    if program < programs:
        latents = Vectors(_chosen(layer, kv_c.data), _chosen(layer, kv_c.stride))
        cache = Pages(
            _chosen(layer, caches.data), _chosen(layer, caches.block_stride), _chosen(layer, caches.entry_stride)
        )
        latent_part(
            program, slots, None, tokens, capacity, 0, latents, None, 0.0, None, cache, scale, LATENT_ROWS, L, KIND,
            CODE, TILE, KIND, BLOCK_SIZE, False, False, HIP, CONVERTS,
        )  # fmt: skip
    if keys is not None and program >= programs:
        key = Vectors(_chosen(layer, keys.data), _chosen(layer, keys.stride))
        cache = Pages(
            _chosen(layer, rope_caches.data),
            _chosen(layer, rope_caches.block_stride),
            _chosen(layer, rope_caches.entry_stride),
        )
        key_part(
            program - programs, slots, None, tokens, capacity, 0, None, key, cache, scale, KEY_ROWS, R, HALF, KIND,
            CODE, TILE, KIND, ROPE_AT, BLOCK_SIZE, False, False, False, False, False, HIP, CONVERTS,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- launches


def power_of_two(n: int) -> int:
    """The least one that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def heads_of(t: Tensor) -> Heads:
    """A tensor [N, H, .] as the kernels take it."""
    return Heads(bits(t), t.stride(0), t.stride(1))


def vectors(t: Tensor) -> Vectors:
    """A tensor [N, .] as the kernels take it."""
    return Vectors(bits(t), t.stride(0))


def pages(cache: Tensor, f: Format) -> Pages:
    """A cache tensor as the kernels take it."""
    entry = cache.stride(-2)
    if f.packed and f.packed.block_multiple is not None:
        entry = f.packed.dims[0] + 2 * f.packed.dims[1]  # scales lie apart
    return Pages(bits(cache), cache.stride(0), entry)


def _block(count: int, width: int, tile: int) -> int:
    """Heads of a program, for a tile of about so many elements."""
    return min(power_of_two(count), max(tile // max(width, 1), 1))


def key_rows(half: int) -> int:
    """Tokens of a program with keys of 2 * half elements."""
    return min(KEY_ROWS, max(PAIR_TILE // 2 // (2 * half), 1))


def _of_rows(cache: Tensor, rope_cache: Tensor | None, f: Format, latent_dim: int, rope_dim: int) -> dict[str, Any]:
    """The constexprs of a cache and its rows."""
    rope_at = 0 if rope_cache is not None else latent_dim
    if f.packed and f.packed.block_multiple is None:
        rope_at = f.packed.row_bytes - 2 * rope_dim  # behind the scales
    half = power_of_two(rope_dim // 2)
    return {
        "L": latent_dim,
        "R": rope_dim,
        "HALF": half,
        "CODE": "fp8_e4m3fn" if f.packed else f.name,
        "TILE": f.packed.tile if f.packed else 0,
        "ROPE_AT": rope_at,
        "BLOCK_SIZE": max(cache.shape[-2], 1),
        "LATENT_ROWS": LATENT_ROWS,
        "KEY_ROWS": key_rows(half),
    }


def of_target(target: Target) -> dict[str, Any]:
    """The constexprs of a target."""
    return {"HIP": target.hip, "CONVERTS": target.converts, "PDL": target.pdl}


_WITHOUT: dict[str, Any] = {  # what update_kernel takes for what an op does not have
    **dict.fromkeys(("slots", "positions", "table", "kv_c", "weight", "kv_c_out", "key", "query", "more_heads")),
    **dict.fromkeys(("q_out", "q_rope_out", "nope", "q_scale", "cache", "rope_cache", "scale")),
    **dict.fromkeys(("rows", "tokens", "capacity", "max_position", "HEADS", "MORE_HEADS", "L", "TILE", "ROPE_AT"), 0),
    **dict.fromkeys(("BLOCK_SIZE", "LATENT_ROWS", "KEY_ROWS", "HEAD_BLOCK", "MORE_BLOCK", "NOPE_BLOCK", "WIDTH"), 1),
    **dict.fromkeys(("CODE", "QUERY", "TABLE", "WEIGHT"), ""),
    **dict.fromkeys(("IS_NEOX", "INVERSE", "ROTATES", "ROPE_MASKED"), False),
    "IN_PLACE": True,
    "eps": 0.0,
}


def of_rotation(positions: Tensor | None, table: Tensor | None, is_neox: bool) -> dict[str, Any]:
    """What the kernels take for a rotation; nothing where there is none."""
    if positions is None or table is None or table.shape[1] == 0:
        return {}
    return {
        "positions": positions,
        "table": vectors(table),
        "max_position": table.shape[0],
        "TABLE": kind_of(table.dtype),
        "IS_NEOX": is_neox,
        "ROTATES": True,
    }


def _rows(
    kv_c: Tensor,
    k_pe: Tensor,
    slots: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
) -> tuple[int, dict[str, Any]]:
    """The programs that write rows, and what update_kernel takes for them."""
    f, tokens, rope_dim = FORMATS[format], len(slots), k_pe.shape[1]
    args = {
        "slots": slots,
        "rows": tokens,
        "tokens": tokens,
        "capacity": cache.shape[0] * cache.shape[-2],
        "kv_c": vectors(kv_c),
        "key": vectors(k_pe) if rope_dim else None,
        "cache": pages(cache, f),
        "rope_cache": pages(cache if rope_cache is None else rope_cache, f),
        "scale": scale if f.quantised else None,
        "KIND": kind_of(kv_c.dtype),
        **_of_rows(cache, rope_cache, f, kv_c.shape[1], rope_dim),
    }
    return cdiv(tokens, LATENT_ROWS) + (cdiv(tokens, args["KEY_ROWS"]) if rope_dim else 0), args


def _launch(target: Target, programs: int, *parts: dict[str, Any]) -> list[Launch]:
    args = _WITHOUT | of_target(target)
    for part in parts:
        args |= part
    return [Launch(update_kernel, (programs,), args, target.num_warps, pdl=target.pdl)]


def rope_launches(
    target: Target,
    positions: Tensor,
    q: Tensor,
    k: Tensor | None,
    cos_sin_cache: Tensor,
    is_neox: bool,
    inverse: bool = False,
) -> list[Launch]:
    """The launches of rope_; its arguments have been checked."""
    n, heads, rope_dim = q.shape
    half = power_of_two(rope_dim // 2)
    args: dict[str, Any] = {"rows": n, "tokens": n, "KIND": kind_of(q.dtype), "R": rope_dim, "HALF": half}
    args |= {"INVERSE": inverse, "ROPE_MASKED": True, "HEADS": heads, "HEAD_BLOCK": _block(heads, 2 * half, PAIR_TILE)}
    programs = 0
    if q.numel():
        args["query"] = heads_of(q)
        programs += n * cdiv(heads, args["HEAD_BLOCK"])
    if k is not None and k.numel() and (k.dim() == 2 or k.shape[1] == 1):
        args |= {"key": vectors(k), "KEY_ROWS": key_rows(half)}
        programs += cdiv(n, args["KEY_ROWS"])
    elif k is not None and k.numel():
        block = _block(k.shape[1], 2 * half, PAIR_TILE)
        args |= {"more_heads": heads_of(k), "MORE_HEADS": k.shape[1], "MORE_BLOCK": block}
        programs += n * cdiv(k.shape[1], block)
    return _launch(target, programs, args, of_rotation(positions, cos_sin_cache, is_neox))


def write_cache_launches(
    target: Target,
    kv_c: Tensor,
    k_pe: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
) -> list[Launch]:
    """The launches of write_cache_."""
    programs, rows = _rows(kv_c, k_pe, slot_mapping, cache, rope_cache, scale, format)
    return _launch(target, programs, rows)


def rope_write_cache_launches(
    target: Target,
    positions: Tensor | None,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    cos_sin_cache: Tensor | None,
    slot_mapping: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    is_neox: bool,
    rope_masked: bool = False,
) -> list[Launch]:
    """The launches of rope_write_cache_."""
    programs, rows = _rows(kv_c, k_pe, slot_mapping, cache, rope_cache, scale, format)
    rotation = of_rotation(positions, cos_sin_cache, is_neox)
    args: dict[str, Any] = {"ROPE_MASKED": rope_masked}
    if rotation and q_pe.shape[1]:
        heads = q_pe.shape[1]
        block = _block(heads, 2 * rows["HALF"], PAIR_TILE)
        args |= {"query": heads_of(q_pe), "HEADS": heads, "HEAD_BLOCK": block}
        programs += len(slot_mapping) * cdiv(heads, block)
    return _launch(target, programs, rows, rotation, args)


def decode_prologue_launches(
    target: Target,
    q_nope: Tensor | None,
    q_pe: Tensor,
    kv_c: Tensor,
    k_pe: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    slot_mapping: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    q_out: Tensor,
    q_rope_out: Tensor | None,
    kv_c_out: Tensor | None,
    q_scale: Tensor | None,
    kv_norm_weight: Tensor | None,
    is_neox: bool,
    kv_norm_eps: float = 1e-6,
    rope_masked: bool = True,
) -> list[Launch]:
    """The launches of decode_prologue."""
    n, heads, rope_dim = q_pe.shape
    latent_dim = kv_c.shape[1]
    programs, rows = _rows(kv_c, k_pe, slot_mapping, cache, rope_cache, scale, format)
    width = power_of_two(latent_dim)
    args: dict[str, Any] = {
        "rows": n,
        "IN_PLACE": False,
        "eps": kv_norm_eps,
        "QUERY": kind_of(q_out.dtype),
        "HEADS": heads,
        "HEAD_BLOCK": _block(heads, 2 * rows["HALF"], PAIR_TILE),
        "NOPE_BLOCK": _block(heads, width, NOPE_TILE),
        "WIDTH": width,
        "ROPE_MASKED": rope_masked,
        "q_scale": q_scale if q_out.dtype.itemsize == 1 else None,
    }
    if kv_norm_weight is not None:
        args |= {"weight": bits(kv_norm_weight), "WEIGHT": kind_of(kv_norm_weight.dtype)}
        args["kv_c_out"] = None if kv_c_out is None else vectors(kv_c_out)
    if heads:
        args |= {"q_out": heads_of(q_out), "nope": None if q_nope is None else heads_of(q_nope)}
        programs += n * (1 if q_nope is None else cdiv(heads, args["NOPE_BLOCK"]))
    if heads and rope_dim:
        args["query"] = heads_of(q_pe)
        args["q_rope_out"] = heads_of(q_out[..., latent_dim:] if q_rope_out is None else q_rope_out)
        programs += n * cdiv(heads, args["HEAD_BLOCK"])
    return _launch(target, programs, rows, of_rotation(positions, cos_sin_cache, is_neox), args)


def write_cache_grouped_launches(
    target: Target,
    kv_c: Sequence[Tensor],
    k_pe: Sequence[Tensor],
    slot_mapping: Tensor,
    caches: Sequence[Tensor],
    rope_caches: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    format: str,
) -> list[Launch]:
    """The launches of write_cache_grouped_: one for every MAX_LAYERS layers."""
    f, tokens, (latent_dim, rope_dim) = FORMATS[format], len(slot_mapping), (kv_c[0].shape[1], k_pe[0].shape[1])
    layout = _of_rows(caches[0], rope_caches[0] if rope_caches else None, f, latent_dim, rope_dim)
    programs = cdiv(tokens, LATENT_ROWS) + (cdiv(tokens, layout["KEY_ROWS"]) if rope_dim else 0)
    launches = []
    for first in range(0, len(kv_c), MAX_LAYERS):
        some = slice(first, first + MAX_LAYERS)
        scaled = {i: scale for i, scale in enumerate(scales[some]) if f.quantised and scale is not None}
        args = {
            "slots": slot_mapping,
            "tokens": tokens,
            "capacity": caches[0].shape[0] * caches[0].shape[-2],
            "kv_c": Vectors(*_columns(map(vectors, kv_c[some]))),
            "keys": Vectors(*_columns(map(vectors, k_pe[some]))) if rope_dim else None,
            "caches": Pages(*_columns(pages(cache, f) for cache in caches[some])),
            "rope_caches": Pages(*_columns(pages(cache, f) for cache in (rope_caches or caches)[some])),
            "scales": tuple(scaled.values()) or None,
            "SCALED": tuple(scaled),
            "KIND": kind_of(kv_c[0].dtype),
            **layout,
            **of_target(target),
        }
        grid = (programs, len(kv_c[some]))
        launches.append(Launch(grouped_kernel, grid, args, target.num_warps, pdl=target.pdl))
    return launches


def _columns(rows: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    return zip(*rows, strict=True)


# --------------------------------------------------------------------------------------------------------- the ops


def check_values(
    args: Arguments,
    slots: Tensor | None,
    cache: Tensor | None,
    positions: Tensor | None = None,
    table: Tensor | None = None,
    rope_masked: bool = False,
) -> None:
    """Raises for a slot past the capacity, or a position outside the table, where values are looked at."""
    if not checks_values(args.device):
        return
    if slots is None or cache is None:
        assert positions is not None, "no indices to look at"
        outside(args, torch.ones_like(positions, dtype=torch.bool), None, 0, positions, table)
        return
    rotates = (slots >= 0) | rope_masked
    if table is None or table.shape[1] == 0:
        rotates = torch.zeros_like(rotates)
    positions = positions[: len(slots)] if positions is not None else None
    outside(args, rotates, slots, cache.shape[0] * cache.shape[-2], positions, table)


def run(launches: Iterable[Launch]) -> None:
    """One after the other."""
    for launch in launches:
        launch.run()


def rope_(
    positions: Tensor, q: Tensor, k: Tensor | None, cos_sin_cache: Tensor, is_neox: bool, inverse: bool = False
) -> None:
    """See :meth:`latentkv.providers.Provider.rope_`."""
    args = Arguments("rope_", q.device)
    check_rope(args, positions, q, k, cos_sin_cache)
    if q.shape[2]:
        check_values(args, None, None, positions, cos_sin_cache)
    run(rope_launches(Target.of(q.device), positions, q, k, cos_sin_cache, is_neox, inverse))


def write_cache_(
    kv_c: Tensor,
    k_pe: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
) -> None:
    """See :meth:`latentkv.providers.Provider.write_cache_`."""
    args = Arguments("write_cache_", kv_c.device)
    check_update(args, None, None, k_pe, kv_c, None, slot_mapping, cache, rope_cache, scale, format, False)
    check_values(args, slot_mapping, cache)
    run(write_cache_launches(Target.of(kv_c.device), kv_c, k_pe, slot_mapping, cache, rope_cache, scale, format))


def rope_write_cache_(
    positions: Tensor | None,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    cos_sin_cache: Tensor | None,
    slot_mapping: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    is_neox: bool,
    rope_masked: bool = False,
) -> None:
    """See :meth:`latentkv.providers.Provider.rope_write_cache_`."""
    args, rotates = Arguments("rope_write_cache_", kv_c.device), cos_sin_cache is not None
    check_update(
        args, positions, q_pe, k_pe, kv_c, cos_sin_cache, slot_mapping, cache, rope_cache, scale, format, rotates
    )
    check_values(args, slot_mapping, cache, positions, cos_sin_cache, rope_masked)
    run(
        rope_write_cache_launches(
            Target.of(kv_c.device), positions, q_pe, k_pe, kv_c, cos_sin_cache, slot_mapping, cache, rope_cache, scale,
            format, is_neox, rope_masked,
        )
    )  # fmt: skip


def decode_prologue(
    q_nope: Tensor | None,
    q_pe: Tensor,
    kv_c: Tensor,
    k_pe: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    slot_mapping: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    q_out: Tensor,
    q_rope_out: Tensor | None,
    kv_c_out: Tensor | None,
    q_scale: Tensor | None,
    kv_norm_weight: Tensor | None,
    is_neox: bool,
    kv_norm_eps: float = 1e-6,
    rope_masked: bool = True,
) -> None:
    """See :meth:`latentkv.providers.Provider.decode_prologue`."""
    args = Arguments("decode_prologue", kv_c.device)
    check_update(
        args, positions, q_pe, k_pe, kv_c, cos_sin_cache, slot_mapping, cache, rope_cache, scale, format, False
    )
    check_query(args, q_nope, q_pe, kv_c, q_out, q_rope_out, q_scale)
    check_norm(args, kv_c, kv_norm_weight, kv_c_out)
    check_values(args, slot_mapping, cache, positions, cos_sin_cache, rope_masked)
    run(
        decode_prologue_launches(
            Target.of(kv_c.device), q_nope, q_pe, kv_c, k_pe, positions, cos_sin_cache, slot_mapping, cache, rope_cache,
            scale, format, q_out, q_rope_out, kv_c_out, q_scale, kv_norm_weight, is_neox, kv_norm_eps, rope_masked,
        )
    )  # fmt: skip


def write_cache_grouped_(
    kv_c: Sequence[Tensor],
    k_pe: Sequence[Tensor],
    slot_mapping: Tensor,
    caches: Sequence[Tensor],
    rope_caches: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    format: str,
) -> None:
    """See :meth:`latentkv.providers.Provider.write_cache_grouped_`."""
    args = Arguments("write_cache_grouped_", kv_c[0].device if kv_c else slot_mapping.device)
    check_grouped(args, kv_c, k_pe, slot_mapping, caches, rope_caches, scales, format)
    check_values(args, slot_mapping, caches[0])
    target = Target.of(args.device)
    run(write_cache_grouped_launches(target, kv_c, k_pe, slot_mapping, caches, rope_caches, scales, format))

"""The MLA cache update in one launch: rotate query heads and the shared rope key, and write each token's latent vector
and rotated key into its row of a paged cache. In place, rotated heads go back where they came from; the decode prologue
puts the query together elsewhere, and may normalise the latent vector on the way.

A launch has parts, one after the other in its grid: latent vectors, keys, query heads, the query's latent parts. A
program takes a tile of 128 threads by 16 bytes or a few times that. Whatever it can ask for goes out at once: slot,
position, scale and activations; a row that turns out dead has only been read.

Tensors reach the kernels as :func:`codec.bits`, with their strides in elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..checks import Call, Rotation, Stored
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


# What varies from step to step makes no other kernel.
@triton.jit(
    do_not_specialize=["rows", "tokens", "capacity", "max_position"],
    do_not_specialize_on_alignment=["slots", "positions"],
)
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


@triton.jit(do_not_specialize=["tokens", "capacity"], do_not_specialize_on_alignment=["slots"])
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


def pages(t: Tensor, cache: Stored) -> Pages:
    """A tensor of a cache as the kernels take it."""
    entry, packed = t.stride(-2), cache.format.packed
    if packed and packed.block_multiple is not None:
        entry = packed.dims[0] + 2 * packed.dims[1]  # scales lie apart
    return Pages(bits(t), t.stride(0), entry)


def of_target(target: Target) -> dict[str, Any]:
    """The constexprs of a target."""
    return {"HIP": target.hip, "CONVERTS": target.converts, "PDL": target.pdl}


def of_rotation(rotation: Rotation | None) -> dict[str, Any]:
    """What the kernels take for a rotation, or for none."""
    if rotation is None:
        return {"positions": None, "table": None, "max_position": 0, "TABLE": "", "IS_NEOX": False, "ROTATES": False}
    return {
        "positions": rotation.positions,
        "table": vectors(rotation.table),
        "max_position": rotation.table.shape[0],
        "TABLE": kind_of(rotation.table.dtype),
        "IS_NEOX": rotation.is_neox,
        "ROTATES": True,
    }


def _of_rows(cache: Stored) -> dict[str, Any]:
    """The constexprs of a cache and its rows."""
    packed, half = cache.format.packed, power_of_two(cache.rope_dim // 2)
    rope_at = 0 if cache.rope_data is not None else cache.latent_dim
    if packed and packed.block_multiple is None:
        rope_at = packed.row_bytes - 2 * cache.rope_dim  # behind the scales
    return {
        "L": cache.latent_dim,
        "R": cache.rope_dim,
        "HALF": half,
        "CODE": "fp8_e4m3fn" if packed else cache.format.name,
        "TILE": packed.tile if packed else 0,
        "ROPE_AT": rope_at,
        "BLOCK_SIZE": max(cache.block_size, 1),
        "LATENT_ROWS": LATENT_ROWS,
        "KEY_ROWS": _key_rows(half),
    }


def _key_rows(half: int) -> int:
    """Tokens of a program with keys of 2 * half elements."""
    return min(KEY_ROWS, max(PAIR_TILE // 2 // (2 * half), 1))


def _block(count: int, width: int, tile: int) -> int:
    """Heads of a program, for a tile of about so many elements."""
    return min(power_of_two(count), max(tile // max(width, 1), 1))


_WITHOUT: dict[str, Any] = {  # what update_kernel takes for what an op does not have
    **dict.fromkeys(("slots", "kv_c", "weight", "kv_c_out", "key", "query", "more_heads", "q_out", "q_rope_out")),
    **dict.fromkeys(("nope", "q_scale", "cache", "rope_cache", "scale")),
    **dict.fromkeys(("capacity", "HEADS", "MORE_HEADS", "L", "TILE", "ROPE_AT"), 0),
    **dict.fromkeys(("BLOCK_SIZE", "LATENT_ROWS", "KEY_ROWS", "HEAD_BLOCK", "MORE_BLOCK", "NOPE_BLOCK", "WIDTH"), 1),
    **dict.fromkeys(("CODE", "QUERY", "WEIGHT"), ""),
    "eps": 0.0,
}


def update_launches(target: Target, x: Call) -> list[Launch]:
    """The launch of an update: whichever of rows, keys, query and norm the op has."""
    q, k, in_place = (x.q, x.k, True) if x.kv_c is None else (x.q_pe, x.k_pe, x.q_out is None)
    width, half = x.sizes["R"], power_of_two(x.sizes["R"] // 2)
    tokens, rows = x.tokens, x.tokens if in_place else x.sizes["N"]
    args = _WITHOUT | of_target(target) | of_rotation(x.rotation)
    args |= {"rows": rows, "tokens": tokens, "KIND": kind_of(k.dtype if q is None else q.dtype), "R": width}
    args |= {"HALF": half, "IN_PLACE": in_place, "INVERSE": x.rotation is not None and x.rotation.inverse}
    args["ROPE_MASKED"] = x.slot_mapping is None or bool(x.rope_masked)
    programs = 0
    for cache in x.written:
        args |= _of_rows(cache)
        args |= {"slots": x.slot_mapping, "capacity": cache.capacity, "kv_c": vectors(x.kv_c), "scale": cache.scale}
        args["cache"] = pages(cache.data, cache)
        args["rope_cache"] = pages(cache.data if cache.rope_data is None else cache.rope_data, cache)
        programs += cdiv(tokens, LATENT_ROWS)
    if k is not None and k.numel() and (x.slot_mapping is not None or k.dim() == 2 or k.shape[1] == 1):
        args |= {"key": vectors(k), "KEY_ROWS": _key_rows(half)}
        programs += cdiv(tokens, args["KEY_ROWS"])
    elif k is not None and k.numel():
        block = _block(k.shape[1], 2 * half, PAIR_TILE)
        args |= {"more_heads": heads_of(k), "MORE_HEADS": k.shape[1], "MORE_BLOCK": block}
        programs += rows * cdiv(k.shape[1], block)
    if q is not None and q.numel() and (x.rotation is not None or not in_place):
        block = _block(q.shape[1], 2 * half, PAIR_TILE)
        args |= {"query": heads_of(q), "HEADS": q.shape[1], "HEAD_BLOCK": block}
        programs += rows * cdiv(q.shape[1], block)
    if not in_place:
        programs += _of_query(args, x)
    return [Launch(update_kernel, (programs,), args, target.num_warps, pdl=target.pdl)]


def _of_query(args: dict[str, Any], x: Call) -> int:
    """Adds where the prologue's query goes, and the norm; the programs that its latent parts take."""
    heads, size = x.sizes["H"], x.sizes["L"]
    args |= {"QUERY": kind_of(x.q_out.dtype), "q_scale": x.q_scale if x.q_out.dtype.itemsize == 1 else None}
    args |= {"WIDTH": power_of_two(size), "NOPE_BLOCK": _block(heads, power_of_two(size), NOPE_TILE)}
    if x.kv_norm_weight is not None:
        args |= {"weight": bits(x.kv_norm_weight), "WEIGHT": kind_of(x.kv_norm_weight.dtype), "eps": x.kv_norm_eps}
        args["kv_c_out"] = None if x.kv_c_out is None else vectors(x.kv_c_out)
    if not heads:
        return 0
    args |= {"HEADS": heads, "q_out": heads_of(x.q_out), "nope": None if x.q_nope is None else heads_of(x.q_nope)}
    if args["query"] is not None:
        args["q_rope_out"] = heads_of(x.q_out[..., size:] if x.q_rope_out is None else x.q_rope_out)
    return int(args["rows"] * (1 if x.q_nope is None else cdiv(heads, args["NOPE_BLOCK"])))


def grouped_launches(target: Target, x: Call) -> list[Launch]:
    """The launches of write_cache_grouped_: one for every MAX_LAYERS layers."""
    layout, tokens, has_key = _of_rows(x.caches[0]), x.tokens, x.sizes["R"] > 0
    programs = cdiv(tokens, LATENT_ROWS) + (cdiv(tokens, layout["KEY_ROWS"]) if has_key else 0)
    launches = []
    for first in range(0, len(x.kv_c), MAX_LAYERS):
        some = slice(first, first + MAX_LAYERS)
        caches: list[Stored] = x.caches[some]
        scaled = {i: cache.scale for i, cache in enumerate(caches) if cache.scale is not None}
        ropes = [c.data if c.rope_data is None else c.rope_data for c in caches]
        args = {
            "slots": x.slot_mapping,
            "tokens": tokens,
            "capacity": caches[0].capacity,
            "kv_c": Vectors(*_columns(map(vectors, x.kv_c[some]))),
            "keys": Vectors(*_columns(map(vectors, x.k_pe[some]))) if has_key else None,
            "caches": Pages(*_columns(pages(cache.data, cache) for cache in caches)),
            "rope_caches": Pages(*_columns(pages(t, cache) for t, cache in zip(ropes, caches, strict=True))),
            "scales": tuple(scaled.values()) or None,
            "SCALED": tuple(scaled),
            "KIND": kind_of(x.kv_c[0].dtype),
            **layout,
            **of_target(target),
        }
        grid = (programs, len(caches))
        launches.append(Launch(grouped_kernel, grid, args, target.num_warps, pdl=target.pdl))
    return launches


def _columns(rows: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    return zip(*rows, strict=True)

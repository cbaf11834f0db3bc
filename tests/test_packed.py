"""Rows that bring their own scales: fp8_ds_mla, fp8_model1, the indexer's keys. Byte for byte as they are published."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import latentkv
import pytest
import torch
from conftest import on_cpu
from latentkv import CacheLayout, MLACache, layout_for, providers
from latentkv.cache.layouts import FORMATS
from latentkv.compat import vllm
from latentkv.providers import Provider
from latentkv.testing import POISON, Problem, assert_same_bytes, poisoned
from latentkv.testing.matrix import ACTIVATIONS, MAX_POSITION
from oracle import (
    FLOOR,
    PACKED,
    all_poison,
    becomes,
    grid,
    indexer_row,
    make,
    need,
    next_power_of_two,
    outside,
    packed_row,
    put_bytes,
    refuses,
    tile_codes,
    tile_scales,
    turn,
)
from torch import Tensor

DIMS = {"fp8_ds_mla": (512, 64), "fp8_model1": (448, 64)}
TILE = {"fp8_ds_mla": 128, "fp8_model1": 64}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def decoded(codes: Tensor) -> Tensor:
    """The values of e4m3fn bytes, from the definition of the kind."""
    values = torch.cat([grid("fp8_e4m3fn"), torch.tensor([math.nan])])
    return values[(codes & 0x7F).long()] * torch.where(codes >= 0x80, -1.0, 1.0)


def read(cache: MLACache, slot: int) -> tuple[Tensor, Tensor, Tensor]:
    """A reader as the layouts are published: the latent vector in fp64, its tile scales, and the key's bytes."""
    block, entry = divmod(slot, cache.layout.block_size)
    if cache.layout.format == "fp8_ds_mla":
        row = cache.data[block, entry].cpu()
        codes, scales, key = row[:512], row[512:528].view(torch.float32).double(), row[528:656]
    else:
        size = cache.layout.block_size
        page = cache.data[block].as_strided((size * 584,), (1,), cache.data[block].storage_offset()).cpu()
        row, footer = page[entry * 576 :][:576], page[size * 576 + entry * 8 :][:8]
        assert footer[7] == 0
        codes, scales, key = row[:448], 2.0 ** (footer[:7].double() - 127), row[448:]
    return decoded(codes) * scales.repeat_interleave(len(codes) // len(scales)), scales, key


def write(provider: Provider, device: str, format: str, x: Tensor, block_size: int = 4) -> MLACache:
    """Rows [N, L] as latent vectors at slots 0, 1, ...; the key is all zeros."""
    n = len(x)
    cache = CacheLayout(*DIMS[format], block_size, format).allocate(-(-n // block_size), device)
    key = torch.zeros(n, 64, dtype=torch.bfloat16, device=device)
    provider.write_cache_(x.to(device), key, torch.arange(n, device=device), cache)
    return cache


def rows_with(tiles: Tensor, format: str) -> Tensor:
    """Latent vectors made of tiles [T, tile], the last row filled up with zeros."""
    per_row = DIMS[format][0] // TILE[format]
    tiles = torch.cat([tiles, tiles.new_zeros(-len(tiles) % per_row, tiles.shape[1])])
    return tiles.view(-1, DIMS[format][0])


def must_be_published(cache: MLACache, x: Tensor) -> None:
    """Scales and codes of all rows, by the oracle, row after row."""
    tile, format = TILE[cache.layout.format], cache.layout.format
    scales = tile_scales(x, tile)
    codes = tile_codes(x, scales)
    block_size, n = cache.layout.block_size, len(x)
    if format == "fp8_ds_mla":
        rows = cache.data.cpu().reshape(-1, 656)[:n]
        got, got_scales = rows[:, :512], rows[:, 512:528].contiguous().view(torch.float32)
        assert_same_bytes(got_scales, scales.float())
    else:
        shape, strides = (cache.num_blocks, block_size * 584), (cache.data.stride(0), 1)
        pages = cache.data.as_strided(shape, strides, cache.data.storage_offset()).cpu()
        got = pages[:, : block_size * 576].reshape(-1, 576)[:n, :448]
        footer = pages[:, block_size * 576 :].reshape(-1, 8)[:n]
        exponents = torch.where(scales.isinf(), 255, 127 + scales.clamp(max=2.0**127).log2()).to(torch.uint8)
        assert_same_bytes(footer[:, :7], exponents)
        assert footer[:, 7].eq(0).all()
    assert_same_bytes(got, codes)


# ------------------------------------------------------------------------------------------------------ layouts


def test_row_bytes_and_shapes() -> None:
    mla, model1 = CacheLayout(format="fp8_ds_mla"), CacheLayout(448, 64, 64, "fp8_model1")
    assert (mla.row_bytes, model1.row_bytes) == (656, 584)
    assert mla.shapes(7) == ((7, 64, 656),) and model1.shapes(7) == ((7, 64, 584),)
    assert mla.dtype == model1.dtype == torch.uint8
    assert mla.packed is FORMATS["fp8_ds_mla"].packed and CacheLayout().packed is None


@pytest.mark.parametrize("block_size", [1, 2, 16, 64, 71, 72, 256])
def test_blocks_of_model1_are_padded(block_size: int, device: str) -> None:
    """To a multiple of 576 bytes, the last one too; those of fp8_ds_mla are not."""
    cache = CacheLayout(448, 64, block_size, "fp8_model1").allocate(3, device)
    step = cache.data.stride(0)
    assert step % 576 == 0 and 0 <= step - block_size * 584 < 576
    assert cache.data.stride()[1:] == (584, 1) and cache.data.shape == (3, block_size, 584)
    assert cache.data.untyped_storage().nbytes() == 3 * step
    assert cache.num_slots == 3 * block_size and cache.num_blocks == 3
    plain = CacheLayout(512, 64, block_size, "fp8_ds_mla").allocate(3, device)
    assert plain.data.is_contiguous() and plain.data.eq(0).all() and cache.data.eq(0).all()
    assert CacheLayout(448, 64, block_size, "fp8_model1").allocate(0, device).num_slots == 0


def test_what_a_packed_cache_has_not(device: str) -> None:
    """Parts of one dtype, and a use for a scale."""
    for format, dims in DIMS.items():
        cache = CacheLayout(*dims, 64, format).allocate(2, device, scale=0.5)
        assert cache.latent is None and cache.rope is None and cache.op_arguments[2] is None
        assert cache.tensors == (cache.data,)
        with pytest.raises(ValueError, match=f"pages_of_one: format: expected one that is not packed, got {format}"):
            _ = cache.pages_of_one


def test_wrapped_storage_of_an_engine(device: str) -> None:
    """[B, bs, C] or [B, 1, bs, C], padded blocks; nothing is copied."""
    pages = torch.zeros(3, 1, 4, 656, dtype=torch.uint8, device=device)
    wrapped = MLACache.wrap(pages, CacheLayout(512, 64, 4, "fp8_ds_mla"))
    assert wrapped.data.shape == (3, 4, 656) and wrapped.data.data_ptr() == pages.data_ptr()
    storage = torch.zeros(3, 5 * 576, dtype=torch.uint8, device=device)
    blocks = storage[:, : 4 * 584].view(3, 1, 4, 584)
    wrapped = MLACache.wrap(blocks, CacheLayout(448, 64, 4, "fp8_model1"))
    assert wrapped.data.stride() == (2880, 584, 1) and wrapped.data.data_ptr() == storage.data_ptr()


def test_layouts_of_the_sparse_readers() -> None:
    assert layout_for("FLASHMLA_SPARSE", format="fp8_ds_mla") == CacheLayout(512, 64, 64, "fp8_ds_mla")
    own = layout_for("V4_FLASHMLA_SPARSE", format="fp8_model1", kv_lora_rank=448)
    assert own == CacheLayout(448, 64, 64, "fp8_model1")


# ----------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("strides", ["contiguous", "sliced", "unaligned"])
@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("op", ["write_cache_", "rope_write_cache_"])
def test_all_rows(device: str, provider: Provider, op: str, format: str, strides: str) -> None:
    """Every byte of the buffers, gaps between blocks and rows included."""
    for pages, neox in ((False, False), (True, True)):
        p = make(device, op=op, format=format, strides=strides, pages=pages, rope="neox" if neox else "gptj", heads=1)
        becomes(p, provider, range(6) if op == "rope_write_cache_" else [], range(6))


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("block_size", [1, 2, 3, 64, 100])
def test_block_sizes(device: str, provider: Provider, block_size: int, format: str) -> None:
    p = make(device, op="write_cache_", format=format, block_size=block_size)
    capacity = p.cache.num_slots
    slots = sorted({0, block_size - 1, block_size, capacity - 1})
    p.slots[:] = torch.tensor(slots + [-1] * (6 - len(slots)))
    becomes(p, provider, [], range(len(slots)))


@pytest.mark.parametrize("format", PACKED)
def test_masked_padding_and_outside(device: str, provider: Provider, format: str) -> None:
    p = make(device, format=format)
    p.slots[1] = -1
    p.slots = p.slots[:4]
    becomes(p, provider, [0, 2, 3], [0, 2, 3])
    p = make(device, format=format, rows="rotate-masked")
    p.slots[:] = torch.tensor([0, -1, 2, -1, 4, 5])
    becomes(p, provider, range(6), [0, 2, 4, 5])
    for op in ("write_cache_", "rope_write_cache_"):
        p = make(device, op=op, format=format)
        capacity = p.cache.num_slots
        p.slots[2] = capacity
        outside(p, provider, "slot_mapping", f"slots below the capacity of {capacity}", capacity, 2)
    p = make(device, format=format)
    p.positions[3] = MAX_POSITION  # type: ignore[index]
    outside(p, provider, "positions", f"values in 0 .. {MAX_POSITION - 1}", MAX_POSITION, 3)


@pytest.mark.parametrize("width", [660, 672, 1024])
def test_wide_rows_of_ds_mla(device: str, provider: Provider, width: int) -> None:
    """Any strides that are multiples of 4 bytes, from any multiple of 4 on."""
    p = make(device, op="write_cache_", format="fp8_ds_mla")
    buffer = poisoned(4 + 5 * 4 * width, device)
    p.cache = MLACache.wrap(buffer[4:].view(5, 4, width), p.case.layout)
    p.buffers["cache0"] = buffer
    becomes(p, provider, [])
    assert buffer[4:].view(20, width)[:, 656:].eq(POISON).all()
    p = make(device, op="write_cache_", format="fp8_ds_mla")  # entries outside, blocks inside
    buffer = poisoned(5 * 4 * width, device)
    p.cache = MLACache.wrap(buffer.view(4, 5, width).transpose(0, 1), p.case.layout)
    p.buffers["cache0"] = buffer
    becomes(p, provider, [])


@pytest.mark.parametrize("padding", [544, 1120])  # to 5 and 6 times 576 bytes
def test_padded_blocks_of_model1(device: str, provider: Provider, padding: int) -> None:
    """What lies between a block's last scale and the next block is not touched."""
    p = make(device, op="write_cache_", format="fp8_model1")
    buffer = poisoned(4 + 5 * (4 * 584 + padding), device)
    blocks = buffer[4:].as_strided((5, 4, 584), (4 * 584 + padding, 584, 1), 4)
    p.cache = MLACache.wrap(blocks, p.case.layout)
    p.buffers["cache0"] = buffer
    becomes(p, provider, [])
    gaps = buffer[4:].view(5, -1)[:, 4 * 584 :]
    assert gaps.eq(POISON).all() and buffer[:4].eq(POISON).all()


def test_scale_is_not_looked_at(device: str, provider: Provider) -> None:
    for format in PACKED:
        p, other = (make(device, op="write_cache_", format=format, scale=s) for s in (None, 0.125))
        arguments = (p.kv_c, p.k_pe, p.slots, p.cache.data, None, torch.tensor([7.0], device=device), format)
        provider._ops["write_cache_"](*arguments)
        other.run(provider)
        del other.buffers["scale"]
        assert {d.partition(":")[0] for d in other.differences(p)} == set()


def test_keys_are_verbatim(device: str, provider: Provider) -> None:
    """bf16 bit for bit: NaN payloads, signed zeros."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(1024, 64)
    for format, (latent, rope) in DIMS.items():
        cache = CacheLayout(latent, rope, 64, format).allocate(16, device)
        zeros = torch.zeros(1024, latent, dtype=torch.bfloat16, device=device)
        provider.write_cache_(zeros, every.to(device), torch.arange(1024, device=device), cache)
        keys = torch.stack([read(cache, slot)[2] for slot in range(1024)])
        assert_same_bytes(keys, every.view(torch.uint8))


# ------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("format", PACKED)
def test_every_number_is_its_tile_s_largest(device: str, provider: Provider, format: str) -> None:
    """Every bf16 number alone in a tile, and beside its half: scales at and around every power of two, the floor,
    infinities, NaNs."""
    every = torch.arange(-(2**15), 2**15, 5).to(torch.int16).view(torch.bfloat16)
    around = torch.tensor([448.0 * 2.0**k for k in range(-20, 20)] + [FLOOR * 448, 448e-4, 2.0**-13 * 448])
    near = (around.bfloat16().view(torch.int16)[:, None] + torch.arange(-2, 3, dtype=torch.int16)).flatten()
    x = torch.cat([every, near.view(torch.bfloat16)])
    tiles = torch.zeros(len(x), TILE[format], dtype=torch.bfloat16)
    tiles[:, 3], tiles[:, -1] = x, x / 2
    rows = rows_with(tiles, format)
    must_be_published(write(provider, device, format, rows), rows)


@pytest.mark.parametrize("format", PACKED)
def test_all_magnitudes(device: str, provider: Provider, format: str) -> None:
    random = torch.Generator().manual_seed(3)
    tiles = torch.randn((420, TILE[format]), generator=random) * 2.0 ** (torch.arange(420.0)[:, None] % 84 - 42)
    tiles[::5, :7] *= 2.0 ** torch.arange(-21.0, 21.0, 6.0)
    rows = rows_with(tiles.bfloat16(), format)
    must_be_published(write(provider, device, format, rows), rows)


@pytest.mark.parametrize("format", PACKED)
def test_tiles_that_are_no_numbers(device: str, provider: Provider, format: str) -> None:
    """NaN does not count for the scale; of NaN alone it is the floor's; of infinity it is infinite."""
    tiles = torch.zeros(6, TILE[format])
    tiles[0] = math.nan
    tiles[1], tiles[1, 5] = 3.0, math.nan
    tiles[2], tiles[2, 0] = -1.0, -math.inf
    tiles[3], tiles[3, 7], tiles[3, 8] = 1.0, math.inf, math.nan
    tiles[4] = -0.0
    tiles[5] = 3e38
    rows = rows_with(tiles.bfloat16(), format)
    cache = write(provider, device, format, rows, block_size=1)
    must_be_published(cache, rows)
    per_row = DIMS[format][0] // TILE[format]
    values, scales = (torch.cat([read(cache, i)[j] for i in range(len(rows))]) for j in (0, 1))
    infinite = math.inf if format == "fp8_ds_mla" else 2.0**128  # 0xFF, the exponent that ue8m0 has for it
    assert scales[:6].tolist() == [2.0**-13, 2.0**-7, infinite, infinite, 2.0**-13, 2.0**120]
    values = values.view(-1, TILE[format])[: len(rows) * per_row]
    assert values[0].isnan().all() and values[4].eq(0).all() and torch.signbit(values[4]).all()
    assert values[1].isnan().nonzero().flatten().tolist() == [5] and values[1, 0] == 3
    if format == "fp8_ds_mla":  # 0 times infinity
        assert values[2].isnan().all()


@pytest.mark.parametrize("format", PACKED)
def test_what_a_reader_gets_back(device: str, provider: Provider, format: str) -> None:
    """Within half a step of fp8: 2^-4 of each number, or half the least step where the tile is much larger."""
    random = torch.Generator().manual_seed(6)
    latent, _ = DIMS[format]
    x = (
        torch.randn((40, latent), generator=random) * 2.0 ** torch.randint(-9, 9, (40, 1), generator=random)
    ).bfloat16()
    cache = write(provider, device, format, x, block_size=16)
    for slot, row in enumerate(x.double()):
        got, scales, _ = read(cache, slot)
        scales = scales.repeat_interleave(TILE[format])
        assert ((got - row).abs() <= torch.maximum(row.abs() * 2.0**-4, scales * 2.0**-10)).all()
        top = row.view(-1, TILE[format]).abs().amax(1) / scales[:: TILE[format]]
        assert (top > 224).logical_or(scales[:: TILE[format]] == 2.0**-13).all() and (top <= 448).all()


def test_scale_is_the_published_formula(device: str, provider: Provider) -> None:
    """2^ceil(log2(max(amax / 448, 1e-4))), for amax away from powers of two, where a logarithm can be trusted."""
    amax = torch.tensor([1e-5, 0.04, 0.05, 0.3, 1.0, 13.0, 447.0, 449.0, 1e4, 3e30]).bfloat16()
    tiles = torch.zeros(10, 128, dtype=torch.bfloat16)
    tiles[:, 100] = -amax
    cache = write(provider, device, "fp8_ds_mla", rows_with(tiles, "fp8_ds_mla"))
    got = torch.cat([read(cache, i)[1] for i in range(3)])[:10].tolist()
    want = [2.0 ** math.ceil(math.log2(max(a / 448, 1e-4))) for a in amax.tolist()]
    assert got == want


def test_oracle_of_powers_of_two() -> None:
    x = torch.tensor([1.0, 1.0 + 2.0**-23, 2.0 - 2.0**-23, 2.0, 1e-4, 2.0**-13, 3.4e38, math.inf], dtype=torch.float64)
    assert next_power_of_two(x).tolist() == [1, 2, 2, 2, 2.0**-13, 2.0**-13, 2.0**128, math.inf]


def test_oracle_of_rows_is_read_back() -> None:
    """The reader and the oracle's writer were made apart."""
    random = torch.Generator().manual_seed(8)
    for format, (latent, rope) in DIMS.items():
        x = torch.randn(latent, generator=random).bfloat16()
        key = torch.randn(rope, generator=random).bfloat16()
        cache = CacheLayout(latent, rope, 4, format).allocate(2, "cpu")
        data, footer = packed_row(x, key, format)
        if len(footer):
            put_bytes(cache.data[1], 2, data, footer)
        else:
            cache.data[1, 2] = data
        got, scales, got_key = read(cache, 6)
        assert (got - x.double()).abs().max() < 0.2 and scales.min() > 0
        assert_same_bytes(got_key, key.view(torch.uint8))
        assert cache.data[0].eq(0).all()


# ---------------------------------------------------------------------------------------------------- the indexer


def indexer(device: str, rope_dim: int = 64, **fields: object) -> Problem:
    return make(device, R=rope_dim, op="write_indexer_cache_", **fields)  # type: ignore[arg-type]


def keys_become(p: Problem, provider: Provider, written: Iterable[int] = range(6)) -> None:
    """Running ``p`` writes exactly those rows: all other bytes stay, k's too."""
    want, rope = copy.deepcopy(p), p.case.layout.rope_dim
    for i in written:
        key = want.k[i].cpu().clone()
        if want.table is not None:
            key[:rope] = turn(key[:rope], want.table[want.positions[i]], p.case.rope == "neox")  # type: ignore[index]
        block, entry = divmod(int(want.slots[i]), p.case.layout.block_size)
        page = want.index_cache[block]
        put_bytes(page[0] if page.dim() == 3 else page, entry, *indexer_row(key, p.case.power_of_two))
    p.run(provider)
    assert p.differences(want) == []


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("rope", ["gptj", "neox", "none"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_indexer_keys(device: str, provider: Provider, power_of_two: bool, rope: str, activation: str) -> None:
    for strides, pages in (("contiguous", False), ("sliced", True), ("unaligned", True)):
        p = indexer(device, activation=activation, rope=rope, power_of_two=power_of_two, strides=strides, pages=pages)
        keys_become(p, provider)


@pytest.mark.parametrize("rope_dim", [2, 6, 32, 64, 126, 128])
@pytest.mark.parametrize("rope", ["gptj", "neox"])
def test_first_elements_of_an_indexer_key_are_rotated(
    device: str, provider: Provider, rope: str, rope_dim: int
) -> None:
    for table, strides in (("fp32", "contiguous"), ("bf16", "unaligned")):
        keys_become(indexer(device, rope_dim, rope=rope, table=table, strides=strides), provider)


@pytest.mark.parametrize("block_size", [1, 2, 3, 64])
def test_indexer_blocks(device: str, provider: Provider, block_size: int) -> None:
    p = indexer(device, block_size=block_size, pages=True)
    slots = sorted({0, block_size - 1, block_size, p.index_cache.shape[0] * block_size - 1})
    p.slots[:] = torch.tensor(slots + [-1] * (6 - len(slots)))
    keys_become(p, provider, range(len(slots)))


def test_indexer_rows(device: str, provider: Provider) -> None:
    """Padding is not read, masked rows are not written, their positions are of no interest."""
    p = indexer(device, index=torch.int32)
    p.slots[1] = -1
    p.positions[1], p.positions[5] = MAX_POSITION, -7  # type: ignore[index]
    p.slots = p.slots[:4]
    p.k[4:] = math.nan
    keys_become(p, provider, [0, 2, 3])
    keys_become(indexer(device, tokens=0), provider, [])
    p = indexer(device)
    p.slots = p.slots[:0]
    keys_become(p, provider, [])


@pytest.mark.parametrize("beyond", [0, 2**31, 2**32 + 5, 2**63 - 1])
def test_indexer_slot_beyond_the_cache(device: str, provider: Provider, beyond: int) -> None:
    p = indexer(device)
    capacity = p.index_cache.shape[0] * 4
    p.slots[2] = slot = beyond or capacity
    if on_cpu(device, provider):
        refuses(p, provider, "slot_mapping", f"slots below the capacity of {capacity}", f"{slot} at row 2")
    else:
        keys_become(p, provider, [0, 1, 3, 4, 5])


@pytest.mark.parametrize("position", [-1, MAX_POSITION, 2**32 + 5])
def test_indexer_position_outside_the_table(device: str, provider: Provider, position: int) -> None:
    p = indexer(device)
    p.positions[2] = position  # type: ignore[index]
    if on_cpu(device, provider):
        refuses(p, provider, "positions", f"values in 0 .. {MAX_POSITION - 1}", f"{position} at row 2")
    else:
        keys_become(p, provider, [0, 1, 3, 4, 5])


def index_rows(provider: Provider, device: str, k: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """The codes [N, 128] and scales [N] of keys, unrotated, in blocks of 64."""
    n = len(k)
    cache = torch.zeros(-(-n // 64), 64, 132, dtype=torch.uint8, device=device)
    slots = torch.arange(n, device=device)
    provider.write_indexer_cache_(
        k.to(device), None, None, slots, cache, is_neox=False, power_of_two_scale=power_of_two
    )
    pages = cache.cpu().view(-1, 64 * 132)
    codes = pages[:, : 64 * 128].reshape(-1, 128)[:n]
    return codes, pages[:, 64 * 128 :].reshape(-1, 4).view(torch.float32).flatten()[:n]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_numbers_of_indexer_keys(device: str, provider: Provider, activation: str, power_of_two: bool) -> None:
    """The largest of a key from the floor to infinity, at and around powers of two, and NaNs."""
    dtype = ACTIVATIONS[activation]
    random = torch.Generator().manual_seed(9)
    amax = torch.cat(
        [
            torch.tensor([448.0 * 2.0**k for k in range(-24, 7)] + [2.0**k for k in range(-24, 16)]),
            torch.tensor([0.0, FLOOR, 1e-4, 9e-5, 2e-4, 0.0448, 6e4, math.inf, math.nan]),
            torch.rand(60, generator=random) * 10,
        ]
    )
    near = torch.cat([amax, amax.nextafter(torch.tensor(0.0)), amax.nextafter(torch.tensor(math.inf))])
    k = torch.randn((len(near), 128), generator=random).clamp(-1, 1) * near.nan_to_num(1.0, posinf=3.0)[:, None]
    k[:, 70] = near
    k[-3, :] = math.nan
    k = k.to(dtype)
    codes, scales = index_rows(provider, device, k, power_of_two)
    want = [indexer_row(row, power_of_two) for row in k]
    assert_same_bytes(scales, torch.cat([scale for _, scale in want]).view(torch.float32))
    assert_same_bytes(codes, torch.stack([code for code, _ in want]))
    if power_of_two:
        assert (scales.view(torch.int32) & 0x7FFFFF).eq(0).all()


def test_indexer_scale_is_the_published_formula(device: str, provider: Provider) -> None:
    """max(1e-4, amax) / 448, and what a reader makes of it."""
    k = torch.randn((50, 128), generator=torch.Generator().manual_seed(2))
    codes, scales = index_rows(provider, device, k, power_of_two=False)
    torch.testing.assert_close(scales, k.abs().amax(1).clamp(min=1e-4) / 448, rtol=1e-6, atol=0)
    back = decoded(codes) * scales.double()[:, None]
    assert ((back - k).abs() <= torch.maximum(k.abs() * 2.0**-4, scales[:, None] * 2.0**-10) * (1 + 1e-6)).all()
    assert (codes & 0x7F).amax(1).eq(0x7E).all()  # each key's largest number is the kind's


# ------------------------------------------------------------------------------------------------ several layers


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn", *PACKED])
@pytest.mark.parametrize("layers", [1, 2, 5, 40])
def test_grouped_rows(device: str, provider: Provider, layers: int, format: str) -> None:
    tokens = 6 if layers < 40 else 2
    for strides in ("contiguous", "transposed", "unaligned"):
        for placement in ("concat", "split") if format in ("bf16", "fp8_e4m3fn") else ("concat",):
            p = make(
                device, op="write_cache_grouped_", layers=layers, format=format, strides=strides, tokens=tokens,
                placement=placement, rope="none",
            )  # fmt: skip
            becomes(p, provider, [], range(tokens))


def test_grouped_rows_masked_padding_and_outside(device: str, provider: Provider) -> None:
    p = make(device, op="write_cache_grouped_", layers=3, rope="none")
    p.slots[1] = -1
    p.slots = p.slots[:4]
    becomes(p, provider, [], [0, 2, 3])
    for tokens in (0, 6):
        p = make(device, op="write_cache_grouped_", layers=3, rope="none", tokens=tokens)
        p.slots = p.slots[:0]
        becomes(p, provider, [], [])
    p = make(device, op="write_cache_grouped_", layers=3, rope="none")
    capacity = p.cache.num_slots
    p.slots[2] = capacity
    outside(p, provider, "slot_mapping", f"slots below the capacity of {capacity}", capacity, 2)


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn", "fp8_ds_mla"])
def test_grouped_is_each_layer_by_itself(device: str, provider: Provider, format: str) -> None:
    p, single = (make(device, op="write_cache_grouped_", layers=5, format=format, rope="none") for _ in range(2))
    p.run(provider)
    for kv_c, k_pe, cache in single.layers:
        provider.write_cache_(kv_c, k_pe, single.slots, cache)
    assert p.differences(single) == []


def test_grouped_takes_one_tensor_for_all(device: str, provider: Provider) -> None:
    """[G, N, L] and [G, N, R], or one of them; any strides."""
    random = torch.Generator().manual_seed(0)
    both = torch.randn((6, 3, 48), generator=random).bfloat16().to(device).transpose(0, 1)
    kv_c, k_pe = both[..., :32], both[..., 32:]
    slots = torch.arange(6, device=device)
    layout = CacheLayout(32, 16, 4)
    want = [layout.allocate(2, device) for _ in range(3)]
    for i, cache in enumerate(want):
        provider.write_cache_(kv_c[i], k_pe[i], slots, cache)
    for one, other in ((kv_c, k_pe), (list(kv_c), k_pe), (kv_c, tuple(k_pe))):
        caches = [layout.allocate(2, device) for _ in range(3)]
        provider.write_cache_grouped_(one, other, slots, caches)
        for cache, own in zip(caches, want, strict=True):
            assert_same_bytes(cache.data, own.data)


def test_layers_of_one_buffer(device: str, provider: Provider) -> None:
    """As engines allocate them: [B, layers, bs, C]."""
    p = make(device, op="write_cache_grouped_", layers=3, rope="none")
    buffer = poisoned(5 * 3 * 4 * 64 * 2, device)
    pages = buffer.view(torch.bfloat16).view(5, 3, 4, 64)
    caches = [MLACache.wrap(pages[:, i], p.case.layout) for i in range(3)]
    provider.write_cache_grouped_([c for c, _, _ in p.layers], [k for _, k, _ in p.layers], p.slots, caches)
    want = poisoned(5 * 3 * 4 * 64 * 2, device).view(torch.bfloat16).view(5, 3, 4, 64)
    for i, (kv_c, k_pe, _) in enumerate(p.layers):
        want[p.slots // 4, i, p.slots % 4] = torch.cat([kv_c, k_pe], 1)
    assert_same_bytes(pages, want)


def test_public_functions(device: str) -> None:
    p, want = (indexer(device) for _ in range(2))
    latentkv.write_indexer_cache_(p.k, p.positions, p.table, p.slots, p.index_cache, is_neox=False)
    want.run(providers.reference)
    assert p.differences(want) == []
    q, want = (make(device, op="write_cache_grouped_", layers=2, rope="none") for _ in range(2))
    kv_c, k_pe, caches = zip(*q.layers, strict=True)
    latentkv.write_cache_grouped_(kv_c, k_pe, q.slots, caches)
    want.run(providers.reference)
    assert q.differences(want) == []


# ------------------------------------------------------------------------------------------------- far in memory


@on_gpu
@pytest.mark.parametrize("format", PACKED)
def test_a_packed_cache_beyond_2_32_bytes(format: str) -> None:
    """Its last slots are written, and nothing where an offset of 31 or 32 bits would have ended."""
    need(8)
    p = make("cuda", op="write_cache_", format=format, block_size=64, tokens=5)
    layout = p.case.layout
    blocks = (2**32 + 2**30) // layout.block_bytes

    def pages(buffer: Tensor) -> Tensor:
        return buffer.view(-1, layout.block_bytes)[:, : 64 * layout.row_bytes].view(-1, 64, layout.row_bytes)

    buffer = poisoned(blocks * layout.block_bytes, "cuda")
    p.cache = MLACache.wrap(pages(buffer), layout)
    row, last = p.case.layout.row_bytes, p.cache.num_slots - 1
    slots = [last, 0, last - 64, 2**31 // row + 1, 2**32 // row + 1]
    p.slots[:] = torch.tensor(slots)
    p.run(providers.native)
    small = make("cuda", op="write_cache_", format=format, block_size=64, tokens=5)
    small.cache = MLACache.wrap(pages(poisoned(5 * layout.block_bytes, "cuda")), layout)
    small.slots[:] = torch.tensor([64 * i + slot % 64 for i, slot in enumerate(slots)])
    small.run(providers.reference)
    for i, slot in enumerate(slots):
        assert_same_bytes(p.cache.data[slot // 64], small.cache.data[i])
        p.cache.data[slot // 64] = POISON
    assert all_poison(buffer)


@on_gpu
def test_an_indexer_cache_beyond_2_32_bytes() -> None:
    need(8)
    blocks = (2**32 + 2**30) // (64 * 132)
    buffer = poisoned(blocks * 64 * 132, "cuda")
    p = make("cuda", R=64, op="write_indexer_cache_", block_size=64, tokens=4)
    p.index_cache = buffer.view(blocks, 64, 132)
    slots = [blocks * 64 - 1, 0, 2**31 // 132 + 1, 2**32 // 132 + 1]
    p.slots[:] = torch.tensor(slots)
    p.run(providers.native)
    small = make("cuda", R=64, op="write_indexer_cache_", block_size=64, tokens=4)
    small.index_cache = poisoned(4 * 64 * 132, "cuda").view(4, 64, 132)
    small.slots[:] = torch.tensor([64 * i + slot % 64 for i, slot in enumerate(slots)])
    small.run(providers.reference)
    for i, slot in enumerate(slots):
        assert_same_bytes(p.index_cache[slot // 64], small.index_cache[i])
        p.index_cache[slot // 64] = POISON
    assert all_poison(buffer)


# ------------------------------------------------------------------------------------------------------------ vLLM


def test_vllm_s_word_for_packed_rows(device: str) -> None:
    """concat_and_cache_mla(kv_cache_dtype="fp8_ds_mla"), as vLLM has it; the scale is not looked at."""
    p, want = (make(device, op="write_cache_", format="fp8_ds_mla") for _ in range(2))
    scale = torch.tensor([0.25], device=device)
    vllm.concat_and_cache_mla(p.kv_c, p.k_pe, p.cache.data, p.slots, "fp8_ds_mla", scale)
    want.run(providers.reference)
    assert p.differences(want) == []
    p, want = (make(device, format="fp8_ds_mla") for _ in range(2))
    vllm.concat_and_cache_mla_rope_fused(
        p.positions, p.q_pe, p.k_pe, p.kv_c, p.table, False, p.slots, p.cache.data, "fp8_ds_mla", scale
    )  # fmt: skip
    want.run(providers.reference)
    assert p.differences(want) == []

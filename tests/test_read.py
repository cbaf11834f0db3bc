"""What gather_cache and convert_cache_ mean, by other words than the reference's; and what they refuse."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import amd
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import Python, on_cpu
from hypothesis import given
from hypothesis import strategies as st
from latentkv import CacheLayout, MLACache, providers
from latentkv.cache.layouts import FORMATS
from latentkv.ops.schemas import NAMESPACE, NATIVE_NAMESPACE
from latentkv.providers import Provider
from latentkv.testing import Case, Problem
from torch import Tensor

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
READING = ("gather_cache", "convert_cache_")
FP8 = [name for name, f in FORMATS.items() if f.quantised]
PLAIN = [name for name, f in FORMATS.items() if not f.packed]
NUMPY = {
    "fp8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "fp8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}
ALL_CODES = torch.arange(256, dtype=torch.uint8)


def counted(layout: CacheLayout, blocks: int, device: str) -> MLACache:
    """A cache in which every element of the row in slot s is s, and every rope element s + 0.5."""
    cache = layout.allocate(blocks, device)
    slots = torch.arange(cache.num_slots, dtype=torch.float32).view(blocks, layout.block_size, 1)
    assert cache.latent is not None and cache.rope is not None
    cache.latent.copy_(slots.expand(cache.latent.shape))
    cache.rope.copy_((slots + 0.5).expand(cache.rope.shape))
    return cache


def of_codes(format: str, device: str, scale: float | None = None) -> MLACache:
    """One row that holds all 256 codes of an fp8 format."""
    cache = CacheLayout(256, 0, 1, format).allocate(1, device, scale)
    cache.data.view(torch.uint8)[0, 0] = ALL_CODES.to(device)
    return cache


def codes(cache: MLACache) -> Tensor:
    return cache.data.view(torch.uint8).flatten().cpu()


def numbers(format: str) -> Tensor:
    """What the 256 codes of a format stand for, by ml_dtypes."""
    return torch.from_numpy(ALL_CODES.numpy().view(NUMPY[format]).astype(np.float32))


def table(device: str, *rows: list[int]) -> Tensor:
    return torch.tensor(rows, device=device)


# ---------------------------------------------------------------------------------------------------------- gather


@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_rows_of_sequences(placement: str, block_size: int, device: str, provider: Provider) -> None:
    """Three sequences of 5, 0 and 4 tokens; rows of out behind them stay as they are."""
    cache = counted(CacheLayout(17, 6, block_size, "fp32", placement), 12, device)  # type: ignore[arg-type]
    blocks = table(device, [7, 2, 9, 4, 11, -5], [10**6, -1, 99, 99, 99, 99], [0, 5, 3, 8, 1, 6])
    lengths, starts = [5, 0, 4], [1, 0, 2]
    for skip in (False, True):
        out = torch.full((11, 23), -7.0, device=device)
        begins = torch.tensor([0, 5, 5, 9], device=device)
        first = starts if skip else [0, 0, 0]
        if not skip and block_size == 1:
            assert blocks[0, :5].tolist() == [7, 2, 9, 4, 11]
        limit = 5 if skip and block_size == 1 else lengths[0]
        begins[1:] += limit - lengths[0]
        if skip and block_size == 1:  # token 5 of sequence 0 would need the block -5
            begins[1:] -= 1
        rows = [
            (int(blocks[s, t // block_size]) * block_size + t % block_size)
            for s in range(3)
            for t in range(first[s], first[s] + int(begins[s + 1] - begins[s]))
        ]
        got = provider.gather_cache(
            cache, blocks, begins, out=out, seq_starts=torch.tensor(starts, device=device) if skip else None
        )
        assert got is out
        want = torch.full((11, 23), -7.0)
        want[: len(rows), :17] = torch.tensor(rows).float()[:, None]
        want[: len(rows), 17:] = torch.tensor(rows)[:, None] + 0.5
        assert torch.equal(out.cpu(), want)


@pytest.mark.parametrize("format", ["bf16", "fp8_e5m2", "fp8_ds_mla"])
def test_allocates(format: str, device: str, provider: Provider) -> None:
    """``total`` rows, of the cache's own dtype or bf16."""
    cache = CacheLayout(512, 64, 4, format).allocate(2, device)
    arguments = cache, table(device, [1]), torch.tensor([0, 3], device=device)
    out = provider.gather_cache(*arguments, total=3)
    assert out.shape == (3, 576) and out.dtype == torch.bfloat16 and out.eq(0).all()
    assert provider.gather_cache(*arguments, total=3, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"^latentkv\.gather_cache: out, total: expected one of them, got neither$"):
        provider.gather_cache(*arguments)
    with pytest.raises(RuntimeError, match=r"^latentkv\.gather_cache: out, total: expected one of them, got both$"):
        provider.gather_cache(*arguments, total=3, out=out)
    with pytest.raises(RuntimeError, match=r"out: expected dtype torch.float16, as dtype, got torch.bfloat16$"):
        provider.gather_cache(*arguments, out=out, dtype=torch.float16)


@pytest.mark.parametrize("sequences", [1, 2, 31, 32, 33, 300])
def test_many_sequences(sequences: int, device: str, provider: Provider) -> None:
    """Each row finds its own among them, those without rows too."""
    lengths = torch.randint(0, 3, (sequences,), generator=torch.Generator().manual_seed(sequences))
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    cache = counted(CacheLayout(8, 8, 2, "fp32"), sequences, device)
    blocks = torch.arange(sequences).flip(0)[:, None]
    out = provider.gather_cache(cache, blocks.to(device), begins.to(device), total=int(begins[-1]))
    rows = [2 * int(blocks[s]) + t for s in range(sequences) for t in range(int(lengths[s]))]
    assert out[:, 0].tolist() == rows


GATHER_FAULTS = {  # a row of its own that cannot be read -> what the CPU says, by arguments that differ
    "past the end": ({"block": 5}, "block_table: expected block numbers in 0 .. 4, got 5 at [1, 1]"),
    "far past it": ({"block": 2**32 + 1}, f"block_table: expected block numbers in 0 .. 4, got {2**32 + 1} at [1, 1]"),
    "negative": ({"block": -1}, "block_table: expected block numbers in 0 .. 4, got -1 at [1, 1]"),
    "no column": ({"start": 3}, "block_table: expected blocks for token 6 of sequence 1, 3 tokens each, got 2 blocks"),
    "before 0": ({"start": -1}, "block_table: expected blocks for token -1 of sequence 1, 3 tokens each, got 2 blocks"),
    "far before": (
        {"start": -(2**40)},
        f"block_table: expected blocks for token -{2**40} of sequence 1, 3 tokens each, got 2 blocks",
    ),
    "far behind": (
        {"start": 2**40},
        f"block_table: expected blocks for token {2**40} of sequence 1, 3 tokens each, got 2 blocks",
    ),
}


def gather_of(device: str, format: str, block: int = 3, start: int = 1) -> tuple[Any, ...]:
    """Two sequences of 2 and 5 rows in blocks of 3; the second one's second block and first token are given."""
    cache = CacheLayout(16, 8, 3, format).allocate(5, device, float("nan") if FORMATS[format].quantised else None)
    cache.data.view(torch.uint8).fill_(1)
    starts = torch.tensor([0, start], device=device)
    return cache, table(device, [0, 77], [2, block]), torch.tensor([0, 2, 7], device=device), starts


@pytest.mark.parametrize("format", ["bf16", "fp32", "fp8_e4m3fnuz"])
@pytest.mark.parametrize("what", GATHER_FAULTS)
def test_rows_that_cannot_be_read(what: str, format: str, device: str, provider: Provider) -> None:
    """The CPU raises before it writes; on a GPU they are zero, whatever the scale, and the others as ever."""
    fields, text = GATHER_FAULTS[what]
    cache, blocks, begins, starts = gather_of(device, format, **fields)
    out = torch.full((8, 24), -1.0, dtype=torch.bfloat16, device=device)
    if on_cpu(device, provider):
        with pytest.raises(RuntimeError) as error:
            provider.gather_cache(cache, blocks, begins, out=out, seq_starts=starts)
        assert str(error.value).splitlines()[0] == f"latentkv.gather_cache: {text}"
        assert out.eq(-1).all()
        return
    provider.gather_cache(cache, blocks, begins, out=out, seq_starts=starts)
    tokens = [fields.get("start", 1) + i for i in range(5)]
    dead = [not (0 <= t < 6) or (t >= 3 and "block" in fields) for t in tokens]
    assert out[:2].ne(0).all() and out[7:].eq(-1).all()
    assert [bool(row.eq(0).all()) for row in out[2:7]] == dead


@pytest.mark.parametrize(
    ("begins", "total", "text"),
    [
        ([1, 2, 7], 7, "cu_seq_lens: expected rising numbers from 0 on, got [1, 2, 7]"),
        ([0, 8, 7], 9, "cu_seq_lens: expected rising numbers from 0 on, got [0, 8, 7]"),
        ([-1, 2, 7], 7, "cu_seq_lens: expected rising numbers from 0 on, got [-1, 2, 7]"),
        ([0, 2, 7], 6, "out: expected at least 7 rows, as cu_seq_lens ends there, got 6"),
        ([0, 0, 1], 0, "out: expected at least 1 rows, as cu_seq_lens ends there, got 0"),
    ],
)
def test_lengths_that_cannot_be(begins: list[int], total: int, text: str, device: str, provider: Provider) -> None:
    """A GPU reads and writes nothing outside for them; what it writes is not defined."""
    cache, blocks, _, starts = gather_of(device, "bf16")
    for index in (torch.int64, torch.int32):
        out = torch.full((total, 24), -1.0, dtype=torch.bfloat16, device=device)
        arguments = cache, blocks, torch.tensor(begins, device=device, dtype=index)
        if on_cpu(device, provider):
            with pytest.raises(RuntimeError) as error:
                provider.gather_cache(*arguments, out=out, seq_starts=starts)
            assert str(error.value).splitlines()[0] == f"latentkv.gather_cache: {text}"
            assert out.eq(-1).all()
        elif provider.name != "reference":
            provider.gather_cache(*arguments, out=out, seq_starts=starts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [None, 0.37, 2.0**-3])
@pytest.mark.parametrize("format", FP8)
def test_every_code_is_read(
    format: str, scale: float | None, dtype: torch.dtype, device: str, provider: Provider
) -> None:
    cache = of_codes(format, device, scale)
    out = provider.gather_cache(
        cache, table(device, [0]), torch.tensor([0, 1], device=device), total=1, dtype=dtype
    )  # fmt: skip
    wanted = (numbers(format) * torch.tensor(1.0 if scale is None else scale)).to(dtype)
    assert torch.equal(out[0].cpu().isnan(), wanted.isnan())
    same = ~wanted.isnan()
    assert torch.equal(out[0].cpu()[same].view(torch.uint8), wanted[same].view(torch.uint8))


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_own_dtype_keeps_every_bit(kind: str, device: str, provider: Provider) -> None:
    """NaNs too; and a packed row's key."""
    layout = CacheLayout(16, 8, 2, kind)
    cache = layout.allocate(1, device)
    random = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 256, (2, 24 * layout.dtype.itemsize), generator=random).to(torch.uint8)
    bits[:, 1 :: layout.dtype.itemsize] |= 0x7F
    cache.data.view(torch.uint8)[0] = bits.to(device)
    out = provider.gather_cache(cache, table(device, [0]), torch.tensor([0, 2], device=device), total=2)
    assert torch.equal(out.view(torch.uint8).cpu(), bits)
    if kind == "bf16":
        packed = CacheLayout(512, 64, 1, "fp8_ds_mla").allocate(1, device)
        key = torch.arange(0x7F70, 0x7FB0).to(torch.int16)
        packed.data[0, 0, 528:] = key.view(torch.uint8).to(device)
        out = provider.gather_cache(packed, table(device, [0]), torch.tensor([0, 1], device=device), total=1)
        assert torch.equal(out[0, 512:].view(torch.int16).cpu(), key)


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn"])
def test_nothing_to_gather(format: str, device: str, provider: Provider) -> None:
    cache = CacheLayout(16, 8, 2, format).allocate(2, device)
    begins = torch.tensor([0, 0], device=device)
    assert provider.gather_cache(cache, table(device, [9]), begins, total=0).shape == (0, 24)
    out = torch.full((3, 24), -1.0, dtype=torch.bfloat16, device=device)
    provider.gather_cache(cache, table(device, [9]), begins, out=out)
    provider.gather_cache(cache, torch.zeros((0, 4), dtype=torch.int64, device=device), begins[:1], out=out)
    provider.gather_cache(cache, torch.zeros((1, 0), dtype=torch.int64, device=device), begins, out=out)
    assert out.eq(-1).all()


# --------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("placements", [("concat", "split"), ("split", "concat")], ids="-to-".join)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 6), (1, 3), (12, 1)], ids=str)
def test_tokens_keep_their_places(
    placements: tuple[Any, Any], sizes: tuple[int, int], device: str, provider: Provider
) -> None:
    """Two runs of twelve tokens; of the second one the last six are left out on one side, two blocks on the other."""
    src = counted(CacheLayout(17, 6, sizes[0], "fp32", placements[0]), 40, device)
    dst = CacheLayout(17, 6, sizes[1], "bf16", placements[1]).allocate(40, device)
    order = torch.Generator().manual_seed(2)
    blocks = [torch.randperm(40, generator=order)[: 24 // size].view(2, -1) for size in sizes]
    blocks[0][1, 6 // sizes[0] + (6 % sizes[0] > 0) :] = -1
    blocks[1][1, :1] = -3
    provider.convert_cache_(src, dst, src_blocks=blocks[0].to(device), dst_blocks=blocks[1].to(device))
    want = torch.zeros(dst.num_slots)
    for run in range(2):
        for t in range(12):
            a, b = (int(own[run, t // size]) for own, size in zip(blocks, sizes, strict=True))
            if a >= 0 <= b:
                want[b * sizes[1] + t % sizes[1]] = a * sizes[0] + t % sizes[0]
    assert dst.latent is not None and dst.rope is not None
    assert torch.equal(dst.latent.flatten(0, 1).float().cpu(), want[:, None].expand(-1, 17))
    written = want.ne(0)
    rope = dst.rope.flatten(0, 1).float().cpu()
    assert torch.equal(rope[written], (want[written, None] + 0.5).bfloat16().float().expand(-1, 6))


@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("fp8_e4m3fn", "fp8_e4m3fn"), ("fp16", "fp8_e5m2")], ids=str)
def test_all_blocks(formats: tuple[str, str], device: str, provider: Provider) -> None:
    """Without tables, and with one of one side."""
    random = torch.Generator().manual_seed(3)
    src = CacheLayout(32, 16, 4, formats[0]).allocate(6, device)
    value = torch.randn(6, 4, 48, generator=random)
    kind = FORMATS[formats[0]]
    src.data.view(torch.uint8 if kind.quantised else src.data.dtype).copy_(
        value.to(kind.dtype).view(torch.uint8) if kind.quantised else value
    )
    whole, mixed = (CacheLayout(32, 16, 8, formats[1]).allocate(n, device) for n in (3, 5))
    provider.convert_cache_(src, whole)
    provider.convert_cache_(src, mixed, dst_blocks=torch.tensor([4, 0, 2], device=device, dtype=torch.int32))
    assert torch.equal(codes(whole).view(3, -1), codes(mixed).view(5, -1)[[4, 0, 2]])
    assert codes(mixed).view(5, -1)[[1, 3]].eq(0).all()
    if formats[0] == formats[1]:
        assert torch.equal(codes(whole), codes(src))


@pytest.mark.parametrize("format", FORMATS)
def test_within_one_cache(format: str, device: str, provider: Provider) -> None:
    """From some of its blocks into others: bytes, whatever they are."""
    packed = FORMATS[format].packed
    cache = CacheLayout(*(packed.dims if packed else (17, 6)), 3, format).allocate(7, device)
    before = torch.randint(0, 256, cache.data.view(torch.uint8).shape, generator=torch.Generator().manual_seed(4))
    cache.data.view(torch.uint8).copy_(before)
    moves = table(device, [5, 0, 3]), table(device, [6, 1, 2])
    provider.convert_cache_(cache, cache, src_blocks=moves[0][0], dst_blocks=moves[1][0])
    before[[6, 1, 2]] = before[[5, 0, 3]]
    assert torch.equal(cache.data.view(torch.uint8).cpu(), before.to(torch.uint8))


@pytest.mark.parametrize("scales", [(None, None), (0.37, 0.11), (2.0**-3, None), (1.0, 2.0**9)], ids=str)
@pytest.mark.parametrize("to", PLAIN)
@pytest.mark.parametrize("format", FP8)
def test_every_code_is_converted(
    format: str, to: str, scales: tuple[float | None, float | None], device: str, provider: Provider
) -> None:
    src, dst = of_codes(format, device, scales[0]), CacheLayout(256, 0, 1, to).allocate(1, device, scales[1])
    provider.convert_cache_(src, dst)
    if format == to and scales[0] == scales[1]:
        assert torch.equal(codes(dst), ALL_CODES)
        return
    one, two = (torch.tensor(1.0 if scale is None else scale) for scale in scales)
    value = numbers(format) * one
    f = FORMATS[to]
    if f.quantised:
        assert f.max is not None
        stored = (value / two).clamp(-f.max, f.max).numpy().astype(NUMPY[to]).view(np.uint8)
        wanted = torch.where(value.isnan(), torch.tensor(f.nan), torch.from_numpy(stored))
        assert codes(dst).tolist() == wanted.tolist()
    else:
        got, wanted = dst.data.flatten().cpu(), value.to(f.dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        same = ~wanted.isnan()
        assert torch.equal(got[same].view(torch.uint8), wanted[same].view(torch.uint8))


@pytest.mark.parametrize("scale", [1.0, 0.37, 3.14159])
def test_twins(scale: float, device: str, provider: Provider) -> None:
    """FNUZ and OCP: with half the scale bytes stay what they are, but for four; and so back."""
    nuz = of_codes("fp8_e4m3fnuz", device, scale)
    ocp = CacheLayout(256, 0, 1, "fp8_e4m3fn").allocate(1, device, scale / 2)
    provider.convert_cache_(nuz, ocp)
    wanted = ALL_CODES.clone()
    wanted[[0x7F, 0xFF, 0x80]] = torch.tensor([0x7E, 0xFE, 0x7F], dtype=torch.uint8)
    assert torch.equal(codes(ocp), wanted)
    back = CacheLayout(256, 0, 1, "fp8_e4m3fnuz").allocate(1, device, scale)
    provider.convert_cache_(ocp, back)
    changed = codes(back).ne(ALL_CODES)
    assert changed.nonzero().flatten().tolist() == [0x7F, 0xFF] and codes(back)[[0x7F, 0xFF]].tolist() == [0x7E, 0xFE]

    ocp = of_codes("fp8_e4m3fn", device, scale)
    nuz = CacheLayout(256, 0, 1, "fp8_e4m3fnuz").allocate(1, device, 2 * scale)
    provider.convert_cache_(ocp, nuz)
    wanted = ALL_CODES.clone()
    wanted[[0x80, 0x7F, 0xFF]] = torch.tensor([0, 0x80, 0x80], dtype=torch.uint8)
    assert torch.equal(codes(nuz), wanted)


def test_scales_are_compared_on_the_device(device: str, provider: Provider) -> None:
    """Equal scales in two tensors: bytes stay, NaNs of either sign too. No scale is 1."""
    for scales in ((0.37, 0.37), (None, 1.0), (1.0, None), (0.0, -0.0)):
        src = of_codes("fp8_e5m2", device, scales[0])
        dst = CacheLayout(256, 0, 1, "fp8_e5m2").allocate(1, device, scales[1])
        provider.convert_cache_(src, dst)
        assert torch.equal(codes(dst), ALL_CODES), scales
    src, dst = (of_codes("fp8_e5m2", device, float("nan")) for _ in range(2))
    provider.convert_cache_(src, dst)
    assert codes(dst).eq(0x7F).all()


@pytest.mark.parametrize("packed", ["fp8_ds_mla", "fp8_model1"])
@pytest.mark.parametrize("plain", ["bf16", "fp16", "fp8_e4m3fnuz"])
def test_plain_and_packed(plain: str, packed: str, device: str, provider: Provider) -> None:
    """To packed rows it is write_cache_ of what the cache holds; and back, it is what they hold."""
    dims = FORMATS[packed].packed.dims  # type: ignore[union-attr]
    random = torch.Generator().manual_seed(5)
    rows = torch.randn((12, sum(dims)), generator=random).to(device)
    rows[1, :130] = 0
    src = CacheLayout(*dims, 4, plain).allocate(3, device, 0.25)
    slots = torch.arange(12, device=device)
    kind = torch.float16 if plain == "fp16" else torch.bfloat16
    providers.native.write_cache_(rows.to(kind)[:, : dims[0]], rows.to(kind)[:, dims[0] :], slots, src)
    dst, want = (CacheLayout(*dims, 6, packed).allocate(2, device) for _ in range(2))
    provider.convert_cache_(src, dst)
    held = providers.native.gather_cache(
        src, table(device, [0, 1, 2]), torch.tensor([0, 12], device=device), total=12, dtype=torch.bfloat16
    )
    if plain == "bf16":
        providers.native.write_cache_(held[:, : dims[0]], held[:, dims[0] :], slots, want)
        assert torch.equal(codes(dst), codes(want))
    back = CacheLayout(*dims, 4, "bf16").allocate(3, device)
    provider.convert_cache_(dst, back)
    error = (back.data.flatten(0, 1).float() - held.float()).abs()
    assert (error <= held.float().abs() * 2.0**-3 + 2.0**-6).all()
    assert torch.equal(back.data.flatten(0, 1)[:, dims[0] :], held[:, dims[0] :])  # the key is copied


CONVERT_FAULTS = {"src_blocks": (4, "0 .. 3"), "dst_blocks": (3, "0 .. 2")}


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn"])
@pytest.mark.parametrize("far", [0, 2**32])
@pytest.mark.parametrize("side", CONVERT_FAULTS)
def test_blocks_that_are_not_there(side: str, far: int, format: str, device: str, provider: Provider) -> None:
    """The CPU raises before it writes; a GPU leaves them out, as it does those of negative number."""
    src = counted(CacheLayout(16, 8, 2, "bf16"), 4, device)
    dst = CacheLayout(16, 8, 2, format).allocate(3, device)
    blocks = {"src_blocks": table(device, [3, 1], [2, 0]), "dst_blocks": table(device, [0, 1], [-1, 2])}
    first, limits = CONVERT_FAULTS[side]
    blocks[side][0, 1] = first + far
    if on_cpu(device, provider):
        text = f"latentkv.convert_cache_: {side}: expected block numbers in {limits}, got {first + far} at [0, 1]"
        with pytest.raises(RuntimeError) as error:
            provider.convert_cache_(src, dst, **blocks)
        assert str(error.value).splitlines()[0] == text and codes(dst).eq(0).all()
        return
    provider.convert_cache_(src, dst, **blocks)
    assert [bool(block.ne(0).any()) for block in dst.data.view(torch.uint8)] == [True, False, True]


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn", "fp16"])
def test_nothing_to_convert(format: str, device: str, provider: Provider) -> None:
    src, dst = CacheLayout(16, 8, 2, "bf16").allocate(2, device), CacheLayout(16, 8, 3, format).allocate(2, device)
    none = torch.zeros((3, 0), dtype=torch.int64, device=device)
    for own in (none, none[:0], none[0]):
        provider.convert_cache_(src, dst, src_blocks=own, dst_blocks=own)
    provider.convert_cache_(
        CacheLayout(16, 8, 2, "bf16").allocate(0, device), CacheLayout(16, 8, 3, format).allocate(0, device)
    )
    assert codes(dst).eq(0).all()


def test_other_dimensions(device: str, provider: Provider) -> None:
    src, dst = (CacheLayout(latent, 8, 2).allocate(2, device) for latent in (16, 24))
    with pytest.raises(
        RuntimeError, match=r"convert_cache_: dst: expected \(L, R\)=\(16, 8\), as src has, got \(24, 8\)$"
    ):
        provider.convert_cache_(src, dst)


@given(data=st.data())
def test_there_and_back(data: st.DataObject) -> None:
    """By any detour without rounding, and any blocks, rows come back."""
    format = data.draw(st.sampled_from(["bf16", "fp8_e4m3fn", "fp8_e5m2"]))
    detour = data.draw(st.sampled_from(["fp32", format]))
    sizes = [data.draw(st.integers(1, 9)) for _ in range(2)]
    tokens, runs = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 3))
    dims = data.draw(st.sampled_from([(512, 64), (17, 6), (24, 0), (8, 8)]))
    placements = [data.draw(st.sampled_from(["concat", "split"])) for _ in range(2)]
    columns = [-(-tokens // size) for size in sizes]
    source, home = (
        CacheLayout(*dims, sizes[0], format, placements[0]).allocate(runs * columns[0], "cpu") for _ in "ab"
    )
    kind = FORMATS[format]
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for t in source.tensors:
        values = torch.randn(t.shape, generator=random).to(kind.dtype)
        t.view(torch.uint8).copy_(values.view(torch.uint8))
    away = CacheLayout(*dims, sizes[1], detour, placements[1]).allocate(runs * columns[1] + 1, "cpu")
    first, second = (
        torch.randperm(runs * columns[0], generator=random).view(runs, -1),
        torch.randperm(runs * columns[1] + 1, generator=random)[:-1].view(runs, -1),
    )
    providers.native.convert_cache_(source, away, src_blocks=first, dst_blocks=second)
    providers.native.convert_cache_(away, home, src_blocks=second, dst_blocks=first)
    filled = min(columns[0] * sizes[0], columns[1] * sizes[1])
    for a, b in zip(source.tensors, home.tensors, strict=True):
        for run in first:
            one, two = (t.view(torch.uint8)[run].flatten(0, 1) for t in (a, b))
            assert torch.equal(one[:filled], two[:filled]) and two[filled:].eq(0).all()


# ------------------------------------------------------------------------------------------------------ bad input


def valid(op: str, device: str, format: str = "fp8_e4m3fn", placement: str = "concat") -> dict[str, Any]:
    packed = FORMATS[format].packed
    dims = packed.dims if packed else (16, 8)
    cache = CacheLayout(*dims, 4, format, placement).allocate(3, device, 0.5)  # type: ignore[arg-type]
    data, rope, scale, _ = cache.op_arguments
    if op == "gather_cache":
        return {
            "cache": data, "rope_cache": rope, "scale": scale, "format": format,
            "block_table": torch.zeros((2, 2), dtype=torch.int64, device=device),
            "cu_seq_lens": torch.tensor([0, 2, 3], device=device),
            "out": torch.zeros((4, sum(dims)), device=device), "kv_lora_rank": dims[0],
            "seq_starts": torch.zeros(2, dtype=torch.int64, device=device),
        }  # fmt: skip
    to, to_rope, _, _ = CacheLayout(*dims, 6, "bf16", placement).allocate(2, device).op_arguments  # type: ignore[arg-type]
    return {
        "src": data, "src_rope": rope, "src_scale": scale, "src_format": format,
        "dst": to, "dst_rope": to_rope, "dst_scale": torch.ones(1, device=device), "dst_format": "bf16",
        "kv_lora_rank": dims[0], "rope_dim": dims[1],
        "src_blocks": torch.tensor([[0, 1, 2]], device=device), "dst_blocks": torch.tensor([[0, 1]], device=device),
    }  # fmt: skip


def wide(t: Tensor) -> Tensor:
    """The same shape with an inner stride of 2."""
    return t.new_zeros((*t.shape[:-1], 2 * t.shape[-1]))[..., ::2]


Spoil = Callable[[Any], Any]
INDEX, CONTIGUOUS = "dtype int64 or int32", "a contiguous last dimension (stride 1)"
ACTIVATIONS = "dtype bfloat16 or float16 or float32"
OVERLAP, PAGES = "elements that do not overlap in memory", "shape [B, bs, C] or [B, 1, bs, C]"
OWN = "dtype float8_e4m3fn or uint8 for format fp8_e4m3fn"
FAULTS: list[tuple[str, str, Spoil, str, dict[str, str]]] = [  # op, argument, how it is spoiled, what is said, blamed
    ("gather_cache", "out", lambda t: t.double(), f"{ACTIVATIONS}, got float64", {}),
    ("gather_cache", "out", lambda t: t[0], "shape [total, L + R], got [24]", {}),
    ("gather_cache", "out", wide, f"{CONTIGUOUS}, got stride 2", {}),
    ("gather_cache", "out", lambda t: t[:1].expand(4, 24), f"{OVERLAP}, got strides [0, 1] for shape [4, 24]", {}),
    ("gather_cache", "out", lambda t: t.new_zeros(4, 25), "rows of L + R=25 elements, got 24",
     {"blamed": "cache"}),
    ("gather_cache", "kv_lora_rank", lambda _: 0, "at least 1, got 0", {}),
    ("gather_cache", "kv_lora_rank", lambda _: 25, "a number in 1 .. 24, the width of out, got 25", {}),
    ("gather_cache", "kv_lora_rank", lambda _: 448, "L=512 for format fp8_ds_mla, got 448",
     {"format": "fp8_ds_mla"}),
    ("gather_cache", "format", lambda _: "fp8", "a known format name, got 'fp8'", {}),
    ("gather_cache", "format", lambda _: "bf16", "dtype bfloat16 for format bf16, got float8_e4m3fn",
     {"blamed": "cache"}),
    ("gather_cache", "block_table", lambda t: t.float(), f"{INDEX}, got float32", {}),
    ("gather_cache", "block_table", lambda t: t[0], "shape [S, max_blocks], got [2]", {}),
    ("gather_cache", "block_table", wide, f"{CONTIGUOUS}, got stride 2", {}),
    ("gather_cache", "block_table", lambda t: t[:1], "shape [S + 1=2], got [3]", {"blamed": "cu_seq_lens"}),
    ("gather_cache", "cu_seq_lens", lambda t: t.short(), f"{INDEX}, got int16", {}),
    ("gather_cache", "cu_seq_lens", lambda t: t[:2], "shape [S + 1=3], got [2]", {}),
    ("gather_cache", "cu_seq_lens", lambda t: t[None], "shape [S + 1=3], got [1, 3]", {}),
    ("gather_cache", "cu_seq_lens", wide, f"{CONTIGUOUS}, got stride 2", {}),
    ("gather_cache", "seq_starts", lambda t: t.double(), f"{INDEX}, got float64", {}),
    ("gather_cache", "seq_starts", lambda t: t[:1], "shape [S=2], got [1]", {}),
    ("gather_cache", "seq_starts", wide, f"{CONTIGUOUS}, got stride 2", {}),
    ("convert_cache_", "kv_lora_rank", lambda _: 0, "at least 1, got 0", {}),
    ("convert_cache_", "kv_lora_rank", lambda _: 448, "L=512 for format fp8_ds_mla, got 448",
     {"format": "fp8_ds_mla"}),
    ("convert_cache_", "rope_dim", lambda _: -1, "at least 0, got -1", {}),
    ("convert_cache_", "rope_dim", lambda _: 9, "rows of at least L + R=25 elements, got 24", {"blamed": "src"}),
    ("convert_cache_", "dst_blocks", lambda t: t.repeat(2, 1), "shape [S=1, m], got [2, 2]", {}),
    ("convert_cache_", "dst_blocks", lambda t: t[:, :1],
     "2 blocks of 6, for src_blocks has 3 of 4, got 1", {}),
    ("convert_cache_", "dst_blocks", lambda _: torch.zeros(3, dtype=torch.int64),
     "2 blocks of 6, for src_blocks has 3 of 4, got 3", {}),
    ("convert_cache_", "dst_blocks", lambda t: t[:, :0], "2 blocks of 6, for src_blocks has 3 of 4, got 0", {}),
    ("convert_cache_", "src_blocks", lambda t: t[:, :0], "0 blocks of 6, for src_blocks has 0 of 4, got 2",
     {"blamed": "dst_blocks"}),
]  # fmt: skip
for _op, _sides in (
    ("gather_cache", ("cache", "rope_cache", "scale")),
    ("convert_cache_", ("src", "src_rope", "src_scale")),
):
    _cache, _rope, _scale = _sides
    _least = "at least " if _op == "convert_cache_" else ""  # which is told L and R
    FAULTS += [
        (_op, _cache, lambda t: t.view(torch.int8), f"{OWN}, got int8", {}),
        (_op, _cache, lambda t: t[0], f"{PAGES}, got [4, 24]", {}),
        (_op, _cache, lambda t: t[:, None].expand(3, 2, 4, 24), f"{PAGES}, got [3, 2, 4, 24]", {}),
        (_op, _cache, wide, f"{CONTIGUOUS}, got stride 2", {}),
        (_op, _cache, lambda t: t[:1].expand(3, 4, 24), f"{OVERLAP}, got strides [0, 24, 1] for shape [3, 4, 24]", {}),
        (_op, _cache, lambda t: t[..., :15], f"rows of {_least}L=16 elements, got 15", {"placement": "split"}),
        (_op, _rope, lambda t: t[..., :7], f"rows of {_least}R=8 elements, got 7", {"placement": "split"}),
        (_op, _rope, lambda t: t.view(torch.int8), f"{OWN}, got int8", {"placement": "split"}),
        (_op, _rope, lambda t: t[:2], f"the blocks of {_cache}: [3, 4, 16], got [2, 4, 8]", {"placement": "split"}),
        (_op, _rope, lambda _: torch.zeros(3, 4, 64, dtype=torch.uint8), "None for format fp8_ds_mla, got a tensor",
         {"format": "fp8_ds_mla"}),
        (_op, _cache, lambda t: t[..., :655], "rows of at least 656 bytes, got 655", {"format": "fp8_ds_mla"}),
        (_op, _cache, lambda t: t.new_zeros(3, 4, 600)[..., :584],
         "entries 584 bytes apart, as scales lie after a block's rows, got 600", {"format": "fp8_model1"}),
        (_op, _scale, lambda t: t.double(), "dtype float32, got float64", {}),
        (_op, _scale, lambda t: t.repeat(2), "one element, got shape [2]", {}),
    ]  # fmt: skip
FAULTS += [
    ("convert_cache_", "dst", lambda t: t.half(), "dtype bfloat16 for format bf16, got float16", {}),
    ("convert_cache_", "dst", wide, f"{CONTIGUOUS}, got stride 2", {}),
    (
        "convert_cache_",
        "dst_rope",
        lambda t: t[..., :7],
        "rows of at least R=8 elements, got 7",
        {"placement": "split"},
    ),
    ("convert_cache_", "dst_scale", lambda t: t.double(), "dtype float32, got float64", {}),
    ("convert_cache_", "src_format", lambda _: "int8", "a known format name, got 'int8'", {}),
    ("convert_cache_", "dst_format", lambda _: "", "a known format name, got ''", {}),
    ("convert_cache_", "src_blocks", lambda t: t.float(), f"{INDEX}, got float32", {}),
    ("convert_cache_", "src_blocks", lambda t: t[None], "shape [n], got [1, 1, 3]", {}),
    ("convert_cache_", "dst_blocks", wide, f"{CONTIGUOUS}, got stride 2", {}),
    ("convert_cache_", "dst_blocks", lambda t: t.bool(), f"{INDEX}, got bool", {}),
]


def plain_op(provider: Provider, op: str) -> Callable[..., Any]:
    """Below the classes, which check some of it themselves."""
    return provider._op(op)


@pytest.mark.parametrize(
    ("op", "argument", "spoil", "said", "more"), FAULTS, ids=[f"{f[0]}-{f[1]}-{i}" for i, f in enumerate(FAULTS)]
)
def test_message(
    op: str, argument: str, spoil: Spoil, said: str, more: dict[str, str], device: str, provider: Provider
) -> None:
    if provider.name in amd.ARCHS:
        pytest.skip("its checks are native's")
    more = dict(more)
    blamed = more.pop("blamed", argument)
    call = valid(op, device, **more)
    call[argument] = spoil(call[argument])
    if isinstance(call[argument], Tensor):
        call[argument] = call[argument].to(device)
    tensors = [t for t in call.values() if isinstance(t, Tensor)]
    before = copy.deepcopy(tensors)
    with pytest.raises(RuntimeError) as error:
        plain_op(provider, op)(*call.values())
    assert str(error.value).splitlines()[0] == f"latentkv.{op}: {blamed}: expected {said}"
    assert all(
        torch.equal(
            a.view(torch.uint8) if a.element_size() == 1 else a, b.view(torch.uint8) if b.element_size() == 1 else b
        )
        for a, b in zip(tensors, before, strict=True)
    )


@pytest.mark.parametrize("op", READING)
def test_every_argument_is_spoiled(op: str) -> None:
    assert {f[1] for f in FAULTS if f[0] == op} == set(valid(op, "cpu"))


@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("op", READING)
def test_the_valid_call_is_valid(op: str, placement: str, device: str, provider: Provider) -> None:
    plain_op(provider, op)(*valid(op, device, placement=placement).values())


@pytest.mark.parametrize("op", READING)
def test_wrong_device(op: str, device: str) -> None:
    """No argument on another device turns the call into a silent no-op."""
    for argument, value in valid(op, device, placement="split").items():
        if not isinstance(value, Tensor):
            continue
        for provider in (providers.native, providers.reference):
            call = valid(op, device, placement="split") | {argument: value.to("meta")}
            with pytest.raises(RuntimeError, match=rf"^latentkv\.{op}: \w+: expected a tensor on .*, got one on"):
                plain_op(provider, op)(*call.values())


@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("op", READING)
def test_opcheck(op: str, placement: str, device: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch with dynamic shapes."""

    def arguments() -> dict[str, Any]:  # torch's own check of a schema cannot compare fp8
        call = valid(op, device, placement=placement)
        fp8 = {k: v.view(torch.uint8) for k, v in call.items() if isinstance(v, Tensor) and v.element_size() == 1}
        return call | fp8

    for namespace in (NAMESPACE, NATIVE_NAMESPACE):
        call = arguments()
        torch.library.opcheck(getattr(getattr(torch.ops, namespace), op).default, tuple(call.values()))
    optional = {"scale", "seq_starts", "src_scale", "dst_scale", "src_blocks", "dst_blocks"}
    call = {k: None if k in optional else v for k, v in arguments().items()}
    torch.library.opcheck(getattr(torch.ops.latentkv, op).default, tuple(call.values()))


@pytest.mark.parametrize("format", ["bf16", "fp32", "fp8_e4m3fn", "fp8_e4m3fnuz"])
def test_many_rows(format: str, device: str, provider: Provider) -> None:
    """Of many rows a lane takes more of each: the same bytes."""
    cache = CacheLayout(64, 8, 16, format).allocate(8, device, 0.37)
    random = torch.Generator().manual_seed(6)
    values = torch.randn(cache.data.shape, generator=random).to(FORMATS[format].dtype)
    cache.data.view(torch.uint8).copy_(values.view(torch.uint8))
    blocks = torch.arange(136, device=device)[None] % 8
    for aligned in (True, False):
        out = torch.zeros((2100, 72 if aligned else 73), dtype=torch.bfloat16, device=device)[:, :72]
        provider.gather_cache(cache, blocks, torch.tensor([0, 2100], device=device), out=out)
        few = providers.reference.gather_cache(
            cache, blocks, torch.tensor([0, 128], device=device), total=128, dtype=torch.bfloat16
        )
        assert torch.equal(out, few.repeat(17, 1)[:2100])


@on_gpu
def test_many_rows_into_tiles() -> None:
    """And from them."""
    cache = CacheLayout(512, 64, 64).allocate(64, "cuda")
    cache.data.copy_(torch.randn(cache.data.shape, generator=torch.Generator().manual_seed(7)))
    packed, few = (CacheLayout(512, 64, 64, "fp8_ds_mla").allocate(64, "cuda") for _ in range(2))
    providers.native.convert_cache_(cache, packed)
    rows = torch.arange(4096, device="cuda")
    latent, rope = cache.data.flatten(0, 1).split((512, 64), 1)
    providers.native.write_cache_(latent, rope, rows, few)
    assert torch.equal(packed.data, few.data)
    arguments = torch.arange(64, device="cuda")[None], torch.tensor([0, 4096], device="cuda")
    out = providers.native.gather_cache(packed, *arguments, total=4096)
    assert torch.equal(out, providers.reference.gather_cache(packed, *arguments, total=4096))


# ---------------------------------------------------------------------------------------------- checks on demand, GPUs

CHECKED = """
import sys
sys.path.insert(0, {tests!r})
import torch
import test_read as t
from latentkv import CacheLayout, providers
provider, device = {provider}, {device!r}
for fields, text in t.GATHER_FAULTS.values():
    cache, blocks, begins, starts = t.gather_of(device, "bf16", **fields)
    out = torch.full((8, 24), -1.0, dtype=torch.bfloat16, device=device)
    try:
        provider.gather_cache(cache, blocks, begins, out=out, seq_starts=starts)
    except RuntimeError as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError(text)
    assert out.eq(-1).all()
src, dst = (CacheLayout(16, 8, 2, f).allocate(3, device) for f in ("bf16", "fp16"))
try:
    provider.convert_cache_(src, dst, src_blocks=torch.tensor([0, 3, 1], device=device))
except RuntimeError as error:
    assert "src_blocks: expected block numbers in 0 .. 2, got 3 at [0, 1]" in str(error), str(error)
else:
    raise AssertionError("convert")
print("checked")
"""


@pytest.mark.skipif(amd.problem() is not None, reason=f"no emulated chip: {amd.problem()}")
def test_checks_make_an_emulated_chip_raise(python: Python) -> None:
    code = CHECKED.format(tests=str(Path(__file__).parent), provider="t.amd.provider('gfx942')", device="cpu")
    done = python(code, LATENTKV_CHECKS="1", PYTHONPATH=":".join(p for p in sys.path if p))
    assert done.returncode == 0 and "checked" in done.stdout, done.stderr


@on_gpu
@pytest.mark.parametrize("name", ["native", "triton", "reference"])
def test_checks_make_the_gpu_raise(name: str, python: Python) -> None:
    code = CHECKED.format(tests=str(Path(__file__).parent), provider=f"providers.{name}", device="cuda")
    done = python(code, LATENTKV_CHECKS="1", PYTHONPATH=":".join(p for p in sys.path if p))
    assert done.returncode == 0 and "checked" in done.stdout, done.stderr


@on_gpu
@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("fields", [{"format": "bf16"}, {"format": "fp8_e4m3fn"}, {"format": "fp8_ds_mla"}], ids=str)
def test_graph_replays_on_new_inputs(fields: dict[str, str], name: str) -> None:
    """Captured once; replayed after tables, lengths and rows in the same memory have changed."""
    provider = getattr(providers, name)
    layout = CacheLayout(512, 64, 16, fields["format"])
    gather = Case("gather_cache", layout, tokens=40, starts=True)
    convert = Case("convert_cache_", layout, to=CacheLayout(512, 64, 64), tokens=40)
    for case in (gather, convert):
        p = Problem(case, "cuda")
        p.run(provider)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            p.run(provider)
        for seed in range(1, 4):
            fresh = Problem(case, "cuda", seed)
            if any(p.buffers[n].shape != b.shape for n, b in fresh.buffers.items()):
                fresh = Problem(case, "cuda")
            for n, buffer in fresh.buffers.items():
                p.buffers[n].copy_(buffer)
            if case.op == "gather_cache":
                p.cu_seq_lens.copy_(fresh.cu_seq_lens)
                p.seq_starts.copy_(fresh.seq_starts)
            graph.replay()
            fresh.run(providers.reference)
            torch.cuda.synchronize()
            assert p.differences(fresh) == []


@on_gpu
@pytest.mark.parametrize("name", ["native", "triton"])
def test_offsets_beyond_32_bits(name: str) -> None:
    """Elements past 2^31 and bytes past 2^32, on either side."""
    provider = getattr(providers, name)
    blocks = 2**32 // (64 * 576) + 100
    src = CacheLayout(512, 64, 64, "fp8_e4m3fn").allocate(blocks, "cuda")
    chosen = [blocks - 1, 0, 2**31 // (64 * 576) + 1, 2**32 // (64 * 576) + 1]
    for i, block in enumerate(chosen):
        src.data.view(torch.uint8)[block] = 0x30 + i
    own = torch.tensor(chosen, device="cuda")
    out = provider.gather_cache(src, own[None], torch.tensor([0, 256], device="cuda"), total=256)
    wanted = torch.tensor([0x30, 0x31, 0x32, 0x33], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(out.view(4, -1).float().cpu(), wanted[:, None].expand(4, 64 * 576))
    provider.convert_cache_(src, src, src_blocks=own[:2], dst_blocks=own[2:])
    assert src.data.view(torch.uint8)[own].view(4, -1).eq(torch.tensor([[48], [49], [48], [49]], device="cuda")).all()
    del src
    large = torch.empty((2**32 // 1152 + 5, 576), dtype=torch.bfloat16, device="cuda")
    small = CacheLayout(512, 64, 64).allocate(1, "cuda")
    small.data.fill_(3)
    total, zero = len(large), torch.zeros((1, -(-len(large) // 64)), dtype=torch.int32, device="cuda")
    provider.gather_cache(small, zero, torch.tensor([0, total], device="cuda"), out=large)
    assert all(part.eq(3).all() for part in large.split(1 << 20))


@on_gpu
def test_every_part_of_a_chain_waits() -> None:
    """Writes and reads of one cache, back to back with programmatic dependent launch."""
    layout = CacheLayout(512, 64, 64, "fp8_e4m3fn")
    cache, copied = layout.allocate(64, "cuda", 0.5), CacheLayout(512, 64, 16).allocate(256, "cuda")
    slots = torch.arange(4096, device="cuda")
    blocks, begins = torch.arange(256, device="cuda")[None], torch.tensor([0, 4096], device="cuda")
    for i in range(20):
        rows = torch.full((4096, 576), float(i + 1), dtype=torch.bfloat16, device="cuda")
        providers.native.write_cache_(rows[:, :512], rows[:, 512:], slots, cache)
        providers.native.convert_cache_(cache, copied)
        out = providers.native.gather_cache(copied, blocks, begins, total=4096)
        providers.native.gather_cache(copied, blocks, begins, out=rows)
        assert torch.equal(out, rows)
        wanted = (torch.tensor((i + 1) / 0.5).to(torch.float8_e4m3fn).float() * 0.5).item()
        assert out.eq(wanted).all()


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_table_without_columns(name: str) -> None:
    """It has a block for no token."""
    provider = getattr(providers, name)
    cache, table = CacheLayout(8, 2, 4).allocate(2, "cpu"), torch.zeros(1, 0, dtype=torch.int64)
    with pytest.raises(
        RuntimeError, match="block_table: expected blocks for token 0 of sequence 0, 4 tokens each, got 0"
    ):
        provider.gather_cache(cache, table, torch.tensor([0, 3]), total=3)
    assert provider.gather_cache(cache, table, torch.tensor([0, 0]), total=0).shape == (0, 10)

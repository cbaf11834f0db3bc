"""An oracle of the contract's own: what a call leaves behind, computed apart from every provider.

Numbers are fp64 with a rounding to fp32 after each step, fp8 codes are found by search, packed rows are put together
byte by byte from the published descriptions.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from conftest import on_cpu
from latentkv import CacheLayout
from latentkv.cache.layouts import FORMATS, MLACache
from latentkv.providers import Provider
from latentkv.testing import POISON, Case, Problem
from torch import Tensor

QUANTISED = [f for f in FORMATS if FORMATS[f].quantised]
PACKED = [f for f in FORMATS if FORMATS[f].packed]
FLOOR = float(np.float32(1e-4))  # the least divisor of a tile


# ------------------------------------------------------------------------------------------------------ numbers


def rounded(x: Tensor) -> Tensor:
    """fp64 rounded to fp32. Of the product, sum or quotient of two fp32 numbers that is the correctly rounded one."""
    return x.float().double()


def turn(x: Tensor, angles: Tensor, neox: bool, inverse: bool = False) -> Tensor:
    """One head [R] by one row of the table, in fp64 with a rounding to fp32 after each step."""
    half, dtype = x.shape[-1] // 2, x.dtype
    cos, sin = angles.cpu().double().split(half)
    sin = -sin if inverse else sin
    first = torch.arange(half) if neox else torch.arange(0, 2 * half, 2)
    second = first + half if neox else first + 1
    x, out = x.cpu().double(), torch.empty(2 * half, dtype=torch.float64)
    out[first] = rounded(rounded(x[first] * cos) - rounded(x[second] * sin))
    out[second] = rounded(rounded(x[second] * cos) + rounded(x[first] * sin))
    return out.float().to(dtype)


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of one vector [L], one number at a time."""
    one, size = np.float32(1), len(x)
    values = x.cpu().float().numpy()
    with np.errstate(all="ignore"):
        partial = [np.float32(0)] * 32
        for i, v in enumerate(values):
            partial[i // 8 % 32] = partial[i // 8 % 32] + v * v
        for half in (16, 8, 4, 2, 1):
            partial = [partial[i] + partial[i + half] for i in range(half)]
        root = one / np.sqrt(partial[0] / np.float32(size) + np.float32(eps))
        out = (values * root) * weight.cpu().float().numpy()
    assert out.dtype == np.float32
    return torch.from_numpy(out).to(x.dtype)


def grid(format: str) -> Tensor:
    """The values of an fp8 kind's codes 0, 1, ... up to the largest finite one, from the definition of the kind."""
    mantissa, bias, top = {"fp8_e4m3fn": (3, 7, 0x7E), "fp8_e4m3fnuz": (3, 8, 0x7F), "fp8_e5m2": (2, 15, 0x7B)}[format]
    values = []
    for code in range(top + 1):
        exponent, fraction = code >> mantissa, (code & (1 << mantissa) - 1) / (1 << mantissa)
        values.append((fraction if exponent == 0 else 1 + fraction) * 2.0 ** (max(exponent, 1) - bias))
    return torch.tensor(values, dtype=torch.float64)


def nearest(x: Tensor, format: str) -> Tensor:
    """The codes of fp32 numbers, held in fp64, by search for the nearest value of the kind."""
    values = grid(format)
    size = x.abs().nan_to_num(0.0).clamp(max=float(values[-1]))
    above = torch.searchsorted(values, size).clamp(min=1)
    below = above - 1
    to_below, to_above = size - values[below], values[above] - size
    even = torch.where(below % 2 == 0, below, above)
    code = torch.where(to_below < to_above, below, torch.where(to_above < to_below, above, even))
    sign = torch.signbit(x) & ((code > 0) | (format != "fp8_e4m3fnuz"))
    nan = 0x80 if format == "fp8_e4m3fnuz" else 0x7F
    return torch.where(x.isnan(), nan, code | sign.long() << 7).to(torch.uint8)


def fp8(x: Tensor, format: str, scale: float | Tensor | None) -> Tensor:
    """The codes of convert(x / scale)."""
    divisor = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32)
    return nearest(rounded(x.cpu().double() / divisor.cpu().double()), format)


def fp8_query(x: Tensor, format: str, scale: float | None) -> Tensor:
    """The codes of convert(x * (1 / scale))."""
    divisor = torch.tensor(1.0 if scale is None else scale, dtype=torch.float32).double()
    return nearest(rounded(x.cpu().double() * rounded(1 / divisor)), format)


def stored(x: Tensor, format: str, scale: float | None) -> Tensor:
    return fp8(x, format, scale) if FORMATS[format].quantised else x


def plain(part: Tensor) -> Tensor:
    """A tensor as it is indexed and compared: fp8 as uint8."""
    return part.view(torch.uint8) if part.element_size() == 1 else part


# -------------------------------------------------------------------------------------------------- packed rows


def largest(x: Tensor) -> Tensor:
    """The largest magnitude of the last dimension's numbers, 0 where there is none."""
    return x.cpu().double().abs().nan_to_num(0.0, posinf=math.inf).amax(-1)


def next_power_of_two(x: Tensor) -> Tensor:
    """The least power of two that is not less, by fraction and exponent."""
    fraction, exponent = torch.frexp(x)
    power = torch.ldexp(torch.ones_like(x), exponent - (fraction == 0.5).int())
    return torch.where(x.isinf(), x, power)


def tile_scales(x: Tensor, tile: int) -> Tensor:
    """2^ceil(log2(max(amax / 448, 1e-4))) of each tile of [..., L], in fp64."""
    amax = largest(x.unflatten(-1, (-1, tile)))
    return next_power_of_two(rounded(amax / 448).clamp(min=FLOOR))


def tile_codes(x: Tensor, scales: Tensor) -> Tensor:
    tile = x.shape[-1] // scales.shape[-1]
    return fp8(x, "fp8_e4m3fn", scales.repeat_interleave(tile, -1))


def as_bytes(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def packed_row(latent: Tensor, rope: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """A row of 656 bytes and nothing, or the 576 bytes of data and the 8 of scales of a row of DeepSeek-V4."""
    if format == "fp8_ds_mla":
        scales = tile_scales(latent, 128)
        row = torch.cat([tile_codes(latent, scales), as_bytes(scales.float()), as_bytes(rope)])
        assert len(row) == 656
        return row, row[:0]
    scales = tile_scales(latent, 64)
    row = torch.cat([tile_codes(latent, scales), as_bytes(rope)])
    exponents = [255 if math.isinf(s) else 127 + int(math.log2(s)) for s in scales.tolist()]
    assert (len(row), len(exponents)) == (576, 7)
    return row, torch.tensor([*exponents, 0], dtype=torch.uint8)


def indexer_row(k: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """The 128 codes and the 4 bytes of the scale of an indexer key [128], rotated already."""
    scale = rounded(largest(k).clamp(min=FLOOR) / 448)
    scale = next_power_of_two(scale) if power_of_two else scale
    return fp8(k, "fp8_e4m3fn", scale), as_bytes(scale.float().reshape(1))


def put_bytes(page: Tensor, entry: int, data: Tensor, footer: Tensor) -> None:
    """Into a block [bs, row] of bytes: all entries' data first, then all entries' footers."""
    size, entries, start = len(data) + len(footer), page.shape[0], page.storage_offset()
    run = page.as_strided((entries * size,), (1,), start)
    run[entry * len(data) : (entry + 1) * len(data)] = data.to(page.device)
    at = entries * len(data) + entry * len(footer)
    run[at : at + len(footer)] = footer.to(page.device)


def put_row(cache: MLACache, slot: int, latent: Tensor, rope: Tensor) -> None:
    """Writes one row as the cache's format has it."""
    lay = cache.layout
    block, entry = divmod(slot, lay.block_size)
    if lay.format == "fp8_ds_mla":
        cache.data[block, entry, :656] = packed_row(latent, rope, lay.format)[0].to(cache.device)
        return
    if lay.packed:
        return put_bytes(cache.data[block], entry, *packed_row(latent, rope, lay.format))
    scale = None if cache.scale is None else float(cache.scale)
    for part, x in ((cache.latent, latent), (cache.rope, rope)):
        assert part is not None
        plain(part)[block, entry] = stored(x, lay.format, scale).to(cache.device)


# --------------------------------------------------------------------------------------------------- the memory


def virtual(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of its own, of which only what is touched is taken."""
    extent = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python's name is newer than Linux's
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    pages = mmap.mmap(-1, extent * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).as_strided(shape, strides)


def spread(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy of ``t`` with other strides."""
    view = virtual(tuple(t.shape), strides, t.dtype)
    plain(view).copy_(plain(t))
    return view


def need(gigabytes: float) -> None:
    """Skips the test where the GPU has less memory than that."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free:.1f} are free")


def all_poison(buffer: Tensor) -> bool:
    """Whether no byte has been touched; in pieces, as a comparison makes as many bytes again."""
    return all(bool((piece == POISON).all()) for piece in buffer.split(2**30))


# ------------------------------------------------------------------------------------------------- the problems


def make(
    device: str, L: int = 32, R: int = 32, block_size: int = 4, format: str = "bf16", placement: str = "concat",
    op: str = "rope_write_cache_", **fields: object,
) -> Problem:  # fmt: skip
    """Six tokens, three heads, all slots valid; every tensor that could be overwritten is among the buffers.

    A packed format brings its own L and R, the indexer's op its own L and format.
    """
    packed = FORMATS[format].packed
    L, R = packed.dims if packed else (L, R)
    L, format = (128, "fp8_e4m3fn") if op == "write_indexer_cache_" else (L, format)
    layout = CacheLayout(L, R, block_size, format, placement)  # type: ignore[arg-type]
    p = Problem(Case(op, layout, **({"tokens": 6} | fields)), device, seed=3)  # type: ignore[arg-type]
    return keep(p)


def keep(p: Problem) -> Problem:
    """Watches the arguments of a problem too, after some were replaced."""
    del p.__dict__["_random"]
    inputs = {"positions": p.positions, "slots": p.slots, "table": p.table}
    if p.case.op != "write_indexer_cache_":
        inputs["scale"] = p.cache.scale
    p.buffers |= {name: t for name, t in inputs.items() if t is not None}
    return p


def expected(p: Problem, rotated: Iterable[int], written: Iterable[int]) -> Problem:
    """A copy of the problem in which those rows are rotated and written, and everything else is as it was."""
    want = copy.deepcopy(p)
    for i in rotated:
        assert want.positions is not None and want.table is not None
        angles = want.table[want.positions[i]]
        for head in (*want.q_pe[i], want.k_pe[i]):
            head.copy_(turn(head, angles, p.case.rope == "neox"))
    for i in written:
        for kv_c, k_pe, cache in want.layers:
            put_row(cache, int(want.slots[i]), kv_c[i], k_pe[i])
    return want


def becomes(
    p: Problem, provider: Provider, rotated: Iterable[int] = range(6), written: Iterable[int] = range(6)
) -> None:
    """Running ``p`` rotates and writes exactly those rows: all other bytes stay."""
    want = expected(p, rotated, written)
    p.run(provider)
    assert p.differences(want) == []


def refuses(p: Problem, provider: Provider, argument: str, expected: str, got: str) -> None:
    """Running ``p`` raises before anything is written."""
    before = copy.deepcopy(p)
    with pytest.raises(RuntimeError) as error:
        p.run(provider)
    assert f"latentkv.{p.case.op}: {argument}: expected {expected}, got {got}" in str(error.value)
    assert p.differences(before) == []


def outside(p: Problem, provider: Provider, argument: str, expected: str, value: int, row: int) -> None:
    """What a slot or position outside does: the CPU raises, a GPU skips that row as a whole."""
    if on_cpu(str(p.device), provider):
        return refuses(p, provider, argument, expected, f"{value} at row {row}")
    others = [i for i in range(len(p.slots)) if i != row]
    return becomes(p, provider, others if p.case.op == "rope_write_cache_" else [], others)

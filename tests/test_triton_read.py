"""gather_cache and convert_cache_ of the Triton provider, byte for byte as the reference, poison included.

What the ops mean, by other words than the reference's, is in test_read.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, elsewhere, in_triton, passes_interpreted
from latentkv import CacheLayout, MLACache
from latentkv.cache.layouts import FORMATS
from latentkv.ops import checks
from latentkv.providers import Provider, reference, triton
from latentkv.testing import Case, Problem, first_difference, poisoned
from torch import Tensor

pytest.importorskip("triton")
# Random bytes are infinities and NaNs, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")

FP8 = [name for name, f in FORMATS.items() if f.quantised]
PLAIN = [name for name, f in FORMATS.items() if not f.packed]
PACKED = [name for name, f in FORMATS.items() if f.packed]
PAIRS = [*itertools.product(PLAIN, PLAIN), *((f, f) for f in PACKED)]
PAIRS += [pair for packed in PACKED for plain in PLAIN for pair in ((packed, plain), (plain, packed))]
INDEX = (torch.int64, torch.int32)


@elsewhere
def test_interpreted() -> None:
    passes_interpreted(__file__)


@dataclass
class Stored:
    """A cache of random bytes, in memory that is poisoned around it."""

    cache: MLACache
    buffers: list[Tensor]


def stored(format: str, number: int, dims: tuple[int, int] = (24, 8), *, empty: bool = False, **fields: Any) -> Stored:
    """``number`` picks block size, placement, strides, backing and scale; ``empty`` leaves it poisoned."""
    packed = FORMATS[format].packed
    layout = CacheLayout(
        *(packed.dims if packed else dims),
        fields.get("block_size", (1, 3, 16, 64)[number % 4]),
        format,
        "split" if number // 2 % 2 and not packed else "concat",
    )
    case = Case(
        "write_cache_", layout, tokens=24, pages=number // 3 % 2 == 1, as_bytes=number % 2 == 1,
        scale=(0.37, None)[number % 2], strides=("contiguous", "unaligned")[number // 5 % 2],
    )  # fmt: skip
    problem = Problem(case, DEVICE)
    cache = problem.cache
    if not empty:
        random = torch.Generator().manual_seed(number)
        for t in cache.tensors:
            to = t.view(torch.uint8)
            to.copy_(torch.randint(0, 256, to.shape, generator=random))
    return Stored(cache, [b for name, b in problem.buffers.items() if name.startswith("cache")])


def assert_same(actual: list[Tensor], expected: list[Tensor], format: str) -> None:
    """All bytes are the same, but for those of a NaN that arithmetic made in 16 or 32 bits, as in packed keys."""
    f = FORMATS[format]
    kind = torch.uint8 if f.quantised else f.activation
    assert kind is not None
    for a, b in zip(actual, expected, strict=True):
        assert first_difference(a.view(kind), b.view(kind), any_nan=kind != torch.uint8) is None


def tensor(values: Any, kind: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=kind, device=DEVICE)


# ---------------------------------------------------------------------------------------------------------- gather


def gathered(
    provider: Provider, rows: int, width: int, dtype: torch.dtype, gap: int, *arguments: Any, **more: Any
) -> Tensor:
    """The poisoned buffer that rows of ``width`` elements, ``gap`` apart, were gathered into."""
    buffer = poisoned((rows * (width + gap) + gap) * dtype.itemsize, DEVICE)
    out = buffer.view(dtype).as_strided((rows, width), (width + gap, 1), gap)
    provider.gather_cache(*arguments, out=out, **more)
    return buffer


@in_triton
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("format", FORMATS)
def test_gather(format: str, kind: str) -> None:
    """Every format, in blocks of every size; the last rows of out are no sequence's."""
    for number in range(4) if FORMATS[format].packed is None else range(4, 6):
        cache = stored(format, number + 4 * list(FORMATS).index(format)).cache
        size, blocks = cache.layout.block_size, cache.num_blocks
        starts, lengths = [2, 0, 1], [min(11, cache.num_slots // 2), 0, 5]
        columns = -(-14 // size)
        random = torch.Generator().manual_seed(number)
        table = torch.randint(0, blocks, (3, columns), generator=random).to(INDEX[number % 2]).to(DEVICE)
        begins = tensor([0, *itertools.accumulate(lengths)], INDEX[number // 2 % 2])
        more = {"seq_starts": tensor(starts, INDEX[number % 2])} if number % 2 else {}
        width = cache.layout.kv_lora_rank + cache.layout.rope_dim
        args = (sum(lengths) + 3, width, FORMATS[kind].dtype, (0, 3)[number % 2], cache, table, begins)
        assert_same(*([gathered(p, *args, **more)] for p in (triton, reference)), kind)


@in_triton
@given(data=st.data())
@settings(max_examples=12)
def test_gather_of_any_shape(data: st.DataObject) -> None:
    sizes = st.integers(1, 40)
    dims = data.draw(st.tuples(sizes, sizes.map(lambda n: 2 * n - 2)))
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=70))
    format, kind = data.draw(st.sampled_from(PLAIN)), data.draw(st.sampled_from(["bf16", "fp16", "fp32"]))
    cache = stored(format, data.draw(st.integers(0, 30)), dims).cache
    columns = -(-9 // cache.layout.block_size)
    table = torch.arange(len(lengths) * columns, device=DEVICE).view(-1, columns) * 7 % cache.num_blocks
    begins = tensor([0, *itertools.accumulate(lengths)])
    args = (sum(lengths) + 1, sum(dims), FORMATS[kind].dtype, 1, cache, table, begins)
    assert_same(*([gathered(p, *args)] for p in (triton, reference)), kind)


@in_triton
@pytest.mark.parametrize("sequences", [31, 32, 1100])
def test_search(sequences: int) -> None:
    """Of one, two and three steps, most sequences being empty."""
    cache = stored("bf16", 0).cache
    lengths = torch.arange(sequences) % 29 == 28
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    table = (torch.arange(sequences, device=DEVICE) % cache.num_blocks)[:, None]
    args = (int(begins[-1]) + 2, 32, torch.bfloat16, 0, cache, table, begins)
    assert_same(*([gathered(p, *args)] for p in (triton, reference)), "bf16")


@in_triton
@pytest.mark.parametrize("format", ["bf16", "fp8_e5m2", "fp8_ds_mla"])
def test_gather_without_blocks(format: str) -> None:
    """Where no value is looked at, a row without a block is zero, and be the scale NaN."""
    cache = stored(format, 1).cache
    if cache.scale is not None:
        cache.scale.fill_(float("nan"))
    size, blocks = cache.layout.block_size, cache.num_blocks
    table = tensor([[0, blocks, 1], [-1, 1, 2**31 - 1], [2**40, 0, -(2**40)]])
    begins, starts = tensor([0, 3 * size, 5 * size + 1, 8 * size]), tensor([0, -1, 1])
    width = cache.layout.kv_lora_rank + cache.layout.rope_dim
    args = (8 * size + 1, width, torch.bfloat16, 1, cache, table, begins)
    with unchecked():
        assert_same(*([gathered(p, *args, seq_starts=starts)] for p in (triton, reference)), "bf16")
        nowhere = (args[0], width, torch.bfloat16, 1, cache, table[:, :0], begins)
        assert_same(*([gathered(p, *nowhere)] for p in (triton, reference)), "bf16")


def unchecked() -> Any:
    """No value is looked at, as on a GPU."""
    return mock.patch.object(checks, "checks_values", return_value=False)


# --------------------------------------------------------------------------------------------------------- convert


def converted(provider: Provider, src: MLACache, format: str, number: int, **blocks: Any) -> list[Tensor]:
    """The buffers of a poisoned cache that src was converted into."""
    dims = (src.layout.kv_lora_rank, src.layout.rope_dim)
    to = stored(format, number, dims, empty=True)
    provider.convert_cache_(src, to.cache, **blocks)
    return to.buffers


@in_triton
@pytest.mark.parametrize(("format", "to"), PAIRS)
def test_convert(format: str, to: str) -> None:
    """Rows of every format into every other, from some blocks of one size into some of another."""
    first, random = PAIRS.index((format, to)), torch.Generator().manual_seed(0)
    dims = next((f.packed.dims for f in (FORMATS[format], FORMATS[to]) if f.packed), (24, 8))
    for number in (first, first + 7)[: 1 if FORMATS[to].packed else 2]:
        src, dst = stored(format, number, dims).cache, stored(to, number + 1, dims, empty=True).cache
        sizes = (src.layout.block_size, dst.layout.block_size)
        n, m = (-(-18 // size) for size in sizes)
        src_blocks = torch.randperm(src.num_blocks, generator=random)[: min(n, src.num_blocks)]
        dst_blocks = torch.randperm(dst.num_blocks, generator=random)[: min(m, dst.num_blocks)]
        tokens = min(len(src_blocks) * sizes[0], len(dst_blocks) * sizes[1])
        blocks = {
            "src_blocks": src_blocks[: -(-tokens // sizes[0])].to(INDEX[number % 2]).to(DEVICE),
            "dst_blocks": dst_blocks[: -(-tokens // sizes[1])].to(DEVICE),
        }
        assert_same(*(converted(p, src, to, number + 1, **blocks) for p in (triton, reference)), to)


@in_triton
@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("fp8_e4m3fnuz", "fp8_e4m3fn"), ("fp16", "fp8_model1")], ids=str)
def test_runs(formats: tuple[str, str]) -> None:
    """Sequences of unequal lengths in 2-D tables filled up with negative numbers, on either side."""
    src = stored(formats[0], 1, (448, 64), block_size=3).cache
    src_blocks = tensor([[0, 1, 2], [5, -1, -1], [7, 3, -9]])
    dst_blocks = tensor([[4, 3, 0], [2, 1, -1], [-1, 5, 6]], torch.int32)
    blocks = {"src_blocks": src_blocks, "dst_blocks": dst_blocks}

    def buffers(provider: Provider) -> list[Tensor]:
        to = stored(formats[1], 1, (448, 64), empty=True, block_size=3)
        provider.convert_cache_(src, to.cache, **blocks)
        return to.buffers

    assert_same(buffers(triton), buffers(reference), formats[1])
    if DEVICE == "cpu":
        with unchecked():
            blocks["src_blocks"] = tensor([[0, 10**6, 2], [2**40, -1, 4], [7, 3, -9]])
            assert_same(buffers(triton), buffers(reference), formats[1])


@in_triton
@pytest.mark.parametrize("to", PLAIN)
@pytest.mark.parametrize("format", FP8)
def test_every_code(format: str, to: str) -> None:
    """With scales that are the same, in a tensor of their own or absent, halved, and any."""
    for scales in ((None, None), (1.0, None), (0.37, 0.37), (0.5, 0.25), (0.25, 0.5), (0.37, 0.11), (3e38, 1e-38)):
        src = CacheLayout(256, 0, 1, format).allocate(1, DEVICE, scales[0])
        src.data.view(torch.uint8)[0, 0] = torch.arange(256, dtype=torch.uint8)
        got = []
        for provider in (triton, reference):
            dst = CacheLayout(256, 0, 1, to).allocate(1, DEVICE, scales[1])
            provider.convert_cache_(src, dst)
            got.append([dst.data])
        assert_same(*got, to)


@in_triton
def test_twins() -> None:
    """FNUZ to OCP at half the scale, and OCP to FNUZ at twice: bytes stay, but for those that the docstring lists."""
    for format, to, factor, changes in (
        ("fp8_e4m3fnuz", "fp8_e4m3fn", 0.5, {0x7F: 0x7E, 0xFF: 0xFE, 0x80: 0x7F}),
        ("fp8_e4m3fn", "fp8_e4m3fnuz", 2.0, {0x80: 0, 0x7F: 0x80, 0xFF: 0x80}),
    ):
        src = CacheLayout(256, 0, 1, format).allocate(1, DEVICE, 0.37)
        src.data.view(torch.uint8)[0, 0] = torch.arange(256, dtype=torch.uint8)
        dst = CacheLayout(256, 0, 1, to).allocate(1, DEVICE, 0.37 * factor)
        triton.convert_cache_(src, dst)
        assert dst.data.view(torch.uint8).flatten().tolist() == [changes.get(code, code) for code in range(256)]


# ---------------------------------------------------------------------------------------------------------- errors


def bad_calls() -> dict[str, tuple[str, dict[str, Any]]]:
    """Op and arguments of calls that raise: a few of each kind of check, and all that look at values."""
    cache, other = stored("fp8_e4m3fn", 1).cache, stored("bf16", 1).cache
    table, begins = tensor([[0, 1]]), tensor([0, 5])
    gather = {"cache": cache, "block_table": table, "cu_seq_lens": begins, "total": 5}
    convert = {"src": cache, "dst": other}
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "table's dtype": ("gather_cache", gather | {"block_table": table.float()}),
        "begins' length": ("gather_cache", gather | {"cu_seq_lens": tensor([0, 2, 5])}),
        "out's width": ("gather_cache", gather | {"total": None, "out": torch.zeros(5, 7, device=DEVICE)}),
        "runs": ("convert_cache_", convert | {"src_blocks": tensor([[0], [1]]), "dst_blocks": tensor([0])}),
        "tokens": ("convert_cache_", convert | {"src_blocks": tensor([0]), "dst_blocks": tensor([0, 1, 2])}),
    }
    if DEVICE == "cpu":
        calls |= {
            "falling": ("gather_cache", gather | {"cu_seq_lens": tensor([5, 0])}),
            "too many": ("gather_cache", gather | {"cu_seq_lens": tensor([0, 6])}),
            "no column": ("gather_cache", gather | {"seq_starts": tensor([5])}),
            "no block": ("gather_cache", gather | {"block_table": tensor([[0, -1]])}),
            "src block": ("convert_cache_", convert | {"src_blocks": tensor([99]), "dst_blocks": tensor([0])}),
            "dst block": ("convert_cache_", convert | {"src_blocks": tensor([0]), "dst_blocks": tensor([99])}),
        }
    return calls


@in_triton
@pytest.mark.parametrize("name", bad_calls())
def test_errors(name: str) -> None:
    """As the reference puts it."""
    op, arguments = bad_calls()[name]
    texts = []
    for provider in (triton, reference):
        with pytest.raises(RuntimeError) as error:
            getattr(provider, op)(**arguments)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"latentkv.{op}: ")

"""mla_decode against attention in fp64, at most twice as far off as PyTorch's in the activations' dtype is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import DEVICE, can_run, elsewhere, in_triton, passes_interpreted
from latentkv import CacheLayout, MLACache
from latentkv.cache.layouts import FORMATS
from latentkv.ops import checks
from latentkv.ops.schemas import NAMESPACE
from latentkv.providers import Provider, reference, triton
from torch import Tensor

PLAIN = [name for name, f in FORMATS.items() if not f.packed]
# The logarithm of an empty sum.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
each_reader = pytest.mark.parametrize(
    "reader", [pytest.param(triton, marks=in_triton, id="triton"), pytest.param(reference, id="reference")]
)


@elsewhere
def test_interpreted() -> None:
    pytest.importorskip("triton")
    passes_interpreted(__file__)


@dataclass
class Query:
    """A decode step: sequences whose blocks are strewn over a cache, in which all else is NaN."""

    format: str = "bf16"
    lengths: tuple[int, ...] = (37, 0, 5)
    heads: int = 3
    dims: tuple[int, int] = (32, 16)
    block_size: int = 4
    placement: str = "concat"
    dtype: torch.dtype = torch.bfloat16
    index: torch.dtype = torch.int64
    pages: bool = False
    as_bytes: bool = False
    columns: int = 0  # of the table besides those that are needed
    sm_scale: float = 0.21
    q: Tensor = field(init=False)
    cache: MLACache = field(init=False)
    table: Tensor = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(len(self.lengths) + self.heads)
        batch, width = len(self.lengths), sum(self.dims)
        layout = CacheLayout(*self.dims, self.block_size, self.format, self.placement)  # type: ignore[arg-type]
        needed = [-(-n // self.block_size) for n in self.lengths]
        blocks = sum(needed) + 2
        order = torch.randperm(blocks, generator=random)
        # Entries that no token needs are absurd.
        self.table = torch.full((batch, max(needed) + self.columns), 10**9).to(self.index).to(DEVICE)
        rows = torch.full((blocks * self.block_size, width), float("nan"))
        for row, n, length, end in zip(self.table, needed, self.lengths, torch.tensor(needed).cumsum(0), strict=True):
            own = order[end - n : end]
            row[:n] = own.to(self.index)
            slots = (own[:, None] * self.block_size + torch.arange(self.block_size)).flatten()[:length]
            rows[slots] = torch.randn((length, width), generator=random)
        f = FORMATS[self.format]
        scale = torch.tensor([0.17], device=DEVICE) if f.quantised else None
        values = (rows / 0.17 if f.quantised else rows).to(f.dtype).view(blocks, self.block_size, width).to(DEVICE)
        values = values.view(torch.uint8) if self.as_bytes or f.quantised else values
        parts = values.split(self.dims, -1) if self.placement == "split" else (values,)
        parts = tuple(part.contiguous() for part in parts)
        if self.pages:  # rows and blocks apart
            wide = [part.new_zeros((blocks, 1, self.block_size + 1, part.shape[-1] + 8)) for part in parts]
            views = tuple(w[:, :, : self.block_size, : part.shape[-1]] for w, part in zip(wide, parts, strict=True))
            for view, part in zip(views, parts, strict=True):
                view.copy_(part[:, None])
            parts = views
        if f.quantised and not self.as_bytes:
            parts = tuple(part.view(f.dtype) for part in parts)
        self.cache = MLACache.wrap(parts, layout, scale)
        self.q = torch.randn((batch, self.heads, width + 8), generator=random).to(self.dtype).to(DEVICE)[..., :width]
        self.seq_lens = torch.tensor(self.lengths, dtype=self.index, device=DEVICE)

    def run(self, reader: Provider) -> tuple[Tensor, Tensor]:
        return reader.mla_decode(self.q, self.cache, self.table, self.seq_lens, sm_scale=self.sm_scale)

    def rows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Each sequence's [n, L + R], that the reference gathers in a dtype; fp32 for fp64."""
        kind = torch.float32 if dtype == torch.float64 else dtype
        for i, n in enumerate(self.lengths):
            ends = torch.tensor([0, n], device=DEVICE)
            yield reference.gather_cache(self.cache, self.table[i : i + 1], ends, total=n, dtype=kind).to(dtype)

    def attention(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """PyTorch's, in a dtype."""
        batch, latent_dim = len(self.lengths), self.dims[0]
        out = torch.zeros((batch, self.heads, latent_dim), dtype=dtype, device=DEVICE)
        lse = torch.full((batch, self.heads), float("-inf"), dtype=dtype, device=DEVICE)
        for i, rows in enumerate(self.rows(dtype)):
            if len(rows):
                scores = self.q[i].to(dtype) @ rows.T * self.sm_scale
                lse[i], out[i] = scores.logsumexp(1), scores.softmax(1) @ rows[:, :latent_dim]
        return out, lse

    def check(self, reader: Provider) -> None:
        out, lse = self.run(reader)
        exact, exact_lse = self.attention(torch.float64)
        rounded, _ = self.attention(self.dtype)
        assert out.dtype == self.dtype and out.shape == exact.shape and lse.dtype == torch.float32
        error, allowed = ((x.double() - exact).abs() for x in (out, rounded))
        # The floor is half a unit in the last place of the largest number: what rounding out alone may cost.
        floor = exact.abs().max() * torch.finfo(self.dtype).eps / 2 if exact.numel() else 0
        assert error.max() <= max(2 * allowed.max(), floor), (error.max(), allowed.max())
        assert error.mean() <= 2 * allowed.mean() + floor / 64, (error.mean(), allowed.mean())
        there = torch.tensor(self.lengths, device=DEVICE) > 0
        assert lse[~there].isneginf().all()
        assert ((lse.double() - exact_lse).abs() <= self.lse_tolerance())[there].all()

    def lse_tolerance(self) -> Tensor:
        """[B, H]: scores are fp32 sums of exact products, but where values are rounded to the activations' dtype first.

        A tensor core adds 16 products at a time and drops what is below the last bit of the greatest number. A few more
        roundings are those of the exponentials, their sum and its logarithm.
        """
        f, shape = FORMATS[self.format], (len(self.lengths), self.heads)
        if not (f.quantised or f.dtype == self.dtype or self.dtype == torch.float32):
            return torch.tensor({torch.bfloat16: 3e-2, torch.float16: 4e-3}[self.dtype], device=DEVICE).expand(shape)
        magnitude = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
        for i, rows in enumerate(self.rows(torch.float64)):
            if len(rows):
                magnitude[i] = (self.q[i].double().abs() @ rows.abs().T * abs(self.sm_scale)).amax(1)
        return 2**-23 * ((sum(self.dims) // 16 + 8) * magnitude + 8)


@each_reader
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("format", PLAIN)
def test_formats(format: str, dtype: torch.dtype, reader: Provider) -> None:
    quantised = FORMATS[format].quantised
    Query(format, dtype=dtype, as_bytes=quantised and dtype == torch.bfloat16, lengths=(37, 0, 150)).check(reader)


@each_reader
@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_pages(block_size: int, placement: str, reader: Provider) -> None:
    for pages in (False, True):
        format = "fp8_e4m3fn" if pages else "bf16"
        Query(format, block_size=block_size, placement=placement, pages=pages, index=torch.int32).check(reader)


@each_reader
@pytest.mark.parametrize("dims", [(512, 64), (256, 64), (448, 64), (512, 0), (40, 6), (7, 2), (1, 0)], ids=str)
def test_dims(dims: tuple[int, int], reader: Provider) -> None:
    Query(dims=dims, lengths=(33, 70), heads=5).check(reader)


@each_reader
@pytest.mark.parametrize("heads", [1, 16, 20, 130])
def test_heads(heads: int, reader: Provider) -> None:
    Query(heads=heads, lengths=(40,)).check(reader)


@in_triton
@pytest.mark.parametrize("splits", [1, 2, 5, 33])
def test_shares(splits: int) -> None:
    """Of one tile or many, empty ones, and the last one not full; more of them than the merge takes at a time."""
    with mock.patch("latentkv.ops.triton.decode.split_count", return_value=splits):
        Query(lengths=(150, 0, 33), columns=3, heads=2).check(triton)


@in_triton
def test_split_count() -> None:
    """Enough shares to keep a GPU busy, never more than tiles of tokens."""
    from latentkv.ops.triton.decode import split_count

    assert split_count(1, 264, 1000) >= 240 and split_count(1, 264, 5) == 5
    assert split_count(128, 132, 1000) == 1 and split_count(256, 132, 100) <= 8 and split_count(5000, 132, 100) == 1


@each_reader
def test_wide_table(reader: Provider) -> None:
    """Absurd numbers beyond the blocks that are needed."""
    Query(columns=500, index=torch.int32).check(reader)


@each_reader
def test_empty(reader: Provider) -> None:
    """Sequences without tokens, of length 0 or less: out 0 and lse -inf. No sequences, no heads: nothing."""
    query = Query(lengths=(0, 9, 0), columns=1)
    query.seq_lens[2] = -4
    out, lse = query.run(reader)
    assert out[[0, 2]].eq(0).all() and lse[[0, 2]].isneginf().all() and lse[1].isfinite().all()
    for part in (query.q[:0], query.q[:, :0]):
        sizes = slice(0, len(part))
        out, lse = reader.mla_decode(part, query.cache, query.table[sizes], query.seq_lens[sizes], sm_scale=1.0)
        assert out.shape == (*part.shape[:2], 32) and lse.shape == part.shape[:2]


@each_reader
def test_missing_blocks(reader: Provider) -> None:
    """A token without a block is left out where no value is looked at: as if its score were -inf."""
    query = Query(lengths=(12, 14, 8), block_size=4)
    query.table[0, 1], query.table[1, 3], query.table[2] = -1, 10**6, 2**40
    query.seq_lens[1] = 1000  # beyond the table
    with mock.patch.object(checks, "checks_values", return_value=False):
        out, lse = query.run(reader)
    left = Query(lengths=(12, 14, 8), block_size=4)
    left.table[0, 1] = left.table[0, 2]
    left.seq_lens[0], left.seq_lens[1], left.seq_lens[2] = 8, 12, 0
    wanted, wanted_lse = left.run(reference)
    assert torch.allclose(out.float(), wanted.float(), rtol=1e-2, atol=1e-2)
    assert torch.allclose(lse, wanted_lse, rtol=0, atol=1e-5)
    assert out[2].eq(0).all() and lse[2].isneginf().all()


def bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    """What is wrong with the arguments of a call, and the start of the error."""
    query = Query()
    calls: dict[str, tuple[dict[str, Any], str]] = {
        "q's shape": ({"q": query.q[0]}, "q: expected shape [B, H, L + R=48], got"),
        "q's dtype": ({"q": query.q.double()}, "q: expected dtype bfloat16 or float16 or float32, got float64"),
        "table": ({"block_table": query.table[:2]}, "block_table: expected shape [B=3, max_blocks], got"),
        "lengths": ({"seq_lens": query.seq_lens.float()}, "seq_lens: expected dtype int64 or int32, got float32"),
        "packed": (
            {"cache": CacheLayout(512, 64, 4, "fp8_ds_mla").allocate(1, DEVICE), "q": query.q.new_zeros(3, 3, 576)},
            "format: expected one that is not packed, got fp8_ds_mla",
        ),
    }
    if DEVICE == "cpu":
        calls["columns"] = ({"block_table": query.table[:, :3]}, "block_table: expected blocks for token 12 of")
        calls["block"] = ({"block_table": query.table + 99}, "block_table: expected block numbers in 0 .. ")
    return calls


@each_reader
@pytest.mark.parametrize("name", bad_calls())
def test_errors(name: str, reader: Provider) -> None:
    query = Query()
    given, text = bad_calls()[name]
    arguments = {"q": query.q, "cache": query.cache, "block_table": query.table, "seq_lens": query.seq_lens}
    with pytest.raises(RuntimeError) as error:
        reader.mla_decode(**(arguments | given), sm_scale=1.0)
    assert str(error.value).startswith(f"latentkv.mla_decode: {text}")


@pytest.mark.skipif(can_run and DEVICE == "cpu", reason="without the interpreter")
@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn"])
def test_opcheck(format: str) -> None:
    query = Query(format, as_bytes=format != "bf16")  # opcheck multiplies, which torch cannot do with fp8
    arguments = (query.q.contiguous(), *query.cache.op_arguments, query.table, query.seq_lens, 32, 0.3)
    torch.library.opcheck(getattr(torch.ops, NAMESPACE).mla_decode.default, arguments)


@on_gpu
@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn"])
def test_graph_replays_on_new_inputs(format: str) -> None:
    query = Query(format, lengths=(700, 3, 0), heads=16, dims=(512, 64), block_size=64)
    query.run(triton)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = query.run(triton)
    query.q.copy_(query.q.flip(1))
    query.seq_lens.copy_(torch.tensor([300, 2, 0]))
    graph.replay()
    expected, expected_lse = query.run(triton)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@on_gpu
@pytest.mark.parametrize("heads", [16, 32, 128])
@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn"])
def test_sizes_of_models(format: str, heads: int) -> None:
    """The tiles that only a GPU takes, on more sequences and tokens than one round of its multiprocessors."""
    lengths = (4096, 1, 777, 0, 2048, 63, 64, 65)
    Query(format, lengths=lengths, heads=heads, dims=(512, 64), block_size=64, sm_scale=0.07).check(triton)

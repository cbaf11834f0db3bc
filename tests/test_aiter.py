"""AITER: the cache as pages of one row, and parity with AITER's own writers and its decode reader.

The parity tests run with AITER itself where an AMD GPU and AITER are, and everywhere with a stand-in, which has AITER's
signatures, refuses what AITER refuses and rounds the way its sources allow. A stand-in shows that a test can pass; what
AITER does, only AITER shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentkv import CacheLayout, MLACache, Platform, build_cos_sin_cache, layout_for
from latentkv.cache.backends import BACKENDS, aiter_problem
from latentkv.cache.layouts import FORMATS
from latentkv.providers import Provider
from latentkv.testing import assert_same_bytes
from torch import Tensor

# ------------------------------------------------------------------------------------------- pages of one row

SMALL = CacheLayout(24, 8, 4, "fp32")


@pytest.mark.parametrize("format", [f for f in FORMATS if not FORMATS[f].packed])
@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((3, 4, 32), (128, 32, 1), 0),
        ((3, 1, 4, 32), (128, 999, 32, 1), 0),
        ((3, 4, 40), (160, 40, 1), 0),  # rows wider than needed
        ((3, 4, 32), (160, 40, 1), 8),  # columns of wider rows
        ((1, 4, 32), (999, 32, 1), 16),  # of one block or of blocks of one row, any stride is even
        ((3, 1, 32), (48, 999, 1), 0),
        ((0, 4, 32), (128, 32, 1), 0),
    ],
)
def test_slot_s_is_page_s(
    device: str, provider: Provider, format: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    layout = CacheLayout(24, 8, shape[-2], format)
    buffer = torch.zeros(4096, dtype=torch.uint8, device=device).view(layout.dtype)
    cache = MLACache.wrap(buffer.as_strided(shape, strides, offset), layout)
    pages = cache.pages_of_one
    assert pages.dtype == layout.dtype and pages.shape == (cache.num_slots, 1, 1, 32)
    assert pages.data_ptr() == cache.data.data_ptr() or not cache.num_slots
    slots = torch.randperm(cache.num_slots).to(device)
    dtype = torch.float32 if FORMATS[format].quantised else layout.dtype
    rows = torch.randn(cache.num_slots, 32, device=device).to(dtype)
    provider.write_cache_(rows[:, :24], rows[:, 24:], slots, cache)
    written = torch.zeros_like(rows)
    written[slots] = rows
    assert_same_bytes(pages[:, 0, 0], written.to(layout.dtype))


@pytest.mark.parametrize("format", [f for f in FORMATS if FORMATS[f].quantised])
def test_pages_have_the_dtype_of_the_format(format: str) -> None:
    cache = MLACache.wrap(torch.zeros(3, 4, 32, dtype=torch.uint8), CacheLayout(24, 8, 4, format))
    assert cache.pages_of_one.dtype == FORMATS[format].dtype
    cache.data[1, 2, 5] = 1
    assert cache.pages_of_one.view(torch.uint8)[6, 0, 0, 5] == 1


def test_no_pages_of_a_split_cache() -> None:
    with pytest.raises(ValueError, match=r"^MLACache\.pages_of_one: placement: expected concat, got split$"):
        _ = CacheLayout(24, 8, 4, placement="split").allocate(3, "cpu").pages_of_one


@pytest.mark.parametrize("shape", [(3, 4, 32), (3, 1, 4, 32)])
def test_no_pages_of_padded_blocks(shape: tuple[int, ...]) -> None:
    strides = (144, 32, 1) if len(shape) == 3 else (144, 144, 32, 1)
    cache = MLACache.wrap(torch.zeros(1024).as_strided(shape, strides), SMALL)
    expected = (
        r"^MLACache\.pages_of_one: data: expected blocks without padding, 128 elements from one to the next, got 144$"
    )
    with pytest.raises(ValueError, match=expected):
        _ = cache.pages_of_one


# ------------------------------------------------------------------------------------- AITER, or its stand-in

L, R = 512, 64


class StandIn:
    """AITER's functions in PyTorch, as its sources of August 2026 describe them."""

    def __init__(self, fp8: torch.dtype) -> None:
        self.dtypes = SimpleNamespace(fp8=fp8)
        self.mla = SimpleNamespace(mla_decode_fwd=self.mla_decode_fwd)

    def _encode(self, x: Tensor, dtype: torch.dtype, scale: Tensor, saturate: bool = True) -> Tensor:
        if dtype != self.dtypes.fp8:
            return x.to(dtype)
        x = x.float() * (1 / scale)
        limit = torch.finfo(dtype).max
        return (x.clamp(-limit, limit) if saturate else x).to(dtype)

    def _store(self, latent: Tensor, rope: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        assert kv_cache.dtype in (torch.bfloat16, self.dtypes.fp8) and slot_mapping.dtype == torch.int64
        kept = slot_mapping >= 0
        rows = torch.cat([latent.view(torch.uint8), rope.view(torch.uint8)], 1)[: len(slot_mapping)]
        kv_cache.view(torch.uint8).flatten(0, 1)[slot_mapping[kept]] = rows[kept]

    def concat_and_cache_mla(
        self, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, kv_cache_dtype: str, scale: Tensor
    ) -> None:
        assert kv_cache_dtype == ("fp8" if kv_cache.dtype == self.dtypes.fp8 else "auto")
        latent, rope = (self._encode(x, kv_cache.dtype, scale) for x in (kv_c, k_pe))
        self._store(latent, rope, kv_cache, slot_mapping)

    def fused_qk_rope_concat_and_cache_mla(
        self, q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, q_out: Tensor,
        slot_mapping: Tensor, k_scale: Tensor, q_scale: Tensor, positions: Tensor, cos_cache: Tensor,
        sin_cache: Tensor, is_neox: bool, is_nope_first: bool, compute_all_q_rope: bool = False,
    ) -> None:  # fmt: skip
        assert is_nope_first and not compute_all_q_rope and positions.dtype == torch.int64
        for table in (cos_cache, sin_cache):
            assert table.is_contiguous() and table.dtype == kv_c.dtype
        cos, sin = (table[positions].double() for table in (cos_cache, sin_cache))

        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            pairs = x.double().unflatten(-1, (2, -1) if is_neox else (-1, 2))
            a, b = pairs.unbind(-2 if is_neox else -1)
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -2 if is_neox else -1).flatten(-2).float()

        rope = rotate(k_pe, cos, sin)
        if kv_cache.dtype != self.dtypes.fp8:
            rope = (rope.view(torch.int32) & ~0xFFFF).view(torch.float32)  # bf16 by truncation
        rope = self._encode(rope, kv_cache.dtype, k_scale, saturate=False)
        self._store(self._encode(kv_c, kv_cache.dtype, k_scale), rope, kv_cache, slot_mapping)
        rows = (slot_mapping >= 0).nonzero().flatten()
        q = torch.cat([q_nope.float(), rotate(q_pe, cos[:, None], sin[:, None])], -1)
        q_out[rows] = self._encode(q, q_out.dtype, q_scale)[rows]

    def mla_decode_fwd(
        self, q: Tensor, kv_buffer: Tensor, o: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor,
        kv_last_page_lens: Tensor, max_seqlen_q: int, page_size: int = 1, nhead_kv: int = 1,
        sm_scale: float | None = None, *, q_scale: Tensor | None = None, kv_scale: Tensor | None = None,
    ) -> None:  # fmt: skip
        assert kv_buffer.shape[1:] == (page_size, nhead_kv, q.shape[-1]) == (1, 1, L + R)
        assert q.dtype == kv_buffer.dtype and q.dtype in (torch.bfloat16, self.dtypes.fp8) and q.is_contiguous()
        assert (q.dtype == self.dtypes.fp8) == (q_scale is not None) == (kv_scale is not None)
        assert max_seqlen_q == 1 and qo_indptr.tolist() == list(range(len(q) + 1))
        assert kv_last_page_lens.tolist() == [1] * len(q)
        assert {t.dtype for t in (qo_indptr, kv_indptr, kv_indices, kv_last_page_lens)} == {torch.int32}
        for i in range(len(q)):
            rows = kv_buffer[kv_indices[kv_indptr[i] : kv_indptr[i + 1]].long(), 0, 0].float()
            rows = rows if kv_scale is None else rows * kv_scale
            query = q[i].float() if q_scale is None else q[i].float() * q_scale
            weights = torch.softmax(query @ rows.T * sm_scale, -1)
            o[i] = weights.to(o.dtype) @ rows[:, :L].to(o.dtype)


@dataclass(frozen=True)
class Peer:
    """AITER or a stand-in. Each of its functions is called in one place, here."""

    aiter: Any
    platform: Platform
    device: str

    def cache(self, format: str, block_size: int, scale: float) -> MLACache:
        """Room for 512 rows; ``"fp8"`` is the e4m3 kind of the peer's architecture."""
        format = self.platform.fp8_format if format == "fp8" else format
        layout = layout_for("ROCM_AITER_MLA", format=format, block_size=block_size)
        return layout.allocate(512 // block_size, self.device, scale)

    def concat_and_cache_mla(self, kv_c: Tensor, k_pe: Tensor, slots: Tensor, cache: MLACache) -> None:
        word = "fp8" if FORMATS[cache.layout.format].quantised else "auto"
        self.aiter.concat_and_cache_mla(kv_c, k_pe, cache.data, slots, word, cache.scale)

    def fused_qk_rope_concat_and_cache_mla(
        self, positions: Tensor, q: Tensor, k_pe: Tensor, kv_c: Tensor, table: Tensor, slots: Tensor, cache: MLACache,
        is_neox: bool,
    ) -> Tensor:  # fmt: skip
        """The query [N, H, L + R] that it returns, of q's dtype."""
        q_nope, q_pe = q.split([L, R], -1)
        cos, sin = (half.contiguous() for half in table.chunk(2, -1))
        q_out, q_scale = torch.zeros_like(q), torch.ones(1, device=self.device)
        self.aiter.fused_qk_rope_concat_and_cache_mla(
            q_nope, q_pe, kv_c, k_pe, cache.data, q_out, slots, cache.scale, q_scale, positions, cos, sin, is_neox, True
        )
        return q_out

    def mla_decode_fwd(
        self, q: Tensor, cache: MLACache, slots: list[Tensor], sm_scale: float, q_scale: Tensor | None
    ) -> Tensor:
        """The attention output [B, H, L] in bf16 of one query token for each sequence, whose rows are in ``slots``."""
        out = torch.full((*q.shape[:2], L), torch.nan, dtype=torch.bfloat16, device=self.device)
        starts = torch.tensor([0, *(len(s) for s in slots)]).cumsum(0).int().to(self.device)
        pages, ones = torch.cat(slots).int(), torch.ones(len(q), dtype=torch.int32, device=self.device)
        queries = torch.arange(len(q) + 1, dtype=torch.int32, device=self.device)
        kv_scale = None if q_scale is None else cache.scale
        self.aiter.mla.mla_decode_fwd(
            q, cache.pages_of_one, out, queries, starts, pages, ones, 1,
            sm_scale=sm_scale, q_scale=q_scale, kv_scale=kv_scale,
        )  # fmt: skip
        return out


@pytest.fixture(params=["gfx942 stand-in", "gfx950 stand-in", "AITER"])
def peer(request: pytest.FixtureRequest) -> Peer:
    if request.param != "AITER":
        arch = request.param.split()[0]
        fp8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}[arch]
        return Peer(StandIn(fp8), Platform("rocm", arch), "cpu")
    platform, backend = Platform.detect(), BACKENDS["ROCM_AITER_MLA"]
    if not backend.runs_on(platform):
        pytest.skip(f"needs an AMD GPU, {' or '.join(backend.archs)}; this machine is {platform}")
    if problem := aiter_problem():
        pytest.skip(problem)
    import aiter
    import aiter.mla

    return Peer(aiter, platform, "cuda")


# ------------------------------------------------------------------------------------------------------ parity


class Tokens:
    """48 tokens, as slices of wider projections; the slots of some are masked, the last two are padding."""

    def __init__(self, device: str) -> None:
        random = torch.Generator().manual_seed(0)
        n, heads = 48, 16
        kv = torch.randn(n, L + R, generator=random)
        # of all magnitudes, so that fp8 saturates; not the rope part, which AITER's fused op does not saturate
        kv[:, :L] *= 2.0 ** torch.randint(-12, 12, (n, L), generator=random)
        self.kv_c, self.k_pe = kv.bfloat16().to(device).split([L, R], -1)
        self.q = torch.randn(n, heads, L + R, generator=random).bfloat16().to(device)
        slots = torch.randperm(512, generator=random)[: n - 2]
        slots[::7] = -1
        self.slots = slots.to(device)
        self.positions = torch.randint(0, 4096, (n,), generator=random).to(device)
        self.written = (self.slots >= 0).nonzero().flatten()


def fused(
    peer: Peer, provider: Provider, format: str, block_size: int, table: Tensor, is_neox: bool
) -> tuple[MLACache, MLACache, Tensor, Tensor]:
    """Our cache and AITER's, our rotated q and AITER's [n, H, L + R] of the rows that were written."""
    tokens = Tokens(peer.device)
    ours, theirs = (peer.cache(format, block_size, scale=0.5) for _ in range(2))
    q, k_pe = tokens.q.clone(), tokens.k_pe.clone()
    provider.rope_write_cache_(
        tokens.positions, q[..., L:], k_pe, tokens.kv_c, table, tokens.slots, ours, is_neox=is_neox
    )
    q_out = peer.fused_qk_rope_concat_and_cache_mla(
        tokens.positions, tokens.q, tokens.k_pe, tokens.kv_c, table, tokens.slots, theirs, is_neox
    )
    return ours, theirs, q[tokens.written], q_out[tokens.written]


def assert_within_a_step(actual: Tensor, expected: Tensor) -> None:
    """Elements differ by one step of their dtype at most; of bf16 also by an fp32 rounding error of the terms."""
    bf16 = actual.dtype == torch.bfloat16
    rtol, atol = (2.0**-7, 2.0**-20 * float(expected.float().abs().max())) if bf16 else (2.0**-3, 2.0**-9)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=rtol, atol=atol)


both_formats = pytest.mark.parametrize("format", ["bf16", "fp8"])
both_blocks = pytest.mark.parametrize("block_size", [1, 64])  # AITER has a kernel for each
both_pairs = pytest.mark.parametrize("is_neox", [False, True], ids=["gptj", "neox"])


def test_fp8_kind(peer: Peer) -> None:
    assert peer.cache("fp8", 64, scale=1.0).pages_of_one.dtype == peer.aiter.dtypes.fp8


@both_formats
@both_blocks
def test_same_bytes_as_concat_and_cache_mla(peer: Peer, provider: Provider, format: str, block_size: int) -> None:
    """The scale is a power of two: AITER multiplies by its reciprocal."""
    tokens = Tokens(peer.device)
    ours, theirs = (peer.cache(format, block_size, scale=0.5) for _ in range(2))
    provider.write_cache_(tokens.kv_c, tokens.k_pe, tokens.slots, ours)
    peer.concat_and_cache_mla(tokens.kv_c, tokens.k_pe, tokens.slots, theirs)
    assert_same_bytes(ours.data, theirs.data)


@both_blocks
def test_any_scale_is_within_a_step(peer: Peer, provider: Provider, block_size: int) -> None:
    tokens = Tokens(peer.device)
    ours, theirs = (peer.cache("fp8", block_size, scale=0.37) for _ in range(2))
    provider.write_cache_(tokens.kv_c, tokens.k_pe, tokens.slots, ours)
    peer.concat_and_cache_mla(tokens.kv_c, tokens.k_pe, tokens.slots, theirs)
    assert_within_a_step(theirs.data, ours.data)


@both_formats
@both_blocks
@both_pairs
def test_same_bytes_as_the_fused_op_by_an_angle_of_zero(
    peer: Peer, provider: Provider, format: str, block_size: int, is_neox: bool
) -> None:
    table = torch.cat([torch.ones(4096, R // 2), torch.zeros(4096, R // 2)], -1).bfloat16().to(peer.device)
    ours, theirs, q, q_out = fused(peer, provider, format, block_size, table, is_neox)
    assert_same_bytes(ours.data, theirs.data)
    assert_same_bytes(q, q_out)


@both_formats
@both_blocks
@both_pairs
def test_within_a_step_of_the_fused_op(
    peer: Peer, provider: Provider, format: str, block_size: int, is_neox: bool
) -> None:
    """AITER may fuse a multiply and an add, and truncates to bf16 on gfx942; on the way to fp8 it skips bf16."""
    table = build_cos_sin_cache(
        rope_theta=10000.0, qk_rope_head_dim=R, max_position_embeddings=4096, dtype=torch.bfloat16, device=peer.device
    )
    ours, theirs, q, q_out = fused(peer, provider, format, block_size, table, is_neox)
    assert_same_bytes(ours.latent, theirs.latent)
    assert_within_a_step(theirs.rope, ours.rope)
    assert_same_bytes(q[..., :L], q_out[..., :L])
    assert_within_a_step(q_out[..., L:], q[..., L:])


def attention(q: Tensor, rows: Tensor, sm_scale: float) -> Tensor:
    """In fp64: q [H, L + R] over rows [S, L + R] of which the first L are the values; [H, L]."""
    return torch.softmax(q @ rows.T * sm_scale, -1) @ rows[:, :L]


@both_formats
@both_blocks
@pytest.mark.parametrize("heads", [16, 128])
def test_decode(peer: Peer, provider: Provider, format: str, block_size: int, heads: int) -> None:
    """AITER's reader finds in our cache what we wrote, and there the same as in a cache that AITER wrote."""
    random = torch.Generator().manual_seed(1)
    lengths, sm_scale, scale = [1, 63, 64, 65, 130], 192**-0.5, 2.0**-5
    rows = torch.randn(sum(lengths), L + R, generator=random).bfloat16().to(peer.device)
    q = torch.randn(len(lengths), heads, L + R, generator=random).bfloat16().to(peer.device)
    # the blocks of a sequence lie anywhere, and its rows in their order within the blocks
    table = iter(torch.randperm(512 // block_size, generator=random).tolist())
    slots = []
    for length in lengths:
        blocks = torch.tensor([next(table) for _ in range(-(-length // block_size))])
        slots.append((blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:length].to(peer.device))

    ours, theirs = (peer.cache(format, block_size, scale) for _ in range(2))
    kv_c, k_pe = rows.split([L, R], -1)
    provider.write_cache_(kv_c, k_pe, torch.cat(slots), ours)
    peer.concat_and_cache_mla(kv_c, k_pe, torch.cat(slots), theirs)
    assert_same_bytes(ours.data, theirs.data)

    q_scale = None
    if format == "fp8":
        q_scale = torch.full((1,), scale, device=peer.device)
        q = (q.float() / q_scale).to(ours.layout.dtype)
    out = peer.mla_decode_fwd(q, ours, slots, sm_scale, q_scale)
    assert_same_bytes(out, peer.mla_decode_fwd(q, theirs, slots, sm_scale, q_scale))

    unit = scale if format == "fp8" else 1.0
    stored = (ours.data.cpu().double() * unit).flatten(0, 1)
    queries = q.cpu().double() * unit
    want = torch.stack([attention(queries[i], stored[s.cpu()], sm_scale) for i, s in enumerate(slots)])
    got = out.cpu().double()
    distance = 1 - 2 * (got * want).sum() / (got * got + want * want).sum()
    assert distance < (3e-2 if format == "fp8" else 1e-5)  # the bounds of AITER's own tests

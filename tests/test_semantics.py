"""The contract's meaning, sentence by sentence, against an oracle of its own; memory is poisoned everywhere."""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import amd
import latentkv
import pytest
import torch
from conftest import AMD, Python, on_cpu
from latentkv import CacheLayout, MLACache, providers
from latentkv.cache.layouts import FORMATS
from latentkv.providers import Provider
from latentkv.testing import POISON, Problem, assert_same_bytes, poisoned
from latentkv.testing.matrix import ACTIVATIONS, MAX_POSITION
from oracle import (
    QUANTISED,
    all_poison,
    becomes,
    fp8,
    grid,
    make,
    need,
    outside,
    plain,
    refuses,
    rounded,
    spread,
    stored,
    turn,
    virtual,
)
from torch import Tensor

FAR_INDICES = [2**31, 2**31 + 5, 2**32, 2**32 + 5, 3 * 2**32 + 1, 2**62, 2**63 - 1]
NEGATIVES = [-1, -2, -(2**31), -(2**32) + 5, -(2**33), -(2**63), -(2**63) + 5]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
emulated = pytest.mark.skipif(not AMD, reason=f"no emulated AMD devices: {amd.problem()}")


@pytest.fixture(params=["contiguous", "unaligned"])
def strides(request: pytest.FixtureRequest) -> str:
    """16-byte access, and element by element."""
    return request.param


# ------------------------------------------------------------------------------------------- what an op means


@pytest.mark.parametrize("format", ["bf16", *QUANTISED])
@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("rope", ["gptj", "neox"])
def test_all_rows(device: str, provider: Provider, strides: str, rope: str, placement: str, format: str) -> None:
    becomes(make(device, format=format, placement=placement, rope=rope, strides=strides), provider)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_all_activations_and_tables(device: str, provider: Provider, strides: str, activation: str) -> None:
    for table in ACTIVATIONS:
        p = make(device, format=activation, activation=activation, table=table, strides=strides)
        becomes(p, provider)


def test_write_cache_does_not_rotate(device: str, provider: Provider, strides: str) -> None:
    becomes(make(device, op="write_cache_", strides=strides), provider, rotated=[])


@pytest.mark.parametrize("op", ["rope_write_cache_", "write_cache_"])
def test_rows_from_T_on_are_padding(device: str, provider: Provider, strides: str, op: str) -> None:
    """Neither read, so that anything may stand there, nor written."""
    p = make(device, op=op, strides=strides)
    p.slots = p.slots[:4]
    assert p.positions is not None
    p.positions[4], p.positions[5] = -7, 2**40
    p.kv_c[4:] = math.nan
    becomes(p, provider, range(4) if op == "rope_write_cache_" else [], range(4))


@pytest.mark.parametrize("slot", NEGATIVES)
def test_negative_slot_masks_the_row(device: str, provider: Provider, strides: str, slot: int) -> None:
    """By default its q and k_pe stay as they were, and its position is of no interest."""
    p = make(device, strides=strides)
    p.slots[1] = p.slots[4] = slot
    p.positions[4] = MAX_POSITION + 3  # type: ignore[index]
    becomes(p, provider, [0, 2, 3, 5], [0, 2, 3, 5])


@pytest.mark.parametrize("slot", NEGATIVES)
def test_rope_masked_rotates_it_all_the_same(device: str, provider: Provider, strides: str, slot: int) -> None:
    p = make(device, strides=strides, rows="rotate-masked")
    p.slots[:] = torch.arange(6)
    p.slots[1] = p.slots[4] = slot
    becomes(p, provider, range(6), [0, 2, 3, 5])


def test_write_cache_leaves_out_masked_rows(device: str, provider: Provider, strides: str) -> None:
    p = make(device, op="write_cache_", strides=strides)
    p.slots[1] = p.slots[4] = -1
    becomes(p, provider, [], [0, 2, 3, 5])


def test_all_rows_masked(device: str, provider: Provider, strides: str) -> None:
    p = make(device, strides=strides)
    p.slots[:] = -1
    becomes(p, provider, [], [])


@pytest.mark.parametrize("op", ["rope_write_cache_", "write_cache_"])
@pytest.mark.parametrize("beyond", [0, 1, *FAR_INDICES])
def test_slot_beyond_the_cache(device: str, provider: Provider, strides: str, op: str, beyond: int) -> None:
    """2^32 + 5 is not slot 5, either."""
    p = make(device, op=op, strides=strides)
    capacity = p.cache.num_slots
    p.slots[2] = slot = beyond + capacity if beyond < 2 else beyond
    outside(p, provider, "slot_mapping", f"slots below the capacity of {capacity}", slot, row=2)


@pytest.mark.parametrize("beyond", [0, 1, 2**31 - 1])
def test_int32_slot_beyond_the_cache(device: str, provider: Provider, beyond: int) -> None:
    p = make(device, index=torch.int32)
    capacity = p.cache.num_slots
    p.slots[5] = slot = beyond + capacity if beyond < 2 else beyond
    outside(p, provider, "slot_mapping", f"slots below the capacity of {capacity}", slot, row=5)


@pytest.mark.parametrize("position", [MAX_POSITION, MAX_POSITION + 1, *FAR_INDICES, *NEGATIVES])
def test_position_outside_the_table(device: str, provider: Provider, strides: str, position: int) -> None:
    """The row is skipped as a whole, its cache row included."""
    p = make(device, strides=strides)
    p.positions[3] = position  # type: ignore[index]
    outside(p, provider, "positions", f"values in 0 .. {MAX_POSITION - 1}", position, row=3)


@pytest.mark.parametrize("position", [MAX_POSITION, 2**32 + 5, -1])
def test_position_outside_on_a_masked_row_that_rotates(device: str, provider: Provider, position: int) -> None:
    p = make(device, rows="rotate-masked")
    p.slots[:] = torch.tensor([0, 1, 2, -1, 4, 5])
    p.positions[3] = position  # type: ignore[index]
    if on_cpu(device, provider):
        refuses(p, provider, "positions", f"values in 0 .. {MAX_POSITION - 1}", f"{position} at row 3")
    else:
        becomes(p, provider, [0, 1, 2, 4, 5], [0, 1, 2, 4, 5])


@pytest.mark.parametrize("position", [MAX_POSITION, *FAR_INDICES, *NEGATIVES])
def test_position_outside_in_rope(device: str, provider: Provider, strides: str, position: int) -> None:
    p = make(device, op="rope_", strides=strides)
    p.positions[0] = position  # type: ignore[index]
    if on_cpu(device, provider):
        refuses(p, provider, "positions", f"values in 0 .. {MAX_POSITION - 1}", f"{position} at row 0")
    else:
        becomes(p, provider, range(1, 6), [])


def test_last_slot_and_last_position_are_inside(device: str, provider: Provider, strides: str) -> None:
    p = make(device, strides=strides)
    p.slots[:] = torch.arange(6)
    p.slots[1] = p.cache.num_slots - 1
    p.positions[1] = MAX_POSITION - 1  # type: ignore[index]
    p.positions[2] = 0  # type: ignore[index]
    becomes(p, provider)


def test_without_rotation(device: str, provider: Provider, strides: str) -> None:
    """positions=None, cos_sin_cache=None: models that keep R but do not rotate."""
    becomes(make(device, rope="none", strides=strides), provider, rotated=[])
    p = make(device, rope="none", strides=strides, rows="rotate-masked")
    p.slots[0] = -1
    becomes(p, provider, rotated=[], written=[i for i in range(6) if p.slots[i] >= 0])


@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("op", ["rope_write_cache_", "write_cache_"])
def test_without_a_rope_part(device: str, provider: Provider, strides: str, op: str, placement: str) -> None:
    becomes(make(device, R=0, op=op, placement=placement, strides=strides), provider, rotated=[])


def test_without_a_rope_part_but_with_a_table(device: str, provider: Provider) -> None:
    """Nothing is rotated, so no position is outside."""
    p = make(device, R=0)
    p.positions = torch.full((6,), 77, device=device)
    p.table = torch.empty(5, 0, device=device)
    becomes(p, provider, rotated=[])


def test_rope_of_no_elements_has_no_position_outside(device: str, provider: Provider) -> None:
    p = make(device, R=0)
    positions, table = torch.full((6,), 77, device=device), torch.empty(5, 0, device=device)
    provider.rope_(positions, p.q_pe, p.k_pe, table, is_neox=False)


def test_one_key_and_one_position_for_all_heads(device: str, provider: Provider) -> None:
    for heads in (1, 2, 16, 128, 130):
        becomes(make(device, heads=heads), provider)


# -------------------------------------------------------------------------------------------- empty batches


@pytest.mark.parametrize("op", ["rope_write_cache_", "write_cache_", "rope_"])
def test_no_tokens(device: str, provider: Provider, op: str) -> None:
    becomes(make(device, op=op, tokens=0), provider, [], [])


@pytest.mark.parametrize("op", ["rope_write_cache_", "write_cache_"])
def test_no_slots(device: str, provider: Provider, op: str) -> None:
    p = make(device, op=op)
    p.slots = p.slots[:0]
    becomes(p, provider, [], [])


@pytest.mark.parametrize("op", ["rope_write_cache_", "write_cache_"])
@pytest.mark.parametrize("placement", ["concat", "split"])
def test_a_cache_without_blocks(device: str, provider: Provider, op: str, placement: str) -> None:
    p = make(device, op=op, placement=placement)
    p.cache = p.case.layout.allocate(0, device)
    p.slots[:] = -1
    becomes(p, provider, [], [])
    p.slots[2] = 0
    if on_cpu(device, provider):
        refuses(p, provider, "slot_mapping", "slots below the capacity of 0", "0 at row 2")
    else:
        becomes(p, provider, [], [])
    p.slots = p.slots[:0]
    becomes(p, provider, [], [])


@pytest.mark.parametrize("op", ["rope_write_cache_", "rope_"])
def test_no_heads(device: str, provider: Provider, op: str) -> None:
    becomes(make(device, op=op, heads=0), provider, written=range(6) if op == "rope_write_cache_" else [])


def test_rope_with_nothing_to_rotate(device: str, provider: Provider) -> None:
    """No heads at all, or heads of no elements: a no-op."""
    p = make(device, op="rope_", heads=0)
    provider.rope_(p.positions, p.q_pe, None, p.table, is_neox=False)
    p = make(device, op="rope_", R=0)
    positions, table = torch.zeros(6, dtype=torch.int64, device=device), torch.empty(1, 0, device=device)
    provider.rope_(positions, p.q_pe, p.k_pe, table, is_neox=False)
    provider.rope_(positions, p.q_pe, None, table, is_neox=True)
    if device == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ the memory


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 16, 64, 100])
def test_slot_is_block_times_size_plus_entry(device: str, provider: Provider, block_size: int) -> None:
    p = make(device, block_size=block_size)
    capacity = p.cache.num_slots
    slots = sorted({0, 1, block_size - 1, block_size, capacity // 2, capacity - 1})
    p.slots[:] = torch.tensor(slots + [-1] * (6 - len(slots)))
    becomes(p, provider, range(len(slots)), range(len(slots)))


def test_int32_and_int64_mean_the_same(device: str, provider: Provider, strides: str) -> None:
    for positions in (torch.int32, torch.int64):
        for slots in (torch.int32, torch.int64):
            p = make(device, strides=strides)
            assert p.positions is not None
            p.positions, p.slots = p.positions.to(positions), p.slots.to(slots)
            becomes(p, provider)


def test_indices_may_be_slices(device: str, provider: Provider) -> None:
    """Engines pass the first T of a persistent buffer, from any offset."""
    p = make(device)
    assert p.positions is not None
    for dtype in (torch.int32, torch.int64):
        absurd = torch.full((20,), 10**6, dtype=dtype, device=device)
        positions, slots = absurd.clone(), absurd.clone()
        positions[3:9], slots[7:13] = p.positions.to(dtype), p.slots.to(dtype)
        p.positions, p.slots = positions[3:9], slots[7:13]
        becomes(p, provider)


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn"])
@pytest.mark.parametrize("placement", ["concat", "split"])
def test_four_dimensions_and_padded_blocks(
    device: str, provider: Provider, strides: str, placement: str, format: str
) -> None:
    """[B, 1, bs, C], blocks with a gap between them, at a storage offset."""
    becomes(make(device, placement=placement, format=format, pages=True, strides=strides), provider)


@pytest.mark.parametrize("format", QUANTISED)
def test_uint8_holds_any_fp8_kind(device: str, provider: Provider, strides: str, format: str) -> None:
    p = make(device, format=format, as_bytes=True, strides=strides)
    assert p.cache.data.dtype == torch.uint8
    becomes(p, provider)


def wrapped(p: Problem, buffer: Tensor, *tensors: Tensor) -> Problem:
    """The problem with other cache memory."""
    p.cache = MLACache.wrap(tensors, p.case.layout, p.cache.scale)
    p.buffers["cache0"] = buffer
    return p


@pytest.mark.parametrize("width", [65, 80, 96])
def test_rows_wider_than_needed(device: str, provider: Provider, width: int) -> None:
    """Columns from L + R on are not touched."""
    p = make(device)
    buffer = poisoned(5 * 4 * width * 2, device)
    becomes(wrapped(p, buffer, buffer.view(torch.bfloat16).view(5, 4, width)), provider)
    assert (buffer.view(20, width * 2)[:, 128:] == POISON).all()


@pytest.mark.parametrize("format", ["bf16", "fp8_e5m2"])
def test_split_pair_as_views_of_one_concat_buffer(device: str, provider: Provider, format: str) -> None:
    """As FlashInfer takes it: ckv and kpe are columns of the same rows. The bytes are those of concat."""
    p, concat = make(device, placement="split", format=format), make(device, format=format)
    dtype = p.case.layout.dtype
    buffer = poisoned(concat.cache.num_slots * 64 * dtype.itemsize, device)
    rows = buffer.view(dtype).view(-1, 4, 64)
    becomes(wrapped(p, buffer, rows[..., :32], rows[..., 32:]), provider)
    concat.run(provider)
    assert_same_bytes(plain(rows), plain(concat.cache.data))


@pytest.mark.parametrize("order", [1, -1])
def test_split_pair_interleaved_by_entry_with_gaps(device: str, provider: Provider, order: int) -> None:
    p = make(device, placement="split")
    buffer = poisoned(5 * 4 * 80 * 2, device)
    rows = buffer.view(torch.bfloat16).view(5, 4, 80)
    latent, rope = (rows[..., 3:35], rows[..., 40:72]) if order > 0 else (rows[..., 40:72], rows[..., 3:35])
    becomes(wrapped(p, buffer, latent, rope), provider)


@pytest.mark.parametrize("order", [1, -1])
def test_split_pair_interleaved_by_block(device: str, provider: Provider, order: int) -> None:
    """Each block is its latent vectors, then its rope keys (or the other way round)."""
    p = make(device, placement="split")
    buffer = poisoned(5 * 4 * 64 * 2, device)
    blocks = buffer.view(torch.bfloat16).view(5, 2, 4, 32)
    latent, rope = (blocks[:, 0], blocks[:, 1]) if order > 0 else (blocks[:, 1], blocks[:, 0])
    becomes(wrapped(p, buffer, latent, rope), provider)


def test_split_pair_one_after_the_other(device: str, provider: Provider) -> None:
    p = make(device, placement="split", L=16, R=32)
    buffer = poisoned(5 * 4 * 48 * 2, device)
    typed = buffer.view(torch.bfloat16)
    becomes(wrapped(p, buffer, typed[: 5 * 64].view(5, 4, 16), typed[5 * 64 :].view(5, 4, 32)), provider)
    p = make(device, placement="split", L=16, R=32)
    buffer = poisoned(5 * 4 * 48 * 2, device)
    typed = buffer.view(torch.bfloat16)
    becomes(wrapped(p, buffer, typed[5 * 128 :].view(5, 4, 16), typed[: 5 * 128].view(5, 4, 32)), provider)


def test_blocks_may_lie_in_any_order(device: str, provider: Provider) -> None:
    """Entries outside, blocks inside: [bs, B, C] transposed."""
    p = make(device)
    buffer = poisoned(5 * 4 * 64 * 2, device)
    becomes(wrapped(p, buffer, buffer.view(torch.bfloat16).view(4, 5, 64).transpose(0, 1)), provider)


@pytest.mark.parametrize("nope", [128, 64, 5])
def test_q_pe_is_the_end_of_each_head(device: str, provider: Provider, nope: int) -> None:
    """And k_pe and kv_c are slices of one projection: the other columns stay."""
    p = make(device)
    q = poisoned(6 * 3 * (nope + 32) * 2, device).view(torch.bfloat16).view(6, 3, nope + 32)
    projection = poisoned(6 * (7 + 32 + 32) * 2, device).view(torch.bfloat16).view(6, 71)
    for name, view in (("q_pe", q[..., nope:]), ("kv_c", projection[:, 7:39]), ("k_pe", projection[:, 39:])):
        view.copy_(getattr(p, name))
        setattr(p, name, view)
    p.buffers |= {"q_pe": q, "k_pe": projection, "kv_c": projection}
    becomes(p, provider)


def test_heads_before_tokens(device: str, provider: Provider) -> None:
    """q as [H, N, R], transposed."""
    becomes(make(device, strides="transposed"), provider)


# --------------------------------------------------------------------------------------------------- rotation


def test_pairs_by_hand(device: str, provider: Provider) -> None:
    """A quarter turn of the first pair, none of the second."""
    table = torch.tensor([[0.0, 1.0, 1.0, 0.0]], device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    for neox, want in ((True, [-3.0, 2.0, 1.0, 4.0]), (False, [-2.0, 1.0, 3.0, 4.0])):
        q, k = torch.tensor([[[1.0, 2, 3, 4]]], device=device), torch.tensor([[1.0, 2, 3, 4]], device=device)
        provider.rope_(position, q, k, table, is_neox=neox)
        assert q.flatten().tolist() == want and k.flatten().tolist() == want
        provider.rope_(position, q, k, table, is_neox=neox, inverse=True)
        assert q.flatten().tolist() == [1, 2, 3, 4] and k.flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_each_step_is_rounded(device: str, provider: Provider, activation: str, inverse: bool, neox: bool) -> None:
    """No fused multiply-add: products and sums are fp32, and only the result is the activation's dtype."""
    random = torch.Generator().manual_seed(1)
    q = torch.randn((64, 2, 64), generator=random).to(ACTIVATIONS[activation])
    angle = torch.rand((64, 32), generator=random) * 7
    table = torch.cat([angle.cos(), angle.sin()], 1)
    got = q.clone().to(device)
    provider.rope_(torch.arange(64, device=device), got, None, table.to(device), is_neox=neox, inverse=inverse)
    want = torch.stack([torch.stack([turn(h, table[i], neox, inverse) for h in q[i]]) for i in range(64)])
    assert_same_bytes(got.cpu(), want)
    if activation == "fp32":  # the inputs tell a fused multiply-add from the real thing
        a, b = (q[..., :32], q[..., 32:]) if neox else (q[..., ::2], q[..., 1::2])
        cos, sin = angle.cos()[:, None].double(), angle.sin()[:, None].double() * (-1 if inverse else 1)
        fused = (a.double() * cos - rounded(b.double() * sin)).float()
        assert (fused != (want[..., :32] if neox else want[..., ::2])).any()


def test_inverse_is_the_negative_sine(device: str, provider: Provider, strides: str) -> None:
    for neox in (True, False):
        p, other = make(device, op="rope_", strides=strides), make(device, op="rope_", strides=strides)
        assert other.table is not None
        other.table[:, 16:] *= -1
        provider.rope_(p.positions, p.q_pe, p.k_pe, p.table, is_neox=neox, inverse=True)
        provider.rope_(other.positions, other.q_pe, other.k_pe, other.table, is_neox=neox)
        del p.buffers["table"]
        assert p.differences(other) == []


def test_inverse_undoes(device: str, provider: Provider, strides: str) -> None:
    for neox in (True, False):
        p = make(device, op="rope_", activation="fp32", format="fp32", strides=strides)
        q, k = p.q_pe.clone(), p.k_pe.clone()
        provider.rope_(p.positions, p.q_pe, p.k_pe, p.table, is_neox=neox)
        assert not torch.equal(p.q_pe, q)
        provider.rope_(p.positions, p.q_pe, p.k_pe, p.table, is_neox=neox, inverse=True)
        torch.testing.assert_close(p.q_pe, q, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(p.k_pe, k, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("keys", [None, 0, 1, 3, 16])
def test_rope_takes_any_key(device: str, provider: Provider, strides: str, keys: int | None) -> None:
    """k is None, [N, R], or [N, K, R]."""
    p = make(device, op="rope_", heads=16, strides=strides)
    assert p.table is not None and p.positions is not None
    k = None if keys is None else poisoned(6 * (keys * 2 + 1) * 32 * 2, device).view(torch.bfloat16).view(6, -1, 32)
    if k is not None:
        k[:, 1::2] = torch.randn(6, max(keys or 0, 0), 32).to(k)
    want_q, want_k = p.q_pe.clone(), None if k is None else k.clone()
    for i in range(6):
        angles = p.table[p.positions[i]]
        for head in (*want_q[i], *(want_k[i, 1::2] if want_k is not None else ())):
            head.copy_(turn(head, angles, neox=False))
    provider.rope_(p.positions, p.q_pe, None if k is None else k[:, 1::2], p.table, is_neox=False)
    assert_same_bytes(p.q_pe, want_q)
    if k is not None and want_k is not None:
        assert_same_bytes(k, want_k)


def test_cached_key_is_the_rounded_one(device: str, provider: Provider) -> None:
    """First to bf16, then to fp8: as the pair of ops would do it. The numbers tell it from a single rounding."""
    p = make(device, format="fp8_e4m3fn", tokens=33, scale=None)
    once = torch.stack([turn(k.float(), p.table[i], False) for k, i in zip(p.k_pe, p.positions, strict=True)])  # type: ignore[arg-type,index]
    p.run(provider)
    block, entry = p.slots // 4, p.slots % 4
    got = p.cache.rope.view(torch.uint8)[block, entry].cpu()
    assert torch.equal(got, fp8(p.k_pe, "fp8_e4m3fn", None))
    assert not torch.equal(got, fp8(once, "fp8_e4m3fn", None))


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads(threads: int) -> None:
    """The CPU's launch shares out tokens and heads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in (1, 2, 17, 333):
            p = make("cpu", tokens=tokens, heads=5, rows="masked")
            rows = [i for i in range(tokens) if p.slots[i] >= 0]
            becomes(p, providers.native, rows, rows)
    finally:
        torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------- values


def write(provider: Provider, x: Tensor, format: str, scale: float | Tensor | None, device: str) -> Tensor:
    """The codes [N, L] that rows of ``x`` become as latent vectors."""
    n, latent = x.shape
    cache = CacheLayout(latent, 0, 1, format).allocate(n, device, scale)
    x = x.to(device)
    provider.write_cache_(x, x[:, :0], torch.arange(n, device=device), cache)
    return plain(cache.data)[:, 0].cpu()


def first_wrong(x: Tensor, got: Tensor, want: Tensor) -> str:
    at = (got != want).flatten().nonzero().flatten().tolist()
    if not at:
        return ""
    x, got, want = x.flatten(), got.flatten(), want.flatten()
    return f"{len(at)} wrong; {float(x[at[0]])!r}: 0x{int(got[at[0]]):02x}, expected 0x{int(want[at[0]]):02x}"


SCALES = [None, 1.0, 0.37, 2.0**-3, 3.1e-3, 1e-30, 2.0**-126, 2.0**-149, 977.0, 1e38, -0.7, -2.0]
SCALES += [0.0, -0.0, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("activation", ["bf16", "fp16"])
def test_every_16_bit_number_as_fp8(
    device: str, provider: Provider, activation: str, format: str, scale: float | None
) -> None:
    """All 65536, NaNs and infinities among them, in rows for 16-byte access and (odd) for single elements."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(ACTIVATIONS[activation])
    want = fp8(every, format, scale)
    got = write(provider, every.view(128, 512), format, scale, device)
    assert not first_wrong(every, got.flatten(), want)
    got = write(provider, every[1:].view(-1, 257), format, scale, device)
    assert not first_wrong(every[1:], got.flatten(), want[1:])


@pytest.mark.parametrize("format", QUANTISED)
def test_fp32_around_every_rounding_boundary_of_fp8(device: str, provider: Provider, format: str) -> None:
    values = grid(format)
    halfway = (values[1:] + values[:-1]) / 2
    beyond = torch.tensor([values[-1] * 17 / 16, values[-1] * 2, 3e38, math.inf, math.nan, 1e-45, 1e-38])
    points = torch.cat([values, halfway, beyond]).float()
    near = [points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(math.inf))]
    x = torch.cat([*near, *(-n for n in near)])
    x = torch.cat([x, x.new_zeros(-len(x) % 8)])
    for scale in (None, 1.0, 0.25, -1.0):
        want = fp8(x * (scale or 1.0), format, scale)
        got = write(provider, (x * (scale or 1.0)).view(-1, 8), format, scale, device)
        assert not first_wrong(x, got.flatten(), want)


@pytest.mark.parametrize("format", QUANTISED)
def test_division_by_any_scale(device: str, provider: Provider, format: str) -> None:
    """Correctly rounded, not a product with the reciprocal: quotients next to the boundaries of fp8 tell."""
    random = torch.Generator().manual_seed(5)
    values = grid(format)
    halfway = ((values[1:] + values[:-1]) / 2).float()
    reciprocal_differs = False
    # A mantissa of ones makes a reciprocal next to a midpoint, which an approximate instruction easily misses.
    ones = torch.arange(0, 255, 16, dtype=torch.int32) << 23 | 0x7FFFFF
    for bits in [*ones, *torch.randint(1, 0x7F800000, (100,), generator=random, dtype=torch.int32)]:
        scale = bits.view(torch.float32)
        product = halfway * scale
        x = torch.stack([product, product.nextafter(torch.tensor(0.0)), product.nextafter(torch.tensor(math.inf))])
        x = x.nan_to_num(0.0, 0.0, 0.0)
        x = torch.cat([x, -x], 1).flatten()
        x = torch.cat([x, x.new_zeros(-len(x) % 8)])
        want = fp8(x, format, float(scale))
        got = write(provider, x.view(-1, 8), format, float(scale), device)
        assert not first_wrong(x, got.flatten(), want), f"scale {float(scale)!r}"
        if float(scale) > 1e-37:
            reciprocal_differs |= not torch.equal(fp8(x * (1 / scale), format, None), want)
    assert reciprocal_differs


def test_oracle_of_fp8() -> None:
    """The search for the nearest value, against ml_dtypes."""
    numpy, ml_dtypes = pytest.importorskip("numpy"), pytest.importorskip("ml_dtypes")
    random = torch.Generator().manual_seed(2)
    x = torch.randint(-(2**31), 2**31 - 1, (1 << 18,), generator=random).to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.randn((1 << 16,), generator=random), torch.randn((1 << 16,), generator=random) * 0.01])
    for format in QUANTISED:
        kind = getattr(ml_dtypes, str(FORMATS[format].dtype).removeprefix("torch."))
        top = float(ml_dtypes.finfo(kind).max)
        assert top == FORMATS[format].max == float(grid(format)[-1])
        with numpy.errstate(invalid="ignore"):
            codes = x.clamp(-top, top).numpy().astype(kind).view(numpy.uint8)
        want = torch.where(x.isnan(), FORMATS[format].nan, torch.from_numpy(codes))  # type: ignore[arg-type]
        assert not first_wrong(x, fp8(x, format, None), want)


@pytest.mark.parametrize("format", QUANTISED)
def test_infinity_and_nan_as_fp8(device: str, provider: Provider, format: str) -> None:
    top, nan = {"fp8_e4m3fn": (0x7E, 0x7F), "fp8_e4m3fnuz": (0x7F, 0x80), "fp8_e5m2": (0x7B, 0x7F)}[format]
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    x = torch.cat([torch.tensor([math.inf, -math.inf, 1e9]), nans])
    assert write(provider, x[None], format, 0.5, device).flatten().tolist() == [top, 0x80 | top, top, *[nan] * 5]


@pytest.mark.parametrize("format", QUANTISED)
def test_quotients_that_are_no_numbers(device: str, provider: Provider, format: str) -> None:
    """0/0 and inf/inf are NaN, and stored as NaN is, whatever its sign."""
    top = {"fp8_e4m3fn": 0x7E, "fp8_e4m3fnuz": 0x7F, "fp8_e5m2": 0x7B}[format]
    nan, minus_zero = FORMATS[format].nan, 0 if format == "fp8_e4m3fnuz" else 0x80
    x = torch.tensor([[0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, math.nan]])
    up, down = top, 0x80 | top
    assert write(provider, x, format, 0.0, device)[0].tolist() == [nan, nan, up, down, up, down, nan]
    assert write(provider, x, format, -0.0, device)[0].tolist() == [nan, nan, down, up, down, up, nan]
    assert write(provider, x, format, math.inf, device)[0].tolist() == [0, minus_zero, nan, nan, 0, minus_zero, nan]
    assert write(provider, x, format, math.nan, device)[0].tolist() == [nan] * 7


def test_copies_are_verbatim(device: str, provider: Provider) -> None:
    """Every 16-bit pattern, NaN payloads included, through the latent part and an unrotated rope part."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        for latent, rope in ((448, 64), (510, 2)):
            n = 65536 // (latent + rope)
            x = every[: n * (latent + rope)].view(n, latent + rope).to(device)
            cache = CacheLayout(latent, rope, 16, name).allocate(n // 16 + 1, device, scale=0.25)  # not used
            slots = torch.arange(n, device=device)
            q = x.new_zeros(n, 1, rope)
            provider.rope_write_cache_(None, q, x[:, latent:], x[:, :latent], None, slots, cache, is_neox=False)
            assert_same_bytes(cache.data.view(-1, latent + rope)[:n], x)
    bits = torch.tensor([0x7F800001, -1, -0x7FFFFF, 0x7FC12345, -0x3EDCBB, 1, -0x80000000, 0x7F800000])
    x = bits.to(torch.int32).view(torch.float32)[None]
    assert_same_bytes(write(provider, x, "fp32", None, device), x)


def test_no_scale_is_one(device: str, provider: Provider) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for format in QUANTISED:
        assert_same_bytes(write(provider, x, format, None, device), write(provider, x, format, 1.0, device))


def test_scale_may_have_any_shape_of_one(device: str, provider: Provider) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    want = write(provider, x, "fp8_e4m3fn", 0.37, device)
    for shape in ((), (1,), (1, 1, 1)):
        scale = torch.full(shape, 0.37, device=device)
        assert_same_bytes(write(provider, x, "fp8_e4m3fn", scale, device), want)


@pytest.mark.parametrize("activation", ["bf16", "fp16"])
def test_rope_rounds_to_nearest_even(device: str, provider: Provider, activation: str) -> None:
    """An fp32 table whose sine is zero scales by its cosine: every bf16 or fp16 number, once rounded."""
    dtype = ACTIVATIONS[activation]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(64, 16, 64)
    for cosine in (1.0, 1.0 + 2.0**-8, 1.0 + 2.0**-11, 0.3, 2.0**-20, 2.0**100):
        table = torch.tensor([[cosine] * 32 + [0.0] * 32])
        cosine = float(table[0, 0])  # as fp32 has it
        q = every.clone().to(device)
        provider.rope_(torch.zeros(64, dtype=torch.int64, device=device), q, None, table.to(device), is_neox=True)
        a, b = every.double().chunk(2, -1)
        zero_a, zero_b = rounded(a * 0.0), rounded(b * 0.0)  # NaN where the other of the pair is no number
        want = torch.cat([rounded(rounded(a * cosine) - zero_b), rounded(rounded(b * cosine) + zero_a)], -1)
        assert_same_bytes(q.cpu(), want.float().to(dtype), any_nan=True)


# ---------------------------------------------------------------------------------- GPU: checks, graphs, streams


CHECKED = """
import torch, latentkv
from latentkv import providers
from latentkv.testing import Case, Problem
layout = latentkv.CacheLayout(32, 32, 4, "bf16")
for provider in (providers.native, providers.reference, providers.public):
    for argument, index in (("slot_mapping", "slots"), ("positions", "positions")):
        for value in (10**6, 2**32 + 5):
            p, before = (Problem(Case("rope_write_cache_", layout), "cuda") for _ in range(2))
            getattr(p, index)[2] = value
            try:
                p.run(provider)
            except RuntimeError as error:
                assert f"latentkv.rope_write_cache_: {argument}: expected" in str(error), str(error)
                assert f"got {value} at row 2" in str(error), str(error)
            else:
                raise AssertionError(f"{provider}: {argument}: no error")
            torch.cuda.synchronize()
            assert p.differences(before) == []
        p = Problem(Case("rope_write_cache_", layout), "cuda")
        p.slots[1], p.positions[1] = -1, -5  # a masked row is none of its business
        p.run(provider)
# A capture cannot be waited for: there the row is skipped, as ever.
p, before = (Problem(Case("rope_write_cache_", layout), "cuda") for _ in range(2))
p.slots[:] = 10**6
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    p.run(providers.native)
graph.replay()
torch.cuda.synchronize()
assert p.differences(before) == []
print("checked")
"""


@on_gpu
def test_checks_make_the_gpu_raise(python: Python) -> None:
    done = python(CHECKED, LATENTKV_CHECKS="1")
    assert done.returncode == 0 and "checked" in done.stdout, done.stderr


# Both what LATENTKV_CHECKS=1 makes of an emulated chip and what it is without.
CHECKED_ON_AMD = """
import os, sys
sys.path.insert(0, {tests!r})
import amd, latentkv
from latentkv import providers
from latentkv.testing import Case, Problem

def layout(op):
    indexer = op == "write_indexer_cache_"
    return latentkv.CacheLayout(128, 32, 4, "fp8_e4m3fn") if indexer else latentkv.CacheLayout(32, 32, 4, "bf16")

def said(p, provider):
    try:
        p.run(provider)
    except RuntimeError as error:
        return str(error).splitlines()[0]

chip, checks = amd.provider("gfx942"), os.environ.get("LATENTKV_CHECKS") == "1"
for op, index, value in (
    *(("write_cache_", "slots", v) for v in (10**6, 2**32 + 5)),
    *(("rope_write_cache_", "slots", v) for v in (10**6, 2**32 + 5)),
    *(("rope_write_cache_", "positions", v) for v in (10**6, 2**32 + 5, -1)),
    *(("rope_", "positions", v) for v in (10**6, 2**32 + 5, -1)),
    *(("decode_prologue", "slots", v) for v in (10**6, 2**32 + 5)),
    *(("decode_prologue", "positions", v) for v in (10**6, 2**32 + 5, -1)),
    *(("write_cache_grouped_", "slots", v) for v in (10**6, 2**32 + 5)),
    *(("write_indexer_cache_", "slots", v) for v in (10**6, 2**32 + 5)),
    *(("write_indexer_cache_", "positions", v) for v in (10**6, 2**32 + 5, -1)),
):
    case = Case(op, layout(op), layers=3 if op == "write_cache_grouped_" else 1)
    p, cpu, before, skipped = (Problem(case, "cpu") for _ in range(4))
    getattr(p, index)[2] = getattr(cpu, index)[2] = value
    if op == "rope_":  # there are no slots to mask by
        kept = skipped.q_pe[2].clone(), skipped.k_pe[2].clone()
        skipped.run(providers.native)
        skipped.q_pe[2], skipped.k_pe[2] = kept
    else:
        skipped.slots[2] = -1
        skipped.run(providers.native)
        if op == "decode_prologue":
            skipped.q_out[2] = 0
    want, got = said(cpu, providers.native), said(p, chip)
    assert want and f"got {{value}} at row 2" in want, want
    assert got == (want if checks else None), (got, want)
    assert p.differences(before if checks else skipped) == [], (op, index, value)
p, want = (Problem(Case("rope_write_cache_", latentkv.CacheLayout(32, 32, 4, "bf16")), "cpu") for _ in range(2))
for problem, provider in ((p, chip), (want, providers.native)):
    problem.slots[1], problem.positions[1] = -1, -5  # a masked row is none of its business
    problem.run(provider)
assert p.differences(want) == []
print("checked" if checks else "skipped")
"""


@emulated
@pytest.mark.parametrize("checks", [True, False])
def test_checks_make_an_emulated_chip_raise(python: Python, checks: bool) -> None:
    """As the CPU does, in its words and before anything is written; without the variable the row is skipped."""
    variables = {"LATENTKV_CHECKS": "1"} if checks else {}
    done = python(CHECKED_ON_AMD.format(tests=str(Path(__file__).parent)), **variables)
    assert done.returncode == 0 and ("checked" if checks else "skipped") in done.stdout, done.stderr


@on_gpu
def test_nothing_is_allocated_on_the_device() -> None:
    p = make("cuda", op="rope_", tokens=64, strides="sliced")
    problems = [p, make("cuda", format="fp8_e4m3fn", tokens=64), make("cuda", op="write_cache_", tokens=64)]
    problems.append(make("cuda", op="decode_prologue", format="fp8_ds_mla", tokens=64, norm="fp32", query="fp8_e4m3fn"))
    problems.append(make("cuda", op="write_cache_grouped_", layers=40, rope="none", tokens=64))
    problems.append(make("cuda", op="write_indexer_cache_", tokens=64))
    for problem in problems:
        problem.run(providers.native)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for problem in problems:
        problem.run(providers.native)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


GRAPHS = [
    *(
        (op, {"format": format})
        for op in ("rope_", "write_cache_", "rope_write_cache_")
        for format in ("bf16", "fp8_e4m3fn")
    ),
    ("rope_write_cache_", {"format": "fp8_model1"}),
    ("decode_prologue", {"norm": "fp32", "normalised": "apart", "split": True}),
    ("decode_prologue", {"format": "fp8_ds_mla", "norm": "bf16", "query": "fp8_e4m3fn", "q_scale": 0.5}),
    ("decode_prologue", {"in_place": True, "format": "fp8_e4m3fn"}),
    ("write_cache_grouped_", {"layers": 3, "format": "fp8_e4m3fn"}),
    ("write_indexer_cache_", {"power_of_two": True}),
]


@on_gpu
@pytest.mark.parametrize(("op", "fields"), GRAPHS, ids=str)
def test_graph_replays_on_new_inputs(op: str, fields: dict[str, object]) -> None:
    """Captured once; replayed after positions, slots and values in the same memory have changed."""
    p = make("cuda", op=op, tokens=33, rows="rotate-masked", **fields)  # type: ignore[arg-type]
    before = copy.deepcopy(p)
    p.run(providers.native)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        p.run(providers.native)
    for seed in range(5):
        fresh = copy.deepcopy(before)
        random = torch.Generator().manual_seed(seed)
        pages = fresh.index_cache if op == "write_indexer_cache_" else fresh.cache.data
        capacity = pages.shape[0] * pages.shape[-2]
        fresh.slots.copy_(torch.randperm(2 * capacity, generator=random)[:33] - capacity // 2)  # some are outside
        fresh.positions.copy_(torch.randint(-9, MAX_POSITION + 9, (33,), generator=random))  # type: ignore[union-attr]
        inputs = [getattr(fresh, name, None) for name in ("q_pe", "k_pe", "kv_c", "q_nope", "weight", "k")]
        for t in (t for t in inputs if t is not None):
            t.copy_(torch.randn(t.shape, generator=random))
        for name, buffer in fresh.buffers.items():
            p.buffers[name].copy_(buffer)
        graph.replay()
        fresh.run(providers.reference)
        torch.cuda.synchronize()
        assert p.differences(fresh) == []


@on_gpu
def test_runs_on_the_current_stream() -> None:
    """Work queued before it on a side stream is seen, and the default stream is not waited for."""
    p, want = make("cuda", tokens=33), make("cuda", tokens=33)
    want.q_pe.mul_(2)
    want.run(providers.reference)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        p.q_pe.mul_(2)
        p.run(providers.native)
        got = p.q_pe.clone()
    stream.synchronize()
    assert_same_bytes(got, want.q_pe)
    assert p.differences(want) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_arguments() -> None:
    p, want = make("cuda:1", tokens=33), make("cuda:1", tokens=33)
    with torch.cuda.device(0):
        p.run(providers.native)
        want.run(providers.reference)
    torch.cuda.synchronize(1)
    assert p.differences(want) == []


class Layer:
    """Tensors that a chain of ops hands on, the one's result being the next one's input."""

    def __init__(self, tokens: int, format: str) -> None:
        random = torch.Generator().manual_seed(tokens)
        layout = CacheLayout(512, 64, 64, format)
        self.q = torch.randn(tokens, 16, 192, generator=random).bfloat16().cuda()
        self.kv = torch.randn(tokens, 576, generator=random).bfloat16().cuda()
        self.small = torch.randn(1, 2, 64, generator=random).bfloat16().cuda()
        self.table = latentkv.build_cos_sin_cache(
            rope_theta=1e4, qk_rope_head_dim=64, max_position_embeddings=4096, dtype=torch.float32
        ).cuda()
        self.positions = torch.randint(0, 4096, (tokens,), generator=random).cuda()
        blocks = tokens // 64 + 2
        self.slots = torch.randperm(blocks * 64, generator=random)[:tokens].cuda()
        self.other_slots = self.slots.roll(1)
        self.cache = layout.allocate(blocks, "cuda", scale=0.25)
        self.rows = self.cache.data.view(-1, 576)
        self.nope = torch.randn(16, tokens, 512, generator=random).bfloat16().cuda().transpose(0, 1)
        self.query = torch.zeros(tokens, 16, 576, dtype=torch.bfloat16, device="cuda")
        self.weight = torch.rand(512, generator=random).cuda()
        self.draft, self.packed = (
            layout.allocate(blocks, "cuda", 0.5),
            CacheLayout(format="fp8_ds_mla").allocate(blocks, "cuda"),
        )
        self.index = torch.zeros(blocks, 64, 132, dtype=torch.uint8, device="cuda")

    def state(self) -> dict[str, Tensor]:
        caches = {name: plain(getattr(self, name).data) for name in ("cache", "draft", "packed", "index")}
        return caches | {"q": self.q, "kv": self.kv, "small": self.small, "query": self.query}

    def steps(self, provider: Provider) -> Iterator[Callable[[], object]]:
        """One round: ours and torch's kernels in turn, each in need of what the one before it left."""
        q, k, kv_c = self.q[..., 128:], self.kv[:, 512:], self.kv[:, :512]
        at, angles = self.positions, self.table
        yield lambda: provider.rope_write_cache_(at, q, k, kv_c, angles, self.slots, self.cache, is_neox=False)
        yield lambda: q.neg_()
        yield lambda: provider.rope_(at, q, k, angles, is_neox=False, inverse=True)
        yield lambda: provider.rope_(at[:1], self.small, None, angles, is_neox=True)  # done long before the others
        yield lambda: provider.rope_(at, q, None, angles, is_neox=True)
        if self.rows.element_size() > 1:  # the cache as an attention kernel would read it
            yield lambda: self.kv.copy_(self.rows[self.other_slots])
        yield lambda: kv_c.neg_()
        yield lambda: provider.write_cache_(kv_c, k, self.other_slots, self.cache)
        yield lambda: provider.rope_(at, q, k, angles, is_neox=True, inverse=True)
        yield lambda: provider.write_cache_(kv_c, k, self.slots, self.cache)
        yield lambda: provider.rope_write_cache_(at, q, k, kv_c, angles, self.other_slots, self.cache, is_neox=True)
        query, index = self.query, self.index
        norm: dict[str, Any] = {"kv_c_out": kv_c, "kv_norm_weight": self.weight}
        yield lambda: provider.decode_prologue(
            self.nope, q, kv_c, k, at, angles, self.slots, self.packed, is_neox=False, q_out=query, **norm
        )
        yield lambda: self.nope.copy_(query[..., :512].roll(1, 0))
        yield lambda: provider.write_cache_grouped_(
            [kv_c, query[:, 3, :512]], [k, query[:, 5, 512:]], self.other_slots, [self.draft, self.cache]
        )
        yield lambda: provider.write_indexer_cache_(kv_c[:, :128], at, angles, self.slots, index, is_neox=True)
        yield lambda: self.small.add_(q[:1, :2])
        yield lambda: self.small.mul_(0.5)

    def run(self, provider: Provider, rounds: int, step_by_step: bool = False) -> None:
        for _ in range(rounds):
            for step in self.steps(provider):
                step()
                if step_by_step:
                    torch.cuda.synchronize()


@on_gpu
@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 500, 4096])
def test_chains_overlap_without_a_trace(tokens: int, format: str) -> None:
    """Programmatic dependent launch: a long chain on one stream gives what its steps give one at a time."""
    chain, single, plain_torch = (Layer(tokens, format) for _ in range(3))
    chain.run(providers.native, 60)
    torch.cuda.synchronize()
    single.run(providers.native, 60, step_by_step=True)
    plain_torch.run(providers.reference, 60)
    torch.cuda.synchronize()
    for name, got in chain.state().items():
        assert_same_bytes(got, plain_torch.state()[name])
        assert_same_bytes(got, single.state()[name])
        assert not got.is_floating_point() or got.isfinite().all(), f"{name}: numbers that no longer tell"


@on_gpu
@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 500, 4096])
def test_chains_overlap_in_a_graph(tokens: int, format: str) -> None:
    """The same captured: ten rounds in a graph, replayed back to back."""
    captured, single = Layer(tokens, format), Layer(tokens, format)
    warm = Layer(tokens, format)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        warm.run(providers.native, 1)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run(providers.native, 10)
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    single.run(providers.reference, 100)
    torch.cuda.synchronize()
    for name, got in captured.state().items():
        assert_same_bytes(got, single.state()[name])


@on_gpu
def test_overlap_can_be_switched_off() -> None:
    one, other = Layer(64, "bf16"), Layer(64, "bf16")
    one.run(providers.native, 5)
    providers.set_overlap(False)
    try:
        other.run(providers.native, 5)
    finally:
        providers.set_overlap(True)
    torch.cuda.synchronize()
    for name, got in one.state().items():
        assert_same_bytes(got, other.state()[name])


# ---------------------------------------------------------------------------------------- GPU: beyond 2^31


@on_gpu
@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn"])
@pytest.mark.parametrize("placement", ["concat", "split"])
def test_a_cache_beyond_2_31_elements(placement: str, format: str) -> None:
    """Its last slots are written, and nothing where an offset of 31 or 32 bits would have ended."""
    need(14)
    latent, rope = 512, 64
    blocks = -(-(2**32 + 2**30) // (64 * 512)) if format == "fp8_e4m3fn" else -(-(2**31 + 2**30) // (64 * 512))
    layout = CacheLayout(latent, rope, 64, format, placement)  # type: ignore[arg-type]
    p = make("cuda", L=latent, R=rope, block_size=64, tokens=8, format=format, placement=placement)
    buffers, tensors = [], []
    for shape in layout.shapes(blocks):
        buffers.append(poisoned(math.prod(shape) * layout.dtype.itemsize, "cuda"))
        tensors.append(buffers[-1].view(layout.dtype).view(shape))
    cache = MLACache.wrap(tensors, layout, p.cache.scale)
    boundary = [2**31 // 576, 2**31 // 512, 2**32 // 576 if format == "fp8_e4m3fn" else 2**31 // 560]
    last = cache.num_slots - 1
    p.slots = torch.tensor([last, 0, last - 64, last - 1, *(b + 1 for b in boundary), 7], device="cuda")
    assert p.slots.max() < cache.num_slots and len(set(p.slots.tolist())) == 8
    want = copy.deepcopy(p)
    for i in range(8):
        for head in (*want.q_pe[i], want.k_pe[i]):
            head.copy_(turn(head, p.table[p.positions[i]], False))  # type: ignore[index]
    p.cache = cache
    p.run(providers.native)
    assert_same_bytes(p.q_pe, want.q_pe)
    block, entry = p.slots // 64, p.slots % 64
    for part, x in ((cache.latent, want.kv_c), (cache.rope, want.k_pe)):
        row = stored(x, format, 0.37).to("cuda")
        assert_same_bytes(plain(part)[block, entry], row)
        plain(part)[block, entry] = torch.full_like(row.view(torch.uint8), POISON).view(row.dtype)
    assert all(map(all_poison, buffers))


@on_gpu
@pytest.mark.parametrize("far", ["tokens", "heads"])
@pytest.mark.parametrize("misaligned", [0, 1])
def test_strides_that_reach_beyond_2_31_elements(far: str, misaligned: int) -> None:
    """q, k_pe, kv_c and the table all have rows more than 2^30 elements apart."""
    need(8)
    step = 2**30 + 64 + misaligned
    p, want = make("cuda", tokens=3, heads=3), make("cuda", tokens=3, heads=3)
    buffer = poisoned((2 * step + 4096) * 2, "cuda")
    typed = buffer.view(torch.bfloat16)
    q_strides = (step, 96, 1) if far == "tokens" else (96, step, 1)
    q = typed.as_strided((3, 3, 32), q_strides, 0)
    k = typed.as_strided((3, 32), (step, 1), 1024)
    kv_c = typed.as_strided((3, 32), (step, 1), 2048)
    table = typed.as_strided((3, 32), (step, 1), 3072)
    narrow = want.table[:3].bfloat16()  # type: ignore[index]
    for view, x in ((q, p.q_pe), (k, p.k_pe), (kv_c, p.kv_c), (table, narrow)):
        view.copy_(x)
    p.q_pe, p.k_pe, p.kv_c, p.table = q, k, kv_c, table
    want.table = narrow
    want.positions = p.positions = torch.tensor([2, 0, 1], device="cuda")
    p.run(providers.native)
    want.run(providers.reference)
    for view, x in ((q, want.q_pe), (k, want.k_pe), (kv_c, want.kv_c), (table, narrow)):
        assert_same_bytes(view, x)
        view.view(torch.int16).fill_(POISON * 0x101 - 0x10000)
    assert_same_bytes(p.buffers["cache0"], want.buffers["cache0"])
    assert all_poison(buffer)


# --------------------------------------------------------------------------------- emulated chips: beyond 2^32


@emulated
@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="needs POSIX mmap")
@pytest.mark.parametrize("arch", AMD or ["none"])
@pytest.mark.parametrize(("placement", "format"), [("concat", "bf16"), ("split", "fp8_e4m3fn")])
@pytest.mark.parametrize("far", ["outer", "inner"])
@pytest.mark.parametrize("misaligned", [0, 1])
def test_strides_beyond_2_32_elements_on_an_emulated_chip(
    misaligned: int, far: str, placement: str, format: str, arch: str
) -> None:
    """Tokens or heads of q, blocks or entries of the cache, and the rows of k_pe, kv_c and the table lie far apart.

    From each to the next it is more than 2^32 elements. The emulated chip raises at an access outside the rows, and
    there a stride or an offset leads that was cut to 31 or 32 bits, be it of elements or of bytes.
    """
    want = make("cpu", tokens=3, heads=3, block_size=3, format=format, placement=placement)
    assert want.positions is not None and want.table is not None
    want.positions[:], want.slots[:] = torch.tensor([2, 0, 1]), torch.tensor([8, 0, 4])
    want.table = want.table[:3].to(ACTIVATIONS["bf16" if format == "bf16" else "fp32"])
    step, near = 2**32 + 4096 + misaligned, 128
    outer_inner = (step, near) if far == "outer" else (near, step)
    p = copy.deepcopy(want)
    p.q_pe = spread(want.q_pe, (*outer_inner, 1))
    p.k_pe, p.kv_c = spread(want.k_pe, (step, 1)), spread(want.kv_c, (step, 1))
    p.table = spread(want.table, (step, 1))
    p.cache = MLACache.wrap([spread(t, (*outer_inner, 1)) for t in want.cache.tensors], p.case.layout, want.cache.scale)
    before = plain(want.cache.data).clone()
    p.run(amd.provider(arch))
    want.run(providers.reference)
    assert not torch.equal(plain(want.cache.data), before)
    for name in ("q_pe", "k_pe", "kv_c", "table"):
        assert_same_bytes(getattr(p, name), getattr(want, name))
    for got, part in zip(p.cache.tensors, want.cache.tensors, strict=True):
        assert_same_bytes(plain(got), plain(part))


@emulated
def test_a_grid_that_hip_cannot_take() -> None:
    """2^32 threads: refused, where some versions of HIP would run a part of them."""
    tokens, heads = 2**22, 32
    q = virtual((tokens, heads, 64), (heads * 65, 65, 1), torch.bfloat16)
    amd.provider("gfx942")
    arguments = (torch.zeros(tokens, dtype=torch.int32), q, None, torch.zeros(1, 64), False, False)
    with pytest.raises(RuntimeError, match=r"expected fewer than 2\^32 threads in a launch, got 4294967296"):
        torch.ops.latentkv_gfx942.rope_.default.redispatch(amd.KEYS, *arguments)

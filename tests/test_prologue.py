"""decode_prologue: what becomes of a row in every state, numerics of the norm and the query, whose memory is whose."""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Iterable

import amd
import latentkv
import pytest
import torch
from conftest import AMD, on_cpu
from latentkv import CacheLayout, MLACache, providers
from latentkv.cache.layouts import FORMATS
from latentkv.providers import Provider
from latentkv.testing import POISON, Problem, assert_same_bytes, first_difference, poisoned
from latentkv.testing.matrix import ACTIVATIONS, MAX_POSITION
from oracle import (
    PACKED,
    QUANTISED,
    all_poison,
    fp8,
    fp8_query,
    grid,
    make,
    need,
    normalised,
    plain,
    put_row,
    refuses,
    spread,
    turn,
)
from torch import Tensor

FAR = [2**31, 2**32 + 5, 2**63 - 1]
NEGATIVES = [-1, -(2**32) + 5, -(2**63)]
EPS = 1e-6
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
emulated = pytest.mark.skipif(not AMD, reason=f"no emulated AMD devices: {amd.problem()}")


def prologue(device: str, **fields: object) -> Problem:
    """Six tokens, three heads, all slots valid, masked rows rotated as they are by default."""
    fields = {"rows": "rotate-masked", "outputs": "sliced", "strides": "sliced"} | fields
    p = make(device, op="decode_prologue", **fields)  # type: ignore[arg-type]
    if len(p.slots) <= 6:
        p.slots[:] = torch.tensor([3, 0, 7, 5, 2, 9][: len(p.slots)])
    return p


def query(p: Problem, x: Tensor) -> Tensor:
    """Elements of a query as q_out holds them, fp8 as bytes."""
    return fp8_query(x, p.case.query, p.case.q_scale) if p.case.query else x.cpu()


def after(p: Problem, alive: Iterable[int], rotated: Iterable[int], written: Iterable[int], eps: float) -> Problem:
    """A copy of the problem as it should be: only ``alive`` rows have a query, the others' are zero."""
    want, rotated, alive = copy.deepcopy(p), set(rotated), set(alive)
    latent_dim, out = p.case.layout.kv_lora_rank, plain(want.q_out)
    apart = None if want.q_rope_out is None else plain(want.q_rope_out)
    for i in range(len(want.q_pe)):
        if i not in alive:
            out[i] = 0
            if apart is not None:
                apart[i] = 0
            continue
        angles = want.table[want.positions[i]] if i in rotated else None  # type: ignore[index]
        for h, q_pe in enumerate(want.q_pe[i]):
            if want.q_nope is not None:
                out[i, h, :latent_dim] = query(p, want.q_nope[i, h]).to(p.device)
            rope = turn(q_pe, angles, p.case.rope == "neox") if angles is not None else q_pe
            (out[i, h, latent_dim:] if apart is None else apart[i, h])[:] = query(p, rope).to(p.device)
        latent = want.kv_c[i] if want.weight is None else normalised(want.kv_c[i], want.weight, eps)
        if want.kv_c_out is not None:
            want.kv_c_out[i] = latent.to(p.device)
        key = turn(want.k_pe[i], angles, p.case.rope == "neox") if angles is not None else want.k_pe[i]
        if i in written:
            put_row(want.cache, int(want.slots[i]), latent, key)
    return want


def becomes(
    p: Problem,
    provider: Provider,
    alive: Iterable[int] = range(6),
    rotated: Iterable[int] | None = None,
    written: Iterable[int] | None = None,
) -> None:
    """Running ``p`` leaves every byte as the oracle has it; live rows are rotated and written unless told otherwise."""
    alive = list(alive)
    want = after(p, alive, alive if rotated is None else rotated, alive if written is None else written, EPS)
    p.run(provider)
    assert p.differences(want) == []


def outside(p: Problem, provider: Provider, argument: str, expected: str, value: int, row: int) -> None:
    """The CPU raises before anything is written; on a GPU the row's query is zero, and nothing else of it changes."""
    if on_cpu(str(p.device), provider):
        return refuses(p, provider, argument, expected, f"{value} at row {row}")
    return becomes(p, provider, [i for i in range(6) if i != row])


NORMS = [
    {},
    {"norm": "fp32"},
    {"norm": "bf16", "normalised": "apart"},
    {"norm": "fp32", "normalised": "in-place"},
]


# -------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", [None, "fp8_e4m3fn"])
def test_all_rows(
    device: str, provider: Provider, kind: str | None, in_place: bool, split: bool, norm: dict[str, str]
) -> None:
    for strides, rope in (("sliced", "gptj"), ("unaligned", "neox")):
        p = prologue(
            device, query=kind, in_place=in_place, split=split, strides=strides, rope=rope, outputs=strides, **norm
        )
        becomes(p, provider)


@pytest.mark.parametrize("format", ["fp16", "fp32", *QUANTISED, *PACKED])
def test_all_formats(device: str, provider: Provider, format: str) -> None:
    activation = format if format in ACTIVATIONS else "bf16"
    for norm in ({}, {"norm": "fp32", "normalised": "apart"}):
        p = prologue(device, format=format, activation=activation, tokens=3, heads=1, **norm)
        becomes(p, provider, range(3))


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_all_queries(device: str, provider: Provider, activation: str, kind: str) -> None:
    """Whatever the cache's format: the two have nothing to do with each other."""
    for format in (activation, "fp8_e5m2"):
        for q_scale in (None, 0.37):
            p = prologue(device, format=format, activation=activation, query=kind, q_scale=q_scale, tokens=3)
            becomes(p, provider, range(3))


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_from_T_on_are_padding(device: str, provider: Provider, in_place: bool, norm: dict[str, str]) -> None:
    """Their query is zero, what already lay there too; nothing else is read or written."""
    for split in (False, True):
        p = prologue(device, in_place=in_place, split=split, **norm)
        p.slots = p.slots[:4]
        p.positions[4], p.positions[5] = -7, 2**40  # type: ignore[index]
        p.kv_c[4:] = math.nan
        p.q_pe[4:] = math.nan
        if p.q_nope is not None:
            p.q_nope[4:] = math.nan
        becomes(p, provider, range(4))


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_no_slots(device: str, provider: Provider, norm: dict[str, str]) -> None:
    """T = 0: every row is padding."""
    for fields in ({}, {"query": "fp8_e4m3fnuz"}, {"split": True, "in_place": True}, {"rope": "none"}, {"R": 0}):
        p = prologue(device, **fields, **norm)
        p.slots = p.slots[:0]
        becomes(p, provider, [])
        assert plain(p.q_out).eq(0).all()


def test_no_tokens(device: str, provider: Provider) -> None:
    for fields in ({}, {"norm": "fp32", "normalised": "in-place"}, {"split": True}, {"in_place": True}):
        becomes(prologue(device, tokens=0, **fields), provider, [])


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_no_heads(device: str, provider: Provider, norm: dict[str, str]) -> None:
    """The cache row is written all the same, and the normalised vector."""
    for fields in ({}, {"split": True, "in_place": True}, {"rows": "masked"}):
        p = prologue(device, heads=0, **fields, **norm)
        becomes(p, provider)
        assert plain(p.cache.data).ne(plain(prologue(device, heads=0, **norm).cache.data)).any()


@pytest.mark.parametrize("slot", NEGATIVES)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_masked_rows_are_rotated_by_default(device: str, provider: Provider, norm: dict[str, str], slot: int) -> None:
    """The token lives on another rank: its query is made, and its normalised vector, but no cache row."""
    p = prologue(device, **norm)
    p.slots[1] = p.slots[4] = slot
    becomes(p, provider, written=[0, 2, 3, 5])


@pytest.mark.parametrize("slot", NEGATIVES)
@pytest.mark.parametrize("kind", [None, "fp8_e4m3fn"])
def test_masked_rows_that_are_not_rotated(device: str, provider: Provider, kind: str | None, slot: int) -> None:
    """[q_nope | q_pe], converted all the same; their position is of no interest."""
    for fields in ({}, {"in_place": True, "norm": "fp32", "normalised": "apart"}, {"split": True}):
        p = prologue(device, rows="masked", query=kind, **fields)
        p.slots[1] = p.slots[4] = slot
        p.positions[4] = MAX_POSITION + 3  # type: ignore[index]
        becomes(p, provider, rotated=[0, 2, 3, 5], written=[0, 2, 3, 5])


def test_all_rows_masked(device: str, provider: Provider) -> None:
    for rows, rotated in (("masked", []), ("rotate-masked", range(6))):
        p = prologue(device, rows=rows, norm="fp32", normalised="apart")
        p.slots[:] = -1
        becomes(p, provider, rotated=rotated, written=[])


@pytest.mark.parametrize("rows", ["masked", "rotate-masked"])
@pytest.mark.parametrize("beyond", [0, 1, *FAR])
def test_slot_beyond_the_cache(device: str, provider: Provider, beyond: int, rows: str) -> None:
    """Its query is zero, the rope part too where that is a tensor of its own; kv_c_out keeps what it had."""
    for fields in (
        {"norm": "fp32", "normalised": "apart"},
        {"norm": "bf16", "normalised": "in-place", "split": True, "query": "fp8_e4m3fn"},
        {"in_place": True, "rope": "none"},
        {"split": True, "in_place": True, "query": "fp8_e5m2"},
    ):
        p = prologue(device, rows=rows, **fields)
        capacity = p.cache.num_slots
        p.slots[2] = slot = beyond + capacity if beyond < 2 else beyond
        expected = f"slots below the capacity of {capacity}"
        if on_cpu(device, provider):
            refuses(p, provider, "slot_mapping", expected, f"{slot} at row 2")
        else:
            alive = [0, 1, 3, 4, 5]
            becomes(p, provider, alive, rotated=alive if p.case.rope != "none" else [])


@pytest.mark.parametrize("position", [MAX_POSITION, *FAR, *NEGATIVES])
def test_position_outside_the_table(device: str, provider: Provider, position: int) -> None:
    for fields in ({"norm": "fp32", "normalised": "apart"}, {"split": True, "in_place": True, "heads": 0}):
        p = prologue(device, **fields)
        p.positions[3] = position  # type: ignore[index]
        outside(p, provider, "positions", f"values in 0 .. {MAX_POSITION - 1}", position, 3)


def test_position_outside_on_a_masked_row_that_rotates(device: str, provider: Provider) -> None:
    """It is dead all the same: no query, no normalised vector."""
    p = prologue(device, norm="fp32", normalised="apart")
    p.slots[3] = -1
    p.positions[3] = MAX_POSITION  # type: ignore[index]
    outside(p, provider, "positions", f"values in 0 .. {MAX_POSITION - 1}", MAX_POSITION, 3)


def test_several_bad_rows(device: str, provider: Provider) -> None:
    """The CPU names the first."""
    p = prologue(device)
    p.slots[4] = p.slots[5] = capacity = p.cache.num_slots
    if on_cpu(device, provider):
        refuses(p, provider, "slot_mapping", f"slots below the capacity of {capacity}", f"{capacity} at row 4")
    else:
        becomes(p, provider, range(4))


def test_a_cache_without_blocks(device: str, provider: Provider) -> None:
    p = prologue(device, norm="fp32", normalised="apart")
    p.cache = p.case.layout.allocate(0, device)
    p.slots[:] = -1
    becomes(p, provider, written=[])


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_block_sizes(device: str, provider: Provider, block_size: int) -> None:
    for format in ("bf16", "fp8_model1"):
        p = prologue(device, block_size=block_size, format=format, heads=1, tokens=3)
        p.slots[:] = torch.tensor([p.cache.num_slots - 1, 0, block_size])
        becomes(p, provider, range(3))


def test_int32_and_int64_mean_the_same(device: str, provider: Provider) -> None:
    for positions in (torch.int32, torch.int64):
        for slots in (torch.int32, torch.int64):
            p = prologue(device)
            p.positions, p.slots = p.positions.to(positions), p.slots.to(slots)  # type: ignore[union-attr]
            becomes(p, provider)


@pytest.mark.parametrize("kind", [None, "fp8_e4m3fn"])
def test_without_rotation(device: str, provider: Provider, kind: str | None) -> None:
    """positions=None, cos_sin_cache=None."""
    for rows in ("masked", "rotate-masked"):
        p = prologue(device, rope="none", rows=rows, query=kind)
        p.slots[1] = -1
        becomes(p, provider, rotated=[], written=[0, 2, 3, 4, 5])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", [None, "fp8_e4m3fn"])
def test_without_a_rope_part(device: str, provider: Provider, kind: str | None, split: bool) -> None:
    """R = 0: q_out is q_nope alone; with a table as well as without, and then no position is outside."""
    for table in (False, True):
        for placement in ("concat", "split"):
            p = prologue(device, R=0, query=kind, split=split, placement=placement, norm="fp32")
            if table:
                p.positions = torch.full((6,), 77, device=device)
                p.table = torch.empty(5, 0, device=device)
            becomes(p, provider, rotated=[])


# ------------------------------------------------------------------------------------------- whose memory is whose


def call(p: Problem, provider: Provider, **fields: object) -> Tensor:
    """The public function on a problem's inputs."""
    return provider.decode_prologue(
        p.q_nope, p.q_pe, p.kv_c, p.k_pe, p.positions, p.table, p.slots, p.cache, is_neox=p.case.rope == "neox",
        **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def test_q_out_is_allocated(device: str, provider: Provider) -> None:
    """Of q_pe's dtype or q_dtype; [N, H, L + R], or [N, H, L] beside a q_rope_out. Every byte is written."""
    for dtype in (None, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2):
        for split in (False, True):
            kind = next((name for name in QUANTISED if FORMATS[name].dtype == dtype), None)
            p = prologue(device, query=kind, split=split, outputs="contiguous", q_scale=0.5)
            p.slots = p.slots[:4]
            want = copy.deepcopy(p)
            want.run(providers.reference)
            for _ in range(3):
                junk = poisoned(6 * 3 * 64 * 2, device)  # what the allocation may find in its memory
                del junk
                got = call(p, provider, q_dtype=dtype, q_rope_out=p.q_rope_out, q_scale=p.q_scale)
                assert got.dtype == (dtype or torch.bfloat16) and got.shape == (6, 3, 32 if split else 64)
                assert_same_bytes(plain(got), plain(want.q_out))
            if split:
                assert_same_bytes(plain(p.q_rope_out), plain(want.q_rope_out))


def test_q_out_is_returned(device: str, provider: Provider) -> None:
    p = prologue(device, query="fp8_e5m2")
    assert call(p, provider, q_out=p.q_out) is p.q_out
    assert call(p, provider, q_out=p.q_out, q_dtype=torch.float8_e5m2) is p.q_out


def test_two_halves_of_one_buffer(device: str, provider: Provider) -> None:
    """As a reader may want it: [rope | latent], heads outside tokens, and gaps that stay."""
    for kind in (None, "fp8_e4m3fn"):
        p = prologue(device, split=True, query=kind)
        dtype = FORMATS[kind].dtype if kind else torch.bfloat16
        buffer = poisoned(3 * 6 * 80 * dtype.itemsize, device)
        rows = buffer.view(dtype).view(3, 6, 80).transpose(0, 1)
        p.q_rope_out, p.q_out = rows[..., 3:35], rows[..., 41:73]
        p.buffers["q_out"] = buffer
        becomes(p, provider)


def test_transposed_query(device: str, provider: Provider) -> None:
    """q_nope as the [H, N, L] that a batch product leaves, q_pe as the end of each head of a projection."""
    p = prologue(device)
    nope = poisoned(3 * 6 * 32 * 2, device).view(torch.bfloat16).view(3, 6, 32)
    heads = poisoned(6 * 3 * 48 * 2, device).view(torch.bfloat16).view(6, 3, 48)
    for name, view in (("q_nope", nope.transpose(0, 1)), ("q_pe", heads[..., 16:])):
        view.copy_(getattr(p, name))
        setattr(p, name, view)
    p.buffers |= {"q_nope": nope, "q_pe": heads}
    becomes(p, provider)


def test_repeated_inputs(device: str, provider: Provider) -> None:
    """What is only read may overlap itself: one head for all, one row for all."""
    p = prologue(device, norm="fp32", normalised="apart")
    p.q_nope = p.q_nope[:1, :1].expand(6, 3, 32)  # type: ignore[index]
    p.q_pe, p.k_pe, p.kv_c = p.q_pe[:, :1].expand(6, 3, 32), p.k_pe[:1].expand(6, 32), p.kv_c[:1].expand(6, 32)
    becomes(p, provider)


@pytest.mark.parametrize("kind", [None, *QUANTISED])
def test_q_nope_in_place_is_not_touched(device: str, provider: Provider, kind: str | None) -> None:
    """It lies in q_out already, NaN payloads and all, and is not converted once more."""
    p = prologue(device, L=64, R=2, heads=4, query=kind, in_place=True)
    nope = p.q_out[..., :64]
    if kind:
        plain(nope).copy_(torch.arange(256, dtype=torch.uint8).view(1, 4, 64).expand(6, 4, 64))
    else:
        nope.view(torch.int16).copy_((torch.arange(256) * 257).to(torch.int16).view(1, 4, 64).expand(6, 4, 64))
    before = plain(nope).clone()
    p.run(provider)
    assert_same_bytes(plain(nope), before)


@pytest.mark.parametrize("activation", ["bf16", "fp16"])
def test_copies_are_verbatim(device: str, provider: Provider, activation: str) -> None:
    """Every 16-bit pattern as q_nope, and as a q_pe that is not rotated: NaN payloads included."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(ACTIVATIONS[activation])
    for latent, rope in ((448, 64), (510, 2)):
        heads = 65536 // (latent + rope)
        x = every[: heads * (latent + rope)].view(1, heads, latent + rope).to(device)
        cache = CacheLayout(latent, rope, 16, activation).allocate(1, device)
        q_scale = torch.tensor([0.25], device=device)  # not used
        out = provider.decode_prologue(
            x[..., :latent], x[..., latent:], x[:, 0, :latent], x[:, 0, latent:], None, None,
            torch.zeros(1, dtype=torch.int64, device=device), cache, is_neox=False, q_scale=q_scale,
        )  # fmt: skip
        assert_same_bytes(out, x)
        assert_same_bytes(cache.data[0, 0], x[0, 0])


def test_kv_c_out_may_be_kv_c(device: str, provider: Provider) -> None:
    """The raw slice of a projection becomes the normalised vector; its neighbours stay."""
    for strides in ("contiguous", "sliced", "unaligned"):
        for activation in ACTIVATIONS:
            p = prologue(
                device, norm="fp32", normalised="in-place", strides=strides, activation=activation, format=activation
            )
            assert p.kv_c_out is p.kv_c
            becomes(p, provider)


def test_kv_c_out_of_any_row_stride(device: str, provider: Provider) -> None:
    p = prologue(device, norm="fp32", normalised="apart")
    buffer = poisoned(6 * 41 * 2, device)
    p.kv_c_out = buffer.view(torch.bfloat16).view(6, 41)[:, 3:35]
    p.buffers["kv_c_out"] = buffer
    becomes(p, provider)


# -------------------------------------------------------------------------------------------------------- the query


QUERY_SCALES = [None, 1.0, 0.37, 2.0**-3, 977.0, 1e38, 1e-30, 2.0**-126, 2.0**-149, 3e-39, -0.7, 0.0, -0.0, math.inf]
QUERY_SCALES += [-math.inf, math.nan]


@pytest.mark.parametrize("q_scale", QUERY_SCALES)
@pytest.mark.parametrize("kind", QUANTISED)
def test_every_16_bit_number_as_a_query(device: str, provider: Provider, kind: str, q_scale: float | None) -> None:
    """convert(x * (1 / q_scale)) for q_nope and for q_pe, 16 bytes at a time and (odd) one by one."""
    for activation, latent, rope in (("bf16", 448, 64), ("fp16", 33, 2)):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(ACTIVATIONS[activation])
        heads = 65536 // (latent + rope)
        x = every[: heads * (latent + rope)].view(1, heads, latent + rope)
        cache = CacheLayout(latent, rope, 16, activation).allocate(1, device)
        row = x.to(device)
        got = provider.decode_prologue(
            row[..., :latent], row[..., latent:], row[:, 0, :latent], row[:, 0, latent:], None, None,
            torch.zeros(1, dtype=torch.int64, device=device), cache, is_neox=False, q_dtype=FORMATS[kind].dtype,
            q_scale=None if q_scale is None else torch.tensor([q_scale], device=device),
        )  # fmt: skip
        assert_same_bytes(plain(got).cpu(), fp8_query(x, kind, q_scale))


def test_query_is_multiplied_by_the_reciprocal(device: str, provider: Provider) -> None:
    """Not divided, as the cache row is: quotients next to the boundaries of fp8 tell."""
    values, told = grid("fp8_e4m3fn"), False
    halfway = ((values[1:] + values[:-1]) / 2).float()
    for scale in (0.37, 3.1e-3, 7.7):
        product = halfway * scale
        x = torch.cat([product, product.nextafter(torch.tensor(0.0)), product.nextafter(torch.tensor(math.inf))])
        x = x[None, None, :376]
        want, divided = fp8_query(x, "fp8_e4m3fn", scale), fp8(x, "fp8_e4m3fn", scale)
        cache = CacheLayout(x.shape[2], 0, 1, "fp8_e4m3fn").allocate(1, device, scale)
        q = x.to(device)
        got = provider.decode_prologue(
            q, q[..., :0], q[:, 0], q[:, 0, :0], None, None, torch.zeros(1, dtype=torch.int64, device=device), cache,
            is_neox=False, q_dtype=torch.float8_e4m3fn, q_scale=torch.tensor(scale, device=device),
        )  # fmt: skip
        assert_same_bytes(plain(got).cpu(), want)
        assert_same_bytes(plain(cache.data)[0].cpu(), divided[0])
        told |= not torch.equal(divided, want)
    assert told


def test_query_is_rounded_before_it_is_quantised(device: str, provider: Provider) -> None:
    """The rotated q_pe first becomes bf16, as the op that rotates it would leave it."""
    p = prologue(device, query="fp8_e4m3fn", tokens=33, heads=4)
    p.slots[:] = -1
    q = torch.stack([torch.stack([turn(h.float(), p.table[i], False) for h in row])  # type: ignore[index]
                     for row, i in zip(p.q_pe, p.positions, strict=True)])  # type: ignore[arg-type]  # fmt: skip
    p.run(provider)
    got = plain(p.q_out)[..., 32:].cpu()
    assert torch.equal(got, fp8_query(q.bfloat16(), "fp8_e4m3fn", None))
    assert not torch.equal(got, fp8_query(q, "fp8_e4m3fn", None))


def test_q_scale_may_have_any_shape_of_one(device: str, provider: Provider) -> None:
    p = prologue(device, query="fp8_e4m3fn", q_scale=0.37)
    want = call(p, provider, q_dtype=torch.float8_e4m3fn, q_scale=p.q_scale)
    for shape in ((), (1, 1, 1)):
        got = call(p, provider, q_dtype=torch.float8_e4m3fn, q_scale=torch.full(shape, 0.37, device=device))
        assert_same_bytes(plain(got), plain(want))


# --------------------------------------------------------------------------------------------------------- the norm


def norm(
    provider: Provider, device: str, x: Tensor, weight: Tensor, eps: float = EPS, format: str | None = None
) -> tuple[Tensor, MLACache]:
    """RMSNorm of rows [N, L] alone, and the cache that holds them."""
    n, latent = x.shape
    format = format or next(name for name, dtype in ACTIVATIONS.items() if dtype == x.dtype)
    cache = CacheLayout(latent, 0, 1, format).allocate(n, device)
    kv_c, out = x.to(device), torch.empty_like(x, device=device)
    q = kv_c.new_zeros(n, 0, latent)
    provider.decode_prologue(
        q, q[..., :0], kv_c, kv_c[:, :0], None, None, torch.arange(n, device=device), cache,
        is_neox=False, kv_c_out=out, kv_norm_weight=weight.to(device), kv_norm_eps=eps,
    )  # fmt: skip
    return out.cpu(), cache


def vectors(n: int, latent: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of many magnitudes, so that the order of a sum shows."""
    random = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-4, 5, (n, latent), generator=random).float()
    return (torch.randn((n, latent), generator=random) * 2.0**exponents).to(dtype)


LENGTHS = [1, 2, 7, 8, 9, 31, 64, 255, 256, 257, 264, 448, 512, 1000, 1024, 2056]


@pytest.mark.parametrize("latent", LENGTHS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_norm_in_the_fixed_order(device: str, provider: Provider, activation: str, latent: int) -> None:
    """Bit for bit what the contract says one number at a time, for weights of both dtypes."""
    x = vectors(3, latent, ACTIVATIONS[activation], latent)
    for dtype in {ACTIVATIONS[activation], torch.float32}:
        weight = vectors(1, latent, dtype, 1)[0]
        got, cache = norm(provider, device, x, weight)
        want = torch.stack([normalised(row, weight, EPS) for row in x])
        assert_same_bytes(got, want)
        assert_same_bytes(cache.data[:, 0].cpu(), want)


def test_oracle_of_the_norm() -> None:
    """It is RMSNorm, to fp32's precision; and another order of the sum gives other bits."""
    orders_differ = False
    for latent in LENGTHS:
        x, weight = vectors(8, latent, torch.float32, latent), vectors(1, latent, torch.float32, 1)[0]
        got = torch.stack([normalised(row, weight, EPS) for row in x])
        v = x.double()
        exact = v * (v.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
        for order in (torch.arange(latent).flip(0), torch.randperm(latent)):
            other = torch.stack([normalised(row[order], weight[order], EPS) for row in x])
            orders_differ |= not torch.equal(other, got[:, order])
    assert orders_differ


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 1e-5, 1e-3, 1.0, 1e30])
def test_eps(device: str, provider: Provider, eps: float) -> None:
    """Rounded to fp32. Of the zero vector: zeros; with none at all, 0 / 0."""
    x = torch.cat([vectors(3, 64, torch.float32), torch.zeros(1, 64), torch.full((1, 64), 1e-5)])
    weight = vectors(1, 64, torch.float32, 1)[0]
    got, _ = norm(provider, device, x, weight, eps)
    want = torch.stack([normalised(row, weight, eps) for row in x])
    assert_same_bytes(got, want, any_nan=True)
    assert bool(got[3].isnan().all()) == (eps == 0)


def test_eps_has_a_default(device: str, provider: Provider) -> None:
    p, q = (prologue(device, norm="fp32", normalised="apart") for _ in range(2))
    call(p, provider, kv_norm_weight=p.weight, kv_c_out=p.kv_c_out)
    call(q, provider, kv_norm_weight=q.weight, kv_c_out=q.kv_c_out, kv_norm_eps=1e-6)
    assert_same_bytes(p.kv_c_out, q.kv_c_out)


def test_norm_of_what_is_no_number(device: str, provider: Provider) -> None:
    """A NaN makes the whole vector NaN; an infinity makes itself NaN and the others zero; squares may overflow."""
    x = torch.randn((4, 64), generator=torch.Generator().manual_seed(0))
    x[0, 5], x[1, 63], x[2] = math.nan, -math.inf, 1e20
    ones = torch.ones(64)
    got, _ = norm(provider, device, x, ones)
    want = torch.stack([normalised(row, ones, EPS) for row in x])
    assert_same_bytes(got, want, any_nan=True)
    assert got[0].isnan().all() and got[1].isnan().tolist() == [False] * 63 + [True]
    assert got[1, :63].eq(0).all() and got[2].eq(0).all() and got[3].ne(0).all()
    _, cache = norm(provider, device, x, ones, format="fp8_e4m3fn")
    assert plain(cache.data)[0, 0].cpu().eq(0x7F).all() and int(plain(cache.data)[1, 0, 63]) == 0x7F
    weight = ones.clone()
    weight[3] = math.nan
    got, _ = norm(provider, device, x, weight)
    assert got[3].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_norm_of_zeros(device: str, provider: Provider, activation: str) -> None:
    """They keep their sign, or take the weight's; so do products too small for the activation's dtype."""
    dtype = ACTIVATIONS[activation]
    x = torch.tensor([[0.0, -0.0, 3.0, -3.0] * 16] * 2).to(dtype)
    x[1, 2::4] = 6e4
    for sign in (1.0, -1.0):
        weight = torch.tensor([1.0, 1.0, 0.0, 1e-42] * 16) * sign
        got, _ = norm(provider, device, x, weight)
        want = torch.stack([normalised(row, weight, EPS) for row in x])
        assert_same_bytes(got, want)
        assert torch.equal(torch.signbit(got[:, :2]), torch.tensor([[sign < 0, sign > 0]] * 2))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-21, 1e-10, 1e10, 1e18])
def test_norm_of_the_smallest_and_the_largest(device: str, provider: Provider, magnitude: float) -> None:
    """Squares and their mean may be subnormal: nothing is flushed to zero."""
    x, weight = vectors(4, 64, torch.float32) * magnitude, torch.ones(64)
    for eps in (0.0, 1e-44, EPS):
        got, _ = norm(provider, device, x, weight, eps)
        want = torch.stack([normalised(row, weight, eps) for row in x])
        assert_same_bytes(got, want, any_nan=True)


@pytest.mark.parametrize("activation", ["bf16", "fp16"])
def test_norm_rounds_once(device: str, provider: Provider, activation: str) -> None:
    """(x * s) * weight stays fp32 until the end, whatever the weight's dtype; then fp8 takes the rounded vector."""
    dtype = ACTIVATIONS[activation]
    x, weight = vectors(16, 512, dtype), vectors(1, 512, torch.float32, 1)[0]
    got, _ = norm(provider, device, x, weight)
    want = torch.stack([normalised(row, weight, EPS) for row in x])
    assert_same_bytes(got, want)
    single = torch.stack([normalised(row, torch.ones(512), EPS) for row in x])
    assert not torch.equal((single.float() * weight).to(dtype), want)
    _, cache = norm(provider, device, x, weight, format="fp8_e4m3fn")
    assert_same_bytes(plain(cache.data)[:, 0].cpu(), fp8_query(want, "fp8_e4m3fn", None))
    unrounded = torch.stack([normalised(row.float(), weight, EPS) for row in x])
    assert not torch.equal(fp8_query(unrounded, "fp8_e4m3fn", None), fp8_query(want, "fp8_e4m3fn", None))


# -------------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn", *PACKED])
@pytest.mark.parametrize("rows", ["full", "padded", "masked", "rotate-masked"])
def test_fused_is_the_chain_of_ops(device: str, provider: Provider, rows: str, format: str) -> None:
    """RoPE and row write by the in-place op, then concat: not one bit differs from doing it at once."""
    p, chain = (make(device, op="decode_prologue", format=format, rows=rows, norm="fp32") for _ in range(2))
    p.run(provider)
    latent = torch.stack([normalised(row, chain.weight, EPS) for row in chain.kv_c]).to(device)
    provider.rope_write_cache_(
        chain.positions, chain.q_pe, chain.k_pe, latent, chain.table, chain.slots, chain.cache,
        is_neox=False, rope_masked=rows == "rotate-masked",
    )  # fmt: skip
    concat = torch.cat([chain.q_nope, chain.q_pe], -1)  # type: ignore[list-item]
    concat[len(chain.slots) :] = 0
    assert_same_bytes(p.q_out, concat)
    assert_same_bytes(p.buffers["cache0"], chain.buffers["cache0"])


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in (1, 2, 17, 133):
            p, want = (
                make(
                    "cpu", op="decode_prologue", tokens=tokens, heads=5, rows="masked", norm="fp32", normalised="apart"
                )
                for _ in range(2)
            )
            p.run(providers.native)
            want.run(providers.reference)
            assert p.differences(want) == []
    finally:
        torch.set_num_threads(before)


def test_default_is_context_parallel(device: str, provider: Provider) -> None:
    """Unlike rope_write_cache_, it rotates masked rows unless told not to."""
    p = prologue(device)
    p.slots[:] = -1
    given = {"q_nope": p.q_nope, "q_pe": p.q_pe}
    got = call(p, provider)
    assert_same_bytes(got, call(p, provider, rope_masked=True))
    assert not torch.equal(got, call(p, provider, rope_masked=False))
    assert_same_bytes(call(p, provider, rope_masked=False), torch.cat([given["q_nope"], given["q_pe"]], -1))  # type: ignore[list-item]


def test_public_function(device: str) -> None:
    p = prologue(device, norm="fp32", normalised="apart")
    want = copy.deepcopy(p)
    latentkv.decode_prologue(
        p.q_nope, p.q_pe, p.kv_c, p.k_pe, p.positions, p.table, p.slots, p.cache, is_neox=False, q_out=p.q_out,
        kv_c_out=p.kv_c_out, kv_norm_weight=p.weight,
    )  # fmt: skip
    want.run(providers.reference)
    assert p.differences(want) == []


# ------------------------------------------------------------------------------------------------ far in memory


@on_gpu
@pytest.mark.parametrize("far", ["tokens", "heads"])
@pytest.mark.parametrize("misaligned", [0, 1])
@pytest.mark.parametrize("split", [False, True])
def test_strides_that_reach_beyond_2_31_elements(split: bool, far: str, misaligned: int) -> None:
    """Rows, or heads, of every tensor lie more than 2^30 elements apart, in one buffer."""
    need(12)
    fields = {"tokens": 3, "split": split, "norm": "fp32", "normalised": "apart", "outputs": "contiguous"}
    p, want = prologue("cuda", **fields), prologue("cuda", **fields)
    step = 2**30 + 64 + misaligned
    buffer = poisoned((2 * step + 8192) * 2, "cuda")
    typed = buffer.view(torch.bfloat16)
    heads = (step, 96, 1) if far == "tokens" else (96, step, 1)
    at = {"q_pe": 0, "q_nope": 512, "q_out": 1024, "q_rope_out": 1536, "k_pe": 2048, "kv_c": 2560, "kv_c_out": 3072}
    views = {}
    for name, offset in at.items():
        own = getattr(want, name)
        if own is not None:
            views[name] = typed.as_strided(own.shape, heads if own.dim() == 3 else (step, 1), offset)
            views[name].copy_(own)
            setattr(p, name, views[name])
    want.positions = p.positions = torch.tensor([2, 0, 1], device="cuda")
    p.run(providers.native)
    want.run(providers.reference)
    for name, view in views.items():
        assert_same_bytes(view, getattr(want, name))
        view.view(torch.int16).fill_(POISON * 0x101 - 0x10000)
    assert_same_bytes(p.buffers["cache0"], want.buffers["cache0"])
    assert all_poison(buffer)


@on_gpu
@pytest.mark.parametrize("kind", [None, "fp8_e4m3fn"])
def test_a_query_beyond_2_31_elements(kind: str | None) -> None:
    """[N, H, L + R] in one piece, larger than 32 bits count; its last rows are padding."""
    tokens, heads, latent, rope = 2**15 + 64, 128, 448, 64
    need(11 if kind else 13)
    nope = torch.randn((1, heads, latent), generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    q_pe = torch.randn((tokens, 1, rope), generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    kv_c = torch.zeros(1, latent, dtype=torch.bfloat16, device="cuda").expand(tokens, latent)
    cache = CacheLayout(latent, rope, 64).allocate(1, "cuda")
    slots = torch.full((tokens - 3,), -1, device="cuda")
    q_dtype = FORMATS[kind].dtype if kind else torch.bfloat16
    out = providers.native.decode_prologue(
        nope.expand(tokens, heads, latent), q_pe.expand(tokens, heads, rope), kv_c, kv_c[:, :rope], None, None, slots,
        cache, is_neox=False, q_dtype=q_dtype,
    )  # fmt: skip
    assert out.numel() > 2**31
    assert plain(out)[-3:].eq(0).all()
    for i in (0, 1, 2**15 - 1, 2**15, tokens - 4):
        want = torch.cat([nope[0].cpu(), q_pe[i].expand(heads, rope).cpu()], -1)
        assert_same_bytes(plain(out)[i].cpu(), fp8_query(want, kind, None) if kind else want)
    wanted = plain(out[0, :, :latent])
    assert all(bool((plain(rows[..., :latent]) == wanted).all()) for rows in out[:-3].split(1024))


@emulated
@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="needs POSIX mmap")
@pytest.mark.parametrize("arch", AMD or ["none"])
@pytest.mark.parametrize("far", ["outer", "inner"])
@pytest.mark.parametrize("misaligned", [0, 1])
@pytest.mark.parametrize("kind", [None, "fp8_e4m3fn"])
def test_strides_beyond_2_32_elements_on_an_emulated_chip(
    kind: str | None, misaligned: int, far: str, arch: str
) -> None:
    """Of every tensor that has rows or heads: the chip raises where an offset cut to 32 bits would lead."""
    fields = {"tokens": 3, "block_size": 3, "query": kind, "norm": "fp32", "normalised": "apart", "split": not kind}
    want = prologue("cpu", **fields)
    want.slots[:] = torch.tensor([8, 0, 4])
    p = copy.deepcopy(want)
    step, near = 2**32 + 4096 + misaligned, 128
    outer_inner = (step, near) if far == "outer" else (near, step)
    changed = ("q_out", "q_rope_out", "kv_c_out")
    for name in ("q_pe", "q_nope", "k_pe", "kv_c", *changed):
        own = getattr(want, name)
        if own is not None:
            setattr(p, name, spread(own, (*outer_inner, 1) if own.dim() == 3 else (step, 1)))
    p.cache = MLACache.wrap([spread(t, (*outer_inner, 1)) for t in want.cache.tensors], p.case.layout, want.cache.scale)
    p.run(amd.provider(arch))
    want.run(providers.reference)
    for name in changed:
        got, own = getattr(p, name), getattr(want, name)
        assert own is None or first_difference(plain(got), plain(own)) is None, name
    assert_same_bytes(plain(p.cache.data), plain(want.cache.data))

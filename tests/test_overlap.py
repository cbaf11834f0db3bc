"""Arguments that share memory: refused where the result would depend on an order, else allowed and right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from calls import BLOCK_SIZE, BLOCKS, H, L, N, R, call_of, mutated, put, refused, run, tensors, valid
from hypothesis import assume, given
from hypothesis import strategies as st
from interpreted import INTERPRETED, TRITON, elsewhere, passes_interpreted
from latentkv import CacheLayout, MLACache, providers
from latentkv.cache.geometry import Span, overlaps_itself, share_bytes
from latentkv.ops.description import OPS
from latentkv.providers import Provider
from torch import Tensor


@elsewhere
def test_interpreted() -> None:
    passes_interpreted(__file__, *TRITON)


def over(call: dict[str, Any], name: str, other: str, at: int) -> None:
    """Puts a tensor into the memory of another, from its byte ``at`` on."""
    a, b = tensors(call)[name], tensors(call)[other]
    size = max(b.untyped_storage().nbytes(), at + a.untyped_storage().nbytes())
    buffer = torch.zeros(size + 16, dtype=torch.uint8, device=a.device)
    for argument, t, offset in ((other, b, 0), (name, a, at)):
        words = buffer[: (size + 16) // t.element_size() * t.element_size()].view(t.dtype)
        put(call, argument, words.as_strided(t.shape, t.stride(), offset // t.element_size()))


def may(op: str, a: str, b: str) -> bool:
    """Whether the two may be one tensor."""
    return {a, b} == {"kv_c", "kv_c_out"} or (
        op == "convert_cache_" and a[:3] != b[:3] and "_s" not in a + b and "_b" not in a + b
    )


@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("op", OPS)
def test_every_pair_of_which_one_is_written(op: str, placement: Any, device: str, provider: Provider) -> None:
    names = list(tensors(call_of(provider, op, device, placement)))
    written = [name for name in names if name.partition("[")[0] in mutated(op)]
    for a, b in itertools.combinations(names, 2):
        if not {a, b} & set(written) or may(op, a, b):
            continue
        call = valid(op, device, placement)
        over(call, a, b, at=0)
        message = refused(provider, op, call)
        assert any(
            f"{x}: expected a tensor that shares no bytes with {y}, got" in message for x, y in ((a, b), (b, a))
        ), message


@pytest.mark.parametrize("op", [op for op in OPS if op != "mla_decode"])
def test_what_is_only_read_may_be_shared(op: str, device: str, provider: Provider) -> None:
    """Of two tensors, neither of which is written: the same bytes as apart."""
    names = list(tensors(call_of(provider, op, device)))
    reads = [name for name in names if name.partition("[")[0] not in mutated(op)]
    for a, b in itertools.combinations(reads, 2):
        call, apart = valid(op, device), valid(op, device)
        if tensors(call)[a].shape != tensors(call)[b].shape or tensors(call)[a].dtype != tensors(call)[b].dtype:
            continue
        put(call, a, tensors(call)[b])
        put(apart, a, tensors(apart)[b].clone())
        run(provider, op, call)
        run(provider, op, apart)
        assert all(torch.equal(t, tensors(apart)[name]) for name, t in tensors(call).items()), (a, b)


def test_the_norm_in_place(device: str, provider: Provider) -> None:
    """kv_c_out is kv_c; but not moved by a row, or by an element."""
    call, apart = valid("decode_prologue", device), valid("decode_prologue", device)
    call["kv_c_out"] = call["kv_c"]
    apart["kv_c_out"].copy_(apart["kv_c"])
    run(provider, "decode_prologue", call)
    run(provider, "decode_prologue", apart)
    assert torch.equal(call["kv_c_out"], apart["kv_c_out"]) and torch.equal(call["cache"], apart["cache"])
    buffer = torch.zeros(N * L + L, dtype=torch.bfloat16, device=device)
    for at in (1, L):
        call = valid("decode_prologue", device)
        call |= {"kv_c": buffer[: N * L].view(N, L), "kv_c_out": buffer[at : at + N * L].view(N, L)}
        assert "kv_c_out: expected a tensor that shares no bytes with kv_c" in refused(
            provider, "decode_prologue", call
        )


def test_slices_of_one_projection(device: str, provider: Provider) -> None:
    """q_pe of a wider q, kv_c and k_pe of one row: no two meet, though their ranges do. One element further they do."""
    for wide, extra in ((L + R, 0), (L + R + 3, 0), (L + R, 1)):
        call, apart = valid("rope_write_cache_", device), valid("rope_write_cache_", device)
        rows = torch.zeros(N, wide, dtype=torch.bfloat16, device=device)
        rows[:, :L], rows[:, L : L + R] = call["kv_c"], call["k_pe"]
        q = torch.zeros(N, H, 5 + R, dtype=torch.bfloat16, device=device)
        q[..., 5:] = call["q_pe"]
        call |= {"kv_c": rows[:, :L], "k_pe": rows[:, L - extra : L + R - extra], "q_pe": q[..., 5:]}
        if extra:
            assert "k_pe: expected a tensor that shares no bytes with kv_c" in refused(
                provider, "rope_write_cache_", call
            )
            continue
        run(provider, "rope_write_cache_", call)
        run(provider, "rope_write_cache_", apart)
        assert all(torch.equal(call[name], apart[name]) for name in ("q_pe", "k_pe", "kv_c", "cache"))


def test_a_key_that_is_a_head_of_the_query(device: str, provider: Provider) -> None:
    call = valid("rope_", device)
    call["k"] = call["q"][:, 1]
    assert "k: expected a tensor that shares no bytes with q" in refused(provider, "rope_", call)
    heads = call["q"]
    call |= {"q": heads[:, :2], "k": heads[:, 2]}  # a head beside those of the query
    run(provider, "rope_", call)


def test_a_conversion_within_one_cache(device: str, provider: Provider) -> None:
    """Blocks that move inside their cache; from one half of a cache to the other."""
    for halves in (False, True):
        cache = CacheLayout(L, R, BLOCK_SIZE).allocate(2 * BLOCKS, device)
        cache.data.copy_(torch.randn(cache.data.shape).bfloat16())
        before = cache.data.clone()
        numbers = torch.tensor([1, 2], device=device), torch.tensor([4, 3], device=device)
        src, dst = cache, cache
        if halves:
            src, dst = (MLACache.wrap(t, cache.layout) for t in cache.data.chunk(2))
            numbers = numbers[0], numbers[1] - BLOCKS
        provider.convert_cache_(src, dst, src_blocks=numbers[0], dst_blocks=numbers[1])
        before[[4, 3]] = before[[1, 2]]
        assert torch.equal(cache.data, before)


# ---------------------------------------------------------------------------------------------------- the geometry


@st.composite
def views(draw: st.DrawFn, dims: int = 3) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset of bytes within 4096; strides nested as those of real tensors are, or any."""
    shape = (*tuple(draw(st.integers(1, 4)) for _ in range(dims - 1)), draw(st.integers(1, 6)))
    if draw(st.booleans()):
        strides = (*tuple(draw(st.integers(0, 48)) for _ in range(dims - 1)), 1)
    else:
        entry = draw(st.integers(shape[-1], shape[-1] + 6))
        strides = (1,)
        for size in shape[-2::-1]:
            strides, entry = (entry, *strides), entry * size + draw(st.sampled_from([0, 0, 1, 5]))
    return shape, strides, draw(st.integers(0, 64))


BUFFER = torch.zeros(4096, dtype=torch.uint8)


def bytes_of(t: Tensor) -> list[int]:
    """The offsets of all elements."""
    steps = (
        range(0, size * stride, stride) if stride else [0] * size
        for size, stride in zip(t.shape, t.stride(), strict=True)
    )
    return [t.storage_offset() + sum(at) for at in itertools.product(*steps)]


@given(views(), views())
def test_sharing_is_never_missed(a: Any, b: Any) -> None:
    x, y = BUFFER.as_strided(*a), BUFFER.as_strided(*b)
    spans = Span.of(x), Span.of(y)
    assert spans[0] is not None and spans[1] is not None
    if set(bytes_of(x)) & set(bytes_of(y)):
        assert share_bytes(*spans) and share_bytes(*spans[::-1])
    assert share_bytes(*spans) == share_bytes(*spans[::-1])


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(0, 70)
)
def test_slices_side_by_side_are_told_apart(
    blocks: int, entries: int, first: int, second: int, gap: int, padding: int
) -> None:
    """By entry and by block, either before the other."""
    row = first + gap + second
    rows = BUFFER.as_strided((blocks, entries, row), (entries * row + padding, row, 1))
    by_entry = rows[..., :first], rows[..., first + gap :]
    block = entries * (first + second) + padding
    by_block = (
        BUFFER.as_strided((blocks, entries, first), (block, first, 1)),
        BUFFER.as_strided((blocks, entries, second), (block, second, 1), entries * first),
    )
    for x, y in (by_entry, by_block):
        assert not share_bytes(Span.of(x), Span.of(y)) and not share_bytes(Span.of(y), Span.of(x))  # type: ignore[arg-type]


@given(views())
def test_a_tensor_that_meets_itself_is_never_missed(view: Any) -> None:
    t = BUFFER.as_strided(*view)
    places = bytes_of(t)
    if len(set(places)) < len(places):
        assert overlaps_itself(t.shape, t.stride())
    if t.is_contiguous():
        assert not overlaps_itself(t.shape, t.stride())


@pytest.mark.skipif(INTERPRETED, reason="of the compiled kernels")
@given(views(), views())
def test_the_compiled_kernels_agree(a: Any, b: Any) -> None:
    """A split cache of bytes, to which nothing is written."""
    shapes = a[0], (*a[0][:2], 2)
    data, rope = BUFFER.as_strided(*a), BUFFER.as_strided(shapes[1], b[1], b[2])
    assume(not overlaps_itself(shapes[0], a[1]) and not overlaps_itself(shapes[1], b[1]))
    kv_c, k_pe = torch.zeros(1, shapes[0][2]), torch.zeros(1, 2)
    arguments = (kv_c, k_pe, torch.zeros(0, dtype=torch.int64), data, rope, None, "fp8_e4m3fn")
    shares = share_bytes(Span.of(data), Span.of(rope))  # type: ignore[arg-type]
    for provider in (providers.native, providers.reference):
        if shares:
            with pytest.raises(RuntimeError, match="rope_cache: expected a tensor that shares no bytes with cache"):
                provider._op("write_cache_")(*arguments)
        else:
            provider._op("write_cache_")(*arguments)


@pytest.mark.skipif(INTERPRETED, reason="of the compiled kernels")
@given(views())
def test_the_compiled_kernels_agree_on_one_tensor(view: Any) -> None:
    q = torch.zeros(4096).as_strided((*view[0][:2], 4), view[1])
    arguments = (torch.zeros(q.shape[0], dtype=torch.int64), q, None, torch.zeros(2, 4), False)
    for provider in (providers.native, providers.reference):
        if overlaps_itself(q.shape, q.stride()):
            with pytest.raises(RuntimeError, match="q: expected elements that do not overlap in memory"):
                provider._op("rope_")(*arguments)
        else:
            provider._op("rope_")(*arguments)

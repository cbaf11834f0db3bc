"""Every check comes before the first write: what raises has written nothing, and says where."""

from __future__ import annotations

from typing import Any

import latentkv
import pytest
import torch
from calls import BLOCKS, L, N, R, T, call_of, memory, refused
from interpreted import TRITON, elsewhere, passes_interpreted
from latentkv import CacheLayout
from latentkv.providers import Provider

CAPACITY = 12


@elsewhere
def test_interpreted() -> None:
    passes_interpreted(__file__, *TRITON)


def looks(device: str, provider: Provider) -> None:
    """Skips where values are not looked at."""
    if device != "cpu" or provider.name.startswith("gfx"):
        pytest.skip("a GPU leaves the row out")


UPDATES = [
    "rope_",
    "write_cache_",
    "rope_write_cache_",
    "decode_prologue",
    "write_cache_grouped_",
    "write_indexer_cache_",
]


@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("op", UPDATES)
def test_the_last_row_of_an_update(op: str, placement: Any, device: str, provider: Provider) -> None:
    looks(device, provider)
    for name, value, expected in (
        ("slot_mapping", CAPACITY, f"slots below the capacity of {CAPACITY}"),
        ("slot_mapping", 2**62, f"slots below the capacity of {CAPACITY}"),
        ("positions", 10, "values in 0 .. 9"),
        ("positions", -1, "values in 0 .. 9"),
        ("positions", -(2**63), "values in 0 .. 9"),
    ):
        call = call_of(provider, op, device, placement)
        if name not in call:
            continue
        row = (N if op == "rope_" else T) - 1
        call[name][row] = value
        message = f"latentkv.{op}: {name}: expected {expected}, got {value} at row {row}"
        assert refused(provider, op, call) == message


@pytest.mark.parametrize(
    ("op", "name", "at", "value", "expected"),
    [
        ("gather_cache", "block_table", (1, 0), BLOCKS, "block numbers in 0 .. 2"),
        ("gather_cache", "block_table", (1, 0), -1, "block numbers in 0 .. 2"),
        ("gather_cache", "seq_starts", (1,), 8, "blocks for token 8 of sequence 1"),
        ("gather_cache", "seq_starts", (1,), 2**63 - 1, f"blocks for token {2**63 - 1} of sequence 1"),
        ("gather_cache", "seq_starts", (1,), -1, "blocks for token -1 of sequence 1"),
        ("gather_cache", "cu_seq_lens", (2,), 6, "at least 6 rows, as cu_seq_lens ends there"),
        ("gather_cache", "cu_seq_lens", (2,), 2**62, f"at least {2**62} rows, as cu_seq_lens ends there"),
        ("gather_cache", "cu_seq_lens", (0,), 1, "rising numbers from 0 on"),
        ("gather_cache", "cu_seq_lens", (1,), 6, "rising numbers from 0 on"),
        ("convert_cache_", "src_blocks", (1,), BLOCKS, "block numbers in 0 .. 2"),
        ("convert_cache_", "dst_blocks", (1,), 2**40, "block numbers in 0 .. 2"),
        ("mla_decode", "seq_lens", (1,), 9, "blocks for token 8 of sequence 1"),
        ("mla_decode", "block_table", (1, 1), BLOCKS, "block numbers in 0 .. 2"),
    ],
)
def test_the_last_block_of_a_table(
    op: str, name: str, at: tuple[int, ...], value: int, expected: str, device: str, provider: Provider
) -> None:
    looks(device, provider)
    call = call_of(provider, op, device)
    call[name][at] = value
    assert f"expected {expected}" in refused(provider, op, call)


# A layer op rotates the rows that have no slot (T..N-1) by another op than the rest.
@pytest.mark.parametrize("slots", [0, 2, N, None])
@pytest.mark.parametrize("key", [(N, R), (N, 1, R)])
@pytest.mark.parametrize(
    ("name", "row", "value"), [("positions", 3, 10), ("positions", 0, -1), ("positions", 1, 2**62), ("slots", 1, 12)]
)
def test_layer_ops(slots: int | None, key: tuple[int, ...], name: str, row: int, value: int) -> None:
    """By the name of the op that was called, and by the row as its caller counts."""
    random = torch.Generator().manual_seed(0)
    x = {
        "positions": torch.arange(N),
        "q_pe": torch.randn(N, 2, R, generator=random),
        "k_pe": torch.randn(key, generator=random),
        "kv_c": torch.randn(N, L, generator=random),
        "cos_sin_cache": torch.rand(10, R, generator=random),
        "slots": torch.arange(slots or 0),
    }
    if name == "slots" and (slots or 0) <= row:
        pytest.skip("no such slot")
    x[name][row] = value
    cache, layer = CacheLayout(L, R, 4, "fp32").allocate(BLOCKS, "cpu"), latentkv.compile.layer_index("half.a")
    before = memory({**x, "cache": cache.data})
    what = "slots below the capacity of 12" if name == "slots" else "values in 0 .. 9"
    argument = "slot_mapping" if name == "slots" else name
    text = rf"^latentkv\.layer_rope_write_cache: {argument}: expected {what}, got {value} at row {row}"
    with (
        latentkv.compile.step({"half.a": cache}, None if slots is None else x["slots"]),
        pytest.raises(RuntimeError, match=text),
    ):
        torch.ops.latentkv.layer_rope_write_cache(*(x[n] for n in list(x)[:5]), False, layer)
    assert memory({**x, "cache": cache.data}) == before


@pytest.mark.parametrize(
    ("name", "spoil", "expected"),
    [
        ("q_pe", lambda t: t[:, 0], "shape \\[N=4, "),
        ("q_pe", lambda t: t[..., :6], "shape \\[N=4, "),
        ("q_pe", lambda t: t.double(), "dtype float32"),
        ("q_pe", lambda t: t[:1].expand(t.shape), "elements that do not overlap"),
        ("k_pe", lambda t: t.half(), "dtype float32"),
        ("positions", lambda t: t[:3], "shape \\[N=4\\]"),
        ("positions", lambda t: t.float(), "dtype int64 or int32"),
        ("cos_sin_cache", lambda t: t[:, :6], "shape \\[max_position, R=8\\]"),
        ("cos_sin_cache", lambda t: t.double(), "dtype bfloat16 or float16 or float32"),
        ("kv_c", lambda t: t[:3], "shape \\[N=3"),
    ],
)
@pytest.mark.parametrize("slots", [2, N])
def test_layer_ops_with_bad_arguments(name: str, spoil: Any, expected: str, slots: int) -> None:
    x = {
        **{"positions": torch.arange(N), "q_pe": torch.ones(N, 2, R), "k_pe": torch.ones(N, R)},
        **{"kv_c": torch.ones(N, L), "cos_sin_cache": torch.rand(10, R)},
    }
    x[name] = spoil(x[name])
    cache, layer = CacheLayout(L, R, 4, "fp32").allocate(BLOCKS, "cpu"), latentkv.compile.layer_index("half.b")
    before = memory({**x, "cache": cache.data})
    with (
        latentkv.compile.step({"half.b": cache}, torch.arange(slots)),
        pytest.raises(RuntimeError, match=rf"^latentkv\.layer_rope_write_cache: \w+: expected {expected}"),
    ):
        torch.ops.latentkv.layer_rope_write_cache(*x.values(), False, layer)
    assert memory({**x, "cache": cache.data}) == before

"""vLLM's names: what goes wrong in them comes under the name of the function that was called, and of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import BLOCK_SIZE, BLOCKS, H, L, N, R, T, memory
from latentkv import CacheLayout
from latentkv.compat import vllm
from torch import Tensor

FUNCTIONS = {
    "concat_and_cache_mla_rope_fused": (
        *("positions", "q_pe", "k_pe", "kv_c", "cos_sin_cache", "is_neox", "slot_mapping", "kv_cache"),
        *("kv_cache_dtype", "kv_cache_scale"),
    ),
    "concat_and_cache_mla": ("kv_c", "k_pe", "kv_cache", "slot_mapping", "kv_cache_dtype", "scale"),
    "rotary_embedding": ("positions", "query", "key", "head_size", "cos_sin_cache", "is_neox"),
}
WRITING = tuple(FUNCTIONS)[:2]


def valid(name: str, device: str) -> dict[str, Any]:
    call: dict[str, Any] = {
        "positions": torch.arange(N, device=device),
        "q_pe": torch.randn(N, H, R, device=device).bfloat16(),
        "k_pe": torch.randn(N, R, device=device).bfloat16(),
        "kv_c": torch.randn(N, L, device=device).bfloat16(),
        "query": torch.randn(N, H * R, device=device).bfloat16(),
        "key": torch.randn(N, R, device=device).bfloat16(),
        "cos_sin_cache": torch.rand(10, R, device=device),
        "slot_mapping": torch.arange(T, device=device),
        "kv_cache": CacheLayout(L, R, BLOCK_SIZE).allocate(BLOCKS, device).data,
        "kv_cache_scale": torch.ones(1, device=device),
        "scale": torch.ones(1, device=device),
        "kv_cache_dtype": "auto",
        "is_neox": False,
        "head_size": R,
    }
    return {argument: call[argument] for argument in FUNCTIONS[name]}


def refused(name: str, call: dict[str, Any]) -> str:
    before = memory(call)
    with pytest.raises(RuntimeError) as error:
        getattr(vllm, name)(**call)
    assert memory(call) == before
    message = str(error.value).splitlines()[0]
    assert message.startswith(f"latentkv.{name}: "), message
    return message.removeprefix(f"latentkv.{name}: ")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_valid_call_is_valid(name: str, device: str) -> None:
    call = valid(name, device)
    before = memory(call)
    getattr(vllm, name)(**call)
    assert memory(call) != before
    torch.compile(getattr(vllm, name), fullgraph=True, backend="aot_eager")(**call)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name: str, device: str) -> None:
    for argument, value in valid(name, device).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            call = valid(name, device)
            call[argument].requires_grad_()
            message = refused(name, call)
            assert message.startswith(f"{argument}: expected a tensor without gradient"), message
            with torch.no_grad():
                getattr(vllm, name)(**call)


@pytest.mark.parametrize("name", WRITING)
def test_widths(name: str, device: str) -> None:
    """A cache of vLLM says nothing but how wide a row is; and a latent vector is longer than a key."""
    for latent, rope in ((R, L), (L - 2, R), (L + 2, R), (L, R - 2), (L, R + 2), (L, 0)):
        call = valid(name, device)
        for argument, shape in (("kv_c", (N, latent)), ("k_pe", (N, rope)), ("q_pe", (N, H, rope))):
            if argument in call:
                call[argument] = call[argument].new_ones(shape)
        if "cos_sin_cache" in call:
            call["cos_sin_cache"] = torch.rand(10, rope, device=device)
        assert refused(name, call).startswith("kv_c: expected a latent" if latent < rope else "kv_cache: expected rows")


@pytest.mark.parametrize(
    ("name", "argument", "spoil", "message"),
    [
        ("concat_and_cache_mla", "scale", lambda t: t.double(), "scale: expected dtype float32"),
        ("concat_and_cache_mla_rope_fused", "kv_cache_scale", lambda t: t.double(), "kv_cache_scale: expected dtype"),
        *((name, "kv_cache", lambda t: t.half(), "kv_cache: expected dtype bfloat16") for name in WRITING),
        *((name, "slot_mapping", lambda t: t + 10, "slot_mapping: expected slots below") for name in WRITING),
        ("rotary_embedding", "query", lambda t: t.double(), "query: expected dtype bfloat16"),
        ("rotary_embedding", "query", lambda t: t[:, 1:], "query: expected shape [N, heads * 8] or [N, heads, 8]"),
        ("rotary_embedding", "query", lambda t: t[:1].expand(t.shape), "query: expected elements that do not overlap"),
        ("rotary_embedding", "key", lambda t: t[:3], "key: expected shape [N=4"),
        ("rotary_embedding", "head_size", lambda _: R - 1, "head_size: expected at least rope_dim_offset + R = 8"),
        ("rotary_embedding", "positions", lambda t: t + 9, "positions: expected values in 0 .. 9, got 10 at row 1"),
    ],
)
def test_names(name: str, argument: str, spoil: Callable[[Any], Any], message: str) -> None:
    call = valid(name, "cpu")
    call[argument] = spoil(call[argument])
    assert refused(name, call).startswith(message)


def test_overlap(device: str) -> None:
    call = valid("rotary_embedding", device)
    call["key"] = call["query"][:, :R]
    assert refused("rotary_embedding", call).startswith("key: expected a tensor that shares no bytes with query, got")
    for name in WRITING:
        call = valid(name, device)
        call["kv_c"] = call["kv_cache"].view(-1, L + R)[:N, :L]
        assert refused(name, call).startswith("kv_cache: expected a tensor that shares no bytes with kv_c, got")

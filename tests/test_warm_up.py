"""Within a warm-up no op writes anything, whoever serves; outside of it all is as before."""

from __future__ import annotations

import threading

import latentkv
import pytest
import torch
from calls import BLOCKS, L, R, call_of, memory, valid
from interpreted import TRITON, elsewhere, passes_interpreted
from latentkv import CacheLayout, providers
from latentkv.compat import vllm
from latentkv.ops.description import OPS
from latentkv.providers import Provider


@elsewhere
def test_interpreted() -> None:
    passes_interpreted(__file__, *TRITON)


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_written(op: str, device: str, provider: Provider) -> None:
    """Nor looked at."""
    call = call_of(provider, op, device)
    for name in ("slot_mapping", "positions", "block_table", "src_blocks", "seq_lens"):
        if name in call:
            call[name].fill_(10**6)
    before = memory(call)
    with providers.warm_up():
        results = provider._call(op, *call.values())
    assert memory(call) == before
    assert [t.shape for t in results or ()] == ([(2, 3, L), (2, 3)] if op == "mla_decode" else [])
    call = valid(op, device)
    before = memory(call)
    results = provider._call(op, *call.values())
    assert results or memory(call) != before


@pytest.mark.parametrize("op", OPS)
def test_the_public_ops(op: str, device: str) -> None:
    call = valid(op, device)
    before = memory(call)
    with providers.warm_up():
        providers.public._call(op, *call.values())
    assert memory(call) == before


def test_what_is_made_of_the_ops(device: str) -> None:
    cache, layer = CacheLayout(L, R, 4).allocate(BLOCKS, device), latentkv.compile.layer_index("warm.a")
    call = valid("rope_write_cache_", device)
    rows = [call[name] for name in ("positions", "q_pe", "k_pe", "kv_c", "cos_sin_cache")]
    before = memory({**call, "cache": cache.data})
    with providers.warm_up(), latentkv.compile.step({"warm.a": cache}, call["slot_mapping"]):
        torch.ops.latentkv.layer_rope_write_cache(*rows, False, layer)
        torch.ops.latentkv.layer_write_cache(call["kv_c"], call["k_pe"], layer)
        vllm.concat_and_cache_mla(call["kv_c"], call["k_pe"], cache.data, call["slot_mapping"], "auto", torch.ones(1))
        vllm.rotary_embedding(call["positions"], call["q_pe"], call["k_pe"], R, call["cos_sin_cache"], False)
        out = latentkv.gather_cache(cache, torch.zeros(1, 1).long(), torch.tensor([0, 2]), total=2)
    assert memory({**call, "cache": cache.data}) == before and out.shape == (2, L + R)


def test_another_thread_goes_on(device: str) -> None:
    call = valid("rope_", device)
    before = call["q"].clone()
    with providers.warm_up():
        thread = threading.Thread(target=lambda: providers.public._call("rope_", *call.values()))
        thread.start()
        thread.join()
    assert not torch.equal(call["q"], before)


def test_it_ends_with_an_error(device: str) -> None:
    call = valid("rope_", device)
    before = call["q"].clone()
    with pytest.raises(KeyError), providers.warm_up():
        raise KeyError
    providers.public._call("rope_", *call.values())
    assert not torch.equal(call["q"], before)

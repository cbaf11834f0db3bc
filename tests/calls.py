"""A valid call of every op, on plain tensors in the order of its schema, for tests to spoil."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latentkv import CacheLayout
from latentkv.cache.layouts import FORMATS, Placement
from latentkv.ops.description import OPS
from latentkv.providers import Provider
from torch import Tensor

N, H, L, R, T, G, BLOCKS, BLOCK_SIZE, MAX_POSITION = 4, 3, 16, 8, 3, 2, 3, 4, 10
Call = dict[str, Any]


def valid(op: str, device: str = "cpu", placement: Placement = "concat", format: str = "bf16") -> Call:
    """Its arguments by name. Of a split cache, the prologue's query is in two tensors too."""
    packed, split = FORMATS[format].packed, placement == "split"
    latent, rope = packed.dims if packed else (L, R)
    random = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).bfloat16().to(device)

    def numbers(*rows: Any) -> Tensor:
        return torch.tensor(rows, device=device)

    layout = CacheLayout(latent, rope, BLOCK_SIZE, format, placement)
    caches = [layout.allocate(BLOCKS, device, 0.5) for _ in range(G)]
    ropes = [cache.rope_data for cache in caches if cache.rope_data is not None]
    scales = [numbers(0.5 + i) for i in range(G)]
    call: Call = {
        **{
            "positions": torch.arange(N, device=device),
            "cos_sin_cache": torch.rand(MAX_POSITION, rope, generator=random).to(device),
        },
        **{"q": values(N, H, rope), "k": values(N, 2, rope), "q_pe": values(N, H, rope), "k_pe": values(N, rope)},
        **{"kv_c": values(N, latent), "q_nope": values(N, H, latent), "slot_mapping": torch.arange(T, device=device)},
        **{"cache": caches[0].data, "rope_cache": caches[0].rope_data, "scale": scales[0], "format": format},
        **{"caches": [cache.data for cache in caches], "rope_caches": ropes, "scales": scales},
        **{"src": caches[0].data, "src_rope": caches[0].rope_data, "src_scale": scales[0], "src_format": format},
        **{"dst": caches[1].data, "dst_rope": caches[1].rope_data, "dst_scale": scales[1], "dst_format": format},
        **{"src_blocks": numbers(0, 1), "dst_blocks": numbers(2, 0)},
        **{
            "q_out": values(N, H, latent if split else latent + rope),
            "q_rope_out": values(N, H, rope) if split else None,
        },
        **{"kv_c_out": values(N, latent), "q_scale": numbers(0.25), "kv_norm_weight": values(latent)},
        **{"block_table": numbers([0, 1], [2, 0]), "cu_seq_lens": numbers(0, 3, 5), "seq_starts": numbers(0, 1)},
        **{"out": values(5, latent + rope), "seq_lens": numbers(3, 6)},
        **{"is_neox": False, "inverse": False, "rope_masked": False, "power_of_two_scale": False},
        **{"kv_norm_eps": 1e-6, "sm_scale": 0.5, "kv_lora_rank": latent, "rope_dim": rope},
    }
    if op == "write_cache_grouped_":
        call |= {"kv_c": [values(N, latent) for _ in range(G)], "k_pe": [values(N, rope) for _ in range(G)]}
    elif op == "write_indexer_cache_":
        cache = torch.zeros(BLOCKS, BLOCK_SIZE, 132, dtype=torch.uint8, device=device)
        call |= {"k": values(N, 128), "cache": cache}
    elif op == "mla_decode":
        call["q"] = values(2, H, latent + rope)
    for name in ("cache", "src"):  # what is read
        if op in ("gather_cache", "convert_cache_", "mla_decode") and format == "bf16":
            for part in (call[name], call["rope_cache"]):
                if part is not None:
                    part.copy_(values(*part.shape))
    return {argument.name: call[argument.name] for argument in OPS[op].plain}


def tensors(call: Call) -> dict[str, Tensor]:
    """Its tensors by name, those of lists as ``kv_c[1]``."""
    found = {}
    for name, value in call.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, list):
            found |= {f"{name}[{i}]": t for i, t in enumerate(value) if isinstance(t, Tensor)}
    return found


def put(call: Call, name: str, value: object) -> None:
    """Sets an argument, or an entry of a list."""
    name, _, index = name.rstrip("]").partition("[")
    if index:
        call[name] = [*call[name][: int(index)], value, *call[name][int(index) + 1 :]]
    else:
        call[name] = value


def mutated(op: str) -> list[str]:
    """The names of the arguments that an op writes, as the schema has them."""
    return [argument.name for argument in OPS[op].plain if "!" in argument.type]


def memory(call: Call) -> list[bytes]:
    """All bytes of all storages."""
    storages = [t.untyped_storage().cpu() for t in tensors(call).values()]
    return [torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes() for storage in storages]


def run(provider: Provider, op: str, call: Call) -> Any:
    """The op on plain tensors."""
    return provider._op(op)(*call.values())


def refused(provider: Provider, op: str, call: Call) -> str:
    """The message with which a call is refused, after which everything is as it was."""
    before = memory(call)
    with pytest.raises(RuntimeError) as error:
        run(provider, op, call)
    assert memory(call) == before
    message = str(error.value).splitlines()[0]
    assert message.startswith(f"latentkv.{op}: "), message
    return message


def call_of(provider: Provider, op: str, device: str, placement: Placement = "concat") -> Call:
    """A valid call of an op that the provider has; the test is skipped where it has not."""
    if not provider.has(op):
        pytest.skip(f"{provider.name} has no {op}")
    return valid(op, device, placement)

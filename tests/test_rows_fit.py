"""The layout of a cache decides how wide its rows are: whatever else comes is refused, and never written."""

from __future__ import annotations

import re
from typing import Any

import latentkv
import pytest
import torch
from calls import BLOCK_SIZE, BLOCKS, H, L, N, R, T, memory, refused, valid
from interpreted import TRITON, elsewhere, passes_interpreted
from latentkv import CacheLayout, MLACache
from latentkv.providers import Provider
from torch import Tensor

# Exchanged; the same sum; one of them wider or narrower.
WIDTHS = [(R, L), (L - 2, R + 2), (L + 2, R - 2), (L - 2, R), (L + 2, R), (L, R - 2), (L, R + 2), (L, 0)]
WRITING = ["write_cache_", "rope_write_cache_", "decode_prologue", "write_cache_grouped_"]
LAYOUTS = [
    CacheLayout(L, R, BLOCK_SIZE),
    CacheLayout(L, R, BLOCK_SIZE, placement="split"),
    CacheLayout(L, R, BLOCK_SIZE, "fp8_e4m3fn"),
    CacheLayout(L, R, BLOCK_SIZE, "fp8_e5m2", "split"),
]
PACKED = [CacheLayout(512, 64, BLOCK_SIZE, "fp8_ds_mla"), CacheLayout(448, 64, BLOCK_SIZE, "fp8_model1")]


@elsewhere
def test_interpreted() -> None:
    passes_interpreted(__file__, *TRITON)


def rows(device: str, latent: int, rope: int) -> dict[str, Tensor]:
    """Activations of other widths, all of which agree with one another."""
    return {
        "kv_c": torch.randn(N, latent, device=device).bfloat16(),
        "k_pe": torch.randn(N, rope, device=device).bfloat16(),
        "q_pe": torch.randn(N, H, rope, device=device).bfloat16(),
        "q_nope": torch.randn(N, H, latent, device=device).bfloat16(),
        "table": torch.rand(10, rope, device=device),
        "positions": torch.arange(N, device=device),
        "slots": torch.arange(T, device=device),
    }


def write(provider: Any, op: str, x: dict[str, Tensor], caches: list[MLACache]) -> None:
    """A writing op on rows and caches."""
    kv_c, k_pe, q_pe, slots = x["kv_c"], x["k_pe"], x["q_pe"], x["slots"]
    if op == "write_cache_":
        provider.write_cache_(kv_c, k_pe, slots, caches[0])
    elif op == "rope_write_cache_":
        provider.rope_write_cache_(x["positions"], q_pe, k_pe, kv_c, x["table"], slots, caches[0], is_neox=False)
    elif op == "decode_prologue":
        provider.decode_prologue(
            x["q_nope"], q_pe, kv_c, k_pe, x["positions"], x["table"], slots, caches[0], is_neox=False
        )
    else:
        provider.write_cache_grouped_([kv_c, kv_c], [k_pe, k_pe], slots, caches)


def unchanged(x: dict[str, Tensor], caches: list[MLACache]) -> list[bytes]:
    return memory({**x, "caches": [t for cache in caches for t in cache.tensors]})


@pytest.mark.parametrize("layout", [*LAYOUTS, *PACKED], ids=str)
@pytest.mark.parametrize("op", WRITING)
def test_rows_of_other_widths(op: str, layout: CacheLayout, device: str, provider: Provider) -> None:
    """Also in a cache whose tensors are wider than a row, where they would find room."""
    own = layout.kv_lora_rank, layout.rope_dim
    for latent, rope in [own[::-1], *((own[0] + a - L, own[1] + b - R) for a, b in WIDTHS[1:])]:
        for by in (0, 8) if layout.packed is None else (0,):
            shapes = [(*shape[:2], shape[2] + by) for shape in layout.shapes(BLOCKS)]
            caches = [layout.allocate(BLOCKS, device) for _ in range(2)]
            if by:
                caches = [
                    MLACache.wrap([t.new_zeros(s) for t, s in zip(c.tensors, shapes, strict=True)], layout)
                    for c in caches
                ]
            x = rows(device, latent, rope)
            before = unchanged(x, caches)
            with pytest.raises(RuntimeError, match=rf"^latentkv\.{op}: (kv_c|k_pe|q_pe|q_nope)(\[0\])?: expected"):
                write(provider, op, x, caches)
            assert unchanged(x, caches) == before


@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("op", WRITING)
def test_plain_tensors_of_other_widths(op: str, placement: Any, device: str, provider: Provider) -> None:
    """Without L and R the rows must fill the cache. Of two exchanged in one row nothing could be told."""
    for latent, rope in WIDTHS[0 if placement == "split" else 3 :]:
        call = valid(op, device, placement) | {"kv_lora_rank": None, "rope_dim": None}
        x = rows(device, latent, rope)
        for name, value in (("kv_c", x["kv_c"]), ("k_pe", x["k_pe"])):
            call[name] = [value.clone() for _ in call[name]] if isinstance(call[name], list) else value
        call |= {name: value for name, value in (("q_pe", x["q_pe"]), ("cos_sin_cache", x["table"])) if name in call}
        if op == "decode_prologue":
            outs = {"q_out": x["q_nope"].new_zeros(N, H, latent + (rope if placement == "concat" else 0))}
            outs |= {"kv_c_out": x["kv_c"].clone(), "kv_norm_weight": x["kv_c"][0].clone(), "q_nope": x["q_nope"]}
            call |= outs | ({"q_rope_out": x["q_pe"].clone()} if placement == "split" else {})
        message = refused(provider, op, call)
        assert "cache" in message.split(": ")[1] and "expected rows of" in message, message


@pytest.mark.parametrize("op", WRITING)
def test_sizes_that_are_given_decide(op: str, device: str, provider: Provider) -> None:
    for sizes, name in (
        ({"kv_lora_rank": R, "rope_dim": L}, "(kv_c|k_pe|q_pe)"),
        ({"kv_lora_rank": L - 2, "rope_dim": R + 2}, "(kv_c|k_pe|q_pe)"),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"kv_lora_rank": -L}, "kv_lora_rank"),
        ({"rope_dim": -R}, "rope_dim"),
    ):
        message = refused(provider, op, valid(op, device) | sizes)
        assert re.match(rf"latentkv\.{op}: {name}(\[0\])?: expected", message), message


@pytest.mark.parametrize("placement", ["concat", "split"])
def test_what_a_gather_fills(placement: Any, device: str, provider: Provider) -> None:
    for shape in ((5, L + R - 2), (5, L + R + 2), (5, L), (5, R), (5,), (1, 5, L + R)):
        call = valid("gather_cache", device, placement)
        call["out"] = call["out"].new_zeros(shape)
        text = f"expected shape [total, L + R={L + R}], got {list(shape)}"
        assert refused(provider, "gather_cache", call) == f"latentkv.gather_cache: out: {text}"
    for sizes in ({"kv_lora_rank": L + 2}, {"rope_dim": R + 2}, {"rope_dim": R - 2}, {"kv_lora_rank": 0}):
        refused(provider, "gather_cache", valid("gather_cache", device, placement) | sizes)


def test_what_attention_reads(device: str, provider: Provider) -> None:
    if not provider.has("mla_decode"):
        pytest.skip("native has none")
    for shape in ((2, H, L + R - 2), (2, H, L + R + 2), (2, H, L), (2, L + R), (2, H, 1, L + R)):
        call = valid("mla_decode", device)
        call["q"] = call["q"].new_zeros(shape)
        message = refused(provider, "mla_decode", call)
        assert message.startswith(f"latentkv.mla_decode: q: expected shape [B, H, L + R={L + R}]"), message
    for name, shape in (("block_table", (3, 2)), ("block_table", (2,)), ("seq_lens", (3,)), ("seq_lens", (2, 1))):
        call = valid("mla_decode", device)
        call[name] = call[name].new_zeros(shape)
        assert f"{name}: expected shape [B=2" in refused(provider, "mla_decode", call)


@pytest.mark.parametrize("placement", ["concat", "split"])
def test_caches_of_a_conversion(placement: Any, device: str, provider: Provider) -> None:
    for latent, rope in WIDTHS[:-1]:
        layouts = [CacheLayout(*dims, BLOCK_SIZE, "bf16", placement) for dims in ((L, R), (latent, rope))]
        caches = [layout.allocate(2, device) for layout in layouts]
        for src, dst in (caches, caches[::-1]):
            with pytest.raises(RuntimeError, match=r"latentkv\.convert_cache_: dst: expected \(L, R\)=.*, as src has"):
                provider.convert_cache_(src, dst)
    for sizes in ({"kv_lora_rank": L + 2}, {"rope_dim": R + 2}, {"kv_lora_rank": 0}):
        refused(provider, "convert_cache_", valid("convert_cache_", device, placement) | sizes)


# -------------------------------------------------------------------------------------------- what is made of the ops


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", ["layer_write_cache", "layer_rope_write_cache"])
def test_layer_ops(op: str, layout: CacheLayout, device: str) -> None:
    """The message names the op that was called."""
    for latent, rope in WIDTHS:
        x, cache = rows(device, latent, rope), layout.allocate(BLOCKS, device)
        before, layer = unchanged(x, [cache]), latentkv.compile.layer_index("rows.a")
        arguments = [x[name] for name in ("positions", "q_pe", "k_pe", "kv_c", "table")] + [False, layer]
        if op == "layer_write_cache":
            arguments = [x["kv_c"], x["k_pe"], layer]
        with (
            latentkv.compile.step({"rows.a": cache}, x["slots"]),
            pytest.raises(RuntimeError, match=rf"^latentkv\.{op}: (kv_c|k_pe|q_pe|cos_sin_cache): expected"),
        ):
            getattr(torch.ops.latentkv, op)(*arguments)
        assert unchanged(x, [cache]) == before

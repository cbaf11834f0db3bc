"""The fusion pass on real attention layers: the same bits with the pass off and on, eager and compiled.

On a GPU the compiled layers run in CUDA graphs. Where a cache is found by its layer its format is no part of the graph,
so one graph serves them all; every batch there has a size of its own, so that its CUDA graph is its own too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import engine_ops
import latentkv as lk
import pytest
import torch
from latentkv.models import Model, model
from latentkv.testing import assert_same_bytes
from latentkv.testing.mla import Batch, MLAAttention, forward_context
from torch import Tensor
from torch._dynamo.utils import counters

HIDDEN, BLOCK_SIZE, BLOCKS = 64, 16, 64
V2_LITE, V3 = model("deepseek-v2-lite"), model("deepseek-v3")
FORMATS = ("bf16", "fp8_e4m3fn")
STYLES = ("op", "pytorch", "pytorch_cat")
Layers = dict[str, MLAAttention]
Caches = Mapping[str, lk.MLACache]
Outputs = list[Tensor]
# pytest listens to a logger that does not propagate, and torch then dumps every graph into it.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    """Every graph meets the pass, and bf16 is rounded where eager PyTorch rounds it. Compiled kernels may be reused."""
    torch.compiler.reset()
    counters.clear()
    with (
        torch._inductor.config.patch(fx_graph_cache=False, emulate_precision_casts=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch.no_grad(),
    ):
        yield
    torch.compiler.reset()


@contextmanager
def fusion(sites: int) -> Iterator[None]:
    """Off for 0 sites. Else the pass is on, sees so many, and fuses them all."""
    if sites == 0:
        yield
        return
    with lk.compile.enable(strict=True) as fusion:
        yield
    assert len(fusion.report.fused) == sites and not fusion.report.unfused, str(fusion.report)


def compiled(function: Callable[..., Any], device: str) -> Any:
    return torch.compile(function, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)


def graphs() -> int:
    """So many has Dynamo captured in this test."""
    return counters["stats"]["unique_graphs"]


# ------------------------------------------------------------------------------------------- layers and their inputs


class Stack(torch.nn.Module):
    """Layers one after the other; gives their rotated q and k_pe too."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers.values())

    def forward(self, hidden: Tensor, positions: Tensor, slot_mapping: Tensor | None, prefill: bool) -> Outputs:
        outputs = []
        for layer in self.layers:
            q, kv_c, k_pe = layer.project(hidden)
            q, k_pe, written = layer.update(positions, q, k_pe, kv_c, slot_mapping)
            hidden = hidden + layer.attend(q, kv_c, k_pe, written, prefill)
            outputs += [q, k_pe]
        return [hidden, *outputs]


@cache
def table(m: Model, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return lk.build_cos_sin_cache(m.rope, max_position_embeddings=256, device=device, dtype=dtype)


def new_layer(name: str, m: Model, device: str, **options: Any) -> MLAAttention:
    options = {"hidden_size": HIDDEN, "heads": 2, "v_dim": 32, "q_lora_rank": 32 if m is V3 else None} | options
    return MLAAttention(name, m, table(m, device), **options)


def new_layers(device: str, *styles: str) -> Layers:
    """For each style a layer of both models, one in GPT-J's and one in NeoX order."""
    kinds = [(style, m) for style in styles for m in (V2_LITE, V3)]
    names = [f"{style}.{m.name}" for style, m in kinds]
    return {
        name: new_layer(name, m, device, style=style, is_neox=m is V3, seed=seed)
        for seed, (name, (style, m)) in enumerate(zip(names, kinds, strict=True))
    }


def fused_by_hand(layers: Layers) -> Layers:
    """The same layers, with the fused op called by hand."""
    twins = {}
    for name, layer in layers.items():
        twins[name] = twin = MLAAttention.__new__(MLAAttention)
        twin.__dict__ = layer.__dict__ | {"style": "fused", "cache": None}
    return twins


def new_cache(format: str, device: str) -> lk.MLACache:
    return lk.CacheLayout(512, 64, BLOCK_SIZE, format).allocate(BLOCKS, device, scale=0.05)


def new_batch(rows: int, prefill: bool, device: str) -> Batch:
    """So many tokens: two sequences' prompts, or the next tokens of sequences of many lengths."""
    lengths = [rows // 2, rows - rows // 2] if prefill else [1 + 11 * i % 90 for i in range(rows)]
    per = BLOCKS // len(lengths)
    blocks = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(rows))[: len(lengths) * per]
    return Batch.of(lengths, lengths if prefill else [1] * rows, blocks.view(-1, per).to(device), BLOCK_SIZE)


def with_masked_rows(batch: Batch) -> Batch:
    """Row 1 lives on another rank, and the last row is padding: the slot mapping is shorter than the batch."""
    slots = batch.slot_mapping.clone()
    slots[1] = -1
    return replace(batch, slot_mapping=slots[:-1])


def run(stack: Callable[..., Outputs], caches: Caches, batch: Batch, prefill: bool, direct: bool = False) -> Outputs:
    """What the layers give and what then lies in the caches; on a GPU the replay of a CUDA graph."""
    device, generator = batch.positions.device, torch.Generator().manual_seed(len(batch.positions))
    hidden = torch.randn(len(batch.positions), HIDDEN, generator=generator).bfloat16().to(device)
    for t in (hidden, batch.positions, batch.slot_mapping):  # N is the only dynamic size, as in engines
        torch._dynamo.mark_dynamic(t, 0)
    for _ in range(3 if device.type == "cuda" else 1):  # the first call warms up, the second captures
        with forward_context(caches, batch):
            outputs = stack(hidden, batch.positions, batch.slot_mapping if direct else None, prefill)
            outputs = [t.clone() for t in outputs]
    return outputs + [cache.data.clone() for cache in caches.values()]


def assert_same(got: Outputs, want: Outputs) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert_same_bytes(a, b)


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
def test_eager_styles_give_the_bits_of_the_fused_op(device: str, prefill: bool, format: str) -> None:
    layers, batch = new_layers(device, *STYLES), with_masked_rows(new_batch(6, prefill, device))
    new_caches = partial(dict.fromkeys, layers)
    want, got = (
        run(Stack(each), {name: new_cache(format, device) for name in new_caches()}, batch, prefill)
        for each in (fused_by_hand(layers), layers)
    )
    assert_same(got, want)
    assert all(data.view(torch.uint8).any() for data in want[-len(layers) :])


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
def test_layers_of_one_graph(device: str, prefill: bool) -> None:
    """All styles in both, each model in turn: every style meets every model in one of them."""
    layers = new_layers(device, *STYLES)
    layers, results = {name: layers[name] for i, name in enumerate(layers) if (i + i // 2) % 2 == prefill}, {}
    for sites in (0, len(layers)):
        torch.compiler.reset()
        counters.clear()
        stack, results[sites] = compiled(Stack(layers), device), []
        with fusion(sites):
            for i, rows in enumerate((6, 9, 4, 7)):
                caches = {name: new_cache(FORMATS[i % 2], device) for name in layers}
                results[sites] += run(stack, caches, with_masked_rows(new_batch(rows, prefill, device)), prefill)
        assert graphs() == 1  # for four sizes, two formats
    assert_same(results[len(layers)], results[0])


def test_cache_as_an_argument(device: str) -> None:
    assert engine_ops.STAND_INS  # imported for vLLM's ops
    layers, caches, batch = {}, {}, new_batch(6, False, device)
    for style in ("direct", "vllm"):
        for format in FORMATS:
            name, cache = f"{style}.{format}", new_cache(format, device)
            caches[name] = lk.MLACache.wrap(
                cache.data.view(torch.uint8) if format != "bf16" else cache.data, cache.layout, cache.scale
            )
            layers[name] = new_layer(name, V2_LITE, device, style=style, cache=caches[name])
            # With a table in 16 bits vLLM's rope rounds as ours does.
            layers[name].cos_sin_cache = table(V2_LITE, device, torch.bfloat16)

    def result(stack: Callable[..., Outputs]) -> Outputs:
        for cache in caches.values():
            cache.data.zero_()
        return run(stack, caches, batch, False, direct=True)

    assert_same(result(Stack(layers)), result(Stack(fused_by_hand(layers))))
    off = result(compiled(Stack(layers), device))
    torch.compiler.reset()
    with fusion(len(layers)):
        assert_same(result(compiled(Stack(layers), device)), off)


@pytest.mark.parametrize("style", ["op", "pytorch"])
def test_all_heads_of_deepseek_v3(device: str, style: str) -> None:
    layer, results = new_layer("l", V3, device, style=style, heads=128, v_dim=128), {}
    for sites in (0, 1):
        torch.compiler.reset()
        with fusion(sites):
            stack = compiled(Stack({"l": layer}), device)
            results[sites] = run(stack, {"l": new_cache("bf16", device)}, new_batch(3, False, device), False)
    assert_same(results[1], results[0])


@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
def test_layers_compiled_one_by_one_share_their_graphs(device: str) -> None:
    names, results, batch = [f"layers.{i}" for i in range(5)], {}, new_batch(6, False, device)
    layers = [new_layer(name, V2_LITE, device, seed=i) for i, name in enumerate(names)]
    for on in (False, True):
        torch.compiler.reset()
        counters.clear()
        caches = {name: new_cache("bf16", device) for name in names}
        calls = [compiled(layer, device) for layer in layers]

        def one_by_one(hidden: Tensor, positions: Tensor, *_: Any, calls: list[Any] = calls) -> Outputs:
            outputs = [hidden]
            for call in calls:
                outputs.append(outputs[-1] + call(outputs[-1], positions).clone())
            return outputs

        with fusion(2 if on else 0):  # the first layer's own graph, and one for all others
            results[on] = run(one_by_one, caches, batch, False)
        assert graphs() == 2
    assert_same(results[True], results[False])


def test_decode_agrees_with_prefill(device: str) -> None:
    """The last tokens' outputs: absorbed, from the cache, and expanded, among their prompts."""
    layer = new_layer("l", V3, device, dtype=torch.float32, is_neox=False)
    cache = lk.CacheLayout(512, 64, BLOCK_SIZE, "fp32").allocate(BLOCKS, device)
    lengths, blocks = (5, 37), torch.randperm(BLOCKS)[:6].view(2, 3).to(device)
    hidden = torch.randn(sum(lengths), HIDDEN, generator=torch.Generator().manual_seed(0)).to(device)
    last, outputs = torch.tensor(lengths).cumsum(0) - 1, []
    for new, x in ((lengths, hidden), ((1, 1), hidden[last])):
        batch = Batch.of(lengths, new, blocks, BLOCK_SIZE)
        with forward_context({"l": cache}, batch):
            outputs.append(layer(x, batch.positions, prefill=new == lengths))
    torch.testing.assert_close(outputs[1], outputs[0][last], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- transformers' DeepSeek-V3

PROMPTS = ([3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41], [2, 4, 8, 16, 32, 64, 128, 9, 81, 6, 36, 1])


@pytest.fixture(scope="module")
def hf() -> Any:
    pytest.importorskip("transformers", minversion="5.0")
    import hf_deepseek

    return hf_deepseek


def test_patched_transformers_model_is_still_the_model(device: str, hf: Any) -> None:
    net = hf.hf_model(device, torch.float32)
    want = net(input_ids=torch.tensor(PROMPTS, device=device)).logits[:, -1]
    _, logits = hf.decode_greedily(hf.patch(net), hf.new_caches(net, 16, "fp32"), PROMPTS, 1, device)
    torch.testing.assert_close(logits[0], want, rtol=1e-4, atol=1e-4)


def test_transformers_model_decodes_the_same_tokens_and_logits(device: str, hf: Any) -> None:
    def decode(mode: str, sites: int = 0, by_hand: bool = False) -> tuple[Tensor, Tensor]:
        torch.compiler.reset()
        counters.clear()
        net = hf.hf_model(device)
        call = hf.patch(net, by_hand)
        with fusion(sites):
            result = hf.decode_greedily(
                compiled(call, device) if mode == "compiled" else call, hf.new_caches(net, 16), PROMPTS, 16, device
            )
        assert graphs() == (mode == "compiled")  # one for the prompts and every step
        return result

    for off, on in (
        (decode("eager"), decode("eager", by_hand=True)),
        (decode("compiled"), decode("compiled", sites=2)),
    ):
        assert_same(list(on), list(off))
        assert off[0].shape == (2, 16) and len(off[0].unique()) > 8  # it does not repeat itself

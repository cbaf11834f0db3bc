"""The layer's op with a stand-in for vLLM's attention, for what an engine on a CPU cannot run.

The stand-ins have the attributes and signatures that ``test_vllm_contract`` finds in the published releases. What the
readers get is compared with the unfused steps, byte by byte; the native kernels of the CPU compute both here, as they
do on a GPU.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import latentkv as lk
import pytest
import torch
import vllm.model_executor.layers.mla  # noqa: F401 - the layer can be imported once this is
from latentkv.engines import HandedBack
from latentkv.engines.vllm import layer, writes
from torch import Tensor
from vllm.platforms import current_platform

H, P, V, L, R, BLOCK = 3, 32, 16, 512, 64, 16
reference = lk.providers.reference


class Impl:
    """Attention that remembers what it was given."""

    dcp_world_size = 1
    supports_quant_query_input = True
    lse_base_on_e = True
    query: Any = None
    prefill: Any = None

    def forward_mqa(self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any) -> tuple[Tensor, Tensor]:
        self.query, self.cache = q, kv_c_and_k_pe_cache
        part = q[0] if isinstance(q, tuple) else q
        return torch.ones(*part.shape[:2], L), torch.zeros(part.shape[:2])

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        cache: Tensor,
        metadata: Any,
        k_scale: Tensor,
        output: Tensor,
    ) -> None:
        self.prefill = q.clone(), kv_c_normed.clone(), k_pe.clone()
        output.fill_(2)


class Group:
    """Two ranks of decode context parallelism, of which the other has the same heads."""

    world_size = 2

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat([x, x], dim)

    def combine(self, out: Tensor, lse: Tensor, *_: Any, **__: Any) -> Tensor:
        return out[:, :H]


class Case(SimpleNamespace):
    """A step, its op, and the tensors of a batch: ``decode`` tokens, ``prefill`` tokens, and padding."""


def _case(
    backend: str = "FLASHMLA",
    cache_dtype: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    decode: int = 4,
    prefill: int = 3,
    padding: int = 2,
    mode: str = "prologue",
    slots: list[int] | None = None,
    **attributes: Any,
) -> Case:
    torch.manual_seed(decode + 7 * prefill)
    n = decode + prefill
    impl = Impl()
    attn = SimpleNamespace(
        attn_backend=SimpleNamespace(get_name=lambda: backend), impl=impl, kv_cache_dtype=cache_dtype,
        layer_name="model.layers.0.attn", is_aiter_triton_fp8_bmm_enabled=False, _k_scale=torch.tensor(0.5),
        W_UK_T=torch.randn(H, P, L, dtype=dtype), _q_scale=torch.tensor(0.25),
        _v_up_proj=lambda x, out: out.copy_(x.sum(-1, keepdim=True).expand(-1, -1, V).reshape(out.shape)),
    )  # fmt: skip
    attn.__dict__.update(attributes)
    table = lk.build_cos_sin_cache(
        {"qk_rope_head_dim": R, "max_position_embeddings": 128, "rope_theta": 1e4}, device="cpu", dtype=dtype
    )
    wrapper: Any = SimpleNamespace(
        mode=mode, mla_attn=attn, num_heads=H, qk_nope_head_dim=P, kv_lora_rank=L, qk_rope_head_dim=R,
        kv_a_layernorm=SimpleNamespace(weight=torch.rand(L, dtype=dtype), variance_epsilon=1e-6),
        rotary_emb=SimpleNamespace(cos_sin_cache=table, is_neox_style=False),
    )  # fmt: skip
    step = layer.Step(wrapper)
    quantised = cache_dtype.startswith("fp8")
    cache = torch.full((4, BLOCK, L + R), 77, dtype=torch.uint8 if quantised else dtype)
    metadata = SimpleNamespace(
        num_actual_tokens=n,
        num_decode_tokens=decode,
        num_decodes=decode,
        decode=SimpleNamespace(seq_lens=None),
        query_start_loc=torch.arange(n + 1),
    )
    return Case(
        step=step, attn=attn, impl=impl, wrapper=wrapper, cache=cache, metadata=metadata, decode=decode, n=n,
        q=torch.randn(n + padding, H * (P + R), dtype=dtype), kv=torch.randn(n + padding, L + R, dtype=dtype),
        positions=torch.arange(n + padding) * 5 % 128, output=torch.full((n + padding, H * V), 9.0),
        slots=torch.tensor(slots if slots is not None else range(3, 3 + n)),
    )  # fmt: skip


def _run(case: Case) -> None:
    case.given = case.q.clone(), case.kv.clone()
    case.step(case.q, case.kv, case.positions, case.output, case.metadata, case.cache, case.slots)


def _expected(case: Case, q_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, lk.MLACache]:
    """Query [n, H, L + R] and cache after the unfused steps, kv_c [n, L] normalised; of all tokens."""
    q, kv = (x[: case.n] for x in case.given)
    q = q.view(case.n, H, P + R)
    nope = torch.bmm(q[..., :P].transpose(0, 1), case.attn.W_UK_T).transpose(0, 1)
    fp8 = case.attn.kv_cache_dtype != "auto"
    format = "fp8_e4m3fn" if fp8 else {torch.bfloat16: "bf16", torch.float32: "fp32"}[q.dtype]
    layout = lk.CacheLayout(L, R, block_size=BLOCK, format=format)
    cache = lk.MLACache.wrap(torch.full_like(case.cache, 77), layout, case.attn._k_scale.view(1))
    kv_c = torch.empty(case.n, L, dtype=q.dtype)
    query = reference.decode_prologue(
        nope, q[..., P:], kv[:, :L], kv[:, L:], case.positions[: case.n], case.wrapper.rotary_emb.cos_sin_cache,
        case.slots[: case.n], cache, is_neox=False, kv_c_out=kv_c, kv_norm_weight=case.wrapper.kv_a_layernorm.weight,
        q_dtype=q_dtype, q_scale=case.attn._q_scale,
    )  # fmt: skip
    return query, kv_c, cache


def _same(a: Tensor, b: Tensor) -> bool:
    bits = [x.contiguous().view(torch.uint8) for x in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)


@pytest.mark.parametrize(("decode", "prefill"), [(4, 3), (4, 0), (0, 3), (1, 1)])
@pytest.mark.parametrize("backend", layer.PARTS + layer.WHOLE)
def test_readers_get_what_the_unfused_steps_make(backend: str, decode: int, prefill: int) -> None:
    case = _case(backend, decode=decode, prefill=prefill)
    _run(case)
    query, kv_c, cache = _expected(case)
    if decode:
        given = case.impl.query
        assert isinstance(given, tuple) == (backend == "FLASH_ATTN_MLA"), "a concat that it did not have"
        parts = query[:decode].split([L, R], -1)
        assert all(map(_same, given, parts)) if isinstance(given, tuple) else _same(given, query[:decode])
        assert (case.output[:decode] == L).all()
    if prefill:
        q, normed, k_pe = case.impl.prefill
        assert _same(q[..., P:], query[decode:, :, L:])
        assert _same(q[..., :P], case.given[0].view(-1, H, P + R)[decode : case.n, :, :P])
        assert _same(normed, kv_c[decode:])
        assert _same(k_pe[:, 0], cache.rope.view(-1, R)[case.slots[decode:]])  # type: ignore[union-attr]
        assert (case.output[decode : case.n] == 2).all()
    assert _same(case.cache, cache.tensors[0])
    assert (case.output[case.n :] == 9).all(), "padding was written"
    assert torch.equal(case.q[:decode], case.given[0][:decode])
    assert torch.equal(case.kv[:decode], case.given[1][:decode])


@pytest.mark.parametrize("backend", ["FLASHMLA", "TRITON_MLA", "ROCM_AITER_MLA"])
@pytest.mark.parametrize("quantises", [True, False])
def test_fp8_caches(backend: str, quantises: bool) -> None:
    """With an fp8 query where the reader takes one, by its scale."""
    case = _case(backend, "fp8")
    case.impl.supports_quant_query_input = quantises
    _run(case)
    query, _, cache = _expected(case, current_platform.fp8_dtype() if quantises else None)
    assert _same(case.impl.query, query[: case.decode])
    assert case.impl.cache.dtype == current_platform.fp8_dtype()
    assert _same(case.cache, cache.tensors[0].view(torch.uint8))


def test_amd_fnuz_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """gfx942's kind of fp8, for cache and query; the architecture is set by hand."""
    monkeypatch.setattr(current_platform, "fp8_dtype", lambda: torch.float8_e4m3fnuz)
    monkeypatch.setattr(lk.Platform, "detect", classmethod(lambda cls: cls("rocm", "gfx942")))
    case = _case("TRITON_MLA", "fp8", prefill=0)
    _run(case)
    layout = lk.CacheLayout(L, R, block_size=BLOCK, format="fp8_e4m3fnuz")
    cache = lk.MLACache.wrap(torch.full_like(case.cache, 77), layout, case.attn._k_scale.view(1))
    q, kv = case.given[0][: case.n].view(case.n, H, P + R), case.given[1][: case.n]
    query = reference.decode_prologue(
        torch.bmm(q[..., :P].transpose(0, 1), case.attn.W_UK_T).transpose(0, 1), q[..., P:], kv[:, :L], kv[:, L:],
        case.positions[: case.n], case.wrapper.rotary_emb.cos_sin_cache, case.slots, cache, is_neox=False,
        kv_norm_weight=case.wrapper.kv_a_layernorm.weight, q_dtype=torch.float8_e4m3fnuz, q_scale=case.attn._q_scale,
    )  # fmt: skip
    assert _same(case.impl.query, query) and _same(case.cache, cache.tensors[0].view(torch.uint8))


def test_aiters_fp8_product_is_called_as_vllm_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm._aiter_ops import rocm_aiter_ops

    calls = []

    def bmm(X: Tensor, WQ: Tensor, w_scale: Tensor, group_size: int = 128, transpose_bm: bool = False) -> Tensor:
        calls.append((X.shape, group_size, transpose_bm))
        return torch.bmm(X, WQ.transpose(1, 2).to(X.dtype) * w_scale).transpose(0, 1).contiguous()

    monkeypatch.setattr(rocm_aiter_ops, "triton_fp8_bmm", bmm)
    weight = torch.randn(H, L, P)
    case = _case("ROCM_AITER_MLA", is_aiter_triton_fp8_bmm_enabled=True, W_K=weight, W_K_scale=torch.tensor(0.5))
    case.attn.W_UK_T = (weight.transpose(1, 2).bfloat16() * 0.5).bfloat16()
    _run(case)
    assert calls == [((H, case.decode, P), 128, True)]
    query, _, _ = _expected(case)
    assert _same(case.impl.query[..., L:], query[: case.decode, :, L:])


@pytest.mark.parametrize("kind", ["dcp_a2a", "reduce", "dcp_manager"])
@pytest.mark.parametrize("backend", ["FLASH_ATTN_MLA", "FLASHMLA"])
def test_decode_context_parallelism(monkeypatch: pytest.MonkeyPatch, backend: str, kind: str) -> None:
    """Tokens of other ranks (slot -1) are rotated and not written; the query is gathered after that, in one tensor."""
    group = Group()
    monkeypatch.setattr(layer.attention, "get_dcp_group", lambda: group)
    if kind == "dcp_manager":
        manager = SimpleNamespace(query_gather=lambda q: group.all_gather(q, 1), combine=group.combine)
        case = _case(backend, slots=[3, -1, 5, -1, 7, -1, 9], dcp_manager=manager)
        case.impl.dcp_world_size = 2
    else:
        monkeypatch.setattr(layer.attention, "dcp_a2a_lse_reduce", group.combine, raising=False)
        monkeypatch.setattr(layer.attention, "cp_lse_ag_out_rs", group.combine, raising=False)
        case = _case(backend, slots=[3, -1, 5, -1, 7, -1, 9], dcp_a2a=kind == "dcp_a2a")
        case.impl.dcp_world_size = -1  # until the first step
    _run(case)
    query, _, cache = _expected(case)
    assert _same(case.impl.query, torch.cat([query[: case.decode]] * 2, 1)) and _same(case.cache, cache.tensors[0])
    assert (case.output[: case.decode] == L).all()


def test_a_profiling_run_writes_nothing() -> None:
    case = _case()
    calls = []
    case.attn.forward_impl = lambda q, kv_c, k_pe, kv_cache, metadata, output: calls.append((q.shape, metadata))
    case.step(case.q, case.kv, case.positions, case.output, None, torch.empty(0), None)
    assert calls == [((case.n + 2, H, P + R), None)] and (case.cache == 77).all()


def test_tokens_without_a_place_are_an_error() -> None:
    case = _case()
    with pytest.raises(RuntimeError, match=r"latentkv: model\.layers\.0\.attn: vLLM gave tokens and no place"):
        case.step(case.q, case.kv, case.positions, case.output, case.metadata, case.cache, None)


def test_a_cache_that_moves_is_found_again() -> None:
    """As after vLLM's sleep mode, or when it makes new caches."""
    case = _case()
    _run(case)
    case.q, case.kv, case.cache = case.given[0].clone(), case.given[1].clone(), torch.full_like(case.cache, 77)
    _run(case)
    assert _same(case.cache, _expected(case)[2].tensors[0])


def test_one_line_names_the_layers(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer.logger, "propagate", True)
    layer.Step.served.clear()
    cases = [_case("FLASHMLA", layer_name=f"model.layers.{i}.self_attn.attn") for i in (0, 1, 2, 5)]
    with caplog.at_level(logging.INFO, layer.logger.name):
        for case in cases:
            _run(case)
    (said,) = [r.getMessage() for r in caplog.records]
    assert "serves 4 MLA layers" in said and "model.layers.0-2,5.self_attn.attn (FLASHMLA, auto cache;" in said


SERVED = {
    "is_sparse": False, "prefix": "model.layers.7.self_attn", "q_lora_rank": None, "v_head_dim": V, "q_proj": None,
    "fused_qkv_a_proj": None, "kv_a_proj_with_mqa": None, "o_proj": None, "q_a_layernorm": None, "q_b_proj": None,
}  # fmt: skip


def _wrapper(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """A layer that is served, with changes: ``attn__NAME``, ``config__NAME`` or an attribute of the layer."""
    rope = object.__new__(layer.DeepseekScalingRotaryEmbedding)
    rope.__dict__.update(rotary_dim=R, head_size=R)
    norm = object.__new__(layer.RMSNorm)
    norm.__dict__.update(
        has_weight=True, variance_size_override=None, weight=torch.ones(L), variance_epsilon=1e-6, _modules={}
    )
    case = _case(
        use_direct_call=False, q_pad_num_heads=None, use_pcp=False, is_aiter_triton_fp4_bmm_enabled=False,
        quant_config=None, kv_cache=None, forward_impl=None,
    )  # fmt: skip
    wrapper = case.wrapper
    wrapper.__dict__.update(SERVED, rotary_emb=rope, kv_a_layernorm=norm, forward=None)
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace()),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(fuse_attn_quant=False)),
    )
    for name, value in changes.items():
        kind, _, rest = name.partition("__")
        if kind == "attn":
            setattr(case.attn, rest, value)
        elif kind == "gone":
            delattr(case.attn, rest)
        elif rest == "llama_4_scaling":
            config.model_config.hf_text_config.llama_4_scaling = value
        elif rest == "fuse_attn_quant":
            config.compilation_config.pass_config.fuse_attn_quant = value
        elif rest == "dcp":
            config.parallel_config.decode_context_parallel_size = value
        else:
            setattr(wrapper, name, value)
    monkeypatch.setattr(layer, "get_current_vllm_config", lambda: config)
    return wrapper


def test_a_layer_that_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    layer._check(_wrapper(monkeypatch))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"is_sparse": True}, "sparse attention"),
        ({"rotary_emb": None}, "no rotary_emb"),
        ({"attn__use_direct_call": True}, "use_direct_call"),
        ({"attn__attn_backend": SimpleNamespace(get_name=lambda: "CUTLASS_MLA")}, "attention backend CUTLASS_MLA"),
        ({"attn__q_pad_num_heads": 128}, "heads padded to 128"),
        ({"attn__kv_cache_dtype": "fp8_ds_mla"}, "kv_cache_dtype fp8_ds_mla"),
        ({"attn__calculate_kv_scales": True}, "kv scales that are computed"),
        ({"config__llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
        ({"g_proj": object()}, "g_proj"),
        ({"dcp_q_replicate": True}, "dcp_q_replicate"),
        ({"fuse_qkv_rmsnorm": True}, "fuse_qkv_rmsnorm"),
        ({"attn__hisparse_cache": object()}, "HiSparse"),
        ({"attn__use_pcp": True}, "prefill context parallelism"),
        ({"config__dcp": 2}, "decode context parallelism of another kind"),
        ({"attn__is_aiter_triton_fp4_bmm_enabled": True}, "AITER's fp4 bmm"),
        ({"attn__is_amx_bmm_enabled": True}, "AMX's bmm"),
        ({"attn__quant_config": object(), "config__fuse_attn_quant": True}, "fuse_attn_quant"),
        ({"qk_rope_head_dim": 32}, "a rotation of its own: DeepseekScalingRotaryEmbedding, 64 elements"),
        ({"rotary_emb": torch.nn.Identity()}, "a rotation of its own: Identity"),
        ({"kv_a_layernorm": torch.nn.Identity()}, "a norm of its own: Identity"),
        ({"kv_lora_rank": 256}, "a norm of its own"),
        ({"gone__use_pcp": None}, r"vLLM .* lacks .*MLAAttention\.use_pcp"),
    ],
)  # fmt: skip
def test_what_is_handed_back_says_why(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(HandedBack, match=why):
        layer._check(_wrapper(monkeypatch, **changes))


def test_registration_is_light_and_may_be_repeated() -> None:
    code = """
import sys, torch
from vllm.config.compilation import CompilationConfig
from latentkv.engines.vllm import register
before = set(sys.modules)
register(); register()
assert CompilationConfig._attention_ops.count("vllm::latentkv_mla") == 1
assert not [m for m in set(sys.modules) - before if m.startswith("vllm.model_executor")], "vLLM's layers were imported"
assert "vllm.model_executor.layers.mla" not in sys.modules
import vllm.model_executor.layers.mla
from vllm.model_executor.custom_op import op_registry_oot
assert op_registry_oot["MultiHeadLatentAttentionWrapper"].__module__ == "latentkv.engines.vllm.layer"
register()
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_plugin_keeps_the_layer() -> None:
    code = """
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper as Own
from vllm.model_executor.custom_op import op_registry_oot
class Theirs(Own): pass
Own.register_oot(Theirs)
from latentkv.engines.vllm import register
register()
assert op_registry_oot[Own.__name__] is Theirs
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "another plugin has replaced them by" in done.stdout + done.stderr


@pytest.mark.parametrize("dtype", ["auto", "fp8", "fp8_ds_mla", "nvfp4_ds_mla"])
def test_the_small_door(dtype: str) -> None:
    """``concat_and_cache_mla`` of models that do not use the layer; other formats stay vLLM's."""
    theirs = []
    write = writes.rebound(lambda *a: theirs.append(a))
    packed = dtype.endswith("ds_mla")
    kv_c, k_pe = (torch.randn(3, n, dtype=torch.bfloat16) for n in (L, R))
    shape = (2, BLOCK, 656 if packed else L + R)
    cache = torch.zeros(shape, dtype=torch.bfloat16 if dtype == "auto" else torch.uint8)
    write(kv_c, k_pe, cache, torch.arange(3), dtype, torch.tensor([0.5]))
    assert bool(theirs) == (dtype == "nvfp4_ds_mla") and bool(cache.any()) == (not theirs)


def test_the_small_door_is_opened_by_a_variable() -> None:
    code = """
import os
import vllm._custom_ops as ops
from latentkv.engines.vllm import register
own = ops.concat_and_cache_mla
register()
assert ops.concat_and_cache_mla is own
os.environ["LATENTKV_VLLM_WRITES"] = "latentkv"
register(); register()
assert ops.concat_and_cache_mla.__wrapped__ is own
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""vLLM's MLA layer with latentkv between the projections and attention.

One op stands for vLLM's two (cache update, attention). Its decode tokens take the absorbing product, then one launch
for RMSNorm, RoPE, the query as attention reads it and the cache row. Its prefill tokens take RMSNorm with RoPE and row,
then RoPE of their queries. Attention itself is vLLM's.
"""

# No annotations as strings here: torch reads the op's schema from them.
from typing import Any

import torch
import vllm.model_executor.layers.attention.mla_attention as attention
from torch import Tensor
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding, RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.deepseek_scaling_rope import DeepseekScalingRotaryEmbedding
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op
from vllm.version import __version__ as vllm_version

from ... import __version__
from ...cache.layouts import CacheLayout, MLACache
from ...compat.vllm import format_of
from ...providers import public
from .. import HandedBack, in_words
from . import OP, contract, logger

PARTS = ("FLASH_ATTN_MLA",)
"""Attention backends that read a query's latent and rope part apart."""
WHOLE = ("FLASHMLA", "TRITON_MLA", "FLASHINFER_MLA", "ROCM_AITER_MLA", "CPU_MLA")
"""Those that read one tensor."""
CACHES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3")

_ROPE = (RotaryEmbedding.forward_native, DeepseekScalingRotaryEmbedding.forward_native)


class LatentMLA(MultiHeadLatentAttentionWrapper):  # type: ignore[misc]
    """vLLM's layer; what cannot be served stays vLLM's own."""

    mode: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            _check(self)
        except HandedBack as why:
            logger.info("latentkv hands %s back to vLLM: %s", self.prefix, why)
            self._served = False
        else:
            self._served = True
            self.mla_attn.latentkv = Step(self)

    def forward(self, positions: Tensor, hidden_states: Tensor, llama_4_scaling: Tensor | None = None) -> Tensor:
        """As vLLM's: positions [N], hidden_states [N, hidden] to [N, hidden]."""
        if not self._served:
            return super().forward(positions, hidden_states, llama_4_scaling)
        latent = self.kv_lora_rank + self.qk_rope_head_dim
        if self.q_lora_rank is None:
            q, kv = self.q_proj(hidden_states)[0], self.kv_a_proj_with_mqa(hidden_states)[0]
        else:
            q_c, kv = self.fused_qkv_a_proj(hidden_states)[0].split([self.q_lora_rank, latent], dim=-1)
            q = self.q_b_proj(self.q_a_layernorm(q_c))[0]
        output = q.new_empty(q.shape[0], self.num_heads * self.v_head_dim)
        name = _encode_layer_name(self.mla_attn.layer_name)
        getattr(torch.ops.vllm, OP)(q, kv, positions, output, name)
        return self.o_proj(output)[0]


def _check(layer: LatentMLA) -> None:
    """Raises HandedBack where a layer does something that the op does not."""
    attn, norm, rope = layer.mla_attn, layer.kv_a_layernorm, layer.rotary_emb
    missing = contract.lacks(layer, "MultiHeadLatentAttentionWrapper") + contract.lacks(attn, "MLAAttention")
    if missing:
        raise HandedBack(f"vLLM {vllm_version} lacks {', '.join(missing)}")
    config = get_current_vllm_config()
    backend = attn.attn_backend.get_name()
    reasons = {
        "sparse attention": layer.is_sparse,
        "no rotary_emb": rope is None,
        "attention without an op of its own (use_direct_call)": attn.use_direct_call,
        f"attention backend {backend}": backend not in PARTS + WHOLE,
        f"heads padded to {attn.q_pad_num_heads}": attn.q_pad_num_heads is not None,
        f"kv_cache_dtype {attn.kv_cache_dtype}": attn.kv_cache_dtype not in CACHES,
        "kv scales that are computed as it runs": getattr(attn, "calculate_kv_scales", False),
        "llama_4_scaling": getattr(config.model_config.hf_text_config, "llama_4_scaling", None) is not None,
        "a gate (g_proj)": getattr(layer, "g_proj", None) is not None,
        "dcp_q_replicate": getattr(layer, "dcp_q_replicate", False),
        "fuse_qkv_rmsnorm": getattr(layer, "fuse_qkv_rmsnorm", False),
        "HiSparse": getattr(attn, "hisparse_cache", None) is not None,
        "prefill context parallelism": attn.use_pcp,
        "decode context parallelism of another kind": config.parallel_config.decode_context_parallel_size > 1
        and not hasattr(attn, "dcp_a2a")
        and not hasattr(attn, "dcp_manager"),
        "AITER's fp4 bmm": attn.is_aiter_triton_fp4_bmm_enabled,
        "AMX's bmm": getattr(attn, "is_amx_bmm_enabled", False),
        "a quantised output (fuse_attn_quant)": attn.quant_config is not None
        and config.compilation_config.pass_config.fuse_attn_quant,
    }
    for reason, true in reasons.items():
        if true:
            raise HandedBack(reason)
    turned = isinstance(rope, RotaryEmbeddingBase) and type(rope).forward_native in _ROPE
    if not turned or not rope.rotary_dim == rope.head_size == layer.qk_rope_head_dim:
        raise HandedBack(f"a rotation of its own: {type(rope).__name__}, {getattr(rope, 'rotary_dim', '?')} elements")
    plain = type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
    if not plain or norm.weight.shape != (layer.kv_lora_rank,):
        raise HandedBack(f"a norm of its own: {norm}")


class Step:
    """What a layer does with the tokens of one step of the engine."""

    served: list["Step"] = []  # noqa: RUF012 - of this process, until the first of them has run

    def __init__(self, layer: LatentMLA) -> None:
        self.mode = layer.mode
        self._attn, self._norm, self._rope = layer.mla_attn, layer.kv_a_layernorm, layer.rotary_emb
        self._heads, self._nope = layer.num_heads, layer.qk_nope_head_dim
        self._latent, self._turned = layer.kv_lora_rank, layer.qk_rope_head_dim
        self._backend = layer.mla_attn.attn_backend.get_name()
        self._fp8 = attention.is_quantized_kv_cache(layer.mla_attn.kv_cache_dtype)
        self._cache: tuple[Tensor, MLACache] | None = None  # vLLM's tensor, and the same for latentkv
        Step.served.append(self)

    def __call__(
        self, q: Tensor, kv: Tensor, positions: Tensor, output: Tensor, metadata: Any, kv_cache: Tensor, slots: Any
    ) -> None:
        """Writes the rows of a step's tokens, and attention's output.

        Args:
            q: [N, H * (P + R)], as projected; rotated in place where prefill needs it.
            kv: [N, L + R], as projected; its latent part is normalised in place where prefill needs it.
            positions: [N].
            output: [N, H * V].
            metadata: vLLM's of this layer, decode tokens first; None in a profiling run.
            kv_cache: [B, bs, L + R].
            slots: [>= tokens], or None where there is nothing to write to.
        """
        if Step.served:
            _announce()
        attn = self._attn
        q, (kv_c, k_pe) = q.view(len(q), self._heads, -1), kv.split([self._latent, self._turned], -1)
        if metadata is None:
            attn.forward_impl(q, kv_c, k_pe.unsqueeze(1), kv_cache, None, output=output)
            return
        if slots is None or not kv_cache.numel():
            raise RuntimeError(f"latentkv: {attn.layer_name}: vLLM gave tokens and no place for their rows")
        tokens = metadata.num_actual_tokens
        decode = metadata.num_decode_tokens if self.mode == "prologue" else 0
        cache = self._cache_of(kv_cache, kv_c)
        if decode:
            at = slice(0, decode)
            query = self._query(q[at], kv_c[at], k_pe[at], positions[at], slots[at], cache)
            self._attend(query, kv_cache, metadata, output[at])
        if decode == tokens:
            return
        at = slice(decode, tokens)
        q, kv_c, k_pe, output = q[at], kv_c[at], k_pe[at], output[at]
        self._write(q, kv_c, k_pe, positions[at], slots[at], cache)
        if self.mode == "prologue":
            attn.impl.forward_mha(
                q, kv_c, k_pe.unsqueeze(1), self._typed(kv_cache), metadata, attn._k_scale, output=output
            )
        else:
            attn.forward_impl(q, kv_c, k_pe.unsqueeze(1), kv_cache, metadata, output=output)

    def _cache_of(self, kv_cache: Tensor, kv_c: Tensor) -> MLACache:
        if self._cache is None or self._cache[0] is not kv_cache:
            format: Any = format_of(self._attn.kv_cache_dtype, kv_c, kv_cache)
            layout = CacheLayout(self._latent, self._turned, kv_cache.shape[1], format)
            self._cache = kv_cache, MLACache.wrap(kv_cache, layout, self._attn._k_scale.view(1))
        return self._cache[1]

    def _write(self, q: Tensor, kv_c: Tensor, k_pe: Tensor, positions: Tensor, slots: Tensor, cache: MLACache) -> None:
        """Rows, and what attention over unabsorbed queries reads, in place: kv_c normalised, q and k_pe rotated."""
        q_pe, table, is_neox = q[..., self._nope :], self._rope.cos_sin_cache, self._rope.is_neox_style
        no_heads = kv_c.new_empty(len(q), 0, self._latent + self._turned)
        public.decode_prologue(
            None, q_pe[:, :0], kv_c, k_pe, positions, table, slots, cache, is_neox=is_neox, q_out=no_heads,
            kv_c_out=kv_c, kv_norm_weight=self._norm.weight.data, kv_norm_eps=self._norm.variance_epsilon,
        )  # fmt: skip
        public.rope_(positions, q_pe, k_pe, table, is_neox=is_neox)

    def _query(
        self, q: Tensor, kv_c: Tensor, k_pe: Tensor, positions: Tensor, slots: Tensor, cache: MLACache
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rows, and the absorbed query as attention reads it."""
        nope, q_pe = self._absorbed(q[..., : self._nope]), q[..., self._nope :]
        parts = self._backend in PARTS and self._ranks() == 1
        fp8 = self._fp8 and self._attn.impl.supports_quant_query_input
        rope = torch.empty_like(q_pe, memory_format=torch.contiguous_format) if parts else None
        query = public.decode_prologue(
            None if parts else nope, q_pe, kv_c, k_pe, positions, self._rope.cos_sin_cache, slots, cache,
            is_neox=self._rope.is_neox_style, q_out=nope if parts else None, q_rope_out=rope,
            q_dtype=current_platform.fp8_dtype() if fp8 else None, q_scale=self._attn._q_scale if fp8 else None,
            kv_norm_weight=self._norm.weight.data, kv_norm_eps=self._norm.variance_epsilon,
        )  # fmt: skip
        return query if rope is None else (query, rope)

    def _absorbed(self, nope: Tensor) -> Tensor:
        """[n, H, P] times W_UK: [n, H, L], in whatever strides are the product's own."""
        attn, by_head = self._attn, nope.transpose(0, 1)
        if attn.is_aiter_triton_fp8_bmm_enabled:
            from vllm._aiter_ops import rocm_aiter_ops

            return rocm_aiter_ops.triton_fp8_bmm(by_head, attn.W_K, attn.W_K_scale, group_size=128, transpose_bm=True)
        return torch.bmm(by_head, attn.W_UK_T).transpose(0, 1)

    def _attend(self, query: Any, kv_cache: Tensor, metadata: Any, output: Tensor) -> None:
        attn, parallel = self._attn, self._ranks() > 1
        if parallel:
            query = _gathered(attn, query)
        out, lse = attn.impl.forward_mqa(query, self._typed(kv_cache), metadata, attn)
        if parallel:
            out = _combined(attn, out, lse, metadata)
        attn._v_up_proj(out, out=output)

    def _typed(self, kv_cache: Tensor) -> Tensor:
        """The cache as vLLM's readers take it."""
        return kv_cache.view(current_platform.fp8_dtype()) if self._fp8 else kv_cache

    def _ranks(self) -> int:
        """Ranks that share a sequence's rows. vLLM up to 0.26 finds out at the first step."""
        impl = self._attn.impl
        if impl.dcp_world_size == -1:
            impl.dcp_world_size = attention.get_dcp_group().world_size
        return impl.dcp_world_size


def _gathered(attn: Any, query: Tensor) -> Tensor:
    """The query heads of all ranks of decode context parallelism."""
    if (manager := getattr(attn, "dcp_manager", None)) is not None:
        return manager.query_gather(query)
    return attention.get_dcp_group().all_gather(query, dim=1)


def _combined(attn: Any, out: Tensor, lse: Tensor, metadata: Any) -> Tensor:
    """This rank's heads, of what all ranks have found in their shares of the rows."""
    if (manager := getattr(attn, "dcp_manager", None)) is not None:
        starts = metadata.query_start_loc[: metadata.num_decodes + 1]
        return manager.combine(out, lse, seq_lens=metadata.decode.seq_lens, query_start_loc=starts)
    reduce = attention.dcp_a2a_lse_reduce if attn.dcp_a2a else attention.cp_lse_ag_out_rs
    return reduce(out, lse, attention.get_dcp_group(), is_lse_base_on_e=attn.impl.lse_base_on_e)


def _announce() -> None:
    """One line about all layers that are served, by the first rank."""
    served, Step.served = Step.served, []
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    how = sorted({f"{s._backend}, {s._attn.kv_cache_dtype} cache" for s in served})
    names = in_words(s._attn.layer_name for s in served)
    logger.info(
        "latentkv %s serves %d MLA layers of vLLM %s: %s (%s; LATENTKV_VLLM=%s)",
        __version__, len(served), vllm_version, names, "; ".join(how), served[0].mode,
    )  # fmt: skip


@eager_break_during_capture
@maybe_transfer_kv_layer
def _op(q: Tensor, kv: Tensor, positions: Tensor, output: Tensor, layer_name: LayerNameType) -> None:
    metadata, attn, kv_cache, slots = get_attention_context(_resolve_layer_name(layer_name))
    attn.latentkv(q, kv, positions, output, metadata, kv_cache, slots)


def install(mode: str) -> None:
    """Registers the op and the layer with vLLM."""
    LatentMLA.mode = mode
    direct_register_custom_op(
        op_name=OP,
        op_func=_op,
        mutates_args=["q", "kv", "output"],
        dispatch_key=current_platform.dispatch_key,
        tags=(torch.Tag.flexible_layout,),
    )
    MultiHeadLatentAttentionWrapper.register_oot(LatentMLA)

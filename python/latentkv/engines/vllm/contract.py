"""What the plugin takes from vLLM, by name, so that a release in which something is missing is found before it is used.

An entry is ``module:name``, ``module:Class.attribute`` or either of them with the parameters that the plugin passes,
``(a, b)``. A class attribute may also be one that the constructor sets on the instance.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any, NamedTuple

OLDEST, NEWEST = "0.26.0", "0.33.0"
"""The first and the last release that the names below were compared with."""

_MLA = "vllm.model_executor.layers.mla:MultiHeadLatentAttentionWrapper"
_ATTENTION = "vllm.model_executor.layers.attention.mla_attention:MLAAttention"
_ROPE = "vllm.model_executor.layers.rotary_embedding"

NEEDS = (
    "vllm.compilation.breakable_cudagraph:eager_break_during_capture(fn)",
    "vllm.config:get_current_vllm_config()",
    "vllm.config.compilation:CompilationConfig._attention_ops",
    "vllm.config.compilation:CompilationConfig.pass_config",
    "vllm.config.compilation:PassConfig.fuse_attn_quant",
    "vllm.config.model:ModelConfig.hf_text_config",
    "vllm.config.parallel:ParallelConfig.decode_context_parallel_size",
    "vllm.model_executor.custom_op:op_registry_oot",
    "vllm.model_executor.custom_op:PluggableLayer.register_oot",
    "vllm.model_executor.layers.attention.attention:get_attention_context(layer_name)",
    "vllm.model_executor.layers.attention.kv_transfer_utils:maybe_transfer_kv_layer(func)",
    "vllm.model_executor.layers.layernorm:RMSNorm.has_weight",
    "vllm.model_executor.layers.layernorm:RMSNorm.variance_epsilon",
    "vllm.model_executor.layers.layernorm:RMSNorm.variance_size_override",
    f"{_ROPE}.base:RotaryEmbeddingBase.cos_sin_cache",
    f"{_ROPE}.base:RotaryEmbeddingBase.head_size",
    f"{_ROPE}.base:RotaryEmbeddingBase.is_neox_style",
    f"{_ROPE}.base:RotaryEmbeddingBase.rotary_dim",
    f"{_ROPE}.base:RotaryEmbedding.forward_native(positions, query, key)",
    f"{_ROPE}.deepseek_scaling_rope:DeepseekScalingRotaryEmbedding.forward_native(positions, query, key)",
    "vllm.platforms:current_platform",
    "vllm.platforms.interface:Platform.fp8_dtype",
    "vllm.utils.torch_utils:direct_register_custom_op(op_name, op_func, mutates_args, dispatch_key, tags)",
    "vllm.utils.torch_utils:LayerNameType",
    "vllm.utils.torch_utils:_encode_layer_name(layer_name)",
    "vllm.utils.torch_utils:_resolve_layer_name(layer_name)",
    "vllm.version:__version__",
    f"{_MLA}.forward(positions, hidden_states, llama_4_scaling)",
    *(
        f"{_MLA}.{name}"
        for name in (
            "fused_qkv_a_proj", "is_sparse", "kv_a_layernorm", "kv_a_proj_with_mqa", "kv_lora_rank", "mla_attn",
            "num_heads", "o_proj", "prefix", "q_a_layernorm", "q_b_proj", "q_lora_rank", "q_proj", "qk_nope_head_dim",
            "qk_rope_head_dim", "rotary_emb", "v_head_dim",
        )
    ),
    f"{_ATTENTION}.forward_impl(q, k_c_normed, k_pe, kv_cache, attn_metadata, output)",
    f"{_ATTENTION}._v_up_proj(x, out)",
    *(
        f"{_ATTENTION}.{name}"
        for name in (
            "attn_backend", "impl", "is_aiter_triton_fp4_bmm_enabled", "is_aiter_triton_fp8_bmm_enabled", "kv_cache",
            "kv_cache_dtype", "layer_name", "q_pad_num_heads", "quant_config", "use_direct_call", "use_pcp",
        )
    ),
    *(
        f"vllm.model_executor.layers.attention.mla_attention:{name}"
        for name in (
            "MLACommonMetadata.num_actual_tokens",
            "MLACommonMetadata.num_decode_tokens",
            "MLACommonMetadata.decode",
            "MLACommonMetadata.num_decodes",
            "MLACommonMetadata.query_start_loc",
            "MLACommonDecodeMetadata.seq_lens",
            "MLACommonImpl.forward_mha(q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output)",
            "MLACommonImpl.forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer)",
            "MLACommonImpl.lse_base_on_e",
            "MLACommonImpl.dcp_world_size",
            "MLACommonImpl.supports_quant_query_input",
            "is_quantized_kv_cache",
            "get_dcp_group",
        )
    ),
)  # fmt: skip


LOADED = (
    f"{_ATTENTION}.W_UK_T",
    f"{_ATTENTION}.W_K",
    f"{_ATTENTION}.W_K_scale",
    "vllm._aiter_ops:rocm_aiter_ops.triton_fp8_bmm(X, WQ, w_scale, group_size, transpose_bm)",
    "vllm.model_executor.layers.attention.attention:set_default_quant_scales(layer)",  # _k_scale, _q_scale
)
"""What is only there once weights are loaded, or on AMD GPUs: nothing looks for it before it is used."""

_MODULE, _MANAGER = "vllm.model_executor.layers.attention.mla_attention", "vllm.v1.attention.ops.dcp:MLADCPManager"
PARALLEL = (
    (
        f"{_ATTENTION}.dcp_a2a",
        f"{_MODULE}:cp_lse_ag_out_rs(is_lse_base_on_e)",
        f"{_MODULE}:dcp_a2a_lse_reduce(is_lse_base_on_e)",
    ),
    (f"{_ATTENTION}.dcp_manager", f"{_MANAGER}.query_gather", f"{_MANAGER}.combine"),
)
"""Decode context parallelism: what earlier releases have, or what later ones have."""


class Need(NamedTuple):
    """An entry, taken apart."""

    module: str
    name: str
    attribute: str | None
    parameters: tuple[str, ...] | None

    @staticmethod
    def of(entry: str) -> Need:
        """The parts of an entry."""
        match = re.fullmatch(r"([\w.]+):(\w+)(?:\.(\w+))?(?:\((.*)\))?", entry)
        assert match, entry
        module, name, attribute, parameters = match.groups()
        return Need(
            module, name, attribute, None if parameters is None else tuple(filter(None, parameters.split(", ")))
        )


def missing() -> list[str]:
    """The entries that the vLLM of this process does not have.

    What only a constructor sets is not looked for: the layer does that when it is made (:func:`lacks`).
    """
    return [entry for entry in NEEDS if _problem(Need.of(entry))]


def lacks(owner: object, name: str) -> list[str]:
    """The entries of class ``name`` that an object of it does not have."""
    needs = ((entry, Need.of(entry)) for entry in NEEDS)
    return [entry for entry, n in needs if n.name == name and n.attribute and not hasattr(owner, n.attribute)]


def _problem(need: Need) -> bool:
    try:
        found: Any = getattr(importlib.import_module(need.module), need.name)
    except (ImportError, AttributeError):
        return True
    if need.attribute is not None:
        if not hasattr(found, need.attribute):
            return need.parameters is not None  # a method is the class's, anything else may be the instance's
        found = getattr(found, need.attribute)
    if need.parameters is None:
        return False
    given = inspect.signature(found).parameters
    return any(name not in given for name in need.parameters)

"""The torch ops of the library: schemas and fakes, side by side. Implementations are registered by ``providers``.

Every op exists in namespace ``latentkv``, served by the provider chosen at import, and those with compiled kernels in
``latentkv_native`` too, where these can always be reached. All can be captured in CUDA graphs. They write to the
arguments declared as mutated and return nothing, but for ``mla_decode``, which returns new tensors.

The ops that know a cache by its layer exist in ``latentkv`` alone, where ``compile.layers`` implements them by the
others. They return a tensor without elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .checks import Arguments

NAMESPACE = "latentkv"
NATIVE_NAMESPACE = "latentkv_native"

SCHEMAS = (
    "rope_(Tensor positions, Tensor(a!) q, Tensor(b!)? k, Tensor cos_sin_cache, bool is_neox,"
    " bool inverse=False) -> ()",
    "write_cache_(Tensor kv_c, Tensor k_pe, Tensor slot_mapping, Tensor(a!) cache, Tensor(b!)? rope_cache,"
    " Tensor? scale, str format) -> ()",
    "rope_write_cache_(Tensor? positions, Tensor(a!) q_pe, Tensor(b!) k_pe, Tensor kv_c, Tensor? cos_sin_cache,"
    " Tensor slot_mapping, Tensor(c!) cache, Tensor(d!)? rope_cache, Tensor? scale, str format, bool is_neox,"
    " bool rope_masked=False) -> ()",
    "decode_prologue(Tensor? q_nope, Tensor q_pe, Tensor kv_c, Tensor k_pe, Tensor? positions, Tensor? cos_sin_cache,"
    " Tensor slot_mapping, Tensor(a!) cache, Tensor(b!)? rope_cache, Tensor? scale, str format, Tensor(c!) q_out,"
    " Tensor(d!)? q_rope_out, Tensor(e!)? kv_c_out, Tensor? q_scale, Tensor? kv_norm_weight, bool is_neox,"
    " float kv_norm_eps=1e-6, bool rope_masked=True) -> ()",
    "write_cache_grouped_(Tensor[] kv_c, Tensor[] k_pe, Tensor slot_mapping, Tensor(a!)[] caches,"
    " Tensor(b!)[] rope_caches, Tensor?[] scales, str format) -> ()",
    "write_indexer_cache_(Tensor k, Tensor? positions, Tensor? cos_sin_cache, Tensor slot_mapping, Tensor(a!) cache,"
    " bool is_neox, bool power_of_two_scale=False) -> ()",
    "gather_cache(Tensor cache, Tensor? rope_cache, Tensor? scale, str format, Tensor block_table, Tensor cu_seq_lens,"
    " Tensor(a!) out, int kv_lora_rank, Tensor? seq_starts=None) -> ()",
    "convert_cache_(Tensor src, Tensor? src_rope, Tensor? src_scale, str src_format, Tensor(a!) dst,"
    " Tensor(b!)? dst_rope, Tensor? dst_scale, str dst_format, int kv_lora_rank, int rope_dim, Tensor? src_blocks=None,"
    " Tensor? dst_blocks=None) -> ()",
)
ATTENTION_SCHEMAS = (  # without compiled kernels
    "mla_decode(Tensor q, Tensor cache, Tensor? rope_cache, Tensor? scale, str format, Tensor block_table,"
    " Tensor seq_lens, int kv_lora_rank, float sm_scale) -> (Tensor, Tensor)",
)
LAYER_SCHEMAS = (
    "layer_write_cache(Tensor kv_c, Tensor k_pe, SymInt layer) -> Tensor",
    "layer_rope_write_cache(Tensor positions, Tensor(a!) q_pe, Tensor(b!) k_pe, Tensor kv_c, Tensor cos_sin_cache,"
    " bool is_neox, SymInt layer) -> Tensor",
)


def _names(schemas: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(schema.partition("(")[0] for schema in schemas)


NATIVE_OP_NAMES = _names(SCHEMAS)
OP_NAMES = _names(SCHEMAS + ATTENTION_SCHEMAS)
LAYER_OP_NAMES = _names(LAYER_SCHEMAS)
LEADS = (
    "kv_c",
    "kv_c[0]",
    "q",
    "k",
    "cache",
    "src",
)  # of an op's arguments, the first of these says where the others must lie


Fake = Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None]


def _fake(name: str, schema: str) -> Fake:
    """The fake of an op: all it checks is that the tensors lie on one device. A layer's op returns an empty tensor."""
    parsed = torch._C.parse_schema(schema)
    names = [argument.name for argument in parsed.arguments]

    def fake(*args: object) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        tensors = {}
        for argument, value in zip(names, args, strict=False):
            if isinstance(value, torch.Tensor):
                tensors[argument] = value
            elif isinstance(value, list | tuple):
                tensors |= {f"{argument}[{i}]": t for i, t in enumerate(value) if isinstance(t, torch.Tensor)}
        lead = next(tensors[argument] for argument in (*LEADS, *tensors) if argument in tensors)
        for argument, t in tensors.items():
            Arguments(name, lead.device).on_device(argument, t)
        if name == "mla_decode":
            batch, heads, _ = lead.shape
            out = lead.new_empty((batch, heads, args[names.index("kv_lora_rank")]))  # type: ignore[arg-type]
            return out, lead.new_empty((batch, heads), dtype=torch.float32)
        return lead.new_empty(0) if parsed.returns else None

    return fake


def _define(namespace: str, schemas: tuple[str, ...] = SCHEMAS) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for name, schema in zip(_names(schemas), schemas, strict=True):
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{namespace}::{name}", _fake(name, schema), lib=library)
    return library


# A library object must outlive its ops.
LIBRARIES = {
    NAMESPACE: _define(NAMESPACE, SCHEMAS + ATTENTION_SCHEMAS + LAYER_SCHEMAS),
    NATIVE_NAMESPACE: _define(NATIVE_NAMESPACE),
}

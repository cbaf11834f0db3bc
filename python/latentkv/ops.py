"""The torch ops of the library: schemas and fakes, side by side. Implementations are registered by ``providers``.

Every op exists twice: in namespace ``latentkv``, served by the provider chosen at import, and in ``latentkv_native``,
where the compiled kernels can always be reached. All of them work in place on the arguments declared as mutated,
return nothing, and can be captured in CUDA graphs.
"""

from __future__ import annotations

import torch

NAMESPACE = "latentkv"
NATIVE_NAMESPACE = "latentkv_native"

SCHEMAS = (
    "rope_(Tensor positions, Tensor(a!) q, Tensor(b!)? k, Tensor cos_sin_cache, bool is_neox, bool inverse=False) -> ()",
    "write_cache_(Tensor kv_c, Tensor k_pe, Tensor slot_mapping, Tensor(a!) cache, Tensor(b!)? rope_cache,"
    " Tensor? scale, str format) -> ()",
    "rope_write_cache_(Tensor? positions, Tensor(a!) q_pe, Tensor(b!) k_pe, Tensor kv_c, Tensor? cos_sin_cache,"
    " Tensor slot_mapping, Tensor(c!) cache, Tensor(d!)? rope_cache, Tensor? scale, str format, bool is_neox,"
    " bool rope_masked=False) -> ()",
)
OP_NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)


def _writes_in_place(*args: object, **kwargs: object) -> None:
    """The fake of every op here: nothing is returned, so there is no shape to derive."""


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for name, schema in zip(OP_NAMES, SCHEMAS, strict=True):
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{namespace}::{name}", _writes_in_place, lib=library)
    return library


# A library object must outlive its ops.
LIBRARIES = {namespace: _define(namespace) for namespace in (NAMESPACE, NATIVE_NAMESPACE)}

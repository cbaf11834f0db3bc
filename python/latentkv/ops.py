"""The torch ops of the library: schemas and fakes, side by side. Implementations are registered by ``providers``.

Every op exists twice: in namespace ``latentkv``, served by the provider chosen at import, and in ``latentkv_native``,
where the compiled kernels can always be reached. All of them work in place on the arguments declared as mutated,
return nothing, and can be captured in CUDA graphs.
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
)
OP_NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)


def _fake(name: str, schema: str) -> Callable[..., None]:
    """The fake of an op: nothing is returned, so all it can tell is that the tensors lie on one device."""
    names = [argument.name for argument in torch._C.parse_schema(schema).arguments]
    lead = "kv_c" if "kv_c" in names else "q"

    def fake(*args: object) -> None:
        tensors = {n: t for n, t in zip(names, args, strict=False) if isinstance(t, torch.Tensor)}
        for argument, t in tensors.items():
            Arguments(name, tensors[lead].device).on_device(argument, t)

    return fake


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for name, schema in zip(OP_NAMES, SCHEMAS, strict=True):
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{namespace}::{name}", _fake(name, schema), lib=library)
    return library


# A library object must outlive its ops.
LIBRARIES = {namespace: _define(namespace) for namespace in (NAMESPACE, NATIVE_NAMESPACE)}

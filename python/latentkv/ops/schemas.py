"""The torch ops of the library: schemas and fakes, from their descriptions. ``providers`` registers implementations.

Every op exists in namespace ``latentkv``, served by the provider chosen at import, and those with compiled kernels in
``latentkv_native`` too, where these can always be reached. All can be captured in CUDA graphs. They write to the
arguments declared as mutated and return nothing, but for ``mla_decode``, which returns new tensors.

The ops that know a cache by its layer exist in ``latentkv`` alone, where ``compile.layers`` implements them by the
others. They return a tensor without elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .autograd import refuse_gradients, tensors_of
from .checks import fail
from .description import LAYER_OPS, OPS, Op

NAMESPACE = "latentkv"
NATIVE_NAMESPACE = "latentkv_native"
OP_NAMES = tuple(OPS)
NATIVE_OP_NAMES = tuple(op.name for op in OPS.values() if op.native)
LAYER_OP_NAMES = tuple(LAYER_OPS)

Fake = Callable[..., Tensor | tuple[Tensor, ...] | None]


def fake_of(op: Op) -> Fake:
    """The fake of an op: it checks that the tensors lie on one device, and makes those that the op returns."""

    def fake(*args: Any) -> Tensor | tuple[Tensor, ...] | None:
        refuse_gradients(op, args)
        tensors = dict(tensors_of(op, args))
        lead = tensors.get(op.lead, tensors.get(f"{op.lead}[0]"))
        assert lead is not None, "the schema asks for it"
        for name, t in tensors.items():
            if t.device != lead.device:
                fail(op.name, name, f"a tensor on {lead.device}", f"one on {t.device}")
        sizes = {"0": 0}
        for argument in op.arguments:
            if argument.name in tensors:
                sizes |= zip(argument.shape.split(), tensors[argument.name].shape, strict=False)
        values = dict(zip((p.name for p in op.plain), args, strict=False))
        sizes |= {a.size: values[a.name] for a in op.arguments if a.size and values.get(a.name) is not None}
        made = tuple(
            lead.new_empty(
                [sizes[word] for word in r.shape.split()], dtype=torch.float32 if r.dtypes == "float32" else lead.dtype
            )
            for r in op.returns
        )
        return made if len(made) > 1 else made[0] if made else None

    return fake


def define(namespace: str, names: Iterable[str] = NATIVE_OP_NAMES) -> torch.library.Library:
    """A torch namespace with the schemas and fakes of ops, by default of those that the compiled libraries have."""
    library = torch.library.Library(namespace, "DEF")
    for op in ((OPS | LAYER_OPS)[name] for name in names):
        library.define(op.schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{namespace}::{op.name}", fake_of(op), lib=library)
    return library


# A library object must outlive its ops.
LIBRARIES = {
    NAMESPACE: define(NAMESPACE, OP_NAMES + LAYER_OP_NAMES),
    NATIVE_NAMESPACE: define(NATIVE_NAMESPACE),
}

# Asked by the compiled kernels, which cannot ask a tensor themselves, where autograd records.
LIBRARIES[NAMESPACE].define("which_requires_grad(Tensor[] tensors) -> int")
LIBRARIES[NAMESPACE].impl(
    "which_requires_grad",
    lambda tensors: next((i for i, t in enumerate(tensors) if t.requires_grad), -1),
    "CompositeExplicitAutograd",
)

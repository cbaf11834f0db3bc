"""The ops that know a cache by its layer: an engine keeps its caches outside the graph.

The graph holds a layer's integer, :func:`layer_index`; :func:`step` tells which cache and slots it stands for now. The
caches are not declared arguments of these ops, so attention must consume the tensor, without elements, that they
return: this keeps a write before the read. Descriptions: ``ops/description.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.layouts import MLACache
from ..ops.checks import call_of, called_as, check_positions, checks_values, fail
from ..ops.description import LAYER_OPS
from ..ops.schemas import LIBRARIES, NAMESPACE
from ..providers import public

_names: dict[int, str] = {}


@dataclass(frozen=True)
class _Step:
    """What :func:`step` was given: the cache and the slots of each layer, by its integer."""

    layers: Mapping[int, tuple[MLACache | None, Tensor | None]]
    rope_masked: bool


_step: ContextVar[_Step | None] = ContextVar("latentkv.compile.step", default=None)


def layer_index(name: str) -> int:
    """The integer by which a graph knows the layer ``name``: an attribute of the module, made when it is built.

    Under ``torch._dynamo.config.allow_unspec_int_on_nn_module = True`` equal layers then share their graphs: Dynamo
    compiles the first layer for its own integer, and the second for any.

    Raises:
        ValueError: another name has the same integer; of 10^16 pairs of names less than one does.
    """
    # A digest, not a counter: it is the same in every process, and a graph that another one compiled may hold it.
    index = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    if _names.setdefault(index, name) != name:
        raise ValueError(
            f"latentkv.compile.layer_index: name: expected another than {name!r}: {_names[index]!r} has {index}"
        )
    return index


@contextmanager
def step(
    caches: Mapping[str, MLACache | None],
    slot_mapping: Tensor | Mapping[str, Tensor | None] | None,
    *,
    rope_masked: bool = True,
) -> Iterator[None]:
    """The current step: where ``layer_write_cache`` and ``layer_rope_write_cache`` find their caches and slots.

    It holds for this thread (or asynchronous task), around calls of compiled code, not in it. An inner step takes the
    place of the outer one as a whole. A CUDA graph keeps what it was captured with: replays write to the same caches,
    at the slots that then stand in the same ``slot_mapping``, and look at no step.

    Args:
        caches: the cache of each layer, by name; None where it is not allocated yet: nothing is written, but q_pe and
            k_pe are rotated.
        slot_mapping: [T] int64 or int32, T <= N, of all layers, or of each by name; None (a profiling run): nothing is
            written, but q_pe and k_pe are rotated.
        rope_masked: rotate masked rows (slot < 0) and padding (rows T..N-1) too, as a separate RoPE would, so that
            fusing the two changes no bit. False leaves them as they are: cheaper, where they only pad.

    Raises:
        TypeError: a cache is neither an :class:`~latentkv.MLACache` nor None.
        ValueError: a layer has a cache, but no entry in ``slot_mapping``.
    """
    layers: dict[int, tuple[MLACache | None, Tensor | None]] = {}
    for name, cache in caches.items():
        if not isinstance(cache, MLACache | None):
            got = type(cache).__name__
            raise TypeError(f"latentkv.compile.step: caches[{name!r}]: expected an MLACache or None, got {got}")
        if not isinstance(slot_mapping, Mapping):
            slots = slot_mapping
        elif name in slot_mapping:
            slots = slot_mapping[name]
        else:
            raise ValueError(f"latentkv.compile.step: slot_mapping: expected an entry for {name!r}, got none")
        layers[layer_index(name)] = cache, slots
    token = _step.set(_Step(layers, rope_masked))
    try:
        yield
    finally:
        _step.reset(token)


def _find(op: str, layer: int) -> tuple[MLACache | None, Tensor | None, bool]:
    """The cache, the slots and ``rope_masked`` of a layer in the current step."""
    current = _step.get()
    name = repr(_names[layer]) if layer in _names else f"{layer}, which layer_index has given to no name"
    if current is None:
        fail(op, "layer", "a call within latentkv.compile.step", f"layer {name} outside of any")
    if layer not in current.layers:
        known = ", ".join(repr(_names[index]) for index in current.layers) or "none"
        fail(op, "layer", f"a layer of the current latentkv.compile.step ({known})", name)
    return *current.layers[layer], current.rope_masked


def _key(op: str, k_pe: Tensor) -> Tensor:
    """k_pe as [N, R], a view."""
    if k_pe.dim() == 3 and k_pe.shape[1] == 1:
        return k_pe.squeeze(1)
    if k_pe.dim() != 2:
        fail(op, "k_pe", "shape [N, R] or [N, 1, R]", list(k_pe.shape))
    return k_pe


def _layer_write_cache(kv_c: Tensor, k_pe: Tensor, layer: int) -> Tensor:
    """``write_cache_`` to the cache of a layer, if there are a cache and slots. k_pe is [N, R] or [N, 1, R]."""
    op = "layer_write_cache"
    key = _key(op, k_pe)
    cache, slots, _ = _find(op, layer)
    if cache is not None and slots is not None:
        with called_as(op):
            public.write_cache_(kv_c, key, slots, cache)
    return kv_c.new_empty(0)


def _layer_rope_write_cache(
    positions: Tensor, q_pe: Tensor, k_pe: Tensor, kv_c: Tensor, cos_sin_cache: Tensor, is_neox: bool, layer: int
) -> Tensor:
    """``rope_write_cache_`` to the cache of a layer, or ``rope_`` alone. k_pe is [N, R] or [N, 1, R]."""
    op = "layer_rope_write_cache"
    key = _key(op, k_pe)
    cache, slots, rope_masked = _find(op, layer)
    rest = 0  # the first row that rope_ takes
    if cache is not None and slots is not None:
        rest = slots.shape[0] if rope_masked else q_pe.shape[0]
    if rest < q_pe.shape[0] and checks_values(kv_c.device):  # before the others are written
        call_of(LAYER_OPS[op], (positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, layer))
        every = torch.ones_like(positions[rest:], dtype=torch.bool)
        check_positions(op, positions[rest:], cos_sin_cache, every, first=rest)
    with called_as(op, q="q_pe", k="k_pe"):
        if cache is not None and slots is not None:
            public.rope_write_cache_(
                positions, q_pe, key, kv_c, cos_sin_cache, slots, cache, is_neox=is_neox, rope_masked=rope_masked
            )
        if rest < q_pe.shape[0]:
            public.rope_(positions[rest:], q_pe[rest:], key[rest:], cos_sin_cache, is_neox=is_neox)
    return kv_c.new_empty(0)


for _op in (_layer_write_cache, _layer_rope_write_cache):
    _name = _op.__name__[1:]
    LIBRARIES[NAMESPACE].impl(_name, _op, "CompositeExplicitAutograd")
    # Whatever becomes of the tensor that they return (the sum of an empty one is folded): no compiler may drop them.
    torch.fx.node.has_side_effect(getattr(torch.ops.latentkv, _name).default)

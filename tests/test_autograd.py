"""Inside autograd the ops, which have no derivative, say so; and it learns of what they write."""

from __future__ import annotations

import re
from typing import Any

import latentkv
import pytest
import torch
from calls import R, call_of, memory, mutated, put, refused, run, tensors, valid
from interpreted import TRITON, elsewhere, passes_interpreted
from latentkv import CacheLayout, providers
from latentkv.ops.description import OPS
from latentkv.providers import Provider

REFUSED = "expected a tensor without gradient, as the op has no derivative: call it under torch.no_grad(), got one that"


@elsewhere
def test_interpreted() -> None:
    passes_interpreted(__file__, *TRITON)


def floats(call: dict[str, Any]) -> list[str]:
    """The arguments that may require a gradient."""
    return [name for name, t in tensors(call).items() if t.is_floating_point()]


@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("op", OPS)
def test_a_gradient_is_refused(op: str, placement: Any, device: str, provider: Provider) -> None:
    """Of a leaf, of what was computed from one, and of a view."""
    for name in floats(call_of(provider, op, device, placement)):
        for kind in ("leaf", "computed", "view"):
            call = valid(op, device, placement)
            t = tensors(call)[name].detach().requires_grad_()
            put(call, name, {"leaf": t, "computed": t * 1, "view": (t * 1)[...]}[kind].requires_grad_())
            before = {n: x._version for n, x in tensors(call).items()}
            assert refused(provider, op, call) == f"latentkv.{op}: {name}: {REFUSED} requires grad"
            assert {n: x._version for n, x in tensors(call).items()} == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", OPS)
def test_where_nothing_is_recorded_it_may(op: str, mode: Any, device: str, provider: Provider) -> None:
    """And it gives the same bytes; leaves, which torch itself would not let change outside of no_grad, too."""
    call, plain = call_of(provider, op, device), valid(op, device)
    for name in floats(call):
        tensors(call)[name].requires_grad_()
    with mode():
        results = run(provider, op, call)
    assert all(t.is_leaf or not t.requires_grad for t in tensors(call).values())
    wanted = run(provider, op, plain)
    for t, name in zip(tensors(call).values(), tensors(plain), strict=True):
        assert torch.equal(t.detach(), tensors(plain)[name]), name
    for result, want in zip(results or (), wanted or (), strict=True):
        assert torch.equal(result, want) and not result.requires_grad


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("op", OPS)
def test_versions_move(op: str, placement: Any, mode: str, device: str, provider: Provider) -> None:
    """Those of what is written, and of nothing else."""
    call = call_of(provider, op, device, placement)
    before = {name: t._version for name, t in tensors(call).items()}
    with torch.set_grad_enabled(mode == "grad"):
        run(provider, op, call)
    moved = {name for name, t in tensors(call).items() if t._version != before[name]}
    assert moved == {name for name in before if name.partition("[")[0] in mutated(op)}


@pytest.mark.parametrize("op", OPS)
def test_inference_tensors_have_no_version(op: str, device: str, provider: Provider) -> None:
    call_of(provider, op, device)
    with torch.inference_mode():
        call = valid(op, device)
        before = memory(call)
        results = run(provider, op, call)
    assert results or memory(call) != before


@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("op", OPS)
def test_what_backward_saved_is_not_changed_unseen(op: str, placement: Any, device: str, provider: Provider) -> None:
    """A product saves what it multiplies with; after the op it is something else. The same of a view's base."""
    written = [
        name for name in floats(call_of(provider, op, device, placement)) if name.partition("[")[0] in mutated(op)
    ]
    for name in written:
        call = valid(op, device, placement)
        target = tensors(call)[name]
        base = torch.stack([target, target])
        put(call, name, base[0])
        weights = torch.ones_like(base, requires_grad=True), torch.ones_like(target, requires_grad=True)
        products = (weights[0] * base).sum(), (weights[1] * tensors(call)[name]).sum()
        run(provider, op, call)
        for product in products:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()


def test_a_gradient_beside_the_op_is_right(device: str, provider: Provider) -> None:
    """What does not pass through an argument flows on."""
    call = valid("rope_", device)
    w = torch.randn(R, device=device, requires_grad=True)
    with torch.no_grad():
        run(provider, "rope_", call)
    (call["q"].float() * w).sum().backward()
    assert torch.equal(w.grad, call["q"].float().sum((0, 1)))


# -------------------------------------------------------------------------------------------- what is made of the ops


@pytest.mark.parametrize("op", OPS)
def test_the_public_functions(op: str, device: str) -> None:
    for name in floats(valid(op, device)):
        call = valid(op, device)
        put(call, name, tensors(call)[name].requires_grad_())
        assert refused(providers.public, op, call).startswith(f"latentkv.{op}: {name}: {REFUSED}")


def layer_call(op: str, device: str) -> dict[str, Any]:
    call = valid("rope_write_cache_", device)
    names = ("positions", "q_pe", "k_pe", "kv_c", "cos_sin_cache", "is_neox")
    return {name: call[name] for name in (names if "rope" in op else ("kv_c", "k_pe"))}


@pytest.mark.parametrize("tokens", [4, 2])
@pytest.mark.parametrize("op", ["layer_write_cache", "layer_rope_write_cache"])
def test_layer_ops(op: str, tokens: int, device: str) -> None:
    """They name themselves, and their versions move, whatever of the rows have slots."""
    cache, layer = CacheLayout(16, 8, 4).allocate(3, device), latentkv.compile.layer_index("autograd.a")
    kernel = getattr(torch.ops.latentkv, op)
    with latentkv.compile.step({"autograd.a": cache}, torch.arange(tokens, device=device)):
        for name in floats(layer_call(op, device)):
            call = layer_call(op, device)
            call[name].requires_grad_()
            before = memory({**call, "cache": cache.data})
            with pytest.raises(RuntimeError, match=rf"^latentkv\.{op}: {name}: {re.escape(REFUSED)}"):
                kernel(*call.values(), layer)
            assert memory({**call, "cache": cache.data}) == before
            with torch.no_grad():
                kernel(*call.values(), layer)
        call = layer_call(op, device)
        versions = [t._version for t in (cache.data, *tensors(call).values())]
        kernel(*call.values(), layer)
        moved = [t._version > v for t, v in zip((cache.data, *tensors(call).values()), versions, strict=True)]
        assert moved == [True, *(name in ("q_pe", "k_pe") and "rope" in op for name in tensors(call))]

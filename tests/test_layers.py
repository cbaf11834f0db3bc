"""The ops that know a cache by its layer: what they write, the step that they look at, torch.compile, CUDA graphs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import latentkv
import pytest
import torch
from conftest import Python
from latentkv import CacheLayout, MLACache, providers
from latentkv.cache.layouts import FORMATS
from latentkv.compile import layer_index, layers, step
from latentkv.ops.schemas import LAYER_OP_NAMES, NAMESPACE, NATIVE_NAMESPACE
from latentkv.testing import Case, Problem, assert_same_bytes
from test_ops import need_compiler, on_meta
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

NAME = "model.layers.3.self_attn"
STRIDES = ["contiguous", "sliced", "unaligned"]  # sliced: q[..., P:], and k_pe and kv_c of one projection
CACHES = {
    "bf16": {"format": "bf16"},
    "bf16 split": {"format": "bf16", "placement": "split", "pages": True},
    "fp8": {"format": "fp8_e4m3fn", "as_bytes": True},
    "fp8 split": {"format": "fp8_e5m2", "placement": "split"},
    "packed": {"format": "fp8_ds_mla"},
}


def problem(device: str, format: str = "bf16", placement: str = "concat", **fields: Any) -> Problem:
    packed = FORMATS[format].packed
    layout = CacheLayout(*(packed.dims if packed else (32, 16)), 4, format, placement)  # type: ignore[arg-type]
    return Problem(Case("rope_write_cache_", layout, **fields), device)


def write(p: Problem, name: str = NAME, heads: bool = False) -> Tensor:
    """layer_write_cache, with k_pe as [N, R] or [N, 1, R]."""
    k_pe = p.k_pe.unsqueeze(1) if heads else p.k_pe
    return torch.ops.latentkv.layer_write_cache(p.kv_c, k_pe, layer_index(name))


def rope_write(p: Problem, name: str = NAME, heads: bool = False) -> Tensor:
    k_pe, neox = p.k_pe.unsqueeze(1) if heads else p.k_pe, p.case.rope == "neox"
    return torch.ops.latentkv.layer_rope_write_cache(
        p.positions, p.q_pe, k_pe, p.kv_c, p.table, neox, layer_index(name)
    )


def rope_alone(p: Problem) -> None:
    providers.reference.rope_(p.positions, p.q_pe, p.k_pe, p.table, is_neox=p.case.rope == "neox")  # type: ignore[arg-type]


def write_alone(p: Problem) -> None:
    providers.reference.write_cache_(p.kv_c, p.k_pe, p.slots, p.cache)


def fused(p: Problem, rope_masked: bool) -> None:
    providers.reference.rope_write_cache_(
        p.positions, p.q_pe, p.k_pe, p.kv_c, p.table, p.slots, p.cache,
        is_neox=p.case.rope == "neox", rope_masked=rope_masked,
    )  # fmt: skip


def assert_empty(result: Tensor, p: Problem) -> None:
    """What attention consumes: no elements, no memory of another tensor."""
    assert (result.shape, result.dtype, result.device) == ((0,), p.kv_c.dtype, p.kv_c.device)
    assert result.untyped_storage().data_ptr() not in {b.untyped_storage().data_ptr() for b in p.buffers.values()}


# ------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rope", ["gptj", "neox"])
@pytest.mark.parametrize("rows", ["full", "padded", "masked"])
def test_same_bytes_as_the_unfused_pair(device: str, rows: str, rope: str, cache: str) -> None:
    """Of every buffer, poison around the tensors included: masked rows and padding are rotated too."""
    for i, strides in enumerate(STRIDES):
        fields = {"rows": rows, "rope": rope, "strides": strides, "index": (torch.int64, torch.int32)[i % 2]}
        got, want, whole = (problem(device, **fields, **CACHES[cache]) for _ in range(3))
        with step({NAME: got.cache}, got.slots):
            assert_empty(rope_write(got, heads=i == 1), got)
        rope_alone(want)
        write_alone(want)
        assert got.differences(want) == []
        fused(whole, rope_masked=True)
        if rows != "padded":
            assert got.differences(whole) == []


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rows", ["full", "padded", "masked"])
def test_write_alone(device: str, rows: str, cache: str) -> None:
    for i, strides in enumerate(STRIDES):
        fields = {"rows": rows, "strides": strides, "index": (torch.int32, torch.int64)[i % 2]}
        got, want = (problem(device, **fields, **CACHES[cache]) for _ in range(2))
        with step({NAME: got.cache}, got.slots):
            assert_empty(write(got, heads=i == 1), got)
        write_alone(want)
        assert got.differences(want) == []


@pytest.mark.parametrize("rows", ["full", "padded", "masked"])
def test_masked_rows_and_padding_stay_on_request(device: str, rows: str) -> None:
    got, want, rotated = (problem(device, rows=rows, strides="sliced") for _ in range(3))
    with step({NAME: got.cache}, got.slots, rope_masked=False):
        rope_write(got)
    fused(want, rope_masked=False)
    assert got.differences(want) == []
    rope_alone(rotated)
    write_alone(rotated)
    assert [d.split(":")[0] for d in got.differences(rotated)] == ([] if rows == "full" else ["q_pe", "kv"])


@pytest.mark.parametrize("rope_masked", [True, False])
@pytest.mark.parametrize("missing", ["slots", "cache", "both", "slots by name"])
def test_without_slots_or_cache_only_rope(device: str, missing: str, rope_masked: bool) -> None:
    """A profiling run, or caches that are not allocated yet: all rows are rotated, nothing is written."""
    for strides in STRIDES:
        got, want = (problem(device, strides=strides, rows="masked") for _ in range(2))
        slots: Any = None if missing in ("slots", "both") else got.slots
        slots = {NAME: None} if missing == "slots by name" else slots
        with step({NAME: None if missing in ("cache", "both") else got.cache}, slots, rope_masked=rope_masked):
            assert_empty(write(got), got)
            assert got.differences(want) == []
            assert_empty(rope_write(got, heads=True), got)
        rope_alone(want)
        assert got.differences(want) == []


def test_no_slots_at_all(device: str) -> None:
    """T = 0: every row is padding."""
    for rope_masked in (True, False):
        got, want = (problem(device) for _ in range(2))
        with step({NAME: got.cache}, got.slots[:0], rope_masked=rope_masked):
            rope_write(got)
            write(got)
        if rope_masked:
            rope_alone(want)
        assert got.differences(want) == []


def test_empty_batch(device: str) -> None:
    got, want = (problem(device, tokens=0) for _ in range(2))
    for cache, slots in ((got.cache, got.slots), (got.cache, None), (None, got.slots)):
        with step({NAME: cache}, slots):
            for result in (write(got), write(got, heads=True), rope_write(got), rope_write(got, heads=True)):
                assert_empty(result, got)
    assert got.differences(want) == []


def test_each_layer_has_its_cache_and_slots(device: str) -> None:
    """Layouts, scales and slots of their own; layers without a cache may lack slots, and slots may know more layers."""
    fields: list[dict[str, Any]] = [{"format": "fp8_e4m3fn"}, {"placement": "split", "rows": "padded"}]
    got, want = ([problem(device, **f) for f in fields] for _ in range(2))
    caches = {"a": got[0].cache, "b": got[1].cache}
    with step(caches, {"a": got[0].slots, "b": got[1].slots, "c": got[0].slots}):
        for name, p in zip("ab", got, strict=True):
            rope_write(p, name)
    for p, q in zip(got, want, strict=True):
        rope_alone(q)
        write_alone(q)
        assert p.differences(q) == []


def test_the_reference_serves_them_too(python: Python) -> None:
    code = """
import latentkv, torch
from latentkv.compile import layer_index, step
from latentkv.testing import Case, Problem
p, want = (Problem(Case("rope_write_cache_", latentkv.CacheLayout(32, 16, 4), rows="masked"), "cpu") for _ in range(2))
with step({"x": p.cache}, p.slots):
    torch.ops.latentkv.layer_rope_write_cache(p.positions, p.q_pe, p.k_pe, p.kv_c, p.table, False, layer_index("x"))
    torch.ops.latentkv.layer_write_cache(p.kv_c, p.k_pe, layer_index("x"))
latentkv.providers.native.rope_(want.positions, want.q_pe, want.k_pe, want.table, is_neox=False)
latentkv.providers.native.write_cache_(want.kv_c, want.k_pe, want.slots, want.cache)
assert p.differences(want) == [] and latentkv.providers.served_by["cpu"] == "reference"
"""
    done = python(code, LATENTKV_PROVIDER="reference")
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------- the step

OPS = {"layer_write_cache": write, "layer_rope_write_cache": rope_write}
each_op = pytest.mark.parametrize("op", OPS)


@contextlib.contextmanager
def refused(p: Problem, message: str) -> Iterator[None]:
    """A RuntimeError of these very words, and nothing is touched."""
    want = Problem(p.case, p.device, p.seed)
    with pytest.raises(RuntimeError) as error:
        yield
    assert str(error.value) == message
    assert p.differences(want) == []


@each_op
def test_outside_of_a_step(op: str, device: str) -> None:
    p = problem(device)
    said = f"latentkv.{op}: layer: expected a call within latentkv.compile.step, got layer '{NAME}' outside of any"
    with refused(p, said):
        OPS[op](p)
    with contextlib.suppress(KeyError), step({NAME: p.cache}, p.slots):
        raise KeyError
    with refused(p, said):
        OPS[op](p)


@each_op
def test_unknown_layer(op: str, device: str) -> None:
    p = problem(device)
    expected = f"latentkv.{op}: layer: expected a layer of the current latentkv.compile.step"
    with step({}, p.slots), refused(p, f"{expected} (none), got '{NAME}'"):
        OPS[op](p)
    with step({"a": p.cache, "b": None}, p.slots), refused(p, f"{expected} ('a', 'b'), got '{NAME}'"):
        OPS[op](p)
    arguments = [p.kv_c, p.k_pe] if op == "layer_write_cache" else [p.positions, p.q_pe, p.k_pe, p.kv_c, p.table, False]
    got = "5, which layer_index has given to no name"
    with step({NAME: p.cache}, p.slots), refused(p, f"{expected} ('{NAME}'), got {got}"):
        getattr(torch.ops.latentkv, op)(*arguments, 5)


@each_op
def test_bad_shape_of_the_key(op: str, device: str) -> None:
    """Said by these ops, also where nothing is written; all else is said by the ops that they call."""
    p = problem(device)
    keys = {"[5, 2, 8]": p.k_pe.view(5, 2, 8), "[80]": p.k_pe.flatten(), "[5, 1, 1, 16]": p.k_pe[:, None, None]}
    for cache in (p.cache, None):
        for shape, p.k_pe in keys.items():
            with (
                step({NAME: cache}, p.slots),
                refused(p, f"latentkv.{op}: k_pe: expected shape [N, R] or [N, 1, R], got {shape}"),
            ):
                OPS[op](p)
    p = problem(device)
    p.k_pe = p.k_pe[:4]
    with step({NAME: p.cache}, p.slots), pytest.raises(RuntimeError, match=rf"latentkv\.{op}: k_pe: "):
        OPS[op](p)


def test_steps_nest(device: str) -> None:
    """The inner one takes the outer one's place as a whole, and gives it back, also after an error."""
    outer, inner, want = (problem(device) for _ in range(3))
    with step({NAME: outer.cache, "x": outer.cache}, outer.slots):
        with step({NAME: inner.cache}, inner.slots):
            rope_write(inner)
            with pytest.raises(RuntimeError, match=r"step \('model.layers.3.self_attn'\), got 'x'$"):
                rope_write(outer, "x")
        with contextlib.suppress(KeyError), step({}, None):
            raise KeyError
        assert outer.differences(want) == []
        rope_write(outer)
    rope_alone(want)
    write_alone(want)
    assert outer.differences(want) == inner.differences(want) == []


def test_a_step_belongs_to_its_thread(device: str) -> None:
    """Two threads in their steps at once, and one outside of any."""
    problems, want = [problem(device) for _ in range(3)], problem(device)
    meet, errors = threading.Barrier(3, timeout=60), []

    def run(p: Problem, context: contextlib.AbstractContextManager[None]) -> None:
        with context:
            meet.wait()
            try:
                rope_write(p)
            except RuntimeError as error:
                errors.append(str(error))
            meet.wait()

    contexts = [step({NAME: p.cache}, p.slots) for p in problems[:2]]
    with step({NAME: problems[2].cache}, problems[2].slots):
        threads = [
            threading.Thread(target=run, args=(p, context))
            for p, context in zip(problems, [*contexts, contextlib.nullcontext()], strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 1 and errors[0].endswith(f"got layer '{NAME}' outside of any")
    assert problems[2].differences(want) == []
    rope_alone(want)
    write_alone(want)
    assert problems[0].differences(want) == problems[1].differences(want) == []


def test_step_rejects(device: str) -> None:
    p = problem(device)
    with (
        pytest.raises(
            TypeError, match=r"^latentkv\.compile\.step: caches\['a'\]: expected an MLACache or None, got Te"
        ),
        step({"a": p.cache.data}, p.slots),  # type: ignore[dict-item]
    ):
        pass
    with (
        pytest.raises(
            ValueError, match=r"^latentkv\.compile\.step: slot_mapping: expected an entry for 'b', got none$"
        ),
        step({"a": p.cache, "b": None}, {"a": p.slots}),
    ):
        pass


def test_layer_index(python: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    """One integer for a name, in every process; a Dynamo integer, and an int64."""
    names = [f"model.layers.{i}.self_attn.attn" for i in range(100)]
    indices = [layer_index(name) for name in names]
    assert indices == [layer_index(name) for name in names]
    assert len(set(indices)) == 100 and all(0 < i < 2**62 for i in indices)
    code = f"from latentkv.compile import layer_index; layer_index('x'); print([layer_index(n) for n in {names}])"
    assert python(code).stdout == f"{indices}\n"
    monkeypatch.setitem(layers._names, indices[7], "another")
    said = rf"^latentkv\.compile\.layer_index: name: expected another than '{names[7]}': 'another' has {indices[7]}$"
    with pytest.raises(ValueError, match=said):
        layer_index(names[7])


# --------------------------------------------------------------------------------------------------- schemas, fakes


def arguments(p: Problem, op: str, heads: bool = False) -> tuple[Any, ...]:
    k_pe, layer = p.k_pe.unsqueeze(1) if heads else p.k_pe, layer_index(NAME)
    if op == "layer_write_cache":
        return (p.kv_c, k_pe, layer)
    return (p.positions, p.q_pe, k_pe, p.kv_c, p.table, p.case.rope == "neox", layer)


def op_of(op: str) -> Any:
    return getattr(torch.ops.latentkv, op).default


def test_schemas() -> None:
    assert tuple(OPS) == LAYER_OP_NAMES
    mutated: dict[str, list[str]] = {"layer_write_cache": [], "layer_rope_write_cache": ["q_pe", "k_pe"]}
    for op in OPS:
        schema = op_of(op)._schema
        assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == mutated[op]
        assert [r.alias_info for r in schema.returns] == [None]
        assert torch.Tag.pt2_compliant_tag in op_of(op).tags
        assert hasattr(getattr(torch.ops, NAMESPACE), op) and not hasattr(getattr(torch.ops, NATIVE_NAMESPACE), op)


@pytest.mark.parametrize("strides", STRIDES)
@each_op
def test_opcheck(op: str, strides: str, device: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch with dynamic shapes."""
    for heads, rows in ((False, "full"), (True, "padded")):
        p = problem(device, strides=strides, rows=rows)
        for cache in (p.cache, None):
            with step({NAME: cache}, p.slots):
                torch.library.opcheck(op_of(op), arguments(p, op, heads))


@each_op
def test_meta_and_fake(op: str) -> None:
    """Neither looks at a step; the fake wants its tensors on one device."""
    real = arguments(problem("cpu"), op)
    result = op_of(op)(*on_meta(real))
    assert (result.shape, result.dtype, result.device.type) == ((0,), torch.bfloat16, "meta")
    for i, value in enumerate(real):
        if isinstance(value, Tensor):
            mixed = on_meta(list(real))
            mixed[i] = value
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(RuntimeError) as error:
                op_of(op)(*tree_map_only(Tensor, mode.from_tensor, mixed))
            assert f"latentkv.{op}: " in str(error.value) and "a tensor on" in str(error.value)


# --------------------------------------------------------------------------------------------------- torch.compile

L, R, P = 32, 16, 24
LAYOUT = CacheLayout(L, R, 4)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_current: list[dict[int, MLACache]] = [{}]  # what the reader below reads, by layer
_reader = torch.library.Library("latentkv_test_layers", "DEF")
_reader.define("read(Tensor q, Tensor written, Tensor slots, SymInt layer) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _read(q: Tensor, written: Tensor, slots: Tensor, layer: int) -> Tensor:
    """Attention's part: it reads the rows of the cache, which is no argument of it either."""
    return _current[0][layer].data.flatten(0, 1)[slots]


_reader.impl("read", _read, "CompositeExplicitAutograd")
torch.library.register_fake(
    "latentkv_test_layers::read", lambda q, written, slots, layer: q.new_empty(slots.shape[0], L + R), lib=_reader
)


class Layer(nn.Module):
    """The part of an MLA layer around the cache update; its cache lies outside the graph.

    ``kind``: products, as projections are, "fused" with GPT-J pairs, with "neox" pairs or "unfused"; "pointwise": what
    is rotated comes out of no kernel of its own; "inputs": q and kv are the graph's inputs, and must be written to.
    """

    def __init__(self, name: str, device: str, kind: str = "fused") -> None:
        super().__init__()
        self.layer, self.kind = layer_index(name), kind
        weight = torch.rand(L, generator=torch.Generator().manual_seed(self.layer)).bfloat16()
        self.weight = nn.Parameter(weight.to(device), requires_grad=False)
        self.q_weight, self.kv_weight = (  # exact, whatever the order of the sums
            nn.Parameter(2 * torch.eye(n, dtype=torch.bfloat16, device=device), requires_grad=False)
            for n in (P + R, L + R)
        )

    def forward(self, q: Tensor, kv: Tensor, positions: Tensor, table: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        if self.kind == "pointwise":
            q, kv = q * 2, kv * 2
        elif self.kind != "inputs":
            q, kv = q @ self.q_weight, kv @ self.kv_weight
        kv_c, k_pe = kv.split([L, R], dim=-1)
        kv_c, q_pe, k_pe = kv_c * self.weight, q[..., P:], k_pe.unsqueeze(1)
        ops, neox = torch.ops.latentkv, self.kind == "neox"
        if self.kind == "unfused":
            ops.rope_(positions, q_pe, k_pe, table, neox)
            written = ops.layer_write_cache(kv_c, k_pe, self.layer)
        else:
            written = ops.layer_rope_write_cache(positions, q_pe, k_pe, kv_c, table, neox, self.layer)
        rows = torch.ops.latentkv_test_layers.read(q, written, slots, self.layer)
        return q + 1, k_pe + 1, rows * 2


def inputs(tokens: int, device: str, seed: int = 0) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    q, kv = (torch.randn(shape, generator=random).bfloat16() for shape in ((tokens, 3, P + R), (tokens, L + R)))
    positions, slots = torch.randint(0, 50, (tokens,), generator=random), torch.randperm(96, generator=random)[:tokens]
    table = torch.rand((50, R), generator=random)
    return tuple(t.to(device) for t in (q, kv, positions, table, slots))  # type: ignore[return-value]


def caches(names: list[str], device: str) -> dict[str, MLACache]:
    return {name: LAYOUT.allocate(24, device) for name in names}


@contextlib.contextmanager
def in_step(by_name: dict[str, MLACache], slots: Tensor) -> Iterator[None]:
    _current[0] = {layer_index(name): cache for name, cache in by_name.items()}
    with step(by_name, slots), torch.no_grad():
        yield


def results(run: Callable[..., tuple[Tensor, ...]], name: str, given: Inputs) -> tuple[Tensor, ...]:
    """All that a layer gives and changes, in a step on a new cache."""
    by_name, given = caches([name], given[0].device.type), tuple(t.clone() for t in given)  # type: ignore[assignment]
    with in_step(by_name, given[-1]):
        return (*run(*given), *given, by_name[name].data)


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert_same_bytes(a, b)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["fused", "neox", "unfused", "pointwise", "inputs"])
def test_compiled(kind: str, backend: str, device: str) -> None:
    """In one graph for any N: q is written through; attention, which consumes the result, reads what was written."""
    need_compiler(backend)
    layer = Layer(NAME, device, kind)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 17):
        given = inputs(tokens, device, tokens)
        want = results(layer, NAME, given)
        assert_same(results(compiled, NAME, given), want)
        assert want[-1].any()
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["fused", "unfused", "inputs"])
def test_compiled_with_the_first_functionalisation(kind: str, device: str) -> None:
    """On tensors with memory of their own: torch 2.13 gives wrong values for views of pointwise results, with any op.

    It clones the whole storage of the base, but Inductor has made no more of it than the view.
    """
    need_compiler("inductor")
    layer = Layer(NAME, device, kind)
    with torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        for tokens in (5, 9):
            given = inputs(tokens, device, tokens)
            assert_same(results(compiled, NAME, given), results(layer, NAME, given))


def test_compiled_raises_outside_of_a_step(device: str) -> None:
    """Found when it runs: compiling looks at no step."""
    compiled = torch.compile(Layer(NAME, device), backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match=rf"expected a call within .* got layer '{NAME}' outside"):
        compiled(*inputs(5, device))


def test_compiled_profiling_run(device: str) -> None:
    """The graph of a step without slots serves a step with them, and the other way round."""
    compiled = torch.compile(Layer(NAME, device), backend="aot_eager", fullgraph=True)
    given, cache = inputs(5, device), LAYOUT.allocate(24, device)
    want = results(Layer(NAME, device), NAME, given)
    for slots in (None, given[-1], None):
        before = cache.data.clone()
        _current[0] = {layer_index(NAME): cache}
        with step({NAME: cache}, slots), torch.no_grad():
            q, k_pe, _ = compiled(*given)
        assert_same((q, k_pe), want[:2])
        assert_same_bytes(cache.data, before if slots is None else want[-1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_equal_layers_share_their_graphs(backend: str, device: str) -> None:
    """Twelve, compiled one by one: a graph for the first one's integer, one for any, and one for any N."""
    need_compiler(backend)
    names = [f"model.layers.{i}.self_attn" for i in range(12)]
    counter = CompileCounterWithBackend(backend)
    graphs = []
    models = [Layer(name, device) for name in names]
    compiled = [torch.compile(layer, backend=counter, fullgraph=True) for layer in models]
    for tokens in (5, 9, 17):
        given = inputs(tokens, device, tokens)
        for name, layer, run in zip(names, models, compiled, strict=True):
            assert_same(results(run, name, given), results(layer, name, given))
            graphs.append(counter.frame_count)
    assert graphs == [1] + 11 * [2] + 24 * [3]


def test_equal_layers_write_to_caches_of_their_own(device: str) -> None:
    """In one step, out of one graph."""
    names = [f"model.layers.{i}.self_attn" for i in range(4)]
    models, given, by_name = [Layer(n, device) for n in names], inputs(5, device), caches(names, device)
    with in_step(by_name, given[-1]):
        for layer in models:
            torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)(*given)
    for name, layer in zip(names, models, strict=True):
        assert_same_bytes(by_name[name].data, results(layer, name, given)[-1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------------ CUDA graphs

captures = pytest.mark.skipif(
    not torch.cuda.is_available() or providers.served_by["cuda"] != "native",
    reason="needs a GPU and the native kernels: the reference reads back to the host",
)


@captures
@pytest.mark.parametrize("slots", ["all", "fewer", "none"])
@pytest.mark.parametrize("rope_masked", [True, False])
def test_neither_allocates_nor_syncs(slots: str, rope_masked: bool) -> None:
    p = problem("cuda", strides="sliced", rows="masked")
    given = {"all": p.slots, "fewer": p.slots[:3], "none": None}[slots]
    with step({NAME: p.cache}, given, rope_masked=rope_masked):
        for op in (rope_write, write):
            op(p)  # the first call may load a kernel
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            torch.cuda.set_sync_debug_mode("error")
            try:
                result = op(p, heads=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
            assert_empty(result, p)


@captures
@pytest.mark.parametrize("tokens", [5, 33])
def test_capture(tokens: int) -> None:
    """A replay looks at no step: it writes to the caches of the capture, at the slots that now stand in its tensor."""
    names = ["a", "b"]
    held, by_name = [inputs(tokens, "cuda", seed) for seed in (0, 1)], caches(names, "cuda")
    slots = held[0][-1]
    models = [Layer(name, "cuda") for name in names]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with in_step(by_name, slots):
        with torch.cuda.stream(side):
            for layer, given in zip(models, held, strict=True):
                layer(*given)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            outputs = [layer(*given[:-1], slots) for layer, given in zip(models, held, strict=True)]
    for seed in (2, 4):
        fresh = [inputs(tokens, "cuda", seed + i) for i in range(2)]
        for given, new in zip(held, fresh, strict=True):
            for old, t in zip(given, new, strict=True):
                old.copy_(t)
        for cache in by_name.values():
            cache.data.zero_()
        graph.replay()
        for layer, name, new, out in zip(models, names, fresh, outputs, strict=True):
            want = results(layer, name, (*new[:-1], fresh[0][-1]))
            assert_same((*out, by_name[name].data), (*want[:3], want[-1]))


@captures
def test_compiled_with_cuda_graphs() -> None:
    """Layers that share a compiled graph: each replays a capture of its own."""
    names = [f"model.layers.{i}.self_attn" for i in range(3)]
    models, given, by_name = [Layer(n, "cuda") for n in names], inputs(5, "cuda"), caches(names, "cuda")
    compiled = [torch.compile(layer, fullgraph=True, mode="reduce-overhead") for layer in models]
    for _ in range(4):
        for cache in by_name.values():
            cache.data.zero_()
        torch.compiler.cudagraph_mark_step_begin()
        with in_step(by_name, given[-1]):
            outputs = [tuple(t.clone() for t in run(*given)) for run in compiled]
        for layer, name, out in zip(models, names, outputs, strict=True):
            want = results(layer, name, given)
            assert_same((*out, by_name[name].data), (*want[:3], want[-1]))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_compile_is_part_of_the_package() -> None:
    assert latentkv.compile.step is step and "compile" in latentkv.__all__

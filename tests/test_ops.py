"""The torch ops: schemas, fakes, torch.compile; and which provider serves them."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import amd
import latentkv
import pytest
import torch
from conftest import Python
from latentkv import CacheLayout, MLACache, build_cos_sin_cache, providers
from latentkv.cache.layouts import FORMATS
from latentkv.compat import vllm
from latentkv.ops.schemas import NAMESPACE, NATIVE_NAMESPACE, NATIVE_OP_NAMES, OP_NAMES
from latentkv.testing import Case, Problem, assert_same_bytes
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

MUTATED = {
    "rope_": ["q", "k"],
    "write_cache_": ["cache", "rope_cache"],
    "rope_write_cache_": ["q_pe", "k_pe", "cache", "rope_cache"],
    "decode_prologue": ["cache", "rope_cache", "q_out", "q_rope_out", "kv_c_out"],
    "write_cache_grouped_": ["caches", "rope_caches"],
    "write_indexer_cache_": ["cache"],
    "gather_cache": ["out"],
    "convert_cache_": ["dst", "dst_rope"],
    "mla_decode": [],
}


def problem(op: str, device: str, strides: str = "contiguous", format: str = "bf16", **fields: Any) -> Problem:
    packed, placement = FORMATS[format].packed, fields.pop("placement", "concat")
    layout = CacheLayout(*(packed.dims if packed else (32, 32)), 4, format, placement)
    if op == "write_indexer_cache_":
        layout = CacheLayout(128, 32, 4, "fp8_e4m3fn")
    elif op == "write_cache_grouped_":
        fields = {"layers": 3} | fields
    elif op == "decode_prologue":
        fields = {"outputs": strides, "norm": "fp32", "normalised": "apart"} | fields
    elif op == "gather_cache":
        fields = {"outputs": strides, "starts": True} | fields
    elif op == "convert_cache_":
        fields = {"to": CacheLayout(32, 32, 3, "fp8_e4m3fn", "split"), "to_bytes": True} | fields
    return Problem(Case(op, layout, strides=strides, as_bytes=True, **fields), device)  # type: ignore[arg-type]


def arguments(p: Problem, inverse: bool = False) -> tuple[Any, ...]:
    """The op's arguments as the schema has them."""
    neox, masked = p.case.rope == "neox", p.case.rows == "rotate-masked"
    if p.case.op == "rope_":
        return (p.positions, p.q_pe, p.k_pe, p.table, neox, inverse)
    if p.case.op == "write_indexer_cache_":
        return (p.k, p.positions, p.table, p.slots, p.index_cache, neox, p.case.power_of_two)
    if p.case.op == "write_cache_grouped_":
        kv_c, k_pe, caches = (list(x) for x in zip(*p.layers, strict=True))
        ropes = [cache.rope_data for cache in caches if cache.rope_data is not None]
        return (kv_c, k_pe, p.slots, [c.data for c in caches], ropes, [c.scale for c in caches], p.case.layout.format)
    cache = (p.cache.data, p.cache.rope_data, p.cache.scale, p.case.layout.format)
    if p.case.op == "gather_cache":
        return (*cache, p.block_table, p.cu_seq_lens, p.out, p.case.layout.kv_lora_rank, p.seq_starts)
    if p.case.op == "convert_cache_":
        dims = (p.case.layout.kv_lora_rank, p.case.layout.rope_dim)
        return (*cache, *p.to_cache.op_arguments, *dims, p.src_blocks, p.dst_blocks)
    if p.case.op == "write_cache_":
        return (p.kv_c, p.k_pe, p.slots, *cache)
    if p.case.op == "rope_write_cache_":
        return (p.positions, p.q_pe, p.k_pe, p.kv_c, p.table, p.slots, *cache, neox, masked)
    outputs = (p.q_out, p.q_rope_out, p.kv_c_out, p.q_scale, p.weight)
    return (p.q_nope, p.q_pe, p.kv_c, p.k_pe, p.positions, p.table, p.slots, *cache, *outputs, neox, 1e-6, masked)


def on_meta(values: Any) -> Any:
    """The same arguments without their memory."""
    return tree_map_only(Tensor, lambda t: t.to("meta"), values)


def op_of(name: str, namespace: str = NAMESPACE) -> Any:
    return getattr(getattr(torch.ops, namespace), name).default


# ----------------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize("op", OP_NAMES)
def test_schema_declares_what_is_mutated(op: str) -> None:
    for namespace in (NAMESPACE, NATIVE_NAMESPACE) if op in NATIVE_OP_NAMES else (NAMESPACE,):
        schema = op_of(op, namespace)._schema
        assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == MUTATED[op]
        assert schema.is_mutable == bool(MUTATED[op]) and len(schema.returns) == (2 if op == "mla_decode" else 0)
        assert "mode" not in {a.name for a in schema.arguments}  # it breaks auto-functionalisation
        assert torch.Tag.pt2_compliant_tag in op_of(op, namespace).tags


def test_the_namespace_holds_the_public_ops() -> None:
    for op in OP_NAMES:
        assert callable(getattr(latentkv, op)) and op in latentkv.__all__
        for name in ("native", "triton", "reference", "public"):
            assert callable(getattr(getattr(providers, name), op))


@pytest.mark.parametrize("strides", ["contiguous", "sliced", "transposed", "unaligned"])
@pytest.mark.parametrize("op", NATIVE_OP_NAMES)
def test_opcheck(op: str, strides: str, device: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch with dynamic shapes."""
    for namespace in (NAMESPACE, NATIVE_NAMESPACE):
        torch.library.opcheck(op_of(op, namespace), arguments(problem(op, device, strides)))


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "fp8_e4m3fn"},
        {"format": "fp8_e4m3fn", "placement": "split", "pages": True},
        {"placement": "split", "scale": None},
        {"rope": "neox", "rows": "rotate-masked", "index": torch.int32},
        {"rope": "none"},
        {"rows": "padded"},
    ],
    ids=str,
)
def test_opcheck_of_other_arguments(fields: dict[str, Any], device: str) -> None:
    """None for optional tensors, uint8 pages, T < N."""
    for op in ("rope_write_cache_", "write_cache_", "decode_prologue", "write_cache_grouped_"):
        torch.library.opcheck(op_of(op), arguments(problem(op, device, **fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"split": True, "scale": None},
        {"in_place": True, "norm": None, "normalised": "none"},
        {"in_place": True, "split": True, "q_scale": 0.5},
        {"format": "fp8_ds_mla"},
        {"format": "fp8_model1", "rope": "none"},
    ],
    ids=str,
)
def test_opcheck_of_other_prologues(fields: dict[str, Any], device: str) -> None:
    torch.library.opcheck(op_of("decode_prologue"), arguments(problem("decode_prologue", device, "sliced", **fields)))


def test_opcheck_of_other_layers_and_keys(device: str) -> None:
    for fields in ({"layers": 1}, {"layers": 2, "scale": None}, {"format": "fp8_ds_mla"}):
        p = problem("write_cache_grouped_", device, **fields)
        torch.library.opcheck(op_of("write_cache_grouped_"), arguments(p))
    for fields in ({"rope": "none"}, {"power_of_two": True, "pages": True, "rows": "masked"}):
        p = problem("write_indexer_cache_", device, **fields)
        torch.library.opcheck(op_of("write_indexer_cache_"), arguments(p))


def test_opcheck_of_rope_without_a_key(device: str) -> None:
    positions, q, _, table, *flags = arguments(problem("rope_", device), inverse=True)
    torch.library.opcheck(op_of("rope_"), (positions, q, None, table, *flags))
    torch.library.opcheck(op_of("rope_"), (positions, q, q[:, :1].clone(), table, *flags))


def test_ops_are_in_place(device: str) -> None:
    """Neither returned nor copied: the caller's memory changes."""
    for op in NATIVE_OP_NAMES:
        p = problem(op, device, "sliced")
        before = copy.deepcopy(p.buffers)
        pointers = {name: b.data_ptr() for name, b in p.buffers.items()}
        assert op_of(op)(*arguments(p)) is None
        assert {name: b.data_ptr() for name, b in p.buffers.items()} == pointers
        assert any(not torch.equal(b, before[name]) for name, b in p.buffers.items())


@pytest.mark.parametrize("kind", ["eager", "compiled", "meta", "fake"])
@pytest.mark.parametrize("op", NATIVE_OP_NAMES)
def test_ops_take_keywords(op: str, kind: str, device: str) -> None:
    """By the schema's names, in any order, after any number of positional arguments."""
    names = [a.name for a in op_of(op)._schema.arguments]
    for split in (0, 2, len(arguments(problem(op, device))) - 1):
        torch._dynamo.reset()
        p, want = problem(op, device), problem(op, device)
        given: list[Any] = list(arguments(p))
        mode: Any = contextlib.nullcontext()
        if kind == "meta":
            given = on_meta(given)
        elif kind == "fake":
            mode = FakeTensorMode()
            given = tree_map_only(Tensor, mode.from_tensor, given)
        call = op_of(op)
        if kind == "compiled":
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        with mode:
            call(*given[:split], **dict(reversed(list(zip(names, given, strict=False))[split:])))
        if kind in ("eager", "compiled"):
            want.run(providers.reference)
            assert p.differences(want) == []


def test_meta_tensors_do_nothing() -> None:
    for op in NATIVE_OP_NAMES:
        op_of(op)(*on_meta(arguments(problem(op, "cpu"))))


def test_fakes_want_one_device() -> None:
    """Of lists too: a tensor elsewhere, and a list's last one."""
    for op in NATIVE_OP_NAMES:
        real = list(arguments(problem(op, "cpu")))
        for i, value in enumerate(real):
            if not isinstance(value, Tensor | list) or not len(value):
                continue
            mixed = on_meta(real)
            mixed[i] = [*mixed[i][:-1], value[-1]] if isinstance(value, list) else value
            if isinstance(value, list) and value[-1] is None:
                continue
            name = op_of(op)._schema.arguments[i].name
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(RuntimeError) as error:
                op_of(op)(*tree_map_only(Tensor, mode.from_tensor, mixed))
            assert f"latentkv.{op}: " in str(error.value) and "a tensor on" in str(error.value), (op, name)


# ----------------------------------------------------------------------------------------------- torch.compile

BACKENDS = ["aot_eager", "inductor"]
Step = Callable[[Problem], tuple[Tensor, ...]]


def fused(p: Problem) -> tuple[Tensor, ...]:
    """Other work around the op, which its order against the op decides."""
    q_before = p.q_pe * 2
    k_before = p.k_pe.float().abs()
    latentkv.rope_write_cache_(
        p.positions, p.q_pe, p.k_pe, p.kv_c, p.table, p.slots, p.cache, is_neox=False, rope_masked=True
    )
    return q_before, k_before, p.q_pe + 1, p.cache.data.view(torch.uint8) + 1, p.kv_c * 3


def unfused(p: Problem) -> tuple[Tensor, ...]:
    """Each tensor is mutated once: between two mutations of one tensor Inductor misplaces reads, for any custom op.

    Seen with plain ``clone()`` in torch 2.13, and with arithmetic on strided tensors in 2.11 on a GPU, where the
    reference provider shows it too.
    """
    latentkv.rope_(p.positions, p.q_pe, p.k_pe, p.table, is_neox=True)
    latentkv.write_cache_(p.kv_c, p.k_pe, p.slots, p.cache)
    return p.q_pe * 2, p.cache.data.view(torch.uint8) + 1


def prologue(p: Problem) -> tuple[Tensor, ...]:
    """The outputs given, fp8 or not, and split; inputs that the graph has made and goes on with."""
    p.kv_c_out.fill_(1)  # type: ignore[union-attr]
    q = latentkv.decode_prologue(
        p.q_nope, p.q_pe, p.kv_c * 2, p.k_pe, p.positions, p.table, p.slots, p.cache, is_neox=False, q_out=p.q_out,
        q_rope_out=p.q_rope_out, kv_c_out=p.kv_c_out, kv_norm_weight=p.weight, q_scale=p.q_scale,
    )  # fmt: skip
    parts = [t.view(torch.uint8) + 1 for t in (q, p.q_rope_out) if t is not None]
    return (*parts, p.kv_c_out + 1, p.q_pe * 2, p.cache.data.view(torch.uint8) + 1)  # type: ignore[operator]


def allocated(p: Problem) -> tuple[Tensor, ...]:
    """The query is the op's own tensor, the normalised vector takes the place of kv_c."""
    before = p.kv_c + 1
    q = latentkv.decode_prologue(
        p.q_nope, p.q_pe, p.kv_c, p.k_pe, p.positions, p.table, p.slots, p.cache, is_neox=True,
        kv_c_out=p.kv_c, kv_norm_weight=p.weight, rope_masked=False,
    )  # fmt: skip
    return q * 2, before, p.kv_c + 1, p.cache.data.view(torch.uint8) + 1


def in_place(p: Problem) -> tuple[Tensor, ...]:
    """q_nope lies in q_out: a batch product has just written it."""
    latent = p.case.layout.kv_lora_rank
    p.q_out[..., :latent].copy_(p.kv_c[:, None] * 0.5)
    q = latentkv.decode_prologue(
        None, p.q_pe, p.kv_c, p.k_pe, None, None, p.slots, p.cache, is_neox=False, q_out=p.q_out,
        kv_norm_weight=p.weight,
    )  # fmt: skip
    return q * 2, p.kv_c + 1


def grouped(p: Problem) -> tuple[Tensor, ...]:
    kv_c, k_pe, caches = zip(*p.layers, strict=True)
    before = [c.data.view(torch.uint8) + 1 for c in caches]
    latentkv.write_cache_grouped_([c * 2 for c in kv_c], k_pe, p.slots, caches)
    return (*before, *(t.view(torch.uint8) + 1 for c in caches for t in c.tensors))


def indexer(p: Problem) -> tuple[Tensor, ...]:
    latentkv.write_indexer_cache_(p.k * 2, p.positions, p.table, p.slots, p.index_cache, is_neox=True)
    return p.k + 1, p.index_cache + 1


def unrotated(p: Problem) -> tuple[Tensor, ...]:
    latentkv.rope_write_cache_(None, p.q_pe, p.k_pe, p.kv_c, None, p.slots, p.cache, is_neox=False)
    return (p.cache.data.view(torch.uint8) + 1,)


def need_compiler(backend: str) -> None:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "strides"), [("aot_eager", "contiguous"), ("aot_eager", "sliced"), ("inductor", "sliced")]
)
@pytest.mark.parametrize("step", [fused, unfused, unrotated], ids=lambda f: f.__name__)
def test_compiled_gives_the_same_bytes(step: Step, strides: str, backend: str, device: str) -> None:
    """A function that calls the public API, in one graph: the tensors are its closure's, as in a model."""
    need_compiler(backend)
    for fields in ({"rows": "padded"}, {"format": "fp8_e4m3fn", "placement": "split", "rows": "masked"}):
        eager, compiled = (problem("rope_write_cache_", device, strides, **fields) for _ in range(2))
        if fields["rows"] == "masked":
            for p in (eager, compiled):  # the other path of auto-functionalisation: fp8 as fp8
                p.cache = MLACache.wrap([t.view(torch.float8_e4m3fn) for t in p.cache.tensors], p.case.layout)
        want = step(eager)
        got = torch.compile(lambda p=compiled: step(p), fullgraph=True, backend=backend)()
        assert compiled.differences(eager) == []
        for a, b in zip(got, want, strict=True):
            assert_same_bytes(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("step", "fields"),
    [
        (prologue, {"rows": "padded", "query": "fp8_e4m3fn", "q_scale": 0.5}),
        (prologue, {"split": True, "format": "fp8_e4m3fn", "placement": "split"}),
        (prologue, {"format": "fp8_ds_mla", "rows": "masked"}),
        (allocated, {"rows": "masked"}),
        (in_place, {"rope": "none"}),
        (grouped, {}),
        (grouped, {"placement": "split", "format": "fp8_e4m3fn", "rows": "masked"}),
        (indexer, {"rows": "padded"}),
    ],
    ids=lambda x: x.__name__ if callable(x) else str(x),
)
def test_compiled_new_ops(step: Step, fields: dict[str, Any], backend: str, device: str) -> None:
    """Each in one graph between other work, on strided tensors."""
    need_compiler(backend)
    op = {grouped: "write_cache_grouped_", indexer: "write_indexer_cache_"}.get(step, "decode_prologue")
    eager, compiled = (problem(op, device, "sliced", **fields) for _ in range(2))
    want = step(eager)
    got = torch.compile(lambda p=compiled: step(p), fullgraph=True, backend=backend)()
    assert compiled.differences(eager) == []
    for a, b in zip(got, want, strict=True):
        assert_same_bytes(a, b)


def test_compiled_prologue_with_arguments(device: str) -> None:
    """q_out comes out of the graph, kv_c and q_nope are views in it; other sizes at the second call."""

    def step(q: Tensor, kv: Tensor, positions: Tensor, table: Tensor, slots: Tensor, cache: MLACache) -> Tensor:
        kv_c, k_pe = kv.split([32, 16], dim=-1)
        q_nope, q_pe = q[..., :32], q[..., 32:]
        return latentkv.decode_prologue(
            q_nope.transpose(0, 1).contiguous().transpose(0, 1), q_pe, kv_c, k_pe, positions, table, slots, cache,
            is_neox=False, kv_c_out=kv_c, kv_norm_weight=table[0].repeat(2), q_dtype=torch.float8_e4m3fn,
        )  # fmt: skip

    random = torch.Generator().manual_seed(0)
    table = torch.rand((50, 16), generator=random).to(device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        inputs = [
            torch.randn((tokens, 3, 48), generator=random).bfloat16().to(device),
            torch.randn((tokens, 48), generator=random).bfloat16().to(device),
            torch.randint(0, 50, (tokens,), generator=random).to(device),
            table,
            torch.randperm(24, generator=random)[:tokens].to(device),
        ]
        ours, theirs = [t.clone() for t in inputs], [t.clone() for t in inputs]
        layout = CacheLayout(32, 16, 4)
        cache, other = layout.allocate(6, device), layout.allocate(6, device)
        want, got = step(*ours, cache), compiled(*theirs, other)
        assert_same_bytes(got.view(torch.uint8), want.view(torch.uint8))
        for a, b in zip((*theirs, other.data), (*ours, cache.data), strict=True):
            assert_same_bytes(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_arguments(backend: str, device: str) -> None:
    """Tensors and the cache handle as inputs, and a second call with other sizes."""
    need_compiler(backend)

    def step(
        q: Tensor, projection: Tensor, positions: Tensor, table: Tensor, slots: Tensor, cache: MLACache
    ) -> tuple[Tensor, Tensor]:
        """q_pe, k_pe and kv_c are views that the graph itself takes."""
        kv_c, k_pe = projection.split([32, 16], dim=-1)
        q_pe = q[..., 24:]
        latentkv.rope_write_cache_(positions, q_pe, k_pe, kv_c, table, slots, cache, is_neox=False)
        return q.float() * 0.5, k_pe + 1

    random = torch.Generator().manual_seed(0)
    table = torch.rand((50, 16), generator=random).to(device)
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (5, 9, 17):
        inputs = [
            torch.randn((tokens, 3, 40), generator=random).bfloat16().to(device),
            torch.randn((tokens, 48), generator=random).bfloat16().to(device),
            torch.randint(0, 50, (tokens,), generator=random).to(device),
            table,
            torch.randperm(24, generator=random)[:tokens].to(device),
        ]
        ours, theirs = [t.clone() for t in inputs], [t.clone() for t in inputs]
        layout = CacheLayout(32, 16, 4)
        cache, other = layout.allocate(6, device), layout.allocate(6, device)
        want, got = step(*ours, cache), compiled(*theirs, other)
        for a, b in zip((*got, *theirs, other.data), (*want, *ours, cache.data), strict=True):
            assert_same_bytes(a, b)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=r"slot_mapping: expected slots below the capacity of 24, got 24"):
            compiled(*theirs[:4], theirs[4] * 0 + 24, other)


def test_views_of_one_buffer_are_functionalised(device: str) -> None:
    """q, k_pe and kv_c of one fused projection [N, H*(P+R) | L | R], and one cache buffer for both parts."""

    def step(x: Tensor, pages: Tensor, positions: Tensor, table: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1.5
        q = y[:, :120].view(-1, 3, 40)
        kv_c, k_pe = y[:, 120:152], y[:, 152:]
        layout = CacheLayout(32, 16, 4, "bf16", "split")
        cache = MLACache.wrap([pages[..., :32], pages[..., 32:48]], layout)
        latentkv.rope_write_cache_(positions, q[..., 24:], k_pe, kv_c, table, slots, cache, is_neox=True)
        return y + 1, q[..., 24:] * 2

    random = torch.Generator().manual_seed(1)
    x = torch.randn((7, 168), generator=random).bfloat16().to(device)
    table = torch.rand((50, 16), generator=random).to(device)
    positions, slots = torch.randint(0, 50, (7,), generator=random).to(device), torch.randperm(24)[:7].to(device)
    results = []
    for run in (step, *(torch.compile(step, fullgraph=True, backend=b) for b in ("eager", "aot_eager"))):
        pages = torch.zeros(6, 4, 50, dtype=torch.bfloat16, device=device)
        results.append((*run(x, pages, positions, table, slots), pages))  # type: ignore[operator]
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bytes(a, b)
    assert results[0][2][..., 48:].eq(0).all() and results[0][2][..., :48].ne(0).any()


# --------------------------------------------------------------------------------------------------- providers

RUN = """
import torch, warnings
warnings.simplefilter("error")
import latentkv
from latentkv.testing import Case, Problem
p, want = (Problem(Case("rope_write_cache_", latentkv.CacheLayout(32, 32, 4)), "cpu") for _ in range(2))
p.run(latentkv.providers.public)
want.run(latentkv.providers.reference)
assert p.differences(want) == []
print(latentkv.providers.served_by, latentkv.providers.library_errors)
"""


def kernels(python: Python, **variables: str) -> str:
    """Where the dispatcher finds the CPU kernel of the public op."""
    code = "import torch, latentkv; print(torch._C._dispatch_dump('latentkv::rope_'))"
    dump = python(code, **variables).stdout
    return next(line for line in dump.splitlines() if line.startswith("CPU:"))


def test_providers_by_default(python: Python) -> None:
    done = python(RUN.replace('warnings.simplefilter("error")', "pass"))
    assert done.returncode == 0, done.stderr
    assert "{'cpu': 'native', " in done.stdout
    assert "csrc_common" in kernels(python)


def test_reference_serves_all_devices(python: Python) -> None:
    done = python(RUN, LATENTKV_PROVIDER="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'cpu': 'reference', 'cuda': 'reference'}")
    assert "csrc_common" not in kernels(python, LATENTKV_PROVIDER="reference")


def test_native_on_request(python: Python) -> None:
    done = python(RUN, LATENTKV_PROVIDER="native")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'cpu': 'native'") and "reference" not in done.stdout


def test_unknown_provider(python: Python) -> None:
    done = python("import latentkv", LATENTKV_PROVIDER="bogus")
    assert done.returncode != 0
    assert "ValueError: LATENTKV_PROVIDER: expected native, triton or reference, got 'bogus'" in done.stderr


def test_triton_on_request(python: Python) -> None:
    """On a CPU only where it interprets: what it cannot serve there is nobody's."""
    if not torch.cuda.is_available():
        done = python("import latentkv", LATENTKV_PROVIDER="triton")
        assert done.returncode != 0 and "ImportError: LATENTKV_PROVIDER=triton, but it can run nowhere" in done.stderr
        assert "on a CPU they need TRITON_INTERPRET=1, which is slow" in done.stderr
    done = python(RUN, LATENTKV_PROVIDER="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'cpu': 'triton'")
    assert "csrc_common" not in kernels(python, LATENTKV_PROVIDER="triton", TRITON_INTERPRET="1")


def test_an_op_that_native_lacks(device: str) -> None:
    cache = CacheLayout(32, 16, 4).allocate(2, device)
    q, table, lengths = torch.zeros(1, 2, 48, dtype=torch.bfloat16, device=device), *torch.zeros(2, 1, 1).long()
    with pytest.raises(RuntimeError, match=r"latentkv.mla_decode: provider: expected triton or reference, got native"):
        providers.native.mla_decode(q, cache, table.to(device), lengths[0].to(device), sm_scale=1.0)
    assert not providers.native.has("mla_decode") and providers.reference.has("mla_decode")
    out, lse = latentkv.mla_decode(q, cache, table.view(1, 1).to(device), lengths.view(1).to(device), sm_scale=1.0)
    assert out.shape == (1, 2, 32) and out.eq(0).all() and lse.eq(-torch.inf).all()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the package without its libraries."""
    shutil.copytree(Path(latentkv.__file__).parent, tmp_path / "latentkv", ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


@pytest.mark.parametrize("triton", [True, False])
def test_without_libraries(bare: Path, python: Python, triton: bool) -> None:
    """Triton serves a GPU's torch where the package is there; else the reference does, and says that it is slow."""
    hide = (
        "import importlib.util as u; f = u.find_spec\nu.find_spec = lambda n, *a: f(n, *a) if n != 'triton' else None\n"
    )
    done = python(("" if triton else hide) + RUN.replace('warnings.simplefilter("error")', "pass"), bare)
    assert done.returncode == 0, done.stderr
    gpu = "triton" if triton and (torch.version.hip or torch.version.cuda) else "reference"
    assert done.stdout.startswith(f"{{'cpu': 'reference', 'cuda': '{gpu}'}}")
    assert "'cpu': 'the library _cpu was not built'" in done.stdout
    missing = "_hip" if torch.version.hip else "_cuda" if torch.version.cuda else None
    no_cuda = f"the library {missing} was not built" if missing else "this torch is built without CUDA or ROCm"
    assert f"'cuda': '{no_cuda}'" in done.stdout
    slow = f"RuntimeWarning: latentkv runs its slow reference on the GPU: {no_cuda}"
    assert (slow in done.stderr) == (torch.cuda.is_available() and gpu == "reference")


@pytest.mark.skipif(amd.problem() is not None, reason=f"no HIP library: {amd.problem()}")
def test_a_rocm_torch_loads_the_hip_library(python: Python, tmp_path: Path) -> None:
    """One package holds all libraries, and torch decides."""
    amd.build_runtime(tmp_path)
    rocm = "import torch; torch.version.hip, torch.version.cuda = '7.1', None\n"
    show = "import latentkv; print(latentkv.providers.served_by, latentkv.providers.library_errors)"
    done = python(rocm + show, LD_LIBRARY_PATH=str(tmp_path))
    assert done.stdout.strip() == "{'cpu': 'native', 'cuda': 'native'} {}", done.stderr
    done = python(rocm + show)
    assert "of this build, got OSError: libtorch_hip.so: cannot open shared object file" in done.stdout, done.stderr
    assert "RuntimeWarning: latentkv passes over its library for cuda: " in done.stderr
    done = python(show, LD_LIBRARY_PATH=str(tmp_path))
    assert ("{'cuda': 'this torch is built without CUDA or ROCm'}" in done.stdout) == (torch.version.cuda is None)


@pytest.mark.skipif(amd.problem() is not None, reason=f"no HIP library: {amd.problem()}")
def test_a_library_without_code_for_the_gpu(python: Python, tmp_path: Path) -> None:
    """It is not loaded: Triton serves the GPU."""
    amd.build_runtime(tmp_path)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "properties").write_text("cpu_cores_count 0\ngfx_target_version 110000\n")
    rocm = f"""
import pathlib, torch
torch.version.hip, torch.version.cuda = "7.1", None
glob = pathlib.Path.glob
found = [pathlib.Path({str(tmp_path / "0" / "properties")!r})]
pathlib.Path.glob = lambda self, pattern: found if "kfd" in str(self) else glob(self, pattern)
import latentkv
print(latentkv.providers.served_by, latentkv.providers.library_errors)"""
    done = python(rocm, LD_LIBRARY_PATH=str(tmp_path))
    assert "'cuda': 'triton'" in done.stdout, done.stderr
    assert "the library _hip was built for gfx90a gfx942 gfx950, not for this machine's gfx1100" in done.stdout


def test_without_libraries_native_cannot_be_had(bare: Path, python: Python) -> None:
    done = python("import latentkv", bare, LATENTKV_PROVIDER="native")
    assert done.returncode != 0
    assert "ImportError: LATENTKV_PROVIDER=native, but it can run nowhere" in done.stderr
    assert "the library _cpu was not built" in done.stderr


def test_a_library_that_does_not_load(bare: Path, python: Python) -> None:
    """It is there, so that it does not serve is no matter of course; but nothing depends on it."""
    (bare / "latentkv" / "_cpu.so").write_text("not a library")
    done = python(RUN.replace('warnings.simplefilter("error")', "pass"), bare)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'cpu': 'reference'") and "_cpu.so: " in done.stdout
    assert "RuntimeWarning: latentkv passes over its library for cpu: " in done.stderr and "_cpu.so: " in done.stderr


def test_served_by(device: str) -> None:
    """In this process: and the provider named is the one that runs."""
    assert providers.served_by[device] in ("native", "triton", "reference")
    for op in NATIVE_OP_NAMES:
        p, want = problem(op, device, "unaligned"), problem(op, device, "unaligned")
        p.run(providers.public)
        want.run(getattr(providers, providers.served_by[device]))
        assert p.differences(want) == []
    for name in ("native", "triton", "reference"):
        assert repr(getattr(providers, name)) == f"<latentkv provider {name}>"


def test_vllm_rotary_of_an_empty_batch(device: str) -> None:
    empty = torch.zeros(0, 256, dtype=torch.bfloat16, device=device)
    table = torch.ones(4, 64, device=device)
    vllm.rotary_embedding(torch.zeros(0, dtype=torch.int64, device=device), empty, None, 64, table, False)


def test_a_copy_that_inductor_drops_is_refused() -> None:
    """pytorch#198031: op(x.clone(), x) is compiled to op(x, x). What may share memory is checked when it runs."""
    table = build_cos_sin_cache(qk_rope_head_dim=8, rope_theta=1e4, max_position_embeddings=64)
    positions, slots, values = torch.arange(3) + 1, torch.arange(3), torch.randn(3, 8)

    def update(x: Tensor, data: Tensor, clones: bool) -> None:
        key = x * 2
        latent = key.clone() if clones else key * 1
        rows = (slots, data, None, None, "fp32", False, False, 8, 8)
        torch.ops.latentkv.rope_write_cache_(positions, x[:, None] * 3, key, latent, table, *rows)

    with torch.no_grad():
        caches = [torch.zeros(1, 4, 16) for _ in range(3)]
        update(values, caches[0], True)
        torch.compile(update)(values, caches[1], False)
        assert torch.equal(caches[0], caches[1])
        outcome = "as written"  # by a torch without the fault
        try:
            torch.compile(update)(values, caches[2], True)
        except RuntimeError as error:
            outcome = str(error)
    if "shares no bytes" in outcome:
        assert not caches[2].any()
    else:
        assert outcome == "as written" and torch.equal(caches[0], caches[2])

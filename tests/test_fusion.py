"""The compile pass: what it fuses, to the same bits and with nothing left behind; what it does not fuse, and why.

Most tests compile with Inductor up to its last graph pass and run that graph as it is (:func:`stop_at_graph`): this
takes no C++ compiler, and shows what is left. Backend ``inductor`` is the real thing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import engine_ops
import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from conftest import Python
from hypothesis import given, settings
from hypothesis import strategies as st
from latentkv import CacheLayout, MLACache, Platform, build_cos_sin_cache
from latentkv.compile import FusionError, FusionPass, Reason, Report, enable, layer_index, step
from latentkv.compile.graph import SCATTERS
from latentkv.testing import POISON, assert_same_bytes, poisoned
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_POSITION = 24
BLOCKS, BLOCK_SIZE = 4, 4
NAMES = tuple(f"model.layers.{i}.attn" for i in range(4))
logging.getLogger("torch.__trace").disabled = True  # else pytest shows thousands of lines at each failure
ROWS = ("x", "positions", "slots", "q_in", "kv_in")  # of the inputs, those with N rows
Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Any]


# ------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Dims:
    """N tokens, H heads, P + R elements of a query head, L of the latent vector."""

    n: int = 5
    h: int = 3
    p: int = 16
    r: int = 16
    latent: int = 32

    def __str__(self) -> str:
        return "x".join(map(str, dataclasses.astuple(self)))


@dataclass
class Inputs:
    """The tensors of one run, equal for equal arguments: what the graph takes, and the layers' caches outside of it."""

    device: str
    dims: Dims = Dims()
    activation: str = "bf16"
    table: str = "fp32"
    format: str = "bf16"
    placement: str = "concat"
    as_bytes: bool = False
    layers: int = 1
    yarn: bool = False
    t: Tensors = field(init=False)
    caches: dict[str, MLACache] = field(init=False)

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)
        n, h, p, r, latent = dataclasses.astuple(self.dims)
        hidden, dtype = 24, DTYPES[self.activation]
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6, "mscale": 1.0}
        table = build_cos_sin_cache(
            rope_theta=100.0,
            qk_rope_head_dim=r,
            max_position_embeddings=MAX_POSITION,
            dtype=DTYPES[self.table],
            **({"rope_parameters": scaling | {"mscale_all_dim": 0.5}} if self.yarn else {}),
        )
        slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=self._random)[:n]
        slots[n // 2] = -1
        self.t = {
            "x": self._draw(n, hidden).to(dtype),
            "positions": torch.randint(0, MAX_POSITION, (n,), generator=self._random),
            "table": table,
            "slots": slots,
            "scale": torch.tensor([0.37]),
            "norm": self._draw(latent).to(dtype),
            "q_in": self._draw(n, h, p + r).to(dtype),
            "kv_in": self._draw(n, latent + r).to(dtype),
            "counter": torch.zeros(1, dtype=torch.long),
        }
        for i in range(self.layers):
            self.t[f"w_q{i}"] = self._draw(hidden, h * (p + r)).to(dtype)
            self.t[f"w_kv{i}"] = self._draw(hidden, latent + r).to(dtype)
            self.t[f"w_all{i}"] = torch.cat([self.t[f"w_q{i}"], self.t[f"w_kv{i}"]], 1)
            self.t[f"w_out{i}"] = (self._draw(h * (p + r), hidden) / 64).to(dtype)
        self.t = {name: t.to(self.device) for name, t in self.t.items()}
        self.caches = {name: self._cache() for name in NAMES[: self.layers]}
        for i, cache in enumerate(self.caches.values()):  # for those updates that take their cache as an argument
            self.t[f"cache{i}"] = cache.data
            if cache.rope_data is not None:
                self.t[f"rope_cache{i}"] = cache.rope_data

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random)

    def _cache(self) -> MLACache:
        layout = CacheLayout(self.dims.latent, self.dims.r, BLOCK_SIZE, self.format, self.placement)  # type: ignore[arg-type]
        dtype = torch.uint8 if self.as_bytes else layout.dtype
        shapes = layout.shapes(BLOCKS)
        parts = [poisoned(b * s * w * dtype.itemsize, self.device).view(dtype).view(b, s, w) for b, s, w in shapes]
        return MLACache.wrap(parts, layout, self.t["scale"])

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Where layer-named ops, and attention, find the caches."""
        engine_ops.CACHES.clear()
        engine_ops.CACHES.update({name: cache for name, cache in self.caches.items() if cache is not None})
        try:
            with step(self.caches, self.t["slots"]):
                yield
        finally:
            engine_ops.CACHES.clear()


# ------------------------------------------------------------------------------------------------- compiling


@dataclass
class Outcome:
    """What the runs of a compiled function returned and left in memory, and what it was compiled to."""

    returned: list[Tensor]
    inputs: list[Inputs]
    graphs: list[torch.fx.GraphModule]
    code: list[str]
    report: Report


def lower(gm: torch.fx.GraphModule, inputs: list[Any], is_inference: bool) -> None:
    """Makes the last graph of Inductor's passes, ours among them, of what it is given."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.virtualized import V

    view_to_reshape(gm)  # as Inductor does before its passes after the gradient
    with V.set_fake_mode(fake_tensor_prop(gm, inputs)):
        _recursive_post_grad_passes(gm, is_inference=is_inference)
    gm.recompile()


class Interpreter(torch.fx.Interpreter):
    """Runs a graph as its fake tensors, and Inductor, have it.

    Eager PyTorch leaves the result of a scatter where its source was in a larger storage.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_function(target, args, kwargs)
        if target in SCATTERS and out.storage_offset():
            out = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device).copy_(out)
        return out


def stop_at_graph(graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
    """A backend: Inductor with all its graph passes, but the last graph is run by PyTorch, and kept in ``graphs``."""
    from torch._inductor.compile_fx import compile_fx

    def inner(gm: torch.fx.GraphModule, inputs: list[Any], *_: Any, is_inference: bool = False, **__: Any) -> Any:
        lower(gm, inputs, is_inference)
        graphs.append(gm)

        def run(args: list[Any]) -> Any:
            own = list(args)
            args.clear()
            return Interpreter(gm).run(*own)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return lambda gm, inputs: compile_fx(gm, inputs, inner_compile=inner)


@contextlib.contextmanager
def settings_of_all_runs(v2: bool = True) -> Iterator[None]:
    """No caches, so that the pass sees every graph; PyTorch's RoPE is rounded as it is written.

    On a GPU Inductor would pad matrices as small as these, which adds copies, off and on.
    """
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(
            fx_graph_cache=False, emulate_precision_casts=True, enable_auto_functionalized_v2=v2, shape_padding=False
        ),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._dynamo.config.patch(automatic_dynamic_local_pgo=False, specialize_int=True),
        torch.no_grad(),
    ):
        yield
    torch._dynamo.reset()


def execute(
    fn: Function,
    *makes: Callable[[], Inputs],
    fuse: Mapping[str, Any] | None = None,
    backend: str = "graph",
    dynamic: bool = False,
    v2: bool = True,
    fullgraph: bool = True,
) -> Outcome:
    """Compiles ``fn`` and runs it on each of the inputs, with the pass and its options ``fuse``, or without."""
    from torch._inductor.utils import run_and_get_code

    inputs, graphs, code, returned = [make() for make in makes], [], [], []
    with contextlib.ExitStack() as stack:
        stack.enter_context(settings_of_all_runs(v2))
        report = Report()
        if fuse is not None:
            report = stack.enter_context(enable(**fuse)).report
        compiled = fn
        if backend != "eager":
            kind = stop_at_graph(graphs) if backend == "graph" else "inductor"
            compiled = torch.compile(fn, backend=kind, fullgraph=fullgraph, dynamic=dynamic)
        for i, given in enumerate(inputs):
            for name in given.t if dynamic else ():
                if name not in ROWS:
                    torch._dynamo.mark_static(given.t[name])
            with given.step():
                if backend == "inductor" and i == 0:
                    out, code = run_and_get_code(compiled, given.t)
                else:
                    out = compiled(given.t)
            returned += list(out)
    return Outcome(returned, inputs, graphs, code, report)


def assert_same(off: Outcome, on: Outcome) -> None:
    """The same bits in what was returned, in every input, and in the caches."""
    assert len(off.returned) == len(on.returned)
    for a, b in zip(on.returned, off.returned, strict=True):
        assert_same_bytes(a, b)
    for mine, theirs in zip(on.inputs, off.inputs, strict=True):
        for name, t in mine.t.items():
            assert_same_bytes(t, theirs.t[name])
        for name, cache in mine.caches.items():
            for a, b in zip(cache.tensors, theirs.caches[name].tensors, strict=True):
                assert_same_bytes(a, b)


FUSED = ("latentkv::layer_rope_write_cache", "latentkv::rope_write_cache_")
# What makes no kernel, or was not made by RoPE and update.
FREE = {f"aten::{name}" for name in (
    "view", "reshape", "_unsafe_view", "slice", "split", "split_with_sizes", "as_strided", "unsqueeze", "squeeze",
    "select", "expand", "permute", "transpose", "t", "alias", "detach", "mm", "addmm", "sym_size", "empty",
)}  # fmt: skip


def calls(graphs: list[torch.fx.GraphModule]) -> Counter[str]:
    """How often each op is called, but for those that take no time."""
    found: Counter[str] = Counter()
    for gm in graphs:
        for node in gm.graph.nodes:
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            if node.target is torch.ops.aten.copy_.default and node.args[0] is node.args[1]:
                continue
            name = node.target._schema.name
            if name not in FREE and not name.startswith("latentkv_tests::"):
                found[name] += 1
    return found


def kernels(code: list[str]) -> int:
    """The kernels that Inductor generated."""
    return sum(len(re.findall(r"async_compile\.(?:cpp_pybinding|triton)\(", c)) for c in code)


# ------------------------------------------------------------------------------------------------- programs

IN_PLACE = ("ours", "ours-apart", "vllm", "vllm-apart", "flashinfer", "aiter")  # ops that rotate what they are given
PYTORCH = ("gptj", "neox", "half", "interleave")
ROPE_NAMES = {
    "ours": "latentkv::rope_",
    "ours-apart": "latentkv::rope_",
    "vllm": "_C::rotary_embedding",
    "vllm-apart": "_C::rotary_embedding",
    "flashinfer": "vllm::flashinfer_rotary_embedding",
    "aiter": "vllm::rocm_aiter_triton_rotary_embedding",
    **dict.fromkeys(PYTORCH, "PyTorch"),
}
UPDATE_NAMES = {
    "layer": "latentkv::layer_write_cache",
    "write": "latentkv::write_cache_",
    "concat": "_C_cache_ops::concat_and_cache_mla",
    "unified": "vllm::unified_mla_kv_cache_update",
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor, spelling: str, upcast: str) -> Tensor:
    """``x`` [N, R] or [N, heads, R] turned, as people write it; cos and sin [N, R/2].

    ``upcast``: x "whole" and at once; "operand" by operand; "promoted" by an fp32 table; "assigned": that too, and
    rounded only where the result is put; "none".
    """
    dtype = x.dtype
    if upcast == "whole":
        x = x.float()
    up: Callable[[Tensor], Tensor] = torch.Tensor.float if upcast == "operand" else lambda y: y
    down: Callable[[Tensor], Tensor] = (lambda y: y) if upcast == "assigned" else lambda y: y.to(dtype)
    if spelling in ("half", "interleave"):
        if spelling == "half":
            # One unsqueeze for the heads: positions have one dimension.
            cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
            a, b = x.chunk(2, -1)
            turned = torch.cat((-b, a), -1)
        else:
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        if x.dim() == 3:
            cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return down(up(x) * cos + up(turned) * sin)
    if x.dim() == 3:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = x.chunk(2, -1) if spelling == "neox" else (x[..., ::2], x[..., 1::2])
    c, d = up(a) * cos - up(b) * sin, up(b) * cos + up(a) * sin
    if upcast == "operand":
        c, d = down(c), down(d)
    out = torch.cat((c, d), -1) if spelling == "neox" else torch.stack((c, d), -1).flatten(-2)
    return down(out)


def gather(table: Tensor, positions: Tensor, how: str) -> Tensor:
    if how == "index_select":
        return table.index_select(0, positions)
    return torch.nn.functional.embedding(positions, table) if how == "embedding" else table[positions]


@dataclass(frozen=True)
class Program:
    """The way from the projections to attention, as an engine might write it.

    Attributes:
        rope: an op of :data:`IN_PLACE` or a spelling of :data:`PYTORCH`.
        is_neox: for ops; a PyTorch spelling has its own.
        upcast: see :func:`rotate`; "op" for ops.
        gathered: how rows of the table are taken: "index", "index_select", "embedding"; "op" for ops.
        take: where the rotated query goes: into its "slice" of q; there by an "assigned" copy of itself; from a "flat"
            contiguous copy back into its slice; into a "cat"; or "direct", to attention as it is.
        key: the dimensions of k_pe, [N, R] or [N, 1, R], in RoPE and in the update: "22", "32", "33".
        source: q and k_pe from "two" projections, or a split of "one".
        update: of :data:`UPDATE_NAMES`, with the format: "", "-fp8" (with a scale), "-split" (fp8, two tensors).
        norm: kv_c goes through arithmetic of its own before it is written.
    """

    rope: str = "gptj"
    is_neox: bool = False
    upcast: str = "whole"
    take: str = "slice"
    key: str = "22"
    source: str = "two"
    update: str = "layer"
    table: str = "fp32"
    activation: str = "bf16"
    gathered: str = "index"
    norm: bool = False
    yarn: bool = False
    dims: Dims = Dims()
    layers: int = 1

    def __str__(self) -> str:
        words = [self.rope, self.upcast, self.take, self.key, self.source, self.update, self.table, self.activation]
        words += [self.gathered, *(name for name in ("is_neox", "norm", "yarn") if getattr(self, name)), str(self.dims)]
        return "-".join(words)

    @property
    def valid(self) -> bool:
        """Whether it means anything, and keeps to arithmetic that rounds as ours."""
        op, kind, short = self.rope in IN_PLACE, self.update.partition("-")[0], self.activation != "fp32"
        wrong = (
            (self.upcast == "op") != op,
            (self.gathered == "op") != op,
            self.is_neox and not op,
            self.take in ("assigned", "flat") and not op,
            self.take == "flat" and self.dims.n == self.dims.h == 1,  # PyTorch will not copy a single row onto itself
            not op and (self.upcast == "none") == short,
            self.upcast == "assigned" and (self.take != "slice" or self.key[0] == "3"),
            self.rope.startswith("vllm") and (not short or self.table == "fp32"),
            self.rounding and (not short or self.table != "fp32"),
            kind in ("write", "concat") and self.key[1] == "3",
        )
        return not any(wrong)

    @property
    def rounding(self) -> bool:
        """Whether it takes ``allow_rounding``."""
        return self.rope in ("flashinfer", "aiter")

    def with_rows(self, n: int) -> Program:
        """The same for another N."""
        return dataclasses.replace(self, dims=dataclasses.replace(self.dims, n=n))

    def inputs(self, device: str) -> Inputs:
        kind, _, format = self.update.partition("-")
        return Inputs(
            device,
            self.dims,
            self.activation,
            self.table,
            format="fp8_e4m3fn" if format else self.activation,
            placement="split" if format == "split" else "concat",
            as_bytes=kind == "concat" and format == "fp8",
            layers=self.layers,
            yarn=self.yarn,
        )

    def __call__(self, t: Tensors) -> list[Tensor]:
        x, out = t["x"], []
        for i in range(self.layers):
            seen = self.attend(t, *self.project(t, x, i), i)
            x = x + seen[0].flatten(1) @ t[f"w_out{i}"]
            out += seen
        return out

    def attend(self, t: Tensors, q: Tensor, q_pe: Tensor | None, kv_c: Tensor, k_pe: Tensor, i: int) -> list[Tensor]:
        """The update and attention of layer i."""
        done = self.write(t, kv_c, k_pe, i)
        direct = self.update.startswith(("write", "concat"))
        cache, name = (t[f"cache{i}"], None) if direct else (None, NAMES[i])
        return torch.ops.latentkv_tests.attention(q, q_pe, kv_c, k_pe, done, cache, name)

    def project(self, t: Tensors, x: Tensor, i: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """q (or its nope part), q_pe (or None), kv_c and the rotated k_pe of layer i."""
        d = self.dims
        h, p, r, latent = d.h, d.p, d.r, d.latent
        if self.source == "one":
            q, kv_c, k_pe = (x @ t[f"w_all{i}"]).split([h * (p + r), latent, r], -1)
        else:
            q = x @ t[f"w_q{i}"]
            kv_c, k_pe = (x @ t[f"w_kv{i}"]).split([latent, r], -1)
        q = q.view(-1, h, p + r)
        if self.norm:
            kv_c = kv_c * t["norm"]
        if self.key[0] == "3":
            k_pe = k_pe.unsqueeze(1)
        q_pe = q[..., p:]
        if self.rope in IN_PLACE:
            if self.take == "flat":
                q_pe = q_pe.reshape(-1, h * r)
            self.rotate_in_place(t, q_pe, k_pe)
            if self.take == "flat":
                q_pe = q_pe.view(-1, h, r)
        else:
            cos, sin = gather(t["table"], t["positions"], self.gathered).chunk(2, -1)
            if self.upcast in ("promoted", "assigned"):
                cos, sin = cos.float(), sin.float()
            q_pe = rotate(q_pe, cos, sin, self.rope, self.upcast)
            k_pe = rotate(k_pe, cos, sin, self.rope, "promoted" if self.upcast == "assigned" else self.upcast)
        if self.take in ("assigned", "flat") or (self.take == "slice" and self.rope in PYTORCH):
            q[..., p:] = q_pe
        if self.key == "32":
            k_pe = k_pe.squeeze(1)
        if self.take == "cat":
            q = torch.cat([q[..., :p], q_pe], -1)
        return (q[..., :p], q_pe, kv_c, k_pe) if self.take == "direct" else (q, None, kv_c, k_pe)

    def rotate_in_place(self, t: Tensors, q_pe: Tensor, k_pe: Tensor) -> None:
        positions, table, r = t["positions"], t["table"], self.dims.r
        if self.rope.startswith("ours"):
            if q_pe.dim() == 2:
                q_pe = q_pe.view(-1, self.dims.h, r)
            if self.rope == "ours":
                torch.ops.latentkv.rope_(positions, q_pe, k_pe, table, self.is_neox)
                return
            torch.ops.latentkv.rope_(positions, q_pe, None, table, self.is_neox)
            torch.ops.latentkv.rope_(positions, k_pe if k_pe.dim() == 3 else k_pe[:, None], None, table, self.is_neox)
        elif self.rope == "vllm-apart":
            torch.ops._C.rotary_embedding(positions, q_pe, None, r, table, self.is_neox)
            torch.ops._C.rotary_embedding(positions, k_pe, None, r, table, self.is_neox)
        else:
            op = {"vllm": torch.ops._C.rotary_embedding, "flashinfer": torch.ops.vllm.flashinfer_rotary_embedding,
                  "aiter": torch.ops.vllm.rocm_aiter_triton_rotary_embedding}[self.rope]  # fmt: skip
            op(positions, q_pe, k_pe, r, table, self.is_neox)

    def write(self, t: Tensors, kv_c: Tensor, k_pe: Tensor, i: int) -> Tensor | None:
        """The update of layer i."""
        kind, _, format = self.update.partition("-")
        if kind == "layer":
            return torch.ops.latentkv.layer_write_cache(kv_c, k_pe, LAYERS[i])
        if kind == "unified":
            return torch.ops.vllm.unified_mla_kv_cache_update(kv_c, k_pe, NAMES[i], "auto", t["scale"])
        cache, rope_cache = t[f"cache{i}"], t.get(f"rope_cache{i}")
        if kind == "concat":
            torch.ops._C_cache_ops.concat_and_cache_mla(kv_c, k_pe, cache, t["slots"], format or "auto", t["scale"])
        else:
            name = "fp8_e4m3fn" if format else self.activation
            scale = t["scale"] if format else None
            torch.ops.latentkv.write_cache_(kv_c, k_pe, t["slots"], cache, rope_cache, scale, name)
        return None


LAYERS = tuple(layer_index(name) for name in NAMES)


CHOICES: dict[str, tuple[Any, ...]] = {
    "rope": IN_PLACE + PYTORCH,
    "is_neox": (False, True),
    "upcast": ("op", "whole", "operand", "promoted", "assigned", "none"),
    "take": ("slice", "assigned", "flat", "cat", "direct"),
    "key": ("22", "32", "33"),
    "source": ("two", "one"),
    "update": ("layer", "layer-fp8", "write", "write-fp8", "write-split", "concat", "concat-fp8", "unified"),
    "table": tuple(DTYPES),
    "activation": tuple(DTYPES),
    "gathered": ("op", "index", "index_select", "embedding"),
    "norm": (False, True),
    "yarn": (False, True),
    "dims": (Dims(), Dims(1, 2, 8, 8, 8), Dims(4, 1, 6, 10, 7), Dims(3, 4, 0, 16, 32), Dims(2, 4, 128, 64, 512)),
}

ALTERNATIVES: tuple[dict[str, tuple[Any, ...]], ...] = (
    {"rope": IN_PLACE, "upcast": ("op",), "gathered": ("op",)},
    {"rope": PYTORCH, "is_neox": (False,)},
)


def covering() -> list[Program]:
    """Programs in which every two choices that go together meet at least once."""
    draw = random.Random(0)

    def sample() -> Program:
        choices = CHOICES | draw.choice(ALTERNATIVES)
        return Program(**{name: draw.choice(values) for name, values in choices.items()})

    pool = [p for p in (sample() for _ in range(10000)) if p.valid]
    pairs = {p: {*itertools.combinations([(n, getattr(p, n)) for n in CHOICES], 2)} for p in pool}
    left, chosen = set().union(*pairs.values()), []
    while left:
        chosen.append(max(pool, key=lambda p: len(pairs[p] & left)))
        left -= pairs[chosen[-1]]
    return chosen


def leftovers(program: Program) -> Counter[str]:
    """What a program computes besides RoPE and update; q needs no concatenation either once its parts lie in place."""
    return Counter(["aten::mul"] * program.norm)


def fused_op(update: str) -> str:
    return FUSED[0] if update.startswith(("layer", "unified")) else FUSED[1]


def check_fused(program: Program, on: Outcome, layers: int = 1) -> None:
    """The report tells of the program's sites, all fused."""
    assert len(on.report.sites) == layers, on.report
    for site in on.report.sites:
        assert site.fused and site.reason is None, site
        assert site.rope == ROPE_NAMES[program.rope]
        assert site.update == UPDATE_NAMES[program.update.partition("-")[0]]
        assert "test_fusion.py" in site.where


# ------------------------------------------------------------------------------------------- what is fused


@pytest.mark.parametrize("program", covering(), ids=str)
def test_fused_with_nothing_left(program: Program, device: str) -> None:
    """The bits of eager PyTorch; one op in the graph, and no copy, clone, scatter, gather or arithmetic of RoPE."""
    make = functools.partial(program.inputs, device)
    off = execute(program, make, backend="eager")
    on = execute(program, make, fuse={"allow_rounding": program.rounding})
    assert_same(off, on)
    check_fused(program, on)
    assert calls(on.graphs) == Counter([fused_op(program.update)]) + leftovers(program)


SOME = (
    Program(),
    Program("ours", upcast="op", gathered="op", take="assigned", key="32", source="one", update="write-fp8"),
    Program("vllm", upcast="op", gathered="op", take="flat", key="33", update="unified", table="bf16", norm=True),
    Program("half", take="slice", key="32", source="one", update="concat-fp8", table="bf16", yarn=True),
    Program("neox", take="direct", upcast="operand", key="33", update="unified", gathered="embedding"),
    Program("interleave", take="cat", upcast="promoted", update="write-split", norm=True),
    Program("gptj", take="slice", key="33", source="one", update="layer-fp8", dims=Dims(2, 4, 128, 64, 512)),
    Program("ours-apart", is_neox=True, upcast="op", gathered="op", take="direct", key="32", update="concat"),
)


# Dynamic shapes for every other one, and for the first both.
@pytest.mark.parametrize(
    ("program", "dynamic"),
    [(SOME[0], False), *((program, i % 2 == 0) for i, program in enumerate(SOME))],
    ids=lambda x: str(x) if isinstance(x, Program) else ["static", "dynamic"][x],
)
def test_inductor(program: Program, dynamic: bool, device: str) -> None:
    """The whole compiler, off and on: the same bits, and no kernel generated that was not there before."""
    programs = [program, program.with_rows(7)] if dynamic else [program]
    makes = [functools.partial(p.inputs, device) for p in programs]
    off = execute(program, *makes, backend="inductor", dynamic=dynamic)
    on = execute(program, *makes, backend="inductor", dynamic=dynamic, fuse={})
    assert_same(off, on)
    check_fused(program, on)
    (code,) = (code.partition("def call(")[2] for code in on.code)
    named = {
        op: code.count(f"torch.ops.{op.replace('::', '.')}.default(")
        for op in {*FUSED, *ROPE_NAMES.values(), *UPDATE_NAMES.values()}
    }
    assert Counter({op: count for op, count in named.items() if count}) == Counter([fused_op(program.update)])
    assert kernels(on.code) == program.norm <= kernels(off.code)
    for word in ("copy_(", "clone", "slice_scatter"):
        assert word not in code


@pytest.mark.parametrize("program", SOME, ids=str)
def test_dynamic_rows(program: Program, device: str) -> None:
    """One graph for any N but 0 and 1, with nothing left in it."""
    makes = [functools.partial(program.with_rows(n).inputs, device) for n in (5, 11, 2, 16)]
    off = execute(program, *makes, backend="eager")
    on = execute(program, *makes, dynamic=True, fuse={})
    assert_same(off, on)
    check_fused(program, on)
    assert len(on.graphs) == 1
    assert calls(on.graphs) == Counter([fused_op(program.update)]) + leftovers(program)


@pytest.mark.parametrize("program", SOME, ids=str)
def test_functionalisation_v1(program: Program, device: str) -> None:
    make = functools.partial(program.inputs, device)
    off = execute(program, make, backend="eager")
    on = execute(program, make, v2=False, fuse={})
    assert_same(off, on)
    check_fused(program, on)
    assert calls(on.graphs) == Counter([fused_op(program.update)]) + leftovers(program)


@pytest.mark.parametrize(
    "program", [Program(layers=3), Program("ours", upcast="op", gathered="op", update="write", layers=3)], ids=str
)
@pytest.mark.parametrize("parallel", [False, True], ids=["in-turn", "parallel"])
def test_each_layer_has_its_own_query(program: Program, parallel: bool, device: str) -> None:
    """All share positions and table; in parallel, nothing but the projections tells whose query is whose."""

    layers = Branches(**vars(program)) if parallel else program

    def fn(t: Tensors) -> list[Tensor]:
        return layers(t)

    make = functools.partial(program.inputs, device)
    off, on = execute(fn, make), execute(fn, make, fuse={})
    assert_same(off, on)
    check_fused(program, on, layers=3)
    assert calls(on.graphs)[fused_op(program.update)] == 3
    nodes = on.graphs[0].graph.nodes
    made = [tuple(source(x).args[1] for x in node.args[1:3]) for node in nodes if "rope_write" in str(node.target)]
    inputs = [n for n in nodes if n.op == "placeholder"]
    d = program.dims
    of_width = {
        width: [n for n in inputs if n.meta["val"].shape == (24, width)]
        for width in (d.h * (d.p + d.r), d.latent + d.r)
    }
    assert made == list(zip(*of_width.values(), strict=True))


class Branches(Program):
    """A program whose layers all start from x."""

    def __call__(self, t: Tensors) -> list[Tensor]:
        parts = [self.project(t, t["x"], i) for i in range(self.layers)]
        return [out for i, part in enumerate(parts) for out in self.attend(t, *part, i)]


def source(node: torch.fx.Node) -> torch.fx.Node:
    """The matrix product that a tensor is a view of."""
    while node.target is not torch.ops.aten.mm.default:
        node = node.args[0]  # type: ignore[assignment]
    return node


# --------------------------------------------------------------------------------------- what is not, and why

D = Dims()
BASE = Program()


def angles(t: Tensors) -> tuple[Tensor, Tensor]:
    cos, sin = t["table"][t["positions"]].chunk(2, -1)
    return cos, sin


def parts(t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, H, P + R], kv_c and k_pe [N, R] of two projections."""
    kv_c, k_pe = (t["x"] @ t["w_kv0"]).split([D.latent, D.r], -1)
    return (t["x"] @ t["w_q0"]).view(-1, D.h, D.p + D.r), kv_c, k_pe


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(x, cos, sin, "gptj", "whole")


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.float()[..., ::2], x.float()[..., 1::2]


def woven(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack((a, b), -1).flatten(-2).bfloat16()


def put(q: Tensor, q_pe: Tensor) -> Tensor:
    """q with its rope part replaced, in a tensor of its own."""
    return torch.cat([q[..., : D.p], q_pe], -1)


def finish(q: Tensor, kv_c: Tensor, k_pe: Tensor, *more: Tensor) -> list[Tensor]:
    """The layer's update and attention; and more to return."""
    done = torch.ops.latentkv.layer_write_cache(kv_c, k_pe, LAYERS[0])
    return [*torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, done, None, NAMES[0]), *more]


def ours(t: Tensors, q: Tensor, k_pe: Tensor | None) -> None:
    """Our op, in place, on the rope part of q, and on k_pe."""
    torch.ops.latentkv.rope_(t["positions"], q[..., D.p :], k_pe, t["table"], False)


UNFUSED: dict[str, tuple[Reason, Function, dict[str, Any]]] = {}


def unfused(reason: Reason, **inputs: Any) -> Callable[[Function], Function]:
    """Registers a function that must be left as it is, for that reason."""

    def register(fn: Function) -> Function:
        UNFUSED[fn.__name__] = (reason, fn, inputs)
        return fn

    return register


@unfused(Reason.PARTITIONED)
def key_from_another_graph(t: Tensors) -> list[Tensor]:
    kv_c, k_pe = t["kv_in"].split([D.latent, D.r], -1)
    q, _, _ = parts(t)
    return finish(q, kv_c, k_pe)


@unfused(Reason.NO_ROPE)
def key_not_rotated(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    return finish(put(q, turned(q[..., D.p :], *angles(t))), kv_c, k_pe)


@unfused(Reason.NO_QUERY)
def query_not_rotated(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    return finish(q, kv_c, turned(k_pe, *angles(t)))


@unfused(Reason.NO_QUERY)
def op_without_query(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    torch.ops.latentkv.rope_(t["positions"], k_pe[:, None], None, t["table"], False)
    return finish(q, kv_c, k_pe)


@unfused(Reason.NO_QUERY)
def other_positions(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    cos, sin = t["table"][t["slots"].abs()].chunk(2, -1)
    return finish(put(q, turned(q[..., D.p :], cos, sin)), kv_c, turned(k_pe, *angles(t)))


@unfused(Reason.NO_QUERY)
def other_table(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    cos, sin = t["norm"].float().expand(MAX_POSITION, -1)[:, : D.r][t["positions"]].chunk(2, -1)
    return finish(put(q, turned(q[..., D.p :], cos, sin)), kv_c, turned(k_pe, *angles(t)))


@unfused(Reason.NO_UPDATE)
def no_update(t: Tensors) -> list[Tensor]:
    q, _, k_pe = parts(t)
    ours(t, q, k_pe)
    return [q, k_pe]


@unfused(Reason.ROUNDING, table="bf16")
def rope_in_bf16(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    cos, sin = angles(t)
    q_pe, k_pe = (rotate(x, cos, sin, "gptj", "none") for x in (q[..., D.p :], k_pe))
    return finish(put(q, q_pe), kv_c, k_pe)


@unfused(Reason.ROUNDING)
def vllm_with_fp32_table(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    torch.ops._C.rotary_embedding(t["positions"], q[..., D.p :], k_pe, D.r, t["table"], False)
    return finish(q, kv_c, k_pe)


@unfused(Reason.ROUNDING)
def flashinfer(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    torch.ops.vllm.flashinfer_rotary_embedding(t["positions"], q[..., D.p :], k_pe, D.r, t["table"], False)
    return finish(q, kv_c, k_pe)


@unfused(Reason.ROUNDING)
def aiter(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    torch.ops.vllm.rocm_aiter_triton_rotary_embedding(t["positions"], q[..., D.p :], k_pe, D.r, t["table"], False)
    return finish(q, kv_c, k_pe)


@unfused(Reason.OTHER_USER)
def unrotated_key_is_returned(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    before = k_pe.clone()
    ours(t, q, k_pe)
    return finish(q, kv_c, k_pe, before)


@unfused(Reason.OTHER_USER)
def whole_projection_is_returned(t: Tensors) -> list[Tensor]:
    """Unrotated, since PyTorch's RoPE makes new tensors."""
    kv = t["x"] @ t["w_kv0"]
    kv_c, k_pe = kv.split([D.latent, D.r], -1)
    q, cos_sin = parts(t)[0], angles(t)
    return finish(put(q, turned(q[..., D.p :], *cos_sin)), kv_c, turned(k_pe, *cos_sin), kv)


@unfused(Reason.OTHER_USER)
def unrotated_query_is_read(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    cos_sin = angles(t)
    read = torch.ops.latentkv_tests.pure(q)
    return finish(put(q, turned(q[..., D.p :], *cos_sin)), kv_c, turned(k_pe, *cos_sin), read)


@unfused(Reason.OTHER_USER)
def one_row_of_the_key_is_read(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    row = torch.ops.latentkv_tests.pure(k_pe[3])
    ours(t, q, k_pe)
    return finish(q, kv_c, k_pe, row)


@unfused(Reason.DTYPE, format="fp16")
def cache_of_another_dtype(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    return finish(q, kv_c.half(), k_pe.half())


@unfused(Reason.SIDE_EFFECT)
def a_note_of_the_rotated(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    torch.ops.latentkv_tests.note(k_pe)
    kv_c = kv_c * t["norm"]
    return finish(q, kv_c, k_pe)


@unfused(Reason.SHAPE)
def positions_of_a_batch(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    cos, sin = t["table"][t["positions"].view(1, -1)].chunk(2, -1)  # [1, N, R / 2]
    q_pe, k_pe = turned(q[..., D.p :], cos[0], sin[0]), turned(k_pe, cos[0], sin[0])
    return finish(put(q, q_pe), kv_c, k_pe)


@unfused(Reason.INPUT)
def query_is_an_input(t: Tensors) -> list[Tensor]:
    _, kv_c, k_pe = parts(t)
    cos_sin = angles(t)
    return finish(put(t["q_in"], turned(t["q_in"][..., D.p :], *cos_sin)), kv_c, turned(k_pe, *cos_sin))


@unfused(Reason.INPUT)
def key_is_an_input(t: Tensors) -> list[Tensor]:
    q, _, _ = parts(t)
    kv_c, k_pe = t["kv_in"].split([D.latent, D.r], -1)
    cos_sin = angles(t)
    return finish(put(q, turned(q[..., D.p :], *cos_sin)), kv_c, turned(k_pe, *cos_sin))


@unfused(Reason.TABLE)
def angles_without_a_table(t: Tensors) -> list[Tensor]:
    """As transformers does it."""
    q, kv_c, k_pe = parts(t)
    at = t["positions"].float()[:, None] * t["table"][3, : D.r // 2]
    cos_sin = at.cos(), at.sin()
    return finish(put(q, turned(q[..., D.p :], *cos_sin)), kv_c, turned(k_pe, *cos_sin))


@unfused(Reason.ROUNDING)
def rounded_table(t: Tensors) -> list[Tensor]:
    """As vLLM does it where activations have another dtype."""
    q, kv_c, k_pe = parts(t)
    cos, sin = t["table"].bfloat16()[t["positions"]].chunk(2, -1)
    return finish(put(q, turned(q[..., D.p :], cos, sin)), kv_c, turned(k_pe, cos, sin))


@unfused(Reason.DEPENDENCE)
def latent_from_the_rotated(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    return finish(q, kv_c + k_pe[:, :1], k_pe)


@unfused(Reason.DEPENDENCE)
def cache_is_read_before_its_update(t: Tensors) -> list[Tensor]:
    """By attention with the rotated query: fused, it would need a copy of the whole cache."""
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    out = torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, None, t["cache0"], None)
    torch.ops.latentkv.write_cache_(kv_c, k_pe, t["slots"], t["cache0"], None, None, "bf16")
    return list(out)


@unfused(Reason.DEPENDENCE)
def bytes_of_the_cache_are_read_before_its_update(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    out = torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, None, t["cache0"].view(torch.uint8), None)
    torch.ops.latentkv.write_cache_(kv_c, k_pe, t["slots"], t["cache0"], None, None, "bf16")
    return list(out)


@unfused(Reason.PADDING)
def padded(t: Tensors) -> list[Tensor]:
    """Slots for fewer rows than positions: the unfused RoPE rotates them all, the fused op would not."""
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    torch.ops.latentkv.write_cache_(kv_c, k_pe, t["slots"][:3], t["cache0"], None, None, "bf16")
    return list(torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, None, t["cache0"], None))


# What the report tells to do, where it knows more than the reason.
ADVICE = {
    "rope_in_bf16": "upcast q_pe, k_pe, cos and sin to fp32",
    "rounded_table": "upcast q_pe, k_pe, cos and sin to fp32",
    "vllm_with_fp32_table": "give it a table of 16 bits",
    "unrotated_key_is_returned": "read k_pe only as rotated",
    "whole_projection_is_returned": "return k_pe only as rotated",
    "unrotated_query_is_read": "read q only as rotated",
    "one_row_of_the_key_is_read": "read k_pe only as rotated",
    "cache_is_read_before_its_update": "let it read the cache after the update",
    "bytes_of_the_cache_are_read_before_its_update": "let it read the cache after the update",
    "padded": "torch._check(slot_mapping.shape[0] == positions.shape[0])",
}


@pytest.mark.parametrize("name", UNFUSED)
def test_unfused(name: str, device: str) -> None:
    """The report names the reason; the graph stays as it was, and right."""
    reason, fn, fields = UNFUSED[name]
    make = functools.partial(Inputs, device, **fields)
    off, on = execute(fn, make), execute(fn, make, fuse={})
    assert_same(off, on)
    (site,) = on.report.sites
    assert (site.fused, site.reason) == (False, reason), site
    assert (site.update is None) == (reason is Reason.NO_UPDATE)
    assert calls(on.graphs) == calls(off.graphs)
    assert reason.name in str(on.report) and "test_fusion.py" in site.where
    assert ADVICE.get(name, reason.advice) in site.advice and f"To fuse it, {site.advice} [" in str(site)
    assert not on.report.fused and on.report.unfused == [site]


def test_heads_that_are_a_symbol(device: str) -> None:
    """They are no place to work in; the report tells what to declare."""

    def fn(t: Tensors) -> list[Tensor]:
        _, kv_c, k_pe = parts(t)
        q = t["q_in"] * 2
        ours(t, q, k_pe)
        return finish(q, kv_c, k_pe)

    inputs = Inputs(device)
    torch._dynamo.mark_dynamic(inputs.t["q_in"], 1)
    with settings_of_all_runs(), enable() as fusion:
        run_once(fn, inputs, dynamic=None)
    (site,) = fusion.report.sites
    assert site.reason is Reason.SHAPE and "declare no more than N dynamic" in str(site)


def test_every_reason_has_a_test() -> None:
    tested = {reason for reason, *_ in UNFUSED.values()} | {Reason.FORMAT}  # below
    assert tested == set(Reason)


@pytest.mark.parametrize("update", ["concat", "unified", "write"])
def test_packed_rows(update: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, but for vLLM's updates on chips where its tiles have another kind of fp8."""
    dims = Dims(latent=512, r=64)
    program = Program("ours", upcast="op", gathered="op", dims=dims)

    def fn(t: Tensors) -> list[Tensor]:
        q, q_pe, kv_c, k_pe = program.project(t, t["x"], 0)
        cache, name = (None, NAMES[0]) if update == "unified" else (t["cache0"], None)
        done = None
        if update == "concat":
            torch.ops._C_cache_ops.concat_and_cache_mla(kv_c, k_pe, cache, t["slots"], "fp8_ds_mla", t["scale"])
        elif update == "unified":
            done = torch.ops.vllm.unified_mla_kv_cache_update(kv_c, k_pe, name, "fp8_ds_mla", t["scale"])
        else:
            torch.ops.latentkv.write_cache_(kv_c, k_pe, t["slots"], cache, None, None, "fp8_ds_mla")
        return list(torch.ops.latentkv_tests.attention(q, q_pe, kv_c, k_pe, done, cache, name))

    make = functools.partial(Inputs, device, dims, format="fp8_ds_mla")
    off, on = execute(fn, make), execute(fn, make, fuse={})
    assert_same(off, on)
    assert [site.fused for site in on.report.sites] == [True]
    monkeypatch.setattr(Platform, "detect", staticmethod(lambda: Platform("rocm", "gfx942")))
    on = execute(fn, make, fuse={})
    assert_same(off, on)
    assert [site.reason for site in on.report.sites] == [None if update == "write" else Reason.FORMAT]


@pytest.mark.parametrize("name", [name for name, (reason, *_) in UNFUSED.items() if reason is Reason.ROUNDING])
def test_allow_rounding(name: str, device: str) -> None:
    """On opt-in; the bits are then those of RoPE in fp32, whatever the graph said."""
    _, fn, fields = UNFUSED[name]
    make = functools.partial(Inputs, device, **fields)
    on = execute(fn, make, fuse={"allow_rounding": True})
    assert [site.fused for site in on.report.sites] == [True]
    spelled = Program("ours", upcast="op", gathered="op", table=fields.get("table", "fp32"))
    assert_same(execute(spelled, make), on)


# Off the beaten track, but fused.

ODD: dict[str, tuple[Function, dict[str, Any], tuple[str, ...]]] = {}


def odd(*left: str, **inputs: Any) -> Callable[[Function], Function]:
    """Registers a function that is fused all the same, and the ops that it needs besides."""

    def register(fn: Function) -> Function:
        ODD[fn.__name__] = (fn, inputs, left)
        return fn

    return register


@odd()
def inputs_that_are_written_back(t: Tensors) -> list[Tensor]:
    """q and k_pe belong to the caller, who sees them rotated."""
    kv_c, k_pe = t["kv_in"].split([D.latent, D.r], -1)
    ours(t, t["q_in"], k_pe)
    return finish(t["q_in"], kv_c, k_pe)


@odd()
def inputs_that_pytorch_writes_back(t: Tensors) -> list[Tensor]:
    kv_c, k_pe = t["kv_in"].split([D.latent, D.r], -1)
    cos_sin = angles(t)
    t["q_in"][..., D.p :] = turned(t["q_in"][..., D.p :], *cos_sin)
    k_pe.copy_(turned(k_pe, *cos_sin))
    return finish(t["q_in"], kv_c, k_pe)


@odd("aten::add", "aten::clamp_max")
def computed_positions(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    t["positions"] = (t["positions"] + 1).clamp(max=MAX_POSITION - 1)
    ours(t, q, k_pe)
    return finish(q, kv_c, k_pe)


@odd("prims::convert_element_type")
def short_positions(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    cos, sin = t["table"][t["positions"].int()].chunk(2, -1)
    return finish(put(q, turned(q[..., D.p :], cos, sin)), kv_c, turned(k_pe, cos, sin))


@odd()
def parts_of_the_table_gathered_apart(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    cos, sin = (half[t["positions"]] for half in t["table"].chunk(2, -1))
    return finish(put(q, turned(q[..., D.p :], cos, sin)), kv_c, turned(k_pe, cos, sin))


@odd()
def table_gathered_twice(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    return finish(put(q, turned(q[..., D.p :], *angles(t))), kv_c, turned(k_pe, *angles(t)))


@odd()
def two_spellings(t: Tensors) -> list[Tensor]:
    """An op for the query, PyTorch for the key."""
    q, kv_c, k_pe = parts(t)
    ours(t, q, None)
    return finish(q, kv_c, rotate(k_pe, *angles(t), "interleave", "operand"))


@odd()
def some_heads(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q[:, :2, D.p :] = turned(q[:, :2, D.p :], *angles(t))
    return finish(q, kv_c, turned(k_pe, *angles(t)))


@odd("aten::sum", "aten::sum", "aten::add", activation="fp32", format="fp32")
def nope_and_latent_are_read_by_others(t: Tensors) -> list[Tensor]:
    """Of the tensors that are rotated in place, but not of the parts that change."""
    q, kv_c, k_pe = parts(t)
    more = q[..., : D.p].sum(-1) + kv_c.sum(-1, keepdim=True)
    ours(t, q, k_pe)
    return finish(q, kv_c, k_pe, more)


@odd()
def the_rotated_are_read_before_the_update(t: Tensors) -> list[Tensor]:
    """As an indexer does."""
    q, kv_c, k_pe = parts(t)
    cos_sin = angles(t)
    q[..., D.p :] = turned(q[..., D.p :], *cos_sin)
    k_pe = turned(k_pe, *cos_sin)
    more = torch.ops.latentkv_tests.pure(q), torch.ops.latentkv_tests.pure(k_pe)
    return finish(q, kv_c, k_pe, *more)


@odd()
def counted_between(t: Tensors) -> list[Tensor]:
    """An op that changes what has nothing to do with it."""
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    torch.ops.latentkv_tests.count_(t["counter"])
    return finish(q, kv_c, k_pe)


@odd()
def noted_before_and_between(t: Tensors) -> list[Tensor]:
    """Side effects that read nothing rotated keep their order without being in the way."""
    q, kv_c, k_pe = parts(t)
    torch.ops.latentkv_tests.note(t["x"][:2])
    ours(t, q, k_pe)
    torch.ops.latentkv_tests.note(t["x"][:3])
    return finish(q, kv_c, k_pe)


@odd()
def only_the_key_is_used_later(t: Tensors) -> list[Tensor]:
    """Nobody reads the rotated query."""
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    done = torch.ops.latentkv.layer_write_cache(kv_c, k_pe, LAYERS[0])
    return list(torch.ops.latentkv_tests.attention(q[..., : D.p], None, kv_c, k_pe, done, None, NAMES[0]))


@odd()
def returned_in_place(t: Tensors) -> list[Tensor]:
    """q, k_pe and the whole projection, as they are after an op in place."""
    kv = t["x"] @ t["w_kv0"]
    kv_c, k_pe = kv.split([D.latent, D.r], -1)
    q, _, _ = parts(t)
    ours(t, q, k_pe)
    return finish(q, kv_c, k_pe, q, k_pe, kv, q[..., D.p :])


@pytest.mark.parametrize("name", ODD)
def test_fused_all_the_same(name: str, device: str) -> None:
    fn, fields, left = ODD[name]
    make = functools.partial(Inputs, device, **fields)
    notes: list[list[int]] = []
    outcomes = []
    for backend, options in (("eager", None), ("graph", {})):
        engine_ops.NOTES.clear()
        outcomes.append(execute(fn, make, fuse=options, backend=backend))
        notes.append(list(engine_ops.NOTES))
    off, on = outcomes
    assert_same(off, on)
    assert notes[0] == notes[1]
    assert [site.fused for site in on.report.sites] == [True], on.report
    assert calls(on.graphs) == Counter([FUSED[0], *left])


# Where a step too far would be wrong. How much is fused is the pass's business; the bits are not.

TRICKY: dict[str, tuple[Function, dict[str, Any], int | None]] = {}


def tricky(fused: int | None = None, **inputs: Any) -> Callable[[Function], Function]:
    """Registers a function, and how many of its updates are fused, if that is to be told."""

    def register(fn: Function) -> Function:
        TRICKY[fn.__name__] = (fn, inputs, fused)
        return fn

    return register


def turn_all(t: Tensors, q: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
    """q with its rope part rotated, and the rotated key, in PyTorch."""
    cos_sin = angles(t)
    return put(q, turned(q[..., D.p :], *cos_sin)), turned(k_pe, *cos_sin)


@tricky()
def heads_change_places(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q, k_pe = turn_all(t, torch.cat([q[:, 1:], q[:, :1]], 1), k_pe)
    return finish(torch.cat([q[:, 2:], q[:, :2]], 1), kv_c, k_pe)


@tricky()
def only_rope_parts_change_heads(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    rolled = torch.cat([q[:, 1:, D.p :], q[:, :1, D.p :]], 1)
    return finish(put(q, turned(rolled, *angles(t))), kv_c, turned(k_pe, *angles(t)))


@tricky()
def rows_change_places(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q, k_pe = turn_all(t, q, torch.cat([k_pe[1:], k_pe[:1]]))
    return finish(q, kv_c, k_pe)


@tricky(fused=0)
def rows_change_places_afterwards(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q, k_pe = turn_all(t, q, k_pe)
    return finish(q, kv_c, torch.cat([k_pe[1:], k_pe[:1]]))


@tricky(fused=0)
def written_in_another_order(t: Tensors) -> list[Tensor]:
    """The cache gets all even elements first."""
    q, kv_c, k_pe = parts(t)
    q, k_pe = turn_all(t, q, k_pe)
    return finish(q, kv_c, k_pe.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(1))


@tricky(fused=0)
def one_row_is_reset(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q, k_pe = turn_all(t, q, k_pe)
    k_pe[3] = 0
    return finish(q, kv_c, k_pe)


@tricky()
def one_row_of_q_is_reset(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q, k_pe = turn_all(t, q, k_pe)
    q[3, :, D.p :] = 0
    return finish(q, kv_c, k_pe)


@tricky(fused=0)
def masked_rows_stay(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q, turned_key = turn_all(t, q, k_pe)
    return finish(q, kv_c, torch.where(t["slots"][:, None] < 0, k_pe, turned_key))


@tricky()
def key_rotated_twice(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    torch.ops.latentkv.rope_(t["positions"], k_pe[:, None], None, t["table"], False)
    return finish(q, kv_c, k_pe)


# In 16 bits PyTorch 2.11 forgets the rounding between the two (pytorch#176565), with the pass or without.
@tricky(activation="fp32", format="fp32")
def both_rotated_twice(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q, k_pe = turn_all(t, *turn_all(t, q, k_pe))
    return finish(q, kv_c, k_pe)


@tricky()
def both_rotated_twice_in_place(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    ours(t, q, k_pe)
    return finish(q, kv_c, k_pe)


@tricky(fused=0)
def turned_back(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    torch.ops.latentkv.rope_(t["positions"], q[..., D.p :], k_pe, t["table"], False, True)
    return finish(q, kv_c, k_pe)


@tricky(fused=0, table="bf16")
def turned_back_by_vllm(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    torch.ops._C.rotary_embedding(t["positions"], q[..., D.p :], k_pe, D.r, t["table"], False, 0, True)
    return finish(q, kv_c, k_pe)


@tricky(table="bf16")
def heads_with_an_offset(t: Tensors) -> list[Tensor]:
    """vLLM's op is given whole heads."""
    q, kv_c, k_pe = parts(t)
    torch.ops._C.rotary_embedding(t["positions"], q.flatten(1), None, D.p + D.r, t["table"], False, D.p)
    torch.ops._C.rotary_embedding(t["positions"], k_pe, None, D.r, t["table"], False)
    return finish(q, kv_c, k_pe)


@tricky(layers=2)
def one_key_for_two_layers(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    done = [torch.ops.latentkv.layer_write_cache(kv_c, k_pe, layer) for layer in LAYERS[:2]]
    return list(torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, torch.cat(done), None, NAMES[0]))


@tricky(fused=1, layers=2)
def one_query_for_two_keys(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    other, other_key = (t["x"].flip(0) @ t["w_kv0"]).split([D.latent, D.r], -1)
    q, k_pe = turn_all(t, q, k_pe)
    out = finish(q, kv_c, k_pe)
    done = torch.ops.latentkv.layer_write_cache(other, turned(other_key, *angles(t)), LAYERS[1])
    return [*out, *torch.ops.latentkv_tests.attention(q, None, other, other_key, done, None, NAMES[1])]


@tricky(fused=1)
def two_queries_for_one_key(t: Tensors) -> list[Tensor]:
    """As an indexer has its own."""
    q, kv_c, k_pe = parts(t)
    more = (t["x"].flip(0) @ t["w_q0"]).view(-1, D.h, D.p + D.r)
    ours(t, more, None)
    ours(t, q, k_pe)
    return finish(q, kv_c, k_pe, more)


@tricky()
def key_of_the_cache_is_a_query(t: Tensors) -> list[Tensor]:
    q, kv_c, _ = parts(t)
    ours(t, q, None)
    return finish(q, kv_c, q[:, 0, D.p :])


@tricky()
def key_is_a_part_of_the_query(t: Tensors) -> list[Tensor]:
    q, kv_c, _ = parts(t)
    q, k_pe = turn_all(t, q, q[:, 0, D.p :])
    return finish(q, kv_c, k_pe)


@tricky(fused=0)
def query_waits_for_the_update(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    k_pe = turned(k_pe, *angles(t))
    done = torch.ops.latentkv.layer_write_cache(kv_c, k_pe, LAYERS[0])
    q = q + done.sum()
    q = put(q, turned(q[..., D.p :], *angles(t)))
    return list(torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, done, None, NAMES[0]))


@tricky(fused=1)
def query_is_rotated_after_the_update(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    k_pe = turned(k_pe, *angles(t))
    done = torch.ops.latentkv.layer_write_cache(kv_c, k_pe, LAYERS[0])
    q[..., D.p :] = turned(q[..., D.p :], *angles(t))
    return list(torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, done, None, NAMES[0]))


@tricky(fused=1)
def written_twice(t: Tensors) -> list[Tensor]:
    """Both go to the same slots: the second must stay the second."""
    q, kv_c, k_pe = parts(t)
    torch.ops.latentkv.layer_write_cache(kv_c * 2, kv_c[:, : D.r] + 2, LAYERS[0])
    ours(t, q, k_pe)
    first = torch.ops.latentkv.layer_write_cache(kv_c, k_pe, LAYERS[0])
    last = torch.ops.latentkv.layer_write_cache(kv_c * 3, kv_c[:, : D.r] + 1, LAYERS[0])
    return list(torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, torch.cat([first, last]), None, NAMES[0]))


@tricky(fused=1)
def positions_advance(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    t["positions"].add_(1)
    out = finish(q, kv_c, k_pe)
    t["slots"].add_(1)
    return out


@tricky(fused=1)
def table_and_slots_change_between(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    t["table"].mul_(2)
    t["slots"].copy_(t["slots"].flip(0))
    torch.ops.latentkv.write_cache_(kv_c, k_pe, t["slots"], t["cache0"], None, None, "bf16")
    t["slots"].zero_()
    return list(torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, None, t["cache0"], None))


@tricky(fused=1)
def cache_is_cleared_between(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    t["cache0"].zero_()
    torch.ops.latentkv.write_cache_(kv_c, k_pe, t["slots"], t["cache0"], None, None, "bf16")
    return list(torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, None, t["cache0"], None))


@tricky(fused=2)
def two_updates_of_one_cache(t: Tensors) -> list[Tensor]:
    out = []
    for flip in (False, True):
        x = t["x"].flip(0) if flip else t["x"]
        q, kv_c, k_pe = parts(t | {"x": x})
        ours(t, q, k_pe)
        torch.ops.latentkv.write_cache_(kv_c, k_pe, t["slots"], t["cache0"], None, None, "bf16")
        out += torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, None, t["cache0"], None)
    return out


@tricky(fused=1)
def cache_is_a_slice_of_all_layers(t: Tensors) -> list[Tensor]:
    """One tensor holds every layer's pages."""
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    cache = t["cache0"][1:]
    torch.ops.latentkv.write_cache_(kv_c, k_pe, t["slots"].clamp(max=BLOCK_SIZE), cache, None, None, "bf16")
    return list(torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, None, cache, None))


@tricky(fused=0, dims=Dims(latent=34))
def latent_overlaps_the_key(t: Tensors) -> list[Tensor]:
    kv = t["x"] @ t["w_kv0"]
    kv_c, k_pe = kv[:, :34], kv[:, 32:48]
    q = (t["x"] @ t["w_q0"]).view(-1, D.h, D.p + D.r)
    q, k_pe = turn_all(t, q, k_pe)
    return finish(q, kv_c, k_pe)


@tricky(dims=Dims(latent=34))
def latent_overlaps_the_key_in_place(t: Tensors) -> list[Tensor]:
    kv = t["x"] @ t["w_kv0"]
    kv_c, k_pe = kv[:, :34], kv[:, 32:48]
    q = (t["x"] @ t["w_q0"]).view(-1, D.h, D.p + D.r)
    ours(t, q, k_pe)
    return finish(q, kv_c, k_pe)


@tricky()
def one_query_for_all_heads(t: Tensors) -> list[Tensor]:
    """Heads of stride 0 are no place to work in."""
    q, kv_c, k_pe = parts(t)
    q, k_pe = turn_all(t, q[:, :1].expand(-1, D.h, -1), k_pe)
    return finish(q, kv_c, k_pe)


@tricky()
def one_key_for_all_rows(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q, k_pe = turn_all(t, q, k_pe[:1].expand(len(kv_c), -1))
    return finish(q, kv_c, k_pe)


@tricky()
def key_spread_over_heads(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    keys = turned(k_pe[:, None].expand(-1, D.h, -1), *angles(t))
    q, _ = turn_all(t, q, k_pe)
    return finish(q, kv_c, keys[:, 0])


@tricky(fused=1)
def rope_part_comes_first(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q[..., : D.r] = turned(q[..., : D.r], *angles(t))
    return finish(q, kv_c, turned(k_pe, *angles(t)))


@tricky()
def heads_before_rows(t: Tensors) -> list[Tensor]:
    """q as [H, N, D], rotated there."""
    q, kv_c, k_pe = parts(t)
    q = q.transpose(0, 1)
    cos, sin = angles(t)
    a, b = pairs(q[..., D.p :])
    q_pe = woven(a * cos - b * sin, b * cos + a * sin)
    q = torch.cat([q[..., : D.p], q_pe], -1).transpose(0, 1)
    return finish(q, kv_c, turned(k_pe, cos, sin))


@tricky(fused=1)
def query_is_scaled_afterwards(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    q *= 1.5
    return finish(q, kv_c, k_pe)


@tricky()
def clone_is_rotated(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    copy = q.clone()
    ours(t, copy, k_pe)
    return finish(copy, kv_c, k_pe, q)


@tricky()
def swapped_halves_of_the_table(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    sin, cos = angles(t)
    return finish(put(q, turned(q[..., D.p :], cos, sin)), kv_c, turned(k_pe, cos, sin))


@tricky()
def later_columns_of_a_wider_table(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    rows = torch.cat([t["table"], t["table"]], 1)[t["positions"]]
    cos, sin = rows[:, D.r : D.r + D.r // 2], rows[:, D.r + D.r // 2 :]
    return finish(put(q, turned(q[..., D.p :], cos, sin)), kv_c, turned(k_pe, cos, sin))


@tricky()
def changed_input_is_read_before(t: Tensors) -> list[Tensor]:
    """q is the caller's; its old value goes out too."""
    old = t["q_in"] * 2
    kv_c, k_pe = t["kv_in"].split([D.latent, D.r], -1)
    ours(t, t["q_in"], k_pe)
    return finish(t["q_in"], kv_c, k_pe, old)


@tricky()
def key_in_every_other_element(t: Tensors) -> list[Tensor]:
    """Of a tensor from which a concatenation is made: no place to work in, as heads must be contiguous."""
    q, _, _ = parts(t)
    kv = (t["x"] @ t["w_kv0"])[:, : 2 * D.r]
    kv = torch.cat([kv[:, ::2], kv[:, 1::2]], 1)
    q, k_pe = turn_all(t, q, kv[:, D.r :])
    return finish(q, t["x"] @ t["w_kv0"][:, : D.latent], k_pe)


@tricky()
def rotated_and_reordered(t: Tensors) -> list[Tensor]:
    """What is a view of a tensor of its own need not be one of q."""
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    q_pe = q[..., D.p :].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return finish(put(q, q_pe), kv_c, k_pe, q_pe)


@tricky()
def reordered_as_a_whole(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    q = q.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return finish(q, kv_c, k_pe, q)


@tricky()
def flattened_parts(t: Tensors) -> list[Tensor]:
    """Views of what is contiguous only when it is not fused."""
    q, kv_c, k_pe = parts(t)
    cos_sin = angles(t)
    q_pe, k_pe = turned(q[..., D.p :], *cos_sin), turned(k_pe, *cos_sin)
    return finish(put(q, q_pe), kv_c, k_pe, q_pe.view(-1), k_pe.view(-1), q_pe.view(-1, 2) * 2)


@tricky()
def strided_by_hand(t: Tensors) -> list[Tensor]:
    """What lies so in the memory of the unfused results."""
    q, kv_c, k_pe = parts(t)
    cos_sin = angles(t)
    q_pe, k_pe = turned(q[..., D.p :], *cos_sin), turned(k_pe, *cos_sin)
    more = q_pe.as_strided((2, D.r), (D.r, 1)) * 2, k_pe.as_strided((D.r, 3), (1, D.r)) * 2
    return finish(put(q, q_pe), kv_c, k_pe, *more)


@tricky()
def strided_by_hand_in_place(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    more = q.as_strided((2, 3), (1, 2), 20) * 2, k_pe.as_strided((3, D.r), (D.latent + D.r, 1), D.latent) * 2
    return finish(q, kv_c, k_pe, *more)


@tricky()
def positions_of_stride_0(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    t["positions"] = t["positions"][:1].expand(len(kv_c))
    q, k_pe = turn_all(t, q, k_pe)
    return finish(q, kv_c, k_pe)


@tricky()
def positions_are_a_column(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    t["positions"] = torch.stack([t["positions"], t["slots"]], 1)[:, 0]
    q, k_pe = turn_all(t, q, k_pe)
    return finish(q, kv_c, k_pe)


@tricky()
def table_lies_across(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    t["table"] = t["table"].T.contiguous().T
    q, k_pe = turn_all(t, q, k_pe)
    return finish(q, kv_c, k_pe)


@tricky()
def views_of_one_input(t: Tensors) -> list[Tensor]:
    """The graph is given q_pe, k_pe and kv_c as views."""
    torch.ops.latentkv.rope_(t["positions"], t["q_pe_in"], t["k_pe_in"], t["table"], False)
    done = torch.ops.latentkv.layer_write_cache(t["kv_c_in"], t["k_pe_in"], LAYERS[0])
    q = t["q_pe_in"]
    return list(torch.ops.latentkv_tests.attention(q, None, t["kv_c_in"], t["k_pe_in"], done, None, NAMES[0]))


def turn_in_place(t: Tensors, q: Tensor, k_pe: Tensor) -> Tensor:
    """The query first, written back; then the key, which is returned."""
    cos_sin = angles(t)
    q[..., D.p :] = turned(q[..., D.p :], *cos_sin)
    return turned(k_pe, *cos_sin)


@tricky(fused=1)
def query_before_key_in_one_projection(t: Tensors) -> list[Tensor]:
    widths = [D.h * (D.p + D.r), D.latent, D.r]
    q, kv_c, k_pe = (t["x"] @ torch.cat([t["w_q0"], t["w_kv0"]], 1)).split(widths, -1)
    q = q.view(-1, D.h, D.p + D.r)
    k_pe = turn_in_place(t, q, k_pe)
    return finish(q, kv_c, k_pe)


@tricky(fused=0)
def key_through_fp8(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    k_pe = turn_in_place(t, q, k_pe)
    return finish(q, kv_c, k_pe.to(torch.float8_e4m3fn).bfloat16())


@tricky(fused=0)
def key_through_integers(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    k_pe = turn_in_place(t, q, k_pe)
    return finish(q, kv_c, k_pe.to(torch.int32).bfloat16())


@tricky(fused=0)
def table_through_fp8(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    cos, sin = (x.to(torch.float8_e4m3fn).float() for x in angles(t))
    q[..., D.p :] = turned(q[..., D.p :], cos, sin)
    return finish(q, kv_c, turned(k_pe, cos, sin))


@tricky()
def query_through_fp8_before(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    cos_sin = angles(t)
    q[..., D.p :] = turned(q[..., D.p :].to(torch.float8_e4m3fn).bfloat16(), *cos_sin)
    return finish(q, kv_c, turned(k_pe, *cos_sin))


@tricky()
def key_changed_by_a_column_later(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    k_pe = turn_in_place(t, q, k_pe)
    result = finish(q, kv_c, k_pe)
    torch.ops.latentkv_tests.count_(k_pe[:, 1])
    return [*result, k_pe]


@tricky()
def query_changed_by_a_head_later(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    q, k_pe = turn_all(t, q, k_pe)
    result = finish(q, kv_c, k_pe)
    torch.ops.latentkv_tests.count_(q[:, 0])
    return [*result, q]


@tricky()
def key_by_strides(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    k_pe = turn_in_place(t, q, k_pe)
    return finish(q, kv_c, k_pe, torch.as_strided(k_pe, (D.n, D.r), (D.r, 1)) * 1)


@tricky(dims=Dims(n=1))
def bytes_of_the_key_before(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    old = k_pe.view(torch.uint8) + 1
    return finish(q, kv_c, turn_in_place(t, q, k_pe), old)


@tricky(fused=1)
def the_cache_as_it_was_is_read_by_others(t: Tensors) -> list[Tensor]:
    """By what needs nothing that is rotated, and stays before."""
    q, kv_c, k_pe = parts(t)
    ours(t, q, k_pe)
    before = t["cache0"].float().sum()
    torch.ops.latentkv.write_cache_(kv_c, k_pe, t["slots"], t["cache0"], None, None, "bf16")
    return [*torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, None, t["cache0"], None), before]


@tricky(fused=1)
def one_element_of_each(t: Tensors) -> list[Tensor]:
    q, kv_c, k_pe = parts(t)
    k_pe = turn_in_place(t, q, k_pe)
    return finish(q, kv_c, k_pe, q[0, 0, -1:] * 2, (k_pe[0, 0] * 2).reshape(1))


@pytest.mark.parametrize("what", ["sin", "query"])
def test_bounds_that_are_symbols(what: str, device: str) -> None:
    """A slice that is RoPE's for one value of an integer is not for another, in the same graph."""

    def fn(t: Tensors, start: int) -> list[Tensor]:
        q, kv_c, k_pe = parts(t)
        cos, sin = rows = t["table"][t["positions"]].chunk(2, -1)
        source = q[..., D.p :]
        if what == "sin":
            sin = torch.cat(rows, -1)[:, start - 8 : start]
        else:
            source = q[..., start : start + D.r]
        q[..., D.p :] = turned(source, cos, sin)
        return finish(q, kv_c, turned(k_pe, cos, sin))

    for start in (D.p, D.p - 2):
        results: list[list[Tensor]] = []
        for on in (False, True):
            inputs, graphs = Inputs(device, layers=2), []
            with settings_of_all_runs(), contextlib.ExitStack() as stack:
                stack.enter_context(torch._dynamo.config.patch(specialize_int=False))
                if on:
                    stack.enter_context(enable())
                stack.enter_context(inputs.step())
                call = torch.compile(fn, backend=stop_at_graph(graphs), dynamic=True, fullgraph=True) if on else fn
                for t in inputs.t.values():
                    torch._dynamo.mark_static(t)
                if on:
                    call(inputs.t, D.p)  # which makes the graph
                    inputs = Inputs(device, layers=2)
                    stack.enter_context(inputs.step())
                results.append(call(inputs.t, start))
        for a, b in zip(*results, strict=True):
            assert_same_bytes(a, b)


@pytest.mark.parametrize("name", TRICKY)
def test_the_bits_stay(name: str, device: str) -> None:
    fn, fields, fused = TRICKY[name]

    def make() -> Inputs:
        inputs = Inputs(device, **fields)
        inputs.t["q_pe_in"] = inputs.t["q_in"][..., inputs.dims.p :]
        inputs.t["kv_c_in"], inputs.t["k_pe_in"] = inputs.t["kv_in"].split([inputs.dims.latent, inputs.dims.r], -1)
        return inputs

    off, on = execute(fn, make, backend="eager"), execute(fn, make, fuse={})
    assert_same(off, on)
    if fused is not None:
        assert len(on.report.fused) == fused, on.report


# Looks like RoPE, and is not: nothing may be fused.


def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = pairs(x)
    return woven(a * cos + b * sin, b * cos - a * sin)


def wrong_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = pairs(x)
    return woven(a * cos + b * sin, b * cos + a * sin)


def plainly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """That is RoPE."""
    a, b = pairs(x)
    return woven(a * cos - b * sin, b * cos + a * sin)


def swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return plainly(x, sin, cos)


def neighbour(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The partner's index is off."""
    a, b = pairs(x)
    return woven(a * cos - b.roll(1, -1) * sin, b * cos + a * sin)


def same_partner(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = pairs(x)
    return woven(a * cos - b * sin, b * cos + b * sin)


def reordered(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' DeepSeek-V3: GPT-J pairs go in, NeoX pairs come out."""
    a, b = pairs(x)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).bfloat16()


def mixed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """NeoX pairs go in, GPT-J pairs come out."""
    a, b = x.float().chunk(2, -1)
    return woven(a * cos - b * sin, b * cos + a * sin)


def scaled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return plainly(x, cos * 1.5, sin)


def shifted_table(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return plainly(x, cos.roll(1, -1), sin.roll(1, -1))


def other_row(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return plainly(x, cos.flip(0), sin.flip(0))


def one_row_skipped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = plainly(x, cos, sin)
    return torch.cat([out[:3], x[3:4], out[4:]])


def one_row_of_cos_differs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return plainly(x, torch.cat([cos[:3], sin[3:4], cos[4:]]), sin)


def half_of_it(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([plainly(x[..., :half], cos[..., ::2], sin[..., ::2]), x[..., half:]], -1)


def one_element_differs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = plainly(x, cos, sin)
    return torch.cat([out[..., :-1], x[..., -1:]], -1)


def rounded_on_the_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The sum of rounded products."""
    a, b = pairs(x)
    return woven((a * cos).bfloat16() - (b * sin).bfloat16(), (b * cos).bfloat16() + (a * sin).bfloat16())


def in_fp64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = pairs(x.double())
    cos, sin = cos.double(), sin.double()
    return woven(a.double() * cos - b.double() * sin, b.double() * cos + a.double() * sin)


def with_a_sum_too_much(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = pairs(x)
    return woven(a * cos - b * sin + 0.5, b * cos + a * sin)


NOT_ROPE = (backwards, wrong_sign, swapped, neighbour, same_partner, reordered, mixed, scaled, shifted_table, other_row,
            one_row_skipped, one_row_of_cos_differs, half_of_it, one_element_differs, rounded_on_the_way, in_fp64,
            with_a_sum_too_much)  # fmt: skip


# On both the query and the key, and on one of them in turns.
@pytest.mark.parametrize(
    ("turn", "which"),
    [pair for i, turn in enumerate(NOT_ROPE) for pair in ((turn, "both"), (turn, ("query", "key")[i % 2]))],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_what_is_no_rope_is_not_fused(turn: Callable[..., Tensor], which: str, device: str) -> None:
    """Of 13 rows, so that a few that one would look at do not tell about all."""

    def fn(t: Tensors) -> list[Tensor]:
        q, kv_c, k_pe = parts(t)
        cos, sin = angles(t)
        cos, sin = cos[:, None], sin[:, None]
        q_pe = (plainly if which == "key" else turn)(q[..., D.p :], cos, sin)
        k_pe = (plainly if which == "query" else turn)(k_pe[:, None], cos, sin)[:, 0]
        return finish(put(q, q_pe), kv_c, k_pe)

    make = functools.partial(Inputs, device, Dims(n=13))
    off, on = execute(fn, make, backend="eager"), execute(fn, make, fuse={})
    assert_same(off, on)
    (site,) = on.report.sites
    assert not site.fused, site


# ------------------------------------------------------------------------------- rows that change, layers, splits


def test_rows_of_a_dynamic_size(device: str) -> None:
    """RoPE for the first five rows of what had five rows when it was compiled."""

    def fn(t: Tensors) -> list[Tensor]:
        q, kv_c, k_pe = parts(t)
        cos, sin = (x[:5] for x in angles(t))
        q_pe = torch.cat([turned(q[:5, :, D.p :], cos, sin), q[5:, :, D.p :]])
        return finish(put(q, q_pe), kv_c, torch.cat([turned(k_pe[:5], cos, sin), k_pe[5:]]))

    makes = [functools.partial(Inputs, device, Dims(n=n)) for n in (6, 9)]
    off, on = execute(fn, *makes, backend="eager"), execute(fn, *makes, fuse={}, dynamic=True)
    assert_same(off, on)
    assert not on.report.fused


def test_rows_read_before_are_as_many_as_were_compiled(device: str) -> None:
    """The first 4 rows of the query are read before RoPE, in a graph that was made for 4 rows and runs with 8."""

    def fn(t: Tensors) -> list[Tensor]:
        q, kv_c, k_pe = parts(t)
        kv_c = kv_c + q[:4, :, D.p :].float().sum().bfloat16()
        q, k_pe = turn_all(t, q, k_pe)
        return finish(q, kv_c, k_pe)

    makes = [functools.partial(Inputs, device, Dims(n=n)) for n in (4, 8)]
    off, on = execute(fn, *makes, backend="eager"), execute(fn, *makes, fuse={}, dynamic=True)
    assert_same(off, on)


@pytest.mark.parametrize("width", [16, 200])
def test_parts_that_overlap_for_many_rows(width: int, device: str) -> None:
    """A column block of 5 rows lies before the key of a tensor of N; whether it meets it depends on N."""

    def fn(t: Tensors) -> list[Tensor]:
        q, _, _ = parts(t)
        kv = (t["x"] @ t["w_kv0"]).flatten()
        n = t["x"].shape[0]
        k_pe, more = kv[-n * D.r :].view(n, D.r), kv[:width].float().sum().reshape(1)
        q, k_pe = turn_all(t, q, k_pe)
        return finish(q, t["x"] @ t["w_kv0"][:, : D.latent], k_pe, more)

    makes = [functools.partial(Inputs, device, Dims(n=n)) for n in (5, 9)]
    off, on = execute(fn, *makes, backend="eager"), execute(fn, *makes, fuse={}, dynamic=True)
    assert_same(off, on)


@pytest.mark.parametrize("how", ["folded", "unused"])
@pytest.mark.parametrize("update", ["layer", "unified"])
@pytest.mark.parametrize("fuse", [None, {}], ids=["off", "on"])
def test_a_write_happens_whatever_becomes_of_its_result(
    fuse: dict[str, Any] | None, update: str, how: str, device: str
) -> None:
    """Inductor folds the sum of an empty tensor. vLLM's op is ours to keep only where the pass is on."""
    program = Program("ours", upcast="op", gathered="op", update=update)

    def fn(t: Tensors) -> list[Tensor]:
        _, _, kv_c, k_pe = program.project(t, t["x"], 0)
        done = program.write(t, kv_c, k_pe, 0)
        return [kv_c + done.sum() if how == "folded" else kv_c * 2]

    if update == "unified":
        FusionPass()
    make = functools.partial(Inputs, device)
    off, on = execute(fn, make, backend="eager"), execute(fn, make, backend="inductor", fuse=fuse)
    assert_same(off, on)
    assert [site.fused for site in on.report.sites] == [True] * (fuse is not None)


def test_every_node_is_evaluated_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps before RoPE and after it that would double the work, one by one, of whoever forgets; and long ones."""
    from latentkv.compile.elements import Elements

    seen: Counter[tuple[int, str]] = Counter()
    evaluate = Elements._evaluate

    def counting(self: Elements, node: torch.fx.Node) -> Any:
        seen[id(self), node.name] += 1
        return evaluate(self, node)

    def fn(t: Tensors) -> list[Tensor]:
        q, kv_c, k_pe = parts(t)
        for _ in range(60):
            k_pe = k_pe + k_pe * 0.5
        q, k_pe = turn_all(t, q, k_pe)
        q_pe = q[..., D.p :]
        for i in (8, 4, 2, 1):  # a Hadamard transform
            a, b = q_pe.unflatten(-1, (-1, 2, i)).unbind(-2)
            q_pe = torch.stack((a + b, a - b), -2).flatten(-3)
        return finish(put(q, q_pe), kv_c, k_pe)

    monkeypatch.setattr(Elements, "_evaluate", counting)
    make = functools.partial(Inputs, device, activation="fp32", format="fp32")
    off, on = execute(fn, make), execute(fn, make, fuse={})
    assert_same(off, on)
    assert seen and set(seen.values()) == {1}
    assert [site.fused for site in on.report.sites] == [True]


@pytest.mark.parametrize("program", SOME[:2], ids=str)
def test_unbacked_rows(program: Program, device: str) -> None:
    """N of which nothing is known when it is compiled."""
    graphs: list[torch.fx.GraphModule] = []
    with settings_of_all_runs(), enable() as fusion:
        compiled = torch.compile(program, backend=stop_at_graph(graphs), fullgraph=True)
        for n in (7, 3, 12):
            make = functools.partial(program.with_rows(n).inputs, device)
            inputs = make()
            for name in ROWS:
                torch._dynamo.decorators.mark_unbacked(inputs.t[name], 0)
            with inputs.step():
                out = list(compiled(inputs.t))
            assert_same(execute_eagerly(program, make), Outcome(out, [inputs], [], [], Report()))
    reason = Reason.PADDING if program.update.startswith("write") else None
    assert [site.reason for site in fusion.report.sites] == [reason] and len(graphs) == 1


def execute_eagerly(fn: Function, make: Callable[[], Inputs]) -> Outcome:
    inputs = make()
    with torch.no_grad(), inputs.step():
        return Outcome(list(fn(inputs.t)), [inputs], [], [], Report())


@pytest.mark.parametrize("slots", ["none", "short", "unallocated"])
def test_steps_of_a_fused_layer(slots: str, device: str) -> None:
    """A graph that was compiled for a usual step, in a profiling run, with padding, and before there is a cache."""

    def make() -> Inputs:
        inputs = Inputs(device)
        if slots == "unallocated":
            inputs.caches = dict.fromkeys(inputs.caches)  # type: ignore[assignment]
        else:
            inputs.t["slots"] = inputs.t["slots"][:3] if slots == "short" else None  # type: ignore[assignment]
        return inputs

    with settings_of_all_runs(), enable(strict=True):
        compiled = torch.compile(BASE, backend=stop_at_graph([]), fullgraph=True)
        usual = Inputs(device)
        with usual.step():
            compiled(usual.t)
        with torch.compiler.set_stance("fail_on_recompile"):
            inputs = make()
            given = inputs.t | {"slots": usual.t["slots"]}  # no argument of the graph
            with inputs.step():
                out = list(compiled(given))
    expected = make()
    with torch.no_grad(), expected.step():
        assert all(map(torch.equal, out, BASE(expected.t)))
    for name, cache in inputs.caches.items():
        if cache is not None:
            assert_same_bytes(cache.data, expected.caches[name].data)


class Layer(torch.nn.Module):
    """One layer whose number is an attribute."""

    def __init__(self, name: str, t: Tensors) -> None:
        super().__init__()
        self.layer, self.t = layer_index(name), t

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        t = self.t | {"x": x, "positions": positions}
        q, kv_c, k_pe = parts(t)
        cos_sin = angles(t)
        q[..., D.p :] = turned(q[..., D.p :], *cos_sin)
        k_pe = turned(k_pe, *cos_sin)
        done = torch.ops.latentkv.layer_write_cache(kv_c, k_pe, self.layer)
        return torch.ops.latentkv_tests.attention(q, None, kv_c, k_pe, done, None, None)[0]


def test_equal_layers_share_their_graph(device: str) -> None:
    """Two graphs for any number of layers, and the fused op in both."""

    def run(fuse: bool) -> tuple[list[Tensor], Inputs, list[torch.fx.GraphModule]]:
        inputs, graphs = Inputs(device, layers=4), []
        t = {name: x for name, x in inputs.t.items() if name not in ("x", "positions")}
        with settings_of_all_runs(), contextlib.ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(specialize_int=False, allow_unspec_int_on_nn_module=True))
            fusion = stack.enter_context(enable(strict=True)) if fuse else None
            stack.enter_context(inputs.step())
            backend = stop_at_graph(graphs)
            layers = [torch.compile(Layer(name, t), backend=backend, fullgraph=True) for name in inputs.caches]
            out = [layer(inputs.t["x"], inputs.t["positions"]) for layer in layers]
            if fusion is not None:
                assert [site.fused for site in fusion.report.sites] == [True] * len(graphs)
        return out, inputs, graphs

    (off, off_inputs, _), (on, on_inputs, graphs) = run(False), run(True)
    assert_same(Outcome(off, [off_inputs], [], [], Report()), Outcome(on, [on_inputs], [], [], Report()))
    assert len(graphs) <= 2
    for gm in graphs:
        assert calls([gm]) == Counter(FUSED[:1])


@pytest.mark.parametrize("rope", ["ours", "gptj"])
def test_graph_split_at_attention(rope: str, device: str) -> None:
    """As engines split: attention runs outside, q and k_pe are results of the graph."""
    program = Program(rope, upcast="op", gathered="op") if rope == "ours" else Program()

    def fn(t: Tensors) -> list[Tensor]:
        q, _, kv_c, k_pe = program.project(t, t["x"], 0)
        done = program.write(t, kv_c, k_pe, 0)
        assert done is not None
        return [q, kv_c, k_pe, done]

    make = functools.partial(Inputs, device)
    off, on = execute(fn, make, backend="inductor"), execute(fn, make, backend="inductor", fuse={})
    assert_same(off, on)
    check_fused(program, on)
    for a, b in zip(on.returned, off.returned, strict=True):
        assert a.stride() == b.stride()
    # A k_pe that PyTorch made was contiguous, and is to be so still.
    assert kernels(on.code) <= (0 if rope == "ours" else kernels(off.code))


def test_graph_break_between_rope_and_update(device: str) -> None:
    """Both graphs say what they miss."""

    def fn(t: Tensors) -> list[Tensor]:
        q, kv_c, k_pe = parts(t)
        ours(t, q, k_pe)
        torch._dynamo.graph_break()
        return finish(q, kv_c, k_pe)

    make = functools.partial(Inputs, device)
    off, on = execute(fn, make, backend="eager"), execute(fn, make, fuse={}, fullgraph=False)
    assert_same(off, on)
    assert [site.reason for site in on.report.sites] == [Reason.NO_UPDATE, Reason.PARTITIONED]


@pytest.mark.parametrize("program", SOME[:4], ids=str)
def test_graph_partition(program: Program, device: str) -> None:
    make = functools.partial(program.inputs, device)
    off = execute(program, make, backend="eager")
    with torch._inductor.config.patch(graph_partition=True):
        on = execute(program, make, backend="inductor", fuse={})
    assert_same(off, on)
    check_fused(program, on)


@pytest.mark.parametrize("program", SOME, ids=str)
def test_cuda_graphs(program: Program, device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU")
    make = functools.partial(program.inputs, device)
    off, on = make(), make()
    with settings_of_all_runs(), enable() as fusion:
        compiled = torch.compile(program, mode="reduce-overhead", fullgraph=True, dynamic=False)
        for _ in range(4):  # warm-up, capture, replays
            for cache in (*off.caches.values(), *on.caches.values()):
                for part in cache.tensors:
                    part.view(torch.uint8).fill_(POISON)
            with off.step():
                want = program(off.t)
            with on.step():
                got = [x.clone() for x in compiled(on.t)]
            assert_same(Outcome(list(want), [off], [], [], Report()), Outcome(got, [on], [], [], Report()))
        assert [site.fused for site in fusion.report.sites] == [True]


# ------------------------------------------------------------------------------------------- the switch


def run_once(fn: Function, inputs: Inputs, **options: Any) -> Any:
    """Compiles with the settings as they are, and runs."""
    with inputs.step():
        return torch.compile(fn, **({"backend": stop_at_graph([]), "fullgraph": True, "dynamic": False} | options))(
            inputs.t
        )


def test_strict_raises_where_nothing_fuses(device: str) -> None:
    fn = UNFUSED["key_not_rotated"][1]
    with settings_of_all_runs(), pytest.raises(Exception, match=r"strict") as caught, enable(strict=True):
        run_once(fn, Inputs(device))
    assert "NO_ROPE" in str(caught.value)
    chain, error = [], caught.value
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    assert any(isinstance(e, FusionError) for e in chain), chain
    assert torch._inductor.config.post_grad_custom_pre_pass is None


def test_strict_without_sites(device: str) -> None:
    """A graph without updates raises nothing; a `with` in which nothing at all was fused does."""
    with settings_of_all_runs():
        fusion = enable(strict=True)
        run_once(lambda t: [t["x"] * 2], Inputs(device))
        run_once(no_update, Inputs(device))
        fusion.disable()
        with pytest.raises(FusionError, match="nothing was fused"), enable(strict=True):
            run_once(lambda t: [t["x"] * 3], Inputs(device))
        with enable(strict=True):  # nothing was compiled
            pass
        with enable(strict=True) as fusion:
            run_once(lambda t: [t["x"] * 4], Inputs(device))
            run_once(BASE, Inputs(device))
            run_once(lambda t: [t["x"] * 5], Inputs(device))
        assert len(fusion.report.fused) == 1


def test_strict_hides_no_other_error(device: str) -> None:
    def fail() -> None:
        with settings_of_all_runs(), enable(strict=True):
            run_once(lambda t: [t["x"] * 6], Inputs(device))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_strict_takes_one_fused_site_as_enough(device: str) -> None:
    """A graph with one site that is fused and one that is not."""

    def fn(t: Tensors) -> list[Tensor]:
        _, kv_c, _ = parts(t)
        more = torch.ops.latentkv.layer_write_cache(kv_c.flip(0), kv_c[:, : D.r].clone(), LAYERS[1])
        return [*BASE(t), more]

    make = functools.partial(Inputs, device, layers=2)
    off, on = execute(fn, make), execute(fn, make, fuse={"strict": True})
    assert_same(off, on)
    assert sorted(site.fused for site in on.report.sites) == [False, True]


def test_disable(device: str) -> None:
    with settings_of_all_runs():
        fusion = enable()
        fusion.disable()
        graphs: list[torch.fx.GraphModule] = []
        run_once(BASE, Inputs(device), backend=stop_at_graph(graphs))
    assert not fusion.report.sites and FUSED[0] not in calls(graphs)
    assert torch._inductor.config.post_grad_custom_pre_pass is None


def test_one_pass_at_a_time() -> None:
    with enable(), pytest.raises(RuntimeError, match="on already"):
        enable()
    assert torch._inductor.config.post_grad_custom_pre_pass is None


class Seen(CustomGraphPass):
    """A user's own pass."""

    def __init__(self) -> None:
        self.graphs: list[Counter[str]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs.append(
            Counter(str(node.args[0]) for node in graph.nodes if "auto_functionalized" in str(node.target))
        )

    def uuid(self) -> str:
        return "seen"


@pytest.mark.parametrize("kind", ["pass", "callable", "list"])
def test_enable_goes_with_own_passes(kind: str, device: str) -> None:
    """Before ours, since the user had it first; and it is there again afterwards."""
    if kind == "list" and torch.__version__ < "2.13":
        pytest.skip("lists of passes came with torch 2.13")
    seen = Seen()
    own: Any = {"pass": seen, "callable": lambda graph: seen(graph), "list": [seen, seen]}[kind]
    with settings_of_all_runs(), torch._inductor.config.patch(post_grad_custom_pre_pass=own):
        program = Program("ours", upcast="op", gathered="op")
        with enable() as fusion:
            run_once(program, Inputs(device))
        assert torch._inductor.config.post_grad_custom_pre_pass is own
    assert [site.fused for site in fusion.report.sites] == [True]
    assert len(seen.graphs) == (2 if kind == "list" else 1)
    assert all(ops == Counter(["latentkv.rope_.default"]) for ops in seen.graphs)


def test_pass_without_enable(device: str) -> None:
    own = FusionPass()
    with settings_of_all_runs(), torch._inductor.config.patch(post_grad_custom_pre_pass=own):
        run_once(BASE, Inputs(device))
    assert [site.fused for site in own.report.sites] == [True]


def test_uuid_tells_options_and_nothing_else(python: Python) -> None:
    options = [{}, {"strict": True}, {"allow_rounding": True}, {"strict": True, "allow_rounding": True}]
    ids = [FusionPass(**o).uuid() for o in options]
    assert [FusionPass(**o).uuid() for o in options] == ids
    assert len(set(ids)) == 4
    code = "from latentkv.compile import FusionPass; print(repr(FusionPass().uuid()))"
    assert python(code).stdout.strip() == repr(ids[0])


def test_uuid_beside_a_users_pass() -> None:
    """The user's is part of it; without one nothing may come from the cache."""

    def uuid(own: Any) -> Any:
        with torch._inductor.config.patch(post_grad_custom_pre_pass=own), enable():
            return torch._inductor.config.post_grad_custom_pre_pass.uuid()

    other = Seen()
    other.uuid = lambda: "other"  # type: ignore[method-assign]
    assert uuid(Seen()) == uuid(Seen()) != uuid(other)
    assert uuid(None) == FusionPass().uuid() not in (uuid(Seen()), None)
    assert uuid(lambda graph: None) is None


def test_inductors_cache(device: str) -> None:
    """What was fused once comes from the cache fused, and only for the same options."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    def run(**options: Any) -> tuple[int, Outcome]:
        torch._dynamo.reset()
        counters.clear()
        inputs = Inputs(device)
        with enable(**options) as fusion, inputs.step():
            out = torch.compile(BASE, fullgraph=True, dynamic=False)(inputs.t)
        return counters["inductor"]["fxgraph_cache_hit"], Outcome(list(out), [inputs], [], [], fusion.report)

    off = execute(BASE, functools.partial(Inputs, device), backend="eager")
    with settings_of_all_runs(), torch._inductor.config.patch(fx_graph_cache=True), fresh_cache():
        for options, expected in (({}, 0), ({}, 1), ({"strict": True}, 0), ({"strict": True}, 1)):
            hits, on = run(**options)
            assert hits == on.report.cached == expected
            assert_same(off, on)
            assert len(on.report.fused) == 1 - hits
        for own in (Seen(), lambda graph: None):  # torch cannot tell one plain callable from another
            for expected in (0, int(isinstance(own, Seen))):
                with torch._inductor.config.patch(post_grad_custom_pre_pass=own):
                    hits, on = run()
                assert hits == expected
                assert_same(off, on)


def test_report_is_a_table(device: str) -> None:
    with settings_of_all_runs(), enable() as fusion:
        run_once(Program(layers=2), Inputs(device, layers=2))
        run_once(UNFUSED["key_not_rotated"][1], Inputs(device))
    text = str(fusion.report)
    assert "2 of 3" in text and "PyTorch" in text and "latentkv::layer_write_cache" in text and "NO_ROPE" in text
    assert [site.fused for site in fusion.report.sites] == [True, True, False]


# ------------------------------------------------------------------------------------------- as hypothesis draws them


@settings(max_examples=15)
@given(st.data())
def test_any_program(device: str, data: st.DataObject) -> None:
    """Any spelling, update, dimensions: fused, to the same bits, with nothing left behind."""
    small = st.integers(1, 9)
    dims = Dims(
        n=data.draw(small, "N"),
        h=data.draw(st.integers(1, 5), "H"),
        p=data.draw(st.sampled_from([0, 2, 4, 6, 8, 16]), "P"),
        r=data.draw(st.sampled_from([2, 4, 6, 8, 16]), "R"),
        latent=data.draw(st.sampled_from([2, 3, 4, 8, 16, 24]), "L"),
    )
    choices = CHOICES | ALTERNATIVES[data.draw(st.integers(0, 1), "PyTorch")] | {"dims": (dims,)}
    drawn = st.builds(Program, **{name: st.sampled_from(values) for name, values in choices.items()})
    program = data.draw(drawn.filter(lambda p: p.valid), "program")
    make = functools.partial(program.inputs, device)
    off = execute(program, make, backend="eager")
    on = execute(program, make, fuse={"allow_rounding": program.rounding})
    assert_same(off, on)
    check_fused(program, on)
    assert calls(on.graphs) == Counter([fused_op(program.update)]) + leftovers(program)

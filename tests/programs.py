"""Whole programs for the compile pass, as hypothesis draws them: lines of Python, from the projections to attention.

A program is a value that can be read, and pasted into a test as an explicit example. The names in its lines are those
of inputs (:meth:`Program.inputs`), of sizes (H, P, R, L), and of :data:`SCOPE`. What a line appends to ``out`` is
returned.
"""

from __future__ import annotations

import dataclasses
import linecache
import re
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from latentkv import build_cos_sin_cache
from test_fusion import DTYPES, LAYERS, MAX_POSITION, NAMES, ROWS, Dims, Function, Inputs, rotate

DIMS = Dims()
LAYOUTS = (DIMS, Dims(h=2, p=8, r=8, latent=24), Dims(h=1, p=0, r=8, latent=8), Dims(h=4, p=4, r=16, latent=16))
HIDDEN, MAX_LAYERS = 24, 3
FREE_POSITIONS = 16  # positions are below it, so that programs may add up to MAX_POSITION - FREE_POSITIONS
SCOPE: dict[str, Any] = {
    "torch": torch,
    "cat": torch.cat,
    "embedding": torch.nn.functional.embedding,
    "rotate": rotate,
    "rope_": torch.ops.latentkv.rope_,
    "rotary_embedding": torch.ops._C.rotary_embedding,
    "layer_write_cache": torch.ops.latentkv.layer_write_cache,
    "unified_mla_kv_cache_update": torch.ops.vllm.unified_mla_kv_cache_update,
    "write_cache_": torch.ops.latentkv.write_cache_,
    "concat_and_cache_mla": torch.ops._C_cache_ops.concat_and_cache_mla,
    "attention": torch.ops.latentkv_tests.attention,
    "note": torch.ops.latentkv_tests.note,
    "pure": torch.ops.latentkv_tests.pure,
    "count_": torch.ops.latentkv_tests.count_,
    **{f"layer{i}": LAYERS[i] for i in range(MAX_LAYERS)},
    **{f"name{i}": NAMES[i] for i in range(MAX_LAYERS)},
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A model's step, and how it is compiled.

    Attributes:
        lines: what it does.
        rows: the N of each run; more than one are runs of a graph whose N is dynamic.
        dims: the other sizes, H, P, R and L in the lines.
        activation, table: dtypes, A in the lines is that of activations.
        format, placement, as_bytes: of the caches; no format is that of the activations.
        v2: whether torch functionalises by its second version.
    """

    lines: tuple[str, ...]
    rows: tuple[int, ...] = (5,)
    dims: Dims = DIMS
    activation: str = "bf16"
    table: str = "fp32"
    format: str | None = None
    placement: str = "concat"
    as_bytes: bool = False
    v2: bool = True

    def function(self) -> Function:
        """The program as a function of the inputs' tensors."""
        d = self.dims
        scope = SCOPE | {"H": d.h, "P": d.p, "R": d.r, "L": d.latent, "A": DTYPES[self.activation]}
        used = [name for name in self.inputs("cpu", 1).t if any(re.search(rf"\b{name}\b", line) for line in self.lines)]
        body = [*(f"{name} = t[{name!r}]" for name in used), "out = []", *self.lines, "return out"]
        source = "def program(t):\n" + "".join(f"    {line}\n" for line in body)
        file = f"<program {abs(hash(self))}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        exec(compile(source, file, "exec"), scope)
        return scope["program"]  # type: ignore[no-any-return]

    def inputs(self, device: str, n: int) -> Inputs:
        """The tensors of a run with N = n."""
        made = Inputs(
            device,
            dataclasses.replace(self.dims, n=n),
            self.activation,
            self.table,
            self.format or self.activation,
            self.placement,
            self.as_bytes,
            layers=MAX_LAYERS,
        )
        t = made.t
        t["positions"] %= FREE_POSITIONS
        t["table2"], other = (self._table(device, theta) for theta in (50.0, 20.0))
        t["wide"] = torch.cat([t["table2"], other], 1)
        t["slots2"] = t["slots"].flip(0)
        return made

    @property
    def dynamic(self) -> bool:
        """Whether N is a symbol in the graph."""
        return len(self.rows) > 1

    def mark(self, inputs: Inputs) -> None:
        """Tells Dynamo that only N is."""
        for name in inputs.t if self.dynamic else ():
            if name not in (*ROWS, "slots2"):
                torch._dynamo.mark_static(inputs.t[name])

    def _table(self, device: str, theta: float) -> torch.Tensor:
        return build_cos_sin_cache(
            rope_theta=theta,
            qk_rope_head_dim=self.dims.r,
            max_position_embeddings=MAX_POSITION,
            dtype=DTYPES[self.table],
            device=device,
        )


# ------------------------------------------------------------------------------------------------- drawing them

TOKENS = None  # in a shape: N, or some multiple of it
Shape = tuple[int | None, ...]


@dataclasses.dataclass
class _Layer:
    """How a layer calls its parts.

    Attributes:
        rope, nope: the slices of a query head.
        key: the rank of k_pe.
        apart: q_pe where it does not go back into q.
    """

    i: int
    rope: str
    nope: str
    positions: str = "positions"
    table: str = "table"
    key: int = 2
    shared: bool = False  # the key lies in the query
    apart: str | None = None

    def __call__(self, name: str) -> str:
        return f"{name}{self.i}"

    @property
    def q_pe(self) -> str:
        return f"q{self.i}[..., {self.rope}]"


class _Author:
    """Writes a program, and keeps account of what is in scope."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw = draw
        self.lines: list[str] = []
        self.shapes: dict[str, Shape] = {"x": (TOKENS, HIDDEN)}
        self.dims: Dims = self.one_of(*LAYOUTS)
        rows = st.integers(1, 9)
        self.rows: tuple[int, ...] = tuple(draw(st.lists(rows, min_size=1, max_size=2, unique=True)))
        self.activation: str = self.one_of("bf16", "bf16", "fp16", "fp32")
        self.table: str = self.one_of("fp32", "fp32", "bf16")
        self.update: str = self.one_of("layer", "layer", "write", "concat", "unified")
        self.by_argument = self.update in ("write", "concat")
        self.fp8 = self.rarely(4)
        self.split = self.update in ("layer", "write") and self.rarely(6)
        self.kept = self.added = 0

    def one_of(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def rarely(self, n: int) -> bool:
        return self.draw(st.integers(1, n)) == n  # type: ignore[no-any-return]

    def some_rows(self) -> int:
        """A number of rows: often as many as there are when the graph is made."""
        return self.draw(st.integers(1, 6)) if self.rarely(2) else self.rows[0]

    def write(self, line: str, **shapes: Shape) -> None:
        self.lines.append(line)
        self.shapes |= shapes

    # -- the layers

    def program(self) -> Program:
        layers = [self.layer(i) for i in range(self.one_of(1, 1, 1, 1, 2, 3))]
        stages = (self.project, self.turn, self.store, self.attend)
        if self.rarely(3):  # all layers at once
            calls = [(stage, layer) for stage in stages for layer in layers]
        else:
            calls = [(stage, layer) for layer in layers for stage in stages]
        for stage, layer in calls:
            for _ in range(self.draw(st.integers(0, 9)) // 7):
                self.noise()
            stage(layer)
        if self.rarely(4):
            self.noise()
        return Program(
            tuple(self.lines),
            self.rows,
            self.dims,
            self.activation,
            self.table,
            "fp8_e4m3fn" if self.fp8 else None,
            "split" if self.split else "concat",
            self.fp8 and self.update == "concat",
            not self.rarely(4),
        )

    def layer(self, i: int) -> _Layer:
        rope, nope = self.one_of(("P:", ":P"), ("P:", ":P"), (":R", "R:"))
        return _Layer(i, rope, nope)

    def project(self, layer: _Layer) -> None:
        """q [N, H, P + R], the latent vectors c and the keys k."""
        i, d = layer.i, self.dims
        q, c, k, kv = map(layer, ("q", "c", "k", "kv"))
        width = d.h * (d.p + d.r)
        source = self.one_of("two", "two", "one", "inputs", "flat", "of the query", "of the query", "as before")
        if source == ("inputs" if i else "as before"):
            source = "two"
        if source == "one":
            self.write(f"all{i} = x @ w_all{i}", **{f"all{i}": (TOKENS, width + d.latent + d.r)})
            self.write(f"{q}, {c}, {k} = all{i}.split([H * (P + R), L, R], -1)")
            self.write(f"{q} = {q}.view(-1, H, P + R)")
        else:
            how = self.one_of("", "", "", ".transpose(0, 1).contiguous().transpose(0, 1)")
            self.write(f"{q} = " + ("q_in" if source == "inputs" else f"(x @ w_q{i}).view(-1, H, P + R){how}"))
            if source == "as before":  # two layers with one latent
                self.write(f"{c}, {k} = c{i - 1}, k{i - 1}")
                layer.key = len(self.shapes[f"k{i - 1}"])
            elif source == "of the query":
                layer.shared = True
                self.write(f"{c} = x @ w_kv{i}[:, :L]")
                self.write(f"{k} = {q}[:, {self.one_of(0, -1)}, {layer.rope}]")
            elif source == "flat":
                self.write(f"{kv} = (x @ w_kv{i}).flatten()", **{kv: (TOKENS,)})
                self.write(f"{c} = x @ w_kv{i}[:, :L]")
                self.write(f"{k} = {kv}[-x.shape[0] * R:].view(-1, R)")
            else:
                self.write(
                    f"{kv} = " + ("kv_in" if source == "inputs" else f"x @ w_kv{i}"), **{kv: (TOKENS, d.latent + d.r)}
                )
                parts = [
                    f"{c}, {k} = {kv}.split([L, R], -1)",
                    f"{c}, {k} = {kv}[:, :L], {kv}[:, L:]",
                    f"{k}, {c} = {kv}.split([R, L], -1)",
                    f"{c}, {k} = {kv}[:, 2:L + 2], {kv}[:, L:]",
                ]
                self.write(self.one_of(parts[0], *parts))
        if source != "as before":
            layer.key = self.one_of(2, 2, 3)
            if layer.key == 3:
                self.write(f"{k} = {k}.unsqueeze(1)")
        key: Shape = (TOKENS, d.r) if layer.key == 2 else (TOKENS, 1, d.r)
        self.shapes |= {q: (TOKENS, d.h, d.p + d.r), c: (TOKENS, d.latent), k: key}

    def angles(self) -> tuple[str, str]:
        """Positions and a table [max_position, R]."""
        positions = self.one_of(
            "positions", "positions", "positions", "(positions + 1)", "positions.clone()", "positions.int()"
        )
        table = self.one_of(
            "table", "table", "table", "table2", "wide[:, :R]", "wide[:, R:]", "table.float()", "(table * 2)"
        )
        return positions, table

    def turn(self, layer: _Layer) -> None:
        """RoPE of query and key."""
        positions, table = self.angles() if self.rarely(3) else ("positions", "table")
        for name, text in (("p", positions), ("t", table)):
            if text not in ("positions", "table", "table2"):
                self.write(f"{layer(name)} = {text}")
                text = layer(name)
            if name == "p":
                layer.positions = text
            else:
                layer.table = text
        kinds = ["pytorch", "pytorch", "op"]
        if self.activation != "fp32" and self.table != "fp32":
            kinds.append("rotary")
        kind = self.one_of(*kinds)
        if kind == "pytorch":
            self.turn_by_pytorch(layer)
        else:
            self.turn_by_op(layer, kind)

    def turn_by_pytorch(self, layer: _Layer) -> None:
        cos, sin, q, k = map(layer, ("cos", "sin", "q", "k"))
        p, t = layer.positions, layer.table
        rows = self.one_of(f"{t}[{p}]", f"{t}[{p}]", f"{t}.index_select(0, {p})", f"embedding({p}, {t})")
        if self.activation == "fp32":
            upcast = self.one_of("none", "whole")
        else:
            upcast = self.one_of("whole", "whole", "operand", "promoted", "none") if self.rarely(2) else "whole"
        up = ".float()" if upcast == "promoted" else ""
        self.write(f"{cos}, {sin} = {rows}{up}.chunk(2, -1)")
        spelling = self.one_of("gptj", "gptj", "neox", "half", "interleave")
        how = f"{cos}, {sin}, {spelling!r}, {upcast!r}"
        other = how
        if self.rarely(8):
            other = self.one_of(f"{sin}, {cos}, {spelling!r}, {upcast!r}", f"{cos}, {sin}, 'neox', {upcast!r}", None)

        def query() -> None:
            heads = self.one_of("1:", ":1") if self.dims.h > 1 and self.rarely(10) else None
            if heads:
                self.write(f"{q}[:, {heads}, {layer.rope}] = rotate({q}[:, {heads}, {layer.rope}], {how})")
                return
            self.write(f"r{layer.i} = rotate({layer.q_pe}, {how})", **{layer("r"): (TOKENS, self.dims.h, self.dims.r)})
            self.put(layer)

        def key() -> None:
            if other is None or (layer.shared and layer.key == 3 and self.rarely(2)):
                return
            into = "[:]" if self.rarely(5) else ""
            self.write(f"{k}{into} = rotate({k}, {other})")

        self.both(*((key, query) if layer.shared else (query, key)))

    def both(self, one: Callable[[], None], other: Callable[[], None]) -> None:
        """One after the other, in either order, and perhaps something between."""
        first, second = (other, one) if self.rarely(4) else (one, other)
        first()
        if self.rarely(6):
            self.noise()
        second()

    def put(self, layer: _Layer) -> None:
        """The rotated query goes back into q, into a new one, or on as it is."""
        q, r = layer("q"), layer("r")
        how = self.one_of("assign", "assign", "cat", "direct")
        if how == "assign":
            self.write(f"{layer.q_pe} = {r}")
        elif how == "cat":
            parts = f"{q}[..., {layer.nope}], {r}" if layer.rope == "P:" else f"{r}, {q}[..., {layer.nope}]"
            self.write(f"{q} = cat([{parts}], -1)")
        else:
            layer.apart = r

    def turn_by_op(self, layer: _Layer, kind: str) -> None:
        k, d = layer("k"), self.dims
        p = layer.positions
        if kind == "rotary" and p != "positions":  # it takes int64 alone
            p = f"{p}.long()"
        neox = self.one_of(False, True)
        flat = kind == "rotary" and d.h > 1  # of one head it would be a view, which PyTorch copies not onto itself
        how = self.one_of("in place", "in place", "copy", *["flat"] * flat)
        target = layer.q_pe
        if d.h > 1 and how == "in place" and self.rarely(10):
            target = f"{layer('q')}[:, 1:, {layer.rope}]"
        if how == "copy":
            copied = self.one_of("clone", "contiguous")
            self.write(f"r{layer.i} = {target}.{copied}()", **{layer("r"): (TOKENS, d.h, d.r)})
            target = layer("r")
        elif how == "flat":
            self.write(f"r{layer.i} = {target}.reshape(-1, H * R)")
            target = layer("r")
        if self.rarely(6):
            self.write(f"{k} = {k}.clone()")
            layer.shared = False
        apart = layer.shared or self.rarely(4)

        def call(query: str, key: str | None) -> None:
            other = (not neox) if self.rarely(12) else neox
            if kind == "op":
                self.write(f"rope_({p}, {query}, {key}, {layer.table}, {other})")
            else:
                self.write(f"rotary_embedding({p}, {query}, {key}, R, {layer.table}, {other})")

        if apart:
            heads = k if layer.key == 3 else f"{k}[:, None]"
            self.both(lambda: call(target, None), lambda: call(heads, None))
        else:
            call(target, k)
        if how == "flat":
            self.write(f"r{layer.i} = r{layer.i}.view(-1, H, R)", **{layer("r"): (TOKENS, d.h, d.r)})
        if how != "in place":
            self.put(layer)

    def store(self, layer: _Layer) -> None:
        """The cache update."""
        i, c, k = layer.i, layer("c"), layer("k")
        if self.rarely(5):
            self.write(f"{c} = {self.one_of(f'{c} * norm', f'{c}.clone()')}")
        if self.by_argument and layer.key == 3:
            self.write(
                f"{k} = {k}{self.one_of('.squeeze(1)', '[:, 0]', '.reshape(-1, R)')}", **{k: (TOKENS, self.dims.r)}
            )
            layer.key = 2
        if self.update == "layer":
            self.write(f"done{i} = layer_write_cache({c}, {k}, layer{i})")
            return
        if self.update == "unified":
            self.write(f"done{i} = unified_mla_kv_cache_update({c}, {k}, name{i}, 'auto', scale)")
            return
        if self.rarely(6):
            self.read_cache(layer)
        slots = self.one_of("slots", "slots", "slots", "slots", "slots2", "slots[:-1]")
        if self.update == "concat":
            kind = "fp8" if self.fp8 else "auto"
            self.write(f"concat_and_cache_mla({c}, {k}, cache{i}, {slots}, {kind!r}, scale)")
        else:
            rope, scale = f"rope_cache{i}" if self.split else None, "scale" if self.fp8 else None
            format = "fp8_e4m3fn" if self.fp8 else self.activation
            self.write(f"write_cache_({c}, {k}, {slots}, cache{i}, {rope}, {scale}, {format!r})")

    def read_cache(self, layer: _Layer) -> None:
        """Something reads the cache, or changes it, before the update."""
        cache = f"cache{layer.i}"
        self.write(
            self.one_of(
                self.attention(layer, "None"),
                f"out.append({cache}.view(torch.uint8)[:1] + 1)",
                f"out.append({cache}.clone())",
                f"{cache}[1].zero_()",
                f"{cache}.copy_(cache{(layer.i + 1) % MAX_LAYERS})",
            )
        )

    def attention(self, layer: _Layer, done: str) -> str:
        q, c, k = map(layer, ("q", "c", "k"))
        query = f"{q}[..., {layer.nope}], {layer.apart}" if layer.apart else f"{q}, None"
        where = f"cache{layer.i}, None" if self.by_argument else f"None, name{layer.i}"
        return f"out += attention({query}, {c}, {k}, {done}, {where})"

    def attend(self, layer: _Layer) -> None:
        """Attention takes what the update returns; or nobody does."""
        done = "None" if self.by_argument else layer("done")
        if not self.by_argument and self.rarely(8):
            self.write(f"x = x + {done}.sum()")
            return
        self.write(self.attention(layer, done))
        if self.rarely(2):
            self.write(f"x = torch.maximum(x, out[-3].flatten(1) @ w_out{layer.i})")

    # -- what else a model does, and what nobody would

    def noise(self) -> None:
        v = self.one_of(*self.shapes, *(name for name in self.shapes if name[0] in "qkr"))
        kind = self.one_of("read", "read", "keep", "feed", "rebind", "change", "change", "state")
        getattr(self, f"_{kind}")(v)

    def part(self, v: str) -> str:
        """A view of v."""
        shape = self.shapes[v]
        k = self.some_rows() * (1 if len(shape) > 1 else self.dims.r)
        options = [v, f"{v}[:{k}]", f"{v}[-{k}:]", f"{v}[{k}:]", f"{v}[::2]"]
        if len(shape) > 1:
            width = shape[-1]
            j = self.draw(st.integers(1, width)) if width else 1
            options += [f"{v}[..., :{j}]", f"{v}[..., -{j}:]", f"{v}[..., ::2]", f"{v}[0]", f"{v}[-1]", f"{v}[:, -1]"]
        if len(shape) > 2:
            options += [f"{v}[:, 1:]", f"{v}[:, 0]", f"{v}.flatten(1)[:, :{j}]", f"{v}.transpose(0, 1)"]
        return self.one_of(*options)  # type: ignore[no-any-return]

    def _read(self, v: str) -> None:
        part = self.part(v)
        options = ["{} * 2", "{}", "{}.clone()", "pure({})"]
        if not re.search(r"\[\d+:|\[:, 1:", part):  # of no rows there is no maximum
            options.append("{}.float().amax(0, keepdim=True)")
        if self.rarely(6):
            self.write(f"note({part})")
        else:
            self.write(f"out.append({self.one_of(*options).format(part)})")

    def _keep(self, v: str) -> None:
        """A view, or a copy, that something may read later."""
        name, self.kept = f"keep{self.kept}", self.kept + 1
        shape = self.shapes[v]
        if len(shape) == 1:
            self.write(f"{name} = {v}[:{self.some_rows() * self.dims.r}]", **{name: shape})
        elif self.rarely(3):
            self.write(f"{name} = {v}.clone()", **{name: shape})
        else:
            width = shape[-1] or 1
            j = self.draw(st.integers(1, width))
            self.write(f"{name} = {v}[..., :{j}]", **{name: (*shape[:-1], j)})

    def _feed(self, v: str) -> None:
        """Something of v goes into another tensor: no sum, which Inductor may make one with a product before it."""
        w = self.one_of(*self.shapes)
        if 1 in (len(self.shapes[v]), len(self.shapes[w])):
            return
        tail = "" if len(self.shapes[w]) == 2 else "[..., None]"
        self.write(f"{w} = torch.maximum({w}, {v}.flatten(1)[:, :1]{tail})")

    def _rebind(self, v: str) -> None:
        k = self.some_rows()
        options = ["{v}.clone()", "{v}.float().to(A)", "{v} * 0.5", "-{v}", "{v}.half().to(A)", "{v}.double().to(A)"]
        if len(self.shapes[v]) > 1:
            options += ["{v}.flip(0)", "{v}.flip(-1)", "{v}.roll(1, -1)", f"cat([{{v}}[{k}:], {{v}}[:{k}]])"]
            options += [f"cat([{{v}}[:{k}] * 2, {{v}}[{k}:]])", "{v}.transpose(0, 1).contiguous().transpose(0, 1)"]
        if len(self.shapes[v]) > 2:
            options += ["{v}.flip(1)", "cat([{v}[:, 1:], {v}[:, :1]], 1)"]
        self.write(f"{v} = " + self.one_of(*options).format(v=v))

    def _change(self, v: str) -> None:
        part = self.part(v)
        self.write(part + self.one_of(".mul_(0.5)", ".zero_()", ".clamp_(min=0)", ".add_(1)"))

    def _state(self, v: str) -> None:
        """What steps read changes; slots, scales and caches only where the update has them as arguments."""
        options = ["count_(counter)", "table.neg_()", "table2.copy_(table)"]
        if self.added < MAX_POSITION - FREE_POSITIONS - 1:
            options += ["positions.add_(1)"]
        if self.by_argument:
            options += ["slots.copy_(slots2)", "scale.mul_(2)", "cache0[1].zero_()"]
        line = self.one_of(*options)
        self.added += line.startswith("positions")
        self.write(line)


@st.composite
def programs(draw: Callable[..., Any]) -> Program:
    """Programs of up to three layers."""
    return _Author(draw).program()

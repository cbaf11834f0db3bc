"""Every op, described once.

From :data:`OPS` come the torch schemas and fakes (``schemas``), the checks of arguments in Python (``checks``), their
twins in C++ with declarations and registration (``cmake/generate_ops.py``, at build time), and the table of ops in the
docs. This file imports nothing but the standard library, so that a build can read it alone.

Shapes are written in the letters of the library: N rows, T of them with slots, H heads, L latent and R rope elements,
S sequences, B queries, G layers. The first argument that has a letter says what it stands for; where ``kv_lora_rank``
and ``rope_dim`` are given, these do. ``L+R`` is a sum, ``T<=N`` a size of its own with a bound, 128 a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["tensor", "tensors", "cache", "caches", "bool", "int", "float", "layer"]


@dataclass(frozen=True)
class Dim:
    """One dimension of a shape: the sum of letters and a number; ``bound`` is the letter that it may not exceed."""

    text: str
    letters: tuple[str, ...]
    plus: int = 0
    bound: str = ""

    @classmethod
    def of(cls, word: str) -> Dim:
        """That of a word: ``N``, ``L+R``, ``S+1``, ``T<=N``, ``D=128`` or ``1``."""
        if "<=" in word:
            letter, _, bound = word.partition("<=")
            return cls(letter, (letter,), bound=bound)
        if "=" in word:
            text, _, number = word.partition("=")
            return cls(text, (), int(number))
        parts = word.split("+")
        return cls(
            " + ".join(parts), tuple(p for p in parts if not p.isdigit()), sum(int(p) for p in parts if p.isdigit())
        )


def _shapes(text: str) -> tuple[tuple[Dim, ...], ...]:
    return tuple(tuple(map(Dim.of, shape.split())) for shape in text.split("|")) if text else ()


@dataclass(frozen=True)
class Argument:
    """One argument of an op.

    Attributes:
        name: in the schema, in messages and as a field of a call.
        kind: ``cache`` stands for all that a cache takes in a schema: its tensors, its scale and its format; ``layer``
            is the integer that a graph knows a layer by.
        dtypes: alternatives, separated by ``|``: ``activation`` (bf16, fp16, fp32), ``index`` (int64, int32), ``fp8``,
            ``float32``, ``uint8``, or the name of the argument that has the same.
        shape: alternatives, separated by ``|``, told apart by their number of dimensions.
        without: the shape where the optional argument ``unless`` is given, if that makes another.
        unless: see ``without``.
        mutated: whether the op writes it.
        optional: whether it may be None.
        default: as the schema writes it, None for none.
        size: of an int: the letter that it gives a value to, where it is given.
        least: of such a size.
        aliases: the argument that a mutated one may be itself, as a whole.
    """

    name: str
    kind: Kind
    dtypes: str = ""
    shape: str = ""
    without: str = ""
    unless: str = ""
    mutated: bool = False
    optional: bool = False
    default: str | None = None
    size: str = ""
    least: int = 0
    aliases: str = ""

    @cached_property
    def shapes(self) -> tuple[tuple[Dim, ...], ...]:
        """The alternatives of the shape; none of a single element."""
        return _shapes(self.shape)

    @cached_property
    def shapes_without(self) -> tuple[tuple[Dim, ...], ...]:
        """Those of ``without``."""
        return _shapes(self.without)

    @property
    def prefix(self) -> str:
        """Of a cache: what its arguments' names begin with where there are two caches."""
        return "" if self.name in ("cache", "caches") else f"{self.name}_"


@dataclass(frozen=True)
class Op:
    """One op: its name, its arguments in the order of the schema, and what it is for.

    Attributes:
        lead: the argument that says which device and dtype the others must have, and that is checked first.
        summary: a line for the docs.
        returns: of an op that makes new tensors, a name, dtype and shape for each.
        native: whether the compiled libraries have it.
    """

    name: str
    lead: str
    summary: str
    arguments: tuple[Argument, ...]
    returns: tuple[Argument, ...] = ()
    native: bool = True

    def __getitem__(self, name: str) -> Argument:
        return next(a for a in self.arguments if a.name == name)

    @cached_property
    def in_check_order(self) -> tuple[Argument, ...]:
        """Sizes that are given, the lead, what must be there, what may be None; each as they stand."""
        return tuple(sorted(self.arguments, key=lambda a: (not a.size, a.name != self.lead, a.optional)))

    @cached_property
    def plain(self) -> tuple[PlainArgument, ...]:
        """The arguments as the torch schema has them: a cache taken apart, optional sizes last."""
        flat = [p for a in self.arguments for p in _plain(a)]
        marks = iter("abcdefgh")
        return tuple(
            PlainArgument(p.name, p.type.replace("!", f"({next(marks)}!)", 1) if "!" in p.type else p.type, p.default)
            for p in flat
        )

    @property
    def schema(self) -> str:
        """What torch is told: ``rope_(Tensor positions, Tensor(a!) q, ...) -> ()``."""
        arguments = (f"{p.type} {p.name}" + (f"={p.default}" if p.default is not None else "") for p in self.plain)
        returns = "Tensor" if len(self.returns) == 1 else f"({', '.join('Tensor' for _ in self.returns)})"
        return f"{self.name}({', '.join(arguments)}) -> {returns}"


@dataclass(frozen=True)
class PlainArgument:
    """An argument of a torch schema: ``Tensor(a!)? rope_cache``."""

    name: str
    type: str
    default: str | None = None


def _plain(a: Argument) -> tuple[PlainArgument, ...]:
    mark, none = "!" if a.mutated else "", "?" if a.optional else ""
    if a.kind == "cache":
        scale, format = f"{a.prefix}scale", f"{a.prefix}format"
        rope = f"{a.prefix}rope" if a.prefix else "rope_cache"
        return (
            PlainArgument(a.name, f"Tensor{mark}"),
            PlainArgument(rope, f"Tensor{mark}?"),
            PlainArgument(scale, "Tensor?"),
            PlainArgument(format, "str"),
        )
    if a.kind == "caches":
        return (
            PlainArgument(a.name, f"Tensor{mark}[]"),
            PlainArgument("rope_caches", f"Tensor{mark}[]"),
            PlainArgument("scales", "Tensor?[]"),
            PlainArgument("format", "str"),
        )
    types = {"tensor": f"Tensor{mark}{none}", "tensors": f"Tensor{mark}[]", "int": f"int{none}", "layer": "SymInt"}
    return (PlainArgument(a.name, types.get(a.kind, a.kind), a.default),)


# ------------------------------------------------------------------------------------------------------------ the words


def _tensor(name: str, dtypes: str, shape: str, **more: object) -> Argument:
    return Argument(name, "tensor", dtypes, shape, **more)  # type: ignore[arg-type]


def _optional(name: str, dtypes: str, shape: str, default: str | None = None, **more: object) -> Argument:
    return Argument(name, "tensor", dtypes, shape, optional=True, default=default, **more)  # type: ignore[arg-type]


def _flag(name: str, default: bool | None = None) -> Argument:
    return Argument(name, "bool", default=None if default is None else str(default))


def _rotation(optional: bool) -> tuple[Argument, Argument]:
    return (
        Argument("positions", "tensor", "index", "N", optional=optional),
        Argument("cos_sin_cache", "tensor", "activation", "max_position R", optional=optional),
    )


_SLOTS = _tensor("slot_mapping", "index", "T<=N")
_CACHE = Argument("cache", "cache", mutated=True)
_SCALE = _optional("q_scale", "float32", "")
_READ = Argument("cache", "cache")
# Without them the tensors say: rows are as wide as the cache's.
_SIZES = (
    Argument("kv_lora_rank", "int", optional=True, default="None", size="L", least=1),
    Argument("rope_dim", "int", optional=True, default="None", size="R"),
)
_LATENT = Argument("kv_lora_rank", "int", size="L", least=1)

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "rope_",
            "q",
            "RoPE on query and key heads in place",
            (
                _rotation(False)[0],
                _tensor("q", "activation", "N H R", mutated=True),
                _optional("k", "q", "N R|N K R", mutated=True),
                _rotation(False)[1],
                _flag("is_neox"),
                _flag("inverse", False),
            ),
        ),
        Op(
            "write_cache_",
            "kv_c",
            "one cache row per token",
            (
                _tensor("kv_c", "activation", "N L"),
                _tensor("k_pe", "kv_c", "N R"),
                _SLOTS,
                _CACHE,
                *_SIZES,
            ),
        ),
        Op(
            "rope_write_cache_",
            "kv_c",
            "`rope_` and `write_cache_` in one launch",
            (
                _rotation(True)[0],
                _tensor("q_pe", "kv_c", "N H R", mutated=True),
                _tensor("k_pe", "kv_c", "N R", mutated=True),
                _tensor("kv_c", "activation", "N L"),
                _rotation(True)[1],
                _SLOTS,
                _CACHE,
                _flag("is_neox"),
                _flag("rope_masked", False),
                *_SIZES,
            ),
        ),
        Op(
            "decode_prologue",
            "kv_c",
            "RMSNorm, RoPE, the query as attention reads it (fp8 too) and the cache row in one launch",
            (
                _optional("q_nope", "kv_c", "N H L"),
                _tensor("q_pe", "kv_c", "N H R"),
                _tensor("kv_c", "activation", "N L"),
                _tensor("k_pe", "kv_c", "N R"),
                *_rotation(True),
                _SLOTS,
                _CACHE,
                _tensor("q_out", "kv_c|fp8", "N H L+R", without="N H L", unless="q_rope_out", mutated=True),
                _optional("q_rope_out", "q_out", "N H R", mutated=True),
                _optional("kv_c_out", "kv_c", "N L", mutated=True, aliases="kv_c"),
                _SCALE,
                _optional("kv_norm_weight", "kv_c|float32", "L"),
                _flag("is_neox"),
                Argument("kv_norm_eps", "float", default="1e-06"),
                _flag("rope_masked", True),
                *_SIZES,
            ),
        ),
        Op(
            "write_cache_grouped_",
            "kv_c",
            "the rows of several layers in one launch",
            (
                Argument("kv_c", "tensors", "activation", "N L"),
                Argument("k_pe", "tensors", "kv_c", "N R"),
                _SLOTS,
                Argument("caches", "caches", mutated=True),
                *_SIZES,
            ),
        ),
        Op(
            "write_indexer_cache_",
            "k",
            "RoPE, fp8 and row of a sparse model's indexer key",
            (
                _tensor("k", "activation", "N D=128"),
                *_rotation(True),
                _SLOTS,
                _tensor("cache", "uint8", "indexer", mutated=True),
                _flag("is_neox"),
                _flag("power_of_two_scale", False),
            ),
        ),
        Op(
            "gather_cache",
            "cache",
            "rows of many sequences out of the paged cache into one tensor",
            (
                _READ,
                _tensor("block_table", "index", "S max_blocks"),
                _tensor("cu_seq_lens", "index", "S+1"),
                _tensor("out", "activation", "total L+R", mutated=True),
                _LATENT,
                _optional("seq_starts", "index", "S", default="None"),
                _SIZES[1],
            ),
        ),
        Op(
            "convert_cache_",
            "src",
            "rows from one cache into another of any layout",
            (
                Argument("src", "cache"),
                Argument("dst", "cache", mutated=True),
                _LATENT,
                Argument("rope_dim", "int", size="R"),
                _optional("src_blocks", "index", "n|S n", default="None"),
                _optional("dst_blocks", "index", "m|S m", default="None"),
            ),
        ),
        Op(
            "mla_decode",
            "q",
            "decode attention over the paged cache (Triton; fp64 in the reference)",
            (
                _tensor("q", "activation", "B H L+R"),
                _READ,
                _tensor("block_table", "index", "B max_blocks"),
                _tensor("seq_lens", "index", "B"),
                _LATENT,
                Argument("sm_scale", "float"),
                _SIZES[1],
            ),
            returns=(_tensor("out", "q", "B H L"), _tensor("lse", "float32", "B H")),
            native=False,
        ),
    )
}

# The ops that find cache and slots by a layer's integer, at run time (``compile.layers``). They return a tensor without
# elements, which attention takes, so that it comes after the write.
_DONE = (_tensor("done", "kv_c", "0"),)
_LAYER = Argument("layer", "layer")
LAYER_OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "layer_write_cache",
            "kv_c",
            "`write_cache_` to the cache of a layer",
            (_tensor("kv_c", "activation", "N L"), _tensor("k_pe", "kv_c", "N R|N 1 R"), _LAYER),
            returns=_DONE,
        ),
        Op(
            "layer_rope_write_cache",
            "kv_c",
            "`rope_write_cache_` to the cache of a layer",
            (
                _rotation(False)[0],
                _tensor("q_pe", "kv_c", "N H R", mutated=True),
                _tensor("k_pe", "kv_c", "N R|N 1 R", mutated=True),
                _tensor("kv_c", "activation", "N L"),
                _rotation(False)[1],
                _flag("is_neox"),
                _LAYER,
            ),
            returns=_DONE,
        ),
    )
}

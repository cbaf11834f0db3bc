"""Arguments as a call: named, checked against the op's description, with what belongs together in one piece.

Every failure is a RuntimeError that says the op, the argument, what was expected and what came, and is raised before
anything is written. ``csrc_common/arguments.h`` has the same rules and messages for the compiled kernels.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..cache.geometry import Region, Span, overlaps, overlaps_itself
from ..cache.layouts import FORMATS, Format, Packed
from .description import OPS, Argument, Dim, Op
from .warmup import warming_up

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
QUERY_FORMATS = {f.dtype: f for f in FORMATS.values() if f.quantised}
# A key of a sparse model's indexer: of a block 128 e4m3fn codes for each row, then an fp32 scale for each.
_KEY = Packed((128, 0), tile=128, row_bytes=132, block_multiple=1)
INDEXER = Format("indexer", torch.uint8, packed=_KEY)
INDEX_DIM, INDEX_ROW_BYTES = _KEY.dims[0], _KEY.row_bytes
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "activation": ACTIVATIONS,
    "index": (torch.int64, torch.int32),
    "fp8": tuple(QUERY_FORMATS),
    "float32": (torch.float32,),
    "uint8": (torch.uint8,),
}
_NAMES = {a.name for op in OPS.values() for a in op.arguments}
_LIMIT = 2**31  # of any size
_TYPES: dict[str, tuple[Any, str]] = {
    "Tensor": (Tensor, "a tensor"),
    "list": ((list, tuple), "a list of tensors"),
    "bool": (bool, "True or False"),
    "int": (int, "a number"),
    "SymInt": ((int, torch.SymInt), "a number"),
    "float": ((int, float), "a number"),
    "str": (str, "a name"),
}


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raises the error of a bad argument."""
    raise RuntimeError(f"latentkv.{op}: {argument}: expected {expected}, got {got}")


@contextmanager
def called_as(op: str, **names: str) -> Iterator[None]:
    """Errors of the ops that ``op`` consists of come under its name, and with its names for their arguments."""
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"^latentkv\.\w+: ", f"latentkv.{op}: ", str(error))
        if text == str(error):
            raise
        own = rf"(?<=^latentkv\.{op}: )\w+|(?<=shares no bytes with )\w+"
        raise RuntimeError(re.sub(own, lambda name: names.get(name[0], name[0]), text)) from error


@dataclass(frozen=True)
class Stored:
    """A cache as an op takes it: its tensors, how they are to be read, and what its arguments are called.

    Attributes:
        data: [B, bs, C] or [B, 1, bs, C]: the rows, or the latent parts.
        rope_data: the rope parts of a split cache, else None.
        scale: one fp32 element, or None for 1; None for formats without one.
        format: of its rows.
        latent_dim, rope_dim: L and R.
    """

    data: Tensor
    rope_data: Tensor | None
    scale: Tensor | None
    format: Format
    latent_dim: int
    rope_dim: int

    @property
    def num_blocks(self) -> int:
        """B."""
        return self.data.shape[0]

    @property
    def block_size(self) -> int:
        """Rows of a block."""
        return self.data.shape[-2]

    @property
    def capacity(self) -> int:
        """Slots 0 .. capacity - 1 exist."""
        return self.num_blocks * self.block_size

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Latent, rope and a packed format's scales: views [B, bs, .] of elements; bytes for fp8 and packed."""
        packed, latent, rope = self.format.packed, self.latent_dim, self.rope_dim
        if packed and packed.block_multiple is not None:
            rows, scales = runs_of(self.data, latent + 2 * rope, packed.row_bytes - latent - 2 * rope)
            return rows[..., :latent], rows[..., latent:], scales
        pages, *more = (self._pages(t) for t in (self.data, self.rope_data) if t is not None)
        if packed:
            codes, scales, key = pages[..., : packed.row_bytes].tensor_split((latent, -2 * rope), -1)
            return codes, key, scales
        return pages[..., :latent], more[0][..., :rope] if more else pages[..., latent : latent + rope]

    def _pages(self, t: Tensor) -> Tensor:
        pages = t.view(torch.uint8) if self.format.quantised else t
        return pages.squeeze(1) if pages.dim() == 4 else pages


def runs_of(cache: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """Blocks [B, bs, >= sum of widths] of bytes, in which first one part of all rows lies and then the next."""
    blocks, entries = cache.shape[0], cache.shape[-2]
    block = cache.as_strided((blocks, entries * sum(widths)), (cache.stride(0), 1))
    parts = block.split([entries * width for width in widths], 1)
    return tuple(part.unflatten(1, (entries, width)) for part, width in zip(parts, widths, strict=True))


@dataclass(frozen=True)
class Rotation:
    """Where tokens are turned to: positions [N] and the table [max_position, R], cos half | sin half."""

    positions: Tensor
    table: Tensor
    is_neox: bool
    inverse: bool


@dataclass
class Call:
    """A checked call of ``op``: its arguments are attributes, a cache is one :class:`Stored`.

    Attributes:
        op: the description.
        device: that all tensors lie on.
        sizes: what the letters of the shapes stand for.
        rotation: None where nothing is turned.
    """

    op: Op
    device: torch.device
    sizes: dict[str, int] = field(default_factory=dict)
    rotation: Rotation | None = None

    def __getattr__(self, name: str) -> Any:
        """None for an argument that only other ops have."""
        if name not in _NAMES:
            raise AttributeError(f"latentkv.{self.op.name}: no op has an argument {name}")
        return None

    def fail(self, argument: str, expected: str, got: object) -> NoReturn:
        """Raises the error of a bad argument."""
        fail(self.op.name, argument, expected, got)

    @property
    def tokens(self) -> int:
        """T, or N where there are no slots."""
        return self.sizes["T" if "T" in self.sizes else "N"]

    @property
    def written(self) -> list[Stored]:
        """The caches that get a row per token."""
        if self.slot_mapping is None:
            return []
        return self.caches or [self.cache]


def check_types(op: Op, args: Sequence[Any]) -> None:
    """That the arguments of an op's schema are tensors, numbers and so forth, as it says."""
    for argument, value in zip(op.plain, args, strict=False):
        kind = argument.type.partition("(")[0].rstrip("?")
        if argument.type.endswith("[]"):
            kind = "list"
        elif value is None and argument.type.endswith("?"):
            continue
        if not isinstance(value, _TYPES[kind][0]) or (isinstance(value, bool) and kind != "bool"):
            fail(op.name, argument.name, _TYPES[kind][1], text_of(value))


def text_of(value: object) -> str:
    """What came in the place of something else."""
    return "None" if value is None else f"a {type(value).__name__}"


def call_of(op: Op, args: Sequence[Any]) -> Call:
    """The call of an op with the arguments of its torch schema, checked.

    Raises:
        RuntimeError: an argument's device, dtype, shape or strides are off, or two share memory that they may not.
    """
    return _Check(op, args).call


class _Check:
    """One pass over the arguments of a call."""

    def __init__(self, op: Op, args: Sequence[Any]) -> None:
        plain = op.plain
        defaults = [None if p.default in (None, "None") else _literal(p.default) for p in plain[len(args) :]]
        self.op, self.values = op, dict(zip((p.name for p in plain), (*args, *defaults), strict=True))
        self.blame: dict[str, str] = {}  # by letter: the argument that gave it its value
        check_types(op, args)
        lead = self.values[op.lead]
        if isinstance(lead, list | tuple) and not lead:
            fail(op.name, op.lead, "at least one tensor", "none")
        self.call = Call(op, (lead[0] if isinstance(lead, list | tuple) else lead).device)
        self.sizes, self.regions = self.call.sizes, list[Region]()
        rotates = "cos_sin_cache" in self.values
        for argument in op.in_check_order:
            if rotates and not argument.size and argument.name != op.lead:
                rotates = False
                self.both_or_none()
            self.argument(argument)
        self.finish()

    def fail(self, argument: str, expected: str, got: object) -> NoReturn:
        fail(self.op.name, argument, expected, got)

    # ------------------------------------------------------------------------------------------------- by argument

    def argument(self, a: Argument) -> None:
        value = self.values[a.name]
        if a.kind == "tensor" and a.shape != "indexer":
            if value is not None:
                self.tensor(a, a.name, value)
        elif a.kind == "tensors":
            self.tensors(a, value)
        elif a.size and value is not None:
            if value < a.least:
                self.fail(a.name, f"at least {a.least}", value)
            if value >= _LIMIT:
                self.fail(a.name, "a number below 2^31", value)
            self.bind(a.size, value, a.name)
        setattr(self.call, a.name, value)

    def tensors(self, a: Argument, values: Sequence[Tensor]) -> None:
        if a.name != self.op.lead:
            self.as_many(a.name, values)
        for i, t in enumerate(values):
            self.tensor(a, f"{a.name}[{i}]", t)
            if a.name == self.op.lead and i == 0:
                self.sizes["G"] = len(values)

    def as_many(self, name: str, values: Sequence[object]) -> None:
        if len(values) != self.sizes["G"]:
            self.fail(name, f"G={self.sizes['G']} entries, as {self.op.lead} has", len(values))

    def tensor(self, a: Argument, name: str, t: Tensor) -> None:
        self.on_device(name, t)
        self.dtype(name, t, self.dtypes_of(a, name))
        if a.shapes:
            self.shape(name, t, a.shapes_without if a.unless and self.values[a.unless] is not None else a.shapes)
            self.unit_stride(name, t)
        elif t.numel() != 1:
            self.fail(name, "one element", f"shape {list(t.shape)}")
        if a.mutated:
            self.no_overlap(name, t)
        self.region(name, t, a.mutated)

    def dtypes_of(self, a: Argument, name: str) -> tuple[torch.dtype, ...]:
        """What the description allows."""
        if a.name == self.op.lead and name.endswith("]") and not name.endswith("[0]"):
            return (self.values[a.name][0].dtype,)
        found: tuple[torch.dtype, ...] = ()
        for word in a.dtypes.split("|"):
            like = None if word in _DTYPES else self.values[word]
            found += _DTYPES[word] if like is None else ((like[0] if isinstance(like, list | tuple) else like).dtype,)
        return found

    def shape(self, name: str, t: Tensor, alternatives: Sequence[Sequence[Dim]]) -> None:
        """Holds a tensor's sizes against a shape, and learns the letters that are new."""
        sizes = t.shape
        dims = next((d for d in alternatives if len(d) == len(sizes)), alternatives[0])
        known = [None if dim.bound else self.known(dim) for dim in dims]
        if len(dims) != len(sizes) or any(k not in (None, n) for k, n in zip(known, sizes, strict=True)):
            texts = [
                d.text if k is None or d.text.isdigit() else f"{d.text}={k}" for d, k in zip(dims, known, strict=True)
            ]
            self.fail(name, f"shape [{', '.join(texts)}]", list(sizes))
        for dim, value, size in zip(dims, known, sizes, strict=True):
            if dim.text == "R" and size % 2 and name != "cos_sin_cache":
                self.fail(name, "an even rope dimension R", size)
            if size >= _LIMIT:
                self.fail(name, "fewer than 2^31 elements along a dimension", list(sizes))
            if dim.bound and size > self.sizes[dim.bound]:
                self.fail(name, f"at most {dim.bound}={self.sizes[dim.bound]} entries", size)
            if value is None:
                *given, letter = dim.letters
                rest = size - sum(self.sizes[other] for other in given)
                if rest < 0:
                    first = given[0]
                    self.fail(self.blame[first], f"a number in 1 .. {size}, the width of {name}", self.sizes[first])
                self.bind(letter, rest, name)

    def known(self, dim: Dim) -> int | None:
        """The value of a dimension; None where a letter has none yet."""
        total = dim.plus
        for letter in dim.letters:
            if letter not in self.sizes:
                return None
            total += self.sizes[letter]
        return total

    def bind(self, letter: str, size: int, name: str) -> None:
        self.sizes.setdefault(letter, size)
        self.blame.setdefault(letter, name)

    # --------------------------------------------------------------------------------------------- single properties

    def on_device(self, argument: str, t: Tensor) -> None:
        if t.device != self.call.device:
            self.fail(argument, f"a tensor on {self.call.device}", f"one on {t.device}")

    def dtype(self, argument: str, t: Tensor, types: Sequence[torch.dtype], purpose: str = "") -> None:
        if t.dtype not in types:
            names = " or ".join(map(name_of, dict.fromkeys(types)))
            self.fail(argument, f"dtype {names} {purpose}".rstrip(), name_of(t.dtype))

    def unit_stride(self, argument: str, t: Tensor) -> None:
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            self.fail(argument, "a contiguous last dimension (stride 1)", f"stride {t.stride(-1)}")

    def no_overlap(self, argument: str, t: Tensor) -> None:
        if overlaps_itself(t.shape, t.stride()):
            strides = f"strides {list(t.stride())} for shape {list(t.shape)}"
            self.fail(argument, "elements that do not overlap in memory", strides)

    def region(self, name: str, t: Tensor, mutated: bool, width: int | None = None) -> None:
        if (span := Span.of(t, width)) is not None:
            self.regions.append(Region(name, span, mutated))

    # ------------------------------------------------------------------------------------------- what belongs together

    def both_or_none(self) -> None:
        positions, table = self.values["positions"], self.values["cos_sin_cache"]
        if (positions is None) != (table is None):
            missing = "positions" if positions is None else "cos_sin_cache"
            self.fail(missing, "a tensor, as for the other of positions and cos_sin_cache", "None")

    def finish(self) -> None:
        """What concerns several arguments."""
        for a in self.op.arguments:
            if a.kind == "cache":
                names = [p.name for p in self.op.plain if p.name in (a.name, f"{a.prefix}rope", "rope_cache")]
                rope, prefix = names[1] if a.prefix else "rope_cache", a.prefix
                setattr(self.call, a.name, self.stored(a, (a.name, rope, f"{prefix}scale", f"{prefix}format")))
            elif a.kind == "caches":
                self.call.caches = self.caches(a)  # type: ignore[attr-defined]
            elif a.shape == "indexer":
                self.indexer(a)
        self.rest()
        for one, other in overlaps(self.regions):
            if not self.may_share(one.name, other.name):
                self.fail(other.name, f"a tensor that shares no bytes with {one.name}", "overlapping memory")
        positions, table = self.values.get("positions"), self.values.get("cos_sin_cache")
        if positions is not None and table is not None and table.shape[1]:
            rotation = Rotation(positions, table, self.values["is_neox"], self.values.get("inverse", False))
            self.call.rotation = rotation

    def may_share(self, a: str, b: str) -> bool:
        """Whether two arguments may lie in the same memory: as one tensor, or as the caches of a conversion."""
        if self.op.name == "convert_cache_":
            return {a, b} <= {"src", "src_rope", "dst", "dst_rope"} and a[:3] != b[:3]
        for argument in self.op.arguments:
            if argument.aliases and {a, b} == {argument.name, argument.aliases}:
                x, y = self.values[a], self.values[b]
                return bool(x.data_ptr() == y.data_ptr() and x.stride() == y.stride())
        return False

    def rest(self) -> None:
        """The few rules of single ops that a shape does not tell."""
        if self.values.get("kv_c_out") is not None and self.values["kv_norm_weight"] is None:
            self.fail("kv_c_out", "None without kv_norm_weight", "a tensor")
        if self.op.name == "convert_cache_":
            check_blocks(self.call)
        if self.op.name == "mla_decode" and self.call.cache.format.packed:
            self.fail("format", "one that is not packed", self.call.cache.format.name)

    def stored(self, a: Argument, names: tuple[str, str, str, str], layer: int | None = None) -> Stored:
        """A cache, for rows of L and R elements."""
        data_name, rope_name, scale_name, format_name = names
        data, rope, scale = (self.values[name] for name in names[:3])
        if layer is not None:
            data, rope, scale = data[layer], rope[layer] if rope else None, scale[layer]
            data_name, rope_name, scale_name = (f"{name}[{layer}]" for name in names[:3])
        latent_dim, rope_dim = self.sizes["L"], self.sizes["R"]
        f = self.format(a, format_name)
        own, row = (f.storage_dtypes, f"for format {f.name}"), latent_dim + rope_dim
        exact = f.packed is None and any(s.size and self.values[s.name] is None for s in self.op.arguments)
        if f.packed:
            size = f.packed.row_bytes
            self.pages(data_name, data, size, f"{size} bytes", False, *own)
            self.byte_rows(data_name, data, size if f.packed.block_multiple else None)
            if rope is not None:
                self.fail(rope_name, f"None {own[1]}", "a tensor")
        elif rope is None:
            self.pages(data_name, data, row, f"L + R={row} elements", exact, *own)
        else:
            self.pages(data_name, data, latent_dim, f"L={latent_dim} elements", exact, *own)
            self.pages(rope_name, rope, rope_dim, f"R={rope_dim} elements", exact, *own)
            self.same_blocks(rope_name, rope, data_name, data)
        width = None if f.packed else row if rope is None else latent_dim
        self.region(data_name, data, a.mutated, width)
        if rope is not None:
            self.region(rope_name, rope, a.mutated, rope_dim)
        if scale is not None:
            self.on_device(scale_name, scale)
            self.dtype(scale_name, scale, (torch.float32,))
            if scale.numel() != 1:
                self.fail(scale_name, "one element", f"shape {list(scale.shape)}")
            self.region(scale_name, scale, False)
        return Stored(data, rope, scale if f.quantised else None, f, latent_dim, rope_dim)

    def caches(self, a: Argument) -> list[Stored]:
        """Those of several layers."""
        names = ("caches", "rope_caches", "scales", "format")
        for name in names[:3]:
            if name != "rope_caches" or self.values[name]:
                self.as_many(name, self.values[name])
        found = []
        for i in range(self.sizes["G"]):
            found.append(self.stored(a, names, i))
            self.same_blocks(f"caches[{i}]", found[i].data, "caches[0]", found[0].data)
        return found

    def format(self, a: Argument, argument: str) -> Format:
        """The format of a cache, against what is to be written to it and against L and R."""
        name = self.values[argument]
        if name not in FORMATS:
            self.fail(argument, "a known format name", repr(name))
        f = FORMATS[name]
        lead = self.values[self.op.lead]
        if a.mutated and self.op[self.op.lead].dtypes and f.activation is not None:
            first, layer = (lead[0], "[0]") if isinstance(lead, list | tuple) else (lead, "")
            self.dtype(self.op.lead + layer, first, (f.activation,), f"for format {name}")
        if f.packed:
            for letter, size in zip("LR", f.packed.dims, strict=True):
                if self.sizes[letter] != size:
                    self.fail(self.blame[letter], f"{letter}={size} for format {name}", self.sizes[letter])
        return f

    def pages(
        self, argument: str, t: Tensor, size: int, text: str, exact: bool, types: Sequence[torch.dtype], purpose: str
    ) -> None:
        """One cache tensor [B, bs, C] or [B, 1, bs, C] whose rows hold ``size`` elements, in words ``text``."""
        self.on_device(argument, t)
        self.dtype(argument, t, types, purpose)
        if not (t.dim() == 3 or (t.dim() == 4 and t.shape[1] == 1)):
            self.fail(argument, "shape [B, bs, C] or [B, 1, bs, C]", list(t.shape))
        if t.shape[-1] < size or (exact and t.shape[-1] != size):
            least = "" if exact else "at least "
            self.fail(argument, f"rows of {least}{text}", t.shape[-1])
        self.unit_stride(argument, t)
        self.no_overlap(argument, t)
        rows = t.shape[0] * t.shape[-2]
        if max(rows, t.shape[0], t.shape[-2]) >= _LIMIT:
            got = rows if max(t.shape[0], t.shape[-2]) < _LIMIT else f"shape {list(t.shape)}"
            self.fail(argument, "fewer than 2^31 rows", got)

    def byte_rows(self, argument: str, t: Tensor, apart: int | None) -> None:
        """Rows of mixed types, for access by 4 bytes; ``apart`` where those of a block must follow one another."""
        if apart is not None and t.shape[-2] > 1 and t.stride(-2) != apart:
            self.fail(argument, f"entries {apart} bytes apart, as scales lie after a block's rows", t.stride(-2))
        steps = [stride for stride, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1]
        if t.data_ptr() % 4 or any(step % 4 for step in steps):
            got = f"address {t.data_ptr() % 4} modulo 4 and strides {list(t.stride())}"
            self.fail(argument, "rows that start at a multiple of 4 bytes", got)

    def same_blocks(self, argument: str, t: Tensor, other_argument: str, other: Tensor) -> None:
        """Both cache tensors have as many blocks and entries."""
        if (t.shape[0], t.shape[-2]) != (other.shape[0], other.shape[-2]):
            self.fail(argument, f"the blocks of {other_argument}: {list(other.shape)}", list(t.shape))

    def indexer(self, a: Argument) -> None:
        """The cache of an indexer's keys, and how much of a key is rotated."""
        table, t = self.values["cos_sin_cache"], self.values[a.name]
        if table is not None and table.shape[1] not in range(2, INDEX_DIM + 1, 2):
            self.fail("cos_sin_cache", f"an even R in 2 .. {INDEX_DIM}", table.shape[1])
        row = f"{INDEX_ROW_BYTES} bytes"
        self.pages(a.name, t, INDEX_ROW_BYTES, row, False, _DTYPES[a.dtypes], "for format indexer")
        self.byte_rows(a.name, t, INDEX_ROW_BYTES)
        self.region(a.name, t, a.mutated)
        setattr(self.call, a.name, Stored(t, None, None, INDEXER, INDEX_DIM, 0))


def _literal(text: str | None) -> Any:
    """The default of a schema as a Python value."""
    if text in ("True", "False"):
        return text == "True"
    return float(text or "nan")


# ------------------------------------------------------------------------------------------------------ convert_cache_


def block_counts(cache: Stored, blocks: Tensor | None) -> tuple[int, int]:
    """The runs of blocks that convert_cache_ goes through on one side, and the blocks of each."""
    if blocks is None:
        return 1, cache.num_blocks
    return (1, blocks.shape[0]) if blocks.dim() == 1 else (blocks.shape[0], blocks.shape[1])


def check_blocks(x: Call) -> None:
    """That src_blocks and dst_blocks are for the same tokens: some number needs just so many blocks of either size."""
    (runs, count), (dst_runs, dst_count) = block_counts(x.src, x.src_blocks), block_counts(x.dst, x.dst_blocks)
    if runs != dst_runs:
        x.fail("dst_blocks", f"S={runs} runs of blocks, as src_blocks has", dst_runs)
    size, dst_size = x.src.block_size, x.dst.block_size
    fewest = max((count - 1) * size, (dst_count - 1) * dst_size) + 1
    if (count or dst_count) and fewest > min(count * size, dst_count * dst_size):
        expected = f"{-(-count * size // max(dst_size, 1))} blocks of {dst_size}"
        x.fail("dst_blocks", f"{expected}, for src_blocks has {count} of {size}", dst_count)
    if runs * count * size >= _LIMIT:
        x.fail("src_blocks", "fewer than 2^31 rows in all", runs * count * size)


# --------------------------------------------------------------------------------------------------- values of indices


def checks_on() -> bool:
    """Whether ``LATENTKV_CHECKS`` asks for values to be looked at everywhere."""
    return os.environ.get("LATENTKV_CHECKS", "").lower() in ("1", "true", "yes", "on")


def checks_values(device: torch.device) -> bool:
    """Whether slots, positions and block numbers are looked at: on a CPU, and on a GPU under ``LATENTKV_CHECKS``.

    They are not where the call only compiles.
    """
    return (device.type == "cpu" or checks_on()) and not warming_up()


def check_scales(x: Call) -> None:
    """That the scales of a call are positive numbers: asked under ``LATENTKV_CHECKS``."""
    scales = {f"{a.prefix}scale": getattr(x, a.name).scale for a in x.op.arguments if a.kind == "cache"}
    scales |= {f"scales[{i}]": cache.scale for i, cache in enumerate(x.caches or ())}
    if x.q_out is not None and x.q_out.dtype in QUERY_FORMATS:
        scales["q_scale"] = x.q_scale
    for name, scale in scales.items():
        if scale is not None and not 0 < (value := float(scale.reshape(()))) < math.inf:
            x.fail(name, "a positive number", f"{value:g}")


def check_positions(op: str, positions: Tensor, table: Tensor, rows: Tensor, first: int = 0) -> Tensor:
    """Which of ``rows`` (bool [n]) have a position outside the table; or it raises. ``first`` is row 0 for the user."""
    bad = rows & ((positions < 0) | (positions >= table.shape[0]))
    if checks_values(positions.device) and bad.any():
        row = int(bad.nonzero()[0])
        at = f"{int(positions[row])} at row {first + row}"
        fail(op, "positions", f"values in 0 .. {table.shape[0] - 1}", at)
    return bad


@dataclass(frozen=True)
class Plan:
    """What is done for tokens [T].

    Attributes:
        alive: neither slot nor position (of what is rotated) lies outside.
        rotate: turned.
        write: has a cache row.
    """

    alive: Tensor
    rotate: Tensor
    write: Tensor


def plan(x: Call) -> Plan:
    """The plan of an update; raises for what lies outside where values are looked at."""
    slots, caches = x.slot_mapping, x.written
    alive = torch.ones(x.tokens, dtype=torch.bool, device=x.device)
    valid = alive
    if slots is not None:
        capacity = caches[0].capacity
        alive, valid = slots < capacity, (slots >= 0) & (slots < capacity)
        if checks_values(x.device) and not alive.all():
            row = int((~alive).nonzero()[0])
            x.fail("slot_mapping", f"slots below the capacity of {capacity}", f"{int(slots[row])} at row {row}")
    rotate = torch.zeros_like(alive)
    if x.rotation is not None:
        rotate = alive if slots is None or x.rope_masked else valid
        bad = check_positions(x.op.name, x.rotation.positions[: x.tokens], x.rotation.table, rotate)
        alive, rotate = alive & ~bad, rotate & ~bad
    return Plan(alive, rotate, valid & alive)


def gather_slots(x: Call) -> tuple[Tensor, Tensor]:
    """The rows of ``out`` that gather_cache writes and the slot of each, -1 for a row without a block; or it raises."""
    ends, out = x.cu_seq_lens, x.out
    if checks_values(x.device):
        if ends[0] != 0 or (ends.diff() < 0).any():
            x.fail("cu_seq_lens", "rising numbers from 0 on", ends.tolist())
        if ends[-1] > len(out):
            x.fail("out", f"at least {int(ends[-1])} rows, as cu_seq_lens ends there", len(out))
    rows = torch.arange(len(out), device=out.device)
    sequence = torch.searchsorted(ends[1:].contiguous().long(), rows, right=True)
    rows, sequence = (v[sequence < len(x.block_table)] for v in (rows, sequence))
    token = rows - ends[sequence] + (0 if x.seq_starts is None else x.seq_starts[sequence])
    return rows, _slots_of(x, "block_table", x.block_table, sequence, token, x.cache, missing=True)


def convert_slots(x: Call) -> tuple[Tensor, Tensor]:
    """The slots in src and dst of every token of convert_cache_, -1 where there is none; or it raises."""
    runs, count = block_counts(x.src, x.src_blocks)
    tokens = min(count * x.src.block_size, block_counts(x.dst, x.dst_blocks)[1] * x.dst.block_size)
    run = torch.arange(runs, device=x.device).repeat_interleave(tokens)
    token = torch.arange(tokens, device=x.device).repeat(runs)
    slots, dst_slots = (
        _slots_of(x, name, _blocks(cache, blocks), run, token, cache, missing=False)
        for name, cache, blocks in (("src_blocks", x.src, x.src_blocks), ("dst_blocks", x.dst, x.dst_blocks))
    )
    return slots, dst_slots


def decode_slots(x: Call) -> Iterator[Tensor]:
    """For each sequence of mla_decode the slots of its tokens, -1 where there is none; or it raises."""
    for i, length in enumerate(x.seq_lens.tolist()):
        token = torch.arange(max(length, 0), device=x.device)
        yield _slots_of(x, "block_table", x.block_table, torch.full_like(token, i), token, x.cache, missing=True)


def _blocks(cache: Stored, blocks: Tensor | None) -> Tensor:
    """The block numbers [S, n] that convert_cache_ goes through on one side."""
    if blocks is None:
        return torch.arange(cache.num_blocks, device=cache.data.device)[None]
    return blocks[None] if blocks.dim() == 1 else blocks


def _slots_of(
    x: Call, name: str, blocks: Tensor, sequence: Tensor, token: Tensor, cache: Stored, missing: bool
) -> Tensor:
    """The slots of some sequences' tokens, by their blocks [S, n]; -1 where there is none, or it raises.

    ``missing``: a negative block number is a fault, too.
    """
    count, size = cache.num_blocks, max(cache.block_size, 1)
    column = token // size
    inside = (token >= 0) & (column < blocks.shape[1])
    if missing and checks_values(x.device) and not inside.all():
        row = int((~inside).nonzero()[0])
        expected = f"blocks for token {int(token[row])} of sequence {int(sequence[row])}, {size} tokens each"
        x.fail(name, expected, f"{blocks.shape[1]} blocks")
    if not blocks.shape[1]:
        return torch.full_like(token, -1)
    number = blocks[sequence, column.clamp(0, blocks.shape[1] - 1)].long()
    bad = inside & ((number >= count) | (missing & (number < 0)))
    if checks_values(x.device) and bad.any():
        row = int(bad.nonzero()[0])
        at = f"{int(number[row])} at [{int(sequence[row])}, {int(column[row])}]"
        x.fail(name, f"block numbers in 0 .. {count - 1}", at)
    return torch.where(inside & (number >= 0) & (number < count), number * size + token % size, -1)

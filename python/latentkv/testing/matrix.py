"""The cases that every provider must compute to the same bytes, and the inputs of each.

A :class:`Case` says what to compute on; :class:`Problem` builds it: every tensor is a view into a poisoned buffer, so
that comparing whole buffers finds a wrong byte as well as one that should not have been touched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..cache.layouts import FORMATS, CacheLayout, MLACache, Placement, resolve_format
from ..models.rope_table import build_cos_sin_cache
from ..ops.checks import Stored
from ..ops.schemas import NATIVE_OP_NAMES
from ..providers import Provider
from .compare import first_difference, poisoned

Rope = Literal["gptj", "neox", "none"]
Strides = Literal["contiguous", "sliced", "transposed", "unaligned"]
Rows = Literal["full", "padded", "masked", "rotate-masked"]
Normalised = Literal["none", "apart", "in-place"]
Blocks = Literal["all", "to-list", "lists", "tables"]

ACTIVATIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_POSITION = 96
_OFFSETS: dict[Strides, int] = {"contiguous": 0, "sliced": 16, "transposed": 0, "unaligned": 1}  # of a view's start
_GAPS: dict[Strides, int] = {"contiguous": 0, "sliced": 16, "transposed": 0, "unaligned": 1}  # between heads or rows


@dataclass(frozen=True)
class Case:
    """One point of the matrix.

    Attributes:
        op: the name of an op.
        layout: of the cache. The indexer's has 128 elements, of which rope_dim are rotated, and its format is not used.
        activation: dtype of the activations, a key of :data:`ACTIVATIONS`.
        rope: how pairs lie, or none for models without rotation.
        strides: how q_pe, k_pe, kv_c, q_nope and the indexer's k lie: contiguous; slices of wider projections; queries
            as [H, N, .] transposed; or at odd offsets and strides that rule out 16-byte access.
        rows: full (T = N, slots all valid); padded (T < N); masked (some slots -1, left alone); rotate-masked. Of
            gather_cache: full, or padded (out has more rows).
        table: dtype of the cos/sin table.
        index: dtype of positions and slots.
        tokens, heads: N and H.
        as_bytes: back a quantised cache by uint8.
        pages: B, 1, bs, C tensors with padded blocks at a storage offset, instead of packed B, bs, C.
        scale: dequantisation scale, or None.
        inverse: turn back by the negative angle, which only rope_ can.
        query: the fp8 format of decode_prologue's q_out, or None for the activations' dtype.
        q_scale: its scale, or None.
        outputs: how q_out, q_rope_out and kv_c_out lie, in the words of ``strides``.
        split: the query's rope part is an output of its own.
        in_place: q_nope already lies in q_out.
        norm: dtype of RMSNorm's weight, a key of :data:`ACTIVATIONS`, or None for no norm.
        normalised: what takes the normalised vectors: nothing, a tensor apart, or kv_c itself.
        layers: G of write_cache_grouped_; each layer has strides, pages and a scale of its own.
        power_of_two: the scales of the indexer's keys.
        sequences: S of gather_cache and of convert_cache_ with tables. N is the tokens of all, or of each.
        starts: sequences do not start at their first token.
        blocks: of convert_cache_, where rows come from and go: all blocks; a list of blocks of ``to``; lists of both;
            tables of both.
        to, to_scale, to_bytes, to_pages: the cache that convert_cache_ writes, as layout, scale, as_bytes and pages say
            of the one that it reads.
    """

    op: str
    layout: CacheLayout
    activation: str = "bf16"
    rope: Rope = "gptj"
    strides: Strides = "contiguous"
    rows: Rows = "full"
    table: str = "fp32"
    index: torch.dtype = torch.int64
    tokens: int = 5
    heads: int = 3
    as_bytes: bool = False
    pages: bool = False
    scale: float | None = 0.37
    inverse: bool = False
    query: str | None = None
    q_scale: float | None = None
    outputs: Strides = "contiguous"
    split: bool = False
    in_place: bool = False
    norm: str | None = None
    normalised: Normalised = "none"
    layers: int = 1
    power_of_two: bool = False
    sequences: int = 3
    starts: bool = False
    blocks: Blocks = "tables"
    to: CacheLayout | None = None
    to_scale: float | None = 0.37
    to_bytes: bool = False
    to_pages: bool = False

    def __str__(self) -> str:
        if self.op in ("gather_cache", "convert_cache_"):
            return self._read_name()
        lay = self.layout
        parts = [self.op, f"{lay.format}", lay.placement, f"{lay.kv_lora_rank}+{lay.rope_dim}x{lay.block_size}"]
        parts += [self.activation, self.rope, self.strides, self.rows, f"table-{self.table}"]
        parts += [
            f"i{self.index.itemsize * 8}",
            *(["bytes"] if self.as_bytes else []),
            *(["pages"] if self.pages else []),
            *(["inverse"] if self.inverse else []),
            *([f"layers-{self.layers}"] if self.layers > 1 else []),
            *(["power-of-two"] if self.power_of_two else []),
        ]
        if self.op == "decode_prologue":
            parts += [f"q-{self.query or self.activation}", f"out-{self.outputs}"]
            parts += [word for word, is_so in (("split", self.split), ("in-place", self.in_place)) if is_so]
            parts += [f"norm-{self.norm}-{self.normalised}"] if self.norm else []
        return "-".join(parts)

    def _read_name(self) -> str:
        """The name of a case that reads a cache."""
        parts = [self.op]
        sides = [(self.layout, self.scale, self.as_bytes, self.pages)]
        if self.to is not None:
            sides.append((self.to, self.to_scale, self.to_bytes, self.to_pages))
        for lay, scale, as_bytes, pages in sides:
            parts += [lay.format, lay.placement, f"{lay.kv_lora_rank}+{lay.rope_dim}x{lay.block_size}"]
            parts += [f"scale-{scale}"] if FORMATS[lay.format].quantised else []
            parts += [word for word, is_so in (("bytes", as_bytes), ("pages", pages)) if is_so]
        parts += [self.strides, f"i{self.index.itemsize * 8}", f"{self.sequences}x{self.tokens}"]
        if self.op == "gather_cache":
            parts += [self.activation, self.rows, f"out-{self.outputs}", *(["starts"] if self.starts else [])]
        else:
            parts += [self.blocks]
        return "-".join(parts)


@dataclass
class Problem:
    """The tensors of a case on a device, drawn from ``seed``: equal for equal arguments, whatever the device."""

    case: Case
    device: torch.device | str
    seed: int = 0
    buffers: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        case, lay = self.case, self.case.layout
        self._random = torch.Generator().manual_seed(self.seed)
        self.buffers = {}
        self._more_layers: list[tuple[Tensor, Tensor, MLACache]] = []
        if case.op == "gather_cache":
            return self._gather()
        if case.op == "convert_cache_":
            return self._convert()
        n, h, latent, rope = case.tokens, case.heads, lay.kv_lora_rank, lay.rope_dim
        dtype = ACTIVATIONS[case.activation]
        q_gap = {"sliced": 2 * rope, "unaligned": 1}.get(case.strides, 0)
        self.q_pe = self._values("q_pe", (n, h, rope), self._head_strides(case.strides, rope, q_gap), dtype)
        self.kv_c, self.k_pe = self._projection("", case.strides)
        table_dtype = ACTIVATIONS[case.table]
        self.table = None
        if case.rope != "none" and rope:
            self.table = build_cos_sin_cache(
                rope_theta=10000.0,
                qk_rope_head_dim=rope,
                max_position_embeddings=MAX_POSITION,
                dtype=table_dtype,
            ).to(self.device)
        positions = torch.randint(0, MAX_POSITION, (n,), generator=self._random).to(case.index)
        self.positions = positions.to(self.device) if self.table is not None else None
        blocks = -(-2 * max(n, 1) // lay.block_size) + 1
        slots = torch.randperm(blocks * lay.block_size, generator=self._random)[:n].to(case.index)
        if case.rows in ("masked", "rotate-masked"):
            slots[::2] = -1
        if case.rows == "padded":
            slots = slots[: n // 2]
        self.slots = slots.to(self.device)
        if case.op == "write_indexer_cache_":
            self.k = self._values("k", (n, 128), (128 + _GAPS[case.strides], 1), dtype)
            shape = (blocks, lay.block_size, 132)
            self.index_cache = self._pages("cache0", shape, torch.uint8, case.pages, run=4, mixed=True)
            return
        self.cache = self._cache(("cache", ""), lay, blocks, case.pages, case.scale, case.as_bytes)
        for i in range(1, case.layers):
            strides = _STRIDES[(_STRIDES.index(case.strides) + i % 2) % 4]
            scale = (case.scale, None, 0.25 * i)[i % 3]
            kv_c, k_pe = self._projection(f"/{i}", strides)
            pages = case.pages != (i % 2 == 1)
            cache = self._cache(("cache", f"/{i}"), lay, blocks, pages, scale, case.as_bytes)
            self._more_layers.append((kv_c, k_pe, cache))
        if case.op == "decode_prologue":
            self._prologue(dtype, latent, rope)

    def _prologue(self, dtype: torch.dtype, latent: int, rope: int) -> None:
        """What decode_prologue takes besides: q_nope, the outputs, the norm's weight, the query's scale."""
        case, n, h = self.case, self.case.tokens, self.case.heads
        gap, out_gap = _GAPS[case.strides], _GAPS[case.outputs]
        self.q_nope = None
        if not case.in_place:
            self.q_nope = self._values("q_nope", (n, h, latent), self._head_strides(case.strides, latent, gap), dtype)
        kind = FORMATS[case.query].dtype if case.query else dtype
        self.q_rope_out: Tensor | None = None
        if case.split and case.outputs == "contiguous":
            self.q_out = self._view("q_out", (n, h, latent), (h * latent, latent, 1), kind, 0)
            self.q_rope_out = self._view("q_rope_out", (n, h, rope), (h * rope, rope, 1), kind, 0)
        else:
            strides = self._head_strides(case.outputs, latent + rope, out_gap)
            self.q_out = self._view("q_out", (n, h, latent + rope), strides, kind, _OFFSETS[case.outputs])
            if case.split:
                self.q_out, self.q_rope_out = self.q_out[..., :latent], self.q_out[..., latent:]
        if case.in_place:
            own = self._draw((n, h, latent)).to(kind).to(self.device)
            as_bytes = kind.itemsize == 1  # torch does not copy fp8 everywhere
            nope = self.q_out[..., :latent]
            (nope.view(torch.uint8) if as_bytes else nope).copy_(own.view(torch.uint8) if as_bytes else own)
        self.weight = self.kv_c_out = None
        if case.norm:
            self.weight = self._values("weight", (latent,), (1,), ACTIVATIONS[case.norm])
        if case.normalised == "apart":
            self.kv_c_out = self._view("kv_c_out", (n, latent), (latent + out_gap, 1), dtype, _OFFSETS[case.outputs])
        elif case.normalised == "in-place":
            self.kv_c_out = self.kv_c
        self.q_scale = None if case.q_scale is None else torch.tensor([case.q_scale], device=self.device)

    def _gather(self) -> None:
        """Sequences of any length, 0 too, each in blocks of its own; what no row needs of the table is absurd."""
        case, lay, count = self.case, self.case.layout, self.case.sequences
        cuts = torch.randint(0, case.tokens + 1, (count - 1,), generator=self._random).sort().values
        cuts[1:2] = cuts[:1]
        ends = [*cuts.tolist(), case.tokens]
        starts = torch.randint(0, 2 * lay.block_size + 1, (count,), generator=self._random) * case.starts
        columns = []  # of each sequence: those that its rows need
        for start, begin, end in zip(starts.tolist(), [0, *ends], ends, strict=False):
            last = (start + end - begin - 1) // lay.block_size
            columns.append(range(start // lay.block_size, last + 1 if end > begin else 0))
        blocks = sum(map(len, columns)) + 2
        order = iter(torch.randperm(blocks, generator=self._random).tolist())
        rows = [
            [next(order) if i in own else (-1) ** i * (2**30 + i) for i in range(max(c.stop for c in columns) + 1)]
            for own in columns
        ]
        self.cache = self._cache(("cache", ""), lay, blocks, case.pages, case.scale, case.as_bytes)
        self._fill(self.cache)
        self.block_table = self._table("block_table", rows)
        self.cu_seq_lens = torch.tensor([0, *ends], dtype=case.index, device=self.device)
        self.seq_starts = starts.to(case.index).to(self.device) if case.starts else None
        total, width = case.tokens + (3 if case.rows == "padded" else 0), lay.kv_lora_rank + lay.rope_dim
        strides, dtype = (width + _GAPS[case.outputs], 1), ACTIVATIONS[case.activation]
        self.out = self._view("out", (total, width), strides, dtype, _OFFSETS[case.outputs])

    def _convert(self) -> None:
        """Runs of N tokens: with tables some of them shorter, and of one the first block is left out."""
        case, lay, to = self.case, self.case.layout, self.case.to
        assert to is not None, "convert_cache_ needs a layout to convert to"
        runs = case.sequences if case.blocks == "tables" else 1
        needed = [-(-case.tokens // side.block_size) for side in (lay, to)]
        spare = [{"all": 0, "to-list": i}.get(case.blocks, 1) for i in range(2)]
        counts = [runs * n + more for n, more in zip(needed, spare, strict=True)]
        self.cache = self._cache(("cache", ""), lay, counts[0], case.pages, case.scale, case.as_bytes)
        self.to_cache = self._cache(("to", ""), to, counts[1], case.to_pages, case.to_scale, case.to_bytes)
        self._fill(self.cache)
        lists: list[Tensor | None] = []
        for i, (name, columns) in enumerate(zip(("src_blocks", "dst_blocks"), needed, strict=True)):
            rows = torch.randperm(counts[i], generator=self._random)[: runs * columns].view(runs, columns)
            if case.blocks == "tables":
                for run in range(1, runs):  # the first one is whole
                    rows[run, columns - run * columns // runs :] = -1
                rows[-1, : 1 - i] = -1
            table = self._table(name, rows.tolist()) if spare[i] else None
            lists.append(table if table is None or case.blocks == "tables" else table[0])
        self.src_blocks, self.dst_blocks = lists

    def _table(self, name: str, rows: list[list[int]]) -> Tensor:
        """A table of block numbers."""
        shape = (len(rows), len(rows[0]))
        view = self._view(name, shape, (shape[1] + _GAPS[self.case.strides], 1), self.case.index, 0)
        return view.copy_(torch.tensor(rows))

    def _fill(self, cache: MLACache) -> None:
        """Puts numbers into a cache, all of them finite: every code of fp8, and as scales of tiles powers of two."""
        lay, (data, rope_data, _, name) = cache.layout, cache.op_arguments
        kind = FORMATS["fp8_e4m3fn" if lay.packed else name]
        parts = Stored(data, rope_data, None, FORMATS[name], lay.kv_lora_rank, lay.rope_dim).parts
        for i, part in enumerate(parts):
            if i == 2:
                values = torch.randint(117, 138, part.shape, generator=self._random).to(torch.uint8)
                if name == "fp8_ds_mla":
                    scales = (values[..., :4].int() << 23).view(torch.float32)
                    scales[..., 1] *= 1.37  # older engines wrote such
                    values = scales.view(torch.uint8)
            elif kind.quantised and not (lay.packed and i == 1):
                values = torch.randint(0, 256, part.shape, generator=self._random).to(torch.uint8)
                values = torch.where(values.view(kind.dtype).float().isfinite(), values, 0)
            else:
                dtype = torch.bfloat16 if lay.packed else lay.dtype
                values = self._draw((*part.shape[:-1], lay.rope_dim if lay.packed else part.shape[-1])).to(dtype)
                values = values.view(part.dtype)
            part.copy_(values)

    def _head_strides(self, strides: Strides, width: int, gap: int) -> tuple[int, int, int]:
        n, h, head = self.case.tokens, self.case.heads, width + gap
        return (width, n * width, 1) if strides == "transposed" else (h * head, head, 1)

    def _projection(self, suffix: str, strides: Strides) -> tuple[Tensor, Tensor]:
        """kv_c and k_pe, both in the rows of one projection, as engines have them, unless they are contiguous."""
        n, latent, rope = self.case.tokens, self.case.layout.kv_lora_rank, self.case.layout.rope_dim
        dtype = ACTIVATIONS[self.case.activation]
        if strides == "contiguous":
            kv_c = self._values(f"kv_c{suffix}", (n, latent), (latent, 1), dtype)
            return kv_c, self._values(f"k_pe{suffix}", (n, rope), (rope, 1), dtype)
        width = latent + rope + (3 if strides == "unaligned" else 8)
        projection = self._values(f"kv{suffix}", (n, width), (width, 1), dtype)
        return projection[:, :latent], projection[:, latent : latent + rope]

    def _view(
        self, name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, offset: int
    ) -> Tensor:
        """A view of ``shape`` and ``strides`` at element ``offset`` of a new poisoned buffer."""
        extent = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
        buffer = poisoned((extent + 16) * dtype.itemsize, self.device)
        self.buffers[name] = buffer
        return buffer.view(dtype).as_strided(shape, strides, offset)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        """Values of all magnitudes: fp8 rounds, saturates and goes subnormal on them."""
        exponents = torch.randint(-14, 12, shape, generator=self._random).float()
        return torch.randn(shape, generator=self._random) * 2.0 ** (exponents / 2)

    def _values(self, name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        view = self._view(name, shape, strides, dtype, _OFFSETS[self.case.strides])
        view.copy_(self._draw(shape))
        return view

    def _cache(
        self, name: tuple[str, str], lay: CacheLayout, blocks: int, pages: bool, value: float | None, as_bytes: bool
    ) -> MLACache:
        """A poisoned cache; ``name``: what comes before and after the number of a tensor in its buffer's name."""
        dtype = torch.uint8 if as_bytes and FORMATS[lay.format].quantised else lay.dtype
        run = lay.packed.block_multiple if lay.packed else None
        tensors = [
            self._pages(f"{i}".join(name), shape, dtype, pages, run, mixed=lay.packed is not None)
            for i, shape in enumerate(lay.shapes(blocks))
        ]
        scale = None if value is None else torch.tensor([value], device=self.device)
        return MLACache.wrap(tensors, lay, scale)

    def _pages(
        self, name: str, shape: tuple[int, int, int], dtype: torch.dtype, pages: bool, run: int | None, mixed: bool
    ) -> Tensor:
        """A cache tensor; ``run`` where the rows of a block must follow one another, and blocks lie a multiple of so
        many bytes apart; ``mixed`` where all rows lie at multiples of 4.
        """
        blocks, entries, width = shape
        multiple = run or 1
        if not pages:
            return self._view(name, shape, (-(-entries * width // multiple) * multiple, width, 1), dtype, 0)
        gap = (4 if mixed else 3) if self.case.strides == "unaligned" else 16
        row = width if run else width + gap
        block = -(-(entries * row + (gap if run else 32)) // multiple) * multiple
        strides = (block, entries * row, row, 1)
        return self._view(name, (blocks, 1, entries, width), strides, dtype, 32)

    @property
    def layers(self) -> list[tuple[Tensor, Tensor, MLACache]]:
        """kv_c, k_pe and the cache of each layer."""
        return [(self.kv_c, self.k_pe, self.cache), *self._more_layers]

    def run(self, provider: Provider) -> None:
        """Computes the case's op."""
        case, neox = self.case, self.case.rope == "neox"
        masked = case.rows == "rotate-masked"
        if case.op == "rope_":
            assert self.positions is not None and self.table is not None, "rope_ needs a rotation"
            provider.rope_(self.positions, self.q_pe, self.k_pe, self.table, is_neox=neox, inverse=case.inverse)
        elif case.op == "write_cache_":
            provider.write_cache_(self.kv_c, self.k_pe, self.slots, self.cache)
        elif case.op == "rope_write_cache_":
            provider.rope_write_cache_(
                self.positions, self.q_pe, self.k_pe, self.kv_c, self.table, self.slots, self.cache,
                is_neox=neox, rope_masked=masked,
            )  # fmt: skip
        elif case.op == "decode_prologue":
            provider.decode_prologue(
                self.q_nope, self.q_pe, self.kv_c, self.k_pe, self.positions, self.table, self.slots, self.cache,
                is_neox=neox, q_out=self.q_out, q_rope_out=self.q_rope_out, kv_c_out=self.kv_c_out,
                q_scale=self.q_scale, kv_norm_weight=self.weight, rope_masked=masked,
            )  # fmt: skip
        elif case.op == "write_cache_grouped_":
            kv_c, k_pe, caches = zip(*self.layers, strict=True)
            provider.write_cache_grouped_(kv_c, k_pe, self.slots, caches)
        elif case.op == "write_indexer_cache_":
            provider.write_indexer_cache_(
                self.k, self.positions, self.table, self.slots, self.index_cache,
                is_neox=neox, power_of_two_scale=case.power_of_two,
            )  # fmt: skip
        elif case.op == "gather_cache":
            provider.gather_cache(
                self.cache, self.block_table, self.cu_seq_lens, out=self.out, seq_starts=self.seq_starts
            )  # fmt: skip
        elif case.op == "convert_cache_":
            provider.convert_cache_(
                self.cache, self.to_cache, src_blocks=self.src_blocks, dst_blocks=self.dst_blocks
            )  # fmt: skip
        else:
            raise ValueError(f"Case: op: expected one of {', '.join(NATIVE_OP_NAMES)}, got {case.op!r}")

    def differences(self, other: Problem) -> list[str]:
        """One line per buffer in which a byte differs from ``other``'s; the first bad coordinate in each."""
        found = []
        for name, buffer in self.buffers.items():
            difference = first_difference(buffer, other.buffers[name])
            if difference:
                found.append(f"{name}: byte offset: {difference}")
        return found


def check(
    case: Case,
    provider: Provider,
    expected: Provider,
    device: torch.device | str,
    seed: int = 0,
    expected_device: torch.device | str | None = None,
) -> list[str]:
    """Runs ``case`` on ``provider`` and on ``expected``; the differences, none if all bytes agree.

    ``expected_device`` is where ``expected`` runs: ``"cpu"`` keeps a GPU's own faults out of it. None: ``device``.
    """
    actual, wanted = Problem(case, device, seed), Problem(case, expected_device or device, seed)
    actual.run(provider)
    wanted.run(expected)
    return actual.differences(wanted)


def devices() -> list[str]:
    """The devices of this machine: the CPU, and a GPU where there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def formats_for(activation: str) -> list[str]:
    """The formats that take activations of a dtype: its own, every quantised one, and bf16's the packed ones."""
    return [name for name, f in FORMATS.items() if f.activation in (None, ACTIVATIONS[activation])]


# Latent and rope dimensions and block size: DeepSeek, Mistral-4, a small odd one, one without a rope part.
_DIMS = ((512, 64, 64), (256, 64, 16), (512, 64, 1), (17, 6, 3), (96, 32, 16), (64, 0, 16))
_PROLOGUE_DIMS = ((512, 64, 64), (256, 64, 16), (448, 64, 1), (17, 6, 3), (264, 32, 16), (7, 2, 5), (64, 0, 16))
_STRIDES: tuple[Strides, ...] = ("contiguous", "sliced", "transposed", "unaligned")
_ROPES: tuple[Rope, ...] = ("gptj", "neox", "none")
_ROWS: tuple[Rows, ...] = ("full", "padded", "masked", "rotate-masked")
_NORMS: tuple[tuple[str | None, Normalised], ...] = (
    *((None, "none"), ("own", "none"), ("fp32", "apart"), ("own", "in-place"), ("fp32", "none"), ("own", "apart")),
    ("fp32", "in-place"),
)


_QUERIES = tuple(name for name, f in FORMATS.items() if f.quantised)


def _written() -> list[tuple[str, str, Placement]]:
    """Each activation dtype with each format that takes it, in each placement that the format has."""
    return [
        (activation, fmt, placement)
        for activation in ACTIVATIONS
        for fmt in formats_for(activation)
        for placement in get_args(Placement)
        if placement == "concat" or not FORMATS[fmt].packed
    ]


def _unpacked() -> list[tuple[str, str]]:
    return [(a, f) for a in ACTIVATIONS for f in formats_for(a) if not FORMATS[f].packed]


def _layout(dims: tuple[int, int, int], fmt: str, placement: Placement) -> CacheLayout:
    packed = FORMATS[fmt].packed
    latent, rope_dim = packed.dims if packed else dims[:2]
    return CacheLayout(latent, rope_dim, dims[2], resolve_format(fmt), placement)


def _picker(number: int) -> Callable[[Sequence[Any]], Any]:
    """Chooses from one axis after another for the case of that number.

    Every axis goes round at a rate of its own. The rates are square roots of primes, so that no two fall in step.
    """
    rates = iter((2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47))
    return lambda values: values[int(number * math.sqrt(next(rates)) % 1 * len(values))]


def matrix() -> Iterator[Case]:
    """The shared matrix.

    write_cache_ and rope_write_cache_: activation x format x placement x rope style x strides x rows, in full;
    decode_prologue: the same with half of the rows. gather_cache: format x placement x dtype of out x alignment;
    convert_cache_: format x format x alignment. Then the other ops, and rows so long that a GPU's lanes pass over
    them more than once. Dimensions, block sizes, table and index dtypes, page shapes, uint8 backing and all else that
    an op has go round with the cases, so that each meets each.
    """
    yield from _in_place()
    yield from _rope_alone()
    yield from _long_rows()
    yield from _prologues()
    yield from _long_prologues()
    yield from _grouped()
    yield from _indexer()
    yield from _gathers()
    yield from _conversions()


def _in_place() -> Iterator[Case]:
    axes = itertools.product(("rope_write_cache_", "write_cache_"), _written(), _ROPES, _STRIDES, _ROWS)
    for number, (op, (activation, fmt, placement), rope, strides, rows) in enumerate(axes):
        if op == "write_cache_" and (rope != "none" or rows == "rotate-masked"):
            continue
        pick = _picker(number)
        yield Case(
            op=op,
            layout=_layout(pick(_DIMS[: 5 if rope != "none" else 6]), fmt, placement),
            activation=activation,
            rope=rope,
            strides=strides,
            rows=rows,
            table=pick(list(ACTIVATIONS)),
            index=pick((torch.int64, torch.int32)),
            tokens=pick((5, 1, 33)),
            heads=pick((3, 16, 1, 130)),
            as_bytes=pick((False, True)),
            pages=pick((False, True)),
            scale=pick((0.37, None, 2.0**-3)),
        )


def _rope_alone() -> Iterator[Case]:
    """rope_: activation x rope style x strides x table, every other pair of cases inverse."""
    axes = itertools.product(ACTIVATIONS, _ROPES[:2], _STRIDES, ACTIVATIONS)
    for number, (activation, rope, strides, table) in enumerate(axes):
        layout = CacheLayout(8, (64, 32, 6, 128, 16)[number % 5], 16)
        yield Case(
            "rope_", layout, activation, rope, strides,
            table=table, tokens=7, heads=(16, 3)[number % 2], inverse=number // 2 % 2 == 1,
        )  # fmt: skip


def _long_rows() -> Iterator[Case]:
    """rope_write_cache_: activation x format x rope style x strides."""
    for (i, (activation, fmt)), (j, rope), (k, strides) in itertools.product(
        enumerate(_unpacked()), enumerate(_ROPES[:2]), enumerate((_STRIDES[0], _STRIDES[3]))
    ):
        layout = CacheLayout(1024, 1024, 4, resolve_format(fmt), get_args(Placement)[(i + j + k) % 2])
        table = list(ACTIVATIONS)[(i + j) % 3]
        yield Case("rope_write_cache_", layout, activation, rope, strides, table=table, tokens=3, heads=2)


def _prologues() -> Iterator[Case]:
    axes = itertools.product(_written(), _ROPES, _STRIDES, (_ROWS[:2], _ROWS[2:]))
    for number, ((activation, fmt, placement), rope, strides, rows) in enumerate(axes):
        pick = _picker(number)
        tokens, heads = pick(((5, 3), (1, 16), (3, 1), (9, 2), (17, 3), (1, 130), (2, 5)))
        norm, normalised = pick(_NORMS)
        yield Case(
            op="decode_prologue",
            layout=_layout(pick(_PROLOGUE_DIMS[: 6 if rope != "none" else 7]), fmt, placement),
            activation=activation,
            rope=rope,
            strides=strides,
            rows=pick(rows),
            table=pick(list(ACTIVATIONS)),
            index=pick((torch.int64, torch.int32)),
            tokens=tokens,
            heads=heads,
            as_bytes=pick((False, True)),
            pages=pick((False, True)),
            scale=pick((0.37, None, 2.0**-3)),
            query=pick((None, *_QUERIES)),
            q_scale=pick((0.37, None, 2.0**-3)),
            outputs=pick(_STRIDES),
            split=pick((False, True)),
            in_place=pick((False, False, True)),
            norm=activation if norm == "own" else norm,
            normalised=normalised,
        )


def _long_prologues() -> Iterator[Case]:
    """activation x format x strides."""
    axes = itertools.product(_unpacked(), (_STRIDES[0], _STRIDES[3]))
    for number, ((activation, fmt), strides) in enumerate(axes):
        pick = _picker(number)
        norm, normalised = pick(_NORMS)
        yield Case(
            op="decode_prologue",
            layout=CacheLayout(1024, 1024, 4, resolve_format(fmt), pick(get_args(Placement))),
            activation=activation,
            rope=pick(_ROPES[:2]),
            strides=strides,
            table=pick(list(ACTIVATIONS)),
            tokens=2,
            heads=2,
            query=pick((None, *_QUERIES)),
            outputs=strides,
            split=pick((False, True)),
            norm=activation if norm == "own" else norm,
            normalised=normalised,
        )


def _grouped() -> Iterator[Case]:
    """write_cache_grouped_: activation x format x placement x strides."""
    for number, ((activation, fmt, placement), strides) in enumerate(itertools.product(_written(), _STRIDES)):
        pick = _picker(number)
        layers, tokens = pick(((2, 5), (5, 1), (1, 17), (3, 5), (40, 2)))
        yield Case(
            op="write_cache_grouped_",
            layout=_layout(pick(_DIMS), fmt, placement),
            activation=activation,
            rope="none",
            strides=strides,
            rows=pick(_ROWS[:3]),
            index=pick((torch.int64, torch.int32)),
            tokens=tokens,
            as_bytes=pick((False, True)),
            pages=pick((False, True)),
            scale=pick((0.37, None, 2.0**-3)),
            layers=layers,
        )


def _indexer() -> Iterator[Case]:
    """write_indexer_cache_: activation x rope style x strides x rows."""
    axes = itertools.product(ACTIVATIONS, _ROPES, ("contiguous", "sliced", "unaligned"), _ROWS[:3])
    for number, (activation, rope, strides, rows) in enumerate(axes):
        pick = _picker(number)
        yield Case(
            op="write_indexer_cache_",
            layout=CacheLayout(128, pick((64, 128, 2, 32, 6)), pick((64, 16, 1, 3)), "fp8_e4m3fn"),
            activation=activation,
            rope=rope,
            strides=strides,  # type: ignore[arg-type]
            rows=rows,
            table=pick(list(ACTIVATIONS)),
            index=pick((torch.int64, torch.int32)),
            tokens=pick((5, 1, 17)),
            pages=pick((False, True)),
            power_of_two=pick((False, True)),
        )


# More than a GPU's lanes take at a time, in either part.
_READ_DIMS = (*_DIMS, (1040, 328, 4))


def _stored() -> list[tuple[str, Placement]]:
    return [(f, p) for f in FORMATS for p in get_args(Placement) if p == "concat" or not FORMATS[f].packed]


def _gathers() -> Iterator[Case]:
    axes = itertools.product(_stored(), ACTIVATIONS, ((_STRIDES[0], _STRIDES[0]), (_STRIDES[1], _STRIDES[3])))
    for number, ((fmt, placement), activation, strides) in enumerate(axes):
        pick = _picker(number)
        sequences, tokens = pick(((3, 19), (1, 5), (70, 40), (5, 131), (2, 1)))
        yield Case(
            op="gather_cache",
            layout=_layout(pick(_READ_DIMS), fmt, placement),
            activation=activation,
            strides=pick(strides),
            rows=pick(_ROWS[:2]),
            index=pick((torch.int64, torch.int32)),
            tokens=tokens,
            sequences=sequences,
            as_bytes=pick((False, True)),
            pages=pick((False, True)),
            scale=pick((0.37, None, 2.0**-3)),
            outputs=pick((_STRIDES[0], _STRIDES[1], _STRIDES[3])),
            starts=pick((False, True)),
        )


def _conversions() -> Iterator[Case]:
    pairs = [(f, g) for f in FORMATS for g in FORMATS if f == g or not (FORMATS[f].packed and FORMATS[g].packed)]
    for number, ((fmt, to), strides) in enumerate(itertools.product(pairs, (_STRIDES[1], _STRIDES[3]))):
        pick = _picker(number)
        packed = FORMATS[fmt].packed or FORMATS[to].packed
        dims = pick(_READ_DIMS)
        latent, rope_dim = packed.dims if packed else dims[:2]
        placements: list[Placement] = [
            pick(get_args(Placement)) if not FORMATS[f].packed else "concat" for f in (fmt, to)
        ]
        yield Case(
            op="convert_cache_",
            layout=CacheLayout(latent, rope_dim, dims[2], resolve_format(fmt), placements[0]),
            to=CacheLayout(latent, rope_dim, pick((16, 64, 1, 3, 5)), resolve_format(to), placements[1]),
            strides=strides,
            index=pick((torch.int64, torch.int32)),
            tokens=pick((19, 1, 50, 7)),
            sequences=pick((3, 1, 2)),
            as_bytes=pick((False, True)),
            pages=pick((False, True)),
            scale=pick((0.37, None, 2.0**-3)),
            to_bytes=pick((False, True)),
            to_pages=pick((False, True)),
            to_scale=pick((None, 0.37, 2.0**-3)),
            blocks=pick(get_args(Blocks)),
        )


def for_layout(layout: CacheLayout) -> Iterator[Case]:
    """A few cases on one layout: what a backend's cache must pass."""
    for activation in ACTIVATIONS:
        if layout.format in formats_for(activation):
            base = Case("rope_write_cache_", layout, activation, strides="sliced", tokens=19, heads=16)
            yield base
            yield replace(base, rope="neox", rows="masked", table=activation, pages=True)
            yield replace(base, op="write_cache_", strides="unaligned", rows="padded", index=torch.int32)
            yield replace(base, op="write_cache_grouped_", layers=3, tokens=5)
            base = replace(base, op="decode_prologue", strides="transposed", tokens=5, heads=4)
            yield replace(
                base, norm="fp32", normalised="apart", query=layout.format if FORMATS[layout.format].quantised else None
            )
            yield replace(base, rope="neox", rows="rotate-masked", split=True, in_place=True, pages=True)
    plain = CacheLayout(layout.kv_lora_rank, layout.rope_dim, 16)
    yield Case("gather_cache", layout, tokens=19, pages=True, starts=True)
    yield Case("convert_cache_", plain, to=layout, tokens=19)
    yield Case("convert_cache_", layout, to=plain, tokens=19, pages=True, blocks="lists")

"""What a timed call works on: tensors that lie in memory as an engine has them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from ... import providers
from ...cache.layouts import FORMATS, CacheLayout, MLACache, Placement, resolve_format
from ...models import Model
from ...models.rope_table import build_cos_sin_cache
from ...ops.checks import INDEX_DIM, INDEX_ROW_BYTES
from ...ops.schemas import OP_NAMES

LAYERS: Final = 4  # that write_cache_grouped_ writes at once: a draft model's
SCALE: Final = 0.25  # of fp8 rows and queries; a power of two, so that dividing and multiplying round alike
PROLOGUE: Final = "decode_prologue"
GROUPED: Final = "write_cache_grouped_"
INDEXER: Final = "write_indexer_cache_"
GATHER: Final = "gather_cache"
CONVERT: Final = "convert_cache_"
DECODE: Final = "mla_decode"  # not timed here: benchmarks/readers.py times it beside its peers
READS: Final = (GATHER, CONVERT)
QUERYLESS: Final = ("write_cache_", GROUPED, INDEXER, *READS)
OPS: Final = tuple(name for name in OP_NAMES if name != DECODE)
SEQUENCES: Final = 8  # that gather_cache reads, at most
# What convert_cache_ reads and writes: (format, block size, placement) of either side, and the scale of its result.
CONVERSIONS: Final[dict[str, tuple[tuple[str, int, Placement], tuple[str, int, Placement], float]]] = {
    "to fp8": (("bf16", 64, "concat"), ("fp8_e4m3fn", 64, "concat"), SCALE),
    "to fp8_e4m3fn": (("fp8_e4m3fnuz", 64, "concat"), ("fp8_e4m3fn", 64, "concat"), SCALE / 2),
    "blocks of 16 to split blocks of 64": (("bf16", 16, "concat"), ("bf16", 64, "split"), SCALE),
}
VARIANTS: Final = {PROLOGUE: ("", "norm"), INDEXER: ("", "power of two"), CONVERT: tuple(CONVERSIONS)}


@dataclass(frozen=True)
class Outputs:
    """What an op may write: whole tensors, and how many of their bytes it has to write.

    Attributes:
        activations: the tensors outside the cache, by name.
        activation_bytes: of these.
        pages: the tensors of the cache.
        cache_bytes: of these.
    """

    activations: dict[str, Tensor]
    activation_bytes: int
    pages: tuple[Tensor, ...]
    cache_bytes: int


@dataclass(frozen=True, eq=False)
class Inputs(ABC):
    """The arguments of one call, lying in memory as an engine has them."""

    @abstractmethod
    def arguments(self, op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a provider's method ``op`` takes, by position and by name."""

    @property
    @abstractmethod
    def outputs(self) -> Outputs:
        """What an op may write."""

    @property
    def written(self) -> dict[str, Tensor]:
        """Every tensor that an op may write, whole, by name."""
        return self.outputs.activations | {f"cache[{i}]": t for i, t in enumerate(self.outputs.pages)}


@dataclass(frozen=True, eq=False)
class Tokens(Inputs):
    """What all ops that write tokens take.

    Attributes:
        positions: [T], or None where the model does not rotate.
        slots: [T].
        table: [max_position, R], or None.
        is_neox: how pairs lie.
    """

    positions: Tensor | None
    slots: Tensor
    table: Tensor | None
    is_neox: bool


@dataclass(frozen=True, eq=False)
class Update(Tokens):
    """For the in-place ops ``rope_``, ``write_cache_`` and ``rope_write_cache_``.

    Attributes:
        q: [T, H, P + R]; the op sees the strided view ``q_pe``.
        kv: [T, L + R], the projection whose last part is ``k_pe``.
        kv_c: [T, L], normalised, hence a tensor of its own.
        cache: where the rows go.
    """

    q: Tensor
    kv: Tensor
    kv_c: Tensor
    cache: MLACache

    @classmethod
    def random(
        cls,
        model: Model,
        heads: int,
        positions: Tensor,
        slots: Tensor,
        table: Tensor | None,
        cache: MLACache,
        generator: torch.Generator,
    ) -> Update:
        """Normally distributed activations of the model, on the generator's device."""
        tokens, rank, rope = len(slots), model.kv_lora_rank, model.rope_dim
        dtype = activation_dtype(cache.layout)
        q, kv = (_normal(generator, dtype, *s) for s in ((tokens, heads, model.nope_dim + rope), (tokens, rank + rope)))
        rotated = None if table is None else positions
        return Update(rotated, slots, table, model.is_neox, q, kv, kv[:, :rank].contiguous(), cache)

    def to(self, device: torch.device, table: Tensor | None, cache: MLACache) -> Update:
        """A copy of the activations and indices on ``device``, with the ``table`` and ``cache`` there."""
        copies = {name: getattr(self, name).to(device, copy=True) for name in ("q", "kv", "kv_c", "slots")}
        positions = None if self.positions is None else self.positions.to(device)
        return replace(self, positions=positions, table=table, cache=cache, **copies)

    @property
    def q_pe(self) -> Tensor:
        """[T, H, R], strided."""
        return self.q[..., self.q.shape[-1] - self.k_pe.shape[-1] :]

    @property
    def k_pe(self) -> Tensor:
        """[T, R], strided."""
        return self.kv[:, self.kv_c.shape[-1] :]

    def arguments(self, op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of any of the three ops."""
        if op == "write_cache_":
            return (self.kv_c, self.k_pe, self.slots, self.cache), {}
        turn = (self.positions, self.q_pe, self.k_pe)
        rest = (self.table,) if op == "rope_" else (self.kv_c, self.table, self.slots, self.cache)
        return (*turn, *rest), {"is_neox": self.is_neox}

    @property
    def outputs(self) -> Outputs:
        """q and k, with the elements around them that no op may touch, and the cache."""
        activations, size = {"q": self.q, "k": self.kv}, self.q_pe.nbytes + self.k_pe.nbytes
        return Outputs(activations, size, self.cache.tensors, len(self.slots) * self.cache.layout.row_bytes)


@dataclass(frozen=True, eq=False)
class Prologue(Update):
    """For ``decode_prologue``; here ``kv_c`` is the projection's slice.

    Attributes:
        q_nope: [T, H, L], the transposed view of a product [H, T, L].
        q_out: [T, H, L + R] of :func:`query_dtype`.
        q_scale: one element.
        kv_norm_weight: [L], or None.
    """

    q_nope: Tensor
    q_out: Tensor
    q_scale: Tensor
    kv_norm_weight: Tensor | None

    @classmethod
    def of(cls, x: Update, norm: bool, generator: torch.Generator) -> Prologue:
        """The same projections, with what the prologue takes besides."""
        (tokens, heads, rope), rank = x.q_pe.shape, x.kv_c.shape[1]
        dtype, device = x.kv.dtype, x.kv.device
        q_nope = _normal(generator, dtype, heads, tokens, rank).transpose(0, 1)
        q_out = torch.empty(tokens, heads, rank + rope, dtype=query_dtype(x.cache.layout), device=device)
        weight = _normal(generator, dtype, rank) if norm else None
        common = (x.positions, x.slots, x.table, x.is_neox, x.q, x.kv, x.kv[:, :rank], x.cache)
        return cls(*common, q_nope, q_out, torch.full((1,), SCALE, device=device), weight)

    def arguments(self, op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of its only op."""
        activations = (self.q_nope, self.q_pe, self.kv_c, self.k_pe)
        options = {"q_out": self.q_out, "q_scale": self.q_scale, "kv_norm_weight": self.kv_norm_weight}
        return (*activations, self.positions, self.table, self.slots, self.cache), {"is_neox": self.is_neox, **options}

    @property
    def outputs(self) -> Outputs:
        """The query and the cache; q_pe and k_pe are what peers that rotate in place may change."""
        return replace(super().outputs, activations={"q_out": self.q_out}, activation_bytes=self.q_out.nbytes)


@dataclass(frozen=True, eq=False)
class Layers(Tokens):
    """For ``write_cache_grouped_``.

    Attributes:
        kv_c, k_pe: [G, T, L] and [G, T, R], the latter strided.
        caches: G of them.
    """

    kv_c: Tensor
    k_pe: Tensor
    caches: tuple[MLACache, ...]

    @classmethod
    def random(cls, model: Model, slots: Tensor, caches: tuple[MLACache, ...], generator: torch.Generator) -> Layers:
        """Normally distributed activations of the model, on the generator's device."""
        shape = (len(caches), len(slots), model.kv_lora_rank + model.rope_dim)
        kv = _normal(generator, activation_dtype(caches[0].layout), *shape)
        latent, rope = kv.split((model.kv_lora_rank, model.rope_dim), -1)
        return Layers(None, slots, None, model.is_neox, latent.contiguous(), rope, caches)

    def arguments(self, op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of its only op."""
        return (self.kv_c, self.k_pe, self.slots, self.caches), {}

    @property
    def outputs(self) -> Outputs:
        """The caches."""
        pages = tuple(t for cache in self.caches for t in cache.tensors)
        return Outputs({}, 0, pages, len(self.caches) * len(self.slots) * self.caches[0].layout.row_bytes)


@dataclass(frozen=True, eq=False)
class IndexerKeys(Tokens):
    """For ``write_indexer_cache_``.

    Attributes:
        k: [T, 128], a tensor of its own, as its LayerNorm leaves it.
        cache: [B, 64, 132].
        power_of_two: whether scales are powers of two, as DeepSeek-V3.2 is served.
    """

    k: Tensor
    cache: Tensor
    power_of_two: bool

    def arguments(self, op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of its only op."""
        options = {"is_neox": self.is_neox, "power_of_two_scale": self.power_of_two}
        return (self.k, self.positions, self.table, self.slots, self.cache), options

    @property
    def outputs(self) -> Outputs:
        """The cache; k is what peers that rotate in place may change."""
        return Outputs({}, 0, (self.cache,), len(self.slots) * INDEX_ROW_BYTES)


@dataclass(frozen=True, eq=False)
class Gather(Inputs):
    """For ``gather_cache``.

    Attributes:
        cache: rows of some sequences, their blocks in any order, with as many blocks of others between them.
        block_table: [S, max_blocks] int32.
        cu_seq_lens: [S + 1] int32.
        lengths: of the sequences.
        out: [T, L + R], 16-bit.
    """

    cache: MLACache
    block_table: Tensor
    cu_seq_lens: Tensor
    lengths: tuple[int, ...]
    out: Tensor

    @classmethod
    def random(cls, tokens: int, layout: CacheLayout, generator: torch.Generator) -> Gather:
        """Sequences of about equal lengths, none of which ends with a block."""
        device, size = generator.device, layout.block_size
        count = min(SEQUENCES, -(-tokens // size))
        ends = [tokens * (i + 1) // count + (i + 1 < count) * (i % 3 - 1) for i in range(count)]
        lengths = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
        columns = -(-max(lengths) // size)
        cache = random_rows(layout, 2 * count * columns, SCALE, generator)
        blocks = torch.randperm(cache.num_blocks, generator=generator, device=device)[: count * columns]
        out = torch.empty(tokens, layout.kv_lora_rank + layout.rope_dim, dtype=activation_dtype(layout), device=device)
        starts = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        return cls(cache, blocks.view(count, columns).int(), starts, lengths, out)

    def arguments(self, op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of its only op."""
        return (self.cache, self.block_table, self.cu_seq_lens), {"out": self.out}

    @property
    def outputs(self) -> Outputs:
        """The rows; the cache stays as it is."""
        return Outputs({"out": self.out}, self.out.nbytes, (), 0)


@dataclass(frozen=True, eq=False)
class Conversion(Inputs):
    """For ``convert_cache_``.

    Attributes:
        src, dst: caches of as many rows.
        src_blocks, dst_blocks: [n] and [m] int32, all of their blocks, in any order.
    """

    src: MLACache
    dst: MLACache
    src_blocks: Tensor
    dst_blocks: Tensor

    @classmethod
    def random(cls, variant: str, tokens: int, dims: tuple[int, int], generator: torch.Generator) -> Conversion:
        """Whole blocks of 64 tokens."""
        src, dst, scale = conversion(variant, dims)
        rows = whole_blocks(tokens)
        cache = random_rows(src, rows // src.block_size, SCALE, generator)
        result = dst.allocate(rows // dst.block_size, generator.device, scale)
        orders = (torch.randperm(c.num_blocks, generator=generator, device=c.device).int() for c in (cache, result))
        return cls(cache, result, *orders)

    def arguments(self, op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of its only op."""
        return (self.src, self.dst), {"src_blocks": self.src_blocks, "dst_blocks": self.dst_blocks}

    @property
    def outputs(self) -> Outputs:
        """The cache that is written."""
        return Outputs({}, 0, self.dst.tensors, self.dst.num_slots * self.dst.layout.row_bytes)


def conversion(variant: str, dims: tuple[int, int]) -> tuple[CacheLayout, CacheLayout, float]:
    """The layouts that a variant of ``convert_cache_`` reads and writes, and the scale of its result."""
    *sides, scale = CONVERSIONS[variant]
    src, dst = (CacheLayout(*dims, size, resolve_format(format), placement) for format, size, placement in sides)
    return src, dst, scale


def whole_blocks(tokens: int) -> int:
    """As many tokens, or a few more, in whole blocks of 64."""
    return -(-tokens // 64) * 64


def random_rows(layout: CacheLayout, blocks: int, scale: float, generator: torch.Generator) -> MLACache:
    """A cache full of normally distributed rows."""
    cache = layout.allocate(blocks, generator.device, scale)
    dtype, slots = activation_dtype(layout), torch.arange(cache.num_slots, device=generator.device)
    latent, rope = (_normal(generator, dtype, cache.num_slots, n) for n in (layout.kv_lora_rank, layout.rope_dim))
    providers.public.write_cache_(latent, rope, slots, cache)
    return cache


def random_inputs(
    op: str,
    variant: str,
    model: Model,
    heads: int,
    tokens: int,
    layout: CacheLayout,
    table: Tensor | None,
    generator: torch.Generator,
) -> Inputs:
    """Arguments of ``op``: slots scattered over a cache of twice the tokens, activations normally distributed.

    Of ``convert_cache_`` the variant says both layouts; of ``layout`` only the dimensions count.
    """
    if op == GATHER:
        return Gather.random(tokens, layout, generator)
    if op == CONVERT:
        return Conversion.random(variant, tokens, (layout.kv_lora_rank, layout.rope_dim), generator)
    device, blocks = generator.device, -(-2 * tokens // layout.block_size)
    slots = torch.randperm(blocks * layout.block_size, generator=generator, device=device)[:tokens]
    positions = torch.randint(1 if table is None else len(table), (tokens,), generator=generator, device=device)
    if op == INDEXER:
        k = _normal(generator, activation_dtype(layout), tokens, INDEX_DIM)
        cache = torch.zeros(blocks, layout.block_size, INDEX_ROW_BYTES, dtype=torch.uint8, device=device)
        rotated = None if table is None else positions
        return IndexerKeys(rotated, slots, table, True, k, cache, variant == "power of two")  # V3.2's indexer is NeoX
    if op == GROUPED:
        caches = tuple(layout.allocate(blocks, device, SCALE) for _ in range(LAYERS))
        return Layers.random(model, slots, caches, generator)
    update = Update.random(model, heads, positions, slots, table, layout.allocate(blocks, device, SCALE), generator)
    return Prologue.of(update, variant == "norm", generator) if op == PROLOGUE else update


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).to(dtype)


def activation_dtype(layout: CacheLayout) -> torch.dtype:
    """The dtype of activations for a cache: the one that it takes, bf16 where it takes several."""
    return FORMATS[layout.format].activation or torch.bfloat16


def query_dtype(layout: CacheLayout) -> torch.dtype:
    """The dtype of ``decode_prologue``'s query: fp8 for fp8 rows, else the activations'."""
    return layout.dtype if FORMATS[layout.format].quantised else activation_dtype(layout)


def table_dtype(op: str, layout: CacheLayout) -> torch.dtype:
    """The dtype of the cos/sin table: the one that the op's peers take."""
    return torch.float32 if op in (PROLOGUE, INDEXER) else activation_dtype(layout)


def rope_table(model: Model, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The model's cos/sin table; None where it does not rotate."""
    if model.rope is None:
        return None
    return build_cos_sin_cache(**model.rope, device=device, dtype=dtype)


def bytes_moved(op: str, heads: int, tokens: int, layout: CacheLayout, rotates: bool = True, variant: str = "") -> int:
    """What one call must read and write: each byte that it needs or changes, once."""
    size, index = activation_dtype(layout).itemsize, torch.int64.itemsize
    rope, rank = layout.rope_dim, layout.kv_lora_rank
    if op == GATHER:  # and the number of each block
        return tokens * (layout.row_bytes + (rank + rope) * size) + -(-tokens // layout.block_size) * 4
    if op == CONVERT:
        *sides, _ = conversion(variant, (rank, rope))
        return whole_blocks(tokens) * sum(x.row_bytes for x in sides) + sum(
            whole_blocks(tokens) // x.block_size * 4 for x in sides
        )
    angles = rope * table_dtype(op, layout).itemsize + index if rotates else 0  # of a token, with its position
    write = (rank + rope) * size + layout.row_bytes
    if op == INDEXER:
        return tokens * (INDEX_DIM * size + INDEX_ROW_BYTES + index + angles)
    if op == GROUPED:
        return tokens * (LAYERS * write + index)
    if op == PROLOGUE:
        query = heads * (rank + rope) * (size + query_dtype(layout).itemsize)
        return tokens * (query + angles + write + index) + (rank * size if variant == "norm" else 0)
    turn = 2 * (heads + 1) * rope * size + angles if op != "write_cache_" and rotates else 0
    if op == "rope_":
        return tokens * turn
    return tokens * (turn + write + index - (rope * size if turn else 0))  # k_pe is read once

"""The cases that every provider must compute to the same bytes, and the inputs of each.

A :class:`Case` says what to compute on; :class:`Problem` builds it: every tensor is a view into a poisoned buffer, so
that comparing whole buffers finds a wrong byte as well as one that should not have been touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..layouts import FORMATS, CacheLayout, MLACache
from ..providers import Provider
from ..rope_table import build_cos_sin_cache
from .compare import first_difference, poisoned

Rope = Literal["gptj", "neox", "none"]
Strides = Literal["contiguous", "sliced", "transposed", "unaligned"]
Rows = Literal["full", "padded", "masked", "rotate-masked"]

ACTIVATIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_POSITION = 96


@dataclass(frozen=True)
class Case:
    """One point of the matrix.

    Attributes:
        op: rope_, write_cache_ or rope_write_cache_.
        layout: of the cache.
        activation: dtype of the activations, a key of :data:`ACTIVATIONS`.
        rope: how pairs lie, or none for models without rotation.
        strides: how q_pe, k_pe and kv_c lie: contiguous; slices of wider projections; q as [H, N, R] transposed;
            or at odd offsets and strides that rule out 16-byte access.
        rows: full (T = N, slots all valid); padded (T < N); masked (some slots -1, left alone); rotate-masked.
        table: dtype of the cos/sin table.
        index: dtype of positions and slots.
        tokens, heads: N and H.
        as_bytes: back a quantised cache by uint8.
        pages: B, 1, bs, C tensors with padded blocks at a storage offset, instead of packed B, bs, C.
        scale: dequantisation scale, or None.
        inverse: turn back by the negative angle, which only rope_ can.
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

    def __str__(self) -> str:
        lay = self.layout
        parts = [self.op, f"{lay.format}", lay.placement, f"{lay.kv_lora_rank}+{lay.rope_dim}x{lay.block_size}"]
        parts += [self.activation, self.rope, self.strides, self.rows, f"table-{self.table}"]
        parts += [
            f"i{self.index.itemsize * 8}",
            *(["bytes"] if self.as_bytes else []),
            *(["pages"] if self.pages else []),
            *(["inverse"] if self.inverse else []),
        ]
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
        n, h, latent, rope = case.tokens, case.heads, lay.kv_lora_rank, lay.rope_dim
        dtype = ACTIVATIONS[case.activation]
        self.q_pe = self._values("q_pe", (n, h, rope), self._q_strides(), dtype)
        if case.strides == "contiguous":
            self.kv_c = self._values("kv_c", (n, latent), (latent, 1), dtype)
            self.k_pe = self._values("k_pe", (n, rope), (rope, 1), dtype)
        else:  # both in the rows of one projection, as engines have them
            width = latent + rope + (3 if case.strides == "unaligned" else 8)
            projection = self._values("kv", (n, width), (width, 1), dtype)
            self.kv_c, self.k_pe = projection[:, :latent], projection[:, latent : latent + rope]
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
        self.cache = self._cache(blocks)

    def _q_strides(self) -> tuple[int, int, int]:
        n, h, r = self.case.tokens, self.case.heads, self.case.layout.rope_dim
        head = {"sliced": 3 * r, "unaligned": r + 1}.get(self.case.strides, r)
        return (r, n * r, 1) if self.case.strides == "transposed" else (h * head, head, 1)

    def _view(
        self, name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, offset: int
    ) -> Tensor:
        """A view of ``shape`` and ``strides`` at element ``offset`` of a new poisoned buffer."""
        extent = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
        buffer = poisoned((extent + 16) * dtype.itemsize, self.device)
        self.buffers[name] = buffer
        return buffer.view(dtype).as_strided(shape, strides, offset)

    def _values(self, name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Values of all magnitudes: fp8 rounds, saturates and goes subnormal on them."""
        exponents = torch.randint(-14, 12, shape, generator=self._random).float()
        values = torch.randn(shape, generator=self._random) * 2.0 ** (exponents / 2)
        offset = {"sliced": 16, "unaligned": 1}.get(self.case.strides, 0)
        view = self._view(name, shape, strides, dtype, offset)
        view.copy_(values)
        return view

    def _cache(self, blocks: int) -> MLACache:
        case, lay = self.case, self.case.layout
        dtype = torch.uint8 if case.as_bytes and FORMATS[lay.format].quantised else lay.dtype
        tensors = []
        for i, (_, entries, width) in enumerate(lay.shapes(blocks)):
            if case.pages:
                row = width + (3 if case.strides == "unaligned" else 16)
                strides = (entries * row + 32, entries * row, row, 1)
                tensors.append(self._view(f"cache{i}", (blocks, 1, entries, width), strides, dtype, 32))
            else:
                shape = (blocks, entries, width)
                tensors.append(self._view(f"cache{i}", shape, (entries * width, width, 1), dtype, 0))
        scale = None if case.scale is None else torch.tensor([case.scale], device=self.device)
        return MLACache.wrap(tensors, lay, scale)

    def run(self, provider: Provider) -> None:
        """Computes the case's op in place."""
        neox = self.case.rope == "neox"
        if self.case.op == "rope_":
            assert self.positions is not None and self.table is not None, "rope_ needs a rotation"
            provider.rope_(self.positions, self.q_pe, self.k_pe, self.table, is_neox=neox, inverse=self.case.inverse)
        elif self.case.op == "write_cache_":
            provider.write_cache_(self.kv_c, self.k_pe, self.slots, self.cache)
        else:
            provider.rope_write_cache_(
                self.positions, self.q_pe, self.k_pe, self.kv_c, self.table, self.slots, self.cache,
                is_neox=neox, rope_masked=self.case.rows == "rotate-masked",
            )  # fmt: skip

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
    """The formats that take activations of a dtype: its own, and every quantised one."""
    return [name for name, f in FORMATS.items() if f.quantised or f.dtype == ACTIVATIONS[activation]]


# Latent and rope dimensions and block size: DeepSeek, Mistral-4, a small odd one, one without a rope part.
_DIMS = ((512, 64, 64), (256, 64, 16), (512, 64, 1), (17, 6, 3), (96, 32, 16), (64, 0, 16))


def matrix() -> Iterator[Case]:
    """The shared matrix: op x activation x format x placement x rope style x strides x rows, in full.

    Dimensions, block sizes, table and index dtypes, page shapes and uint8 backing go round with the cases, at periods
    that share no factor, so that each meets each.

    Then rope_ alone: activation x rope style x strides x table, every other pair of cases inverse. Last, rows so long
    that a GPU's lanes pass over them more than once: activation x format x rope style x strides.
    """
    axes = itertools.product(
        ("rope_write_cache_", "write_cache_"),
        [(a, f) for a in ACTIVATIONS for f in formats_for(a)],
        ("concat", "split"),
        ("gptj", "neox", "none"),
        ("contiguous", "sliced", "transposed", "unaligned"),
        ("full", "padded", "masked", "rotate-masked"),
    )
    number = 0
    for op, (activation, fmt), placement, rope, strides, rows in axes:
        if op == "write_cache_" and (rope != "none" or rows == "rotate-masked"):
            continue
        number += 1
        latent, rope_dim, block_size = _DIMS[number % 5 if rope != "none" else number % 6]
        yield Case(
            op=op,
            layout=CacheLayout(latent, rope_dim, block_size, fmt, placement),  # type: ignore[arg-type]
            activation=activation,
            rope=rope,  # type: ignore[arg-type]
            strides=strides,  # type: ignore[arg-type]
            rows=rows,  # type: ignore[arg-type]
            table=list(ACTIVATIONS)[number // 5 % 3],
            index=(torch.int64, torch.int32)[number // 7 % 2],
            tokens=(5, 1, 33)[number // 11 % 3],
            heads=(3, 16, 1, 130)[number // 13 % 4],
            as_bytes=number // 3 % 2 == 1,
            pages=number // 2 % 2 == 1,
            scale=(0.37, None, 2.0**-3)[number // 17 % 3],
        )
    for activation, rope, strides, table in itertools.product(
        ACTIVATIONS, ("gptj", "neox"), ("contiguous", "sliced", "transposed", "unaligned"), ACTIVATIONS
    ):
        number += 1
        layout = CacheLayout(8, (64, 32, 6, 128, 16)[number % 5], 16)
        yield Case(
            "rope_", layout, activation, rope, strides,  # type: ignore[arg-type]
            table=table, tokens=7, heads=(16, 3)[number % 2], inverse=number // 2 % 2 == 1,
        )  # fmt: skip
    long = [(a, f) for a in ACTIVATIONS for f in formats_for(a)]
    for i, (j, rope), (k, strides) in itertools.product(
        range(len(long)), enumerate(("gptj", "neox")), enumerate(("contiguous", "unaligned"))
    ):
        activation, fmt = long[i]
        layout = CacheLayout(1024, 1024, 4, fmt, ("concat", "split")[(i + j + k) % 2])
        yield Case(
            "rope_write_cache_", layout, activation, rope, strides,  # type: ignore[arg-type]
            table=list(ACTIVATIONS)[(i + j) % 3], tokens=3, heads=2,
        )  # fmt: skip


def for_layout(layout: CacheLayout) -> Iterator[Case]:
    """A few cases on one layout: what a backend's cache must pass."""
    for activation in ACTIVATIONS:
        if layout.format in formats_for(activation):
            base = Case("rope_write_cache_", layout, activation, strides="sliced", tokens=19, heads=16)
            yield base
            yield replace(base, rope="neox", rows="masked", table=activation, pages=True)
            yield replace(base, op="write_cache_", strides="unaligned", rows="padded", index=torch.int32)

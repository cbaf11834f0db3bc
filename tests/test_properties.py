"""Properties that must hold for any dimensions, strides, types and values, as hypothesis draws them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from latentkv import providers
from latentkv.layouts import FORMATS, CacheLayout, MLACache
from latentkv.providers import Provider
from latentkv.testing import assert_same_bytes, poisoned
from latentkv.testing.matrix import ACTIVATIONS, formats_for
from torch import Tensor

MAX_POSITION = 50
Ints = Sequence[int]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

# Zeros, infinities, subnormals, the largest and smallest numbers, quiet and signalling NaNs of both signs.
SPECIAL = {
    torch.bfloat16: "0 8000 3F80 BF80 7F80 FF80 1 807F 7F7F 80 7FC0 FFC1 7F81 FFBF",
    torch.float16: "0 8000 3C00 BC00 7C00 FC00 1 83FF 7BFF 400 7E00 FE01 7C01 FDFF",
    torch.float32: "0 80000000 3F800000 BF800000 7F800000 FF800000 1 807FFFFF 7F7FFFFF 800000 "
    "7FC00000 FFC00001 7F800001 FFBFFFFF",
}


def special(dtype: torch.dtype) -> Tensor:
    """Those values, as integers of the dtype's size."""
    size = 8 * dtype.itemsize
    patterns = [int(word, 16) for word in SPECIAL[dtype].split()]
    return torch.tensor([p - (p >> size - 1 << size) for p in patterns], dtype=BITS[dtype.itemsize])


@dataclass(frozen=True)
class Spec:
    """A call, drawn by hypothesis. Paddings and offsets count elements."""

    op: str
    activation: str
    format: str
    placement: str
    is_neox: bool
    rotates: bool
    table: str
    table_pad: int
    index: torch.dtype
    tokens: int
    mapped: int  # T
    heads: int
    latent: int
    rope: int
    block_size: int
    pads: tuple[int, ...]  # between heads of q; rows of q, of k, of kv_c; entries, blocks of the cache
    offsets: tuple[int, ...]  # of q, k, kv_c, cache
    four_dims: bool
    as_bytes: bool
    masked: tuple[bool, ...]
    rope_masked: bool
    scale: float | None
    values: str
    angles: str
    seed: int


SCALES = st.one_of(
    st.none(),
    st.sampled_from([0.37, 1.0, -1.0, 0.0, -0.0, math.inf, -math.inf, math.nan]),
    st.integers(-149, 127).map(lambda e: 2.0**e),
    st.floats(width=32, allow_nan=False),
)
# Dimensions, paddings and offsets that allow 16-byte access, and any.
ALIGNED = ([8, 16, 64, 256, 512], [16, 32, 64, 64, 128], [0, 0, 8, 16, 24])
ANY = ([1, 2, 7, 8, 16, 17, 64, 256, 512], [0, 2, 4, 6, 8, 16, 32, 64, 128], [0, 0, 0, 8, 16, 1, 3, 4])


@st.composite
def specs(draw: st.DrawFn, op: str | None = None, values: str | None = None) -> Spec:
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 17, 40]))
    latents, ropes, gaps = (st.sampled_from(x) for x in draw(st.sampled_from([ALIGNED, ANY])))
    return Spec(
        op=op or draw(st.sampled_from(["rope_", "write_cache_", "rope_write_cache_", "rope_write_cache_"])),
        activation=activation,
        format=draw(st.sampled_from(formats_for(activation))),
        placement=draw(st.sampled_from(["concat", "split"])),
        is_neox=draw(st.booleans()),
        rotates=draw(st.integers(0, 5)) > 0,
        table=draw(st.sampled_from(list(ACTIVATIONS))),
        table_pad=draw(gaps),
        index=draw(st.sampled_from([torch.int64, torch.int32])),
        tokens=tokens,
        mapped=draw(st.sampled_from([tokens, tokens, draw(st.integers(0, tokens))])),
        heads=draw(st.sampled_from([0, 1, 2, 3, 5, 16, 20])),
        latent=draw(latents),
        rope=draw(ropes),
        block_size=draw(st.sampled_from([1, 2, 3, 16, 64])),
        pads=tuple(draw(gaps) for _ in range(6)),
        offsets=tuple(draw(gaps) for _ in range(4)),
        four_dims=draw(st.booleans()),
        as_bytes=draw(st.booleans()),
        masked=tuple(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))),
        rope_masked=draw(st.booleans()),
        scale=draw(SCALES),
        values=values or draw(st.sampled_from(["normal", "special", "bits"])),
        angles=draw(st.sampled_from(["angles", "angles", "special", "bits"])),
        seed=draw(st.integers(0, 2**31)),
    )


class Memory:
    """The tensors of a spec, views into poisoned buffers on a device; equal for equal specs, whatever the device."""

    def __init__(self, spec: Spec, device: str) -> None:
        self.spec, self.device = spec, device
        self._random = torch.Generator().manual_seed(spec.seed)
        self.buffers: dict[str, Tensor] = {}  # typed, gaps and all
        n, h, r, dtype = spec.tokens, spec.heads, spec.rope, ACTIVATIONS[spec.activation]
        q_head, q_token, k_token, c_token, entry_pad, block_pad = spec.pads
        head = r + q_head
        self.q = self._filled("q", (n, h, r), (h * head + q_token, head, 1), dtype, spec.offsets[0])
        self.k = self._filled("k", (n, r), (r + k_token, 1), dtype, spec.offsets[1])
        self.kv_c = self._filled("kv_c", (n, spec.latent), (spec.latent + c_token, 1), dtype, spec.offsets[2])
        table = ACTIVATIONS[spec.table]
        self.table = self._filled("table", (MAX_POSITION, r), (r + spec.table_pad, 1), table, 0, spec.angles)
        self.positions = torch.randint(0, MAX_POSITION, (n,), generator=self._random).to(spec.index)
        self.blocks = -(-(n + 3) // spec.block_size)
        self.slots = torch.randperm(self.blocks * spec.block_size, generator=self._random)[:n].to(spec.index)
        masked = torch.tensor(spec.masked, dtype=torch.bool)
        self.slots = torch.where(masked, -1 - self.slots, self.slots)[: spec.mapped].to(spec.index)
        self.turned = torch.zeros(n, dtype=torch.bool)  # rows whose q and k are rotated
        self.turned[: spec.mapped] = spec.rotates & (spec.rope_masked | ~masked[: spec.mapped])
        self.positions, self.slots = self.positions.to(device), self.slots.to(device)
        layout = CacheLayout(spec.latent, r, spec.block_size, spec.format, spec.placement)  # type: ignore[arg-type]
        self.code = torch.uint8 if FORMATS[spec.format].quantised and spec.as_bytes else layout.dtype
        tensors = []
        for i, (_, entries, width) in enumerate(layout.shapes(self.blocks)):
            row = width + entry_pad
            strides = [entries * row + block_pad, row, 1]
            shape = [self.blocks, entries, width]
            if spec.four_dims:
                strides.insert(1, entries * row)
                shape.insert(1, 1)
            tensors.append(self._view(f"cache{i}", shape, strides, self.code, spec.offsets[3]))
        scale = None if spec.scale is None else torch.tensor([spec.scale], device=device)
        self.cache = MLACache.wrap(tensors, layout, scale)

    def _view(self, name: str, shape: Ints, strides: Ints, dtype: torch.dtype, offset: int) -> Tensor:
        extent = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
        # as_strided lays bounds around empty tensors too
        self.buffers[name] = poisoned((max(extent, offset) + 16) * dtype.itemsize, self.device).view(dtype)
        return self.buffers[name].as_strided(shape, strides, offset)

    def _filled(
        self, name: str, shape: Ints, strides: Ints, dtype: torch.dtype, offset: int, values: str | None = None
    ) -> Tensor:
        kind = BITS[dtype.itemsize]
        values = values or self.spec.values
        if values == "normal":
            exponents = torch.randint(-30, 30, shape, generator=self._random).float() / 3
            bits = (torch.randn(shape, generator=self._random) * 2.0**exponents).to(dtype).view(kind)
        elif values == "angles":
            angle = torch.rand((*shape[:-1], shape[-1] // 2), generator=self._random) * 7
            bits = torch.cat([angle.cos(), angle.sin()], -1).to(dtype).view(kind)
        elif values == "special":
            choice = special(dtype)
            bits = choice[torch.randint(0, len(choice), shape, generator=self._random)]
        else:
            size = 1 << 8 * dtype.itemsize
            bits = torch.randint(-size // 2, size // 2, shape, generator=self._random).to(kind)
        view = self._view(name, shape, strides, dtype, offset)
        view.view(kind).copy_(bits)
        return view

    def run(self, provider: Provider) -> Memory:
        s = self.spec
        if s.op == "rope_":
            provider.rope_(self.positions, self.q, self.k, self.table, is_neox=s.is_neox, inverse=s.rope_masked)
        elif s.op == "write_cache_":
            provider.write_cache_(self.kv_c, self.k, self.slots, self.cache)
        else:
            angles = (self.positions, self.table) if s.rotates else (None, None)
            provider.rope_write_cache_(
                angles[0], self.q, self.k, self.kv_c, angles[1], self.slots, self.cache,
                is_neox=s.is_neox, rope_masked=s.rope_masked,
            )  # fmt: skip
        return self

    def must_equal(self, other: Memory) -> None:
        """All bytes of all buffers, but a NaN that the rotation made is as good as any other."""
        for name, buffer in self.buffers.items():
            arithmetic = name in ("q", "k", "cache0", "cache1") and buffer.dtype in ACTIVATIONS.values()
            try:
                assert_same_bytes(buffer, other.buffers[name], any_nan=arithmetic)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None

    def written(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that have a slot, and their blocks and entries."""
        rows = (self.slots >= 0).nonzero().flatten()
        slots = self.slots[rows].long()
        return rows, slots // self.spec.block_size, slots % self.spec.block_size


def codes(part: Tensor) -> Tensor:
    """A cache tensor as it is compared and indexed: torch does neither on fp8 everywhere."""
    return part.view(torch.uint8) if part.element_size() == 1 else part


@settings(max_examples=500)
@given(spec=specs())
def test_native_is_the_reference(device: str, spec: Spec) -> None:
    wanted = Memory(spec, "cpu").run(providers.reference)
    Memory(spec, device).run(providers.native).must_equal(wanted)
    if device != "cpu":
        Memory(spec, device).run(providers.reference).must_equal(wanted)


@given(spec=specs(op="rope_write_cache_"))
def test_only_the_rows_meant_change(device: str, spec: Spec) -> None:
    """And copies are verbatim, NaN payloads included: of the latent vector, and of the key as it stands after."""
    before, after = Memory(spec, device), Memory(spec, device).run(providers.native)
    stays = ~after.turned.to(device)
    assert_same_bytes(after.q[stays], before.q[stays])
    assert_same_bytes(after.k[stays], before.k[stays])
    for name in ("kv_c", "table"):
        assert_same_bytes(after.buffers[name], before.buffers[name])
    rows, block, entry = after.written()
    if not FORMATS[spec.format].quantised:
        assert_same_bytes(after.cache.latent[block, entry], after.kv_c[rows])
        assert_same_bytes(after.cache.rope[block, entry], after.k[rows])
    for part, old in zip(after.cache.tensors, before.cache.tensors, strict=True):
        free = torch.ones(part.shape[:2], dtype=torch.bool, device=device)
        free[block, entry] = False
        assert_same_bytes(codes(part)[free], codes(old)[free])


@given(spec=specs(op="rope_write_cache_"))
def test_fused_is_the_pair_of_ops(device: str, provider: Provider, spec: Spec) -> None:
    fused, pair = Memory(spec, device).run(provider), Memory(spec, device)
    rows = pair.turned.nonzero().flatten().to(device)
    q, k = pair.q[rows], pair.k[rows]
    provider.rope_(pair.positions[rows], q, k, pair.table, is_neox=spec.is_neox)
    pair.q[rows], pair.k[rows] = q, k
    provider.write_cache_(pair.kv_c, pair.k, pair.slots, pair.cache)
    fused.must_equal(pair)


@given(spec=specs())
def test_strides_do_not_matter(device: str, spec: Spec) -> None:
    """Packed tensors (16-byte access where the dimensions allow) against the strides drawn: the same values."""
    packed = dataclasses.replace(spec, pads=(0,) * 6, offsets=(0,) * 4, table_pad=0, four_dims=False)
    a, b = Memory(spec, device).run(providers.native), Memory(packed, device).run(providers.native)
    assert_same_bytes(a.q, b.q, any_nan=True)
    assert_same_bytes(a.k, b.k, any_nan=True)
    for one, other in zip(a.cache.tensors, b.cache.tensors, strict=True):
        assert_same_bytes(codes(one), codes(other), any_nan=True)


@settings(max_examples=200)
@given(
    bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40),
    scale=st.floats(width=32),
    format=st.sampled_from([f for f in FORMATS if FORMATS[f].quantised]),
)
def test_any_number_and_scale(device: str, bits: list[int], scale: float, format: str) -> None:
    """One fp32 vector, drawn bit for bit, so that hypothesis can shrink to the number that goes wrong."""
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    layout = CacheLayout(len(bits), 0, 1, format)
    rows = []
    for provider, where in ((providers.native, device), (providers.reference, "cpu")):
        cache = layout.allocate(1, where, scale=scale)
        slots = torch.zeros(1, dtype=torch.int64, device=where)
        provider.write_cache_(x.to(where), x[:, :0].to(where), slots, cache)
        rows.append(codes(cache.data).flatten())
    note(f"x = {x.tolist()}, codes = {rows[0].tolist()}, expected {rows[1].tolist()}")
    assert_same_bytes(rows[0], rows[1])


def test_spec_reaches_every_path() -> None:
    """The strategy is not so narrow that a property holds for want of examples."""
    seen: list[tuple[bool, bool, bool, str]] = []

    @settings(max_examples=400, database=None, derandomize=True)
    @given(spec=specs(op="rope_write_cache_"))
    def collect(spec: Spec) -> None:
        aligned = all(x % 8 == 0 for x in (*spec.pads, *spec.offsets, spec.latent, spec.table_pad))
        aligned = aligned and spec.rope % 16 == 0 and spec.rope > 0
        busy = spec.mapped > 0 and spec.heads > 0 and spec.rotates
        seen.append((aligned and busy, any(spec.masked[: spec.mapped]), spec.mapped < spec.tokens, spec.values))

    collect()
    assert sum(s[0] for s in seen) > 40
    assert sum(s[1] for s in seen) > 50
    assert sum(s[2] for s in seen) > 30
    assert {s[3] for s in seen} == {"normal", "special", "bits"}


@pytest.mark.parametrize("dtype", list(SPECIAL), ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    values = special(dtype).view(dtype)
    assert int(values.isnan().sum()) == 4 and int(values.isinf().sum()) == 2 and int((values == 0).sum()) == 2
    assert int(((values != 0) & (values.abs() < torch.finfo(dtype).tiny)).sum()) == 2

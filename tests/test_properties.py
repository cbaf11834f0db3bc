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
from latentkv.cache.layouts import FORMATS, CacheLayout, MLACache
from latentkv.ops.schemas import OP_NAMES
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
    pads: tuple[
        int, ...
    ]  # between heads and rows of q; rows of k, kv_c; entries, blocks; heads and rows of q_nope, q_out
    offsets: tuple[int, ...]  # of q, k, kv_c, cache, q_nope, q_out
    four_dims: bool
    as_bytes: bool
    masked: tuple[bool, ...]
    rope_masked: bool
    scale: float | None
    query: str | None
    q_scale: float | None
    split: bool
    in_place: bool
    norm: str | None
    kv_c_out: str | None
    eps: float
    layers: int
    power_of_two: bool
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


OPS = [*OP_NAMES, "rope_write_cache_", "decode_prologue", "decode_prologue"]


@st.composite
def specs(draw: st.DrawFn, op: str | None = None, values: str | None = None) -> Spec:
    op = op or draw(st.sampled_from(OPS))
    activation = draw(st.sampled_from([*ACTIVATIONS, "bf16"]))  # which has the most formats
    format = draw(st.sampled_from(formats_for(activation)))
    packed = FORMATS[format].packed
    tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 17, 40]))
    latents, ropes, gaps = (st.sampled_from(x) for x in draw(st.sampled_from([ALIGNED, ANY])))
    latent, rope = packed.dims if packed else (draw(latents), draw(ropes))
    if op == "write_indexer_cache_":
        latent, rope = 128, max(rope, 2)
    values = values or draw(st.sampled_from(["normal", "special", "bits"]))
    angles = draw(st.sampled_from(["angles", "angles", "special", "bits"]))
    # A NaN that the rotation makes can be any, which bytes of mixed types would not show.
    comparable = packed is None or op == "write_indexer_cache_" or (values, angles) == ("normal", "angles")
    norm = draw(st.sampled_from([None, "fp32", activation]))
    return Spec(
        op=op,
        activation=activation,
        format=format,
        placement="concat" if packed else draw(st.sampled_from(["concat", "split"])),
        is_neox=draw(st.booleans()),
        rotates=draw(st.integers(0, 5)) > 0 and comparable,
        table=draw(st.sampled_from(list(ACTIVATIONS))),
        table_pad=draw(gaps),
        index=draw(st.sampled_from([torch.int64, torch.int32])),
        tokens=tokens,
        mapped=draw(st.sampled_from([tokens, tokens, draw(st.integers(0, tokens))])),
        heads=draw(st.sampled_from([0, 1, 2, 3, 5, 16, 20])),
        latent=latent,
        rope=rope,
        block_size=draw(st.sampled_from([1, 2, 3, 16, 64])),
        pads=tuple(draw(gaps) for _ in range(10)),
        offsets=tuple(draw(gaps) for _ in range(6)),
        four_dims=draw(st.booleans()),
        as_bytes=draw(st.booleans()),
        masked=tuple(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))),
        rope_masked=draw(st.booleans()),
        scale=draw(SCALES),
        query=draw(st.sampled_from([None, None, "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2"])),
        q_scale=draw(SCALES),
        split=draw(st.booleans()),
        in_place=draw(st.integers(0, 3)) == 0,
        norm=norm,
        kv_c_out=draw(st.sampled_from([None, "apart", "in place"])) if norm else None,
        eps=draw(st.sampled_from([1e-6, 1e-6, 0.0, 1e-3])),
        layers=draw(st.sampled_from([1, 2, 3, 5])),
        power_of_two=draw(st.booleans()),
        values=values,
        angles=angles,
        seed=draw(st.integers(0, 2**31)),
    )


class Memory:
    """The tensors of a spec, views into poisoned buffers on a device; equal for equal specs, whatever the device."""

    def __init__(self, spec: Spec, device: str) -> None:
        self.spec, self.device = spec, device
        self._random = torch.Generator().manual_seed(spec.seed)
        self.buffers: dict[str, Tensor] = {}  # typed, gaps and all
        n, h, r, dtype = spec.tokens, spec.heads, spec.rope, ACTIVATIONS[spec.activation]
        q_head, q_token, k_token, c_token = spec.pads[:4]
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
        if spec.op == "write_indexer_cache_":
            self.key = self._filled("key", (n, 128), (128 + k_token, 1), dtype, spec.offsets[1])
            self.index_cache = self._pages("cache0", 132, torch.uint8, True, 4)
            return
        layout = CacheLayout(spec.latent, r, spec.block_size, spec.format, spec.placement)  # type: ignore[arg-type]
        self.code = torch.uint8 if FORMATS[spec.format].quantised and spec.as_bytes else layout.dtype
        self.cache = self._cache(layout, "")
        self.layers = [(self.kv_c, self.k, self.cache)]
        for i in range(1, spec.layers if spec.op == "write_cache_grouped_" else 1):
            kv_c = self._filled(f"kv_c/{i}", (n, spec.latent), (spec.latent + c_token, 1), dtype, spec.offsets[2])
            k = self._filled(f"k/{i}", (n, r), (r + k_token, 1), dtype, spec.offsets[1])
            self.layers.append((kv_c, k, self._cache(layout, f"/{i}")))
        self.q_nope = self.q_out = self.q_rope_out = self.kv_c_out = self.weight = self.q_scale = None
        if spec.op == "decode_prologue":
            self._prologue(dtype)

    def _prologue(self, dtype: torch.dtype) -> None:
        spec = self.spec
        n, h, latent = spec.tokens, spec.heads, spec.latent
        nope_head, nope_token, out_head, out_token = spec.pads[6:]
        if not spec.in_place:
            head = latent + nope_head
            strides = (h * head + nope_token, head, 1)
            self.q_nope = self._filled("q_nope", (n, h, latent), strides, dtype, spec.offsets[4])
        kind, head = FORMATS[spec.query].dtype if spec.query else dtype, latent + spec.rope + out_head
        strides = (h * head + out_token, head, 1)
        q_out = self._view("q_out", (n, h, latent + spec.rope), strides, kind, spec.offsets[5])
        if spec.in_place:
            bits = torch.randint(0, 256, (n, h, latent, kind.itemsize), generator=self._random).to(torch.uint8)
            codes(q_out[..., :latent]).copy_(codes(bits.view(kind)[..., 0]))
        self.q_out, self.q_rope_out = (q_out[..., :latent], q_out[..., latent:]) if spec.split else (q_out, None)
        if spec.norm:
            self.weight = self._filled("weight", (latent,), (1,), ACTIVATIONS[spec.norm], spec.offsets[4])
        if spec.kv_c_out == "apart":
            strides = (latent + spec.pads[3], 1)
            self.kv_c_out = self._view("kv_c_out", (n, latent), strides, dtype, spec.offsets[2])
        elif spec.kv_c_out:
            self.kv_c_out = self.kv_c
        if spec.q_scale is not None:
            self.q_scale = torch.tensor([spec.q_scale], device=self.device)

    def _cache(self, layout: CacheLayout, suffix: str) -> MLACache:
        packed = layout.packed
        run = packed.block_multiple if packed else None
        tensors = [
            self._pages(f"cache{i}{suffix}", width, self.code, packed is not None, run)
            for i, (_, _, width) in enumerate(layout.shapes(self.blocks))
        ]
        scale = None if self.spec.scale is None else torch.tensor([self.spec.scale], device=self.device)
        return MLACache.wrap(tensors, layout, scale)

    def _pages(self, name: str, width: int, dtype: torch.dtype, mixed: bool, run: int | None) -> Tensor:
        """A cache tensor; ``mixed`` rows start at multiples of 4, ``run`` leaves no gap between those of a block,
        and so many bytes, or a multiple of them, lie between blocks.
        """
        spec, unit = self.spec, 4 if mixed else 1
        row = width + (0 if run else unit * spec.pads[4])
        multiple = run or 1
        strides = [-(-(spec.block_size * row + unit * spec.pads[5]) // multiple) * multiple, row, 1]
        shape = [self.blocks, spec.block_size, width]
        if spec.four_dims:
            strides.insert(1, spec.block_size * row)
            shape.insert(1, 1)
        return self._view(name, shape, strides, dtype, unit * spec.offsets[3])

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
        angles = (self.positions, self.table) if s.rotates else (None, None)
        if s.op == "rope_":
            provider.rope_(self.positions, self.q, self.k, self.table, is_neox=s.is_neox, inverse=s.rope_masked)
        elif s.op == "write_cache_":
            provider.write_cache_(self.kv_c, self.k, self.slots, self.cache)
        elif s.op == "write_cache_grouped_":
            kv_c, k, caches = zip(*self.layers, strict=True)
            provider.write_cache_grouped_(kv_c, k, self.slots, caches)
        elif s.op == "write_indexer_cache_":
            provider.write_indexer_cache_(
                self.key, angles[0], angles[1], self.slots, self.index_cache,
                is_neox=s.is_neox, power_of_two_scale=s.power_of_two,
            )  # fmt: skip
        elif s.op == "decode_prologue":
            provider.decode_prologue(
                self.q_nope, self.q, self.kv_c, self.k, angles[0], angles[1], self.slots, self.cache,
                is_neox=s.is_neox, q_out=self.q_out, q_rope_out=self.q_rope_out, kv_c_out=self.kv_c_out,
                q_scale=self.q_scale, kv_norm_weight=self.weight, kv_norm_eps=s.eps, rope_masked=s.rope_masked,
            )  # fmt: skip
        else:
            provider.rope_write_cache_(
                angles[0], self.q, self.k, self.kv_c, angles[1], self.slots, self.cache,
                is_neox=s.is_neox, rope_masked=s.rope_masked,
            )  # fmt: skip
        return self

    def must_equal(self, other: Memory) -> None:
        """All bytes of all buffers, but a NaN that the rotation or the norm made is as good as any other."""
        for name, buffer in self.buffers.items():
            computed = name in ("q", "k", "q_out", "kv_c_out") or name.startswith(("cache", "kv_c"))
            arithmetic = computed and buffer.dtype in ACTIVATIONS.values()
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


def native_is_the_reference(device: str, spec: Spec) -> None:
    wanted = Memory(spec, "cpu").run(providers.reference)
    Memory(spec, device).run(providers.native).must_equal(wanted)
    if device != "cpu":
        Memory(spec, device).run(providers.reference).must_equal(wanted)


@settings(max_examples=500)
@given(spec=specs())
def test_native_is_the_reference(device: str, spec: Spec) -> None:
    native_is_the_reference(device, spec)


@pytest.mark.parametrize("op", ["decode_prologue", "write_cache_grouped_", "write_indexer_cache_"])
def test_native_is_the_reference_of_one_op(op: str, device: str) -> None:
    settings(max_examples=300)(given(spec=specs(op=op))(native_is_the_reference))(device)  # type: ignore[call-arg]


def rows_that_changed(before: Memory, after: Memory) -> None:
    """Only those that have a slot, of a cache whose entries are rows of their own."""
    _, block, entry = after.written()
    for part, old in zip(after.cache.tensors, before.cache.tensors, strict=True):
        if part.dtype == torch.uint8 and after.spec.format == "fp8_model1":  # its scales lie elsewhere
            continue
        free = torch.ones(part.shape[:2], dtype=torch.bool, device=part.device)
        free[block, entry] = False
        assert_same_bytes(codes(part)[free], codes(old)[free])


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
    if after.cache.latent is not None and not FORMATS[spec.format].quantised:
        assert_same_bytes(after.cache.latent[block, entry], after.kv_c[rows])
        assert after.cache.rope is not None
        assert_same_bytes(after.cache.rope[block, entry], after.k[rows])
    rows_that_changed(before, after)


@given(spec=specs(op="decode_prologue"))
def test_a_prologue_changes_its_outputs_alone(device: str, spec: Spec) -> None:
    """Its inputs stay, padding has no query, and a copied q_nope is verbatim."""
    before, after = Memory(spec, device), Memory(spec, device).run(providers.native)
    for name in ("q", "k", "table", "q_nope", "weight", *(["kv_c"] if spec.kv_c_out != "in place" else [])):
        if name in after.buffers:
            assert_same_bytes(after.buffers[name], before.buffers[name])
    for out in (after.q_out, after.q_rope_out):
        assert out is None or codes(out)[spec.mapped :].eq(0).all()
    if after.kv_c_out is not None:
        assert_same_bytes(after.kv_c_out[spec.mapped :], before.kv_c_out[spec.mapped :])
    if after.q_nope is not None and not spec.query:
        assert_same_bytes(after.q_out[: spec.mapped, :, : spec.latent], after.q_nope[: spec.mapped])
    if spec.in_place:
        own = (codes(m.q_out)[: spec.mapped, :, : spec.latent] for m in (after, before))
        assert_same_bytes(*own)
    rows_that_changed(before, after)


@given(spec=specs(op="decode_prologue"))
def test_a_prologue_without_norm_is_the_ops_it_replaces(device: str, provider: Provider, spec: Spec) -> None:
    """rope_write_cache_, then concat."""
    spec = dataclasses.replace(spec, norm=None, kv_c_out=None, query=None, in_place=False, split=False)
    fused, chain = Memory(spec, device).run(provider), Memory(spec, device)
    provider.rope_write_cache_(
        *((chain.positions, chain.q, chain.k, chain.kv_c, chain.table) if spec.rotates else
          (None, chain.q, chain.k, chain.kv_c, None)),
        chain.slots, chain.cache, is_neox=spec.is_neox, rope_masked=spec.rope_masked,
    )  # fmt: skip
    q = torch.cat([chain.q_nope, chain.q], -1)
    q[spec.mapped :] = 0
    assert_same_bytes(fused.q_out, q, any_nan=True)
    for one, other in zip(fused.cache.tensors, chain.cache.tensors, strict=True):
        assert_same_bytes(codes(one), codes(other), any_nan=one.dtype in ACTIVATIONS.values())


@given(spec=specs(op="write_cache_grouped_"))
def test_grouped_is_each_layer_by_itself(device: str, provider: Provider, spec: Spec) -> None:
    grouped, single = Memory(spec, device).run(provider), Memory(spec, device)
    for kv_c, k, cache in single.layers:
        provider.write_cache_(kv_c, k, single.slots, cache)
    grouped.must_equal(single)


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
    packed = dataclasses.replace(spec, pads=(0,) * 10, offsets=(0,) * 6, table_pad=0, four_dims=False)
    a, b = Memory(spec, device).run(providers.native), Memory(packed, device).run(providers.native)
    for name in ("q", "k", "q_out", "q_rope_out", "kv_c_out", "index_cache"):
        one, other = (getattr(m, name, None) for m in (a, b))
        if one is not None and other is not None:
            assert_same_bytes(codes(one).squeeze(), codes(other).squeeze(), any_nan=one.dtype in ACTIVATIONS.values())
    caches = zip(a.layers, b.layers, strict=True) if spec.op != "write_indexer_cache_" else ()
    for (_, _, cache), (_, _, plain) in caches:
        for one, other in zip(cache.tensors, plain.tensors, strict=True):
            assert_same_bytes(codes(one), codes(other), any_nan=one.dtype in ACTIVATIONS.values())


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


def test_spec_of_a_prologue_reaches_every_path() -> None:
    seen: list[Spec] = []

    @settings(max_examples=400, database=None, derandomize=True)
    @given(spec=specs(op="decode_prologue"))
    def collect(spec: Spec) -> None:
        if spec.mapped and spec.heads:
            seen.append(spec)

    collect()
    for name, least in (("query", 60), ("split", 60), ("in_place", 20), ("norm", 60), ("kv_c_out", 40)):
        assert least < sum(bool(getattr(spec, name)) for spec in seen) < len(seen) - least, name
    assert sum(bool(FORMATS[spec.format].packed) for spec in seen) > 8
    assert sum(spec.rotates and spec.mapped < spec.tokens for spec in seen) > 20


@pytest.mark.parametrize("dtype", list(SPECIAL), ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    values = special(dtype).view(dtype)
    assert int(values.isnan().sum()) == 4 and int(values.isinf().sum()) == 2 and int((values == 0).sum()) == 2
    assert int(((values != 0) & (values.abs() < torch.finfo(dtype).tiny)).sum()) == 2

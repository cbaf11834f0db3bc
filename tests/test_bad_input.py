"""Bad arguments: every error says the op, the argument, what was expected and what came; nothing has been written.

Each entry of FAULTS spoils one argument of an otherwise valid call; both providers must raise the same message.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import latentkv
import pytest
import torch
from latentkv import CacheLayout, MLACache, layout_for, providers, select_backend
from latentkv.layouts import FORMATS
from torch import Tensor

N, H, L, R, T, BLOCKS, BLOCK_SIZE, MAX_POSITION = 4, 3, 16, 8, 3, 3, 4, 10
OPS = ("rope_", "write_cache_", "rope_write_cache_")
ARGUMENTS = {
    "rope_": ("positions", "q", "k", "cos_sin_cache", "is_neox"),
    "write_cache_": ("kv_c", "k_pe", "slot_mapping", "cache", "rope_cache", "scale", "format"),
    "rope_write_cache_": (
        *("positions", "q_pe", "k_pe", "kv_c", "cos_sin_cache", "slot_mapping", "cache", "rope_cache", "scale"),
        *("format", "is_neox", "rope_masked"),
    ),
}
Call = dict[str, Any]


def valid(op: str, device: str, placement: str = "concat", format: str = "fp8_e4m3fn") -> Call:
    """The arguments of a call that both providers take."""
    random = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).bfloat16().to(device)

    cache = CacheLayout(L, R, BLOCK_SIZE, format, placement).allocate(BLOCKS, device, 0.5)  # type: ignore[arg-type]
    call = {
        "positions": torch.arange(N, device=device),
        "q_pe": values(N, H, R),
        "q": values(N, H, R),
        "k": values(N, 2, R),
        "k_pe": values(N, R),
        "kv_c": values(N, L),
        "cos_sin_cache": torch.rand((MAX_POSITION, R), generator=random).to(device),
        "slot_mapping": torch.arange(T, device=device),
        "cache": cache.data,
        "rope_cache": cache.rope_data,
        "scale": cache.scale,
        "format": format,
        "is_neox": False,
        "rope_masked": False,
    }
    return {name: call[name] for name in ARGUMENTS[op]}


def run(provider: str, op: str, call: Call) -> None:
    """The op on plain tensors, below the classes that check some of it themselves."""
    if provider == "native":
        getattr(torch.ops.latentkv_native, op).default(*call.values())
    else:
        getattr(latentkv.providers._reference, op)(*call.values())


def memory(call: Call) -> list[bytes]:
    """All bytes of all storages."""
    tensors = [t for t in call.values() if isinstance(t, Tensor) and t.device.type != "meta"]
    return [bytes(t.untyped_storage().cpu().tolist()) for t in tensors]


def message(provider: str, op: str, call: Call) -> str:
    """The error of a bad call, which has left everything as it was."""
    before = memory(call)
    with pytest.raises(RuntimeError) as error:
        run(provider, op, call)
    assert memory(call) == before
    return str(error.value)


@pytest.mark.parametrize("placement", ["concat", "split"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["native", "reference"])
def test_the_valid_call_is_valid(name: str, op: str, placement: str, device: str) -> None:
    call = valid(op, device, placement)
    before = memory(call)
    run(name, op, call)
    assert memory(call) != before


# ---------------------------------------------------------------------------------------------- single faults


@dataclass(frozen=True)
class Fault:
    """One spoiled argument: ``spoil`` makes its bad value from the good one, or edits the call."""

    name: str
    argument: str
    spoil: Callable[[Any], Any]
    expected: str
    got: str
    ops: tuple[str, ...] = OPS
    placement: str = "concat"
    format: str = "fp8_e4m3fn"
    blamed: str | None = None  # the argument that the message names, where it is another

    def __str__(self) -> str:
        return f"{self.argument}-{self.name}"


def strided(t: Tensor) -> Tensor:
    """The same values with an inner stride of 2."""
    wide = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1]))
    wide[..., ::2] = t
    return wide[..., ::2]


def widened(t: Tensor, dim: int, by: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] += by
    return t.new_zeros(shape)


def faults() -> list[Fault]:
    fused, rope, write = ("rope_write_cache_",), ("rope_",), ("write_cache_",)
    rotating, writing = (*fused, *rope), (*fused, *write)
    activations, indices = "dtype bfloat16 or float16 or float32", "dtype int64 or int32"
    contiguous = "a contiguous last dimension (stride 1)"
    overlap = "elements that do not overlap in memory"
    found = []

    def add(argument: str, ops: tuple[str, ...], *rest: Any, **more: Any) -> None:
        found.append(Fault(rest[0], argument, *rest[1:], ops=ops, **more))

    # Activations.
    for argument, ops, shape, dims in (
        ("q_pe", fused, "[N=4, H, R]", [N, H, R]),
        ("q", rope, "[N, H, R]", [N, H, R]),
        ("k", rope, "[N=4, K, R=8]", [N, 2, R]),
        ("k_pe", writing, "[N=4, R=8]", [N, R]),
        ("kv_c", writing, "[N, L]", [N, L]),
    ):
        for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn, torch.bool):
            name = str(dtype).removeprefix("torch.")
            add(argument, ops, name, lambda t, d=dtype: t.to(d), activations, name)
        if argument not in ("q", "kv_c"):
            lead = "bfloat16"
            for dtype in (torch.float16, torch.float32):
                name = str(dtype).removeprefix("torch.")
                add(argument, ops, name, lambda t, d=dtype: t.to(d), f"dtype {lead}", name)
        flat = "shape [N=4, R=8]" if argument == "k" else f"shape {shape}"
        add(argument, ops, "too-deep", lambda t: t[None].expand(N, *t.shape), flat, str([N, *dims]))
        add(argument, ops, "stride-2", strided, contiguous, "stride 2")
        if argument != "kv_c":  # which is only read
            for name, strides in (
                ("stride-0", [0, R, 1] if len(dims) == 3 else [0, 1]),
                ("rows-overlap", [dims[1] * R, R - 1, 1] if len(dims) == 3 else [R - 1, 1]),
            ):
                text = f"strides {strides} for shape {dims}"
                mutating = fused if argument == "k_pe" else ops  # write_cache_ only reads it
                add(argument, mutating, name, lambda t, s=strides: t.as_strided(t.shape, s), overlap, text)
        if argument in ("q_pe", "k_pe", "k"):
            for by in (-1, 1):
                wrong = f"{[N + by, *dims[1:]]}"
                add(argument, ops, f"rows{by:+}", lambda t, by=by: widened(t, 0, by), f"shape {shape}", wrong)
    add("q_pe", fused, "flat", lambda t: t.flatten(1), "shape [N=4, H, R]", str([N, H * R]))
    add("q", rope, "flat", lambda t: t.flatten(1), "shape [N, H, R]", str([N, H * R]))
    add("q", rope, "scalar", lambda t: t[0, 0, 0], "shape [N, H, R]", "[]")
    add("k", rope, "flat", lambda t: t.flatten(1), "shape [N=4, R=8]", str([N, 2 * R]))
    add("k", rope, "vector", lambda t: t[0, 0], "shape [N=4, R=8]", str([R]))
    add("k_pe", fused, "heads", lambda t: t[:, None], "shape [N=4, R=8]", str([N, 1, R]))
    add("k_pe", write, "vector", lambda t: t[0], "shape [N=4, R=8]", str([R]))
    add("kv_c", writing, "heads", lambda t: t[:, None], "shape [N, L]", str([N, 1, L]))
    add("k_pe", fused, "other-R", lambda t: widened(t, 1, 2), "shape [N=4, R=8]", str([N, R + 2]))
    add("k", rope, "other-R", lambda t: widened(t, 2, -2), "shape [N=4, K, R=8]", str([N, 2, R - 2]))
    add("k_pe", write, "odd-R", lambda t: widened(t, 1, -1), "an even rope dimension R", "7")

    # Positions, slots and the table.
    for argument, ops, shape in (
        ("positions", rotating, "[N=4]"), ("slot_mapping", writing, "[T]"),
    ):  # fmt: skip
        for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool):
            name = str(dtype).removeprefix("torch.")
            add(argument, ops, name, lambda t, d=dtype: t.to(d), indices, name)
        rows = N if argument == "positions" else T
        add(argument, ops, "matrix", lambda t: t[:, None], f"shape {shape}", str([rows, 1]))
        add(argument, ops, "scalar", lambda t: t[0], f"shape {shape}", "[]")
        add(argument, ops, "stride-2", strided, contiguous, "stride 2")
        add(argument, ops, "stride-0", lambda t: t[:1].expand(t.shape), contiguous, "stride 0")
    for by in (-1, 1):
        add("positions", rotating, f"rows{by:+}", lambda t, by=by: widened(t, 0, by), "shape [N=4]", str([N + by]))
    add("slot_mapping", writing, "T-above-N", lambda t: widened(t, 0, 2) - 1, "at most N=4 entries", str(T + 2))
    table = "shape [max_position, R=8]"
    for dtype in (torch.float64, torch.int32, torch.complex64):
        name = str(dtype).removeprefix("torch.")
        add("cos_sin_cache", rotating, name, lambda t, d=dtype: t.to(d), activations, name)
    add("cos_sin_cache", rotating, "other-R", lambda t: widened(t, 1, 2), table, str([MAX_POSITION, R + 2]))
    add("cos_sin_cache", rotating, "vector", lambda t: t[0], table, str([R]))
    add("cos_sin_cache", rotating, "pair", lambda t: t.view(-1, 2, R // 2), table, str([MAX_POSITION, 2, R // 2]))
    add("cos_sin_cache", rotating, "stride-2", strided, contiguous, "stride 2")
    both = "a tensor, as for the other of positions and cos_sin_cache"
    add("positions", fused, "none", lambda t: None, both, "None")
    add("cos_sin_cache", fused, "none", lambda t: None, both, "None")

    # The cache.
    own = "dtype float8_e4m3fn or uint8 for format fp8_e4m3fn"
    for dtype in (torch.bfloat16, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.int8):
        name = str(dtype).removeprefix("torch.")
        add("cache", writing, name, lambda t, d=dtype: t.to(d), own, name)
        add("rope_cache", writing, name, lambda t, d=dtype: t.to(d), own, name, placement="split")
    for dtype in (torch.float16, torch.uint8, torch.float8_e4m3fn):
        name = str(dtype).removeprefix("torch.")
        own16 = "dtype bfloat16 for format bf16"
        add("cache", writing, name, lambda t, d=dtype: t.to(d), own16, name, format="bf16")
    add("format", writing, "of-other-activations", lambda f: "fp16", "dtype float16 for format fp16", "bfloat16",
        format="bf16", blamed="kv_c")  # fmt: skip
    for wrong in ("fp8", "bfloat16", "BF16", "fp8_ds_mla", ""):
        add("format", writing, f"is-{wrong or 'empty'}", lambda f, w=wrong: w, "a known format name", repr(wrong))
    for argument, placement, what, row in (
        ("cache", "concat", "L + R=24", L + R), ("cache", "split", "L=16", L), ("rope_cache", "split", "R=8", R),
    ):  # fmt: skip
        pages = "shape [B, bs, C] or [B, 1, bs, C]"
        size = [BLOCKS, BLOCK_SIZE, row]
        for name, spoil, expected, got in (
            ("flat", lambda t: t.flatten(0, 1), pages, str([BLOCKS * BLOCK_SIZE, row])),
            ("two-heads", lambda t: t[:, None].repeat(1, 2, 1, 1), pages, str([BLOCKS, 2, BLOCK_SIZE, row])),
            ("five-dims", lambda t: t[:, None, None], pages, str([BLOCKS, 1, 1, BLOCK_SIZE, row])),
            ("short-row", lambda t: t[..., :-1], f"rows of at least {what} elements", str(row - 1)),
            ("stride-2", strided, "a contiguous last dimension (stride 1)", "stride 2"),
        ):
            add(argument, writing, f"{placement}-{name}", spoil, expected, got, placement=placement)
        for name, strides in (
            ("same-block", [0, row, 1]), ("same-entry", [BLOCK_SIZE * row, 0, 1]),
            ("entries-overlap", [BLOCK_SIZE * row, row - 1, 1]), ("blocks-overlap", [BLOCK_SIZE * row - 1, row, 1]),
        ):  # fmt: skip
            text, bad = f"strides {strides} for shape {size}", lambda t, s=strides: t.as_strided(t.shape, s)
            add(argument, writing, f"{placement}-{name}", bad, overlap, text, placement=placement)
    latent = [BLOCKS, BLOCK_SIZE, L]
    for name, shape in (("blocks", [BLOCKS + 1, BLOCK_SIZE, R]), ("entries", [BLOCKS, BLOCK_SIZE - 1, R])):
        add("rope_cache", writing, f"other-{name}", lambda t, s=shape: t.new_zeros(s),
            f"the blocks of cache: {latent}", str(shape), placement="split")  # fmt: skip

    # The scale.
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        name = str(dtype).removeprefix("torch.")
        add("scale", writing, name, lambda t, d=dtype: t.to(d), "dtype float32", name)
    add("scale", writing, "two", lambda t: t.repeat(2), "one element", "shape [2]")
    add("scale", writing, "empty", lambda t: t[:0], "one element", "shape [0]")
    add("scale", writing, "per-token", lambda t: t.repeat(N, 1), "one element", f"shape [{N}, 1]")
    return found


FAULTS = faults()
SINGLE = [(op, fault) for fault in FAULTS for op in fault.ops]


def spoiled(op: str, fault: Fault, device: str) -> Call:
    call = valid(op, device, fault.placement, fault.format)
    call[fault.argument] = fault.spoil(call[fault.argument])
    return call


@pytest.mark.parametrize(("op", "fault"), SINGLE, ids=lambda x: str(x))
def test_message(op: str, fault: Fault, device: str) -> None:
    """What each provider says, which is the same."""
    wanted = f"latentkv.{op}: {fault.blamed or fault.argument}: expected {fault.expected}, got {fault.got}"
    said = {name: message(name, op, spoiled(op, fault, device)) for name in ("native", "reference")}
    assert said == {"native": wanted, "reference": wanted}


def test_every_argument_is_spoiled() -> None:
    for op, arguments in ARGUMENTS.items():
        tested = {fault.argument for fault in FAULTS if op in fault.ops}
        assert tested >= set(arguments) - {"is_neox", "rope_masked"}


@pytest.mark.parametrize("op", ["rope_", "rope_write_cache_"])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_odd_rope_dimension(name: str, op: str, device: str) -> None:
    """All tensors agree on an odd R."""
    call = valid(op, device)
    for argument in ("q", "k", "q_pe", "k_pe", "cos_sin_cache"):
        if argument in call:
            call[argument] = call[argument][..., : R - 1].contiguous()
    q = "q" if op == "rope_" else "q_pe"
    assert message(name, op, call) == f"latentkv.{op}: {q}: expected an even rope dimension R, got 7"


@pytest.mark.parametrize("op", ["write_cache_", "rope_write_cache_"])
def test_rows_disagree_with_kv_c(op: str, device: str) -> None:
    """N is kv_c's; where that is the odd one out, the first argument to disagree is named."""
    for by in (-1, 1):
        said = set()
        for name in ("native", "reference"):
            call = valid(op, device)
            call["kv_c"] = widened(call["kv_c"], 0, by)
            said.add(message(name, op, call))
        first = {"write_cache_": "k_pe", "rope_write_cache_": "(positions|q_pe)"}[op]
        for text in said:
            assert re.match(rf"latentkv\.{op}: {first}: expected shape \[N={N + by}.*\], got \[{N}", text), text


# -------------------------------------------------------------------------------------------------- devices


def elsewhere() -> list[str]:
    return ["meta", *(["cuda"] if torch.cuda.is_available() else [])]


def tensors_of(op: str) -> list[str]:
    return [a for a in ARGUMENTS[op] if a not in ("format", "is_neox", "rope_masked")]


@pytest.mark.parametrize("other", elsewhere())
@pytest.mark.parametrize(("op", "argument"), [(op, a) for op in OPS for a in tensors_of(op)])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_wrong_device(name: str, op: str, argument: str, other: str, device: str) -> None:
    """One argument lies on another device than all the others: whichever, the call fails and says so.

    A meta tensor among real ones must not turn the call into a silent no-op.
    """
    if device == "cuda":
        other = "cpu" if other == "cuda" else other
    placement = "split" if argument == "rope_cache" else "concat"
    call = valid(op, device, placement)
    call[argument] = call[argument].to(other)
    here = "cuda:0" if device == "cuda" else device
    there = "cuda:0" if other == "cuda" else other
    text = message(name, op, call)
    assert re.match(rf"latentkv\.{op}: \w+: expected a tensor on (cpu|cuda|cuda:0|meta), got one on [\w:]+$", text), (
        text
    )
    lead = "q" if op == "rope_" else "kv_c"  # what the others are compared with
    if argument != lead and (device, other) != ("cpu", "cuda"):  # there the GPU's kernel is the one called
        assert text == f"latentkv.{op}: {argument}: expected a tensor on {here}, got one on {there}"


# -------------------------------------------------------------------------------- a cache pair that shares bytes


def pair(device: str, latent: tuple[int, ...], rope: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Two views of one byte buffer, by (offset, block stride, entry stride)."""
    buffer = torch.zeros(4096, dtype=torch.uint8, device=device)
    return tuple(
        buffer.as_strided((BLOCKS, BLOCK_SIZE, width), (block, entry, 1), offset)
        for width, (offset, block, entry) in ((L, latent), (R, rope))
    )  # type: ignore[return-value]


@pytest.mark.parametrize("op", ["write_cache_", "rope_write_cache_"])
@pytest.mark.parametrize(
    ("latent", "rope"),
    [
        ((0, 96, 24), (0, 96, 24)),  # the very same rows
        ((0, 96, 24), (15, 96, 24)),  # the last byte of each latent vector
        ((8, 96, 24), (1, 96, 24)),  # the first one
        ((0, 96, 24), (20, 96, 24)),  # into the next entry
        ((0, 64, 16), (63, 64, 16)),  # into the next block
        ((0, 64, 16), (191, 32, 8)),  # the last byte of the latent tensor
        ((95, 64, 16), (0, 32, 8)),  # the last byte of the rope tensor
        ((0, 96, 16), (63, 96, 8)),  # by block, one byte too early
        ((0, 96, 16), (65, 96, 8)),  # by block, one byte into the next
        ((0, 96, 24), (100, 97, 24)),  # other strides that meet somewhere
    ],
)
def test_pair_that_shares_bytes(op: str, latent: tuple[int, ...], rope: tuple[int, ...], device: str) -> None:
    for name in ("native", "reference"):
        call = valid(op, device, "split")
        call["cache"], call["rope_cache"] = pair(device, latent, rope)
        text = f"latentkv.{op}: rope_cache: expected a tensor that shares no bytes with cache, got overlapping memory"
        assert message(name, op, call) == text


@pytest.mark.parametrize(
    ("latent", "rope"),
    [
        ((0, 96, 24), (16, 96, 24)),  # concat rows
        ((8, 96, 24), (0, 96, 24)),  # rope first
        ((0, 64, 16), (192, 32, 8)),  # one tensor, then the other
        ((96, 64, 16), (0, 32, 8)),
        ((0, 96, 16), (64, 96, 8)),  # block by block
        ((32, 96, 16), (0, 96, 8)),
        ((0, 200, 40), (1016, 200, 40)),  # concat rows, many blocks later
        ((500, 100, 25), (508 - 492, 100, 25)),  # so much earlier that the ranges are apart
    ],
)
def test_pair_that_shares_none(latent: tuple[int, ...], rope: tuple[int, ...], device: str) -> None:
    """The neighbours of the cases above are fine."""
    for name in ("native", "reference"):
        call = valid("write_cache_", device, "split")
        call["cache"], call["rope_cache"] = pair(device, latent, rope)
        run(name, "write_cache_", call)
        latents, ropes = call["cache"].flatten(0, 1), call["rope_cache"].flatten(0, 1)
        assert latents[:T].ne(0).any(1).all() and ropes[:T].ne(0).any(1).all()
        assert latents[T:].eq(0).all() and ropes[T:].eq(0).all()


# --------------------------------------------------------------------------------- the API above the plain ops


def test_a_cache_is_checked_when_it_is_wrapped(device: str) -> None:
    layout, split = CacheLayout(L, R, BLOCK_SIZE, "bf16"), CacheLayout(L, R, BLOCK_SIZE, "bf16", "split")
    good = torch.zeros(BLOCKS, BLOCK_SIZE, L + R, dtype=torch.bfloat16, device=device)
    latent, rope = good[..., :L], good[..., L:]
    here = "cuda:0" if device == "cuda" else "cpu"
    ones, scale_on = torch.ones(1, device=device), "scale: expected one float32 element on"
    for tensors, lay, scale, text in (
        ([good, good], layout, None, "tensors: expected 1 for placement 'concat', got 2"),
        (good, split, None, "tensors: expected 2 for placement 'split', got 1"),
        ([], layout, None, "tensors: expected 1 for placement 'concat', got 0"),
        (good[:, :2], layout, None, "tensors[0]: expected shape [3, 4, 24], got [3, 2, 24]"),
        (good[..., :-1], layout, None, "tensors[0]: expected shape [3, 4, 24], got [3, 4, 23]"),
        (good[0], layout, None, "tensors[0]: expected shape [4, 4, 24], got [4, 24]"),
        ([latent, rope[:2]], split, None, "tensors[1]: expected shape [3, 4, 8], got [2, 4, 8]"),
        (good.half(), layout, None, "tensors[0]: expected dtype torch.bfloat16 for format bf16, got torch.float16"),
        ([latent, rope.to("meta")], split, None, f"tensors[1]: expected device {here}, got meta"),
        (good, layout, ones.repeat(2), f"{scale_on} {here}, got torch.float32 [2]"),
        (good, layout, ones.double(), f"{scale_on} {here}, got torch.float64 [1]"),
        (good, layout, ones.to("meta"), f"{scale_on} {here}, got torch.float32 [1] on meta"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(text)):
            MLACache.wrap(tensors, lay, scale)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank: expected at least 1, got 0"),
        ({"rope_dim": -2}, "rope_dim: expected an even number, at least 0, got -2"),
        ({"rope_dim": 63}, "rope_dim: expected an even number, at least 0, got 63"),
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"format": "int8"}, f"format: expected one of {', '.join(FORMATS)} or fp8, got 'int8'"),
        ({"placement": "packed"}, "placement: expected one of ('concat', 'split'), got 'packed'"),
    ],
)
def test_unknown_layout(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        CacheLayout(**fields)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"layout_for: backend: expected .*TRITON_MLA.*, got 'XFORMERS'"):
        layout_for("XFORMERS")
    with pytest.raises(ValueError, match=r"select_backend: prefer: expected .*TRITON_MLA.*, got 'XFORMERS'"):
        select_backend(heads=16, prefer="XFORMERS")
    with pytest.raises(ValueError, match=r"format: expected one of .*, got 'int8'"):
        layout_for("TRITON_MLA", format="int8")
    with pytest.raises(AttributeError, match="cutlass"):
        _ = providers.cutlass  # type: ignore[attr-defined]


def test_errors_come_through_the_public_functions(device: str) -> None:
    cache = CacheLayout(L, R, BLOCK_SIZE).allocate(BLOCKS, device)
    call = valid("rope_write_cache_", device)
    q, k, c, table = (call[a] for a in ("q_pe", "k_pe", "kv_c", "cos_sin_cache"))
    positions, slots = call["positions"], call["slot_mapping"]
    with pytest.raises(RuntimeError, match=r"latentkv\.rope_: positions: expected shape \[N=4\], got \[3\]"):
        latentkv.rope_(positions[:3], q, k, table, is_neox=True)
    with pytest.raises(RuntimeError, match=r"latentkv\.write_cache_: k_pe: expected shape \[N=4, R=8\], got \[3, 8\]"):
        latentkv.write_cache_(c, k[:3], slots, cache)
    with pytest.raises(
        RuntimeError, match=r"latentkv\.rope_write_cache_: kv_c: expected dtype bfloat16 for format bf16"
    ):
        latentkv.rope_write_cache_(positions, q.half(), k.half(), c.half(), table, slots, cache, is_neox=True)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_repeated_rows_may_be_read(name: str, device: str) -> None:
    """What an op does not mutate may overlap itself; a cache of one row may have any strides."""
    latent, rope = (torch.zeros(1, 1, w, device=device).expand(1, 2, w)[:, :1] for w in (L, R))
    cache = MLACache.wrap([latent, rope], CacheLayout(L, R, 1, "fp32", "split"))
    ones, slots = torch.ones(1, L, device=device), torch.tensor([0, -1], device=device)
    repeated = torch.ones(1, R, device=device).expand(2, R)
    getattr(providers, name).write_cache_(ones.expand(2, L), repeated, slots, cache)
    assert cache.data.sum() == L and cache.rope_data is not None and cache.rope_data.sum() == R

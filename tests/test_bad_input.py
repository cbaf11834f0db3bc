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
from latentkv.cache.layouts import FORMATS
from torch import Tensor

N, H, L, R, T, G, BLOCKS, BLOCK_SIZE, MAX_POSITION = 4, 3, 16, 8, 3, 2, 3, 4, 10
ARGUMENTS = {
    "rope_": ("positions", "q", "k", "cos_sin_cache", "is_neox"),
    "write_cache_": ("kv_c", "k_pe", "slot_mapping", "cache", "rope_cache", "scale", "format"),
    "rope_write_cache_": (
        *("positions", "q_pe", "k_pe", "kv_c", "cos_sin_cache", "slot_mapping", "cache", "rope_cache", "scale"),
        *("format", "is_neox", "rope_masked"),
    ),
    "decode_prologue": (
        *("q_nope", "q_pe", "kv_c", "k_pe", "positions", "cos_sin_cache", "slot_mapping", "cache", "rope_cache"),
        *("scale", "format", "q_out", "q_rope_out", "kv_c_out", "q_scale", "kv_norm_weight", "is_neox"),
        *("kv_norm_eps", "rope_masked"),
    ),
    "write_cache_grouped_": ("kv_c", "k_pe", "slot_mapping", "caches", "rope_caches", "scales", "format"),
    "write_indexer_cache_": (
        *("k", "positions", "cos_sin_cache", "slot_mapping", "cache", "is_neox", "power_of_two_scale"),
    ),
}
OPS = tuple(ARGUMENTS)
WRITE = ("write_cache_",)
WRITING = ("write_cache_", "rope_write_cache_", "decode_prologue")  # [kv_c | k_pe] to one cache
PACKED = [name for name, f in FORMATS.items() if f.packed]
SETTINGS = {"format", "is_neox", "rope_masked", "kv_norm_eps", "power_of_two_scale"}
LEADS = {"rope_": "q", "write_indexer_cache_": "k"}  # says where the other arguments must lie; kv_c in the other ops
Call = dict[str, Any]


def valid(op: str, device: str, placement: str = "concat", format: str = "fp8_e4m3fn") -> Call:
    """The arguments of a call that both providers take. With ``split`` the prologue's query is in two tensors too."""
    random = torch.Generator().manual_seed(0)
    packed = FORMATS[format].packed
    latent_dim, rope_dim = packed.dims if packed else (L, R)
    layout = CacheLayout(latent_dim, rope_dim, BLOCK_SIZE, format, placement)  # type: ignore[arg-type]

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).bfloat16().to(device)

    caches = [layout.allocate(BLOCKS, device, 0.5 + i) for i in range(G)]
    split = placement == "split"
    call: Call = {
        "positions": torch.arange(N, device=device),
        "q_nope": values(N, H, latent_dim),
        "q_pe": values(N, H, rope_dim),
        "q": values(N, H, R),
        "k": values(N, 2, R),
        "k_pe": values(N, rope_dim),
        "kv_c": values(N, latent_dim),
        "cos_sin_cache": torch.rand((MAX_POSITION, rope_dim), generator=random).to(device),
        "slot_mapping": torch.arange(T, device=device),
        "cache": caches[0].data,
        "rope_cache": caches[0].rope_data,
        "scale": torch.tensor([0.5], device=device),
        "format": format,
        "q_out": values(N, H, latent_dim + (0 if split else rope_dim)),
        "q_rope_out": values(N, H, rope_dim) if split else None,
        "kv_c_out": values(N, latent_dim),
        "q_scale": torch.tensor([0.25], device=device),
        "kv_norm_weight": values(latent_dim),
        "kv_norm_eps": 1e-6,
        "caches": [cache.data for cache in caches],
        "rope_caches": [cache.rope_data for cache in caches if cache.rope_data is not None],
        "scales": [torch.tensor([0.5], device=device) for _ in range(G)],
        "is_neox": False,
        "rope_masked": False,
        "power_of_two_scale": False,
    }
    if op == "write_cache_grouped_":
        call |= {"kv_c": [values(N, latent_dim) for _ in range(G)], "k_pe": [values(N, rope_dim) for _ in range(G)]}
    elif op == "write_indexer_cache_":
        call["k"] = values(N, 128)
        call["cache"] = torch.zeros(BLOCKS, BLOCK_SIZE, 132, dtype=torch.uint8, device=device)
    return {name: call[name] for name in ARGUMENTS[op]}


def tensors_in(call: Call) -> list[Tensor]:
    """All tensors, those of lists too."""
    flat = [t for value in call.values() for t in (value if isinstance(value, list) else [value])]
    return [t for t in flat if isinstance(t, Tensor)]


def run(provider: str, op: str, call: Call) -> None:
    """The op on plain tensors, below the classes that check some of it themselves."""
    if provider == "native":
        getattr(torch.ops.latentkv_native, op).default(*call.values())
    else:
        getattr(latentkv.providers._reference, op)(*call.values())


def memory(call: Call) -> list[bytes]:
    """All bytes of all storages."""
    storages = [t.untyped_storage().cpu() for t in tensors_in(call) if t.device.type != "meta"]
    return [torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes() for storage in storages]


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
    layer: int | None = None  # of a list, the one tensor to spoil

    def __str__(self) -> str:
        return f"{self.blamed or self.argument}-{self.name}"


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
    fused, rope, write, prologue = ("rope_write_cache_",), ("rope_",), ("write_cache_",), ("decode_prologue",)
    indexer, rotating = ("write_indexer_cache_",), ("rope_write_cache_", "rope_", "decode_prologue")
    writing = WRITING
    activations, indices = "dtype bfloat16 or float16 or float32", "dtype int64 or int32"
    contiguous = "a contiguous last dimension (stride 1)"
    overlap = "elements that do not overlap in memory"
    found = []

    def add(argument: str, ops: tuple[str, ...], *rest: Any, **more: Any) -> None:
        found.append(Fault(rest[0], argument, *rest[1:], ops=ops, **more))

    # Activations.
    for argument, ops, shape, dims in (
        ("q_pe", (*fused, *prologue), "[N=4, H, R]", [N, H, R]),
        ("q", rope, "[N, H, R]", [N, H, R]),
        ("k", rope, "[N=4, K, R=8]", [N, 2, R]),
        ("k_pe", (*fused, *prologue), "[N=4, R=8]", [N, R]),
        ("k_pe", WRITE, "[N=4, R=8]", [N, R]),
        ("kv_c", writing, "[N, L]", [N, L]),
    ):
        for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn, torch.bool):
            name = str(dtype).removeprefix("torch.")
            own = activations if argument in ("q", "kv_c") else "dtype bfloat16"
            add(argument, ops, name, lambda t, d=dtype: t.to(d), own, name)
        if argument not in ("q", "kv_c"):
            lead = "bfloat16"
            for dtype in (torch.float16, torch.float32):
                name = str(dtype).removeprefix("torch.")
                add(argument, ops, name, lambda t, d=dtype: t.to(d), f"dtype {lead}", name)
        if argument == "k_pe" and ops is WRITE:
            shape = "[N=4, R]"  # nothing said before what R is
        flat = "shape [N=4, R=8]" if argument == "k" else f"shape {shape}"
        add(argument, ops, "too-deep", lambda t: t[None].expand(N, *t.shape), flat, str([N, *dims]))
        add(argument, ops, "stride-2", strided, contiguous, "stride 2")
        if argument != "kv_c":  # which is only read
            for name, strides in (
                ("stride-0", [0, R, 1] if len(dims) == 3 else [0, 1]),
                ("rows-overlap", [dims[1] * R, R - 1, 1] if len(dims) == 3 else [R - 1, 1]),
            ):
                text = f"strides {strides} for shape {dims}"
                mutating = fused if argument in ("q_pe", "k_pe") else ops  # the others only read it
                add(argument, mutating, name, lambda t, s=strides: t.as_strided(t.shape, s), overlap, text)
        if argument in ("q_pe", "k_pe", "k"):
            for by in (-1, 1):
                wrong = f"{[N + by, *dims[1:]]}"
                add(argument, ops, f"rows{by:+}", lambda t, by=by: widened(t, 0, by), f"shape {shape}", wrong)
    add("q_pe", (*fused, *prologue), "flat", lambda t: t.flatten(1), "shape [N=4, H, R]", str([N, H * R]))
    add("q", rope, "flat", lambda t: t.flatten(1), "shape [N, H, R]", str([N, H * R]))
    add("q", rope, "scalar", lambda t: t[0, 0, 0], "shape [N, H, R]", "[]")
    add("k", rope, "flat", lambda t: t.flatten(1), "shape [N=4, R=8]", str([N, 2 * R]))
    add("k", rope, "vector", lambda t: t[0, 0], "shape [N=4, R=8]", str([R]))
    add("k_pe", (*fused, *prologue), "heads", lambda t: t[:, None], "shape [N=4, R=8]", str([N, 1, R]))
    add("k_pe", write, "vector", lambda t: t[0], "shape [N=4, R]", str([R]))
    add("kv_c", writing, "heads", lambda t: t[:, None], "shape [N, L]", str([N, 1, L]))
    add("k_pe", (*fused, *prologue), "other-R", lambda t: widened(t, 1, 2), "shape [N=4, R=8]", str([N, R + 2]))
    add("k", rope, "other-R", lambda t: widened(t, 2, -2), "shape [N=4, K, R=8]", str([N, 2, R - 2]))
    add("k_pe", write, "odd-R", lambda t: widened(t, 1, -1), "an even rope dimension R", "7")

    # Positions, slots and the table.
    for argument, ops, shape in (
        ("positions", (*rotating, *indexer), "[N=4]"), ("slot_mapping", (*writing, *indexer), "[T]"),
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
        add(
            "positions",
            (*rotating, *indexer),
            f"rows{by:+}",
            lambda t, by=by: widened(t, 0, by),
            "shape [N=4]",
            str([N + by]),
        )
    add("slot_mapping", (*writing, *indexer), "T-above-N", lambda t: widened(t, 0, 2) - 1, "at most N=4 entries",
        str(T + 2))  # fmt: skip
    table = "shape [max_position, R=8]"
    for dtype in (torch.float64, torch.int32, torch.complex64):
        name = str(dtype).removeprefix("torch.")
        add("cos_sin_cache", (*rotating, *indexer), name, lambda t, d=dtype: t.to(d), activations, name)
    add("cos_sin_cache", rotating, "other-R", lambda t: widened(t, 1, 2), table, str([MAX_POSITION, R + 2]))
    add("cos_sin_cache", rotating, "vector", lambda t: t[0], table, str([R]))
    add("cos_sin_cache", rotating, "pair", lambda t: t.view(-1, 2, R // 2), table, str([MAX_POSITION, 2, R // 2]))
    add("cos_sin_cache", (*rotating, *indexer), "stride-2", strided, contiguous, "stride 2")
    both, either = "a tensor, as for the other of positions and cos_sin_cache", (*fused, *prologue, *indexer)
    add("positions", either, "none", lambda t: None, both, "None")
    add("cos_sin_cache", either, "none", lambda t: None, both, "None")

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
    for wrong in ("fp8", "bfloat16", "BF16", "fp8_ds_mla_", ""):
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
            ("short-row", lambda t: t[..., :-1], f"rows of {what} elements", str(row - 1)),
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
    return found + packed_faults() + prologue_faults() + grouped_faults() + indexer_faults()


def byte_rows(argument: str, row: int, ops: tuple[str, ...], **more: Any) -> list[Fault]:
    """A cache of rows of ``row`` bytes that hold more than one type; ``scales`` where they lie after a block's rows."""
    pages, found = "shape [B, bs, C] or [B, 1, bs, C]", []
    run = more.pop("run")
    block = BLOCK_SIZE * row

    def strides(name: str, block: int, entry: int, expected: str, offset: int = 0) -> None:
        def spoil(t: Tensor) -> Tensor:
            storage = torch.zeros(BLOCKS * BLOCK_SIZE * (row + 8) + 8, dtype=torch.uint8, device=t.device)
            return storage.as_strided((BLOCKS, BLOCK_SIZE, row), (block, entry, 1), offset)

        got = f"address {offset} modulo 4 and strides {[block, entry, 1]}"
        if "apart" in expected:
            got = str(entry)
        elif "overlap" in expected:
            got = f"strides {[block, entry, 1]} for shape {[BLOCKS, BLOCK_SIZE, row]}"
        found.append(Fault(name, argument, spoil, expected, got, ops, **more))

    aligned = "rows that start at a multiple of 4 bytes"
    for offset in (1, 2, 3):
        strides(f"address-{offset}", block, row, aligned, offset)
    strides("block-stride-odd", block + 1, row, aligned)
    strides("block-stride-even", block + 2, row, aligned)
    apart = f"entries {row} bytes apart, as scales lie after a block's rows"
    strides("entries-4-more", block + 16, row + 4, apart) if run else None
    strides("entries-2-more", block + 8, row + 2, apart if run else aligned)
    strides("entries-overlap", block, row - 4, "elements that do not overlap in memory")
    strides("blocks-overlap", block - 4, row, "elements that do not overlap in memory")
    strides("one-block", 0, row, "elements that do not overlap in memory")
    for name, change, expected, got in (
        ("flat", lambda t: t.flatten(0, 1), pages, str([BLOCKS * BLOCK_SIZE, row])),
        ("two-heads", lambda t: t[:, None].repeat(1, 2, 1, 1), pages, str([BLOCKS, 2, BLOCK_SIZE, row])),
        ("short-row", lambda t: t[..., :-1], f"rows of at least {row} bytes", str(row - 1)),
        ("stride-2", strided, "a contiguous last dimension (stride 1)", "stride 2"),
    ):
        found.append(Fault(name, argument, change, expected, got, ops, **more))
    return found


def packed_faults() -> list[Fault]:
    found = []
    for format in PACKED:
        packed, run = FORMATS[format].packed, format == "fp8_model1"
        assert packed is not None
        found += byte_rows("cache", packed.row_bytes, WRITING, format=format, run=run)
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
            name = str(dtype).removeprefix("torch.")
            text = f"dtype uint8 for format {format}"
            found.append(Fault(name, "cache", lambda t, d=dtype: t.to(d), text, name, WRITING, format=format))
        found.append(Fault("two", "scale", lambda t: t.repeat(2), "one element", "shape [2]", WRITING, format=format))
        other, size = {"fp8_ds_mla": ("fp8_model1", 448), "fp8_model1": ("fp8_ds_mla", 512)}[format]
        text, own = f"L={size} for format {other}", str(packed.dims[0])
        as_other = lambda _, o=other: o  # noqa: E731
        found.append(Fault(f"is-{other}", "format", as_other, text, own, WRITING, format=format, blamed="kv_c"))
        wrong = f"R=64 for format {format}"
        found.append(Fault("R", "k_pe", lambda t: t[:, :62], wrong, "62", ("write_cache_",), format=format))
    return found


def prologue_faults() -> list[Fault]:
    found = []
    contiguous, overlap = "a contiguous last dimension (stride 1)", "elements that do not overlap in memory"

    def add(argument: str, name: str, spoil: Callable[[Any], Any], expected: str, got: str, **more: Any) -> None:
        found.append(Fault(name, argument, spoil, expected, got, ("decode_prologue",), **more))

    def shapes(argument: str, text: str, dims: list[int], **more: Any) -> None:
        """Each dimension one more and one less, too few and too many dimensions, inner strides."""
        for i in range(len(dims)):
            for by in (-1, 1):
                got = str([*dims[:i], dims[i] + by, *dims[i + 1 :]])
                add(argument, f"dim{i}{by:+}", lambda t, i=i, by=by: widened(t, i, by), f"shape {text}", got, **more)
        add(argument, "deep", lambda t: t[None], f"shape {text}", str([1, *dims]), **more)
        add(argument, "flat", lambda t: t.flatten()[:5], f"shape {text}", "[5]", **more)
        add(argument, "stride-2", strided, contiguous, "stride 2", **more)

    def types(argument: str, own: str, *wrong: torch.dtype, **more: Any) -> None:
        for dtype in wrong:
            name = str(dtype).removeprefix("torch.")
            add(argument, name, lambda t, d=dtype: t.to(d), f"dtype {own}", name, **more)

    queries = "bfloat16 or float8_e4m3fn or float8_e4m3fnuz or float8_e5m2"
    shapes("q_nope", f"[N=4, H=3, L={L}]", [N, H, L])
    types("q_nope", "bfloat16", torch.float16, torch.float32, torch.float8_e4m3fn)
    shapes("q_out", f"[N=4, H=3, L + R={L + R}]", [N, H, L + R])
    types("q_out", queries, torch.float16, torch.float32, torch.uint8, torch.int8)
    split = {"placement": "split"}
    shapes("q_out", f"[N=4, H=3, L={L}]", [N, H, L], **split)
    shapes("q_rope_out", f"[N=4, H=3, R={R}]", [N, H, R], **split)
    types("q_rope_out", "bfloat16", torch.float16, torch.float8_e4m3fn, **split)
    add("q_out", "fp8-but-not-q_rope_out", lambda t: t.to(torch.float8_e4m3fn), "dtype float8_e4m3fn", "bfloat16",
        blamed="q_rope_out", **split)  # fmt: skip
    shapes("kv_c_out", f"[N=4, L={L}]", [N, L])
    types("kv_c_out", "bfloat16", torch.float16, torch.float32, torch.float8_e4m3fn)
    shapes("kv_norm_weight", f"[L={L}]", [L])
    types("kv_norm_weight", "bfloat16 or float32", torch.float16, torch.float64, torch.int32)
    types("q_scale", "float32", torch.float64, torch.bfloat16, torch.int32)
    add("q_scale", "two", lambda t: t.repeat(2), "one element", "shape [2]")
    add("q_scale", "per-head", lambda t: t.repeat(H, 1), "one element", f"shape [{H}, 1]")
    add("kv_norm_weight", "none", lambda _: None, "None without kv_norm_weight", "a tensor", blamed="kv_c_out")
    for argument, dims, more in (
        ("q_out", [N, H, L + R], {}), ("q_out", [N, H, L], split), ("q_rope_out", [N, H, R], split),
        ("kv_c_out", [N, L], {}),
    ):  # fmt: skip
        row = dims[-1]
        for name, strides in (
            ("same-row", [0, row, 1] if len(dims) == 3 else [0, 1]),
            ("rows-overlap", [(H - 1) * row, row, 1] if len(dims) == 3 else [row - 1, 1]),
            *([("heads-overlap", [H * row, row - 1, 1])] if len(dims) == 3 else []),
        ):
            text = f"strides {strides} for shape {dims}"
            add(argument, name, lambda t, s=strides: t.as_strided(t.shape, s), overlap, text, **more)
    return found


def grouped_faults() -> list[Fault]:
    found = []

    def add(argument: str, name: str, spoil: Callable[[Any], Any], expected: str, got: str, **more: Any) -> None:
        found.append(Fault(name, argument, spoil, expected, got, ("write_cache_grouped_",), **more))

    def one(argument: str, layer: int, name: str, spoil: Callable[[Any], Any], *texts: str, **more: Any) -> None:
        blamed = more.pop("blamed", f"{argument}[{layer}]")
        add(argument, name, spoil, *texts, layer=layer, blamed=blamed, **more)

    # The lists.
    add("kv_c", "none", lambda _: [], "at least one tensor", "none")
    for argument in ("k_pe", "caches", "scales"):
        add(argument, "one-less", lambda x: x[1:], "G=2 entries, as kv_c has", "1")
        add(argument, "one-more", lambda x: [*x, x[0]], "G=2 entries, as kv_c has", "3")
    add("rope_caches", "one-less", lambda x: x[1:], "G=2 entries, as kv_c has", "1", placement="split")
    add("rope_caches", "one-more", lambda x: [*x, x[0]], "G=2 entries, as kv_c has", "3", placement="split")

    # One tensor of them.
    activations = "dtype bfloat16 or float16 or float32"
    contiguous, overlap = "a contiguous last dimension (stride 1)", "elements that do not overlap in memory"
    for argument, letter, size in (("kv_c", "L", L), ("k_pe", "R", R)):
        for layer in range(G):
            own = activations if (argument, layer) == ("kv_c", 0) else "dtype bfloat16"
            one(argument, layer, "float64", lambda t: t.double(), own, "float64")
            one(argument, layer, "stride-2", strided, contiguous, "stride 2")
        shape = f"shape [N=4, {letter}={size}]"
        one(argument, 1, "float16", lambda t: t.half(), "dtype bfloat16", "float16")
        one(argument, 1, "row-more", lambda t: widened(t, 0, 1), shape, str([N + 1, size]))
        one(argument, 1, "wider", lambda t: widened(t, 1, 2), shape, str([N, size + 2]))
        one(argument, 1, "deep", lambda t: t[None], shape, str([1, N, size]))
    one("kv_c", 0, "deep", lambda t: t[None], "shape [N, L]", str([1, N, L]))
    one("k_pe", 0, "odd", lambda t: widened(t, 1, -1), "an even rope dimension R", "7")
    for dtype in (torch.float32, torch.int16):
        name = str(dtype).removeprefix("torch.")
        add("slot_mapping", name, lambda t, d=dtype: t.to(d), "dtype int64 or int32", name)
    add("slot_mapping", "matrix", lambda t: t[:, None], "shape [T]", str([T, 1]))
    add("slot_mapping", "T-above-N", lambda t: widened(t, 0, 2), "at most N=4 entries", str(T + 2))
    add("format", "is-fp8", lambda _: "fp8", "a known format name", "'fp8'")
    add("format", "of-other-activations", lambda _: "fp16", "dtype float16 for format fp16", "bfloat16",
        format="bf16", blamed="kv_c[0]")  # fmt: skip
    add("format", "of-other-L", lambda _: "fp8_ds_mla", "L=512 for format fp8_ds_mla", "448",
        format="fp8_model1", blamed="kv_c[0]")  # fmt: skip

    # The caches.
    own, pages = "dtype float8_e4m3fn or uint8 for format fp8_e4m3fn", "shape [B, bs, C] or [B, 1, bs, C]"
    for argument, placement, what, row in (
        ("caches", "concat", "L + R=24", L + R), ("caches", "split", "L=16", L), ("rope_caches", "split", "R=8", R),
    ):  # fmt: skip
        for layer in range(G):
            for name, spoil, expected, got in (
                ("bfloat16", lambda t: t.to(torch.bfloat16), own, "bfloat16"),
                ("flat", lambda t: t.flatten(0, 1), pages, str([BLOCKS * BLOCK_SIZE, row])),
                ("short-row", lambda t: t[..., :-1], f"rows of {what} elements", str(row - 1)),
                ("stride-2", strided, contiguous, "stride 2"),
                ("same-block", lambda t: t[:1].expand(t.shape), overlap,
                 f"strides {[0, row, 1]} for shape {[BLOCKS, BLOCK_SIZE, row]}"),
            ):  # fmt: skip
                one(argument, layer, f"{placement}-{name}", spoil, expected, got, placement=placement)
    blocks = "the blocks of {}: {}".format
    for name, shape in (("block-more", [BLOCKS + 1, BLOCK_SIZE]), ("entry-less", [BLOCKS, BLOCK_SIZE - 1])):
        one("caches", 1, name, lambda t, s=shape: t.new_zeros(*s, L + R),
            blocks("caches[0]", [BLOCKS, BLOCK_SIZE, L + R]), str([*shape, L + R]))  # fmt: skip
        one("rope_caches", 1, name, lambda t, s=shape: t.new_zeros(*s, R),
            blocks("caches[1]", [BLOCKS, BLOCK_SIZE, L]), str([*shape, R]), placement="split")  # fmt: skip
    for layer in range(G):
        one("scales", layer, "float64", lambda t: t.double(), "dtype float32", "float64")
        one("scales", layer, "two", lambda t: t.repeat(2), "one element", "shape [2]")
        found.extend(
            Fault(f.name, f.argument, f.spoil, f.expected, f.got, f.ops, format=f.format, layer=layer,
                  blamed=f"caches[{layer}]")
            for format, row, run in (("fp8_ds_mla", 656, False), ("fp8_model1", 584, True))
            for f in byte_rows("caches", row, ("write_cache_grouped_",), format=format, run=run)
        )  # fmt: skip
    return found


def indexer_faults() -> list[Fault]:
    ops = ("write_indexer_cache_",)
    found = byte_rows("cache", 132, ops, run=True)

    def add(argument: str, name: str, spoil: Callable[[Any], Any], expected: str, got: str) -> None:
        found.append(Fault(name, argument, spoil, expected, got, ops))

    for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn):
        name = str(dtype).removeprefix("torch.")
        add("k", name, lambda t, d=dtype: t.to(d), "dtype bfloat16 or float16 or float32", name)
    add("k", "heads", lambda t: t[:, None], "shape [N, D=128]", str([N, 1, 128]))
    add("k", "vector", lambda t: t[0], "shape [N, D=128]", "[128]")
    for by in (-1, 1, -64):
        add("k", f"width{by:+}", lambda t, by=by: widened(t, 1, by), "shape [N, D=128]", str([N, 128 + by]))
    add("k", "stride-2", strided, "a contiguous last dimension (stride 1)", "stride 2")
    for width in (0, 7, 130):
        table = lambda t, w=width: t.new_zeros(MAX_POSITION, w)  # noqa: E731
        add("cos_sin_cache", f"R-{width}", table, "an even R in 2 .. 128", str(width))
    for name, spoil, shape in (
        ("vector", lambda t: t[0], [R]), ("pair", lambda t: t.view(-1, 2, R // 2), [MAX_POSITION, 2, R // 2]),
    ):  # fmt: skip
        add("cos_sin_cache", name, spoil, "shape [max_position, R]", str(shape))
    for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        name = str(dtype).removeprefix("torch.")
        add("cache", name, lambda t, d=dtype: t.to(d), "dtype uint8 for format indexer", name)
    return found


FAULTS = faults()
SINGLE = [(op, fault) for fault in FAULTS for op in fault.ops]


def spoiled(op: str, fault: Fault, device: str) -> Call:
    call = valid(op, device, fault.placement, fault.format)
    if fault.layer is None:
        call[fault.argument] = fault.spoil(call[fault.argument])
    else:
        call[fault.argument][fault.layer] = fault.spoil(call[fault.argument][fault.layer])
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
        assert tested >= set(arguments) - (SETTINGS - {"format"})
    assert all(name in OPS for fault in FAULTS for name in fault.ops)


@pytest.mark.parametrize("op", ["rope_", "rope_write_cache_", "decode_prologue"])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_odd_rope_dimension(name: str, op: str, device: str) -> None:
    """All tensors agree on an odd R."""
    call = valid(op, device)
    for argument in ("q", "k", "q_pe", "k_pe", "cos_sin_cache"):
        if argument in call:
            call[argument] = call[argument][..., : R - 1].contiguous()
    q = "q" if op == "rope_" else "q_pe"
    assert message(name, op, call) == f"latentkv.{op}: {q}: expected an even rope dimension R, got 7"


@pytest.mark.parametrize("op", WRITING)
def test_rows_disagree_with_kv_c(op: str, device: str) -> None:
    """N is kv_c's; where that is the odd one out, the first argument to disagree is named."""
    for by in (-1, 1):
        said = set()
        for name in ("native", "reference"):
            call = valid(op, device)
            call["kv_c"] = widened(call["kv_c"], 0, by)
            said.add(message(name, op, call))
        first = "k_pe" if op == "write_cache_" else "(positions|q_pe)"
        for text in said:
            assert re.match(rf"latentkv\.{op}: {first}: expected shape \[N={N + by}.*\], got \[{N}", text), text


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("op", [*WRITING, "write_cache_grouped_"])
def test_packed_formats_take_bf16_and_one_tensor(op: str, format: str, device: str) -> None:
    """What cannot be spoiled in one argument alone."""
    layer = "[0]" if op == "write_cache_grouped_" else ""
    for dtype in (torch.float16, torch.float32):
        said = set()
        for name in ("native", "reference"):
            call = valid(op, device, format=format)
            for argument in {"q_nope", "q_pe", "kv_c", "k_pe", "q_out", "kv_c_out", "kv_norm_weight"} & set(call):
                value = call[argument]
                call[argument] = [t.to(dtype) for t in value] if layer else value.to(dtype)
            said.add(message(name, op, call))
        got = str(dtype).removeprefix("torch.")
        assert said == {f"latentkv.{op}: kv_c{layer}: expected dtype bfloat16 for format {format}, got {got}"}
    said, argument = set(), "rope_caches" if layer else "rope_cache"
    for name in ("native", "reference"):
        call = valid(op, device, format=format)
        extra = [torch.zeros(BLOCKS, BLOCK_SIZE, 64, dtype=torch.uint8, device=device) for _ in range(G)]
        call[argument] = extra if layer else extra[0]
        said.add(message(name, op, call))
    assert said == {f"latentkv.{op}: {argument}{layer}: expected None for format {format}, got a tensor"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_weight_of_fp32_activations(dtype: torch.dtype, device: str) -> None:
    """One dtype alone will do, and the message names it once."""
    for name in ("native", "reference"):
        call = valid("decode_prologue", device)
        for argument in ("q_nope", "q_pe", "kv_c", "k_pe", "q_out", "kv_c_out"):
            call[argument] = call[argument].float()
        call["kv_norm_weight"] = call["kv_norm_weight"].to(dtype)
        text = f"expected dtype float32, got {str(dtype).removeprefix('torch.')}"
        assert message(name, "decode_prologue", call) == f"latentkv.decode_prologue: kv_norm_weight: {text}"


@pytest.mark.parametrize("op", OPS)
def test_checked_without_tokens_too(op: str, device: str) -> None:
    """An empty batch is a no-op, but not one that lets bad arguments through."""
    for name in ("native", "reference"):
        call = valid(op, device)
        per_token = {"positions", "q_nope", "q_pe", "q", "k", "k_pe", "kv_c", "slot_mapping", "q_out", "kv_c_out"}
        for argument in per_token & set(call):
            value = call[argument]
            call[argument] = [t[:0] for t in value] if isinstance(value, list) else value[:0]
        before = memory(call)
        run(name, op, call)
        assert memory(call) == before
        index = "positions" if op == "rope_" else "slot_mapping"
        call[index] = call[index].double()
        assert f"{index}: expected dtype int64 or int32, got float64" in message(name, op, call)


# -------------------------------------------------------------------------------------------------- devices


def elsewhere() -> list[str]:
    return ["meta", *(["cuda"] if torch.cuda.is_available() else [])]


def tensors_of(op: str) -> list[str]:
    return [a for a in ARGUMENTS[op] if a not in SETTINGS]


@pytest.mark.parametrize("other", elsewhere())
@pytest.mark.parametrize(("op", "argument"), [(op, a) for op in OPS for a in tensors_of(op)])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_wrong_device(name: str, op: str, argument: str, other: str, device: str) -> None:
    """One argument (of a list, its last) lies on another device than all the others: the call fails and says so.

    A meta tensor among real ones must not turn the call into a silent no-op.
    """
    if device == "cuda":
        other = "cpu" if other == "cuda" else other
    placement = "split" if argument in ("rope_cache", "rope_caches", "q_rope_out") else "concat"
    call = valid(op, device, placement)
    if isinstance(call[argument], list):
        call[argument][-1] = call[argument][-1].to(other)
        argument += f"[{G - 1}]"
    else:
        call[argument] = call[argument].to(other)
    here = "cuda:0" if device == "cuda" else device
    there = "cuda:0" if other == "cuda" else other
    text = message(name, op, call)
    devices = "(cpu|cuda|cuda:0|meta)"
    assert re.match(rf"latentkv\.{op}: [\w\[\]]+: expected a tensor on {devices}, got one on [\w:]+$", text), text
    lead = LEADS.get(op, "kv_c")
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


@pytest.mark.parametrize("op", [*WRITING, "write_cache_grouped_"])
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
        blamed, other = "rope_cache", "cache"
        if op == "write_cache_grouped_":
            call["caches"][1], call["rope_caches"][1] = pair(device, latent, rope)
            blamed, other = "rope_caches[1]", "caches[1]"
        else:
            call["cache"], call["rope_cache"] = pair(device, latent, rope)
        text = f"{blamed}: expected a tensor that shares no bytes with {other}, got overlapping memory"
        assert message(name, op, call) == f"latentkv.{op}: {text}"


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


def test_a_packed_cache_is_checked_when_it_is_wrapped(device: str) -> None:
    for format, row in (("fp8_ds_mla", 656), ("fp8_model1", 584)):
        layout = CacheLayout(*FORMATS[format].packed.dims, 4, format)  # type: ignore[union-attr,misc]
        good = torch.zeros(3, 4, row, dtype=torch.uint8, device=device)
        wide = torch.zeros(3, 4, row + 16, dtype=torch.uint8, device=device)
        for tensors, text in (
            ([good, good], "tensors: expected 1 for placement 'concat', got 2"),
            (good[..., :-1], f"tensors[0]: expected shape [3, 4, {row}], got [3, 4, {row - 1}]"),
            (good[:, :2], f"tensors[0]: expected shape [3, 4, {row}], got [3, 2, {row}]"),
            (good.to(torch.int8), f"tensors[0]: expected dtype torch.uint8 for format {format}, got torch.int8"),
            (
                good.view(torch.float8_e4m3fn),
                f"tensors[0]: expected dtype torch.uint8 for format {format}, got torch.float8_e4m3fn",
            ),
        ):
            with pytest.raises(ValueError, match=re.escape(text)):
                MLACache.wrap(tensors, layout)
        if format == "fp8_ds_mla":
            assert MLACache.wrap(wide, layout).data.shape == (3, 4, 672)
        else:
            apart = "tensors[0]: expected entries 584 bytes apart, as scales lie after a block's rows, got 600"
            with pytest.raises(ValueError, match=re.escape(apart)):
                MLACache.wrap(wide, layout)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"format": "fp8_ds_mla", "kv_lora_rank": 448},
            "(kv_lora_rank, rope_dim): expected (512, 64) for format fp8_ds_mla, got (448, 64)",
        ),
        (
            {"format": "fp8_model1"},
            "(kv_lora_rank, rope_dim): expected (448, 64) for format fp8_model1, got (512, 64)",
        ),
        (
            {"format": "fp8_ds_mla", "rope_dim": 0},
            "(kv_lora_rank, rope_dim): expected (512, 64) for format fp8_ds_mla, got (512, 0)",
        ),
        (
            {"format": "fp8_ds_mla", "placement": "split"},
            "placement: expected concat for format fp8_ds_mla, got split",
        ),
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


def test_errors_of_the_prologue_above_the_op(device: str) -> None:
    call = valid("decode_prologue", device)
    cache = CacheLayout(L, R, BLOCK_SIZE).allocate(BLOCKS, device)
    inputs = [call[a] for a in ("q_pe", "kv_c", "k_pe", "positions", "cos_sin_cache", "slot_mapping")]
    with pytest.raises(RuntimeError, match=r"^latentkv\.decode_prologue: q_out: expected a tensor, as q_nope is None"):
        latentkv.decode_prologue(None, *inputs, cache, is_neox=False)
    text = r"q_out: expected dtype torch\.float8_e5m2, as q_dtype, got torch\.bfloat16"
    with pytest.raises(RuntimeError, match=rf"^latentkv\.decode_prologue: {text}"):
        latentkv.decode_prologue(
            call["q_nope"], *inputs, cache, is_neox=False, q_out=call["q_out"], q_dtype=torch.float8_e5m2
        )
    for dtype, name in ((torch.uint8, "uint8"), (torch.float16, "float16"), (torch.float8_e5m2fnuz, "float8_e5m2fnuz")):
        with pytest.raises(RuntimeError, match=rf"q_out: expected dtype bfloat16 or float8_e4m3fn .*, got {name}$"):
            latentkv.decode_prologue(call["q_nope"], *inputs, cache, is_neox=False, q_dtype=dtype)
    for i, argument in enumerate(("q_pe", "kv_c")):
        flat = [*inputs[:i], inputs[i].flatten()[0], *inputs[i + 1 :]]
        with pytest.raises(RuntimeError, match=rf"{argument}: expected shape \[N.*\], got \[\]"):
            latentkv.decode_prologue(call["q_nope"], *flat, cache, is_neox=False)


def test_errors_of_the_grouped_write_above_the_op(device: str) -> None:
    call, layout = valid("write_cache_grouped_", device), CacheLayout(L, R, BLOCK_SIZE)
    kv_c, k_pe, slots = call["kv_c"], call["k_pe"], call["slot_mapping"]
    caches = [layout.allocate(BLOCKS, device) for _ in range(G)]
    for arguments, got in (
        ((kv_c[:1], k_pe, slots, caches), "1, 2, 2"),
        ((kv_c, k_pe[:1], slots, caches), "2, 1, 2"),
        ((kv_c, k_pe, slots, caches[:1]), "2, 2, 1"),
        (([], [], slots, []), "0, 0, 0"),
        ((torch.stack(kv_c)[:1], torch.stack(k_pe), slots, caches), "1, 2, 2"),
    ):
        text = f"latentkv.write_cache_grouped_: kv_c, k_pe, caches: expected equally many, at least 1, got {got}"
        with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
            latentkv.write_cache_grouped_(*arguments)
    for other in (
        CacheLayout(L, R, 2),
        CacheLayout(L, R, BLOCK_SIZE, "fp8_e4m3fn"),
        CacheLayout(L, R, 4, "bf16", "split"),
    ):
        text = f"caches[1]: expected the layout of caches[0], {layout}, got {other}"
        with pytest.raises(RuntimeError, match=re.escape(text)):
            latentkv.write_cache_grouped_(kv_c, k_pe, slots, [caches[0], other.allocate(BLOCKS, device)])
    with pytest.raises(
        RuntimeError, match=r"caches\[1\]: expected the blocks of caches\[0\]: \[3, 4, 24\], got \[2, 4"
    ):
        latentkv.write_cache_grouped_(kv_c, k_pe, slots, [caches[0], layout.allocate(2, device)])


@pytest.mark.parametrize("name", ["native", "reference"])
def test_repeated_rows_may_be_read(name: str, device: str) -> None:
    """What an op does not mutate may overlap itself; a cache of one row may have any strides."""
    latent, rope = (torch.zeros(1, 1, w, device=device).expand(1, 2, w)[:, :1] for w in (L, R))
    cache = MLACache.wrap([latent, rope], CacheLayout(L, R, 1, "fp32", "split"))
    ones, slots = torch.ones(1, L, device=device), torch.tensor([0, -1], device=device)
    repeated = torch.ones(1, R, device=device).expand(2, R)
    getattr(providers, name).write_cache_(ones.expand(2, L), repeated, slots, cache)
    assert cache.data.sum() == L and cache.rope_data is not None and cache.rope_data.sum() == R

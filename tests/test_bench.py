"""The benchmark's arithmetic, inputs, peers and files. Nothing here asserts a time."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import engine_ops
import pytest
import torch
from latentkv import CacheLayout, providers
from latentkv.cache.layouts import FORMATS
from latentkv.cli import OpName
from latentkv.cli.benchmark import (
    FUSED,
    INDEXER,
    OPS,
    PROLOGUE,
    READS,
    VARIANTS,
    VLLM,
    Bench,
    FlashInfer,
    PeerError,
    Row,
    Timing,
    Update,
    environment,
    plot,
    read_csv,
    summary,
    time_calls,
    timing,
    write_csv,
)
from latentkv.cli.benchmark.contenders import plain_call, plain_prologue, plain_update, provider_call, torch_op_call
from latentkv.cli.benchmark.inputs import GROUPED, LAYERS, IndexerKeys, Layers, Prologue, bytes_moved
from latentkv.models import MODELS, model
from latentkv.ops import reference
from latentkv.ops.schemas import OP_NAMES
from latentkv.testing import assert_same_bytes

CPU = torch.device("cpu")
CONCAT = CacheLayout(512, 64, 64, "bf16")
FP8 = CacheLayout(512, 64, 64, "fp8_e4m3fn")
WRITES = [op for op in OPS if op not in READS]
DS_MLA = CacheLayout(512, 64, 64, "fp8_ds_mla")
MODEL1 = CacheLayout(448, 64, 64, "fp8_model1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times too short to mean anything."""
    monkeypatch.setattr(timing, "_CPU_SECONDS", 0.0)
    monkeypatch.setattr("latentkv.cli.benchmark.streamed_bandwidth", lambda device: 100.0)


def bench(name: str = "deepseek-v3", *peers: VLLM | FlashInfer) -> Bench:
    return Bench(model(name), CPU, peers)


def test_the_command_line_knows_every_op() -> None:
    assert get_args(OpName) == OP_NAMES


def test_percentiles() -> None:
    assert Timing.of([float(i) for i in range(101)]) == Timing(20.0, 50.0, 80.0)


def test_time_calls_goes_round_over_all_sets() -> None:
    seen: list[int] = []
    times = time_calls([lambda i=i: seen.append(i) for i in range(3)], CPU)  # type: ignore[misc]
    assert seen[:6] == [0, 1, 2, 0, 1, 2]
    assert 0 <= times.p20 <= times.p50 <= times.p80


def test_bytes_moved() -> None:
    # One token of DeepSeek's, 16 heads: q and k in and out, a table row, kv_c, the row, position and slot.
    q, k, table, latent, row, index = 16 * 128, 128, 128, 1024, 1152, 8
    rope, write = 2 * q + 2 * k + table + index, latent + row + index
    assert bytes_moved(FUSED, 16, 1, CONCAT) == rope + write
    assert bytes_moved("rope_", 16, 1, CONCAT) == rope
    assert bytes_moved("write_cache_", 16, 1, CONCAT) == write + k
    assert bytes_moved(FUSED, 16, 1, CONCAT, rotates=False) == write + k
    assert bytes_moved(FUSED, 16, 7, FP8) == 7 * (rope + write - row // 2)


def test_bytes_moved_by_the_later_ops() -> None:
    # One token: the query in and out, kv_c and k_pe, the row, angles in fp32, position and slot.
    query, kv, angles, index = 16 * 1152, 1152, 256, 8
    rest = kv + angles + 2 * index
    assert bytes_moved(PROLOGUE, 16, 1, CONCAT) == 2 * query + rest + 1152
    assert bytes_moved(PROLOGUE, 16, 3, CONCAT, variant="norm") == 3 * (2 * query + rest + 1152) + 1024
    assert bytes_moved(PROLOGUE, 16, 1, FP8) == query + query // 2 + rest + 576
    assert bytes_moved(PROLOGUE, 16, 1, DS_MLA) == 2 * query + rest + 656
    assert bytes_moved(PROLOGUE, 16, 1, MODEL1) == 2 * 16 * 1024 + 1024 + angles + 2 * index + 584
    assert bytes_moved(PROLOGUE, 16, 1, CONCAT, rotates=False) == 2 * query + kv + index + 1152
    assert bytes_moved(GROUPED, 0, 5, FP8) == 5 * (LAYERS * (kv + 576) + index)
    assert bytes_moved(INDEXER, 0, 5, CONCAT) == 5 * (256 + 132 + angles + 2 * index)


@pytest.mark.parametrize("name", MODELS)
def test_inputs_are_an_engines(name: str) -> None:
    m = model(name)
    layout = CacheLayout(m.kv_lora_rank, m.rope_dim)
    x = bench(name).inputs(FUSED, 4, 33, layout)
    assert isinstance(x, Update)
    assert x.q_pe.shape == (33, 4, m.rope_dim)
    assert x.q_pe.stride() == (4 * (m.nope_dim + m.rope_dim), m.nope_dim + m.rope_dim, 1)
    assert x.k_pe.stride() == (m.kv_lora_rank + m.rope_dim, 1)
    assert x.kv_c.is_contiguous()
    assert len(set(x.slots.tolist())) == 33
    assert (x.positions is None) == (m.rope is None)
    again = bench(name).inputs(FUSED, 4, 33, layout)
    assert isinstance(again, Update)
    assert_same_bytes(again.q, x.q)


@pytest.mark.parametrize(
    ("layout", "q_dtype"), [(CONCAT, torch.bfloat16), (FP8, torch.float8_e4m3fn), (DS_MLA, torch.bfloat16)]
)
def test_a_prologues_inputs_are_an_engines(layout: CacheLayout, q_dtype: torch.dtype) -> None:
    x = bench().inputs(PROLOGUE, 4, 33, layout)
    assert isinstance(x, Prologue)
    assert x.q_nope.shape == (33, 4, 512)
    assert x.q_nope.transpose(0, 1).is_contiguous()
    assert x.kv_c.stride() == x.k_pe.stride() == (576, 1)
    assert x.q_pe.stride() == (4 * 192, 192, 1)
    assert x.table is not None and x.table.dtype == torch.float32
    assert x.q_out.dtype == q_dtype
    assert x.kv_norm_weight is None
    normed = bench().inputs(PROLOGUE, 4, 33, layout, "norm")
    assert isinstance(normed, Prologue) and normed.kv_norm_weight is not None
    assert_same_bytes(normed.q_nope, x.q_nope)


def test_inputs_of_the_other_ops() -> None:
    layers = bench().inputs(GROUPED, 0, 5, FP8)
    assert isinstance(layers, Layers)
    assert len(layers.caches) == len(layers.kv_c) == LAYERS
    assert layers.k_pe.stride() == (5 * 576, 576, 1)
    keys = bench().inputs(INDEXER, 0, 5, CONCAT, "power of two")
    assert isinstance(keys, IndexerKeys)
    assert keys.power_of_two and keys.is_neox
    assert keys.k.is_contiguous()


@pytest.mark.parametrize(
    ("op", "variant", "layout"),
    [
        (op, variant, CacheLayout(*(f.packed.dims if f.packed else (512, 64)), 64, f.name, placement))
        for op in OPS
        for variant in VARIANTS.get(op, ("",))
        for f in FORMATS.values()
        if f.name in ("bf16", "fp8_e4m3fn", "fp8_e5m2") or f.packed
        for placement in ("concat", "split")
        if placement == "concat" or not f.packed
    ],
    ids=lambda value: f"{value.format}-{value.placement}" if isinstance(value, CacheLayout) else str(value),
)
def test_every_way_to_call_gives_the_same_bytes(op: str, variant: str, layout: CacheLayout) -> None:
    runner = bench("deepseek-v4" if layout.kv_lora_rank == 448 else "deepseek-v3")
    expected, public, torch_op, plain = (runner.inputs(op, 3, 9, layout, variant) for _ in range(4))
    provider_call(providers.reference, op, expected)()
    provider_call(providers.public, op, public)()
    torch_op_call(op, torch_op)()
    computed = [public, torch_op]
    if isinstance(plain, Update) and not layout.packed and variant != "norm":  # PyTorch's norm adds up in its own order
        plain_call(plain_prologue if op == PROLOGUE else plain_update, op, plain)()
        computed.append(plain)
    for actual in computed:
        for name, tensor in expected.written.items():
            assert_same_bytes(actual.written[name], tensor)


def test_measure_compares_and_times() -> None:
    rows = bench().measure(FUSED, 4, 5, CONCAT)
    assert [r.contender for r in rows] == ["latentkv fused", "latentkv pair", "reference"]
    for row in rows:
        assert (row.qk_differs_percent, row.cache_differs_percent, row.wrong) == (0, 0, False)
        assert row.timing == "wall"
        assert row.p50_us
        assert row.gb_s
        assert row.times_empty is None
        assert row.share_of_streamed == pytest.approx(row.gb_s / 100)
        assert row.baseline == "reference"
        assert row.speedup
    assert rows[-1].speedup == 1


def test_measure_finds_wrong_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = providers.public.rope_write_cache_

    def off_by_one_bit(positions: torch.Tensor, q_pe: torch.Tensor, *args: object, **kwargs: object) -> None:
        right(positions, q_pe, *args, **kwargs)  # type: ignore[arg-type]
        q_pe.view(torch.int16)[0, 0, 0] ^= 1

    monkeypatch.setattr(providers.public, "rope_write_cache_", off_by_one_bit)
    fused, pair, *_ = bench().measure(FUSED, 4, 5, CONCAT)
    assert fused.wrong
    assert not pair.wrong
    assert fused.qk_differs_percent == pytest.approx(100 / (5 * 5 * 128))
    assert fused.cache_differs_percent == 0


def test_a_model_without_rotation_has_no_pair() -> None:
    rows = bench("kimi-k3").measure(FUSED, 4, 5, CONCAT)
    assert [r.contender for r in rows] == ["latentkv fused", "reference"]


# What vLLM's ops demand and do, by its published schemas and sources, computed here by the reference.
_FORMATS = {"auto": "bf16", "fp8": "fp8_e4m3fn", "fp8_e5m2": "fp8_e5m2", "fp8_ds_mla": "fp8_ds_mla"}


def _rope(positions, q, k, size, table, is_neox, offset=0, inverse=False) -> None:  # type: ignore[no-untyped-def]
    turned = table.shape[1]
    reference.rope_(positions, q[..., :turned], k, table, is_neox, inverse)
    assert q.shape[-1] == size and offset == 0


def _norm(out, x, weight, eps) -> None:  # type: ignore[no-untyped-def]
    assert out.is_contiguous()
    out.copy_(reference.rms_norm(x, weight, eps))


def _static_quant(out, x, scale, group_shape=None) -> None:  # type: ignore[no-untyped-def]
    assert out.is_contiguous() and x.is_contiguous()
    out.view(torch.uint8).copy_(reference.quantise(x.float() * (1 / scale), FORMATS["fp8_e4m3fn"]))


def _kimi(nope, pe, kv_c, k_pe, out, cache, slots, size, positions, table, q_inv=None, inv=None, format="bf16"):  # type: ignore[no-untyped-def]
    assert kv_c.is_contiguous() and out.is_contiguous()
    assert cache.shape[1] == size
    assert table is None or table.dtype == torch.float32
    scales = [None if x is None else 1 / x for x in (inv, q_inv)]
    reference.decode_prologue(
        nope, pe, kv_c, k_pe, positions, table, slots, cache, None, scales[0], format,
        out, None, None, scales[1], None, False,
    )  # fmt: skip


def _kimi_fp8(nope, pe, kv_c, k_pe, out, cache, slots, q_inv, inv, size, positions=None, table=None) -> None:  # type: ignore[no-untyped-def]
    assert out.dtype == cache.dtype == torch.float8_e4m3fn
    _kimi(nope, pe, kv_c, k_pe, out, cache, slots, size, positions, table, q_inv, inv, "fp8_e4m3fn")


def _kimi_ds_mla(*args: Any) -> None:
    _kimi(*args, format="fp8_ds_mla")


def _v4_insert(kv, cache, slots, positions, table, size, fp8_scale=None, kv_mxfp8=False) -> None:  # type: ignore[no-untyped-def]
    assert kv.is_contiguous() and kv.shape[1] == 512 and table.dtype == torch.float32 and not kv_mxfp8
    rope = kv[:, 448:].clone()
    reference.rope_(positions, rope[:, None], None, table, False)
    reference.write_cache_(kv[:, :448], rope, slots, cache, None, None, "fp8_model1")


def _write(kv_c, k, cache, slots, dtype, scale, skip_scale=False) -> None:  # type: ignore[no-untyped-def]
    reference.write_cache_(kv_c, k, slots, cache, None, scale, _FORMATS[dtype])


def _fused(positions, q, k, kv_c, table, is_neox, slots, cache, dtype, scale) -> None:  # type: ignore[no-untyped-def]
    reference.rope_write_cache_(positions, q, k, kv_c, table, slots, cache, None, scale, _FORMATS[dtype], is_neox)


def _grouped(kv_c, k, addresses, slots, size, block, entry, scales=None, dtype="auto") -> None:  # type: ignore[no-untyped-def]
    element = torch.bfloat16 if dtype == "auto" else torch.uint8
    assert slots.shape == kv_c.shape[:2] and (scales is None) == (dtype == "auto")
    for i, address in enumerate(addresses.tolist()):
        blocks = int(slots.max()) // size + 1
        memory = (ctypes.c_char * (blocks * block * element.itemsize)).from_address(address)
        cache = torch.frombuffer(memory, dtype=element).as_strided((blocks, size, 576), (block, entry, 1))
        _write(kv_c[i], k[i], cache, slots[i], dtype, None if scales is None else scales[i : i + 1])


def _indexer(k, cache, slots, size, scale_fmt) -> None:  # type: ignore[no-untyped-def]
    assert k.is_contiguous() and k.shape[1] == size == 128
    reference.write_indexer_cache_(k, None, None, slots, cache, False, scale_fmt == "ue8m0")


_KIMI = "fused_kimi_k3_mla_decode_q_concat"
_HEADS = "Tensor ql_nope, Tensor q_pe, Tensor kv_c_normed, Tensor k_pe, Tensor! mqa_q, Tensor! k_cache, Tensor slots"
_TURN = "int cache_block_size, Tensor? position_ids=None, Tensor? cos_sin_cache=None"
_VLLM: dict[str, dict[str, Callable[..., None]]] = {
    "_C_cache_ops": {
        "concat_and_cache_mla_rope_fused(Tensor positions, Tensor! q_pe, Tensor! k_pe, Tensor kv_c,"
        " Tensor cos_sin_cache, bool is_neox, Tensor slot_mapping, Tensor! kv_cache, str kv_cache_dtype,"
        " Tensor kv_cache_scale) -> ()": _fused,
        "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor! kv_cache, Tensor slot_mapping,"
        " str kv_cache_dtype, Tensor scale, bool skip_scale=False) -> ()": _write,
        "concat_and_cache_mla_grouped(Tensor kv_c, Tensor k_pe, Tensor kv_cache_ptrs, Tensor slot_mapping,"
        " int block_size, int block_stride, int entry_stride, Tensor? kv_scales=None,"
        " str kv_cache_dtype='auto') -> ()": _grouped,
        "indexer_k_quant_and_cache(Tensor k, Tensor! kv_cache, Tensor slot_mapping, int quant_block_size,"
        " str kv_cache_dtype) -> ()": _indexer,
    },
    "_C": {
        "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache,"
        " bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()": _rope,
        "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()": _norm,
        "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()": (
            _static_quant
        ),
        f"{_KIMI}_kv_cache_insert({_HEADS}, {_TURN}) -> ()": _kimi,
        f"{_KIMI}_kv_cache_fp8_insert({_HEADS}, Tensor q_scale_inv, Tensor cache_scale_inv, {_TURN}) -> ()": _kimi_fp8,
        f"{_KIMI}_ds_mla_insert({_HEADS}, {_TURN}) -> ()": _kimi_ds_mla,
        "fused_deepseek_v4_kv_rope_insert(Tensor kv, Tensor! k_cache, Tensor slot_mapping, Tensor position_ids,"
        " Tensor cos_sin_cache, int cache_block_size, Tensor? fp8_scale=None, bool kv_mxfp8=False) -> ()": _v4_insert,
    },
}


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's ops under its names, but in namespaces of their own: a process registers an op only once."""
    with contextlib.ExitStack() as stack:
        for namespace, kernels in _VLLM.items():
            own = f"latentkv_tests{namespace}"
            library = stack.enter_context(torch.library._scoped_library(own, "FRAGMENT"))
            for schema, kernel in kernels.items():
                library.define(schema)
                library.impl(schema.partition("(")[0], kernel, "CPU")
            monkeypatch.setattr(torch.ops, namespace, getattr(torch.ops, own))
        package = ModuleType("vllm")
        package.__version__ = "0.33.0"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", package)
        monkeypatch.setitem(sys.modules, "vllm._custom_ops", ModuleType("vllm._custom_ops"))
        yield


def test_compiled_graphs_call_vllm_by_the_same_schemas(fake_vllm: None) -> None:
    """The ops that other tests compile graphs from; registered for good, they go beside those here."""
    schemas = {f"{ns}::{s.partition('(')[0]}": s[s.index("(") :] for ns, kernels in _VLLM.items() for s in kernels}
    both = schemas.keys() & engine_ops.STAND_INS.keys()
    assert both == {"_C::rotary_embedding", "_C_cache_ops::concat_and_cache_mla"}
    for name in both:
        assert engine_ops.STAND_INS[name][0] == schemas[name]


_VLLM_NAMES = {
    FUSED: ["vllm fused", "vllm pair"],
    PROLOGUE: ["vllm kimi-k3", "vllm chain"],
    INDEXER: ["vllm pair"],
}


@pytest.mark.parametrize(
    ("op", "variant", "layout"),
    [
        *((op, variant, layout) for op in WRITES for variant in VARIANTS.get(op, ("",)) for layout in (CONCAT, FP8)),
        *((op, "", CacheLayout(512, 64, 64, "fp8_e5m2")) for op in (FUSED, "write_cache_", GROUPED)),
        *((op, "", DS_MLA) for op in (FUSED, "write_cache_")),
        *((PROLOGUE, variant, DS_MLA) for variant in ("", "norm")),
        ("write_cache_", "", MODEL1),
    ],
    ids=lambda value: value.format if isinstance(value, CacheLayout) else str(value),
)
def test_vllm_is_called_by_its_schemas(op: str, variant: str, layout: CacheLayout, fake_vllm: None) -> None:
    peer = VLLM(CPU)
    assert peer.version == "0.33.0"
    name = "deepseek-v4" if layout.kv_lora_rank == 448 else "deepseek-v3"
    rows = bench(name, peer).measure(op, 4, 5, layout, variant)
    theirs = [r for r in rows if r.contender.startswith("vllm")]
    names = _VLLM_NAMES.get(op, ["vllm"])
    if variant == "norm":
        names = ["vllm rms_norm + kimi-k3", "vllm chain"]
    if op == FUSED and layout.packed:
        names = names[1:]
    assert [r.contender for r in theirs] == names
    for row in theirs:
        assert row.p50_us, row.note
        assert not row.qk_differs_percent
        assert row.cache_differs_percent == 0
        noted = row.contender == "vllm kimi-k3" or layout.format == "fp8_model1"
        assert bool(row.note) == noted, row.note
    assert {r.baseline for r in rows} == {names[0]}


def test_vllm_rotates_no_neox_pairs_in_its_prologue(fake_vllm: None) -> None:
    runner = Bench(replace(model("deepseek-v3"), is_neox=True), CPU, (VLLM(CPU),))
    rows = {r.contender: r for r in runner.measure(PROLOGUE, 4, 5, CONCAT)}
    assert rows["vllm kimi-k3"].note == "it rotates pairs (2i, 2i + 1) only"
    assert rows["vllm chain"].qk_differs_percent == 0


def test_vllm_without_rotation(fake_vllm: None) -> None:
    rows = bench("kimi-k3", VLLM(CPU)).measure(PROLOGUE, 4, 5, FP8)
    theirs = [r for r in rows if r.contender.startswith("vllm")]
    assert [(r.contender, r.qk_differs_percent) for r in theirs] == [("vllm kimi-k3", 0), ("vllm chain", 0)]


@pytest.mark.parametrize(
    ("name", "op", "layout"),
    [
        ("kimi-k3", FUSED, CONCAT),
        ("deepseek-v3", FUSED, CacheLayout(block_size=1)),
        ("deepseek-v3", FUSED, CacheLayout(placement="split")),
        ("deepseek-v4", PROLOGUE, MODEL1),
    ],
)
def test_vllm_says_what_it_cannot_do(name: str, op: str, layout: CacheLayout, fake_vllm: None) -> None:
    rows = bench(name, VLLM(CPU)).measure(op, 4, 5, layout)
    row = next(r for r in rows if r.contender == "vllm")
    assert row.p50_us is None
    assert row.note.startswith("it ")


@pytest.fixture
def fake_flashinfer(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """FlashInfer's function, as its sources have it, on the reference; gives who asked for overlap."""
    overlaps: list[bool] = []

    def append(  # type: ignore[no-untyped-def]
        q_rope, k_rope, q_nope, k_nope, v, cos_sin_cache, pos_ids, paged_kv_cache, kv_indices, kv_indptr,
        batch_indices, positions, is_neox=True, quantize_dtype=None, quant_scale_q=1.0, quant_scale_kv=1.0,
        page_size=16, kv_layout="NHD", q_rope_out=None, q_nope_out=None, enable_pdl=False,
    ) -> None:  # fmt: skip
        ckv, kpe = paged_kv_cache
        assert v is None and k_rope.dim() == 2 and cos_sin_cache.dtype == torch.float32
        assert kv_indices.dtype == batch_indices.dtype == positions.dtype == torch.int32
        assert ckv.dtype == kpe.dtype == q_rope_out.dtype
        assert ckv.shape[1:] == (page_size, 512) and kpe.shape[1:] == (page_size, 64)
        scales = [torch.tensor([1 / x]) for x in (quant_scale_kv, quant_scale_q)]
        slots = kv_indices[kv_indptr[batch_indices] + positions // page_size] * page_size + positions % page_size
        reference.decode_prologue(
            q_nope, q_rope, k_nope, k_rope, pos_ids, cos_sin_cache, slots, ckv, kpe, scales[0],
            "fp8_e4m3fn", q_nope_out, q_rope_out, None, scales[1], None, is_neox,
        )  # fmt: skip
        overlaps.append(enable_pdl)

    package, rope = ModuleType("flashinfer"), ModuleType("flashinfer.rope")
    package.__version__ = "0.7.2"  # type: ignore[attr-defined]
    rope.rope_quantize_fp8_append_paged_kv_cache = append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.rope", rope)
    return overlaps


@pytest.mark.parametrize("is_neox", [False, True])
def test_flashinfer_is_called_by_its_signature(is_neox: bool, fake_flashinfer: list[bool]) -> None:
    peer = FlashInfer(CPU)
    assert peer.version == "0.7.2"
    runner = Bench(replace(model("deepseek-v3"), is_neox=is_neox), CPU, (peer,))
    rows = [r for r in runner.measure(PROLOGUE, 4, 5, FP8) if r.contender.startswith("flashinfer")]
    assert [r.contender for r in rows] == ["flashinfer", "flashinfer, no overlap"]
    for row in rows:
        assert row.p50_us, row.note
        assert (row.qk_differs_percent, row.cache_differs_percent) == (0, 0)
    assert set(fake_flashinfer) == {True, False}


def test_flashinfer_says_what_it_cannot_do(fake_flashinfer: list[bool]) -> None:
    runner = bench("deepseek-v3", FlashInfer(CPU))
    for layout, variant in ((CONCAT, ""), (FP8, "norm"), (DS_MLA, "")):
        row = next(r for r in runner.measure(PROLOGUE, 4, 5, layout, variant) if r.contender == "flashinfer")
        assert row.p50_us is None
        assert row.note.startswith("its op does")
    assert not any("flashinfer" in r.contender for r in runner.measure(FUSED, 4, 5, CONCAT))


def test_missing_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(PeerError, match="flashinfer"):
        FlashInfer(CPU)


def test_missing_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PeerError, match="vllm"):
        VLLM(CPU)
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(PeerError, match=r"broken\.so"):
        VLLM(CPU, broken)


def test_a_failing_peer_is_a_note(fake_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: VLLM, x: Update) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(VLLM, "_fused_call", fail)
    rows = {r.contender: r for r in bench("deepseek-v3", VLLM(CPU)).measure(FUSED, 4, 5, CONCAT)}
    assert rows["vllm fused"].note == "RuntimeError: no kernel image"
    assert rows["latentkv fused"].baseline == "vllm pair"


def test_what_nobody_wrote_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    runner = Bench(model("deepseek-v3"), CPU, compiled=True)
    for op, layout, is_there in ((PROLOGUE, FP8, True), (PROLOGUE, DS_MLA, False), (GROUPED, FP8, False)):
        row = next(r for r in runner.measure(op, 4, 5, layout) if r.contender == "torch.compile")
        assert bool(row.p50_us) == is_there, row.note


def some_rows() -> list[Row]:
    dims: dict[str, Any] = {"op": FUSED, "model": "deepseek-v3", "kv_lora_rank": 512, "rope_dim": 64}
    rows = [
        Row(
            **dims,
            heads=heads,
            tokens=tokens,
            format=format,
            contender=name,
            timing="graph",
            variant=variant,
            p20_us=factor,
            p50_us=factor * (2 + tokens / 64),
            p80_us=9.0,
            bytes=5000 * tokens,
            streamed_gb_s=3000.0,
            empty_us=0.85,
            baseline="vllm fused",
            baseline_us=1.5 * (2 + tokens / 64),
            qk_differs_percent=0.0,
            note="a, note",
        )
        for heads in (16, 128)
        for format in ("bf16", "fp8_e4m3fn")
        for tokens in (32, 64, 1024)
        for variant in ("", "norm")
        for name, factor in (("latentkv fused", 1.0), ("vllm fused", 1.5))
    ]
    return [
        *rows,
        Row(**dims, heads=16, tokens=1, format="bf16", contender="latentkv.x", timing="host", p50_us=8.0),
    ]


def test_csv_round_trip(tmp_path: Path) -> None:
    path, facts = tmp_path / "x.csv", environment(CPU)
    write_csv(path, some_rows(), facts)
    assert read_csv(path) == (some_rows(), facts)
    with path.open(newline="") as file:
        line = next(csv.DictReader(file))
    assert float(line["speedup"]) == 1.5
    assert float(line["times_empty"]) == pytest.approx(2.5 / 0.85, rel=1e-5)
    assert float(line["share_of_streamed"]) == pytest.approx(float(line["gb_s"]) / 3000, rel=1e-5)
    assert line["torch"] == torch.__version__


def test_the_committed_files_can_be_read(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "results"
    old = folder / "2026-11-22-h100-rope_write_cache.csv"  # before there were variants
    assert {row.variant for row in read_csv(old)[0]} == {""}
    for path in folder.glob("2*.csv"):
        rows, facts = read_csv(path)
        write_csv(tmp_path / path.name, rows, facts)
        assert read_csv(tmp_path / path.name) == (rows, facts)


def test_summary() -> None:
    def slower(row: Row, name: str, factor: float) -> Row:
        assert row.p50_us
        return replace(row, contender=name, p50_us=factor * row.p50_us)

    ours = [r for r in some_rows() if r.contender == "latentkv fused"]
    rows = [*ours, *(slower(r, "vllm fused", 1.5 if r.heads == 128 else 3) for r in ours)]
    rows += [slower(r, "flashinfer", 2) for r in ours]
    faster = summary(rows)
    assert list(faster) == [
        (f"{format}{variant}", other)
        for format in ("bf16", "fp8_e4m3fn")
        for variant in ("", ", norm")
        for other in ("vllm fused", "flashinfer", "the fastest")
    ]
    for (_, other), by_own in faster.items():
        least, mean = by_own["latentkv fused"]
        assert least == pytest.approx({"flashinfer": 2}.get(other, 1.5))
        assert mean == pytest.approx({"vllm fused": 4.5**0.5, "flashinfer": 2, "the fastest": 3**0.5}[other])
    assert summary([]) == {}


@pytest.mark.parametrize("text", ["", "op,model\nrope_,x\n", "nothing"])
def test_a_foreign_csv(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a CSV file by latentkv bench"):
        read_csv(path)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"x.{suffix}"
    plot(some_rows(), path, "a GPU")
    assert path.stat().st_size > 10_000
    if suffix == "svg":
        assert "matplotlib" in path.read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(providers.served_by["cuda"] != "native", reason="no native GPU kernels")
def test_on_a_gpu() -> None:
    runner = Bench(model("deepseek-v3"), torch.device("cuda"))
    rows = []
    for op in OPS:
        for variant in VARIANTS.get(op, ("",)):
            rows += runner.measure(op, 16, 8, CONCAT, variant)
        rows += runner.measure_host(op, 16, CONCAT)
    assert all(r.p50_us and not r.wrong for r in rows)
    assert {r.timing for r in rows} == {"graph", "host"}

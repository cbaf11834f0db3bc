"""The benchmark of the ops that read: their inputs, vLLM's gathering ops, and the readers of benchmarks/readers.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from latentkv import CacheLayout, MLACache, layout_for, providers
from latentkv.cli import app
from latentkv.cli.benchmark import CONVERT, GATHER, OPS, VARIANTS, VLLM, Bench, timing
from latentkv.cli.benchmark.contenders import provider_call, torch_op_call
from latentkv.cli.benchmark.inputs import CONVERSIONS, Conversion, Gather, bytes_moved, random_inputs, random_rows
from latentkv.models import model
from latentkv.ops import reference
from latentkv.testing import assert_same_bytes
from typer.testing import CliRunner

CPU = torch.device("cpu")
CONCAT, FP8 = CacheLayout(512, 64, 64, "bf16"), CacheLayout(512, 64, 64, "fp8_e4m3fn")
DS_MLA, MODEL1 = CacheLayout(512, 64, 64, "fp8_ds_mla"), CacheLayout(448, 64, 64, "fp8_model1")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "readers.py"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times too short to mean anything."""
    monkeypatch.setattr(timing, "_CPU_SECONDS", 0.0)
    monkeypatch.setattr("latentkv.cli.benchmark.streamed_bandwidth", lambda device: 100.0)


def inputs(op: str, variant: str, layout: CacheLayout, tokens: int, seed: int = 0) -> Any:
    return random_inputs(
        op, variant, model("deepseek-v3"), 0, tokens, layout, None, torch.Generator().manual_seed(seed)
    )


def test_every_op_but_attention_is_timed() -> None:
    assert {GATHER, CONVERT} < set(OPS)
    assert "mla_decode" not in OPS
    result = CliRunner().invoke(app, ["bench", "--op", "mla_decode", "--device", "cpu"])
    assert result.exit_code == 2
    assert "benchmarks/readers.py" in result.output


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 512, 1000])
def test_gathered_sequences(tokens: int) -> None:
    x = inputs(GATHER, "", CONCAT, tokens)
    assert isinstance(x, Gather)
    assert sum(x.lengths) == len(x.out) == tokens
    assert x.cu_seq_lens.diff().tolist() == list(x.lengths)
    assert min(x.lengths) > 0
    assert len(x.lengths) == min(8, -(-tokens // 64))
    assert x.block_table.unique().numel() == x.block_table.numel()
    assert x.cache.num_blocks == 2 * x.block_table.numel()
    assert x.block_table.dtype == x.cu_seq_lens.dtype == torch.int32


@pytest.mark.parametrize("variant", CONVERSIONS)
def test_converted_rows(variant: str) -> None:
    x = inputs(CONVERT, variant, CONCAT, 130)
    assert isinstance(x, Conversion)
    assert x.src.num_slots == x.dst.num_slots == 192
    for blocks, cache in ((x.src_blocks, x.src), (x.dst_blocks, x.dst)):
        assert blocks.sort().values.tolist() == list(range(cache.num_blocks))


def test_fnuz_to_fn_keeps_nearly_all_bytes() -> None:
    x = inputs(CONVERT, "to fp8_e4m3fn", CONCAT, 64)
    provider_call(providers.reference, CONVERT, x)()
    before, after = (c.data.view(torch.uint8)[b.long()] for c, b in ((x.src, x.src_blocks), (x.dst, x.dst_blocks)))
    assert float((before == after).float().mean()) > 0.999


def test_bytes_moved() -> None:
    assert bytes_moved(GATHER, 0, 65, CONCAT) == 65 * 2 * 1152 + 2 * 4
    assert bytes_moved(GATHER, 0, 64, FP8) == 64 * (576 + 1152) + 4
    assert bytes_moved(GATHER, 0, 64, DS_MLA) == 64 * (656 + 1152) + 4
    assert bytes_moved(CONVERT, 0, 1, CONCAT, variant="to fp8") == 64 * (1152 + 576) + 8
    assert bytes_moved(CONVERT, 0, 65, CONCAT, variant="blocks of 16 to split blocks of 64") == 128 * 2 * 1152 + 40


@pytest.mark.parametrize(
    ("op", "variant", "layout"),
    [
        *((GATHER, "", layout) for layout in (CONCAT, FP8, DS_MLA, MODEL1, CacheLayout(placement="split"))),
        *((CONVERT, variant, CONCAT) for variant in VARIANTS[CONVERT]),
    ],
    ids=lambda value: value.format if isinstance(value, CacheLayout) else str(value),
)
def test_every_way_to_call_gives_the_same_bytes(op: str, variant: str, layout: CacheLayout) -> None:
    expected, public, torch_op = (inputs(op, variant, layout, 200) for _ in range(3))
    provider_call(providers.reference, op, expected)()
    provider_call(providers.public, op, public)()
    torch_op_call(op, torch_op)()
    for actual in (public, torch_op):
        for name, tensor in expected.written.items():
            assert_same_bytes(actual.written[name], tensor)


def test_measured_rows() -> None:
    runner = Bench(model("deepseek-v3"), CPU, compiled=True)
    for row in runner.measure(GATHER, 0, 70, FP8):
        assert (row.contender == "torch.compile") == (row.p50_us is None)
        if row.p50_us:
            assert (row.qk_differs_percent, row.cache_differs_percent) == (0, None)
    for variant, kind in zip(VARIANTS[CONVERT], ("bf16", "fp8_e4m3fnuz", "bf16"), strict=True):
        row, *_ = runner.measure(CONVERT, 0, 70, CONCAT, variant)
        assert row.kind == f"{kind}, {variant}"
        assert (row.qk_differs_percent, row.cache_differs_percent) == (None, 0)


# ------------------------------------------------------------------------------------------------- vLLM's gathering ops


def _gather(src, dst, table, cu, token_to_seq, num_tokens, dtype, scale, starts) -> None:  # type: ignore[no-untyped-def]
    assert num_tokens == len(dst) == len(token_to_seq) and starts is None and token_to_seq.dtype == torch.int32
    assert (dtype == "auto") == (src.dtype == dst.dtype)
    assert [int((token_to_seq == i).sum()) for i in range(len(table))] == cu.diff().tolist()
    reference.gather_cache(src, None, scale, "bf16" if dtype == "auto" else "fp8_e4m3fn", table, cu, dst, 512)


def _copy(src, dst, table, cu, batch_size, starts) -> None:  # type: ignore[no-untyped-def]
    assert batch_size == len(table) and src.dtype == dst.dtype
    reference.gather_cache(src, None, None, "bf16", table, cu, dst, 512)


def _upconvert(src, dst, table, starts, batch_size, *rest) -> None:  # type: ignore[no-untyped-def]
    assert batch_size == len(table) == len(starts) and not any(x is not None for x in rest)
    cu = torch.cat([starts, starts.new_tensor([len(dst)])])
    reference.gather_cache(src, None, None, "fp8_ds_mla", table, cu, dst, 512)


_SCHEMAS = {  # as vLLM 0.33's library registers them
    "gather_and_maybe_dequant_cache(Tensor src_cache, Tensor! dst, Tensor block_table, Tensor cu_seq_lens,"
    " Tensor token_to_seq, int num_tokens, str kv_cache_dtype, Tensor scale, Tensor? seq_starts) -> ()": _gather,
    "cp_gather_cache(Tensor src_cache, Tensor! dst, Tensor block_table, Tensor cu_seq_lens, int batch_size,"
    " Tensor? seq_starts) -> ()": _copy,
    "cp_gather_and_upconvert_fp8_kv_cache(Tensor src_cache, Tensor! dst, Tensor block_table, Tensor workspace_starts,"
    " int batch_size, Tensor? seq_starts, Tensor? host_cache=None, Tensor? host_row_ids=None,"
    " Tensor? device_row_ids=None) -> ()": _upconvert,
}


def define(namespace: str, ops: dict[str, Any]) -> torch.library.Library:
    library = torch.library.Library(namespace, "FRAGMENT")
    for schema, kernel in ops.items():
        library.define(schema)
        library.impl(schema.partition("(")[0], kernel, "CPU")
    return library


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = define("_C_cache_ops", _SCHEMAS)
    package = ModuleType("vllm")
    package.__version__ = "0.33.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", ModuleType("vllm._custom_ops"))
    monkeypatch.setattr(VLLM, "_rotates_views", lambda self, device: True)
    yield
    library._destroy()


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (CONCAT, ["vllm gather_and_maybe_dequant", "vllm cp_gather"]),
        (FP8, ["vllm gather_and_maybe_dequant"]),
        (DS_MLA, ["vllm cp_gather_and_upconvert"]),
    ],
    ids=lambda value: value.format if isinstance(value, CacheLayout) else "",
)
def test_vllm_gathers_by_its_schemas(layout: CacheLayout, names: list[str], fake_vllm: None) -> None:
    rows = Bench(model("deepseek-v3"), CPU, (VLLM(CPU),)).measure(GATHER, 0, 300, layout)
    theirs = [r for r in rows if r.contender.startswith("vllm")]
    assert [r.contender for r in theirs] == names
    for row in theirs:
        assert row.p50_us, row.note
        assert row.qk_differs_percent == 0
    assert {r.baseline for r in rows} == {names[0]}


def test_vllm_says_what_it_cannot_gather_or_convert(fake_vllm: None) -> None:
    row = Bench(model("deepseek-v4"), CPU, (VLLM(CPU),)).measure(GATHER, 0, 5, MODEL1)[-1]
    assert (row.contender, row.note) == ("vllm", "it gathers no such rows")
    assert VLLM(CPU).contenders(CONVERT, "to fp8", CONCAT, True) == []


# ------------------------------------------------------------------------------------------------ benchmarks/readers.py


@pytest.fixture(scope="module")
def readers() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("readers", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["readers"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["readers"]


def attention(q: torch.Tensor, rows: torch.Tensor, sm_scale: float, values: int) -> torch.Tensor:
    """One sequence: q [H, D] over rows [n, D]."""
    return (q.double() @ rows.double().T * sm_scale).softmax(-1) @ rows[:, :values].double()


def paged(q, pages, table, lengths, sm_scale) -> torch.Tensor:  # type: ignore[no-untyped-def]
    out = []
    for i, n in enumerate(lengths.tolist()):
        rows = pages[table[i].long()].flatten(0, 1)[:n]
        out.append(attention(q[i], rows, sm_scale, 512))
    return torch.stack(out).to(q.dtype if q.dtype.itemsize > 1 else torch.bfloat16)


def _dense(q, pages, rank, lengths, table, sm_scale, causal, plan, splits, out) -> Any:  # type: ignore[no-untyped-def]
    assert q.shape[1] == 1 and pages.shape[1:] == (64, 1, 576) and rank == 512 and not causal and out is None
    assert lengths.dtype == table.dtype == torch.int32
    result = paged(q[:, 0], pages[:, :, 0], table, lengths, sm_scale)[:, None]
    return result, result.new_empty(0), lengths.clone(), lengths.clone()


def _sparse(q, pages, slots, a, b, plan, splits, c, d, e, width, sm_scale, out=None, f=False) -> Any:  # type: ignore[no-untyped-def]
    assert q.shape[1] == slots.shape[1] == 1 and q.shape[2] in (64, 128) and width == 512
    assert slots.dtype == torch.int32 and slots.shape[2] % 64 == 0
    layout = MODEL1 if q.shape[3] == 512 else DS_MLA
    cache = MLACache.wrap(pages.squeeze(2), layout)
    table = torch.arange(cache.num_blocks)[None]
    rows = providers.reference.gather_cache(cache, table, torch.tensor([0, cache.num_slots]), total=cache.num_slots)
    outputs = [attention(x, rows[s[s >= 0].long()], sm_scale, 512) for x, s in zip(q[:, 0], slots[:, 0], strict=True)]
    return torch.stack(outputs)[:, None].bfloat16(), q.new_empty(0), slots.clone(), slots.clone()


def _fp8_plan(lengths, heads, one) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    return [lengths.clone(), lengths.clone()]


def _fp8(q, pages, rank, lengths, table, sm_scale, causal, plan, splits, q_scale, scale) -> Any:  # type: ignore[no-untyped-def]
    assert q.dtype == pages.dtype == torch.float8_e4m3fn and q_scale.shape == scale.shape == (1,)
    result = paged(q[:, 0].float() * q_scale, pages[:, :, 0].float() * scale, table, lengths, sm_scale)
    return [result[:, None].bfloat16(), result]


def _fa3_plan(batch, one, longest, heads, kv_heads, rope, rank, dtype, used, *rest) -> torch.Tensor:  # type: ignore[no-untyped-def]
    assert (one, kv_heads, rope, rank) == (1, 1, 64, 512) and longest == int(used.max())
    return used.clone()


def _fa3(q, k, v, *rest) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    latent, starts, used, table, sm_scale = rest[2], rest[4], rest[8], rest[11], rest[20]
    assert starts.tolist() == list(range(len(q) + 1))
    pages = torch.cat([v, k], -1).squeeze(2)
    return [paged(torch.cat([latent, q], -1), pages, table, used, sm_scale)]


_TWO = "Tensor? plan, Tensor? splits"
_FA3 = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q,"
    " int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,"
    " Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,"
    " float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap,"
    " bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin,"
    " Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"
)
_FA3_PLAN = (
    "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k,"
    " int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? leftpad_k, int? page_size, int max_seqlen_k_new,"
    " bool is_causal, int window_size_left, int window_size_right, bool has_softcap, int num_splits, bool? pack_gqa,"
    " int sm_margin) -> Tensor"
)
_ATTENTION: dict[str, dict[str, Any]] = {  # the schemas of vLLM 0.33's wheel; what they alias is left out
    "_flashmla_C": {
        f"dense_decode_fwd(Tensor q, Tensor kcache, int head_size_v, Tensor seqlens_k, Tensor block_table,"
        f" float softmax_scale, bool is_causal, {_TWO}, Tensor? out_) -> (Tensor, Tensor, Tensor?, Tensor?)": _dense,
        f"sparse_decode_fwd(Tensor q, Tensor kv, Tensor indices, Tensor? topk_length, Tensor? attn_sink, {_TWO},"
        " Tensor? extra_kv, Tensor? extra_indices, Tensor? extra_topk_length, int d_v, float sm_scale,"
        " Tensor? out_=None, bool enable_batch_invariant=False) -> (Tensor, Tensor, Tensor?, Tensor?)": _sparse,
    },
    "_flashmla_extension_C": {
        "fwd_kvcache_mla_fp8(Tensor q, Tensor kcache, int head_size_v, Tensor seqlens_k, Tensor block_table,"
        " float softmax_scale, bool is_causal, Tensor tile_scheduler_metadata, Tensor num_splits, Tensor? descale_q,"
        " Tensor? descale_k) -> Tensor[]": _fp8,
        "get_mla_decoding_metadata_dense_fp8(Tensor seqlens_k, int num_heads_per_head_k, int num_heads_k)"
        " -> Tensor[]": _fp8_plan,
    },
    "_vllm_fa3_C": {_FA3: _fa3, _FA3_PLAN: _fa3_plan},
}


class FakeWrapper:
    """FlashInfer's, as far as the script uses it."""

    def __init__(self, workspace: torch.Tensor, backend: str) -> None:
        assert workspace.dtype == torch.uint8 and backend in ("fa2", "fa3")

    def plan(self, metadata: Any, **options: Any) -> None:
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in vars(metadata).values())
        assert (options["query_layout"], options["kv_cache_layout"], options["causal"]) == ("split", "split", False)
        self.metadata, self.options = metadata, options

    def run(self, query: Any, kv_cache: Any, out: torch.Tensor) -> torch.Tensor:
        m, pages = self.metadata, torch.cat(kv_cache, -1)
        for i, length in enumerate(m.kv_len_arr.tolist()):
            blocks = m.kv_indices[m.kv_indptr[i] : m.kv_indptr[i + 1]].long()
            assert len(blocks) == -(-length // self.options["page_size"])
            rows, q = pages[blocks].flatten(0, 1)[:length], torch.cat([x[i] for x in query], -1)
            out[i] = attention(q, rows, self.options["sm_scale"], 512)
        return out


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    libraries = [define(namespace, ops) for namespace, ops in _ATTENTION.items()]
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    package, mla = ModuleType("flashinfer"), ModuleType("flashinfer.mla")
    package.__version__ = "0.7.2"  # type: ignore[attr-defined]
    mla.BatchMLAPagedAttentionWrapper = FakeWrapper  # type: ignore[attr-defined]
    mla.MLAPlanMetadata = SimpleNamespace(csr=lambda **tensors: SimpleNamespace(**tensors))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", mla)
    yield
    for library in libraries:
        library._destroy()


def test_foreign_readers_are_called_by_their_schemas(
    readers: Any, fakes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "WORKSPACE", 1)
    found = [
        *readers.flashmla_readers(Path(), "vllm"),
        *readers.flashmla_fp8_readers(Path(), "vllm"),
        *readers.flash_attention_readers(Path("x.so"), "vllm"),
        *readers.flashinfer_readers("fa3", CPU),
    ]
    assert len(found) == 8
    for reader in found:
        proof = readers.prove(reader, 4, (1, 63, 130), CPU)
        assert not proof.failed, proof
        assert (proof.same_output, proof.same_cache, proof.same_query) == (True, True, True), proof
        assert proof.batch == 3
        bound = 0.2 if "fp8" in reader.format else 0.02
        assert proof.relative_error < bound


def test_a_misread_fails_though_both_caches_agree(readers: Any) -> None:
    def one_token_short(step: Any) -> Any:
        shorter = readers.Step(step.q, step.cache, step.block_table.flip(0), step.seq_lens, step.sm_scale)
        return right.bind(shorter)

    right = readers.our_reader(providers.reference, "TRITON_MLA", "bf16")
    wrong = readers.Reader("wrong", "", "TRITON_MLA", "bf16", one_token_short)
    assert not readers.prove(right, 2, (40, 50), CPU).failed
    proof = readers.prove(wrong, 2, (40, 50), CPU)
    assert proof.ratio == 1 and proof.failed


def test_times_and_tables(readers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROUND_BYTES", 1 << 16)
    right = readers.our_reader(providers.reference, "TRITON_MLA", "fp8_e4m3fn")
    time = readers.timed(right, 2, 2, 20, 100.0, CPU)
    assert time.cache_bytes == 2 * 20 * 576
    assert time.gb_s == pytest.approx(1e-3 * time.cache_bytes / time.p50_us)
    readers.print_times([time])


def test_every_layout_of_a_timed_reader_can_be_filled() -> None:
    for backend in ("FLASHMLA", "FLASH_ATTN_MLA", "FLASHINFER_PAGED_MLA", "TRITON_MLA"):
        cache = random_rows(layout_for(backend), 2, 1.0, torch.Generator())
        assert float(cache.latent.float().std()) == pytest.approx(1, abs=0.1)  # type: ignore[union-attr]

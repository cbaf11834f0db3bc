"""The benchmark's arithmetic, inputs, peers and files. Nothing here asserts a time."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from latentkv import CacheLayout, providers
from latentkv.bench import (
    FUSED,
    VLLM,
    Bench,
    Inputs,
    PeerError,
    Row,
    Timing,
    environment,
    plot,
    read_csv,
    time_calls,
    timing,
    write_csv,
)
from latentkv.bench.contenders import plain_update, provider_call, torch_op_call
from latentkv.bench.inputs import bytes_moved
from latentkv.models import MODELS, model
from latentkv.ops import OP_NAMES
from latentkv.testing import assert_same_bytes

CPU = torch.device("cpu")
CONCAT = CacheLayout(512, 64, 64, "bf16")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times too short to mean anything."""
    monkeypatch.setattr(timing, "_CPU_SECONDS", 0.0)
    monkeypatch.setattr("latentkv.bench.streamed_bandwidth", lambda device: 100.0)


def bench(name: str = "deepseek-v3", *peers: VLLM) -> Bench:
    return Bench(model(name), CPU, peers)


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
    fp8 = CacheLayout(512, 64, 64, "fp8_e4m3fn")
    assert bytes_moved(FUSED, 16, 7, fp8) == 7 * (rope + write - row // 2)


@pytest.mark.parametrize("name", MODELS)
def test_inputs_are_an_engines(name: str) -> None:
    m = model(name)
    x = bench(name).inputs(4, 33, CacheLayout(m.kv_lora_rank, m.rope_dim))
    assert x.q_pe.shape == (33, 4, m.rope_dim)
    assert x.q_pe.stride() == (4 * (m.nope_dim + m.rope_dim), m.nope_dim + m.rope_dim, 1)
    assert x.k_pe.stride() == (m.kv_lora_rank + m.rope_dim, 1)
    assert x.kv_c.is_contiguous()
    assert len(set(x.slots.tolist())) == 33
    assert (x.positions is None) == (m.rope is None)
    again = bench(name).inputs(4, 33, CacheLayout(m.kv_lora_rank, m.rope_dim))
    assert_same_bytes(again.q, x.q)


@pytest.mark.parametrize("op", OP_NAMES)
@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("placement", ["concat", "split"])
def test_every_way_to_call_gives_the_same_bytes(op: str, format: str, placement: str) -> None:
    layout = CacheLayout(512, 64, 64, format, placement)  # type: ignore[arg-type]
    runner = bench()
    expected, public, torch_op, plain = (runner.inputs(3, 9, layout) for _ in range(4))
    provider_call(providers.reference, op, expected)()
    provider_call(providers.public, op, public)()
    torch_op_call(op, torch_op)()
    p = plain
    rope = (p.positions, p.q_pe, p.k_pe, p.kv_c, p.table)
    plain_update(op, *rope, p.slots, p.cache.tensors, p.cache.scale, format, p.is_neox)
    for actual in (public, torch_op, plain):
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


# vLLM's schemas , computed here by our own ops: the calls must fit them.
_VLLM = {
    "_C_cache_ops": (
        "concat_and_cache_mla_rope_fused(Tensor positions, Tensor! q_pe, Tensor! k_pe, Tensor kv_c,"
        " Tensor cos_sin_cache, bool is_neox, Tensor slot_mapping, Tensor! kv_cache, str kv_cache_dtype,"
        " Tensor kv_cache_scale) -> ()",
        "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor! kv_cache, Tensor slot_mapping,"
        " str kv_cache_dtype, Tensor scale, bool skip_scale=False) -> ()",
    ),
    "_C": (
        "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache,"
        " bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
    ),
}
_FORMATS = {"auto": "bf16", "fp8": "fp8_e4m3fn", "fp8_e5m2": "fp8_e5m2"}


def _fused(positions, q, k, kv_c, table, is_neox, slots, cache, dtype, scale) -> None:  # type: ignore[no-untyped-def]
    torch.ops.latentkv.rope_write_cache_(
        positions, q, k, kv_c, table, slots, cache, None, scale, _FORMATS[dtype], is_neox
    )


def _write(kv_c, k, cache, slots, dtype, scale, skip_scale=False) -> None:  # type: ignore[no-untyped-def]
    torch.ops.latentkv.write_cache_(kv_c, k, slots, cache, None, scale, _FORMATS[dtype])


def _rope(positions, q, k, size, table, is_neox, offset=0, inverse=False) -> None:  # type: ignore[no-untyped-def]
    torch.ops.latentkv.rope_(positions, q, k, table, is_neox, inverse)


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    libraries = []
    kernels = iter((_fused, _write, _rope))
    for namespace, schemas in _VLLM.items():
        library = torch.library.Library(namespace, "FRAGMENT")
        for schema in schemas:
            library.define(schema)
            library.impl(schema.partition("(")[0], next(kernels), "CPU")
        libraries.append(library)
    package = ModuleType("vllm")
    package.__version__ = "0.33.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", ModuleType("vllm._custom_ops"))
    yield
    for library in libraries:
        library._destroy()


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("op", OP_NAMES)
def test_vllm_is_called_by_its_schemas(op: str, format: str, fake_vllm: None) -> None:
    peer = VLLM(CPU)
    assert peer.version == "0.33.0"
    rows = bench("deepseek-v3", peer).measure(op, 4, 5, CacheLayout(512, 64, 64, format))
    theirs = [r for r in rows if r.contender.startswith("vllm")]
    names = ["vllm fused", "vllm pair"] if op == FUSED else ["vllm"]
    assert [r.contender for r in theirs] == names
    for row in theirs:
        assert row.note == ""
        assert row.p50_us
        assert (row.qk_differs_percent, row.cache_differs_percent) == (0, 0)
    assert {r.baseline for r in rows} == {names[0]}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("kimi-k3", CONCAT),
        ("deepseek-v3", CacheLayout(block_size=1)),
        ("deepseek-v3", CacheLayout(placement="split")),
    ],
)
def test_vllm_says_what_it_cannot_do(name: str, layout: CacheLayout, fake_vllm: None) -> None:
    rows = bench(name, VLLM(CPU)).measure(FUSED, 4, 5, layout)
    row = next(r for r in rows if r.contender == "vllm")
    assert row.p50_us is None
    assert row.note.startswith("it ")


def test_missing_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PeerError, match="vllm"):
        VLLM(CPU)
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(PeerError, match=r"broken\.so"):
        VLLM(CPU, broken)


def test_a_failing_peer_is_a_note(fake_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: VLLM, x: Inputs) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(VLLM, "_fused_call", fail)
    rows = {r.contender: r for r in bench("deepseek-v3", VLLM(CPU)).measure(FUSED, 4, 5, CONCAT)}
    assert rows["vllm fused"].note == "RuntimeError: no kernel image"
    assert rows["latentkv fused"].baseline == "vllm pair"


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
    rows = runner.measure(FUSED, 16, 8, CONCAT) + runner.measure_host(FUSED, 16, CONCAT)
    assert all(r.p50_us and not r.wrong for r in rows)
    assert {r.timing for r in rows} == {"graph", "host"}

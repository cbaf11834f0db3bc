"""The shared matrix: every case, on every device, to the bytes of the reference on the CPU."""

from __future__ import annotations

import itertools

import amd
import pytest
import torch
from conftest import AMD, TARGETS
from latentkv import providers
from latentkv.cache.layouts import FORMATS, CacheLayout
from latentkv.ops.schemas import NATIVE_OP_NAMES
from latentkv.providers import Provider
from latentkv.testing import Case, Problem, for_layout, matrix
from latentkv.testing.matrix import ACTIVATIONS, formats_for

CASES = list(matrix())
READING = ("gather_cache", "convert_cache_")
PLAIN_FP8 = [name for name, f in FORMATS.items() if f.quantised]


# The reference on the CPU is what all others are compared with.
others = pytest.mark.parametrize(
    ("device", "provider"), [t for t in TARGETS if t != ("cpu", "reference")], indirect=True
)


def differences(case: Case, device: str, provider: Provider) -> list[str]:
    """Where the provider on the device leaves other bytes than the reference on the CPU."""
    wanted, actual = Problem(case, "cpu"), Problem(case, device)
    wanted.run(providers.reference)
    actual.run(provider)
    return [f"{case}: {provider.name} on {device}: {d}" for d in actual.differences(wanted)]


@others
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bytes(case: Case, device: str, provider: Provider) -> None:
    assert differences(case, device, provider) == []


def test_emulated_amd_devices_take_part() -> None:
    """Where they are absent, this says why."""
    if not AMD:
        pytest.skip(f"emulated AMD devices are absent: {amd.problem()}")
    assert {name for _, name in TARGETS} > set(AMD) == set(amd.ARCHS)


@others
def test_backends(mla_layouts: list[CacheLayout], device: str, provider: Provider) -> None:
    """Every layout that an attention backend reads."""
    cases = [case for layout in mla_layouts for case in for_layout(layout)]
    assert {lay for case in cases for lay in (case.layout, case.to)} >= set(mla_layouts)
    assert [d for case in cases for d in differences(case, device, provider)] == []


# ------------------------------------------------------------------------------------------ the matrix itself


def test_a_problem_is_equal_for_equal_seeds(device: str) -> None:
    for case in CASES[::97]:
        one, same, other = Problem(case, "cpu"), Problem(case, device), Problem(case, "cpu", seed=1)
        assert one.differences(same) == []
        if case.op not in READING:
            assert torch.equal(one.slots, same.slots.cpu())
        assert one.differences(other) != []


def test_a_problem_runs(device: str) -> None:
    """What the comparison sees: each op writes exactly the buffers that it should."""
    for case in CASES[::41]:
        before, after = Problem(case, device), Problem(case, device)
        after.run(providers.native)
        changed = {d.partition(":")[0] for d in after.differences(before)}
        if case.op in READING:
            wanted = {"out"} if case.op == "gather_cache" else {name for name in after.buffers if name.startswith("to")}
            assert changed == wanted, f"{case}: wrote {changed}"
            continue
        if case.op == "decode_prologue":
            kv_c = {"none": set(), "apart": {"kv_c_out"}, "in-place": {"kv_c", "kv"}}[case.normalised]
            may = {"q_out", "q_rope_out", "cache0", "cache1"} | kv_c
            assert "q_out" in changed or (case.in_place and not case.layout.rope_dim), str(case)
            if case.normalised != "none" and len(after.slots):
                assert kv_c & changed, str(case)
        else:
            may = set() if case.op.startswith("write") else {"q_pe", "k_pe" if case.strides == "contiguous" else "kv"}
            may |= {name for name in after.buffers if name.startswith("cache")} if case.op != "rope_" else set()
        assert changed <= may, f"{case}: wrote {changed}"
        if case.rows == "full":
            must = {"rope_", "rope_write_cache_"} if case.rope != "none" else set()
            assert "q_pe" in changed or case.op not in must, str(case)
            caches = {name for name in after.buffers if name.startswith("cache0")}
            assert caches <= changed or case.op == "rope_", str(case)


def met(cases: list[Case], *axes: str) -> set[tuple[object, ...]]:
    """The combinations that some fields of the cases, or of their layouts, have."""
    return {tuple(getattr(c if hasattr(c, a) else c.layout, a) for a in axes) for c in cases}


def meet_in_pairs(cases: list[Case], *axes: str) -> None:
    """Each value of each of the axes meets each of every other."""
    for a, b in itertools.combinations(axes, 2):
        missing = set(itertools.product(*({v for (v,) in met(cases, x)} for x in (a, b)))) - met(cases, a, b)
        assert not missing, f"{a} and {b} never are {missing}"


def test_the_matrix_meets_every_choice() -> None:
    assert len({str(c) for c in CASES}) == len(CASES)
    assert {c.op for c in CASES} == set(NATIVE_OP_NAMES)
    pairs = {(a, f) for a in ACTIVATIONS for f in formats_for(a)}
    for op in ("write_cache_", "rope_write_cache_", "decode_prologue", "write_cache_grouped_"):
        assert met([c for c in CASES if c.op == op], "activation", "format") == pairs, op
    assert {f for _, f in pairs} == set(FORMATS)
    assert {f for f in FORMATS if FORMATS[f].packed} == {f for a, f in pairs if a == "bf16"} - {"bf16", *PLAIN_FP8}


def test_the_in_place_ops_meet_every_choice() -> None:
    in_place = [c for c in CASES if c.op in ("write_cache_", "rope_write_cache_")]
    axes = ("strides", "rows", "table", "index", "tokens", "heads", "as_bytes", "pages", "scale")
    meet_in_pairs(
        [c for c in in_place if c.rope != "none" and c.layout.kv_lora_rank <= 512], "rope", "placement", *axes
    )
    alone = [c for c in CASES if c.op == "rope_"]
    assert not any(c.inverse for c in CASES if c.op != "rope_") and sum(c.inverse for c in alone) == len(alone) // 2
    meet_in_pairs(alone, "activation", "strides", "table", "heads", "rope")
    for axis in ("activation", "strides", "table", "heads"):
        meet_in_pairs(alone, axis, "inverse")
    long = [c for c in in_place if c.layout.kv_lora_rank > 512 and c.layout.rope_dim > 512]
    plain = [f for f in FORMATS if not FORMATS[f].packed]
    assert met(long, "activation", "format") == {(a, f) for a in ACTIVATIONS for f in formats_for(a) if f in plain}
    meet_in_pairs(long, "rope", "strides", "placement")


def test_decode_prologue_meets_every_choice() -> None:
    cases = [c for c in CASES if c.op == "decode_prologue" and c.layout.kv_lora_rank <= 512]
    meet_in_pairs(
        cases, "placement", "rope", "strides", "rows", "table", "index", "tokens", "as_bytes", "pages", "scale",
        "query", "q_scale", "outputs", "split", "in_place", "normalised",
    )  # fmt: skip
    for activation in ACTIVATIONS:
        own = [c for c in cases if c.activation == activation]
        meet_in_pairs(own, "format", "rope", "strides", "rows", "query", "split", "in_place", "normalised")
        meet_in_pairs(own, "norm", "strides", "rows", "query", "outputs")
        assert {c.norm for c in own} == {None, activation, "fp32"}
    dims = met(cases, "kv_lora_rank", "rope_dim")
    assert dims >= {(512, 64), (256, 64), (448, 64)} and any(r == 0 for _, r in dims)
    for want in dims:  # whatever the dimensions
        own = [c for c in cases if (c.layout.kv_lora_rank, c.layout.rope_dim) == want]
        assert {c.strides for c in own} == {c.strides for c in cases} and {c.norm is None for c in own} == {True, False}
        assert {c.query for c in own} == {None, *PLAIN_FP8} and {c.split for c in own} == {c.in_place for c in own}
    long = [c for c in CASES if c.op == "decode_prologue" and c.layout.kv_lora_rank > 512 < c.layout.rope_dim]
    meet_in_pairs(long, "strides", "query")
    assert {c.norm is None for c in long} == {c.split for c in long} == {c.rope == "neox" for c in long}


def test_the_other_ops_meet_every_choice() -> None:
    grouped = [c for c in CASES if c.op == "write_cache_grouped_"]
    assert {c.layers for c in grouped} == {1, 2, 3, 5, 40}
    meet_in_pairs(grouped, "layers", "placement", "strides", "rows", "index", "as_bytes", "pages", "scale")
    indexer = [c for c in CASES if c.op == "write_indexer_cache_"]
    meet_in_pairs(
        indexer, "activation", "rope", "strides", "rows", "table", "index", "tokens", "pages", "power_of_two",
        "block_size",
    )  # fmt: skip
    meet_in_pairs([c for c in indexer if c.rope != "none"], "rope", "rope_dim", "strides", "power_of_two")


def test_the_reading_ops_meet_every_choice() -> None:
    gathers = [c for c in CASES if c.op == "gather_cache"]
    axes = ("activation", "strides", "rows", "index", "tokens", "as_bytes", "pages", "scale", "outputs", "starts")
    meet_in_pairs(gathers, "format", "activation")
    meet_in_pairs(gathers, "placement", *axes)
    assert {f for (f,) in met(gathers, "format")} == set(FORMATS)
    conversions = [c for c in CASES if c.op == "convert_cache_"]
    pairs = {(c.layout.format, c.to.format) for c in conversions}
    packed = [f for f in FORMATS if FORMATS[f].packed]
    assert pairs == {(f, g) for f in FORMATS for g in FORMATS if f == g or not {f, g} <= set(packed)}
    meet_in_pairs(
        conversions, "placement", "strides", "index", "tokens", "sequences", "as_bytes", "pages", "scale", "to_bytes",
        "to_pages", "to_scale", "blocks",
    )  # fmt: skip
    assert {(c.layout.placement, c.to.placement) for c in conversions} == set(
        itertools.product(("concat", "split"), repeat=2)
    )
    for same in (True, False):  # one fp8 kind on both sides, with one scale and with two
        assert {c.layout.format for c in conversions if (c.scale == c.to_scale) == same} >= set(PLAIN_FP8)
    long = [c for c in gathers + conversions if c.layout.kv_lora_rank > 1024 and c.layout.rope_dim > 256]
    assert {c.op for c in long} == set(READING)


def test_sequences_of_every_length() -> None:
    """Also none; and the table has a number where a row needs one, and nowhere else."""
    for case in [c for c in CASES if c.op == "gather_cache" and c.sequences > 2]:
        p = Problem(case, "cpu")
        assert p.cu_seq_lens.diff().eq(0).any() and p.cu_seq_lens[-1] == case.tokens
        used = (p.block_table >= 0) & (p.block_table < p.cache.num_blocks)
        starts = torch.zeros(case.sequences).long() if p.seq_starts is None else p.seq_starts
        for own, start, length in zip(used, starts.tolist(), p.cu_seq_lens.diff().tolist(), strict=True):
            first, last = start // case.layout.block_size, (start + length - 1) // case.layout.block_size
            assert own.nonzero().flatten().tolist() == (list(range(first, last + 1)) if length else [])


def test_layers_differ() -> None:
    """In scale, in strides and in how their pages lie."""
    p = Problem(next(c for c in CASES if c.layers == 40 and c.strides == "contiguous" and c.scale), "cpu")
    kv_c, _, caches = zip(*p.layers, strict=True)
    assert len({x.data_ptr() for x in kv_c}) == 40 and len({x.stride(0) for x in kv_c}) == 2
    assert len({c.data.stride(0) for c in caches}) == 2
    assert len({None if c.scale is None else float(c.scale) for c in caches}) > 10

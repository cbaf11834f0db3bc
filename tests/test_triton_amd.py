"""The Triton kernels' machine code for AMD GPUs: held to limits, and executed over a part of the shared matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import amd
import amd_triton
import machine_code
import pytest
import torch
from amd_triton import READERS, Variant, main_variants, variants
from cdna.machine import unknown
from latentkv import CacheLayout, MLACache, providers
from latentkv.cache.layouts import FORMATS
from latentkv.ops.schemas import NATIVE_OP_NAMES
from latentkv.testing import Case, Problem, matrix
from oracle import virtual

pytestmark = pytest.mark.skipif(amd_triton.problem() is not None, reason=f"no Triton on AMD: {amd_triton.problem()}")


def subset() -> list[tuple[str, Case]]:
    """A case for every op, activation and format on one of the chips: another one each time of those that there are."""
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in matrix():
        format = case.layout.format if case.op not in ("rope_", "write_indexer_cache_") else ""
        groups.setdefault((case.op, case.activation, format), []).append(case)
    return [(amd.ARCHS[i % 2], group[(5 * i + 3) % len(group)]) for i, group in enumerate(groups.values())]


CASES = subset()


@pytest.mark.parametrize(("arch", "case"), CASES, ids=str)
def test_same_bytes(arch: str, case: Case) -> None:
    wanted, actual = Problem(case, "cpu"), Problem(case, "cpu")
    wanted.run(providers.reference)
    actual.run(amd_triton.provider(arch))
    assert actual.differences(wanted) == []


def test_the_subset_meets_every_choice() -> None:
    """Of each axis of the matrix, though not of their combinations; both chips every op."""
    for op in NATIVE_OP_NAMES:
        assert {arch for arch, case in CASES if case.op == op} == set(amd.ARCHS)
    for op in ("rope_write_cache_", "decode_prologue"):
        own, all_ = ([c for c in some if c.op == op] for some in ([case for _, case in CASES], matrix()))
        axes = ("rope", "strides", "rows", "table", "index", "as_bytes", "pages")
        for axis in (*axes, "query", "outputs", "split", "in_place", "normalised"):
            assert {getattr(c, axis) for c in own} == {getattr(c, axis) for c in all_}, (op, axis)


@pytest.mark.parametrize("arch", amd.ARCHS)
def test_far_rows(arch: str) -> None:
    """In a cache of more than 2 GB, for which the 32-bit offsets of buffer instructions will not do."""
    blocks, layout = 2**32 // (64 * 576) + 2, CacheLayout(512, 64, 64)
    pages = virtual((blocks, 64, 576), (64 * 576, 576, 1), torch.bfloat16)
    kv_c, k_pe = torch.randn(2, 512).bfloat16(), torch.randn(2, 64).bfloat16()
    slots = torch.tensor([5, (blocks - 1) * 64 + 3])
    amd_triton.provider(arch).write_cache_(kv_c, k_pe, slots, MLACache.wrap(pages, layout))
    for slot, *row in zip(slots.tolist(), kv_c, k_pe, strict=True):
        assert torch.equal(pages[slot // 64, slot % 64], torch.cat(row))


# ------------------------------------------------------------------- limits: what a kernel has to be blamed for

# Waves that must fit on a SIMD, of the ops that are not named eight. What holds whole rows in registers has few.
WAVES = {"gather_cache": 4, "convert_cache_": 3, "mla_decode": 1}


def registers(v: Variant) -> list[str]:
    """As many waves fit on a SIMD as the op has, and nothing is kept in memory."""
    k = v.kernel
    kept = {"scratch": k.scratch_bytes, "VGPR spills": k.vgpr_spills}
    if v.op != "mla_decode":  # which keeps some in the lanes of a VGPR
        kept["SGPR spills"] = k.sgpr_spills
    found = [f"{v}: {count} {what}" for what, count in kept.items() if count]
    if v.waves < WAVES.get(v.op, 8):
        found.append(f"{v}: {v.waves} waves: {k.vgprs} VGPRs, {k.sgprs} SGPRs")
    if k.wavefront != 64:
        found.append(f"{v}: waves of {k.wavefront} lanes")
    return found


def instructions(v: Variant) -> list[str]:
    """No memory but the global and the LDS; no calls; no product that adds a zero to -0; matrices only in attention."""
    other = ("scratch_", "flat_", "s_swappc", "s_setpc", "s_call", "v_fma_mix", "v_mad_mix")
    found = [f"{v}: {name}" for name in v.mnemonics if name.startswith(other)]
    if v.op != "mla_decode":
        found += [f"{v}: {why}" for why in unknown(v.kernel)]
    elif v.kernel.name == "attend" and not any(name.startswith("v_mfma") for name in v.mnemonics):
        found.append(f"{v}: no matrix instructions")
    return found


def stores(v: Variant) -> list[str]:
    """16 bytes at a time; codes of fp8 eight or more; scales of tiles and of the indexer's keys, four or one."""
    found = {size for kind, size, _ in v.accesses if kind == "store"}
    if v.op in READERS:
        allowed = {16, 8, 4} if v.op == "convert_cache_" else {16}  # four: the codes of keys
    else:
        quantised = FORMATS[v.format].quantised or FORMATS[v.format].packed or v.op == "write_indexer_cache_"
        allowed = {16, 8} if quantised else {16}
        allowed |= {"fp8_ds_mla": {4}, "fp8_model1": {1}}.get(v.format, set())
        allowed |= {4} if v.op == "write_indexer_cache_" else set()
    if v.op == "mla_decode":  # each result has the layout that matrix instructions leave
        return []
    return [f"{v}: stores of {found} bytes"] if not found <= allowed else []


def loads(v: Variant) -> list[str]:
    """16 bytes at a time, but for indices, angles and scales; keys and exponents of packed rows are read piecemeal."""
    found = {size for kind, size, _ in v.accesses if kind == "load"}
    allowed = {4, 8, 16}
    if v.op in READERS:
        allowed |= {"fp8_ds_mla": {2}, "fp8_model1": {1}}.get(v.format, set())
    return [f"{v}: loads of {found} bytes"] if not {16} <= found <= allowed else []


LIMITS = (registers, instructions, stores, loads)
VARIANTS = [(amd.ARCHS[i % 2], *variant) for i, variant in enumerate(variants())]


@pytest.mark.parametrize(("arch", "op", "activation", "format"), VARIANTS)
def test_limits(arch: str, op: str, activation: str, format: str) -> None:
    found = [
        complaint for v in main_variants(arch, op, activation, format) for limit in LIMITS for complaint in limit(v)
    ]
    if (arch, op, format) == ("gfx942", "mla_decode", "fp32"):  # docs/amd.md says that it spills
        found = [complaint for complaint in found if "scratch" not in complaint and "spills" not in complaint]
    assert found == []


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("4 scratch", {"scratch_bytes": 4}),
        ("1 VGPR spills", {"vgpr_spills": 1}),
        ("7 waves: 65 VGPRs", {"vgprs": 65}),
        ("flat_load_ubyte", "flat_load_ubyte v1, v[2:3]"),
        ("v_fma_mixlo_f16", "v_fma_mixlo_f16 v1, v2, v3, 0"),
        ("v_frobnicate", "v_frobnicate v1"),
        ("stores of", "buffer_store_dword v1, v0, s[4:7], 0 offen"),
        ("loads of", "buffer_load_ushort v1, v0, s[4:7], 0 offen"),
    ],
    ids=str,
)
def test_the_limits_can_be_missed(says: str, change: Any) -> None:
    (v,) = main_variants("gfx942", "rope_write_cache_", "bf16", "bf16")
    assert [complaint for limit in LIMITS for complaint in limit(v)] == []
    if isinstance(change, str):
        change = {"listing": [*v.kernel.listing, f"\t{change} // 00000000FFFF: 00"]}
    doctored = replace(v, kernel=replace(v.kernel, **change))
    assert any(says in complaint for limit in LIMITS for complaint in limit(doctored))


def test_the_table_of_the_documentation_is_this_builds() -> None:
    text = machine_code.DOCUMENT.read_text()
    if machine_code.compiler() not in text:
        pytest.skip(f"the tables are not of {machine_code.compiler()}")
    new = machine_code.written(text, "amd_triton", amd_triton.TABLES)
    assert new == text, "run: PYTHONPATH=python:tests python tests/amd_triton.py"

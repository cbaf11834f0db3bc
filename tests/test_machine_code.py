"""Limits that the machine code in `_hip` must keep, kernel by kernel, for every architecture it holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import amd
import machine_code
import pytest
from cdna.code_object import CodeObject
from cdna.errors import UnknownInstruction
from cdna.machine import unknown
from latentkv.testing.matrix import ACTIVATIONS
from machine_code import ARCHS, MOVING, Variant, variants

pytestmark = pytest.mark.skipif(amd.problem() is not None, reason=f"no AMD machine code: {amd.problem()}")

# Waves that must fit on a SIMD: with 64 VGPRs eight do, seven with 72, six with 80, five with 96. Kernels that hold the
# encoders of all codes need more registers than those that copy.
MOST_VGPRS = {8: 64, 7: 72, 6: 80, 5: 96}
WAVES = {
    ("update", "copies"): 8,
    ("update", "vector"): 6,
    ("update", "scalar"): 8,
    ("prologue", "copies"): 8,
    ("prologue", "vector"): 7,
    ("prologue", "scalar"): 7,
    ("grouped", "vector"): 5,
    ("grouped", "scalar"): 8,
    ("indexer", "vector"): 8,
    ("indexer", "scalar"): 8,
    ("copy", "copies"): 8,
    ("convert", "vector"): 5,
    ("convert", "scalar"): 5,
}
Limit = Callable[[Variant], list[str]]


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_library_holds_what_it_should(arch: str) -> None:
    assert all(set(amd.code_objects(bundle)) == set(ARCHS) for bundle in amd.embedded_bundles(amd.library()))
    found = [(v.family, v.activation, v.n, v.angle_bytes, v.copies) for v in variants(arch)]
    wanted = []
    for a in ACTIVATIONS:
        for n in (1, 16 // ACTIVATIONS[a].itemsize):
            wanted.append(("grouped", a, n, 0, False))
            wanted += [("indexer", a, n, angle, False) for angle in (2, 4)]
            for angle in (2, 4) if n == 8 else (0,):
                wanted += [(f, a, n, angle, c) for f in ("update", "prologue") for c in {False, n > 1}]
    wanted += [("copy", "bf16", n, 0, True) for n in (16, 4, 1)]
    wanted += [("convert", a, n, 0, False) for n in (8, 1) for a in ("bf16", "fp32")]
    assert sorted(found) == sorted(wanted)


# ------------------------------------------------------------------- limits: what a kernel has to be blamed for


def registers(v: Variant) -> list[str]:
    """As many waves fit on a SIMD as the family has, and nothing is kept in memory."""
    k = v.kernel
    kept = {"scratch": k.scratch_bytes, "VGPR spills": k.vgpr_spills, "SGPR spills": k.sgpr_spills, "LDS": k.lds_bytes}
    found = [f"{v}: {count} {what}" for what, count in kept.items() if count]
    if v.waves < WAVES[v.family, v.path]:
        found.append(f"{v}: {v.waves} waves: {k.vgprs} VGPRs, {k.agprs} AGPRs, {k.sgprs} SGPRs")
    if k.wavefront != 64:
        found.append(f"{v}: waves of {k.wavefront} lanes")
    return found


def instructions(v: Variant) -> list[str]:
    """Global memory only, by instructions that know it is global; no calls; no product that adds a zero to -0."""
    other = ("scratch_", "flat_", "buffer_", "ds_", "s_swappc", "s_setpc", "s_call", "v_fma_mix", "v_mad_mix")
    return [f"{v}: {name}" for name in v.mnemonics if name.startswith(other) and name != "ds_swizzle_b32"]


def counts(v: Variant) -> list[str]:
    """Lanes meet only in a reduction; divisions and roots are those of the text."""
    norm = v.family == "prologue"
    scales = 0 if v.copies else 1 if v.family == "convert" else 2  # of latent vector and key, or of the indexer
    lanes = min(64 // v.n, 32)  # of an indexer's group
    meetings = lanes.bit_length() - 1 if v.family == "indexer" else 5 * (norm or v.family in MOVING)  # or a search
    if v.stores_tiles:  # two tiles of 16 lanes at a time, or two of 8, by one encoder; of convert one
        meetings += (1 if v.family == "convert" else 2) * (4 + 3)
    divisions = scales + 2 * norm + 2 * (norm and not v.copies)  # the norm's mean and root; the query's two parts
    wanted = {"ds_swizzle_b32": meetings, "v_sqrt_f32": norm, "v_rsq_f32": 0}
    wanted |= {"v_rcp_f32": divisions, "v_div_fixup_f32": divisions}
    return [f"{v}: {v.mnemonics[name]} {name}, not {n:d}" for name, n in wanted.items() if v.mnemonics[name] != n]


def conversions(v: Variant) -> list[str]:
    """To fp8 by the chip's own instruction where it has one for the kind, and by none where it has not."""
    used = {m for m in v.mnemonics if m.startswith(("v_cvt_pk_fp8", "v_cvt_pk_bf8", "v_cvt_sr", "v_cvt_scalef32"))}
    wanted = set(v.native.values())
    return [] if used == wanted else [f"{v}: {used}, not {wanted}"]


def stores(v: Variant) -> list[str]:
    """A chunk at a time: non-temporal into rows and into a query that goes elsewhere, cached where heads turn in place.

    Also cached: the scales of tiles, four bytes or one, and of the indexer's keys.
    """
    chunk = v.n * ACTIVATIONS[v.activation].itemsize
    wanted = {(chunk, True)} if v.family != "indexer" else {(4, False)}
    wanted |= {(v.n, True)} if not v.copies else set()
    wanted |= {(chunk, False)} if v.family == "update" else set()
    wanted |= {(4, False), (1, False)} if v.stores_tiles else set()
    if v.family == "copy":
        wanted = {(v.n, True), (4, False)}
    elif v.family == "convert":  # to 8, 16 or 32 bits an element
        wanted = {(size, True) for size in ((8, 16) if v.n == 8 else (1, 2, 4))} | {(4, False), (1, False)}
    found = {(size, nt) for kind, size, nt in v.accesses if kind == "store"}
    return [] if found == wanted else [f"{v}: stores (bytes, nt) {found}, not {wanted}"]


def loads(v: Variant) -> list[str]:
    """The vector path asks for 16 bytes of activations at a time, and for nothing twice."""
    if v.n == 1:
        return []
    found = Counter(size for kind, size, _ in v.accesses if kind == "load")
    if v.family in MOVING:
        # Four eights of a latent vector and one of a key, or four chunks. Words: low and high of cu_seq_lens and starts
        # and the tables; the scales of tiles have four bytes or one.
        words = 13 if v.family == "copy" else 16
        eights = {8: 5, 16: 5 if v.activation == "bf16" else 10, 1: 4}
        limits = Counter({4: words}) + Counter({v.n: 4} if v.family == "copy" else eights)
        return [] if found == limits else [f"{v}: loads {dict(found)}, not {dict(limits)}"]
    # A part with heads asks for two chunks before its loop and in it, so does q_nope; a latent vector for two pieces of
    # eight elements each time. The norm adds weights of either dtype and the walk over what a lane does not hold.
    pieces = 8 // v.n
    latent = 2 * 2 * pieces
    chunks = {
        "update": latent + 2 * 4,
        "prologue": 2 * latent + 2 * 2 + pieces + 3 * 4,
        "grouped": latent + 4,
        "indexer": 2,
    }[v.family]
    # Every part asks for low and high words of slot and position, and where it quantises for a scale.
    parts = {"update": 3, "prologue": 4, "grouped": 2, "indexer": 1}[v.family]
    limits = Counter({16: chunks, 4: parts * (4 if v.copies else 5)})
    for angle_bytes in (v.angle_bytes,) if v.angle_bytes else (2, 4) * (v.family != "grouped"):
        limits[v.n // 2 * angle_bytes] += 4 if v.family == "indexer" else 8  # two runs of cosines and two of sines
    if v.family == "grouped":  # what a layer has of its own, which a lane looks up for its token
        limits += Counter({1: 3, 8: 6, 12: 2, 16: 5})
    if not chunks <= found[16] <= limits[16] or found.keys() != limits.keys() or not found <= limits:
        return [f"{v}: loads {dict(found)}, not {dict(limits)}"]
    return []


LIMITS = (registers, instructions, counts, conversions, stores, loads)


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.__name__)
def test_limits(arch: str, limit: Limit) -> None:
    assert [complaint for v in variants(arch) for complaint in limit(v)] == []


def with_metadata(**changes: int) -> Callable[[Variant], Variant]:
    return lambda v: replace(v, kernel=replace(v.kernel, **changes))


def with_code(pattern: str, *lines: str, count: int = 1) -> Callable[[Variant], Variant]:
    """With lines in place of the first one that matches, or of all, for a count of 0."""

    def doctor(v: Variant) -> Variant:
        new = "\n".join(f"\t{line} // 000000000000: 00" for line in lines)
        text, found = re.subn(rf"(?m)^\s*{pattern}.*$", new, "\n".join(v.kernel.listing), count=count)
        assert found, pattern
        return replace(v, kernel=replace(v.kernel, listing=text.splitlines()))

    return doctor


def with_one_more(line: str) -> Callable[[Variant], Variant]:
    return with_code("s_endpgm", line, "s_endpgm")


WIDE_LOAD, CODES = "global_load_dwordx4", r"global_store_dwordx2 .* nt\b"
FOUR_LOADS = [f"global_load_dword v{i}, v[8:9], off offset:{4 * i}" for i in range(4)]
DOCTORED = {  # what is wrong -> which limit sees it, what it says, what makes it so
    "AGPRs": (registers, "81 VGPRs, 1 AGPRs", with_metadata(vgprs=81, agprs=1)),
    "a spilled VGPR": (registers, "1 VGPR spills", with_metadata(vgpr_spills=1)),
    "a spilled SGPR": (registers, "1 SGPR spills", with_metadata(sgpr_spills=1)),
    "scratch": (registers, "4 scratch", with_metadata(scratch_bytes=4)),
    "LDS": (registers, "4 LDS", with_metadata(lds_bytes=4)),
    "half a wave": (registers, "32 lanes", with_metadata(wavefront=32)),
    "flat": (instructions, "flat_load_ubyte", with_one_more("flat_load_ubyte v1, v[2:3]")),
    "the LDS": (instructions, "ds_read_b32", with_one_more("ds_read_b32 v1, v2")),
    "a call": (instructions, "s_swappc_b64", with_one_more("s_swappc_b64 s[0:1], s[2:3]")),
    "a zero added": (instructions, "v_fma_mixlo_f16", with_one_more("v_fma_mixlo_f16 v1, v2, v3, 0")),
    "a division": (counts, "3 v_rcp_f32", with_one_more("v_rcp_f32_e32 v1, v1")),
    "a root": (counts, "1 v_sqrt_f32, not 0", with_one_more("v_sqrt_f32_e32 v1, v1")),
    "lanes that meet": (counts, "15 ds_swizzle", with_one_more("ds_swizzle_b32 v1, v1 offset:swizzle(SWAP,1)")),
    "no conversion": (conversions, "set(), not", with_code("v_cvt_pk_fp8_f32", "v_mov_b32_e32 v1, v2", count=0)),
    "another conversion": (
        conversions, "v_cvt_pk_bf8_f32", with_code("v_cvt_pk_fp8_f32", "v_cvt_pk_bf8_f32 v1, v2, v3")
    ),
    "a narrow load": (loads, "1: 1", with_code(WIDE_LOAD, "global_load_ubyte v1, v[2:3], off")),
    "one load more": (loads, "1: 1", with_one_more("global_load_ubyte v1, v[2:3], off")),
    "split loads": (loads, "loads {4: 62, 8: 8}", with_code(WIDE_LOAD, *FOUR_LOADS, count=0)),
    "a split load": (loads, "16: 11", with_code(WIDE_LOAD, *FOUR_LOADS)),
    "words more": (loads, "4: 18", with_code("s_endpgm", *FOUR_LOADS)),
    "a split store": (stores, "(12, False)", with_one_more("global_store_dwordx3 v[0:1], v[4:6], off")),
    "cached rows": (stores, "(8, False)", with_code(CODES, "global_store_dwordx2 v[0:1], v[4:5], off")),
}  # fmt: skip


@pytest.mark.parametrize("what", DOCTORED)
def test_the_limits_can_be_missed(what: str) -> None:
    """By a kernel that was good before: one complaint, which says what is wrong."""
    limit, says, doctor = DOCTORED[what]
    good = {"family": "update", "activation": "bf16", "n": 8, "angle_bytes": 2, "copies": False}
    (v,) = (v for v in variants("gfx942") if good.items() <= vars(v).items())
    assert limit(v) == []
    complaints = limit(doctor(v))
    assert len(complaints) == 1 and says in complaints[0], complaints


@pytest.mark.parametrize(("family", "path"), WAVES)
def test_a_wave_less_is_seen(family: str, path: str) -> None:
    (v, *_) = (v for v in variants("gfx950") if (v.family, v.path) == (family, path))
    most, scalars = MOST_VGPRS[WAVES[family, path]], 100 if WAVES[family, path] == 8 else 102
    good = with_metadata(vgprs=most, sgprs=scalars)(v)
    assert registers(good) == []
    assert len(registers(with_metadata(vgprs=most + 1)(good))) == 1
    assert len(registers(with_metadata(sgprs=101)(good))) == (scalars == 100)


def test_foreign_conversions_are_seen() -> None:
    """The chip's own fp8 is not the format's, where the format is another chip's; and copies need none."""
    for good in ({"family": "indexer"}, {"copies": True}):
        (v, *_) = (v for v in variants("gfx942") if good.items() <= vars(v).items())
        assert conversions(v) == []
        assert len(conversions(with_one_more("v_cvt_pk_fp8_f32 v1, v2, v3")(v))) == 1


@pytest.mark.parametrize("arch", amd.ARCHS)
def test_every_instruction_can_be_emulated(arch: str) -> None:
    """Also where no test gets."""
    assert [complaint for v in variants(arch) for complaint in unknown(v.kernel)] == []


def test_hidden_arguments_are_refused() -> None:
    """Only what the caller passes is modelled."""
    elf = amd.code_objects(amd.embedded_bundles(amd.library())[0])["gfx942"]
    with pytest.raises(UnknownInstruction, match="hidden_a"):
        CodeObject(elf.replace(b"by_value", b"hidden_a", 1), "gfx942")


@pytest.mark.parametrize("op", ["rope_write_cache_", "decode_prologue"])
@pytest.mark.parametrize("arch", amd.ARCHS)
def test_traffic(arch: str, op: str) -> None:
    """What lanes ask for is what has to move, but for what groups share through the caches."""
    is_prologue = op == "decode_prologue"
    for format in ("bf16", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_ds_mla"):
        r = machine_code.run(op, arch, format)
        # A table row for each head; slot, position and scale for each lane; a vector and its weight for each half.
        groups = 16 + 1
        shared = groups * 4 * 64 + groups * 4 * 64 + 512 * 2 + is_prologue * (2 * 2 * 512 * 2 + 16 * 64 * 20)
        assert r.needed <= r.requested <= r.needed + shared, (format, r)


def test_the_tables_of_the_documentation_are_this_builds() -> None:
    text = machine_code.DOCUMENT.read_text()
    if machine_code.compiler() not in text:  # another release may allocate otherwise; the limits hold all the same
        pytest.skip(f"the tables are not of {machine_code.compiler()}")
    assert machine_code.written(text, "machine_code", machine_code.TABLES) == text, (
        "run: PYTHONPATH=python:tests python tests/machine_code.py"
    )

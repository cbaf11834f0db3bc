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
from latentkv.layouts import FORMATS
from latentkv.testing.matrix import ACTIVATIONS, formats_for
from machine_code import ARCHS, Variant, variants

pytestmark = pytest.mark.skipif(amd.problem() is not None, reason=f"no AMD machine code: {amd.problem()}")

# VGPRs come from a file of 512 per lane and SIMD, SGPRs from one of 800: so many leave room for eight waves.
MOST_VGPRS, MOST_SGPRS = 64, 100
Limit = Callable[[Variant], list[str]]
HARDWARE = {  # architecture, format -> the conversion that the chip has
    ("gfx942", "fp8_e4m3fnuz"): "v_cvt_pk_fp8_f32",
    ("gfx950", "fp8_e4m3fn"): "v_cvt_pk_fp8_f32",
    ("gfx950", "fp8_e5m2"): "v_cvt_pk_bf8_f32",
}


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_library_holds_what_it_should(arch: str) -> None:
    assert set(amd.code_objects(amd.embedded_bundle(amd.library()))) == set(ARCHS)
    found = {(v.activation, v.format, v.n, v.angle_bytes) for v in variants(arch)}
    wanted = {
        (a, f, n, angle)
        for a in ACTIVATIONS
        for f in formats_for(a)
        for n in (1, 16 // ACTIVATIONS[a].itemsize)
        for angle in (2, 4)
    }
    assert found == wanted


# ------------------------------------------------------------------- limits: what a kernel has to be blamed for


def registers(v: Variant) -> list[str]:
    """Eight waves fit on a SIMD, and nothing is kept in memory."""
    k = v.kernel
    kept = {"scratch": k.scratch_bytes, "VGPR spills": k.vgpr_spills, "SGPR spills": k.sgpr_spills, "LDS": k.lds_bytes}
    found = [f"{v}: {count} {what}" for what, count in kept.items() if count]
    if k.vgprs + k.agprs > MOST_VGPRS:
        found.append(f"{v}: {k.vgprs} VGPRs, {k.agprs} AGPRs")
    if k.sgprs > MOST_SGPRS:
        found.append(f"{v}: {k.sgprs} SGPRs")
    if k.wavefront != 64:
        found.append(f"{v}: waves of {k.wavefront} lanes")
    return found


def instructions(v: Variant) -> list[str]:
    """Global memory only, by instructions that know it is global; no calls; no division but the scale's reciprocal."""
    other = ("scratch_", "flat_", "buffer_", "ds_", "s_swappc", "s_setpc", "s_call")
    found = [f"{v}: {name}" for name in v.mnemonics if name.startswith(other)]
    reciprocals = 2 if FORMATS[v.format].quantised else 0  # the latent part's and the key part's
    for name in ("v_rcp_f32", "v_div_fixup_f32"):
        if v.mnemonics[name] != reciprocals:
            found.append(f"{v}: {v.mnemonics[name]} {name}, not {reciprocals}")
    return found


def conversions(v: Variant) -> list[str]:
    """To fp8 by the chip's own instruction where it has one for the kind, and by none where it has not."""
    used = {m for m in v.mnemonics if m.startswith(("v_cvt_pk_fp8", "v_cvt_pk_bf8", "v_cvt_sr", "v_cvt_scalef32"))}
    wanted = {HARDWARE[v.kernel.arch, v.format]} if (v.kernel.arch, v.format) in HARDWARE else set()
    return [] if used == wanted else [f"{v}: {used}, not {wanted}"]


def widths(v: Variant) -> list[str]:
    """The vector path moves activations 16 bytes at a time, and rows a chunk at a time, which nobody else stores."""
    if v.n == 1:
        return []
    found, quantised = [], FORMATS[v.format].quantised
    row = v.n * FORMATS[v.format].dtype.itemsize
    if row < (16 if not quantised else 8 if v.activation != "fp32" else 4):
        found.append(f"{v}: {row} bytes of a row")
    stores = {(size, nt) for kind, size, nt in v.accesses if kind == "store"}
    if stores != {(16, False), (row, True)}:
        found.append(f"{v}: stores (bytes, nt) {stores}")
    # There are three parts: queries, keys and latent rows. Each asks for two chunks at once, before its loop and in it,
    # and for low and high words of slot and position. The first two have angles, two runs of cosines and two of sines;
    # the last two have a scale.
    loads = Counter(size for kind, size, _ in v.accesses if kind == "load")
    limits = Counter({16: 3 * 2 * 2, 4: 3 * 2 * 2 + 2 * quantised})
    limits[v.n // 2 * v.angle_bytes] += 2 * 4
    if loads[16] != limits[16] or loads.keys() != limits.keys() or not loads <= limits:
        found.append(f"{v}: loads {dict(loads)}, not {dict(limits)}")
    return found


LIMITS = (registers, instructions, conversions, widths)


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


WIDE_LOAD, ROW_STORE = "global_load_dwordx4", r"global_store_dwordx2 .* nt\b"
FOUR_LOADS = [f"global_load_dword v{i}, v[8:9], off offset:{4 * i}" for i in range(4)]
DOCTORED = {  # what is wrong -> which limit sees it, what it says, what makes it so
    "a VGPR too many": (registers, "65 VGPRs", with_metadata(vgprs=65)),
    "AGPRs": (registers, "64 VGPRs, 1 AGPRs", with_metadata(vgprs=64, agprs=1)),
    "an SGPR too many": (registers, "101 SGPRs", with_metadata(sgprs=101)),
    "a spilled VGPR": (registers, "1 VGPR spills", with_metadata(vgpr_spills=1)),
    "a spilled SGPR": (registers, "1 SGPR spills", with_metadata(sgpr_spills=1)),
    "scratch": (registers, "4 scratch", with_metadata(scratch_bytes=4)),
    "LDS": (registers, "4 LDS", with_metadata(lds_bytes=4)),
    "half a wave": (registers, "32 lanes", with_metadata(wavefront=32)),
    "flat": (instructions, "flat_load_ubyte", with_code("s_nop", "s_nop 0", "flat_load_ubyte v1, v[2:3]")),
    "a call": (instructions, "s_swappc_b64", with_code("s_nop", "s_swappc_b64 s[0:1], s[2:3]")),
    "a division": (instructions, "3 v_rcp_f32", with_code("s_nop", "v_rcp_f32_e32 v1, v1")),
    "no conversion": (conversions, "set(), not", with_code("v_cvt_pk_fp8_f32", "v_mov_b32_e32 v1, v2", count=0)),
    "another conversion": (
        conversions, "v_cvt_pk_bf8_f32", with_code("v_cvt_pk_fp8_f32", "v_cvt_pk_bf8_f32 v1, v2, v3")
    ),
    "a narrow load": (widths, "1: 1", with_code(WIDE_LOAD, "global_load_ubyte v1, v[2:3], off")),
    "one load more": (widths, "1: 1", with_code("s_nop", "global_load_ubyte v1, v[2:3], off")),
    "split loads": (widths, "loads {4: 62, 8: 8}", with_code(WIDE_LOAD, *FOUR_LOADS, count=0)),
    "a split load": (widths, "16: 11", with_code(WIDE_LOAD, *FOUR_LOADS)),
    "one word more": (widths, "4: 15", with_code("s_nop", FOUR_LOADS[0])),
    "wide rows": (widths, "(16, True)", with_code(ROW_STORE, "global_store_dwordx4 v[0:1], v[4:7], off nt")),
    "cached rows": (widths, "(8, False)", with_code(ROW_STORE, "global_store_dwordx2 v[0:1], v[4:5], off")),
}  # fmt: skip


@pytest.mark.parametrize("what", DOCTORED)
def test_the_limits_can_be_missed(what: str) -> None:
    """By a kernel that was good before: one complaint, which says what is wrong."""
    limit, says, doctor = DOCTORED[what]
    good = {"activation": "bf16", "format": "fp8_e4m3fnuz", "n": 8, "angle_bytes": 2}
    (v,) = (v for v in variants("gfx942") if good.items() <= vars(v).items())
    assert limit(v) == []
    complaints = limit(doctor(v))
    assert len(complaints) == 1 and says in complaints[0], complaints


def test_foreign_conversions_are_seen() -> None:
    """The chip's own fp8 is not the format's, where the format is another chip's."""
    (v, *_) = (v for v in variants("gfx942") if v.format == "fp8_e4m3fn")
    assert conversions(v) == []
    assert len(conversions(with_code("s_nop", "v_cvt_pk_fp8_f32 v1, v2, v3")(v))) == 1


@pytest.mark.parametrize("arch", amd.ARCHS)
def test_every_instruction_can_be_emulated(arch: str) -> None:
    """Also where no test gets."""
    assert [complaint for v in variants(arch) for complaint in unknown(v.kernel)] == []


def test_hidden_arguments_are_refused() -> None:
    """Only what the caller passes is modelled."""
    elf = amd.code_objects(amd.embedded_bundle(amd.library()))["gfx942"]
    with pytest.raises(UnknownInstruction, match="hidden_a"):
        CodeObject(elf.replace(b"by_value", b"hidden_a", 1), "gfx942")


def test_traffic() -> None:
    """What lanes ask for is what has to move, but for angles and indices, which groups share through the caches."""
    for arch in amd.ARCHS:
        for format in ("bf16", "fp8_e4m3fnuz", "fp8_e5m2"):
            r = machine_code.run(arch, format)
            shared = 16 * 4 * 64 + 17 * 4 * 64  # a table row for each head, and its slot and position for each lane
            assert r.needed <= r.requested <= r.needed + shared, (arch, format, r)


def test_the_tables_of_the_documentation_are_this_builds() -> None:
    text = machine_code.DOCUMENT.read_text()
    if (
        machine_code.compiler() not in text
    ):  # another release of it may allocate otherwise; the limits hold all the same
        pytest.skip(f"the tables are not of {machine_code.compiler()}")
    assert machine_code.written(text) == text, "run: PYTHONPATH=tests python tests/machine_code.py"

"""Limits that the machine code in `_hip` must keep, kernel by kernel, for every architecture it holds."""

from __future__ import annotations

from dataclasses import replace

import amd
import machine_code
import pytest
from latentkv.layouts import FORMATS
from latentkv.testing.matrix import ACTIVATIONS, formats_for
from machine_code import ARCHS, variants

pytestmark = pytest.mark.skipif(amd.problem() is not None, reason=f"no AMD machine code: {amd.problem()}")

# VGPRs come from a file of 512 per lane and SIMD, SGPRs from one of 800: so many leave room for eight waves.
MOST_VGPRS, MOST_SGPRS = 64, 100
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


def test_registers(arch: str) -> None:
    """Eight waves fit on a SIMD, and nothing is kept in memory."""
    for v in variants(arch):
        k = v.kernel
        assert k.vgprs + k.agprs <= MOST_VGPRS, f"{v}: {k.vgprs} VGPRs, {k.agprs} AGPRs"
        assert k.sgprs <= MOST_SGPRS, f"{v}: {k.sgprs} SGPRs"
        assert (k.scratch_bytes, k.vgpr_spills, k.sgpr_spills, k.lds_bytes) == (0, 0, 0, 0), v
        assert k.wavefront == 64


def test_instructions(arch: str) -> None:
    """Global memory only, by instructions that know it is global; no calls; no division but the scale's reciprocal."""
    for v in variants(arch):
        odd = [m for m in v.mnemonics if m.startswith(("scratch_", "flat_", "buffer_", "ds_", "s_swappc", "s_setpc"))]
        assert odd == [], v
        reciprocals = 2 if FORMATS[v.format].quantised else 0  # the latent part's and the key part's
        assert v.mnemonics["v_rcp_f32"] == v.mnemonics["v_div_fixup_f32"] == reciprocals, v


def test_fp8_conversion(arch: str) -> None:
    """By the chip's own instruction where it has one for the kind, and by none where it has not."""
    for v in variants(arch):
        used = {m for m in v.mnemonics if m.startswith(("v_cvt_pk_fp8", "v_cvt_pk_bf8", "v_cvt_sr"))}
        assert used == {HARDWARE[arch, v.format]} if (arch, v.format) in HARDWARE else used == set(), v


def test_width_of_accesses(arch: str) -> None:
    """The vector path moves activations 16 bytes at a time, and rows a chunk at a time, which nobody else stores."""
    for v in variants(arch):
        if v.n == 1:
            continue
        row = v.n * FORMATS[v.format].dtype.itemsize
        assert row >= (16 if not FORMATS[v.format].quantised else 8 if v.activation != "fp32" else 4)
        stores = {(size, nt) for kind, size, nt in v.accesses if kind == "store"}
        assert stores == {(16, False), (row, True)}, v
        # Indices and the scale are words; the angles of a chunk come in two runs.
        angles = v.n // 2 * v.angle_bytes
        assert {size for kind, size, _ in v.accesses if kind == "load"} == {16, 4, angles}, v


def test_traffic() -> None:
    """What lanes ask for is what has to move, but for angles and indices, which groups share through the caches."""
    for arch in amd.ARCHS:
        for format in ("bf16", "fp8_e4m3fnuz", "fp8_e5m2"):
            r = machine_code.run(arch, format)
            shared = 16 * 4 * 64 + 17 * 4 * 64  # a table row for each head, and its slot and position for each lane
            assert r.needed <= r.requested <= r.needed + shared, (arch, format, r)


def test_the_limits_can_be_missed() -> None:
    """A kernel with more registers, a byte-wide access, a call: each is seen."""
    v = variants("gfx942")[0]
    lines = v.kernel.listing
    fake = [
        *lines[:3],
        "flat_load_ubyte v1, v[2:3] // 000000000000: 00",
        "s_swappc_b64 s[0:1], s[2:3] // 000000000000: 00",
    ]
    other = replace(v, kernel=replace(v.kernel, listing=fake))
    assert {"flat_load_ubyte", "s_swappc_b64"} <= set(other.mnemonics)


def test_the_tables_of_the_documentation_are_this_builds() -> None:
    text = machine_code.DOCUMENT.read_text()
    if (
        machine_code.compiler() not in text
    ):  # another release of it may allocate otherwise; the limits hold all the same
        pytest.skip(f"the tables are not of {machine_code.compiler()}")
    assert machine_code.written(text) == text, "run: PYTHONPATH=tests python tests/machine_code.py"

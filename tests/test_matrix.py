"""The shared matrix: every case, on every device, to the bytes of the reference on the CPU."""

from __future__ import annotations

import amd
import pytest
import torch
from conftest import AMD, TARGETS
from latentkv import providers
from latentkv.backends import BACKENDS
from latentkv.layouts import FORMATS, CacheLayout
from latentkv.providers import Provider
from latentkv.testing import Case, Problem, for_layout, matrix
from latentkv.testing.matrix import ACTIVATIONS, formats_for

CASES = list(matrix())


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
def test_backends(mla_backend: str, mla_layouts: list[CacheLayout], device: str, provider: Provider) -> None:
    """Every plain layout that an attention backend reads; the packed formats are not written yet."""
    readable = {f for f in BACKENDS[mla_backend].formats if f in FORMATS}
    assert {layout.format for layout in mla_layouts} == readable
    if not readable:
        pytest.skip(f"{mla_backend} reads no plain format")
    cases = [case for layout in mla_layouts for case in for_layout(layout)]
    assert {case.layout.format for case in cases} == readable
    assert [d for case in cases for d in differences(case, device, provider)] == []


# ------------------------------------------------------------------------------------------ the matrix itself


def test_a_problem_is_equal_for_equal_seeds(device: str) -> None:
    for case in CASES[::97]:
        one, same, other = Problem(case, "cpu"), Problem(case, device), Problem(case, "cpu", seed=1)
        assert one.differences(same) == []
        assert torch.equal(one.slots, same.slots.cpu())
        assert one.differences(other) != []


def test_a_problem_runs(device: str) -> None:
    """What the comparison sees: each op writes exactly the buffers that it should."""
    for case in CASES[::41]:
        before, after = Problem(case, device), Problem(case, device)
        after.run(providers.native)
        changed = {d.partition(":")[0] for d in after.differences(before)}
        key = "k_pe" if case.strides == "contiguous" else "kv"
        may = set() if case.op == "write_cache_" else {"q_pe", key}
        may |= set() if case.op == "rope_" else {"cache0", "cache1"}
        assert changed <= may, f"{case}: wrote {changed}"
        if case.rows == "full" and case.op != "write_cache_" and case.rope != "none":
            assert "q_pe" in changed, str(case)


def test_the_matrix_meets_every_choice() -> None:
    assert len({str(c) for c in CASES}) == len(CASES)
    pairs = {(c.activation, c.layout.format) for c in CASES if c.op != "rope_"}
    assert pairs == {(a, f) for a in ACTIVATIONS for f in formats_for(a)}
    assert {f for _, f in pairs} == set(FORMATS)
    writes = [c for c in CASES if c.op != "rope_"]
    rotated = [c for c in writes if c.rope != "none"]
    for axis in ("strides", "rows", "table", "index", "tokens", "heads", "as_bytes", "pages", "scale"):
        values = {getattr(c, axis) for c in writes}
        for rope in ("gptj", "neox"):
            for placement in ("concat", "split"):
                met = {getattr(c, axis) for c in rotated if (c.rope, c.layout.placement) == (rope, placement)}
                assert met == values, f"{axis}: {rope} {placement} meets only {met} of {values}"
    alone = [c for c in CASES if c.op == "rope_"]
    assert not any(c.inverse for c in writes) and sum(c.inverse for c in alone) == len(alone) // 2
    for axis in ("activation", "strides", "table", "heads"):
        for rope in ("gptj", "neox"):
            met = {(getattr(c, axis), c.inverse) for c in alone if c.rope == rope}
            assert met == {(value, i) for value in {getattr(c, axis) for c in alone} for i in (False, True)}, axis
    long = [c for c in writes if c.layout.kv_lora_rank > 512 and c.layout.rope_dim > 512]
    assert {(c.activation, c.layout.format) for c in long} == pairs
    for placement in ("concat", "split"):
        met = {(c.rope, c.strides) for c in long if c.layout.placement == placement}
        assert met == {(r, s) for r in ("gptj", "neox") for s in ("contiguous", "unaligned")}

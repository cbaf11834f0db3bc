"""A process that flushes fp32's subnormals to zero gets the same bytes of the CPU's library."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from latentkv import CacheLayout, providers
from latentkv.ops.schemas import NATIVE_OP_NAMES
from latentkv.testing import Case, Problem, matrix

OTHERS = {"fp8_e4m3fn": "fp8_e4m3fnuz", "fp8_e4m3fnuz": "fp8_e4m3fn"}  # twice the value of a code's bits, or half


def cases() -> list[Case]:
    """The first of every combination of formats and dtypes that the matrix has of an op."""
    found: dict[object, Case] = {}
    for c in matrix():
        found.setdefault((c.op, c.layout.format, c.activation, c.to and c.to.format, c.query, c.norm), c)
    return list(found.values())


def problem(case: Case, flushes: bool) -> Problem:
    """Computed; where activations are fp16 some of them are subnormal, which they are not as fp32."""
    made = Problem(case, "cpu")
    if case.activation == "fp16" and case.op not in ("gather_cache", "convert_cache_"):
        for x in (made.k,) if case.op == "write_indexer_cache_" else (made.q_pe, made.kv_c, made.k_pe):
            x[..., ::3] *= 2.0**-14
    torch.set_flush_denormal(flushes)
    made.run(providers.native)
    torch.set_flush_denormal(False)
    return made


def check_every_op() -> None:
    tried = cases()
    assert {c.op for c in tried} == set(NATIVE_OP_NAMES)
    for case in tried:
        assert problem(case, True).differences(problem(case, False)) == [], case


def check_codes_that_stay() -> None:
    """A conversion to the other kind of e4m3, where the scales make up for the difference between the two."""
    codes = torch.cat([torch.arange(0x7F), torch.arange(0x81, 0xFF)]).to(torch.uint8)
    for format, other in OTHERS.items():
        same = 2.0 if other == "fp8_e4m3fnuz" else 0.5
        for scale in (None, 0.25, 3.0):
            source = CacheLayout(len(codes), 0, 1, format).allocate(1, "cpu", scale=scale)
            source.data.view(torch.uint8)[0, 0] = codes
            result = CacheLayout(len(codes), 0, 1, other).allocate(1, "cpu", scale=same * (scale or 1.0))
            torch.set_flush_denormal(True)
            providers.native.convert_cache_(source, result)
            torch.set_flush_denormal(False)
            assert torch.equal(result.data.view(torch.uint8)[0, 0], codes)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor has no such mode")
def test_flushed_subnormals_change_no_byte() -> None:
    """In a process of its own."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert torch.set_flush_denormal(True) and torch.full((), 2.0**-126) / 2 == 0
    check_every_op()
    check_codes_that_stay()

"""Where grids overlap, an op of ours lets the next one start only when nothing before the op still runs."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import pytest
import torch
from latentkv import CacheLayout, providers
from latentkv.ops.schemas import NATIVE_OP_NAMES
from latentkv.testing import Case, Problem

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
gdc_wait = pytest.importorskip("triton.language.extra.cuda").gdc_wait
gdc_launch_dependents = pytest.importorskip("triton.language.extra.cuda").gdc_launch_dependents

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs grids that overlap"
)
OTHER: dict[str, dict[str, Any]] = {
    "write_indexer_cache_": {"layout": CacheLayout(128, 64, 16)},
    "convert_cache_": {"to": CacheLayout(128, 64, 64)},
}


@triton.jit
def slow_writer(out, value, spins, scratch):
    """Lets the next grid go at once, as kernels of other libraries do."""
    gdc_launch_dependents()
    gdc_wait()
    x = tl.load(scratch)
    for _ in range(spins):
        x = x * 1.0001 + 0.1
    tl.store(scratch, x)
    tl.store(out + tl.arange(0, 128), value + tl.zeros([128], tl.int32))


@triton.jit
def early_reader(source, before, after):
    """Takes what is older than the grid before it, then waits for that."""
    at = tl.arange(0, 128)
    x = tl.load(source + at, volatile=True)
    gdc_launch_dependents()
    gdc_wait()
    tl.store(before + at, x)
    tl.store(after + at, tl.load(source + at, volatile=True))


@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("op", [*NATIVE_OP_NAMES, "mla_decode"])
def test_what_is_older_may_be_read_before_the_wait(op: str, name: str) -> None:
    provider = getattr(providers, name)
    if op == "mla_decode":
        if name == "native":
            pytest.skip("Triton's alone")
        q, cache = torch.zeros(2, 16, 192).bfloat16().cuda(), CacheLayout(128, 64, 16).allocate(64, "cuda")
        table, lengths = torch.arange(64, device="cuda").view(2, 32), torch.tensor([500, 3], device="cuda")

        def run() -> None:
            provider.mla_decode(q, cache, table, lengths, sm_scale=0.1)
    else:
        problem = Problem(Case(op, **{"layout": CacheLayout(128, 64, 16)} | OTHER.get(op, {})), "cuda")

        def run() -> None:
            problem.run(provider)

    out, before, after = (torch.zeros(128, dtype=torch.int32, device="cuda") for _ in range(3))
    scratch = torch.ones(1, device="cuda")
    stale = 0
    for i in range(1, 61):
        slow_writer[(1,)](out, i, 20000, scratch, num_warps=1, launch_pdl=True)
        run()
        early_reader[(1,)](out, before, after, num_warps=1, launch_pdl=True)
        torch.cuda.synchronize()
        assert (after == i).all()
        stale += int((before != i).any())
    assert stale == 0

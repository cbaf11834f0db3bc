"""Triton's own way to a GPU, as far as it goes without one: arguments specialised, kernels compiled for sm_90.

What the interpreter accepts the compiler may not, and other tests that compile choose the specialisation themselves.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from interpreted import INTERPRETED
from latentkv import CacheLayout, providers
from latentkv.ops.schemas import NATIVE_OP_NAMES
from latentkv.testing import Case, Problem, matrix

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="kernels are interpreted, or run on a GPU"),
    pytest.mark.skipif(providers.triton_problem("cuda") == "the package triton is not installed", reason="no Triton"),
]
SHARED_BYTES = 227 * 1024  # that a program may take on sm_90


class Hopper:
    """A driver that launches nothing. Triton keeps what it has loaded for as long as the process lives."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launched: list[tuple[str, int]] = []  # kernels, and the shared memory of each
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        assert kernel[:4] == b"\x7fELF"
        self.loaded.append(name)
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *args: self.launched.append((metadata.name, metadata.shared))


GPU = Hopper()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Hopper:
    """The kernels take a CPU's tensors for those of a Hopper GPU."""
    from latentkv.ops import triton as triton_ops
    from latentkv.ops.triton import launch
    from triton.runtime import driver

    GPU.loaded.clear()
    GPU.launched.clear()
    monkeypatch.setattr(driver, "_active", GPU)
    target = launch.Target(converts=True, pdl=True)
    monkeypatch.setattr(launch.Target, "of", classmethod(lambda cls, device: target))
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    monkeypatch.setattr(triton_ops, "device_limits", lambda device: (132, SHARED_BYTES))
    return GPU


CASES = [
    case
    for op in NATIVE_OP_NAMES
    for case in itertools.islice((c for c in matrix() if c.op == op), 5, None, 331 if op != "rope_" else 40)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles(case: Case, hopper: Hopper) -> None:
    Problem(case, "cpu").run(providers.triton)
    assert hopper.launched


@pytest.mark.parametrize(("format", "heads"), [("bf16", 16), ("bf16", 128), ("fp8_e4m3fn", 16), ("fp8_e5m2", 128)])
def test_attention_compiles(format: str, heads: int, hopper: Hopper) -> None:
    q = torch.zeros(3, heads, 576, dtype=torch.bfloat16)
    cache = CacheLayout(format=format).allocate(8, "cpu", scale=0.5)
    lengths = torch.tensor([5, 0, 300])
    providers.triton.mla_decode(q, cache, torch.zeros(3, 8, dtype=torch.int32), lengths, sm_scale=0.1)
    assert [name for name, _ in hopper.launched] == ["attend", "merge"]
    assert all(shared <= SHARED_BYTES for _, shared in hopper.launched)


def test_a_batch_of_another_size_compiles_nothing(hopper: Hopper) -> None:
    """The number of tokens, and the cache's capacity, are no part of a specialisation: not even whether one is 1."""
    for tokens in (1, 2, 16, 33, 64):
        Problem(Case("rope_write_cache_", CacheLayout(64, 16, 16), tokens=tokens, heads=2), "cpu").run(providers.triton)
        Problem(Case("gather_cache", CacheLayout(64, 16, 16), tokens=tokens), "cpu").run(providers.triton)
        q, cache = torch.zeros(tokens, 2, 80, dtype=torch.bfloat16), CacheLayout(64, 16, 16).allocate(3, "cpu")
        table, lengths = torch.zeros(tokens, 16 * tokens, dtype=torch.int32), torch.ones(tokens, dtype=torch.int32)
        providers.triton.mla_decode(q, cache, table, lengths, sm_scale=1.0)
    assert sorted(hopper.loaded) == ["attend", "merge", "move_rows", "update_kernel"]


def test_the_next_grid_is_let_go_after_the_wait(hopper: Hopper) -> None:
    """By every kernel: what the next one reads before its own wait may else still be written by the one before."""
    from latentkv.ops.triton import decode, indexer, read, update

    for op in ("rope_write_cache_", "write_cache_grouped_", "write_indexer_cache_", "gather_cache"):
        Problem(Case(op, CacheLayout(128, 64, 16), layers=2 if op == "write_cache_grouped_" else 1), "cpu").run(
            providers.triton
        )
    q, cache = torch.zeros(1, 2, 192, dtype=torch.bfloat16), CacheLayout(128, 64, 16).allocate(3, "cpu")
    table, lengths = torch.zeros(1, 16, dtype=torch.int32), torch.tensor([5])
    providers.triton.mla_decode(q, cache, table, lengths, sm_scale=1.0)
    kernels = (update.update_kernel, update.grouped_kernel, indexer.indexer_kernel, read.move_rows)
    for kernel in (*kernels, decode.attend, decode.merge):
        compiled = list(kernel.device_caches[0][0].values())
        assert compiled
        for ptx in (c.asm["ptx"] for c in compiled):
            assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1
            assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")

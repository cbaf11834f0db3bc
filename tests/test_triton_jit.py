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


# ------------------------------------------------------------------------------------------------------- the warm-up


def served(op: str, step: int, index: torch.dtype) -> tuple[Any, ...]:
    """The arguments of an op as an engine has them in its n-th step: sizes, widths, strides and alignment vary."""
    rows, sequences, blocks, columns = 1 + 41 * step % 97, 1 + 7 * step % 11, 3 + step % 5, 1 + 13 * step % 103
    layout = CacheLayout(48, 32, 16)
    cache, other = layout.allocate(blocks, "cpu"), layout.allocate(blocks, "cpu")

    def numbers(*shape: int) -> torch.Tensor:
        """Slices that begin anywhere, of rows that are wider."""
        wide = torch.zeros(*shape[:-1], shape[-1] + step % 9, dtype=index)
        return wide[..., step % 9 :]

    q, k, kv_c = (torch.zeros(rows, *shape, dtype=torch.bfloat16) for shape in ((2, 32), (32,), (48,)))
    table, slots = torch.zeros(64, 32), numbers(rows)[: rows - step % rows]
    if op == "rope_write_cache_":
        return (numbers(rows), q, k, kv_c, table, slots, *cache.op_arguments, False, False, 48, 32)
    if op == "write_cache_grouped_":
        return ([kv_c] * 2, [k] * 2, slots, [cache.data, other.data], [], [None] * 2, "bf16", 48, 32)
    if op == "gather_cache":
        lengths = numbers(sequences + 1)
        return (*cache.op_arguments, numbers(sequences, columns), lengths, torch.zeros(rows, 80), 48, None, 32)
    if op == "convert_cache_":
        return (
            *cache.op_arguments,
            *other.op_arguments,
            48,
            32,
            numbers(sequences, columns),
            numbers(sequences, columns),
        )
    q = torch.zeros(sequences, 2, 80, dtype=torch.bfloat16)
    return (q, *cache.op_arguments, numbers(sequences, columns), numbers(sequences), 48, 0.5, 32)


SERVED = ("rope_write_cache_", "write_cache_grouped_", "gather_cache", "convert_cache_", "mla_decode")


@pytest.mark.parametrize("op", SERVED)
def test_nothing_compiles_after_a_warm_up(op: str, hopper: Hopper) -> None:
    """Over a hundred steps; int32 and int64 are warmed up apart. Nothing runs meanwhile, and nothing is looked at."""
    from latentkv.ops.triton import read

    for index in (torch.int64, torch.int32):
        with providers.warm_up():
            providers.triton._call(op, *served(op, 100, index))
        assert hopper.loaded and not hopper.launched
        hopper.loaded.clear()
        for step in range(100):
            providers.triton._call(op, *served(op, step, index))
        assert hopper.launched and not hopper.loaded
        hopper.launched.clear()
    if op != "gather_cache":
        return
    # Many rows, and many sequences, are of other kernels; these have been compiled too.
    for rows, sequences in ((read.FEW_ROWS, 31), (read.FEW_ROWS + 1, 33), (read.LEAST_ROWS, 1024), (20000, 2000)):
        cache = CacheLayout(48, 32, 16).allocate(3, "cpu")
        table, lengths = (torch.zeros(*shape, dtype=torch.int32) for shape in ((sequences, 5), (sequences + 1,)))
        providers.triton._call(op, *cache.op_arguments, table, lengths, torch.zeros(rows, 80), 48, None, 32)
    assert not hopper.loaded


def test_a_grid_for_any_batch(hopper: Hopper) -> None:
    """A GPU takes 2^31 programs along the first axis, and 65535 along the others."""
    from latentkv.ops.checks import call_of
    from latentkv.ops.description import OPS
    from latentkv.ops.triton.decode import Tiles, decode_launches
    from latentkv.ops.triton.launch import Target

    batch, cache = 70000, CacheLayout(48, 32, 16).allocate(3, "meta")
    q, table = (
        torch.empty(batch, 16, 80, dtype=torch.bfloat16, device="meta"),
        torch.empty(batch, 4, device="meta").int(),
    )
    x = call_of(OPS["mla_decode"], (q, *cache.op_arguments, table, table[:, 0].contiguous(), 48, 0.5, 32))
    for splits in (1, 4):
        launches = decode_launches(Target(), x, q[..., :48], q[..., 0].float(), Tiles(16, 32, 4, 1, 1), splits)
        assert len(launches) == (1 if splits == 1 else 2)
        for launch in launches:
            assert launch.grid[0] >= batch and all(size <= 65535 for size in launch.grid[1:])

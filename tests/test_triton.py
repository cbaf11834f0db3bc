"""The Triton kernels without a GPU: interpreted, against the reference, and compiled for GPUs of both vendors.

The interpreter is slow, so it takes a part of the matrix. It has to be asked for before the kernels are imported, so it
runs in a fresh Python. Where there is a GPU, the other tests take the whole matrix.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import latentkv
import pytest
from conftest import Python
from latentkv import CacheLayout
from latentkv.ops.schemas import OP_NAMES
from latentkv.providers import Provider
from latentkv.testing.matrix import Case, Problem

triton = pytest.importorskip("triton")

UPDATES = (
    *("rope_", "write_cache_", "rope_write_cache_", "decode_prologue", "write_cache_grouped_", "write_indexer_cache_"),
)
PRELUDE = f"""
import collections, itertools, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
import latentkv
from latentkv import providers
from latentkv.ops import checks
from latentkv.ops import triton as triton_kernels
from latentkv.testing.matrix import Case, Problem, check, matrix
"""


def succeeds(python: Python, code: str) -> None:
    done = python(PRELUDE + code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# ---------------------------------------------------------------------------------------------------- the interpreter


@pytest.mark.parametrize("op", UPDATES)
def test_matrix(op: str, python: Python) -> None:
    """Two cases of every format that an op writes of every activation dtype; those with fewer heads and tokens."""
    succeeds(
        python,
        f"""
groups = collections.defaultdict(list)
for number, case in enumerate(case for case in matrix() if case.op == {op!r}):
    if case.tokens * case.heads <= 51 and case.layers <= 5:
        groups[case.activation, case.layout.format].append(case)
ran = 0
for number, cases in enumerate(groups.values()):
    for case in {{cases[(7 * number + step) % len(cases)] for step in (1, len(cases) // 2)}}:
        assert not (found := check(case, providers.triton, providers.reference, "cpu")), (str(case), found)
        ran += 1
assert ran >= 6
""",
    )


def test_rows_outside_are_skipped(python: Python) -> None:
    """As on a GPU, which does not look at the values: memory stays, or the query becomes zero."""
    succeeds(
        python,
        f"""
from unittest import mock
import latentkv.ops.triton as kernels
off = lambda device: False
with mock.patch.object(checks, "checks_values", off), mock.patch.object(kernels, "checks_values", off):
    for op, masked, in_place in itertools.product(
        {UPDATES}, ("masked", "rotate-masked"), (False, True),
    ):
        if in_place and op != "decode_prologue":
            continue
        layout = latentkv.CacheLayout(128 if "indexer" in op else 40, 16, 4)
        case = Case(op, layout, rows=masked, tokens=12, in_place=in_place, layers=2 if "grouped" in op else 1)
        pair = Problem(case, "cpu"), Problem(case, "cpu")
        for problem, provider in zip(pair, (providers.triton, providers.reference)):
            capacity = problem.index_cache.shape[0] * 4 if "indexer" in op else problem.cache.data.shape[0] * 4
            problem.slots[1], problem.slots[3], problem.slots[4] = capacity, 2**40, -(2**40)
            if problem.positions is not None:
                problem.positions[5], problem.positions[6], problem.positions[7] = 96, -1, 2**33
            problem.run(provider)
        assert not (found := pair[0].differences(pair[1])), (str(case), found)
""",
    )


def test_errors(python: Python) -> None:
    """The messages of the reference, for arguments and for values, and nothing has been written."""
    succeeds(
        python,
        """
import test_bad_input as bad
def run(provider, op, call):
    getattr({"triton": triton_kernels, "reference": providers._reference}[provider], op)(*call.values())
bad.run = run
for op, fault in bad.SINGLE:
    if hasattr(triton_kernels, op):
        said = [bad.message(name, op, bad.spoiled(op, fault, "cpu")) for name in ("triton", "reference")]
        assert said[0] == said[1], said
for op in bad.OPS:
    for argument, value in (("slot_mapping", 10**6), ("positions", 10**6), ("positions", -1)):
        said = []
        for name in ("triton", "reference"):
            call = bad.valid(op, "cpu")
            if argument in call:
                call[argument][:] = value
                said.append(bad.message(name, op, call))
        assert len(set(said)) == (argument in call), said
""",
    )


def test_empty(python: Python) -> None:
    """Without tokens, slots or heads: nothing happens, but for the query of padding, which becomes zero."""
    succeeds(
        python,
        """
for op in ("rope_", "write_cache_", "rope_write_cache_", "decode_prologue", "write_cache_grouped_"):
    for tokens, heads, slots in ((0, 2, 0), (3, 2, 0), (3, 0, 3)):
        case = Case(op, latentkv.CacheLayout(24, 8, 4), tokens=tokens, heads=heads)
        pair = Problem(case, "cpu"), Problem(case, "cpu")
        for problem, provider in zip(pair, (providers.triton, providers.reference)):
            problem.slots = problem.slots[:slots]
            problem.run(provider)
        assert not (found := pair[0].differences(pair[1])), (str(case), found)
""",
    )


# ------------------------------------------------------------------------------------------------------------ compiled

TARGETS = {"sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64), "gfx950": ("hip", "gfx950", 64)}
BASE = Case("rope_write_cache_", CacheLayout(), tokens=19, heads=16)
VARIANTS = {
    "bf16": BASE,
    "neox": replace(BASE, rope="neox", heads=128),
    "fp8": replace(BASE, layout=CacheLayout(format="fp8_e4m3fn")),
    "fnuz": replace(BASE, layout=CacheLayout(format="fp8_e4m3fnuz")),
    "fp8_ds_mla": replace(BASE, layout=CacheLayout(format="fp8_ds_mla")),
    "fp8_model1": replace(BASE, layout=CacheLayout(448, format="fp8_model1")),
    "rope": replace(BASE, op="rope_"),
    "write": replace(BASE, op="write_cache_", layout=CacheLayout(placement="split")),
    "prologue": replace(BASE, op="decode_prologue", norm="bf16", normalised="in-place"),
    "prologue-fp8": replace(
        BASE, op="decode_prologue", layout=CacheLayout(format="fp8_e4m3fn"), query="fp8_e4m3fn", norm="fp32", heads=128
    ),
    "grouped": replace(BASE, op="write_cache_grouped_", layers=1),
    "indexer": replace(BASE, op="write_indexer_cache_", layout=CacheLayout(128)),
}


def launches(case: Case, name: str) -> list[Any]:
    """Those that an op makes for a GPU, in place of their run."""
    from latentkv.ops import triton as triton_kernels
    from latentkv.ops.triton.launch import Launch, Target

    target, made = Target(hip=name.startswith("gfx"), converts=name == "sm_90", pdl=name == "sm_90"), list[Launch]()
    ops = {op: getattr(triton_kernels, op) for op in OP_NAMES if hasattr(triton_kernels, op)}
    run = mock.patch.object(Launch, "run", lambda launch: made.append(launch))
    with run, mock.patch.object(Target, "of", return_value=target):
        Problem(case, "cpu").run(Provider("triton", ops))
    return made


def specialised(launch: Any, name: str) -> tuple[Any, dict[str, Any], Any, Any]:
    """What Triton's launcher makes of the arguments: backend, options, bound arguments, and what code depends on."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget(*TARGETS[name]))
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}
    options |= {"launch_pdl": True} if launch.pdl else {}
    kernel = launch.kernel
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(
        **launch.args, **options
    )
    return backend, options, bound, specialization


def compiled(launch: Any, name: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, options, bound, specialization = specialised(launch, name)
    parsed, *source = launch.kernel._pack_args(backend, options, bound, specialization, options)
    return triton.compile(
        ASTSource(launch.kernel, *source), target=GPUTarget(*TARGETS[name]), options=parsed.__dict__
    )  # fmt: skip


def ptxas(code: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def lines_of(instruction: str, ptx: str) -> set[str]:
    """The lines of Python that an instruction was made of."""
    where, found = ("", ""), set()
    for line in ptx.splitlines():
        if match := re.search(r"\.loc\s.*// (\w+\.py):(\d+)", line):
            where = match.groups()
        if instruction in line:
            found.add(where)
    folder = Path(latentkv.__file__).parent / "ops" / "triton"
    return {(folder / name).read_text().splitlines()[int(number) - 1] for name, number in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles(variant: str, name: str) -> None:
    """In registers, one launch an op, with 16-byte access and no narrow one to activations."""
    (launch,) = launches(VARIANTS[variant], name)
    code = compiled(launch, name).asm
    if name == "sm_90":
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in ptxas(code["ptx"])
        assert "ld.global.v4.b32" in code["ptx"] and ".ftz" not in code["ptx"]
        assert all("tl.fma(" in line for line in lines_of("fma.rn", code["ptx"]))  # none but those that are written
        assert not re.search(r"ld\.global\.b(8|16)\b", code["ptx"])
        assert code["ptx"].index("griddepcontrol.wait") < code["ptx"].index("ld.global")
    else:
        assert re.search(r"\.private_segment_fixed_size: 0\b", code["amdgcn"])
        assert re.search(r"\.vgpr_spill_count: 0\b", code["amdgcn"])
        assert re.search(r"\.sgpr_spill_count: 0\b", code["amdgcn"])
        assert re.search(r"(buffer|global)_load_dwordx4", code["amdgcn"])
        assert not re.search(r"load_u(byte|short)", code["amdgcn"])


@pytest.mark.parametrize("op", UPDATES)
def test_one_kernel_for_all_batch_sizes(op: str) -> None:
    layout = CacheLayout(128 if op == "write_indexer_cache_" else 512, 64, 64)
    case = Case(op, layout, heads=16, layers=2 if op == "write_cache_grouped_" else 1, norm="bf16")

    def keys(sizes: Sequence[int]) -> set[str]:
        made = [launches(replace(case, tokens=tokens), "sm_90") for tokens in sizes]
        return {repr(specialised(launch, "sm_90")[3]) for some in made for launch in some}

    assert len(keys((1, 2, 3, 16, 17, 48, 400))) == 1


def test_layers_of_a_launch() -> None:
    """As many as a kernel's arguments have room for: 4 KB."""
    case = Case("write_cache_grouped_", CacheLayout(format="fp8_e4m3fn", placement="split"), tokens=2, layers=40)
    made = launches(case, "sm_90")
    assert [launch.grid[1] for launch in made] == [20, 20]
    backend, options, bound, specialization = specialised(made[0], "sm_90")
    _, signature, *_ = made[0].kernel._pack_args(backend, options, bound, specialization, options)

    def size(kind: Any) -> int:
        if isinstance(kind, tuple):
            return sum(map(size, kind))
        return 0 if kind == "constexpr" else 8

    assert sum(map(size, signature.values())) < 4096 - 16

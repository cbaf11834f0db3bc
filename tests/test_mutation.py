"""The matrix can fail: faults planted in a copy of the source are found, on the CPU and on an emulated chip."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import amd
import pytest
import torch
from cdna.memory import MemoryFault
from latentkv import CacheLayout, providers
from latentkv.cache.layouts import FORMATS
from latentkv.ops import schemas as ops
from latentkv.providers import Provider
from latentkv.testing import Case, Problem, check, first_difference, matrix

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
ALL = "all.cu"
DESCRIPTION = "python/latentkv/ops/description.py"
KEPT: list[object] = []  # a namespace lives as long as its library object


@dataclass(frozen=True)
class Fault:
    """A regular expression that fits once in a file, what to put in its place, and who must notice."""

    name: str
    file: str
    pattern: str
    replacement: str
    noticed_by: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


FAULTS = (
    Fault(
        "sign of the sine",
        "csrc_common/rope.h",
        r"sub_rn\(mul_rn\((\w+), cos\), mul_rn\((\w+), sin\)\)",
        r"add_rn(mul_rn(\1, cos), mul_rn(\2, sin))",
        ("matrix",),
    ),
    Fault(
        "no clamp to the finite range",
        "csrc_common/fp8.h",
        r"if \(u > float_bits\(kind\.max\)\) u = float_bits\(kind\.max\);",
        "",
        ("matrix", "sweep"),
    ),
    Fault(
        "ties away from zero",
        "csrc_common/fp8.h",
        r"\(uint32_t\{1\} << \(drop - 1\)\) - 1 \+ \(u >> drop & 1\)",
        "(uint32_t{1} << (drop - 1))",
        ("matrix", "sweep"),
    ),
    Fault(
        "capacity off by one",
        "csrc_common/prepare.cu",
        r"slot >= int64_t\{p\.capacity\}",
        "slot > int64_t{p.capacity}",
        ("bounds",),
    ),
    Fault(
        "last row before the padding left out",
        "csrc_common/prepare.cu",
        r"params\.tokens = static_cast<uint32_t>\(tokens\);",
        "params.tokens = static_cast<uint32_t>(tokens - (tokens > 1));",
        ("matrix",),
    ),
    Fault(
        "padding rows of the query not made zero",
        "csrc_common/decode_prologue.cu",
        r"update\.finish\(x\.N\);",
        "update.finish(x.T);",
        ("matrix",),
    ),
    Fault(
        "squares summed in another order",
        "csrc_common/latent.h",
        r"add_rn\(partial_\[i\], partial_\[i \+ half\]\)",
        "add_rn(partial_[i], partial_[2 * half - 1 - i])",
        ("matrix",),
    ),
    Fault(
        "a tile's scale without the carry",
        "csrc_common/latent.h",
        r"\(amax \+ 0x1FFFFF\) & 0xFF800000",
        "amax & 0xFF800000",
        ("matrix",),
    ),
)


AMD_FAULTS = (
    Fault(
        "a wrong lane index",
        "csrc_common/gpu.h",
        r"threadIdx\.x & \(\(1 << shift\) - 1\)",
        "threadIdx.x & ((1 << shift) - 2)",
        ("wrong bytes",),
    ),
    Fault(
        "a missing clamp",
        "csrc_hip/vendor.h",
        r"__builtin_amdgcn_fmed3f\(x, -Kind::max, Kind::max\)",
        "x",
        ("wrong bytes",),
    ),
    Fault(
        "a store past the end of the row",
        "csrc_common/cache_update.h",
        r"if \(at < end\) store_eight",
        "if (at <= end) store_eight",
        ("wrong bytes", "MemoryFault"),
    ),
    Fault(
        "half of a latent vector forgotten",
        "csrc_common/cache_update.h",
        r"if \(group\.index % 2 == 1\) i \+= group\.lanes,",
        "if (false) i += group.lanes,",
        ("wrong bytes",),
    ),
)


def matrix_notices(provider: Provider) -> Iterator[str]:
    for case in matrix():
        for difference in check(case, provider, providers.reference, "cpu"):
            yield f"{case}: {difference}"


def sweep_notices(provider: Provider) -> Iterator[str]:
    """Every bf16 number through every fp8 kind."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(128, 512)
    for format in (f for f in FORMATS if FORMATS[f].quantised):
        caches = [CacheLayout(512, 0, 1, format).allocate(128, "cpu") for _ in range(2)]
        for cache, who in zip(caches, (provider, providers.reference), strict=True):
            who.write_cache_(every, every[:, :0], torch.arange(128), cache)
        codes = [cache.data.view(torch.uint8) for cache in caches]
        if difference := first_difference(*codes):
            yield f"{format}: {difference}"


def bounds_notices(provider: Provider) -> Iterator[str]:
    """The first slot and the first positions that do not exist must raise."""
    for index, row, value in (("slots", 1, None), ("positions", 2, 96), ("positions", 3, -1)):
        p = Problem(Case("rope_write_cache_", CacheLayout(32, 32, 4)), "cpu")
        getattr(p, index)[row] = p.cache.num_slots if value is None else value
        try:
            p.run(provider)
        except RuntimeError:
            continue
        yield f"{index}[{row}]: no error"


NOTICES = {"matrix": matrix_notices, "sweep": sweep_notices, "bounds": bounds_notices}


def mutated(fault: Fault, folder: Path) -> None:
    for name in ("csrc_common", "csrc_cpu", "csrc_hip", "cmake"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    described = folder / DESCRIPTION
    described.parent.mkdir(parents=True)
    shutil.copy(ROOT / DESCRIPTION, described)
    file = folder / fault.file
    text, count = re.subn(fault.pattern, fault.replacement, file.read_text())
    assert count == 1, f"{fault}: {fault.pattern!r} fits {count} times in {fault.file}: adapt it to the source"
    file.write_text(text)
    # As one source, so that torch's headers are read once.
    listed = re.compile(r"set\(LATENTKV_SOURCES ([^)]*)\)")
    lists = folder / "CMakeLists.txt"
    (sources,) = listed.findall(lists.read_text())
    lists.write_text(listed.sub(f"set(LATENTKV_SOURCES {ALL})", lists.read_text()))
    (folder / "csrc_common" / ALL).write_text("".join(f'#include "{name}"\n' for name in sources.split()))


def built(folder: Path, namespace: str) -> Provider:
    """The CPU library of ``folder``, as csrc_cpu/CMakeLists.txt and cmake/torch.cmake make it but for -O3."""
    torch_folder, library = Path(torch.__file__).parent, folder / "mutant.so"
    generate = [folder / "cmake" / "generate_ops.py", folder / DESCRIPTION, folder / "generated"]
    subprocess.run([sys.executable, *generate], check=True)
    command = f"""{COMPILER} -std=c++20 -O0 -ffp-contract=off -fno-strict-aliasing -fPIC -shared -fvisibility=hidden -w
        -DTORCH_TARGET_VERSION=0x020A000000000000 -DLATENTKV_ARCHITECTURES="" -I{folder}/csrc_cpu -I{folder}/csrc_common
        -I{folder}/generated
        -isystem {torch_folder}/include -x c++ {folder}/csrc_common/{ALL} -x none
        {torch_folder}/lib/libtorch_cpu.so -Wl,--as-needed -Wl,--unresolved-symbols=ignore-in-shared-libs
        -o {library}"""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded = ctypes.CDLL(str(library))
    KEPT.extend([ops.define(namespace), loaded])
    loaded.latentkv_register.argtypes = [ctypes.c_char_p]
    loaded.latentkv_register(namespace.encode())
    found = getattr(torch.ops, namespace)
    return Provider(namespace, {name: getattr(found, name).default for name in ops.NATIVE_OP_NAMES})


def cross_built(folder: Path) -> Path:
    """The HIP library of ``folder`` for gfx942, by its own CMake files and the toolchain that was made for `_hip`.

    It takes every activation for bf16, as the others' kernels would treble the time.
    """
    build = folder / "build"
    host = folder / "csrc_common" / "prepare.h"
    text, count = re.subn(r"case ScalarType::BFloat16: (return aligned .*\n).*\n.*\n", r"default: \1", host.read_text())
    assert count == 1, "adapt it to the source"
    host.write_text(text)
    for made in list(ROOT.glob("build/*/rocm/made"))[:1]:  # else it is assembled again
        shutil.copytree(made.parent, build / "rocm")
    options = [
        "-DLATENTKV_HIP=cross",
        "-DLATENTKV_CUDA=OFF",
        "-DCMAKE_HIP_ARCHITECTURES=gfx942",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    for command in (["cmake", "-G", "Ninja", "-S", folder, "-B", build, *options], ["ninja", "-C", build, "_hip"]):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(list(map(str, command)), env=os.environ | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return build / "csrc_hip" / "_hip.abi3.so"


def emulated_notices(provider: Provider) -> str:
    """How the first of some cases of the matrix fails on an emulated chip."""
    for case in [case for case in matrix() if case.activation == "bf16"][::19]:
        try:
            if check(case, provider, providers.reference, "cpu"):
                return "wrong bytes"
        except MemoryFault:
            return "MemoryFault"
    return "nothing"


@pytest.mark.parametrize("fault", FAULTS + AMD_FAULTS, ids=str)
def test_the_source_still_has_the_place(fault: Fault, tmp_path: Path) -> None:
    mutated(fault, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    mutated(fault, tmp_path)
    provider = built(tmp_path, f"latentkv_mutant_{FAULTS.index(fault)}")
    for name in fault.noticed_by:
        assert next(NOTICES[name](provider), None), f"{name}: nothing was noticed"


@pytest.mark.slow
@pytest.mark.skipif(amd.problem() is not None, reason=f"no emulated AMD devices: {amd.problem()}")
@pytest.mark.parametrize("fault", AMD_FAULTS, ids=str)
def test_a_fault_is_noticed_on_an_emulated_chip(fault: Fault, tmp_path: Path) -> None:
    mutated(fault, tmp_path)
    provider = amd.load(cross_built(tmp_path), f"latentkv_amd_mutant_{AMD_FAULTS.index(fault)}", "gfx942")
    assert emulated_notices(provider) in fault.noticed_by


def test_nothing_is_noticed_without_a_fault() -> None:
    """The matrix itself is run by test_matrix.py."""
    assert list(sweep_notices(providers.native)) == []
    assert list(bounds_notices(providers.native)) == []

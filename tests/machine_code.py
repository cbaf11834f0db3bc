"""What the machine code of `_hip` says of itself: per kernel what it is, its registers and its memory accesses.

    PYTHONPATH=tests python tests/machine_code.py      # writes the tables of docs/amd.md

The tests hold every kernel to limits, and the tables to what this script would write.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import amd
import torch
from cdna.code_object import Kernel
from latentkv import CacheLayout
from latentkv.layouts import FORMATS
from latentkv.testing import Case, Problem
from latentkv.testing.matrix import ACTIVATIONS

DOCUMENT = Path(__file__).parents[1] / "docs" / "amd.md"
ARCHS = ("gfx90a", *amd.ARCHS)

# HBM bandwidth from AMD's data sheets, bytes a second.
CHIPS = {"gfx942": ("MI300X", 5.3e12), "gfx950": ("MI355X", 8.0e12)}

_NAME = re.compile(
    r"CacheUpdateINS_\d(Bf16|Fp16|Fp32)ENS_(?:8Verbatim|3Fp8IS\d_NS_\d)(E\dM\d(?:FN(?:UZ)?)?)?.*?ELi(\d)ELi(\d)E"
)
_BYTES = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class Variant:
    """A kernel and its template arguments.

    Attributes:
        activation: a key of ACTIVATIONS.
        format: of the rows.
        n: elements of a chunk: 16 bytes of them (the vector path), or 1.
        angle_bytes: of an entry of the cos/sin table.
    """

    kernel: Kernel
    activation: str
    format: str
    n: int
    angle_bytes: int

    def __str__(self) -> str:
        path = "vector" if self.n > 1 else "scalar"
        return f"{self.kernel.arch}-{self.activation}-{self.format}-{path}-angles{8 * self.angle_bytes}"

    @cached_property
    def mnemonics(self) -> Counter[str]:
        """How often each instruction stands in the code, whatever its encoding."""
        return Counter(re.sub(r"_(e32|e64|sdwa|dpp)$", "", i.mnemonic) for i in self.kernel.instructions)

    @property
    def accesses(self) -> Iterator[tuple[str, int, bool]]:
        """Every access to global memory: load or store, bytes per lane, whether non-temporal."""
        for i in self.kernel.instructions:
            if match := re.fullmatch(r"global_(load|store)_(\w+?)(?:_d16)?(?:_hi)?", i.mnemonic):
                yield match[1], _BYTES[match[2]], not {"nt", "slc"}.isdisjoint(i.text.split())  # gfx90a: slc


def variants(arch: str) -> list[Variant]:
    """Every kernel of the library for an architecture."""
    found = []
    for name, kernel in amd.shipped(arch).kernels.items():
        match = _NAME.search(name)
        assert match, f"{name}: no kernel that this script knows"
        activation, kind, n, angle_bytes = match.groups()
        format = f"fp8_{kind.lower()}" if kind else activation.lower()
        found.append(Variant(kernel, activation.lower(), format, int(n), int(angle_bytes)))
    return found


@dataclass(frozen=True)
class Run:
    """A decode step of DeepSeek-V3 on an emulated chip, counted: everything per token.

    Attributes:
        instructions: executed, by all waves.
        requested: bytes that lanes loaded and stored.
        needed: bytes that have to move, each of them once.
    """

    instructions: float
    requested: float
    needed: float


def run(arch: str, format: str, tokens: int = 8, heads: int = 16) -> Run:
    """bf16 activations and table, L = 512, R = 64, blocks of 64, int64 positions and slots."""
    layout = CacheLayout(512, 64, 64, format)
    problem = Problem(
        Case("rope_write_cache_", layout, table="bf16", strides="sliced", tokens=tokens, heads=heads), "cpu"
    )
    chip = amd.runtime()
    problem.run(amd.provider(arch))
    memory, element = chip.memory, ACTIVATIONS["bf16"].itemsize
    activations = (2 * heads * 64 + 2 * 64 + 512) * element
    needed = activations + 64 * element + 2 * 8 + (512 + 64) * FORMATS[format].dtype.itemsize
    return Run(chip.executed / tokens, (memory.bytes_read + memory.bytes_written) / tokens, needed)


def compiler() -> str:
    """The compiler that made the machine code."""
    path = amd.library()
    assert path is not None
    match = re.search(rb"clang version 22[.\d]*", path.read_bytes())
    assert match, "not made by clang-22"
    return match[0].decode()


def kernel_table() -> str:
    """Registers and instructions of the kernels for bf16 activations and a bf16 table."""
    lines = [
        f"Compiled by {compiler()}.",
        "",
        "| chip | row format | path | VGPRs | SGPRs | instructions | VALU | loads, stores | fp8 conversion |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arch in ARCHS:
        for v in variants(arch):
            if (v.activation, v.angle_bytes) != ("bf16", 2):
                continue
            moves = Counter(kind for kind, _, _ in v.accesses)
            valu = sum(count for name, count in v.mnemonics.items() if name.startswith("v_"))
            hardware = sum(v.mnemonics[m] for m in ("v_cvt_pk_fp8_f32", "v_cvt_pk_bf8_f32"))
            conversion = "" if not FORMATS[v.format].quantised else "hardware" if hardware else "integer"
            lines.append(
                f"| {arch} | {v.format} | {'vector' if v.n > 1 else 'scalar'} | {v.kernel.vgprs} | {v.kernel.sgprs} |"
                f" {len(v.kernel.instructions)} | {valu} | {moves['load']}, {moves['store']} | {conversion} |"
            )
    return "\n".join(lines)


def traffic_table() -> str:
    """Bytes and instructions per token as emulated, and what bandwidth alone would allow."""
    lines = [
        "| chip | row format | heads | wave instructions a token | bytes a token: asked for, needed |"
        " *estimate* at T = 8192, by bandwidth alone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arch, (chip, bandwidth) in CHIPS.items():
        fp8 = "fp8_e4m3fnuz" if arch == "gfx942" else "fp8_e4m3fn"
        for format in ("bf16", fp8):
            for heads in (16, 128):
                r = run(arch, format, heads=heads)
                estimate = 8192 * r.needed / bandwidth * 1e6
                lines.append(
                    f"| {chip} ({arch}) | {format} | {heads} | {r.instructions:.0f} |"
                    f" {r.requested:.0f}, {r.needed:.0f} | {estimate:.1f} us |"
                )
    return "\n".join(lines)


def written(text: str) -> str:
    """The document with its tables as this build has them."""
    for name, table in (("kernels", kernel_table()), ("traffic", traffic_table())):
        begin, end = f"<!-- {name}: tests/machine_code.py -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        assert found, f"{DOCUMENT.name} has no place for {name}"
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    return text


if __name__ == "__main__":
    torch.set_num_threads(1)
    DOCUMENT.write_text(written(DOCUMENT.read_text()))

"""What the machine code of `_hip` says of itself: per kernel what it is, its registers and its memory accesses.

    PYTHONPATH=python:tests python tests/machine_code.py      # writes the tables of docs/amd.md

The tests hold every kernel to limits, and the tables to what this script would write.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import amd
import torch
from cdna.code_object import Kernel
from latentkv import CacheLayout
from latentkv.cache.layouts import FORMATS
from latentkv.testing import Case, Problem
from latentkv.testing.matrix import ACTIVATIONS, Strides

DOCUMENT = Path(__file__).parents[1] / "docs" / "amd.md"
ARCHS = ("gfx90a", *amd.ARCHS)
FAMILIES = ("update", "prologue", "grouped", "indexer", "copy", "convert")
MOVING = ("copy", "convert")  # families of gather_cache and convert_cache_

# HBM bandwidth from AMD's data sheets, bytes a second.
CHIPS = {"gfx942": ("MI300X", 5.3e12), "gfx950": ("MI355X", 8.0e12)}

_NAME = re.compile(
    r"run_lane_groupsINS_\d+(CacheUpdate|GroupedWrite|IndexerWrite|CopyRows|ConvertRows)"
    r"I(?:NS_\d(Bf16|Fp16|Fp32)E)?((?:L[ib]\d+E)+)"
)
_BYTES = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
NATIVE_KINDS = {  # fp8 kinds that a chip has an instruction for
    "gfx90a": {},
    "gfx942": {"e4m3fnuz": "v_cvt_pk_fp8_f32"},
    "gfx950": {"e4m3fn": "v_cvt_pk_fp8_f32", "e5m2": "v_cvt_pk_bf8_f32"},
}


@dataclass(frozen=True)
class Code:
    """What the machine code of a kernel says."""

    kernel: Kernel

    @cached_property
    def mnemonics(self) -> Counter[str]:
        """How often each instruction stands in the code, whatever its encoding."""
        return Counter(re.sub(r"_(e32|e64|sdwa|dpp)$", "", i.mnemonic) for i in self.kernel.instructions)

    @property
    def accesses(self) -> Iterator[tuple[str, int, bool]]:
        """Every access to global memory: load or store, bytes per lane, whether non-temporal."""
        for i in self.kernel.instructions:
            if match := re.fullmatch(r"(?:global|buffer)_(load|store)_(\w+?)(?:_d16)?(?:_hi)?", i.mnemonic):
                yield match[1], _BYTES[match[2]], not {"nt", "slc"}.isdisjoint(i.text.split())  # gfx90a: slc

    @property
    def waves(self) -> int:
        """How many fit on a SIMD: per lane it has 512 VGPRs, AGPRs among both, dealt out by eights, and 800 SGPRs."""
        vgprs = -(-self.kernel.vgprs // 8) * 8
        return min(8 if self.kernel.sgprs <= 100 else 7, 512 // max(vgprs, 1))

    @property
    def figures(self) -> str:
        """Cells of a table: VGPRs, SGPRs, waves, instructions, VALU, loads and stores."""
        moves = Counter(kind for kind, _, _ in self.accesses)
        valu = sum(count for name, count in self.mnemonics.items() if name.startswith("v_"))
        k = self.kernel
        return (
            f"{k.vgprs} | {k.sgprs} | {self.waves} | {len(k.instructions)} | {valu} | {moves['load']}, {moves['store']}"
        )


@dataclass(frozen=True)
class Variant(Code):
    """A kernel and its template arguments.

    Attributes:
        family: update (the ops in place), prologue, grouped, indexer; copy or convert, which move rows.
        activation: a key of ACTIVATIONS. Of convert, fp32 or what is smaller, which stands here as bf16.
        n: elements of a chunk: 16 bytes of them (the vector path), or 1. Of copy, bytes: 16, 4 or 1. Of convert, the
            eight that lie together, or 1.
        angle_bytes: of an entry of the cos/sin table; 0 where nothing is rotated, or where either width will do.
        copies: whether it only stores things as they are. Others hold the encoders of all codes.
    """

    family: str
    activation: str
    n: int
    angle_bytes: int
    copies: bool

    def __str__(self) -> str:
        parts = [self.kernel.arch, self.family, self.activation, self.path]
        return "-".join(parts + [f"angles{8 * self.angle_bytes}"] * bool(self.angle_bytes))

    @property
    def path(self) -> str:
        """copies, vector, or scalar; copies is vector too."""
        return "copies" if self.copies else "vector" if self.n > 1 else "scalar"

    @property
    def native(self) -> dict[str, str]:
        """Kinds that it encodes by the chip's own instruction. The indexer's keys are e4m3fn."""
        kinds = {} if self.copies else NATIVE_KINDS[self.kernel.arch]
        return {k: name for k, name in kinds.items() if self.family != "indexer" or k == "e4m3fn"}

    @property
    def stores_tiles(self) -> bool:
        """Whether it can write the packed formats, which take bf16."""
        if self.family == "convert":
            return True
        return self.family != "indexer" and self.activation == "bf16" and not self.copies


def variants(arch: str) -> list[Variant]:
    """Every kernel of the library for an architecture."""
    found = []
    for name, kernel in amd.shipped(arch).items():
        match = _NAME.search(name)
        assert match, f"{name}: no kernel that this script knows"
        n, *rest = (int(x) for x in re.findall(r"L[ib](\d+)E", match[3]))
        if match[1] == "CopyRows":
            found.append(Variant(kernel, "copy", "bf16", n, 0, True))
            continue
        if match[1] == "ConvertRows":
            found.append(Variant(kernel, "convert", {2: "bf16", 4: "fp32"}[rest[0]], n, 0, False))
            continue
        angle_bytes, copies, is_prologue = (*rest, *(0, 0, 0)[len(rest) :])
        update = "prologue" if is_prologue else "update"
        family = {"GroupedWrite": "grouped", "IndexerWrite": "indexer"}.get(match[1], update)
        found.append(Variant(kernel, family, match[2].lower(), n, angle_bytes, bool(copies)))
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


def decode_step(
    op: str, format: str, tokens: int = 8, heads: int = 16, activation: str = "bf16", strides: Strides = "sliced"
) -> Case:
    """L = 512 (448 for DeepSeek-V4's format), R = 64, blocks of 64, a bf16 table, int64 positions and slots.

    decode_prologue normalises by a weight of the activations' dtype, and its query is of the cache's format.
    """
    packed = FORMATS[format].packed
    layout = CacheLayout(*(packed.dims if packed else (512, 64)), 64, format)
    if op == "write_indexer_cache_":
        layout = CacheLayout(128, 64, 64, "fp8_e4m3fn")
    case = Case(op, layout, activation, table="bf16", strides=strides, tokens=tokens, heads=heads)
    if op == "decode_prologue":
        case = replace(case, query=format if FORMATS[format].quantised else None, norm=activation)
    return case


def run(op: str, arch: str, format: str, tokens: int = 8, heads: int = 16) -> Run:
    """The :func:`decode_step`, with bf16 activations."""
    element = ACTIVATIONS["bf16"].itemsize
    stored = FORMATS[format].dtype.itemsize
    query = 2 * 64 * element  # of a head: read, written
    if op == "decode_prologue":
        query = (512 + 64) * (element + stored)
    row = 656 if format == "fp8_ds_mla" else (512 + 64) * stored
    key = (1 if op == "decode_prologue" else 2) * 64 * element
    problem, chip = Problem(decode_step(op, format, tokens, heads), "cpu"), amd.runtime()
    problem.run(amd.provider(arch))
    memory = chip.memory
    needed = heads * query + key + 512 * element + 64 * element + 2 * 8 + row
    return Run(chip.executed / tokens, (memory.bytes_read + memory.bytes_written) / tokens, needed)


def compiler() -> str:
    """The compiler that made the machine code."""
    path = amd.library()
    assert path is not None
    match = re.search(rb"clang version 22[.\d]*", path.read_bytes())
    assert match, "not made by clang-22"
    return match[0].decode()


def kernel_table() -> str:
    """Registers and instructions of the vector kernels for bf16 activations and a bf16 table."""
    lines = [
        f"Compiled by {compiler()}.",
        "",
        "| chip | kernel | VGPRs | SGPRs | waves | instructions | VALU | loads, stores | fp8 by the chip |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arch in ARCHS:
        rows = [v for v in variants(arch) if v.activation == "bf16" and v.n >= 8 and v.angle_bytes != 4]
        for v in sorted(rows, key=lambda v: (FAMILIES.index(v.family), not v.copies)):
            name = f"{v.family}{', copies' if v.copies else ''}"
            lines.append(f"| {arch} | {name} | {v.figures} | {', '.join(v.native)} |")
    return "\n".join(lines)


def traffic_table() -> str:
    """Bytes and instructions per token as emulated, and what bandwidth alone would allow."""
    lines = [
        "| chip | op | format | heads | wave instructions a token | bytes a token: asked for, needed |"
        " *estimate* at T = 8192, by bandwidth alone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arch, (chip, bandwidth) in CHIPS.items():
        fp8 = "fp8_e4m3fnuz" if arch == "gfx942" else "fp8_e4m3fn"
        updates = [("rope_write_cache_", format) for format in ("bf16", fp8, "fp8_ds_mla")]
        for op, format in (*updates, ("decode_prologue", "bf16"), ("decode_prologue", fp8)):
            for heads in (16, 128):
                r = run(op, arch, format, heads=heads)
                estimate = 8192 * r.needed / bandwidth * 1e6
                lines.append(
                    f"| {chip} ({arch}) | {op} | {format} | {heads} | {r.instructions:.0f} |"
                    f" {r.requested:.0f}, {r.needed:.0f} | {estimate:.1f} us |"
                )
    return "\n".join(lines)


def written(text: str, script: str, tables: dict[str, Callable[[], str]]) -> str:
    """The document with a script's tables as this build has them."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: tests/{script}.py -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        assert found, f"{DOCUMENT.name} has no place for {name}"
        text = f"{head}{begin}\n{table()}\n{end}{tail}"
    return text


TABLES = {"kernels": kernel_table, "traffic": traffic_table}

if __name__ == "__main__":
    torch.set_num_threads(1)
    DOCUMENT.write_text(written(DOCUMENT.read_text(), "machine_code", TABLES))

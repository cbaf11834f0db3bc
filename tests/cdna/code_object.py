"""AMD GPU code objects: what an ELF file says of its kernels, and their instructions as llvm-objdump spells them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from .errors import UnknownInstruction

# ---------------------------------------------------------------------------------------------------- instructions

# Registers that have a name: the number of the first scalar register, and how many there are.
_NAMED = {
    "flat_scratch": (102, 2), "flat_scratch_lo": (102, 1), "flat_scratch_hi": (103, 1),
    "vcc": (106, 2), "vcc_lo": (106, 1), "vcc_hi": (107, 1), "m0": (124, 1),
    "exec": (126, 2), "exec_lo": (126, 1), "exec_hi": (127, 1),
}  # fmt: skip

_FLAGS = {"nt", "sc0", "sc1", "offen", "clamp", "row_mirror", "row_half_mirror"}
_TOKEN = re.compile(r"(?:[^\s,\[\(]|\[[^\]]*\]|\([^)]*\))+")
_MODIFIER = re.compile(r"([a-z]\w*):(.+)")
_REGISTER = re.compile(r"([sva])(?:(\d+)|\[(\d+):(\d+)\])")
_INTEGER = re.compile(r"-?(0x[0-9a-f]+|\d+)")
_FLOAT = re.compile(r"-?\d+\.\d+(e[+-]?\d+)?")


@dataclass(frozen=True)
class Operand:
    """An operand.

    Attributes:
        kind: "v", "s" or "a" for registers, "integer", "float", or "word" for anything else, such as `off`.
        value: number of the first register, the constant, or the word.
        count: of registers.
        literal: of a constant: whether it takes a word of its own (32 bits) and so is no inline constant.
        neg, abs, sext: modifiers, in this order from without.
    """

    kind: str
    value: Any
    count: int = 1
    literal: bool = False
    neg: bool = False
    abs: bool = False
    sext: bool = False

    @staticmethod
    @cache
    def parse(text: str) -> Operand:
        """Any spelling of llvm-objdump."""
        flags = {}
        if re.match(r"-[|vs]", text):
            text, flags["neg"] = text[1:], True
        for name, pattern in (("abs", r"\|(.*)\|"), ("sext", r"sext\((.*)\)")):
            if match := re.fullmatch(pattern, text):
                text, flags[name] = match[1], True
        if text in _NAMED:
            return Operand("s", *_NAMED[text], **flags)
        if match := _REGISTER.fullmatch(text):
            first = int(match[2] or match[3])
            return Operand(match[1], first, int(match[4] or first) - first + 1, **flags)
        if _INTEGER.fullmatch(text):
            return Operand("integer", int(text, 0), literal="0x" in text, **flags)
        if _FLOAT.fullmatch(text):
            return Operand("float", float(text), **flags)
        return Operand("word", text, **flags)


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``modifiers`` has what follows the operands; flags are True."""

    address: int
    mnemonic: str
    operands: tuple[Operand, ...]
    modifiers: dict[str, Any]
    text: str

    @staticmethod
    def parse(text: str, address: int = 0) -> Instruction:
        """A line of llvm-objdump's, without the comment."""
        mnemonic, _, rest = text.partition(" ")
        operands, modifiers = [], {}
        for token in _TOKEN.findall(re.sub(r"<.*>", "", rest)):
            if token in _FLAGS:
                modifiers[token] = True
            elif match := _MODIFIER.fullmatch(token):
                modifiers[match[1]] = _modifier(match[2])
            else:
                operands.append(Operand.parse(token))
        return Instruction(address, mnemonic, tuple(operands), modifiers, text)

    def unknown(self, why: str) -> UnknownInstruction:
        """The exception to raise."""
        return UnknownInstruction(f"{self.text}: {why}")


def _modifier(text: str) -> Any:
    if text.startswith("["):
        return tuple(int(item) for item in text[1:-1].split(","))
    return int(text, 0) if _INTEGER.fullmatch(text) else text


# --------------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Descriptor:
    """A kernel descriptor, as LLVM's "User Guide for AMDGPU Backend" lays it out.

    Attributes:
        user_sgprs: how many there are; ``kernarg_pointer`` says whether the first two hold the kernel arguments.
        block_ids: for x, y and z, whether an SGPR holds the work-group's.
        preload: words of the kernel arguments that the last of the user SGPRs hold, as (first, count).
    """

    user_sgprs: int
    kernarg_pointer: bool
    block_ids: tuple[bool, bool, bool]
    preload: tuple[int, int]

    @staticmethod
    def decode(data: bytes, name: str) -> Descriptor:
        """Refuses whatever is not modelled."""
        private = struct.unpack_from("<I", data, 4)[0]
        rsrc1, rsrc2, properties, preload = struct.unpack_from("<IIHH", data, 48)
        expected = {
            "no private segment": (private | rsrc2 & 1, 0),
            "rounding to nearest even, all denormals kept": (rsrc1 >> 12 & 0xFF, 0xF0),
            "DX10_CLAMP and IEEE mode, and no FP16_OVFL": (rsrc1 >> 20 & 0x7F, 0b0001010),
            "only the kernel argument pointer and the work-group ids": (properties & ~8 | rsrc2 & 0x440, 0),
        }
        for what, (value, wanted) in expected.items():
            if value != wanted:
                raise UnknownInstruction(f"{name}: kernel descriptor: expected {what}")
        ids = rsrc2 >> 7 & 1, rsrc2 >> 8 & 1, rsrc2 >> 9 & 1
        user_sgprs, pointer, count = rsrc2 >> 1 & 31, bool(properties & 8), preload & 0x7F
        if count and user_sgprs != 2 * pointer + count:
            raise UnknownInstruction(f"{name}: kernel descriptor: expected arguments in all other user SGPRs")
        return Descriptor(user_sgprs, pointer, tuple(map(bool, ids)), (preload >> 7, count))  # type: ignore[arg-type]


@dataclass(eq=False)
class Kernel:
    """A kernel: its metadata, and its code, which is parsed when it is asked for."""

    name: str
    arch: str
    arguments: list[tuple[int, int]]  # (offset, size)
    kernarg_size: int
    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    lds_bytes: int
    wavefront: int
    raw_descriptor: bytes = field(repr=False)
    listing: list[str] = field(repr=False)

    @cached_property
    def descriptor(self) -> Descriptor:
        return Descriptor.decode(self.raw_descriptor, self.name)

    @cached_property
    def instructions(self) -> list[Instruction]:
        lines = (line.split("//") for line in self.listing)
        return [Instruction.parse(text.strip(), int(comment.split(":")[0], 16)) for text, comment in lines]


class CodeObject:
    """The kernels of a code object, by mangled name."""

    def __init__(self, elf: bytes, arch: str):
        sections = list(_sections(elf))
        symbols = dict(_symbols(elf, sections))
        metadata = next(_metadata(elf, sections))
        listings = _disassemble(elf, arch)
        self.kernels: dict[str, Kernel] = {}
        for kernel in metadata["amdhsa.kernels"]:
            get = kernel.get
            self.kernels[get(".name")] = Kernel(
                name=get(".name"),
                arch=arch,
                arguments=list(_arguments(get(".name"), get(".args", []))),
                kernarg_size=get(".kernarg_segment_size"),
                vgprs=get(".vgpr_count"),
                agprs=get(".agpr_count", 0),
                sgprs=get(".sgpr_count"),
                vgpr_spills=get(".vgpr_spill_count", 0),
                sgpr_spills=get(".sgpr_spill_count", 0),
                scratch_bytes=get(".private_segment_fixed_size"),
                lds_bytes=get(".group_segment_fixed_size"),
                wavefront=get(".wavefront_size"),
                raw_descriptor=symbols[get(".symbol")],
                listing=listings[get(".name")],
            )


def _arguments(name: str, arguments: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """Offset and size of each, which the caller passes; refuses those that the runtime would have to fill in."""
    for argument in arguments:
        if (kind := argument[".value_kind"]) not in ("by_value", "global_buffer"):
            raise UnknownInstruction(f"{name}: an argument of the kind {kind}")
        yield argument[".offset"], argument[".size"]


def _disassemble(elf: bytes, arch: str) -> dict[str, list[str]]:
    tool = shutil.which("llvm-objdump-22") or shutil.which("llvm-objdump") or "/opt/rocm/llvm/bin/llvm-objdump"
    command = [tool, "--disassemble", f"--mcpu={arch}", "-"]
    text = subprocess.run(command, input=elf, capture_output=True, check=True).stdout.decode()
    listings: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            lines = listings.setdefault(match[1], [])
        elif line.startswith("\t") and "//" in line:
            lines.append(line)
    return listings


# ------------------------------------------------------------------------------------------------------------- ELF


@dataclass(frozen=True)
class _Section:
    type: int
    address: int
    offset: int
    size: int
    link: int


_NOTE, _DYNSYM, _AMDGPU_METADATA = 7, 11, 32


def _sections(elf: bytes) -> Iterator[_Section]:
    start, entry, count = (struct.unpack_from(kind, elf, at)[0] for kind, at in (("<Q", 40), ("<H", 58), ("<H", 60)))
    for at in range(start, start + entry * count, entry):
        _, kind, _, address, offset, size, link = struct.unpack_from("<IIQQQQI", elf, at)
        yield _Section(kind, address, offset, size, link)


def _symbols(elf: bytes, sections: list[_Section]) -> Iterator[tuple[str, bytes]]:
    """The dynamic symbols and the bytes they stand for."""
    for table in (section for section in sections if section.type == _DYNSYM):
        for at in range(table.offset + 24, table.offset + table.size, 24):
            name, _, _, section, value, size = struct.unpack_from("<IBBHQQ", elf, at)
            start = sections[table.link].offset + name
            offset = value - sections[section].address + sections[section].offset
            yield elf[start : elf.index(0, start)].decode(), elf[offset : offset + size]


def _metadata(elf: bytes, sections: list[_Section]) -> Iterator[dict[str, Any]]:
    for note in (section for section in sections if section.type == _NOTE):
        name_size, size, kind = struct.unpack_from("<III", elf, note.offset)
        start = note.offset + 12 + -(-name_size // 4) * 4
        if kind == _AMDGPU_METADATA:
            yield _Msgpack(elf[start : start + size]).value()


# Tags of MessagePack that say how many bytes tell the size of a string, an array or a map, or hold a number.
_STRING, _ARRAY, _MAP = 0xD9, 0xDC, 0xDE
_SIZES = {_STRING: 1, 0xDA: 2, _ARRAY: 2, 0xDD: 4, _MAP: 2, 0xDF: 4, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}


class _Msgpack:
    """Reads what code objects use of MessagePack: maps, arrays, strings, numbers, booleans."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def _take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def value(self) -> Any:
        tag = self._take(1)[0]
        if tag < 0x80:
            return tag
        if tag in (0xC2, 0xC3):
            return tag == 0xC3
        if tag < 0xC0:  # short ones have their size in the tag
            size, tag = (tag & 31, _STRING) if tag >= 0xA0 else (tag & 15, _ARRAY if tag >= 0x90 else _MAP)
        else:
            size = int.from_bytes(self._take(_SIZES[tag]), "big")
        if _STRING <= tag < _ARRAY:
            return self._take(size).decode()
        if _ARRAY <= tag < _MAP:
            return [self.value() for _ in range(size)]
        return {self.value(): self.value() for _ in range(size)} if tag >= _MAP else size

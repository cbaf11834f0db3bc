"""The emulator of CDNA instructions (tests/cdna): against AMD's pseudocode, ml_dtypes, numpy and exact fractions."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

ml_dtypes = pytest.importorskip("ml_dtypes")
# The wheel of tinygrad carries the pseudocode of AMD's published machine-readable ISA.
PCODE = pytest.importorskip("tinygrad.runtime.autogen.amd.cdna.str_pcode").PCODE

import pseudocode as pc  # noqa: E402
from cdna import alu  # noqa: E402
from cdna import scalar as scalar_unit  # noqa: E402
from cdna import vector as vector_unit  # noqa: E402
from cdna.code_object import Kernel  # noqa: E402
from cdna.machine import ARCHS, State, batches, dispatch, execute, unknown  # noqa: E402
from cdna.memory import Memory, MemoryFault, UnknownInstruction  # noqa: E402
from pseudocode import Value  # noqa: E402

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
Array = np.ndarray[Any, Any]
ALL = 0xFFFF_FFFF_FFFF_FFFF
FP8 = {
    "gfx942": {"fp8": ml_dtypes.float8_e4m3fnuz, "bf8": ml_dtypes.float8_e5m2fnuz},
    "gfx950": {"fp8": ml_dtypes.float8_e4m3fn, "bf8": ml_dtypes.float8_e5m2},
}
FP8_FORMATS = {
    "gfx942": {"fp8": pc.FP8_FNUZ, "bf8": pc.BF8_FNUZ},
    "gfx950": {"fp8": pc.FP8_OCP, "bf8": pc.BF8_OCP},
}


def base_name(mnemonic: str) -> str:
    return re.sub(r"_(e32|e64|sdwa|dpp)$", "", mnemonic)


TEXTS = {base_name(op.name.lower()): text for op, text in PCODE.items()}
ENCODINGS: dict[str, set[str]] = {base: set() for base in TEXTS}
for operation in PCODE:
    ENCODINGS[base_name(operation.name.lower())].add(type(operation).__name__)

# --- What the pseudocode leaves open --------------------------------------------------------------------------------

# Texts that are not in the language, or say nothing that can be computed; with what tests the instruction instead.
NOT_EVALUATED = {
    "s_waitcnt": "prose; test_no_effect",
    "ds_swizzle_b32": "prose and tables; test_swizzle, by the formula of the assembler's manual",
    "v_rcp_f32": "the text is the exact function, the instruction is within one ulp; test_approximate",
    "v_rcp_iflag_f32": "likewise",
    "v_rsq_f32": "likewise",
    "v_sqrt_f32": "likewise",
    "v_exp_f32": "likewise",
    "v_log_f32": "likewise",
    "v_nop": "no text; test_no_effect",
    "v_swap_b32": "writes its source, too; test_swap",
}

ONLY_DENOMINATOR = "if S0.f32 == S1.f32 then\n// Only scale the denominator\nD0.f32 = ldexp(S0.f32"

# Texts that must be read otherwise than written: (what they say, what is meant).
READINGS: dict[str, list[tuple[str, str]]] = {
    "v_div_scale_f32": [
        # Of a denominator whose reciprocal is denormal 2**64 times is infinite; the quotient grows if it shrinks.
        (f"f32)) then\nVCC = 0x1LL;\n{ONLY_DENOMINATOR}, 64)", f"f32)) then\nVCC = 0x1LL;\n{ONLY_DENOMINATOR}, -64)"),
        ("VCC = 0x0LL", "D0.f32 = S0.f32; VCC.u64[laneId] = 1'0U"),  # one lane's bit, and where no branch scales
        ("VCC = 0x1LL", "VCC.u64[laneId] = 1'1U"),
        ("1.0 / 64'F(S1.f32) == DENORM.f64", "1.0F / S1.f32 == DENORM.f32"),  # no f32 has a denormal f64 reciprocal
    ],
    # The scale must undo what v_div_scale did, which is 2**64 up or down; and there is one rounding, for a quotient
    # below the normal numbers would be rounded twice otherwise.
    "v_div_fmas_f32": [
        (
            "2.0F ** 32 * fma(S0.f32, S1.f32, S2.f32)",
            "scaled_fma(S0.f32, S1.f32, S2.f32, exponent(S2.f32) > 127 ? 64 : -64)",
        )
    ],
    # S1 was asked before; where the quotient overflows, it arrives as infinity or, after another step, as NaN.
    "v_div_fixup_f32": [("elsif exponent(S1.f32) == 255 then", "elsif exponent(S0.f32) == 255 then")],
    "v_bitop3_b16": [("D.b16", "D0.b16")],
    "v_bitop3_b32": [("D.b32", "D0.b32")],
    "v_pk_mov_b32": [("S0.u32[", "S0.u64["), ("S1.u32[", "S1.u64[")],  # the upper halves, too
    # f32_to_f16 rounds as ROUND_MODE says, which is to nearest but for this.
    "v_cvt_pkrtz_f16_f32": [("f32_to_f16", "f32_to_f16_rtz")],
    "v_ldexp_f32": [("S0.f32 * 2.0F ** S1.i32", "ldexp(S0.f32, S1.i32)")],  # of which 2**S1 may overflow
    # Of zero and of denormals the text takes the field of the exponent.
    "v_frexp_exp_i32_f32": [("exponent(S0.f32) - 127 + 1", "frexp_exponent(S0.f32)")],
    # The sum with 0.5 is rounded in the text, and it loses the sign of zero.
    **{n: [(TEXTS[n], f"D0.{n[-3:]} = rint(S0.{n[-3:]})")] for n in ("v_rndne_f16", "v_rndne_f32", "v_rndne_f64")},
}


def scaled_fma(a: Value, b: Value, c: Value, exponent: Value) -> Value:
    x, y, z = a.number, b.number, c.number
    if not all(map(math.isfinite, (x, y, z))):
        return pc.fma(a, b, c)
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    return pc.floating(exact * Fraction(2) ** exponent.number, a) if exact else pc.fma(a, b, c)


def half_towards_zero(a: Value) -> Value:
    half = pc.convert_float(a, "f", 16)
    return half._replace(bits=half.bits - 1) if abs(half.number) > abs(a.number) else half


@cache
def text_of(name: str) -> str:
    text = TEXTS[name]
    for said, meant in READINGS.get(name, []):
        assert said in text, name
        text = text.replace(said, meant)
    return text


FUNCTIONS: dict[str, Callable[..., Value]] = {
    "scaled_fma": scaled_fma,
    "f32_to_f16_rtz": half_towards_zero,
    "rint": pc.rounding(round),
    "frexp_exponent": lambda a: pc.integer(math.frexp(a.number)[1]),
    "CalcGlobalAddr": lambda address, *_: address,
    "CalcScalarGlobalAddr": lambda address, *_: address,
    "CalcBufferAddr": lambda address, *_: address,
    "CalcDsAddr": lambda address, *_: address,
}


@cache
def compiled(name: str, arch: str = "gfx942") -> Callable[[pc.Env], pc.Env]:
    functions = dict(FUNCTIONS)
    for kind, fmt in FP8_FORMATS[arch].items():
        numbers = np.arange(256, dtype=U8).view(FP8[arch][kind]).astype(np.float32).view(U32)
        functions[f"f32_to_{kind}"] = lambda a, fmt=fmt: Value("b", 8, pc.encode(a.number, fmt))
        functions[f"{kind}_to_f32"] = lambda a, numbers=numbers: Value("f", 32, int(numbers[a.bits]))
    for called in re.findall(r"\b([vs]_\w+)\(", text_of(name)):  # one instruction's text may call another's
        functions[called] = lambda *arguments, called=called: call(called, arguments)
    return pc.compile_text(text_of(name), functions)


def call(name: str, arguments: tuple[Value, ...]) -> Value:
    env = {f"S{i}": a for i, a in enumerate(arguments)} | {"D0": Value("b", 0, 0)}
    result: Value = compiled(name)(env)["D0"]
    return result


@cache
def source_types(name: str) -> list[tuple[str, int]]:
    """(kind, width) of S0, S1, ..., by the views that the text takes of them."""
    text, types = text_of(name), []
    if constant := re.fullmatch(r"v_cmpx?_(?:f|t|tru)_([uif])(\d+)", name):  # which don't look at their operands
        return [(constant[1], int(constant[2]))] * 2
    for i in range(max((int(i) + 1 for i in re.findall(r"\bS([012])\b", text)), default=0)):
        views = re.findall(rf"\bS{i}(\[[^\]]*\])?\.([uibf])(\d+)", text) or [("[]", "u", "32")]
        wide = any(width == "64" for _, _, width in views) or re.search(r"\bS0\[63 : 32\]|D0\.u32\[63", text)
        narrow = all(not part and width == "16" for part, _, width in views)
        types.append((views[0][1], 64 if wide else 16 if narrow else 32))
    return types


# --- Lines of assembly ----------------------------------------------------------------------------------------------


@dataclass
class Line:
    """One instruction as the disassembler spells it."""

    text: str
    mnemonic: str = field(init=False)
    operands: list[str] = field(init=False)
    modifiers: dict[str, str] = field(init=False)
    literal: int = field(init=False)

    def __post_init__(self) -> None:
        self.mnemonic, _, rest = self.text.partition(" ")
        parts = re.split(r",\s*(?![^\[(|]*[\])])", rest) if rest else []
        words = parts[-1].split(" ") if parts else []
        self.operands = [p.strip() for p in parts[:-1]] + words[:1]
        self.modifiers = {k: v for k, _, v in (w.partition(":") for w in words[1:])}
        place = {"v_fmamk_f32": 2, "v_fmaak_f32": 3}.get(self.name)
        self.literal = int(self.operands.pop(place), 0) if place else 0

    @cached_property
    def name(self) -> str:
        return base_name(self.mnemonic)

    @cached_property
    def sources(self) -> list[tuple[str, str, int]]:
        """(operand, kind, width) for S0, S1, ..."""
        types = source_types(self.name)
        operands = self.operands[: -1 if self.mask_in else None]
        return [(o, *t) for o, t in zip(operands[len(operands) - len(types) :], types, strict=True)]

    @cached_property
    def destinations(self) -> list[str]:
        return self.operands[: len(self.operands) - len(self.sources) - bool(self.mask_in)]

    @cached_property
    def mask_in(self) -> str | None:
        """The operand that the text calls VCC, where there is one."""
        explicit = re.match(r"v_(cndmask|addc_co|subb_co|subbrev_co)", self.mnemonic)
        return self.operands[-1] if explicit else None

    @property
    def packs_floats(self) -> bool:
        return re.fullmatch(r"v_pk_\w+_f32", self.name) is not None

    def list_of(self, modifier: str, default: list[int]) -> list[int]:
        return (
            [int(x) for x in self.modifiers[modifier].strip("[]").split(",")] if modifier in self.modifiers else default
        )


def is_vector(operand: str) -> bool:
    return re.match(r"v[\d\[]", operand) is not None


def wide(operand: str) -> bool:
    return operand in ("vcc", "exec") or len(registers(operand)[1]) == 2


@cache
def registers(operand: str) -> tuple[str, list[int]]:
    """v[2:3] as ("v", [2, 3])."""
    match = re.fullmatch(r"([vs])(?:(\d+)|\[(\d+):(\d+)\])", operand)
    assert match, operand
    return match[1], [int(match[2])] if match[2] else list(range(int(match[3]), int(match[4]) + 1))


@cache
def constant(operand: str, width: int) -> int | None:
    """An inline constant or a literal as the bits of an operand."""
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand):
        return pc.mask(int(operand, 0), width)
    if re.fullmatch(r"-?\d+\.\d+", operand):
        if operand == "0.15915494":  # 1 / (2 pi), to the precision of the operand
            return {16: 0x3118, 32: 0x3E22F983, 64: 0x3FC45F306DC9C882}[width]
        return pc.encode(Fraction(operand), pc.FLOATS["f"][width])
    return None


@dataclass
class Picture:
    """A copy of a state; also what the state should be."""

    v: Array
    s: Array
    vcc: list[int]
    exec_mask: list[int]
    scc: list[int]

    @classmethod
    def of(cls, state: State) -> Picture:
        masks = ([int(x) for x in getattr(state, name)] for name in ("vcc", "exec_mask", "scc"))
        return cls(state.v.copy(), state.s[:100].copy(), *masks)

    def active(self, wave: int) -> list[int]:
        return [lane for lane in range(64) if self.exec_mask[wave] >> lane & 1]

    def read(self, operand: str, width: int, wave: int, lane: int = 0) -> int:
        bits = constant(operand, width)
        if bits is not None:
            return bits
        if operand in ("vcc", "exec"):
            return self.vcc[wave] if operand == "vcc" else self.exec_mask[wave]
        file, numbers = registers(operand)
        array, column = (self.v, 64 * wave + lane) if file == "v" else (self.s, wave)
        return pc.mask(sum(int(array[n, column]) << 32 * i for i, n in enumerate(numbers)), width)

    def write(self, operand: str, bits: int, wave: int, lane: int = 0) -> None:
        if operand == "vcc":
            self.vcc[wave] = bits
        elif operand == "exec":
            self.exec_mask[wave] = bits
        else:
            file, numbers = registers(operand)
            array, column = (self.v, 64 * wave + lane) if file == "v" else (self.s, wave)
            for i, n in enumerate(numbers):
                array[n, column] = bits >> 32 * i & 0xFFFFFFFF


def canonical(words: Array, kind: str, arch: str) -> Array:
    """Every NaN of a kind as one: the emulator need not know which NaN the hardware makes."""
    if kind in ("f16", "bf16"):
        halves = np.ascontiguousarray(words).view(U16)
        inf = 0x7C00 if kind == "f16" else 0x7F80
        return np.where((halves & 0x7FFF) > inf, U16(0x7FFF), halves).view(U32)
    if kind == "f64":
        low, high = words
        nan = (high & 0x7FFFFFFF) + (low != 0) > 0x7FF00000
        return np.where(nan, U32(0x7FFFFFFF), words)
    if kind == "f32":
        return np.where((words & 0x7FFFFFFF) > 0x7F800000, U32(0x7FFFFFFF), words)
    if kind in FP8[arch]:
        codes = np.ascontiguousarray(words).view(U8)
        return np.where(np.isnan(codes.view(FP8[arch][kind]).astype(np.float32)), U8(0x7F), codes).view(U32)
    return words


def compare(line: Line, got: Picture, want: Picture, before: Picture, arch: str, bits: int) -> None:
    """Compares every register, not only the destination: an instruction must leave the others alone."""
    kind = result_kind(line.name)
    rows = [row for d in line.destinations[:1] if is_vector(d) for row in registers(d)[1]]
    for name in ("v", "s"):
        a, b = getattr(got, name), getattr(want, name)
        if name == "v" and rows:
            a, b = a.copy(), b.copy()
            a[rows], b[rows] = (canonical(x[rows] & U32(bits), kind, arch) for x in (a, b))
        wrong = np.argwhere(a != b)
        if len(wrong):
            row, column = wrong[0]
            wave, lane = divmod(int(column), 64) if name == "v" else (int(column), 0)
            inputs = [f"{o}={before.read(o.strip('-|'), w, wave, lane):#x}" for o, _, w in line.sources if "(" not in o]
            found, expected = (int(x[row, column]) for x in (a, b))
            pytest.fail(
                f"{line.text}: {name}{row} is {found:#x}, not {expected:#x}, in {len(wrong)} places; first in wave "
                f"{wave}, lane {lane}: {' '.join(inputs)}, before {int(getattr(before, name)[row, column]):#x}"
            )
    for name in ("vcc", "exec_mask", "scc"):
        assert getattr(got, name) == getattr(want, name), f"{line.text}: {name}"


# --- The oracle -----------------------------------------------------------------------------------------------------


SELECTS = ["BYTE_0", "BYTE_1", "BYTE_2", "BYTE_3", "WORD_0", "WORD_1", "DWORD"]


def flip(bits: int, operand: str, width: int) -> int:
    """The source modifiers neg and abs, as floats have them."""
    if "|" in operand:
        bits = pc.mask(bits, width - 1)
    return bits ^ 1 << (width - 1) if operand.startswith("-") else bits


def selected(bits: int, select: str, signed: bool) -> int:
    """SDWA: BYTE_1, WORD_0, ... of a source."""
    if select == "DWORD":
        return bits
    width = 8 if select.startswith("BYTE") else 16
    bits = pc.mask(bits >> width * int(select[-1]), width)
    return pc.mask(Value("i", width, bits).number, 32) if signed else bits


def merged(bits: int, old: int, select: str, unused: str) -> int:
    """SDWA: the result in BYTE_1, WORD_0, ... of the destination."""
    if select == "DWORD":
        return bits
    width = 8 if select.startswith("BYTE") else 16
    low = width * int(select[-1])
    window, placed = ((1 << width) - 1) << low, pc.mask(bits, width) << low
    if unused == "UNUSED_PRESERVE":
        return old & ~window | placed
    if unused == "UNUSED_SEXT" and bits >> (width - 1) & 1:
        return pc.mask(~0 << low, 32) & ~window | placed
    return placed


def dpp_lane(modifiers: dict[str, str], lane: int) -> int | None:
    """The lane that a lane reads, None where there is none."""
    row, at = lane & ~15, lane & 15
    for name, argument in modifiers.items():
        n = int(argument) if argument.isdigit() else 0
        if name == "quad_perm":
            return lane & ~3 | int(argument.strip("[]").split(",")[lane & 3])
        if name in ("row_shl", "row_shr"):
            source = at + n if name == "row_shl" else at - n
            return row + source if 0 <= source < 16 else None
        if name == "row_ror":
            return row + (at - n) % 16
        if name in ("wave_shl", "wave_shr"):
            source = lane + n if name == "wave_shl" else lane - n
            return source if 0 <= source < 64 else None
        if name in ("wave_rol", "wave_ror"):
            return (lane + n if name == "wave_rol" else lane - n) % 64
        if name in ("row_mirror", "row_half_mirror"):
            return lane ^ 15 if name == "row_mirror" else lane ^ 7
        if name == "row_bcast":  # the last lane of a row (or half) to the next one
            return (31 if lane > 31 else None) if n == 31 else row - 1 if row else None
        if name == "row_newbcast":
            return row + n
    raise AssertionError(modifiers)


def expected(line: Line, before: Picture, arch: str) -> Picture:
    """The state after a vector or scalar ALU instruction, by its pseudocode."""
    want = Picture(before.v.copy(), before.s.copy(), list(before.vcc), list(before.exec_mask), list(before.scc))
    if line.mnemonic.startswith("s_"):
        for wave in range(len(before.scc)):
            scalar(line, before, want, wave, arch)
        return want
    outputs = [d for d in line.destinations if not is_vector(d)] + ["exec"] * line.name.startswith("v_cmpx")
    for wave in range(len(before.scc)):
        masks = dict.fromkeys(outputs, 0)  # lanes that aren't active give 0
        for lane in before.active(wave):
            vector(line, before, want, wave, lane, masks, arch)
        for operand, bits in masks.items():
            want.write(operand, bits, wave)
    return want


def scalar(line: Line, before: Picture, want: Picture, wave: int, arch: str) -> None:
    """What the pseudocode does with one wave."""
    env: pc.Env = {f"S{i}": Value("b", w, before.read(o, w, wave)) for i, (o, _, w) in enumerate(line.sources)}
    env |= {"SCC": Value("u", 1, before.scc[wave]), "EXEC": Value("u", 64, before.exec_mask[wave])}
    for destination in line.destinations:
        env["D0"] = Value("b", 64 if wide(destination) else 32, before.read(destination, 64, wave))
    compiled(line.name, arch)(env)
    want.scc[wave], want.exec_mask[wave] = env["SCC"].bits & 1, env["EXEC"].bits
    if line.destinations:
        want.write(line.destinations[0], env["D0"].bits, wave)


def source_bits(line: Line, i: int, before: Picture, wave: int, lane: int | None) -> int:
    """An operand with its modifiers applied; 0 where DPP has no lane to read."""
    operand, _, width = line.sources[i]
    op_sel, op_sel_hi = line.list_of("op_sel", [0] * 4), line.list_of("op_sel_hi", [1] * 3)
    select = line.modifiers.get(f"src{i}_sel")
    bits = constant(operand, width)
    if bits is not None:
        return bits
    plain = re.sub(r"^-|\||^sext\(|\)$", "", operand)
    bits = 0 if lane is None else before.read(plain, max(width, 32), wave, lane)
    if line.packs_floats:
        halves = [bits >> 32 * s[i] & 0xFFFFFFFF for s in (op_sel, op_sel_hi)]
        signs = [line.list_of(m, [0] * 3)[i] << 31 for m in ("neg_lo", "neg_hi")]
        return (halves[0] ^ signs[0]) | (halves[1] ^ signs[1]) << 32
    if select and "SDWA" not in text_of(line.name):
        bits = selected(bits, select, operand.startswith("sext"))
    elif width == 16:
        bits >>= 16 * op_sel[i]
    return flip(pc.mask(bits, width), operand, width)


def vector(line: Line, before: Picture, want: Picture, wave: int, lane: int, masks: dict[str, int], arch: str) -> None:
    """What the pseudocode does with one lane; ``masks`` collects the bits that go to scalar registers."""
    text, modifiers, name, destination = text_of(line.name), line.modifiers, line.name, line.destinations[0]
    old = before.read(destination, 64, wave, lane) if is_vector(destination) else 0
    from_lane: int | None = lane
    if line.mnemonic.endswith("_dpp"):
        rows, banks = (int(modifiers[m], 0) for m in ("row_mask", "bank_mask"))
        from_lane = dpp_lane(modifiers, lane)
        if from_lane is not None and not before.exec_mask[wave] >> from_lane & 1:
            from_lane = None
        if not rows >> lane // 16 & banks >> lane % 16 // 4 & 1 or (
            from_lane is None and "bound_ctrl" not in modifiers
        ):
            return
    env: pc.Env = {
        f"S{i}": Value("b", width, source_bits(line, i, before, wave, lane if i else from_lane))
        for i, (_, _, width) in enumerate(line.sources)
    }
    op_sel = line.list_of("op_sel", [0] * 4)
    fields = op_sel[-1] << 3 if name != "v_pk_mov_b32" else op_sel[0] | op_sel[1] << 1
    carry = before.read(line.mask_in or "vcc", 64, wave)
    truth = int(modifiers.get("bitop3", "0"), 0)
    env |= {
        "D0": Value("b", 64, old if name.startswith("v_fmac") else 0),
        "D1": Value("b", 1, 0),
        "VCC": Value("u", 64, carry),
        "laneId": pc.integer(lane),
        "VDST": pc.integer(0),
        "VGPR": {lane: {0: Value("b", 32, pc.mask(old, 32))}},
        "OPSEL": Value("u", 4, fields),
        "SDWA_SRC0_SEL": Value("u", 3, SELECTS.index(modifiers.get("src0_sel", "DWORD"))),
        "SIMM32": Value("b", 32, line.literal),
        **{f"BYTE{i}": Value("u", 3, i) for i in range(4)},
        "WORD1": Value("u", 3, 5),
        "INST.OMOD": Value("u", 2, truth >> 6),
        "INST.ABS": Value("u", 3, truth >> 3 & 7),
        "INST.NEG": Value("u", 3, truth & 7),
    }
    compiled(name, arch)(env)
    if not is_vector(destination):
        for mask in masks:
            masks[mask] |= env["D0"].bits & 1 << lane
        return
    for mask in masks:
        masks[mask] |= (env["D1"].bits if "D1" in text else env["VCC"].bits >> lane & 1) << lane
    bits = env["VGPR"][lane][0].bits if "VGPR" in text else env["D0"].bits
    if "clamp" in modifiers:
        number = pc.decode(pc.mask(bits, 32), pc.F32)
        bits = 0 if math.isnan(number) or number <= 0 else pc.encode(min(number, 1.0), pc.F32)
    if "dst_sel" in modifiers:
        bits = merged(bits, pc.mask(old, 32), modifiers["dst_sel"], modifiers["dst_unused"])
    want.write(destination, bits, wave, lane)


def result_kind(name: str) -> str:
    """What the text writes, as far as it is floating point."""
    text = text_of(name)
    if re.fullmatch(r"v_cvt_pk_[bf][fp]8_f32", name):
        return "fp8" if "_fp8" in name else "bf8"
    match = re.search(r"(?:D0|tmp)(?:\[[^\]]*\])?\.(f64|f32|f16|bf16)\s*[-+]?=", text)
    return match[1] if match else ""


# --- Operands -------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return text.split()


def pool(text: str, sign: int | None = None) -> list[int]:
    """Hexadecimal numbers; ~n is n and its neighbours; with a sign bit, each number with either sign."""
    numbers = [int(word.strip("~"), 16) + d for word in words(text) for d in ((-1, 0, 1) if word[0] == "~" else (0,))]
    return numbers if sign is None else [n | s << sign for n in numbers for s in (0, 1)]


# Floats: zero, denormals, the ends of the normal numbers, 1 and its neighbours, ties of conversions, infinity, NaNs.
INTERESTING: dict[tuple[str, int], list[int]] = {
    ("f", 32): pool(
        """0 1 2 400000 ~800000 ~3f800000 3f000000 3fc00000 ~40000000 3f801000 3f803000 477fefff ~477ff000 33000000
        33000001 38800000 387fe000 ~43700000 ~43e80000 4f000000 5f000000 1f800000 b800000 c000000 7e800000 ~4b000000
        ~7f800000 7fc00000 7fa00000 7fffffff 40490fdb 3eaaaaab""",
        31,
    ),
    ("f", 16): pool("0 1 2 200 ~400 ~3c00 3800 3e00 ~7c00 7e00 7d00 7fff", 15),
    ("f", 64): pool(
        """0 1 ~10000000000000 ~3ff0000000000000 3fe0000000000000 3ff8000000000000 4330000000000001 ~7ff0000000000000
        7ff8000000000000 47efffffe0000000 ~47effffff0000000 36a0000000000000 3690000000000000 ~3810000000000000""",
        63,
    ),
    ("u", 32): pool(
        """0 1 2 3 4 5 7 8 c d 10 17 18 ~20 ~40 ff ~10000 ~80000000 ffffffff fffffffe ffffffe1 3020100 b0a0908 c07080d
        5060704 ffff0000 ff00ff"""
    ),
    ("u", 64): pool(
        "0 1 2 ~100000000 ~8000000000000000 ffffffffffffffff fffffffffffffffe ffffffff00000000 123456789abcdef"
    ),
}


def draw(rng: np.random.Generator, kind: str, width: int, count: int) -> Array:
    """uint64 [count]: interesting operands mostly, random bits else."""
    random = rng.integers(0, 1 << 64, count, dtype=U64, endpoint=False)
    choice = np.array(INTERESTING[("f" if kind == "f" else "u", 32 if kind != "f" and width < 32 else width)], U64)
    return np.where(rng.random(count) < 0.7, rng.choice(choice, count), random) & U64((1 << width) - 1)


def exec_masks(rng: np.random.Generator, waves: int) -> Array:
    """Full ones, random ones, one lane, none."""
    masks = rng.integers(0, 1 << 64, waves, dtype=U64)
    masks[: waves // 2 or 1] = ALL
    if waves >= 8:
        masks[-1], masks[-2] = 0, 1 << 37
    return masks


def prepared(line: Line, waves: int, seed: int = 1) -> State:
    """A state of random registers, but with interesting operands for the instruction."""
    rng = np.random.default_rng([seed, *line.text.encode()])
    state = State(waves=waves, vgprs=24, rng=rng)
    state.v = rng.integers(0, 1 << 32, state.v.shape, dtype=U32)
    state.s = rng.integers(0, 1 << 32, state.s.shape, dtype=U32)
    state.scc = rng.integers(0, 2, waves)
    state.vcc = rng.integers(0, 1 << 64, waves, dtype=U64)
    previous: dict[tuple[str, int], Array] = {}
    for operand, kind, width in line.sources:
        name = re.sub(r"^-|\||^sext\(|\)$", "", operand)
        if not re.match(r"[vs][\d\[]", name):
            continue
        file, numbers = registers(name)
        array = state.v if file == "v" else state.s
        packed = line.packs_floats
        width = 32 if packed else width
        values = draw(rng, kind, width, array.shape[1])
        if (file, width) in previous:  # equal operands, here and there
            values = np.where(rng.random(len(values)) < 0.1, previous[file, width], values)
        previous[file, width] = values
        if packed or width == 16:  # something in the other half, too
            values = values | draw(rng, kind, width, len(values)) << U64(width)
        for j, n in enumerate(numbers):
            array[n] = values >> U64(32 * j) & U64(0xFFFFFFFF)
    state.exec_mask = exec_masks(rng, waves)
    return state


def check(text: str, arch: str = "gfx942", waves: int = 8, bits: int = 0xFFFFFFFF) -> None:
    """Runs a line on a prepared state, and compares the whole state with what the pseudocode makes of it."""
    line = Line(text)
    state = prepared(line, waves)
    before = Picture.of(state)
    execute(text, state, arch=arch)
    compare(line, Picture.of(state), expected(line, before, arch), before, arch, bits)


# --- Vector instructions --------------------------------------------------------------------------------------------


def spelled(name: str) -> Iterator[str]:
    """The instruction with registers for operands, in both encodings where it has two."""
    text, file = text_of(name), name[0]
    sources = []
    for first, (_, width) in zip((4, 8, 12), source_types(name), strict=False):
        sources.append(f"{file}[{first}:{first + 1}]" if width == 64 else f"{file}{first}")
    wide = re.search(r"D0\.[uibf]64[^=!;\n]*=[^=]|D0(?:\.u32)?\[63", text) or name.startswith("v_pk_")
    result = [f"{file}[0:1]" if wide else f"{file}0"] if re.search(r"\b(D0?|VGPR)\b", text) else []
    if file == "s":
        constants = [
            ["0xff80", "0x7f"] if "16" in re.findall(rf"\bS{i}\.[iu](16)", text) else [source]
            for i, source in enumerate(sources)
        ]
        for operands in itertools.product(*constants):
            yield f"{name} {', '.join([*result, *operands])}"
        return
    if "SIMM32" in text:
        sources.insert(1 if name == "v_fmamk_f32" else 2, "0x40490fdb")
    both = ENCODINGS[name] & {"VOP1Op", "VOP2Op", "VOPCOp"} and "SIMM32" not in text
    for encoding in ("_e32", "_e64") if both else ("",):
        mask_in, mask_out = ("s[22:23]", "s[20:21]") if encoding == "_e64" or not both else ("vcc", "vcc")
        carry = re.search(r"VCC\S* =|D1\.[iu]1", text)
        results = [mask_out] if name.startswith("v_cmp") else [*result, mask_out] if carry else result
        reads_mask = re.match(r"v_(cndmask|addc_co|subb_co|subbrev_co)", name)
        yield f"{name}{encoding} {', '.join([*results, *sources, *([mask_in] if reads_mask else [])])}"


def with_tables(line: str) -> list[str]:
    return [f"{line} bitop3:{t:#x}" for t in (0x80, 0xEC, 0xDE, 0x96, 0x53)] if "bitop3" in line else [line]


def lines_of(names: Iterable[str]) -> list[str]:
    return [
        line
        for name in sorted(names)
        if name in TEXTS.keys() - NOT_EVALUATED.keys()
        for text in spelled(name)
        for line in with_tables(text)
    ]


# Every instruction that the emulator knows, and not a list of ours: what it can do is tested.
KNOWN = {arch: {*vector_unit.operations(arch), *vector_unit._PACKED} for arch in ARCHS}


@pytest.mark.parametrize("text", lines_of(KNOWN["gfx942"]))
def test_vector(text: str) -> None:
    check(text, waves=4)


@pytest.mark.parametrize("text", lines_of(n for n in KNOWN["gfx950"] if n not in KNOWN["gfx942"] or "8" in n))
def test_vector_of_gfx950(text: str) -> None:
    # Whether a 16-bit result clears the other half is not written anywhere.
    check(text, "gfx950", bits=0xFFFF if "_b16" in text else 0xFFFFFFFF)


# Scalar and constant operands, modifiers, and results over sources.
FORMS = """
v_add3_u32 v0, v4, v8, s12
v_add_f32_e32 v0, 0x40490fdb, v8
v_add_f32_e32 v0, s4, v8
v_add_f32_e64 v0, -v4, |v8|
v_add_f32_e64 v0, -|v4|, s8
v_add_f32_e64 v0, v4, v8 clamp
v_add_lshl_u32 v0, s4, v8, 2
v_add_u32_e32 v0, s4, v8
v_add_u32_e32 v0, 64, v8
v_add_u32_e32 v0, -16, v8
v_add_u32_e32 v0, 0x12345, v8
v_add_u32_e32 v4, v4, v4
v_and_b32_e32 v0, 0xffff0000, v8
v_and_b32_e32 v0, -4, v8
v_and_or_b32 v0, v4, s8, v12
v_ashrrev_i32_e32 v0, 31, v8
v_ashrrev_i32_e32 v0, s4, v8
v_ashrrev_i64 v[0:1], 2, v[8:9]
v_bfe_u32 v0, v4, 0, s12
v_bfe_u32 v0, v4, 16, 1
v_cmp_eq_u32_e64 s[20:21], 1, v8
v_cmp_gt_f32_e64 vcc, |v4|, s8
v_cmp_gt_i64_e64 s[20:21], 0, v[8:9]
v_cmp_gt_u64_e32 vcc, s[4:5], v[8:9]
v_cmp_gt_u64_e64 s[20:21], s[4:5], v[8:9]
v_cmp_le_f32_e64 s[20:21], -|v4|, 0.5
v_cmp_lt_i64_e64 s[20:21], -1, v[8:9]
v_cmp_nlt_f32_e64 vcc, |v4|, s8
v_cmp_o_f16_e64 s[20:21], |v4|, -v8
v_cndmask_b32_e32 v0, -1, v8, vcc
v_cndmask_b32_e32 v0, 1.0, v8, vcc
v_cndmask_b32_e64 v0, 0, 1, s[22:23]
v_cndmask_b32_e64 v0, v4, -v8, s[22:23]
v_cndmask_b32_e64 v0, v4, 0, vcc
v_cndmask_b32_e64 v0, |v4|, v8, s[22:23]
v_cvt_f16_f32_e32 v0, s4
v_cvt_f16_f32_e64 v0, -v4
v_cvt_f32_f16_e32 v0, 1.0
v_cvt_f32_f16_e32 v0, s4
v_cvt_f32_f16_e64 v0, |v4|
v_cvt_pk_bf8_f32 v0, v4, v8 op_sel:[0,0,1]
v_cvt_pk_fp8_f32 v0, -v4, |v8|
v_cvt_pk_fp8_f32 v0, v4, 0
v_cvt_pk_fp8_f32 v0, v4, v8 op_sel:[0,0,1]
v_div_fixup_f32 v0, v4, v8, 1.0
v_div_scale_f32 v0, s[20:21], v4, v4, 1.0
v_div_scale_f32 v0, s[20:21], v4, v4, v8
v_div_scale_f32 v0, vcc, 1.0, v8, 1.0
v_div_scale_f32 v0, vcc, v8, v4, v8
v_fma_f32 v0, -v4, v8, 1.0
v_fma_f32 v0, -v4, |v8|, s12
v_fma_f32 v0, v4, 0.15915494, -0.5
v_fma_f32 v0, v4, v8, v12 clamp
v_fmac_f32_e32 v4, v4, v4
v_fmac_f32_e64 v0, |v4|, -s8
v_lshl_add_u32 v0, v4, 4, s12
v_lshl_add_u64 v[0:1], s[4:5], 3, v[12:13]
v_lshl_add_u64 v[0:1], v[4:5], 0, s[12:13]
v_lshl_add_u64 v[4:5], v[4:5], 1, v[4:5]
v_lshl_or_b32 v0, v4, 1, 1
v_lshrrev_b64 v[0:1], 24, v[8:9]
v_mad_u64_u32 v[0:1], s[20:21], s4, v8, 0
v_mad_u64_u32 v[0:1], s[20:21], v4, s8, v[12:13]
v_mad_u64_u32 v[4:5], s[20:21], v4, v8, v[4:5]
v_med3_f32 v0, v4, s8, v12
v_mov_b32_e32 v0, 0x80000000
v_mov_b32_e32 v0, -16
v_mov_b32_e32 v0, -4.0
v_mov_b32_e32 v0, 0.15915494
v_mov_b32_e32 v0, 1.0
v_mov_b32_e32 v0, 64
v_mov_b32_e32 v0, s4
v_mov_b64_e32 v[0:1], -1
v_mov_b64_e32 v[0:1], s[4:5]
v_mul_f32_e32 v0, 0x3f317218, v8
v_mul_f32_e64 v0, s4, -v8
v_mul_f32_e64 v0, v4, 4.0
v_mul_f32_e64 v0, v4, v8 clamp
v_mul_hi_u32 v0, v4, s8
v_mul_lo_u32 v0, s4, v8
v_pack_b32_f16 v0, -v4, |v8|
v_pack_b32_f16 v0, v4, v8 op_sel:[0,1,0]
v_pack_b32_f16 v0, v4, v8 op_sel:[1,0,0]
v_perm_b32 v0, v4, v8, s12
v_pk_add_f32 v[0:1], v[4:5], v[8:9] neg_lo:[0,1] neg_hi:[0,1]
v_pk_fma_f32 v[0:1], v[4:5], v[8:9], v[12:13] op_sel:[0,1,0] op_sel_hi:[1,0,1] neg_lo:[1,0,0]
v_pk_mov_b32 v[0:1], v[4:5], v[8:9] op_sel:[1,0]
v_pk_mov_b32 v[0:1], v[4:5], v[8:9] op_sel:[0,1]
v_pk_mul_f32 v[0:1], v[4:5], s[8:9] op_sel_hi:[1,0]
v_pk_mul_f32 v[4:5], v[4:5], v[4:5] op_sel:[1,0] op_sel_hi:[0,1]
v_sub_co_u32_e64 v4, s[4:5], v4, v8
v_sub_u32_e32 v0, s4, v8
v_subb_co_u32_e64 v4, s[22:23], v4, v8, s[22:23]
v_xor_b32_e32 v0, 0x80000000, v8
v_add_f16_sdwa v0, |v4|, -v8 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD src1_sel:DWORD
v_add_u32_sdwa v0, sext(v4), v8 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_2 src1_sel:WORD_0
v_cndmask_b32_sdwa v0, v4, v8, vcc dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:WORD_1
v_cndmask_b32_sdwa v0, v4, v8, vcc dst_sel:BYTE_2 dst_unused:UNUSED_PRESERVE src0_sel:BYTE_3 src1_sel:WORD_0
v_and_b32_sdwa v0, s4, v8 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:BYTE_3
v_cmp_o_f16_sdwa s[20:21], v4, v8 src0_sel:WORD_1 src1_sel:WORD_1
v_cmp_o_f16_sdwa vcc, v4, |v8| src0_sel:WORD_0 src1_sel:WORD_1
v_cvt_f16_f32_sdwa v0, v4 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD
v_cvt_f32_f16_sdwa v0, -v4 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1
v_cvt_f32_f16_sdwa v0, v4 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1
v_cvt_f32_bf8_sdwa v0, v4 src0_sel:BYTE_2
v_cvt_f32_fp8_sdwa v0, v4 src0_sel:BYTE_1
v_cvt_f32_fp8_sdwa v0, v4 src0_sel:BYTE_3
v_cvt_pk_f32_fp8_sdwa v[0:1], v4 src0_sel:WORD_1
v_lshlrev_b32_sdwa v0, v4, v8 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:BYTE_2
v_lshrrev_b32_sdwa v0, v4, v8 dst_sel:BYTE_1 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD
""".strip().splitlines()


@pytest.mark.parametrize("text", FORMS)
def test_forms(text: str) -> None:
    check(text)


@pytest.mark.parametrize("unused", ["UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE"])
@pytest.mark.parametrize("select", ["DWORD", "BYTE_0", "BYTE_1", "BYTE_2", "BYTE_3", "WORD_0", "WORD_1"])
def test_sdwa_selects(select: str, unused: str) -> None:
    modifiers = f"dst_sel:{select} dst_unused:{unused} src0_sel:WORD_1 src1_sel:{select}"
    check(f"v_or_b32_sdwa v0, v4, v8 {modifiers}", waves=2)
    check(f"v_add_u32_sdwa v4, v4, sext(v8) {modifiers}", waves=2)


@pytest.mark.skipif(not shutil.which("llvm-objdump-22"), reason="no llvm-22")
@pytest.mark.parametrize("arch", ARCHS)
def test_spelling(arch: str, tmp_path: Path) -> None:
    """The lines are those that the assembler takes and the disassembler gives."""
    lines = [*lines_of(KNOWN[arch]), *FORMS, *lines_of(scalar_unit.OPERATIONS), *SCALAR_FORMS]
    (tmp_path / "lines.s").write_text("\n".join(lines) + "\n")
    command = ["llvm-mc-22", "-triple=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-filetype=obj", "lines.s", "-o", "lines.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    output = subprocess.run(
        ["llvm-objdump-22", "-d", "lines.o"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert [line.partition("//")[0].strip() for line in output.stdout.splitlines() if "//" in line] == lines


# --- Lanes that read other lanes ------------------------------------------------------------------------------------

CONTROLS = words("""
quad_perm:[1,0,3,2] quad_perm:[2,3,0,1] quad_perm:[3,3,0,1] row_shl:1 row_shl:15 row_shr:1 row_shr:8 row_ror:4 row_ror:8
row_mirror row_half_mirror wave_shl:1 wave_shr:1 wave_rol:1 wave_ror:1 row_bcast:15 row_bcast:31 row_newbcast:5
""")


@pytest.mark.parametrize("bound", ["", " bound_ctrl:1"])
@pytest.mark.parametrize("control", CONTROLS)
def test_dpp(control: str, bound: str) -> None:
    check(f"v_mov_b32_dpp v0, v4 {control} row_mask:0xf bank_mask:0xf{bound}", waves=4)
    check(f"v_add_f32_dpp v0, v4, v8 {control} row_mask:0xa bank_mask:0x7{bound}", waves=4)
    check(f"v_max_f32_dpp v4, v4, v4 {control} row_mask:0xf bank_mask:0xf{bound}", waves=4)


def across(text: str, env: Callable[[Picture, int], pc.Env], arch: str = "gfx942", full: bool = False) -> None:
    """An instruction whose text reads and writes the vector registers of the whole wave."""
    state = State(waves=8, vgprs=24)
    rng = np.random.default_rng(list(text.encode()))
    state.v = rng.integers(0, 1 << 32, state.v.shape, dtype=U32)
    state.v[12] = rng.integers(0, 300, state.v.shape[1])  # byte addresses of lanes, some beyond the last
    state.s = rng.integers(0, 1 << 32, state.s.shape, dtype=U32)
    state.exec_mask = ALL if full else exec_masks(rng, 8)
    before, line, want = Picture.of(state), Line(text), Picture.of(state)
    for wave in range(8):
        columns = range(64 * wave, 64 * wave + 64)
        vgpr = {
            lane: {row: Value("b", 32, int(before.v[row, column])) for row in range(24)}
            for lane, column in enumerate(columns)
        }
        names = env(before, wave) | {"VGPR": vgpr, "EXEC": Value("u", 64, before.exec_mask[wave])}
        names = compiled(line.name, arch)(names)
        for lane, column in enumerate(columns):
            want.v[:, column] = [vgpr[lane][row].bits for row in range(24)]
        if "D0" in names:
            want.write(line.operands[0], names["D0"].bits, wave)
    execute(text, state, arch=arch)
    got = Picture.of(state)
    np.testing.assert_array_equal(got.v, want.v)
    np.testing.assert_array_equal(got.s, want.s)
    assert got.exec_mask == before.exec_mask


def rows(**names: int) -> Callable[[Picture, int], pc.Env]:
    return lambda before, wave: {name: pc.integer(row) for name, row in names.items()}


@pytest.mark.parametrize("lane", ["0", "5", "63", "s8"])
def test_read_and_write_lane(lane: str) -> None:
    def env(before: Picture, wave: int) -> pc.Env:
        selects = {"S1": Value("u", 32, before.read(lane, 32, wave)), "S0": Value("b", 32, before.read("s4", 32, wave))}
        return selects | {"SRC0": pc.integer(4), "VDST": pc.integer(0)}

    across(f"v_readlane_b32 s0, v4, {lane}", lambda *a: env(*a) | {"D0": Value("b", 0, 0)})
    across(f"v_writelane_b32 v0, s4, {lane}", env)


def test_read_first_lane() -> None:
    across("v_readfirstlane_b32 s0, v4", lambda *_: {"D0": Value("b", 0, 0), "SRC0": pc.integer(4)})


def test_swap() -> None:
    state = State(waves=4, vgprs=8)
    state.exec_mask = exec_masks(np.random.default_rng(0), 4)
    want = Picture.of(state)
    active = np.array([want.exec_mask[lane // 64] >> lane % 64 & 1 for lane in range(256)], bool)
    want.v[[0, 4]] = np.where(active, want.v[[4, 0]], want.v[[0, 4]])
    execute("v_swap_b32 v0, v4", state)
    np.testing.assert_array_equal(state.v, want.v)


@pytest.mark.parametrize("offset", [0, 4, 128])
@pytest.mark.parametrize("name", ["ds_bpermute_b32", "ds_permute_b32"])
def test_permute(name: str, offset: int) -> None:
    modifier = f" offset:{offset}" if offset else ""
    across(f"{name} v0, v12, v4{modifier}", rows(ADDR=12, DATA0=4, VDST=0, OFFSET=offset))


@pytest.mark.parametrize("name", ["v_permlane32_swap_b32", "v_permlane16_swap_b32"])
def test_permlane_swap(name: str) -> None:
    across(f"{name}_e32 v0, v4", rows(SRC0=4, VDST=0), "gfx950", full=True)  # the text knows no EXEC
    with pytest.raises(UnknownInstruction):
        execute(f"{name}_e32 v0, v4", State(), arch="gfx942")


# Lane to lane, by https://llvm.org/docs/AMDGPU/... "Swizzle": a mask of and, or, xor in groups of 32; or of four lanes.
SWIZZLES: dict[str, Callable[[int], int]] = {
    "swizzle(SWAP,16)": lambda lane: lane ^ 16,
    "swizzle(SWAP,1)": lambda lane: lane ^ 1,
    "swizzle(REVERSE,8)": lambda lane: lane ^ 7,
    "swizzle(BROADCAST,32,5)": lambda lane: lane & 32 | 5,
    "swizzle(BROADCAST,8,2)": lambda lane: lane & ~7 | 2,
    'swizzle(BITMASK_PERM,"01pip")': lambda lane: lane & 32 | 8 | lane & 4 | ~lane & 2 | lane & 1,
    "swizzle(QUAD_PERM,3,0,0,2)": lambda lane: lane & ~3 | (3, 0, 0, 2)[lane & 3],
}


@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_swizzle(swizzle: str) -> None:
    state = State(waves=8, vgprs=8)
    state.exec_mask = exec_masks(np.random.default_rng(0), 8)
    before = Picture.of(state)
    execute(f"ds_swizzle_b32 v0, v4 offset:{swizzle}", state)
    for wave in range(8):
        for lane in before.active(wave):
            source = SWIZZLES[swizzle](lane)
            read = before.read("v4", 32, wave, source) if before.exec_mask[wave] >> source & 1 else 0
            before.write("v0", read, wave, lane)
    np.testing.assert_array_equal(state.v, before.v)


# --- Scalar instructions --------------------------------------------------------------------------------------------

SCALAR_FORMS = """
s_add_i32 s0, s4, -4
s_add_u32 s0, s4, 40
s_addc_u32 s0, s4, 0
s_and_b32 s0, s4, 0xff
s_and_b64 exec, exec, s[8:9]
s_and_b64 exec, exec, vcc
s_and_b64 vcc, exec, vcc
s_and_saveexec_b64 s[0:1], vcc
s_andn2_b64 exec, exec, s[8:9]
s_andn2_b64 vcc, exec, s[8:9]
s_andn2_saveexec_b64 s[4:5], s[4:5]
s_ashr_i32 s0, s4, 31
s_bfm_b32 s0, s4, 0
s_bitcmp1_b32 s4, 0
s_brev_b32 s0, 1
s_brev_b32 s0, 60
s_cmp_eq_u32 s4, 8
s_cmp_eq_u64 s[4:5], 0
s_cselect_b64 s[0:1], -1, 0
s_cselect_b64 vcc, -1, 0
s_lshl_b32 s0, 8, s8
s_lshl_b32 s0, s4, 2
s_lshr_b32 s0, 0x80, s8
s_lshr_b32 s0, s4, 16
s_lshr_b64 s[0:1], s[4:5], 24
s_lshr_b64 s[4:5], s[4:5], s4
s_mov_b32 s0, -16
s_mov_b32 s0, 0.5
s_mov_b32 s0, 0x12345678
s_mov_b64 exec, s[4:5]
s_mov_b64 s[0:1], -1
s_mov_b64 s[0:1], exec
s_mov_b64 s[0:1], vcc
s_movk_i32 s0, 0x80
s_movk_i32 s0, 0xff80
s_or_b64 exec, exec, s[8:9]
s_or_b64 s[0:1], s[4:5], exec
s_xor_b32 s0, s4, 1
s_xor_b64 s[0:1], exec, -1
""".strip().splitlines()


@pytest.mark.parametrize("text", lines_of(scalar_unit.OPERATIONS))
def test_scalar(text: str) -> None:
    check(text, waves=192)


@pytest.mark.parametrize("text", SCALAR_FORMS)
def test_scalar_forms(text: str) -> None:
    check(text, waves=192)


@pytest.mark.parametrize("text", ["s_nop 0", "v_nop", "s_waitcnt vmcnt(0)", "s_waitcnt vmcnt(1) lgkmcnt(0)"])
def test_no_effect(text: str) -> None:
    state = State(waves=2, vgprs=8)
    before = Picture.of(state)
    execute(text, state)
    got = Picture.of(state)
    np.testing.assert_array_equal(got.v, before.v)
    np.testing.assert_array_equal(got.s, before.s)
    assert (got.vcc, got.exec_mask, got.scc) == (before.vcc, before.exec_mask, before.scc)


def test_what_is_not_evaluated() -> None:
    """The emulator knows nothing that the ISA does not, and no text is excepted that could be evaluated."""
    for arch in ARCHS:
        assert not (KNOWN[arch] | scalar_unit.OPERATIONS.keys()) - TEXTS.keys() - NOT_EVALUATED.keys()
    for name in NOT_EVALUATED.keys() & TEXTS.keys():
        if "v_" not in name:
            with pytest.raises(pc.Untranslatable):
                compiled(name)


# --- Conversions ----------------------------------------------------------------------------------------------------


def apply(text: str, *operands: Array, arch: str = "gfx942", old: int = 0xA5A55A5A, seed: int = 0) -> Array:
    """v0 of an instruction (or several) for operands in v4, v8, v12: uint32, one lane each."""
    count = len(operands[0])
    state = State(waves=-(-count // 64), vgprs=24, rng=np.random.default_rng(seed))
    state.v[0] = old
    for row, values in zip((4, 8, 12), operands, strict=False):
        state.v[row, :count] = values
    for line in text.strip().splitlines():
        execute(line.strip(), state, arch=arch)
    return state.v[0, :count].copy()


def bits_of(floats: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(floats, np.float32).view(U32)


def decisive(dtype: Any) -> Array:
    """float32 patterns that decide a rounding to a narrower format: its numbers, the midpoints, and one ulp about."""
    size = np.dtype(dtype).itemsize
    with np.errstate(invalid="ignore"):
        numbers = np.arange(1 << 8 * size, dtype=f"u{size}").view(dtype).astype(np.float64)
    numbers = np.unique(np.abs(numbers[np.isfinite(numbers)]))
    past = 2 * numbers[-1] - numbers[-2]  # what would come next, but overflows
    numbers = np.append(numbers, [past, 2 * past])
    points = bits_of(np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2]))
    points = np.concatenate([points, points + 1, np.maximum(points, 1) - 1])
    special = [0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF, 1, 2, 0x7FFFFF, 0x800000]
    points = np.concatenate([points, np.array(special, U32)])
    return np.concatenate([points, points | U32(0x80000000)])


def assert_rounds(got: Array, source: Array, dtype: Any) -> None:
    """The codes are those of ml_dtypes and numpy, NaN for NaN."""
    with np.errstate(all="ignore"):
        want = source.view(np.float32).astype(dtype)
    codes = got.view(dtype)
    nan = np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(codes.astype(np.float32)), nan)
    np.testing.assert_array_equal(got[~nan], want.view(got.dtype)[~nan])


@pytest.mark.parametrize("arch", ARCHS)
def test_half_to_float(arch: str) -> None:
    halves = np.arange(1 << 16, dtype=U16)
    got = apply("v_cvt_f32_f16_e32 v0, v4", halves.astype(U32) | U32(0xBEEF0000), arch=arch)
    want = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(got.view(np.float32), want)
    np.testing.assert_array_equal(got >> 31, halves >> 15)


@pytest.mark.parametrize("arch", ARCHS)
def test_float_to_half(arch: str) -> None:
    source = decisive(np.float16)
    got = apply("v_cvt_f16_f32_e32 v0, v4", source, arch=arch)
    assert_rounds(got.astype(U16), source, np.float16)
    assert not (got >> 16).any()  # gfx9 clears the other half


def test_float_to_packed_halves() -> None:
    source = decisive(np.float16)
    got = apply("v_cvt_pk_f16_f32 v0, v4, v8", source, source[::-1], arch="gfx950")
    assert_rounds(got.astype(U16), source, np.float16)
    assert_rounds((got >> 16).astype(U16), source[::-1], np.float16)


def test_float_to_bfloat() -> None:
    source = decisive(ml_dtypes.bfloat16)
    got = apply("v_cvt_pk_bf16_f32 v0, v4, v8", source, source[::-1], arch="gfx950")
    assert_rounds(got.astype(U16), source, ml_dtypes.bfloat16)
    assert_rounds((got >> 16).astype(U16), source[::-1], ml_dtypes.bfloat16)


@pytest.mark.parametrize("word", [0, 1])
@pytest.mark.parametrize("name", ["fp8", "bf8"])
@pytest.mark.parametrize("arch", ARCHS)
def test_float_to_byte(arch: str, name: str, word: int) -> None:
    """FNUZ on gfx942, OCP on gfx950; what overflows is NaN or infinity, as nothing sets the mode that saturates."""
    dtype = FP8[arch][name]
    source = decisive(dtype)
    modifier = " op_sel:[0,0,1]" if word else ""
    got = apply(f"v_cvt_pk_{name}_f32 v0, v4, v8{modifier}", source, source[::-1], arch=arch)
    low, high = ((got >> shift).astype(U8) for shift in (16 * word, 16 * word + 8))
    assert_rounds(low, source, dtype)
    assert_rounds(high, source[::-1], dtype)
    np.testing.assert_array_equal((got >> 16 * (1 - word)).astype(U16), 0xA5A5 if word == 0 else 0x5A5A)


# --- Rounding and division ------------------------------------------------------------------------------------------

any_float = st.integers(0, 0xFFFFFFFF) | st.sampled_from(INTERESTING["f", 32])


def floats_of(bits: int) -> float:
    return pc.decode(bits, pc.F32)


def fused(a: int, b: int, c: int) -> int:
    """a * b + c by fractions, rounded once."""
    x, y, z = map(floats_of, (a, b, c))
    if not all(map(math.isfinite, (x, y, z))):
        with np.errstate(all="ignore"):
            return int(
                bits_of(np.float32(np.float64(x) * y + z if math.isfinite(z) or math.isnan(x * y) else x * y + z))
            )
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    return pc.encode(exact, pc.F32) if exact else int(bits_of(np.float32(x * y + z)))


def assert_fused(cases: list[tuple[int, int, int]]) -> None:
    a, b, c = np.array(cases, U32).T
    want = canonical(np.array([fused(*case) for case in cases], U32), "f32", "gfx942")
    fma = apply("v_fma_f32 v0, v4, v8, v12", a, b, c)
    fmac = apply("v_mov_b32_e32 v0, v12\nv_fmac_f32_e32 v0, v4, v8", a, b, c)
    np.testing.assert_array_equal(canonical(fma, "f32", "gfx942"), want)
    np.testing.assert_array_equal(canonical(fmac, "f32", "gfx942"), want)


@given(st.lists(st.tuples(any_float, any_float, any_float), min_size=1, max_size=64))
@settings(max_examples=40)
def test_fused(cases: list[tuple[int, int, int]]) -> None:
    assert_fused(cases)


def test_fused_once_rounded() -> None:
    """Products halfway between two floats, and an addend too small for float64 to see, that breaks the tie."""
    cases = []
    for k, sign, tiny in itertools.product(range(1, 2048, 66), (0, 0x80000000), (1, 0x00800000, 0x20000000)):
        a, b = (int(bits_of(np.float32(1 + n * 2.0**-12))) for n in (1, k))
        cases += [(a, b ^ sign, tiny), (a, b ^ sign, tiny | 0x80000000)]
        cases += [(a - (60 << 23), b - (80 << 23) ^ sign, tiny)]  # and a denormal result
    assert_fused(cases)


# How clang divides v4 by v8.
DIVISION = """
v_div_scale_f32 v13, s[20:21], v8, v8, v4
v_rcp_f32_e32 v15, v13
v_fma_f32 v16, -v13, v15, 1.0
v_fmac_f32_e32 v15, v16, v15
v_div_scale_f32 v16, vcc, v4, v8, v4
v_mul_f32_e32 v17, v16, v15
v_fma_f32 v18, -v13, v17, v16
v_fmac_f32_e32 v17, v18, v15
v_fma_f32 v13, -v13, v17, v16
v_div_fmas_f32 v13, v13, v15, v17
v_div_fixup_f32 v0, v13, v8, v4
"""


def assert_divides(numerators: Array, denominators: Array, seed: int) -> None:
    with np.errstate(all="ignore"):
        want = bits_of(numerators.view(np.float32) / denominators.view(np.float32))
    got = apply(DIVISION, numerators, denominators, seed=seed)
    got, want = (canonical(x, "f32", "gfx942").astype(np.int64) for x in (got, want))
    # A quotient by 2 - 2**-23, or that times a power of two, can be so near to halfway between two floats that these
    # steps err by an ulp, unless v_rcp_f32 happens to err to the right side (Markstein, 1990). No other one can.
    hard = denominators & U32(0x7FFFFF) == 0x7FFFFF
    assert (np.abs(got - want)[hard] <= 1).all()
    np.testing.assert_array_equal(got[~hard], want[~hard])


@given(st.lists(st.tuples(any_float, any_float), min_size=1, max_size=64), st.integers(0, 99))
@settings(max_examples=40)
def test_division(cases: list[tuple[int, int]], seed: int) -> None:
    numerators, denominators = np.array(cases, U32).T
    assert_divides(numerators.copy(), denominators.copy(), seed)


@pytest.mark.parametrize("error", [-1, 0, 1])
def test_reciprocal_of_every_mantissa(error: int) -> None:
    """What `div_rn` in csrc_hip/vendor.h rests on: 1 / b for each mantissa, whatever v_rcp_f32's last bit.

    clang's sequence alone is wrong for one mantissa unless that bit is right; with a look at the remainder it never is.
    """
    b = (np.arange(1 << 23, dtype=np.uint32) | 0x3F800000).view(np.float32)
    one, right = np.ones_like(b), (1 / b.astype(np.float64)).astype(np.float32)
    y = (right.view(np.int32) + error).view(np.float32)  # v_rcp_f32
    y = alu.fma(alu.fma(-b, y, one), y, y)
    q = alu.fma(alu.fma(-b, y, one), y, y)
    q = alu.fma(alu.fma(-b, q, one), y, q)
    wrong = b[q != right].view(np.uint32).tolist()
    assert wrong == ([0x3FFFFFFF] if error else [])
    following = (q.view(np.uint32) + 1).view(np.float32)
    closer = np.abs(alu.fma(-following, b, one)) < np.abs(alu.fma(-q, b, one))
    assert np.array_equal(np.where(closer, following, q), right)


@pytest.mark.parametrize("seed", range(3))
def test_division_of_many(seed: int) -> None:
    """All pairs of interesting operands, random ones, and ones of a similar size; another v_rcp_f32 each time."""
    pairs = np.array(list(itertools.product(INTERESTING["f", 32], repeat=2)), U32)
    rng = np.random.default_rng(seed)
    random = rng.integers(0, 1 << 32, (20000, 2), dtype=U32)
    close = (random & U32(0x807FFFFF)) | rng.integers(100, 150, (20000, 2), dtype=U32) << U32(23)
    numerators, denominators = np.concatenate([pairs, random, close]).T.copy()
    assert_divides(numerators, denominators, seed)
    assert_divides(np.full_like(denominators, 0x3F800000), denominators, seed)


def test_reciprocal() -> None:
    """As the kernels have it, with a constant for the numerator."""
    denominators = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=U32)
    got = apply(DIVISION.replace("v4", "1.0"), denominators, denominators)
    want = apply(DIVISION, np.full_like(denominators, 0x3F800000), denominators)
    np.testing.assert_array_equal(got, want)


@dataclass
class Approximation:
    """A function by its value in float64, where it is tested, and special values (None is NaN).

    With ``flushes``, denormal numbers are zero, whether they go in or come out; else they are left open.
    """

    function: Callable[[float], float]
    domain: Callable[[float], bool]
    special: dict[int, int | None]
    flushes: bool = False


INF, MINUS = 0x7F800000, 0x80000000
RECIPROCAL = Approximation(
    lambda x: 1 / x,
    lambda x: True,
    {0: INF, MINUS: MINUS | INF, INF: 0, MINUS | INF: MINUS, 1: INF, MINUS | 0x7FFFFF: MINUS | INF}  # denormal inputs
    | {0x7E800000: 0x00800000, 0x7E800001: 0, 0x7F7FFFFF: 0, MINUS | 0x7EC00000: MINUS},  # and results, from 2**126 on
    flushes=True,
)
APPROXIMATE = {
    "v_rcp_f32": RECIPROCAL,
    "v_rcp_iflag_f32": RECIPROCAL,
    "v_rsq_f32": Approximation(
        lambda x: 1 / math.sqrt(x),
        lambda x: x > 0,
        {0: INF, MINUS: MINUS | INF, INF: 0, 0xBF800000: None, 1: INF, 0x7FFFFF: INF, MINUS | 1: MINUS | INF},
        flushes=True,
    ),
    "v_sqrt_f32": Approximation(math.sqrt, lambda x: x > 0, {0: 0, MINUS: MINUS, INF: INF, 0xBF800000: None}),
    "v_exp_f32": Approximation(lambda x: 2.0**x, lambda x: abs(x) < 120, {0x43800000: INF, INF: INF, MINUS | INF: 0}),
    "v_log_f32": Approximation(
        math.log2, lambda x: x > 0 and abs(x - 1) > 1e-6, {0: MINUS | INF, INF: INF, 0xBF800000: None}
    ),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate(name: str) -> None:
    """Within one ulp of the correctly rounded value, and not always at it."""
    what, rng = APPROXIMATE[name], np.random.default_rng(0)
    source = np.concatenate([np.array(INTERESTING["f", 32], U32), rng.integers(0, 1 << 32, 3000, dtype=U32)])
    source = np.concatenate([source, rng.integers(0x3D000000, 0x43000000, 1000, dtype=U32)])
    numbers = [floats_of(int(b)) for b in source]
    source = source[[math.isfinite(x) and abs(x) >= 2.0**-126 and what.domain(x) for x in numbers]]
    want = np.array([pc.encode(what.function(floats_of(int(b))), pc.F32) for b in source], np.int64)
    if what.flushes:
        want = np.where(want & INF == 0, want & MINUS, want)
    errors = [apply(f"{name}_e32 v0, v4", source, seed=seed).astype(np.int64) - want for seed in range(4)]
    assert np.abs(errors).max() == 1
    assert (np.array(errors[1:]) != errors[0]).any(axis=1).all()  # another function with another seed
    for bits, result in [*what.special.items(), (0x7FC00000, None), (0x7F800001, None)]:
        got = int(apply(f"{name}_e32 v0, v4", np.array([bits], U32))[0])
        assert math.isnan(floats_of(got)) if result is None else got == result


# --- Memory ---------------------------------------------------------------------------------------------------------

LOADS = words("""
ubyte sbyte ushort sshort ubyte_d16 ubyte_d16_hi sbyte_d16 sbyte_d16_hi short_d16 short_d16_hi
dword dwordx2 dwordx3 dwordx4
""")
STORES = words("byte byte_d16_hi short short_d16_hi dword dwordx2 dwordx3 dwordx4")
# The address operands, the offset, and what else an access may say.
PLACES = [("off", 0, ""), ("off", -16, " offset:-16"), ("off", 4080, " offset:4080 nt"), ("s[6:7]", 8, " offset:8")]
PAST = 0x7FFF_0000  # an address far from any array, for lanes that must not access it


def element(width: str) -> int:
    return 1 if "byte" in width else 2 if "short" in width else 4


def dwords(width: str) -> int:
    return int(width[-1]) if width[-2:-1] == "x" else 1


def data_registers(first: int, width: str) -> str:
    return f"v[{first}:{first + dwords(width) - 1}]" if dwords(width) > 1 else f"v{first}"


@dataclass
class Scene:
    """Two waves, some lanes of which access a buffer, each somewhere else."""

    width: str
    place: tuple[str, int, str]
    lanes: int = 128
    state: State = field(init=False)
    buffer: Array = field(init=False)
    offsets: Array = field(init=False)

    def __post_init__(self) -> None:
        base, offset, _ = self.place
        rng = np.random.default_rng([*self.width.encode(), offset & 0xFF])
        self.buffer = rng.integers(0, 256, 20 * self.lanes, dtype=U8)
        spread = rng.permutation(self.lanes) * 20 + rng.integers(0, 4, self.lanes)
        self.offsets = spread // element(self.width) * element(self.width)
        self.offsets = np.minimum(self.offsets, self.buffer.size - 16) & -element(self.width)
        self.state = State(waves=2, vgprs=24)
        self.state.exec_mask = [0x0F0F_1234_8000_0001, ALL ^ 0xFF0]
        address = self.offsets + self.buffer.ctypes.data - offset
        address = np.where(self.active, address, PAST).astype(np.int64)
        if base == "off":
            self.state.v[2], self.state.v[3] = address & 0xFFFFFFFF, address >> 32
        else:  # a register below, and an unsigned offset with its top bit set
            start = self.buffer.ctypes.data - offset - 0x80000000
            self.state.s[6], self.state.s[7] = start & 0xFFFFFFFF, start >> 32
            self.state.v[2] = np.where(self.active, self.offsets + 0x80000000, 0)

    @property
    def active(self) -> Array:
        masks = [int(m) for m in self.state.exec_mask]
        return np.array([masks[lane // 64] >> lane % 64 & 1 for lane in range(self.lanes)], bool)

    @property
    def address(self) -> str:
        return "v[2:3]" if self.place[0] == "off" else "v2"

    def range(self) -> tuple[int, int]:
        return self.buffer.ctypes.data, self.buffer.nbytes


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("width", LOADS)
def test_load(width: str, place: tuple[str, int, str]) -> None:
    scene = Scene(width, place)
    want, untouched = scene.state.v.copy(), scene.buffer.copy()
    content = dict(enumerate(scene.buffer.tolist()))
    for lane in np.flatnonzero(scene.active):
        old = sum(int(want[8 + i, lane]) << 32 * i for i in range(4))
        env = {
            "MEM": pc.Bytes(content),
            "ADDR": Value("u", 32, int(scene.offsets[lane])),
            "VDATA": Value("b", 128, old),
        }
        env |= {"SADDR": pc.integer(0), "OFFSET": pc.integer(0)}
        bits = compiled(f"global_load_{width}")(env)["VDATA"].bits
        for i in range(dwords(width)):
            want[8 + i, lane] = bits >> 32 * i & 0xFFFFFFFF
    text = f"global_load_{width} {data_registers(8, width)}, {scene.address}, {place[0]}{place[2]}"
    execute(text, scene.state, memory=Memory(readable=[scene.range()], writable=[]))
    np.testing.assert_array_equal(scene.state.v, want)
    np.testing.assert_array_equal(scene.buffer, untouched)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("width", STORES)
def test_store(width: str, place: tuple[str, int, str]) -> None:
    scene = Scene(width, place)
    before, memory = scene.state.v.copy(), pc.Bytes(dict(enumerate(scene.buffer.tolist())))
    for lane in np.flatnonzero(scene.active):
        data = sum(int(before[8 + i, lane]) << 32 * i for i in range(4))
        env = {"MEM": memory, "ADDR": Value("u", 32, int(scene.offsets[lane])), "VDATA": Value("b", 128, data)}
        compiled(f"global_store_{width}")(env | {"SADDR": pc.integer(0), "OFFSET": pc.integer(0)})
    text = f"global_store_{width} {scene.address}, {data_registers(8, width)}, {place[0]}{place[2]}"
    execute(text, scene.state, memory=Memory(readable=[], writable=[scene.range()]))
    np.testing.assert_array_equal(scene.buffer, [memory.content[i] for i in range(scene.buffer.size)])
    np.testing.assert_array_equal(scene.state.v, before)


@pytest.mark.parametrize(("kind", "width"), [*(("load", w) for w in LOADS), *(("store", w) for w in STORES)])
def test_faults(kind: str, width: str) -> None:
    """One byte outside, misaligned, or read-only: and nothing happens where no lane is active."""
    size = element(width) * dwords(width)
    buffer = np.zeros(256, U8)
    start = -(-(buffer.ctypes.data + 64) // 16) * 16
    inside = [(start, 64)]

    def access(address: int, *, mask: int = 1, readable: Any = (), writable: Any = ()) -> None:
        state = State(waves=1, vgprs=24)
        state.exec_mask = mask
        state.v[2], state.v[3] = address & 0xFFFFFFFF, address >> 32
        register = data_registers(8, width)
        operands = f"{register}, v[2:3]" if kind == "load" else f"v[2:3], {register}"
        execute(f"global_{kind}_{width} {operands}, off", state, memory=Memory(list(readable), list(writable)))

    allowed: dict[str, Any] = {"readable" if kind == "load" else "writable": inside}
    access(start, **allowed)
    access(start + 64 - size, **allowed)
    access(start + element(width), **allowed)
    access(PAST, mask=0, **allowed)
    for address in (start - element(width), start + 64 - size + element(width), start + 64, PAST):
        with pytest.raises(MemoryFault):
            access(address, **allowed)
    with pytest.raises(MemoryFault):
        access(start + (1 if size > 1 else 64), **allowed)
    with pytest.raises(MemoryFault):
        access(start, **({"writable": [(start + 16, 48)]} if kind == "load" else {"readable": inside}))
    if size > 1:  # a range that ends within
        with pytest.raises(MemoryFault):
            access(start, **{key: [(start, size - 1)] for key in allowed})


# The vector address, the scalar offset, and what else an access to a buffer may say; the constant offset.
BUFFERS = [("v2", "0", " offen", 0), ("v2", "s9", " offen offset:16 nt", 16), ("v2", "0x8", " offen offset:4095", 4095)]


@pytest.mark.parametrize("place", BUFFERS, ids=str)
@pytest.mark.parametrize("access", [*(f"load_{w}" for w in LOADS), *(f"store_{w}" for w in STORES)])
def test_buffer(access: str, place: tuple[str, str, str, int]) -> None:
    """As the text says, of lanes within the resource; lanes past its end load 0 and store nothing, however far."""
    verb, _, width = access.partition("_")
    vector, soffset, suffix, constant_offset = place
    scene, rng, added = (
        Scene(width, PLACES[0]),
        np.random.default_rng(len(access)),
        {"0": 0, "s9": 64, "0x8": 8}[soffset],
    )
    state, size = scene.state, 1 << 31
    start = scene.buffer.ctypes.data - added - constant_offset
    state.s[4], state.s[5], state.s[6], state.s[7] = start & 0xFFFFFFFF, start >> 32, size + added, 0x27000
    state.s[9] = added
    outside = rng.random(128) < 0.3
    state.v[2] = np.where(outside, rng.choice([size, 0xFFFFFFFF, size + 4], 128), scene.offsets)
    want, memory = state.v.copy(), pc.Bytes(dict(enumerate(scene.buffer.tolist())))
    for lane in np.flatnonzero(scene.active):
        old = sum(int(want[8 + i, lane]) << 32 * i for i in range(4))
        here = pc.Bytes(dict.fromkeys(range(32), 0)) if outside[lane] else memory
        at = 0 if outside[lane] else int(scene.offsets[lane])
        env = {"MEM": here, "VADDR": Value("u", 32, at), "VDATA": Value("b", 128, old)}
        env |= {name: pc.integer(0) for name in ("SRSRC", "SOFFSET", "OFFSET")}
        bits = compiled(f"buffer_{access}")(env)["VDATA"].bits
        for i in range(dwords(width) if verb == "load" else 0):
            want[8 + i, lane] = bits >> 32 * i & 0xFFFFFFFF
    ranges = {"readable" if verb == "load" else "writable": [scene.range()]}
    text = f"buffer_{access} {data_registers(8, width)}, {vector}, s[4:7], {soffset}{suffix}"
    execute(text, state, memory=Memory(**ranges))
    np.testing.assert_array_equal(state.v, want)
    np.testing.assert_array_equal(scene.buffer, [memory.content[i] for i in range(scene.buffer.size)])


@pytest.mark.parametrize(
    ("at", "why"),
    [(0, None), (60, "fault"), (1 << 20, None), ((1 << 20) - 4, "across"), ("word 1", "raw"), ("word 3", "raw")],
)
def test_buffer_limits(at: Any, why: str | None) -> None:
    """What lies within the resource is checked as any memory; what is not a plain range of bytes is not modelled."""
    buffer = np.zeros(16, U32)
    state = State(waves=1, vgprs=24)
    start = buffer.ctypes.data
    state.s[4], state.s[5], state.s[6], state.s[7] = start & 0xFFFFFFFF, start >> 32, 1 << 20, 0x27000
    state.v[2], state.exec_mask = at if isinstance(at, int) else 0, 1
    if isinstance(at, str):
        state.s[4 + int(at[-1])] |= 1 << 17
        state.s[4 + int(at[-1])] ^= 1 << 18
    raised = {None: nullcontext(), "fault": pytest.raises(MemoryFault)}
    with raised.get(why, pytest.raises(UnknownInstruction, match=why)):
        text = "buffer_load_dwordx2 v[8:9], v2, s[4:7], 0 offen\nbuffer_load_dword v8, off, s[4:7], 0 offset:60"
        execute(text, state, memory=Memory(readable=[(start, buffer.nbytes)]))


def test_one_faulty_lane_of_many() -> None:
    scene = Scene("dword", PLACES[0])
    scene.state.v[2, 127] += 20 * 128
    assert scene.active[127]
    with pytest.raises(MemoryFault):
        execute("global_load_dword v8, v[2:3], off", scene.state, memory=Memory([scene.range()], []))


def test_across_two_ranges() -> None:
    """Ranges that touch stay two, whatever can be done to them; those that overlap are one."""
    buffer = np.zeros(64, U8)
    start = -(-buffer.ctypes.data // 16) * 16
    for kind in ("read", "write"):
        for first, allowed in ((16, False), (20, True)):
            ranges = [(start + 16, 16), (start, first)]
            memory = Memory(ranges[:1], ranges[1:]) if kind == "read" else Memory([], ranges)
            for at in (0, 8, 16):
                address = np.array([start + at], U64)
                with nullcontext() if allowed or at != 8 else pytest.raises(MemoryFault):
                    memory.load(address, 4, 4)
                    if kind == "write":
                        memory.store(address, 4, np.zeros((4, 1), U32))
                if kind == "write" and at == 8 and not allowed:
                    with pytest.raises(MemoryFault):
                        memory.store(address, 4, np.zeros((4, 1), U32))
    memory = Memory([(start, 16)])
    with memory.also_readable(start + 16, 16), pytest.raises(MemoryFault):
        memory.load(np.array([start + 8], U64), 4, 4)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_scalar_load(count: int) -> None:
    data = np.random.default_rng(count).integers(0, 1 << 32, 64, dtype=U32)
    memory = Memory(readable=[(data.ctypes.data, data.nbytes)], writable=[])
    name = "s_load_dword" + (f"x{count}" if count > 1 else "")
    target = f"s[16:{15 + count}]" if count > 1 else "s16"
    state = State(waves=3)
    starts = data.ctypes.data + np.array([0, 64, 96])
    state.s[2], state.s[3] = starts & 0xFFFFFFFF, starts >> 32
    want = state.s.copy()
    for wave, start in enumerate((0, 16, 24)):
        want[16 : 16 + count, wave] = data[start + 6 : start + 6 + count]
    execute(f"{name} {target}, s[2:3], 0x18", state, memory=memory)
    np.testing.assert_array_equal(state.s, want)
    with pytest.raises(MemoryFault):
        execute(f"{name} {target}, s[2:3], {256 - 96 - 4 * count + 4:#x}", state, memory=memory)


LOCAL = words(
    """read_b32 read_b64 read_b96 read_b128 read_u8 read_i8 read_u16 read_i16 read_u8_d16 read_u8_d16_hi read_i8_d16
    read_i8_d16_hi read_u16_d16 read_u16_d16_hi write_b32 write_b64 write_b96 write_b128 write_b8 write_b16
    write_b8_d16_hi write_b16_d16_hi read2_b32 read2_b64 write2_b32 write2_b64 read2st64_b32 write2st64_b64"""
)


def local_dwords(state: State, count: int, values: Array | None = None) -> Array:
    """The first dwords of the LDS, which are set to ``values`` before, if given."""
    helper, result = State(waves=1, vgprs=8), []
    helper.local = state.local
    for start in range(0, count, 64):
        helper.v[4] = 4 * np.arange(start, start + 64)
        helper.exec_mask = ALL >> max(64 - (count - start), 0)
        if values is not None:
            helper.v[5, : count - start] = values[start : start + 64]
            execute("ds_write_b32 v4, v5", helper)
        execute("ds_read_b32 v6, v4", helper)
        result.append(helper.v[6, : count - start].copy())
    return np.concatenate(result)


@pytest.mark.parametrize("name", LOCAL)
def test_local_memory(name: str) -> None:
    """Each active lane at an address of its own, against the text; the last byte can be had, and no further one."""
    bits, two = int(re.findall(r"_[bui](\d+)", name)[0]), "2" in name.partition("_")[0]
    size, count = max(bits // 8, 1), max(bits // 32, 1)
    unit = 1 if not two else size * 64 if "st64" in name else size
    offsets = [2, 5] if two else [16]
    stride = 8 * size if two else size  # nothing is written twice
    total = 63 * stride + max(offsets) * unit + size
    state = State(waves=1, vgprs=32, lds_bytes=total, rng=np.random.default_rng(bits))
    state.v[4] = (np.arange(64) ^ 21) * stride
    content = local_dwords(state, total // 4, np.random.default_rng(1).integers(0, 1 << 32, total // 4, dtype=U32))
    memory = pc.Bytes(dict(enumerate(content.view(U8).tolist())))
    state.exec_mask = 0x8000_7FFF_FFFF_0001
    want, text = state.v.copy(), text_of(f"ds_{name}")
    for lane in Picture.of(state).active(0):
        data = [sum(int(want[first + i, lane]) << 32 * i for i in range(4)) for first in (8, 16)]
        env: pc.Env = {
            "MEM": memory,
            "OFFSET": pc.integer(offsets[0]),
            "OFFSET0": pc.integer(2),
            "OFFSET1": pc.integer(5),
        }
        env["ADDR"] = Value("u", 32, int(state.v[4, lane]) + (0 if "OFFSET" in text else offsets[0]))
        env |= {"DATA": Value("b", 128, data[0]), "DATA2": Value("b", 128, data[1])}
        env = compiled(f"ds_{name}")(env | {"RETURN_DATA": env["DATA"]})
        for i in range(count * (1 + two) if "read" in name else 0):
            want[8 + i, lane] = env["RETURN_DATA"].bits >> 32 * i & 0xFFFFFFFF
    rows = [range(8, 8 + count), range(16, 16 + count)]
    if "read" in name:
        rows = [range(8, 8 + count * (1 + two))]
    data_operands = [f"v[{r[0]}:{r[-1]}]" if len(r) > 1 else f"v{r[0]}" for r in rows[: 1 + two]]
    operands = ", ".join([*data_operands, "v4"] if "read" in name else ["v4", *data_operands])
    modifiers = "offset0:2 offset1:5" if two else "offset:16"
    execute(f"ds_{name} {operands} {modifiers}", state)
    np.testing.assert_array_equal(state.v, want)
    np.testing.assert_array_equal(local_dwords(state, total // 4).view(U8), [memory.content[i] for i in range(total)])
    state.v[4] += size
    state.exec_mask = 1 << 42  # the lane with the highest address, 42 ^ 21 = 63
    with pytest.raises(MemoryFault):
        execute(f"ds_{name} {operands} {modifiers}", state)


# --- Work-groups ----------------------------------------------------------------------------------------------------

# Blocks 2 i and 2 i + 1 both add 1 to word i; each block b writes b, by way of its LDS, to word 1024 + b.
TWO_A_WORD = """
s_load_dwordx2 s[4:5], s[0:1], 0x0
s_lshr_b32 s3, s2, 1
v_mov_b32_e32 v1, s3
v_lshlrev_b32_e32 v1, 2, v1
global_load_dword v2, v1, s[4:5]
v_add_u32_e32 v2, 1, v2
global_store_dword v1, v2, s[4:5]
v_mov_b32_e32 v3, s2
v_mov_b32_e32 v4, 0
ds_write_b32 v4, v3
s_barrier
ds_read_b32 v5, v4
v_lshlrev_b32_e32 v3, 2, v3
v_add_u32_e32 v3, 0x1000, v3
global_store_dword v3, v5, s[4:5]
s_endpgm
"""


def handmade(text: str, lds_bytes: int = 4, preload: int = 0) -> Kernel:
    """A kernel with one pointer for an argument: s[0:1] has its address.

    In the next SGPRs are ``preload`` words of the arguments, then comes the block's x.
    """
    listing = [f"{line} // {4 * i:012X}: 0" for i, line in enumerate(text.strip().splitlines())]
    descriptor = struct.pack("<48xIIHH4x", 0xF0 << 12 | 0b1010 << 20, 2 + preload << 1 | 1 << 7, 8, preload)
    resources = {"vgprs": 8, "agprs": 0, "sgprs": 8, "vgpr_spills": 0, "sgpr_spills": 0, "scratch_bytes": 0}
    return Kernel(
        "handmade", "gfx942", [(0, 8)], 8, **resources, lds_bytes=lds_bytes, wavefront=64, raw_descriptor=descriptor,
        listing=listing,
    )  # fmt: skip


# Every item tells the LDS its number, and writes what an item of another wave told.
EXCHANGE = """
s_load_dwordx2 s[4:5], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 2, v0
ds_write_b32 v1, v0
s_barrier
v_xor_b32_e32 v2, 0x100, v1
ds_read_b32 v3, v2
global_store_dword v1, v3, s[4:5]
s_endpgm
"""


@pytest.mark.parametrize("barrier", [True, False])
def test_waves_meet_only_at_barriers(barrier: bool) -> None:
    """Without one, only the later of two waves finds what the other wrote."""
    text = EXCHANGE if barrier else EXCHANGE.replace("s_barrier", "s_nop 0")
    later = set()
    for seed in range(16):
        words = np.zeros(256, U32)
        memory, kernarg = Memory([], [(words.ctypes.data, words.nbytes)]), struct.pack("<Q", words.ctypes.data)
        rng = np.random.default_rng(seed)
        dispatch(handmade(text, lds_bytes=1024), (1, 1, 1), (256, 1, 1), kernarg, memory, rng)
        right = (words == np.arange(256) ^ 64).reshape(4, 64)
        assert barrier == right.all() and (right.all(axis=1) == right.any(axis=1)).all()
        assert (right[[0, 2]].any(axis=1) | right[[1, 3]].any(axis=1)).all()
        later.add(tuple(right[:, 0].tolist()))
    assert barrier or len(later) == 4


def test_arguments_in_registers() -> None:
    """Firmware that preloads them skips 256 bytes, other firmware does not: a launch meets either."""
    loads = ["s_load_dwordx2 s[2:3], s[0:1], 0x0", "v_mov_b32_e32 v1, 1", "global_store_dword v1, v1, s[2:3] offset:7"]
    lines = [*loads, *["s_nop 0"] * 61, "v_mov_b32_e32 v1, 0", "v_mov_b32_e32 v2, s4"]
    kernel = handmade("\n".join([*lines, "global_store_dword v1, v2, s[2:3]", "s_endpgm"]), preload=2)
    found = set()
    for seed in range(16):
        words = np.full(4, 9, U32)
        memory, kernarg = Memory([], [(words.ctypes.data, words.nbytes)]), struct.pack("<Q", words.ctypes.data)
        dispatch(kernel, (1, 1, 1), (1, 1, 1), kernarg, memory, np.random.default_rng(seed))
        found.add(tuple(words.tolist()))
    assert found == {(0, 9, 1, 9), (0, 9, 9, 9)}


@pytest.mark.parametrize("blocks", [2, 128, 1024])
def test_blocks_race(blocks: int) -> None:
    """An update that two blocks both make is seen to be made twice, for about every other pair, and for a lone one."""
    words = np.zeros(2048, U32)
    memory = Memory([], [(words.ctypes.data, words.nbytes)])
    kernarg = struct.pack("<Q", words.ctypes.data)
    dispatch(handmade(TWO_A_WORD), (blocks, 1, 1), (1, 1, 1), kernarg, memory, np.random.default_rng(blocks))
    twice = int((words[: blocks // 2] == 2).sum())
    assert twice == 1 if blocks == 2 else blocks // 8 < twice < blocks // 2
    np.testing.assert_array_equal(words[1024 : 1024 + blocks], np.arange(blocks))


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 64, 1000])
def test_batches(blocks: int) -> None:
    """Every block once, no batch too large, never all blocks in one; neighbours part, elsewhere in each launch."""
    rng, apart = np.random.default_rng(blocks), []
    for most in (1, 7, 512, 512):
        found = batches(blocks, most, rng)
        assert len(found) >= min(blocks, 2) and all(0 < len(numbers) <= most for numbers in found)
        assert sorted(np.concatenate([*found, np.arange(0)]).tolist()) == list(range(blocks))
        batch = {int(number): i for i, numbers in enumerate(found) for number in numbers}
        apart.append([batch[i] != batch[i + 1] for i in range(blocks - 1)])
    if blocks == 2:
        assert all(map(all, apart))
    if blocks >= 64:
        assert all(sum(parted) > blocks // 4 for parted in apart) and apart[2] != apart[3]


# --- What isn't known -----------------------------------------------------------------------------------------------

UNKNOWN = """
v_frobnicate_b32 v0, v4
s_frobnicate_b32 s0, s4
v_add_f32_e64 v0, v4, v8 frobnicate
v_add_f32_e64 v0, v4, v8 frobnicate:1
v_mov_b32_e32 v0, src_nowhere
v_add_f32_e32 v0, q4, v8
v_mov_b32_dpp v0, v4 row_share:1 row_mask:0xf bank_mask:0xf
v_or_b32_sdwa v0, v4, v8 dst_sel:NIBBLE_1 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD
v_mul_f32_e64 v0, v4, v8 mul:2
global_load_dword v0, v[2:3], off frobnicate
global_load_nibble v0, v[2:3], off
buffer_load_dword v0, v2, s[4:7], 0 idxen
buffer_load_dword v0, v2, s[4:7], 0 offen lds
buffer_load_dword v0, off, s[4:7], 0 offen
buffer_load_dword v0, v2, s[4:7], 0
buffer_load_dword v0, v2, s[4:5], 0 offen
s_waitcnt frobnicate(0)
s_setreg_frobnicate_b32 hwreg(HW_REG_MODE, 0, 4), s4
""".strip().splitlines()


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown(text: str) -> None:
    state = State(waves=1, vgprs=24)
    state.exec_mask = 0  # so that it can't be the memory that is missing
    with pytest.raises(UnknownInstruction):
        execute(text, state, memory=Memory([], []))


def test_unknown_architecture() -> None:
    with pytest.raises(UnknownInstruction):
        execute("v_mov_b32_e32 v0, v4", State(), arch="gfx1100")


@pytest.mark.parametrize("text", ["v_frobnicate_b32 v0, v4", "s_branch 100"])
def test_unknown_where_no_wave_gets(text: str) -> None:
    assert unknown(handmade(TWO_A_WORD)) == []
    assert len(unknown(handmade(f"{TWO_A_WORD.strip()}\n{text}\ns_endpgm"))) == 1


# --- The evaluator --------------------------------------------------------------------------------------------------

FORMATS = {
    pc.F16: np.float16,
    pc.F32: np.float32,
    pc.BF16: ml_dtypes.bfloat16,
    pc.FP8_OCP: ml_dtypes.float8_e4m3fn,
    pc.BF8_OCP: ml_dtypes.float8_e5m2,
    pc.FP8_FNUZ: ml_dtypes.float8_e4m3fnuz,
    pc.BF8_FNUZ: ml_dtypes.float8_e5m2fnuz,
}


@given(st.floats(allow_nan=False) | st.floats(width=32) | st.floats(-600, 600, width=16))
@settings(max_examples=300)
def test_rounding_of_the_evaluator(x: float) -> None:
    """What rounds the oracle's results agrees with numpy and ml_dtypes."""
    for fmt, dtype in FORMATS.items():
        if np.dtype(dtype).itemsize == 1 or dtype is ml_dtypes.bfloat16:  # these round by way of float32
            x = float(np.float32(x)) if abs(x) < 3e38 or math.isinf(x) else math.copysign(3e38, x)
        with np.errstate(all="ignore"):
            want = (
                np.array(x, np.float64).astype(np.float32).astype(dtype) if dtype is not np.float16 else np.float16(x)
            )
        width = 8 * np.dtype(dtype).itemsize
        got = np.array(pc.encode(x, fmt), f"u{width // 8}").view(dtype)
        assert got.tobytes() == np.asarray(want).tobytes() or (math.isnan(float(got)) and math.isnan(float(want)))
    assert pc.decode(pc.encode(x, pc.F64), pc.F64) == x


@example("D0.u32 = { S0[7 : 0], S0[31 : 8] }", 0x11223344, 0x44112233)
@example("D0.i32 = S0.i32 >> 4U", 0x80000000, 0xF8000000)
@example("D0.u32 = S0.u32[0 : 31]", 1, 0x80000000)
@example("tmp = -1; for i in 0 : 31 do if S0.u32[i] == 1'1U then tmp = i; break endif endfor; D0.i32 = tmp", 0x50, 4)
@example("D0.u32 = 32'U(64'U(S0.u32) * 64'U(S0.u32) >> 32U)", 0xFFFFFFFF, 0xFFFFFFFE)
@example("D0.f32 = S0.f32 * 2.0F", 1, 2)
@example("D0.f32 = 1.0F / S0.f32", 0x40400000, 0x3EAAAAAB)
@example("D0.f32 = -S0.f32", 0, 0x80000000)
@example("D0.u32 = (S0.f32 == -0.0) ? 1U : 0U", 0, 0)
@example(
    "if isSignalNAN(64'F(S0.f32)) then D0.f32 = cvtToQuietNAN(S0.f32) else D0.u32 = 1U endif", 0x7F800001, 0x7FC00001
)
@example("D0[15 : 0].f16 = 16'F(S0.f32); D0[31 : 16].b16 = 16'0xbeef", 0x3F800000, 0xBEEF3C00)
@given(st.just("D0.u32 = S0.u32"), st.just(5), st.just(5))
@settings(max_examples=1)
def test_evaluator(text: str, source: int, result: int) -> None:
    env = pc.compile_text(text)({"S0": Value("b", 32, source), "D0": Value("b", 32, 0)})
    assert env["D0"].bits == result

"""The Triton kernels as devices of the test matrix, with no GPU: compiled for an AMD chip, run on an emulated one.

The ops check their arguments and make their launches as ever. Then each kernel is compiled as Triton's own launcher
would for these arguments, and in place of the HIP runtime :mod:`cdna` executes its machine code, with every access held
against the tensors that the op was given. No driver is asked for.

    PYTHONPATH=python:tests python tests/amd_triton.py      # writes its table of docs/amd.md
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import amd
import machine_code
import numpy as np
import torch
from cdna.code_object import CodeObject, Kernel
from cdna.machine import dispatch
from cdna.memory import Memory
from cdna.state import LANES
from latentkv.cache.layouts import FORMATS
from latentkv.ops import schemas as ops
from latentkv.providers import Provider
from latentkv.testing import Case, Problem
from latentkv.testing.matrix import ACTIVATIONS, formats_for

SUPPORTED = "3.6."  # whose launcher is followed here, and whose code is held to limits


def problem() -> str | None:
    """Why Triton's AMD code cannot be made and emulated here; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not (version := importlib.metadata.version("triton")).startswith(SUPPORTED):
        return f"triton is {version}, not {SUPPORTED}x"
    return amd.problem()


@dataclass(frozen=True)
class Compiled:
    """A kernel for a chip, and what it was compiled for.

    Attributes:
        kernel: its machine code; the LDS is what a launch asks for.
        signature: parameter -> type, "constexpr" where the value is part of the code; tuples have tuples of types.
    """

    kernel: Kernel
    signature: dict[str, Any]


_compiled: dict[str, Compiled] = {}


def compiled(launch: Any, arch: str) -> Compiled:
    """The kernel of a launch, specialised as Triton's launcher does: for alignments, ones and absent arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("hip", arch, LANES)
    backend = make_backend(target)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, _ = bind(**launch.args, **options)
    key = repr((arch, kernel.fn.__qualname__, specialization, options))
    if key not in _compiled:
        parsed, signature, *rest = kernel._pack_args(backend, options, arguments, specialization, options)
        made = compile(ASTSource(kernel, signature, *rest), target=target, options=parsed.__dict__)
        (code,) = CodeObject(made.asm["hsaco"], arch).kernels.values()
        _compiled[key] = Compiled(replace(code, lds_bytes=made.metadata.shared), signature)
    return _compiled[key]


_CODES = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
_CODES |= {"fp32": "f", "fp64": "d"}


def _packed(signature: Any, value: Any) -> Iterator[bytes]:
    """What a kernel is passed of an argument: nothing of what is part of the code."""
    if isinstance(signature, tuple):
        for part in zip(signature, value, strict=True):
            yield from _packed(*part)
    elif signature.startswith("*"):
        yield struct.pack("<Q", value.data_ptr())
    elif signature != "constexpr":
        yield struct.pack("<" + _CODES[signature], value)


def kernarg(code: Compiled, args: dict[str, Any]) -> bytes:
    """The arguments as the kernel finds them; the two pointers to scratch at the end are null, for there is none."""
    block = bytearray(code.kernel.kernarg_size)
    values = [data for name, kind in code.signature.items() for data in _packed(kind, args[name])]
    for (offset, size), data in zip(code.kernel.arguments, [*values, bytes(8), bytes(8)], strict=True):
        assert len(data) == size, code.signature
        block[offset : offset + size] = data
    return bytes(block)


@contextmanager
def in_place_of_run(run: Callable[[Any], None]) -> Iterator[None]:
    """Ops make their launches for an AMD GPU, whatever their tensors' device, and ``run`` takes them."""
    from latentkv.ops.triton.launch import Launch, Target

    with (
        mock.patch.object(Launch, "run", lambda launch: run(launch)),
        mock.patch.object(Target, "of", return_value=Target(hip=True)),
    ):
        yield


class Chip:
    """An emulated GPU that takes launches.

    Attributes:
        arch, memory: the chip, and what the next launches may touch.
        executed: instructions that waves have executed in the last op.
    """

    def __init__(self, arch: str) -> None:
        self.arch, self.memory, self.executed = arch, Memory(), 0
        self.random = np.random.default_rng(0)

    def run(self, launch: Any) -> None:
        """In place of Launch.run."""
        code = compiled(launch, self.arch)
        x, y, z = (*launch.grid, 1, 1)[:3]
        shape = ((x, y, z), (LANES * launch.num_warps, 1, 1))
        self.executed += dispatch(code.kernel, *shape, kernarg(code, launch.args), self.memory, self.random)


@functools.cache
def chip(arch: str) -> Chip:
    """The one of its kind in this process."""
    return Chip(arch)


@functools.cache
def provider(arch: str) -> Provider:
    """The Triton kernels on an emulated ``arch``; attention's matrix instructions are not emulated."""
    gpu, kernels = chip(arch), importlib.import_module("latentkv.ops.triton")

    def emulated(name: str) -> Any:
        overload = getattr(getattr(torch.ops, ops.NAMESPACE), name).default

        def op(*args: Any) -> None:
            gpu.memory, gpu.executed = amd._allowed(overload, args), 0
            with in_place_of_run(gpu.run):
                getattr(kernels, name)(*args)

        return op

    return Provider(f"triton-{arch}", {name: emulated(name) for name in ops.NATIVE_OP_NAMES})


# ------------------------------------------------------------------------------------------------- the machine code


@dataclass(frozen=True)
class Variant(machine_code.Code):
    """A kernel, and the op, activation and format that it was compiled for."""

    op: str
    activation: str
    format: str

    def __str__(self) -> str:
        return "-".join((self.kernel.arch, self.op, self.kernel.name, self.activation, self.format))


UPDATES = ("write_cache_", "rope_write_cache_", "decode_prologue", "write_cache_grouped_")
READERS = ("gather_cache", "convert_cache_", "mla_decode")


def variants() -> Iterator[tuple[str, str, str]]:
    """Every op with each activation and format: of a reader the dtype of its result, or of its query, and a format."""
    yield from ((op, activation, "bf16") for op in ("rope_", "write_indexer_cache_") for activation in ACTIVATIONS)
    yield from ((op, a, f) for op in UPDATES for a in ACTIVATIONS for f in formats_for(a))
    yield from ((op, "bf16", f) for op in READERS for f in FORMATS if op != "mla_decode" or not FORMATS[f].packed)


def main_case(op: str, activation: str, format: str) -> Case:
    """A step of DeepSeek-V3 (of V4 for its format), everything aligned; convert_cache_ writes bf16, of bf16 e4m3fn."""
    case = machine_code.decode_step(op, format, activation=activation, strides="contiguous")
    if op in READERS:
        to = "fp8_e4m3fn" if format == "bf16" else "bf16"
        case = replace(case, tokens=5000, to=replace(case.layout, format=to))  # enough for large programs
    return case


@functools.cache
def main_launches(op: str, activation: str, format: str) -> tuple[Any, ...]:
    """What an op launches for its main case, on an AMD GPU."""
    from latentkv.providers import triton

    case, found = main_case(op, activation, format), list[Any]()
    with in_place_of_run(found.append):
        if op == "mla_decode":
            layout = case.layout
            q = torch.zeros(8, case.heads, layout.kv_lora_rank + layout.rope_dim, dtype=ACTIVATIONS[activation])
            scale = torch.ones(1) if FORMATS[format].quantised else None
            cache, lengths = layout.allocate(256, device="cpu", scale=scale), torch.full((8,), 4096, dtype=torch.int32)
            triton.mla_decode(q, cache, torch.zeros(8, 64, dtype=torch.int32), lengths, sm_scale=0.1)
        elif op == "write_cache_grouped_":  # three layers that lie alike
            p = Problem(case, "cpu")
            caches = [p.cache.layout.allocate(p.cache.num_blocks, "cpu", p.cache.scale) for _ in range(3)]
            triton.write_cache_grouped_([p.kv_c] * 3, [p.k_pe] * 3, p.slots, caches)
        else:
            Problem(case, "cpu").run(triton)
    return tuple(found)


def main_variants(arch: str, op: str, activation: str, format: str) -> list[Variant]:
    """Their machine code. mla_decode has two kernels."""
    launches = main_launches(op, activation, format)
    return [Variant(compiled(launch, arch).kernel, op, activation, format) for launch in launches]


def kernel_table() -> str:
    """The main variants for bf16, of formats that the chip is made for; of updates what eight tokens take."""
    lines = [
        f"Compiled by Triton {importlib.metadata.version('triton')}.",
        "",
        "| chip | op | format | VGPRs | SGPRs | waves | instructions | VALU | loads, stores | LDS |"
        " wave instructions a token: Triton, native |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arch in amd.ARCHS:
        formats = ("bf16", "fp8_e4m3fnuz" if arch == "gfx942" else "fp8_e4m3fn")
        rows = [(op, f) for op in ("rope_write_cache_", "decode_prologue") for f in (*formats, "fp8_ds_mla")]
        rows += [(op, f) for op in ("gather_cache", "mla_decode") for f in formats]
        for op, format in rows:
            v, executed = main_variants(arch, op, "bf16", format)[0], ""
            if op in UPDATES:
                chip(arch).random = np.random.default_rng(0)  # which decides about the arguments' preload
                Problem(main_case(op, "bf16", format), "cpu").run(provider(arch))
                executed = f"{chip(arch).executed / 8:.0f}, {machine_code.run(op, arch, format).instructions:.0f}"
            lines.append(f"| {arch} | {op} | {format} | {v.figures} | {v.kernel.lds_bytes} | {executed} |")
    return "\n".join(lines)


TABLES = {"triton": kernel_table}

if __name__ == "__main__":
    torch.set_num_threads(1)
    new = machine_code.written(machine_code.DOCUMENT.read_text(), "amd_triton", TABLES)
    machine_code.DOCUMENT.write_text(new)

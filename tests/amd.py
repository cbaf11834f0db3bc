"""AMD GPUs as devices of the test matrix, with no GPU: the library `_hip` itself runs, on an emulated chip.

`_hip` is loaded as it ships. Its host code checks and launches as ever, but the HIP runtime that it finds is
`cdna/hip_runtime.c`, which hands each launch to :mod:`cdna`: the machine code embedded in the library is taken out of
it and executed, instruction by instruction, on the tensors, which lie in host memory. Every access is checked against
the tensors that the op was given.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cdna.code_object import CodeObject, Kernel
from cdna.machine import ARCHS as ARCHS
from cdna.machine import dispatch
from cdna.memory import Memory
from latentkv.ops import schemas as ops
from latentkv.providers import Provider
from torch import Tensor

TOOLS = ("llvm-objdump-22", "cc")
KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # whose kernels are called, whatever the tensors
_kept: list[object] = []  # what the loader and the callback must not lose


def library() -> Path | None:
    """The library `_hip` beside the package, if it was built."""
    spec = importlib.util.find_spec("latentkv._hip")
    return Path(spec.origin) if spec and spec.origin else None


def problem() -> str | None:
    """Why AMD devices cannot be emulated here; None where they can."""
    if torch.version.hip:
        return "this torch has the real HIP runtime"
    if library() is None:
        return "the library _hip was not built"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"no {', '.join(missing)}" if missing else None


def entries(bundle: bytes) -> dict[str, tuple[int, int]]:
    """Offset and size of each architecture's ELF in clang's offload bundle, of which the head is enough."""
    magic = b"__CLANG_OFFLOAD_BUNDLE__"
    assert bundle.startswith(magic), "not an uncompressed offload bundle"
    (count,), at = struct.unpack_from("<Q", bundle, len(magic)), len(magic) + 8
    found = {}
    for _ in range(count):
        offset, size, length = struct.unpack_from("<QQQ", bundle, at)
        target = bundle[at + 24 : at + 24 + length].decode()
        at += 24 + length
        if "amdgcn" in target:
            found[target.rpartition("--")[2]] = (offset, size)
    return found


def code_objects(bundle: bytes) -> dict[str, bytes]:
    """The ELF of each architecture in clang's offload bundle."""
    return {arch: bundle[offset : offset + size] for arch, (offset, size) in entries(bundle).items()}


def embedded_bundles(path: Path) -> list[bytes]:
    """The offload bundles inside a library file, one for each source file with kernels in it."""
    data = path.read_bytes()
    starts = [match.start() for match in re.finditer(b"__CLANG_OFFLOAD_BUNDLE__", data)]
    return [data[start:end] for start, end in itertools.pairwise([*starts, len(data)])]


@functools.cache
def shipped(arch: str) -> dict[str, Kernel]:
    """The machine code of `_hip` for an architecture: its kernels by name."""
    path = library()
    assert path is not None
    objects = [CodeObject(code_objects(bundle)[arch], arch) for bundle in embedded_bundles(path)]
    return {name: kernel for code in objects for name, kernel in code.kernels.items()}


def build_runtime(folder: Path) -> list[Path]:
    """The libraries that `_hip` asks for: the stand-in for HIP's runtime, and an empty one for torch's own."""
    sources = {"libamdhip64.so.7": Path(__file__).parent / "cdna" / "hip_runtime.c", "libtorch_hip.so": "/dev/null"}
    for name, source in sources.items():
        command = ["cc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}", "-o", folder / name, "-x", "c", source]
        subprocess.run(command, check=True)
    return [folder / name for name in sources]


class Runtime:
    """The HIP runtime of this process.

    Attributes:
        arch, memory: the chip of the next launches, and what they may touch.
        executed: instructions that waves have executed.
    """

    def __init__(self) -> None:
        self.arch, self.memory, self.executed = "", Memory(), 0
        self.random = np.random.default_rng(0)
        self.error: BaseException | None = None
        self._programs: dict[tuple[int, str], CodeObject] = {}
        with tempfile.TemporaryDirectory(prefix="latentkv-hip-") as folder:
            self._loaded = [ctypes.CDLL(str(path)) for path in build_runtime(Path(folder))]
        dim3 = ctypes.POINTER(ctypes.c_uint32)
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, dim3, dim3, ctypes.POINTER(ctypes.c_void_p)
        )
        self._on_launch = callback(self._launch)
        self._loaded[0].set_on_launch(self._on_launch)

    def _launch(self, bundle: int, name: bytes, grid: Any, block: Any, arguments: Any) -> int:
        try:
            kernel = self._program(bundle).kernels[name.decode()]
            kernarg = bytearray(kernel.kernarg_size)
            for (offset, size), pointer in zip(kernel.arguments, arguments, strict=False):
                kernarg[offset : offset + size] = ctypes.string_at(pointer, size)
            shape = (tuple(grid[:3]), tuple(block[:3]))
            self.executed += dispatch(kernel, *shape, bytes(kernarg), self.memory, self.random)
        except BaseException as error:  # a callback cannot raise through C
            self.error = error
            return 1
        return 0

    def _program(self, bundle: int) -> CodeObject:
        key = (bundle, self.arch)
        if key not in self._programs:
            offset, size = entries(ctypes.string_at(bundle, 4096))[self.arch]
            self._programs[key] = CodeObject(ctypes.string_at(bundle + offset, size), self.arch)
        return self._programs[key]


@functools.cache
def runtime() -> Runtime:
    """The one runtime of this process."""
    return Runtime()


def _ranges(t: Tensor) -> Iterator[tuple[int, int]]:
    """The bytes of a tensor's elements, as (address, size); the last dimension is contiguous."""
    if t.numel() == 0:
        return
    t = t if t.dim() else t[None]
    size, item = t.shape[-1] * t.element_size(), t.element_size()
    if t.dim() > 1 and t.stride(-2) == t.shape[-1]:  # entries without gaps, which may be shared out otherwise
        t, size = t.select(-2, 0), t.shape[-2] * size
    steps = [[i * stride * item for i in range(n)] for n, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    for offsets in itertools.product(*steps):
        yield t.data_ptr() + sum(offsets), size


# Arguments with a row for every token, of which padding is neither read nor written.
_PER_TOKEN = ("positions", "q_nope", "q_pe", "k_pe", "kv_c", "k", "kv_c_out")


def _allowed(overload: Any, args: tuple[Any, ...]) -> Memory:
    """What an op may read and write: its tensors, those with a row per token without the padding rows."""
    named = dict(zip((a.name for a in overload._schema.arguments), args, strict=False))
    slots = named.get("slot_mapping")
    tokens = slots.shape[0] if isinstance(slots, Tensor) else None
    readable, writable = [], []
    for argument in overload._schema.arguments:
        value = named.get(argument.name)
        for t in value if isinstance(value, list | tuple) else [value]:
            if isinstance(t, Tensor):
                written = argument.alias_info is not None and argument.alias_info.is_write
                ranges = _ranges(t[:tokens] if argument.name in _PER_TOKEN else t)
                (writable if written else readable).extend(ranges)
    return Memory(readable, writable)


def load(path: Path, namespace: str, arch: str) -> Provider:
    """A HIP library as a provider on an emulated ``arch``, its ops in a torch namespace of its own."""
    chip = runtime()
    loaded = ctypes.CDLL(str(path))
    _kept.extend([ops.define(namespace), loaded])
    loaded.latentkv_register.argtypes = [ctypes.c_char_p]
    loaded.latentkv_register(namespace.encode())

    def emulated(name: str) -> Any:
        overload = getattr(getattr(torch.ops, namespace), name).default

        def op(*args: Any) -> None:
            chip.arch, chip.memory, chip.executed, chip.error = arch, _allowed(overload, args), 0, None
            try:
                overload.redispatch(KEYS, *args)
            finally:
                if chip.error is not None:
                    raise chip.error

        return op

    return Provider(arch, {name: emulated(name) for name in ops.NATIVE_OP_NAMES})


@functools.cache
def provider(arch: str) -> Provider:
    """The library as it ships, on an emulated ``arch``."""
    path = library()
    assert path is not None, problem()
    return load(path, f"latentkv_{arch}", arch)

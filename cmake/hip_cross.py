"""Assembles a HIP cross toolchain: a folder shaped like a ROCm installation, for a machine without one.

    python hip_cross.py FOLDER

The device compiler is clang-22 with lld-22 and llvm-22 (on Debian: clang-22 clang-tools-22 lld-22 llvm-22). The HIP
headers and the device bitcode come from one pinned wheel of Triton, fetched by pip and checked by its hash. What ROCm
has besides and HIP code needs is made here: modules of one constant each, a stub of the runtime to link against, and
the CMake package that the HIP language asks for. The result depends on nothing else of the machine.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

LLVM = "22"
WHEEL = "triton-3.6.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"
SHA256 = "e8e323d608e3a9bfcc2d9efcc90ceefb764a82b99dea12a86d643c72539ad5d3"
INSIDE = "triton/backends/amd/"
HIP_VERSION = {"MAJOR": 7, "MINOR": 1, "PATCH": 25424}  # of the wheel's headers
GFX = {"906": 9006, "90a": 9010, "942": 9402, "950": 9500}  # gfx906 is what CMake tries the compiler with

TRIPLE = "amdgcn-amd-amdhsa"

# What the library calls; the runtime that torch brings has them all.
RUNTIME = (
    "__hipPopCallConfiguration",
    "__hipPushCallConfiguration",
    "__hipRegisterFatBinary",
    "__hipRegisterFunction",
    "__hipUnregisterFatBinary",
    "hipDeviceGetAttribute",
    "hipGetDevice",
    "hipGetDeviceCount",
    "hipGetErrorString",
    "hipLaunchKernel",
    "hipMemcpyAsync",
    "hipSetDevice",
    "hipStreamIsCapturing",
    "hipStreamSynchronize",
)

# Torch's headers name types of two more headers of ROCm, for conversions that this library does not use.
HIP_FP16 = """\
#pragma once
struct __half {
  _Float16 value;
};
__host__ __device__ inline float __half2float(__half x) { return x.value; }
__host__ __device__ inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
__host__ __device__ inline short __half_as_short(__half x) { return __builtin_bit_cast(short, x); }
__host__ __device__ inline __half __hneg(__half x) { return {-x.value}; }
"""
THRUST_COMPLEX = """\
#pragma once
namespace thrust {
template <class T>
struct complex {
  T re, im;
  __host__ __device__ complex(T re = {}, T im = {}) : re(re), im(im) {}
  __host__ __device__ T real() const { return re; }
  __host__ __device__ T imag() const { return im; }
};
template <class T>
__host__ __device__ complex<T> polar(T radius, T angle);
}  // namespace thrust
"""

HIP_LANG_CONFIG = """\
add_library(hip-lang::device INTERFACE IMPORTED)
add_library(hip-lang::amdhip64 SHARED IMPORTED)
set_target_properties(hip-lang::amdhip64 PROPERTIES
  IMPORTED_LOCATION "${CMAKE_CURRENT_LIST_DIR}/../../libamdhip64.so" IMPORTED_SONAME libamdhip64.so.7)
set_property(TARGET hip-lang::device APPEND PROPERTY INTERFACE_LINK_LIBRARIES hip-lang::amdhip64)
set(_CMAKE_HIP_DEVICE_RUNTIME_TARGET hip-lang::device)
"""


def tool(name: str) -> str:
    """The path of an LLVM tool of the right version."""
    path = shutil.which(f"{name}-{LLVM}")
    if path is None:
        raise SystemExit(
            f"hip_cross: {name}-{LLVM} was not found: install clang-{LLVM} clang-tools-{LLVM} lld-{LLVM} llvm-{LLVM}"
        )
    return path


def run(*command: object, stdin: str | None = None) -> str:
    """Runs a command; its output."""
    done = subprocess.run([str(c) for c in command], input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"hip_cross: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def fetch(folder: Path) -> None:
    """Headers and bitcode from the wheel."""
    of_wheel = ("--python-version=3.11", "--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_27_x86_64")
    download = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *of_wheel)
    run(sys.executable, *download, "--dest", folder, "triton==3.6.0")
    wheel = folder / WHEEL
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"hip_cross: {WHEEL}: expected sha256 {SHA256}, got {digest}")
    bitcode = folder / "amdgcn" / "bitcode"
    bitcode.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(INSIDE)
            if inside.startswith("include/") and not name.endswith("/"):
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
            elif inside in ("lib/ocml.bc", "lib/ockl.bc"):
                (bitcode / Path(inside).name).write_bytes(archive.read(name))
    wheel.unlink()


def constants(bitcode: Path) -> None:
    """The modules through which the driver tells the device libraries what to assume."""
    probe = run(
        tool("clang"), f"--target={TRIPLE}", "-nogpulib", "-S", "-emit-llvm", "-x", "c", "-", "-o", "-", stdin=""
    )
    layout = next(line for line in probe.splitlines() if line.startswith("target datalayout"))
    head = f'{layout}\ntarget triple = "{TRIPLE}"\n'

    def module(name: str, body: str = "") -> None:
        run(tool("llvm-as"), "-o", bitcode / f"{name}.bc", stdin=head + body)

    def constant(name: str, symbol: str, type_: str, value: int) -> None:
        align = int(type_[1:]) // 8
        variable = "linkonce_odr hidden local_unnamed_addr addrspace(4) constant"
        module(name, f"@__oclc_{symbol} = {variable} {type_} {value}, align {align}\n")

    module("hip")
    module("opencl")
    for gfx, version in GFX.items():
        constant(f"oclc_isa_version_{gfx}", "ISA_version", "i32", version)
    for abi in (500, 600):
        constant(f"oclc_abi_version_{abi}", "ABI_version", "i32", abi)
    for name, symbol in (
        ("unsafe_math", "unsafe_math_opt"),
        ("finite_only", "finite_only_opt"),
        ("correctly_rounded_sqrt", "correctly_rounded_sqrt32"),
        ("daz_opt", "daz_opt"),
        ("wavefrontsize64", "wavefrontsize64"),
    ):
        for value, word in enumerate(("off", "on")):
            constant(f"oclc_{name}_{word}", symbol, "i8", value)


def assemble(folder: Path) -> None:
    """The whole folder; it appears at once or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    fetch(part)
    (part / "include" / "hip" / "hip_fp16.h").write_text(HIP_FP16)
    (part / "include" / "thrust").mkdir()
    (part / "include" / "thrust" / "complex.h").write_text(THRUST_COMPLEX)
    constants(part / "amdgcn" / "bitcode")
    version = part / "share" / "hip" / "version"
    version.parent.mkdir(parents=True)
    version.write_text("".join(f"HIP_VERSION_{name}={value}\n" for name, value in HIP_VERSION.items()))
    stub = "".join(f"void {name}(void) {{}}\n" for name in RUNTIME)
    package = part / "lib" / "cmake" / "hip-lang"
    package.mkdir(parents=True)
    shared = ("-shared", "-fPIC", "-nostdlib", "-fuse-ld=lld", "-Wl,-soname,libamdhip64.so.7")
    run(tool("clang"), *shared, "-x", "c", "-", "-o", part / "lib" / "libamdhip64.so", stdin=stub)
    (package / "hip-lang-config.cmake").write_text(HIP_LANG_CONFIG)
    (part / "made").touch()
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


if __name__ == "__main__":
    assemble(Path(sys.argv[1]).resolve())

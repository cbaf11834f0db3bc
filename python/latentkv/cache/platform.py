"""Which machine a cache is for: the kind of device and its architecture."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

__all__ = ["Kind", "Platform"]

Kind = Literal["cuda", "rocm", "cpu"]

# How an architecture is written, by kind. Group 1 is what counts: neither the "a" or "f" of a compile target
# (sm_90a) nor the features behind a ROCm name (gfx942:sramecc+:xnack-) make it another chip.
_ARCH = {"cuda": r"(|sm_\d+)[af]?", "rocm": r"(|gfx[\w-]+)(?::.*)?", "cpu": r"(.*)"}


@dataclass(frozen=True)
class Platform:
    """A kind of device and its architecture: this machine's from :meth:`detect`, any other's by hand.

    Args:
        kind: ``"cuda"``, ``"rocm"`` or ``"cpu"``.
        arch: ``"sm_90"``, ``"gfx942"``, ``"x86_64"``; empty where it does not matter.

    Raises:
        ValueError: ``kind`` is unknown, or ``arch`` is no architecture of that kind.
    """

    kind: Kind
    arch: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"Platform: kind: expected one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        match = re.fullmatch(_ARCH[self.kind], self.arch)
        if match is None:
            example = {"cuda": "sm_90", "rocm": "gfx942"}[self.kind]
            raise ValueError(f"Platform: arch: expected a name like {example} for {self.kind}, got {self.arch!r}")
        object.__setattr__(self, "arch", match[1])

    @classmethod
    @functools.cache
    def detect(cls) -> Platform:
        """The platform of this process, as torch sees its first device; looked up once.

        A machine without a GPU, or with a torch that cannot use it, is ``cpu`` with the processor's name.
        """
        if not torch.cuda.is_available():
            return cls("cpu", platform.machine())
        if torch.version.hip:
            return cls("rocm", torch.cuda.get_device_properties(0).gcnArchName)
        major, minor = torch.cuda.get_device_capability(0)
        return cls("cuda", f"sm_{major}{minor}")

    @property
    def fp8_format(self) -> Literal["fp8_e4m3fn", "fp8_e4m3fnuz"]:
        """The e4m3 kind that this architecture computes with, which ``format="fp8"`` means."""
        return "fp8_e4m3fnuz" if self.arch in ("gfx940", "gfx941", "gfx942") else "fp8_e4m3fn"

    def is_a(self, arch: str) -> bool:
        """Whether this is the architecture ``arch``.

        ``"gfx942"`` is that chip alone, ``"sm_100"`` every chip of its generation (sm_103 too: engines gate
        their kernels by the major version), ``"sm_80+"`` that chip and all later ones.
        """
        if not self.arch.startswith("sm_"):
            return self.arch == arch
        if arch.endswith("+"):
            return int(self.arch[3:]) >= int(arch[3:-1])
        return self.arch[:-1] == arch[:-1]

    def __str__(self) -> str:
        return f"{self.kind} {self.arch}".strip()


def installed_gpus() -> list[str]:
    """The architectures of the GPUs that this process may use, ``["sm_90"]``, asked without starting CUDA or HIP.

    A process that has started either must not fork, so this is what can be asked at import. Empty where there is no
    driver to ask. GPUs that a container or an environment variable hides are left out, as far as can be told.
    """
    if torch.version.hip:
        gpus = _visible(_kfd_gpus(), "ROCR_VISIBLE_DEVICES")
        hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"
        return [arch for _, arch in _visible(gpus, hip)]
    gpus = _nvml_gpus()
    by_index = re.match(r"\s*\d", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if not by_index or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        gpus = _visible(gpus, "CUDA_VISIBLE_DEVICES")
    # Else any of them may be meant: by default CUDA counts from the fastest on, the driver along the bus.
    return [arch for _, arch in gpus]


def _visible(gpus: list[tuple[str, str]], variable: str) -> list[tuple[str, str]]:
    """The GPUs (UUID, architecture) that an environment variable names, by index or by how a UUID begins.

    As in CUDA and HIP, what stands behind a name that is no GPU's counts for nothing.
    """
    names = os.environ.get(variable)
    if names is None:
        return gpus
    left = []
    for name in map(str.strip, names.split(",")):
        named = [g for i, g in enumerate(gpus) if name == str(i) or (name[:4] == "GPU-" and g[0].startswith(name))]
        if not named:
            break
        left.append(named[0])
    return left


def _kfd_gpus() -> list[tuple[str, str]]:
    """UUID and architecture of each AMD GPU, in the order in which ROCm counts them."""
    nodes = []
    for node in Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        try:
            properties = dict(re.findall(r"^(\w+) (\d+)$", node.read_text(), re.MULTILINE))
        except OSError:  # another container's GPU
            continue
        version = int(properties.get("gfx_target_version", 0))  # 90402: gfx942; a CPU has 0
        if version:
            arch = f"gfx{version // 10000}{version // 100 % 100}{version % 100:x}"
            nodes.append((int(node.parent.name), f"GPU-{int(properties.get('unique_id', 0)):016x}", arch))
    return [(uuid, arch) for _, uuid, arch in sorted(nodes)]


def _nvml_gpus() -> list[tuple[str, str]]:
    """UUID and architecture of each NVIDIA GPU, in the order of the bus."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    count, gpus = ctypes.c_uint(), []
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    for i in range(count.value):
        gpu, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        uuid = ctypes.create_string_buffer(96)
        if (
            nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(gpu)) == 0
            and nvml.nvmlDeviceGetCudaComputeCapability(gpu, ctypes.byref(major), ctypes.byref(minor)) == 0
            and nvml.nvmlDeviceGetUUID(gpu, uuid, len(uuid)) == 0
        ):
            gpus.append((uuid.value.decode(), f"sm_{major.value}{minor.value}"))
    nvml.nvmlShutdown()
    return gpus


def has_code_for(architectures: str, gpu: str) -> bool:
    """Whether a library compiled for some architectures, as CMake names them, runs on a GPU.

    "80" is machine code and PTX, good for every later chip; "80-real" machine code alone, good for the later ones of
    its generation; "100f" is for the later ones of its generation too, "90a" for that chip alone; gfx names are exact.
    """
    for name in architectures.split():
        match = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", name)
        if match is None or not gpu.startswith("sm_"):
            if name.partition(":")[0] == gpu:
                return True
            continue
        own, chip = int(match[1]), int(gpu[3:])
        anywhere = not match[2] and match[3] != "-real"
        if chip == own or (chip > own and match[2] != "a" and (anywhere or chip // 10 == own // 10)):
            return True
    return False

"""A kernel launch as plain data: made from an op's checked arguments, run, or compiled for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..warmup import warming_up

overlap = True  # whether kernels may start while the one before them drains, where the chip can do that


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    Attributes:
        hip: an AMD GPU.
        converts: its instructions convert to bf16 and OCP fp8: NVIDIA from sm_89 on.
        pdl: programmatic dependent launch: NVIDIA from sm_90 on.
    """

    hip: bool = False
    converts: bool = False
    pdl: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """That of a device; of a CPU, where the interpreter runs them, it is none of these."""
        if device.type == "cpu" or torch.version.hip is not None:
            return cls(hip=device.type != "cpu")
        capability = torch.cuda.get_device_capability(device)
        return cls(converts=capability >= (8, 9), pdl=capability >= (9, 0) and overlap)

    @property
    def num_warps(self) -> int:
        """Warps of 128 threads."""
        return 2 if self.hip else 4


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the JITFunction.
        grid: programs along each axis.
        args: every argument by its parameter's name, constexprs among them.
        num_warps, num_stages: Triton's options.
        pdl: may start while the launch before it drains (sm_90 and later): a kernel that calls gdc_wait.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    pdl: bool = False

    def run(self) -> None:
        """Puts it on the current stream of its tensors' device; one without programs does nothing.

        Within :func:`latentkv.providers.warm_up` it is compiled and loaded, and not run, whatever its grid.
        """
        if 0 in self.grid and not warming_up():
            return
        options: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": False,  # every product and sum is rounded by itself
            **({"launch_pdl": True} if self.pdl else {}),  # AMD's compiler does not know it
        }
        with torch.cuda.device_of(next(_tensors(self.args.values()))):
            if not warming_up():
                self.kernel[self.grid](**self.args, **options)
            elif isinstance(self.kernel, triton.JITFunction):  # the interpreter has nothing to compile
                _ = self.kernel.warmup(**self.args, **options, grid=self.grid).run  # which loads it


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)

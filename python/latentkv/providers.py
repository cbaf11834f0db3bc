"""Who computes an op: ``native`` (the compiled kernels) or ``reference`` (plain PyTorch, the specification).

At import the namespace ``torch.ops.latentkv`` is served, device by device, by the first provider that can: ``native``
where its library loads, else ``reference``; the environment variable ``LATENTKV_PROVIDER`` names one instead. All of
them stay callable as ``latentkv.providers.<name>``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import reference as _reference
from .layouts import MLACache
from .ops import LIBRARIES, NAMESPACE, NATIVE_NAMESPACE, OP_NAMES

__all__ = ["Provider", "library_errors", "native", "public", "reference", "served_by", "set_overlap"]

Op = Callable[..., None]


class Provider:
    """The ops of the library on one implementation. The public functions are the methods of one of these."""

    def __init__(self, name: str, ops: Mapping[str, Op]) -> None:
        self.name = name
        self._rope = ops["rope_"]
        self._write_cache = ops["write_cache_"]
        self._rope_write_cache = ops["rope_write_cache_"]

    def __repr__(self) -> str:
        return f"<latentkv provider {self.name}>"

    def rope_(
        self,
        positions: Tensor,
        q: Tensor,
        k: Tensor | None,
        cos_sin_cache: Tensor,
        *,
        is_neox: bool,
        inverse: bool = False,
    ) -> None:
        """Rotates query and key heads in place (RoFormer, arXiv:2104.09864): x' = x cos - y sin, y' = y cos + x sin.

        The arithmetic is fp32 with every product and sum rounded by itself, then one rounding to q's dtype. A row whose
        position lies outside the table stays as it is on a GPU and raises on the CPU.

        Args:
            positions: [N] int64 or int32.
            q: [N, H, R] bf16, fp16 or fp32; any strides with a contiguous last dimension. R is even.
            k: [N, R] or [N, K, R] of q's dtype, or None.
            cos_sin_cache: [max_position, R] fp32, bf16 or fp16: cos half | sin half.
            is_neox: pairs are (i, i + R/2); otherwise (2i, 2i + 1), which is what DeepSeek uses.
            inverse: turn back, by the negative angle.

        Raises:
            RuntimeError: an argument's device, dtype, shape or strides are off; nothing has been written then.
        """
        self._rope(positions, q, k, cos_sin_cache, is_neox, inverse)

    def write_cache_(self, kv_c: Tensor, k_pe: Tensor, slot_mapping: Tensor, cache: MLACache) -> None:
        """Writes one row [kv_c | k_pe] per token into the paged cache.

        Row i goes to slot ``slot_mapping[i]``: block slot // bs, entry slot % bs. A negative slot is not written; nor
        is one past the end on a GPU, while the CPU raises. fp8 formats store convert(x / scale): fp32 division, clamp
        to the finite range, round to nearest even. Two rows with one slot: which of them stays is undefined.

        Args:
            kv_c: [N, L] latent vectors; bf16, fp16 or fp32, equal to the cache's format where that is not fp8.
            k_pe: [N, R] rope keys, already rotated, of kv_c's dtype; R may be 0.
            slot_mapping: [T] int64 or int32, T <= N; rows T..N-1 are padding and not read.
            cache: where the rows go.

        Raises:
            RuntimeError: an argument's device, dtype, shape or strides are off; nothing has been written then.
        """
        self._write_cache(kv_c, k_pe, slot_mapping, *cache.op_arguments)

    def rope_write_cache_(
        self,
        positions: Tensor | None,
        q_pe: Tensor,
        k_pe: Tensor,
        kv_c: Tensor,
        cos_sin_cache: Tensor | None,
        slot_mapping: Tensor,
        cache: MLACache,
        *,
        is_neox: bool,
        rope_masked: bool = False,
    ) -> None:
        """:meth:`rope_` on q_pe and k_pe, then :meth:`write_cache_`, in one launch and to the same bytes.

        The cached key is the rotated k_pe as rounded to the activation dtype. Rows T..N-1 are padding: neither read nor
        written. A row whose slot or (if it is rotated) position lies outside is skipped as a whole on a GPU; the CPU
        raises before anything is written, and so does a GPU under ``LATENTKV_CHECKS=1``, at the cost of a sync.

        Args:
            positions: [N] int64 or int32; None, together with cos_sin_cache, for models without rotation.
            q_pe: [N, H, R] bf16, fp16 or fp32, rotated in place; usually the view ``q[..., P:]``.
            k_pe: [N, R] of the same dtype, rotated in place.
            kv_c: [N, L] of the same dtype.
            cos_sin_cache: [max_position, R] fp32, bf16 or fp16: cos half | sin half; or None.
            slot_mapping: [T] int64 or int32, T <= N. A negative slot masks the row: its cache row is not written.
            cache: where the rows go.
            is_neox: pairs are (i, i + R/2); otherwise (2i, 2i + 1), which is what DeepSeek uses.
            rope_masked: rotate masked rows too (context parallelism: the token lives on another rank, its query is
                needed here). By default they stay as they are (graph padding).

        Raises:
            RuntimeError: an argument's device, dtype, shape or strides are off; nothing has been written then.
        """
        self._rope_write_cache(
            positions, q_pe, k_pe, kv_c, cos_sin_cache, slot_mapping, *cache.op_arguments, is_neox, rope_masked
        )


def _load(name: str) -> ctypes.CDLL:
    # Looked up as a module, not imported: an editable install keeps libraries and sources apart.
    spec = importlib.util.find_spec(f"{__package__}._{name}")
    if spec is None or spec.origin is None:
        raise OSError(f"the library _{name} was not built")
    library = ctypes.CDLL(spec.origin)
    library.latentkv_register.argtypes = [ctypes.c_char_p]
    library.latentkv_register(NATIVE_NAMESPACE.encode())
    return library


_libraries: dict[str, ctypes.CDLL] = {}
library_errors: dict[str, str] = {}  # device -> why its library is not there

# A ROCm torch calls its devices "cuda" too.
for _device, _library in (("cpu", "cpu"), ("cuda", "hip" if torch.version.hip else "cuda")):
    if _device == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        library_errors[_device] = "this torch is built without CUDA or ROCm"
        continue
    try:
        _libraries[_device] = _load(_library)
    except OSError as _error:
        library_errors[_device] = str(_error)


def _ops_of(namespace: str) -> dict[str, Op]:
    return {name: getattr(getattr(torch.ops, namespace), name).default for name in OP_NAMES}


native = Provider("native", _ops_of(NATIVE_NAMESPACE))
reference = Provider("reference", {name: getattr(_reference, name) for name in OP_NAMES})
public = Provider("public", _ops_of(NAMESPACE))


def _serve() -> dict[str, str]:
    wanted = os.environ.get("LATENTKV_PROVIDER") or None
    if wanted not in (None, "native", "reference"):
        raise ValueError(f"LATENTKV_PROVIDER: expected native or reference, got {wanted!r}")
    if wanted == "native" and not _libraries:
        raise ImportError(f"LATENTKV_PROVIDER=native, but no native library loads: {library_errors}")
    served: dict[str, str] = {}
    for device in ("cpu", "cuda"):
        if wanted != "reference" and device in _libraries:
            _libraries[device].latentkv_register(NAMESPACE.encode())
            served[device] = "native"
        elif wanted != "native":
            for name in OP_NAMES:
                LIBRARIES[NAMESPACE].impl(name, getattr(_reference, name), device.upper())
            served[device] = "reference"
    # Asked last: the question starts CUDA, after which a process must not fork.
    if wanted is None and served["cuda"] == "reference" and torch.cuda.is_available():
        warnings.warn(
            f"latentkv runs its slow reference on the GPU: {library_errors['cuda']}", RuntimeWarning, stacklevel=2
        )
    return served


served_by: dict[str, str] = _serve()  # device -> the provider of torch.ops.latentkv


def set_overlap(enabled: bool) -> None:
    """Switches programmatic dependent launch (sm_90 and later; on by default) of the native CUDA kernels."""
    library: Any = _libraries.get("cuda")
    if library is not None and not torch.version.hip:
        library.latentkv_set_overlap(ctypes.c_bool(enabled))

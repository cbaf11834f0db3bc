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
from collections.abc import Callable, Mapping, Sequence
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
        self._ops = {op: ops[op] for op in OP_NAMES}

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
        self._ops["rope_"](positions, q, k, cos_sin_cache, is_neox, inverse)

    def write_cache_(self, kv_c: Tensor, k_pe: Tensor, slot_mapping: Tensor, cache: MLACache) -> None:
        """Writes one row [kv_c | k_pe] per token into the paged cache.

        Row i goes to slot ``slot_mapping[i]``: block slot // bs, entry slot % bs. A negative slot is not written; nor
        is one past the end on a GPU, while the CPU raises. fp8 formats store convert(x / scale): fp32 division, clamp
        to the finite range, round to nearest even. Packed formats scale each tile of the latent vector by a power of
        two of their own and keep the key in bf16. Two rows with one slot: which of them stays is undefined.

        Args:
            kv_c: [N, L] latent vectors; bf16, fp16 or fp32: the cache's own dtype where that is one of them, bf16
                for packed formats.
            k_pe: [N, R] rope keys, already rotated, of kv_c's dtype; R may be 0.
            slot_mapping: [T] int64 or int32, T <= N; rows T..N-1 are padding and not read.
            cache: where the rows go.

        Raises:
            RuntimeError: an argument's device, dtype, shape or strides are off; nothing has been written then.
        """
        self._ops["write_cache_"](kv_c, k_pe, slot_mapping, *cache.op_arguments)

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
        self._ops["rope_write_cache_"](
            positions, q_pe, k_pe, kv_c, cos_sin_cache, slot_mapping, *cache.op_arguments, is_neox, rope_masked
        )

    def decode_prologue(
        self,
        q_nope: Tensor | None,
        q_pe: Tensor,
        kv_c: Tensor,
        k_pe: Tensor,
        positions: Tensor | None,
        cos_sin_cache: Tensor | None,
        slot_mapping: Tensor,
        cache: MLACache,
        *,
        is_neox: bool,
        q_out: Tensor | None = None,
        q_rope_out: Tensor | None = None,
        kv_c_out: Tensor | None = None,
        q_dtype: torch.dtype | None = None,
        q_scale: Tensor | None = None,
        kv_norm_weight: Tensor | None = None,
        kv_norm_eps: float = 1e-6,
        rope_masked: bool = True,
    ) -> Tensor:
        """All between the projections and attention in one launch: the query as attention reads it, and the cache row.

        Each head of ``q_out`` is [q_nope | rotated q_pe], copied or quantised to fp8: convert(x * (1 / q_scale)). The
        cache row is [RMSNorm(kv_c) | rotated k_pe], as :meth:`rope_write_cache_` writes it. Inputs do not change, and
        outputs must not overlap them, but for a ``kv_c_out`` that is kv_c itself.

        What becomes of a row depends on its slot. A valid one: all of the above. Negative: no cache row, and q_pe is
        rotated only if ``rope_masked``. Padding (rows T..N-1): its query is zeroed, nothing else. Slot or (if it is
        rotated) position outside: the same on a GPU; the CPU raises before anything is written, and so does a GPU under
        ``LATENTKV_CHECKS=1``.

        RMSNorm, fp32, every step rounded by itself: element i's square goes to partial (i // 8) % 32 in rising i, a
        halving tree adds up the 32, then (x * (1 / sqrt(sum / L + eps))) * weight is rounded to kv_c's dtype.

        Args:
            q_nope: [N, H, L] absorbed query, of q_pe's dtype; any strides with a contiguous last dimension, usually a
                transposed [H, N, L]. None where it already lies in q_out, in q_out's dtype.
            q_pe: [N, H, R] bf16, fp16 or fp32; R may be 0.
            kv_c: [N, L] of the same dtype; before the norm if there is a ``kv_norm_weight``.
            k_pe: [N, R] of the same dtype.
            positions: [N] int64 or int32; None, together with cos_sin_cache, for models without rotation.
            cos_sin_cache: [max_position, R] fp32, bf16 or fp16: cos half | sin half; or None.
            slot_mapping: [T] int64 or int32, T <= N.
            cache: where the rows go.
            is_neox: pairs are (i, i + R/2); otherwise (2i, 2i + 1), which is what DeepSeek uses.
            q_out: [N, H, L + R] of q_pe's dtype, float8_e4m3fn, float8_e4m3fnuz or float8_e5m2; [N, H, L] with
                ``q_rope_out``. None allocates it.
            q_rope_out: [N, H, R] of q_out's dtype, for the rope part, where attention reads it apart.
            kv_c_out: [N, L] of kv_c's dtype for the normalised vector, and it may be kv_c itself; only with
                ``kv_norm_weight``. Rows without a query (padding and outside) stay.
            q_dtype: of the q_out to allocate; None for q_pe's.
            q_scale: the dequantisation scale of an fp8 query, one fp32 element on the device, or None for 1.0; ignored
                by 16/32-bit queries.
            kv_norm_weight: [L] of kv_c's dtype or fp32; None writes kv_c as it is.
            kv_norm_eps: added to the mean of the squares.
            rope_masked: rotate masked rows too (context parallelism: the token lives on another rank, its query is
                needed here).

        Returns:
            q_out.

        Raises:
            ValueError: q_nope is None without a q_out, or q_out has another dtype than q_dtype.
            RuntimeError: an argument's device, dtype, shape or strides are off; nothing has been written then.
        """
        if q_out is None:
            if q_nope is None:
                raise ValueError("latentkv.decode_prologue: q_out: expected a tensor, as q_nope is None, got None")
            width = sum(kv_c.shape[-1:]) + (sum(q_pe.shape[-1:]) if q_rope_out is None else 0)
            q_out = q_pe.new_empty((*q_pe.shape[:-1], width), dtype=q_dtype)
        elif q_dtype not in (None, q_out.dtype):
            raise ValueError(
                f"latentkv.decode_prologue: q_out: expected dtype {q_dtype}, as q_dtype, got {q_out.dtype}"
            )
        self._ops["decode_prologue"](
            q_nope, q_pe, kv_c, k_pe, positions, cos_sin_cache, slot_mapping, *cache.op_arguments,
            q_out, q_rope_out, kv_c_out, q_scale, kv_norm_weight, is_neox, kv_norm_eps, rope_masked,
        )  # fmt: skip
        return q_out

    def write_cache_grouped_(
        self,
        kv_c: Tensor | Sequence[Tensor],
        k_pe: Tensor | Sequence[Tensor],
        slot_mapping: Tensor,
        caches: Sequence[MLACache],
    ) -> None:
        """:meth:`write_cache_` for G layers (or draft models) that share their slots, in one launch.

        Args:
            kv_c: G tensors [N, L], or one [G, N, L]; of one dtype, any strides with a contiguous last dimension.
            k_pe: G tensors [N, R], or one [G, N, R], of kv_c's dtype.
            slot_mapping: [T] int64 or int32, T <= N, for every layer.
            caches: G caches of one layout and as many blocks, each with its own memory and scale.

        Raises:
            ValueError: G is 0 or not the same for all, or the layouts differ.
            RuntimeError: an argument's device, dtype, shape or strides are off; nothing has been written then.
        """
        kv_c, k_pe = (list(x.unbind(0)) if isinstance(x, Tensor) else list(x) for x in (kv_c, k_pe))
        sizes = (len(kv_c), len(k_pe), len(caches))
        if min(sizes) < 1 or len(set(sizes)) > 1:
            raise ValueError(
                "latentkv.write_cache_grouped_: kv_c, k_pe, caches: expected equally many, at least 1, got "
                f"{', '.join(map(str, sizes))}"
            )
        for i, cache in enumerate(caches):
            if cache.layout != caches[0].layout:
                raise ValueError(
                    f"latentkv.write_cache_grouped_: caches[{i}]: expected the layout of caches[0], "
                    f"{caches[0].layout}, got {cache.layout}"
                )
        data, rope_data, scales, formats = zip(*(cache.op_arguments for cache in caches), strict=True)
        ropes = [t for t in rope_data if t is not None]
        self._ops["write_cache_grouped_"](kv_c, k_pe, slot_mapping, list(data), ropes, list(scales), formats[0])

    def write_indexer_cache_(
        self,
        k: Tensor,
        positions: Tensor | None,
        cos_sin_cache: Tensor | None,
        slot_mapping: Tensor,
        cache: Tensor,
        *,
        is_neox: bool,
        power_of_two_scale: bool = False,
    ) -> None:
        """Rotates, quantises and writes the keys of DeepSeek-V3.2's indexer, which picks the tokens to attend to.

        A key takes 132 bytes: 128 fp8_e4m3fn codes of x / scale and the fp32 scale, max(largest magnitude, 1e-4) / 448.
        In a block all codes come first, then all scales. k itself stays as it is. Rows are skipped, or raise, as in
        :meth:`write_cache_`; positions outside the table are treated as slots outside the cache.

        Args:
            k: [N, 128] bf16, fp16 or fp32; any strides with a contiguous last dimension.
            positions: [N] int64 or int32; None, together with cos_sin_cache, for keys that are rotated already.
            cos_sin_cache: [max_position, R] fp32, bf16 or fp16, R even and at most 128: the first R elements of a key
                are rotated, and rounded to k's dtype. Or None.
            slot_mapping: [T] int64 or int32, T <= N. A negative slot is not written.
            cache: [B, bs, 132] or [B, 1, bs, 132] uint8, entries 132 bytes apart; blocks may be padded, all start at a
                multiple of 4 bytes.
            is_neox: pairs are (i, i + R/2); otherwise (2i, 2i + 1).
            power_of_two_scale: raise every scale to the next power of two.

        Raises:
            RuntimeError: an argument's device, dtype, shape or strides are off; nothing has been written then.
        """
        self._ops["write_indexer_cache_"](k, positions, cos_sin_cache, slot_mapping, cache, is_neox, power_of_two_scale)


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

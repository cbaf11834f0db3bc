"""What users call: the ops on caches and tensors, as the methods of a provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache.layouts import FORMATS, MLACache
from .checks import check_types, fail, text_of
from .description import OPS
from .schemas import fake_of
from .warmup import warming_up

Op = Callable[..., Any]


class Provider:
    """The ops of the library on one implementation. The public functions are the methods of one of these."""

    def __init__(self, name: str, ops: Mapping[str, Op], serving: Mapping[tuple[str, str], str] | None = None) -> None:
        """``serving``: the provider of each op on each type of device, where there are several."""
        self.name = name
        self._ops = ops
        self._serving = serving or {}

    def __repr__(self) -> str:
        return f"<latentkv provider {self.name}>"

    def has(self, op: str) -> bool:
        """Whether it implements the op."""
        return op in self._ops

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
        if is_neox is not True and is_neox is not False:  # torch would take None for False
            fail("rope_", "is_neox", "True or False", text_of(is_neox))
        self._call("rope_", positions, q, k, cos_sin_cache, is_neox, inverse)

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
        stored, sizes = _cache_of("write_cache_", "cache", cache)
        self._call("write_cache_", kv_c, k_pe, slot_mapping, *stored, *sizes)

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
        if is_neox is not True and is_neox is not False:  # torch would take None for False
            fail("rope_write_cache_", "is_neox", "True or False", text_of(is_neox))
        stored, sizes = _cache_of("rope_write_cache_", "cache", cache)
        self._call(
            "rope_write_cache_", positions, q_pe, k_pe, kv_c, cos_sin_cache, slot_mapping, *stored, is_neox,
            rope_masked, *sizes,
        )  # fmt: skip

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
            RuntimeError: an argument's device, dtype, shape or strides are off; nothing has been written then.
        """
        if is_neox is not True and is_neox is not False:  # torch would take None for False
            fail("decode_prologue", "is_neox", "True or False", text_of(is_neox))
        stored, sizes = _cache_of("decode_prologue", "cache", cache)
        if q_out is None:
            if q_nope is None:
                fail("decode_prologue", "q_out", "a tensor, as q_nope is None", "None")
            if not isinstance(q_pe, Tensor):
                fail("decode_prologue", "q_pe", "a tensor", text_of(q_pe))
            width = sum(sizes) if q_rope_out is None else sizes[0]
            q_out = q_pe.new_empty((*q_pe.shape[:-1], width), dtype=q_dtype)
        elif isinstance(q_out, Tensor) and q_dtype not in (None, q_out.dtype):
            fail("decode_prologue", "q_out", f"dtype {q_dtype}, as q_dtype", q_out.dtype)
        self._call(
            "decode_prologue", q_nope, q_pe, kv_c, k_pe, positions, cos_sin_cache, slot_mapping, *stored, q_out,
            q_rope_out, kv_c_out, q_scale, kv_norm_weight, is_neox, kv_norm_eps, rope_masked, *sizes,
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
            RuntimeError: an argument's device, dtype, shape or strides are off; nothing has been written then.
        """
        kv_c, k_pe = (list(x.unbind(0)) if isinstance(x, Tensor) else list(x) for x in (kv_c, k_pe))
        counts = (len(kv_c), len(k_pe), len(caches))
        if min(counts) < 1 or len(set(counts)) > 1:
            expected = "equally many, at least 1"
            fail("write_cache_grouped_", "kv_c, k_pe, caches", expected, ", ".join(map(str, counts)))
        taken = [_cache_of("write_cache_grouped_", f"caches[{i}]", cache) for i, cache in enumerate(caches)]
        for i, cache in enumerate(caches):
            if cache.layout != caches[0].layout:
                expected = f"the layout of caches[0], {caches[0].layout}"
                fail("write_cache_grouped_", f"caches[{i}]", expected, cache.layout)
        data, rope_data, scales, formats = zip(*(stored for stored, _ in taken), strict=True)
        ropes = [t for t in rope_data if t is not None]
        self._call(
            "write_cache_grouped_", kv_c, k_pe, slot_mapping, list(data), ropes, list(scales), formats[0], *taken[0][1]
        )

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
        if is_neox is not True and is_neox is not False:  # torch would take None for False
            fail("write_indexer_cache_", "is_neox", "True or False", text_of(is_neox))
        self._call(
            "write_indexer_cache_", k, positions, cos_sin_cache, slot_mapping, cache, is_neox, power_of_two_scale
        )

    def gather_cache(
        self,
        cache: MLACache,
        block_table: Tensor,
        cu_seq_lens: Tensor,
        *,
        total: int | None = None,
        out: Tensor | None = None,
        seq_starts: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The rows of many sequences, out of the paged cache into one contiguous tensor: chunked prefill, prefix reuse.

        Row t of ``out`` is token ``seq_starts[s] + t - cu_seq_lens[s]`` of the sequence s whose range
        ``cu_seq_lens[s] .. cu_seq_lens[s + 1]`` holds t. Elements of ``out``'s dtype are copied verbatim; all others
        become fp32 (fp8 times its scale, one rounding), then ``out``'s dtype, rounded to nearest even. Rows from
        ``cu_seq_lens[S]`` on stay as they are. A row without a block in the table, or with one outside the cache, is
        zeroed on a GPU; the CPU raises before anything is written, and so does a GPU under ``LATENTKV_CHECKS=1``.

        Args:
            cache: of any layout.
            block_table: [S, max_blocks] int64 or int32: the blocks of each sequence in order. Entries that no row needs
                may hold anything.
            cu_seq_lens: [S + 1] int64 or int32: where each sequence's rows begin in ``out``, from 0 on, rising.
            total: rows of the ``out`` to allocate: at least cu_seq_lens[S], which this op does not read back.
            out: [total, L + R] bf16, fp16 or fp32; any stride between rows. None allocates it.
            seq_starts: [S] int64 or int32: the first token of each sequence to take; None for 0.
            dtype: of the ``out`` to allocate; None for the cache's own, bf16 for fp8 and packed formats.

        Returns:
            out.

        Raises:
            RuntimeError: both or neither of ``total`` and ``out`` are given, or an argument's device, dtype, shape or
                strides are off; nothing has been written then.
        """
        stored, (latent_dim, rope_dim) = _cache_of("gather_cache", "cache", cache)
        if (out is None) == (total is None):
            fail("gather_cache", "out, total", "one of them", "neither" if out is None else "both")
        if out is None:
            packs = FORMATS[cache.layout.format].quantised or cache.layout.packed is not None
            kind = dtype or (torch.bfloat16 if packs else cache.layout.dtype)
            out = torch.empty((total or 0, latent_dim + rope_dim), dtype=kind, device=cache.device)
        elif isinstance(out, Tensor) and dtype not in (None, out.dtype):
            fail("gather_cache", "out", f"dtype {dtype}, as dtype", out.dtype)
        self._call("gather_cache", *stored, block_table, cu_seq_lens, out, latent_dim, seq_starts, rope_dim)
        return out

    def convert_cache_(
        self,
        src: MLACache,
        dst: MLACache,
        *,
        src_blocks: Tensor | None = None,
        dst_blocks: Tensor | None = None,
    ) -> None:
        """Rows from one cache into another of any other layout: format, placement, block size, order of blocks.

        Token i of a run lies in block ``src_blocks[i // bs]``, entry i % bs, with the block size of src, and goes to
        where the same rule puts it in dst. With 2-D block tables there are S runs (sequences), each filled up with
        negative block numbers; a token whose block is negative on either side is left out. So is one whose block number
        is past the end, on a GPU; the CPU raises before anything is written, and so does a GPU under
        ``LATENTKV_CHECKS=1``.

        Elements that are stored alike on both sides (the same dtype; the same fp8 kind and an equal scale; the same
        packed format) are copied verbatim. All others become fp32 (fp8 times its scale, one rounding), and are then
        stored as :meth:`write_cache_` would: rounded to 16 bits, or convert(x / dst.scale) for fp8, or in tiles with
        scales of their own. fp8_e4m3fnuz and fp8_e4m3fn give one byte values that differ by a factor of two: with
        ``dst.scale`` half of ``src.scale`` (or twice, the other way) bytes stay what they are, but for three each way:
        FNUZ's 0x7F and 0xFF (+-240) become 0x7E and 0xFE (the largest of FN), its NaN 0x80 becomes 0x7F; FN's -0 (0x80)
        becomes 0, and its NaNs 0x7F and 0xFF become 0x80.

        Args:
            src: where rows come from.
            dst: where they go, with the scale that it is to have; the same L, R and device. Of a row that is read and
                written in one call the outcome is undefined.
            src_blocks: [n] or [S, n] int64 or int32; None for all blocks in order.
            dst_blocks: [m] or [S, m], for as many tokens: some number of tokens must fill n blocks of src's size and m
                of dst's. None for all blocks in order.

        Raises:
            RuntimeError: the dimensions of src and dst differ, or an argument's device, dtype, shape or strides are
                off; nothing has been written then.
        """
        (stored, sizes), (dst_stored, dst_sizes) = (
            _cache_of("convert_cache_", name, cache) for name, cache in (("src", src), ("dst", dst))
        )
        if sizes != dst_sizes:
            fail("convert_cache_", "dst", f"(L, R)={sizes}, as src has", dst_sizes)
        self._call("convert_cache_", *stored, *dst_stored, *sizes, src_blocks, dst_blocks)

    def mla_decode(
        self,
        q: Tensor,
        cache: MLACache,
        block_table: Tensor,
        seq_lens: Tensor,
        *,
        sm_scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Decode attention over the paged latent cache: one query per sequence, every head on the same rows.

        out = softmax(sm_scale * q @ [latent | rope]^T) @ latent, and lse the logarithm of the sum of exponentials, by
        which partial results merge (FlashAttention, arXiv:2205.14135; MLA's absorbed form, arXiv:2405.04434). Sums are
        fp32. A sequence of length 0 has out 0 and lse -inf. Tokens whose block is missing from the table or lies
        outside the cache are left out on a GPU; the CPU raises.

        Args:
            q: [B, H, L + R] bf16, fp16 or fp32; any strides with a contiguous last dimension.
            cache: of a format that is not packed; fp8 rows are worth their code times the scale.
            block_table: [B, max_blocks] int64 or int32. Entries that no token needs may hold anything.
            seq_lens: [B] int64 or int32: the tokens of each sequence.
            sm_scale: the factor of the scores, usually 1 / sqrt(P + R), times YaRN's mscale squared.

        Returns:
            out [B, H, L] of q's dtype, and lse [B, H] fp32, natural logarithm.

        Raises:
            RuntimeError: an argument's device, dtype, shape or strides are off, or the provider is ``native``.
        """
        stored, (latent_dim, rope_dim) = _cache_of("mla_decode", "cache", cache)
        result: tuple[Tensor, Tensor] = self._call(
            "mla_decode", q, *stored, block_table, seq_lens, latent_dim, sm_scale, rope_dim
        )
        return result

    def _op(self, name: str) -> Op:
        """The op on the arguments of its torch schema."""
        if name not in self._ops:
            others = "triton or reference" if name == "mla_decode" else "another provider"
            fail(name, "provider", others, self.name)
        return self._ops[name]

    def _compiles(self, name: str, args: Sequence[Any]) -> bool:
        """Whether a call of an op compiles kernels."""
        flat = (t for value in args for t in (value if isinstance(value, list) else [value]))
        device = next((t.device.type for t in flat if isinstance(t, Tensor)), "")
        return self._serving.get((name, device), self.name) == "triton"

    def _call(self, name: str, *args: Any) -> Any:
        op = self._ops.get(name) or self._op(name)
        try:
            if warming_up() and not self._compiles(name, args):
                return fake_of(OPS[name])(*args)
            return op(*args)
        except (RuntimeError, TypeError) as error:
            if not str(error).startswith("latentkv."):
                _explain(name, args, self.name, error)
            raise


def _cache_of(
    op: str, name: str, cache: MLACache
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None, str], tuple[int, int]]:
    """What the torch op takes of a cache: its tensors, scale and format, then L and R."""
    if not isinstance(cache, MLACache):
        expected = "an MLACache: CacheLayout.allocate makes one, MLACache.wrap takes a tensor of yours"
        fail(op, name, expected, text_of(cache))
    return cache.op_arguments, cache.op_sizes


def _explain(op: str, args: Sequence[Any], provider: str, error: Exception) -> None:
    """Raises what torch said about a call in the words of this library, if it is one of the usual mistakes."""
    check_types(OPS[op], args)
    if isinstance(error, NotImplementedError):
        devices = {value.device.type for value in args if isinstance(value, Tensor)}
        from ..providers import library_errors  # which imports this module

        why = "; ".join(f"{device}: {library_errors[device]}" for device in sorted(devices & library_errors.keys()))
        fail(op, "provider", f"one that runs on {' and '.join(sorted(devices))}", f"{provider} ({why or 'no kernel'})")

"""How the rows of an MLA cache lie in memory: formats, layouts and the cache handle.

Shapes use the words of the library: L = ``kv_lora_rank``, R = ``rope_dim``, B = blocks, bs = block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch

from .geometry import overlaps_itself
from .platform import Platform

__all__ = [
    "FORMATS", "CacheLayout", "Format", "FormatName", "MLACache", "Packed", "Placement", "resolve_format",
]  # fmt: skip

Placement = Literal["concat", "split"]
FormatName = Literal[
    "bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_ds_mla", "fp8_model1", "fp8"
]  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A row of bytes that brings its own scales: the latent vector as fp8_e4m3fn, the rope key as bf16.

    Attributes:
        dims: the only (kv_lora_rank, rope_dim).
        tile: neighbouring latent elements that share one scale.
        row_bytes: what a token takes, its scales included.
        block_multiple: a block is padded to a multiple of so many bytes where its scales lie after its rows, all
            together, so that it must be one run of bytes; None where each row holds its own.
    """

    dims: tuple[int, int]
    tile: int
    row_bytes: int
    block_multiple: int | None = None


@dataclass(frozen=True)
class Format:
    """How one row is stored.

    ``dtype`` is torch's own type for its elements; a quantised format may also be backed by ``torch.uint8``. ``max`` is
    the largest finite value of a quantised format and ``nan`` the byte that every NaN becomes. A ``packed`` format
    mixes element types. With neither, activations are copied verbatim.
    """

    name: str
    dtype: torch.dtype
    max: float | None = None
    nan: int | None = None
    packed: Packed | None = None

    @property
    def quantised(self) -> bool:
        """Whether values are divided by the cache's scale and rounded."""
        return self.max is not None

    @property
    def activation(self) -> torch.dtype | None:
        """The only dtype of activations that the format takes; None where it takes every one."""
        return None if self.quantised else torch.bfloat16 if self.packed else self.dtype

    @property
    def storage_dtypes(self) -> tuple[torch.dtype, ...]:
        """The tensor dtypes that may hold this format."""
        return (self.dtype, torch.uint8) if self.quantised else (self.dtype,)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("bf16", torch.bfloat16),
        Format("fp16", torch.float16),
        Format("fp32", torch.float32),
        Format("fp8_e4m3fn", torch.float8_e4m3fn, max=448.0, nan=0x7F),
        Format("fp8_e4m3fnuz", torch.float8_e4m3fnuz, max=240.0, nan=0x80),
        Format("fp8_e5m2", torch.float8_e5m2, max=57344.0, nan=0x7F),
        # Of a row: 512 latent codes, 4 fp32 scales, 64 bf16.
        Format("fp8_ds_mla", torch.uint8, packed=Packed((512, 64), tile=128, row_bytes=656)),
        # Of a block: its rows of 448 latent codes and 64 bf16, then for each row 7 exponents of scales and a zero byte.
        Format("fp8_model1", torch.uint8, packed=Packed((448, 64), tile=64, row_bytes=584, block_multiple=576)),
    )
}


def resolve_format(format: str, platform: Platform | None = None) -> FormatName:
    """The format a user's word means: ``"fp8"`` is the e4m3 kind of ``platform`` (None: of this machine).

    Raises:
        ValueError: ``format`` is not a known name.
    """
    if format == "fp8":
        return (platform or Platform.detect()).fp8_format
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)} or fp8, got {format!r}")
    return cast(FormatName, format)


@dataclass(frozen=True)
class CacheLayout:
    """How one attention backend wants the cache: row size, block size, element format and placement.

    Args:
        kv_lora_rank: L, elements of the latent vector, at least 1.
        rope_dim: R, elements of the shared rope key; even, 0 for models without one.
        block_size: rows (tokens) in a block, at least 1.
        format: a key of :data:`FORMATS`, or ``"fp8"`` for this machine's e4m3 kind. A packed one fixes kv_lora_rank,
            rope_dim and placement (concat).
        placement: ``"concat"`` keeps latent and rope in one row of L + R elements; ``"split"`` in two tensors.

    Raises:
        ValueError: a field is out of range or unknown, or the format does not go with it.
    """

    kv_lora_rank: int = 512
    rope_dim: int = 64
    block_size: int = 64
    format: FormatName = "bf16"
    placement: Placement = "concat"

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", resolve_format(self.format))
        if self.kv_lora_rank < 1:
            raise ValueError(f"kv_lora_rank: expected at least 1, got {self.kv_lora_rank}")
        if self.rope_dim < 0 or self.rope_dim % 2:
            raise ValueError(f"rope_dim: expected an even number, at least 0, got {self.rope_dim}")
        if self.block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {self.block_size}")
        if self.placement not in get_args(Placement):
            raise ValueError(f"placement: expected one of {get_args(Placement)}, got {self.placement!r}")
        if self.packed is not None:
            dims = (self.kv_lora_rank, self.rope_dim)
            if dims != self.packed.dims:
                expected = f"{self.packed.dims} for format {self.format}"
                raise ValueError(f"(kv_lora_rank, rope_dim): expected {expected}, got {dims}")
            if self.placement != "concat":
                raise ValueError(f"placement: expected concat for format {self.format}, got {self.placement}")

    @property
    def packed(self) -> Packed | None:
        """The measures of a packed format; None where the format is another."""
        return FORMATS[self.format].packed

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors that :meth:`allocate` makes."""
        return FORMATS[self.format].dtype

    @property
    def block_bytes(self) -> int:
        """Bytes from one block to the next as :meth:`allocate` lays them, both parts together: a packed format pads."""
        multiple = self.packed.block_multiple if self.packed and self.packed.block_multiple else 1
        return -(-self.block_size * self.row_bytes // multiple) * multiple

    @property
    def row_bytes(self) -> int:
        """Bytes that one token takes, both parts and the scales of a packed format together."""
        if self.packed is not None:
            return self.packed.row_bytes
        return (self.kv_lora_rank + self.rope_dim) * self.dtype.itemsize

    def shapes(self, num_blocks: int) -> tuple[tuple[int, int, int], ...]:
        """The shape of each tensor of a cache of ``num_blocks`` blocks: one for concat, two for split.

        Blocks of fp8_model1 lie :attr:`block_bytes` apart, which is more than their rows take.
        """
        widths: tuple[int, ...] = (self.kv_lora_rank, self.rope_dim)
        if self.placement == "concat":
            widths = (self.row_bytes // self.dtype.itemsize,)
        return tuple((num_blocks, self.block_size, w) for w in widths)

    def allocate(
        self, num_blocks: int, device: torch.device | str, scale: float | torch.Tensor | None = None
    ) -> MLACache:
        """A zeroed cache of ``num_blocks`` blocks on ``device``.

        ``scale`` is the dequantisation scale of a quantised format (stored = convert(x / scale)): a float, one fp32
        element on ``device``, or None for 1.0. Blocks of fp8_model1 lie a multiple of 576 bytes apart.
        """
        tensors = []
        for shape in self.shapes(num_blocks):
            block = shape[1] * shape[2]
            padded = self.block_bytes if self.packed else block
            storage = torch.zeros((num_blocks, padded), dtype=self.dtype, device=device)
            tensors.append(storage[:, :block].view(shape))
        return MLACache.wrap(tensors, self, scale)


@dataclass(frozen=True, eq=False, repr=False)
class MLACache:
    """A paged latent cache: its tensors, their layout and the dequantisation scale. It owns no memory of its own.

    Make one with :meth:`CacheLayout.allocate`, or around an engine's storage with :meth:`wrap`.

    Attributes:
        data: [B, bs, >= L + R] (concat), the latent tensor [B, bs, >= L] (split), or the bytes [B, bs, >= row_bytes]
            of a packed format.
        rope_data: the rope tensor [B, bs, >= R] of a split cache, else None.
        layout: how to read them.
        scale: one fp32 element on the same device, or None for 1.0; ignored by 16/32-bit and packed formats.
        op_arguments: what the torch ops take of a cache: cache, rope_cache, scale (None where unused) and format.
        op_sizes: and its L and R.
    """

    data: torch.Tensor
    rope_data: torch.Tensor | None
    layout: CacheLayout
    scale: torch.Tensor | None = None
    op_arguments: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, str] = field(init=False, repr=False)
    op_sizes: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scale = self.scale if FORMATS[self.layout.format].quantised else None
        object.__setattr__(self, "op_arguments", (self.data, self.rope_data, scale, self.layout.format))
        object.__setattr__(self, "op_sizes", (self.layout.kv_lora_rank, self.layout.rope_dim))

    @classmethod
    def wrap(
        cls,
        tensors: torch.Tensor | Sequence[torch.Tensor],
        layout: CacheLayout,
        scale: float | torch.Tensor | None = None,
    ) -> MLACache:
        """Wraps an engine's own storage without copying.

        Args:
            tensors: one tensor (concat) or a (latent, rope) pair (split), each [B, bs, C] or [B, 1, bs, C]. C may be
                wider than the row, blocks may be padded and views may start anywhere in their storage.
            layout: the meaning of the bytes. A quantised format may come in its own dtype or as ``torch.uint8``.
            scale: a float, one fp32 element on the same device, or None for 1.0.

        Raises:
            ValueError: a tensor's rank, shape, dtype or device, the distance of fp8_model1's entries and blocks, or the
                scale, contradicts the layout; or rows overlap in memory.
        """
        parts = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        shapes = layout.shapes(parts[0].shape[0] if parts else 0)
        if len(parts) != len(shapes):
            raise ValueError(f"tensors: expected {len(shapes)} for placement {layout.placement!r}, got {len(parts)}")
        views = []
        for i, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            view = part.squeeze(1) if part.dim() == 4 and part.shape[1] == 1 else part
            if view.dim() != 3 or view.shape[:2] != shape[:2] or view.shape[2] < shape[2]:
                raise ValueError(f"tensors[{i}]: expected shape {list(shape)}, got {list(part.shape)}")
            allowed = FORMATS[layout.format].storage_dtypes
            if part.dtype not in allowed:
                names = " or ".join(str(d) for d in allowed)
                raise ValueError(f"tensors[{i}]: expected dtype {names} for format {layout.format}, got {part.dtype}")
            if part.device != parts[0].device:
                raise ValueError(f"tensors[{i}]: expected device {parts[0].device}, got {part.device}")
            packed = layout.packed
            if packed and packed.block_multiple and view.shape[1] > 1 and view.stride(1) != packed.row_bytes:
                expected = f"entries {packed.row_bytes} bytes apart, as scales lie after a block's rows"
                raise ValueError(f"tensors[{i}]: expected {expected}, got {view.stride(1)}")
            if packed and packed.block_multiple and view.shape[0] > 1 and view.stride(0) % packed.block_multiple:
                expected = f"blocks a multiple of {packed.block_multiple} bytes apart, as readers find them"
                raise ValueError(f"tensors[{i}]: expected {expected}, got {view.stride(0)}")
            if overlaps_itself(view.shape, view.stride()):
                strides = f"strides {list(part.stride())} for shape {list(part.shape)}"
                raise ValueError(f"tensors[{i}]: expected rows that do not overlap in memory, got {strides}")
            views.append(view)
        if isinstance(scale, float | int):
            scale = torch.tensor([scale], dtype=torch.float32, device=parts[0].device)
        if scale is not None and (
            scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != parts[0].device
        ):
            raise ValueError(
                f"scale: expected one float32 element on {parts[0].device}, "
                f"got {scale.dtype} {list(scale.shape)} on {scale.device}"
            )
        return cls(views[0], views[1] if len(views) == 2 else None, layout, scale)

    def __repr__(self) -> str:
        """One line, without the numbers in it."""
        shapes = " + ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in self.tensors)
        scale = "" if self.scale is None else ", scaled"
        return f"<MLACache {self.layout.format} {self.layout.placement}: {shapes} on {self.device}{scale}>"

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The cache's tensors: one for concat, (latent, rope) for split."""
        return (self.data,) if self.rope_data is None else (self.data, self.rope_data)

    @property
    def latent(self) -> torch.Tensor | None:
        """The latent part of every row, a view [B, bs, L]; None for a packed format."""
        return None if self.layout.packed else self.data[..., : self.layout.kv_lora_rank]

    @property
    def rope(self) -> torch.Tensor | None:
        """The rope part of every row, a view [B, bs, R]; None for a packed format."""
        if self.layout.packed:
            return None
        if self.rope_data is not None:
            return self.rope_data[..., : self.layout.rope_dim]
        start = self.layout.kv_lora_rank
        return self.data[..., start : start + self.layout.rope_dim]

    @property
    def pages_of_one(self) -> torch.Tensor:
        """Every row as a page of its own, a view [B * bs, 1, 1, L + R] in which slot s is page s: what AITER reads.

        Its dtype is the format's own, also where ``torch.uint8`` holds the cache: AITER goes by the dtype.

        Raises:
            ValueError: the format is packed, the placement is split, or blocks are padded, so that the rows are not
                evenly spaced.
        """
        if self.layout.packed:
            raise ValueError(
                f"MLACache.pages_of_one: format: expected one that is not packed, got {self.layout.format}"
            )
        if self.rope_data is not None:
            raise ValueError("MLACache.pages_of_one: placement: expected concat, got split")
        blocks, block_size, _ = self.data.shape
        block_stride, row_stride, _ = self.data.stride()
        if blocks > 1 and block_size > 1 and block_stride != block_size * row_stride:
            raise ValueError(
                f"MLACache.pages_of_one: data: expected blocks without padding, {block_size * row_stride} elements "
                f"from one to the next, got {block_stride}"
            )
        width = self.layout.kv_lora_rank + self.layout.rope_dim
        return self.data[..., :width].view(self.layout.dtype).view(self.num_slots, 1, 1, width)

    @property
    def num_blocks(self) -> int:
        """B, the number of blocks."""
        return self.data.shape[0]

    @property
    def num_slots(self) -> int:
        """The rows that fit: B * bs. Valid slots are 0 .. num_slots - 1."""
        return self.data.shape[0] * self.data.shape[1]

    @property
    def device(self) -> torch.device:
        """The device that holds the rows."""
        return self.data.device

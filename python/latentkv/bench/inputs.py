"""What a timed call works on: tensors that lie in memory as an engine has them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layouts import FORMATS, CacheLayout, MLACache
from ..models import Model
from ..rope_table import build_cos_sin_cache


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call, lying in memory as an engine has them.

    Attributes:
        positions: [T], or None where the model does not rotate.
        q: [T, H, P + R]; the op sees the strided view ``q_pe``.
        kv: [T, L + R], the projection whose last part is ``k_pe``.
        kv_c: [T, L], normalised, hence a tensor of its own.
        slots: [T].
        table: [max_position, R], or None.
        cache: where the rows go.
        is_neox: how pairs lie.
    """

    positions: Tensor | None
    q: Tensor
    kv: Tensor
    kv_c: Tensor
    slots: Tensor
    table: Tensor | None
    cache: MLACache
    is_neox: bool

    @classmethod
    def random(
        cls,
        model: Model,
        heads: int,
        positions: Tensor,
        slots: Tensor,
        table: Tensor | None,
        cache: MLACache,
        generator: torch.Generator,
    ) -> Inputs:
        """Normally distributed activations of the model, on the generator's device."""
        tokens, rank, rope = len(slots), model.kv_lora_rank, model.rope_dim
        device, dtype = generator.device, activation_dtype(cache.layout)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        q, kv = normal(tokens, heads, model.nope_dim + rope), normal(tokens, rank + rope)
        rotated = None if table is None else positions
        return cls(rotated, q, kv, kv[:, :rank].contiguous(), slots, table, cache, model.is_neox)

    def to(self, device: torch.device, table: Tensor | None, cache: MLACache) -> Inputs:
        """A copy of the activations and indices on ``device``, with the ``table`` and ``cache`` there."""
        copies = {name: getattr(self, name).to(device, copy=True) for name in ("q", "kv", "kv_c", "slots")}
        positions = None if self.positions is None else self.positions.to(device)
        return replace(self, positions=positions, table=table, cache=cache, **copies)

    @property
    def q_pe(self) -> Tensor:
        """[T, H, R], strided."""
        return self.q[..., self.q.shape[-1] - self.k_pe.shape[-1] :]

    @property
    def k_pe(self) -> Tensor:
        """[T, R], strided."""
        return self.kv[:, self.kv_c.shape[-1] :]

    @property
    def written(self) -> dict[str, Tensor]:
        """Every tensor that an op may write, whole, by name."""
        return {"q": self.q, "k": self.kv} | {f"cache[{i}]": t for i, t in enumerate(self.cache.tensors)}


def activation_dtype(layout: CacheLayout) -> torch.dtype:
    """The dtype of activations for a cache: its own, bf16 where it quantises."""
    return torch.bfloat16 if FORMATS[layout.format].quantised else layout.dtype


def rope_table(model: Model, layout: CacheLayout, device: torch.device) -> Tensor | None:
    """The model's cos/sin table in the activation dtype; None where it does not rotate."""
    if model.rope is None:
        return None
    return build_cos_sin_cache(**model.rope, device=device, dtype=activation_dtype(layout))


def bytes_moved(op: str, heads: int, tokens: int, layout: CacheLayout, rotates: bool = True) -> int:
    """What one call must read and write: each byte that it needs or changes, once."""
    size, index = activation_dtype(layout).itemsize, torch.int64.itemsize
    rope, rank = layout.rope_dim, layout.kv_lora_rank
    total = 0
    if op != "write_cache_" and rotates:  # q and k in and out, their row of the table, the position
        total += 2 * (heads + 1) * rope * size + rope * size + index
    if op != "rope_":  # the latent, the row, the slot, and the key unless it is here already
        total += rank * size + layout.row_bytes + index + (0 if total else rope * size)
    return tokens * total

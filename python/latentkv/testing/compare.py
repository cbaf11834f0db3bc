"""Byte comparison that names the first difference, and poison to find what was touched."""

from __future__ import annotations

import torch
from torch import Tensor

POISON = 0xA5  # as bf16, fp16, fp32 and every fp8 kind this is an odd small number


def poisoned(num_bytes: int, device: torch.device | str) -> Tensor:
    """A uint8 buffer of ``num_bytes`` in which every byte is :data:`POISON`."""
    return torch.full((num_bytes,), POISON, dtype=torch.uint8, device=device)


def _bytes(t: Tensor) -> Tensor:
    # A copy, as a dimension of one element may have any stride, and a view as bytes takes none but 1.
    return t.unsqueeze(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def first_difference(actual: Tensor, expected: Tensor, *, any_nan: bool = False) -> str | None:
    """None where both tensors hold the same bytes, else a line with the first coordinate that differs.

    ``any_nan`` lets every NaN equal every other: arithmetic in 16 or 32 bits only has to make *a* NaN.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype}{list(actual.shape)} against {expected.dtype}{list(expected.shape)}"
    if actual.numel() == 0:
        return None
    a, b = _bytes(actual), _bytes(expected).to(actual.device)
    wrong = (a != b).any(-1)
    if any_nan:
        wrong &= ~(actual.isnan() & expected.to(actual.device).isnan())
    if not wrong.any():
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    got, want = (bytes(x[at].tolist())[::-1].hex() for x in (a, b))
    return f"{int(wrong.sum())} of {wrong.numel()} elements differ; first at {at}: 0x{got}, expected 0x{want}"


def assert_same_bytes(actual: Tensor, expected: Tensor, *, any_nan: bool = False) -> None:
    """Raises AssertionError at the first difference; see :func:`first_difference`."""
    difference = first_difference(actual, expected, any_nan=any_nan)
    if difference is not None:
        raise AssertionError(difference)

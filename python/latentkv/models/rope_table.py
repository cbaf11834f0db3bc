"""The cos/sin table that the rotating ops read, from a model's configuration: base RoPE and YaRN.

R is ``qk_rope_head_dim``. The formulas are those of Hugging Face transformers (``modeling_rope_utils``) and
of the YaRN paper (arXiv:2309.00071), with DeepSeek's attention factor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["build_cos_sin_cache"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROPE_TYPES = ("default", "yarn", "deepseek_yarn")
_SECTIONS = ("rope_parameters", "rope_scaling")
_SHARED = ("rope_theta", "original_max_position_embeddings")  # may stand beside the section or inside it
_KEYS = ("qk_rope_head_dim", "max_position_embeddings", *_SHARED, *_SECTIONS)
_CHUNK = 1 << 16  # rows computed at a time, which bounds the fp32 temporaries


def build_cos_sin_cache(
    config: Mapping[str, Any] | str | os.PathLike[str] | object | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> torch.Tensor:
    """The ``cos_sin_cache`` [max_position, R] of a model: cos half | sin half, attention factor included.

    Angles are fp32(position) * fp32(inverse frequency); their cosine and sine are taken and scaled in fp32
    and rounded once to ``dtype``: bit for bit what transformers computes on the CPU. The work is always done
    there and the result moved, so the table does not depend on the device.

    YaRN needs ``factor`` and ``original_max_position_embeddings``; ``beta_fast`` (32), ``beta_slow`` (1) and
    ``truncate`` (True) have defaults. cos and sin are scaled by ``attention_factor`` if given, else by
    yarn(factor, mscale) / yarn(factor, mscale_all_dim), or yarn(factor, 1) if one of the two is missing or 0;
    yarn(s, m) is 0.1 * m * ln(s) + 1 for s > 1, else 1.

    Rows: a keyword ``max_position_embeddings`` is taken as it is. Otherwise the table covers all that the
    model can reach: the configuration's ``max_position_embeddings`` or YaRN's factor *
    ``original_max_position_embeddings``, whichever is more (some declare only the length before scaling).

    Args:
        config: a Hugging Face configuration (its ``text_config`` if multimodal): a dict, an object with
            ``to_dict()`` or attributes, the path of a ``config.json`` or of its folder. None: keywords only.
        device: where the table shall lie.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        **kwargs: ``qk_rope_head_dim`` (R), ``max_position_embeddings``, ``rope_theta`` and the dict
            ``rope_parameters``, or ``rope_scaling`` in the old spelling, with its type under ``rope_type`` or
            ``type``. They override ``config`` entry by entry, inside the dict too:
            ``rope_parameters={"rope_type": "default"}`` turns YaRN off.

    Raises:
        ValueError: a file cannot be read; an entry is missing, unknown or out of range; R is odd; the rope
            type is neither ``default`` nor YaRN; ``dtype`` is none of the three.
    """
    if dtype not in _DTYPES:
        raise _error("dtype", f"one of {', '.join(map(str, _DTYPES))}", dtype)
    if unknown := sorted(kwargs.keys() - set(_KEYS)):
        raise _error("keywords", f"some of {', '.join(_KEYS)}", ", ".join(unknown))
    values = _read(config)
    rope = _rope_section(values) | _rope_section(kwargs)
    values |= (overrides := {key: value for key, value in kwargs.items() if value is not None})

    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise _error("rope_type", f"one of {', '.join(_ROPE_TYPES)}", repr(rope_type))
    dim = _integer(values, "qk_rope_head_dim", even=True)
    theta = _number(rope, "rope_theta", above=1.0)
    periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if rope_type == "default":
        inv_freq, scale, reach = 1.0 / periods, 1.0, 0
    else:
        inv_freq, scale, reach = _yarn(rope, periods, theta)
    rows = _integer(values, "max_position_embeddings", default=reach or None)
    if "max_position_embeddings" not in overrides:
        rows = max(rows, reach)

    table = torch.empty(rows, dim, dtype=dtype, device="cpu")
    for first in range(0, rows, _CHUNK):
        chunk = table[first : first + _CHUNK]
        positions = torch.arange(first, first + len(chunk), device="cpu").float()
        angles = positions[:, None] * inv_freq
        chunk[:, : dim // 2] = angles.cos().mul_(scale)
        chunk[:, dim // 2 :] = angles.sin_().mul_(scale)
    return table.to(device)


def _yarn(rope: Mapping[str, Any], periods: torch.Tensor, theta: float) -> tuple[torch.Tensor, float, int]:
    """YaRN's inverse frequencies [R/2], attention factor and reach, in transformers' order of operations."""
    factor, dim = _number(rope, "factor"), 2 * len(periods)
    original = _integer(rope, "original_max_position_embeddings")
    reach = math.ceil(factor * original)

    def pair_turning(rotations: float) -> float:
        """The (fractional) index of the pair that turns so often over the original context."""
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = pair_turning(_number(rope, "beta_fast", default=32.0))
    high = pair_turning(_number(rope, "beta_slow", default=1.0))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp_(0, 1)
    keep = 1 - ramp  # 1: the frequency stays as trained, 0: it is divided by the factor
    inv_freq = 1.0 / (factor * periods) * (1 - keep) + 1.0 / periods * keep

    names = ("mscale", "mscale_all_dim")
    mscales = [_number(rope, name) for name in names] if all(map(rope.get, names)) else [1.0, 0.0]
    scale = _yarn_mscale(factor, mscales[0]) / _yarn_mscale(factor, mscales[1])
    if "attention_factor" in rope:
        scale = _number(rope, "attention_factor")
    return inv_freq, scale, reach


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read(config: Any) -> dict[str, Any]:
    """The entries of a configuration given as None, mapping, path or object."""
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        try:
            config = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _error("config", "the path of a readable config.json", f"{path} ({error})") from error
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        config = {key: getattr(config, key, None) for key in (*_KEYS, "text_config")}
    if config.get("qk_rope_head_dim") is None and config.get("text_config") is not None:
        return _read(config["text_config"])
    return dict(config)


def _rope_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rope settings, in either spelling, as one flat dict with ``rope_type``; Nones are left out."""
    section: dict[str, Any] = {}
    for name in _SECTIONS:
        part = {} if values.get(name) is None else values[name]
        if not isinstance(part, Mapping) or any(isinstance(value, Mapping) for value in part.values()):
            raise _error(name, "one flat dict for all layers", repr(part))
        part = {key: value for key, value in part.items() if value is not None}
        if "type" in part:
            part.setdefault("rope_type", part["type"])
        section |= part
    return {key: values[key] for key in _SHARED if values.get(key) is not None} | section


def _integer(values: Mapping[str, Any], key: str, *, default: int | None = None, even: bool = False) -> int:
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (even and value % 2):
        raise _error(key, "an even positive integer" if even else "a positive integer", repr(value))
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None, above: float = 0.0) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < math.inf:
        raise _error(key, f"a number above {above:g}", repr(value))
    return float(value)


def _error(key: str, expected: str, got: object) -> ValueError:
    return ValueError(f"build_cos_sin_cache: {key}: expected {expected}, got {got}")

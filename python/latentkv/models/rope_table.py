"""What a model's configuration says of its rotation: the cos/sin table of base RoPE or YaRN, and the softmax scale.

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

__all__ = ["build_cos_sin_cache", "softmax_scale"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_YARN = ("yarn", "deepseek_yarn")
_ROPE_TYPES = ("default", *_YARN)
_SECTIONS = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"
_KEYS = ("qk_rope_head_dim", "max_position_embeddings", "rope_theta", _ORIGINAL, *_SECTIONS)
_SCALE_KEYS = (*_KEYS, "qk_nope_head_dim")
_DIMS = ("qk_rope_head_dim", "qk_nope_head_dim")
_TEXT_CONFIGS = ("text_config", "language_config")
_ATTRIBUTES = (*_SCALE_KEYS, *_TEXT_CONFIGS, "head_dim", "model_type", "compress_rope_theta")
_RENAMED = {"max_position_embeddings": "model_max_length"}  # by Bailing-Hybrid and Kimi-Linear
_NULLABLE = ("factor", "truncate")  # null means something else than no entry
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
    ``truncate`` (True) have defaults. A ``factor`` of None (null in JSON) stands for the configuration's
    ``max_position_embeddings`` / ``original_max_position_embeddings``. cos and sin are scaled by
    ``attention_factor`` if given, else by yarn(factor, mscale) / yarn(factor, mscale_all_dim), or yarn(factor, 1)
    if one of the two is missing or 0; yarn(s, m) is 0.1 * m * ln(s) + 1 for s > 1, else 1.

    Rows: a keyword ``max_position_embeddings`` is taken as it is. Otherwise the table covers all that the
    model can reach: the configuration's ``max_position_embeddings`` or YaRN's factor *
    ``original_max_position_embeddings``, whichever is more (some declare only the length before scaling).

    Several rotations: the layers of some models rotate in different ways, and a table is that of one of them.
    ``rope_parameters=`` chooses it by its name in the configuration, or gives all its settings in a dict.
    DeepSeek-V4 has two: ``"main"``, plain with ``rope_theta``, in layers that only slide, and ``"compress"``,
    with ``compress_rope_theta``, the ``rope_scaling`` and an ``attention_factor`` of 1, in those that compress.

    Args:
        config: a Hugging Face configuration (its ``text_config`` or ``language_config`` if multimodal): a
            dict, an object with ``to_dict()`` or attributes, the path of a ``config.json`` or of its folder.
            None: keywords only.
        device: where the table shall lie.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        **kwargs: ``qk_rope_head_dim`` (R), ``max_position_embeddings``, ``rope_theta`` and the dict
            ``rope_parameters``, or ``rope_scaling`` in the old spelling, with its type under ``rope_type`` or
            ``type``. They override ``config`` entry by entry, inside the dict too:
            ``rope_parameters={"rope_type": "default"}`` turns YaRN off.

    Raises:
        ValueError: a file cannot be read; an entry is missing, unknown or out of range; R is odd; the rope
            type is neither ``default`` nor YaRN; there are several rotations, and it is not said which;
            ``dtype`` is none of the three.
    """
    op = "build_cos_sin_cache"
    if dtype not in _DTYPES:
        raise _error(op, "dtype", f"one of {', '.join(map(str, _DTYPES))}", dtype)
    declared, overrides = _entries(op, config, kwargs, _KEYS)
    rope, values = _rotation(op, declared, overrides), declared | overrides

    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise _error(op, "rope_type", f"one of {', '.join(_ROPE_TYPES)}", repr(rope_type))
    dim = _integer(op, values, "qk_rope_head_dim")
    if dim % 2:
        raise _error(op, "qk_rope_head_dim", "an even integer", dim)
    theta = _number(op, rope, "rope_theta", above=1.0)
    periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if rope_type == "default":
        inv_freq, scale, reach = 1.0 / periods, 1.0, 0
    else:
        inv_freq, scale, reach = _yarn(op, rope, periods, theta)
    rows = _integer(op, values, "max_position_embeddings", default=reach or None)
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


def softmax_scale(config: Mapping[str, Any] | str | os.PathLike[str] | object | None = None, **kwargs: Any) -> float:
    """The factor of the logits q . k before the softmax: ``sm_scale`` of :func:`latentkv.mla_decode`.

    (P + R)**-0.5, for the P + R elements of a query head before absorption, times yarn(factor, mscale_all_dim)
    squared where YaRN's ``mscale_all_dim`` is given: the rule of DeepSeek-V2 and V3, transformers'
    ``yarn_apply_mscale``. yarn(s, m) is 0.1 * m * ln(s) + 1 for s > 1, else 1. DeepSeek-V4's layers have
    ``head_dim``**-0.5, whatever their rotation. The factor of cos and sin is in the table, and not in here.

    Args:
        config: as :func:`latentkv.build_cos_sin_cache` takes it.
        **kwargs: its keywords, and ``qk_nope_head_dim`` (P); R may be 0. Where the layers differ in these
            dimensions, the keywords say which.

    Raises:
        ValueError: a file cannot be read; an entry that is needed is missing, unknown or out of range; there
            are several rotations, and it is not said which.
    """
    op = "softmax_scale"
    declared, overrides = _entries(op, config, kwargs, _SCALE_KEYS)
    values, deepseek_v4 = declared | overrides, _is_deepseek_v4(declared)
    if deepseek_v4 and "qk_nope_head_dim" not in values:
        dims = _integer(op, values, "head_dim")
    else:
        dims = _integer(op, values, "qk_nope_head_dim") + _integer(op, values, "qk_rope_head_dim", least=0)
    rope = {} if deepseek_v4 else _rotation(op, declared, overrides)
    mscale = 1.0
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim"):
        mscale = _yarn_mscale(_number(op, rope, "factor"), _number(op, rope, "mscale_all_dim"))
    return float(dims**-0.5 * mscale * mscale)


def _yarn(op: str, rope: Mapping[str, Any], periods: torch.Tensor, theta: float) -> tuple[torch.Tensor, float, int]:
    """YaRN's inverse frequencies [R/2], attention factor and reach, in transformers' order of operations."""
    factor, dim = _number(op, rope, "factor"), 2 * len(periods)
    original = _integer(op, rope, _ORIGINAL)
    reach = math.ceil(factor * original)

    def pair_turning(rotations: float) -> float:
        """The (fractional) index of the pair that turns so often over the original context."""
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = pair_turning(_number(op, rope, "beta_fast", default=32.0))
    high = pair_turning(_number(op, rope, "beta_slow", default=1.0))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp_(0, 1)
    keep = 1 - ramp  # 1: the frequency stays as trained, 0: it is divided by the factor
    inv_freq = 1.0 / (factor * periods) * (1 - keep) + 1.0 / periods * keep

    names = ("mscale", "mscale_all_dim")
    mscales = [_number(op, rope, name) for name in names] if all(map(rope.get, names)) else [1.0, 0.0]
    scale = _yarn_mscale(factor, mscales[0]) / _yarn_mscale(factor, mscales[1])
    if "attention_factor" in rope:
        scale = _number(op, rope, "attention_factor")
    return inv_freq, scale, reach


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _entries(
    op: str, config: Any, kwargs: Mapping[str, Any], keys: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the configuration says and what the keywords say, each without Nones."""
    if unknown := sorted(kwargs.keys() - set(keys)):
        raise _error(op, "keywords", f"some of {', '.join(keys)}", ", ".join(unknown))
    return _read(op, config), {key: value for key, value in kwargs.items() if value is not None}


def _read(op: str, config: Any) -> dict[str, Any]:
    """The entries of a configuration given as None, mapping, path or object; Nones are left out."""
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        try:
            config = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _error(op, "config", "the path of a readable config.json", f"{path} ({error})") from error
    if not isinstance(config, Mapping):
        entries = config.to_dict() if hasattr(config, "to_dict") else {}
        # to_dict() goes by the names that the model's authors chose, also in text_config, attributes by the common ones
        names = [name for name in _ATTRIBUTES if name not in entries or name in _TEXT_CONFIGS]
        config = entries | {name: getattr(config, name, entries.get(name)) for name in names}
    values = {key: value for key, value in config.items() if value is not None}
    if "qk_rope_head_dim" not in values:
        for name in _TEXT_CONFIGS:
            if name in values:
                return _read(op, values[name])
    for name in _DIMS:
        dims = {layer[name] for layer in values.get("per_layer_config", {}).values() if name in layer}
        if name in values and dims - {values[name]}:
            values[name] = sorted(dims | {values[name]})  # no integer: a keyword has to say which
    return {key: values[name] for key, name in _RENAMED.items() if name in values} | values


def _is_deepseek_v4(values: Mapping[str, Any]) -> bool:
    return "compress_rope_theta" in values or values.get("model_type") == "deepseek_v4"


def _rotation(op: str, declared: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the one rotation that is meant, as one flat dict with ``rope_type``."""
    rope = _section(op, declared)
    rotations = {name: _flat(part) for name, part in rope.items() if isinstance(part, Mapping)}
    deepseek_v4 = _is_deepseek_v4(declared)
    if deepseek_v4 and not rotations:
        rotations = {
            "main": {"rope_theta": declared.get("rope_theta")},
            "compress": rope | {"rope_theta": declared.get("compress_rope_theta")},
        }
    if rotations:
        chosen = overrides.get("rope_parameters", overrides.get("rope_scaling"))
        if isinstance(chosen, str) and chosen in rotations:
            rope = rotations[chosen]
            overrides = {key: value for key, value in overrides.items() if value is not chosen}
        elif isinstance(chosen, Mapping):
            rope = {}
        else:
            names = " or ".join(map(repr, rotations))
            expected = f"which of {len(rotations)} rotations is meant, {names}, or a dict with all settings of one"
            raise _error(op, "rope_parameters", expected, repr(chosen))
    rope = rope | _section(op, overrides)
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise _error(op, "rope_parameters", "the flat dict of one rotation", repr(rope))
    if rope.get("rope_type") in _YARN:
        if deepseek_v4:
            rope.setdefault("attention_factor", 1.0)
        if rope.get("factor", 1.0) is None:
            lengths = {**overrides, **declared}  # how many rows are asked for does not change the angles
            longest = _integer(op, lengths, "max_position_embeddings")
            rope["factor"] = longest / _integer(op, rope, _ORIGINAL)
    return rope


def _section(op: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The rope settings, in either spelling, as one dict; nested if the configuration's are."""
    section: dict[str, Any] = {}
    for name in _SECTIONS:
        part = values.get(name, {})
        if not isinstance(part, Mapping):
            raise _error(op, name, "a dict", repr(part))
        section |= _flat(part)
    # both may stand beside the section, too: there the theta yields to the section's, the length prevails
    if "rope_theta" in values:
        section.setdefault("rope_theta", values["rope_theta"])
    if _ORIGINAL in values:
        section[_ORIGINAL] = values[_ORIGINAL]
    return section


def _flat(part: Mapping[str, Any]) -> dict[str, Any]:
    """``part`` with ``rope_type`` in the new spelling, and without the Nones that mean no entry."""
    part = {key: value for key, value in part.items() if value is not None or key in _NULLABLE}
    return ({"rope_type": part["type"]} if "type" in part else {}) | part


def _integer(op: str, values: Mapping[str, Any], key: str, *, default: int | None = None, least: int = 1) -> int:
    value = values.get(key, default)
    if isinstance(value, float) and value.is_integer():  # as in 4096.0
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _error(op, key, f"an integer of at least {least}", repr(value))
    return value


def _number(op: str, values: Mapping[str, Any], key: str, default: float | None = None, above: float = 0.0) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < math.inf:
        raise _error(op, key, f"a number above {above:g}", repr(value))
    return float(value)


def _error(op: str, key: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{op}: {key}: expected {expected}, got {got}")

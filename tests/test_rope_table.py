"""The cos/sin table, bit for bit against transformers' own DeepSeek rotary embedding; and the models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentkv.models import MODELS, model
from latentkv.models.rope_table import build_cos_sin_cache

V2_LITE: dict[str, Any] = {
    "qk_rope_head_dim": 64,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
V3: dict[str, Any] = V2_LITE | {"rope_scaling": V2_LITE["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0}}
KIMI_K2: dict[str, Any] = V3 | {
    "max_position_embeddings": 262144,
    "rope_theta": 50000.0,
    "rope_scaling": V3["rope_scaling"] | {"factor": 64.0, "beta_fast": 1.0},
}
PLAIN = {"qk_rope_head_dim": 64, "max_position_embeddings": 70001, "rope_theta": 1e6, "rope_scaling": None}
SMALL: dict[str, Any] = V3 | {  # YaRN as in DeepSeek-V3, on few rows and few elements
    "qk_rope_head_dim": 32,
    "max_position_embeddings": 1024,
    "rope_scaling": V3["rope_scaling"] | {"original_max_position_embeddings": 256, "factor": 4.0},
}


def scaled(config: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """``config`` with entries of its rope section replaced, or removed where None."""
    section = {k: v for k, v in (config["rope_scaling"] | entries).items() if v is not None}
    return config | {"rope_scaling": section}


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != key}


def hf_table(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[max_position, R] as transformers' DeepseekV3RotaryEmbedding computes it."""
    hf = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = json.loads(json.dumps(config))  # transformers edits nested dicts in place
    rotary = hf.DeepseekV3RotaryEmbedding(hf.DeepseekV3Config(**config))
    positions = torch.arange(config["max_position_embeddings"])[None]
    cos, sin = rotary(torch.empty(0, dtype=dtype), positions)
    half = config["qk_rope_head_dim"] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert torch.equal(got.view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "config",
    [V2_LITE, V3, KIMI_K2, PLAIN, scaled(V3, mscale=0.707)],
    ids=["v2-lite", "v3", "kimi-k2", "plain", "unequal-mscales"],
)
def test_every_row_matches_transformers(config: dict[str, Any]) -> None:
    assert_same_bits(build_cos_sin_cache(config), hf_table(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [SMALL, scaled(SMALL, mscale=0.707), PLAIN], ids=["yarn", "mscales", "plain"])
def test_one_rounding_to_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    table = build_cos_sin_cache(config, dtype=dtype)
    assert_same_bits(table, hf_table(config, dtype))
    assert_same_bits(table, build_cos_sin_cache(config).to(dtype))


@pytest.mark.parametrize(
    "entries",
    [
        {"mscale": None},
        {"mscale_all_dim": None},
        {"mscale": None, "mscale_all_dim": None},
        {"mscale": 0.707, "mscale_all_dim": 0},
        {"mscale": 0.707, "attention_factor": 1.25},
        {"beta_fast": 8, "beta_slow": 2},
        {"beta_fast": None, "beta_slow": None},
        {"truncate": False},
        {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},  # the ramp has no width
        {"factor": 1.0},
    ],
    ids=str,
)
def test_yarn_options_match_transformers(entries: dict[str, Any]) -> None:
    config = scaled(SMALL, **entries)
    assert_same_bits(build_cos_sin_cache(config), hf_table(config))


def test_attention_factor_is_deepseeks_ratio() -> None:
    table = build_cos_sin_cache(scaled(SMALL, factor=40.0, mscale=0.707, mscale_all_dim=0.5))
    ratio = (0.1 * 0.707 * math.log(40) + 1) / (0.1 * 0.5 * math.log(40) + 1)
    assert torch.equal(table[0], torch.tensor([ratio] * 16 + [0.0] * 16))  # cos 0 and sin 0


def test_old_and_new_spelling_and_keywords_agree() -> None:
    want = build_cos_sin_cache(SMALL)
    old = without(SMALL, "rope_scaling")
    section = without(SMALL["rope_scaling"], "type")
    nested = section | {"rope_type": "deepseek_yarn", "rope_theta": 10000.0}
    for config in (
        old | {"rope_scaling": section | {"rope_type": "yarn"}},
        old | {"rope_parameters": section | {"type": "yarn"}},
        without(old, "rope_theta") | {"rope_parameters": nested},
        old | {"rope_theta": 5e6, "rope_parameters": nested},  # the inner theta counts, as in transformers
        old | {"rope_parameters": {"rope_type": None, "factor": None}, "rope_scaling": SMALL["rope_scaling"]},
        scaled(SMALL, original_max_position_embeddings=None) | {"original_max_position_embeddings": 256},
    ):
        assert_same_bits(build_cos_sin_cache(config), want)
        assert_same_bits(build_cos_sin_cache(**config), want)


def test_config_comes_as_file_folder_or_object(tmp_path: Path) -> None:
    want = build_cos_sin_cache(SMALL)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL))
    for config in (
        file,
        str(file),
        tmp_path,
        SimpleNamespace(**SMALL),
        SimpleNamespace(to_dict=lambda: SMALL),
        {"model_type": "kimi_k25", "text_config": SMALL},
        SimpleNamespace(text_config=SimpleNamespace(**SMALL)),
    ):
        assert_same_bits(build_cos_sin_cache(config), want)


def test_transformers_config_object() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(**json.loads(json.dumps(SMALL)))
    assert_same_bits(build_cos_sin_cache(config), build_cos_sin_cache(SMALL))


def test_keywords_override_entry_by_entry() -> None:
    nested = without(SMALL, "rope_theta")
    nested = scaled(nested, rope_theta=10000.0)
    for config in (SMALL, nested):
        assert_same_bits(
            build_cos_sin_cache(config, rope_theta=5e4, rope_parameters={"mscale": 0.5}, qk_rope_head_dim=16),
            build_cos_sin_cache(scaled(SMALL, rope_theta=5e4, mscale=0.5) | {"qk_rope_head_dim": 16}),
        )
        assert_same_bits(
            build_cos_sin_cache(config, rope_parameters={"rope_type": "default"}, rope_scaling=None),
            build_cos_sin_cache(SMALL | {"rope_scaling": None}),
        )


@pytest.mark.parametrize(
    ("declared", "keyword", "rows"),
    [
        (1024, None, 1024),
        (256, None, 1024),  # only the length before scaling is declared: factor * original
        (None, None, 1024),
        (2048, None, 2048),
        (2048, 100, 100),
        (100, 3000, 3000),
    ],
)
def test_rows_of_a_yarn_table(declared: int | None, keyword: int | None, rows: int) -> None:
    config = SMALL | {"max_position_embeddings": declared}
    table = build_cos_sin_cache(config, max_position_embeddings=keyword)
    assert table.shape == (rows, 32)
    assert torch.equal(table[:100], build_cos_sin_cache(SMALL)[:100])  # rows do not change the frequencies


def test_device_and_ambient_default_device() -> None:
    assert build_cos_sin_cache(SMALL, device="meta").device.type == "meta"
    want = build_cos_sin_cache(SMALL)
    with torch.device("meta"):
        assert_same_bits(build_cos_sin_cache(SMALL), want)


@pytest.mark.parametrize(
    ("config", "key", "got"),
    [
        (without(SMALL, "qk_rope_head_dim"), "qk_rope_head_dim", "None"),
        (SMALL | {"qk_rope_head_dim": 63}, "qk_rope_head_dim", "63"),
        (SMALL | {"qk_rope_head_dim": 0}, "qk_rope_head_dim", "0"),
        (SMALL | {"qk_rope_head_dim": True}, "qk_rope_head_dim", "True"),
        (without(SMALL, "rope_theta"), "rope_theta", "None"),
        (SMALL | {"rope_theta": 1.0}, "rope_theta", "1.0"),
        (SMALL | {"rope_theta": "10000"}, "rope_theta", "'10000'"),
        (without(PLAIN, "max_position_embeddings"), "max_position_embeddings", "None"),
        (SMALL | {"max_position_embeddings": -1}, "max_position_embeddings", "-1"),
        (SMALL | {"max_position_embeddings": 1024.0}, "max_position_embeddings", "1024.0"),
        (scaled(SMALL, factor=None), "factor", "None"),
        (scaled(SMALL, factor=0), "factor", "0"),
        (scaled(SMALL, factor=math.inf), "factor", "inf"),
        (scaled(SMALL, factor=math.nan), "factor", "nan"),
        (scaled(SMALL, original_max_position_embeddings=None), "original_max_position_embeddings", "None"),
        (scaled(SMALL, beta_fast=-1), "beta_fast", "-1"),
        (scaled(SMALL, beta_slow=False), "beta_slow", "False"),
        (scaled(SMALL, mscale="1"), "mscale", "'1'"),
        (scaled(SMALL, attention_factor=0.0), "attention_factor", "0.0"),
        (scaled(SMALL, type="llama3"), "rope_type", "'llama3'"),
        (scaled(SMALL, type="longrope"), "rope_type", "'longrope'"),
        (scaled(SMALL, rope_type="dynamic"), "rope_type", "'dynamic'"),
        (SMALL | {"rope_scaling": "yarn"}, "rope_scaling", "'yarn'"),
        (SMALL | {"rope_parameters": {"main": {}, "compress": {}}}, "rope_parameters", "{'main'"),
        (None, "qk_rope_head_dim", "None"),
        (12, "qk_rope_head_dim", "None"),
        (Path("/no/such/config.json"), "config", "/no/such/config.json"),
    ],
)
def test_errors_name_the_entry(config: Any, key: str, got: str) -> None:
    with pytest.raises(ValueError) as error:
        build_cos_sin_cache(config)
    message = str(error.value)
    assert message.startswith(f"build_cos_sin_cache: {key}: expected ")
    assert f", got {got}" in message


def test_errors_of_file_dtype_and_keywords(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config: expected the path of a readable config\.json, got .*Expecting"):
        build_cos_sin_cache(tmp_path)
    with pytest.raises(ValueError, match=r"dtype: expected one of torch\.float32, .*, got torch\.float64"):
        build_cos_sin_cache(SMALL, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"keywords: expected some of qk_rope_head_dim, .*, got rope_dim"):
        build_cos_sin_cache(SMALL, rope_dim=64)


@pytest.mark.parametrize("name", MODELS)
def test_models_build_their_tables(name: str) -> None:
    entry = model(name)
    assert entry is MODELS[name] and entry.name == name and entry in {entry}
    if entry.rope is not None:
        section = entry.rope.get("rope_parameters", {})
        reach = section.get("factor", 0) * section.get("original_max_position_embeddings", 0)
        assert entry.rope["max_position_embeddings"] >= reach
        table = build_cos_sin_cache(entry.rope, max_position_embeddings=5)
        assert table.shape == (5, entry.rope_dim)
        assert torch.equal(table[0, : entry.rope_dim // 2], torch.ones(entry.rope_dim // 2))


@pytest.mark.parametrize(("name", "config"), [("deepseek-v2-lite", V2_LITE), ("deepseek-v3", V3), ("kimi-k2", KIMI_K2)])
def test_models_agree_with_their_configs(name: str, config: dict[str, Any]) -> None:
    assert_same_bits(build_cos_sin_cache(model(name).rope), build_cos_sin_cache(config))


def test_mistral_4_agrees_with_transformers_defaults() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mistral4Config()
    short = {"max_position_embeddings": 9000}
    mine = model("mistral-4-small")
    assert_same_bits(build_cos_sin_cache(mine.rope, **short), build_cos_sin_cache(config, **short))
    assert mine.rope["max_position_embeddings"] == config.max_position_embeddings


def test_model_names() -> None:
    assert model("DeepSeek-R1") is model("deepseek-v3")
    assert model("kimi-k3").rope is None and model("kimi-k3").rope_dim == 64
    with pytest.raises(ValueError, match=r"expected one of deepseek-r1, deepseek-v2, .*, got 'gpt-2'"):
        model("gpt-2")

"""The cos/sin table and the softmax scale, bit for bit against transformers' own layers; and the models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latentkv.models import MODELS, model
from latentkv.models.rope_table import build_cos_sin_cache, softmax_scale

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
V4: dict[str, Any] = {  # on few rows
    "model_type": "deepseek_v4",
    "qk_rope_head_dim": 64,
    "head_dim": 512,
    "max_position_embeddings": 2048,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 128,
    },
}
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
        {"original_max_position_embeddings": 256.0},
    ],
    ids=str,
)
def test_yarn_options_match_transformers(entries: dict[str, Any]) -> None:
    config = scaled(SMALL, **entries)
    assert_same_bits(build_cos_sin_cache(config), hf_table(config))


@pytest.mark.parametrize(
    "entries",
    [
        {"max_position_embeddings": 2048, "rope_scaling": SMALL["rope_scaling"] | {"factor": None}},
        {"rope_scaling": SMALL["rope_scaling"] | {"truncate": None}},
        {"original_max_position_embeddings": 512},  # beside the section it prevails
    ],
    ids=["null-factor", "null-truncate", "two-original-lengths"],
)
def test_what_stands_in_doubt_is_read_as_transformers_does(entries: dict[str, Any]) -> None:
    config = SMALL | entries
    want = hf_table(config)
    assert_same_bits(build_cos_sin_cache(config)[: len(want)], want)
    assert_same_bits(build_cos_sin_cache(**config), want)
    assert_same_bits(build_cos_sin_cache(config, max_position_embeddings=7), want[:7])  # the same angles on fewer rows


@given(data=st.data(), config=st.sampled_from([SMALL, V4]))
def test_integers_may_be_written_as_floats(data: st.DataObject, config: dict[str, Any]) -> None:
    def rewrite(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: rewrite(value)
            if isinstance(value, dict)
            else float(value)
            if isinstance(value, int) and data.draw(st.booleans(), label=key)
            else value
            for key, value in values.items()
        }

    chosen = {"rope_parameters": "compress"} if config is V4 else {}
    floats = json.loads(json.dumps(rewrite(config)))
    assert_same_bits(build_cos_sin_cache(floats, **chosen), build_cos_sin_cache(config, **chosen))


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
        {"model_type": "deepseek_vl_v2", "language_config": SMALL},
        {"text_config": None, "language_config": SMALL},
        SimpleNamespace(language_config=SimpleNamespace(to_dict=lambda: SMALL)),
        SimpleNamespace(to_dict=lambda: {"text_config": SMALL}),
        SimpleNamespace(text_config=SimpleNamespace(**SMALL)),
    ):
        assert_same_bits(build_cos_sin_cache(config), want)


def test_transformers_config_object() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(**json.loads(json.dumps(SMALL)))
    assert_same_bits(build_cos_sin_cache(config), build_cos_sin_cache(SMALL))


def hf_v4_tables(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """[max_position, R] of each rotation as transformers' DeepseekV4RotaryEmbedding computes it."""
    hf = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    rotary = hf.DeepseekV4RotaryEmbedding(hf.DeepseekV4Config(**json.loads(json.dumps(config))))
    positions = torch.arange(config["max_position_embeddings"])[None]
    tables = {name: rotary(torch.empty(0), positions, layer_type=name) for name in ("main", "compress")}
    return {name: torch.cat(cos_sin, dim=-1)[0] for name, cos_sin in tables.items()}


def test_both_rotations_of_deepseek_v4_match_transformers(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    want = hf_v4_tables(V4)
    as_object = hf.DeepseekV4Config(**json.loads(json.dumps(V4)))
    as_object.save_pretrained(tmp_path)
    section = V4["rope_scaling"] | {"rope_theta": 160000}
    for config in (V4, as_object, tmp_path, {"text_config": V4}, without(V4, "model_type")):
        for name in ("main", "compress"):
            assert_same_bits(build_cos_sin_cache(config, rope_parameters=name), want[name])
        own = {"rope_type": "default", "rope_theta": 10000}
        assert_same_bits(build_cos_sin_cache(config, rope_parameters=own), want["main"])
        assert_same_bits(build_cos_sin_cache(config, rope_parameters=section), want["compress"])
        assert_same_bits(build_cos_sin_cache(config, rope_scaling=section), want["compress"])
    for name, part in as_object.rope_parameters.items():
        assert_same_bits(build_cos_sin_cache(V4, rope_parameters=part), want[name])


@given(
    head_dim=st.sampled_from([16, 64, 512]),
    quarter=st.booleans(),
    thetas=st.tuples(st.floats(10, 1e7), st.floats(10, 1e7)),
    factor=st.floats(1, 64),
    original=st.integers(8, 1 << 16),
)
def test_any_two_rotations_match_transformers(
    head_dim: int, quarter: bool, thetas: tuple[float, float], factor: float, original: int
) -> None:
    config = V4 | {
        "head_dim": head_dim,
        "qk_rope_head_dim": head_dim // 4 if quarter else head_dim,
        "max_position_embeddings": 40,
        "rope_theta": thetas[0],
        "compress_rope_theta": thetas[1],
        "rope_scaling": V4["rope_scaling"] | {"factor": factor, "original_max_position_embeddings": original},
    }
    for name, want in hf_v4_tables(config).items():
        assert_same_bits(build_cos_sin_cache(config, rope_parameters=name, max_position_embeddings=40), want)


@pytest.mark.parametrize(
    "config",
    [
        V4,
        {"text_config": V4},
        without(V4, "rope_scaling"),
        without(V4, "compress_rope_theta"),
        without(without(V4, "model_type"), "rope_theta"),
        PLAIN | {"rope_parameters": {"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 1.6e5}}},
    ],
)
@pytest.mark.parametrize("keywords", [{}, {"rope_theta": 1e4}, {"rope_parameters": "sliding"}], ids=str)
def test_which_of_several_rotations_must_be_said(config: dict[str, Any], keywords: dict[str, Any]) -> None:
    got = repr(keywords.get("rope_parameters"))
    expected = "which of 2 rotations is meant, 'main' or 'compress', or a dict with all settings of one"
    with pytest.raises(ValueError) as error:
        build_cos_sin_cache(config, **keywords)
    assert str(error.value) == f"build_cos_sin_cache: rope_parameters: expected {expected}, got {got}"


def test_one_of_several_rotations_takes_nothing_from_beside_it() -> None:
    with pytest.raises(ValueError, match=r"rope_theta: expected a number above 1, got None"):
        build_cos_sin_cache(V4, rope_parameters=V4["rope_scaling"])  # else it would turn with the other's theta
    with pytest.raises(ValueError, match=r"rope_theta: expected a number above 1, got None"):
        build_cos_sin_cache(without(V4, "compress_rope_theta"), rope_parameters="compress")
    nested = PLAIN | {"max_position_embeddings": 9, "rope_parameters": {"a": {"rope_theta": 100}, "b": None, "c": {}}}
    want = build_cos_sin_cache(PLAIN, rope_theta=100, max_position_embeddings=9)
    assert_same_bits(build_cos_sin_cache(nested, rope_parameters="a"), want)
    assert_same_bits(build_cos_sin_cache(nested, rope_parameters="c", rope_theta=100), want)


@pytest.mark.parametrize("name", ["bailing_hybrid", "kimi_linear"])
def test_names_that_transformers_exchanges(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip(f"transformers.models.{name}")
    config = transformers.AutoConfig.for_model(name, max_position_embeddings=130)
    config.save_pretrained(tmp_path)
    assert "max_position_embeddings" not in config.to_dict() | json.loads((tmp_path / "config.json").read_text())
    for given_as in (config, config.to_dict(), tmp_path, {"text_config": config.to_dict()}):
        assert build_cos_sin_cache(given_as, rope_theta=6e6).shape == (130, 64)
    assert build_cos_sin_cache(PLAIN | {"model_max_length": 9}).shape == (70001, 64)  # the common name goes first


def test_attributes_count_where_to_dict_uses_other_names() -> None:
    class Config:
        def __init__(self) -> None:
            self.vars = {"rope_dim": 32, "length": 1024, "rope_theta": 10000, "rope_scaling": SMALL["rope_scaling"]}
            self.qk_rope_head_dim, self.max_position_embeddings = 32, 1024

        def to_dict(self) -> dict[str, Any]:
            return self.vars

    for config in (Config(), SimpleNamespace(text_config=Config(), to_dict=lambda: {"text_config": Config().vars})):
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
        (SMALL | {"max_position_embeddings": 1024.5}, "max_position_embeddings", "1024.5"),
        (SMALL | {"max_position_embeddings": math.inf}, "max_position_embeddings", "inf"),
        (SMALL | {"qk_rope_head_dim": 63.0}, "qk_rope_head_dim", "63"),
        (scaled(SMALL, factor=None), "factor", "None"),
        (scaled(SMALL, factor=0), "factor", "0"),
        (  # null asks for both lengths
            without(SMALL, "max_position_embeddings") | {"rope_scaling": SMALL["rope_scaling"] | {"factor": None}},
            "max_position_embeddings",
            "None",
        ),
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
    with pytest.raises(ValueError, match=r"rope_parameters: expected a dict, got 'compress'"):
        build_cos_sin_cache(SMALL, rope_parameters="compress")
    with pytest.raises(ValueError, match=r"rope_parameters: expected the flat dict of one rotation, got {.*'main'"):
        build_cos_sin_cache(SMALL, rope_parameters={"main": {}, "compress": {}})


# Models of transformers that have MLA, or as DeepSeek-V4 something like it: their attention layers.
ATTENTION = {
    "axk1": "AXK1Attention",
    "axk2": "AXK2Attention",
    "bailing_hybrid": "BailingHybridAttention",
    "deepseek_v2": "DeepseekV2Attention",
    "deepseek_v3": "DeepseekV3Attention",
    "deepseek_v32": "DeepseekV32Attention",
    "deepseek_v4": "DeepseekV4Attention",
    "glm4_moe_lite": "Glm4MoeLiteAttention",
    "glm_moe_dsa": "GlmMoeDsaAttention",
    "hy_v4": "HYV4Attention",
    "kimi_linear": "KimiLinearAttention",
    "longcat_flash": "LongcatFlashMLA",
    "minicpm3": "MiniCPM3Attention",
    "mistral4": "Mistral4Attention",
    "youtu": "YoutuAttention",
}


def hf_scale(name: str, **entries: Any) -> tuple[Any, float]:
    """A configuration of transformers, and the softmax scale that its attention layer has."""
    transformers = pytest.importorskip("transformers")
    hf = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    config = transformers.AutoConfig.for_model(name, **json.loads(json.dumps(entries)))
    with torch.device("meta"):
        layer = getattr(hf, ATTENTION[name])(config, layer_idx=0)
    return config, layer.scaling


@pytest.mark.parametrize("name", ATTENTION)
def test_softmax_scale_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    config, want = hf_scale(name)
    config.save_pretrained(tmp_path)
    assert softmax_scale(config) == softmax_scale(config.to_dict()) == softmax_scale(tmp_path) == want


@given(
    nope=st.integers(1, 512),
    rope=st.integers(1, 64),
    mscales=st.tuples(*[st.none() | st.just(0.0) | st.floats(0.01, 2)] * 2),
    factor=st.floats(1, 128) | st.integers(1, 128),
)
def test_softmax_scale_has_mscale_squared(
    nope: int, rope: int, mscales: tuple[float | None, float | None], factor: float
) -> None:
    section = scaled(V3, factor=factor, mscale=mscales[0], mscale_all_dim=mscales[1])["rope_scaling"]
    dims = {"qk_nope_head_dim": nope, "qk_rope_head_dim": 2 * rope}
    _, want = hf_scale("deepseek_v3", **dims, rope_scaling=section, max_position_embeddings=1024)
    assert softmax_scale(dims, rope_scaling=section) == softmax_scale(rope_parameters=section, **dims) == want


def test_softmax_scale_of_known_models() -> None:
    assert softmax_scale(V3, qk_nope_head_dim=128) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    null = V3["rope_scaling"] | {"factor": None}
    assert softmax_scale(V3 | {"rope_scaling": null}, qk_nope_head_dim=128) == softmax_scale(V3, qk_nope_head_dim=128)
    assert softmax_scale(V4) == softmax_scale(V4, rope_parameters="main") == 512**-0.5
    assert softmax_scale(V4, qk_nope_head_dim=192) == 256**-0.5
    assert softmax_scale(qk_nope_head_dim=256, qk_rope_head_dim=0) == 256**-0.5
    assert softmax_scale(qk_nope_head_dim=128.0, qk_rope_head_dim=64, rope_scaling={"rope_type": "linear"}) == 192**-0.5
    for entry in MODELS.values():
        section = (entry.rope or {}).get("rope_parameters", {"factor": 1.0, "mscale_all_dim": 0.0})
        mscale = 0.1 * section["mscale_all_dim"] * math.log(section["factor"]) + 1
        scale = softmax_scale(entry.rope, qk_nope_head_dim=entry.nope_dim, qk_rope_head_dim=entry.rope_dim)
        assert scale == pytest.approx((entry.nope_dim + entry.rope_dim) ** -0.5 * mscale**2)


def test_dimensions_that_differ_by_layer_must_be_said(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.models.dots3_note")
    config = transformers.AutoConfig.for_model("dots3_note")  # slides over heads of 192 + 64, else 128 + 64
    config.save_pretrained(tmp_path)
    for given_as in (config, config.to_dict(), tmp_path):
        with pytest.raises(ValueError, match=r"which of 2 rotations is meant, '\w+_attention' or '\w+_attention', or "):
            build_cos_sin_cache(given_as)
        sliding = {"rope_parameters": "sliding_attention"}
        table = build_cos_sin_cache(given_as, max_position_embeddings=9, **sliding)
        assert_same_bits(table, build_cos_sin_cache(PLAIN, rope_theta=5e4, max_position_embeddings=9))
        with pytest.raises(ValueError, match=r"softmax_scale: qk_nope_head_dim: expected .*, got \[128, 192\]"):
            softmax_scale(given_as, **sliding)
        assert softmax_scale(given_as, qk_nope_head_dim=192, **sliding) == 256**-0.5
    assert softmax_scale(config.text_config.per_layer_config[2], **sliding) == 256**-0.5


@pytest.mark.parametrize(
    ("config", "keywords", "message"),
    [
        (V3, {}, "qk_nope_head_dim: expected an integer of at least 1, got None"),
        (V3, {"qk_nope_head_dim": 0}, "qk_nope_head_dim: expected an integer of at least 1, got 0"),
        (None, {"qk_nope_head_dim": 128}, "qk_rope_head_dim: expected an integer of at least 0, got None"),
        (without(V4, "head_dim"), {}, "head_dim: expected an integer of at least 1, got None"),
        (V3, {"head_dim": 192}, "keywords: expected some of qk_rope_head_dim, "),
        (scaled(V3, factor=None), {"qk_nope_head_dim": 128}, "factor: expected a number above 0, got None"),
        (scaled(V3, mscale_all_dim=-1), {"qk_nope_head_dim": 128}, "mscale_all_dim: expected a number above 0, got -1"),
        (
            V3 | {"rope_parameters": {"a": {}, "b": {}}},
            {"qk_nope_head_dim": 128},
            "rope_parameters: expected which of 2 rotations is meant, 'a' or 'b', or ",
        ),
        ("/no/such/config.json", {}, "config: expected the path of a readable config.json, got /no/such/"),
    ],
)
def test_errors_of_softmax_scale(config: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        softmax_scale(config, **keywords)
    assert str(error.value).startswith(f"softmax_scale: {message}")


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

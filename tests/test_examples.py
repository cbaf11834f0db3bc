"""The examples run, their bytes are the reference's, and the guides quote them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Python

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path.read_text("utf-8") for path in sorted((ROOT / "examples").glob("*.py"))}
SAYS = {
    "chunked_prefill": ["[128, 42] rows of 576"],
    "compiled_layer": ["1 of 1 sites fused", "query [6, 16, 192] and fp8_e4m3fn rows"],
    "context_parallel": ["rows of 2 ranks", "merged: near it"],
    "deepseek_v32_decode": ["rows of 656 bytes, indexer keys of 132", "slot 70: tile scales"],
    "deepseek_v3_decode": ["fp8 query [6, 16, 576] and rows", "split query, query in place"],
    "kimi_k3_decode": ["query [6, 12, 576] and rows"],
    "mistral4_decode": ["query [8, 32, 320], latents, rows of 256 + 64"],
    "prefill_mi300_decode_hopper": [
        "on the wire: [10, 16, 576], 576 bytes a token; bf16 rows take 1152",
        "86398 as they were, 2 of 240 became 448",
        "to fp8_e4m3fn, bf16 and fp8_ds_mla in blocks of 64",
        "decoded: [1, 16, 512]",
    ],
    "speculative_decode": ["rows of 5 layers"],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(python: Python, name: str) -> None:
    result = python(EXAMPLES[name], TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    assert result.returncode == 0, result.stderr
    assert "all bytes equal the reference's" in result.stdout
    for said in SAYS[name]:
        assert said in result.stdout


def test_the_guides_quote_the_examples() -> None:
    guide = "".join((ROOT / "docs" / name).read_text("utf-8") for name in ("decode.md", "compile.md", "layouts.md"))
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert blocks
    for block in blocks:
        for passage in block.split("\n\n"):
            assert any(passage.strip() in source for source in EXAMPLES.values()), passage
    for name in EXAMPLES:
        assert f"examples/{name}.py" in guide

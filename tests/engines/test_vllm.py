"""The plugin in vLLM's own engine on a CPU, switched on and off: ``make test-vllm``."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from latentkv.testing.engines import V3, VLLM_OFFLINE

SMALL_V3 = V3 | {
    "q_lora_rank": 128, "n_group": 2, "num_attention_heads": 2, "qk_nope_head_dim": 64, "v_head_dim": 64,
}  # fmt: skip
SCALED = {"llama_4_scaling": {"original_max_position_embeddings": 16, "beta": 0.1}}
GONE = "vllm.model_executor.layers.attention.kv_transfer_utils:maybe_transfer_kv_layer"
RUNS: dict[str, dict[str, Any]] = {
    f"{model} {how} {mode}": {"mode": mode, "model": config, "engine": {"enforce_eager": how == "eager"}}
    for mode in ("off", "prologue")
    for model, config in (("V2", {}), ("V3", SMALL_V3))
    for how in ("eager", "compiled")
} | {
    "V2 eager rope": {"mode": "rope"},
    "V2 bf16 off": {"mode": "off", "engine": {"dtype": "bfloat16"}},
    "V2 bf16 prologue": {"mode": "prologue", "engine": {"dtype": "bfloat16"}},
    "V2 bf16 rope": {"mode": "rope", "engine": {"dtype": "bfloat16"}},
    "V2 lacking prologue": {"mode": "prologue", "without": GONE},
    # What is handed back to vLLM, in a compiled model.
    "V2 scaled off": {"mode": "off", "model": SCALED, "engine": {"enforce_eager": False}},
    "V2 scaled prologue": {"mode": "prologue", "model": SCALED, "engine": {"enforce_eager": False}},
    # Without YaRN another class of vLLM's rotates.
    "V2 plain prologue": {"mode": "prologue", "model": {"rope_scaling": None}},
}


ENVIRONMENT = VLLM_OFFLINE | {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_DISABLE_COMPILE_CACHE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


class Result(NamedTuple):
    """What an engine made of the answers, which batches the layer's op saw how often, and what was logged."""

    logprobs: list[torch.Tensor]  # of each request [tokens, vocabulary]
    steps: dict[tuple[int, int], int]  # by decode tokens and tokens
    log: str

    @property
    def tokens(self) -> list[list[int]]:
        """What it would have answered."""
        return [x.argmax(-1).tolist() for x in self.logprobs]

    @property
    def said(self) -> list[str]:
        """What the plugin logged."""
        lines = [line for line in self.log.splitlines() if "latentkv" in line]
        return [line for line in lines if "latentkv.testing" not in line]  # the engine's configuration


def _requests() -> dict[str, list[list[int]]]:
    """More requests than the engine takes at once, of unequal lengths: some begin while others are in the middle."""
    rng = random.Random(0)

    def texts(*lengths: int) -> list[list[int]]:
        return [[rng.randrange(2, 512) for _ in range(n)] for n in lengths]

    return {"prompts": texts(5, 40, 17, 64, 33, 1), "answers": texts(12, 4, 9, 3, 7, 10)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Of all runs, by name."""
    place = tmp_path_factory.mktemp("engines")
    for name, run in RUNS.items():
        engine = {"dtype": "float32", "enforce_eager": True} | run.get("engine", {})
        told = {"model": {}, "without": ""} | run | _requests() | {"engine": engine}
        (place / f"{name}.json").write_text(json.dumps(told))
    command = [sys.executable, str(Path(__file__).with_name("vllm_run.py")), str(place)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=1500)
    logs = {name: (place / f"{name}.log").read_text() for name in RUNS if (place / f"{name}.log").exists()}
    for name in RUNS:
        assert (place / f"{name}.pt").exists(), f"{name}: {logs.get(name, '')[-6000:]}\n{done.stderr[-2000:]}"
    return {name: Result(*torch.load(place / f"{name}.pt"), logs[name]) for name in RUNS}


def _errors(a: Result, b: Result) -> torch.Tensor:
    return torch.cat([(x - y).abs().flatten() for x, y in zip(a.logprobs, b.logprobs, strict=True)])


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("model", ["V2", "V3"])
def test_the_same_tokens_as_without(results: dict[str, Result], model: str, how: str) -> None:
    """At every place of every answer, in fp32. RMSNorm's order of summation differs."""
    off, on = (results[f"{model} {how} {mode}"] for mode in ("off", "prologue"))
    assert on.tokens == off.tokens
    assert _errors(on, off).max() < 1e-4
    assert not off.said
    assert "serves 3 MLA layers of vLLM" in on.log and "model.layers.0-2.self_attn.attn (CPU_MLA" in on.log
    decoding = sum(count for (decode, _), count in on.steps.items() if decode)
    assert decoding >= 3 * (max(len(x) for x in on.logprobs) - 1), "decode tokens went another way"


def test_decode_and_prefill_tokens_in_one_step(results: dict[str, Result]) -> None:
    """Each take their own way: the runs above hold pure and mixed batches."""
    kinds = {"decode" if d == n else "mixed" if d else "prefill" for d, n in results["V2 eager prologue"].steps}
    assert kinds == {"decode", "mixed", "prefill"}


@pytest.mark.parametrize("mode", ["prologue", "rope"])
def test_16_bits_err_no_more_than_without(results: dict[str, Result], mode: str) -> None:
    exact = results["V2 eager off"]
    off, on = (_errors(results[f"V2 bf16 {m}"], exact) for m in ("off", mode))
    assert on.max() < 1.25 * off.max() and on.mean() < 1.05 * off.mean()


def test_the_mode_for_comparisons(results: dict[str, Result]) -> None:
    off, on = results["V2 eager off"], results["V2 eager rope"]
    assert on.tokens == off.tokens and _errors(on, off).max() < 1e-4
    assert "LATENTKV_VLLM=rope" in on.log and on.steps


def test_both_classes_of_rotations_are_served(results: dict[str, Result]) -> None:
    assert "serves 3 MLA layers" in results["V2 plain prologue"].log


def test_a_vllm_that_lacks_something_serves_as_it_is(results: dict[str, Result]) -> None:
    off, on = results["V2 eager off"], results["V2 lacking prologue"]
    assert all(map(torch.equal, on.logprobs, off.logprobs))
    (said,) = on.said
    assert "WARNING" in said and f"as it lacks: {GONE}" in said


def test_layers_that_are_handed_back_are_vllms_own(results: dict[str, Result]) -> None:
    off, on = results["V2 scaled off"], results["V2 scaled prologue"]
    assert all(map(torch.equal, on.logprobs, off.logprobs)) and not on.steps
    assert len(on.said) == 3, on.said
    for i, line in enumerate(on.said):
        assert f"latentkv hands model.layers.{i}.self_attn back to vLLM: llama_4_scaling" in line


def test_an_unknown_mode_is_refused() -> None:
    env = os.environ | {"LATENTKV_VLLM": "on"}
    code = "import latentkv.engines.vllm as v; v.register()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "LATENTKV_VLLM: expected one of prologue, rope, off, got 'on'" in done.stderr

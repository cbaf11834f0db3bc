"""First mistakes: a tensor for a cache, a list for a tensor, None, what was forgotten, a provider that is not there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import latentkv
import pytest
import torch
from calls import BLOCK_SIZE, BLOCKS, L, R, call_of, run, valid
from conftest import Python
from interpreted import TRITON, elsewhere, passes_interpreted
from latentkv import CacheLayout, MLACache, providers
from latentkv.ops.description import OPS
from latentkv.providers import Provider


@elsewhere
def test_interpreted() -> None:
    passes_interpreted(__file__, *TRITON)


def arguments(op: str, device: str) -> dict[str, Any]:
    """Those of a method of a provider."""
    call, layout = valid(op, device), CacheLayout(L, R, BLOCK_SIZE)
    for name in ("cache", "src", "dst"):
        if name in call and op != "write_indexer_cache_":
            call[name] = layout.allocate(BLOCKS, device)
    if "caches" in call:
        call["caches"] = [layout.allocate(BLOCKS, device) for _ in call["caches"]]
    of_caches = r"(\w+_)?(scale|scales|format|rope|rope_cache|rope_caches|kv_lora_rank|rope_dim)"
    return {
        name: value
        for name, value in call.items()
        if not re.fullmatch(of_caches, name) or name in ("q_scale", "sm_scale")
    }


def said(provider: Provider, op: str, given: dict[str, Any]) -> str:
    with pytest.raises((RuntimeError, TypeError)) as error:
        getattr(provider, op)(**given)
    return str(error.value).splitlines()[0]


@pytest.mark.parametrize("op", OPS)
def test_the_valid_call_is_valid(op: str, device: str, provider: Provider) -> None:
    call_of(provider, op, device)
    getattr(provider, op)(**arguments(op, device))


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_for_a_cache(op: str, device: str, provider: Provider) -> None:
    call_of(provider, op, device)
    good = arguments(op, device)
    for name, value in good.items():
        for cache in [value] if isinstance(value, MLACache) else []:
            for bad, got in ((cache.data, "a Tensor"), (None, "None"), ([cache.data], "a list"), ("bf16", "a str")):
                text = said(provider, op, good | {name: bad})
                assert text.startswith(f"latentkv.{op}: {name}: expected an MLACache: CacheLayout.allocate makes one")
                assert text.endswith(f"got {got}")
    if "caches" in good:
        text = said(provider, op, good | {"caches": [cache.data for cache in good["caches"]]})
        assert text.startswith(f"latentkv.{op}: caches[0]: expected an MLACache") and text.endswith("got a Tensor")


@pytest.mark.parametrize("op", OPS)
def test_what_is_no_tensor(op: str, device: str, provider: Provider) -> None:
    """A list, a number, None where there must be one: the argument is named, in one style."""
    call_of(provider, op, device)
    good, optional = arguments(op, device), {a.name for a in OPS[op].arguments if a.optional}
    optional |= {"gather_cache": {"out"}, "decode_prologue": {"q_out"}}.get(op, set())  # which may be allocated
    for name, value in good.items():
        if not isinstance(value, torch.Tensor):
            continue
        for bad, got in (
            ((value.tolist(), "a list"), (3, "a int"), (None, "None"), (value.cpu().numpy(), "a ndarray"))
            if (value.dtype != torch.bfloat16)
            else (([1.0], "a list"), (0.5, "a float"), (None, "None"))
        ):
            if bad is None and name in optional:
                continue
            text = said(provider, op, good | {name: bad})
            assert text == f"latentkv.{op}: {name}: expected a tensor, got {got}", text


@pytest.mark.parametrize("op", [op for op in OPS if any(a.name == "is_neox" for a in OPS[op].arguments)])
def test_a_forgotten_style_of_rotation(op: str, device: str, provider: Provider) -> None:
    """There is no default: each of the two is right for some models."""
    good = arguments(op, device)
    for bad in (None, 1, "neox"):
        text = said(provider, op, good | {"is_neox": bad})
        assert text.startswith(f"latentkv.{op}: is_neox: expected True or False, got ")
    del good["is_neox"]
    assert "is_neox" in said(provider, op, good)


def test_an_op_that_a_provider_lacks(device: str) -> None:
    text = said(providers.native, "mla_decode", arguments("mla_decode", device))
    assert text == "latentkv.mla_decode: provider: expected triton or reference, got native"


def test_a_library_that_was_not_built(python: Python, tmp_path: Path) -> None:
    """Each of its ops says why it cannot run."""
    shutil.copytree(Path(latentkv.__file__).parent, tmp_path / "latentkv", ignore=shutil.ignore_patterns("*.so"))
    code = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
import latentkv, test_first_mistakes as t
for op in latentkv.providers.native._ops:
    text = t.said(latentkv.providers.native, op, t.arguments(op, "cpu"))
    wanted = "provider: expected one that runs on cpu, got native (cpu: the library _cpu was not built)"
    assert text == f"latentkv.{{op}}: {{wanted}}", text
print("named")
"""
    done = python(code, tmp_path)
    assert "named" in done.stdout, done.stderr


CHECKED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from calls import put, run, tensors, valid
from latentkv import providers
from latentkv.ops.description import OPS

said = 0
for name in {names}:
    provider = getattr(providers, name)
    for op in OPS:
        for scale in [n for n in tensors(valid(op)) if "scale" in n] if provider.has(op) else []:
            for value in (0.0, -0.0, -0.5, float("nan"), float("inf"), 1e-40, 0.5):
                call = valid(op, format="fp8_e4m3fn")
                if scale == "q_scale":
                    call["q_out"] = call["q_out"].to(torch.float8_e4m3fn)
                put(call, scale, torch.tensor([value]))
                try:
                    run(provider, op, call)
                    text = ""
                except RuntimeError as error:
                    text = str(error).splitlines()[0]
                bad = not 0 < value < float("inf")
                wanted = f"latentkv.{{op}}: {{scale}}: expected a positive number, got {{value:g}}" * ({on} and bad)
                assert text == wanted, (name, text, wanted)
                said += bool(text)
print("said", said)
"""


@pytest.mark.parametrize(
    ("word", "on"),
    [*((w, True) for w in ("1", "true", "YES", "On")), *((w, False) for w in ("", "0", "no", "11"))],
)
def test_the_words_of_checks(word: str, on: bool, python: Python) -> None:
    """Under them a scale that makes no sense is refused, by whoever computes."""
    names = ("native", "reference", "triton") if word == "1" else ("native",)
    code = CHECKED.format(tests=str(Path(__file__).parent), names=names, on=on)
    done = python(code, LATENTKV_CHECKS=word, TRITON_INTERPRET="1")
    assert done.returncode == 0 and ("said 0" not in done.stdout) == on, done.stderr


def test_checks_are_off_by_default(device: str, provider: Provider) -> None:
    call = valid("write_cache_", device, format="fp8_e4m3fn")
    call["scale"].zero_()
    run(provider, "write_cache_", call)

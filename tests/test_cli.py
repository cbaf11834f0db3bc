"""The command line: what it prints, writes and exits with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latentkv import Platform, providers
from latentkv.cli import app
from latentkv.cli.benchmark import OPS, QUERYLESS, VARIANTS, read_csv, timing
from typer.testing import CliRunner

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide terminal, short times, plain PyTorch uncompiled."""
    monkeypatch.setattr("latentkv.cli.console.width", 160)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("LATENTKV_BACKEND", raising=False)
    monkeypatch.setattr(timing, "_CPU_SECONDS", 0.0)
    monkeypatch.setattr("latentkv.cli.benchmark.streamed_bandwidth", lambda device: 100.0)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)


def run(*args: str | Path) -> tuple[int, str]:
    """Exit status and all output, with runs of blanks and box lines as one blank."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_help() -> None:
    code, out = run("--help")
    assert code == 0
    for command in ("info", "demo", "verify", "bench"):
        assert command in out
        code, page = run(command, "--help")
        assert code == 0
        assert "--device" in page


def test_info() -> None:
    code, out = run("info", "--device", "cpu")
    assert code == 0
    assert f"cpu {Platform('cpu', os.uname().machine).arch}" in out
    assert f"cpu ops {providers.served_by['cpu']}" in out
    assert "CPU_MLA for deepseek-v3, 128 heads" in out
    assert "[B, 16, 576] 1152 bytes a token" in out
    assert "CPU_MLA: chosen: the first that fits" in out


def test_info_names_an_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTKV_BACKEND", "CPU_MLA")
    assert "asked for by LATENTKV_BACKEND" in run("info", "--device", "cpu")[1]
    monkeypatch.setenv("LATENTKV_BACKEND", "FLASHMLA")
    code, out = run("info", "--device", "cpu")
    assert code == 2
    assert "Invalid value for LATENTKV_BACKEND: FLASHMLA does not fit cpu" in out


DEMO = ("demo", "--device", "cpu", "--heads", "4", "--sequences", "2", "--prompt", "19", "--steps", "3")


@pytest.mark.parametrize("args", [(), ("--model", "kimi-k3"), ("--model", "Mistral-4-small", "--format", "fp32")])
def test_demo(args: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "demo.png"
    code, out = run(*DEMO, *args, "--plot", path)
    assert code == 0, out
    assert "CPU_MLA: chosen" in out
    assert "all bytes equal: compared" in out
    assert "in 4 steps" in out
    assert "latentkv fused" in out
    assert "torch.compile" in out
    assert path.read_bytes().startswith(PNG)


def test_demo_copes_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: object, dynamic: bool) -> Callable[..., None]:
        def fail(*args: object) -> None:
            raise RuntimeError("InvalidCxxCompiler: no C++ compiler\nfound in ...")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    code, out = run(*DEMO)
    assert code == 0
    assert "torch.compile: RuntimeError: InvalidCxxCompiler: no C++ compiler" in out


def broken(monkeypatch: pytest.MonkeyPatch, provider: providers.Provider) -> None:
    """Makes the provider's fused op flip one bit of the cache."""
    right = provider.rope_write_cache_

    def wrong(*args: Any, **kwargs: Any) -> None:
        right(*args, **kwargs)
        cache = args[6].data
        if cache.numel():
            cache.view(torch.uint8)[0, 0, 0] ^= 1

    monkeypatch.setattr(provider, "rope_write_cache_", wrong)


def test_demo_finds_a_wrong_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, providers.public)
    code, out = run(*DEMO)
    assert code == 1
    assert "wrong bytes in cache[0] at positions 0..18: 1 of" in out


def test_verify() -> None:
    code, out = run("verify", "--device", "cpu", "--op", "write_cache_", "--format", "fp16")
    assert code == 0, out
    assert "all bytes right in 28 cases" in out
    assert "rope_write_cache_" not in out


def test_verify_of_the_reference() -> None:
    code, out = run("verify", "--device", "cpu", "--provider", "reference", "--op", "rope_")
    assert code == 0
    assert "reference on" in out


MANY = """
import itertools
import torch
from latentkv import CacheLayout, cli
from latentkv.testing import Case

if __name__ == "__main__":
    few = itertools.islice((c for c in cli._cases() if c.op == "rope_" and c.heads == 3), 9)
    cases = [*few, Case("no_op", CacheLayout())]
    for name in ("triton", "native"):
        one, several = (list(cli._verdicts(cases, name, torch.device("cpu"), n)) for n in (1, 2))
        assert one == several, (one, several)
        assert one[:-1] == [(None, None)] * 9 and "ValueError: Case: op" in one[-1][1], one
    print("the same")
"""


def test_verify_in_several_processes(tmp_path: Path) -> None:
    """As for Triton's kernels on a GPU: the same verdicts in the same order as in one."""
    script = tmp_path / "many.py"  # what is spawned reads it again
    script.write_text(MANY)
    environ = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=300)
    assert "the same" in done.stdout, done.stderr


def test_verify_finds_wrong_bytes_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("verify", "--device", "cpu", "--op", "rope_write_cache_", "--format", "fp16")
    provider = getattr(providers, providers.served_by["cpu"])
    broken(monkeypatch, provider)
    code, out = run(*args)
    assert code == 1
    assert "elements differ; first at (0,): 0x" in out
    assert "more" in out
    assert "all bytes right" not in out

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(provider, "rope_write_cache_", fail)
    code, out = run(*args)
    assert code == 1
    assert "RuntimeError: no kernel image" in out


BENCH = ("bench", "--device", "cpu", "--heads", "2", "--tokens", "1,3")


@pytest.mark.parametrize("op", OPS)
def test_bench(op: str, tmp_path: Path) -> None:
    csv, plot, again = tmp_path / "x.csv", tmp_path / "x.png", tmp_path / "again.png"
    code, out = run(*BENCH, "--op", op, "--compile", "--csv", csv, "--plot", plot)
    assert code == 0, out
    assert "vllm: not compared: its ops run on GPUs only" in out
    assert "flashinfer: not compared: its ops run on GPUs only" in out
    assert "speed-up over reference" in out
    assert "times faster: at least, and in the mean" in out
    assert "empty kernels" not in out
    rows, facts = read_csv(csv)
    contenders = {
        "rope_write_cache_": ["latentkv fused", "latentkv pair"],
        "write_cache_grouped_": ["latentkv", "latentkv by layer"],
    }.get(op, ["latentkv"])
    fp8 = Platform("cpu").fp8_format
    formats = {"rope_": ["bf16"], "rope_write_cache_": ["bf16", fp8], "write_indexer_cache_": ["indexer"]}
    pairs = [(f, v) for f in formats.get(op, ["bf16", fp8, "fp8_ds_mla"]) for v in VARIANTS.get(op, ("",))]
    if op == "convert_cache_":  # a variant has its own format
        pairs = list(zip(["bf16", "fp8_e4m3fnuz", "bf16"], VARIANTS[op], strict=True))
    assert [(r.format, r.variant, r.tokens, r.contender) for r in rows] == [
        (f, v, t, c) for f, v in pairs for t in (1, 3) for c in [*contenders, "reference", "torch.compile"]
    ]
    assert {r.heads for r in rows} == {0 if op in QUERYLESS else 2}
    assert facts["latentkv"].endswith(providers.served_by["cpu"])
    code, out = run("bench", "--from", csv, "--plot", again)
    assert code == 0
    assert "speed-up over reference" in out
    for path in (plot, again):
        assert path.read_bytes().startswith(PNG)


def test_bench_of_packed_rows(tmp_path: Path) -> None:
    csv = tmp_path / "x.csv"
    code, out = run(*BENCH, "--model", "deepseek-v4", "--formats", "fp8_model1", "--csv", csv)
    assert code == 0, out
    assert "deepseek-v4, 2 heads, fp8_model1" in out
    assert {r.format for r in read_csv(csv)[0]} == {"fp8_model1"}


def test_bench_exits_with_1_for_wrong_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken(monkeypatch, providers.public)
    csv = tmp_path / "x.csv"
    code, out = run(*BENCH, "--csv", csv)
    assert code == 1
    assert "wrong bytes: see" in out
    assert any(row.wrong for row in read_csv(csv)[0])


@pytest.mark.parametrize(
    ("args", "option", "message"),
    [
        (("demo", "--model", "gpt-2"), "--model", "expected one of"),
        (("info", "--model", "gpt-2"), "--model", "got 'gpt-2'"),
        (("bench", "--model", "gpt-2"), "--model", "expected one of"),
        (("demo", "--backend", "XMLA"), "--backend", "expected FLASHINFER_MLA"),
        (("demo", "--device", "cpu", "--backend", "FLASHMLA"), "--backend", "FLASHMLA does not fit cpu"),
        (("demo", "--format", "int4"), "--format", "got 'int4'"),
        (("demo", "--device", "cpu", "--format", "fp8"), "--format", "no attention backend fits cpu"),
        (("demo", "--heads", "0"), "--heads", ""),  # the words are typer's
        (("demo", "--plot", "no/folder/x.png"), "--plot", "a writable folder, got no/folder/x.png"),
        (
            ("demo", "--plot", "x.txt"),
            "--plot",
            "expected a file name ending in .png or .svg or .pdf, got x.txt",
        ),
        (("verify", "--format", "int4"), "--format", "got 'int4'"),
        (("verify", "--op", "softmax"), "--op", "'softmax' is not one of"),
        (("verify", "--provider", "vllm"), "--provider", "'vllm' is not one of"),
        (
            ("verify", "--device", "cpu", "--provider", "triton"),
            "--provider",
            "expected reference, as on a CPU they need",
        ),
        (("verify", "--op", "mla_decode"), "--op", "attention is not compared by its bytes"),
        (("verify", "--device", "tpu"), "--device", "'tpu' is not one of"),
        (("bench", "--op", "softmax"), "--op", "'softmax' is not one of"),
        (("bench", "--op", "rope_", "--model", "kimi-k3"), "--op", "kimi-k3 has no rotation, got rope_"),
        (("bench", "--formats", "bf16,int4"), "--formats", "got 'int4'"),
        (("bench", "--tokens", "1,many"), "--tokens", "got 'many'"),
        (("bench", "--heads", "0"), "--heads", "got '0'"),
        (("bench", "--csv", "x.json"), "--csv", "ending in .csv, got x.json"),
        (("bench", "--csv", "no/folder/x.csv"), "--csv", "a writable folder"),
        (("bench", "--formats", "fp8_model1"), "--formats", "expected (448, 64) for format fp8_model1"),
        (("bench", "--device", "cpu", "--peer", "vllm"), "--peer", "got none: its ops run on GPUs only"),
        (("bench", "--device", "cpu", "--peer", "flashinfer"), "--peer", "expected flashinfer's ops, got none"),
        (("bench", "--peer", "vllm,sglang"), "--peer", "expected vllm or flashinfer, got 'sglang'"),
        (
            ("bench", "--device", "cpu", "--vllm-library", __file__),
            "--vllm-library",
            "its ops run on GPUs only",
        ),
        (("bench", "--vllm-library", "no.so"), "--vllm-library", "'no.so' does not exist"),
        (("bench", "--from", "no.csv"), "--from", "'no.csv' does not exist"),
        (("bench", "--from", __file__), "--from", "expected a CSV file by latentkv bench"),
    ],
)
def test_bad_input_is_named(
    args: tuple[str, ...], option: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out = run(*args)
    assert code == 2, out
    assert f"Invalid value for {option}" in out.replace("'--", "--").replace("':", ":")
    assert message in out
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    for command in ("info", "demo", "verify", "bench"):
        code, out = run(command, "--device", "cuda")
        assert code == 2
        assert "expected cpu, as torch finds no GPU here, got cuda" in out


@pytest.mark.skipif("cuda" not in providers.library_errors, reason="the GPU library is here")
def test_verify_needs_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    code, out = run("verify", "--device", "cuda", "--provider", "native")
    assert code == 2
    assert "Invalid value for --provider: expected reference, as" in out
    code, out = run("bench", "--device", "cuda")
    assert code == 2
    assert "the GPU has no kernels" in out


def test_python_m(python: Callable[..., Any]) -> None:
    result = python("import runpy, sys; sys.argv = ['x', '--help']; runpy.run_module('latentkv', run_name='__main__')")
    assert result.returncode == 0, result.stderr
    assert "Usage: latentkv" in result.stdout

"""vLLM's server under load, the plugin off and on: ``vllm bench serve`` with its random data set.

    python benchmarks/vllm_serve.py --csv OUT.csv [--lengths 256/128/128,512/256/256] [--rates 1,5,10]

DeepSeek-V2-Lite's shape with random weights and a tokenizer of numbers, made for the purpose. Both servers live at once
and are loaded by turns: off, on, off. The two runs of off show the noise.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from latentkv.testing.engines import TINY, V2_LITE, VLLM_OFFLINE
from rich.console import Console
from rich.table import Table

MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "lite": (V2_LITE, ("--dtype=bfloat16", "--kv-cache-memory-bytes=5G", "--gpu-memory-utilization=0.45")),
    "cpu": (TINY, ("--dtype=float32", "--attention-backend=CPU_MLA")),  # to try this script
}
MODES = ("off", "prologue", "off")
PORTS = {"off": 8731, "prologue": 8732}
ENVIRONMENT = VLLM_OFFLINE | {
    "VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}  # fmt: skip
STARTS_WITHIN_S = 400
FIGURES = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "output_throughput")

app = typer.Typer(pretty_exceptions_enable=False)
console = Console(width=150, highlight=False)


@app.command()
def run(
    path: Annotated[Path, typer.Option("--csv", help="Where the results go.")],
    model: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = "lite",
    lengths: Annotated[str, typer.Option(help="Input/prefix/output tokens.")] = "256/128/128,512/256/256,1024/512/512",
    rates: Annotated[str, typer.Option(help="Requests a second.")] = "1,5,10,25,50",
    requests: Annotated[int, typer.Option(min=1, help="Of each run.")] = 60,
) -> None:
    """Loads both servers, and writes a row for each run as it ends."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        config, options = MODELS[model]
        (place / "config.json").write_text(json.dumps(config))
        make_tokenizer(place, config["vocab_size"])
        with servers(place, options):
            for length in lengths.split(","):
                for rate in rates.split(","):
                    for mode in MODES:
                        found = load(place, PORTS[mode], *map(int, length.split("/")), float(rate), requests)
                        point = {"model": model, "lengths": length, "rate": rate, "mode": mode, "requests": requests}
                        rows.append(point | {name: f"{found[name]:.5g}" for name in FIGURES} | versions())
                        with path.open("w", newline="", encoding="utf-8") as file:
                            writer = csv.DictWriter(file, list(rows[0]))
                            writer.writeheader()
                            writer.writerows(rows)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Medians; the runs of a point one after the other: off, on, off."""
    table = Table("lengths", "rate", *(f"{name}: {', '.join(MODES)}" for name in ("median_ttft_ms", "median_tpot_ms")))
    for i in range(0, len(rows), len(MODES)):
        turns = rows[i : i + len(MODES)]
        figures = (", ".join(row[name] for row in turns) for name in ("median_ttft_ms", "median_tpot_ms"))
        table.add_row(turns[0]["lengths"], turns[0]["rate"], *figures)
    console.print(table)


def versions() -> dict[str, str]:
    """What was measured on what."""
    import torch
    from vllm.version import __version__ as vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"vllm": vllm, "torch": torch.__version__, "device": device}


def make_tokenizer(place: Path, words: int) -> None:
    """A tokenizer whose words are the numbers of its tokens: what it decodes it encodes to the same."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(WordLevel({str(i): i for i in range(words)}, unk_token="0"))
    own.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="1", unk_token="0").save_pretrained(place)


@contextmanager
def servers(place: Path, options: tuple[str, ...]) -> Iterator[None]:
    """A server for each setting, in its own process; they end with the block."""
    running = {}
    try:
        for mode, port in PORTS.items():
            command = [sys.executable, __file__, "server", str(place), f"--port={port}", *options]
            with (place / f"{mode}.log").open("w") as log:
                running[mode] = subprocess.Popen(
                    command, env=os.environ | ENVIRONMENT | {"LATENTKV_VLLM": mode}, stdout=log, stderr=log
                )
        begun = time.perf_counter()
        for mode, process in running.items():
            while not healthy(PORTS[mode]):
                if process.poll() is not None or time.perf_counter() - begun > STARTS_WITHIN_S:
                    console.print((place / f"{mode}.log").read_text()[-6000:], markup=False)
                    raise typer.Exit(1)
                time.sleep(0.5)
            console.print(f"{mode}: ready after {time.perf_counter() - begun:.0f} s")
        yield
        for mode in running:
            for line in (place / f"{mode}.log").read_text().splitlines():
                if "latentkv" in line:
                    console.print(f"{mode}: {line}", markup=False)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def healthy(port: int) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def load(place: Path, port: int, new: int, prefix: int, answer: int, rate: float, requests: int) -> dict[str, Any]:
    """The figures of ``vllm bench serve``, whose code it runs in this process."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: argparse.ArgumentParser = FlexibleArgumentParser()
    add_cli_args(parser)
    return main(parser.parse_args([  # type: ignore[no-any-return]
        "--backend=openai", f"--base-url=http://127.0.0.1:{port}", f"--model={place}", "--dataset-name=random",
        f"--random-input-len={new}", f"--random-prefix-len={prefix}", f"--random-output-len={answer}",
        f"--num-prompts={requests}", f"--request-rate={rate}", "--ignore-eos", "--disable-tqdm", "--temperature=0",
        "--num-warmups=4", "--percentile-metrics=ttft,tpot", "--metric-percentiles=99",
    ]))  # fmt: skip


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def server(context: typer.Context, place: str) -> None:
    """One server in this process; what ``run`` starts."""
    from latentkv.testing.vllm import fill_weights

    fill_weights()
    sys.argv = ["api_server", f"--model={place}", "--load-format=dummy", "--max-model-len=4096", "--max-num-seqs=128"]
    sys.argv += context.args
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    app()

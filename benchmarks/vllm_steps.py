"""Decode steps of vLLM with the plugin off and on, and with vLLM's own fusion pass, by turns.

    python benchmarks/vllm_steps.py run --csv OUT.csv [--points lite,lite-fp8-flashmla] [--modes off,own,rope,prologue]

Each engine has a process of its own, with random weights. A step's time is that of 65 tokens less that of one, by 64.
The kernels of one layer, as a profiler saw them, go to OUT.kernels.txt.
"""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from latentkv.testing.engines import TINY, V2_LITE, V3, VLLM_OFFLINE, fill_vllm_weights
from rich.console import Console
from rich.table import Table

FEW = {"num_hidden_layers": 8, "n_routed_experts": 8}
# Model and engine of each point. V3: one of eight ranks' share of a layer, in few layers of few experts.
POINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lite": (V2_LITE, {"attention_backend": "FLASH_ATTN_MLA"}),
    "lite-fp8-flashmla": (V2_LITE, {"attention_backend": "FLASHMLA", "kv_cache_dtype": "fp8"}),
    "lite-fp8-triton": (V2_LITE, {"attention_backend": "TRITON_MLA", "kv_cache_dtype": "fp8"}),
    "v3": (
        V2_LITE | V3 | FEW | {"hidden_size": 7168, "moe_intermediate_size": 256},
        {"attention_backend": "FLASH_ATTN_MLA"},
    ),
    "cpu": (TINY, {"attention_backend": "CPU_MLA", "dtype": "float32"}),  # to try this script
}  # fmt: skip
OWN_PASS = {
    "use_inductor_graph_partition": True, "custom_ops": ["+rotary_embedding"],
    "pass_config": {"fuse_rope_kvcache_cat_mla": True},
}  # fmt: skip
MODES = ("off", "own", "rope", "prologue")
BATCHES = (1, 8, 32, 128)
PROMPT, TOKENS, REPETITIONS = 128, 64, 3
ENVIRONMENT = VLLM_OFFLINE | {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}

app = typer.Typer(pretty_exceptions_enable=False)
console = Console(width=150, highlight=False)


@app.command()
def run(
    path: Annotated[Path, typer.Option("--csv", help="Where the results go; OUT.kernels.txt lies beside it.")],
    points: Annotated[str, typer.Option(help=f"Of {', '.join(POINTS)}.")] = "lite",
    modes: Annotated[str, typer.Option(help="Of off, own (vLLM's fusion pass), rope, prologue.")] = ",".join(MODES),
    rounds: Annotated[int, typer.Option(min=1, help="In which every mode has its turn.")] = 2,
    batches: Annotated[str, typer.Option(help="Sequences of a step.")] = ",".join(map(str, BATCHES)),
) -> None:
    """Times decode steps of vLLM's engine."""
    rows: list[dict[str, Any]] = []
    kernels: list[str] = []
    for point in points.split(","):
        for turn in range(rounds):
            for mode in modes.split(","):
                found = _engine_process(point, mode, batches)
                rows += [{"point": point, "mode": mode, "turn": turn, **row} for row in found["rows"]]
                if turn == 0:
                    kernels += [f"{point}, {mode}: {line}" for line in found["kernels"]]
                with path.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)
                path.with_suffix(".kernels.txt").write_text("\n".join(kernels) + "\n", encoding="utf-8")
        _print(point, [row for row in rows if row["point"] == point])


def _engine_process(point: str, mode: str, batches: str) -> Any:
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, "engine", point, mode, place, "--batches", batches]
        switch = {"LATENTKV_VLLM": "off" if mode == "own" else mode}
        begun = time.perf_counter()
        done = subprocess.run(command, env=os.environ | ENVIRONMENT | switch, capture_output=True, text=True)
        log = done.stdout + done.stderr
        console.print(f"{point}, {mode}: {time.perf_counter() - begun:.0f} s, exit status {done.returncode}")
        for line in log.splitlines() if not done.returncode else log.splitlines()[-60:]:
            if "latentkv" in line or done.returncode:
                console.print("  " + line, markup=False)
        if done.returncode:
            raise typer.Exit(1)
        return json.loads((Path(place) / "result.json").read_text())


@app.command()
def engine(point: str, mode: str, place: Path, batches: str = ",".join(map(str, BATCHES))) -> None:
    """One engine in this process; what ``run`` starts."""
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    model, arguments = POINTS[point]
    sizes = [int(n) for n in batches.split(",")]
    (place / "config.json").write_text(json.dumps(model))
    fill_vllm_weights()
    gpu = torch.cuda.is_available()
    compilation: dict[str, Any] = {"cudagraph_capture_sizes": sizes} if gpu else {}
    begun = time.perf_counter()
    llm = LLM(
        model=str(place), load_format="dummy", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=max(sizes),
        seed=0, gpu_memory_utilization=0.85, enable_prefix_caching=False,
        compilation_config=compilation | (OWN_PASS if mode == "own" else {}), **{"dtype": "bfloat16"} | arguments,
    )  # fmt: skip
    start_s = time.perf_counter() - begun

    def seconds(batch: int, tokens: int) -> float:
        vocab = model["vocab_size"]
        prompts = [[(7 * i * (k + 3) + 3 * k) % (vocab - 2) + 2 for i in range(PROMPT)] for k in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return time.perf_counter() - begun

    device = torch.cuda.get_device_name() if gpu else "CPU"
    rows, kernels = [], []
    for batch in sizes:
        seconds(batch, 4)
        steps = [(seconds(batch, 1 + TOKENS) - seconds(batch, 1)) / TOKENS * 1e3 for _ in range(REPETITIONS)]
        rows.append({
            "batch": batch, "step_ms": f"{statistics.median(steps):.5g}", "fastest_ms": f"{min(steps):.5g}",
            "start_s": f"{start_s:.1f}", "device": device, "torch": torch.__version__, "vllm": vllm.__version__,
        })  # fmt: skip
        if gpu and batch in (1, 32):
            kernels += [f"batch {batch}: {line}" for line in _layer_kernels(lambda n=batch: seconds(n, 6))]
    (place / "result.json").write_text(json.dumps({"rows": rows, "kernels": kernels}))


def _layer_kernels(call: Any) -> list[str]:
    """From one layer's attention to the next layer's, late in a decode step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
    events = [e for e in profiled.events() if e.device_type.name == "CUDA"]
    events = sorted(events, key=lambda e: e.time_range.start)[-900:]
    attention = re.compile(r"flash(?!.*combine)|mla|_fwd_grouped_kernel_stage1", re.IGNORECASE)
    at = [i for i, e in enumerate(events) if attention.search(e.name)]
    if len(at) < 12:
        return []
    layer = events[at[-12] : at[-11] + 1]
    return [f"{e.time_range.end - e.time_range.start:8.2f} us  {e.name[:140]}" for e in layer]


def _print(point: str, rows: list[dict[str, Any]]) -> None:
    """Medians over the turns; ratios are speed-ups over off."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    table = Table("batch", *(f"{mode}, ms" for mode in modes), *(f"{mode}, x" for mode in modes[1:]), title=point)
    for batch in dict.fromkeys(row["batch"] for row in rows):
        ms = [
            statistics.median(float(row["step_ms"]) for row in rows if (row["mode"], row["batch"]) == (mode, batch))
            for mode in modes
        ]
        table.add_row(str(batch), *(f"{x:.4g}" for x in ms), *(f"{ms[0] / x:.3f}" for x in ms[1:]))
    console.print(table)


if __name__ == "__main__":
    app()

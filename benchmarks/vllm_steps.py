"""vLLM's engine with the plugin off and on, and with vLLM's own fusion pass: decode steps, kernels, accuracy.

    python benchmarks/vllm_steps.py steps --csv OUT.csv [--points lite,lite-fp8-flashmla] [--modes off,prologue]
    python benchmarks/vllm_steps.py accuracy --csv OUT.csv [--points lite,lite-fp8-flashmla] [--modes off,prologue]

Weights are random, of unit gain. The engines of all modes live at once, each in a process of its own, and take turns:
so the GPU has to hold the weights of all of them. A step's time is that of 65 tokens less that of one, by 64; beside it
stands the GPU's part, the time of the step's CUDA graph. The kernels of one layer, as a profiler saw them, go to
OUT.kernels.txt.
"""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from latentkv.testing.engines import TINY, V2_LITE, V3, VLLM_OFFLINE
from rich.console import Console
from rich.table import Table

# Model and engine of each point. V3: one of eight ranks' share of a layer, of few experts. With fewer layers the host
# needs more time for a step than the GPU.
FEW = {"num_hidden_layers": 30, "n_routed_experts": 8}
POINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lite": (V2_LITE, {"attention_backend": "FLASH_ATTN_MLA"}),
    "lite-fp8-flashmla": (V2_LITE, {"attention_backend": "FLASHMLA", "kv_cache_dtype": "fp8"}),
    "lite-fp8-triton": (V2_LITE, {"attention_backend": "TRITON_MLA", "kv_cache_dtype": "fp8"}),
    "v3": (
        V2_LITE | V3 | FEW | {"hidden_size": 7168, "moe_intermediate_size": 256},
        {"attention_backend": "FLASH_ATTN_MLA"},
    ),
    "cpu": (TINY, {"attention_backend": "CPU_MLA"}),  # to try this script
}  # fmt: skip
OWN_PASS = {
    "use_inductor_graph_partition": True, "custom_ops": ["+rotary_embedding"],
    "pass_config": {"fuse_rope_kvcache_cat_mla": True},
}  # fmt: skip
FORCED = {"max_logprobs": -1, "logits_processors": ["latentkv.testing.vllm:Forced"]}
BATCHES = "1,8,32,128"
PROMPT, TOKENS = 128, 64
ANSWERS, ANSWER = 8, 32  # of the comparison with fp32: requests, and tokens of each
ENVIRONMENT = VLLM_OFFLINE | {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}

app = typer.Typer(pretty_exceptions_enable=False)
console = Console(width=150, highlight=False)
Points = Annotated[str, typer.Option(help=f"Of {', '.join(POINTS)}.")]
Modes = Annotated[str, typer.Option(help="Of off, own (vLLM's fusion pass), rope, prologue.")]
Csv = Annotated[Path, typer.Option("--csv", help="Where the results go.")]


@app.command()
def steps(
    path: Csv,
    points: Points = "lite",
    modes: Modes = "off,prologue",
    repetitions: Annotated[int, typer.Option(min=1, help="In which every mode has its turn.")] = 5,
    batches: Annotated[str, typer.Option(help="Sequences of a step.")] = BATCHES,
) -> None:
    """Times decode steps; kernels of a layer go to OUT.kernels.txt."""
    sizes = [int(n) for n in batches.split(",")]
    rows: list[dict[str, Any]] = []
    kernels: list[str] = []
    for point in points.split(","):
        with engines(*POINTS[point], modes.split(","), sizes) as running:
            for batch in sizes:
                for engine in running.values():
                    engine("seconds", batch, 4)
                for turn in range(repetitions):
                    for mode, engine in running.items():
                        found = {"point": point, "mode": mode, "batch": batch, "turn": turn}
                        rows.append(found | engine("step", batch) | engine.facts)
                _write(path, rows)
            for mode, engine in running.items():
                for batch in {1, 32} & set(sizes):
                    kernels += [f"{point}, {mode}, batch {batch}: {line}" for line in engine("layer_kernels", batch)]
            path.with_suffix(".kernels.txt").write_text("\n".join(kernels) + "\n", encoding="utf-8")
        _print(point, [row for row in rows if row["point"] == point])


@app.command()
def accuracy(path: Csv, points: Points = "lite", modes: Modes = "off,prologue", layers: int = 4) -> None:
    """Log probabilities of forced answers, against vLLM in fp32 without MLA's absorbed form, of so many layers."""
    rows: list[dict[str, Any]] = []
    for point in points.split(","):
        model, arguments = POINTS[point]
        few = model | {"num_hidden_layers": layers, "vocab_size": 2048}
        with engines(few, arguments | FORCED, ["fp32", *modes.split(",")], [ANSWERS]) as running:
            exact, *found = (engine("log_probabilities") for engine in running.values())
        for mode, own in zip(modes.split(","), found, strict=True):
            error = (own - exact).abs()
            rows.append({
                "point": point, "mode": mode, "layers": layers,
                "mean_error": f"{error.mean():.4g}", "largest_error": f"{error.max():.4g}",
                "same_best": f"{(own.argmax(-1) == exact.argmax(-1)).float().mean():.4f}",
            } | running[mode].facts)  # fmt: skip
            console.print(rows[-1])
        _write(path, rows)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _print(point: str, rows: list[dict[str, Any]]) -> None:
    """Medians over the turns; ratios are speed-ups over the first mode."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    table = Table("batch", "of", *(f"{mode}, ms" for mode in modes), *(f"{mode}, x" for mode in modes[1:]), title=point)
    for batch, (of, column) in itertools.product(
        dict.fromkeys(row["batch"] for row in rows), {"step": "step_ms", "GPU": "gpu_ms"}.items()
    ):
        ms = [
            statistics.median(float(row[column]) for row in rows if (row["mode"], row["batch"]) == (mode, batch))
            for mode in modes
        ]
        table.add_row(str(batch), of, *(f"{x:.4g}" for x in ms), *(f"{ms[0] / x:.3f}" for x in ms[1:]))
    console.print(table)


# ------------------------------------------------------------------------------------------------- engines


class Remote:
    """An engine in a process of its own."""

    def __init__(self, log: Path, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._log = log
        self._end, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, log, *arguments))
        self._process.start()
        other.close()
        self.facts: dict[str, str] = {}

    def wait(self) -> None:
        """Until it has started."""
        self.facts = self._answer()

    def __call__(self, method: str, *arguments: Any) -> Any:
        """The result of a method of :class:`Engine`."""
        self._end.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self._end.recv()
        except EOFError:
            console.print(self._log.read_text()[-6000:], markup=False)
            raise typer.Exit(1) from None

    def stop(self) -> None:
        """Ends it."""
        self._end.close()
        self._process.join()


@contextmanager
def engines(
    model: dict[str, Any], arguments: dict[str, Any], modes: list[str], batches: list[int]
) -> Iterator[dict[str, Remote]]:
    """An engine for each mode."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(model))
        begun = time.perf_counter()
        running: dict[str, Remote] = {}
        for mode in modes:
            log = Path(place) / f"{mode}.log"
            running[mode] = Remote(log, place, mode, arguments, batches, 0.9 / len(modes))
            stack.callback(running[mode].stop)
        for mode, engine in running.items():
            engine.wait()
            console.print(f"{mode}: ready after {time.perf_counter() - begun:.0f} s")
        yield running
        for mode in modes:  # which layers were served is said at the first step
            for line in (Path(place) / f"{mode}.log").read_text().splitlines():
                if "latentkv" in line:
                    console.print(f"{mode}: {line}", markup=False)


def serve(end: Connection, log: Path, *arguments: Any) -> None:
    """What an engine's process does: methods of an engine, as they are asked for."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    engine = Engine(*arguments)
    end.send(engine.facts)
    while True:
        try:
            method, given = end.recv()
        except EOFError:
            sys.stdout.flush()
            os._exit(0)  # a graceful end of vLLM takes longer, and has nothing left to do
        end.send(getattr(engine, method)(*given))


class Engine:
    """vLLM's engine in this process."""

    def __init__(self, place: str, mode: str, arguments: dict[str, Any], batches: list[int], share: float) -> None:
        os.environ.update(ENVIRONMENT | {"LATENTKV_VLLM": mode if mode in ("rope", "prologue") else "off"})
        if mode == "fp32":
            os.environ["VLLM_MLA_DISABLE"] = "1"
            kind = "TRITON_ATTN" if arguments["attention_backend"] != "CPU_MLA" else "CPU_ATTN"
            arguments = FORCED | {"attention_backend": kind, "dtype": "float32"}
        import torch
        import vllm
        from latentkv.testing.vllm import fill_weights

        self._torch, self._vllm, self._gpu = torch, vllm, torch.cuda.is_available()
        fill_weights()
        compilation: dict[str, Any] = {"cudagraph_capture_sizes": batches} if self._gpu else {}
        begun = time.perf_counter()
        self._llm = vllm.LLM(
            model=place, load_format="dummy", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=max(batches),
            seed=0, gpu_memory_utilization=share, kv_cache_memory_bytes=3 << 30, enable_prefix_caching=False,
            compilation_config=compilation | (OWN_PASS if mode == "own" else {}), **{"dtype": "bfloat16"} | arguments,
        )  # fmt: skip
        self._vocabulary = self._llm.model_config.get_vocab_size()
        self.facts = {
            "start_s": f"{time.perf_counter() - begun:.1f}", "vllm": vllm.__version__, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self._gpu else "CPU",
        }  # fmt: skip

    def _prompts(self, batch: int) -> list[Any]:
        words = self._vocabulary - 2
        texts = [[(7 * i * (k + 3) + 3 * k) % words + 2 for i in range(PROMPT)] for k in range(batch)]
        return [{"prompt_token_ids": text} for text in texts]

    def seconds(self, batch: int, tokens: int) -> float:
        """Of so many tokens each for so many requests."""
        params = self._vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        self._llm.generate(self._prompts(batch), params, use_tqdm=False)
        return time.perf_counter() - begun

    def step(self, batch: int) -> dict[str, str]:
        """Milliseconds of a decode step, and of its CUDA graph alone, the median."""
        with self._timed_graphs() as graphs:
            long = self.seconds(batch, 1 + TOKENS)
        ms = (long - self.seconds(batch, 1)) / TOKENS * 1e3
        decoding = graphs[-TOKENS // 2 :]
        if len({graph for graph, *_ in decoding}) > 1:
            raise RuntimeError(f"a decode step of {batch} is not one CUDA graph")
        times = [begin.elapsed_time(end) for _, begin, end in decoding]
        return {"step_ms": f"{ms:.5g}", "gpu_ms": f"{statistics.median(times) if times else float('nan'):.5g}"}

    @contextmanager
    def _timed_graphs(self) -> Iterator[list[tuple[Any, Any, Any]]]:
        """The replays of CUDA graphs, each with events before and after it."""
        found: list[tuple[Any, Any, Any]] = []
        own = self._torch.cuda.CUDAGraph.replay

        def replay(graph: Any) -> None:
            begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            own(graph)
            end.record()
            found.append((graph, begin, end))

        self._torch.cuda.CUDAGraph.replay = replay
        try:
            yield found
        finally:
            self._torch.cuda.CUDAGraph.replay = own

    def layer_kernels(self, batch: int) -> list[str]:
        """From one layer's attention to the next layer's, late in a decode step."""
        from torch.profiler import ProfilerActivity, profile

        if not self._gpu:
            return []
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.seconds(batch, 6)
        events = [e for e in profiled.events() if e.device_type.name == "CUDA"]
        events = sorted(events, key=lambda e: e.time_range.start)[-900:]
        attention = re.compile(r"FlashAttnFwdSm90|flash_fwd_splitkv_mla_kernel|_fwd_grouped_kernel_stage1")
        at = [i for i, e in enumerate(events) if attention.search(e.name)]
        if len(at) < 6:
            return []
        layer = events[at[-6] : at[-5] + 1]
        return [f"{e.time_range.end - e.time_range.start:8.2f} us  {e.name[:140]}" for e in layer]

    def log_probabilities(self) -> Any:
        """[answers, tokens, vocabulary]: of answers that are forced, so that every engine sees the same text."""
        answers = [[(5 * i * (k + 2) + k) % (self._vocabulary - 2) + 2 for i in range(ANSWER)] for k in range(ANSWERS)]
        params = [
            self._vllm.SamplingParams(
                temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False, logprobs=-1,
                extra_args={"answer": answer},
            )
            for answer in answers
        ]  # fmt: skip
        done = self._llm.generate(self._prompts(ANSWERS), params, use_tqdm=False)
        tokens = [list(request.outputs[0].token_ids) for request in done]
        assert tokens == answers, "the answers were not forced"
        rows = [[[at[t].logprob for t in range(self._vocabulary)] for at in r.outputs[0].logprobs] for r in done]
        return self._torch.tensor(rows)


if __name__ == "__main__":
    app()

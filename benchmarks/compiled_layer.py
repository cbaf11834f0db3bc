"""A decode layer under torch.compile on a GPU, the fusion pass off and on: kernels, time, compile time.

    python benchmarks/compiled_layer.py --csv OUT.csv [--vllm-library _C_stable_libtorch.abi3.so]

The layer is DeepSeek's attention at its real size over 128 tokens of context, compiled for any number of tokens (one
apart) and captured in CUDA graphs. Beside its time stands what the kernel benchmark says that fusing saves: the time of
what the pass replaces less that of rope_write_cache_, each alone in a graph. Every kernel of the layer, as a profiler
saw it, goes to OUT.kernels.txt. Outputs and caches must be the same bits off and on, else the exit status is 1.
"""

from __future__ import annotations

import csv
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, cast

import latentkv as lk
import torch
import typer
from latentkv.cli.benchmark import FUSED, VLLM, Bench, environment, provider_call, rope_table, time_calls
from latentkv.cli.benchmark.contenders import in_turn, pair_call, plain_call, plain_update
from latentkv.models import Model, model
from latentkv.testing.mla import DIRECT, Batch, MLAAttention, Style, decode_attention, forward_context
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._inductor.utils import fresh_cache

MODELS = (("deepseek-v3", 128, 7168, 1536), ("deepseek-v3", 16, 7168, 1536), ("deepseek-v2-lite", 16, 2048, None))
CONTEXT, BLOCK_SIZE = 128, 64
CALLS = 8  # of the layer in one graph, to spread what a replay costs by itself
REPLAYS = 200
GEMM = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitk", re.IGNORECASE)
REDUCTION = re.compile(r"^triton_(per|red)_")  # Inductor's RMSNorm
DEVICE = torch.device("cuda")
Graph = torch.cuda.CUDAGraph
console = Console(width=150, highlight=False)


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        overlap: whether our kernels start by programmatic dependent launch, which is the default.
        kernels: before attention, projections (matrix products) left out.
        rope_and_write_kernels: of these, all that are not RMSNorm.
        layer_us: the median of many replays; those of off and on take turns.
        saving_us: off less on, the median over pairs of replays.
        predicted_saving_us: the same of the ops alone.
        compile_s: first call with fresh caches, the median; off and on take turns.
    """

    model: str
    heads: int
    tokens: int
    style: str
    mode: str
    overlap: bool
    kernels: int
    rope_and_write_kernels: int
    layer_us: float
    saving_us: float
    predicted_saving_us: float
    compile_s: float
    device: str
    torch: str


@dataclass(frozen=True, eq=False)
class Case:
    """A layer of a style, and its cache."""

    model: Model
    heads: int
    hidden_size: int
    q_lora_rank: int | None
    style: Style

    @cached_property
    def cache(self) -> lk.MLACache:
        """128 sequences, rows random, whatever is written."""
        layout = lk.CacheLayout(self.model.kv_lora_rank, self.model.rope_dim, BLOCK_SIZE, "bf16")
        cache = layout.allocate(128 * CONTEXT // BLOCK_SIZE, DEVICE, scale=1.0)  # vLLM's op wants a scale always
        cache.data.normal_(generator=torch.Generator(DEVICE).manual_seed(1))
        return cache

    @cached_property
    def layer(self) -> MLAAttention:
        """With the cos/sin table in 16 bits, with which vLLM's rope rounds as ours does."""
        table = rope_table(self.model, torch.bfloat16, DEVICE)
        assert table is not None
        return MLAAttention(
            "layer", self.model, table, hidden_size=self.hidden_size, q_lora_rank=self.q_lora_rank, heads=self.heads,
            style=self.style, cache=self.cache if self.style in DIRECT else None,
        )  # fmt: skip

    def batch(self, tokens: int) -> Batch:
        """One new token each, the last of its context."""
        blocks = torch.arange(self.cache.num_blocks, device=DEVICE).view(-1, CONTEXT // BLOCK_SIZE)
        return Batch.of([CONTEXT] * tokens, [1] * tokens, blocks, BLOCK_SIZE)

    def inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """Of the layer."""
        tokens = len(batch.positions)
        generator = torch.Generator(DEVICE).manual_seed(2)
        hidden = torch.randn(tokens, self.hidden_size, generator=generator, device=DEVICE).bfloat16()
        slots = batch.slot_mapping if self.style in DIRECT else None
        for t in (hidden, batch.positions, batch.slot_mapping):
            if tokens > 1:  # a graph for one token is a graph of its own
                torch._dynamo.mark_dynamic(t, 0)
        return hidden, batch.positions, slots


@dataclass(frozen=True, eq=False)
class Capture:
    """The compiled layer in a CUDA graph of CALLS calls.

    Attributes:
        output: what the last call gives.
        kernels: the names of what one call launches, in order.
        held: what the graph reads from must not be freed.
    """

    graph: Graph
    output: Tensor
    kernels: list[str]
    held: object


def switched(on: bool) -> AbstractContextManager[Any]:
    """The pass, off or on."""
    return lk.compile.enable(strict=True) if on else nullcontext()


@contextmanager
def overlapping(overlap: bool) -> Iterator[None]:
    """With or without programmatic dependent launch, for what is captured meanwhile."""
    lk.providers.set_overlap(overlap)
    try:
        yield
    finally:
        lk.providers.set_overlap(True)


def captured(call: Callable[[], Tensor], held: object) -> Capture:
    """The call in a graph."""
    names = kernels(call)  # warms up, too
    graph = Graph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            output = call()
    return Capture(graph, output, names, (call, held))


def kernels(call: Callable[[], Tensor]) -> list[str]:
    """The names of the kernels that a call launches, in order."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert events, "the profiler saw no kernel"
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def capture_all(case: Case, on: bool, all_tokens: Sequence[int]) -> dict[tuple[int, bool], Capture]:
    """The layer, compiled anew, by tokens and overlap."""
    torch.compiler.reset()
    compiled, captures = torch.compile(case.layer, fullgraph=True), {}
    with switched(on):
        for tokens in sorted(all_tokens, reverse=True):
            batch = case.batch(tokens)
            call = partial(compiled, *case.inputs(batch))
            for overlap in (True, False):
                with forward_context({"layer": case.cache}, batch), overlapping(overlap):
                    captures[tokens, overlap] = captured(call, batch)
    return captures


def compile_seconds(case: Case, repetitions: int) -> tuple[float, float]:
    """Of a first call with fresh caches, off and on: the medians."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    batch = case.batch(8)
    inputs = case.inputs(batch)
    for repetition in range(repetitions + 1):
        for on in (False, True) if repetition % 2 else (True, False):
            torch.compiler.reset()
            with fresh_cache(), switched(on), forward_context({"layer": case.cache}, batch):
                start = time.perf_counter()
                torch.compile(case.layer, fullgraph=True)(*inputs)
                torch.cuda.synchronize()
                if repetition:  # the first one starts Inductor's workers
                    seconds[on].append(time.perf_counter() - start)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def layer_times(off: Graph, on: Graph) -> tuple[float, float, float]:
    """Microseconds of a layer off and on, and the difference: medians. Nothing waits between the replays."""
    graphs = (off, on) * REPLAYS
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * len(graphs))]
    for graph in graphs[:20]:
        graph.replay()
    for graph, start, end in zip(graphs, marks[::2], marks[1::2], strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [1e3 * start.elapsed_time(end) / CALLS for start, end in zip(marks[::2], marks[1::2], strict=True)]
    savings = [a - b for a, b in zip(times[::2], times[1::2], strict=True)]
    return statistics.median(times[::2]), statistics.median(times[1::2]), statistics.median(savings)


def before_attention(case: Case, tokens: int, names: Sequence[str]) -> list[str]:
    """Of the kernels of a layer those before attention's, which are known by the one that attention starts with."""
    m, batch = case.model, case.batch(tokens)
    q = torch.zeros(tokens, case.heads, m.kv_lora_rank + m.rope_dim, dtype=torch.bfloat16, device=DEVICE)
    parts = q.split([m.kv_lora_rank, m.rope_dim], -1)
    with forward_context({"layer": case.cache}, batch):
        first, *_ = kernels(partial(decode_attention, *parts, case.cache.data, case.layer.layer, 1.0))
    return list(names[: names.index(first)])


def predicted_saving(bench: Bench, case: Case, tokens: int, vllm: VLLM | None) -> float:
    """Microseconds that the ops alone save: those that the pass replaces, less the fused one."""
    layout = case.cache.layout
    inputs = [bench.inputs(FUSED, case.heads, tokens, layout, seed=seed) for seed in range(8)]
    if case.style == "vllm":
        assert vllm is not None
        pairs = [c for c in vllm.contenders(FUSED, "", layout, True) if c.name == "vllm pair"]
        unfused = pairs[0].bind
    elif case.style == "op":
        # RMSNorm reads the projection after RoPE has worked on its other part, so torch clones it: a launch more.
        projection = torch.empty(tokens, layout.kv_lora_rank + layout.rope_dim, dtype=torch.bfloat16, device=DEVICE)

        def unfused(x: Any) -> Callable[[], object]:
            return in_turn(projection.clone, pair_call(x))
    else:
        torch.compiler.reset()
        rope = torch.compile(plain_update, dynamic=False)

        def unfused(x: Any) -> Callable[[], object]:
            return in_turn(plain_call(rope, "rope_", x), provider_call(lk.providers.public, "write_cache_", x))

    fused = partial(provider_call, lk.providers.public, FUSED)
    before, after = (time_calls([bind(x) for x in inputs], DEVICE).p50 for bind in (unfused, fused))
    return before - after


def same_bits(case: Case, off: Capture, on: Capture) -> bool:
    """Whether a replay of either gives the same output and cache."""
    results, before = [], case.cache.data.clone()
    for capture in (off, on):
        case.cache.data.copy_(before)
        capture.output.zero_()
        capture.graph.replay()
        results.append([t.view(torch.int16).clone() for t in (capture.output, case.cache.data)])
    case.cache.data.copy_(before)
    return all(map(torch.equal, *results))


def measure(
    bench: Bench,
    case: Case,
    all_tokens: Sequence[int],
    compile_s: tuple[float, float],
    vllm: VLLM | None,
    log: list[str],
) -> tuple[list[Row], bool]:
    """Two rows, off and on, for each number of tokens, with overlap and without; and whether all bits agree."""
    captures = {mode: capture_all(case, mode == "on", all_tokens) for mode in ("off", "on")}
    facts = (torch.cuda.get_device_name(), torch.__version__)
    rows, same = [], True
    for tokens in all_tokens:
        for overlap in (True, False):
            off, on = (captures[mode][tokens, overlap] for mode in ("off", "on"))
            same &= same_bits(case, off, on)
            *layer_us, saving = layer_times(off.graph, on.graph)
            with overlapping(overlap):
                predicted = predicted_saving(bench, case, tokens, vllm)
            for mode, capture, us, seconds in zip(("off", "on"), (off, on), layer_us, compile_s, strict=True):
                before = before_attention(case, tokens, capture.kernels)
                rest = [name for name in before if not GEMM.search(name)]
                updates = [name for name in rest if not REDUCTION.search(name)]
                what = (case.model.name, case.heads, tokens, case.style, mode, overlap)
                rows.append(Row(*what, len(rest), len(updates), us, saving, predicted, seconds, *facts))
                if overlap:
                    log.append(f"{case.model.name}, {case.heads} heads, {case.style}, {tokens} tokens, {mode}:")
                    for i, name in enumerate(capture.kernels):
                        mark = " " if i >= len(before) or name not in rest else "*" if name in updates else "+"
                        log.append(f"  {mark} {name[:200]}")
    return rows, same


def print_rows(rows: Sequence[Row]) -> None:
    """A table, off and on in one line."""
    table = Table("model", "heads", "style", "tokens", "overlap")
    for heading in ("kernels", "rope, write", "layer us", "saved us", "predicted us", "compile s"):
        table.add_column(heading, justify="right")
    for off, on in zip(rows[::2], rows[1::2], strict=True):
        table.add_row(
            on.model, str(on.heads), on.style, str(on.tokens), "yes" if on.overlap else "no",
            f"{off.kernels} > {on.kernels}", f"{off.rope_and_write_kernels} > {on.rope_and_write_kernels}",
            f"{off.layer_us:.2f} > {on.layer_us:.2f}", f"{on.saving_us:.2f}", f"{on.predicted_saving_us:.2f}",
            f"{off.compile_s:.2f} > {on.compile_s:.2f}",
        )  # fmt: skip
    console.print(table)


def main(
    path: Annotated[Path, typer.Option("--csv", help="Where the results go; OUT.kernels.txt lies beside it.")],
    vllm_library: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="vLLM's ops.")] = None,
    styles: Annotated[str, typer.Option(help="Of rope and update; vllm needs the library.")] = "op,pytorch",
    tokens: Annotated[str, typer.Option(help="Of a step.")] = "1,8,32,128",
    repetitions: Annotated[int, typer.Option(min=1, help="Of compile times.")] = 5,
) -> None:
    """Time DeepSeek's decode layers with the fusion pass off and on."""
    os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}  # profiles and CUDA graphs in one process
    torch._inductor.config.emulate_precision_casts = True  # rope in PyTorch rounds as it does in eager
    vllm = VLLM(DEVICE, vllm_library) if vllm_library else None
    console.print(", ".join(f"{k} {v}" for k, v in environment(DEVICE, [vllm] if vllm else []).items() if v))
    rows, log, wrong = list[Row](), ["* rotates or writes, + RMSNorm"], list[str]()
    compile_s: dict[tuple[str, str], tuple[float, float]] = {}  # the number of heads plays no part
    with torch.no_grad():
        for name, heads, hidden_size, q_lora_rank in MODELS:
            bench = Bench(model(name), DEVICE)
            for style in styles.split(","):
                case = Case(bench.model, heads, hidden_size, q_lora_rank, cast(Style, style))
                if (name, style) not in compile_s:
                    compile_s[name, style] = compile_seconds(case, repetitions)
                all_tokens = [int(t) for t in tokens.split(",")]
                new, same = measure(bench, case, all_tokens, compile_s[name, style], vllm, log)
                rows += new
                wrong += [] if same else [f"{name}, {heads} heads, {style}"]
                print_rows(new)
                write(path, rows)
                path.with_suffix(".kernels.txt").write_text("\n".join(log) + "\n", encoding="utf-8")
    for which in wrong:
        console.print(f"[red]other bits with the pass on[/]: {which}")
    if wrong:
        raise typer.Exit(1)


def write(path: Path, rows: Sequence[Row]) -> None:
    """The rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


if __name__ == "__main__":
    typer.run(main)

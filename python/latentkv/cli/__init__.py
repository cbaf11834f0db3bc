"""The command line: ``latentkv info | demo | verify | bench``, also ``python -m latentkv``."""

from __future__ import annotations

import functools
import itertools
import os
import platform as host
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import __version__, providers, select_backend
from ..cache.backends import BACKENDS, BackendName, Selection
from ..cache.layouts import FORMATS, CacheLayout, resolve_format
from ..cache.platform import Platform
from ..models import MODELS, Model
from ..models import model as model_named
from ..testing import Case, check, first_difference, for_layout, matrix
from .benchmark import (
    CONVERT,
    DECODE,
    FUSED,
    GATHER,
    INDEXER,
    PROLOGUE,
    QUERYLESS,
    READS,
    VARIANTS,
    VLLM,
    Bench,
    FlashInfer,
    Peer,
    PeerError,
    Row,
    Update,
    activation_dtype,
    device_name,
    environment,
    plot,
    provider_call,
    read_csv,
    rope_table,
    summary,
    write_csv,
)

app = typer.Typer(
    name="latentkv",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="The KV-cache update of multi-head latent attention: what is here, is it right, how fast is it.",
)
_WIDTH = None if sys.stdout.isatty() else 120  # of tables in logs and pipes
console = Console(width=_WIDTH, highlight=False)
progress_console = Console(stderr=True)
T = TypeVar("T")
PEERS = (VLLM.name, FlashInfer.name)

OpName = Literal[
    "rope_", "write_cache_", "rope_write_cache_", "decode_prologue", "write_cache_grouped_", "write_indexer_cache_",
    "gather_cache", "convert_cache_", "mla_decode",
]  # fmt: skip
DeviceOption = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option("--device", help="cuda is a GPU of either vendor, and preferred."),
]
ModelOption = Annotated[str, typer.Option("--model", help=f"The model: {', '.join(MODELS)}.")]
HeadsOption = Annotated[
    int | None,
    typer.Option("--heads", min=1, help="Query heads on one device; by default all of the model's."),
]
FormatOption = Annotated[
    str,
    typer.Option("--format", help=f"The row format: {', '.join(FORMATS)}, or fp8: e4m3 as the device has it."),
]
BackendOption = Annotated[
    str | None,
    typer.Option("--backend", help=f"The attention backend, else dispatch chooses: {', '.join(BACKENDS)}."),
]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw the times into this .png, .svg or .pdf file.")]


# ------------------------------------------------------------------------------------------- options


@contextmanager
def _option(name: str) -> Iterator[None]:
    """Reports a ValueError of the library as what is wrong with an option."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"^(\w+: )+", "", "; ".join(map(str.strip, str(error).splitlines())))
        raise typer.BadParameter(text, param_hint=name) from error


def _device(name: str | None, timed: bool = False) -> torch.device:
    """The device to run on. One to be timed has kernels, unless it is the CPU."""
    why_not = "" if torch.cuda.is_available() else "torch finds no GPU here"
    if timed and not why_not and providers.served_by["cuda"] == "reference":
        cause = providers.library_errors.get("cuda", "LATENTKV_PROVIDER")
        why_not = f"the GPU has no kernels ({cause})"
    if name == "cuda" and why_not:
        raise typer.BadParameter(f"expected cpu, as {why_not}, got cuda", param_hint="--device")
    return torch.device(name or ("cpu" if why_not else "cuda"))


def _platform(device: torch.device) -> Platform:
    return Platform.detect() if device.type == "cuda" else Platform("cpu", host.machine())


def _select(device: torch.device, model: Model, heads: int, format: str, backend: str | None) -> Selection:
    asked = "LATENTKV_BACKEND" if os.environ.get("LATENTKV_BACKEND") else "--backend" if backend else "--format"
    with _option(asked):
        return select_backend(
            _platform(device),
            heads=heads,
            format=resolve_format(format, _platform(device)),
            kv_lora_rank=model.kv_lora_rank,
            rope_dim=model.rope_dim,
            prefer=cast(BackendName | None, backend),
        )


def _output(path: Path | None, option: str, *suffixes: str) -> None:
    """Fails before the work, not after it, if ``path`` cannot be written."""
    if path is None:
        return
    if path.suffix not in suffixes:
        expected = " or ".join(suffixes)
        raise typer.BadParameter(f"expected a file name ending in {expected}, got {path}", param_hint=option)
    if option == "--plot" and find_spec("matplotlib") is None:
        raise typer.BadParameter("expected matplotlib, got none: pip install 'latentkv[cli]'", param_hint=option)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"expected a file in a writable folder, got {path}", param_hint=option)


def _several(text: str, option: str, parse: Callable[[str], T]) -> list[T]:
    """The parts of a comma-separated option, each once."""
    with _option(option):
        return list(dict.fromkeys(parse(part.strip()) for part in text.split(",")))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"expected whole numbers, at least 1, separated by commas, got {text!r}")
    return int(text)


# ------------------------------------------------------------------------------------------- info


@app.command()
def info(
    model: ModelOption = "deepseek-v3",
    heads: HeadsOption = None,
    format: FormatOption = "bf16",
    backend: BackendOption = None,
    device: DeviceOption = None,
) -> None:
    """Show the device, the libraries and providers, and which attention backend dispatch chooses, and why."""
    on = _device(device)
    with _option("--model"):
        chosen = model_named(model)
    selection = _select(on, chosen, heads or chosen.heads, format, backend)
    facts = environment(on)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("latentkv", __version__)
    table.add_row("device", f"{facts['device']} ({selection.platform})")
    table.add_row("torch", " ".join(filter(None, (facts["torch"], facts["toolkit"], facts["driver"]))))
    for name, served in providers.served_by.items():
        why = providers.library_errors.get(name)
        table.add_row(f"{name} ops", f"{served}{f' (native library: {why})' if why else ''}")
    layout = selection.layout
    shapes = " + ".join(f"[B, {size}, {width}]" for _, size, width in layout.shapes(0))
    table.add_row("backend", f"[bold]{selection.name}[/] for {chosen.name}, {heads or chosen.heads} heads")
    table.add_row("layout", f"{layout.format}, {layout.placement} \\{shapes}")
    table.add_row("", f"{layout.row_bytes} bytes a token")
    for name, reason in selection.reasons.items():
        table.add_row("", f"{name}: {reason}")
    console.print(table)


# ------------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    model: ModelOption = "deepseek-v3",
    heads: HeadsOption = None,
    format: FormatOption = "bf16",
    backend: BackendOption = None,
    device: DeviceOption = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences decoded together; by default 32, on a CPU 4.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens of each; by default 256, on a CPU 128.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps.")] = 8,
    plot_path: PlotOption = None,
) -> None:
    """Run a model's cache updates: prefill, then decode steps, into the layout that dispatch chose.

    After every step the whole cache, q and k are compared byte for byte with the reference's, computed on
    the CPU. Then come the times: fused, as an unfused pair of ops, and torch.compile of plain PyTorch, whose
    bytes need not be equal. Activations are random. The exit status is 1 if one of our bytes differs.
    """
    _output(plot_path, "--plot", ".png", ".svg", ".pdf")
    on = _device(device, timed=True)
    with _option("--model"):
        chosen = model_named(model)
    heads = heads or chosen.heads
    selection = _select(on, chosen, heads, format, backend)
    sequences = sequences or (32 if on.type == "cuda" else 4)
    prompt = prompt or (256 if on.type == "cuda" else 128)
    console.print(f"{chosen.name}, {heads} heads, on {device_name(on)}")
    console.print(str(selection), markup=False)
    compared = _run_steps(chosen, heads, selection.layout, on, sequences, prompt, steps)
    console.print(f"[green]all bytes equal[/]: compared {compared:,} to the reference's, in {1 + steps} steps\n")

    bench = Bench(chosen, on, compiled=True)
    rows: list[Row] = []
    sizes = sorted({sequences, sequences * prompt})
    for tokens in track(sizes, "timing", console=progress_console, transient=True):
        rows += bench.measure(FUSED, heads, tokens, selection.layout)
    _print_rows(rows)
    if plot_path:
        plot(rows, plot_path, device_name(on))


def _run_steps(
    model: Model,
    heads: int,
    layout: CacheLayout,
    device: torch.device,
    sequences: int,
    prompt: int,
    steps: int,
) -> int:
    """Prefill and decode on ``device`` and, by the reference, on the CPU; the number of bytes compared."""
    cpu, random = torch.device("cpu"), torch.Generator().manual_seed(0)
    blocks = -(-(prompt + steps) // layout.block_size)
    block_table = torch.randperm(sequences * blocks, generator=random).view(sequences, blocks)
    cache, twin = (layout.allocate(sequences * blocks, where, scale=0.25) for where in (device, cpu))
    table = rope_table(model, activation_dtype(layout), cpu)
    device_table = None if table is None else table.to(device)
    compared = 0
    for first, last in [(0, prompt), *((i, i + 1) for i in range(prompt, prompt + steps))]:
        positions = torch.arange(first, last).repeat(sequences)
        rows = torch.arange(sequences).repeat_interleave(last - first)
        block, entry = positions // layout.block_size, positions % layout.block_size
        slots = block_table[rows, block] * layout.block_size + entry
        expected = Update.random(model, heads, positions, slots, table, twin, random)
        actual = expected.to(device, device_table, cache)
        provider_call(providers.public, FUSED, actual)()
        provider_call(providers.reference, FUSED, expected)()
        for name, tensor in expected.written.items():
            if difference := first_difference(actual.written[name].cpu(), tensor):
                console.print(f"[red]wrong bytes[/] in {name} at positions {first}..{last - 1}: {difference}")
                raise typer.Exit(1)
            compared += tensor.nbytes
    return compared


# ------------------------------------------------------------------------------------------- verify


@app.command()
def verify(
    device: DeviceOption = None,
    provider: Annotated[
        Literal["native", "triton", "reference"] | None,
        typer.Option(help="Whose ops to check; by default whose serve the device. Triton compiles for most cases."),
    ] = None,
    op: Annotated[OpName | None, typer.Option(help="Only this op.")] = None,
    format: Annotated[str | None, typer.Option(help="Only caches of this format.")] = None,
) -> None:
    """Check every op, format and layout on this device against the reference, byte for byte.

    The cases are those of the test suite, and a few for the cache of every attention backend. The reference
    runs on the CPU. The exit status is 1 if a byte is wrong or a case fails to run.
    """
    on = _device(device)
    name = provider or providers.served_by[on.type]
    problems = {"native": providers.library_errors.get(on.type), "triton": providers.triton_problem(on.type)}
    if why := problems.get(name):
        raise typer.BadParameter(f"expected reference, as {why}, got {name}", param_hint="--provider")
    if op == DECODE:
        raise typer.BadParameter(
            f"expected another op, as attention is not compared by its bytes, got {op}", param_hint="--op"
        )
    with _option("--format"):
        wanted = resolve_format(format, _platform(on)) if format else None
    cases = [c for c in _cases() if op in (None, c.op) and wanted in (None, c.layout.format)]
    total, wrong, failed = Counter[tuple[str, str]](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    complaints = []
    # Triton compiles for most cases, which is what takes its time.
    processes = min(len(os.sched_getaffinity(0)), 16) if name == "triton" and on.type == "cuda" else 1
    verdicts = zip(cases, _verdicts(cases, name, on, processes), strict=True)
    for case, (difference, error) in track(
        verdicts, f"{name} on {on}", len(cases), console=progress_console, transient=True
    ):
        key: tuple[str, str] = (case.op, case.layout.format)
        total[key] += 1
        wrong[key] += difference is not None
        failed[key] += error is not None
        if complaint := difference or error:
            complaints.append(f"{case}: {complaint}")

    table = Table("op", "format", title=f"{name} on {device_name(on)}, against the reference")
    for heading in ("cases", "wrong", "failed"):
        table.add_column(heading, justify="right")
    for key, count in total.items():
        table.add_row(
            *key,
            str(count),
            str(wrong[key]),
            str(failed[key]),
            style="red" if wrong[key] + failed[key] else None,
        )
    console.print(table)
    for line in complaints[:10]:
        console.print(line, style="red", markup=False)
    if len(complaints) > 10:
        console.print(f"and {len(complaints) - 10} more", style="red")
    if complaints:
        raise typer.Exit(1)
    console.print(f"[green]all bytes right[/] in {total.total()} cases")


Verdict = tuple[str | None, str | None]  # what differs, and what was raised


def _verdict(case: Case, name: str, on: torch.device) -> Verdict:
    """What is wrong with a provider's result."""
    try:
        differences = check(case, getattr(providers, name), providers.reference, on, expected_device="cpu")
    except Exception as error:  # whatever a broken build throws is a finding
        return None, f"{type(error).__name__}: {error}"
    return (differences[0] if differences else None), None


def _verdicts(cases: Sequence[Case], name: str, on: torch.device, processes: int) -> Iterator[Verdict]:
    """Those of cases in order, of which each of several processes takes a share."""
    verdict = functools.partial(_verdict, name=name, on=on)
    if processes == 1:
        yield from map(verdict, cases)
        return
    one_thread = torch.set_num_threads, (1,)  # for the reference, which runs on the CPU
    with ProcessPoolExecutor(processes, get_context("spawn"), *one_thread) as pool:
        yield from pool.map(verdict, cases, chunksize=8)


def _cases() -> Iterator[Case]:
    yield from matrix()
    layouts = (layout for backend in BACKENDS.values() for layout in backend.layouts)
    for layout in dict.fromkeys(layouts):
        yield from for_layout(layout)


# ------------------------------------------------------------------------------------------- bench


@app.command()
def bench(
    op: Annotated[OpName, typer.Option(help="The op to time.")] = FUSED,
    model: ModelOption = "deepseek-v3",
    heads: Annotated[
        str | None,
        typer.Option(
            help="Query heads, separated by commas; by default 16,128, for decode_prologue 16,64,128, on a CPU 16."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens, separated by commas; by default 1,8,32,128,512,2048,8192, on a CPU 1,32,1024; "
            "for gather_cache and convert_cache_ on a GPU 128,512,2048,8192,32768,131072."
        ),
    ] = None,
    formats: Annotated[
        str | None, typer.Option(help="Row formats, separated by commas; by default bf16,fp8 and what the op is for.")
    ] = None,
    device: DeviceOption = None,
    peer: Annotated[
        str | None,
        typer.Option(
            help="vllm, flashinfer or both, separated by a comma: fail without them, else compare to those found."
        ),
    ] = None,
    vllm_library: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="vLLM's ops where it is not installed: _C_stable_libtorch.abi3.so out of its wheel.",
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Also time torch.compile of plain PyTorch.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the results into this .csv file.")] = None,
    plot_path: PlotOption = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", exists=True, dir_okay=False, help="Show and plot this .csv file, measure nothing."),
    ] = None,
) -> None:
    """Time an op over tokens, heads and formats, beside its peers, and check its bytes at every shape.

    On a GPU: replay of CUDA graphs that go round over eight input sets, with and without programmatic
    dependent launch (overlap), beside vLLM's and FlashInfer's ops if they are here; then what an eager call
    costs the host. On a CPU: wall clock, beside the reference.

    Every time stands beside the bandwidth that an elementwise multiply streams in the same run, and that of
    an empty kernel. Caches hold whole rows (concat) in blocks of 64; q_pe is a strided view into the query
    heads; the cos/sin table has the activations' dtype. For decode_prologue q_nope is the transposed view of
    a product [H, T, L], kv_c a slice of its projection, the table fp32, and the query fp8 where the rows are;
    it is timed with and without RMSNorm. Four layers make a group. gather_cache reads up to eight sequences of
    about equal lengths, their blocks in any order, into 16 bits; convert_cache_ whole blocks in any order, between
    pairs of layouts of its own. On a GPU the Triton kernels are timed beside the native ones. mla_decode is timed
    by benchmarks/readers.py, beside the attention kernels that it compares to.

    The exit status is 1 if one of our bytes differs from the reference's.
    """
    _output(csv, "--csv", ".csv")
    _output(plot_path, "--plot", ".png", ".svg", ".pdf")
    if source:
        with _option("--from"):
            rows, facts = read_csv(source)
        _print_rows(rows)
    else:
        on = _device(device, timed=True)
        with _option("--model"):
            chosen = model_named(model)
        if op == DECODE:
            raise typer.BadParameter(
                f"expected another op, as benchmarks/readers.py times attention, got {op}", param_hint="--op"
            )
        if op == "rope_" and chosen.rope is None:
            raise typer.BadParameter(
                f"expected another op, as {chosen.name} has no rotation, got rope_", param_hint="--op"
            )
        usual_heads = "16" if on.type == "cpu" else "16,64,128" if op == PROLOGUE else "16,128"
        all_heads = [0] if op in QUERYLESS else _several(heads or usual_heads, "--heads", _count)
        usual_tokens = "128,512,2048,8192,32768,131072" if op in READS else "1,8,32,128,512,2048,8192"
        all_tokens = _several(tokens or ("1,32,1024" if on.type == "cpu" else usual_tokens), "--tokens", _count)
        layouts = _layouts(formats, op, chosen, _platform(on))
        demanded = _several(peer, "--peer", _peer_name) if peer else []
        peers = _peers(on, vllm_library, demanded)

        facts = environment(on, peers)
        console.print(", ".join(f"{key} {value}" for key, value in facts.items() if value))
        runner = Bench(chosen, on, peers, compiled)
        empty = "" if runner.empty_us is None else f"; an empty kernel takes {runner.empty_us:.2f} us"
        console.print(f"an elementwise multiply streams {runner.streamed_gb_s:,.0f} GB/s{empty}\n")
        shapes = itertools.product(all_heads, layouts, VARIANTS.get(op, ("",)), all_tokens)
        rows = []
        for h, layout, variant, t in track([*shapes], "timing", console=progress_console, transient=True):
            rows += runner.measure(op, h, t, layout, variant)
        for h in all_heads:
            rows += runner.measure_host(op, h, layouts[0])
        _print_rows(rows)
        if csv:
            write_csv(csv, rows, facts)
    if plot_path:
        plot(rows, plot_path, facts["device"])
    if any(row.wrong for row in rows):
        console.print("[red]wrong bytes[/]: see the columns of differences")
        raise typer.Exit(1)


def _layouts(formats: str | None, op: str, model: Model, platform: Platform) -> list[CacheLayout]:
    """The layouts of the formats asked for; by default of those that ``op`` and the model's dimensions go with."""
    dims = (model.kv_lora_rank, model.rope_dim)
    if op in ("rope_", INDEXER, CONVERT):  # the format plays no part
        return [CacheLayout(*dims, 64, "bf16")]
    if formats is None:
        packed = [f.name for f in FORMATS.values() if f.packed and f.packed.dims == dims and op != FUSED]
        formats = ",".join(["bf16", "fp8", *packed])
    names = _several(formats, "--formats", lambda name: resolve_format(name, platform))
    with _option("--formats"):
        return [CacheLayout(*dims, 64, name) for name in names]


def _peer_name(text: str) -> str:
    if text not in PEERS:
        raise ValueError(f"expected {' or '.join(PEERS)}, got {text!r}")
    return text


def _peers(device: torch.device, library: Path | None, demanded: Collection[str]) -> list[Peer]:
    """The peers that are here. One whose library or name was given has to be."""
    found: list[Peer] = []
    for name in PEERS:
        try:
            if device.type == "cpu":
                raise PeerError("its ops run on GPUs only")
            found.append(VLLM(device, library) if name == VLLM.name else FlashInfer(device))
        except PeerError as error:
            given = library if name == VLLM.name else None
            if given or name in demanded:
                option = "--vllm-library" if given else "--peer"
                raise typer.BadParameter(f"expected {name}'s ops, got none: {error}", param_hint=option) from error
            console.print(f"{name}: not compared: {error}")
    return found


def _print_rows(rows: Sequence[Row]) -> None:
    """A table for each number of heads, format and variant, one of host costs, and who is how much faster."""
    groups: dict[tuple[bool, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.timing == "host", row.heads, row.kind), []).append(row)
    for (is_host, heads, kind), group in groups.items():
        written = {PROLOGUE: "q_out", GATHER: "rows"}.get(group[0].op, "q, k")
        columns: dict[str, list[float | None]] = {
            "us": [r.p50_us for r in group],
            "GB/s": [r.gb_s for r in group],
            "% of streamed": [r.share_of_streamed and 100 * r.share_of_streamed for r in group],
            "empty kernels": [None if is_host else r.times_empty for r in group],
            f"speed-up over {group[0].baseline}": [r.speedup for r in group],
            f"% of {written} differ": [r.qk_differs_percent for r in group],
            "% of cache differs": [r.cache_differs_percent for r in group],
        }
        columns = {heading: values for heading, values in columns.items() if any(v is not None for v in values)}
        what = "host cost of an eager call" if is_host else f"time of {group[0].op}"
        of = f"{heads} heads, {kind}" if heads else kind
        table = Table("tokens", title=f"{what}: {group[0].model}, {of}", title_justify="left")
        table.add_column("contender", no_wrap=True)
        for heading in columns:
            table.add_column(heading, justify="right")
        for i, row in enumerate(group):
            tokens = "" if i and group[i - 1].tokens == row.tokens else str(row.tokens)
            cells = [_three(values[i]) for values in columns.values()]
            table.add_row(tokens, row.contender, *cells, style="red" if row.wrong else None)
        console.print(table)
    if faster := summary(rows):
        ours = list(dict.fromkeys(own for by_own in faster.values() for own in by_own))
        table = Table("rows", "against", title="times faster: at least, and in the mean", title_justify="left")
        for own in ours:
            table.add_column(own, justify="right")
        for key, by_own in faster.items():
            table.add_row(*key, *(", ".join(map(_three, by_own.get(own, ()))) for own in ours))
        console.print(table)
    for contender, note in dict.fromkeys((row.contender, row.note) for row in rows if row.note):
        console.print(f"{contender}: {note}", markup=False)


def _three(value: float | None) -> str:
    """Three digits, or as many as there are before the point."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

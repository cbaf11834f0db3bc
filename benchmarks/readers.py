"""Attention's own readers over caches that this library wrote: are their outputs right, and how fast is mla_decode?

    python benchmarks/readers.py --csv OUT.csv [--flashmla FOLDER] [--flash-attention _vllm_fa3_C.abi3.so] [--times]

For each reader a cache of its layout is written twice, by the ops that serve the device and by the reference: prefill
by rope_write_cache_, then decode steps by decode_prologue, whose query the reader takes. Its output is compared with
attention in fp64 over the activations as they were before any rounding (RoPE in fp64, too). Equal caches give equal
outputs; the error may be twice that over the reference's cache at most, else the exit status is 1. So it is if a reader
is off by more than quantisation could explain. ``--times`` adds OUT.times.csv: one decode step of the dense readers.

FOLDER holds _flashmla_C.abi3.so and _flashmla_extension_C.abi3.so out of vLLM's wheel; FlashInfer is imported. What is
not here, or fails, is left out, and the reason printed.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import latentkv as lk
import torch
import typer
from latentkv import providers
from latentkv.cache.layouts import FORMATS
from latentkv.cli.benchmark import environment, rope_table, time_calls
from latentkv.cli.benchmark.timing import streamed_bandwidth
from latentkv.models import Model, model
from rich.console import Console
from rich.table import Table
from torch import Tensor

STEPS = 3  # decode steps after the prompts
# Lengths before them: one token, the edges of a block, odd ones; and many short ones.
BATCHES = ((1000,), (1, 62, 63, 64, 65, 127, 4093), tuple(range(5, 325, 10)))
SCALE = 2.0**-6  # of fp8 rows and queries: activations up to 7 stay below the largest code
MISREAD = 0.2  # of the largest output: more than quantisation could explain
BAR = 2.0  # times the error over the reference's cache
WORKSPACE = 128 << 20  # bytes that FlashInfer wants for partial results
FP8_QUERY = torch.float8_e4m3fn

HEADS = (16, 128)
TIMED_SHAPES = (*((b, n) for b in (1, 8, 32, 128) for n in (1024, 8192)), (1, 32768), (8, 32768))
ROUND_BYTES = 256 << 20  # of cache to go round over, so that rows come from memory and not from the L2

console = Console(width=180, highlight=False)


@dataclass(frozen=True, eq=False)
class Step:
    """One decode step of attention: what a reader is given.

    Attributes:
        q: [B, H, L + R], absorbed and rotated.
        cache: the rows of all sequences.
        block_table: [B, max_blocks] int32.
        seq_lens: [B] int32.
        sm_scale: the factor of the scores.
    """

    q: Tensor
    cache: lk.MLACache
    block_table: Tensor
    seq_lens: Tensor
    sm_scale: float

    @property
    def longest(self) -> int:
        """The longest sequence; waits for the device."""
        return int(self.seq_lens.max())

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """The query's views [B, H, L] and [B, H, R]."""
        rank = self.cache.layout.kv_lora_rank
        return self.q[..., :rank], self.q[..., rank:]

    @property
    def pages(self) -> Tensor:
        """The rows with their one head, [B, bs, 1, C]."""
        return self.cache.data.unsqueeze(-2)


Read = Callable[[], Tensor]  # gives [B, H, L]; [B, H, L + R] where values are whole rows


@dataclass(frozen=True)
class Reader:
    """One attention kernel over one layout.

    Attributes:
        package: whose it is.
        backend: whose layout it reads.
        format: of its rows.
        bind: prepares a step; every call of what it returns launches the kernel.
        q_dtype: fp8 where it takes a quantised query, None for the activations' dtype.
        whole_values: values are whole rows (DeepSeek-V4), not the latent vectors alone.
        dense: it reads every token by the block table, so that times are comparable.
    """

    name: str
    package: str
    backend: str
    format: str
    bind: Callable[[Step], Read]
    q_dtype: torch.dtype | None = None
    whole_values: bool = False
    dense: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return FORMATS[self.format].activation or torch.bfloat16

    @property
    def model(self) -> Model:
        """Whose dimensions it reads."""
        return model("deepseek-v4" if self.whole_values else "deepseek-v3")

    @property
    def layout(self) -> lk.CacheLayout:
        """Of its backend."""
        dims = {"kv_lora_rank": self.model.kv_lora_rank, "rope_dim": self.model.rope_dim}
        return lk.layout_for(self.backend, **dims, format=self.format)


@dataclass(frozen=True)
class Proof:
    """One comparison.

    Attributes:
        lengths: the shortest and the longest sequence at the last step.
        error: the largest absolute difference to fp64, over all decode steps.
        reference_error: the same of the cache and query that the reference wrote.
        ratio: of the two.
        relative_error: ``error`` over the largest output.
        same_output, same_cache, same_query: bit for bit those of the reference.
    """

    reader: str
    package: str
    backend: str
    format: str
    placement: str
    block_size: int
    heads: int
    batch: int
    lengths: str
    error: float
    reference_error: float
    ratio: float
    relative_error: float
    same_output: bool
    same_cache: bool
    same_query: bool

    @property
    def failed(self) -> bool:
        """The bar was missed, or the reader did not read these rows (NaN compares false)."""
        return not (self.ratio <= BAR and self.relative_error <= MISREAD)


@dataclass(frozen=True)
class Time:
    """One decode step's time: percentiles of microseconds, and the rows' bytes over the median."""

    reader: str
    package: str
    format: str
    heads: int
    batch: int
    length: int
    p20_us: float
    p50_us: float
    p80_us: float
    cache_bytes: int
    gb_s: float
    share_of_streamed: float


# ------------------------------------------------------------------------------------------------------- the readers


def our_reader(provider: providers.Provider, backend: str, format: str) -> Reader:
    """Ours: mla_decode of a provider."""

    def bind(step: Step) -> Read:
        rest = (step.cache, step.block_table, step.seq_lens)
        return lambda: provider.mla_decode(step.q, *rest, sm_scale=step.sm_scale)[0]

    return Reader(f"latentkv {provider.name}", f"latentkv {lk.__version__}", backend, format, bind)


def flashmla_readers(folder: Path, package: str) -> Iterator[Reader]:
    """FlashMLA's dense readers for 16-bit rows, and the sparse ones, which take every token's slot here."""
    torch.ops.load_library(folder / "_flashmla_C.abi3.so")
    ops = torch.ops._flashmla_C

    def dense(step: Step) -> Read:
        def run(schedule: tuple[Tensor | None, Tensor | None]) -> Any:
            query, lengths = step.q.unsqueeze(1), (step.seq_lens, step.block_table)
            return ops.dense_decode_fwd(query, step.pages, 512, *lengths, step.sm_scale, False, *schedule, None)

        _, _, *schedule = run((None, None))  # the first call plans, as an engine's first layer does
        return lambda: run(schedule)[0].squeeze(1)

    def sparse(step: Step) -> Read:
        slots, heads = every_slot(step, multiple=128).unsqueeze(1), step.q.shape[1]
        padded = torch.nn.functional.pad(step.q, (0, 0, 0, -heads % 64)).unsqueeze(1)  # it has 64 heads, or 128

        def run(schedule: tuple[Tensor | None, Tensor | None]) -> Any:
            rows = (padded, step.pages, slots, None, None, *schedule, None, None, None)
            return ops.sparse_decode_fwd(*rows, 512, step.sm_scale, None, False)

        _, _, *schedule = run((None, None))
        return lambda: run(schedule)[0][:, 0, :heads]

    yield Reader("FlashMLA dense", package, "FLASHMLA", "bf16", dense)
    yield Reader("FlashMLA dense", package, "FLASHMLA", "fp16", dense)
    yield Reader("FlashMLA sparse", package, "FLASHMLA_SPARSE", "fp8_ds_mla", sparse, dense=False)
    yield Reader("FlashMLA sparse", package, "V4_FLASHMLA_SPARSE", "fp8_model1", sparse, whole_values=True, dense=False)


def flashmla_fp8_readers(folder: Path, package: str) -> Iterator[Reader]:
    """FlashMLA's dense reader for fp8 rows and queries, as vLLM has it."""
    torch.ops.load_library(folder / "_flashmla_extension_C.abi3.so")
    ops = torch.ops._flashmla_extension_C

    def bind(step: Step) -> Read:
        schedule = ops.get_mla_decoding_metadata_dense_fp8(step.seq_lens, step.q.shape[1], 1)
        scales = (torch.full((1,), SCALE, device=step.q.device), step.cache.scale)
        rows = (step.q.unsqueeze(1), step.pages, 512, step.seq_lens, step.block_table, step.sm_scale, False)
        return lambda: ops.fwd_kvcache_mla_fp8(*rows, *schedule, *scales)[0].squeeze(1)

    yield Reader("FlashMLA dense fp8", package, "FLASHMLA", "fp8_e4m3fn", bind, q_dtype=FP8_QUERY)


def flash_attention_readers(library: Path, package: str) -> Iterator[Reader]:
    """FlashAttention-3 with a latent query beside the rotated one, over views of our rows."""
    torch.ops.load_library(library)
    ops = torch.ops._vllm_fa3_C

    def bind(step: Step) -> Read:
        (batch, heads, _), (latent, rope) = step.q.shape, step.parts
        starts = torch.arange(batch + 1, dtype=torch.int32, device=step.q.device)
        keys, values = (t.unsqueeze(-2) for t in (step.cache.rope, step.cache.latent) if t is not None)
        nothing, longest, size = None, step.longest, step.cache.layout.block_size
        schedule = ops.get_scheduler_metadata(
            batch, 1, longest, heads, 1, rope.shape[-1], latent.shape[-1], step.q.dtype, step.seq_lens,
            starts, nothing, nothing, nothing, nothing, size, 0, True, -1, -1, False, 0, nothing, 0,
        )  # fmt: skip
        arguments = (
            rope, keys, values, nothing, nothing, latent, nothing,  # no new keys and values; q_v; out
            starts, nothing, nothing, nothing, step.seq_lens, 1, longest, step.block_table, nothing, nothing,
            nothing, nothing, nothing, nothing, nothing, nothing,  # rotation and scales of its own
            step.sm_scale, True, -1, -1, 0.0, True, schedule, 0, nothing, 0, nothing, 1, 0, nothing,
        )  # fmt: skip
        return lambda: ops.fwd(*arguments)[0]

    yield Reader("FlashAttention-3", package, "FLASH_ATTN_MLA", "bf16", bind)
    yield Reader("FlashAttention-3", package, "FLASH_ATTN_MLA", "fp16", bind)


def flashinfer_readers(kind: str, device: torch.device) -> Iterator[Reader]:
    """FlashInfer's paged wrapper over two tensors, by its kernel for Hopper (fa3) or for all GPUs (fa2)."""
    version = importlib.import_module("flashinfer").__version__
    mla = importlib.import_module("flashinfer.mla")
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)  # calls of one stream may share it

    def bind(step: Step) -> Read:
        layout, batch = step.cache.layout, len(step.seq_lens)
        blocks = -(-step.seq_lens.cpu() // layout.block_size)
        ends = torch.nn.functional.pad(blocks.cumsum(0), (1, 0)).int()
        used = torch.arange(step.block_table.shape[1]) < blocks[:, None]
        metadata = mla.MLAPlanMetadata.csr(
            qo_indptr=torch.arange(batch + 1, dtype=torch.int32),
            kv_indptr=ends,
            kv_indices=step.block_table[used.to(step.q.device)].contiguous(),
            kv_len_arr=step.seq_lens.cpu(),
        )
        wrapper = mla.BatchMLAPagedAttentionWrapper(workspace, backend=kind)
        wrapper.plan(
            metadata=metadata, num_heads=step.q.shape[1], head_dim_ckv=layout.kv_lora_rank,
            head_dim_kpe=layout.rope_dim, page_size=layout.block_size, causal=False, sm_scale=step.sm_scale,
            q_data_type=step.q.dtype, kv_data_type=step.cache.data.dtype, query_layout="split",
            kv_cache_layout="split",
        )  # fmt: skip
        pages, out = (step.cache.latent, step.cache.rope), torch.empty_like(step.parts[0].contiguous())
        return lambda: wrapper.run(query=step.parts, kv_cache=pages, out=out)

    yield Reader(f"FlashInfer {kind}", f"flashinfer {version}", "FLASHINFER_PAGED_MLA", "bf16", bind)


def every_slot(step: Step, multiple: int) -> Tensor:
    """[B, n] int32: the slot of each token, -1 after the last one; n is a multiple."""
    size = step.cache.layout.block_size
    token = torch.arange(-(-step.longest // multiple) * multiple, device=step.q.device)
    column = (token // size).clamp(max=step.block_table.shape[1] - 1)
    slots = step.block_table[:, column] * size + token % size
    return torch.where(token < step.seq_lens[:, None], slots, -1).int()


def all_readers(
    device: torch.device, flashmla: Path | None, flash_attention: Path | None, package: str
) -> list[Reader]:
    """Those that are here; why others are not is printed."""
    if device.type == "cpu":
        return [
            our_reader(providers.reference, "CPU_MLA", "bf16"),
            our_reader(providers.reference, "TRITON_MLA", "fp8_e4m3fn"),
        ]
    groups: dict[str, Callable[[], Iterator[Reader]]] = {
        "ours": lambda: iter(our_reader(providers.triton, "TRITON_MLA", f) for f in ("bf16", "fp16", "fp8_e4m3fn"))
    }
    if flashmla:
        groups["FlashMLA"] = lambda: flashmla_readers(flashmla, package)
        groups["FlashMLA fp8"] = lambda: flashmla_fp8_readers(flashmla, package)
    if flash_attention:
        groups["FlashAttention-3"] = lambda: flash_attention_readers(flash_attention, package)
    for kind in ("fa3", "fa2"):
        groups[f"FlashInfer {kind}"] = lambda kind=kind: flashinfer_readers(kind, device)  # type: ignore[misc]
    found: list[Reader] = []
    for name, readers in groups.items():
        try:
            found += readers()
        except Exception as error:  # whatever a foreign library throws when it is loaded
            console.print(f"{name}: not here: {why(error)}", markup=False)
    return found


# --------------------------------------------------------------------------------------------------------- the proofs


@dataclass(frozen=True, eq=False)
class Activations:
    """Of all tokens of a batch, sequence after sequence: what attention would read, were nothing rounded.

    Attributes:
        kv_c: [N, L].
        k_pe: [N, R], unrotated.
        q_nope, q_pe: [N, H, L] and [N, H, R], for the decode steps alone: [steps, B, ...].
    """

    kv_c: Tensor
    k_pe: Tensor
    q_nope: Tensor
    q_pe: Tensor


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normally distributed numbers."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def rotated(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """RoPE of GPT-J pairs in fp64; x [N, ..., R]."""
    cos, sin = (t.view(len(positions), *[1] * (x.dim() - 2), -1) for t in table.double()[positions].chunk(2, -1))
    even, odd = x.double()[..., 0::2], x.double()[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def prove(reader: Reader, heads: int, prompts: Sequence[int], device: torch.device) -> Proof:
    """Writes prompts and decode steps twice, and reads them at every step."""
    layout, dtype, batch = reader.layout, reader.dtype, len(prompts)
    rank, rope = layout.kv_lora_rank, layout.rope_dim
    table = rope_table(reader.model, torch.float32, device)
    assert table is not None
    random = torch.Generator(device).manual_seed(heads + batch)
    lengths = torch.tensor(prompts, device=device)
    ends = (lengths + STEPS).cumsum(0)
    starts, total = ends - lengths - STEPS, int(ends[-1])
    x = Activations(
        normal(random, dtype, total, rank), normal(random, dtype, total, rope),
        normal(random, dtype, STEPS, batch, heads, rank), normal(random, dtype, STEPS, batch, heads, rope),
    )  # fmt: skip
    sequence = torch.searchsorted(ends, torch.arange(total, device=device), right=True)
    positions = torch.arange(total, device=device) - starts[sequence]
    columns = -(-(max(prompts) + STEPS) // layout.block_size)
    blocks = torch.randperm(batch * columns, generator=random, device=device).view(batch, columns)
    slots = blocks[sequence, positions // layout.block_size] * layout.block_size + positions % layout.block_size
    keys = torch.cat((x.kv_c.double(), rotated(x.k_pe, positions, table)), 1)
    sm_scale = (reader.model.nope_dim + rope) ** -0.5

    writers = (providers.public, providers.reference)
    caches = [layout.allocate(batch * columns, device, scale=SCALE) for _ in writers]
    q_scale = torch.full((1,), SCALE, device=device)
    prompt = (positions < lengths[sequence]).nonzero().flatten()
    for writer, cache in zip(writers, caches, strict=True):
        q_pe = normal(torch.Generator(device).manual_seed(0), dtype, len(prompt), 1, rope)
        rows = (positions[prompt], q_pe, x.k_pe[prompt], x.kv_c[prompt], table, slots[prompt], cache)
        writer.rope_write_cache_(*rows, is_neox=False)

    errors, largest, same_output, same_query = [0.0, 0.0], 0.0, True, True
    for i in range(STEPS):
        token = starts + lengths + i
        queries, outputs = [], []
        for writer, cache in zip(writers, caches, strict=True):
            rows = (x.q_nope[i], x.q_pe[i], x.kv_c[token], x.k_pe[token], positions[token], table, slots[token])
            quantise = {"q_dtype": reader.q_dtype, "q_scale": q_scale} if reader.q_dtype else {}
            q = writer.decode_prologue(*rows, cache, is_neox=False, **quantise)
            read = reader.bind(Step(q, cache, blocks.int(), (lengths + i + 1).int(), sm_scale))
            read()  # so that what counts is a call by a plan that was used before, as in the layers of a model
            queries.append(q)
            outputs.append(read().clone())
        query = torch.cat((x.q_nope[i].double(), rotated(x.q_pe[i], positions[token], table)), -1)
        for b in range(batch):
            rows64 = keys[starts[b] : token[b] + 1]
            weights = (query[b] @ rows64.T * sm_scale).softmax(-1)
            right = weights @ (rows64 if reader.whole_values else rows64[:, :rank])
            largest = max(largest, float(right.abs().max()))
            for which, out in enumerate(outputs):
                error = float((out[b].double() - right).abs().max())
                errors[which] = max(errors[which], error) if error == error else float("nan")
        same_output &= same_bytes(*outputs)
        same_query &= same_bytes(*queries)
    last = [n + STEPS for n in prompts]
    return Proof(
        reader.name, reader.package, reader.backend, reader.format, layout.placement, layout.block_size, heads, batch,
        f"{min(last)}..{max(last)}" if batch > 1 else str(last[0]),
        *errors, errors[0] / errors[1] if errors[1] else float("nan"), errors[0] / largest,
        same_output, all(map(same_bytes, *(cache.tensors for cache in caches))), same_query,
    )  # fmt: skip


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN or not."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---------------------------------------------------------------------------------------------------------- the times


def timed(reader: Reader, heads: int, batch: int, length: int, streamed: float, device: torch.device) -> Time:
    """A decode step over random rows; calls go round over blocks that no cache of the GPU holds together."""
    layout = reader.layout
    columns, step_bytes = -(-length // layout.block_size), batch * length * layout.row_bytes
    sets = min(64, max(1, -(-ROUND_BYTES // step_bytes)))
    random = torch.Generator(device).manual_seed(0)
    cache = layout.allocate(sets * batch * columns, device, scale=SCALE)
    for tensor in cache.tensors:
        tensor[: batch * columns] = normal(random, torch.float32, *tensor[: batch * columns].shape).to(tensor.dtype)
        for i in range(1, sets):
            tensor[i * batch * columns : (i + 1) * batch * columns] = tensor[: batch * columns]
    tables = torch.randperm(sets * batch * columns, generator=random, device=device).int().view(sets, batch, columns)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    dtype = reader.q_dtype or reader.dtype
    width = layout.kv_lora_rank + layout.rope_dim
    q = normal(random, torch.float32, batch, heads, width).to(dtype)
    sm_scale = (reader.model.nope_dim + layout.rope_dim) ** -0.5
    calls = [reader.bind(Step(q, cache, block_table, lengths, sm_scale)) for block_table in tables]
    timing = time_calls(calls, device)
    gb_s = 1e-3 * step_bytes / timing.p50
    what = (reader.name, reader.package, reader.format, heads, batch, length)
    return Time(*what, timing.p20, timing.p50, timing.p80, step_bytes, gb_s, gb_s / streamed)


# --------------------------------------------------------------------------------------------------------- the report


def why(error: BaseException) -> str:
    """The error in a line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]


def print_proofs(proofs: Sequence[Proof]) -> None:
    """One line each."""
    table = Table("reader", "layout", "rows", "heads", "batch", "lengths")
    for heading in ("error", "over reference's", "ratio", "of largest", "same output", "same cache", "same query"):
        table.add_column(heading, justify="right")
    for p in proofs:
        same = ("yes" if x else "no" for x in (p.same_output, p.same_cache, p.same_query))
        numbers = (f"{p.error:.3g}", f"{p.reference_error:.3g}", f"{p.ratio:.3f}", f"{p.relative_error:.2%}")
        what = (p.reader, p.backend, p.format, str(p.heads), str(p.batch), p.lengths)
        table.add_row(*what, *numbers, *same, style="red" if p.failed else None)
    console.print(table)


def print_times(times: Sequence[Time]) -> None:
    """A line for each shape, a column for each reader."""
    readers = list(dict.fromkeys((t.reader, t.format) for t in times))
    table = Table("heads", "batch", "length", title="microseconds (GB/s of rows)", title_justify="left")
    for reader in readers:
        table.add_column("\n".join(reader), justify="right")
    by_shape: dict[tuple[int, int, int], dict[tuple[str, str], Time]] = {}
    for t in times:
        by_shape.setdefault((t.heads, t.batch, t.length), {})[t.reader, t.format] = t
    for shape, row in by_shape.items():
        cells = (f"{row[r].p50_us:.1f} ({row[r].gb_s:,.0f})" if r in row else "-" for r in readers)
        table.add_row(*map(str, shape), *cells)
    console.print(table)


def write(path: Path, rows: Sequence[Proof | Time], facts: dict[str, str]) -> None:
    """The rows as CSV, each with the environment."""
    if not rows:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*facts, *(field.name for field in fields(rows[0]))])
        writer.writeheader()
        for row in rows:
            writer.writerow(facts | {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def main(
    path: Annotated[Path, typer.Option("--csv", help="Where the results go; OUT.times.csv lies beside it.")],
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="On cpu there is the reference alone.")] = "cuda",
    flashmla: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Its libraries' folder.")] = None,
    flash_attention: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Its library.")] = None,
    package: Annotated[str, typer.Option(help="Where these libraries are from.")] = "vllm 0.33.0",
    only: Annotated[str, typer.Option(help="Only readers whose name and format contain this.")] = "",
    times: Annotated[bool, typer.Option("--times", help="Also time the dense readers.")] = False,
) -> None:
    """See the module's docstring."""
    on = torch.device(device)
    facts = environment(on)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items() if value))
    readers = [r for r in all_readers(on, flashmla, flash_attention, package) if only in f"{r.name} {r.format}"]
    proofs, measured, failures = list[Proof](), list[Time](), dict[str, str]()
    streamed = streamed_bandwidth(on) if times else 0.0
    for reader in readers:
        for heads in HEADS if on.type == "cuda" else (4,):
            for prompts in BATCHES:
                try:
                    proofs.append(prove(reader, heads, prompts, on))
                except Exception as error:  # a foreign kernel that does not run here is no fault of the rows
                    failures[f"{reader.name}, {reader.format}, {heads} heads, batch {len(prompts)}"] = why(error)
            for shape in TIMED_SHAPES if times and reader.dense and reader.format != "fp16" else ():
                try:
                    measured.append(timed(reader, heads, *shape, streamed, on))
                except Exception as error:
                    failures[f"{reader.name}, {reader.format}, {heads} heads, time of {shape}"] = why(error)
        write(path, proofs, facts)
        write(path.with_suffix(".times.csv"), measured, facts)
    print_proofs(proofs)
    if measured:
        console.print(f"an elementwise multiply streams {streamed:,.0f} GB/s")
        print_times(measured)
    for what, reason in failures.items():
        console.print(f"{what}: {reason}", markup=False)
    if any(proof.failed for proof in proofs) or any(name.startswith("latentkv") for name in failures):
        console.print(f"[red]failed[/]: more than {BAR:g} times the error, or not these rows")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

"""How long an update of the cache, or a read, takes beside its peers: the core of ``latentkv bench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import providers
from ...cache.layouts import CacheLayout
from ...models import Model
from .contenders import FUSED, Contender, PeerError, compiled, layer_calls, pair_call, provider_call, torch_op_call
from .inputs import (
    CONVERT,
    DECODE,
    GATHER,
    GROUPED,
    INDEXER,
    OPS,
    PROLOGUE,
    QUERYLESS,
    READS,
    VARIANTS,
    Inputs,
    Update,
    activation_dtype,
    bytes_moved,
    conversion,
    random_inputs,
    rope_table,
    table_dtype,
)
from .peers import VLLM, FlashInfer, Peer, first_line
from .results import Row, device_name, environment, plot, read_csv, summary, write_csv
from .timing import INPUT_SETS, Timing, empty_kernel, streamed_bandwidth, time_calls, time_host

__all__ = [
    "CONVERT",
    "DECODE",
    "FUSED",
    "GATHER",
    "INDEXER",
    "OPS",
    "PROLOGUE",
    "QUERYLESS",
    "READS",
    "VARIANTS",
    "VLLM",
    "Bench",
    "FlashInfer",
    "Inputs",
    "Peer",
    "PeerError",
    "Row",
    "Timing",
    "Update",
    "activation_dtype",
    "device_name",
    "environment",
    "plot",
    "provider_call",
    "read_csv",
    "rope_table",
    "summary",
    "time_calls",
    "write_csv",
]


@dataclass
class Bench:
    """Times a model's ops on a device, beside the bandwidth streamed and an empty kernel in the same run.

    Attributes:
        model: dimensions and rotation.
        device: where.
        peers: whom to compare to.
        compiled: also time ``torch.compile`` of plain PyTorch.
    """

    model: Model
    device: torch.device
    peers: Sequence[Peer] = ()
    compiled: bool = False
    streamed_gb_s: float = field(init=False)
    empty_us: float | None = field(init=False)

    def __post_init__(self) -> None:
        """Measures the two floors."""
        self.streamed_gb_s = streamed_bandwidth(self.device)
        self.empty_us = empty_kernel(self.device)
        self._tables: dict[torch.dtype, Tensor | None] = {}

    @property
    def rotates(self) -> bool:
        """Whether the model turns anything."""
        return self.model.rope is not None

    def inputs(self, op: str, heads: int, tokens: int, layout: CacheLayout, variant: str = "", seed: int = 0) -> Inputs:
        """Random arguments, equal for equal seeds."""
        dtype = table_dtype(op, layout)
        if dtype not in self._tables:
            self._tables[dtype] = rope_table(self.model, dtype, self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        return random_inputs(op, variant, self.model, heads, tokens, layout, self._tables[dtype], generator)

    def contenders(self, op: str) -> list[Contender]:
        """Our ways to do ``op``."""
        call = partial(provider_call, providers.public, op)
        ours = [Contender("latentkv fused" if op == FUSED else "latentkv", call, ours=True)]
        on_gpu = self.device.type == "cuda"
        if on_gpu and providers.served_by["cuda"] != "triton" and providers.triton_problem("cuda") is None:
            ours.append(Contender("latentkv triton", partial(provider_call, providers.triton, op), ours=True))
        if on_gpu and torch.version.cuda and torch.cuda.get_device_capability() >= (9, 0):
            ours = [y for x in ours for y in (x, replace(x, name=f"{x.name}, no overlap", overlap=False))]
        if op == FUSED and self.rotates:
            ours.append(Contender("latentkv pair", pair_call, ours=True))
        if op == GROUPED:
            ours.append(Contender("latentkv by layer", layer_calls, ours=True))
        return ours

    def _others(self, op: str, variant: str, layout: CacheLayout) -> tuple[list[Contender], dict[str, str]]:
        """The contenders to compare to, and why some of them cannot compete."""
        others: list[Contender] = []
        absent = {}
        for peer in self.peers:
            try:
                others += peer.contenders(op, variant, layout, self.rotates)
            except PeerError as error:
                absent[peer.name] = str(error)
        if self.device.type == "cpu":  # on a GPU the reference reads back to the host: no graph can hold it
            others.append(Contender("reference", partial(provider_call, providers.reference, op)))
        if self.compiled:
            try:
                others.append(compiled(op, layout.packed is not None))
            except PeerError as error:
                absent["torch.compile"] = str(error)
        return others, absent

    @torch.no_grad()
    def measure(self, op: str, heads: int, tokens: int, layout: CacheLayout, variant: str = "") -> list[Row]:
        """A row for each contender: its bytes against the reference's, then its times."""
        blank = self._blank(op, heads, tokens, layout, variant)
        others, absent = self._others(op, variant, layout)
        make = partial(self.inputs, op, heads, tokens, layout, variant)
        expected = make()
        provider_call(providers.reference, op, expected)()
        inputs = [make(seed) for seed in range(1, INPUT_SETS + 1)]
        rows = []
        for contender in [*self.contenders(op), *others]:
            row = replace(blank, contender=contender.name, note=contender.note)
            try:
                providers.set_overlap(contender.overlap)
                actual = make()
                contender.bind(actual)()
                row = replace(row, **_differences(actual, expected))
                timing = time_calls([contender.bind(x) for x in inputs], self.device)
                row = replace(row, p20_us=timing.p20, p50_us=timing.p50, p80_us=timing.p80)
            except Exception as error:
                row = replace(row, note=_failure(contender, error))
            finally:
                providers.set_overlap(True)
            rows.append(row)
        rows += [replace(blank, contender=name, note=why) for name, why in absent.items()]
        return _with_baseline(rows, {contender.name for contender in others})

    @torch.no_grad()
    def measure_host(self, op: str, heads: int, layout: CacheLayout) -> list[Row]:
        """What an eager call of one token costs the host; nothing on a CPU, where the call is the work."""
        if self.device.type == "cpu":
            return []
        several = ("pair", "chain", "torch.compile")
        variant = VARIANTS.get(op, ("",))[0]
        peers = [c for c in self._others(op, variant, layout)[0] if not c.name.endswith(several)]
        ours = {
            f"latentkv.{op}": partial(provider_call, providers.public, op),
            f"torch.ops.latentkv.{op}": partial(torch_op_call, op),
        }
        x = self.inputs(op, heads, 1, layout, variant)
        rows = []
        for contender in [*(Contender(name, bind, ours=True) for name, bind in ours.items()), *peers]:
            row = replace(self._blank(op, heads, 1, layout, variant), contender=contender.name, timing="host", bytes=0)
            try:
                timing = time_host(contender.bind(x))
                row = replace(row, p20_us=timing.p20, p50_us=timing.p50, p80_us=timing.p80)
            except Exception as error:
                row = replace(row, note=_failure(contender, error))
            rows.append(row)
        return _with_baseline(rows, {c.name for c in peers})

    @staticmethod
    def _format(op: str, layout: CacheLayout, variant: str) -> str:
        """Of the rows that are read or written."""
        if op == CONVERT:
            return conversion(variant, (layout.kv_lora_rank, layout.rope_dim))[0].format
        return "indexer" if op == INDEXER else layout.format

    def _blank(self, op: str, heads: int, tokens: int, layout: CacheLayout, variant: str = "") -> Row:
        return Row(
            op=op,
            model=self.model.name,
            kv_lora_rank=layout.kv_lora_rank,
            rope_dim=layout.rope_dim,
            heads=heads,
            tokens=tokens,
            format=self._format(op, layout, variant),
            contender="",
            timing="graph" if self.device.type == "cuda" else "wall",
            variant=variant,
            bytes=bytes_moved(op, heads, tokens, layout, self.rotates, variant),
            streamed_gb_s=self.streamed_gb_s,
            empty_us=self.empty_us,
        )


def _differences(actual: Inputs, expected: Inputs) -> dict[str, Any]:
    """Percent of the activations' bytes, and of the cache rows', that differ; stray writes count too."""
    ours, right = actual.outputs, expected.outputs

    def percent(a: Sequence[Tensor], b: Sequence[Tensor], of: int) -> float:
        pairs = zip(a, b, strict=True)
        return 100 * sum(int((x.view(torch.uint8) != y.view(torch.uint8)).sum()) for x, y in pairs) / of

    differences = {}
    if right.pages:
        differences["cache_differs_percent"] = percent(ours.pages, right.pages, right.cache_bytes)
    if right.activations:
        a, b = ([*x.activations.values()] for x in (ours, right))
        differences["qk_differs_percent"] = percent(a, b, right.activation_bytes)
    return differences


def _failure(contender: Contender, error: Exception) -> str:
    """Why a compiler or a peer failed, which it may in any way; we may not."""
    if contender.ours:
        raise error
    return str(error) if isinstance(error, PeerError) else f"{type(error).__name__}: {first_line(error)}"


def _with_baseline(rows: list[Row], others: set[str]) -> list[Row]:
    """The rows with the first timed one of ``others`` as their baseline."""
    for row in rows:
        if row.contender in others and row.p50_us:
            return [replace(r, baseline=row.contender, baseline_us=row.p50_us) for r in rows]
    return rows

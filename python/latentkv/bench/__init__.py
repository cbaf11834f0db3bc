"""How long an update of the cache takes beside its peers: the core of ``latentkv bench``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import providers
from ..layouts import CacheLayout
from ..models import Model
from .contenders import (
    FUSED,
    VLLM,
    Contender,
    PeerError,
    compiled,
    first_line,
    pair_call,
    provider_call,
    torch_op_call,
)
from .inputs import Inputs, activation_dtype, bytes_moved, rope_table
from .results import Row, device_name, environment, plot, read_csv, write_csv
from .timing import INPUT_SETS, Timing, empty_kernel, streamed_bandwidth, time_calls, time_host

__all__ = [
    "FUSED",
    "VLLM",
    "Bench",
    "Inputs",
    "PeerError",
    "Row",
    "Timing",
    "device_name",
    "environment",
    "plot",
    "provider_call",
    "read_csv",
    "rope_table",
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
    peers: Sequence[VLLM] = ()
    compiled: bool = False
    streamed_gb_s: float = field(init=False)
    empty_us: float | None = field(init=False)

    def __post_init__(self) -> None:
        """Measures the two floors."""
        self.streamed_gb_s = streamed_bandwidth(self.device)
        self.empty_us = empty_kernel(self.device)
        self._tables: dict[torch.dtype, Tensor | None] = {}

    def inputs(self, heads: int, tokens: int, layout: CacheLayout, seed: int = 0) -> Inputs:
        """Random arguments, equal for equal seeds: slots scattered over a cache of twice the tokens."""
        dtype = activation_dtype(layout)
        if dtype not in self._tables:
            self._tables[dtype] = rope_table(self.model, layout, self.device)
        table = self._tables[dtype]
        generator = torch.Generator(self.device).manual_seed(seed)
        cache = layout.allocate(-(-2 * tokens // layout.block_size), self.device, scale=0.25)
        slots = torch.randperm(cache.num_slots, generator=generator, device=self.device)[:tokens]
        limit = 1 if table is None else len(table)
        positions = torch.randint(limit, (tokens,), generator=generator, device=self.device)
        return Inputs.random(self.model, heads, positions, slots, table, cache, generator)

    def contenders(self, op: str) -> list[Contender]:
        """Our ways to do ``op``."""
        call = partial(provider_call, providers.public, op)
        ours = [Contender("latentkv fused" if op == FUSED else "latentkv", call, ours=True)]
        if self.device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability() >= (9, 0):
            ours.append(replace(ours[0], name=f"{ours[0].name}, no overlap", overlap=False))
        if op == FUSED and self.model.rope is not None:
            ours.append(Contender("latentkv pair", pair_call, ours=True))
        return ours

    def _others(self, op: str, layout: CacheLayout) -> tuple[list[Contender], dict[str, str]]:
        """The contenders to compare to, and why some peers cannot compete."""
        others, absent = [], {}
        for peer in self.peers:
            try:
                others += peer.contenders(op, layout, rotates=self.model.rope is not None)
            except PeerError as error:
                absent[peer.name] = str(error)
        if self.device.type == "cpu":  # on a GPU the reference reads back to the host: no graph can hold it
            others.append(Contender("reference", partial(provider_call, providers.reference, op)))
        if self.compiled:
            others.append(compiled(op))
        return others, absent

    def measure(self, op: str, heads: int, tokens: int, layout: CacheLayout) -> list[Row]:
        """A row for each contender: its bytes against the reference's, then its times."""
        blank = self._blank(op, heads, tokens, layout)
        others, absent = self._others(op, layout)
        expected = self.inputs(heads, tokens, layout)
        provider_call(providers.reference, op, expected)()
        inputs = [self.inputs(heads, tokens, layout, seed) for seed in range(1, INPUT_SETS + 1)]
        rows = []
        for contender in [*self.contenders(op), *others]:
            row = replace(blank, contender=contender.name, note=contender.note)
            try:
                providers.set_overlap(contender.overlap)
                actual = self.inputs(heads, tokens, layout)
                contender.bind(actual)()
                row = replace(row, **_differences(actual, expected))
                timing = time_calls([contender.bind(x) for x in inputs], self.device)
                row = replace(row, p20_us=timing.p20, p50_us=timing.p50, p80_us=timing.p80)
            except Exception as error:  # a compiler or a peer may fail in any way; we may not
                if contender.ours:
                    raise
                row = replace(row, note=f"{type(error).__name__}: {first_line(error)}")
            finally:
                providers.set_overlap(True)
            rows.append(row)
        rows += [replace(blank, contender=name, note=why) for name, why in absent.items()]
        return _with_baseline(rows, {contender.name for contender in others})

    def measure_host(self, op: str, heads: int, layout: CacheLayout) -> list[Row]:
        """What an eager call of one token costs the host; nothing on a CPU, where the call is the work."""
        if self.device.type == "cpu":
            return []
        x = self.inputs(heads, 1, layout)
        peers = [c for c in self._others(op, layout)[0] if not c.name.endswith("pair") and c.name != "torch.compile"]
        calls = {
            f"latentkv.{op}": provider_call(providers.public, op, x),
            f"torch.ops.latentkv.{op}": torch_op_call(op, x),
        } | {c.name: c.bind(x) for c in peers}
        rows = []
        for name, call in calls.items():
            timing = time_host(call)
            row = replace(self._blank(op, heads, 1, layout), contender=name, timing="host", bytes=0)
            rows.append(replace(row, p20_us=timing.p20, p50_us=timing.p50, p80_us=timing.p80))
        return _with_baseline(rows, {c.name for c in peers})

    def _blank(self, op: str, heads: int, tokens: int, layout: CacheLayout) -> Row:
        return Row(
            op=op,
            model=self.model.name,
            kv_lora_rank=layout.kv_lora_rank,
            rope_dim=layout.rope_dim,
            heads=heads,
            tokens=tokens,
            format=layout.format,
            contender="",
            timing="graph" if self.device.type == "cuda" else "wall",
            bytes=bytes_moved(op, heads, tokens, layout, rotates=self.model.rope is not None),
            streamed_gb_s=self.streamed_gb_s,
            empty_us=self.empty_us,
        )


def _differences(actual: Inputs, expected: Inputs) -> dict[str, Any]:
    """Percent of the bytes of q_pe and k_pe, and of the rows, that differ; stray writes count too."""

    def percent(names: Callable[[str], bool], of: int) -> float:
        pairs = [(t, expected.written[n]) for n, t in actual.written.items() if names(n)]
        return 100 * sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in pairs) / of

    row_bytes = len(actual.slots) * actual.cache.layout.row_bytes
    return {
        "qk_differs_percent": percent(lambda n: n in "qk", actual.q_pe.nbytes + actual.k_pe.nbytes),
        "cache_differs_percent": percent(lambda n: n not in "qk", row_bytes),
    }


def _with_baseline(rows: list[Row], others: set[str]) -> list[Row]:
    """The rows with the first timed one of ``others`` as their baseline."""
    for row in rows:
        if row.contender in others and row.p50_us:
            return [replace(r, baseline=row.contender, baseline_us=row.p50_us) for r in rows]
    return rows

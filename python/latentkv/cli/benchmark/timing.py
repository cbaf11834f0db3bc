"""The time of one call: in a replayed CUDA graph on a GPU, by the wall clock on a CPU.

Calls go round over eight input sets. A decode step's then lie in the GPU's L2 cache, as they do in an engine, where the
projections have just written them; a prefill's have to come from memory, as they would there too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

INPUT_SETS = 8
_GRAPH_CALLS = 64  # in a graph, to spread what a replay costs by itself ...
_GRAPH_US = 5000.0  # ... but no more than take so long, once round all inputs is done
_REPLAYS = 21
_WARM_REPLAYS = 5
_CPU_SECONDS = 0.5


@dataclass(frozen=True)
class Timing:
    """Percentiles of the time of one call, in microseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The percentiles of at least two samples."""
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(tenths[1], tenths[4], tenths[7])


def time_calls(calls: Sequence[Call], device: torch.device) -> Timing:
    """The time of one of ``calls``, which do the same work on different input sets."""
    return _time_graph(calls) if device.type == "cuda" else _time_wall(calls)


def _time_graph(calls: Sequence[Call]) -> Timing:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever a first call does
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    # As many rounds as the GPU's own time asks for, which a small graph tells: an eager call would count the host's.
    once = _captured(calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        start.record()
        once.replay()
        end.record()
    end.synchronize()
    rounds = max(1, min(-(-_GRAPH_CALLS // len(calls)), int(_GRAPH_US / (1e3 * start.elapsed_time(end)))))
    graph = _captured([*calls] * rounds)
    for _ in range(_WARM_REPLAYS):
        graph.replay()
    # Nothing waits between the replays, so the GPU never runs dry and launching stays hidden.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * _REPLAYS)]
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    count = rounds * len(calls)
    return Timing.of([1e3 * a.elapsed_time(b) / count for a, b in zip(marks[::2], marks[1::2], strict=True)])


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _time_wall(calls: Sequence[Call]) -> Timing:
    for call in calls:
        call()
    samples: list[float] = []
    deadline = time.perf_counter() + _CPU_SECONDS
    while len(samples) < 5 or time.perf_counter() < deadline:
        start = time.perf_counter_ns()
        calls[len(samples) % len(calls)]()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return Timing.of(samples)


def time_host(call: Call) -> Timing:
    """What one eager call costs the host on a GPU: launches go on while the kernels run."""
    samples = []
    for _ in range(_REPLAYS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(100):
            call()
        samples.append((time.perf_counter_ns() - start) / 1e5)
    torch.cuda.synchronize()
    return Timing.of(samples[1:])


def streamed_bandwidth(device: torch.device) -> float:
    """GB/s, read and written, of an elementwise multiply of bf16 numbers too many for any cache."""
    x = torch.randn(1 << (28 if device.type == "cuda" else 26), dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    timing = time_calls([lambda: torch.mul(x, 1.5, out=y)], device)
    return 2e-3 * x.nbytes / timing.p50


def empty_kernel(device: torch.device) -> float | None:
    """Microseconds of an empty kernel in a graph; None on a CPU or where torch cannot compile one."""
    if device.type != "cuda":
        return None
    try:
        kernel = torch.cuda._compile_kernel('extern "C" __global__ void empty() {}', "empty")
        return time_calls([lambda: kernel((1, 1, 1), (32, 1, 1), ())], device).p50
    except (AttributeError, RuntimeError, OSError):
        return None

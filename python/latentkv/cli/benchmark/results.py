"""Results: rows, their CSV file, and their plot."""

from __future__ import annotations

import csv
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ... import __version__, providers
from .peers import Peer


@dataclass(frozen=True)
class Row:
    """One line of results. Fields and derived properties are the columns of the CSV, after the environment.

    Attributes:
        heads: 0 where the op knows no query.
        timing: ``graph`` (replay on a GPU), ``wall`` (clock of a CPU) or ``host`` (eager call on a GPU).
        variant: what the op does besides, of those that may: ``norm``, ``power of two``; from and to of a conversion.
        p20_us, p50_us, p80_us: microseconds of one call; None where the contender could not run (``note``).
        bytes: what one call must move; 0 for host times.
        streamed_gb_s: what an elementwise multiply streams in the same run.
        empty_us: an empty kernel in a graph of the same run.
        baseline, baseline_us: the contender that ``speedup`` refers to: a peer, else the reference.
        qk_differs_percent, cache_differs_percent: bytes unlike the reference's: of rope parts, (decode_prologue) of the
            query or (gather_cache) of the rows gathered, and of cache rows.
    """

    op: str
    model: str
    kv_lora_rank: int
    rope_dim: int
    heads: int
    tokens: int
    format: str
    contender: str
    timing: str
    variant: str = ""
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    bytes: int = 0
    streamed_gb_s: float | None = None
    empty_us: float | None = None
    baseline: str = ""
    baseline_us: float | None = None
    qk_differs_percent: float | None = None
    cache_differs_percent: float | None = None
    note: str = ""

    @property
    def kind(self) -> str:
        """The format, and the variant if there is one."""
        return f"{self.format}, {self.variant}" if self.variant else self.format

    @property
    def gb_s(self) -> float | None:
        """Bytes over time."""
        return self.bytes * 1e-3 / self.p50_us if self.bytes and self.p50_us else None

    @property
    def share_of_streamed(self) -> float | None:
        """The part of the streamed bandwidth reached."""
        return self.gb_s / self.streamed_gb_s if self.gb_s and self.streamed_gb_s else None

    @property
    def times_empty(self) -> float | None:
        """The time in empty kernels."""
        return self.p50_us / self.empty_us if self.p50_us and self.empty_us else None

    @property
    def speedup(self) -> float | None:
        """How many times faster than the baseline."""
        return self.baseline_us / self.p50_us if self.p50_us and self.baseline_us else None

    @property
    def wrong(self) -> bool:
        """One of our contenders gave a byte that is not the reference's."""
        differs = self.qk_differs_percent or self.cache_differs_percent
        return self.contender.startswith("latentkv") and bool(differs)


ENVIRONMENT = ("device", "driver", "toolkit", "torch", "latentkv", "peers", "date")
_DERIVED = ("gb_s", "share_of_streamed", "times_empty", "speedup")


def write_csv(path: Path, rows: Iterable[Row], environment: dict[str, str]) -> None:
    """One line per row, each with the environment."""
    columns = [*environment, *(f.name for f in fields(Row)), *_DERIVED]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            values = asdict(row) | {name: getattr(row, name) for name in _DERIVED}
            short = {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in values.items()}
            writer.writerow(environment | short)


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows and the environment in a file of :func:`write_csv`, of this version or an earlier one.

    Raises:
        ValueError: it is none.
    """
    parse: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": int,
        "float | None": lambda text: float(text) if text else None,
    }
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        columns = [f for f in fields(Row) if f.name in lines[0]]  # an earlier version knew fewer
        rows = [Row(**{f.name: parse[str(f.type)](line[f.name]) for f in columns}) for line in lines]
        facts = {name: lines[0][name] for name in ENVIRONMENT}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"expected a CSV file by latentkv bench, got {path} ({error!r})") from error
    return rows, facts


def summary(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """How many times faster we are than whom: by format and variant, and other; then by contender of ours.

    Of all heads and tokens: the least, and the geometric mean. With several others a last one, ``the fastest``, is
    the fastest of them at each point.
    """
    points: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in rows:
        if row.timing != "host" and row.p50_us:
            points.setdefault((row.kind, row.heads, row.tokens), {})[row.contender] = row.p50_us
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (kind, _, _), times in points.items():
        ours = {name: us for name, us in times.items() if name.startswith("latentkv")}
        others = {name: us for name, us in times.items() if name not in ours}
        if len(others) > 1:
            others["the fastest"] = min(others.values())
        for name, us in others.items():
            for own, own_us in ours.items():
                ratios.setdefault((kind, name), {}).setdefault(own, []).append(us / own_us)
    return {
        key: {own: (min(of), statistics.geometric_mean(of)) for own, of in by_own.items()}
        for key, by_own in ratios.items()
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} (threads: {torch.get_num_threads()})"


def environment(device: torch.device, peers: Iterable[Peer] = ()) -> dict[str, str]:
    """Where the numbers come from: device, driver, versions, peers and date."""
    driver = ""
    if device.type == "cuda" and (smi := shutil.which("nvidia-smi")):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    facts = (
        device_name(device),
        driver,
        toolkit if device.type == "cuda" else "",
        torch.__version__,
        f"{__version__} {providers.served_by[device.type]}",
        "; ".join(f"{peer.name} {peer.version}" for peer in peers),
        date.today().isoformat(),
    )
    return dict(zip(ENVIRONMENT, facts, strict=True))


# Okabe and Ito's colours, told apart in every common colour vision; the marker repeats the distinction.
_STYLES = {
    "latentkv": ("#0072B2", "o", "-"),
    "latentkv fused": ("#0072B2", "o", "-"),
    "latentkv, no overlap": ("#56B4E9", "o", "--"),
    "latentkv fused, no overlap": ("#56B4E9", "o", "--"),
    "latentkv pair": ("#009E73", "s", "-"),
    "latentkv by layer": ("#009E73", "s", "-"),
    "latentkv triton": ("#F0E442", "D", "-"),
    "latentkv triton, no overlap": ("#F0E442", "D", "--"),
    "vllm": ("#D55E00", "^", "-"),
    "vllm fused": ("#D55E00", "^", "-"),
    "vllm kimi-k3": ("#D55E00", "^", "-"),
    "vllm rms_norm + kimi-k3": ("#D55E00", "^", "-"),
    "vllm gather_and_maybe_dequant": ("#D55E00", "^", "-"),
    "vllm cp_gather_and_upconvert": ("#D55E00", "^", "-"),
    "vllm cp_gather": ("#E69F00", "v", "-"),
    "vllm pair": ("#E69F00", "v", "-"),
    "vllm chain": ("#E69F00", "v", "-"),
    "flashinfer": ("#CC79A7", "X", "-"),
    "flashinfer, no overlap": ("#CC79A7", "X", "--"),
    "reference": ("#CC79A7", "D", "-"),
    "torch.compile": ("#000000", "P", "-"),
}


def plot(rows: Sequence[Row], path: Path, device: str) -> None:
    """Times over tokens, a panel for each number of heads, format and variant, above the floor that memory sets."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.timing != "host" and row.p50_us]
    heads, kinds = sorted({r.heads for r in rows}), list(dict.fromkeys(r.kind for r in rows))
    figure = Figure(figsize=(4.6 * len(kinds) + 0.4, 3.4 * len(heads) + 0.9), dpi=130, layout="constrained")
    axes = figure.subplots(len(heads), len(kinds), squeeze=False, sharex=True, sharey=True)
    for i, h in enumerate(heads):
        for j, kind in enumerate(kinds):
            ax, panel = axes[i][j], [r for r in rows if (r.heads, r.kind) == (h, kind)]
            _draw_panel(ax, panel)
            ax.set_title(f"{h} heads, {kind}" if h else kind, fontsize=11)
            if i == len(heads) - 1:
                ax.set_xlabel("tokens")
            if j == 0:
                ax.set_ylabel("microseconds a call")
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    lowest = min(time for r in rows for time in (r.p50_us, r.empty_us) if time)
    axes[0][0].set_ylim(bottom=lowest / 2)  # the axes are shared; the memory's floor may go below
    columns = 1 + len(kinds)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{rows[0].op} of {rows[0].model}\n{device}", fontsize=12)
    figure.savefig(path)


def _draw_panel(ax: Any, panel: Sequence[Row]) -> None:
    floor = sorted({(r.tokens, r.bytes * 1e-3 / r.streamed_gb_s) for r in panel if r.streamed_gb_s})
    if floor:
        ax.plot(*zip(*floor, strict=True), color="0.5", ls=":", lw=1.5, label="floor: bytes / streamed bandwidth")
    if panel and (empty := panel[0].empty_us):
        ax.axhline(empty, color="0.5", ls="-.", lw=1.2, label="floor: an empty kernel")
    for i, (name, (colour, marker, line)) in enumerate(_STYLES.items()):
        if points := sorted((r.tokens, r.p50_us) for r in panel if r.contender == name):
            style = {"color": colour, "marker": marker, "ls": line, "ms": 5, "lw": 1.6}
            ax.plot(*zip(*points, strict=True), **style, zorder=20 - i, label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:,g}")
    tokens = sorted({r.tokens for r in panel})
    ax.set_xticks(tokens, [str(t) for t in tokens])
    ax.grid(True, which="major", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)

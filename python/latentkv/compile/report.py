"""What the pass saw, what it fused, and why it left the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

__all__ = ["Reason", "Report", "Site"]


class Reason(Enum):
    """Why a site is not fused: what is the matter, and what to do where nothing more is known of the site."""

    advice: str

    def __new__(cls, value: str, advice: str) -> Reason:  # noqa: D102
        reason = object.__new__(cls)
        reason._value_, reason.advice = value, advice
        return reason

    PARTITIONED = (
        "k_pe is an input of this graph: if it is rotated, then in another",
        "compile RoPE and the update as one graph, without a graph break or a split between them",
    )
    NO_ROPE = (
        "k_pe is not rotated here, or not by RoPE as latentkv computes it",
        "rotate the whole of k_pe by latentkv.rope_, or by plain PyTorch with a row of the table for each token",
    )
    NO_QUERY = (
        "no query is rotated with the same table and positions",
        "rotate q_pe [N, H, R] in the same graph, by the same tensors of positions and cos and sin as k_pe",
    )
    NO_UPDATE = (
        "no cache update takes the rotated key in this graph",
        "write the cache in the same graph, by latentkv::layer_write_cache or another update that the pass knows",
    )
    ROUNDING = (
        "the arithmetic rounds otherwise than latentkv's",
        "compute RoPE by latentkv.rope_, or pass allow_rounding=True, which changes bits",
    )
    OTHER_USER = (
        "something else reads q_pe or k_pe before the rotation",
        "let it read the rotated tensor, or rotate a clone by latentkv.rope_",
    )
    DTYPE = (
        "a dtype that the fused op does not take",
        "give q_pe, k_pe and kv_c one dtype, bf16, fp16 or fp32, and the table one of these",
    )
    FORMAT = (
        "a format of rows that the fused op does not write to the same bytes",
        "use a format of latentkv.CacheLayout, and latentkv's own update to write it",
    )
    SIDE_EFFECT = (
        "an op with side effects stands between rope and update",
        "call it before RoPE or after the update",
    )
    SHAPE = (
        "shapes other than positions [N], q_pe [N, H, R], k_pe [N, R] or [N, 1, R], kv_c [N, L]; or strides",
        "use these shapes, the last dimension contiguous",
    )
    PADDING = (
        "slot_mapping may be shorter than positions: the fused op would not rotate the rest",
        "if it never is, say so before the update: torch._check(slot_mapping.shape[0] == positions.shape[0])",
    )
    INPUT = (
        "q or k is an input of the graph that keeps its value",
        "compute it in this graph, or rotate it in place: q.copy_(rotated)",
    )
    TABLE = (
        "cos and sin do not come from one table [max_position, R] by positions [N]",
        "take both from one row of a table, as latentkv.build_cos_sin_cache makes it: table[positions].chunk(2, -1)",
    )
    DEPENDENCE = (
        "what the update is given is computed from what was rotated",
        "compute it from values before the rotation",
    )


DECLARE_N = "declare no more than N dynamic (torch._dynamo.mark_dynamic): heads and widths have to be numbers"


class Unfused(Exception):
    """Why a site is left as it is, and what to do about it if more can be said than of the reason."""

    def __init__(self, reason: Reason, detail: str = "", advice: str = "") -> None:
        super().__init__(detail)
        self.reason, self.detail, self.advice = reason, detail, advice or reason.advice


@dataclass(frozen=True)
class Site:
    """One cache update (or one rope op without any) in one compiled graph.

    Attributes:
        update: the update's op, None for a rope op without an update.
        rope: the op that rotates, ``PyTorch`` for plain arithmetic, None where no rotation was found.
        fused: whether the fused op took their place.
        reason: why not; None where fused.
        detail: the reason, about this very site.
        advice: what to do to have it fused; empty where it is.
        where: the line that calls the update (or the rope op), if torch knows it.
    """

    update: str | None
    rope: str | None
    fused: bool
    reason: Reason | None = None
    detail: str = ""
    where: str = ""
    advice: str = ""

    def __str__(self) -> str:
        what = f"{self.rope or '?'} + {self.update or '?'}"
        verdict = "fused" if self.reason is None else f"not fused: {self.reason.name}: {self.reason.value}"
        detail = f" ({self.detail})" if self.detail else ""
        advice = f". To fuse it, {self.advice}" if self.advice else ""
        return f"{what}: {verdict}{detail}{advice}{f' [{self.where}]' if self.where else ''}"


@dataclass
class Report:
    """Every site of every graph that was compiled while the pass was on.

    A graph that Inductor takes from its cache was seen when it was compiled, perhaps by another process, and is not
    seen again: what was fused then is fused.

    Attributes:
        sites: in the order of compilation.
        graphs: how many graphs the pass was given, those without a site too.
        cached: how many came from Inductor's cache instead.
    """

    sites: list[Site] = field(default_factory=list)
    graphs: int = 0
    cached: int = 0

    @property
    def fused(self) -> list[Site]:
        """The sites that were fused."""
        return [site for site in self.sites if site.fused]

    @property
    def unfused(self) -> list[Site]:
        """The sites that were not."""
        return [site for site in self.sites if not site.fused]

    def __str__(self) -> str:
        head = f"latentkv.compile: {len(self.fused)} of {len(self.sites)} sites fused in {self.graphs} graphs"
        if self.cached:
            head += f", {self.cached} more from Inductor's cache as they were compiled before"
        counts: dict[str, int] = {}
        for site in self.sites:
            counts[str(site)] = counts.get(str(site), 0) + 1
        return "\n".join([head, *(f"  {count} x {text}" for text, count in counts.items())])

"""The pass as Inductor takes it, and the switch that puts it there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from ..cache.platform import Platform
from .fusion import fuse
from .known_ops import keep_updates
from .report import Report

__all__ = ["Fusion", "FusionError", "FusionPass", "enable"]

_log = logging.getLogger("latentkv.compile")


class FusionError(RuntimeError):
    """With ``strict=True``: there was something to fuse, or there should have been, and nothing was."""


class FusionPass(CustomGraphPass):
    """Fuses RoPE and cache update in a post-grad graph: for ``torch._inductor.config.post_grad_custom_pre_pass``.

    :func:`enable` puts one there. Sites are logged under ``latentkv.compile``: fused ones at INFO, others at WARNING.

    Args:
        strict: raise :class:`FusionError` for a graph that has cache updates of which none can be fused.
        allow_rounding: fuse also where the unfused arithmetic rounds otherwise than latentkv's, which changes bits:
            RoPE in 16 bits, and the ops of others that may contract a product and a sum.

    Attributes:
        report: what the pass has seen.
    """

    def __init__(self, *, strict: bool = False, allow_rounding: bool = False) -> None:
        self.strict, self.allow_rounding = strict, allow_rounding
        self.report = Report()
        keep_updates()

    def __call__(self, graph: Graph) -> None:
        """Rewrites the graph."""
        sites = fuse(graph, self.allow_rounding)
        self.report.graphs += 1
        self.report.sites += sites
        for site in sites:
            _log.log(logging.INFO if site.fused else logging.WARNING, "%s", site)
        if self.strict and any(site.update for site in sites) and not any(site.fused for site in sites):
            lines = "\n  ".join(map(str, sites))
            raise FusionError(f"latentkv.compile: strict: no cache update of this graph could be fused:\n  {lines}")

    def uuid(self) -> Any:
        """What Inductor's cache knows the pass by: the package's sources, the options, the platform."""
        sources = sorted(map(str, Path(__file__).parents[1].rglob("*.py")))
        return get_hash_for_files(tuple(sources), f"{self.strict} {self.allow_rounding} {Platform.detect()}")


class _Chain(CustomGraphPass):
    """Several passes as one."""

    def __init__(self, passes: list[Callable[[Graph], None]]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any:
        """The uuids of all; None, which keeps graphs out of the cache, if one has none."""
        ids = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return None if None in ids else tuple(ids)


class Fusion:
    """The pass, switched on by :func:`enable`. As a context manager it switches off at the end."""

    def __init__(self, own: FusionPass) -> None:
        before = config.post_grad_custom_pre_pass
        others = list(before) if isinstance(before, list | tuple) else [before] if before else []
        if any(isinstance(p, FusionPass) for other in others for p in getattr(other, "passes", [other])):
            raise RuntimeError("latentkv.compile.enable: expected the pass to be off, got one that is on already")
        self._own, self._before, self._hits = own, before, _cache_hits()
        # One pass, not a list: torch takes lists from 2.13 on only.
        self._ours = _Chain([*others, own]) if others else own
        config.post_grad_custom_pre_pass = self._ours

    @property
    def report(self) -> Report:
        """What the pass has seen so far."""
        if config.post_grad_custom_pre_pass is self._ours:
            self._own.report.cached = _cache_hits() - self._hits
        return self._own.report

    def disable(self) -> None:
        """Switches the pass off, and restores the passes that were there before.

        Raises:
            RuntimeError: ``torch._inductor.config.post_grad_custom_pre_pass`` has been changed since.
        """
        if config.post_grad_custom_pre_pass is not self._ours:
            raise RuntimeError("latentkv.compile: disable: post_grad_custom_pre_pass: expected ours, got another")
        _ = self.report  # its last count
        config.post_grad_custom_pre_pass = self._before

    def __enter__(self) -> Fusion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()
        # A graph from the cache was seen when it was compiled; what it held is not known here.
        report = self.report
        if kind is None and self._own.strict and report.graphs and not report.fused and not report.cached:
            raise FusionError(f"latentkv.compile: strict: nothing was fused\n{report}")


def _cache_hits() -> int:
    return max(counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])


def enable(*, strict: bool = False, allow_rounding: bool = False) -> Fusion:
    """Switches the pass on for all that ``torch.compile`` compiles from now on with Inductor.

    It goes behind the passes that ``torch._inductor.config.post_grad_custom_pre_pass`` already holds.

    Args:
        strict: raise :class:`FusionError` for a graph that has cache updates of which none can be fused; and at the
            end of a ``with`` in which graphs were compiled and nothing was fused at all.
        allow_rounding: fuse also where the unfused arithmetic rounds otherwise than latentkv's, which changes bits:
            RoPE in 16 bits, and the ops of others that may contract a product and a sum.

    Raises:
        RuntimeError: the pass is on already.
    """
    return Fusion(FusionPass(strict=strict, allow_rounding=allow_rounding))

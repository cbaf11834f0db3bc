"""The plugin for vLLM: an entry point of group ``vllm.general_plugins``, which vLLM calls in each of its processes.

It is imported by processes that never run a model, so nothing of vLLM's layers is imported before vLLM does. Two
environment variables steer it:

``LATENTKV_VLLM``
    ``prologue`` (default): of decode tokens, all between the absorbing product and attention is one launch.
    ``rope``: RMSNorm, RoPE and the cache's rows only; vLLM does the rest. For comparisons.
    ``off``: vLLM as it is.
``LATENTKV_VLLM_WRITES``
    ``own`` (default): models that do not use vLLM's MLA layer write their caches themselves.
    ``latentkv``: ``vllm._custom_ops.concat_and_cache_mla`` is latentkv's. It saves no launch.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from .. import mode_of

__all__ = ["MODES", "WRITES", "register"]

MODES = ("prologue", "rope", "off")
WRITES = ("own", "latentkv")
OP = "latentkv_mla"

logger = logging.getLogger("vllm.latentkv")  # below vLLM's own, which shows INFO
_done: set[str] = set()


def register() -> None:
    """Registers the layer with vLLM, once its module is imported. A second call does nothing.

    Raises:
        ValueError: an environment variable has an unknown value.
    """
    mode, writes = mode_of("LATENTKV_VLLM", MODES), mode_of("LATENTKV_VLLM_WRITES", WRITES)
    if writes == "latentkv":
        _once("vllm._custom_ops", _take_writes)
    if mode == "off":
        return
    # The graph is split at the layer's op, which has to be known before vLLM makes a configuration.
    try:
        from vllm.config.compilation import CompilationConfig

        ops = CompilationConfig._attention_ops
    except (ImportError, AttributeError):
        _step_aside(["vllm.config.compilation:CompilationConfig._attention_ops"])
        return
    if f"vllm::{OP}" not in ops:
        ops.append(f"vllm::{OP}")
    _once("vllm.model_executor.layers.mla", lambda: _take_layers(mode))


def _step_aside(why: Sequence[str]) -> None:
    from vllm.version import __version__

    logger.warning("latentkv leaves vLLM %s alone, as it lacks: %s", __version__, ", ".join(why))


def _take_layers(mode: str) -> None:
    from . import contract

    if missing := contract.missing():
        _step_aside(missing)
        return
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper

    if (taken := op_registry_oot.get(MultiHeadLatentAttentionWrapper.__name__)) is not None:
        logger.warning("latentkv leaves vLLM's MLA layers alone: another plugin has replaced them by %s", taken)
        return
    from . import layer

    layer.install(mode)


def _take_writes() -> None:
    from vllm import _custom_ops

    from .writes import rebound

    _custom_ops.concat_and_cache_mla = rebound(_custom_ops.concat_and_cache_mla)


def _once(module: str, then: Callable[[], None]) -> None:
    """Calls a function once ``module`` has been imported, be it now or later."""
    if module in _done:
        return
    _done.add(module)
    if module in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _After(module, then))


class _After(importlib.abc.MetaPathFinder):
    """Finds one module as everybody else would, and calls a function after it has run."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self._module, self._then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def run_and_call(module: ModuleType) -> None:
                run(module)
                self._then()

            loader.exec_module = run_and_call
        return spec

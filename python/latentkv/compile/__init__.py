"""The side of torch.compile: cache updates that know a cache by its layer's name, and the pass that fuses.

Inductor, and numpy, which the pass computes with, are only imported once the pass is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .layers import layer_index, step
from .report import Reason, Report, Site

if TYPE_CHECKING:
    from .inductor import Fusion, FusionError, FusionPass, enable

__all__ = ["Fusion", "FusionError", "FusionPass", "Reason", "Report", "Site", "enable", "layer_index", "step"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        try:
            from . import inductor
        except ModuleNotFoundError as error:
            if error.name != "numpy":
                raise
            raise ImportError("latentkv.compile: the pass needs numpy: pip install 'latentkv[compile]'") from error
        return getattr(inductor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

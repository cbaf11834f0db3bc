"""Who computes an op: ``native`` (compiled kernels), ``triton``, or ``reference`` (plain PyTorch, the specification).

At import the namespace ``torch.ops.latentkv`` is served, device by device, by the first provider that can: ``native``
where its library loads, else ``triton`` where there is a GPU's torch and the package, else ``reference``; the
environment variable ``LATENTKV_PROVIDER`` names one instead. An op that it lacks (``native`` has no ``mla_decode``)
comes from the next. All of them stay callable as ``latentkv.providers.<name>``.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from .cache.platform import has_code_for, installed_gpus
from .ops import reference as _reference
from .ops.public import Op, Provider
from .ops.schemas import LIBRARIES, NAMESPACE, NATIVE_NAMESPACE, NATIVE_OP_NAMES, OP_NAMES
from .ops.warmup import warm_up

__all__ = [
    "Provider", "library_errors", "native", "public", "reference", "served_by", "set_overlap", "triton",
    "triton_problem", "warm_up",
]  # fmt: skip


def _load(name: str) -> ctypes.CDLL:
    """The library ``_<name>``, its kernels registered; FileNotFoundError where it was not built.

    It is of use as long as one GPU of this machine can run it.
    """
    # Looked up as a module, not imported: an editable install keeps libraries and sources apart.
    spec = importlib.util.find_spec(f"{__package__}._{name}")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the library _{name} was not built")
    try:
        library = ctypes.CDLL(spec.origin)
        architectures_of, register = library.latentkv_architectures, library.latentkv_register
    except Exception as error:  # whatever a damaged library throws, or one of another build, which lacks symbols
        raise OSError(f"expected the library _{name} of this build, got {type(error).__name__}: {error}") from error
    architectures_of.restype = ctypes.c_char_p
    architectures = architectures_of().decode()
    gpus = dict.fromkeys(installed_gpus() if architectures else ())
    without = [gpu for gpu in gpus if not has_code_for(architectures, gpu)]
    if without:
        found = f"the library _{name} was built for {architectures}, not for this machine's {', '.join(without)}"
        if len(without) == len(gpus):
            raise OSError(found)
        warnings.warn(
            f"latentkv: {found}, where ops fail with 'no kernel image': hide it, or set LATENTKV_PROVIDER=triton",
            RuntimeWarning,
            stacklevel=2,
        )
    register.argtypes = [ctypes.c_char_p]
    register(NATIVE_NAMESPACE.encode())
    return library


_libraries: dict[str, ctypes.CDLL] = {}
library_errors: dict[str, str] = {}  # device -> why its library is not there

# A ROCm torch calls its devices "cuda" too.
for _device, _library in (("cpu", "cpu"), ("cuda", "hip" if torch.version.hip else "cuda")):
    if _device == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        library_errors[_device] = "this torch is built without CUDA or ROCm"
        continue
    try:
        _libraries[_device] = _load(_library)
    except OSError as _error:
        library_errors[_device] = str(_error)
        if not isinstance(_error, FileNotFoundError):
            warnings.warn(f"latentkv passes over its library for {_device}: {_error}", RuntimeWarning, stacklevel=2)


def _ops_of(namespace: str, names: Sequence[str]) -> dict[str, Op]:
    return {name: getattr(getattr(torch.ops, namespace), name).default for name in names}


def triton_problem(device: str) -> str | None:
    """Why the Triton kernels cannot run on ``device`` ("cpu" or "cuda"); None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device == "cpu":
        interprets = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interprets else "on a CPU they need TRITON_INTERPRET=1, which is slow"
    return None if torch.version.cuda or torch.version.hip else "this torch is built without CUDA or ROCm"


def _triton_op(name: str) -> Op:
    def op(*args: Any) -> Any:  # imported when first asked for: that takes its time
        return getattr(importlib.import_module("latentkv.ops.triton"), name)(*args)

    return op


native = Provider("native", _ops_of(NATIVE_NAMESPACE, NATIVE_OP_NAMES))
triton = Provider("triton", {name: _triton_op(name) for name in OP_NAMES})
reference = Provider("reference", {name: getattr(_reference, name) for name in OP_NAMES})
_serving: dict[tuple[str, str], str] = {}  # op and device -> the provider of torch.ops.latentkv
public = Provider("public", _ops_of(NAMESPACE, OP_NAMES), _serving)


def _serve() -> dict[str, str]:
    wanted = os.environ.get("LATENTKV_PROVIDER") or None
    if wanted not in (None, "native", "triton", "reference"):
        raise ValueError(f"LATENTKV_PROVIDER: expected native, triton or reference, got {wanted!r}")
    able = {
        device: [
            provider
            for provider, can in (
                (native, device in _libraries),
                (triton, triton_problem(device) is None),
                (reference, True),
            )
            if can
        ]
        for device in ("cpu", "cuda")
    }
    if wanted and not any(wanted == p.name for providers in able.values() for p in providers):
        why = library_errors if wanted == "native" else {device: triton_problem(device) for device in able}
        raise ImportError(f"LATENTKV_PROVIDER={wanted}, but it can run nowhere: {why}")
    served: dict[str, str] = {}
    for device, providers in able.items():
        names = [p.name for p in providers]
        if wanted and wanted not in names:
            continue
        providers = providers[names.index(wanted) if wanted else 0 :]
        served[device] = providers[0].name
        if providers[0] is native:
            _libraries[device].latentkv_register(NAMESPACE.encode())
        for name in OP_NAMES:
            provider = next(p for p in providers if p.has(name))
            _serving[name, device] = provider.name
            if provider is not native:
                LIBRARIES[NAMESPACE].impl(name, provider._op(name), device.upper())
    # Asked last: the question starts CUDA, after which a process must not fork.
    if wanted is None and served["cuda"] == "reference" and torch.cuda.is_available():
        warnings.warn(
            f"latentkv runs its slow reference on the GPU: {library_errors['cuda']}", RuntimeWarning, stacklevel=2
        )
    return served


served_by: dict[str, str] = _serve()  # device -> the provider of torch.ops.latentkv


def set_overlap(enabled: bool) -> None:
    """Switches programmatic dependent launch (sm_90 and later; on by default) of the native CUDA and Triton kernels."""
    library: Any = _libraries.get("cuda")
    if library is not None and not torch.version.hip:
        library.latentkv_set_overlap(ctypes.c_bool(enabled))
    if triton_problem("cuda") is None:
        launch: Any = importlib.import_module("latentkv.ops.triton.launch")
        launch.overlap = enabled

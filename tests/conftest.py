"""What all tests share: the fixtures of latentkv.testing, hypothesis profiles, providers, subprocesses."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import amd
import latentkv
import pytest
import torch
from hypothesis import HealthCheck, settings
from interpreted import INTERPRETED
from latentkv.providers import Provider
from latentkv.testing.matrix import devices

pytest_plugins = ["latentkv.testing.plugin"]
collect_ignore = ["engines"]  # those have environments of their own: make test-vllm

settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True)
settings.register_profile("hour", parent=settings.get_profile("dev"), max_examples=3600)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# The tensors here are too small to share among threads, and workers of pytest-xdist would fight over the cores.
torch.set_num_threads(1)

# Leaves no import hook of an editable install between a copy of the package and its path.
PLAIN_IMPORTS = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if f.__module__.startswith('_frozen_importlib')]\n"
)

Python = Callable[..., "subprocess.CompletedProcess[str]"]


# Where a test runs that takes a device and a provider: each provider on each device of the machine (Triton's kernels on
# a GPU; on a CPU their interpreter is too slow for all of it, and has a process of its own: interpreted.py), and the
# HIP library on emulated AMD chips, whose memory is the host's.
AMD = () if amd.problem() else amd.ARCHS
PROVIDERS = ("native", "reference")
TARGETS = [
    *((device, name) for device in devices() for name in PROVIDERS),
    *([("cuda", "triton")] if torch.cuda.is_available() else []),
    *(("cpu", arch) for arch in AMD),
]
if INTERPRETED:
    TARGETS = [("cpu", "triton")]


def pytest_report_header() -> str:
    return f"emulated AMD devices: {', '.join(AMD) or f'absent: {amd.problem()}'}"


def pytest_sessionfinish() -> None:
    """Leaves nothing to collect: pytest does so five times at the end, and execnet interrupts what takes over 5 s."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    takes = {"device", "provider"} & set(metafunc.fixturenames)
    if any("device" in marker.args[0] for marker in metafunc.definition.iter_markers("parametrize")):
        return
    if len(takes) == 2:
        metafunc.parametrize(("device", "provider"), TARGETS, indirect=True)
    for name in takes if len(takes) == 1 else ():
        metafunc.parametrize(name, {"device": devices(), "provider": PROVIDERS}[name], indirect=True)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where tensors lie."""
    return request.param


@pytest.fixture(scope="session")
def provider(request: pytest.FixtureRequest) -> Provider:
    """Who computes."""
    return amd.provider(request.param) if request.param in AMD else getattr(latentkv.providers, request.param)


def on_cpu(device: str, provider: Provider) -> bool:
    """Whether values are checked: the CPU raises where a GPU, an emulated one too, skips the row."""
    return device == "cpu" and provider.name not in AMD


@pytest.fixture(scope="session")
def python() -> Python:
    """Runs code in a fresh interpreter: ``python(code, path=folder of the package, LATENTKV_X="...")``."""

    def run(code: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("LATENTKV_")}
        env["PYTHONPATH"] = str(path or Path(latentkv.__file__).parents[1])
        command = [sys.executable, "-c", PLAIN_IMPORTS + code if path else code]
        return subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=300)

    return run

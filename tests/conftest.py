"""What all tests share: the fixtures of latentkv.testing, hypothesis profiles, providers, subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import latentkv
import pytest
import torch
from hypothesis import HealthCheck, settings
from latentkv.providers import Provider

pytest_plugins = ["latentkv.testing.plugin"]

settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# The tensors here are too small to share among threads, and workers of pytest-xdist would fight over the cores.
torch.set_num_threads(1)

# Leaves no import hook of an editable install between a copy of the package and its path.
PLAIN_IMPORTS = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if f.__module__.startswith('_frozen_importlib')]\n"
)

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", params=["native", "reference"])
def provider(request: pytest.FixtureRequest) -> Provider:
    """Runs a test once for each provider."""
    return getattr(latentkv.providers, request.param)


@pytest.fixture(scope="session")
def python() -> Python:
    """Runs code in a fresh interpreter: ``python(code, path=folder of the package, LATENTKV_X="...")``."""

    def run(code: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("LATENTKV_")}
        env["PYTHONPATH"] = str(path or Path(latentkv.__file__).parents[1])
        command = [sys.executable, "-c", PLAIN_IMPORTS + code if path else code]
        return subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=300)

    return run

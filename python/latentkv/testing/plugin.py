"""Pytest fixtures for suites that build on latentkv: ``pytest_plugins = ["latentkv.testing.plugin"]``.

``--backend NAME`` (repeatable) picks attention backends; tests that take the fixture ``mla_backend`` run once for each.
``device`` runs a test on every device of the machine: the CPU always, a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch

from ..backends import BACKENDS, layout_for
from ..layouts import FORMATS, CacheLayout


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--backend``."""
    parser.addoption(
        "--backend",
        action="append",
        choices=sorted(BACKENDS),
        metavar="NAME",
        help=f"attention backend whose cache layout to test (repeatable; default all): {', '.join(BACKENDS)}",
    )


def devices() -> list[str]:
    """The devices to test on."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises ``mla_backend`` and ``device``."""
    if "mla_backend" in metafunc.fixturenames:
        metafunc.parametrize("mla_backend", metafunc.config.getoption("--backend") or list(BACKENDS))
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


@pytest.fixture
def mla_layouts(mla_backend: str) -> list[CacheLayout]:
    """Every layout that the backend reads and this version writes, one per format."""
    return [layout_for(mla_backend, format=name) for name in BACKENDS[mla_backend].formats if name in FORMATS]

"""Pytest fixtures for suites that build on latentkv: ``pytest_plugins = ["latentkv.testing.plugin"]``.

``--mla-backend NAME`` (repeatable) picks attention backends; tests that take the fixture ``mla_backend`` run once for
each, and ``mla_layouts`` are its layouts.
The fixture ``mla_device`` runs a test on every device of the machine: the CPU always, a GPU where there is one.
"""

from __future__ import annotations

import pytest

from ..cache.backends import BACKENDS
from ..cache.layouts import CacheLayout
from .matrix import devices


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--mla-backend``."""
    parser.addoption(
        "--mla-backend",
        action="append",
        choices=sorted(BACKENDS),
        metavar="NAME",
        help=f"attention backend whose cache layout to test (repeatable; default all): {', '.join(BACKENDS)}",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises ``mla_backend``."""
    if "mla_backend" in metafunc.fixturenames:
        metafunc.parametrize("mla_backend", metafunc.config.getoption("--mla-backend") or list(BACKENDS))


@pytest.fixture(scope="session", params=devices())
def mla_device(request: pytest.FixtureRequest) -> str:
    """Runs a test once for each device."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def mla_layouts(mla_backend: str) -> list[CacheLayout]:
    """A layout for each format that the backend reads."""
    return list(BACKENDS[mla_backend].layouts)

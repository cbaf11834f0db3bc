"""The pytest plugin in a suite that has options and fixtures of its own."""

from __future__ import annotations

from pathlib import Path

from conftest import Python

CONFTEST = """
import pytest

pytest_plugins = ["latentkv.testing.plugin"]

def pytest_addoption(parser):
    parser.addoption("--backend", default="nccl")
    parser.addoption("--device", default="tpu")

@pytest.fixture
def backend(request):
    return request.config.getoption("--backend")

@pytest.fixture
def device(request):
    return request.config.getoption("--device")

@pytest.fixture
def layouts():
    return ["NCHW"]
"""

SUITE = """
def test_own(backend, device, layouts):
    assert (backend, device, layouts) == ("gloo", "tpu", ["NCHW"])

def test_ours(mla_backend, mla_layouts, mla_device, device):
    assert mla_backend in ("FLASHMLA", "TRITON_MLA") and device == "tpu"
    assert mla_layouts[0].allocate(1, mla_device).data.device.type == mla_device
"""


def suite(folder: Path, python: Python, *options: str) -> str:
    """The report of a foreign suite in ``folder``, run with ``options``."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_suite.py").write_text(SUITE)
    arguments = [str(folder), "-v", "-p", "no:cacheprovider", f"--rootdir={folder}", "-c", "/dev/null", *options]
    done = python(f"import pytest, sys; sys.exit(pytest.main({arguments}))", PYTEST_ADDOPTS="")
    return done.stdout + done.stderr


def test_in_a_foreign_suite(tmp_path: Path, python: Python) -> None:
    report = suite(tmp_path, python, "--backend=gloo", "--mla-backend=FLASHMLA", "--mla-backend=TRITON_MLA")
    assert "test_own PASSED" in report, report
    for backend in ("FLASHMLA", "TRITON_MLA"):
        assert f"test_ours[cpu-{backend}] PASSED" in report or f"test_ours[{backend}-cpu] PASSED" in report, report
    assert "failed" not in report and "error" not in report.lower(), report


def test_an_unknown_backend_is_named(tmp_path: Path, python: Python) -> None:
    report = suite(tmp_path, python, "--mla-backend=XMLA")
    assert "argument --mla-backend: invalid choice: 'XMLA'" in report, report

"""What an installation pulls, what works without the extras, and what is built where."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Python

ROOT = Path(__file__).parents[1]
TORCH = next(word for word in (ROOT / "Makefile").read_text("utf-8").split() if word.startswith("torch=="))
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({0!r}))\n"  # None there: the module cannot be imported


def test_installing_pulls_torch_alone() -> None:
    wanted = importlib.metadata.requires("latentkv") or []
    assert [name for name in wanted if "extra" not in name] == ["torch>=2.10"]


def test_importing_takes_torch_alone(python: Python) -> None:
    done = python(
        WITHOUT.format(["typer", "rich", "matplotlib", "numpy"])
        + """
import latentkv, latentkv.compat.vllm, latentkv.testing, latentkv.testing.mla
from latentkv.testing import Case, Problem
case = Case("rope_write_cache_", latentkv.CacheLayout(32, 32, 4))
actual, wanted = Problem(case, "cpu"), Problem(case, "cpu")
actual.run(latentkv.providers.public)
wanted.run(latentkv.providers.reference)
assert actual.differences(wanted) == []
latentkv.select_backend(heads=16)
"""
    )
    assert done.returncode == 0, done.stderr


def test_nothing_outside_the_command_line_needs_it(python: Python) -> None:
    done = python(
        WITHOUT.format(["typer", "rich", "matplotlib", "latentkv.cli"])
        + """
import importlib, pkgutil, latentkv
names = [m.name for m in pkgutil.walk_packages(latentkv.__path__, "latentkv.")]
names = [n for n in names if not n.startswith(("latentkv.cli", "latentkv._", "latentkv.ops.triton"))]
for name in ("latentkv.engines.vllm.layer", "latentkv.testing.vllm"):  # within vLLM
    names.remove(name)
assert "latentkv.compile.fusion" in names and "latentkv.testing.plugin" in names, names
for name in names:
    importlib.import_module(name)
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_says_what_to_install(missing: str, python: Python) -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="latentkv")
    module, _, function = script.value.partition(":")
    for start in (
        "runpy.run_module('latentkv', run_name='__main__')",
        f"__import__('{module}', fromlist='x').{function}()",
    ):
        done = python(WITHOUT.format([missing]) + f"import runpy\n{start}")
        assert done.returncode == 1
        assert done.stderr.strip() == f"latentkv: the command line needs {missing}: pip install 'latentkv[cli]'"


def test_the_pass_says_what_to_install(python: Python) -> None:
    done = python(WITHOUT.format(["numpy"]) + "import latentkv\nlatentkv.compile.enable()")
    assert done.returncode != 0
    assert "ImportError: latentkv.compile: the pass needs numpy: pip install 'latentkv[compile]'" in done.stderr


def test_every_extra_goes_with_torch(tmp_path: Path) -> None:
    """By the public index's own metadata, as a machine sees it that has nothing else. No package is downloaded."""
    if importlib.util.find_spec("uv") is None:
        pytest.skip("uv is not installed")
    (tmp_path / "torch").write_text(TORCH)
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--no-cache", "--all-extras"]
    command += ["--default-index", "https://pypi.org/simple", "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--constraint", str(tmp_path / "torch"), str(ROOT / "pyproject.toml")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    env |= {"UV_HTTP_RETRIES": "9", "UV_HTTP_TIMEOUT": "120"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    if "error sending request" in done.stderr and not os.environ.get("CI"):
        pytest.skip("the index cannot be reached")
    assert done.returncode == 0, done.stderr
    assert TORCH in done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [False, True], ids=["no GPU", "GPU"])
def test_the_gpu_decides_what_is_built(gpu: bool, tmp_path: Path) -> None:
    """Not which compilers happen to be on the path."""
    path = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for tool in ("cmake", "ninja", *(["nvcc"] if gpu else [])):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"no {tool}")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{'GPU 0: NVIDIA H100 (UUID: GPU-0)' if gpu else 'No devices were found'}'\n")
    smi.chmod(0o755)
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    command += ["-DLATENTKV_CUDA_ARCHITECTURES=90"]  # by itself CMake would ask the GPU
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    says = (
        "CUDA library for 90"
        if gpu
        else "No CUDA library, as this machine has no NVIDIA GPU; LATENTKV_CUDA=ON builds it"
    )
    assert f"-- {says}\n" in done.stdout
    libraries = re.findall(r"\b_(cpu|cuda)\.abi3\.so", (tmp_path / "build/build.ninja").read_text())
    assert set(libraries) == ({"cpu", "cuda"} if gpu else {"cpu"})

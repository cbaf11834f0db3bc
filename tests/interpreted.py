"""For tests of Triton kernels: on a GPU where there is one, else in Triton's interpreter.

That has to be asked for before the kernels are imported, so a file of such tests holds one more, which runs the file in
a fresh Python. There, tests that take a device and a provider get the CPU and Triton: ``TRITON``.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
can_run = DEVICE == "cuda" or INTERPRETED
in_triton = pytest.mark.skipif(not can_run, reason="runs in the interpreter: test_interpreted")
TRITON = ("-k", "cpu-triton")
elsewhere = pytest.mark.skipif(can_run, reason="the tests themselves run")


def passes_interpreted(file: str, *options: str) -> None:
    """The tests of a file pass in the interpreter: those that ``options`` of pytest choose."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", file, *options]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

"""docs/ops.md has the tables that the descriptions give."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_tables_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import list_ops

    text = (DOCS / "ops.md").read_text()
    assert list_ops.written(text) == text, f"run {Path(sys.executable).name} docs/list_ops.py"
    assert list_ops.written(text.replace("| `q` |", "| `p` |")) == text

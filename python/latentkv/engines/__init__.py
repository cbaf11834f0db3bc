"""Plugins that put latentkv into inference engines, and what they have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

__all__ = ["HandedBack", "in_words", "mode_of"]


class HandedBack(Exception):
    """Why the engine's own code serves a layer."""


def mode_of(variable: str, modes: Sequence[str]) -> str:
    """What an environment variable chooses; the first of the modes where it is not set.

    Raises:
        ValueError: it is set to something else.
    """
    mode = os.environ.get(variable) or modes[0]
    if mode not in modes:
        raise ValueError(f"{variable}: expected one of {', '.join(modes)}, got {mode!r}")
    return mode


def in_words(layers: Iterable[str]) -> str:
    """Names of layers for a line of the log, runs of numbers drawn together: ``layers.0-26.attn``."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in layers:
        before, number, after = re.fullmatch(r"(.*?)(?:(?<=\.)(\d+)(?=\.))?([^\d]*)", name).groups()  # type: ignore[union-attr]
        numbers.setdefault((before, after), []).extend([] if number is None else [int(number)])
    found = []
    for (before, after), given in numbers.items():
        runs: list[list[int]] = []
        for n in sorted(given):
            if runs and n == runs[-1][1] + 1:
                runs[-1][1] = n
            else:
                runs.append([n, n])
        text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        found.append(f"{before}{text}{after}")
    return ", ".join(found)

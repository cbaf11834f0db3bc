"""``python -m latentkv`` and ``latentkv``: the command line, or what to install for it."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; exits with 1 where the packages of the extra ``cli`` are missing."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(f"latentkv: the command line needs {missing}: pip install 'latentkv[cli]'")
    app(prog_name="latentkv")


if __name__ == "__main__":
    main()

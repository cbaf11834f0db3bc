"""``python -m latentkv``: the command line."""

from .cli import app

app(prog_name="latentkv")

"""Writes the tables of docs/ops.md from the descriptions of the ops: python docs/list_ops.py"""

from __future__ import annotations

from pathlib import Path

from latentkv.ops.description import LAYER_OPS, OPS, Argument, Op

DOCUMENT = Path(__file__).with_name("ops.md")
BEGIN, END = "<!-- made by docs/list_ops.py -->\n", "<!-- end -->\n"
DTYPES = {
    "activation": "bf16, fp16, fp32",
    "index": "int64, int32",
    "fp8": "e4m3fn, e4m3fnuz, e5m2",
    "float32": "fp32",
    "uint8": "uint8",
}


def dtypes(a: Argument) -> str:
    """The dtypes of an argument in words; a name is that of the argument that has the same."""
    if a.kind not in ("tensor", "tensors"):
        return {"cache": "its format's", "caches": "their format's", "layer": "int"}.get(a.kind, a.kind)
    return ", ".join(DTYPES.get(word, f"that of {word}") for word in a.dtypes.split("|"))


def shape(a: Argument) -> str:
    """The shape of an argument."""
    if a.kind in ("cache", "caches") or a.shape == "indexer":
        return "[B, bs, C]" + (" each" if a.kind == "caches" else "")
    if a.kind not in ("tensor", "tensors"):
        return a.size
    shapes = [f"[{', '.join(s.split())}]" for s in a.shape.split("|")] if a.shape else ["one element"]
    shapes += [f"[{', '.join(a.without.split())}] with {a.unless}"] if a.unless else []
    return " or ".join(shapes) + (" each" if a.kind == "tensors" else "")


def table(op: Op) -> str:
    """The section of one op."""
    lines = [f"### `{op.name}`", "", f"{op.summary[0].upper()}{op.summary[1:]}.", ""]
    lines += ["| argument | dtype | shape | |", "| --- | --- | --- | --- |"]
    for a in op.arguments:
        notes = ["written"] * a.mutated + ["may be None"] * a.optional
        notes += [f"default {a.default}"] if a.default not in (None, "None") else []
        notes += [f"may be {a.aliases} itself"] if a.aliases else []
        lines.append(f"| `{a.name}` | {dtypes(a)} | {shape(a)} | {', '.join(notes)} |".replace("|  |", "| |"))
    lines += [f"| returns `{r.name}` | {dtypes(r)} | {shape(r)} | |" for r in op.returns]
    return "\n".join(lines)


def tables() -> str:
    """All sections."""
    return "\n\n".join(map(table, (*OPS.values(), *LAYER_OPS.values()))) + "\n"


def written(text: str) -> str:
    """The document with its tables made anew."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + "\n" + tables() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))

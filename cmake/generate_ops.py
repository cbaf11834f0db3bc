"""Writes what C++ must know of the ops from their descriptions: python generate_ops.py DESCRIPTION FOLDER

FOLDER/ops.h declares, for every op, its checked arguments and the function that a kernel's file defines;
FOLDER/bound_ops.h has the functions that torch calls: they check the arguments, and hand them on.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

HEAD = "// Made by cmake/generate_ops.py from python/latentkv/ops/description.py.\n#pragma once\n\n"
TYPES = {
    "Tensor": "const Tensor&",
    "Tensor?": "const OptionalTensor&",
    "Tensor[]": "const std::vector<Tensor>&",
    "Tensor?[]": "const std::vector<OptionalTensor>&",
    "str": "const std::string&",
    "bool": "bool",
    "int": "int64_t",
    "int?": "std::optional<int64_t>",
    "float": "double",
}
FIELDS = {
    "tensor": "const Tensor* {} = nullptr",
    "tensors": "const std::vector<Tensor>* {} = nullptr",
    "cache": "Cache {}",
    "caches": "std::vector<Cache> {}",
    "bool": "bool {} = false",
    "float": "double {} = 0",
}
DTYPES = {
    "activation": "kActivations",
    "index": "kIndexTypes",
    "float32": "ScalarType::Float",
    "uint8": "ScalarType::Byte",
    "fp8": "ScalarType::Float8_e4m3fn, ScalarType::Float8_e4m3fnuz, ScalarType::Float8_e5m2",
}


def load(path: Path) -> ModuleType:
    """The module of descriptions, without the package around it."""
    spec = importlib.util.spec_from_file_location("description", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["description"] = module
    spec.loader.exec_module(module)
    return module


def name_of(op: Any) -> str:
    """RopeWriteCache for rope_write_cache_."""
    return "".join(word.capitalize() for word in op.name.split("_"))


def letters(op: Any) -> list[str]:
    """The letters of an op's shapes, each once."""
    names = [a.size for a in op.arguments if a.size]
    names += [letter for a in op.arguments if a.shape != "indexer" for s in a.shapes for d in s for letter in d.letters]
    return list(dict.fromkeys(names + ["G"] * any(a.kind == "tensors" for a in op.arguments)))


def fields(op: Any) -> Iterator[str]:
    """The fields of the struct of an op's arguments."""
    yield "int device = -1"
    for a in op.arguments:
        if a.kind in FIELDS and a.shape != "indexer":
            yield FIELDS[a.kind].format(a.name)
        elif a.shape == "indexer":
            yield FIELDS["cache"].format(a.name)
    if "cos_sin_cache" in [a.name for a in op.arguments]:
        yield "Rotation rotation"
    yield f"Letter {', '.join(letters(op))}"


def dim(d: Any) -> str:
    """One dimension of a shape as the checks take it."""
    parts = [f'.text = "{d.text}"']
    parts += [f".{field} = &x.{letter}" for field, letter in zip(("letter", "other"), d.letters, strict=False)]
    parts += [f".plus = {d.plus}"] if d.plus else []
    parts += [f'.bound = &x.{d.bound}, .bound_text = "{d.bound}"'] if d.bound else []
    return "{" + ", ".join(parts) + "}"


def shapes(alternatives: Any) -> str:
    """The alternatives of a shape."""
    return ", ".join("{" + ", ".join(map(dim, shape)) + "}" for shape in alternatives)


def types(op: Any, a: Any) -> str:
    """The dtypes that an argument may have."""
    found = []
    for word in a.dtypes.split("|"):
        like = next((b for b in op.arguments if b.name == word), None)
        if word in ("activation", "index"):
            return DTYPES[word]
        found.append(DTYPES[word] if like is None else f"{word}{'[0]' if like.kind == 'tensors' else ''}.scalar_type()")
    return "{" + ", ".join(found) + "}"


def check_tensor(op: Any, a: Any) -> Iterator[str]:
    """The checks of one tensor, or of each of a list."""
    mutated = ", true" if a.mutated else ""
    if a.kind == "tensors":
        lead = a.name == op.lead
        if lead:
            yield f'x.G.bind({a.name}.size(), "{a.name}");'
        else:
            yield f'check.as_many("{a.name}", {a.name}.size(), x.G);'
        yield "for (int i = 0; i < x.G; ++i) {"
        if lead:
            own = f'if (i == 0) check.tensor({{"{a.name}", i}}, {a.name}[i], {types(op, a)}, {{{shapes(a.shapes)}}});'
            yield own
            like = f"{{{a.name}[0].scalar_type()}}"
            yield f'else check.tensor({{"{a.name}", i}}, {a.name}[i], {like}, {{{shapes(a.shapes)}}});'
        else:
            yield f'check.tensor({{"{a.name}", i}}, {a.name}[i], {types(op, a)}, {{{shapes(a.shapes)}}});'
        yield "}"
        return
    value = f"*{a.name}" if a.optional else a.name
    condition = f"if ({a.name}) " if a.optional else ""
    if not a.shape:
        yield f'check.one("{a.name}", x.{a.name});'
    elif a.unless:
        given, otherwise = (f'check.tensor("{a.name}", {value}, {types(op, a)}, {{{shapes(s)}}}{mutated});'
                            for s in (a.shapes_without, a.shapes))  # fmt: skip
        yield f"if ({a.unless}) {given} else {otherwise}"
    else:
        yield f'{condition}check.tensor("{a.name}", {value}, {types(op, a)}, {{{shapes(a.shapes)}}}{mutated});'


def body(op: Any) -> Iterator[str]:
    """The function that torch calls."""
    kinds = {a.name: a for a in op.arguments}
    lead = f"{op.lead}[0]" if kinds[op.lead].kind == "tensors" else op.lead
    if lead != op.lead:
        yield f'if ({op.lead}.empty()) fail("{op.name}", "{op.lead}", "at least one tensor", "none");'
    yield f"{name_of(op)} x;"
    index = "" if lead == op.lead else ", 0"
    yield f'Checker check("{op.name}", {{"{op.lead}"{index}}}, {lead});'
    yield "x.device = check.device();"
    tensors = [p for p in op.plain if p.type.startswith("Tensor")]
    single = (f'{{"{p.name}", {f"pointer({p.name})" if p.type.endswith("?") else f"&{p.name}"}}}'
              for p in tensors if not p.type.endswith("[]"))  # fmt: skip
    yield f"check.no_gradients({{{', '.join(single)}}});"
    for p in tensors:
        if p.type.endswith("[]"):
            yield f'check.no_gradients("{p.name}", {p.name});'
    for a in op.arguments:
        if a.kind == "tensor" and a.shape != "indexer":
            yield f"x.{a.name} = {f'pointer({a.name})' if a.optional else f'&{a.name}'};"
        elif a.kind == "tensors":
            yield f"x.{a.name} = &{a.name};"
        elif a.kind in ("bool", "float"):
            yield f"x.{a.name} = {a.name};"
    rotates = "cos_sin_cache" in kinds
    paired = not rotates or not kinds["positions"].optional
    for a in op.in_check_order:
        if a.size:
            yield f'check.size("{a.name}", {a.name}, {a.least}, x.{a.size});'
            continue
        if not paired and a.name != op.lead:
            paired = True
            yield "check.both_or_none(x.positions, x.cos_sin_cache);"
        if a.kind in ("tensor", "tensors") and a.shape != "indexer":
            yield from check_tensor(op, a)
    optional = [a.name for a in op.arguments if a.size and a.optional]
    exact = " || ".join(f"!{name}" for name in optional) or "false"
    for a in op.arguments:
        if a.kind == "cache":
            rope, scale, format = [p.name for p in op.plain if p.name in (
                (f"{a.prefix}rope", f"{a.prefix}scale", f"{a.prefix}format") if a.prefix
                else ("rope_cache", "scale", "format"))]  # fmt: skip
            writes = ", true" if a.mutated else ", false"
            activation = f", &{op.lead}" if a.mutated and kinds[op.lead].kind == "tensor" else ", nullptr"
            yield (
                f'x.{a.name} = check.cache({{"{a.name}", "{rope}", "{scale}", "{format}", -1}}, {a.name}, '
                f"pointer({rope}), pointer({scale}), {format}, x.L, x.R, {exact}{writes}{activation}, "
                f'"{op.lead}");'
            )
        elif a.kind == "caches":
            yield 'check.as_many("caches", caches.size(), x.G);'
            yield 'if (!rope_caches.empty()) check.as_many("rope_caches", rope_caches.size(), x.G);'
            yield 'check.as_many("scales", scales.size(), x.G);'
            yield "for (int i = 0; i < x.G; ++i) {"
            yield (
                'x.caches.push_back(check.cache({"caches", "rope_caches", "scales", "format", i}, caches[i], '
                "rope_caches.empty() ? nullptr : &rope_caches[i], pointer(scales[i]), format, x.L, x.R, "
                f'{exact}, true, &{lead}, "{op.lead}"));'
            )
            yield 'check.same_blocks({"caches", i}, caches[i], {"caches", 0}, caches[0]);'
            yield "}"
        elif a.shape == "indexer":
            yield f'x.{a.name} = check.indexer("{a.name}", {a.name}, x.cos_sin_cache);'
    if "kv_norm_weight" in kinds:
        yield 'if (kv_c_out && !kv_norm_weight) check.fail("kv_c_out", "None without kv_norm_weight", "a tensor");'
        pairs = ", ".join(f'{{"{a.name}", "{a.aliases}"}}' for a in op.arguments if a.aliases)
        yield f"check.apart({{{pairs}}});"
    elif op.name == "convert_cache_":
        yield 'check.apart({{"src", "dst"}, {"src", "dst_rope"}, {"src_rope", "dst"}, {"src_rope", "dst_rope"}}, true);'
    else:
        yield "check.apart({});"
    if rotates:
        inverse = "inverse" if "inverse" in kinds else "false"
        yield f"x.rotation = Rotation::of(x.positions, x.cos_sin_cache, is_neox, {inverse});"
    yield "run(x);"
    for p in op.plain:
        if "!" in p.type:
            yield f"written({p.name});"


def declarations(op: Any) -> str:
    """The struct and the function of one op."""
    lines = "".join(f"  {field};\n" for field in fields(op))
    return f"struct {name_of(op)} {{\n  static constexpr const char* name = \"{op.name}\";\n{lines}}};\n" \
           f"void run(const {name_of(op)}& x);\n"  # fmt: skip


def bound(op: Any) -> str:
    """What torch calls for one op."""
    arguments = ", ".join(f"{TYPES[re.sub(r'[(]..?[)]', '', p.type)]} {p.name}" for p in op.plain)
    lines = "".join(f"  {line}\n" for line in body(op))
    return f"inline void {op.name}({arguments}) {{\n{lines}}}\n"


def main(description: Path, folder: Path) -> None:
    """Writes both files; one that would not change stays as it is."""
    ops = [op for op in load(description).OPS.values() if op.native]
    register = "".join(f'  library.impl("{op.name}", TORCH_BOX(&{op.name}));\n' for op in ops)
    texts = {
        "ops.h": '#include "arguments.h"\n\nnamespace latentkv {\n\n'
        + "\n".join(map(declarations, ops))
        + "\n}  // namespace latentkv\n",
        "bound_ops.h": '#include <torch/csrc/stable/library.h>\n\n#include "ops.h"\n\nnamespace latentkv {\n\n'
        + "\n".join(map(bound, ops))
        + f"\ninline void register_ops(torch::stable::detail::StableLibrary& library) {{\n{register}}}\n"
        + "\n}  // namespace latentkv\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text() != HEAD + text:
            path.write_text(HEAD + text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

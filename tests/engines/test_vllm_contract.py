"""Every name that the plugin takes from vLLM is in the published wheels of the oldest and the newest known release.

Only the files that are asked for are fetched, not the wheels. A new release is compared by changing
:data:`latentkv.engines.vllm.contract.NEWEST`.
"""

from __future__ import annotations

import ast
import functools
import re
import urllib.request
import zipfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import fsspec
import pytest
from latentkv.engines.vllm import contract
from latentkv.engines.vllm.contract import Need

INDEX = "https://pypi.org/simple/vllm/"
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class Wheel:
    """The Python sources of a release, read as text."""

    def __init__(self, version: str) -> None:
        page = urllib.request.urlopen(INDEX, timeout=60).read().decode()
        link = next(u for u in re.findall(r'href="([^"#]+)', page) if f"/vllm-{version}-" in u and "x86_64.whl" in u)
        self._zip = zipfile.ZipFile(fsspec.open(urljoin(INDEX, link), block_size=2**18).open())

    @functools.cache  # noqa: B019
    def names(self, module: str) -> dict[str, Any]:
        """What a module defines or imports: the node, or (module, name)."""
        path = module.replace(".", "/")
        file = next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in self._zip.namelist()), None)
        return (
            {}
            if file is None
            else dict(_defined(ast.parse(self._zip.read(file)), module, file.endswith("__init__.py")))
        )

    def find(self, module: str, name: str) -> Any:
        """The node that defines a name, wherever it is imported from; None where there is none."""
        found = self.names(module).get(name)
        while isinstance(found, tuple):
            module, name = found
            found = self.names(module).get(name)
        return found if found is None else (module, found)

    def member(self, module: str, owner: ast.ClassDef, name: str) -> Any:
        """What a class or one of its bases has under a name, on the class or set on the instance."""
        for node in ast.walk(owner):
            if isinstance(node, Function) and node.name == name:
                return node
            if name in _assigned(node) or f"self.{name}" in _assigned(node):
                return node
            if isinstance(node, ast.Call) and any(isinstance(a, ast.Constant) and a.value == name for a in node.args):
                return node  # replace_parameter(self, name, ...)
            if isinstance(node, ast.For) and f"'{name}'" in ast.unparse(node.iter):
                return node
        for base in owner.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found is not None and isinstance(found[1], ast.ClassDef):
                inherited = self.member(found[0], found[1], name)
                if inherited is not None:
                    return inherited
        return None

    def has(self, entry: str) -> bool:
        """Whether the release has what an entry of the contract names."""
        need = Need.of(entry)
        found = self.find(need.module, need.name)
        if found is None:
            return False
        module, node = found
        if need.attribute is not None:
            node = node if isinstance(node, ast.ClassDef) else self.find(module, _class_of(node))[1]
            node = self.member(module, node, need.attribute)
        if need.parameters is None or node is None:
            return node is not None
        given = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        return given.issuperset(need.parameters)


def _class_of(node: Any) -> str:
    """Of a module's variable ``name = Class(...)``: the class."""
    assert isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    return ast.unparse(node.value.func)


def _assigned(node: ast.AST) -> list[str]:
    """What a statement assigns to."""
    match node:
        case ast.Assign():
            return [ast.unparse(target) for target in node.targets]
        case ast.AnnAssign():
            return [ast.unparse(node.target)]
    return []


def _defined(tree: ast.AST, module: str, package: bool) -> Iterator[tuple[str, Any]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (*Function, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")[: None if not node.level else len(module.split(".")) - node.level + package]
            source = ".".join([*(parts if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                yield alias.asname or alias.name, (source, alias.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from ((target, node) for target in _assigned(node))
        elif isinstance(node, ast.If | ast.Try):
            yield from _defined(node, module, package)


@pytest.fixture(scope="module", params=[contract.OLDEST, contract.NEWEST])
def wheel(request: pytest.FixtureRequest) -> Wheel:
    return Wheel(request.param)


@pytest.mark.parametrize("entry", contract.NEEDS + contract.LOADED)
def test_the_release_has_it(wheel: Wheel, entry: str) -> None:
    assert wheel.has(entry)


def test_the_release_has_one_kind_of_context_parallelism(wheel: Wheel) -> None:
    assert any(all(map(wheel.has, kind)) for kind in contract.PARALLEL)


@pytest.mark.parametrize(
    "entry",
    [
        "vllm.nowhere:name", "vllm.platforms:nothing", "vllm.config.compilation:CompilationConfig._nothing",
        "vllm.model_executor.layers.attention.attention:get_attention_context(layer)",
        "vllm.model_executor.layers.attention.mla_attention:MLAAttention.forward_impl(nothing)",
    ],
)  # fmt: skip
def test_what_is_missing_is_found(wheel: Wheel, entry: str) -> None:
    assert not wheel.has(entry)

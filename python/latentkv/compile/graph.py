"""Graphs as torch functionalises them: calls by name, storages and their views, closures, fake tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, Node

from .elements import Flat, expr_of, hint, is_transparent, locate, number, unravel
from .known_ops import ROPE_OPS

aten = torch.ops.aten
FUNCTIONALIZED = (torch.ops.higher_order.auto_functionalized_v2, torch.ops.higher_order.auto_functionalized)
META_ONLY = (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default)

Size = int | torch.SymInt


def call_of(node: Node) -> tuple[str, dict[str, Any]] | None:
    """The op of a node, functionalised or not, as ``namespace::name``, and its arguments by name."""
    if node.op != "call_function":
        return None
    if node.target in FUNCTIONALIZED:
        op: Any = node.args[0]
        return (op._schema.name, dict(node.kwargs)) if isinstance(op, torch._ops.OpOverload) else None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return schema.name, defaults | given


def op_name(node: Node) -> str:
    """The op of a node as ``namespace::name``; empty for nodes without one."""
    call = call_of(node)
    return call[0] if call is not None else ""


def is_rope(node: Node) -> bool:
    """Whether the node is a functionalised rope op of those that are known."""
    return node.target in FUNCTIONALIZED and op_name(node) in ROPE_OPS


def storage_of(node: Node) -> int | None:
    """Which storage a node's tensor (or the first of its tensors) has, as its fake tensor tells."""
    val = node.meta.get("val")
    if isinstance(val, list | tuple):
        val = next((v for v in val if isinstance(v, torch.Tensor)), None)
    return val.untyped_storage()._cdata if isinstance(val, torch.Tensor) else None


def parent_of(node: Node) -> Node | None:
    """What a node is a view of; None where it has a storage of its own."""
    if not _is_view(node):
        return None
    parent: Any = node.args[0]
    if parent.target in FUNCTIONALIZED or storage_of(node) != storage_of(parent):
        return None
    # As another dtype its elements are others: whoever makes such a view reads the whole.
    return parent if _dtype_of(node) == _dtype_of(parent) else None


def _dtype_of(node: Node) -> torch.dtype:
    val = node.meta["val"]
    return val[0].dtype if isinstance(val, list | tuple) else val.dtype  # type: ignore[no-any-return]


def shares_storage(node: Node) -> bool:
    """Whether a node is a view, be it of another dtype."""
    source: Any = node.args[0] if _is_view(node) else None
    return source is not None and source.target not in FUNCTIONALIZED and storage_of(node) == storage_of(source)


def refresh_views(graph: Graph) -> None:
    """Brings the fake tensors of views up to date: passes that replace a tensor may leave those of its views as is."""
    for node in graph.nodes:
        if not _is_view(node) or storage_of(node) == storage_of(node.args[0]):
            continue
        if node.target is not operator.getitem:
            node.meta["val"] = fake_result(node)
        elif node.args[0].target not in FUNCTIONALIZED:
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]


def _is_view(node: Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in (operator.getitem, aten.reshape.default, aten._unsafe_view.default):
        return True
    first = node.target._schema.arguments[0] if isinstance(node.target, torch._ops.OpOverload) else None
    return first is not None and first.alias_info is not None and not first.alias_info.is_write


def root_of(node: Node) -> Node:
    """The node whose storage it is."""
    while (parent := parent_of(node)) is not None:
        node = parent
    return node


def plain(positions: Node) -> Node:
    """The same positions before anything that only renames or widens them, so that the same can be told as the same."""
    while positions.op == "call_function":
        parent: Any = positions.args[0] if positions.args else None
        if not isinstance(parent, Node) or not is_tensor(parent):
            break
        mine, given = positions.meta["val"], parent.meta["val"]
        same = parent_of(positions) is parent and View.of(mine) == View.of(given)
        wider = positions.target is torch.ops.prims.convert_element_type.default and given.dtype == torch.int32
        if not (same or (wider and mine.dtype == torch.int64)):
            break
        positions = parent
    return positions


def views_of(root: Node) -> list[Node]:
    """The root and its views, lists of views too, each after what it is made from."""
    found = [root]
    for node in found:
        found += [user for user in node.users if parent_of(user) is node]
    return found


def is_tensor(node: Node) -> bool:
    """Whether the node stands for one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def closure(start: Iterable[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Everything that is reached from ``start``, itself included."""
    found, stack = set(), list(start)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += step(node)
    return found


def expression_of(node: Node) -> list[Node]:
    """The nodes whose elements make those of this one, back to what nothing is known about, in the graph's order."""

    def inputs(n: Node) -> Iterable[Node]:
        known = is_transparent(n) or is_rope(n)
        return (i for i in n.all_input_nodes if i.meta.get("val") is not None) if known else ()

    found = closure([node], inputs)
    return sorted(found)


def consequences_of(node: Node) -> list[Node]:
    """The nodes whose elements are made of this one's by what is known, in the graph's order."""

    def users(n: Node) -> Iterable[Node]:
        return (u for u in n.users if is_transparent(u) or is_rope(u))

    return sorted(closure([node], users) - {node})


def fake_result(node: Node) -> Any:
    """A node's result on the fake tensors of its inputs."""
    if node.target is operator.getitem:
        return node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr]
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor.virtualized import V

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with V.fake_mode, enable_python_dispatcher():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def fake_like(node: Node) -> torch.Tensor:
    """A fake tensor of a node's geometry, and with a storage of its own."""
    from torch._inductor.virtualized import V

    val: torch.Tensor = node.meta["val"]
    with V.fake_mode:
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)


def erase_dead(nodes: Iterable[Node]) -> None:
    """Erases nodes without users, and what was only there for them."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        stack += [u for u in node.users if not u.users and not _lasting(u)]
        if not node.users and not _lasting(node) and not node._erased:
            inputs = node.all_input_nodes
            node.graph.erase_node(node)
            stack += inputs


def has_side_effects(node: Node) -> bool:
    """Whether torch knows of effects of the node, but for the copies to inputs at the end of a graph."""
    if node.target is torch.ops.higher_order.with_effects:
        return True
    return node.op == "call_function" and node.is_impure() and node.target is not aten.copy_.default


def _lasting(node: Node) -> bool:
    return node.op != "call_function" or (node.target not in FUNCTIONALIZED and node.is_impure())


def text_of(node: Node) -> str:
    """A node in words, for a report."""
    name = getattr(node.target, "__name__", str(node.target))
    return f"{node.name} = {node.op if node.op != 'call_function' else name}"


def source_line(node: Node) -> str:
    """The line of source that a node comes from, torch's own left out."""
    own = str(Path(torch.__file__).parent)
    trace = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    return next((line for line in reversed(trace) if line.startswith("File ") and own not in line), "")


@dataclass(frozen=True, eq=False)
class View:
    """A part of a storage, in elements. Equal are those of the same numbers and symbols."""

    size: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        # Not the symbols themselves: to compare these would be a guard.
        numbers = (*self.size, *self.stride, self.offset)
        return len(self.size), *map(expr_of, numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, View) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @staticmethod
    def of(t: torch.Tensor) -> View:
        """What a tensor is of its storage."""
        return View(tuple(t.size()), tuple(t.stride()), t.storage_offset())

    @cached_property
    def hints(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Size, stride and offset in numbers."""
        return tuple(map(hint, self.size)), tuple(map(hint, self.stride)), hint(self.offset)

    def fixed(self, rows: Size) -> bool:
        """Whether it lies in the same place however many rows there are: nothing else is a symbol."""
        sizes = (n for n in self.size if expr_of(n) != expr_of(rows))
        return None not in map(number, (*sizes, *self.stride, self.offset))

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides that matter: those of dimensions of more than one element."""
        size, stride, _ = self.hints
        return tuple(step for n, step in zip(size, stride, strict=True) if n != 1)

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow one another in row-major order."""
        size = self.hints[0]
        dense = tuple(math.prod(size[d + 1 :]) for d in range(len(size)))
        return self.steps == tuple(step for n, step in zip(size, dense, strict=True) if n != 1)

    def offsets(self, flat: Flat) -> Flat:
        """Where the elements lie in the storage."""
        size, stride, offset = self.hints
        total = np.full_like(flat, offset)
        for c, step in zip(unravel(flat, size), stride, strict=True):
            total = total + c * step
        return total

    def locate(self, offsets: Flat) -> tuple[list[Flat], np.ndarray[Any, np.dtype[np.bool_]]]:
        """The coordinates of what lies there, and whether it is in this part."""
        return locate(offsets, *self.hints)

    @property
    def distinct(self) -> bool:
        """Whether no two elements share their place: each dimension steps over what lies within it."""
        extent = 1
        size, stride, _ = self.hints
        for step, n in sorted((step, n) for n, step in zip(size, stride, strict=True) if n != 1):
            if step < extent:
                return False
            extent += step * (n - 1)
        return True

    def apart(self, other: View) -> bool:
        """Whether it is certain that the two share no element."""

        def dims(view: View) -> list[tuple[int, int]]:
            size, stride, _ = view.hints
            return sorted(((b, a) for a, b in zip(size, stride, strict=True) if a != 1), reverse=True)

        mine, others, period = dims(self), dims(other), None
        if any(n == 0 for _, n in mine + others):
            return True
        while mine and others and mine[0] == others[0] and mine[0][0] > 1:
            period = mine.pop(0)[0]
            others.pop(0)
        (a, a_end), (b, b_end) = (
            (v.hints[2], v.hints[2] + sum(step * (n - 1) for step, n in left) + 1)
            for v, left in ((self, mine), (other, others))
        )
        within = period is None or max(a_end, b_end) - min(a, b) <= period
        return within and (a_end <= b or b_end <= a)


def mutated_view(node: Node, kwargs: Mapping[str, Any], name: str) -> tuple[Node, View] | None:
    """Of a functionalised op: the base of an argument that it mutates, and which part of it the argument is."""
    if node.target is not FUNCTIONALIZED[0]:
        given = kwargs.get(name)
        return None if given is None else (given, View.of(given.meta["val"]))
    index = kwargs.get(f"_{name}_base_index")
    if index is None:
        return None
    base = kwargs["_all_bases"][index]
    whole = View.of(base.meta["val"])
    value: Callable[[Any], Size] = lambda x: x.meta["val"] if isinstance(x, Node) else x  # noqa: E731
    if f"_{name}_storage_offset" in kwargs:
        size, stride = (tuple(map(value, kwargs[f"_{name}_{part}"])) for part in ("size", "stride"))
        return base, View(size, stride, value(kwargs[f"_{name}_storage_offset"]))
    if f"_{name}_slice_dim" in kwargs:
        dim, start, end = (value(kwargs[f"_{name}_slice_{part}"]) for part in ("dim", "start", "end"))
        size = tuple(end - start if d == dim else s for d, s in enumerate(whole.size))
        return base, View(size, whole.stride, whole.offset + start * whole.stride[dim])
    return base, whole

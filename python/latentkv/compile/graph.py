"""Graphs as torch functionalises them: calls by name, storages and their views, closures, fake tensors.

Sizes are compared as numbers and symbolic expressions, never by the values that they had when the graph was made.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from .known_ops import ROPE_OPS

aten = torch.ops.aten
FUNCTIONALIZED = (torch.ops.higher_order.auto_functionalized_v2, torch.ops.higher_order.auto_functionalized)
META_ONLY = (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default)
LIMIT = 1 << 20  # elements of a row: what is wider is a weight, and nothing is known of it

Size = int | torch.SymInt
Flat = NDArray[np.int64]  # elements of a tensor or places of a storage, by their number


# ------------------------------------------------------------------------------------------------- sizes


def expr_of(x: Any) -> Any:
    """A size, or a node that stands for one, as a number or a symbolic expression: to compare these is no guard."""
    if isinstance(x, Node):
        x = x.meta["val"]
    return x.node.expr if isinstance(x, torch.SymInt) else x


def number(x: Any) -> int | None:
    """A size that is the same whatever sizes the graph will run with; None where it is a symbol."""
    x = expr_of(x)
    return int(x) if isinstance(x, int) or x.is_Integer else None


def numbers(sizes: Iterable[Any]) -> list[int] | None:
    """All of them, or None."""
    found = [number(size) for size in sizes]
    return None if None in found else found  # type: ignore[return-value]


def quotient(x: Any, y: Any) -> int | None:
    """How many times one size is another, whatever that is; None where that is no whole number."""
    if x == y:
        return 1
    if isinstance(x, int) and isinstance(y, int):
        return x // y if y and x % y == 0 else None
    if isinstance(x, int):
        return None
    ratio = x / y
    return int(ratio) if ratio.is_Integer else None


def shape_text(node: Node) -> str:
    """A shape for a report."""
    return str([expr_of(s) for s in node.meta["val"].shape])


# ------------------------------------------------------------------------------------------------- calls


@functools.cache
def _schema(op: Any) -> tuple[str, tuple[str, ...], dict[str, Any], bool]:
    """Of an op: its name, those of its arguments, their defaults, and whether its result is a view of the first."""
    if not isinstance(op, torch._ops.OpOverload):
        return "", (), {}, op is operator.getitem
    given = op._schema.arguments
    alias = given[0].alias_info if given else None
    view = (alias is not None and not alias.is_write) or op in (aten.reshape.default, aten._unsafe_view.default)
    defaults = {a.name: a.default_value for a in given if a.has_default_value()}
    return op._schema.name, tuple(a.name for a in given), defaults, view


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an op, functionalised or not, by name."""
    if node.target in FUNCTIONALIZED:
        return dict(node.kwargs)
    _, names, defaults, _ = _schema(node.target)
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


def op_name(node: Node) -> str:
    """The op of a node, functionalised or not, as ``namespace::name``; empty for nodes without one."""
    if node.op != "call_function":
        return ""
    op: Any = node.args[0] if node.target in FUNCTIONALIZED else node.target
    return _schema(op)[0]


def is_rope(node: Node) -> bool:
    """Whether the node is a functionalised rope op of those that are known."""
    return node.target in FUNCTIONALIZED and op_name(node) in ROPE_OPS


def is_tensor(node: Node) -> bool:
    """Whether the node stands for one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def text_of(node: Node) -> str:
    """A node in words, for a report."""
    name = getattr(node.target, "__name__", str(node.target))
    return f"{node.name} = {node.op if node.op != 'call_function' else name}"


def source_line(node: Node) -> str:
    """The line of source that a node comes from, torch's own left out."""
    own = str(Path(torch.__file__).parent)
    trace = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    return next((line for line in reversed(trace) if line.startswith("File ") and own not in line), "")


def closure(start: Iterable[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Everything that is reached from ``start``, itself included."""
    found, stack = set(), list(start)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += step(node)
    return found


# ------------------------------------------------------------------------------------------------- storages


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


def refresh_views(nodes: Iterable[Node]) -> None:
    """Brings the fake tensors of these up to date where they are views, and those of their views in turn.

    Passes that replace a tensor may leave those of its views as they were.
    """
    queue = list(nodes)
    for node in queue:
        source: Any = node.args[0] if _is_view(node) else None
        if source is None or source.target in FUNCTIONALIZED or storage_of(node) == storage_of(source):
            continue
        node.meta["val"] = fake_result(node)
        queue += node.users


def _is_view(node: Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    return _schema(node.target)[3]


def root_of(node: Node) -> Node:
    """The node whose storage it is."""
    while (parent := parent_of(node)) is not None:
        node = parent
    return node


def is_intermediate(node: Node) -> bool:
    """Whether a node is a scatter that only goes into another: torch makes one of the two, and of this one a view."""
    return node.target in SCATTERS and any(u.target in SCATTERS and u.args[1] is node for u in node.users)


SCATTERS = (
    aten.slice_scatter.default, aten.select_scatter.default, aten.as_strided_scatter.default,
    aten.diagonal_scatter.default,
)  # fmt: skip


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


@dataclass(frozen=True, eq=False)
class Row:
    """Where the elements of a row lie: ``places`` in a storage, those of the next row ``step`` further."""

    step: int
    places: Flat

    @functools.cached_property
    def _order(self) -> Flat:
        return np.argsort(self.places, kind="stable")

    def index(self, other: Row) -> Flat | None:
        """Where the elements of another row are in this one; None where one is not in it."""
        if self.step != other.step or not len(self.places):
            return None
        found = other.places - self.places[0]  # where these follow one another
        inside = (found >= 0) & (found < len(self.places))
        if not (inside.all() and np.array_equal(self.places[found], other.places)):
            found = self._order[np.searchsorted(self.places, other.places, sorter=self._order) % len(self.places)]
        return found if np.array_equal(self.places[found], other.places) else None

    @property
    def distinct(self) -> bool:
        """Whether no two elements share their place, nor two rows."""
        places = self.places % self.step if self.step else self.places
        return bool(np.diff(np.sort(places)).all())


@dataclass(frozen=True, eq=False)
class View:
    """A part of a storage, in elements. Equal are those of the same numbers and symbols."""

    size: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return len(self.size), *map(expr_of, (*self.size, *self.stride, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, View) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @staticmethod
    def of(t: torch.Tensor) -> View:
        """What a tensor is of its storage."""
        return View(tuple(t.size()), tuple(t.stride()), t.storage_offset())

    @functools.cached_property
    def _dims(self) -> list[tuple[Any, Any]]:
        pairs = zip(map(expr_of, self.size), map(expr_of, self.stride), strict=True)
        return [(size, stride) for size, stride in pairs if size != 1]

    @property
    def steps(self) -> list[Any]:
        """The strides that matter: those of dimensions of more than one element."""
        return [stride for _, stride in self._dims]

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow one another in row-major order."""
        sizes = [size for size, _ in self._dims]
        return self.steps == [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]

    def row(self, rows: Any) -> Row | None:
        """The elements of the first of so many rows, in row-major order; None where it does not consist of such."""
        dims, step = list(self._dims), 0
        if rows != 1:
            size, stride = dims.pop(0) if dims else (0, 0)
            count, between = quotient(size, rows), number(stride)
            if count is None or between is None:
                return None
            step = between * count
            if step < 1:
                return None
            if count != 1:
                dims.insert(0, (count, between))
        return _row(step, dims, self.offset)

    def apart(self, other: View, rows: Any) -> bool:
        """Whether it is certain that the two share no element, however many rows there are."""
        mine = self.row(rows)
        theirs = None if mine is None else other._places_modulo(mine.step)
        if mine is None or theirs is None:
            return False
        return not len(np.intersect1d(mine.places % mine.step if mine.step else mine.places, theirs))

    def _places_modulo(self, step: int) -> Flat | None:
        # Dimensions that step over whole rows do not matter, whatever their sizes.
        dims = [(size, stride) for size, stride in self._dims if not step or quotient(stride, step) is None]
        row = _row(0, dims, self.offset)
        return None if row is None else row.places % step if step else row.places

    def within(self, row: Row) -> Flat | None:
        """Which elements of a row it holds, of any of the rows and in any order; None where that cannot be told."""
        places = self._places_modulo(row.step)
        if places is None:
            return None
        ours = row.places % row.step if row.step else row.places
        return np.nonzero(np.isin(ours, places))[0]


def _row(step: int, dims: list[tuple[Any, Any]], offset: Size) -> Row | None:
    sizes, strides, start = numbers([n for n, _ in dims]), numbers([s for _, s in dims]), number(offset)
    if sizes is None or strides is None or start is None or math.prod(sizes) > LIMIT:
        return None
    places = np.full(1, start, np.int64)
    for size, stride in zip(sizes, strides, strict=True):
        places = (places[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    return Row(step, places)


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


# ------------------------------------------------------------------------------------------------- changes


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


def _lasting(node: Node) -> bool:
    return node.op != "call_function" or node.is_impure()


def sort_between(first: Node, last: Node) -> None:
    """Puts the nodes from one to another in order: each after its inputs, else as they were."""
    nodes = [first]
    while nodes[-1] is not last:
        nodes.append(nodes[-1].next)
    left, waiting, cursor = set(nodes), dict[Node, list[Node]](), first.prev
    pending = nodes[::-1]
    while pending:
        node = pending.pop()
        missing = next((n for n in node.all_input_nodes if n in left), None)
        if missing is not None:
            waiting.setdefault(missing, []).append(node)
            continue
        left.remove(node)
        if cursor.next is not node:
            cursor.append(node)
        cursor = node
        pending += reversed(waiting.pop(node, ()))
    assert not left, "a cycle"

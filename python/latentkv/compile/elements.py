"""What every element of a tensor in an FX graph is computed from: the way the pass recognises RoPE.

Rotary embedding has dozens of spellings (chunk or strided slices, cat or stack, rotate_half, repeated tables, upcasts
here or there), and one meaning. So the pass does not match spellings. It gives each element a fingerprint of the
expression that makes it: elements of a tensor that nothing is known about have arbitrary ones, views and
concatenations move them (torch's own ops do that, on an array of fingerprints), RoPE's arithmetic mixes them. Two
tensors are the same function of the same elements if their fingerprints agree, and to the last bit: the laws used
(x * y = y * x, x + y = y + x, (-x) * y = -(x * y), x - y = x + (-y)) hold for every rounding, and each rounding to 16
bits is part of the expression.

One row (token) is looked at, and stands for all of them, however many: an op that treats rows differently, such as a
slice or a concatenation along them, counts as unknown, as does one whose bounds are symbols. Of arithmetic only what
RoPE is made of is known, an element times one of the table and the sum of two such products: all else makes new
elements. So every node is evaluated once, from its inputs', and that is all.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Graph, Node

from .graph import (
    LIMIT,
    Flat,
    Row,
    View,
    arguments,
    closure,
    expr_of,
    is_rope,
    is_tensor,
    number,
    numbers,
    plain,
    quotient,
    root_of,
)

aten, prims = torch.ops.aten, torch.ops.prims

# An element: its sign (that of -x is the other one), a fingerprint of the rest, what kind of element it is (of a table,
# one times such, the sum of two of these, or any), and the narrowest float dtype that is known to hold it.
Ids = NDArray[np.uint64]
SIGN, PRINT = np.uint64(1 << 63), np.uint64((1 << 63) - (1 << 4))
KIND, ANGLE, PRODUCT, TURNED = map(np.uint64, (12, 4, 8, 12))
NARROW, WIDE, OTHER = map(np.uint64, (3, 0, 3))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _narrow(dtype: torch.dtype) -> np.uint64:
    return np.uint64(_DTYPES.index(dtype)) if dtype in _DTYPES else OTHER


def are(x: Ids | None, kind: np.uint64) -> bool:
    """Whether all are known and of a kind."""
    return x is not None and bool(((x & KIND) == kind).all())


def alike(x: Ids, y: Ids) -> NDArray[np.bool_]:
    """Which elements are computed alike."""
    equal: NDArray[np.bool_] = (x ^ y) & (SIGN | PRINT) == 0
    return equal


def same(x: Ids | None, y: Ids | None) -> bool:
    """Whether both are known, and all elements computed alike."""
    return x is not None and y is not None and x.shape == y.shape and bool(alike(x, y).all())


def _mix(tag: str, *parts: Ids) -> Ids:
    """A fingerprint of the parts, in their order (the finalizer of splitmix64, after each)."""
    h: Any = np.uint64(int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=8).digest(), "little"))
    with np.errstate(over="ignore"):
        for part in parts:
            h = (h ^ part) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return np.asarray(h & PRINT, np.uint64)


class Form(NamedTuple):
    """A tensor as rows: of its dimensions the first ``outer`` are those of N, and shape[outer - 1] in a row of them."""

    outer: int
    shape: tuple[int, ...]


class Elements:
    """The elements of a graph's nodes: at first those that RoPE may be made of, others when they are asked for.

    Attributes:
        touched: the nodes that elements of a table, or rotated ones, go into, in the graph's order.

    Args:
        rows: N, the number of tokens.
        graph: None for a table's own elements, which no others go into.
        rounded: whether rounding to 16 bits is part of an expression. Without, tensors count as equal that real
            arithmetic makes equal.
    """

    def __init__(self, rows: Any, graph: Graph | None = None, rounded: bool = True) -> None:
        self.rows, self.rounded = expr_of(rows), rounded
        self.touched: dict[Node, None] = {}
        self._known: dict[Node, Ids | None] = {}
        self._new: dict[Node, Ids] = {}
        self._forms: dict[Node, Form | None] = {}
        self._tables: dict[Any, Elements] = {}
        self._rows: dict[View, Row | None] = {}
        self._indices: dict[tuple[View, View], Flat | None] = {}
        self._within: dict[tuple[View, View], Flat] = {}
        for node in () if graph is None else graph.nodes:
            first = is_rope(node) or is_lookup(node)
            if (first or any(i in self.touched for i in node.all_input_nodes)) and self._passes(node):
                self.touched[node] = None

    def known(self, node: Node) -> Ids | None:
        """A row of a node's tensor; None where nothing is known of it."""
        if node not in self._known:

            def unseen(n: Node) -> Iterable[Node]:
                return (i for i in n.all_input_nodes if i not in self._known) if self._follows(n) else ()

            for n in sorted(closure([node], unseen)):
                self._known[n] = self._evaluate(n) if self._follows(n) else None
        return self._known[node]

    def _follows(self, node: Node) -> bool:
        """Whether anything may follow from the node's inputs."""
        of_angles = node.target not in _ARITHMETIC or any(i in self.touched for i in node.all_input_nodes)
        return is_transparent(node) and of_angles

    def values(self, node: Node) -> Ids | None:
        """A row of a node's tensor, new elements where nothing is known; None where it is not made of rows."""
        known, form = self.known(node), self.form(node)
        if known is not None or form is None:
            return known
        if node not in self._new:
            ids = _mix(f"element of {node.name}", np.arange(math.prod(form.shape), dtype=np.uint64))
            self._new[node] = (ids | _narrow(node.meta["val"].dtype)).reshape(form.shape)
        return self._new[node]

    def _evaluate(self, node: Node) -> Ids | None:
        form = self.form(node)
        found = None if form is None else _COMPUTES[node.target](self, node)
        return None if found is None or form is None else found.reshape(form.shape)

    def form(self, node: Node) -> Form | None:
        """A node's tensor as rows; None where it does not consist of rows of a known size."""
        if node not in self._forms:
            self._forms[node] = self._form(node)
        return self._forms[node]

    def _form(self, node: Node) -> Form | None:
        if not is_tensor(node):
            return None
        sizes: list[Any] = [expr_of(s) for s in node.meta["val"].shape]
        before: Any = 1
        for outer in range(len(sizes) + 1):
            times, rest = quotient(before, self.rows), numbers(sizes[outer:])
            if times is not None:
                if rest is None or times * math.prod(rest) > LIMIT:
                    return None
                return Form(outer, (*[1] * (outer - 1), *[times] * min(outer, 1), *rest))
            before = math.prod(sizes[: outer + 1])
        return None

    def spread(self, node: Node, over: Node) -> Ids | None:
        """A node's elements, broadcast to the shape of another."""
        mine, other, values = self.form(node), self.form(over), self.values(node)
        if values is None or mine is None or other is None or mine == other:
            return values
        sizes, others = ([expr_of(s) for s in n.meta["val"].shape] for n in (node, over))
        if len(sizes) != len(others) or mine.outer != other.outer or sizes[: mine.outer] != others[: mine.outer]:
            return None
        return np.broadcast_to(values, other.shape).copy()

    # -- places in a storage: layers have them alike

    def row(self, view: View) -> Row | None:
        """Where the elements of a view's first row lie; None where it does not consist of rows."""
        if view not in self._rows:
            self._rows[view] = view.row(self.rows)
        return self._rows[view]

    def index(self, whole: View, part: View) -> Flat | None:
        """Which elements of a row of one view a row of another has; None where it has others, too."""
        if (whole, part) not in self._indices:
            mine, theirs = self.row(whole), self.row(part)
            self._indices[whole, part] = None if mine is None or theirs is None else mine.index(theirs)
        return self._indices[whole, part]

    def within(self, whole: View, part: View) -> Flat:
        """Which elements of a row of one view another may hold, in any of its rows: all where that is not known."""
        if (whole, part) not in self._within:
            row = self.row(whole)
            assert row is not None
            found = part.within(row)
            self._within[whole, part] = np.arange(len(row.places)) if found is None else found
        return self._within[whole, part]

    # -- what is made of what

    def expression(self, node: Node) -> list[Node]:
        """The nodes whose elements make those of this one, back to new ones, in the graph's order."""
        return sorted(closure([node], lambda n: n.all_input_nodes if self._passes(n) else ()))

    def consequences(self, node: Node) -> list[Node]:
        """The nodes whose elements are made of this one's by what is known, in the graph's order."""
        return sorted(closure([node], lambda n: filter(self._passes, n.users)) - {node})

    def _passes(self, node: Node) -> bool:
        return is_split(node) or is_rope(node) or self.known(node) is not None

    # -- arithmetic

    def to(self, x: Ids, dtype: torch.dtype) -> Ids:
        """Converted to a dtype: rounded, unless it is known to hold the values already."""
        narrow = _narrow(dtype)
        if narrow == OTHER:  # fp64 holds all that fp32 does; of anything else it is only known that it is a function
            converted = _mix(f"convert {dtype}", x & (SIGN | PRINT)) | x & KIND
            return (x if dtype == torch.float64 else converted) | OTHER
        fits = ((x & NARROW) == narrow) | ((narrow == WIDE) & ((x & NARROW) != OTHER))
        if fits.all():
            return x
        rounded = _mix(f"round {dtype}", x & PRINT) | x & (SIGN | KIND) if self.rounded else x & ~NARROW
        return np.where(fits, x, rounded | narrow)

    def multiply(self, x: Ids, y: Ids, dtype: torch.dtype = torch.float32) -> Ids:
        """The product, computed in fp32 (fp64 for it) and rounded to ``dtype``."""
        a, b = x & PRINT, y & PRINT
        product = _mix(f"multiply{self._wide(dtype)}", np.minimum(a, b), np.maximum(a, b))
        return self.to(product | (x ^ y) & SIGN | PRODUCT, dtype)

    def add(self, x: Ids, y: Ids, dtype: torch.dtype = torch.float32) -> Ids:
        """The sum, likewise."""
        a, b = x & (SIGN | PRINT), y & (SIGN | PRINT)
        return self.to(_mix(f"add{self._wide(dtype)}", np.minimum(a, b), np.maximum(a, b)) | TURNED, dtype)

    def _wide(self, dtype: torch.dtype) -> str:
        return " in fp64" if dtype == torch.float64 and self.rounded else ""

    def angles(self, table: Node, positions: Node) -> Ids | None:
        """A row of a table [max_position, C], the one at a row of ``positions`` [N]."""
        size = expr_of(table.meta["val"].shape[0])
        if size not in self._tables:
            self._tables[size] = Elements(size, rounded=self.rounded)
        columns = self._tables[size].values(table)
        if columns is None:
            return None
        return _mix(f"at {plain(positions).name}", columns & (SIGN | PRINT)) | columns & NARROW | ANGLE


# ------------------------------------------------------------------------------------------------- what ops compute

Compute = Callable[[Elements, Node], Ids | None]
_COMPUTES: dict[Any, Compute] = {}


def means(*targets: Any) -> Callable[[Compute], Compute]:
    """Registers what ops compute."""

    def register(compute: Compute) -> Compute:
        _COMPUTES.update(dict.fromkeys(targets, compute))
        return compute

    return register


def is_transparent(node: Node) -> bool:
    """Whether something may be known about how the node's elements follow from its inputs'."""
    return node.op == "call_function" and (node.target in _COMPUTES or is_split(node) or is_rope(node))


@means(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.clone.default, aten.alias.default, aten.detach.default,
)  # fmt: skip
def _same(e: Elements, node: Node) -> Ids | None:
    return e.values(node.args[0])  # type: ignore[arg-type]


@means(
    aten.slice.Tensor, aten.select.int, aten.permute.default, aten.transpose.int, aten.repeat.default,
    aten.cat.default, aten.slice_scatter.default,
)  # fmt: skip
def moved(e: Elements, node: Node) -> Any:
    """What an op, or a split, makes of rows by moving elements within each; None if of rows, or by symbols."""
    given, tensors = arguments(node), [n for n in node.all_input_nodes if is_tensor(n)]
    rank, forms = tensors[0].meta["val"].dim(), list(map(e.form, tensors))
    if any(f is None or f.outer != forms[0].outer for f in forms):  # type: ignore[union-attr]
        return None
    along = {given[name] % rank for name in ("dim", "dim0", "dim1") if name in given}
    along |= {d for d, source in enumerate(given.get("dims", ())) if source % rank != d}
    repeats = given.get("repeats", ())
    along |= {d for d, times in enumerate(repeats) if times != 1 or len(repeats) != rank}
    if min(along, default=rank) < forms[0].outer:  # type: ignore[union-attr]
        whole = node.target in _SLICES and _sizes(node) == _sizes(tensors[-1])  # all rows, where they are
        return _converted(e, e.values(tensors[-1]), tensors[-1], node) if whole else None
    if any(number(n) is None for n in node.all_input_nodes if n not in tensors):
        return None

    def argument(n: Node) -> Any:
        return torch.from_numpy(_converted(e, e.values(n), n, node).view(np.int64)) if n in tensors else number(n)

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), argument)
    found = node.target(*args, **kwargs)  # type: ignore[operator]
    return found.numpy().view(np.uint64) if is_tensor(node) else [part.numpy().view(np.uint64) for part in found]


_SLICES, _SPLITS = (aten.slice.Tensor, aten.slice_scatter.default), (aten.split.Tensor, aten.split_with_sizes.default)


def is_split(node: Node) -> bool:
    """Whether the node is a list of the parts of a tensor."""
    return node.target in _SPLITS


def _sizes(node: Node) -> list[Any]:
    return [expr_of(s) for s in node.meta["val"].shape]


def _converted(e: Elements, values: Ids | None, x: Node, node: Node) -> Any:
    """Elements of ``x`` in the dtype of ``node``."""
    dtypes = [n.meta["val"].dtype for n in (x, node) if is_tensor(n)]
    return values if values is None or dtypes[0] == dtypes[-1] else e.to(values, dtypes[-1])


@means(aten.as_strided.default)
def _by_place(e: Elements, node: Node) -> Ids | None:
    root = root_of(node)
    values = None if root is node else e.values(root)
    at = e.index(View.of(root.meta["val"]), View.of(node.meta["val"]))
    return None if at is None or values is None else values.reshape(-1)[at]


@means(prims.convert_element_type.default, aten._to_copy.default)
def _convert(e: Elements, node: Node) -> Any:
    x: Any = node.args[0]
    return _converted(e, e.values(x), x, node)


@means(aten.copy.default, aten.expand.default)
def _spread(e: Elements, node: Node) -> Any:
    x: Any = node.args[1 if node.target is aten.copy.default else 0]
    return _converted(e, e.spread(x, node), x, node)


_ARITHMETIC = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor)


@means(*_ARITHMETIC)
def _arithmetic(e: Elements, node: Node) -> Ids | None:
    """What RoPE does: an element times one of the table, and the sum of two such products."""
    operands = [x for x in node.args[:2] if isinstance(x, Node) and is_tensor(x)]
    dtype, product = node.meta["val"].dtype, node.target is aten.mul.Tensor
    if len(operands) < 2 or not dtype.is_floating_point or node.kwargs.get("alpha", 1) != 1:
        return None
    known = [e.known(x) for x in operands]
    if sum(are(x, ANGLE if product else PRODUCT) for x in known) != (1 if product else 2):
        return None
    x, y = (e.spread(operand, node) for operand in operands)
    if x is None or y is None or (product and any(((v & KIND) == PRODUCT).any() for v in (x, y))):
        return None
    if product:
        return e.multiply(x, y, dtype)
    return e.add(x, y if node.target is aten.add.Tensor else y ^ SIGN, dtype)


@means(aten.neg.default)
def _neg(e: Elements, node: Node) -> Ids | None:
    values = e.values(node.args[0])  # type: ignore[arg-type]
    return None if values is None else values ^ SIGN


# ------------------------------------------------------------------------------------------------- tables

_GATHERS = (aten.index.Tensor, aten.index_select.default, aten.embedding.default)


@means(*_GATHERS)
def _rows(e: Elements, node: Node) -> Ids | None:
    found = gathered(node)
    return None if found is None or _sizes(found[1])[0] != e.rows else e.angles(*found)


def is_lookup(node: Node) -> bool:
    """Whether the node picks elements of a tensor by indices."""
    return node.op == "call_function" and node.target in _GATHERS


def gathered(node: Node) -> tuple[Node, Node] | None:
    """The table and the positions, of a node that picks rows of a table [max_position, C] by positions [N]."""
    if not is_lookup(node):
        return None
    table, positions, *rest = node.args
    if node.target is aten.index.Tensor:
        positions = positions[0] if len(positions) == 1 else None  # type: ignore[index,arg-type]
    elif node.target is aten.index_select.default:
        positions = rest[0] if positions == 0 else None
    if not isinstance(table, Node) or not isinstance(positions, Node):
        return None
    t, p = table.meta["val"], positions.meta["val"]
    if t.dim() != 2 or p.dim() != 1 or not t.dtype.is_floating_point or p.dtype not in (torch.int32, torch.int64):
        return None
    return table, positions


def table_chain(table: Node) -> list[Node]:
    """The table and what it is a run of columns (or another dtype) of, the last of these first."""
    parent: Any = table.args[0] if table.op == "call_function" and table.args else None
    split = table.target is operator.getitem and is_split(parent)
    columns = parent if split else table if table.target is aten.slice.Tensor else None
    if columns is not None:
        follows = arguments(columns)["dim"] % 2 == 1
        parent = columns.args[0]
    else:
        follows = table.target in (prims.convert_element_type.default, aten._to_copy.default, aten.alias.default)
    return [*table_chain(parent), table] if follows else [table]

"""What every element of a tensor in an FX graph is computed from: the way the pass recognises RoPE.

Rotary embedding has dozens of spellings (chunk or strided slices, cat or stack, rotate_half, repeated tables, upcasts
here or there), and one meaning. So the pass does not match spellings. It gives each element a 64-bit fingerprint of the
expression that makes it: elements of a tensor that nothing is known about have arbitrary ones, views and
concatenations move them, RoPE's arithmetic mixes them. Two tensors are the same function of the same elements if their
fingerprints agree, and to the last bit: the laws used (x * y = y * x, x + y = y + x, (-x) * y = -(x * y),
x - y = x + (-y)) hold for every rounding, and each rounding to 16 bits is part of the expression.

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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Graph, Node

from .graph import (
    LIMIT,
    Flat,
    View,
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

Ids = NDArray[np.uint64]
Bytes = NDArray[np.uint8]

aten, prims = torch.ops.aten, torch.ops.prims

ANY, ANGLE, PRODUCT, TURNED = range(4)  # an element; one of the table; the product of such two; the sum of two of these


@dataclass(frozen=True, eq=False)
class Values:
    """The elements of a row, in row-major order."""

    ids: Ids  # their fingerprints
    narrow: Bytes  # the narrowest float dtype known to hold each (bytes 4: fp32), an index into _DTYPES
    kind: Bytes

    def take(self, at: Flat) -> Values:
        """Some of them."""
        return Values(self.ids[at], self.narrow[at], self.kind[at])

    def put(self, at: Flat, values: Values) -> Values:
        """These with some replaced."""
        changed = Values(self.ids.copy(), self.narrow.copy(), self.kind.copy())
        changed.ids[at], changed.narrow[at], changed.kind[at] = values.ids, values.narrow, values.kind
        return changed

    def are(self, kind: int) -> bool:
        """Whether all are of a kind."""
        return bool((self.kind == kind).all())

    def same(self, other: Values | None) -> bool:
        """Whether the others are made as these are."""
        return other is not None and np.array_equal(self.ids, other.ids)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDE, _WIDER = 0, 255  # fp32; and what is none of these


def _narrow(dtype: torch.dtype) -> int:
    return _DTYPES.index(dtype) if dtype in _DTYPES else _WIDER


def _made(ids: Ids, narrow: int, kind: int) -> Values:
    return Values(ids, np.full(ids.shape, narrow, np.uint8), np.full(ids.shape, kind, np.uint8))


def _mix(tag: str, *parts: Ids) -> Ids:
    """A fingerprint of the parts, in their order (the finalizer of splitmix64, after each)."""
    h: Any = np.uint64(int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=8).digest(), "little"))
    with np.errstate(over="ignore"):
        for part in parts:
            h = (h ^ part) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return np.asarray(h, np.uint64)


def _unsigned(x: Ids) -> tuple[Ids, NDArray[np.bool_]]:
    """A fingerprint without its sign, and the sign: that of -x is the negative of that of x."""
    minus = np.negative(x)
    return np.minimum(x, minus), x > minus


def _signed(x: Ids, negative: NDArray[np.bool_]) -> Ids:
    return np.where(negative, np.negative(x), x)


@dataclass(frozen=True)
class _Form:
    """A tensor as rows: the first ``outer`` dimensions are those of N times ``shape[0]``."""

    outer: int
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        return math.prod(self.shape)


class Elements:
    """The fingerprints of the nodes of one graph, evaluated when they are first asked for.

    Args:
        rows: N, the number of tokens.
        rounded: whether rounding to 16 bits is part of an expression. Without, tensors count as equal that real
            arithmetic makes equal.
    """

    def __init__(self, rows: Any, rounded: bool = True) -> None:
        self.rows, self.rounded = expr_of(rows), rounded
        self._known: dict[Node, Values | None] = {}
        self._forms: dict[Node, _Form | None] = {}
        self._tables: dict[Any, Elements] = {}

    def known(self, node: Node) -> Values | None:
        """What is known of a node's elements; None where they are new ones."""
        if node not in self._known:

            def unseen(n: Node) -> Iterable[Node]:
                return (i for i in n.all_input_nodes if i not in self._known) if is_transparent(n) else ()

            for n in sorted(closure([node], unseen)):
                self._known[n] = self._evaluate(n)
        return self._known[node]

    def values(self, node: Node, at: Flat | None = None) -> Values | None:
        """A node's elements, or some of them; None where it is not made of rows."""
        known, form = self.known(node), self.form(node)
        if known is not None:
            return known if at is None else known.take(at)
        if form is None:
            return None
        numbered = np.arange(form.width) if at is None else at
        return _made(_mix(f"element of {node.name}", numbered.astype(np.uint64)), _narrow(node.meta["val"].dtype), ANY)

    def _evaluate(self, node: Node) -> Values | None:
        handler = _HANDLERS.get(node.target) if node.op == "call_function" else None
        form = self.form(node) if handler is not None else None
        values = None if handler is None or form is None else handler(self, node)
        return values if values is not None and form is not None and len(values.ids) == form.width else None

    def form(self, node: Node) -> _Form | None:
        """A node's tensor as rows; None where it does not consist of rows of a known width."""
        if node not in self._forms:
            self._forms[node] = self._form(node)
        return self._forms[node]

    def _form(self, node: Node) -> _Form | None:
        if not is_tensor(node):
            return None
        sizes: list[Any] = [expr_of(s) for s in node.meta["val"].shape]
        before: Any = 1
        for outer in range(len(sizes) + 1):
            times, rest = quotient(before, self.rows), numbers(sizes[outer:])
            if times is not None:
                form = None if rest is None else _Form(outer, (times, *rest))
                return form if form is not None and form.width <= LIMIT else None
            before = math.prod(sizes[: outer + 1])
        return None

    def axis(self, node: Node, dim: int) -> int | None:
        """The dimension in the form of a node; None for those that count the rows."""
        form = self.form(node)
        return None if form is None or dim < form.outer else dim - form.outer + 1

    def pick(self, node: Node, *index: Any) -> Values | None:
        """Those of its elements that an index of the form picks."""
        form = self.form(node)
        if form is None:
            return None
        return self.values(node, np.arange(form.width).reshape(form.shape)[index].reshape(-1))

    def spread(self, node: Node, over: Node) -> Values | None:
        """A node's elements, broadcast to the shape of another."""
        mine, other = self.form(node), self.form(over)
        if mine is None or other is None or mine == other:
            return self.values(node)
        sizes, others = node.meta["val"].shape, over.meta["val"].shape
        same = all(expr_of(a) == expr_of(b) for a, b in zip(sizes[: mine.outer], others, strict=False))
        if len(sizes) != len(others) or mine.outer != other.outer or not same:
            return None
        at = np.arange(mine.width).reshape(mine.shape)
        return self.values(node, np.broadcast_to(at, other.shape).reshape(-1))

    def made_of_angles(self, graph: Graph) -> list[Node]:
        """The nodes that something of a table, or turned by an op, goes into, in the graph's order."""
        found: dict[Node, None] = {}
        for node in graph.nodes:
            fresh = is_rope(node) or is_lookup(node)
            if (fresh or any(i in found for i in node.all_input_nodes)) and self._passes(node):
                found[node] = None
        return list(found)

    def expression(self, node: Node) -> list[Node]:
        """The nodes whose elements make those of this one, back to new ones, in the graph's order."""
        return sorted(closure([node], lambda n: n.all_input_nodes if self._passes(n) else ()))

    def consequences(self, node: Node) -> list[Node]:
        """The nodes whose elements are made of this one's by what is known, in the graph's order."""
        return sorted(closure([node], lambda n: filter(self._passes, n.users)) - {node})

    def _passes(self, node: Node) -> bool:
        return is_split(node) or is_rope(node) or self.known(node) is not None

    # -- arithmetic

    def to(self, x: Values, dtype: torch.dtype) -> Values:
        """Converted to a dtype: rounded, unless it is known to hold the values already."""
        narrow = _narrow(dtype)
        if narrow == _WIDER:  # fp64 holds all that fp32 does; of anything else it is only known that it is a function
            ids = x.ids if dtype == torch.float64 else _mix(f"convert {dtype}", x.ids)
            return replace(x, ids=ids, narrow=np.full(ids.shape, _WIDER, np.uint8))
        fits = (x.narrow == narrow) | ((narrow == _WIDE) & (x.narrow != _WIDER))
        if fits.all():
            return x
        size, negative = _unsigned(x.ids)
        rounded = _signed(_mix(f"round {dtype}", size), negative) if self.rounded else x.ids
        narrowed = np.where(fits, x.narrow, np.uint8(narrow))
        return Values(np.where(fits, x.ids, rounded), narrowed, x.kind)

    def multiply(self, x: Values, y: Values, dtype: torch.dtype = torch.float32) -> Values:
        """The product, computed in fp32 (fp64 for it) and rounded to ``dtype``."""
        (a, s), (b, t) = _unsigned(x.ids), _unsigned(y.ids)
        product = _mix(f"multiply{self._wide(dtype)}", np.minimum(a, b), np.maximum(a, b))
        return self.to(_made(_signed(product, s ^ t), _WIDE, PRODUCT), dtype)

    def add(self, x: Values, y: Values, dtype: torch.dtype = torch.float32) -> Values:
        """The sum, likewise."""
        total = _mix(f"add{self._wide(dtype)}", np.minimum(x.ids, y.ids), np.maximum(x.ids, y.ids))
        return self.to(_made(total, _WIDE, TURNED), dtype)

    def negate(self, x: Values) -> Values:
        """-x."""
        return replace(x, ids=np.negative(x.ids))

    def _wide(self, dtype: torch.dtype) -> str:
        return " in fp64" if dtype == torch.float64 and self.rounded else ""

    def angles(self, table: Node, positions: Node) -> Values | None:
        """A row of a table [max_position, C], the one at a row of ``positions`` [N]."""
        size = expr_of(table.meta["val"].shape[0])
        columns = self._tables.setdefault(size, Elements(size, self.rounded)).values(table)
        if columns is None:
            return None
        ids = _mix(f"at {plain(positions).name}", columns.ids)
        return Values(ids, columns.narrow, np.full(ids.shape, ANGLE, np.uint8))


# ------------------------------------------------------------------------------------------------- what ops compute

Handler = Callable[[Elements, Node], Values | None]
_HANDLERS: dict[Any, Handler] = {}


def means(*targets: Any) -> Callable[[Handler], Handler]:
    """Registers what ops compute."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return register


def is_transparent(node: Node) -> bool:
    """Whether something may be known about how the node's elements follow from its inputs'."""
    return node.op == "call_function" and (node.target in _HANDLERS or is_split(node) or is_rope(node))


def _argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _dim(node: Node, index: int, of: Node) -> int:
    rank: int = of.meta["val"].dim()
    return int(_argument(node, index, "dim", 0)) % max(rank, 1)


def _size(node: Node, dim: int) -> Any:
    return expr_of(node.meta["val"].shape[dim])


def _run(node: Node, whole: int | None, index: int) -> tuple[int, int] | None:
    """Where a slice of so many starts, and its step."""
    start, step = number(_argument(node, index, "start") or 0), number(_argument(node, index + 2, "step", 1))
    if start is None or step is None or whole is None:
        return None
    return min(max(start + whole if start < 0 else start, 0), whole), step


@means(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.clone.default, aten.alias.default, aten.detach.default,
)  # fmt: skip
def _same(e: Elements, node: Node) -> Values | None:
    return e.values(node.args[0])  # type: ignore[arg-type]


@means(aten.as_strided.default)
def _by_place(e: Elements, node: Node) -> Values | None:
    root = root_of(node)
    whole, part = (View.of(n.meta["val"]).row(e.rows) for n in (root, node))
    at = None if whole is None or part is None or root is node else whole.index(part)
    return None if at is None else e.values(root, at)


@means(prims.convert_element_type.default, aten._to_copy.default)
def _convert(e: Elements, node: Node) -> Values | None:
    x: Any = node.args[0]
    mine, given = node.meta["val"].dtype, x.meta["val"].dtype
    widened = mine == given or (given in _DTYPES[1:] and mine in (torch.float32, torch.float64))
    if e.known(x) is None and e.rounded and not widened:
        return None  # what is rounded before anything else happens to it may as well be called new
    values = e.values(x)
    return None if values is None else e.to(values, mine)


@means(aten.copy.default)
def _copy(e: Elements, node: Node) -> Values | None:
    values = e.spread(node.args[1], node)  # type: ignore[arg-type]
    return None if values is None else e.to(values, node.meta["val"].dtype)


@means(aten.expand.default)
def _expand(e: Elements, node: Node) -> Values | None:
    return e.spread(node.args[0], node)  # type: ignore[arg-type]


@means(aten.permute.default, aten.transpose.int)
def _permute(e: Elements, node: Node) -> Values | None:
    x: Any = node.args[0]
    order, form = list(range(x.meta["val"].dim())), e.form(x)
    if node.target is aten.transpose.int:
        i, j = (int(d) % len(order) for d in node.args[1:3])  # type: ignore[arg-type]
        order[i], order[j] = order[j], order[i]
    else:
        order = [int(d) % len(order) for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    if form is None or order[: form.outer] != list(range(form.outer)):
        return None
    axes = [0, *(d - form.outer + 1 for d in order[form.outer :])]
    return e.values(x, np.arange(form.width).reshape(form.shape).transpose(axes).reshape(-1))


@means(aten.slice.Tensor)
def _slice(e: Elements, node: Node) -> Values | None:
    x: Any = node.args[0]
    dim = _dim(node, 1, x)
    axis, run, count = e.axis(x, dim), _run(node, number(_size(x, dim)), 2), number(_size(node, dim))
    if _size(node, dim) == _size(x, dim):
        return e.values(x)
    if axis is None or run is None or count is None:
        return None
    start, step = run
    return e.pick(x, *[slice(None)] * axis, slice(start, start + count * step, step))


@means(aten.select.int)
def _select(e: Elements, node: Node) -> Values | None:
    x: Any = node.args[0]
    dim = _dim(node, 1, x)
    axis, at = e.axis(x, dim), number(node.args[2])
    return None if axis is None or at is None else e.pick(x, *[slice(None)] * axis, at)


_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


def is_split(node: Node) -> bool:
    """Whether the node is a list of the parts of a tensor."""
    return node.target in _SPLITS


def split_part(e: Elements, node: Node) -> Values | None:
    """A part of a split."""
    split, part = node.args
    assert isinstance(split, Node) and isinstance(part, int)
    x: Any = split.args[0]
    dim, sizes = _dim(split, 2, x), split.args[1]
    axis = e.axis(x, dim)
    if split.target is aten.split.Tensor:
        sizes = [sizes] * (part + 1)
    before, count = numbers(sizes[:part]), number(_size(node, dim))  # type: ignore[index,arg-type]
    if axis is None or before is None or count is None:
        return None
    return e.pick(x, *[slice(None)] * axis, slice(sum(before), sum(before) + count))


@means(aten.repeat.default)
def _repeat(e: Elements, node: Node) -> Values | None:
    x: Any = node.args[0]
    form, times = e.form(x), numbers(node.args[1])  # type: ignore[arg-type]
    if form is None or times is None or len(times) != x.meta["val"].dim() or any(n != 1 for n in times[: form.outer]):
        return None
    at = np.arange(form.width).reshape(form.shape)
    return e.values(x, np.tile(at, [1, *times[form.outer :]]).reshape(-1))


@means(aten.cat.default)
def _cat(e: Elements, node: Node) -> Values | None:
    parts: Any = node.args[0]
    axis, whole = e.axis(node, _dim(node, 1, node)), e.form(node)
    made, places, total = [], [], 0
    for x in parts:
        values, form = e.values(x), e.form(x)
        if values is None or form is None or whole is None or axis is None or form.outer != whole.outer:
            return None
        made.append(e.to(values, node.meta["val"].dtype))
        places.append((np.arange(form.width) + total).reshape(form.shape))
        total += form.width
    at = np.concatenate(places, axis).reshape(-1)
    return Values(*(np.concatenate([getattr(v, name) for v in made]) for name in ("ids", "narrow", "kind"))).take(at)


@means(aten.slice_scatter.default)
def _slice_scatter(e: Elements, node: Node) -> Values | None:
    x, src = node.args[:2]
    assert isinstance(x, Node) and isinstance(src, Node)
    dim = _dim(node, 2, node)
    axis, run, count = e.axis(node, dim), _run(node, number(_size(node, dim)), 3), number(_size(src, dim))
    source, values, form = e.values(src), e.values(x), e.form(node)
    if source is None or values is None or form is None:
        return None
    source = e.to(source, node.meta["val"].dtype)
    if _size(src, dim) == _size(node, dim):
        return source
    if axis is None or run is None or count is None:
        return None
    start, step = run
    index = *[slice(None)] * axis, slice(start, start + count * step, step)
    return values.put(np.arange(form.width).reshape(form.shape)[index].reshape(-1), source)


@means(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor)
def _arithmetic(e: Elements, node: Node) -> Values | None:
    """What RoPE does: an element times one of the table, and the sum of two such products."""
    operands = [x for x in node.args[:2] if isinstance(x, Node) and is_tensor(x)]
    dtype = node.meta["val"].dtype
    if len(operands) < 2 or not dtype.is_floating_point or node.kwargs.get("alpha", 1) != 1:
        return None
    known = [e.known(x) for x in operands]
    if node.target is aten.mul.Tensor:
        fitting = sum(v is not None and v.are(ANGLE) for v in known) == 1
    else:
        fitting = all(v is not None and v.are(PRODUCT) for v in known)
    x, y = (e.spread(x, node) if fitting else None for x in operands)
    if x is None or y is None:
        return None
    if node.target is aten.mul.Tensor:
        free = y if x.are(ANGLE) else x
        return e.multiply(x, y, dtype) if not (free.kind == PRODUCT).any() else None
    return e.add(x, y if node.target is aten.add.Tensor else e.negate(y), dtype)


@means(aten.neg.default)
def _neg(e: Elements, node: Node) -> Values | None:
    values = e.values(node.args[0])  # type: ignore[arg-type]
    return None if values is None else e.negate(values)


# ------------------------------------------------------------------------------------------------- tables

_GATHERS = (aten.index.Tensor, aten.index_select.default, aten.embedding.default)


@means(*_GATHERS)
def _rows(e: Elements, node: Node) -> Values | None:
    found = gathered(node)
    return None if found is None or _size(found[1], 0) != e.rows else e.angles(*found)


def is_lookup(node: Node) -> bool:
    """Whether the node picks elements of a tensor by indices."""
    return node.op == "call_function" and node.target in _GATHERS


def gathered(node: Node) -> tuple[Node, Node] | None:
    """The table and the positions, of a node that picks rows of a table [max_position, C] by positions [N]."""
    if not is_lookup(node):
        return None
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        table, positions = node.args[0], indices[0] if len(indices) == 1 else None
    elif node.target is aten.index_select.default:
        table, positions = node.args[0], node.args[2] if node.args[1] == 0 else None
    else:
        table, positions = node.args[:2]
    if not isinstance(table, Node) or not isinstance(positions, Node):
        return None
    t, p = table.meta["val"], positions.meta["val"]
    if t.dim() != 2 or p.dim() != 1 or not t.dtype.is_floating_point or p.dtype not in (torch.int32, torch.int64):
        return None
    return table, positions


def table_chain(table: Node) -> list[Node]:
    """The table and what it is a run of columns (or another dtype) of, the last of these first."""
    chain = [table]
    while (parent := _column_parent(chain[0])) is not None:
        chain.insert(0, parent)
    return chain


def _column_parent(node: Node) -> Node | None:
    """What a table is a run of columns of, or the same in another dtype; None where it is made otherwise."""
    parent: Any = node.args[0] if node.op == "call_function" and node.args else None
    if node.target in (prims.convert_element_type.default, aten._to_copy.default, aten.alias.default):
        return parent  # type: ignore[no-any-return]
    if node.target is aten.slice.Tensor and _dim(node, 1, node) == 1:
        return parent  # type: ignore[no-any-return]
    if node.target is operator.getitem and is_split(parent) and _dim(parent, 2, node) == 1:
        return parent.args[0]  # type: ignore[no-any-return]
    return None

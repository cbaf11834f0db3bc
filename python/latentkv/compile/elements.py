"""What every element of a tensor in an FX graph is computed from: the way the pass recognises RoPE.

Rotary embedding has dozens of spellings (chunk or strided slices, cat or stack, rotate_half, repeated tables, upcasts
here or there), and one meaning. So the pass does not match spellings. It gives each element a 64-bit fingerprint of the
expression that makes it: elements of a tensor that nothing is known about have arbitrary ones, views and
concatenations move them, arithmetic mixes them. Two tensors are the same function of the same elements if their
fingerprints agree, and to the last bit: the laws used (x * y = y * x, x + y = y + x, (-x) * y = -(x * y),
x - y = x + (-y)) hold for every rounding, and each rounding to 16 bits is part of the expression.

Only some rows (tokens) are looked at, but all of each. They stand for the rest because an op that treats rows
differently, such as a slice or a concatenation along them, counts as unknown; so does one whose bounds are symbols. The
number of rows may be a symbol: it takes its hint.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

Flat = NDArray[np.int64]  # elements of a tensor, by their number in row-major order
Ids = NDArray[np.uint64]

aten, prims = torch.ops.aten, torch.ops.prims
_DEPTH = 64  # of an expression; what lies deeper counts as unknown


@dataclass(frozen=True)
class Values:
    """Fingerprints, and for each element the narrowest float dtype known to hold it (bytes 4: fp32)."""

    ids: Ids
    narrow: NDArray[np.uint8]  # an index into _DTYPES

    @staticmethod
    def empty(size: int) -> Values:
        """So many, to be filled by :meth:`put`."""
        return Values(np.empty(size, np.uint64), np.empty(size, np.uint8))

    def put(self, at: Flat, values: Values) -> None:
        """Fills in some."""
        self.ids[at], self.narrow[at] = values.ids, values.narrow

    def where(self, condition: NDArray[np.bool_], other: Values) -> Values:
        """These values where the condition holds, elsewhere the others."""
        return Values(np.where(condition, self.ids, other.ids), np.where(condition, self.narrow, other.narrow))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and bool(np.array_equal(self.ids, other.ids))

    __hash__ = None  # type: ignore[assignment]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDE, _WIDER = 0, 255  # fp32; and what is none of these


def _narrow(dtype: torch.dtype) -> int:
    return _DTYPES.index(dtype) if dtype in _DTYPES else _WIDER


def hint(x: Any) -> int:
    """The value of a size: an int, a SymInt, or a node that stands for one."""
    if isinstance(x, Node):
        x = x.meta["val"]
    if isinstance(x, torch.SymInt):
        expr = x.node.expr
        return int(expr.xreplace({s: _symbol_hint(x, s) for s in expr.free_symbols}))
    return int(x)


def _symbol_hint(x: torch.SymInt, symbol: Any) -> int:
    env = x.node.shape_env
    values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    return int(values.get(symbol, 5))  # an unbacked size: any will do


def number(x: Any) -> int | None:
    """A size that is the same whatever sizes the graph will run with; None where it is a symbol."""
    if isinstance(x, Node):
        x = x.meta["val"]
    x = expr_of(x)
    return int(x) if isinstance(x, int) or x.is_number else None


def expr_of(x: Any) -> Any:
    """A size as a number or a symbolic expression: to compare sizes without a guard."""
    return x.node.expr if isinstance(x, torch.SymInt) else x


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of a node's tensor, hints for symbols."""
    return tuple(hint(s) for s in node.meta["val"].shape)


def unravel(flat: Flat, shape: Sequence[int]) -> list[Flat]:
    """The coordinates of elements of a tensor of that shape."""
    return [np.asarray(c) for c in np.unravel_index(flat, tuple(max(s, 1) for s in shape))] if shape else []


def ravel(coords: Sequence[Flat], shape: Sequence[int]) -> Flat:
    """The numbers of the elements at these coordinates."""
    flat: Any = np.zeros((), np.int64)
    for c, size in zip(coords, shape, strict=True):
        flat = flat * size + c
    return np.asarray(flat, np.int64)


def locate(
    offsets: Flat, size: Sequence[int], stride: Sequence[int], offset: int
) -> tuple[list[Flat], NDArray[np.bool_]]:
    """The coordinates of what lies at these places of a storage in a tensor of that geometry, and whether it is there.

    Its elements must not overlap, and the dimensions not interleave.
    """
    rest, inside = offsets - offset, offsets >= offset
    coords: list[Flat] = [np.zeros_like(offsets)] * len(size)
    for d in sorted((d for d, n in enumerate(size) if n != 1), key=lambda d: -stride[d]):
        coords[d] = rest // max(stride[d], 1)
        rest = rest - coords[d] * stride[d]
        inside = inside & (coords[d] >= 0) & (coords[d] < size[d])
    return [np.where(inside, c, 0) for c in coords], inside & (rest == 0)


def _mix(tag: str, *parts: Ids) -> Ids:
    """A fingerprint of the parts, in their order (the finalizer of splitmix64, after each)."""
    h: Any = np.uint64(zlib.crc32(tag.encode()))
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


class Elements:
    """Evaluates nodes of one graph to fingerprints.

    Args:
        rounded: whether rounding to 16 bits is part of an expression. Without, tensors count as equal that real
            arithmetic makes equal.
        rows: N, the number of tokens; None where rows do not matter.
        leaves: nodes to take as unknown, whatever made them.
        meanings: for nodes of other ops, what they compute: element numbers to values.
    """

    def __init__(
        self,
        rounded: bool,
        rows: Any = None,
        leaves: frozenset[Node] = frozenset(),
        meanings: dict[Node, Callable[[Elements, Flat], Values]] | None = None,
    ) -> None:
        self.rounded = rounded
        self.rows = expr_of(rows)
        self.leaves = leaves
        self.meanings = meanings or {}
        self._depth = 0

    def __call__(self, node: Node, flat: Flat) -> Values:
        """The values of these elements of a node's tensor."""
        if self._depth >= _DEPTH or node in self.leaves:
            return self.leaf(node, flat)
        self._depth += 1
        try:
            if (meaning := self.meanings.get(node)) is not None:
                return meaning(self, flat)
            if node.op == "call_function" and (handler := _handler(node)) is not None:
                return handler(self, node, flat)
            return self.leaf(node, flat)
        finally:
            self._depth -= 1

    def within_rows(self, node: Node, dim: int) -> bool:
        """Whether what happens along a dimension of a tensor happens within rows, the same in each."""
        if self.rows is None:
            return True
        rows: Any = 1
        for d, size in enumerate(node.meta["val"].shape):
            if rows == self.rows:
                return d <= dim
            rows = rows * expr_of(size)
        return False

    def leaf(self, node: Node, flat: Flat) -> Values:
        """Elements of which nothing is known but where they are."""
        return self._known(node, _mix(f"leaf {node.name}", flat.astype(np.uint64)))

    def _known(self, node: Node, ids: Ids) -> Values:
        val = node.meta.get("val")
        dtype = val.dtype if isinstance(val, torch.Tensor) else torch.float32
        return Values(ids, np.full(ids.shape, _narrow(dtype), np.uint8))

    def to(self, x: Values, dtype: torch.dtype) -> Values:
        """Converted to a dtype: rounded, unless it is known to hold the values already."""
        narrow = _narrow(dtype)
        if narrow == _WIDER:  # fp64 holds all that fp32 does; of anything else it is only known that it is a function
            ids = x.ids if dtype == torch.float64 else _mix(f"convert {dtype}", x.ids)
            return Values(ids, np.full(ids.shape, _WIDER, np.uint8))
        fits = (x.narrow == narrow) | ((narrow == _WIDE) & (x.narrow != _WIDER))
        size, negative = _unsigned(x.ids)
        rounded = _signed(_mix(f"round {dtype}", size), negative) if self.rounded else x.ids
        return Values(np.where(fits, x.ids, rounded), np.where(fits, x.narrow, np.uint8(narrow)))

    def multiply(self, x: Values, y: Values, dtype: torch.dtype = torch.float32) -> Values:
        """The product, computed in fp32 (fp64 for it) and rounded to ``dtype``."""
        (a, s), (b, t) = _unsigned(x.ids), _unsigned(y.ids)
        product = _mix(f"multiply{self._wide(dtype)}", np.minimum(a, b), np.maximum(a, b))
        return self._rounded(_signed(product, s ^ t), dtype)

    def add(self, x: Values, y: Values, dtype: torch.dtype = torch.float32) -> Values:
        """The sum, likewise."""
        total = _mix(f"add{self._wide(dtype)}", np.minimum(x.ids, y.ids), np.maximum(x.ids, y.ids))
        return self._rounded(total, dtype)

    def negate(self, x: Values) -> Values:
        """-x."""
        return Values(np.negative(x.ids), x.narrow)

    def gather(self, table: Node, positions: Node, rows: Flat, columns: Flat) -> Values:
        """Elements of rows of a table [max_position, C] at ``positions`` [N]."""
        column = Elements(self.rounded)(table, columns)  # of the first row, which stands for all: see _uniform
        return Values(_mix("gather", self(positions, rows).ids, column.ids), column.narrow)

    def _wide(self, dtype: torch.dtype) -> str:
        return " in fp64" if dtype == torch.float64 and self.rounded else ""

    def _rounded(self, ids: Ids, dtype: torch.dtype) -> Values:
        return self.to(Values(ids, np.full(ids.shape, _WIDE, np.uint8)), dtype)


# ------------------------------------------------------------------------------------------------- what ops compute

Handler = Callable[[Elements, Node, Flat], Values]
_HANDLERS: dict[Any, Handler] = {}


def _handler(node: Node) -> Handler | None:
    return _HANDLERS.get(node.target)


def _means(*targets: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return register


def is_transparent(node: Node) -> bool:
    """Whether something is known about how the node's elements follow from its inputs'."""
    return node.op == "call_function" and (node.target in _HANDLERS or node.target in _SPLITS)


def is_lookup(node: Node) -> bool:
    """Whether the node picks elements of a tensor by indices."""
    return node.op == "call_function" and node.target in _GATHERS


def is_gather(node: Node) -> bool:
    """Whether the node picks rows of a table [max_position, C] by positions [N]."""
    return is_lookup(node) and _gathered(node) is not None


def gathered(node: Node) -> tuple[Node, Node]:
    """Of such a node: the table and the positions."""
    found = _gathered(node)
    assert found is not None
    return found


def table_chain(table: Node) -> list[Node]:
    """The table and what it is a run of columns (or another dtype) of, the last of these first."""
    chain = [table]
    while (parent := _column_parent(chain[0])) is not None:
        chain.insert(0, parent)
    return chain


def _argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _dim(node: Node, index: int, rank: int, default: int = 0) -> int:
    return hint(_argument(node, index, "dim", default)) % max(rank, 1)


def _clamped(bound: Any, size: int, default: int) -> int:
    value = default if bound is None else hint(bound)
    return min(max(value + size if value < 0 else value, 0), size)


def _broadcast(flat: Flat, shape: Sequence[int], source: Sequence[int]) -> Flat:
    """The elements of a tensor of shape ``source`` that those of its expansion to ``shape`` are."""
    coords = unravel(flat, shape)[len(shape) - len(source) :]
    return ravel([c if size != 1 else c * 0 for c, size in zip(coords, source, strict=True)], source) + flat * 0


def _operand(e: Elements, node: Node, x: Any, flat: Flat) -> Values:
    if isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor):
        return e(x, _broadcast(flat, shape_of(node), shape_of(x)))
    number = x.meta["val"] if isinstance(x, Node) else x
    return Values(_mix(f"number {number}", flat.astype(np.uint64) * np.uint64(0)), np.full(flat.shape, _WIDE, np.uint8))


@_means(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.clone.default, aten.alias.default, aten.detach.default,
)  # fmt: skip
def _same(e: Elements, node: Node, flat: Flat) -> Values:
    return e(node.args[0], flat)  # type: ignore[arg-type]


@_means(prims.convert_element_type.default, aten._to_copy.default)
def _convert(e: Elements, node: Node, flat: Flat) -> Values:
    return e.to(e(node.args[0], flat), node.meta["val"].dtype)  # type: ignore[arg-type]


@_means(aten.copy.default)
def _copy(e: Elements, node: Node, flat: Flat) -> Values:
    return e.to(_operand(e, node, node.args[1], flat), node.meta["val"].dtype)


@_means(aten.expand.default)
def _expand(e: Elements, node: Node, flat: Flat) -> Values:
    return _operand(e, node, node.args[0], flat)


@_means(aten.permute.default, aten.transpose.int)
def _permute(e: Elements, node: Node, flat: Flat) -> Values:
    x: Any = node.args[0]
    source, order = shape_of(x), list(range(len(shape_of(x))))
    if node.target is aten.transpose.int:
        i, j = (hint(d) % len(source) for d in node.args[1:3])
        order[i], order[j] = order[j], order[i]
    else:
        order = [hint(d) % len(source) for d in node.args[1]]  # type: ignore[union-attr]
    moved = [d for d, o in enumerate(order) if d != o]
    if not all(e.within_rows(x, d) for d in moved):
        return e.leaf(node, flat)
    coords: list[Any] = [None] * len(source)
    for d, c in zip(order, unravel(flat, shape_of(node)), strict=True):
        coords[d] = c
    return e(x, ravel(coords, source))


@_means(aten.slice.Tensor)
def _slice(e: Elements, node: Node, flat: Flat) -> Values:
    x: Any = node.args[0]
    source, coords = shape_of(x), unravel(flat, shape_of(node))
    dim, step = _dim(node, 1, len(source)), hint(_argument(node, 4, "step", 1))
    if expr_of(node.meta["val"].shape[dim]) == expr_of(x.meta["val"].shape[dim]):
        return e(x, flat)
    bounds = (x.meta["val"].shape[dim], node.meta["val"].shape[dim], _argument(node, 2, "start") or 0, step)
    if not e.within_rows(x, dim) or None in map(number, bounds):
        return e.leaf(node, flat)
    coords[dim] = _clamped(_argument(node, 2, "start"), source[dim], 0) + coords[dim] * step
    return e(x, ravel(coords, source))


@_means(aten.select.int)
def _select(e: Elements, node: Node, flat: Flat) -> Values:
    x: Any = node.args[0]
    source, coords = shape_of(x), unravel(flat, shape_of(node))
    dim = _dim(node, 1, len(source))
    if not e.within_rows(x, dim) or None in map(number, (x.meta["val"].shape[dim], node.args[2])):
        return e.leaf(node, flat)
    coords.insert(dim, np.full_like(flat, hint(node.args[2]) % source[dim]))
    return e(x, ravel(coords, source))


_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


@_means(operator.getitem)
def _part(e: Elements, node: Node, flat: Flat) -> Values:
    split: Any = node.args[0]
    if split.target not in _SPLITS:
        return e.leaf(node, flat)
    x, part = split.args[0], hint(node.args[1])
    source, coords = shape_of(x), unravel(flat, shape_of(node))
    dim, size = _dim(split, 2, len(source)), split.args[1]
    if not e.within_rows(x, dim) or None in map(number, size if isinstance(size, list | tuple) else [size]):
        return e.leaf(node, flat)
    before = part * hint(size) if split.target is aten.split.Tensor else sum(hint(s) for s in size[:part])
    coords[dim] = coords[dim] + before
    return e(x, ravel(coords, source))


@_means(aten.repeat.default)
def _repeat(e: Elements, node: Node, flat: Flat) -> Values:
    x: Any = node.args[0]
    source = shape_of(x)
    repeats: Any = node.args[1]
    if None in map(number, repeats) or any(n != 1 and not e.within_rows(node, d) for d, n in enumerate(repeats)):
        return e.leaf(node, flat)
    coords = unravel(flat, shape_of(node))
    coords = coords[len(coords) - len(source) :]
    return e(x, ravel([c % size for c, size in zip(coords, source, strict=True)], source) + flat * 0)


@_means(aten.cat.default)
def _cat(e: Elements, node: Node, flat: Flat) -> Values:
    parts: Any = node.args[0]
    coords = unravel(flat, shape_of(node))
    dim = _dim(node, 1, len(coords))
    if not e.within_rows(node, dim) or any(number(x.meta["val"].shape[dim]) is None for x in parts):
        return e.leaf(node, flat)
    result, before = Values.empty(len(flat)), 0
    for x in parts:
        source = shape_of(x)
        (own,) = np.nonzero((coords[dim] >= before) & (coords[dim] < before + source[dim]))
        if len(own):
            inside = [c[own] - (before if d == dim else 0) for d, c in enumerate(coords)]
            result.put(own, e.to(e(x, ravel(inside, source)), node.meta["val"].dtype))
        before += source[dim]
    return result


@_means(aten.slice_scatter.default)
def _slice_scatter(e: Elements, node: Node, flat: Flat) -> Values:
    x, src = node.args[:2]
    assert isinstance(x, Node) and isinstance(src, Node)
    shape, coords = shape_of(node), unravel(flat, shape_of(node))
    dim, step = _dim(node, 2, len(shape)), hint(_argument(node, 5, "step", 1))
    if expr_of(src.meta["val"].shape[dim]) == expr_of(node.meta["val"].shape[dim]):
        return e.to(e(src, flat), node.meta["val"].dtype)
    bounds = (node.meta["val"].shape[dim], src.meta["val"].shape[dim], _argument(node, 3, "start") or 0, step)
    if not e.within_rows(node, dim) or None in map(number, bounds):
        return e.leaf(node, flat)
    start = _clamped(_argument(node, 3, "start"), shape[dim], 0)
    stop = _clamped(_argument(node, 4, "end"), shape[dim], shape[dim])
    at = coords[dim] - start
    inside = (at >= 0) & (coords[dim] < stop) & (at % step == 0)
    result = Values.empty(len(flat))
    for (own,), source in ((np.nonzero(inside), src), (np.nonzero(~inside), x)):
        if len(own):
            at_own = [c[own] if d != dim or source is x else at[own] // step for d, c in enumerate(coords)]
            result.put(own, e.to(e(source, ravel(at_own, shape_of(source))), node.meta["val"].dtype))
    return result


@_means(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor)
def _arithmetic(e: Elements, node: Node, flat: Flat) -> Values:
    x, y = (_operand(e, node, a, flat) for a in node.args[:2])
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point or node.kwargs.get("alpha", 1) != 1:
        return e.leaf(node, flat)
    if node.target is aten.mul.Tensor:
        return e.multiply(x, y, dtype)
    return e.add(x, y if node.target is aten.add.Tensor else e.negate(y), dtype)


@_means(aten.neg.default)
def _neg(e: Elements, node: Node, flat: Flat) -> Values:
    return e.negate(e(node.args[0], flat))  # type: ignore[arg-type]


_GATHERS = (aten.index.Tensor, aten.index_select.default, aten.embedding.default)


@_means(*_GATHERS)
def _rows(e: Elements, node: Node, flat: Flat) -> Values:
    found = _gathered(node)
    if found is None:
        return e.leaf(node, flat)
    row, column = unravel(flat, shape_of(node))
    return e.gather(*found, row, column)


def _gathered(node: Node) -> tuple[Node, Node] | None:
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
    return (table, positions) if _uniform(table) else None


def _column_parent(node: Node) -> Node | None:
    """What a table is a run of columns of, or the same in another dtype; None where it is made otherwise."""
    parent: Any = node.args[0] if node.op == "call_function" and node.args else None
    if node.target in (prims.convert_element_type.default, aten._to_copy.default, aten.alias.default):
        return parent  # type: ignore[no-any-return]
    if node.target is aten.slice.Tensor and _dim(node, 1, 2) == 1:
        return parent  # type: ignore[no-any-return]
    if node.target is operator.getitem and parent.target in _SPLITS and _dim(parent, 2, 2) == 1:
        return parent.args[0]  # type: ignore[no-any-return]
    return None


def _uniform(table: Node) -> bool:
    """Whether every row of the table is made like its first: nothing is known about its origin but columns, dtype."""
    origin = table_chain(table)[0]
    return len(origin.meta["val"].shape) == 2 and not is_transparent(origin)


def row_samples(shape: Sequence[int]) -> Flat:
    """All elements of the rows (of the first dimension) to look at: the first and the last."""
    if not shape:
        return np.zeros(1, np.int64)
    rows = np.unique(np.clip(np.array([0, shape[0] - 1], np.int64), 0, None))
    width = math.prod(shape[1:])
    return np.asarray((rows[:, None] * width + np.arange(width)[None]).reshape(-1), np.int64)

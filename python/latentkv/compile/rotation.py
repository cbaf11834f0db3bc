"""Rotations: heads in a storage, turned by the rows of a table, by an op that is known or by plain arithmetic."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.fx import Graph, Node

from .elements import SIGN, TURNED, Elements, Ids, are, gathered, is_split, means, moved, same, table_chain
from .graph import (
    FUNCTIONALIZED,
    View,
    arguments,
    expr_of,
    is_intermediate,
    is_rope,
    is_tensor,
    mutated_view,
    number,
    op_name,
    plain,
    root_of,
    shape_text,
)
from .known_ops import ROPE_OPS, RopeOp
from .report import DECLARE_N, Reason, Unfused


@dataclass(frozen=True)
class Rotation:
    """Heads [N, H, R], a part of the storage of ``root``, turned by the rows ``positions`` of ``table``."""

    op: str  # the op's name, or PyTorch
    node: Node  # the op, or the node that holds the result
    root: Node
    view: View
    positions: Node
    table: Node
    is_neox: bool
    exact: bool  # to the bits that ours gives

    @property
    def advice(self) -> str:
        """What to do to have the bits that ours gives."""
        if self.op == "PyTorch":
            return "upcast q_pe, k_pe, cos and sin to fp32, and round the result; or pass allow_rounding=True"
        if ROPE_OPS[self.op].rounding == "contracts":
            return "give it a table of 16 bits, or pass allow_rounding=True"
        return Reason.ROUNDING.advice

    @property
    def angles(self) -> tuple[Any, ...]:
        """What heads that are turned alike have in common."""
        rows, _, width = map(expr_of, self.view.size)
        return self.positions, self.table, self.is_neox, rows, width

    def before(self, e: Elements) -> Ids | None:
        """A row of the heads as they are, one element after another; None where that is not known."""
        at, values = e.index(View.of(self.root.meta["val"]), self.view), e.values(self.root)
        return None if at is None or values is None else values.reshape(-1)[at]

    def after(self, e: Elements, before: Ids | None) -> Ids | None:
        """The row turned: x cos - y sin and y cos + x sin, for pairs (x, y), as the contract rounds."""
        angles, width = e.angles(self.table, self.positions), number(self.view.size[2])
        if before is None or angles is None or not width or width % 2 or angles.size != width:
            return None
        # The first of each pair and the second, pair by pair.
        shape, order = ((2, width // 2), (0, 1, 2)) if self.is_neox else ((width // 2, 2), (0, 2, 1))
        x, y = before.reshape(-1, *shape).transpose(order).swapaxes(0, 1)
        cos, sin = angles.reshape(2, -1)
        first = e.add(e.multiply(x, cos), e.multiply(y, sin) ^ SIGN)
        second = e.add(e.multiply(y, cos), e.multiply(x, sin))
        turned = np.stack((first, second), 1).transpose(order).reshape(-1)
        return e.to(turned, self.root.meta["val"].dtype)


def _heads(view: View, head_size: int | None, start: int, rope_dim: int) -> View | None:
    """The rotated part of heads [N, H, D], [N, H * D] or (without a ``head_size``) [N, R], as [N, H, R]."""
    width = number(view.size[-1])
    if width is None or len(view.size) not in (2, 3):
        return None
    if len(view.size) == 3:
        size, stride = view.size, view.stride
    else:
        head = width if head_size is None else head_size
        if head < 1 or width % head:
            return None
        size, stride = (view.size[0], width // head, head), (view.stride[0], head * view.stride[1], view.stride[1])
        width = head
    if width < start + rope_dim:
        return None
    return View((size[0], size[1], rope_dim), stride, view.offset + start * stride[2])


def rotations_of(node: Node) -> list[Rotation]:
    """What a rope op rotates, each of its two arguments.

    Raises:
        Unfused: it is called in a way that the fused op has nothing for.
    """
    name, kwargs = op_name(node), arguments(node)
    op: RopeOp = ROPE_OPS[name]
    positions, table = plain(kwargs["positions"]), kwargs["cos_sin_cache"]
    if not op.rotates(kwargs):
        raise Unfused(Reason.NO_ROPE, f"{name} turns back, or by offsets")
    if positions.meta["val"].dim() != 1:
        raise Unfused(Reason.SHAPE, f"positions of {name}: {shape_text(positions)}")
    for part, given in given_to(node).items():
        if View.of(part.meta["val"]) != View.of(given.meta["val"]):
            raise Unfused(Reason.SHAPE, f"another pass has changed the strides of {given.name}")
    rope_dim = number(table.meta["val"].shape[1])
    found = []
    for argument in (op.q, op.k):
        if (mutated := mutated_view(node, kwargs, argument)) is None:
            continue
        base, view = mutated
        heads = rope_dim and _heads(view, kwargs.get("head_size"), kwargs.get("rope_dim_offset", 0), rope_dim)
        if not heads:
            symbols = None in map(number, view.size[1:])
            raise Unfused(Reason.SHAPE, f"{argument} of {name}: {list(map(expr_of, view.size))}", DECLARE_N * symbols)
        exact = op.rounds_as_ours(base.meta["val"].dtype, table.meta["val"].dtype)
        found.append(Rotation(name, node, root_of(base), heads, positions, table, kwargs["is_neox"], exact))
    return found


def given_to(node: Node) -> dict[Node, Node]:
    """Of a functionalised rope op: for each tensor that it returns, the one it was given."""
    kwargs: dict[str, Any] = dict(node.kwargs)
    if node.target is FUNCTIONALIZED[0]:
        given = kwargs["_all_bases"]
    else:
        op = ROPE_OPS[op_name(node)]
        given = [kwargs[op.q], kwargs.get(op.k)]
    parts: dict[Node, Any] = {u: u.args[1] for u in node.users if u.target is operator.getitem}
    return {part: given[index - 1] for part, index in parts.items() if index > 0}


@means(operator.getitem)
def _part(e: Elements, node: Node) -> Ids | None:
    """A part of a split, or what a rope op has rotated."""
    source, index = node.args
    assert isinstance(source, Node) and isinstance(index, int)
    if is_split(source):
        parts = moved(e, source)
        return None if parts is None else parts[index]
    given = given_to(source).get(node) if is_rope(source) else None
    values = None if given is None else e.values(given)
    if given is None or values is None:
        return None
    try:
        rotations = rotations_of(source)
    except Unfused:
        return None
    whole, turned = View.of(given.meta["val"]), values.reshape(-1).copy()
    for rotation in rotations:
        at = e.index(whole, rotation.view)
        if rotation.root is not root_of(given) or (at is None and whole.apart(rotation.view, e.rows)):
            continue
        after = None if at is None else rotation.after(e, turned[at])
        if after is None:
            return None
        turned[at] = after
    return turned


def rotates_a_key(node: Node) -> bool:
    """Whether one of the tensors that a rope op rotates has a single head, as a key of MLA has."""
    try:
        return any(number(rotation.view.size[1]) == 1 for rotation in rotations_of(node))
    except Unfused:
        return True


def heads_of(x: Node) -> View | None:
    """A tensor as heads [N, H, R]; [N, R] are those of one head."""
    view = View.of(x.meta["val"])
    if len(view.size) == 3:
        return view
    if len(view.size) == 2:
        return View((view.size[0], 1, view.size[1]), (view.stride[0], view.size[1], view.stride[1]), view.offset)
    return None


class Finder:
    """Finds the rotations in a graph's tensors of N rows, each once.

    Attributes:
        exact: what their elements are, to the last bit.
        turned: the nodes that rotate, or hold rotated elements and nothing else, in the graph's order.
    """

    def __init__(self, graph: Graph, rows: Any) -> None:
        self._graph, self.exact = graph, Elements(rows, graph)
        self._found: dict[Node, Rotation | None] = {}
        found = filter(self._is_turned, self.exact.touched)
        self.turned = {node: i for i, node in enumerate(found)}

    @functools.cached_property
    def real(self) -> Elements:
        """What their elements are in real arithmetic."""
        return Elements(self.exact.rows, self._graph, rounded=False)

    def _is_turned(self, node: Node) -> bool:
        return is_rope(node) or are(self.exact.known(node), TURNED)

    def rotation_of(self, result: Node) -> Rotation | None:
        """The rotation that makes ``result``."""
        if result not in self._found:
            self._found[result] = self._find(result) if self._is_turned(result) else None
        return self._found[result]

    def _find(self, result: Node) -> Rotation | None:
        expression = self.exact.expression(result)
        candidates = [rotation for node in filter(is_rope, expression) for rotation in rotations_of(node)]
        candidates += self._candidates(result, expression)
        for exact in (True, False):
            e = self.exact if exact else self.real
            values = e.values(result)
            for rotation in candidates:
                if values is not None and same(rotation.after(e, rotation.before(e)), values.reshape(-1)):
                    return replace(rotation, exact=rotation.exact and exact)
        return None

    def _candidates(self, result: Node, expression: list[Node]) -> Iterator[Rotation]:
        """Rotations that may make ``result`` [N, R] or [N, H, R] in plain PyTorch."""
        val, heads = result.meta["val"], heads_of(result)
        if heads is None:
            return
        size = list(map(expr_of, heads.size))
        tables: dict[tuple[Node, Node], None] = {}
        for found in map(gathered, expression):
            if found is not None:
                wide = [t for t in table_chain(found[0]) if number(t.meta["val"].shape[1]) == size[2]]
                if wide:
                    tables[wide[0], plain(found[1])] = None
        for x in expression:
            view = heads_of(x) if is_tensor(x) and x is not result and x.meta["val"].dtype == val.dtype else None
            if view is None or list(map(expr_of, view.size)) != size or is_intermediate(root_of(x)):
                continue
            for table, positions in tables:
                for is_neox in (False, True):
                    yield Rotation("PyTorch", result, root_of(x), view, positions, table, is_neox, True)

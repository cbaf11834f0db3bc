"""Rotations: heads in a storage, turned by the rows of a table, by an op that is known or by plain arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.fx import Node

from .elements import TURNED, Elements, Values, gathered, is_split, means, split_part, table_chain
from .graph import (
    FUNCTIONALIZED,
    Flat,
    View,
    call_of,
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
from .report import Reason, Unfused


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
    def heads(self) -> int | None:
        """H; None where it is a symbol."""
        return number(self.view.size[1])

    def same_angles(self, other: Rotation) -> bool:
        """Whether the heads of both are turned alike."""
        mine, others = (
            (r.positions, r.table, r.is_neox, expr_of(r.view.size[0]), expr_of(r.view.size[2])) for r in (self, other)
        )
        return mine == others

    def index(self, e: Elements) -> Flat | None:
        """Which elements of a row of the root these are; None where their place is not known."""
        whole, part = View.of(self.root.meta["val"]).row(e.rows), self.view.row(e.rows)
        return None if whole is None or part is None else whole.index(part)

    def before(self, e: Elements) -> Values | None:
        """A row of the heads as they are."""
        at = self.index(e)
        return None if at is None else e.values(self.root, at)

    def after(self, e: Elements, before: Values) -> Values | None:
        """The row turned: x cos - y sin and y cos + x sin, for pairs (x, y), as the contract rounds."""
        angles, width = e.angles(self.table, self.positions), number(self.view.size[2])
        if angles is None or not width or width % 2 or len(angles.ids) != width:
            return None
        j, half = np.arange(len(before.ids)) % width, width // 2
        if self.is_neox:
            pair, second, partner = j % half, j >= half, np.where(j < half, half, -half)
        else:
            pair, second, partner = j // 2, j % 2 == 1, np.where(j % 2 == 0, 1, -1)
        straight = e.multiply(before, angles.take(pair))
        crossed = e.multiply(before.take(np.arange(len(j)) + partner), angles.take(pair + half))
        crossed = replace(crossed, ids=np.where(second, crossed.ids, np.negative(crossed.ids)))
        return e.to(e.add(straight, crossed), self.root.meta["val"].dtype)


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
    call = call_of(node)
    assert call is not None
    name, kwargs = call
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
            raise Unfused(Reason.SHAPE, f"{argument} of {name}: {[expr_of(s) for s in view.size]}")
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
def _part(e: Elements, node: Node) -> Values | None:
    """A part of a split, or what a rope op has rotated."""
    source: Any = node.args[0]
    if is_split(source):
        return split_part(e, node)
    if not is_rope(source):
        return None
    given = given_to(source).get(node)
    values = None if given is None else e.values(given)
    if given is None or values is None:
        return None
    try:
        rotations = rotations_of(source)
    except Unfused:
        return None
    view = View.of(given.meta["val"])
    row = view.row(e.rows)
    for rotation in rotations:
        if rotation.root is not root_of(given) or view.apart(rotation.view, e.rows):
            continue
        heads = rotation.view.row(e.rows)
        at = row.index(heads) if row is not None and heads is not None else None
        turned = None if at is None else rotation.after(e, values.take(at))
        if at is None or turned is None:
            return None
        values = values.put(at, turned)
    return values


def rotates_a_key(node: Node) -> bool:
    """Whether one of the tensors that a rope op rotates has a single head, as a key of MLA has."""
    try:
        return any(rotation.heads == 1 for rotation in rotations_of(node))
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
    """

    def __init__(self, rows: Any) -> None:
        self.exact, self._real = Elements(rows), Elements(rows, rounded=False)
        self._found: dict[Node, Rotation | None] = {}

    def elements(self, exact: bool) -> Elements:
        """To the last bit, or as real arithmetic would have them."""
        return self.exact if exact else self._real

    def is_turned(self, node: Node) -> bool:
        """Whether a node may hold rotated heads and nothing else."""
        values = self.exact.known(node)
        return values is not None and values.are(TURNED)

    def rotation_of(self, result: Node) -> Rotation | None:
        """The rotation that makes ``result``."""
        if result not in self._found:
            self._found[result] = self._find(result) if self.is_turned(result) else None
        return self._found[result]

    def _find(self, result: Node) -> Rotation | None:
        expression = self.exact.expression(result)
        known = [rotation for node in filter(is_rope, expression) for rotation in rotations_of(node)]
        for rotation in (*known, *self._candidates(result, expression)):
            for e in (self.exact, self._real):
                before = rotation.before(e)
                after = None if before is None else rotation.after(e, before)
                if after is not None and after.same(e.values(result)):
                    return replace(rotation, exact=rotation.exact and e is self.exact)
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

"""Rotations: heads in a storage, turned by the rows of a table, by an op that is known or by plain arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.fx import Node

from .elements import (
    Elements,
    Flat,
    Values,
    gathered,
    hint,
    is_gather,
    ravel,
    row_samples,
    shape_of,
    table_chain,
    unravel,
)
from .graph import (
    FUNCTIONALIZED,
    View,
    call_of,
    expression_of,
    is_rope,
    is_tensor,
    mutated_view,
    op_name,
    plain,
    root_of,
    views_of,
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
    def heads(self) -> int:
        """H."""
        return self.view.hints[0][1]

    def same_angles(self, other: Rotation) -> bool:
        """Whether the heads of both are turned alike."""
        mine, others = (
            (r.positions, r.table, r.is_neox, r.view.hints[0][0], r.view.hints[0][2]) for r in (self, other)
        )
        return mine == others

    def element(self, e: Elements, n: Flat, h: Flat, j: Flat) -> Values:
        """Of the heads before the rotation."""
        size, _, _ = self.view.hints
        at, _ = View.of(self.root.meta["val"]).locate(self.view.offsets(ravel([n, h, j], size)))
        return e(self.root, ravel(at, shape_of(self.root)))

    def rotated(self, e: Elements, n: Flat, h: Flat, j: Flat) -> Values:
        """Of the heads after it: x cos - y sin and y cos + x sin, for pairs (x, y), as the contract rounds."""
        half = self.view.hints[0][2] // 2
        if self.is_neox:
            pair, second, partner = j % half, j >= half, np.where(j < half, j + half, j - half)
        else:
            pair, second, partner = j // 2, j % 2 == 1, j ^ 1
        cos = e.gather(self.table, self.positions, n, pair)
        sin = e.gather(self.table, self.positions, n, pair + half)
        straight = e.multiply(self.element(e, n, h, j), cos)
        crossed = e.multiply(self.element(e, n, h, partner), sin)
        total = e.add(straight, crossed.where(second, e.negate(crossed)))
        return e.to(total, self.root.meta["val"].dtype)

    def apply(self, e: Elements, offsets: Flat, before: Values) -> Values:
        """Elements of the root's storage after the rotation."""
        coords, inside = self.view.locate(offsets)
        (own,) = np.nonzero(inside)
        after = Values(before.ids.copy(), before.narrow.copy())
        if len(own):
            after.put(own, self.rotated(e, *(c[own] for c in coords)))
        return after


def _heads(view: View, head_size: int | None, start: int, rope_dim: int) -> View | None:
    """The rotated part of heads [N, H, D], [N, H * D] or (without a ``head_size``) [N, R], as [N, H, R]."""
    if len(view.size) == 3:
        size, stride = view.size, view.stride
    elif len(view.size) == 2:
        n, width = view.size
        head = hint(width) if head_size is None else head_size
        if head < 1 or hint(width) % head:
            return None
        size, stride = (n, hint(width) // head, head), (view.stride[0], head * view.stride[1], view.stride[1])
    else:
        return None
    if hint(size[2]) < start + rope_dim:
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
        raise Unfused(Reason.SHAPE, f"positions of {name}: {list(positions.meta['val'].shape)}")
    for part, given in given_to(node).items():
        if View.of(part.meta["val"]) != View.of(given.meta["val"]):
            raise Unfused(Reason.SHAPE, f"another pass has changed the strides of {given.name}")
    rope_dim = hint(table.meta["val"].shape[1])
    found = []
    for argument in (op.q, op.k):
        if (mutated := mutated_view(node, kwargs, argument)) is None:
            continue
        base, view = mutated
        heads = _heads(view, kwargs.get("head_size"), kwargs.get("rope_dim_offset", 0), rope_dim)
        if heads is None:
            raise Unfused(Reason.SHAPE, f"{argument} of {name}: {[hint(s) for s in view.size]}")
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


def _meanings_of(node: Node) -> dict[Node, Callable[[Elements, Flat], Values]]:
    """What the elements of these are."""
    try:
        rotations = rotations_of(node)
    except Unfused:
        return {}

    def rotated(source: Node) -> Callable[[Elements, Flat], Values]:
        def meaning(e: Elements, flat: Flat) -> Values:
            offsets, values = View.of(source.meta["val"]).offsets(flat), e(source, flat)
            for rotation in rotations:
                if rotation.root is root_of(source):
                    values = rotation.apply(e, offsets, values)
            return values

        return meaning

    return {part: rotated(given) for part, given in given_to(node).items()}


def rotates_a_key(node: Node) -> bool:
    """Whether one of the tensors that a rope op rotates has a single head, as a key of MLA has."""
    try:
        return any(rotation.heads == 1 for rotation in rotations_of(node))
    except Unfused:
        return True


def elements_of(rounded: bool, rotations: Sequence[Rotation], nodes: Iterable[Node]) -> Elements:
    """Elements as functions of those that these are the rotations of, through the rope ops among ``nodes`` too."""
    meanings: dict[Node, Callable[[Elements, Flat], Values]] = {}
    for node in filter(is_rope, nodes):
        meanings |= _meanings_of(node)
    roots, rows = frozenset(rotation.root for rotation in rotations), rotations[0].view.size[0]
    for root in roots:
        views = (view for view in views_of(root) if view is not root and is_tensor(view))
        meanings |= {view: _at_place(view, root) for view in views if View.of(view.meta["val"]).fixed(rows)}
    return Elements(rounded, rows, roots, meanings)


def _at_place(view: Node, root: Node) -> Callable[[Elements, Flat], Values]:
    """What a view holds, by where its elements lie: whatever op made it."""
    whole, part = View.of(root.meta["val"]), View.of(view.meta["val"])

    def meaning(e: Elements, flat: Flat) -> Values:
        at, _ = whole.locate(part.offsets(flat))
        return e(root, ravel(at, shape_of(root)))

    return meaning


def _makes(rotation: Rotation, result: Node, expression: list[Node]) -> bool | None:
    """Whether a node is the rotated heads, True to the bit, False but for rounding; None if it is not."""
    flat = row_samples(shape_of(result))
    coords = unravel(flat, rotation.view.hints[0])
    for rounded in (True, False):
        e = elements_of(rounded, [rotation], expression)
        if e(result, flat) == rotation.rotated(e, *coords):
            return rounded
    return None


def _candidates(result: Node, expression: list[Node]) -> Iterator[Rotation]:
    """Rotations that may make ``result`` [N, R] or [N, H, R] in plain PyTorch."""
    val, heads = result.meta["val"], heads_of(result)
    if heads is None:
        return
    size, _, _ = heads.hints
    tables: dict[tuple[Node, Node], None] = {}
    for node in filter(is_gather, expression):
        table, positions = gathered(node)
        wide = [t for t in table_chain(table) if hint(t.meta["val"].shape[1]) == size[2]]
        if wide:
            tables[wide[0], plain(positions)] = None
    for x in expression:
        view = heads_of(x) if is_tensor(x) and x is not result and x.meta["val"].dtype == val.dtype else None
        if view is None or view.hints[0] != size:
            continue
        for table, positions in tables:
            for is_neox in (False, True):
                yield Rotation("PyTorch", result, root_of(x), view, positions, table, is_neox, True)


def find_rotation(result: Node, like: Rotation | None = None) -> Rotation | None:
    """The rotation that makes ``result``; with ``like``, by the same angles."""
    expression = expression_of(result)
    known: list[Rotation] = []
    for node in filter(is_rope, expression):
        known += rotations_of(node)
    size = [hint(s) for s in result.meta["val"].shape]
    for rotation in (*known, *_candidates(result, expression)):
        n, h, r = rotation.view.hints[0]
        if size not in ([n, h, r], [n, h * r]) or (like is not None and not like.same_angles(rotation)):
            continue
        exact = _makes(rotation, result, expression)
        if exact is not None:
            return replace(rotation, exact=rotation.exact and exact)
    return None


def heads_of(x: Node) -> View | None:
    """A tensor as heads [N, H, R]; [N, R] are those of one head."""
    view = View.of(x.meta["val"])
    if len(view.size) == 3:
        return view
    if len(view.size) == 2:
        return View((view.size[0], 1, view.size[1]), (view.stride[0], view.size[1], view.stride[1]), view.offset)
    return None

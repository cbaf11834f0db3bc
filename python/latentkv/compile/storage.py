"""One storage through a functional graph: its views, and its later versions, as nothing is written in place there.

In the source of a model ``q[..., P:] = rope(q[..., P:])`` works on the storage of q. Functionalised, it makes another
tensor, and every later view of q becomes a view of that. To work in place again, the pass has to know for each of these
tensors what it holds: what the storage held before the rotation, what it holds after it, or something in between.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import Enum

import torch
from torch.fx import Node

from .elements import Values, hint, ravel, row_samples, shape_of, unravel
from .graph import View, consequences_of, expression_of, is_rope, is_tensor, parent_of, root_of, views_of
from .rotation import Rotation, elements_of, given_to, heads_of

aten = torch.ops.aten


class State(Enum):
    """What a tensor holds of a storage that is rotated in part."""

    OLD = "what was there before the rotation"
    NEW = "what is there after it"
    APART = "nothing that is rotated"
    MIXED = "neither"


class Storage:
    """The storage of ``root``, of which ``rotations`` turn parts.

    Attributes:
        family: its views and later versions, in the order in which they follow from one another: what each is a view or
            the next version of.
        copies: tensors outside of it: the member whose place, after the rotation, holds the same elements.
    """

    def __init__(self, root: Node, rotations: Sequence[Rotation]) -> None:
        self.root = root
        self.rotations = [r for r in rotations if r.root is root]
        self.views = set(views_of(root))
        self.family = _family(root)
        after = consequences_of(root)
        exact = all(r.exact for r in rotations)
        self._elements = elements_of(exact, rotations, after)
        self._states: dict[Node, State] = {}
        self.copies = self._copies(after)

    def state(self, node: Node) -> State:
        """What a member of the family holds."""
        if node not in self._states:
            self._states[node] = self._state(node)
        return self._states[node]

    def holds_all(self, node: Node) -> bool:
        """Whether a node holds all of the root, as it is after the rotation."""
        member = self.copies.get(node, node)
        if member not in self.family or View.of(member.meta["val"]) != View.of(self.root.meta["val"]):
            return False
        return node in self.copies or self.state(member) is State.NEW

    def _apart(self, node: Node) -> bool:
        val = node.meta["val"]
        parts = val if isinstance(val, list | tuple) else [val]
        views = list(map(View.of, parts))
        return all(v.fixed(r.view.size[0]) and r.view.apart(v) for v in views for r in self.rotations)

    def _state(self, node: Node) -> State:
        apart = self._apart(node)
        if node in self.views or not is_tensor(node):
            return State.APART if apart else State.OLD if node in self.views else State.MIXED
        if not View.of(node.meta["val"]).fixed(self.rotations[0].view.size[0]):
            return State.MIXED
        held, (before, after) = self._held(node), self._around(node)
        if held == before:
            return State.APART if apart else State.OLD
        return State.NEW if held == after else State.MIXED

    def _held(self, node: Node) -> Values:
        """What a later version, or a view of one, holds: elements of that version."""
        version = root_of(node)
        offsets = View.of(node.meta["val"]).offsets(row_samples(shape_of(node)))
        at, _ = View.of(version.meta["val"]).locate(offsets)
        return self._elements(version, ravel(at, shape_of(version)))

    def _around(self, node: Node) -> tuple[Values, Values]:
        """What a member of the family would hold before the rotation, and after it."""
        e, root = self._elements, self.root
        offsets = View.of(node.meta["val"]).offsets(row_samples(shape_of(node)))
        at, _ = View.of(root.meta["val"]).locate(offsets)
        before = after = e(root, ravel(at, shape_of(root)))
        for rotation in self.rotations:
            after = rotation.apply(e, offsets, after)
        return before, after

    def _copies(self, after: Iterable[Node]) -> dict[Node, Node]:
        members: dict[tuple[int, ...], dict[View, Node]] = {}
        for member in self.family:
            fixed = is_tensor(member) and View.of(member.meta["val"]).fixed(self.rotations[0].view.size[0])
            if fixed and not self._apart(member):
                members.setdefault(shape_of(member), {}).setdefault(View.of(member.meta["val"]), member)
        found: dict[Node, Node] = {}
        for node in after:
            own = node not in self.family and is_tensor(node) and root_of(node) not in found
            if not own or node.meta["val"].dtype != self.root.meta["val"].dtype:
                continue
            for member in members.get(shape_of(node), {}).values():
                if self._elements(node, row_samples(shape_of(node))) == self._around(member)[1]:
                    found[node] = member
                    break
        return found


def _family(root: Node) -> dict[Node, Node | None]:
    found: dict[Node, Node | None] = {root: None}
    queue = [root]
    for node in queue:
        for user in node.users:
            heirs = [user]
            if is_rope(user):
                heirs = [part for part, given in given_to(user).items() if given is node]
            elif user.target is aten.slice_scatter.default:
                heirs = [user] if user.args[0] is node else []
            elif parent_of(user) is not node:
                continue
            for heir in heirs:
                same = parent_of(heir) is node or View.of(heir.meta["val"]) == View.of(node.meta["val"])
                if heir not in found and same:
                    found[heir] = node
                    queue.append(heir)
    return found


def origins(rotation: Rotation) -> list[Rotation]:
    """The rotation as one of the storage that its tensor is a later version, or a copy, of; the earliest first."""
    found = [rotation]
    while (earlier := _earlier(found[0])) is not None:
        found.insert(0, earlier)
    return found


def _earlier(rotation: Rotation) -> Rotation | None:
    root, view = rotation.root, rotation.view
    source = root.args[0] if root.op == "call_function" and root.args else None
    if root.target is operator.getitem and isinstance(source, Node) and is_rope(source):
        source = given_to(source).get(root)
    elif root.target is not aten.slice_scatter.default:
        # A copy of just these heads, in whatever shape.
        n, h, r = view.hints[0]
        whole = view.hints == ((n, h, r), (h * r, r, 1), hint(root.meta["val"].storage_offset()))
        if not whole or root.target not in _COPIES:
            return None
        while isinstance(source, Node) and shape_of(source) not in ((n, h, r), (n, r), (n, 1, r)):
            source = source.args[0] if source.target in _COPIES else None
        if not isinstance(source, Node) or math.prod(shape_of(source)) != n * h * r:
            return None
        heads = heads_of(source)
        return None if heads is None else replace(rotation, root=root_of(source), view=heads)
    if not isinstance(source, Node) or View.of(source.meta["val"]) != View.of(root.meta["val"]):
        return None
    earlier = replace(rotation, root=root_of(source))
    # Whatever became the later version, it must not have touched these heads.
    flat = row_samples(view.hints[0])
    at = unravel(flat, view.hints[0])
    e = elements_of(True, [earlier], expression_of(root))
    return earlier if earlier.element(e, *at) == rotation.element(e, *at) else None


_COPIES = (
    aten.clone.default, aten._unsafe_view.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip

"""One storage through a functional graph: its views, and its later versions, as nothing is written in place there.

In the source of a model ``q[..., P:] = rope(q[..., P:])`` works on the storage of q. Functionalised, it makes another
tensor, and every later view of q becomes a view of that. To work in place again, the pass has to know for each of these
tensors what it holds: what the storage held before the rotation, what it holds after it, or something in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from .elements import Elements
from .graph import Flat, View, expr_of, is_rope, is_tensor, parent_of, root_of, views_of
from .report import Reason, Unfused
from .rotation import Rotation, given_to, heads_of

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

    def __init__(self, root: Node, rotations: Sequence[Rotation], e: Elements) -> None:
        self.root, self._e = root, e
        self.views = set(views_of(root))
        self.family = _family(root)
        row, before = View.of(root.meta["val"]).row(e.rows), e.values(root)
        if row is None or before is None:
            raise Unfused(Reason.SHAPE, f"the elements of {root.name} do not lie row by row")
        self._row, self._before, self._after = row, before, before
        self._turned = np.zeros(len(before.ids), np.bool_)
        for rotation in rotations:
            if rotation.root is root:
                at, heads = rotation.index(e), rotation.before(e)
                after = None if heads is None else rotation.after(e, heads)
                assert at is not None and after is not None
                self._turned[at] = True
                self._after = self._after.put(at, after)
        self._versions: dict[Node, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
        self.copies = self._copies()

    def state(self, node: Node) -> State:
        """What a member of the family holds."""
        parts = [self._within(part) for part in _parts(node)]
        apart = not any(self._turned[part].any() for part in parts)
        if node in self.views:
            return State.APART if apart else State.OLD
        old, new = self._held(root_of(node))
        if all(old[part].all() for part in parts):
            return State.APART if apart else State.OLD
        return State.NEW if all(new[part].all() for part in parts) else State.MIXED

    def holds_all(self, node: Node) -> bool:
        """Whether a node holds all of the root, as it is after the rotation."""
        member = self.copies.get(node, node)
        if member not in self.family or View.of(member.meta["val"]) != View.of(self.root.meta["val"]):
            return False
        return node in self.copies or self.state(member) is State.NEW

    def _within(self, view: View) -> Flat:
        """Which elements of a row of the root a view may hold: all of them where that is not known."""
        found = view.within(self._row)
        return np.arange(len(self._turned)) if found is None else found

    def _held(self, version: Node) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which elements of the storage a later version holds as they were before the rotation, and as after it."""
        if version not in self._versions:
            old, new = np.zeros((2, len(self._turned)), np.bool_)
            at, values = self._index(version), self._e.values(version)
            if at is not None and values is not None:
                old[at] = values.ids == self._before.ids[at]
                new[at] = values.ids == self._after.ids[at]
            self._versions[version] = old, new
        return self._versions[version]

    def _index(self, member: Node) -> Flat | None:
        """Where a row of a member lies in a row of the root."""
        row = View.of(member.meta["val"]).row(self._e.rows) if is_tensor(member) else None
        return None if row is None else self._row.index(row)

    def _copies(self) -> dict[Node, Node]:
        members: dict[tuple[int, ...], dict[View, Node]] = {}
        for member in self.family:
            at, form = self._index(member), self._e.form(member)
            if at is not None and form is not None and self._turned[at].any():
                view = View.of(member.meta["val"])
                members.setdefault((len(view.size), *form.shape), {}).setdefault(view, member)
        found: dict[Node, Node] = {}
        for node in self._e.consequences(self.root):
            own = node not in self.family and is_tensor(node) and root_of(node) not in found
            values, form = self._e.known(node), self._e.form(node)
            if not own or values is None or form is None or node.meta["val"].dtype != self.root.meta["val"].dtype:
                continue
            for member in members.get((node.meta["val"].dim(), *form.shape), {}).values():
                if values.same(self._after.take(self._index(member))):  # type: ignore[arg-type]
                    found[node] = member
                    break
        return found


def _parts(node: Node) -> list[View]:
    val = node.meta["val"]
    return [View.of(part) for part in (val if isinstance(val, list | tuple) else [val])]


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


def origins(rotation: Rotation, e: Elements) -> list[Rotation]:
    """The rotation as one of the storage that its tensor is a later version, or a copy, of; the earliest first."""
    found = [rotation]
    while (earlier := _earlier(found[0], e)) is not None:
        found.insert(0, earlier)
    return found


def _earlier(rotation: Rotation, e: Elements) -> Rotation | None:
    root = rotation.root
    source = root.args[0] if root.op == "call_function" and root.args else None
    if isinstance(source, Node) and is_rope(source):
        source = given_to(source).get(root)
    elif root.target in _COPIES:  # of just these heads, in whatever shape
        while isinstance(source, Node) and (heads_of(source) is None or not _fits(rotation, source)):
            source = source.args[0] if source.target in _COPIES else None
        if not isinstance(source, Node):
            return None
        view = heads_of(source)
        earlier = None if view is None else replace(rotation, root=root_of(source), view=view)
        return earlier if earlier is not None and _same_heads(earlier, rotation, e) else None
    elif root.target is not aten.slice_scatter.default:
        return None
    if not isinstance(source, Node) or View.of(source.meta["val"]) != View.of(root.meta["val"]):
        return None
    # Whatever became the later version, it must not have touched these heads.
    earlier = replace(rotation, root=root_of(source))
    return earlier if _same_heads(earlier, rotation, e) else None


def _fits(rotation: Rotation, source: Node) -> bool:
    view = heads_of(source)
    return view is not None and list(map(expr_of, view.size)) == list(map(expr_of, rotation.view.size))


def _same_heads(one: Rotation, other: Rotation, e: Elements) -> bool:
    mine, theirs = one.before(e), other.before(e)
    return mine is not None and mine.same(theirs)


_COPIES = (
    aten.clone.default, aten._unsafe_view.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip

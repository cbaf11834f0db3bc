"""One storage through a functional graph: its views, and its later versions, as nothing is written in place there.

In the source of a model ``q[..., P:] = rope(q[..., P:])`` works on the storage of q. Functionalised, it makes another
tensor, and every later view of q becomes a view of that. To work in place again, the pass has to know for each of these
tensors what it holds: what the storage held before the rotation, what it holds after it, or something in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from .elements import Elements, alike, same
from .graph import View, expr_of, is_rope, is_tensor, parent_of, root_of, views_of
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
        self.root, self._e, self._whole = root, e, View.of(root.meta["val"])
        self.views = set(views_of(root))
        self.family = _family(root)
        before = e.values(root)
        if e.row(self._whole) is None or before is None:
            raise Unfused(Reason.SHAPE, f"the elements of {root.name} do not lie row by row")
        self._before = before.reshape(-1)
        self._after, self._turned = self._before.copy(), np.zeros(before.size, np.bool_)
        for rotation in rotations:
            if rotation.root is root:
                at, after = e.index(self._whole, rotation.view), rotation.after(e, rotation.before(e))
                assert at is not None and after is not None
                self._after[at], self._turned[at] = after, True
        self._versions: dict[Node, NDArray[np.bool_]] = {}
        self.copies = self._copies()

    def state(self, node: Node) -> State:
        """What a member of the family holds."""
        parts = [self._e.within(self._whole, view) for view in _parts(node)]
        old, new = self._held(node if node in self.views else root_of(node))
        if all(old[part].all() for part in parts):
            return State.OLD if any(self._turned[part].any() for part in parts) else State.APART
        return State.NEW if all(new[part].all() for part in parts) else State.MIXED

    def holds_all(self, node: Node) -> bool:
        """Whether a node holds all of the root, as it is after the rotation."""
        member = self.copies.get(node, node)
        if member not in self.family or View.of(member.meta["val"]) != self._whole:
            return False
        return node in self.copies or self.state(member) is State.NEW

    def _held(self, version: Node) -> NDArray[np.bool_]:
        """Which elements of the storage a version holds as they were before the rotation, and as they are after it."""
        if version in self.views:
            return np.array([[True], [False]]).repeat(len(self._turned), 1)
        if version not in self._versions:
            held = np.zeros((2, len(self._turned)), np.bool_)
            at, values = self._e.index(self._whole, View.of(version.meta["val"])), self._e.values(version)
            if at is not None and values is not None:
                held[:, at] = [alike(values.reshape(-1), known[at]) for known in (self._before, self._after)]
            self._versions[version] = held
        return self._versions[version]

    def _copies(self) -> dict[Node, Node]:
        members: dict[tuple[Any, ...], dict[View, Node]] = {}  # by shape
        for member in filter(is_tensor, self.family):
            view = View.of(member.meta["val"])
            at = self._e.index(self._whole, view)
            if at is not None and self._turned[at].any():
                members.setdefault(tuple(map(expr_of, view.size)), {}).setdefault(view, member)
        found: dict[Node, Node] = {}
        for node in self._e.consequences(self.root):
            values = self._e.known(node) if node not in self.family and root_of(node) not in found else None
            if values is None or node.meta["val"].dtype != self.root.meta["val"].dtype:
                continue
            for view, member in members.get(tuple(map(expr_of, node.meta["val"].shape)), {}).items():
                if same(values.reshape(-1), self._after[self._e.index(self._whole, view)]):
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
    root, view = rotation.root, rotation.view
    source: Any = root.args[0] if root.op == "call_function" and root.args else None
    if isinstance(source, Node) and is_rope(source):
        source = given_to(source).get(root)
    elif root.target not in (*_COPIES, aten.slice_scatter.default):
        return None
    if root.target in _COPIES:  # of just these heads, in whatever shape
        sizes = list(map(expr_of, view.size))
        while (found := heads_of(source)) is None or list(map(expr_of, found.size)) != sizes:
            if source.target not in _COPIES:
                return None
            source = source.args[0]
        view = found
    elif source is None or View.of(source.meta["val"]) != View.of(root.meta["val"]):
        return None
    # Whatever became the later version, it must not have touched these heads.
    earlier = replace(rotation, root=root_of(source), view=view)
    return earlier if same(earlier.before(e), rotation.before(e)) else None


_COPIES = (
    aten.clone.default, aten._unsafe_view.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip

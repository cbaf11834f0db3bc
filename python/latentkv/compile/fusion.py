"""The pass: RoPE followed by a cache update becomes the fused op, in the functionalised graph that Inductor lowers.

A site is a cache update. For each:

1. Find which rotation makes its k_pe, and which query is rotated by the same rows of the same table (``Rotation``):
   an op that is known by name, or arithmetic that is recognised by its elements (``elements.py``).
2. Find the tensors whose storage the rotation shall work on, and everything that can be seen afterwards as a view of
   them: the rotated parts themselves, but also q with them written back or concatenated (``storage.py``).
3. Make sure that nobody else needs the values from before (``_readers``), and that all can be put in order.
4. Put the fused op in place, as an ``auto_functionalized_v2`` whose bases are these tensors: torch then finds that it
   can work on them in place, since no reader of the old values is left.

What stands in the way raises ``Unfused`` before anything has changed.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node

from ..cache.layouts import FORMATS
from ..cache.platform import Platform
from ..ops.checks import ACTIVATIONS
from . import known_ops
from .elements import gathered, is_lookup, is_transparent, table_chain
from .graph import (
    FUNCTIONALIZED,
    META_ONLY,
    View,
    arguments,
    closure,
    erase_dead,
    expr_of,
    fake_like,
    fake_result,
    is_intermediate,
    is_rope,
    mutated_view,
    number,
    op_name,
    parent_of,
    refresh_views,
    root_of,
    shape_text,
    shares_storage,
    sort_between,
    source_line,
    storage_of,
    text_of,
    views_of,
)
from .known_ops import UPDATE_OPS, UpdateOp
from .report import DECLARE_N, Reason, Site, Unfused
from .rotation import Finder, Rotation, rotates_a_key, rotations_of
from .storage import State, Storage, origins

aten = torch.ops.aten


@dataclass
class _Update:
    """A cache update in the graph."""

    node: Node
    name: str
    op: UpdateOp

    @property
    def kwargs(self) -> dict[str, Any]:
        """Its arguments as they are now: what fuses another site changes them."""
        return arguments(self.node)

    @property
    def kv_c(self) -> Node:
        return self.kwargs[self.op.kv_c]  # type: ignore[no-any-return]

    @property
    def k_pe(self) -> Node:
        return self.kwargs["k_pe"]  # type: ignore[no-any-return]

    @property
    def others(self) -> list[Any]:
        """What else the fused op will be given: slots, scale, caches, or the layer where a node stands for it."""
        names = ("slot_mapping", "scale", self.op.layer)
        given = [self.kwargs.get(name) for name in names if name] + self.used_caches
        return [x for x in given if isinstance(x, Node)]

    @property
    def caches(self) -> list[tuple[Node | None, str]]:
        """Each cache tensor's base, and the argument's name."""
        found = []
        for name in self.op.caches:
            mutated = mutated_view(self.node, self.kwargs, name)
            found.append((mutated and mutated[0], name))
        return found

    @property
    def used_caches(self) -> list[Node]:
        """The bases of those that are given."""
        return [base for base, _ in self.caches if base is not None]

    def cache_index(self, part: Node) -> int:
        """Which of these a tensor is that the functionalised update returns."""
        index: Any = part.args[1]
        if self.node.target is FUNCTIONALIZED[0]:
            return self.used_caches.index(self.kwargs["_all_bases"][index - 1])
        return int(index) - 1


@dataclass
class _Plan:
    """All that is needed to fuse one site."""

    update: _Update
    q: Rotation
    k: Rotation
    format_and_scale: tuple[str, Any] | None
    storages: list[Storage]
    old: list[tuple[Node, Node]] = field(default_factory=list)  # a reader and the tensor it reads, to stay with the old
    new: list[tuple[Node, Node]] = field(default_factory=list)  # the same, to go to the new storage
    last: Node = field(init=False)  # of what the fused op is computed from
    gone: set[Node] = field(init=False)  # the update, the families and their copies: what will have no place any more


def _unfused(update: str | None, rope: str | None, why: Unfused, node: Node) -> Site:
    return Site(update, rope, False, why.reason, why.detail, source_line(node), why.advice)


class _Fuser:
    """The pass over one graph."""

    def __init__(self, graph: Graph, allow_rounding: bool) -> None:
        self.graph, self.allow_rounding = graph, allow_rounding
        self.taken: set[Node] = set()  # queries that belong to a site already
        self._effects: dict[Any, bool] = {}  # by op
        self._finders: dict[Any, Finder] = {}  # by N

    def run(self) -> list[Site]:
        """Fuses what can be fused, and says what became of every site."""
        updates = list(self._updates())
        ropes = [node for node in self.graph.nodes if is_rope(node)]
        if updates:
            refresh_views(self.graph.nodes)
        sites = []
        keys: set[Node] = set()  # rope ops that lead to an update
        for update in updates:
            rope = None
            try:
                k = self._key(update)
                rope = k.op
                keys.add(k.node)
                self._fuse(self._plan(update, k))
                sites.append(Site(update.name, rope, True, where=source_line(update.node)))
            except Unfused as why:
                sites.append(_unfused(update.name, rope, why, update.node))
        for node in ropes:
            if not (node._erased or node in keys or node in self.taken) and rotates_a_key(node):
                sites.append(_unfused(None, op_name(node), Unfused(Reason.NO_UPDATE), node))
        return sites

    def _updates(self) -> Iterator[_Update]:
        for node in self.graph.nodes:
            op = UPDATE_OPS.get(name := op_name(node))
            if op is not None and (op.layer or node.target in FUNCTIONALIZED):
                yield _Update(node, name, op)

    def _lasts(self, node: Node) -> bool:
        """Whether a node stays though nobody takes its result."""
        key = node.op, node.target, node.args[0] if node.target in FUNCTIONALIZED else None
        if key not in self._effects:
            self._effects[key] = node.op == "output" or node.is_impure()
        return self._effects[key]

    def _has_effects(self, node: Node) -> bool:
        """Whether torch knows of effects of the node, but for the copies to inputs at the end of a graph."""
        if node.target is torch.ops.higher_order.with_effects:
            return True
        return node.op == "call_function" and node.target is not aten.copy_.default and self._lasts(node)

    def _finder(self, rows: Any) -> Finder:
        key = expr_of(rows)
        if key not in self._finders:
            self._finders[key] = Finder(self.graph, rows)
        return self._finders[key]

    def _key(self, update: _Update) -> Rotation:
        """The rotation that makes k_pe."""
        k_pe = update.k_pe
        val = k_pe.meta["val"]
        if val.dim() not in (2, 3) or (val.dim() == 3 and number(val.shape[1]) != 1):
            raise Unfused(Reason.SHAPE, f"k_pe is {shape_text(k_pe)}")
        finder = self._finder(val.shape[0])
        rotation = finder.rotation_of(k_pe)
        if rotation is None or rotation.root._erased:
            self._explain(k_pe)
        return rotation

    def _explain(self, k_pe: Node) -> NoReturn:
        """Why no rotation was found."""
        expression = sorted(closure([k_pe], lambda n: n.all_input_nodes if is_transparent(n) else ()))
        rows = [found for found in map(gathered, expression) if found is not None]
        for node in filter(is_lookup, expression):
            if gathered(node) is None:
                raise Unfused(Reason.SHAPE, f"{text_of(node)}: not a table [max_position, R] by positions [N]")
        ropes = list(filter(is_rope, expression))
        for node in ropes:
            rotations_of(node)
        if not rows and not ropes:
            if any(node.target is aten.mul.Tensor for node in expression):
                raise Unfused(Reason.TABLE, "cos and sin are computed")
            origin = expression[0] if len(expression) == 1 else root_of(k_pe)
            if origin.op == "placeholder":
                raise Unfused(Reason.PARTITIONED, origin.name)
            raise Unfused(Reason.NO_ROPE, f"k_pe comes from {text_of(origin)}")
        width = number(k_pe.meta["val"].shape[-1])
        chains = [table_chain(table) for table, _ in rows]
        tables = {chain[0].name for chain in chains}
        fits = any(width == number(t.meta["val"].shape[1]) for chain in chains for t in chain)
        if rows and (len(tables) > 1 or not fits):
            raise Unfused(Reason.TABLE, ", ".join(sorted(tables)))
        raise Unfused(Reason.NO_ROPE)

    def _query(self, update: _Update, k: Rotation) -> Rotation:
        """The query that is rotated as the key is, and nearest to it."""
        finder = self._finder(k.view.size[0])
        nodes, place = list(finder.turned), finder.turned
        at = place.get(k.node, 0)
        nearest = heapq.merge(reversed(nodes[:at]), nodes[at:], key=lambda n: abs(place[n] - at))
        for node in nearest:
            if node in self.taken or node._erased:
                continue
            rotations: list[Rotation] = []
            if is_rope(node):
                with contextlib.suppress(Unfused):
                    rotations = rotations_of(node)
            elif node.meta["val"].dim() == 3 and node.meta["val"].dtype == k.root.meta["val"].dtype:
                rotations = [r for r in [finder.rotation_of(node)] if r is not None and not r.root._erased]
            for rotation in rotations:
                other = k.angles == rotation.angles and (rotation.root, rotation.view) != (k.root, k.view)
                if other and not _follows(node, update.node):
                    return rotation
        raise Unfused(Reason.NO_QUERY)

    # -- what has to change

    def _plan(self, update: _Update, k: Rotation) -> _Plan:
        format_and_scale = _check_update(update, k)
        q = self._query(update, k)
        _check_dtypes(update, q, k)
        if not (k.exact and q.exact) and not self.allow_rounding:
            raise Unfused(Reason.ROUNDING, q.op if k.exact else k.op, (q if k.exact else k).advice)
        finder = self._finder(k.view.size[0])
        e = finder.exact if k.exact and q.exact else finder.real
        why: Unfused | None = None
        for pair in itertools.product(origins(q, e), origins(k, e)):
            try:
                _check_views(*pair, e.rows)
                storages = [Storage(root, pair, e) for root in dict.fromkeys(rotation.root for rotation in pair)]
                plan = _Plan(update, *pair, format_and_scale, storages)
                self._readers(plan)
                return plan
            except Unfused as error:
                why = error
        assert why is not None
        raise why

    def _readers(self, plan: _Plan) -> None:
        """Who reads the storages of q and k, before and after; checks that all of it can be put in order."""
        update, at = plan.update, plan.update.node
        family = {node: storage for storage in plan.storages for node in storage.family}
        if len(family) < sum(len(storage.family) for storage in plan.storages):
            raise Unfused(Reason.OTHER_USER, "one of q and k_pe is in a later version of the other's storage")
        copies = {node for storage in plan.storages for node in storage.copies}
        own = {at, *(u for u in at.users if u.target is operator.getitem)}
        gone = plan.gone = {*family, *copies, *own}
        roots = [storage.root for storage in plan.storages]
        first, last = min(roots), max(gone)

        # Before: all that the fused op is computed from. It may read what the rotation leaves alone.
        def inputs(reader: Node, nodes: Iterable[Node]) -> Iterator[Node]:
            for node in nodes:
                storage = family.get(node)
                if storage is not None and node not in storage.views:
                    if storage.state(node) not in (State.APART, State.OLD):
                        raise Unfused(Reason.DEPENDENCE, text_of(reader))
                    plan.old.append((reader, node))
                    yield storage.root
                elif node in own or node in copies:
                    raise Unfused(Reason.DEPENDENCE, text_of(node))
                elif not node < first:
                    yield node

        given = [update.kv_c, *update.others, plan.k.positions, plan.k.table, *roots]
        before = closure(inputs(at, given), lambda n: inputs(n, n.all_input_nodes))
        plan.last = max(before)

        # After: all that is alive once every member of the families has its place in the new storage.
        def later(node: Node) -> Iterable[Node]:
            return () if last < node else (user for user in node.users if user not in gone)

        alive: set[Node] = set()
        for node in sorted(closure((u for n in (*family, *copies) for u in n.users), later), reverse=True):
            if last < node or self._lasts(node) or any(user in alive for user in later(node)):
                alive.add(node)

        apart: list[tuple[Node, Node]] = []
        for node, storage in family.items():
            for reader in node.users:
                written = reader.target is aten.copy_.default and reader.args[0] is node
                if reader in gone or written or reader not in alive:
                    continue
                if reader.target in META_ONLY:
                    plan.old.append((reader, node))
                elif reader in before:
                    continue
                elif (state := storage.state(node)) is State.APART:
                    apart.append((reader, node))
                elif state is State.NEW:
                    plan.new.append((reader, node))
                else:
                    raise Unfused(Reason.OTHER_USER, text_of(reader), _other(plan, reader, storage))
        for storage in plan.storages:
            _check_input(storage)
            for node, member in storage.copies.items():
                if (_held(node, member) or _returned_apart(node, member, storage)) and not _view(node).contiguous:
                    advice = "return q and what the update returns, not k_pe; or k_pe.contiguous()"
                    raise Unfused(Reason.SHAPE, f"the strides of {node.name} would change, and are seen", advice)

        # The order: the update stays where it is; what needs the rotated values moves behind it, if it was before.
        start = (*copies, *(reader for reader, _ in plan.new))
        moved = closure((n for n in start if n < at), lambda n: (u for u in n.users if u < at)) - gone
        for reader, node in apart:  # what need not move stays
            (plan.old if reader < at and reader not in moved else plan.new).append((reader, node))
        caches = set(map(storage_of, update.used_caches))
        for node in moved & alive:
            if self._has_effects(node):
                raise Unfused(Reason.SIDE_EFFECT, text_of(node))
            if not caches:
                continue
            if storage_of(node) not in caches and any(storage_of(n) in caches for n in node.all_input_nodes):
                advice = "let it read the cache after the update: the cache would be copied"
                raise Unfused(Reason.DEPENDENCE, f"{text_of(node)} reads the cache before the update", advice)
        node = at
        while node < plan.last:
            node = node.next
            if node not in gone and self._has_effects(node):
                raise Unfused(Reason.SIDE_EFFECT, text_of(node))

    # -- the change

    def _fuse(self, plan: _Plan) -> None:
        update, storages = plan.update, plan.storages
        changed = [reader for reader, _ in (*plan.old, *plan.new)]
        with self.graph.inserting_before(update.node):
            twins = {view: view for storage in storages for view in storage.views}
            for reader, node in plan.old:
                reader.replace_input_with(node, self._twin(node, storages, twins))
            fused = self._insert(plan)
            twins = {storage.root: self._part(fused, 1 + i) for i, storage in enumerate(storages)}
            for storage in storages:
                for node, member in storage.copies.items():
                    if readers := [user for user in node.users if user not in plan.gone]:
                        changed += readers
                        self._replace(node, readers, self._twin(member, storages, twins), storage)
            for reader, node in plan.new:
                reader.replace_input_with(node, self._twin(node, storages, twins))
            caches = [self._part(fused, 1 + len(storages) + i) for i in range(len(update.used_caches))]
            result = self._part(fused, 0) if update.op.layer and update.node.users else None
        last = max(update.node.prev, plan.last)
        changed += update.node.users
        if result is not None:
            update.node.replace_all_uses_with(result)
        for user in list(update.node.users):
            changed += user.users
            user.replace_all_uses_with(caches[update.cache_index(user)])
            self.graph.erase_node(user)
        self.taken |= {plan.q.node, plan.k.node}
        dead = [node for storage in storages for node in (*storage.copies, *storage.family)]
        self.taken.update(dead)
        inputs = update.node.all_input_nodes
        self.graph.erase_node(update.node)  # by hand: no compiler may, as it writes
        changed = [node for node in changed if not node._erased]
        sort_between(min([fused, *changed]), max([last, fused]))
        erase_dead([*inputs, *dead])
        refresh_views(sorted({node for node in changed if not node._erased}))

    def _insert(self, plan: _Plan) -> Node:
        """The fused op."""
        update, q, k, graph = plan.update, plan.q, plan.k, self.graph
        kwargs: dict[str, Any] = {
            "positions": k.positions,
            "kv_c": update.kv_c,
            "cos_sin_cache": k.table,
            "is_neox": k.is_neox,
        }
        roots = [storage.root for storage in plan.storages]
        bases: list[Any] = list(roots)
        if update.op.layer:
            op: Any = torch.ops.latentkv.layer_rope_write_cache.default
            kwargs["layer"] = known_ops.layer_of(update.kwargs[update.op.layer])
        else:
            op = torch.ops.latentkv.rope_write_cache_.default
            assert plan.format_and_scale is not None
            format, scale = plan.format_and_scale
            kwargs |= {"slot_mapping": update.kwargs["slot_mapping"], "scale": scale, "format": format}
            kwargs |= {"rope_masked": True, "_rope_cache_base_index": None}
            for ours, (base, name) in zip(("cache", "rope_cache"), update.caches, strict=False):
                if base is None:
                    continue
                parts = {key: v for key, v in update.kwargs.items() if key.startswith(f"_{name}_")}
                kwargs |= {f"_{ours}_{key.removeprefix(f'_{name}_')}": v for key, v in parts.items()}
                kwargs[f"_{ours}_base_index"] = len(bases)
                bases.append(base)
        names = {a.name for a in op._schema.arguments if a.alias_info is None}
        kwargs |= {name: value for name, value in update.kwargs.items() if name in names and name not in kwargs}
        rows: Any = number(k.view.size[0])
        if rows is None:
            rows = self._finish(graph.call_function(aten.sym_size.int, (k.positions, 0)), update.node)
        size, stride = k.view.size, k.view.stride
        key = View((size[0], size[2]), (stride[0], stride[2]), k.view.offset)
        for name, rotation, view in (("q_pe", q, q.view), ("k_pe", k, key)):
            kwargs[f"_{name}_base_index"] = roots.index(rotation.root)
            if view != View.of(rotation.root.meta["val"]):
                kwargs[f"_{name}_size"] = (rows, *map(number, view.size[1:]))
                kwargs[f"_{name}_stride"] = tuple(map(number, view.stride))
                kwargs[f"_{name}_storage_offset"] = number(view.offset)
        fused = graph.call_function(FUNCTIONALIZED[0], (op,), {**kwargs, "_all_bases": bases})
        # What torch would find by running the op on fake tensors, in a tenth of the time.
        result = update.node.meta["val"] if update.op.layer else None
        return self._finish(fused, update.node, (result, *map(fake_like, bases)))

    def _finish(self, node: Node, like: Node, val: Any = None) -> Node:
        """Gives a new node its fake tensors, and the place in the source of the one it stands for."""
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta["val"] = fake_result(node) if val is None else val
        return node

    def _part(self, node: Node, index: int) -> Node:
        return self._finish(self.graph.call_function(operator.getitem, (node, index)), node)

    def _twin(self, node: Node, storages: Sequence[Storage], made: dict[Node, Node]) -> Node:
        """For a member of a storage's family, the view at its place of what ``made`` has for the root."""
        if node not in made:
            source = next(s.family[node] for s in storages if node in s.family)
            assert source is not None
            twin = self._twin(source, storages, made)
            if parent_of(node) is source:  # a view; a later version is at the place of its source
                twin, old = self.graph.node_copy(node, lambda n: twin if n is source else n), node
                self._finish(twin, old)
            made[node] = twin
        return made[node]

    def _replace(self, node: Node, readers: Iterable[Node], twin: Node, storage: Storage) -> None:
        """Gives readers of a copy a twin in its place, or a copy of that, where they see the difference."""
        held, apart = _held(node, twin), _returned_apart(node, twin, storage)
        seeing = [user for user in readers if held or (apart and user.op == "output")]
        if seeing:
            copy = self.graph.call_function(aten.clone.default, (twin,), {"memory_format": torch.contiguous_format})
            self._finish(copy, node)
        for user in readers:
            if user.target in (aten.view.default, aten._unsafe_view.default):
                user.target = aten.reshape.default  # the twin may have other strides
            user.replace_input_with(node, copy if user in seeing else twin)


def _other(plan: _Plan, reader: Node, storage: Storage) -> str:
    """What to do about a reader of what a storage holds before the rotation."""
    names = [name for name, r in (("q", plan.q), ("k_pe", plan.k)) if r.root is storage.root]
    verb = "return" if reader.op == "output" else "read"
    return f"{verb} {' and '.join(names)} only as rotated, or rotate a clone by latentkv.rope_"


def _follows(node: Node, update: Node) -> bool:
    """Whether a node needs what an update returns."""
    return update in closure([node], lambda n: (i for i in n.all_input_nodes if not i < update))


def _check_views(q: Rotation, k: Rotation, rows: Any) -> None:
    for name, node in (("positions", k.positions), ("cos_sin_cache", k.table)):
        if number(node.meta["val"].stride(-1)) != 1 and number(node.meta["val"].shape[-1]) != 1:
            raise Unfused(Reason.SHAPE, f"{name} whose elements do not follow one another")
    if q.root is k.root and not q.view.apart(k.view, rows):
        raise Unfused(Reason.OTHER_USER, "the key is a part of the query", "give the key a tensor of its own")
    for rotation in (q, k):
        row = rotation.view.row(rows)
        if row is None:
            raise Unfused(Reason.SHAPE, "heads whose place is a symbol", DECLARE_N)
        if not row.distinct:
            raise Unfused(Reason.SHAPE, "heads that share their memory", "rotate a tensor that is not expanded")
        if number(rotation.view.stride[2]) != 1:
            raise Unfused(Reason.SHAPE, f"elements of a head {rotation.view.stride[2]} apart")
        if shares_storage(rotation.root):
            raise Unfused(Reason.SHAPE, f"{rotation.root.name} is a view as another dtype")
        if is_intermediate(rotation.root):
            raise Unfused(Reason.SHAPE, f"{rotation.root.name} becomes a part of another tensor")


def _view(node: Node) -> View:
    return View.of(node.meta["val"])


def _returned_apart(node: Node, twin: Node, storage: Storage) -> bool:
    """Whether the graph returns a copy in strides that its twin has not, or beside another part of the storage."""
    outputs = [user for user in node.users if user.op == "output"]
    others = {*storage.family, *storage.copies} - {node}
    beside = any(other in others for output in outputs for other in output.all_input_nodes)
    return bool(outputs) and (beside or _view(node).steps != _view(twin).steps)


def _held(node: Node, twin: Node) -> bool:
    """Whether a twin's geometry is another, and someone holds that of a tensor, or returns a view of it.

    It is held as strides and offsets, or by the tensor's bytes.
    """

    def holds(user: Node, view: Node) -> bool:
        if user.target is FUNCTIONALIZED[0]:
            return view in user.kwargs["_all_bases"]  # type: ignore[operator]
        if user.target is FUNCTIONALIZED[1]:
            op: Any = user.args[0]
            return any(a.alias_info is not None and user.kwargs[a.name] is view for a in op._schema.arguments)
        returned = user.op == "output" and view is not node
        return returned or isinstance(user.target, torch._ops.HigherOrderOperator) or user.target in _GEOMETRIC

    return _view(node) != _view(twin) and any(holds(user, view) for view in views_of(node) for user in view.users)


_GEOMETRIC = (
    aten.as_strided.default, aten.as_strided_scatter.default, aten.view.dtype, aten.view_as_complex.default,
)  # fmt: skip


def _check_input(storage: Storage) -> None:
    """An input of the graph may change only if the graph itself says so, by copying the result to it."""
    root = storage.root
    if root.op not in ("placeholder", "get_attr"):
        return
    copies: list[Any] = [u.args[1] for u in root.users if u.target is aten.copy_.default and u.args[0] is root]
    if not any(map(storage.holds_all, copies)) or number(root.meta["val"].storage_offset()) != 0:
        raise Unfused(Reason.INPUT, root.name)


def _check_update(update: _Update, k: Rotation) -> tuple[str, Any] | None:
    kv_c = update.kv_c.meta["val"]
    if kv_c.dim() != 2:
        raise Unfused(Reason.SHAPE, f"kv_c is {shape_text(update.kv_c)}")
    theirs = not update.name.startswith("latentkv::") and Platform.detect().fp8_format == "fp8_e4m3fnuz"
    if update.op.layer:
        if theirs and update.kwargs["kv_cache_dtype"] == "fp8_ds_mla":
            raise Unfused(Reason.FORMAT, "fp8_ds_mla, whose tiles are FNUZ there")
        layer = known_ops.layer_of(update.kwargs[update.op.layer])
        index = layer.meta.get("val") if isinstance(layer, Node) else layer
        if not isinstance(index, int | torch.SymInt):
            raise Unfused(Reason.DTYPE, f"{update.op.layer} is neither a name nor an integer: {layer}")
        return None
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    slots, positions = update.kwargs["slot_mapping"].meta["val"], k.positions.meta["val"]
    if not statically_known_true(slots.shape[0] == positions.shape[0]):
        raise Unfused(Reason.PADDING, f"{slots.shape[0]} slots, {positions.shape[0]} positions")
    cache = update.caches[0][0]
    assert cache is not None
    try:
        name, scale = known_ops.format_and_scale(update.kwargs, kv_c, cache.meta["val"])
    except ValueError as error:
        raise Unfused(Reason.FORMAT, str(error)) from None
    format = FORMATS.get(name)
    if format is None or format.activation not in (None, kv_c.dtype):
        raise Unfused(Reason.DTYPE, f"kv_c is {kv_c.dtype} for format {name}")
    if format.packed:
        dims = (number(kv_c.shape[1]), number(k.view.size[2]))
        if dims != format.packed.dims or theirs:
            raise Unfused(Reason.FORMAT, f"{name} of {dims}{', whose tiles are FNUZ there' if theirs else ''}")
    return name, scale


def _check_dtypes(update: _Update, q: Rotation, k: Rotation) -> None:
    dtypes = {"q_pe": q.root, "k_pe": k.root, "kv_c": update.kv_c}
    kinds = {name: node.meta["val"].dtype for name, node in dtypes.items()}
    table = k.table.meta["val"].dtype
    if len(set(kinds.values())) > 1 or kinds["q_pe"] not in ACTIVATIONS or table not in ACTIVATIONS:
        raise Unfused(Reason.DTYPE, ", ".join(f"{n} {d}" for n, d in {**kinds, "cos_sin_cache": table}.items()))


def fuse(graph: Graph, allow_rounding: bool) -> list[Site]:
    """Fuses RoPE and cache updates in a functionalised graph, and says what became of every site."""
    with unset_fake_temporarily():  # the pass computes, with fingerprints
        return _Fuser(graph, allow_rounding).run()

"""Whole programs, as hypothesis draws them: the compile pass changes no bit of what they return, mutate or cache.

For an hour of them: ``pytest tests/test_programs.py --hypothesis-profile=hour --hypothesis-show-statistics``.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import engine_ops
import pytest
import torch
import torch._inductor.config
from hypothesis import Phase, event, example, given, reject, settings
from latentkv.compile import FusionPass
from latentkv.compile.graph import expr_of, is_tensor, root_of
from latentkv.testing import assert_same_bytes
from programs import LAYOUTS, Program, programs
from test_fusion import Interpreter, Outcome, assert_same, execute, lower, settings_of_all_runs
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError

aten = torch.ops.aten


class Both:
    """A backend: Inductor's last graphs without the pass and with it, of one trace. ``on`` says which of them runs."""

    def __init__(self) -> None:
        self.on = False
        self.impossible = False  # Inductor fails without the pass
        self.fusion = FusionPass()
        self.graphs: tuple[list[torch.fx.GraphModule], ...] = ([], [])

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(gm, inputs, inner_compile=self._inner)

    def _inner(
        self, gm: torch.fx.GraphModule, inputs: list[Any], *_: Any, is_inference: bool = False, **__: Any
    ) -> Any:
        pair = gm, copy.deepcopy(gm)
        for one, graphs, own in zip(pair, self.graphs, (None, self.fusion), strict=True):
            self.impossible = own is None
            with torch._inductor.config.patch(post_grad_custom_pre_pass=own):
                lower(one, inputs, is_inference)
            self.impossible = False
            graphs.append(one)

        def run(args: list[Any]) -> Any:
            own = list(args)
            args.clear()
            return Interpreter(pair[self.on]).run(*own)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def run_all(program: Program, device: str) -> list[Outcome]:
    """The program as eager PyTorch runs it, and its graphs without the pass and with it.

    Programs that Inductor fails at without the pass are passed over (functionalisation v1 has such).
    """
    both, fn, found = Both(), program.function(), []
    with settings_of_all_runs(program.v2):
        compiled = torch.compile(fn, backend=both, fullgraph=True, dynamic=program.dynamic)
        for kind in ("eager", "off", "on"):
            both.on = kind == "on"
            engine_ops.NOTES.clear()
            made, returned = [program.inputs(device, n) for n in program.rows], []
            for inputs in made:
                program.mark(inputs)
                try:
                    with inputs.step():
                        returned += (fn if kind == "eager" else compiled)(inputs.t)
                except BackendCompilerFailed:
                    if both.impossible:
                        reject()
                    raise
            returned.append(torch.tensor(engine_ops.NOTES))
            found.append(Outcome(returned, made, both.graphs[both.on], [], both.fusion.report))
    return found


def copies_of_caches(outcome: Outcome) -> int:
    """How many copies of whole caches the graphs make."""
    shapes = {tuple(t.shape) for cache in outcome.inputs[0].caches.values() for t in cache.tensors}
    kinds = (aten.clone.default, aten.copy.default, aten.slice_scatter.default, aten.as_strided_scatter.default)
    made = [tuple(n.meta["val"].shape) for gm in outcome.graphs for n in gm.graph.nodes if n.target in kinds]
    return sum(all(isinstance(size, int) for size in shape) and shape in shapes for shape in made)


def shared(returned: Sequence[torch.Tensor]) -> set[tuple[int, int]]:
    """The pairs of these that share their storage."""
    return {
        (i, j)
        for i, a in enumerate(returned)
        for j, b in enumerate(returned[:i])
        if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() and b.numel()
    }


def strided_parts(outcome: Outcome) -> int:
    """How many parts of tensors are taken for whole storages: Inductor may give a part a storage of its own."""
    return sum(
        node.target is aten.as_strided.default and is_part(node.args[0])
        for gm in outcome.graphs
        for node in gm.graph.nodes
    )


def is_part(node: Any) -> bool:
    """Whether a tensor is a view of some elements of another, or an item of a list of such."""
    root = root_of(node)
    whole = not is_tensor(root) or expr_of(root.meta["val"].numel())
    return root is not node and expr_of(node.meta["val"].numel()) != whole


def check(program: Program, device: str) -> Outcome:
    """The same bits, strides and effects, pass on or off; and no whole cache is copied that was not before."""
    eager, off, on = run_all(program, device)
    try:
        assert_same(eager, off)
    except AssertionError:
        # Torch drops a clone whose strides are those of its source, a part, and takes that for what an op may mutate.
        if strided_parts(off):
            reject()
        raise
    assert_same(off, on)
    assert [t.stride() for t in on.returned] == [t.stride() for t in off.returned]
    assert shared(on.returned) <= shared(off.returned)
    assert copies_of_caches(on) <= copies_of_caches(off)
    assert strided_parts(on) <= strided_parts(off)
    return on


def record(on: Outcome) -> None:
    """Tells hypothesis's statistics what became of a program."""
    sites = on.report.sites
    fused = sum(site.fused for site in sites)
    event(f"sites fused: {'all' if fused == len(sites) else 'some' if fused else 'none'}")
    for reason in {site.reason.name for site in sites if site.reason}:
        event(f"not fused: {reason}")


NOBODY_READS = Program(
    (
        "all0 = x @ w_all0",
        "q0, c0, k0 = all0.split([H * (P + R), L, R], -1)",
        "q0 = q0.view(-1, H, P + R)",
        "cos0, sin0 = table[positions].chunk(2, -1)",
        "k0 = rotate(k0, cos0, sin0, 'neox', 'whole')",
        "q0[..., P:] = rotate(q0[..., P:], cos0, sin0, 'neox', 'whole')",
        "done0 = layer_write_cache(c0, k0, layer0)",
        "x = x + done0.sum()",
    )
)
# The key changes in place before it is rotated: a scatter of a scatter, of which torch makes one.
SCATTERED_TWICE = Program(
    (
        "q0 = (x @ w_q0).view(-1, H, P + R)",
        "kv0 = x @ w_kv0",
        "c0, k0 = kv0.split([L, R], -1)",
        "k0[:, -1].mul_(0.5)",
        "cos0, sin0 = table[positions].chunk(2, -1)",
        "q0[..., P:] = rotate(q0[..., P:], cos0, sin0, 'gptj', 'whole')",
        "k0 = rotate(k0, cos0, sin0, 'gptj', 'whole')",
        "write_cache_(c0, k0, slots, cache0, None, None, 'bf16')",
        "out += attention(q0, None, c0, k0, None, cache0, None)",
    )
)
# Of one row Inductor drops the clone, and the zeros of no rows go into the part that was cloned.
PART_OF_ONE_ROW = Program(
    (
        "all0 = x @ w_all0",
        "q0, c0, k0 = all0.split([H * (P + R), L, R], -1)",
        "q0 = q0.view(-1, H, P + R)",
        "k0 = k0.unsqueeze(1).clone()",
        "rope_(positions, q0[..., P:], None, table, False)",
        "k0[3:].zero_()",
        "rope_(positions, k0, None, table, False)",
        "k0 = k0.reshape(-1, R)",
        "concat_and_cache_mla(c0, k0, cache0, slots, 'auto', scale)",
        "out += attention(q0, None, c0, k0, None, cache0, None)",
    ),
    rows=(1, 8),
    dims=LAYOUTS[1],
)
# An op of the harness reads a strided part in fp32.
READS_A_PART = Program(
    (
        "q0 = (x @ w_q0).view(-1, H, P + R)",
        "kv0 = x @ w_kv0",
        "c0, k0 = kv0[:, :L], kv0[:, L:]",
        "out.append(pure(c0))",
        "cos0, sin0 = table[positions].chunk(2, -1)",
        "k0 = rotate(k0, cos0, sin0, 'half', 'whole')",
        "q0[..., P:] = rotate(q0[..., P:], cos0, sin0, 'half', 'whole')",
        "done0 = layer_write_cache(c0, k0, layer0)",
        "x = x + done0.sum()",
    ),
    activation="fp32",
    v2=False,
)
RETURNS_A_VIEW = Program(
    (
        "q0 = (x @ w_q0).view(-1, H, P + R)",
        "k0, c0 = (x @ w_kv0).split([R, L], -1)",
        "cos0, sin0 = table[positions].chunk(2, -1)",
        "r0 = rotate(q0[..., P:], cos0, sin0, 'gptj', 'whole')",
        "q0[..., P:] = r0",
        "out.append(r0.transpose(0, 1).clone())",
        "k0 = rotate(k0, cos0, sin0, 'gptj', 'whole')",
        "done0 = layer_write_cache(c0, k0, layer0)",
        "out += attention(q0, None, c0, k0, done0, None, name0)",
    )
)
# A tensor and its copy: whoever changes one of them later must not change the other.
RETURNS_A_COPY = Program((*RETURNS_A_VIEW.lines[:5], *RETURNS_A_VIEW.lines[6:8], "out += [q0, q0.clone(), k0, k0 * 1]"))
# The key is a head of the query, and of a later version of it than the copy that is rotated.
KEY_OF_A_LATER_VERSION = Program(
    (
        "q0 = (x @ w_q0).view(-1, H, P + R)",
        "c0 = x @ w_kv0[:, :L]",
        "k0 = q0[:, 0, P:]",
        "q0[..., :9].mul_(0.5)",
        "r0 = q0[..., P:].contiguous()",
        "rope_(positions, r0, None, table, True)",
        "rope_(positions, k0[:, None], None, table, True)",
        "write_cache_(c0, k0, slots, cache0, None, None, 'fp32')",
        "out += attention(q0[..., :P], r0, c0, k0.flip(-1), None, cache0, None)",
    ),
    activation="fp32",
)
# Two layers have one latent and key: the second RoPE of the key gives what the first gave, and goes with it.
KEY_OF_TWO_LAYERS = Program(
    (
        "q1 = (x @ w_q1).view(-1, H, P + R)",
        "k1, c1 = (x @ w_kv1).split([R, L], -1)",
        "q2 = (x @ w_q2).view(-1, H, P + R)",
        "k2, c2 = k1, c1.clone()",
        "k1 = k1.clone()",
        "rope_(positions, k1[:, None], None, table, False)",
        "rope_(positions, q1[..., P:], None, table, False)",
        "rope_(positions, q2[..., :R], None, table, False)",
        "rope_(positions, k2[:, None], None, table, False)",
        "write_cache_(c1, k1, slots, cache1, None, None, 'fp32')",
        "write_cache_(c2, k2, slots, cache2, None, None, 'fp32')",
        "out += attention(q1, None, c1, k1.clone(), None, cache1, None)",
        "out += attention(q2, None, c2, k2, None, cache2, None)",
    ),
    activation="fp32",
)
# Shrinking takes minutes, and a program can be read as it is.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
EXAMPLES = settings().max_examples


@settings(max_examples=EXAMPLES * 2 // 5, phases=PHASES)
@given(program=programs())
@example(NOBODY_READS)
@example(SCATTERED_TWICE)
@example(PART_OF_ONE_ROW)
@example(RETURNS_A_VIEW)
@example(RETURNS_A_COPY)
@example(KEY_OF_A_LATER_VERSION)
@example(KEY_OF_TWO_LAYERS)
def test_the_bits_stay(device: str, program: Program) -> None:
    record(check(program, device))


def test_a_third_of_the_programs_fuses(device: str) -> None:
    """Of a sample that is always the same: else the tests here would prove nothing."""
    found: Counter[bool] = Counter()

    @settings(max_examples=18, derandomize=True, database=None, phases=PHASES)
    @given(program=programs())
    def sample(program: Program) -> None:
        found[any(site.fused for site in check(program, device).report.sites)] += 1

    sample()
    assert found[True] >= found.total() / 3, found


@settings(max_examples=EXAMPLES // 50, phases=PHASES)
@given(program=programs())
@example(SCATTERED_TWICE)
@example(READS_A_PART)
def test_inductor(device: str, program: Program) -> None:
    """What Inductor generates, with the pass and without."""
    makes = [functools.partial(program.inputs, device, n) for n in program.rows]
    run = functools.partial(
        execute, program.function(), *makes, backend="inductor", dynamic=program.dynamic, v2=program.v2
    )
    try:
        off = run()
    except InductorError:
        reject()
    on = run(fuse={})
    assert_same(off, on)
    record(on)


def test_tensors_of_any_strides_are_compared() -> None:
    for t in (torch.tensor(1.5), torch.ones(1, 24)[:, -1], torch.ones(3, 4).t(), torch.ones(1, 4, 8)[..., ::2]):
        assert_same_bytes(t, t.clone())
        with pytest.raises(AssertionError, match="differ"):
            assert_same_bytes(t, t + 1)

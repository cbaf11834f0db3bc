"""What autograd must be told of ops that write to their arguments, and have no derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import Call, call_of, check_scales, checks_on, fail
from .description import OPS, Op
from .warmup import warming_up

T = TypeVar("T")


def tensors_of(op: Op, args: Sequence[Any], mutated: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments of an op's schema, by name; ``mutated``: those that it writes."""
    for argument, value in zip(op.plain, args, strict=False):
        if mutated and "!" not in argument.type:
            continue
        if isinstance(value, list | tuple):
            yield from ((f"{argument.name}[{i}]", t) for i, t in enumerate(value) if isinstance(t, Tensor))
        elif isinstance(value, Tensor):
            yield argument.name, value


def refuse_gradients(op: Op, args: Sequence[Any]) -> None:
    """Raises where autograd records and an argument requires a gradient, which would be lost or wrong."""
    if torch.is_grad_enabled():
        for name, t in tensors_of(op, args):
            if t.requires_grad:
                expected = "a tensor without gradient, as the op has no derivative: call it under torch.no_grad()"
                fail(op.name, name, expected, "one that requires grad")


def implementation(body: Callable[[Call], T]) -> Callable[..., T]:
    """The op of the same name on the arguments of its torch schema, from a function of the checked call."""
    op = OPS[body.__name__]

    @functools.wraps(body)
    def run(*args: Any) -> T:
        refuse_gradients(op, args)
        x = call_of(op, args)
        if checks_on() and not warming_up():
            check_scales(x)
        result = body(x)
        torch.autograd.graph.increment_version([t for _, t in tensors_of(op, args, mutated=True)])
        return result

    return run

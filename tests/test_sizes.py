"""Sizes and products of sizes beyond 32 and 64 bits: each is refused or has nothing to do, and kills no process."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Python

# Empty tensors, and one element repeated, take no memory, whatever their sizes.
CODE = """
import sys
sys.path.insert(0, {tests!r})
import torch
from calls import L, R, put, run, tensors, valid
from latentkv import providers
from latentkv.ops.description import OPS

provider = getattr(providers, {provider!r})
SIZES = (2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**40)

def outcome(op, call):
    try:
        run(provider, op, call)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        assert text.startswith(f"latentkv.{{op}}: ") and " expected " in text, text
        return text
    return "done"

tried = 0
for op in OPS:
    if not provider.has(op):
        continue
    for name in tensors(valid(op)):
        shape = list(tensors(valid(op))[name].shape)
        for dim in range(len(shape)):
            for size in SIZES:
                for other in [i for i in range(len(shape)) if i != dim]:  # none along another dimension
                    call = valid(op)
                    odd = [*shape]
                    odd[dim], odd[other] = size, 0
                    put(call, name, tensors(call)[name].new_empty(odd))
                    said = outcome(op, call)
                    assert said != "done" or size < 2**31, (op, name, odd)
                    tried += 1
                call = valid(op)
                odd = [*shape]
                odd[dim] = size
                put(call, name, tensors(call)[name].new_zeros([1] * len(shape)).expand(odd))
                said = outcome(op, call)
                assert said != "done" or size < 2**31, (op, name, odd)
                tried += 1
    for letter in ("kv_lora_rank", "rope_dim"):
        for size in (*SIZES, 2**62, 2**63 - 1, -1, -(2**63)):
            if letter in valid(op):
                assert outcome(op, valid(op) | {{letter: size}}) != "done", (op, letter, size)
                tried += 1

# Blocks times entries, runs times blocks times entries.
for blocks, entries in ((2**16, 2**15), (2**16, 2**16), (2**31 - 1, 2), (2**31 - 1, 2**31 - 1), (2, 2**31 - 1)):
    for name, op in (("cache", "write_cache_"), ("cache", "gather_cache"), ("src", "convert_cache_")):
        cache = torch.empty(1, dtype=torch.bfloat16).expand(blocks, entries, 1)[..., :0]
        call = valid(op) | {{name: cache}}
        assert outcome(op, call) != "done", (op, blocks, entries)
for columns in (1, 2, 3, 4, 5, 8):
    for runs in (2**20, 2**30, 2**31 - 1):
        for size in (4, 2**20, 2**31 - 1):
            cache = torch.empty((0, size, L + R), dtype=torch.bfloat16)
            numbers = torch.zeros(1, columns, dtype=torch.int64).expand(runs, columns)
            call = valid("convert_cache_")
            call |= {{"src": cache, "dst": cache, "src_blocks": numbers, "dst_blocks": numbers}}
            if columns * runs * size >= 2**31:
                assert "fewer than 2^31 rows in all" in outcome("convert_cache_", call), (columns, runs, size)
print("tried", tried)
"""


@pytest.mark.parametrize("served", ["native", "reference", "triton"])
def test_absurd_sizes(served: str, python: Python) -> None:
    code = CODE.format(tests=str(Path(__file__).parent), provider=served)
    done = python(code, TRITON_INTERPRET="1" if served == "triton" else "0")
    assert done.returncode == 0 and "tried" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]

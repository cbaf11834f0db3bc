"""What torch, the compiled libraries and the fakes know of the ops comes from one description."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import valid
from latentkv import providers
from latentkv.ops.description import LAYER_OPS, OPS
from latentkv.ops.schemas import NAMESPACE, NATIVE_NAMESPACE, NATIVE_OP_NAMES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("op", [*OPS, *LAYER_OPS])
def test_the_schema_that_torch_has(op: str) -> None:
    for namespace in (NAMESPACE, NATIVE_NAMESPACE) if op in NATIVE_OP_NAMES else (NAMESPACE,):
        described = torch._C.parse_schema(f"{namespace}::{(OPS | LAYER_OPS)[op].schema}")
        assert getattr(getattr(torch.ops, namespace), op).default._schema == described


@pytest.mark.parametrize("op", NATIVE_OP_NAMES)
def test_the_library_has_every_op(op: str) -> None:
    for device in ("cpu", "cuda"):
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NATIVE_NAMESPACE}::{op}", device.upper())
        assert has == (device not in providers.library_errors)


def test_what_the_build_generates(tmp_path: Path) -> None:
    """A function and a registration for each op, with its arguments in order; and it checks each tensor of them."""
    script, description = ROOT / "cmake" / "generate_ops.py", ROOT / "python" / "latentkv" / "ops" / "description.py"
    subprocess.run([sys.executable, script, description, tmp_path], check=True)
    text = (tmp_path / "bound_ops.h").read_text()
    functions = dict(re.findall(r"inline void (\w+)\((.*)\) \{\n(?s:.*?)\n\}", text))
    bodies = dict(re.findall(r"inline void (\w+)\(.*\) \{\n((?s:.*?))\n\}", text))
    functions.pop("register_ops")
    assert list(functions) == list(NATIVE_OP_NAMES)
    for name in NATIVE_OP_NAMES:
        plain = OPS[name].plain
        assert re.findall(r"(\w+)(?:,|$)", re.sub(r"<[^<>]*(<[^<>]*>)?[^<>]*>", "", functions[name])) == [
            p.name for p in plain
        ]
        assert f'library.impl("{name}", TORCH_BOX(&{name}));' in text
        for argument in plain:
            if argument.type.startswith("Tensor"):
                assert re.search(rf'no_gradients\(.*"{argument.name}"', bodies[name]), (name, argument.name)
            assert (f"written({argument.name});" in bodies[name]) == ("!" in argument.type)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("name", ["reference", "public"])
def test_the_fake_of_attention_has_the_strides_of_the_result(name: str, strides: str, device: str) -> None:
    call = valid("mla_decode", device)
    q = call["q"]
    if strides == "transposed":
        call["q"] = q.transpose(0, 1).contiguous().transpose(0, 1)
    elif strides == "sliced":
        call["q"] = torch.cat([q, q], -1)[..., : q.shape[-1]]
    results = getattr(providers, name)._op("mla_decode")(*call.values())
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in call.values()]
    if strides == "transposed":
        meta[0] = q.to("meta").transpose(0, 1).contiguous().transpose(0, 1)
    fakes = torch.ops.latentkv.mla_decode(*meta)
    for fake, result in zip(fakes, results, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (result.shape, result.stride(), result.dtype)

"""The pictures of docs/layouts.md are what the script draws, and the script draws where the ops write."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from latentkv.cache.backends import BACKENDS
from latentkv.cache.layouts import CacheLayout, MLACache
from latentkv.testing import reference

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("draw_layouts", DOCS / "draw_layouts.py")
draw = importlib.util.module_from_spec(spec)
sys.modules["draw_layouts"] = draw  # dataclasses look their module up
spec.loader.exec_module(draw)

PICTURES = draw.pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_the_committed_picture_is_what_the_script_draws(name: str) -> None:
    assert (DOCS / "layouts" / name).read_text("utf-8") == PICTURES[name], "run python docs/draw_layouts.py"
    ElementTree.fromstring(PICTURES[name])


def test_the_page_shows_every_picture_and_names_every_backend() -> None:
    page = (DOCS / "layouts.md").read_text("utf-8")
    assert {path.name for path in (DOCS / "layouts").iterdir()} == set(PICTURES)
    for name in PICTURES:
        assert f"(layouts/{name})" in page
    for backend in BACKENDS:
        assert f"`{backend}`" in page


def test_every_layout_of_a_backend_has_a_picture() -> None:
    """But for fp8 in two tensors, of which the page says that it is half as wide, and fp32, twice as wide."""
    shown = {(x.row_bytes, x.placement, x.packed) for x in draw.LAYOUTS.values()}
    layouts = [x for backend in BACKENDS.values() for x in backend.layouts if x.format != "fp32"]
    assert {(x.row_bytes, x.placement, x.packed) for x in layouts} - shown == {(576, "split", None)}


Write = Callable[[Sequence[torch.Tensor]], None]


def storage(t: torch.Tensor) -> torch.Tensor:
    """All bytes behind a tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def same(a: torch.Tensor, b: torch.Tensor) -> set[int]:
    return set((storage(a) == storage(b)).nonzero().flatten().tolist())


def written(tensors: Sequence[torch.Tensor], write: Write) -> list[set[int]]:
    """The bytes behind each tensor that a write sets, whatever they were."""
    results = []
    for poison in (0x00, 0xFF):
        for t in tensors:
            storage(t).fill_(poison)
        write(tensors)
        results.append([storage(t).clone() for t in tensors])
    return [same(a, b) for a, b in zip(*results, strict=True)]


def drawn(blocks: Sequence[draw.Block], *kinds: str) -> list[set[int]]:
    """The bytes of the entry that the pictures show, in block 1 of each tensor."""
    entries = [[p.at(draw.ENTRY) for p in block.pieces if p.kind in kinds] for block in blocks]
    return [
        {block.size + byte for p in entry for byte in range(p.start, p.start + p.size)}
        for block, entry in zip(blocks, entries, strict=True)
    ]


@pytest.mark.parametrize("name", draw.LAYOUTS)
def test_a_row_is_written_where_it_is_drawn(name: str) -> None:
    layout: CacheLayout = draw.LAYOUTS[name]
    blocks, slot = draw.blocks_of(layout), torch.tensor([layout.block_size + draw.ENTRY])
    torch.manual_seed(0)
    latent = torch.randn(1, layout.kv_lora_rank).bfloat16()
    ropes = torch.randn(2, 1, layout.rope_dim).bfloat16().unbind()

    def write(rope: torch.Tensor) -> Write:
        return lambda tensors: reference.write_cache_(latent, rope, slot, MLACache.wrap(tensors, layout))

    tensors, others = (layout.allocate(2, "cpu").tensors for _ in range(2))
    assert written(tensors, write(ropes[0])) == drawn(blocks, "latent", "rope", "scales")
    written(others, write(ropes[1]))
    for a, b, block, rope in zip(tensors, others, blocks, drawn(blocks, "rope"), strict=True):
        changed = set(range(2 * block.size)) - same(a, b)
        assert changed <= rope and bool(changed) == bool(rope)


def test_an_indexer_key_is_written_where_it_is_drawn() -> None:
    key, slot = torch.randn(1, 128), torch.tensor([64 + draw.ENTRY])

    def write(tensors: Sequence[torch.Tensor]) -> None:
        reference.write_indexer_cache_(key, None, None, slot, tensors[0], is_neox=True)

    block = draw.indexer_block(64)
    assert written([torch.zeros(2, 64, 132, dtype=torch.uint8)], write) == drawn([block], "latent", "scales")


def test_tokens_are_converted_as_drawn() -> None:
    small, large = CacheLayout(block_size=16, format="fp32"), CacheLayout(block_size=64, format="fp32")
    src, dst = small.allocate(8, "cpu"), large.allocate(2, "cpu")
    src.data[...] = torch.arange(src.num_slots).view(8, 16, 1) + 1.0
    numbers = [torch.tensor(x) for x in (draw.SRC_BLOCKS, draw.DST_BLOCKS)]
    reference.convert_cache_(src, dst, src_blocks=numbers[0], dst_blocks=numbers[1])
    expected = torch.zeros(dst.num_slots)
    for start in range(0, 80, 16):
        home = draw.DST_BLOCKS[start // 64] * 64 + start % 64
        expected[home : home + 16] = torch.arange(16) + draw.SRC_BLOCKS[start // 16] * 16 + 1.0
    assert torch.equal(dst.data[..., 0].flatten(), expected)

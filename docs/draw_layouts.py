"""Draws the pictures of docs/layouts.md into docs/layouts, to scale, from the library's own measures of its layouts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from latentkv.cache.layouts import FORMATS, CacheLayout, MLACache
from latentkv.ops.checks import INDEX_DIM

Kind = Literal["latent", "rope", "scales", "rest"]

# Of middling brightness: they stand on a white page and on a black one.
COLOURS = {"latent": "#2f6fb5", "rope": "#b3591b", "scales": "#2e8540", "rest": "#757e88"}
TOKENS = ("#2f6fb5", "#b3591b", "#2e8540", "#8250b4", "#a8385d")
STYLE = "text{font:11px sans-serif;fill:#757e88;text-anchor:middle}.in{fill:#fff}"
STYLE += ".l{text-anchor:start}.r{text-anchor:end}"

LEFT, WIDTH, HEIGHT = 20, 840, 26  # of bars, in pixels
GAP = 20
ROW_SCALE = (WIDTH - GAP) / CacheLayout().row_bytes  # pixels of a row's byte, in all pictures
ENLARGED = 16  # times that for the scales of one entry
ENTRY = 6  # the one that is shown

# ------------------------------------------------------------------------------------------------------- the bytes


@dataclass(frozen=True)
class Piece:
    """A part of every entry of a block: entry t has it at byte ``start + t * stride``."""

    kind: Kind
    start: int
    size: int
    stride: int
    text: str
    tile: int = 0  # bytes that share a scale

    def at(self, entry: int) -> Piece:
        """The part of one entry."""
        return replace(self, start=self.start + entry * self.stride)


@dataclass(frozen=True)
class Block:
    """A block of one tensor: its parts, and its bytes with the padding."""

    pieces: tuple[Piece, ...]
    size: int

    @property
    def runs(self) -> list[list[Piece]]:
        """The parts that lie together for every entry: in one run of bytes all entries have them, one by one."""
        return [
            [p for p in self.pieces if p.stride == stride] for stride in dict.fromkeys(p.stride for p in self.pieces)
        ]


def blocks_of(layout: CacheLayout) -> tuple[Block, ...]:
    """A block of each tensor of a cache."""
    p, size, (latent, rope) = layout.packed, layout.block_size, (layout.kv_lora_rank, layout.rope_dim)
    if p is None:
        item, name = layout.dtype.itemsize, layout.format.removeprefix("fp8_")
        parts: tuple[tuple[Kind, int], ...] = (("latent", latent), ("rope", rope))
        tensors = (parts,) if layout.placement == "concat" else tuple((part,) for part in parts)
        blocks = []
        for (_, _, width), tensor in zip(layout.shapes(1), tensors, strict=True):
            pieces, start, stride = [], 0, width * item
            for kind, count in tensor:
                pieces.append(Piece(kind, start, count * item, stride, f"{count} {name}"))
                start += count * item
            blocks.append(Block(tuple(pieces), size * stride))
        return tuple(blocks)
    scales, tiles = p.row_bytes - latent - 2 * rope, latent // p.tile
    codes = Piece("latent", 0, latent, p.row_bytes, f"{latent} e4m3fn", p.tile)
    if p.block_multiple is None:
        pieces = [
            codes,
            Piece("scales", latent, scales, p.row_bytes, f"{tiles} fp32"),
            Piece("rope", latent + scales, 2 * rope, p.row_bytes, f"{rope} bf16"),
        ]
        return (Block(tuple(pieces), size * p.row_bytes),)
    stride = latent + 2 * rope
    pieces = [
        replace(codes, stride=stride),
        Piece("rope", latent, 2 * rope, stride, f"{rope} bf16"),
        Piece("scales", size * stride, scales, scales, f"{tiles} exponents, 0", 1),
    ]
    return (Block(tuple(pieces), -(-size * p.row_bytes // p.block_multiple) * p.block_multiple),)


def indexer_block(size: int) -> Block:
    """A block of DeepSeek-V3.2's indexer keys."""
    codes = Piece("latent", 0, INDEX_DIM, INDEX_DIM, f"{INDEX_DIM} e4m3fn")
    return Block((codes, Piece("scales", size * INDEX_DIM, 4, 4, "fp32")), size * (INDEX_DIM + 4))


# ----------------------------------------------------------------------------------------------------- the drawing


@dataclass(frozen=True)
class Bar:
    """The bytes (or tokens) ``start`` .. ``end`` from left to right."""

    x: float
    y: float
    start: int
    end: int
    scale: float

    def at(self, byte: int) -> float:
        """Where a byte begins."""
        return self.x + (byte - self.start) * self.scale


def number(x: float) -> str:
    """A coordinate."""
    return f"{x:.2f}".rstrip("0").rstrip(".")


@dataclass
class Picture:
    """The elements of an SVG file."""

    items: list[str] = field(default_factory=list)
    bottom: float = 0

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        """A line of text; ``style``: "in" a coloured bar, "l"eft or "r"ight of x."""
        place = f'x="{number(x)}" y="{number(y)}"'
        self.items.append(f'<text {place} class="{style}">{text}</text>' if style else f"<text {place}>{text}</text>")
        self.bottom = max(self.bottom, y + 6)

    def area(self, bar: Bar, spans: Sequence[tuple[int, int]], colour: str, opacity: float = 1) -> None:
        """Spans (start, size) of a bar, filled."""
        path = "".join(
            f"M{number(bar.at(start))} {number(bar.y)}h{number(size * bar.scale)}v{HEIGHT}h-{number(size * bar.scale)}z"
            for start, size in spans
        )
        self.items.append(f'<path d="{path}" fill="{colour}" opacity="{opacity:g}"/>')
        self.bottom = max(self.bottom, bar.y + HEIGHT)

    def lines(self, bar: Bar, bytes: Iterable[int], notch: int = HEIGHT // 2) -> None:
        """Thin lines across a bar, or notches from above and below."""
        line = f"v{notch}m0 {HEIGHT - 2 * notch}v{notch}"
        path = "".join(f"M{number(bar.at(byte))} {number(bar.y)}{line}" for byte in bytes)
        self.items.append(f'<path d="{path}" stroke="#fff" stroke-width=".6"/>')

    def zoom(self, upper: Bar, lower: Bar, start: int, end: int, colour: str = "#757e88") -> None:
        """A faint area from a part of one bar down to the same part of another."""
        corners = [(upper.at(start), upper.y + HEIGHT), (upper.at(end), upper.y + HEIGHT)]
        corners += [(lower.at(end), lower.y), (lower.at(start), lower.y)]
        points = " ".join(f"{number(x)},{number(y)}" for x, y in corners)
        self.items.append(f'<polygon points="{points}" fill="{colour}" opacity=".2"/>')

    def offsets(self, bar: Bar, ticks: Sequence[tuple[int, str]], y: float) -> None:
        """What to write at some bytes of a bar. Neighbours lean away from each other."""
        places = [bar.at(byte) for byte, _ in ticks]
        for i, (x, (_, text)) in enumerate(zip(places, ticks, strict=True)):
            near_last, near_next = (
                abs(x - other) < 60 for other in (places[max(i - 1, 0)], places[(i + 1) % len(places)])
            )
            style = "r" if near_next and 0 < i < len(ticks) - 1 else "l" if i == 0 or near_last else ""
            self.text(x, y, text, style or ("r" if i == len(ticks) - 1 else ""))

    def piece(self, bar: Bar, piece: Piece) -> None:
        """A part of one entry, with its name: inside where there is room, else above."""
        self.area(bar, [(piece.start, piece.size)], COLOURS[piece.kind])
        if piece.tile:
            tiles = range(piece.start + piece.tile, piece.start + piece.size, piece.tile)
            self.lines(bar, tiles, notch=5)
        room, full = piece.size * bar.scale / 6, f"{piece.kind}: {piece.text}"
        inside = next((words for words in (full, piece.text) if len(words) < room), None)
        x = bar.at(piece.start) + piece.size * bar.scale / 2
        self.text(x, bar.y + 17 if inside else bar.y - 5, inside or full, "in" if inside else "")

    def legend(self, kinds: Iterable[Kind]) -> None:
        """The colours, at the top right."""
        x = LEFT + WIDTH
        for kind in reversed(list(kinds)):
            self.text(x, 12, kind, "r")
            x -= 6 * len(kind) + 17
            self.items.append(f'<rect x="{x}" y="3" width="10" height="10" fill="{COLOURS[kind]}"/>')
            x -= 10

    def svg(self) -> str:
        """The file."""
        start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 60} {number(self.bottom + 4)}">'
        return "\n".join([start, f"<style>{STYLE}</style>", *self.items, "</svg>\n"])


def draw_blocks(blocks: Sequence[Block], entries: int) -> Picture:
    """A block of every tensor, side by side, and under it the parts of one entry that lie together."""
    picture, room = Picture(), WIDTH - GAP * (len(blocks) - 1)
    scale, x, row_x = room / sum(block.size for block in blocks), float(LEFT), float(LEFT)
    tensors = " in two tensors" if len(blocks) == 2 else ""
    sizes = " + ".join(str(block.size) for block in blocks)
    picture.text(LEFT, 12, f"block of {entries} entries: {sizes} bytes{tensors}", "l")
    picture.legend(dict.fromkeys(p.kind for block in blocks for p in block.pieces))
    for block in blocks:
        bar, runs = Bar(x, 38, 0, block.size, scale), block.runs
        for run in runs:
            spans = [(t.start, t.size) for p in run for t in map(p.at, range(entries))]
            for p in run:
                picture.area(bar, [(p.at(t).start, p.size) for t in range(entries)], COLOURS[p.kind])
            if run[0].stride * scale > 2:
                picture.lines(bar, [start for start, _ in spans[1:entries]])
        used = runs[-1][-1].at(entries).start
        if used < block.size:
            picture.area(bar, [(used, block.size - used)], COLOURS["rest"], 0.5)
        starts = [run[0].start for run in runs] + [block.size]
        picture.offsets(bar, [(byte, str(byte)) for byte in starts], 32)
        for run, end in zip(runs, starts[1:], strict=True):
            draw = draw_footer if run[0].start else draw_entry
            row_x = draw(picture, bar, Bar(row_x, 104, run[0].start, end, ROW_SCALE), run, entries) + GAP
        x = bar.at(block.size) + GAP
    return picture


def draw_entry(picture: Picture, block: Bar, run_bar: Bar, run: Sequence[Piece], entries: int) -> float:
    """The parts of one entry that lie together, below a bar that has them; returns where they end."""
    first, stride = run[0].at(ENTRY).start, run[0].stride
    bar = replace(run_bar, start=first, end=first + stride)
    picture.zoom(block, bar, bar.start, bar.end)
    for p in run:
        picture.piece(bar, p.at(ENTRY))
    ticks = [(p.at(ENTRY).start, f"+{p.start - run[0].start}") for p in run]
    picture.offsets(bar, [*ticks, (bar.end, f"+{stride}")], bar.y + HEIGHT + 13)
    where = f"{run[0].start} + {stride} t" if run[0].start else f"{stride} t"
    picture.text(bar.x, bar.y + HEIGHT + 28, f"entry t, at byte {where}", "l")
    return bar.at(bar.end)


def draw_footer(picture: Picture, block: Bar, bar: Bar, run: Sequence[Piece], entries: int) -> float:
    """The scales of all entries and the padding, under them those of one entry; returns where they end."""
    used = run[0].at(entries).start
    picture.zoom(block, bar, bar.start, bar.end)
    picture.area(bar, [(bar.start, used - bar.start)], COLOURS[run[0].kind])
    picture.lines(bar, [run[0].at(t).start for t in range(1, entries)])
    if used < bar.end:
        picture.area(bar, [(used, bar.end - used)], COLOURS["rest"], 0.5)
        picture.text(bar.at(bar.end), bar.y - 5, f"{bar.end - used} bytes of padding", "r")
    picture.offsets(bar, [(byte, str(byte)) for byte in dict.fromkeys((bar.start, used, bar.end))], bar.y + HEIGHT + 13)
    below = Bar(bar.x, bar.y + HEIGHT + 40, bar.start, bar.end, ENLARGED * bar.scale)
    end = draw_entry(picture, bar, below, run, entries)
    picture.text(end + 10, below.y + 17, f"{ENLARGED} times as wide", "l")
    return bar.at(bar.end)


def draw_memory(picture: Picture, bar: Bar, cache: MLACache, title: str) -> None:
    """The storage behind a concat cache: its entries by their slots, and what belongs to none."""
    blocks, entries, _ = cache.data.shape
    item, strides, base = cache.data.element_size(), cache.data.stride(), cache.data.storage_offset()
    latent, rope = (n * cache.layout.dtype.itemsize for n in (cache.layout.kv_lora_rank, cache.layout.rope_dim))
    starts = [(base + b * strides[0] + t * strides[1]) * item for b in range(blocks) for t in range(entries)]
    picture.text(bar.x, bar.y - 6, title, "l")
    picture.area(bar, [(bar.start, bar.end - bar.start)], COLOURS["rest"], 0.35)
    picture.area(bar, [(start, latent) for start in starts], COLOURS["latent"])
    picture.area(bar, [(start + latent, rope) for start in starts], COLOURS["rope"])
    picture.lines(bar, starts)
    for slot, start in enumerate(starts):
        picture.text(bar.at(start) + latent * bar.scale / 2, bar.y + 17, str(slot), "in")


def draw_strides() -> Picture:
    """Ways in which an engine may lay out two blocks of four entries."""
    layout, picture = CacheLayout(block_size=4, format="fp8_e4m3fn"), Picture()
    (shape,) = layout.shapes(2)
    blocks, entries, width = shape

    def storage(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=layout.dtype, device="meta")

    plain = storage(blocks, 1, entries, width)
    padded = storage(blocks, entries * width + 256)[:, : entries * width].unflatten(1, (entries, width))
    wide = storage(blocks, entries, 640)
    layers = storage(blocks, 2, entries, width)[:, 1]
    cases = (
        (plain, f"[B, 4, {width}] or [B, 1, 4, {width}]: the same bytes"),
        (padded, "padded blocks: [B, 4, 576] in blocks 2560 bytes apart"),
        (wide, "wide entries: [B, 4, 640], of which a row takes 576"),
        (layers, f"the second of two layers in one storage: storage [B, 2, 4, {width}], cache storage[:, 1]"),
    )
    scale = WIDTH / max(t.untyped_storage().nbytes() for t, _ in cases)
    for i, (tensor, title) in enumerate(cases):
        bar = Bar(LEFT, 20 + 64 * i, 0, tensor.untyped_storage().nbytes(), scale)
        cache = MLACache.wrap(tensor, layout)
        draw_memory(picture, bar, cache, title)
        item = tensor.element_size()
        ticks = [(cache.data.storage_offset() + b * cache.data.stride(0)) * item for b in range(blocks)]
        picture.offsets(bar, [(byte, str(byte)) for byte in (*ticks, bar.end)], bar.y + HEIGHT + 12)
    return picture


def draw_pages() -> Picture:
    """The same bytes as blocks of entries and as pages of one."""
    layout, picture = CacheLayout(block_size=4, format="fp8_e4m3fnuz"), Picture()
    cache = layout.allocate(2, "cpu")
    pages = cache.pages_of_one
    bar = Bar(LEFT, 36, 0, cache.data.nbytes, WIDTH / cache.data.nbytes)
    draw_memory(picture, bar, cache, "")
    picture.text(bar.x, 12, f"the slots of data {list(cache.data.shape)}", "l")
    size = cache.data.stride(0) * cache.data.element_size()
    for b in range(cache.num_blocks):
        picture.text(bar.at(b * size) + size * bar.scale / 2, 30, f"block {b}")
    for page in range(len(pages)):
        start = page * pages.stride(0) * pages.element_size()
        x = bar.at(start) + pages.stride(0) * bar.scale / 2
        picture.text(x, bar.y + HEIGHT + 14, f"page {page}")
        picture.text(bar.at(start), bar.y + HEIGHT + 28, str(start))
    picture.text(bar.at(bar.end), bar.y + HEIGHT + 28, str(bar.end))
    picture.text(
        bar.x,
        bar.y + HEIGHT + 46,
        f"the pages of pages_of_one {list(pages.shape)}, and the bytes where they begin",
        "l",
    )
    return picture


SRC_BLOCKS, DST_BLOCKS = (
    (5, 2, 7, 0, 3),
    (1, 0),
)  # of convert_cache_'s picture: one run, from blocks of 16 to blocks of 64


def draw_conversion() -> Picture:
    """A run of tokens on its way from blocks of 16 to blocks of 64."""
    picture, small, large = Picture(), 16, 64
    tokens, capacity = min(small * len(SRC_BLOCKS), large * len(DST_BLOCKS)), large * len(DST_BLOCKS)
    scale = WIDTH / capacity
    src, run, dst = (Bar(LEFT, y, 0, n, scale) for y, n in ((36, capacity), (112, tokens), (188, capacity)))
    for bar in (src, dst):
        picture.area(bar, [(0, bar.end)], COLOURS["rest"], 0.35)
    for i, block in enumerate(SRC_BLOCKS):
        first, colour = i * small, TOKENS[i]
        moved = replace(src, x=src.at(block * small), start=first)  # the block, by its tokens
        picture.zoom(moved, run, first, first + small, colour)
        home = DST_BLOCKS[first // large] * large + first % large
        picture.zoom(run, replace(dst, x=dst.at(home), start=first), first, first + small, colour)
        for bar, start in ((src, block * small), (run, first), (dst, home)):
            picture.area(bar, [(start, small)], colour)
        picture.text(run.at(first) + small * scale / 2, run.y + 17, f"{first} .. {first + small - 1}", "in")
        picture.text(dst.at(home) + small * scale / 2, dst.y + 17, f"{first} .. {first + small - 1}", "in")
    for bar, size in ((src, small), (dst, large)):
        picture.lines(bar, range(size, bar.end, size))
    for block in range(capacity // small):
        used = block in SRC_BLOCKS
        picture.text(
            src.at(block * small) + small * scale / 2, src.y + (17 if used else -6), str(block), "in" if used else ""
        )
    picture.text(LEFT, 12, f"src, blocks of {small}: src_blocks = {list(SRC_BLOCKS)}", "l")
    picture.text(run.at(tokens) + 8, run.y + 17, f"tokens 0 .. {tokens - 1} of the run", "l")
    for block in range(len(DST_BLOCKS)):
        picture.text(dst.at(block * large) + large * scale / 2, dst.y + HEIGHT + 14, f"block {block}")
    picture.text(
        LEFT,
        dst.y + HEIGHT + 32,
        f"dst, blocks of {large}: dst_blocks = {list(DST_BLOCKS)}; what is gray stays as it is",
        "l",
    )
    return picture


# The pictures of blocks: what they are drawn from.
LAYOUTS = {
    "concat-16-bit": CacheLayout(format="bf16"),
    "concat-fp8": CacheLayout(format="fp8_e4m3fn"),
    "split-16-bit": CacheLayout(format="bf16", placement="split"),
    **{name: CacheLayout(*f.packed.dims, format=name) for name, f in FORMATS.items() if f.packed},
}


def pictures() -> dict[str, str]:
    """Every file of docs/layouts by its name."""
    drawn = {name: draw_blocks(blocks_of(layout), layout.block_size) for name, layout in LAYOUTS.items()}
    drawn["indexer"] = draw_blocks([indexer_block(64)], 64)
    drawn |= {"strides": draw_strides(), "pages-of-one": draw_pages(), "conversion": draw_conversion()}
    return {f"{name}.svg": picture.svg() for name, picture in drawn.items()}


if __name__ == "__main__":
    for name, svg in pictures().items():
        Path(__file__).with_name("layouts").joinpath(name).write_text(svg, "utf-8")

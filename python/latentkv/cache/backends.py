"""Which attention backend reads the cache, and the layout that it wants.

Everything about a backend stands in its one entry of :data:`BACKENDS`; their order is the order of choice.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .layouts import CacheLayout, FormatName, Placement, resolve_format
from .platform import Kind, Platform

__all__ = ["BACKENDS", "Backend", "BackendName", "Selection", "aiter_problem", "layout_for", "select_backend"]


def _one_of(values: Iterable[object]) -> str:
    """``a, b or c``."""
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last


def aiter_problem() -> str | None:
    """Why AITER's MLA decode reader cannot be imported in this Python environment; None where it can.

    AITER's distribution is ``amd-aiter``. An unrelated package of async iterators is called ``aiter`` too, so
    the file that ``import aiter`` would run must be one that ``amd-aiter`` installed, and nobody else (an
    editable or ``develop`` install counts). Nothing is imported.
    """
    try:
        return _aiter_problem()
    except Exception as error:  # whatever a damaged installation throws
        return f"package: amd-aiter is damaged, reinstall it: {type(error).__name__}: {error}"


def _aiter_problem() -> str | None:
    try:
        spec = importlib.util.find_spec("aiter")
    except ValueError:  # a module without a spec was put into sys.modules
        spec = None
    init = Path(spec.origin).resolve() if spec and spec.origin else None
    amd_aiter = list(metadata.distributions(name="amd-aiter"))
    if not amd_aiter:
        stranger = f" ({init} is another project's)" if init else ""
        return f"package: amd-aiter is not installed in this Python environment{stranger}"
    if init is None:
        return "package: amd-aiter is installed, but there is no module aiter to import"
    if not any(_owns(d, init) for d in amd_aiter):
        return f"package: amd-aiter is installed, but import aiter finds {init}, another project's"
    if any(_owns(d, init) for d in metadata.distributions(name="aiter")):
        return f"package: both amd-aiter and aiter installed {init}; uninstall aiter, then reinstall amd-aiter"
    mla = init.with_name("mla.py")
    if not mla.is_file() or not re.search(r"^def mla_decode_fwd\b", mla.read_text("utf-8"), re.MULTILINE):
        return f"package: amd-aiter has no decode reader, expected mla_decode_fwd in {mla}"
    return None


def _owns(dist: metadata.Distribution, init: Path) -> bool:
    """Whether ``init``, the resolved path of some ``aiter/__init__.py``, comes from ``dist``."""
    own = [Path(str(dist.locate_file(f))) for f in dist.files or () if f.match("aiter/__init__.py")]
    direct = json.loads(dist.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable"):
        own.append(Path(url2pathname(urlsplit(direct["url"]).path), "aiter", "__init__.py"))
    return any(path.resolve() == init for path in own)


_16_BIT: tuple[FormatName, ...] = ("bf16", "fp16")
_E4M3: tuple[FormatName, ...] = ("fp8_e4m3fn", "fp8_e4m3fnuz")  # of the two, a platform reads only its own
_ANY = range(1, 1 << 31)
_MULTIPLE_OF_16 = range(16, 1 << 31, 16)


BackendName = Literal[
    "FLASHINFER_MLA", "CUTLASS_MLA", "FLASH_ATTN_MLA", "FLASHMLA", "FLASHINFER_PAGED_MLA", "ROCM_AITER_MLA",
    "TRITON_MLA", "CPU_MLA", "FLASHMLA_SPARSE", "V4_FLASHMLA_SPARSE",
]  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """What one attention backend can read, and where it runs.

    Attributes:
        name: vLLM's name for it.
        kinds: the kinds of platform that it runs on.
        archs: the architectures, as :meth:`Platform.is_a` reads them; empty for all of those kinds.
        formats: the row formats that it reads.
        block_sizes: the block sizes that it reads.
        block_size: the one to use when nobody asks for another.
        placement: how latent and rope lie.
        dims: the only (kv_lora_rank, rope_dim) that its published kernels take; None for any.
        head_tile: fewer query heads are padded to this many, more must be a multiple of it.
        sparse: whether it serves models with sparse attention, and only those.
        on_request: architectures where it runs, but has to be asked for by name.
        problem: tells why its package cannot be used; no function where the reader is the engine's own.
    """

    name: BackendName
    kinds: tuple[Kind, ...]
    archs: tuple[str, ...] = ()
    formats: tuple[FormatName, ...] = _16_BIT
    block_sizes: range | tuple[int, ...] = _ANY
    block_size: int = 64
    placement: Placement = "concat"
    dims: tuple[int, int] | None = (512, 64)
    head_tile: int = 1
    sparse: bool = False
    on_request: tuple[str, ...] = ()
    problem: Callable[[], str | None] | None = None

    def runs_on(self, platform: Platform) -> bool:
        """Whether its kernels exist for ``platform``."""
        return platform.kind in self.kinds and (not self.archs or any(map(platform.is_a, self.archs)))

    @property
    def layouts(self) -> tuple[CacheLayout, ...]:
        """A layout for each of its formats, in its usual block size; DeepSeek-V3's dimensions where any will do."""
        dims = self.dims or (512, 64)
        return tuple(CacheLayout(*dims, self.block_size, format, self.placement) for format in self.formats)


# In order of choice: of the entries for its kind, a platform gets the first that fits.
BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "FLASHINFER_MLA",  # FlashInfer's trtllm-gen kernels
            kinds=("cuda",),
            archs=("sm_100",),
            formats=(*_16_BIT, "fp8_e4m3fn"),
            block_sizes=(32, 64),
        ),
        Backend(
            "CUTLASS_MLA",
            kinds=("cuda",),
            archs=("sm_100",),
            formats=(*_16_BIT, "fp8_e4m3fn"),
            block_sizes=(128,),
            block_size=128,
        ),
        Backend(
            "FLASH_ATTN_MLA",  # FlashAttention-3; its fast path wants blocks of 64
            kinds=("cuda",),
            archs=("sm_90",),
            block_sizes=_MULTIPLE_OF_16,
        ),
        Backend(
            "FLASHMLA",
            kinds=("cuda",),
            archs=("sm_90", "sm_100"),
            formats=(*_16_BIT, "fp8_e4m3fn"),
            block_sizes=(64,),
        ),
        Backend(
            "FLASHINFER_PAGED_MLA",  # our name for FlashInfer's BatchMLAPagedAttentionWrapper (fa2, fa3)
            kinds=("cuda",),
            archs=("sm_80+",),
            formats=(*_16_BIT, "fp8_e4m3fn"),
            placement="split",
            on_request=("sm_100", "sm_120"),
        ),
        Backend(
            "ROCM_AITER_MLA",  # its reader takes MLACache.pages_of_one
            kinds=("rocm",),
            archs=("gfx942", "gfx950"),
            formats=(*_16_BIT, *_E4M3, "fp8_e5m2"),
            head_tile=16,
            problem=aiter_problem,
        ),
        Backend(
            "TRITON_MLA",
            kinds=("cuda", "rocm"),
            formats=(*_16_BIT, *_E4M3),
            block_sizes=_MULTIPLE_OF_16,
            dims=None,
        ),
        Backend(
            "CPU_MLA",
            kinds=("cpu",),
            formats=(*_16_BIT, "fp32"),
            block_sizes=(16,),
            block_size=16,
            dims=None,
        ),
        Backend(
            "FLASHMLA_SPARSE",  # DeepSeek-V3.2
            kinds=("cuda",),
            archs=("sm_90", "sm_100"),
            formats=("fp8_ds_mla",),
            block_sizes=(64,),
            sparse=True,
        ),
        Backend(
            "V4_FLASHMLA_SPARSE",  # DeepSeek-V4: FlashMLA's readers of "MODEL1" rows
            kinds=("cuda",),
            archs=("sm_90", "sm_100"),
            formats=("fp8_model1",),
            block_sizes=(64,),
            dims=(448, 64),
            sparse=True,
        ),
    )
}


def _layout_problems(
    backend: Backend, dims: tuple[int, int], format: FormatName, block_size: int | None, platform: Platform | None
) -> list[str]:
    """Why ``backend`` cannot read such a cache on ``platform`` (None: anywhere); empty if it can."""
    found = []
    foreign = {f for f in _E4M3 if platform and f != platform.fp8_format}
    readable = [f for f in backend.formats if f not in foreign]
    if format not in readable:
        found.append(f"format: expected {_one_of(readable)}, got {format}")
    if block_size is not None and block_size not in backend.block_sizes:
        sizes = backend.block_sizes
        expected = f"a multiple of {sizes.step}" if isinstance(sizes, range) else _one_of(sizes)
        expected = "at least 1" if sizes is _ANY else expected
        found.append(f"block_size: expected {expected}, got {block_size}")
    if backend.dims not in (None, dims):
        found.append(f"(kv_lora_rank, rope_dim): expected {backend.dims}, got {dims}")
    return found


def _problems(backend: Backend, platform: Platform, heads: int, sparse: bool, named: bool) -> list[str]:
    """Why ``backend`` does not fit ``platform`` and the model, whatever the layout; empty if it does."""
    found = []
    if sparse != backend.sparse:
        found.append(f"sparse: expected {backend.sparse}, got {sparse}")
    if heads > backend.head_tile and heads % backend.head_tile:
        tile = backend.head_tile
        found.append(f"heads: expected 1..{tile - 1} or a multiple of {tile}, got {heads}")
    if not named and any(map(platform.is_a, backend.on_request)):
        found.append(f"prefer: on {platform} it has to be asked for by name")
    if backend.problem and (problem := backend.problem()):
        found.append(problem)
    return found


def _layout(backend: Backend, dims: tuple[int, int], format: FormatName, block_size: int | None) -> CacheLayout:
    size = backend.block_size if block_size is None else block_size
    return CacheLayout(*dims, size, format, backend.placement)


def layout_for(
    backend: BackendName,
    *,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
    format: FormatName = "bf16",
    block_size: int | None = None,
) -> CacheLayout:
    """The cache layout that ``backend`` reads, whatever machine it will run on.

    Args:
        backend: a key of :data:`BACKENDS`.
        kv_lora_rank: L, elements of the latent vector.
        rope_dim: R, elements of the shared rope key.
        format: a format that the backend reads on some architecture; ``"fp8"`` is this machine's e4m3 kind.
        block_size: rows in a block; None for the backend's usual size.

    Raises:
        ValueError: ``backend`` is unknown, or it cannot read such a cache.
    """
    if backend not in BACKENDS:
        raise ValueError(f"layout_for: backend: expected {_one_of(BACKENDS)}, got {backend!r}")
    entry, cache = BACKENDS[backend], ((kv_lora_rank, rope_dim), resolve_format(format), block_size)
    if problems := _layout_problems(entry, *cache, platform=None):
        raise ValueError(f"layout_for: {backend}: {'; '.join(problems)}")
    return _layout(entry, *cache)


@dataclass(frozen=True)
class Selection:
    """A chosen attention backend. Printing it tells the whole decision.

    Attributes:
        name: the backend, a key of :data:`BACKENDS`.
        layout: the cache layout that it reads.
        reasons: by name, in the order tried: why each one was passed over, and last why this one was chosen.
        platform: the platform asked about.
    """

    name: BackendName
    layout: CacheLayout
    reasons: Mapping[str, str] = field(hash=False)
    platform: Platform

    def __str__(self) -> str:
        shapes = " + ".join(f"[B, {size}, {width}]" for _, size, width in self.layout.shapes(0))
        title = f"{self.name} for {self.platform}: {self.layout.format}, {self.layout.placement} {shapes}"
        return _report(title, self.reasons)


def _report(title: str, reasons: Mapping[str, str]) -> str:
    return "\n".join([title, *(f"  {name}: {reason}" for name, reason in reasons.items())])


def select_backend(
    platform: Platform | None = None,
    *,
    heads: int,
    format: FormatName = "bf16",
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
    block_size: int | None = None,
    sparse: bool = False,
    prefer: BackendName | None = None,
) -> Selection:
    """The attention backend to write the cache for, with its layout and the reasons.

    A backend asked for by name is taken or the call fails: the environment variable ``LATENTKV_BACKEND``, which
    overrides, else ``prefer``. With neither it is the first of :data:`BACKENDS` that fits.

    Args:
        platform: the machine to ask about; None for this one. AITER, the only reader that is looked up as a
            package, is always looked for in this Python environment: ask inside the image that will run, or
            take ``layout_for("ROCM_AITER_MLA")`` where you know that it will be there.
        heads: H, query heads on one device, at least 1.
        format: a format name; ``"fp8"`` is the e4m3 kind of ``platform``.
        kv_lora_rank: L, elements of the latent vector.
        rope_dim: R, elements of the shared rope key.
        block_size: rows in a block where the engine fixes it; None for the chosen backend's usual size.
        sparse: whether the model's attention is sparse (DeepSeek-V3.2, DeepSeek-V4).
        prefer: the one backend to use, unless ``LATENTKV_BACKEND`` names one.

    Raises:
        ValueError: an argument is out of range, the backend asked for does not fit, or none does; the message
            tells why for every backend tried.
    """
    if heads < 1:
        raise ValueError(f"select_backend: heads: expected at least 1, got {heads}")
    platform = platform or Platform.detect()
    cache = ((kv_lora_rank, rope_dim), resolve_format(format, platform), block_size)
    override = os.environ.get("LATENTKV_BACKEND")
    wish, source = (override, "LATENTKV_BACKEND") if override else (prefer, "prefer")
    if wish and wish not in BACKENDS:
        raise ValueError(f"select_backend: {source}: expected {_one_of(BACKENDS)}, got {wish!r}")

    reasons: dict[str, str] = {}
    for backend in [BACKENDS[wish]] if wish else BACKENDS.values():
        if not wish and platform.kind not in backend.kinds:
            continue
        if not backend.runs_on(platform):
            problems = [f"platform: expected {_one_of(backend.archs or backend.kinds)}, got {platform}"]
        else:
            problems = _problems(backend, platform, heads, sparse, named=bool(wish))
            problems += _layout_problems(backend, *cache, platform)
        if not problems:
            reasons[backend.name] = f"chosen: {f'asked for by {source}' if wish else 'the first that fits'}"
            return Selection(backend.name, _layout(backend, *cache), reasons, platform)
        if wish:
            raise ValueError(f"select_backend: {source}: {wish} does not fit {platform}: {'; '.join(problems)}")
        reasons[backend.name] = f"passed over: {'; '.join(problems)}"
    raise ValueError(_report(f"select_backend: no attention backend fits {platform}", reasons))

"""Platform dispatch: which attention backend is chosen where, with which layout, and why."""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from latentkv.cache.backends import BACKENDS, aiter_problem, layout_for, select_backend
from latentkv.cache.layouts import FORMATS, CacheLayout
from latentkv.cache.platform import Platform, has_code_for, installed_gpus

SM80, SM86, SM89, SM90, SM100, SM103, SM120 = (Platform("cuda", f"sm_{n}") for n in (80, 86, 89, 90, 100, 103, 120))
GFX90A, GFX942, GFX950 = (Platform("rocm", f"gfx{n}") for n in ("90a", "942", "950"))
CPU = Platform("cpu")
NVIDIA = (SM80, SM86, SM89, SM90, SM100, SM103, SM120)
AMD = (GFX90A, GFX942, GFX950)

READER = "def mla_decode_fwd(q, kv_buffer, o):\n    raise AssertionError('imported')\n"


# --------------------------------------------------------------------------------------- fake installations


class Site:
    """A folder on sys.path that distributions are installed into, as pip lays them out."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path.mkdir(parents=True)
        monkeypatch.syspath_prepend(str(path))
        self.path = path

    def files(self, files: dict[str, str], root: Path | None = None) -> None:
        for name, text in files.items():
            file = (root or self.path) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        importlib.invalidate_caches()

    def distribution(self, name: str, owned: list[str], direct_url: dict[str, object] | None = None) -> None:
        info = f"{name}-1.0.dist-info"
        self.files(
            {
                f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
                f"{info}/RECORD": "".join(f"{f},,\n" for f in [*owned, f"{info}/METADATA"]),
                **({f"{info}/direct_url.json": json.dumps(direct_url)} if direct_url else {}),
            }
        )

    def aiter(self, dist: str = "amd_aiter") -> None:
        """The real thing: importing it fails the test, looking at it does not."""
        self.files({"aiter/__init__.py": "raise AssertionError('imported')\n", "aiter/mla.py": READER})
        self.distribution(dist, ["aiter/__init__.py", "aiter/mla.py"])

    def decoy(self) -> None:
        """The package of async iterators."""
        self.files({"aiter/__init__.py": "", "aiter/map_aiter.py": ""})
        self.distribution("aiter", ["aiter/__init__.py", "aiter/map_aiter.py"])


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENTKV_BACKEND", raising=False)
    if aiter_problem() is None:
        pytest.skip("AITER is installed here")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path / "site", monkeypatch)


# ------------------------------------------------------------------------------------------------- Platform


def test_platform_is_a_value() -> None:
    assert Platform("cuda", "sm_90") == Platform("cuda", "sm_90a") != Platform("cuda", "sm_100")
    assert Platform("rocm", "gfx942:sramecc+:xnack-") == GFX942
    assert len({Platform("cpu"), Platform("cpu", "")}) == 1
    assert [str(p) for p in (SM90, GFX942, CPU)] == ["cuda sm_90", "rocm gfx942", "cpu"]


@pytest.mark.parametrize(
    ("kind", "arch", "message"),
    [
        ("hip", "gfx942", "kind: expected one of cuda, rocm, cpu, got 'hip'"),
        ("", "", "kind: expected one of cuda, rocm, cpu, got ''"),
        ("cuda", "90", "arch: expected a name like sm_90 for cuda, got '90'"),
        ("cuda", "gfx942", "arch: expected a name like sm_90 for cuda, got 'gfx942'"),
        ("rocm", "sm_90", "arch: expected a name like gfx942 for rocm, got 'sm_90'"),
    ],
)
def test_platform_rejects(kind: str, arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Platform(kind, arch)  # type: ignore[arg-type]


def test_fp8_format() -> None:
    fnuz = {Platform("rocm", a) for a in ("gfx940", "gfx941", "gfx942")}
    assert {p for p in (*NVIDIA, *AMD, CPU, *fnuz) if p.fp8_format == "fp8_e4m3fnuz"} == fnuz
    assert SM90.fp8_format == GFX950.fp8_format == CPU.fp8_format == "fp8_e4m3fn"


@pytest.mark.parametrize(
    ("platform", "arch", "expected"),
    [
        (SM90, "sm_90", True),
        (SM103, "sm_100", True),
        (SM100, "sm_103", True),
        (SM120, "sm_100", False),
        (SM80, "sm_80+", True),
        (SM120, "sm_80+", True),
        (Platform("cuda", "sm_75"), "sm_80+", False),
        (Platform("cuda"), "sm_80+", False),
        (GFX942, "gfx942", True),
        (GFX942, "gfx940", False),
        (GFX942, "sm_80+", False),
        (SM90, "gfx942", False),
    ],
)
def test_is_a(platform: Platform, arch: str, expected: bool) -> None:
    assert platform.is_a(arch) is expected


@pytest.mark.parametrize(
    ("hip", "available", "expected"),
    [
        (None, True, Platform("cuda", "sm_100")),
        ("7.1.25424", True, GFX942),
        (None, False, "cpu"),
        ("7.1.25424", False, "cpu"),
    ],
    ids=["cuda", "rocm", "cuda build without a GPU", "rocm build without a GPU"],
)
def test_detect(monkeypatch: pytest.MonkeyPatch, hip: str | None, available: bool, expected: Platform | str) -> None:
    is_available = Mock(return_value=available)
    device = types.SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: device)
    Platform.detect.cache_clear()
    try:
        found = Platform.detect()
        assert Platform.detect() is found
        is_available.assert_called_once_with()
        assert found == expected if isinstance(expected, Platform) else found.kind == expected and found.arch
        # None asks about this machine
        assert select_backend(heads=16).platform == found
    finally:
        Platform.detect.cache_clear()


@pytest.mark.parametrize(
    ("architectures", "gpu", "expected"),
    [
        ("80 90", "sm_90", True),
        ("80 90", "sm_86", True),
        ("80 90", "sm_120", True),  # by PTX
        ("80 90", "sm_75", False),
        ("90-real", "sm_90", True),
        ("80-real", "sm_86", True),
        ("90-real", "sm_100", False),
        ("80-real 90-virtual", "sm_100", True),
        ("90a", "sm_90", True),
        ("90a", "sm_100", False),
        ("100f", "sm_100", True),
        ("100f", "sm_103", True),
        ("100f", "sm_120", False),
        ("103f", "sm_100", False),
        ("120f-virtual", "sm_121", True),
        ("gfx942 gfx950", "gfx942", True),
        ("gfx942 gfx950", "gfx90a", False),
        ("gfx942:sramecc+", "gfx942", True),
        ("", "sm_90", False),
    ],
)
def test_has_code_for(architectures: str, gpu: str, expected: bool) -> None:
    assert has_code_for(architectures, gpu) is expected


@pytest.fixture
def kfd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Five nodes as AMD's driver has them, in another order; the first is the processor. No variable hides any."""
    glob = Path.glob
    for i, version in enumerate((0, 90402, 90010, 90500, 110000)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "properties").write_text(
            f"simd_count 1\ngfx_target_version {version}\nunique_id {255 + i}\n"
        )
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: sorted(glob(tmp_path, pattern), reverse=True))
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def test_installed_gpus_of_rocm(kfd: Path) -> None:
    assert installed_gpus() == ["gfx942", "gfx90a", "gfx950", "gfx1100"]


def test_an_amd_gpu_of_another_container(kfd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node can be seen, but not read."""
    read_text = Path.read_text

    def read(path: Path) -> str:
        if path.parent.name == "1":
            raise PermissionError(1, "Operation not permitted", str(path))
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", read)
    assert installed_gpus() == ["gfx90a", "gfx950", "gfx1100"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, ["gfx90a"]),
        ({"CUDA_VISIBLE_DEVICES": "2, 0"}, ["gfx950", "gfx942"]),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0"}, ["gfx90a"]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, ["gfx950"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000000103,0"}, ["gfx1100", "gfx942"]),
        ({"ROCR_VISIBLE_DEVICES": "1,7,2"}, ["gfx90a"]),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
    ],
    ids=str,
)
def test_hidden_amd_gpus(
    variables: dict[str, str], expected: list[str], kfd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert installed_gpus() == expected


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """NVIDIA's driver with three GPUs, of which the second does not answer. No variable hides any."""
    driver = Mock()
    driver.nvmlInit_v2.return_value = 0

    def count(pointer: object) -> int:
        pointer._obj.value = 3  # type: ignore[attr-defined]
        return 0

    def handle(i: int, pointer: object) -> int:
        pointer._obj.value = i  # type: ignore[attr-defined]
        return int(i == 1)

    def capability(gpu: ctypes.c_void_p, major: object, minor: object) -> int:
        major._obj.value, minor._obj.value = (7, 5) if gpu.value else (9, 0)  # type: ignore[attr-defined]
        return 0

    def uuid(gpu: ctypes.c_void_p, text: object, size: int) -> int:
        text.value = b"GPU-75cafe" if gpu.value else b"GPU-90beef"  # type: ignore[attr-defined]
        return 0

    driver.nvmlDeviceGetCount_v2, driver.nvmlDeviceGetHandleByIndex_v2 = count, handle
    driver.nvmlDeviceGetCudaComputeCapability, driver.nvmlDeviceGetUUID = capability, uuid
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("latentkv.cache.platform.ctypes.CDLL", lambda name: driver)
    for variable in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(variable, raising=False)
    return driver


def test_installed_gpus_of_cuda(nvml: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed_gpus() == ["sm_90", "sm_75"]
    monkeypatch.setattr("latentkv.cache.platform.ctypes.CDLL", Mock(side_effect=OSError))
    assert installed_gpus() == []


@pytest.mark.parametrize(
    ("visible", "order", "expected"),
    [
        ("GPU-75", "", ["sm_75"]),
        ("GPU-75cafe,GPU-90beef", "", ["sm_75", "sm_90"]),
        ("", "", []),
        ("-1", "", []),
        ("MIG-90beef/1/0", "", []),  # that it is of the first GPU only a started CUDA could tell
        ("1", "PCI_BUS_ID", ["sm_75"]),
        ("0", "FASTEST_FIRST", ["sm_90", "sm_75"]),  # whichever that is
        ("0", "", ["sm_90", "sm_75"]),
    ],
)
def test_hidden_nvidia_gpus(
    visible: str, order: str, expected: list[str], nvml: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    assert installed_gpus() == expected


# ----------------------------------------------------------------------------------------------- layout_for

ORDINARY = [b for b in BACKENDS.values() if not b.sparse]


@pytest.mark.parametrize(
    ("backend", "layout"),
    [
        ("TRITON_MLA", CacheLayout(512, 64, 64, "bf16", "concat")),
        ("ROCM_AITER_MLA", CacheLayout(512, 64, 64, "bf16", "concat")),
        ("FLASH_ATTN_MLA", CacheLayout(512, 64, 64, "bf16", "concat")),
        ("FLASHMLA", CacheLayout(512, 64, 64, "bf16", "concat")),
        ("FLASHINFER_MLA", CacheLayout(512, 64, 64, "bf16", "concat")),
        ("FLASHINFER_PAGED_MLA", CacheLayout(512, 64, 64, "bf16", "split")),
        ("CUTLASS_MLA", CacheLayout(512, 64, 128, "bf16", "concat")),
        ("CPU_MLA", CacheLayout(512, 64, 16, "bf16", "concat")),
    ],
)
def test_layout_for_defaults(backend: str, layout: CacheLayout) -> None:
    assert layout_for(backend) == layout
    assert BACKENDS[backend].block_size in BACKENDS[backend].block_sizes


@pytest.mark.parametrize(
    ("backend", "formats"),
    [
        ("TRITON_MLA", {"bf16", "fp16", "fp8_e4m3fn", "fp8_e4m3fnuz"}),
        ("ROCM_AITER_MLA", {"bf16", "fp16", "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2"}),
        ("FLASH_ATTN_MLA", {"bf16", "fp16"}),
        ("FLASHMLA", {"bf16", "fp16", "fp8_e4m3fn"}),
        ("FLASHINFER_MLA", {"bf16", "fp16", "fp8_e4m3fn"}),
        ("FLASHINFER_PAGED_MLA", {"bf16", "fp16", "fp8_e4m3fn"}),
        ("CUTLASS_MLA", {"bf16", "fp16", "fp8_e4m3fn"}),
        ("CPU_MLA", {"bf16", "fp16", "fp32"}),
    ],
)
def test_layout_for_formats(backend: str, formats: set[str]) -> None:
    for format in FORMATS:
        if format in formats:
            assert layout_for(backend, format=format).format == format
        else:
            with pytest.raises(ValueError, match=rf"layout_for: {backend}: format: expected .*, got {format}$"):
                layout_for(backend, format=format)


@pytest.mark.parametrize(
    ("backend", "good", "bad"),
    [
        ("TRITON_MLA", [16, 48, 64, 1024], [0, 1, 8, 24]),
        ("ROCM_AITER_MLA", [1, 16, 17, 64], [0, -1]),
        ("FLASH_ATTN_MLA", [16, 32, 64], [1, 8, 40]),
        ("FLASHMLA", [64], [1, 32, 128]),
        ("FLASHINFER_MLA", [32, 64], [16, 128]),
        ("FLASHINFER_PAGED_MLA", [1, 5, 64], [0]),
        ("CUTLASS_MLA", [128], [64, 256]),
        ("CPU_MLA", [16], [1, 32, 64]),
    ],
)
def test_layout_for_block_sizes(backend: str, good: list[int], bad: list[int]) -> None:
    for size in good:
        assert layout_for(backend, block_size=size).block_size == size
    for size in bad:
        with pytest.raises(ValueError, match=rf"layout_for: {backend}: block_size: expected .*, got {size}$"):
            layout_for(backend, block_size=size)


@pytest.mark.parametrize("backend", [b.name for b in ORDINARY])
def test_layout_for_dims(backend: str) -> None:
    for dims in ((256, 64), (512, 0)):
        if backend in ("TRITON_MLA", "CPU_MLA"):
            layout = layout_for(backend, kv_lora_rank=dims[0], rope_dim=dims[1])
            assert (layout.kv_lora_rank, layout.rope_dim) == dims
        else:
            with pytest.raises(ValueError, match=r"expected \(512, 64\), got \(" + f"{dims[0]}, {dims[1]}"):
                layout_for(backend, kv_lora_rank=dims[0], rope_dim=dims[1])


def test_layout_for_any_block_size() -> None:
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        layout_for("ROCM_AITER_MLA", block_size=0)


def test_layout_for_tells_everything_that_is_wrong() -> None:
    with pytest.raises(ValueError) as error:
        layout_for("FLASHMLA", format="fp32", block_size=16, kv_lora_rank=256)
    assert str(error.value) == (
        "layout_for: FLASHMLA: format: expected bf16, fp16 or fp8_e4m3fn, got fp32; "
        "block_size: expected 64, got 16; (kv_lora_rank, rope_dim): expected (512, 64), got (256, 64)"
    )


def test_layout_for_bad_names() -> None:
    with pytest.raises(ValueError, match=r"layout_for: backend: expected .*FLASHMLA.*, got 'FLASH_MLA'"):
        layout_for("FLASH_MLA")
    with pytest.raises(ValueError, match=r"format: expected one of bf16.*, got 'int8'"):
        layout_for("TRITON_MLA", format="int8")
    with pytest.raises(ValueError, match="rope_dim: expected an even number"):
        layout_for("TRITON_MLA", rope_dim=63)


def test_layout_for_fp8_means_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, format in ((GFX942, "fp8_e4m3fnuz"), (GFX950, "fp8_e4m3fn")):
        monkeypatch.setattr(Platform, "detect", lambda platform=platform: platform)
        assert layout_for("TRITON_MLA", format="fp8").format == format


# ------------------------------------------------------------------------------------------- select_backend


@pytest.mark.parametrize(
    ("platform", "without_aiter", "with_aiter"),
    [
        (Platform("cuda", "sm_75"), "TRITON_MLA", None),
        (SM80, "FLASHINFER_PAGED_MLA", None),
        (SM86, "FLASHINFER_PAGED_MLA", None),
        (SM89, "FLASHINFER_PAGED_MLA", None),
        (SM90, "FLASH_ATTN_MLA", None),
        (SM100, "FLASHINFER_MLA", None),
        (SM103, "FLASHINFER_MLA", None),
        (SM120, "TRITON_MLA", None),
        (Platform("cuda"), "TRITON_MLA", None),
        (GFX90A, "TRITON_MLA", "TRITON_MLA"),
        (GFX942, "TRITON_MLA", "ROCM_AITER_MLA"),
        (GFX950, "TRITON_MLA", "ROCM_AITER_MLA"),
        (Platform("rocm"), "TRITON_MLA", "TRITON_MLA"),
        (CPU, "CPU_MLA", None),
    ],
    ids=str,
)
def test_select_by_platform(platform: Platform, without_aiter: str, with_aiter: str | None, site: Site) -> None:
    assert select_backend(platform, heads=16).name == without_aiter
    site.aiter()
    assert select_backend(platform, heads=16).name == (with_aiter or without_aiter)


# Rule a platform's backends out one after the other: this is the order of choice.
@pytest.mark.parametrize(
    ("platform", "want", "expected"),
    [
        (SM80, {}, "FLASHINFER_PAGED_MLA"),
        (SM80, {"kv_lora_rank": 256}, "TRITON_MLA"),
        (SM89, {"format": "fp8"}, "FLASHINFER_PAGED_MLA"),
        (SM90, {}, "FLASH_ATTN_MLA"),
        (SM90, {"block_size": 16}, "FLASH_ATTN_MLA"),
        (SM90, {"format": "fp8"}, "FLASHMLA"),
        (SM90, {"format": "fp8", "block_size": 64}, "FLASHMLA"),
        (SM90, {"format": "fp8", "block_size": 32}, "FLASHINFER_PAGED_MLA"),
        (SM90, {"block_size": 1}, "FLASHINFER_PAGED_MLA"),
        (SM90, {"kv_lora_rank": 256}, "TRITON_MLA"),
        (SM90, {"rope_dim": 0}, "TRITON_MLA"),
        (SM100, {"block_size": 32}, "FLASHINFER_MLA"),
        (SM100, {"format": "fp8"}, "FLASHINFER_MLA"),
        (SM100, {"block_size": 128}, "CUTLASS_MLA"),
        (SM100, {"block_size": 16}, "TRITON_MLA"),
        (SM120, {"format": "fp8"}, "TRITON_MLA"),
        (GFX942, {"format": "fp8"}, "TRITON_MLA"),
        (CPU, {"format": "fp32"}, "CPU_MLA"),
        (CPU, {"kv_lora_rank": 256, "rope_dim": 0}, "CPU_MLA"),
    ],
)
def test_select_order(platform: Platform, want: dict[str, object], expected: str) -> None:
    selection = select_backend(platform, heads=16, **want)  # type: ignore[arg-type]
    assert selection.name == expected
    assert selection.platform == platform
    for key, value in want.items():
        assert getattr(selection.layout, key) == (platform.fp8_format if value == "fp8" else value)
    *passed_over, (last, reason) = selection.reasons.items()
    assert (last, reason) == (expected, "chosen: the first that fits")
    assert all(r.startswith("passed over: ") for _, r in passed_over)


@pytest.mark.parametrize("platform", [SM80, SM90, SM100, SM120, CPU], ids=str)
@pytest.mark.parametrize("heads", [1, 8, 16, 20, 96, 128])
def test_heads_matter_to_aiter_only(platform: Platform, heads: int) -> None:
    assert select_backend(platform, heads=heads).name == select_backend(platform, heads=16).name


@pytest.mark.parametrize(
    ("heads", "fits"),
    [(1, True), (8, True), (15, True), (16, True), (17, False), (20, False), (96, True), (128, True)],
)
def test_aiter_heads(heads: int, fits: bool, site: Site) -> None:
    site.aiter()
    selection = select_backend(GFX942, heads=heads)
    assert selection.name == ("ROCM_AITER_MLA" if fits else "TRITON_MLA")
    if not fits:
        expected = f"passed over: heads: expected 1..15 or a multiple of 16, got {heads}"
        assert selection.reasons["ROCM_AITER_MLA"] == expected


@pytest.mark.parametrize("arch", ["gfx90a", "gfx940", "gfx1100", "gfx1201", "gfx1250"])
def test_aiter_architectures(arch: str, site: Site) -> None:
    site.aiter()
    selection = select_backend(Platform("rocm", arch), heads=16)
    assert selection.name == "TRITON_MLA"
    expected = f"passed over: platform: expected gfx942 or gfx950, got rocm {arch}"
    assert selection.reasons["ROCM_AITER_MLA"] == expected


@pytest.mark.parametrize(
    ("platform", "format", "resolved"),
    [
        (GFX942, "fp8", "fp8_e4m3fnuz"),
        (GFX942, "fp8_e4m3fnuz", "fp8_e4m3fnuz"),
        (GFX942, "fp8_e4m3fn", None),
        (GFX942, "fp8_e5m2", "fp8_e5m2"),
        (GFX950, "fp8", "fp8_e4m3fn"),
        (GFX950, "fp8_e4m3fn", "fp8_e4m3fn"),
        (GFX950, "fp8_e4m3fnuz", None),
        (GFX950, "fp8_e5m2", "fp8_e5m2"),
    ],
)
def test_aiter_formats(platform: Platform, format: str, resolved: str | None, site: Site) -> None:
    site.aiter()
    if resolved:
        selection = select_backend(platform, heads=16, format=format)
        assert (selection.name, selection.layout.format) == ("ROCM_AITER_MLA", resolved)
        assert selection.layout.placement == "concat"
    else:  # the other architecture's kind of e4m3
        with pytest.raises(ValueError, match=f"ROCM_AITER_MLA: .*{platform.fp8_format}.*, got {format}"):
            select_backend(platform, heads=16, format=format)


@pytest.mark.parametrize(
    ("platform", "format", "dtype"),
    [
        (GFX942, "fp8", torch.float8_e4m3fnuz),
        (GFX950, "fp8", torch.float8_e4m3fn),
        (GFX942, "fp8_e5m2", torch.float8_e5m2),
        (GFX950, "fp8_e5m2", torch.float8_e5m2),
    ],
)
def test_aiter_dtypes(platform: Platform, format: str, dtype: torch.dtype, site: Site) -> None:
    site.aiter()
    layout = select_backend(platform, heads=16, format=format).layout
    assert layout.dtype == layout.allocate(1, "cpu").pages_of_one.dtype == dtype
    assert layout.row_bytes == 576


def test_fp8_is_resolved_for_the_platform_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Platform, "detect", lambda: pytest.fail("looked at this machine"))
    for platform in (*NVIDIA, *AMD):
        assert select_backend(platform, heads=16, format="fp8").layout.format == platform.fp8_format


@pytest.mark.parametrize(
    ("platform", "want", "reasons"),
    [
        (
            SM90,
            {"format": "fp8_e4m3fnuz"},
            {
                "FLASHINFER_MLA": "platform: expected sm_100, got cuda sm_90",
                "CUTLASS_MLA": "platform: expected sm_100, got cuda sm_90",
                "FLASH_ATTN_MLA": "format: expected bf16 or fp16, got fp8_e4m3fnuz",
                "FLASHMLA": "format: expected bf16, fp16 or fp8_e4m3fn, got fp8_e4m3fnuz",
                "FLASHINFER_PAGED_MLA": "format: expected bf16, fp16 or fp8_e4m3fn, got fp8_e4m3fnuz",
                "TRITON_MLA": "format: expected bf16, fp16 or fp8_e4m3fn, got fp8_e4m3fnuz",
                "FLASHMLA_SPARSE": "sparse: expected True, got False; format: expected fp8_ds_mla, got fp8_e4m3fnuz",
                "V4_FLASHMLA_SPARSE": "sparse: expected True, got False; format: expected fp8_model1, got "
                "fp8_e4m3fnuz; (kv_lora_rank, rope_dim): expected (448, 64), got (512, 64)",
            },
        ),
        (
            SM100,
            {"block_size": 8},
            {
                "FLASHINFER_MLA": "block_size: expected 32 or 64, got 8",
                "CUTLASS_MLA": "block_size: expected 128, got 8",
                "FLASH_ATTN_MLA": "platform: expected sm_90, got cuda sm_100",
                "FLASHMLA": "block_size: expected 64, got 8",
                "FLASHINFER_PAGED_MLA": "prefer: on cuda sm_100 it has to be asked for by name",
                "TRITON_MLA": "block_size: expected a multiple of 16, got 8",
                "FLASHMLA_SPARSE": "sparse: expected True",
                "V4_FLASHMLA_SPARSE": "sparse: expected True",
            },
        ),
        (
            GFX90A,
            {"block_size": 8, "format": "fp32"},
            {
                "ROCM_AITER_MLA": "platform: expected gfx942 or gfx950, got rocm gfx90a",
                "TRITON_MLA": "format: expected bf16, fp16 or fp8_e4m3fn, got fp32; "
                "block_size: expected a multiple of 16, got 8",
            },
        ),
        (
            GFX942,
            {"kv_lora_rank": 256, "block_size": 1},
            {
                "ROCM_AITER_MLA": "package: amd-aiter is not installed in this Python environment; "
                "(kv_lora_rank, rope_dim): expected (512, 64), got (256, 64)",
                "TRITON_MLA": "block_size: expected a multiple of 16, got 1",
            },
        ),
        (CPU, {"format": "fp8"}, {"CPU_MLA": "format: expected bf16, fp16 or fp32, got fp8_e4m3fn"}),
        (CPU, {"block_size": 64}, {"CPU_MLA": "block_size: expected 16, got 64"}),
        (CPU, {"sparse": True}, {"CPU_MLA": "sparse: expected False, got True"}),
    ],
)
def test_nothing_fits(platform: Platform, want: dict[str, object], reasons: dict[str, str]) -> None:
    with pytest.raises(ValueError) as error:
        select_backend(platform, heads=16, **want)  # type: ignore[arg-type]
    title, *lines = str(error.value).splitlines()
    assert title == f"select_backend: no attention backend fits {platform}"
    assert len(lines) == len(reasons)
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert line.startswith(f"  {name}: passed over: {reason}")


SPARSE = [("FLASHMLA_SPARSE", "fp8_ds_mla", 512), ("V4_FLASHMLA_SPARSE", "fp8_model1", 448)]


@pytest.mark.parametrize("platform", [SM90, SM100], ids=str)
@pytest.mark.parametrize(("name", "format", "latent"), SPARSE)
def test_sparse_models_read_packed_rows(platform: Platform, name: str, format: str, latent: int) -> None:
    selection = select_backend(platform, heads=128, sparse=True, format=format, kv_lora_rank=latent)
    assert (selection.name, selection.layout) == (name, CacheLayout(latent, 64, 64, format))
    assert layout_for(name, format=format, kv_lora_rank=latent) == selection.layout
    with pytest.raises(ValueError, match=rf"{name}: passed over: format: expected {format}, got bf16"):
        select_backend(platform, heads=128, sparse=True, kv_lora_rank=latent)
    with pytest.raises(ValueError, match=rf"{name}: passed over: block_size: expected 64, got 16"):
        select_backend(platform, heads=128, sparse=True, format=format, kv_lora_rank=latent, block_size=16)
    with pytest.raises(ValueError, match=f"  {name}: passed over: sparse: expected True, got False"):
        select_backend(platform, heads=128, format=format, kv_lora_rank=latent)


@pytest.mark.parametrize(("name", "format", "latent"), SPARSE)
def test_packed_rows_have_dimensions_of_their_own(name: str, format: str, latent: int) -> None:
    other = 960 - latent
    with pytest.raises(ValueError, match=rf"expected \({latent}, 64\), got \({other}, 64\)$"):
        layout_for(name, format=format, kv_lora_rank=other)
    for platform in (SM80, SM120, GFX942, CPU):
        with pytest.raises(ValueError, match="no attention backend fits"):
            select_backend(platform, heads=128, sparse=True, format=format, kv_lora_rank=latent)


@pytest.mark.parametrize("by", ["prefer", "LATENTKV_BACKEND"])
@pytest.mark.parametrize(
    ("platform", "wish", "want"),
    [
        (SM90, "TRITON_MLA", {}),
        (SM90, "FLASHMLA", {}),
        (SM100, "FLASHINFER_PAGED_MLA", {"block_size": 1}),
        (SM120, "FLASHINFER_PAGED_MLA", {}),
        (GFX942, "TRITON_MLA", {}),
    ],
)
def test_wish(platform: Platform, wish: str, want: dict[str, int], by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "LATENTKV_BACKEND":
        monkeypatch.setenv(by, wish)
    selection = select_backend(platform, heads=16, prefer=wish if by == "prefer" else None, **want)  # type: ignore[arg-type]
    assert selection.name == wish
    assert selection.reasons == {wish: f"chosen: asked for by {by}"}


@pytest.mark.parametrize("by", ["prefer", "LATENTKV_BACKEND"])
@pytest.mark.parametrize(
    ("platform", "wish", "want", "reason"),
    [
        (SM90, "CUTLASS_MLA", {}, "platform: expected sm_100, got cuda sm_90"),
        (SM90, "CPU_MLA", {}, "platform: expected cpu, got cuda sm_90"),
        (CPU, "TRITON_MLA", {}, "platform: expected cuda or rocm, got cpu"),
        (SM80, "ROCM_AITER_MLA", {}, "platform: expected gfx942 or gfx950, got cuda sm_80"),
        (SM90, "FLASH_ATTN_MLA", {"format": "fp8"}, "format: expected bf16 or fp16, got fp8_e4m3fn"),
        (SM90, "FLASHMLA", {"block_size": 16}, "block_size: expected 64, got 16"),
        (GFX942, "ROCM_AITER_MLA", {}, "package: amd-aiter is not installed in this Python environment"),
    ],
)
def test_wish_fails_loudly(
    platform: Platform,
    wish: str,
    want: dict[str, object],
    reason: str,
    by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if by == "LATENTKV_BACKEND":
        monkeypatch.setenv(by, wish)
    with pytest.raises(ValueError) as error:
        select_backend(platform, heads=16, prefer=wish if by == "prefer" else None, **want)  # type: ignore[arg-type]
    assert str(error.value) == f"select_backend: {by}: {wish} does not fit {platform}: {reason}"


def test_the_environment_overrides_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTKV_BACKEND", "FLASHMLA")
    selection = select_backend(SM90, heads=16, prefer="TRITON_MLA")
    assert selection.reasons == {"FLASHMLA": "chosen: asked for by LATENTKV_BACKEND"}
    with pytest.raises(
        ValueError, match="LATENTKV_BACKEND: FLASHMLA does not fit cpu: platform: expected sm_90 or sm_100"
    ):
        select_backend(CPU, heads=16, prefer="CPU_MLA")
    monkeypatch.setenv("LATENTKV_BACKEND", "nonsense")
    for prefer in (None, "FLASHMLA"):
        with pytest.raises(ValueError, match=r"LATENTKV_BACKEND: expected .*TRITON_MLA.*, got 'nonsense'"):
            select_backend(SM90, heads=16, prefer=prefer)
    monkeypatch.setenv("LATENTKV_BACKEND", "")
    assert select_backend(SM90, heads=16, prefer="FLASHMLA").name == "FLASHMLA"
    assert select_backend(SM90, heads=16).name == "FLASH_ATTN_MLA"


def test_select_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"select_backend: prefer: expected .*, got 'FLASH_MLA'"):
        select_backend(SM90, heads=16, prefer="FLASH_MLA")
    with pytest.raises(ValueError, match="select_backend: heads: expected at least 1, got 0"):
        select_backend(SM90, heads=0)
    with pytest.raises(ValueError, match=r"format: expected one of .*, got 'int8'"):
        select_backend(SM90, heads=16, format="int8")
    with pytest.raises(ValueError, match="rope_dim: expected an even number"):
        select_backend(SM90, heads=16, rope_dim=63)


def test_selection_prints_the_decision() -> None:
    assert str(select_backend(SM90, heads=128, format="fp8", block_size=16)) == (
        "FLASHINFER_PAGED_MLA for cuda sm_90: fp8_e4m3fn, split [B, 16, 512] + [B, 16, 64]\n"
        "  FLASHINFER_MLA: passed over: platform: expected sm_100, got cuda sm_90\n"
        "  CUTLASS_MLA: passed over: platform: expected sm_100, got cuda sm_90\n"
        "  FLASH_ATTN_MLA: passed over: format: expected bf16 or fp16, got fp8_e4m3fn\n"
        "  FLASHMLA: passed over: block_size: expected 64, got 16\n"
        "  FLASHINFER_PAGED_MLA: chosen: the first that fits"
    )
    assert len({select_backend(SM90, heads=128), select_backend(SM90, heads=128)}) == 1


# ------------------------------------------------------------------------------------------ AITER's package


def test_aiter_found(site: Site) -> None:
    site.aiter()
    assert aiter_problem() is None
    assert "aiter" not in sys.modules


def test_aiter_found_however_its_name_is_spelled(site: Site) -> None:
    site.aiter(dist="AMD.Aiter")
    assert aiter_problem() is None


def test_decoy_does_not_fool(site: Site) -> None:
    site.decoy()
    init = site.path / "aiter/__init__.py"
    problem = f"package: amd-aiter is not installed in this Python environment ({init} is another project's)"
    assert aiter_problem() == problem
    assert select_backend(GFX942, heads=16).reasons["ROCM_AITER_MLA"] == f"passed over: {problem}"


def test_reader_without_the_distribution(site: Site) -> None:
    """A checkout on the path, or a distribution of another name that ships the same files."""
    site.files({"aiter/__init__.py": "", "aiter/mla.py": READER})
    assert "amd-aiter is not installed" in str(aiter_problem())
    site.distribution("aiter", ["aiter/__init__.py", "aiter/mla.py"])
    assert "amd-aiter is not installed" in str(aiter_problem())


def test_decoy_that_shadows_aiter(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.aiter()
    earlier = Site(tmp_path / "earlier", monkeypatch)
    earlier.decoy()
    assert aiter_problem() == (
        f"package: amd-aiter is installed, but import aiter finds {earlier.path}/aiter/__init__.py, another project's"
    )


def test_decoy_behind_aiter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Site(tmp_path / "later", monkeypatch).decoy()
    Site(tmp_path / "earlier", monkeypatch).aiter()
    assert aiter_problem() is None


def test_decoy_in_the_same_folder(site: Site) -> None:
    """Whoever was installed last owns the bytes, which no record tells."""
    site.aiter()
    site.decoy()
    assert "uninstall aiter, then reinstall amd-aiter" in str(aiter_problem())


def test_aiter_without_its_module(site: Site) -> None:
    site.distribution("amd_aiter", ["aiter/__init__.py"])
    assert aiter_problem() == "package: amd-aiter is installed, but there is no module aiter to import"


def test_a_module_without_a_spec(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.aiter()
    monkeypatch.setitem(sys.modules, "aiter", types.ModuleType("aiter"))
    assert "there is no module aiter to import" in str(aiter_problem())


@pytest.mark.parametrize("text", [None, "", "def mla_prefill_fwd(): ...\n", "# def mla_decode_fwd(\n"])
def test_aiter_without_its_reader(site: Site, text: str | None) -> None:
    site.aiter()
    mla = site.path / "aiter/mla.py"
    if text is None:
        mla.unlink()
    else:
        mla.write_text(text)
    assert aiter_problem() == f"package: amd-aiter has no decode reader, expected mla_decode_fwd in {mla}"


def test_aiter_editable(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a b" / "src"  # a path that a URL has to quote
    site.files({"aiter/__init__.py": "", "aiter/mla.py": READER}, root=source)
    monkeypatch.syspath_prepend(str(source))  # what the .pth file does
    pth = "__editable__.amd_aiter-1.0.pth"
    site.distribution("amd_aiter", [pth], {"url": source.as_uri(), "dir_info": {}})
    assert "another project's" in str(aiter_problem())
    site.distribution("amd_aiter", [pth], {"url": source.as_uri(), "dir_info": {"editable": True}})
    assert aiter_problem() is None


def test_aiter_develop(site: Site) -> None:
    """``setup.py develop`` puts the checkout with its egg-info on the path."""
    site.files(
        {
            "aiter/__init__.py": "",
            "aiter/mla.py": READER,
            "amd_aiter.egg-info/PKG-INFO": "Metadata-Version: 2.1\nName: amd-aiter\nVersion: 1.0\n",
            "amd_aiter.egg-info/SOURCES.txt": "setup.py\naiter/__init__.py\naiter/mla.py\n",
        }
    )
    assert aiter_problem() is None


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("amd_aiter-1.0.dist-info/direct_url.json", b"{", "JSONDecodeError"),
        ("amd_aiter-1.0.dist-info/direct_url.json", b"[]", "AttributeError"),
        ("amd_aiter-1.0.dist-info/direct_url.json", b'{"dir_info": {"editable": true}}', "KeyError: 'url'"),
        ("amd_aiter-1.0.dist-info/direct_url.json", b"\xff", "UnicodeDecodeError"),
        ("amd_aiter-1.0.dist-info/RECORD", b"\xff", "UnicodeDecodeError"),
        ("amd_aiter-1.0.dist-info/RECORD", b"aiter/__init__.py,sha256=0,many\n", "ValueError"),
        ("amd_aiter-1.0.dist-info/RECORD", None, "another project's"),
        ("aiter/mla.py", b"def mla_decode_fwd(): '\xff'\n", "UnicodeDecodeError"),
    ],
)
def test_a_damaged_aiter_is_passed_over(site: Site, file: str, damage: bytes | None, named: str) -> None:
    site.aiter()
    path = site.path / file
    path.unlink(missing_ok=True)
    if damage is not None:
        path.write_bytes(damage)
    assert named in str(aiter_problem())
    selection = select_backend(GFX942, heads=16)
    assert selection.name == "TRITON_MLA" and selection.reasons["ROCM_AITER_MLA"].startswith("passed over: package: ")


def test_an_aiter_that_cannot_be_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.aiter()
    read_text = Path.read_text

    def read(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "mla.py":
            raise PermissionError(13, "Permission denied", "mla.py")
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    assert "damaged, reinstall it: PermissionError: [Errno 13] Permission denied: 'mla.py'" in str(aiter_problem())

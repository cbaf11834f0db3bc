"""One source for every vendor: csrc_common names none, and hipify takes it as it is, on a copy."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest

hipify_python = pytest.importorskip("torch.utils.hipify.hipify_python")

ROOT = Path(__file__).resolve().parents[1]
COMMON = ROOT / "csrc_common"
SOURCES = sorted(COMMON.glob("*"))
VENDOR = re.compile(r"\b_*(?:cuda|cublas|cub|nv|nvcc|nvtx|nccl|ptx|hip|hipcub|rocm|amd|amdgcn|gfx)\w*", re.IGNORECASE)
CONDITION = re.compile(r"^\s*#\s*(?:el)?if.*?(?:__CUDA|__HIP|USE_ROCM|__NVCC|__AMD)", re.MULTILINE)
PLANTED = """#include <cuda_runtime.h>
__global__ void kernel(int* p) { *p = 1; }
void run(cudaStream_t stream) {
  int* p = nullptr;
  cudaMallocAsync(&p, 4, stream);
  kernel<<<1, 1, 0, stream>>>(p);
}
"""


def code(text: str) -> str:
    """Without comments and string literals, but with the names of included files."""
    lines = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL).splitlines()
    string = re.compile(r'"(?:\\.|[^"\\])*"')
    return "\n".join(line if re.match(r"\s*#\s*include", line) else string.sub('""', line) for line in lines)


def hashes() -> dict[str, str]:
    files = [p for folder in ROOT.glob("csrc_*") for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def hipify(folder: Path) -> dict[Path, Path]:
    """Every file of a folder and what hipify has made of it, which may be the file itself."""
    done = hipify_python.hipify(
        project_directory=str(folder),
        output_directory=str(folder),
        includes=[f"{folder}/*"],
        extra_files=[str(p) for p in sorted(folder.iterdir())],
        is_pytorch_extension=True,
        show_progress=False,
    )
    return {Path(source): Path(result.hipified_path or source) for source, result in done.items()}


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_the_common_source_names_no_vendor(source: Path) -> None:
    text = source.read_text()
    assert CONDITION.findall(text) == []
    assert VENDOR.findall(code(text)) == []


def test_the_check_finds_vendors() -> None:
    assert set(VENDOR.findall(code(PLANTED))) == {"cuda_runtime", "cudaStream_t", "cudaMallocAsync"}
    assert VENDOR.findall('t.is_cuda(); // cudaMalloc\nf("cuda:0"); /* __nv_x */ chip(envoy)') == [
        "cudaMalloc",
        "cuda",
        "__nv_x",
    ]
    assert VENDOR.findall(code('t.is_cuda(); // cudaMalloc\nf("cuda:0"); /* __nv_x */ chip(envoy)')) == []
    assert VENDOR.findall(code("__nv_cvt(x); __hip_x(); hipMalloc(); #include <cuda_fp8.h>")) != []
    for line in (
        "#if defined(__CUDA_ARCH__)",
        "# elif __HIP_DEVICE_COMPILE__",
        "#ifdef USE_ROCM",
        "#ifndef __CUDACC__",
    ):
        assert CONDITION.search(line)


def test_hipify_leaves_nothing_of_cuda(tmp_path: Path) -> None:
    before = hashes()
    folder = tmp_path / "csrc_common"
    shutil.copytree(COMMON, folder)
    (folder / "planted.cu").write_text(PLANTED)
    results = hipify(folder)

    assert hashes() == before  # the source tree, file for file
    assert {p.name for p in results} >= {p.name for p in SOURCES}
    for source, result in results.items():
        text = code(result.read_text())
        if source.name == "planted.cu":  # hipify was at work: this one was translated
            assert "hipMallocAsync" in text and "cudaMalloc" not in text and "<<<" not in text
        else:
            assert VENDOR.findall(text) == [], result.name


def test_hipify_changes_no_common_file(tmp_path: Path) -> None:
    """There is nothing to translate, so what was tested here is what a ROCm build compiles."""
    folder = tmp_path / "csrc_common"
    shutil.copytree(COMMON, folder)
    results = hipify(folder)
    for source in SOURCES:
        assert results[folder / source.name].read_bytes() == source.read_bytes()

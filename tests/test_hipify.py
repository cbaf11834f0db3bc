"""One source for every vendor: csrc_common names none, and hipify turns a copy of it into what ROCm compiles."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

hipify_python = pytest.importorskip("torch.utils.hipify.hipify_python")

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "cmake"))
import hipify  # noqa: E402  (the build's script)

COMMON = ROOT / "csrc_common"
SOURCES = sorted(COMMON.glob("*"))
VENDOR = re.compile(r"\b_*(?:cuda|cublas|cub|nv|nvcc|nvtx|nccl|ptx|hip|hipcub|rocm|amd|amdgcn|gfx)\w*", re.IGNORECASE)
CONDITION = re.compile(r"^\s*#\s*(?:el)?if.*?(?:__CUDA|__HIP|USE_ROCM|__NVCC|__AMD)", re.MULTILINE)
PLANTED = """#include <cuda_runtime.h>
#include "gpu.h"
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


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_the_common_source_names_no_vendor(source: Path) -> None:
    """But for gpu.h, which speaks to the runtime in CUDA's spelling, and to nothing that hipify does not know."""
    text = source.read_text()
    assert CONDITION.findall(text) == []
    if source.name != "gpu.h":
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
    source, copy = tmp_path / "csrc_common", tmp_path / "hipified"
    shutil.copytree(COMMON, source)
    (source / "planted.cu").write_text(PLANTED)
    hipify.hipify(source, copy, hipify.engine())

    assert hashes() == before  # the source tree, file for file
    assert sorted(p.name for p in copy.iterdir()) == sorted([*(p.name for p in SOURCES), "planted.cu"])
    for result in copy.iterdir():
        text = code(result.read_text())
        if result.name in ("planted.cu", "gpu.h"):  # these were translated
            assert re.search(r"\bhip[A-Z]", text) and not re.search(r"\b(cuda|CUDA)[A-Z_]", text), result.name
        else:
            assert result.read_bytes() == (source / result.name).read_bytes()
    planted = (copy / "planted.cu").read_text()
    assert "hipMallocAsync" in planted and "<<<" not in planted
    assert '#include "gpu.h"' in planted  # which is the hipified one, under its old name


def test_the_script_runs_by_itself(tmp_path: Path) -> None:
    """As the build calls it, twice over."""
    for _ in range(2):
        subprocess.run([sys.executable, ROOT / "cmake" / "hipify.py", COMMON, tmp_path / "out"], check=True)
    assert "hipStream_t" in (tmp_path / "out" / "gpu.h").read_text()


def test_hipify_torch_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's own package where it is installed (it is not on the public index), else the engine inside torch."""
    monkeypatch.setitem(sys.modules, "hipify_torch", None)
    assert hipify.engine() is hipify_python
    package = types.ModuleType("hipify_torch")
    package.hipify_python = types.ModuleType("hipify_torch.hipify_python")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hipify_torch", package)
    assert hipify.engine() is package.hipify_python

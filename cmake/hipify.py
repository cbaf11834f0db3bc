"""Hipifies a copy of a source folder: python hipify.py SOURCE COPY

Files keep their names, so that includes keep their meaning; SOURCE stays as it is. The engine is ROCm's hipify_torch
where it is installed, else the copy of it that every torch wheel carries.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType


def engine() -> ModuleType:
    """The module that translates CUDA's names into HIP's."""
    try:
        from hipify_torch import hipify_python
    except ImportError:
        from torch.utils.hipify import hipify_python
    return hipify_python


def hipify(source: Path, copy: Path, hipify_python: ModuleType) -> None:
    """Makes ``copy`` the hipified ``source``."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    files = sorted(copy.iterdir())
    done = hipify_python.hipify(
        project_directory=str(copy),
        output_directory=str(copy),
        includes=[f"{copy}/*"],
        extra_files=[str(file) for file in files],
        is_pytorch_extension=True,
        show_progress=False,
    )
    results = {file: Path(done[str(file)].hipified_path or file) for file in files}
    for file, result in results.items():
        text = result.read_text()
        for ours, theirs in results.items():
            text = text.replace(f'#include "{theirs.name}"', f'#include "{ours.name}"')
        result.unlink()
        file.write_text(text)


if __name__ == "__main__":
    hipify(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), engine())

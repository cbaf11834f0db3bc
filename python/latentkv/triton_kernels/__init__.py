"""The ops as Triton kernels, on the plain tensors of the torch ops: the provider ``triton``.

They give the bytes of :mod:`latentkv.reference`. Where no native library was built they serve the GPUs of both vendors;
TRITON_INTERPRET=1 runs them on a CPU, for tests.
"""

from __future__ import annotations

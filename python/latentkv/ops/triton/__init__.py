"""The ops as Triton kernels, on the plain tensors of the torch ops: the provider ``triton``.

They give the bytes of :mod:`latentkv.ops.reference`. Where no native library was built they serve both vendors' GPUs;
TRITON_INTERPRET=1 runs them on a CPU, for tests.
"""

from __future__ import annotations

from .decode import mla_decode as mla_decode
from .indexer import write_indexer_cache_ as write_indexer_cache_
from .read import convert_cache_ as convert_cache_
from .read import gather_cache as gather_cache
from .update import decode_prologue as decode_prologue
from .update import rope_ as rope_
from .update import rope_write_cache_ as rope_write_cache_
from .update import write_cache_ as write_cache_
from .update import write_cache_grouped_ as write_cache_grouped_

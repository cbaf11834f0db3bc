"""Every seventh case of the shared matrix on the GPU, checked: what compute-sanitizer watches in reasonable time."""

from itertools import islice

from latentkv import providers
from latentkv.testing import check, matrix

wrong = [
    str(case)
    for case in islice(matrix(), 0, None, 7)
    if check(case, providers.native, providers.reference, "cuda", expected_device="cpu")
]
print(f"{len(wrong)} wrong cases", *wrong)
raise SystemExit(bool(wrong))

"""Which native libraries are loaded, and what is said of those that are not."""

from __future__ import annotations

import ctypes
import warnings
from unittest.mock import Mock

import pytest
from latentkv import providers
from latentkv.ops.schemas import NATIVE_NAMESPACE


def test_a_library_of_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ctypes.CDLL(None)
    monkeypatch.setattr(providers.ctypes, "CDLL", lambda path: other)
    expected = "expected the library _cpu of this build, got AttributeError: .*undefined symbol: latentkv_arch"
    with pytest.raises(OSError, match=expected):
        providers._load("cpu")


@pytest.mark.parametrize(
    ("gpus", "without"),
    [
        ([], []),
        (["sm_90", "sm_80"], []),
        (["sm_80", "sm_80", "sm_75", "sm_75"], ["sm_75"]),
        (["sm_70", "sm_75"], ["sm_70", "sm_75"]),
    ],
    ids=str,
)
def test_a_library_serves_the_gpus_that_it_has_code_for(
    gpus: list[str], without: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Mock()
    library.latentkv_architectures.return_value = b"80 90"
    monkeypatch.setattr(providers.ctypes, "CDLL", lambda path: library)
    monkeypatch.setattr(providers, "installed_gpus", lambda: gpus)
    found = f"the library _cpu was built for 80 90, not for this machine's {', '.join(without)}"
    if len(without) == len(gpus) > 0:
        with pytest.raises(OSError, match=found):
            providers._load("cpu")
        library.latentkv_register.assert_not_called()
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert providers._load("cpu") is library
    library.latentkv_register.assert_called_once_with(NATIVE_NAMESPACE.encode())
    assert [str(w.message).partition(", where")[0] for w in told] == ([f"latentkv: {found}"] if without else [])

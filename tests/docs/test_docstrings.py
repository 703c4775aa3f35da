"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import kvbm

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(kvbm.__path__, "kvbm.")
    if not module.name.startswith("kvbm._native") and not module.name.endswith("__main__")
)


@pytest.mark.usefixtures("cpu_device")  # some show blocks by NumPy
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_of_module_run(name: str) -> None:
    if name.startswith("kvbm.engines.vllm"):
        pytest.importorskip("vllm", reason="vLLM is not installed")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    assert any(test.examples for test in finder.find(importlib.import_module("kvbm.pool")))

"""Fixtures of the tests that run vLLM: models made once, engines that are always ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_site import ENVIRONMENT, HAS_VLLM, Engine, has_fixed_names, make_model, need_model


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        if HAS_VLLM and not has_fixed_names():
            patch.setenv("PYTHONHASHSEED", "0")
        yield


@pytest.fixture(scope="session")
def model_of(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        need_model(kind)
        if kind not in made:
            made[kind] = make_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture
def start(model_of: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """Give a function that starts an engine and ends the one before it: a process has room for one."""
    engines: list[Engine] = []

    def begin(kind: str = "llama", **arguments: Any) -> Engine:
        while engines:
            engines.pop().close()
        engines.append(Engine(model_of(kind), **arguments))
        return engines[-1]

    yield begin
    while engines:
        engines.pop().close()

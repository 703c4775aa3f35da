"""Says in every run whether the tests ran on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


@pytest.mark.gpu
def test_there_is_a_gpu_to_test_on(why_no_gpu: Callable[[], str]) -> None:
    reason = why_no_gpu()
    if not reason:
        return
    if os.environ.get("KVBM_DEVICE") == "cuda":  # somebody counts on it: silence would look like success
        pytest.fail(reason)
    pytest.skip(f"GPU tests not run: {reason}")

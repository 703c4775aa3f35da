"""What the real engine says at its start of a configuration that cannot work, or not well."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_site import Engine, has_fixed_names, needs_vllm, prompt_of

from kvbm.errors import ConfigError

pytestmark = needs_vllm
Start = Callable[..., Engine]


@pytest.mark.vllm_smoke
def test_an_unknown_key_is_named_with_the_known_ones(start: Start) -> None:
    with pytest.raises(ConfigError, match="no key 'hots', use host, disk"):
        start(extra={"hots": "64MiB"})


def test_a_connector_without_host_memory_says_what_to_give(start: Start, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a host tier: give it memory, as"):
        start(extra={"disk": {"path": str(tmp_path), "size": "128MiB"}})


def test_an_engine_starts_after_one_that_could_not(start: Start, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        start(extra={"disk": {"path": str(tmp_path), "size": "128MiB"}})
    engine = start(disk=tmp_path)
    cold = engine.generate([prompt_of(1, 200)])
    assert cold[1] == [0]
    engine.calm()


def test_the_policy_that_ends_requests_is_warned_of(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="kvbm"):
        start(policy=None)
        assert 'set "kv_load_failure_policy": "recompute"' in caplog.text
        caplog.clear()
        start()
        assert not caplog.text


def test_names_that_no_other_process_gives_are_warned_of_where_a_tier_outlives_this_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvbm.engines.vllm.settings import warn_of_random_names

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with caplog.at_level(logging.WARNING, logger="kvbm"):
        warn_of_random_names({"host": {}}, "xxhash")
        monkeypatch.setenv("PYTHONHASHSEED", "0")
        warn_of_random_names({"host": {}, "disk": {}}, "xxhash")
        assert not caplog.text
        monkeypatch.delenv("PYTHONHASHSEED")
        warn_of_random_names({"host": {}, "disk": {}}, "xxhash")
        assert "set PYTHONHASHSEED to the same number" in caplog.text
        caplog.clear()
        warn_of_random_names({"host": {}, "disk": {}}, "sha256")
        assert bool(caplog.text) is not has_fixed_names()

"""Times as people write them, and the keys that take them."""

from __future__ import annotations

from typing import Any

import pytest

from kvbm.config import Config
from kvbm.config.durations import parse_duration
from kvbm.errors import ConfigError

MODEL = {"num_layers": 1, "inner_dim": 8}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90.0), ("90s", 90.0), (" 1.5 min ", 90.0), ("6h", 21600.0), ("7d", 604800.0), ("0.25s", 0.25)],
)
def test_times_are_read_in_every_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "6 hours", "1h30min", "-1s", "1e3", "6H", "1.2.3s", "6m", "."])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no time, give seconds, more than 0, or a time such as"):
        parse_duration(text)


@pytest.mark.parametrize(("value", "seconds"), [("6h", 21600.0), (30, 30.0), (0.5, 0.5), (None, None)])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_time_to_live_of_a_tier_is_kept_in_seconds_and_survives_a_round_trip(
    tier: str, value: Any, seconds: float | None, tmp_path: Any
) -> None:
    tree: dict[str, Any] = {"model": MODEL, tier: {} if value is None else {"ttl": value}}
    config = Config.from_dict(tree)
    assert config.tier(tier).ttl_s == seconds
    assert Config.from_dict(config.to_dict()) == config
    path = tmp_path / "kvbm.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert Config.from_toml(path) == config


@pytest.mark.parametrize("value", ["0s", 0, -1.0, "soon", True, float("inf"), float("nan")])
def test_time_to_live_that_is_none_is_refused_by_its_key(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"host\.ttl is .*, give seconds, more than 0, or a time such as"):
        Config.from_dict({"model": MODEL, "host": {"ttl": value}})


def test_environment_gives_a_time_with_its_unit() -> None:
    environ = {"KVBM_MODEL__NUM_LAYERS": "1", "KVBM_MODEL__INNER_DIM": "8", "KVBM_HOST__TTL": "30 min"}
    assert Config.from_environment(environ).host.ttl_s == 1800.0

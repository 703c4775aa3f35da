"""Tiers hold copies of what lies above them: a report warns of one that does not grow."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from kvbm.manager import BlockManager
from kvbm.replay import ReplayReport, generate_conversations, replay
from kvbm.replay.html import render_page
from kvbm.replay.request import hashes_of


@pytest.mark.parametrize(
    ("sizes", "warned"),
    [
        ({"device": 500}, []),
        ({"device": 500, "host": 1000, "disk": 20_000}, []),
        ({"device": 500, "host": 999}, ["it adds at most 499"]),
        ({"device": 500, "host": 500, "disk": 400}, ["host has 500 blocks", "so it adds nothing"]),
        ({"device": 500, "host": 0, "disk": 600}, ["disk has 600 blocks, device above it 500"]),
        ({"device": 500, "host": 2000, "remote": 0}, []),  # a store that has no slots
    ],
)
def test_a_tier_that_does_not_grow_is_warned_of(sizes: dict[str, int], warned: list[str]) -> None:
    report = ReplayReport(capacity_by_tier=sizes)
    assert bool(report.warnings) == bool(warned)
    assert not [part for part in warned if part not in "\n".join(report.warnings)]
    assert report.to_dict()["warnings"] == report.warnings


def test_the_warning_is_in_the_table_and_on_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the page needs the extra report")
    with BlockManager(
        num_layers=1, outer_dim=1, page_size=16, inner_dim=16, dtype="uint8", device_blocks=300, host_blocks=310
    ) as manager:
        requests = list(generate_conversations(num_sessions=3, num_turns=2, seed=0))
        report = replay(manager, requests)
        served = [hashes_of(manager, request) for request in requests]
    text = "host has 310 blocks, device above it 300"
    console = Console(width=250)
    with console.capture() as captured:
        console.print(report.to_table("a replay"))
    assert text in captured.get()
    assert text.replace("host", "Host") in render_page(report, served, title="a replay", configuration={})

"""Each kind of event leaves one line that a program can read: words, then key=value."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import kvbm
from kvbm.storage import HostStorage
from kvbm.storage.base import Storage
from kvbm.testing.faults import FaultMode, FaultPlan, FaultyStorage
from kvbm.types import Tier

MakeManager = Callable[..., kvbm.BlockManager]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "logging.md").read_text(encoding="utf-8")
LINE = re.compile(r"(?P<event>[a-z][a-z ]*[a-z])(?P<pairs>( \w+=\S+)*?)(?P<text> (reason|error)=.*)?")
ROUTE = {"source": "device", "destination": "host"}


def read(record: logging.LogRecord) -> tuple[str, dict[str, str]]:
    """Take a line apart, as the documentation says that it can be."""
    match = LINE.fullmatch(record.getMessage())
    assert match, record.getMessage()
    pairs = [pair.split("=", 1) for pair in match["pairs"].split()]
    if match["text"]:
        pairs.append(match["text"].strip().split("=", 1))
    return match["event"], dict(pairs)


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Callable[..., list[dict[str, str]]]:
    """Give the key=value pairs of each line of an event, with its logger and level; all else must be readable too."""
    caplog.set_level(logging.DEBUG, "kvbm")

    def find(event: str, logger: str, level: int) -> list[dict[str, str]]:
        lines = [(record, *read(record)) for record in caplog.records if record.name.startswith("kvbm")]
        found = [(record, pairs) for record, name, pairs in lines if name == event]
        assert all((record.name, record.levelno) == (logger, level) for record, _ in found)
        return [pairs for _, pairs in found]

    return find


def fill(manager: kvbm.BlockManager, first_token: int = 0) -> kvbm.TokenSequence:
    sequence = manager.sequence(range(first_token, first_token + 48))
    manager.register_blocks(manager.allocate_blocks(3).complete(sequence.hashes)).release()
    manager.flush(60)
    return sequence


def over_faulty_host(make_manager: MakeManager, plan: FaultPlan) -> kvbm.BlockManager:
    layout = kvbm.BlockLayout.fully_contiguous(
        num_blocks=16, num_layers=1, outer_dim=2, block_size=16, inner_dim=8, dtype="uint8"
    )
    storages: dict[Tier, Storage] = {
        Tier.DEVICE: HostStorage(layout),
        Tier.HOST: FaultyStorage(HostStorage(layout), plan),
    }
    return make_manager(device_blocks=0, host_blocks=0, disk_blocks=0, disk_path=None, storages=storages)


def test_allocation_and_release_are_logged(
    make_manager: MakeManager, events: Callable[..., list[dict[str, str]]]
) -> None:
    manager = make_manager(device_blocks=4, host_blocks=0, disk_blocks=0, disk_path=None)
    fill(manager)
    with manager.allocate_blocks(2):
        assert manager.try_allocate_blocks(3) is None
    assert events("allocated", "kvbm.pool", logging.DEBUG) == [
        {"pool": "device", "num_blocks": "3", "num_evicted": "0"},
        {"pool": "device", "num_blocks": "2", "num_evicted": "1"},
    ]
    assert events("allocation refused", "kvbm.pool", logging.DEBUG) == [{"pool": "device", "num_blocks": "3"}]
    assert events("released", "kvbm.pool", logging.DEBUG) == [
        {"pool": "device", "num_blocks": "3", "is_registered": "True"},
        {"pool": "device", "num_blocks": "2", "is_registered": "False"},
    ]


def test_tiers_are_logged_when_they_open(
    make_manager: MakeManager, events: Callable[..., list[dict[str, str]]]
) -> None:
    make_manager(worker_id="w3")
    opened = events("tier opened", "kvbm.manager", logging.INFO)
    assert [(line["tier"], line["num_blocks"]) for line in opened] == [("device", "8"), ("host", "16"), ("disk", "64")]
    assert {(line["worker_id"], line["block_nbytes"]) for line in opened} == {("w3", "256")}


def test_offload_migration_and_onboard_are_logged(
    make_manager: MakeManager, events: Callable[..., list[dict[str, str]]]
) -> None:
    manager = make_manager(disk_blocks=0, disk_path=None)
    sequence = fill(manager)
    manager.reset_pool("device")
    manager.onboard(manager.match_sequence_hashes(sequence.hashes)).result(60).release()
    sent = events("offload sent", "kvbm.planner", logging.DEBUG)
    assert {line["job_id"] for line in sent} == {str(i + 1) for i in range(len(sent))}
    assert all(line.items() >= ROUTE.items() for line in sent)
    (up,) = events("onboard sent", "kvbm.planner", logging.DEBUG)
    assert (up["source"], up["destination"], up["num_blocks"]) == ("host", "device", "3")
    migrated = events("migrated", "kvbm.planner", logging.DEBUG)
    down, back = migrated[:-1], migrated[-1]
    assert sum(int(line["num_blocks"]) for line in down) == 3
    assert sum(int(line["nbytes"]) for line in down) == int(back["nbytes"]) == 3 * 256
    assert {line["job_id"] for line in down} == {line["job_id"] for line in sent}
    assert (back["job_id"], back["num_blocks"]) == (up["job_id"], "3")
    assert all(float(line["seconds"]) >= 0 for line in migrated)


def test_drops_are_logged_with_their_reason(
    make_manager: MakeManager, events: Callable[..., list[dict[str, str]]]
) -> None:
    manager = over_faulty_host(make_manager, FaultPlan([FaultMode.FAIL], affects="all", on="write"))
    fill(manager)
    dropped = {**ROUTE, "reason": "failed", "num_blocks": "3"}
    assert events("offload dropped", "kvbm.planner", logging.DEBUG) == [dropped]
    assert events("offload incomplete", "kvbm.planner", logging.WARNING) == [
        {**ROUTE, "num_blocks": "3", "num_moved": "0", "reason": "write error"}
    ]
    assert not events("migrated", "kvbm.planner", logging.DEBUG)


def test_bad_bytes_are_logged_when_they_are_found(
    make_manager: MakeManager, events: Callable[..., list[dict[str, str]]]
) -> None:
    manager = over_faulty_host(make_manager, FaultPlan([FaultMode.FLIP], affects="one", on="read"))
    sequence = fill(manager)
    manager.reset_pool("device")
    manager.onboard(manager.match_sequence_hashes(sequence.hashes)).result(60).release()
    (line,) = events("onboard incomplete", "kvbm.planner", logging.WARNING)
    assert line["reason"] == "checksum mismatch"
    assert (line["source"], line["num_blocks"], line["num_good"], line["num_corrupt"]) == ("host", "3", "2", "1")


def test_error_of_the_executor_is_logged(
    make_manager: MakeManager, events: Callable[..., list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = over_faulty_host(make_manager, FaultPlan())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(5, "no such luck = none")

    monkeypatch.setattr(manager.storage("host"), "submit_write", refuse)
    fill(manager)
    (line,) = events("copy failed", "kvbm.executor", logging.ERROR)
    assert line.items() >= {**ROUTE, "num_blocks": "3", "error": "OSError(5, 'no such luck = none')"}.items()


def test_nothing_is_formatted_while_nobody_wants_it(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvbm")
    fill(make_manager())
    assert not [record for record in caplog.records if record.name in ("kvbm.pool", "kvbm.planner")]


def test_page_has_every_event_that_pool_and_planner_log() -> None:
    package = Path(kvbm.__file__).parent
    sources = [package / "pool.py", *sorted((package / "planner").glob("*load.py")), package / "planner" / "onboard.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in sources)
    call = r'_log\.(?:debug\(|info\(|warning\(|error\(|log\(\s*self\._complaints\.level\("[a-z ]+"\),)'
    logged = re.findall(call + r'\s*"([a-z ]+?) (\w+=[^"]*)"', source)
    assert len(logged) >= 10
    for event, pairs in logged:
        (row,) = re.findall(rf"^\| `kvbm\.\w+` \| \w+ \| `{event}`.*$", PAGE, re.MULTILINE)
        assert re.findall(r"`(\w+)`", row.rpartition("|")[0].rpartition("|")[2]) == re.findall(r"(\w+)=", pairs)

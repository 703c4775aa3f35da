"""``kvbm explain``: what it prints of processes that serve, and its exit statuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from kvbm._backend import default_backend
from kvbm.cli.explain import explain
from kvbm.engines.explain_socket import ExplainSocket
from kvbm.engines.groups import Group
from kvbm.engines.history import History
from kvbm.engines.step_channel import StepChannels
from kvbm.errors import ConfigError
from kvbm.planner import Advice, Planner
from kvbm.pool import BlockPool
from kvbm.types import HashArray, Tier

Serve = Callable[[History], ExplainSocket]
Run = Callable[..., str]
TIERS = [Tier.HOST, Tier.DISK]


class Clock:
    """Seconds that go on when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folder of a session, where nobody else's sockets lie."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "kvbm"


@pytest.fixture
def serve(runtime: Path) -> Iterator[Serve]:
    """Let a history be asked."""
    begun: list[ExplainSocket] = []

    def start(history: History) -> ExplainSocket:
        begun.append(ExplainSocket(history, runtime))
        return begun[-1]

    yield start
    for one in begun:
        one.close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command; give what it wrote to stdout."""
    monkeypatch.setenv("COLUMNS", "220")
    app = typer.Typer()
    app.command()(explain)

    def call(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result.output

    return call


def names_of(num_blocks: int) -> HashArray:
    return np.arange(1, 2 * num_blocks + 1, dtype=np.uint64).reshape(-1, 2)


def make_history(clock: Clock | None = None) -> tuple[History, list[BlockPool]]:
    backend = default_backend()
    pools = [BlockPool(8, tier=tier, backend=backend) for tier in TIERS]
    channels = StepChannels(1)
    planner = Planner(pools, channels.channels, foreign_tier=Tier.DEVICE)
    return History([Group(planner, channels)], block_tokens=16, clock=clock or Clock()), pools


def served() -> History:
    """Tell of a request that was evicted in part, loaded in part, preempted, and has ended."""
    clock = Clock()
    history, (host, _) = make_history(clock)
    names = names_of(10)
    host.register_blocks(host.allocate_blocks(8).complete(names[2:])).release()
    history.asked("cmpl-2", names[:1], num_computed=0, most=1, num_there=0, num_blocks=0)
    history.saved("cmpl-2", 3)
    host.allocate_blocks(3).release()  # evicts the deepest
    history.step()
    clock.now += 7.0
    where = np.array([0, 0, 1, 1, 1, -1, -1, -1, -1, -1], dtype=np.int8)
    advice = Advice(5, 5, (), 0.25, 1.5, 0.25, 0.0, "loading is sooner")
    missed = names.copy()
    missed[5] = names[9]
    history.asked(
        "cmpl-1", missed, num_computed=0, most=10, lying=[(TIERS, where)], num_there=5, num_blocks=5, advice=advice
    )
    history.allocated("cmpl-1", first=0, last=5)
    history.staged("cmpl-1", {"host": 2, "disk": 3})
    history.noted("cmpl-1", "a load failed: \x1b[31mred")
    history.saved("cmpl-1", 5)
    history.preempted("cmpl-1")
    return history


def test_recent_requests_of_every_process_are_listed(serve: Serve, run: Run) -> None:
    serve(served())
    other, _ = make_history()
    serve(other)
    told = run()
    assert f"process {os.getpid()}: 2 recent requests" in told
    assert f"process {os.getpid()}: 0 recent requests" in told
    line = next(line for line in told.splitlines() if "cmpl-1" in line)
    assert [cell.strip() for cell in line.split("│")[1:-1]][3:] == ["10", "0", "5", "0", "2 host, 3 disk", ""]
    assert told.index("cmpl-1") < told.index("cmpl-2"), "youngest first"
    assert "cmpl-2" not in run("--limit", "1")


def test_request_is_told_from_its_chain_to_what_its_load_cost(serve: Serve, run: Run) -> None:
    history = served()
    record = history.records()[-1]
    record.loads[0].seconds, record.loads[0].num_good = 0.3, 4
    record.loads[0].losses = ("group 0: block 4 and those behind it: it left the disk tier meanwhile (checksum)",)
    history.finished("cmpl-1")
    serve(history)
    told = run("cmpl-1")
    for text in (
        f"│ {os.getpid()}",
        "finished; first asked for",
        "10 blocks of 16 tokens: 0100000000000000",
        "5 of 10 blocks that can be used, 0 of them in the engine",
        "0-1 host, 2-4 disk, 5-9 none",
        "block 5 (1300000000000000",
        "it left the host tier 7 s before (evicted, one of 3 in that step, for 3 blocks of request cmpl-2; 0 of 8",
        "the disk tier has not had it since this process began",
        "there is no remote tier",
        "5 blocks to load; predicted 250 ms, to compute all that is there 1.5 s",
        "blocks 0-4, found in 2 host, 3 disk; 4 of 5 came, in 300 ms",
        "it left the disk tier meanwhile (checksum)",
        "5 blocks were given to be saved",
        "once",
        r"a load failed: \x1b[31mred",
    ):
        assert text in told, text
    assert "\x1b" not in told


def test_json_has_all_of_it(serve: Serve, run: Run) -> None:
    serve(served())
    told: dict[str, Any] = json.loads(run("cmpl-1", "--json"))
    assert told["summary"]["request_id"] == "cmpl-1"
    assert told["pid"] == os.getpid()
    assert [run["tier"] for run in told["answers"][0]["groups"][0]["runs"]] == ["host", "disk", "none"]
    assert [reason["why"] for reason in told["answers"][0]["misses"][0]["reasons"]] == [
        "evicted", "never seen", "tier absent"
    ]  # fmt: skip
    listed = json.loads(run("--json"))
    assert [one["request_id"] for one in listed["processes"][0]["requests"]] == ["cmpl-1", "cmpl-2"]


def test_beginning_of_an_id_is_enough_where_it_means_one(serve: Serve, run: Run) -> None:
    history, _ = make_history()
    for request_id in ("cmpl-11", "cmpl-12", "chat"):
        history.asked(request_id, names_of(1), num_computed=0, most=1, num_there=0, num_blocks=0)
    serve(history)
    assert "request chat" in run("ch")
    told = run("cmpl", status=1)
    assert "'cmpl' may be one of these" in told
    assert "cmpl-11" in told
    assert "cmpl-12" in told
    candidates = json.loads(run("cmpl", "--json", status=1))["candidates"]
    assert [(one["pid"], one["request_id"]) for one in candidates] == [
        (os.getpid(), "cmpl-12"), (os.getpid(), "cmpl-11")
    ]  # fmt: skip


def test_request_that_two_processes_know_is_told_of_neither(serve: Serve, run: Run) -> None:
    for _ in range(2):
        history, _ = make_history()
        history.asked("a", names_of(1), num_computed=0, most=1, num_there=0, num_blocks=0)
        serve(history)
    assert run("a", status=1).count("finished") == 0
    assert "'a' may be one of these" in run("a", status=1)


def test_unknown_request_is_told_with_those_who_were_asked(serve: Serve, run: Run) -> None:
    serve(served())
    told = run("nobody", status=1)
    assert f"no recent request begins with 'nobody'; asked process {os.getpid()} (2 requests)" in told


def test_process_without_a_socket_is_refused_and_those_that_have_one_are_named(serve: Serve, run: Run) -> None:
    serve(served())
    assert "cmpl-1" in run("--pid", str(os.getpid()))
    with pytest.raises(ConfigError, match=f"process 1 does not explain itself, these do: {os.getpid()} "):
        run("--pid", "1")


def test_without_any_process_the_folders_that_were_looked_in_are_named(runtime: Path, run: Run) -> None:
    with pytest.raises(ConfigError, match=f"looked in {runtime}, "):
        run("a")


def test_process_that_does_not_answer_is_told_beside_the_others(
    serve: Serve, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(served())
    broken, _ = make_history()
    monkeypatch.setattr(broken, "records", lambda: 1 / 0)
    serve(broken)
    told = run(status=2)
    assert "cmpl-1" in told
    assert "does not answer: it has gone" in told
    assert "request cmpl-1" in run("cmpl-1", status=2)

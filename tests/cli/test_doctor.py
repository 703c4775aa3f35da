"""``kvbm doctor`` without vLLM: what it prints, its exit statuses, and children that die or hang."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbm.cli import main as cli
from kvbm.engines.doctor import examine as examination
from kvbm.engines.doctor.child import STAND_IN, findings_of, run_child
from kvbm.engines.doctor.findings import Finding, State, exit_status
from kvbm.engines.doctor.setup import make_setup, make_transfer

HAS_OBSTORE = importlib.util.find_spec("obstore") is not None
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command as `main` does, as if vLLM were absent; give what it wrote to stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setattr(examination, "find_vllm", lambda: None)

    def call(*arguments: str | Path, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["kvbm", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert (ended.value.code or 0) == status, captured.out + captured.err
        return captured.out, captured.err

    return call


def states_of(findings: list[Finding]) -> dict[str, State]:
    return {one.subject: one.state for one in findings}


def make(extra: dict[str, Any] | None = None, **more: Any) -> Any:
    transfer = {**make_transfer("1MiB", None, None, None), **more.pop("transfer", {})}
    if extra is not None:
        transfer["kv_connector_extra_config"] = extra
    return make_setup(transfer, engine=more.pop("engine", {}), **more)


# -- the command -----------------------------------------------------------------------------------------------


def test_without_vllm_every_tier_is_still_tried_with_real_bytes(run: Run, tmp_path: Path) -> None:
    disk, remote, file = tmp_path / "disk", tmp_path / "remote", tmp_path / "found.json"
    disk.mkdir()
    remote.mkdir()
    arguments = ["--host", "1MiB", "--disk", "2MiB", "--disk-path", disk, "--kv-cache-memory", "1MiB", "--json", file]
    shown, _ = run(*arguments, *(["--remote", remote.as_uri()] if HAS_OBSTORE else []), status=1)
    report = json.loads(file.read_text())
    states = {one["subject"]: one["state"] for one in report["findings"]}
    tiers = ["host", "disk", *(["remote"] if HAS_OBSTORE else [])]
    assert [states[f"golden blocks, {tier}"] for tier in tiers] == ["ok"] * len(tiers)
    assert (states["flipped byte"], states["tiers"], states["vllm"], report["status"]) == ("ok", "ok", "warning", 1)
    assert "every byte right" in shown
    assert "safe, with warnings" in shown
    assert '"kv_load_failure_policy": "recompute"' in shown
    assert not list(disk.iterdir()), "nothing is left on the disk"
    assert not [path for path in remote.rglob("*") if path.is_file()], "nothing is left in the store"


def test_the_operators_json_is_read_from_a_file_and_its_policy_is_warned_of(run: Run, tmp_path: Path) -> None:
    transfer = {**make_transfer("1MiB", None, None, None), "kv_load_failure_policy": "fail"}
    (tmp_path / "transfer.json").write_text(json.dumps(transfer))
    shown, _ = run("--kv-transfer-config", f"@{tmp_path}/transfer.json", status=1)
    (line,) = (line for line in shown.splitlines() if "kv_load_failure_policy" in line)
    assert "warning" in line
    assert '"kv_load_failure_policy": "recompute"' in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --kv-transfer-config as the engine gets it, or --host SIZE"),
        (("--host", "1MiB", "--disk", "1MiB"), "give both --disk SIZE and --disk-path DIR, or neither"),
        (("--kv-transfer-config", "{}", "--host", "1MiB"), "says all of the tiers: leave --host out"),
        (("--kv-transfer-config", "{host: 1}"), "is no JSON"),
        (("--kv-transfer-config", "[]"), "is no JSON object: give {...}"),
        (("--kv-transfer-config", "@/nowhere.json"), "the file /nowhere.json cannot be read"),
        (("--kv-transfer-config", '{"kv_connector_extra_config": {"hots": 1}}'), "has no key 'hots'"),
        (("--kv-transfer-config", '{"kv_connector_extra_config": {"host": null}}'), "is no object of sections"),
        (("--host", "lots"), "host.size is 'lots', give bytes, or a size"),
        (("--host", "1MiB", "--kv-cache-memory", "x"), "'x' is no size"),
        (("--host", "1MiB", "--json", "/nowhere/x.json"), "--json /nowhere/x.json cannot be written"),
    ],
)
def test_wrong_input_is_one_line_and_status_two(run: Run, arguments: tuple[str, ...], message: str) -> None:
    _, errors = run(*arguments, status=2)
    (line,) = (line for line in errors.splitlines() if line.startswith("kvbm: "))
    assert message in line


# -- the child -------------------------------------------------------------------------------------------------


def child(code: str, folder: Path, timeout_s: float = 60.0) -> list[Finding]:
    command = [sys.executable, "-S", "-c", f"import json, os, signal, sys\nask = json.load(open(sys.argv[1]))\n{code}"]
    return findings_of(run_child(command, {}, folder=folder, timeout_s=timeout_s), what="engine", timeout_s=timeout_s)


def test_a_child_that_dies_is_a_row_with_its_last_words(tmp_path: Path) -> None:
    code = "open(ask['report'], 'w').write('{\"stage\": \"starting the engine\"}\\n{\"sta')\n"
    (row,) = child(code + "print('out of luck', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert (row.state, exit_status([row])) == (State.UNSAFE, 2)
    assert row.found == "died with SIGKILL at: starting the engine: out of luck"
    assert row.advice == "too little memory?"


def test_a_child_runs_the_same_kvbm_wherever_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvbm").mkdir()
    (tmp_path / "kvbm" / "__init__.py").write_text("raise RuntimeError('a source tree')")
    (tmp_path / "runpy.py").write_text("raise RuntimeError('a source tree')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    end = run_child(STAND_IN, {}, folder=tmp_path, timeout_s=60.0)
    assert "a source tree" not in end.words
    assert "KeyError: 'transfer'" in end.words, "it began, and misses its request"
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "runpy.py").unlink()
    assert "a source tree" in run_child(STAND_IN, {}, folder=tmp_path, timeout_s=60.0).words, "as this process does"


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    lines = ['{"stage": "opening"}', '{"error": "ConfigError: no room"}']
    (row,) = child(f"open(ask['report'], 'w').write('\\n'.join({lines!r}))\nsys.exit(1)", tmp_path)
    assert (row.state, row.found) == (State.UNSAFE, "opening: ConfigError: no room")


def test_a_child_that_hangs_is_killed_at_its_deadline(tmp_path: Path) -> None:
    (row,) = child("signal.pause()", tmp_path, timeout_s=0.2)
    assert row.state is State.UNSAFE
    assert row.found.startswith("hung for 0.2 s at: ")


def test_a_child_that_ends_badly_after_its_work_is_a_warning(tmp_path: Path) -> None:
    (row,) = child("open(ask['report'], 'w').write('{\"end\": true}\\n')\nos.abort()", tmp_path)
    assert (row.state, row.found) == (State.WARNING, "did what it should and ended with SIGABRT")


def test_processes_of_the_child_do_not_outlive_it(tmp_path: Path) -> None:
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        child(f"os.open({str(fifo)!r}, os.O_WRONLY)\nif os.fork(): os._exit(0)\nsignal.pause()", tmp_path)
        os.set_blocking(end, True)
        assert os.read(end, 1) == b"", "the last process that held it is gone"
    finally:
        os.close(end)


def test_a_child_that_never_was_up_leaves_the_other_rows(tmp_path: Path) -> None:
    setup = make({"host": "1MiB", "disk": {"path": str(tmp_path), "size": "1MiB"}})
    findings = examination.examine(setup, command=[sys.executable, "-S", "-c", "raise SystemExit(3)"])
    states = states_of(findings)
    assert states["disk"] is State.OK
    assert {one.found for one in findings if one.state is State.UNSAFE} == {"died with status 3 at: nothing"}
    assert not list(tmp_path.iterdir())

"""``kvbm doctor`` with the real vLLM: as an operator runs it, and with bytes that are spoilt on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_site import needs_vllm

from kvbm.engines.doctor import examine as examination
from kvbm.engines.doctor.child import ChildEnd
from kvbm.engines.doctor.findings import Finding, State, exit_status
from kvbm.engines.doctor.report import ChildReport
from kvbm.engines.doctor.setup import make_setup, make_transfer
from kvbm.executor import Executor
from kvbm.jobs import CopyJob, Job, JobResult
from kvbm.storage import DeviceStorage
from kvbm.types import Tier

pytestmark = needs_vllm
ARGUMENTS = {"block_size": 64, "dtype": "float32"}


def test_an_operator_without_a_model_at_hand_is_told_that_all_is_safe(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "kvbm.cli.main", "doctor", "--engine", "vllm", "--host", "64MiB"]
    command += ["--disk", "128MiB", "--disk-path", str(tmp_path / "disk"), "--json", str(file), "--timeout", "100"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
        timeout=110,
        cwd=tempfile.gettempdir(),
    )
    findings = {one["subject"]: one for one in json.loads(file.read_text())["findings"]}
    counted = [one for one in findings.values() if one["state"] in ("warning", "unsafe")]
    # What differs from machine to machine: where temporary files lie, huge pages, the twin that is installed.
    counted = [one for one in counted if one["subject"] not in ("file system", "huge pages", "kvbm", "python")]
    assert counted == [], done.stdout
    assert done.returncode in (0, 1), done.stdout + done.stderr
    subjects = ("engine", "layout", "golden blocks, host", "golden blocks, disk", "flipped byte")
    assert [findings[subject]["state"] for subject in subjects] == ["ok"] * len(subjects)
    assert "4 layers on" in findings["layout"]["found"]
    assert findings["model"]["state"] == "note"
    assert not list(tmp_path.glob(".kvbm-doctor*")), "nothing is left"


@pytest.fixture
def ask_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Finding]]]:
    """Give a function that examines with the child's work done in this process, where vLLM is imported already."""
    from kvbm.engines.vllm import doctor_child

    def run_here(command: Sequence[str], request: Mapping[str, Any], *, folder: Path, timeout_s: float) -> ChildEnd:
        report, asked = folder / "report.jsonl", folder / "request.json"
        asked.write_text(json.dumps({**request, "report": str(report)}))
        status = 0
        try:
            doctor_child.main(str(asked))
        except Exception:  # is in the report
            status = 1
        return ChildEnd(ChildReport.read(report), status, "")

    monkeypatch.setattr(examination, "run_child", run_here)

    def examine(model: Path, **transfer: Any) -> list[Finding]:
        setup = make_setup(
            {**make_transfer("64MiB", None, None, None), **transfer},
            engine=ARGUMENTS,
            model=str(model),
            device_nbytes=1 << 20,
        )
        return examination.examine(setup)

    yield examine
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()


def states_of(findings: list[Finding]) -> dict[str, State]:
    return {one.subject: one.state for one in findings}


def test_a_policy_that_fails_requests_is_warned_of_and_the_rest_is_ok(
    ask_here: Callable[..., list[Finding]], model_of: Callable[[str], Path]
) -> None:
    findings = ask_here(model_of("gemma3"), kv_load_failure_policy="fail")
    states = states_of(findings)
    assert states["kv_load_failure_policy"] is State.WARNING
    assert (states["engine"], states["golden blocks, host"], states["flipped byte"]) == (State.OK,) * 3
    assert exit_status(findings) == 1
    (layout,) = (one.found for one in findings if one.subject == "layout")
    assert "group 1, rank 0: 2 layers on cpu, blocks of 32,768 bytes every 32,768" in layout


def test_a_byte_spoilt_on_its_way_into_the_engine_is_unsafe(
    ask_here: Callable[..., list[Finding]], model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = Executor.execute

    def spoil(executor: Executor, job: Job, deadline: float | None = None) -> JobResult:
        result = execute(executor, job, deadline)
        if isinstance(job, CopyJob) and job.destination is Tier.DEVICE:
            memory = executor._means.storage(Tier.DEVICE)
            assert isinstance(memory, DeviceStorage)
            block = memory.read(job.destination_ids[:1])
            block[0, 5] ^= np.uint8(1)
            memory.write(job.destination_ids[:1], block)
        return result

    monkeypatch.setattr(Executor, "execute", spoil)
    findings = ask_here(model_of("llama"))
    (row,) = (one for one in findings if one.subject == "golden blocks, host")
    assert (row.state, exit_status(findings)) == (State.UNSAFE, 2)
    assert "1 wrong bytes, first in block 23 at byte 5" in row.found


def test_an_engine_that_does_not_start_says_why(
    ask_here: Callable[..., list[Finding]], model_of: Callable[[str], Path]
) -> None:
    findings = ask_here(model_of("llama"), kv_connector_extra_config={"host": "64MiB", "offload": {"polcy": 1}})
    (row,) = (one for one in findings if one.subject == "engine")
    assert row.state is State.UNSAFE
    assert row.found.startswith("starting the engine: ConfigError: ")
    assert "polcy" in row.found

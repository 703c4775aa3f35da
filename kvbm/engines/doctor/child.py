"""Runs what can hang or die in a process of its own, with a deadline, and turns what became of it into findings."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbm.engines.doctor.findings import Finding, State, show_nbytes
from kvbm.engines.doctor.report import ChildReport

# As -m does, but for the folder that Python begins its path with: one with a source tree would hide the kvbm that is
# installed. PYTHONSAFEPATH keeps it out from Python 3.11 on; 3.10 knows no such thing, there it is taken out.
_START = """
import os, sys
if os.environ.get("PYTHONSAFEPATH") and sys.path[:1] == [""]:
    del sys.path[0]
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
STAND_IN = (sys.executable, "-c", _START, "kvbm.engines.doctor.stand_in")
VLLM = (sys.executable, "-c", _START, "kvbm.engines.vllm.doctor_child")
# A doctor loads nothing from afar and tells nobody, and its engine is one process, which starts sooner.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_NUM_LINES = 4  # of the child's own words that are shown
_MAX_CHARACTERS = 600


@dataclass(frozen=True)
class ChildEnd:
    """How a child ended.

    Attributes
    ----------
    report : ChildReport
    status : int or None
        Exit status, negative for a signal; None: it was killed at its deadline.
    words : str
        The last that it wrote to stdout or stderr.
    """

    report: ChildReport
    status: int | None
    words: str


def run_child(command: Sequence[str], request: Mapping[str, Any], *, folder: Path, timeout_s: float) -> ChildEnd:
    """Run a child to its end, or to its deadline; none of its processes is left.

    Parameters
    ----------
    command : sequence of str
        The name of a file with the request is added to it.
    request : mapping
        Plain values; the path of the report is added to them.
    folder : Path
        For request, report and words.
    timeout_s : float
    """
    report, words, asked = folder / "report.jsonl", folder / "words.txt", folder / "request.json"
    asked.write_text(json.dumps({**request, "report": str(report)}), encoding="utf-8")
    environment = {**ENVIRONMENT, **os.environ}
    if not {"", str(Path.cwd())} & set(sys.path):  # this process has it from elsewhere
        environment["PYTHONSAFEPATH"] = "1"
    with words.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(asked)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers of its own, too
            process.wait()
    return ChildEnd(ChildReport.read(report), status, _last_words(words))


def findings_of(end: ChildEnd, *, what: str, timeout_s: float) -> list[Finding]:
    """Say what a child has seen, and how it ended.

    Parameters
    ----------
    end : ChildEnd
    what : str
        The row's name.
    timeout_s : float
        That it was given.
    """
    report = end.report
    found = [_of_end(end, what, timeout_s)]
    advice = "serve this model without the connector here"
    found += [Finding("hits", State.WARNING, text, advice) for text in report.warnings]
    if report.layouts:
        found.append(_of_layouts(report.layouts))
    found += {(disk["engine_name"], disk["io_mode"]): _of_disk(disk) for disk in report.disks}.values()
    tiers = list(dict.fromkeys(result["tier"] for result in report.golden))
    return found + [_of_golden(tier, [one for one in report.golden if one["tier"] == tier]) for tier in tiers]


# -- private ---------------------------------------------------------------------------------------------------


def _of_end(end: ChildEnd, what: str, timeout_s: float) -> Finding:
    report = end.report
    words = f": {end.words}" if end.words else ""
    if report.error:
        return Finding(what, State.UNSAFE, f"{report.stage}: {report.error}", "mend this first; nothing else is sure")
    if report.is_complete and end.status == 0:
        return Finding(what, State.OK, "started, and ended when it was told to")
    if report.is_complete:
        how = "did not end" if end.status is None else f"ended with {_status_name(end.status)}"
        advice = "look at what else runs in this process: plug-ins, sitecustomize, preloaded libraries"
        return Finding(what, State.WARNING, f"did what it should and {how}{words}", advice)
    if end.status is None:
        advice = "a longer --timeout if it was only slow; else what it waits for is what an engine would wait for"
        return Finding(what, State.UNSAFE, f"hung for {timeout_s:g} s at: {report.stage}{words}", advice)
    advice = "too little memory?" if end.status == -signal.SIGKILL else "mend this first; nothing else is sure"
    return Finding(what, State.UNSAFE, f"died with {_status_name(end.status)} at: {report.stage}{words}", advice)


def _of_layouts(layouts: Sequence[Mapping[str, Any]]) -> Finding:
    parts = []
    for one in layouts:
        where = f"group {one['group']}, rank {one['rank']}: " if len(layouts) > 1 else ""
        parts.append(
            f"{where}{one['num_layers']} layers on {one['device']}, blocks of {one['layer_nbytes']:,} bytes every "
            f"{one['stride_nbytes']:,} ({one['described']}), fingerprint {one['fingerprint']}"
        )
    return Finding("layout", State.OK, "; ".join(parts))


def _of_disk(disk: Mapping[str, str]) -> Finding:
    text = f"{disk['io_mode']} I/O by {disk['engine_name']}"
    if disk["io_mode"] == "direct":
        return Finding("disk I/O", State.OK, text)
    why = disk["io_mode_reason"]
    advice = "a file system with O_DIRECT keeps the page cache out of it: blocks are cached twice otherwise"
    return Finding("disk I/O", State.NOTE, f"{text}: {why}" if why else text, advice)


def _of_golden(tier: str, results: Sequence[Mapping[str, Any]]) -> Finding:
    name = "flipped byte" if tier == "flip" else f"golden blocks, {tier}"
    bad = [one for one in results if one["problem"]]
    if bad:
        text = "; ".join(f"group {one['group']}, rank {one['rank']}: {one['problem']}" for one in bad)
        advice = "do not serve with this tier; report it with the output of --json"
        return Finding(name, State.UNSAFE, text, advice)
    num_blocks, nbytes = (sum(one[key] for one in results) for key in ("num_blocks", "nbytes"))
    seconds = sum(one["seconds"] for one in results)
    if tier == "flip":
        return Finding(name, State.OK, "noticed in the host tier, and the block was refused")
    text = f"{num_blocks} blocks, {show_nbytes(nbytes)}, there and back in {seconds * 1e3:.1f} ms: every byte right"
    return Finding(name, State.OK, text)


def _status_name(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _last_words(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-_NUM_LINES:])[-_MAX_CHARACTERS:]

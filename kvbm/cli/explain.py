"""``kvbm explain``: why a recent request was served as it was, told by the process that serves it."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvbm.engines.explain_client import ask, find_processes
from kvbm.engines.explain_socket import VERSION, Question, Reply, runtime_folders
from kvbm.engines.explanation import Answer, Explanation, GroupRuns, Loaded, Summary
from kvbm.errors import ConfigError, KvbmError

_RUNS = 12  # of one group that are printed; --json has more


def explain(
    request: Annotated[str | None, typer.Argument(help="Id of a recent request, or how it begins.")] = None,
    pid: Annotated[int | None, typer.Option("--pid", help="Ask this process only; default: all of yours.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1024, help="Requests in the list.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where a recent request matched, why no further, what was loaded, and what that cost.

    Without REQUEST the recent requests of every process are listed. Exits with 1 where no one request is meant.
    """
    replies, problems = _ask_all(pid, request, limit)
    found = [reply.explanation for reply in replies if reply.explanation is not None]
    if request is None:
        if as_json:
            typer.echo(json.dumps({"processes": [_plain_values(reply) for reply in replies]}, indent=2))
        else:
            for reply in replies:
                _list(f"process {reply.pid}: {reply.num_known} recent requests", reply.summaries)
    elif len(found) == 1:
        if as_json:
            typer.echo(json.dumps(msgspec.to_builtins(found[0]), indent=2))
        else:
            _show(found[0])
    elif as_json:
        candidates = [{**msgspec.to_builtins(one), "pid": pid} for pid, one in _candidates(replies)]
        typer.echo(json.dumps({"explanation": None, "candidates": candidates}, indent=2))
    else:
        _tell_candidates(request, replies)
    for problem in problems:
        Console(stderr=True, soft_wrap=True).print(f"kvbm: {_plain(problem)}", style="red", markup=False)
    if request is not None and len(found) != 1:
        raise typer.Exit(1)
    if problems:
        raise typer.Exit(2)


def _ask_all(pid: int | None, request: str | None, limit: int) -> tuple[list[Reply], list[str]]:
    """Ask every process that is meant; give the answers, and why others gave none."""
    every = find_processes()
    meant = [path for number, path in every if pid in (None, number)]
    if not meant:
        where = ", ".join(map(str, runtime_folders()))
        if not every:
            raise ConfigError(f"no process of yours explains itself: looked in {where} for a connector's socket")
        known = ", ".join(str(number) for number, _ in every)
        raise ConfigError(f"process {pid} does not explain itself, these do: {known} (looked in {where})")
    question = Question(VERSION, "list", limit=limit) if request is None else Question(VERSION, "explain", request)
    replies, problems = [], []
    for path in meant:
        try:
            replies.append(ask(path, question))
        except KvbmError as error:
            problems.append(str(error))
    return replies, problems


def _candidates(replies: list[Reply]) -> list[tuple[int, Summary]]:
    """Give process and request for each that may be meant."""
    found = [(reply.pid, summary) for reply in replies for summary in reply.summaries]
    return found + [(reply.pid, reply.explanation.summary) for reply in replies if reply.explanation is not None]


def _tell_candidates(request: str, replies: list[Reply]) -> None:
    candidates = _candidates(replies)
    if not candidates:
        known = ", ".join(f"{reply.pid} ({reply.num_known} requests)" for reply in replies) or "none"
        _say(f"no recent request begins with {request!r}; asked process {known}")
        return
    _say(f"{request!r} may be one of these; give more of its id, or --pid:")
    for pid in dict.fromkeys(pid for pid, _ in candidates):
        _list(f"process {pid}", [one for number, one in candidates if number == pid])


# -- the list --------------------------------------------------------------------------------------------------


def _list(title: str, summaries: list[Summary]) -> None:
    table = Table(title=escape(title), title_justify="left")
    for name in ("request", "state", "age", "blocks", "in engine", "promised", "loaded", "from", "took"):
        table.add_column(name, justify="left" if name in ("request", "state", "from") else "right", overflow="fold")
    now = time.time()
    for one in summaries:
        cells = (
            one.request_id,
            one.state,
            _seconds(now - one.at),
            f"{one.chain_blocks:,}",
            f"{one.engine_blocks:,}",
            f"{one.promised_blocks:,}",
            f"{one.loaded_blocks:,}",
            _by_tier(one.sources),
            "" if one.load_s is None else _seconds(one.load_s),
        )
        table.add_row(*(escape(_plain(cell)) for cell in cells))
    Console().print(table)


# -- one request -----------------------------------------------------------------------------------------------


def _show(found: Explanation) -> None:
    table = Table(title=escape(_plain(f"request {found.summary.request_id}")), show_header=False, title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for what, value in _facts(found):
        table.add_row(what, escape(_plain(value)))
    Console().print(table)


def _facts(found: Explanation) -> list[tuple[str, str]]:
    one = found.summary
    ended = "" if found.finished_at is None else f", ended after {_seconds(found.finished_at - one.at)}"
    facts = [
        ("process", str(found.pid)),
        ("state", f"{one.state}; first asked for {_seconds(time.time() - one.at)} ago{ended}"),
        ("chain", f"{one.chain_blocks:,} blocks of {found.block_tokens} tokens: {found.first_hash} to "
                  f"{found.last_hash}" if one.chain_blocks else "no full block"),
    ]  # fmt: skip
    for answer in found.answers:
        facts += _of_answer(answer)
    for load in found.loads:
        facts += _of_load(load)
    facts.append(("saved", f"{found.saved_blocks:,} blocks were given to be saved"))
    if found.preemptions:
        facts.append(("preempted", "once" if found.preemptions == 1 else f"{found.preemptions} times"))
    facts += [("noted", note.text) for note in found.notes]
    return facts


def _of_answer(answer: Answer) -> list[tuple[str, str]]:
    times = f" (worked out {answer.num_times} times)" if answer.num_times > 1 else ""
    facts = [
        (
            "matched",
            f"{answer.there_blocks:,} of {answer.usable_blocks:,} blocks that can be used, {answer.engine_blocks:,} of "
            f"them in the engine{times}",
        )
    ]
    facts += [
        (f"  group {group.group}" if len(answer.groups) > 1 else "  where", _runs(group)) for group in answer.groups
    ]
    for miss in answer.misses:
        reasons = "\n".join(reason.text for reason in miss.reasons)
        facts.append(("  first miss", f"block {miss.block} ({miss.hash}), group {miss.group}\n{reasons}"))
    if not answer.misses or answer.promised_blocks < answer.there_blocks:
        facts.append(("  end", answer.end))
    promised = f"{answer.promised_blocks - answer.engine_blocks:,} blocks to load"
    if answer.predicted_load_s is not None and answer.predicted_recompute_s is not None:
        promised += (
            f"; predicted {_seconds(answer.predicted_load_s)}, to compute all that is there "
            f"{_seconds(answer.predicted_recompute_s)}"
        )
    return [*facts, ("  promised", promised)]


def _runs(group: GroupRuns) -> str:
    told = []
    for run in group.runs[:_RUNS]:
        last = run.first + run.num_blocks - 1
        told.append(f"{run.first}-{last} {run.tier}" if last > run.first else f"{run.first} {run.tier}")
    if group.num_runs > _RUNS:
        told.append(f"and {group.num_runs - len(told)} more runs")
    window = f" (needs the last {group.window_blocks} only)" if group.window_blocks else ""
    return f"{', '.join(told) or 'no block'}{window}"


def _of_load(load: Loaded) -> list[tuple[str, str]]:
    what = (
        f"blocks {load.first}-{load.first + load.promised_blocks - 1}, found in {_by_tier(load.sources) or 'no tier'}"
    )
    if load.seconds is None:
        return [("load", f"{what}; under way")]
    facts = [("load", f"{what}; {load.loaded_blocks:,} of {load.promised_blocks:,} came, in {_seconds(load.seconds)}")]
    return [*facts, *(("  lost", loss) for loss in load.losses)]


# -- words -----------------------------------------------------------------------------------------------------


def _by_tier(sources: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {tier}" for tier, number in sources.items() if number)


def _seconds(seconds: float) -> str:
    seconds = max(0.0, seconds)  # dates come from another process's clock
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


def _plain_values(reply: Reply) -> dict[str, Any]:
    requests = [msgspec.to_builtins(one) for one in reply.summaries]
    return {"pid": reply.pid, "num_known": reply.num_known, "requests": requests}


def _say(text: str) -> None:
    Console(soft_wrap=True).print(_plain(text), markup=False, highlight=False)


def _plain(text: str) -> str:
    """Show what would steer a terminal as what it is: ids of requests come from their clients."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)

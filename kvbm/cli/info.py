"""``kvbm info``: what is installed, which twin runs and why, and what this machine allows."""

from __future__ import annotations

import importlib.util
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvbm.bench.machine import describe_machine
from kvbm.plugins import PLUGIN_KINDS, plugin_names

# Optional parts: module, what it is for, and the extra of kvbm-native that installs it ("" where none does).
_OPTIONAL = (
    ("prometheus_client", "kvbm.metrics", "metrics"),
    ("matplotlib", "kvbm replay --report", "report"),
    ("torch", "DLPack exchange of blocks", ""),
    ("xxhash", "tests of the checksum", "test"),
    ("hypothesis", "kvbm.testing", "test"),
    ("sphinx", "building the documentation", "docs"),
)


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show version, twin, processor features, memory settings, device, optional parts, plug-ins and limits."""
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(title="kvbm", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for what, value in facts.items():
        table.add_row(what.replace("_", " "), escape(_show(value)))
    Console().print(table)


def _facts() -> dict[str, Any]:
    return {
        **describe_machine(),
        "device": "host memory stands in for the GPU: this version has no CUDA modules",
        "optional_parts": {
            name: ("installed" if importlib.util.find_spec(name) else "absent")
            + f", for {use} ({f'extra {extra}' if extra else f'pip install {name}'})"
            for name, use, extra in _OPTIONAL
        },
        "plugins": {kind: plugin_names(kind) for kind in PLUGIN_KINDS},
        "limits": {"blocks in a pool": 2**31 - 2, "priority": "0..100", "token": "0..4294967295"},
    }


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_show(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unlimited" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

"""Writes the tables of configuration.md from the schema that `kvbm config --schema` prints.

``python docs/reference.py --write`` after a key was changed; a test fails while the page is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kvbm.config import Config
from kvbm.config.durations import DURATION_PATTERN
from kvbm.config.fields import OTHER_NAMES
from kvbm.config.sizes import SIZE_PATTERN, show_size

PAGE = Path(__file__).parent / "configuration.md"
BEGIN, END = "<!-- reference: begin -->\n", "<!-- reference: end -->"
_TEXTS = {SIZE_PATTERN: 'a size, as "8GiB"', DURATION_PATTERN: 'a time, as "6h"'}
_BIG = 2**31 - 2  # a limit from here on is only what a file can hold, or a pool can number


def reference() -> str:
    """Give a heading and a table for each section, and one for the keys at the top."""
    schema = Config.schema()
    definitions = schema["$defs"]
    root = definitions[schema["$ref"].rpartition("/")[2]]
    sections = {name: entry for name, entry in root["properties"].items() if "$ref" in entry}
    parts = []
    for name, entry in sections.items():
        definition = definitions[entry["$ref"].rpartition("/")[2]]
        parts += [f"### {name}\n", f"{entry['description']}\n", _table(name, definition)]
    parts += ["### At the top\n", _table("", {**root, "properties": _without(root["properties"], sections)})]
    return "\n".join(parts)


def with_reference(page: str) -> str:
    """Give a page with its tables made anew."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{reference()}\n{END}{tail}"


def _table(section: str, definition: dict[str, Any]) -> str:
    rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for name, entry in definition["properties"].items():
        path = f"{section}.{name}" if section else name
        if path in OTHER_NAMES:
            rows.append(f"| `{path}` | | | another name of `{OTHER_NAMES[path]}` |")
            continue
        default = "required" if name in definition.get("required", ()) else _default(entry)
        rows.append(f"| `{path}` | {_allowed(entry)} | {default} | {entry['description']} |")
    return "\n".join(rows) + "\n"


def _allowed(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "examples" in entry:
        return ", ".join(f"`{value}`" for value in entry["examples"]) + ", or a plug-in"
    kinds = [kind for kind in entry.get("anyOf", [entry]) if kind["type"] != "null"]
    return ", or ".join(dict.fromkeys(_kind(kind) for kind in kinds))


def _kind(kind: dict[str, Any]) -> str:
    if kind["type"] == "boolean":
        return "true or false"
    if kind["type"] == "string":
        return _TEXTS.get(kind.get("pattern", ""), "text")
    noun = "integer" if kind["type"] == "integer" else "number"
    low, high = kind.get("minimum"), kind.get("maximum")
    if low is not None and high is not None and abs(high) < _BIG:
        return f"{noun}, {low} to {high}"
    if low is not None and abs(low) < _BIG:
        return f"{noun}, {low} or more"
    if "exclusiveMinimum" in kind:
        return f"{noun} above {kind['exclusiveMinimum']}" + (f", at most {high}" if high is not None else "")
    return noun


def _default(entry: dict[str, Any]) -> str:
    value = entry.get("default")
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    is_size = any(kind.get("pattern") == SIZE_PATTERN for kind in entry.get("anyOf", ()))
    return f"`{show_size(value) if is_size else value}`"


def _without(properties: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in properties.items() if name not in names}


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    made = with_reference(text)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
    elif made != text:
        sys.exit("docs/configuration.md is stale: python docs/reference.py --write")

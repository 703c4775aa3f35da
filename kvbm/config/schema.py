"""Makes the JSON schema of a tree of settings from its annotations, with what they cannot say added by hand."""

from __future__ import annotations

from typing import Any

import msgspec

from kvbm.config.fields import OTHER_NAMES, fields_of, sections_of

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def make(tree: type[msgspec.Struct]) -> dict[str, Any]:
    """Give the schema (draft 2020-12) of a tree, its sections under ``$defs``."""
    (root,), definitions = msgspec.json.schema_components([tree], ref_template="#/$defs/{name}")
    for definition in definitions.values():
        definition["description"] = definition["description"].partition("\n")[0]
    for section, kind in sections_of(tree).items():
        definition = definitions[kind.__name__]
        if {"num_blocks", "size"} <= set(fields_of(kind)):
            given = {"not": {"type": "null"}}
            definition["not"] = {
                "required": ["num_blocks", "size"],
                "properties": {"num_blocks": given, "size": given},
            }
        for other, path in OTHER_NAMES.items():
            if other.startswith(f"{section}."):
                _add_other(definition, other.partition(".")[2], definition["properties"][path.partition(".")[2]], path)
    for other, path in OTHER_NAMES.items():
        if "." not in other:
            section, _, name = path.partition(".")
            meant = definitions[sections_of(tree)[section].__name__]["properties"][name]
            _add_other(definitions[tree.__name__], other, meant, path)
    return {"$schema": _DIALECT, "title": "kvbm configuration", **root, "$defs": definitions}


def _add_other(definition: dict[str, Any], other: str, meant: dict[str, Any], path: str) -> None:
    entry = {name: value for name, value in meant.items() if name != "default"}
    definition["properties"][other] = {**entry, "description": f"Another name of {path}."}

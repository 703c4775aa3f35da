"""Writes a tree of settings as TOML: keys at the top first, then a table a section; values that are None are left out.

Only what settings are made of: text, integers, finite floats and switches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from kvbm.config.fields import Field, fields_of, sections_of
from kvbm.config.sizes import show_size


def write(tree: type[msgspec.Struct], values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> str:
    """Write plain nested values of a tree.

    Parameters
    ----------
    tree : Struct type
        Whose keys they are.
    values : mapping
        As `Config.to_dict` gives them.
    sources : mapping, optional
        Where keys came from, by path; then each key has a comment, "default" where its path is absent.
    """
    lines = list(_lines("", fields_of(tree), values, sources))
    for section, kind in sections_of(tree).items():
        lines += ["", f"[{section}]", *_lines(section, fields_of(kind), values[section], sources)]
    return "\n".join(lines).lstrip("\n") + "\n"


def _lines(
    section: str, fields: Mapping[str, Field], values: Mapping[str, Any], sources: Mapping[str, str] | None
) -> Iterator[str]:
    for name, field in fields.items():
        if values[name] is None:
            if sources is not None:
                yield f"# {name} is not given"
            continue
        line = f"{name} = {_show(field, values[name])}"
        if sources is not None:
            origin = sources.get(f"{section}.{name}" if section else name, "default")
            line += f"  # {''.join(letter if letter.isprintable() else '?' for letter in origin)}"
        yield line


def _show(field: Field, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if field.advice.is_size and not show_size(value).isdigit():
        return f'"{show_size(value)}"'
    if isinstance(value, str):  # JSON's escapes are TOML's too; DEL, which JSON leaves alone, must be one
        import json  # not needed where settings are only read

        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)

"""Sources of settings become one tree: each is read into values by path, then they are merged, checked and built.

Works on any Struct of sections, so that the tree itself may call it. A value remembers where it came from, and every
ConfigError about it says so. Stateless.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec

from kvbm.config.fields import OTHER_NAMES, Field, check_value, fields_of, nearest_name, refused, sections_of, show
from kvbm.config.reference_names import read_reference_names
from kvbm.errors import ConfigError

TreeT = TypeVar("TreeT", bound=msgspec.Struct)

_log = logging.getLogger("kvbm.config")

_PREFIX = "KVBM_"
_SWITCHES = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


@dataclass(frozen=True)
class Given:
    """A value that a source gives for a key, and the source's name ("" needs no naming)."""

    value: Any
    origin: str


Source: TypeAlias = "dict[str, Given]"  # by the key's path, other names resolved


def read_mapping(tree: type[msgspec.Struct], mapping: Any, *, origin: str = "") -> Source:
    """Read nested mappings.

    Raises
    ------
    ConfigError
        Not mappings, an unknown key, or a key under two names with different values.
    """
    source: Source = {}
    with_origin = _from(origin)
    if not isinstance(mapping, Mapping):
        raise refused(f"a configuration must be a mapping of sections, got {show(mapping)}{with_origin}")
    for name, value in mapping.items():
        if not isinstance(name, str) or name not in sections_of(tree):
            _add(source, _resolve(tree, "", name, with_origin), name, Given(value, origin))
        elif not isinstance(value, Mapping):
            known = ", ".join(fields_of(sections_of(tree)[name]))
            raise refused(f"{name} is {show(value)}, give a table of keys: {known}{with_origin}")
        else:
            for key, entry in value.items():
                path = _resolve(tree, name, key, with_origin)
                _add(source, path, f"{name}.{key}", Given(entry, origin))
    return source


def read_toml(tree: type[msgspec.Struct], path: str | os.PathLike[str]) -> Source:
    """Read a TOML file.

    Raises
    ------
    ConfigError
        It cannot be read or is no TOML; else as `read_mapping`.
    """
    from pathlib import Path  # a fifth of what importing this package would take

    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        mapping = _parse_toml(text)
    except OSError as error:
        raise ConfigError(f"configuration file {file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of decoding, of the parser, of integers beyond Python's limit
        raise ConfigError(f"configuration file {file} is no valid TOML: {error}") from error
    return read_mapping(tree, mapping, origin=f"file {file}")


def read_environment(tree: type[msgspec.Struct], environ: Mapping[str, str]) -> Source:
    """Read ``KVBM_<SECTION>__<KEY>``, ``KVBM_<KEY>`` of keys at the top, and the reference system's names.

    Other variables, and empty ones, are left alone.

    Raises
    ------
    ConfigError
        A variable with two underscores names no key, or a key is given under two names with different values.
    """
    source: Source = {}
    top = {*fields_of(tree), *(name for name in OTHER_NAMES if "." not in name)}
    for variable, text in sorted(environ.items()):
        section, separator, name = variable.removeprefix(_PREFIX).lower().partition("__")
        if not variable.startswith(_PREFIX) or not variable.isupper() or not text.strip():
            continue
        if separator:
            if section not in sections_of(tree):
                raise _unknown_variable(tree, section, name, variable)
            path = _resolve(tree, section, name, "", variable=variable)
        elif section in top:
            path = OTHER_NAMES.get(section, section)
        else:
            _warn_of_single_underscore(tree, variable)
            continue
        value = _value_of_text(_field(tree, path), text)
        _add(source, path, variable, Given(value, f"environment {variable}"))
    for path, (value, variable) in read_reference_names(environ, taken=set(source)).items():
        source[path] = Given(value, f"environment {variable}")
    return source


def build(tree: type[TreeT], sources: Iterable[Source]) -> tuple[TreeT, dict[str, str]]:
    """Merge sources, later ones winning, and make the tree; give also each key's origin, by its path.

    Raises
    ------
    ConfigError
        A required key is missing, or a value is impossible.
    """
    merged: Source = {}
    for source in sources:
        for section in sections_of(tree):
            choice = (f"{section}.num_blocks", f"{section}.size")
            if any(path in source and source[path].value is not None for path in choice):
                for path in choice:
                    merged.pop(path, None)
        merged.update(source)
    try:
        for path, given in merged.items():
            check_value(path, _field(tree, path), given.value)
        _check_required(tree, merged)
        parts: dict[str, Any] = {name: given.value for name, given in merged.items() if "." not in name}
        for section, kind in sections_of(tree).items():
            names = {path: path.removeprefix(f"{section}.") for path in merged if path.startswith(f"{section}.")}
            parts[section] = kind(**{name: merged[path].value for path, name in names.items()})
        made = tree(**parts)
    except ConfigError as error:
        keys = vars(error).get("keys", ())
        suffix = _from(*(merged[path].origin for path in keys if path in merged))
        if not suffix:
            raise
        raise refused(f"{error}{suffix}", *keys) from error.__cause__
    return made, {path: given.origin for path, given in merged.items()}


def _add(source: Source, path: str, name: Any, given: Given) -> None:
    before = source.get(path)
    if before is not None and before.value is not None and given.value is not None and before.value != given.value:
        raise refused(
            f"{path} is given twice, as {show(before.value)} and, by the name {name}, as {show(given.value)}: give one"
            + _from(before.origin, given.origin),
            path,
        )
    if before is None or given.value is not None:
        source[path] = given


def _from(*origins: str) -> str:
    """Name the sources in a message, each once."""
    named = dict.fromkeys(origin for origin in origins if origin)
    return f" (from {' and '.join(named)})" if named else ""


def _resolve(tree: type[msgspec.Struct], section: str, name: Any, with_origin: str, *, variable: str = "") -> str:
    """Give the path that a key's name means; refuse one that means none."""
    if isinstance(name, str):
        path = f"{section}.{name}" if section else name
        path = OTHER_NAMES.get(path, path)
        owner, _, key = path.rpartition(".")
        if (not owner or owner in sections_of(tree)) and key in fields_of(_struct(tree, owner)):
            return path
    if variable:
        raise _unknown_variable(tree, section, str(name), variable)
    nearest = _nearest(tree, section, name)
    shown = name if isinstance(name, str) and name.isidentifier() and len(name) <= 60 else show(name)
    raise refused(
        f"{f'{section}.{shown}' if section else shown} is no known key, "
        f"{f'did you mean {nearest}? ' if nearest else ''}"
        f"known {f'in {section}' if section else 'here'}: {', '.join(_known(tree, section))}{with_origin}"
    )


def _unknown_variable(tree: type[msgspec.Struct], section: str, name: str, variable: str) -> ConfigError:
    if section in sections_of(tree):
        nearest, known = _nearest(tree, section, name), _known(tree, section)
    else:
        close = nearest_name(section, sections_of(tree))
        nearest = _nearest(tree, close, name) or f"{close}.{name}" if close else _nearest(tree, "", name)
        section, known = "", list(sections_of(tree))
    meant = f"did you mean {_PREFIX}{nearest.upper().replace('.', '__')}? " if nearest else ""
    what = f"keys of {section}" if section else "sections"
    return refused(f"environment variable {show(variable)[1:-1]} names no key, {meant}{what}: {', '.join(known)}")


def _warn_of_single_underscore(tree: type[msgspec.Struct], variable: str) -> None:
    bare = variable.removeprefix(_PREFIX).lower()
    top = [name for name in (*fields_of(tree), *OTHER_NAMES) if "." not in name and name not in sections_of(tree)]
    if close := nearest_name(bare, top, cutoff=0.8):
        _log.warning(
            "variable=%s is no setting and was left alone, did you mean %s?", variable, f"{_PREFIX}{close}".upper()
        )
    section, _, name = bare.partition("_")
    if section in sections_of(tree) and name in _known(tree, section):
        meant = f"{_PREFIX}{section}__{name}".upper()
        _log.warning("variable=%s is no setting and was left alone, with two underscores it is: %s", variable, meant)


def _nearest(tree: type[msgspec.Struct], section: str, name: Any) -> str:
    """Find the path of a key that resembles a name: the same name elsewhere, then a like one here, then there."""
    if not isinstance(name, str):
        return ""
    name = name.lower()
    here = {key: f"{section}.{key}" if section else key for key in _known(tree, section)}
    everywhere = {key: f"{owner}.{key}" for owner in reversed(sections_of(tree)) for key in _known(tree, owner)}
    for known, cutoff in ((here, 1.0), (everywhere, 1.0), (here, 0.6), (everywhere, 0.6)):
        close = nearest_name(name, known, cutoff=cutoff)
        if close:
            return known[close]
    return ""


def _known(tree: type[msgspec.Struct], section: str) -> list[str]:
    others = [name.rpartition(".")[2] for name in OTHER_NAMES if name.rpartition(".")[0] == section]
    return [*(sections_of(tree) if not section else ()), *fields_of(_struct(tree, section)), *others]


def _struct(tree: type[msgspec.Struct], section: str) -> type[msgspec.Struct]:
    return sections_of(tree)[section] if section else tree


def _field(tree: type[msgspec.Struct], path: str) -> Field:
    section, _, name = path.rpartition(".")
    return fields_of(_struct(tree, section))[name]


def _check_required(tree: type[msgspec.Struct], merged: Source) -> None:
    for section, kind in sections_of(tree).items():
        for field in fields_of(kind).values():
            path = f"{section}.{field.name}"
            if field.is_required and path not in merged:
                variable = f"{_PREFIX}{section.upper()}__{field.name.upper()}"
                raise refused(
                    f"{path} is missing, give {field.advice.give}: as {field.name} in the section {section}, or in the "
                    f"environment as {variable}"
                )


def _value_of_text(field: Field, text: str) -> Any:
    """Read a variable's text as the key's type; what cannot be read so stays text, and is refused by the check."""
    members, text = field.members, text if field.members <= {str, type(None)} else text.strip()
    try:
        if bool in members:
            return _SWITCHES.get(text.lower(), text)
        if int in members and (str not in members or str(int(text)) == text):
            return int(text)
        return float(text) if float in members else text
    except ValueError:
        return text


def _parse_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    mapping: dict[str, Any] = tomllib.loads(text)
    return mapping

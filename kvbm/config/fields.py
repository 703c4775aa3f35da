"""What every key knows about itself, and how a value is checked against it.

A key's type, limits and description stand once, in the annotation of its Struct: `key` adds to it what a message must
say. Checking, the JSON schema and the documentation all read them there. Stateless.
"""

from __future__ import annotations

import functools
import math
import numbers
import os
from collections.abc import Iterable
from typing import Any, ClassVar, get_args

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from kvbm.config.durations import parse_duration
from kvbm.config.sizes import parse_size
from kvbm.errors import ConfigError
from kvbm.plugins import plugin_names

MAX_INTEGER = 2**63 - 1  # what files of every kind can hold

_ADVICE = "kvbm"  # the entry of `Meta.extra` that is ours

# Other names that files, dicts and the environment may use; the second is what they mean.
OTHER_NAMES = {"model.page_size": "model.block_size", "offload_path": "disk.path"}

# Names that need no look into the installed packages; plug-ins of the group ``kvbm.<kind>`` join them.
OWN_NAMES = {
    "layout": ("fully_contiguous", "layer_separate_block_first", "layer_separate_outer_first"),
    "eviction": ("lru", "fifo"),
    "allocator": ("default",),
    "offload": ("always", "second_use", "priority", "tinylfu"),
}


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """What a key allows beyond its type, and how a message says it."""

    give: str
    choices: tuple[str, ...] = ()
    plugin: str = ""  # the kind of plug-in that the value names
    most: int = MAX_INTEGER
    is_size: bool = False
    is_duration: bool = False
    is_path: bool = False


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One key of a section, as its annotation describes it."""

    name: str
    type: Any
    description: str
    advice: Advice
    default: Any
    is_required: bool

    @property
    def members(self) -> frozenset[type]:
        """The plain types a value may have, limits taken off."""
        return frozenset(_plain_types(self.type))


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of keys that checks itself when it is made.

    Raises
    ------
    ConfigError
        A value is impossible; the message names the key's path and what is allowed.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in fields_of(type(self)).values():
            value = getattr(self, field.name)
            checked = check_value(f"{self.section}.{field.name}", field, value)
            if checked is not value:
                force_setattr(self, field.name, checked)
        self._check_together()

    def _check_together(self) -> None:
        """Check what several keys must agree on."""


def key(
    description: str,
    give: str = "",
    *,
    choices: tuple[str, ...] = (),
    plugin: str = "",
    most: int = MAX_INTEGER,
    is_size: bool = False,
    is_duration: bool = False,
    is_path: bool = False,
) -> Meta:
    """Describe a key, for ``Annotated``.

    Parameters
    ----------
    description : str
        For the schema and the documentation.
    give : str
        What is allowed, to follow "give" in a message; made from `choices` or `plugin` where they are given.
    choices : tuple of str
        The names allowed.
    plugin : str
        The value names a plug-in of this kind.
    most : int
        Named in the message about a larger integer.
    is_size : bool
        Text is read as a size.
    is_duration : bool
        Text is read as a time.
    is_path : bool
        Path objects are taken too.
    """
    give = give or f"one of {', '.join(choices)}"
    advice = Advice(
        give=give,
        choices=choices,
        plugin=plugin,
        most=most,
        is_size=is_size,
        is_duration=is_duration,
        is_path=is_path,
    )
    schema: dict[str, Any] | None = None
    if choices:
        schema = {"enum": list(choices)}
    elif plugin:
        schema = {"examples": list(OWN_NAMES[plugin])}
    return Meta(description=description, extra={_ADVICE: advice}, extra_json_schema=schema)


@functools.cache
def fields_of(section: type[msgspec.Struct]) -> dict[str, Field]:
    """List the described keys of a Struct by name, in their order; nested sections are not among them."""
    found = {}
    for info in msgspec.structs.fields(section):
        metas = [meta for meta in getattr(info.type, "__metadata__", ()) if _ADVICE in (meta.extra or {})]
        if metas:
            found[info.name] = Field(
                name=info.name,
                type=info.type,
                description=metas[0].description,
                advice=metas[0].extra[_ADVICE],
                default=None if info.required else info.default,
                is_required=info.required,
            )
    return found


@functools.cache
def sections_of(tree: type[msgspec.Struct]) -> dict[str, type[Section]]:
    """List the sections that a Struct holds by name, in their order."""
    kinds = {info.name: getattr(info.type, "__origin__", None) for info in msgspec.structs.fields(tree)}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}


def check_value(path: str, field: Field, value: Any) -> Any:
    """Check one value, and give it as the tree keeps it: sizes in bytes, paths as text.

    Raises
    ------
    ConfigError
        The value is impossible.
    """
    advice = field.advice
    if not isinstance(value, bool) and isinstance(value, numbers.Integral):
        value = int(value)
    elif advice.is_path and isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif advice.is_size and isinstance(value, str):
        try:
            value = parse_size(value)
        except ConfigError:
            raise refused(f"{path} is {show(value)}, give {advice.give}", path) from None
    elif advice.is_duration and isinstance(value, str):
        try:
            value = parse_duration(value)
        except ConfigError:
            raise refused(f"{path} is {show(value)}, give {advice.give}", path) from None
    if int in field.members and isinstance(value, int) and value > advice.most:
        raise refused(f"{path} is {show(value)}, give at most {advice.most}", path)
    try:
        value = msgspec.convert(value, field.type)
    except (msgspec.ValidationError, OverflowError):
        raise refused(f"{path} is {show(value)}, give {advice.give}", path) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise refused(f"{path} is {value}, give {advice.give}", path)
    if isinstance(value, str):
        _check_text(path, advice, value)
    return value


def refused(message: str, *paths: str) -> ConfigError:
    """Make a ConfigError that knows which keys it is about, so that a loader can say where they came from."""
    error = ConfigError(message)
    vars(error)["keys"] = paths
    return error


def show(value: Any) -> str:
    """Show a value in a message, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "true", False: "false"}[value]
    import reprlib  # for messages only

    try:
        return reprlib.repr(value)
    except Exception:  # a repr may fail, and an integer may be too long to print
        return f"an unprintable {type(value).__name__}"


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Find the known name that a wrong one resembles, "" where none does; `cutoff` 1 wants the same letters."""
    import difflib  # for messages only

    return next(iter(difflib.get_close_matches(name.lower(), known, n=1, cutoff=cutoff)), "")


def _check_text(path: str, advice: Advice, value: str) -> None:
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise refused(f"{path} is {show(value)}, give text that UTF-8 can hold", path)
    if "\0" in value:
        raise refused(f"{path} is {show(value)}, give text without NUL characters", path)
    if advice.choices and value not in advice.choices:
        raise _unknown_choice(path, value, advice.choices)
    if advice.plugin and value not in OWN_NAMES[advice.plugin]:
        known = sorted({*OWN_NAMES[advice.plugin], *plugin_names(advice.plugin)})
        if value not in known:
            raise _unknown_choice(path, value, known, f", or install a plug-in of the group kvbm.{advice.plugin}")


def _unknown_choice(path: str, value: str, known: Iterable[str], otherwise: str = "") -> ConfigError:
    known = list(known)
    nearest = nearest_name(value, known)
    did_you_mean = f"did you mean {nearest}? " if nearest else ""
    return refused(f"{path} is {show(value)}, {did_you_mean}give one of {', '.join(known)}{otherwise}", path)


def _plain_types(annotation: Any) -> list[type]:
    if hasattr(annotation, "__metadata__"):
        return _plain_types(annotation.__origin__)
    members = get_args(annotation)
    return [plain for member in members for plain in _plain_types(member)] if members else [annotation]

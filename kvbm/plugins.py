"""Names in settings become classes, loaded on first use.

Our own names stand in a table here; other packages add theirs by entry points of the group ``kvbm.<kind>``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvbm.errors import PluginError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_OWN = {
    "eviction": {"lru": "kvbm.eviction.lru:LruPolicy", "fifo": "kvbm.eviction.fifo:FifoPolicy"},
    "offload": {
        "always": "kvbm.planner.policies.always:AlwaysPolicy",
        "second_use": "kvbm.planner.policies.second_use:SecondUsePolicy",
        "priority": "kvbm.planner.policies.priority:PriorityPolicy",
        "tinylfu": "kvbm.planner.policies.tinylfu:TinyLfuPolicy",
    },
    "layout": {},
    "allocator": {},
}
PLUGIN_KINDS = tuple(_OWN)


def plugin_names(kind: str) -> list[str]:
    """List the names known in a group, e.g. ``plugin_names("eviction")``."""
    return sorted({point.name for point in _points(kind)})


def load_plugin(kind: str, name: str) -> Any:
    """Load what a name stands for.

    Raises
    ------
    PluginError
        The name is not known (the known ones are listed), or its module cannot be imported (the cause is chained).
    """
    found = [point for point in _own_points(kind) if point.name == name]
    found = found or [point for point in _points(kind) if point.name == name]  # a look into all that is installed
    if not found:
        known = ", ".join(plugin_names(kind))
        raise PluginError(f"no {kind} plug-in is called {name!r}, known: {known}")
    try:
        return found[0].load()
    except Exception as error:
        raise PluginError(f"{kind} plug-in {name!r} ({found[0].value}) cannot be loaded: {error}") from error


def _points(kind: str) -> list[EntryPoint]:
    from importlib.metadata import entry_points  # slow to import, seldom needed

    return _own_points(kind) + list(entry_points(group=f"kvbm.{kind}"))


def _own_points(kind: str) -> list[EntryPoint]:
    from importlib.metadata import EntryPoint

    return [EntryPoint(name, value, f"kvbm.{kind}") for name, value in _OWN.get(kind, {}).items()]

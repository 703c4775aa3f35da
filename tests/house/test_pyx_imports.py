"""The extension modules stand on their floor: import-linter does not read .pyx, so this does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = ("kvbm.types", "kvbm.errors", "kvbm._plugged", "kvbm._native", "numpy", "libc", "libcpp", "cpython", "cython")
STATEMENT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+c?import\b|c?import\s+(.+))", re.MULTILINE)


def imported_modules(source: str) -> list[str]:
    """List what a Cython source imports or cimports, in order."""
    names: list[str] = []
    for match in STATEMENT.finditer(source):
        several = match[1] or match[2].split("#")[0]
        names += [part.split(" as ")[0].strip() for part in several.split(",")]
    return names


def is_allowed(name: str) -> bool:
    """Tell whether a module is on or below the extension modules' floor."""
    if name.partition(".")[0] in sys.stdlib_module_names:
        return True
    return any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED)


def test_imported_modules_finds_every_form() -> None:
    source = "import a, b.c as d  # why\ncimport numpy as cnp\nfrom e.f cimport g\n    from kvbm.pool import h\n"
    assert imported_modules(source) == ["a", "b.c", "numpy", "e.f", "kvbm.pool"]


@pytest.mark.parametrize("name", ["kvbm", "kvbm.pool", "kvbm.types2", "kvbm._pure.store", "torch"])
def test_modules_of_other_floors_are_refused(name: str) -> None:
    assert not is_allowed(name)


def test_extension_modules_import_only_their_floor() -> None:
    sources = sorted([path for ending in ("*.pyx", "*.pxd", "*.pxi") for path in (ROOT / "kvbm").rglob(ending)])
    assert sources, "no Cython sources found"
    bad = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources
        for name in imported_modules(path.read_text(encoding="utf-8"))
        if not is_allowed(name)
    ]
    assert not bad, "\n".join(bad)

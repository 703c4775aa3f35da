"""Pages that list something leave nothing out: error classes, element types, plug-in groups, images, suites."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

import kvbm.testing
from kvbm import errors
from kvbm.layout import DTYPES
from kvbm.plugins import PLUGIN_KINDS

DOCS = Path(__file__).resolve().parents[2] / "docs"
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.KvbmError) and kind is not errors.KvbmError
]


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_page_names_the_class_and_what_else_it_is(kind: type[errors.KvbmError]) -> None:
    rows = re.findall(rf"^\| `{kind.__name__}` \|([^|]*)\|([^|]*)\|", read("errors.md"), re.MULTILINE)
    assert len(rows) == 1
    also, when = rows[0]
    assert re.findall(r"`(\w+)`", also) == [base.__name__ for base in kind.__bases__ if base is not errors.KvbmError]
    assert when.strip()


def test_errors_page_names_no_class_that_is_not_there() -> None:
    named = re.findall(r"^\| `(\w+)` \|", read("errors.md"), re.MULTILINE)
    assert sorted(named) == sorted(kind.__name__ for kind in KINDS)


def test_memory_layout_page_names_every_element_type() -> None:
    table = read("memory-layout.md").partition("## Element types")[2]
    assert not [name for name in DTYPES if f"`{name}`" not in table]


def test_extending_page_names_every_group_of_plug_ins() -> None:
    assert not [kind for kind in PLUGIN_KINDS if f'entry-points."kvbm.{kind}"' not in read("extending.md")]


def test_every_image_is_shown_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md") if "_build" not in page.parts)
    shown = set(re.findall(r"\]\((?:\.\./)?images/([^)]+)\)", text))
    assert shown == {path.name for path in (DOCS / "images").iterdir()}


def test_api_page_of_the_suites_names_every_module() -> None:
    shown = {*re.findall(r"automodule:: ([\w.]+)", read("api/testing.md")), "kvbm.testing.fault_plan"}  # part of faults
    assert shown == {f"kvbm.testing.{module.name}" for module in pkgutil.iter_modules(kvbm.testing.__path__)}

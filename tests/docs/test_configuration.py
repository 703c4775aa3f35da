"""The page about the configuration says what the schema says, and its files load."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from kvbm.config import Config, reference_names
from kvbm.config.fields import fields_of, sections_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "configuration.md").read_text(encoding="utf-8")
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
TOML = re.findall(r"^```toml\n(.*?)^```$", PAGE + README, re.MULTILINE | re.DOTALL)


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_has_the_tables_of_the_schema() -> None:
    assert load_reference().with_reference(PAGE) == PAGE, "run python docs/reference.py --write"


def test_tables_name_every_key_with_its_default() -> None:
    for section, kind in sections_of(Config).items():
        for name, field in fields_of(kind).items():
            (row,) = re.findall(rf"^\| `{section}\.{name}` \|.*$", PAGE, re.MULTILINE)
            assert field.description in row
            assert ("| required |" in row) is field.is_required


def test_page_and_readme_have_a_file_each() -> None:
    assert len(TOML) == 2


@pytest.mark.parametrize("text", TOML)
def test_file_on_the_page_loads(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(text, encoding="utf-8")
    assert Config.from_toml(tmp_path / "settings.toml").model.num_layers


def test_page_names_every_variable_of_the_reference_system() -> None:
    named = set(re.findall(r"`(DYN_KVBM_\w+)`", PAGE))
    assert named == set(reference_names._NAMES)

"""The page about the command names every option that the command has, and every field that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from kvbm.cli.main import app
from kvbm.replay import ReplayReport

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["replay", "info", "bench", "config"])
def test_page_names_every_option_of_the_command(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    section = PAGE.partition(f"## kvbm {name}\n")[2].partition("\n## ")[0]
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    assert section
    assert options
    assert not [option for option in options if f"`{option}" not in section]


def test_page_names_every_field_of_a_report() -> None:
    assert not [field for field in ReplayReport().to_dict() if f"`{field}`" not in PAGE]

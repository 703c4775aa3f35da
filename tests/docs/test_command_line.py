"""The page about the command names every option that the command has, and every field that it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer

from kvbm.cli.main import app
from kvbm.layout import BlockLayout
from kvbm.replay import ReplayReport
from kvbm.storage.disk import DiskStorage

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["replay", "info", "bench", "config", "tune", "doctor", "explain"])
def test_page_names_every_option_of_the_command(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    section = PAGE.partition(f"## kvbm {name}\n")[2].partition("\n## ")[0]
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    assert section
    assert options
    assert not [option for option in options if f"`{option}" not in section]


def test_page_names_every_option_of_the_disk_commands() -> None:
    group = typer.main.get_command(app).commands["disk"]  # type: ignore[attr-defined]
    section = PAGE.partition("## kvbm disk\n")[2].partition("\n## ")[0]
    assert set(group.commands) == {"inspect", "verify", "clear"}
    for name, command in group.commands.items():
        assert f"kvbm disk {name} " in section
        for parameter in command.params:
            for option in parameter.opts:
                row = re.search(rf"^\| `{option}[ `][^|]*\| ([^|]*) \|", section, re.MULTILINE)
                assert not option.startswith("--") or (row and (name in row[1] or row[1] == "all")), (name, option)


def test_page_names_every_field_that_verify_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = BlockLayout.fully_contiguous(
        num_blocks=2, num_layers=1, outer_dim=2, block_size=4, inner_dim=4, dtype="uint8"
    )
    DiskStorage(layout, tmp_path / "disk").close()
    with pytest.raises(SystemExit):
        app(["disk", "verify", str(tmp_path / "disk"), "--json"])
    (slab,) = json.loads(capsys.readouterr().out)["slabs"]
    section = PAGE.partition("## kvbm disk\n")[2]
    assert not [field for field in slab if f"`{field}`" not in section]


def test_page_names_every_field_of_a_report() -> None:
    assert not [field for field in ReplayReport().to_dict() if f"`{field}`" not in PAGE]

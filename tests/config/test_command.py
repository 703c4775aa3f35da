"""``kvbm config`` as its user sees it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvbm.cli import main as cli
from kvbm.config import Config


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("KVBM_", "DYN_KVBM_"))]:
        monkeypatch.delenv(name)
    path = tmp_path / "kvbm.toml"
    path.write_text('[model]\nnum_layers = 2\ninner_dim = 64\n[host]\nsize = "8 MiB"\n')
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["kvbm", "config", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_schema_is_printed_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--schema") == 0
    assert json.loads(capsys.readouterr().out) == Config.schema()


@pytest.mark.parametrize("by", ["argument", "option", "environment"])
def test_effective_settings_are_printed_with_their_sources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: Path, by: str
) -> None:
    monkeypatch.setenv("KVBM_HOST__HUGE_PAGES", "off")
    if by == "environment":
        monkeypatch.setenv("KVBM_CONFIG", str(file))
    arguments = {"argument": [str(file)], "option": ["--file", str(file)], "environment": []}[by]
    assert run(monkeypatch, "--show", *arguments) == 0
    printed = capsys.readouterr().out
    assert f"num_layers = 2  # file {file}" in printed
    assert f'size = "8MiB"  # file {file}' in printed
    assert "huge_pages = false  # environment KVBM_HOST__HUGE_PAGES" in printed
    assert "block_size = 64  # default" in printed
    assert "# enable_offload is not given" in printed
    expected = Config.load(file)
    file.write_text(printed)
    assert Config.from_toml(file) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --schema or --show [FILE]"),
        (["--schema", "--show"], "give --schema or --show [FILE]"),
        (["--show"], "model.num_layers is missing"),
        (["--show", "/absent.toml"], "configuration file /absent.toml cannot be read: No such file or directory"),
        (["--schema", "/absent.toml"], "--schema reads no file"),
        (["--show", "a.toml", "--file", "b.toml"], "two configuration files are given, a.toml and b.toml: give one"),
    ],
)
def test_error_is_one_line_and_status_two(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: Path,
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvbm: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1

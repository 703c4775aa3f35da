"""``kvbm config``: the settings that hold here and where each came from, or the schema of all there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvbm.config import Config
from kvbm.errors import ConfigError


def config(
    file: Annotated[Path | None, typer.Argument(help="With --show: a TOML file; default by KVBM_CONFIG.")] = None,
    named_file: Annotated[Path | None, typer.Option("--file", help="The same file, by name.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a configuration.")] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the effective settings as TOML, each with where it came from.")
    ] = False,
) -> None:
    """Show the effective configuration (file, then environment), or the schema of all keys."""
    if schema == show:
        raise ConfigError("kvbm config prints one of two things, give --schema or --show [FILE]")
    if file is not None and named_file is not None:
        raise ConfigError(f"two configuration files are given, {file} and {named_file}: give one")
    file = file or named_file
    if schema:
        if file is not None:
            raise ConfigError(f"--schema reads no file, leave {file} out or give --show")
        typer.echo(json.dumps(Config.schema(), indent=2))
        return
    settings, sources = Config.load_with_sources(file)
    typer.echo(settings.to_toml(sources), nl=False)

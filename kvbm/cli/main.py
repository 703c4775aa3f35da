"""Entry point of the ``kvbm`` command: puts the commands together and turns our errors into one line."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

import kvbm
from kvbm.cli.bench import bench
from kvbm.cli.config import config
from kvbm.cli.disk import app as disk
from kvbm.cli.doctor import doctor
from kvbm.cli.explain import explain
from kvbm.cli.info import info
from kvbm.cli.replay import replay
from kvbm.cli.tune import tune
from kvbm.errors import KvbmError

app = typer.Typer(
    help="KV-cache block manager for LLM serving.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
app.command()(replay)
app.command()(info)
app.command()(bench)
app.command()(config)
app.command()(doctor)
app.command()(explain)
app.command()(tune)
app.add_typer(disk, name="disk")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"kvbm {kvbm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """KV-cache block manager for LLM serving."""


def main() -> None:
    """Run the command; an error of ours, or of the system under us, is one line on stderr and exit status 2."""
    try:
        app()
    except (KvbmError, ImportError, OSError) as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(f"not enough memory ({error}): give fewer or smaller blocks, or a smaller workload")


def _fail(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"kvbm: {message}", style="red", markup=False, highlight=False)
    sys.exit(2)


if __name__ == "__main__":
    main()

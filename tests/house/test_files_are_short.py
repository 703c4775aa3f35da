"""Files stay short, and every Python file says what it is."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kvbm", "tests", "examples", "benchmarks", "docs", "cuda", ".ci")
ENDINGS = {".py", ".pyx", ".pxd", ".pxi", ".pyi", ".hpp", ".cpp", ".h", ".c", ".cu", ".cuh"}
MAX_LINES = 400


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    return sorted([*found, ROOT / "noxfile.py"])


def test_every_file_is_shorter_than_the_limit() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    too_long = [f"{path}: {length} lines" for path, length in lengths.items() if length >= MAX_LINES]
    assert not too_long, "\n".join(too_long)


def test_every_python_file_has_a_docstring() -> None:
    silent = []
    for path in sources():
        if path.suffix == ".py":
            module = ast.parse(path.read_text(encoding="utf-8"))
            if module.body and ast.get_docstring(module) is None:
                silent.append(str(path.relative_to(ROOT)))
    assert not silent, "\n".join(silent)

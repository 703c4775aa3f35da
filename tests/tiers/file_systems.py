"""File systems that tests mount, where this machine lets them: in memory, an overlay, and a real one in a file."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


class Mounts:
    """Mounts under one directory, taken down in reverse order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._undo: list[Callable[[], None]] = []

    def tmpfs(self, nbytes: int) -> Path:
        """Mount memory of so many bytes."""
        return self._mount("-t", "tmpfs", "-o", f"size={nbytes},mode=0700", "kvbm-test")

    def overlay(self) -> Path:
        """Mount an overlay of two empty directories."""
        lower, upper, work = (self._make(name) for name in ("lower", "upper", "work"))
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        return self._mount("-t", "overlay", "-o", options, "kvbm-test")

    def ext4(self, nbytes: int) -> tuple[Path, Path]:
        """Mount an ext4 in a file; give it, and the file that sets off an error after which it is read-only."""
        image = self._folder / "image"
        with image.open("wb") as file:
            file.truncate(nbytes)
        _run("mkfs.ext4", "-q", "-O", "^has_journal", str(image))
        device = _run("losetup", "--find", "--show", str(image)).strip()
        self._undo.append(lambda: _try("losetup", "--detach", device))
        trigger = Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error"
        path = self._mount("-t", "ext4", "-o", "errors=remount-ro", device)
        if not trigger.exists():
            pytest.skip("this kernel cannot be asked for an error of a file system")
        return path, trigger

    def close(self) -> None:
        """Take everything down, busy or not."""
        while self._undo:
            self._undo.pop()()

    def _mount(self, *arguments: str) -> Path:
        path = self._make("mounted")
        _run("mount", *arguments, str(path))
        self._undo.append(lambda: _try("umount", str(path)) or _try("umount", "--lazy", str(path)))
        return path

    def _make(self, name: str) -> Path:
        path = self._folder / name
        path.mkdir()
        return path


def _run(*command: str) -> str:
    """Run a command that only some machines allow."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"not allowed here: {' '.join(command)}: {error.stderr.strip()}")
    return done.stdout


def _try(*command: str) -> bool:
    return not subprocess.run(command, check=False, capture_output=True).returncode

"""What is shipped: wheels hold what runs, the sdist holds what builds, the installed package is complete."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (".pyx", ".pxd", ".pxi", ".hpp", ".cpp", ".cmake", "CMakeLists.txt")
BUILD = "import sys; from scikit_build_core import build; getattr(build, sys.argv[1])(sys.argv[2])"


def build(kind: str, folder: Path) -> Path:
    """Build without an isolated environment, network or compiler, as pip's back-end call does."""
    pytest.importorskip("scikit_build_core", reason="the back end of the build is not installed")
    env = {**os.environ, "KVBM_NATIVE": "OFF"}
    answer = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(folder)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    (path,) = folder.iterdir()
    return path


def test_pure_wheel_runs_anywhere_and_has_no_native_part(tmp_path: Path) -> None:
    wheel = build("build_wheel", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"kvbm/__init__.py", "kvbm/py.typed", "kvbm/_pure/store.py", "kvbm/_native/store.pyi"} <= set(names)
    assert not [name for name in names if name.endswith((*SOURCES, ".so"))]
    assert not [name for name in names if not name.startswith(("kvbm/", "kvbm_native-"))]


def test_sdist_holds_what_a_build_needs(tmp_path: Path) -> None:
    sdist = build("build_sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = [path for path in (ROOT / "kvbm").rglob("*") if path.name.endswith(SOURCES)]
    needed = {str(path.relative_to(ROOT)) for path in tracked}
    assert "kvbm/_native/store.pyx" in needed
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "cuda").rglob("*") if path.is_file()}
    assert "cuda/kvbm_cuda.h" in needed
    assert needed | {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "noxfile.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_installed_package_is_complete() -> None:
    try:
        names = {str(path) for path in files("kvbm-native") or ()}
    except PackageNotFoundError:
        pytest.skip("kvbm runs from a source tree here, it is not installed")
    if "kvbm/__init__.py" not in names:
        pytest.skip("kvbm is installed in editable form")
    assert {"kvbm/py.typed", "kvbm/_native/store.pyi"} <= names
    assert not [name for name in names if name.endswith(SOURCES)]
    compiled = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
    assert not compiled or {"store", "hashing", "copies", "disk_io", "simulated_device"} <= compiled
    assert compiled <= {"store", "hashing", "copies", "disk_io", "simulated_device", "device"}  # device: with nvcc
    assert any(name.endswith("licenses/LICENSE") for name in names)

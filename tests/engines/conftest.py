"""Sites that serve, histories over their pools, and sockets that answer: each is closed behind its test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from core_site import BLOCK_TOKENS, CoreSite
from explain_site import Serve, make_history_of
from history_site import MakeHistory, MakeSite

from kvbm._backend import Backend
from kvbm.engines.explain_socket import ExplainSocket
from kvbm.engines.groups import Group
from kvbm.engines.history import History


@pytest.fixture
def make_site(backend: Backend, tmp_path: Path) -> Iterator[MakeSite]:
    sites: list[CoreSite] = []

    def make(**given: Any) -> CoreSite:
        folder = tmp_path / str(len(sites))
        folder.mkdir()
        sites.append(CoreSite(backend, folder, **given))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.fixture
def make_history(make_site: MakeSite) -> MakeHistory:
    """Make a history over the pools of a site that serves nothing."""

    def make(windows: tuple[int, ...] = (0,), **given: Any) -> History:
        site = make_site()
        groups = [Group(site.planner, site.channels, window_blocks=window) for window in windows]
        return History(groups, block_tokens=BLOCK_TOKENS, clock=lambda: site.now, **given)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give the path of a folder that is not there yet."""
    return tmp_path / "run"


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    """Start a socket over some requests."""
    begun: list[ExplainSocket] = []

    def start(*request_ids: str, deadline_s: float = 30.0) -> ExplainSocket:
        begun.append(ExplainSocket(make_history_of(*request_ids), folder, deadline_s=deadline_s))
        return begun[-1]

    yield start
    for one in begun:
        one.close()

"""What the tests of the planner share."""

from __future__ import annotations

import pytest
from presence_view import MakeView, View

from kvbm._backend import Backend


@pytest.fixture
def make_view(backend: Backend) -> MakeView:
    return lambda **settings: View(backend, **settings)


@pytest.fixture
def view(make_view: MakeView) -> View:
    return make_view()

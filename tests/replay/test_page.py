"""The report page: all in one file, right in what it says, and a clear word where matplotlib is absent."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from kvbm.errors import PluginError
from kvbm.manager import BlockManager
from kvbm.replay import ReplayReport, TraceRequest, generate_conversations, replay
from kvbm.replay.html import need_matplotlib, render_page
from kvbm.replay.request import hashes_of
from kvbm.types import HashArray


class Page(HTMLParser):
    """Collects the tags of a page, and that each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReplayReport, list[HashArray]]:
    """Replay a little over three tiers."""
    served = []
    with BlockManager(
        num_layers=1,
        outer_dim=1,
        page_size=16,
        inner_dim=16,
        dtype="uint8",
        device_blocks=250,
        host_blocks=500,
        disk_blocks=1500,
        disk_path=tmp_path_factory.mktemp("disk"),
        model="replay",
    ) as manager:
        requests = []
        for request in generate_conversations(num_sessions=10, num_turns=2, seed=1):
            hashes = hashes_of(manager, request)
            requests.append(TraceRequest(hashes=hashes))
            if len(hashes) <= 250:
                served.append(hashes)
        report = replay(manager, requests)
    return report, served


def test_page_is_whole_and_asks_nobody_for_anything(run: tuple[ReplayReport, list[HashArray]]) -> None:
    text = render_page(*run, title="a <b> & c", configuration={"trace": "<x>", "tiers": "three"})
    page = Page(text)
    assert not page.open
    assert {"script", "link", "img", "iframe", "object", "image", "base"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("href", "xlink:href", "src", "action"):
                assert value is not None
                assert value.startswith("#"), (tag, name, value)
    assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, "names of XML, not addresses"
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert "a <b> & c" in page.text
    assert "<x>" in page.text
    assert [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"] == [
        "Hit rate over time",
        "Occupancy by tier",
        "Hit rate against capacity",
        "Bytes by route",
        "Time of the manager's calls",
    ]


def test_page_tells_the_figures_of_the_report(run: tuple[ReplayReport, list[HashArray]]) -> None:
    report, served = run
    page = Page(render_page(report, served, title="t", configuration={}))
    for _, value in report.rows():
        assert value in page.text
    for tier, capacity in report.capacity_by_tier.items():
        assert f"{tier}, room for {capacity:,}" in page.text
    for counts in report.routes.values():
        assert f"{counts['blocks']:,} blocks" in page.text
    assert f"whole run {report.hit_rate:.1%}" in page.text


def test_drawings_on_one_page_share_no_name(run: tuple[ReplayReport, list[HashArray]]) -> None:
    page = Page(render_page(*run, title="t", configuration={}))
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert names
    assert len(names) == len(set(names))


def test_page_of_a_failed_and_interrupted_replay_says_so_first(run: tuple[ReplayReport, list[HashArray]]) -> None:
    report = ReplayReport(is_partial=True, wrong_bytes=3, first_wrong="block 7", held_blocks=2)
    page = Page(render_page(report, [], title="t", configuration={}))
    head = page.text.partition("hit rate")[0]
    assert "Interrupted" in head
    assert "3 wrong bytes, first in block 7" in head
    assert "2 blocks were still held" in head
    assert not [tag for tag, _ in page.tags if tag == "svg"], "there is nothing to draw"


@pytest.mark.parametrize("num_requests", [1, 2, 3])
def test_page_of_few_requests_is_drawn(num_requests: int) -> None:
    hashes = np.arange(6, dtype=np.uint64).reshape(3, 2)
    with BlockManager(num_layers=1, outer_dim=1, page_size=16, inner_dim=16, dtype="uint8", device_blocks=3) as manager:
        report = replay(manager, [TraceRequest(hashes=hashes)] * num_requests)
    page = Page(render_page(report, [hashes] * num_requests, title="t", configuration={}))
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 5


def test_page_without_matplotlib_names_the_extra(
    run: tuple[ReplayReport, list[HashArray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("kvbm.replay.html.find_spec", lambda _: None)
    for ask in (need_matplotlib, lambda: render_page(*run, title="t", configuration={})):
        with pytest.raises(PluginError, match=r"needs matplotlib.*pip install 'kvbm-native\[report\]'"):
            ask()


def test_the_look_of_other_drawings_in_the_process_stays(run: tuple[ReplayReport, list[HashArray]]) -> None:
    names = [name for name in matplotlib.rcParams if name != "backend"]  # which is only chosen when it is read
    before = [matplotlib.rcParams[name] for name in names]
    render_page(*run, title="t", configuration={})
    assert [matplotlib.rcParams[name] for name in names] == before

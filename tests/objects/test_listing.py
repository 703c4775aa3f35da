"""Listings: bounded as a whole, no failure of the store when they take long, and what came is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from object_site import PATIENCE_S, Blocks, FakeClient, MakeStorage, Sleeper

from kvbm.storage.object_store import Found, RetryLimits


class PagedClient(FakeClient):
    """Lists one object a page; `page_plan` says what each page does: an exception is raised, "hang" never comes."""

    def __init__(self) -> None:
        super().__init__()
        self.page_plan: list[Any] = []
        self.num_pages = 0
        self.on_page: Callable[[], Any] = lambda: None

    async def list(self, prefix: str) -> AsyncIterator[list[Found]]:
        self.seen.append("list")
        async for page in super().list(prefix):
            for entry in page:
                outcome = self.page_plan.pop(0) if self.page_plan else None
                if outcome == "hang":
                    await asyncio.Event().wait()
                elif outcome is not None:
                    raise outcome
                self.num_pages += 1
                self.seen.append("page")
                self.on_page()
                await asyncio.sleep(0)
                yield [entry]


@pytest.fixture
def client() -> PagedClient:
    return PagedClient()


def test_listing_that_hangs_ends_in_its_time_and_keeps_what_came(
    make_storage: MakeStorage, client: PagedClient
) -> None:
    storage, blocks = make_storage(client=client, listing_timeout_s=0.05, max_failures=1), Blocks(3)
    assert all(blocks.write(storage))
    client.page_plan = [None, "hang"]
    _, hashes, _, _ = storage.inventory()
    assert len(hashes) == 1
    assert client.num_pages == 1, "it was not begun anew"
    assert storage.counters.num_failures == 0
    assert storage.is_available, "a long listing is no failure of the store"


def test_requests_go_between_the_pages_of_a_listing(make_storage: MakeStorage, client: PagedClient) -> None:
    storage, blocks = make_storage(client=client, max_concurrency=1), Blocks(8)
    assert all(blocks.write(storage))
    reading: list[Any] = []
    client.on_page = lambda: reading or reading.append(blocks.submit_read(storage))
    assert len(storage.inventory()[1]) == 8
    assert client.seen.index("get") < len(client.seen) - 1 - client.seen[::-1].index("page")
    assert reading[0].result(PATIENCE_S).all()


def test_page_that_fails_is_asked_for_again_and_nothing_is_listed_twice(
    make_storage: MakeStorage, client: PagedClient
) -> None:
    storage, blocks = make_storage(client=client, retries=RetryLimits(sleep=Sleeper())), Blocks(4)
    assert all(blocks.write(storage))
    client.page_plan = [None, None, OSError("reset"), None, None, None, OSError("reset")]
    _, hashes, _, _ = storage.inventory()
    assert sorted(hashes.tolist()) == sorted(blocks.hashes.tolist())
    assert storage.counters.num_failures == 2


def test_listing_that_breaks_off_again_and_again_is_given_up(make_storage: MakeStorage, client: PagedClient) -> None:
    storage, blocks = make_storage(client=client, retries=RetryLimits(sleep=Sleeper())), Blocks(2)
    assert all(blocks.write(storage))
    client.page_plan = [None, OSError("reset")] * 100
    assert len(storage.inventory()[1]) == 1
    assert len(client.page_plan) > 150
    assert storage.is_available, "its pages are answered"


def test_clear_of_a_store_that_is_listed_in_pages_deletes_all(make_storage: MakeStorage, client: PagedClient) -> None:
    storage, blocks = make_storage(client=client), Blocks(5)
    assert all(blocks.write(storage))
    storage.clear()
    assert not client.objects

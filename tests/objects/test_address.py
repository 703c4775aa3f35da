"""URLs, options and what may be printed: credentials come from the environment only, and go nowhere."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
from object_site import LAYOUT, Blocks, FakeClient, MakeStorage

from kvbm.errors import ConfigError, PluginError
from kvbm.storage.object_store import ObjectStorage
from kvbm.storage.object_store.address import check_options, check_prefix, check_url, safe_text
from kvbm.testing.object_server import ObjectServer, free_ports

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://user:{SECRET}@bucket/folder",
        f"s3://{SECRET}@bucket/folder",
        f"gs://x:{SECRET}@bucket",
        f"abfs://container:{SECRET}@account.dfs.core.windows.net/x",
        f"az://container/folder?sig={SECRET}",
        f"s3://bucket/folder#{SECRET}",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="environment") as caught:
        ObjectStorage(LAYOUT, url, fingerprint="m", client=FakeClient())
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://bucket/folder", "begins with one of s3://"),
        ("bucket/folder", "no scheme"),
        ("s3:///folder", "names no bucket"),
        ("file://", "names a directory"),
        ("file://host/directory", "names a directory"),
        ("s3://[bucket", "cannot be read"),
    ],
)
def test_urls_that_name_no_store_are_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    ["s3://b", "s3://b/x/y", "gs://b/x", "az://c/x", "abfss://c@a.dfs.core.windows.net/x", "file:///x", "memory://"],
)
def test_urls_of_every_kind_are_taken(url: str) -> None:
    assert check_url(url).scheme == url.partition(":")[0]


@pytest.mark.parametrize("name", ["access_key_id", "secret_access_key", "session_token", "account_key", "sas_key", "x"])
def test_credentials_are_no_option(name: str) -> None:
    with pytest.raises(ConfigError, match="credentials come from the environment") as caught:
        check_options({name: SECRET})
    assert SECRET not in str(caught.value)


def test_an_endpoint_carries_no_credentials() -> None:
    assert check_options({"endpoint": "http://127.0.0.1:1", "region": "x"}) == {
        "endpoint": "http://127.0.0.1:1",
        "region": "x",
    }
    for endpoint in (f"http://u:{SECRET}@host", f"http://host?sig={SECRET}"):
        with pytest.raises(ConfigError, match="endpoint") as caught:
            check_options({"endpoint": endpoint})
        assert SECRET not in str(caught.value)


def test_a_prefix_is_folders() -> None:
    assert check_prefix("/a//b-1/") == "a/b-1"
    assert not check_prefix("")
    for wrong in ("a/../b", "a b", "a?b", "a/ü"):
        with pytest.raises(ConfigError, match="prefix"):
            check_prefix(wrong)


def test_texts_lose_queries_user_names_and_values_of_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    error = OSError(
        f"GET https://me:pw@host/key?sig=abc%2F (key {SECRET}) failed: <?xml version='1.0'?>..\nsecond line"
    )
    assert safe_text(error) == "GET https://host/key (key ***) failed"
    assert len(safe_text(OSError("x" * 1000))) == 500


def test_no_log_line_and_no_error_holds_credentials(
    make_s3: MakeStorage, server: ObjectServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)  # a wrong one
    caplog.set_level(logging.DEBUG)
    blocks = Blocks(2)
    refused, unreachable = make_s3(), make_s3(port=free_ports(1)[0])
    for storage in (refused, unreachable):
        assert blocks.write(storage) == [False] * 2
        assert blocks.read(storage) == [False] * 2
        assert storage.counters.num_failures
        seen = f"{storage!r} {storage.counters} {vars(storage)} {storage.url} {storage._books._client}"
        assert SECRET not in seen
        assert server.access_key not in seen
    assert "403" in refused.counters.last_error
    assert refused.counters.num_retries == 0  # it would be refused again
    assert "object put failed" in caplog.text
    assert SECRET not in caplog.text
    assert server.access_key not in caplog.text


def test_without_obstore_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.delitem(sys.modules, name)

    class Blocked:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name.partition(".")[0] == "obstore":
                raise ImportError(name)

    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    with pytest.raises(PluginError, match=r'pip install "kvbm-native\[s3\]"'):
        ObjectStorage(LAYOUT, "memory://", fingerprint="m")

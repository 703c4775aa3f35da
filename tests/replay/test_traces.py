"""Trace readers: both formats, and any bytes at all."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbm.errors import TraceError
from kvbm.replay import generate_conversations, read_trace

MOONCAKE = [
    {"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [0, 1]},
    {"timestamp": 9, "input_length": 3, "output_length": 1, "hash_ids": [0, 2, 1]},
]
AGENTS: list[dict[str, Any]] = [
    {
        "id": "a",
        "block_size": 64,
        "requests": [{"t": 0, "hash_ids": [1, 2]}, {"type": "subagent", "requests": [{"hash_ids": [9]}]}],
    },
    {"id": "b", "block_size": 64, "requests": [{"t": 0, "hash_ids": [1, 2]}]},
]


def write(path: Path, lines: list[Any]) -> Path:
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_mooncake_ids_become_equal_hashes_where_they_are_equal(tmp_path: Path, name: str) -> None:
    one, two = (request.hashes for request in read_trace(write(tmp_path / name, MOONCAKE)))
    assert one is not None
    assert two is not None
    assert (one.shape, two.shape) == ((2, 2), (3, 2))
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[2])
    assert not np.array_equal(one[1], two[1])


def test_agent_ids_are_local_to_their_session_and_subagents_nest(tmp_path: Path) -> None:
    first, nested, other = (request.hashes for request in read_trace(write(tmp_path / "t.jsonl", AGENTS)))
    assert first is not None
    assert nested is not None
    assert other is not None
    assert (len(first), len(nested), len(other)) == (2, 1, 2)
    assert not np.array_equal(first, other)


def test_requests_tell_their_time_in_seconds_and_their_session(tmp_path: Path) -> None:
    mooncake = read_trace(write(tmp_path / "m.jsonl", MOONCAKE))
    assert [(request.time_s, request.session) for request in mooncake] == [(0.0, ""), (0.009, "")]
    session = {"id": "a", "requests": [{"t": 5, "hash_ids": [1]}, {"requests": [{"hash_ids": [9]}]}]}
    agents = read_trace(write(tmp_path / "a.jsonl", [session, {"id": "b", "requests": [{"t": 2.5, "hash_ids": [1]}]}]))
    assert [(request.time_s, request.session) for request in agents] == [(5.0, "a"), (5.0, "a"), (2.5, "b")]


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", MOONCAKE)
    path.write_bytes(path.read_bytes() + b"{broken")
    assert len(read_trace(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"hash_ids": [1, 2]}\n{"hash_ids": [1', r"line 2: not a whole JSON object .* give --requests 1"),
        (b'{"hash_ids": [1', r"line 1: not a whole JSON object .* fetch it again$"),
        (b'{"hash_ids": ["x"]}\n', "line 1: hash_ids must be a list of integers"),
        (b'{"hash_ids": 5}\n', "line 1: hash_ids must be a list of integers"),
        (b'{"a": 1}\n', "line 1: not a request; expected Mooncake's"),
        (b"[1]\n", "line 1: not a request"),
        (b'{"id": 5, "requests": []}\n', "line 1: not an agent session"),
        (b'{"id": "s", "requests": [{"requests": [5]}]}\n', "line 1: the requests of a subagent"),
        (b'{"timestamp": "noon", "hash_ids": [1]}\n', "line 1: timestamp must be a time, 0 or more"),
        (b'{"id": "s", "requests": [{"t": -1, "hash_ids": [1]}]}\n', "line 1: t must be a time, 0 or more"),
        (b"\n\n", "no request in it"),
    ],
)
def test_a_damaged_trace_names_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(data)
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_absent_and_cut_off_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read_trace(tmp_path / "nothing.jsonl")
    path = write(tmp_path / "t.jsonl.gz", MOONCAKE * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TraceError, match="damaged or cut off"):
        read_trace(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(TraceError, match="damaged or cut off"):
        read_trace(path)


def test_gzip_is_known_by_its_first_bytes_whatever_the_name(tmp_path: Path) -> None:
    packed = write(tmp_path / "t.jsonl.gz", MOONCAKE)
    renamed = packed.rename(tmp_path / "t.jsonl")
    assert len(read_trace(renamed)) == 2


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["hash_ids", "requests", "id", "t"]), inner, max_size=4)
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_are_requests_or_a_trace_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(data)
    with contextlib.suppress(TraceError):
        assert read_trace(path)


def test_generated_conversations_share_prompts_and_repeat_by_seed() -> None:
    one, again, other = (list(generate_conversations(num_sessions=9, num_turns=3, seed=seed)) for seed in (1, 1, 2))
    assert len(one) == 27
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))
    assert len({request.session for request in one}) == 9
    times = [request.time_s for request in one]
    assert times == sorted(times)
    assert len({request.tokens[:512].tobytes() for request in one}) <= 4


def test_generated_conversations_are_made_when_they_are_asked_for() -> None:
    def peak(num_turns: int) -> int:
        tracemalloc.start()
        for _ in itertools.islice(generate_conversations(num_sessions=10, num_turns=num_turns, seed=4), 10):
            pass
        _, peak_nbytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak_nbytes

    peak(1)  # first use of numpy's generator
    assert peak(400) < 2 * peak(4)

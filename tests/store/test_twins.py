"""Both stores answer the same to any schedule: values, error types and texts (CONFORMANCE 14, 38)."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import numpy as np
import pytest

from kvbm._backend import load_backend
from kvbm.eviction import FifoPolicy, LruPolicy
from kvbm.types import HashArray

BACKENDS = ("pure", "native")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("kvbm._native.store") is None, reason="the pure package has one twin only"
)

NUM_BLOCKS = 12
OPERATIONS = (
    *("allocate", "stage", "register", "release") * 3,
    *("match", "find", "acquire", "touch", "set_priority", "remove", "discard", "restore", "clear"),
    *("counts", "states", "registered", "drain", "subscribe", "unsubscribe"),
)
NEEDED_STATES = {"stage": (1,), "register": (2,), "release": (1, 2, 3), "discard": (3, 4), "restore": (0,)}


def _hashes(names: list[int]) -> HashArray:
    return np.array([[name * 7919 + 1, name] for name in names], dtype=np.uint64).reshape(-1, 2)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _answer(store: Any, operation: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return _plain(getattr(store, operation)(*arguments))
    except Exception as error:
        return type(error), str(error)


def _draw_ids(rng: random.Random, store: Any, operation: str) -> list[int]:
    ids = [rng.randrange(NUM_BLOCKS) if rng.random() < 0.98 else rng.choice([-1, NUM_BLOCKS, 2**40]) for _ in range(4)]
    if operation in NEEDED_STATES and rng.random() < 0.7:  # mostly calls that succeed
        wanted = rng.choice(NEEDED_STATES[operation])
        ids = [i for i in range(NUM_BLOCKS) if store.states([i])[0] == wanted]
        rng.shuffle(ids)
    ids = ids[: rng.randrange(5)]
    return ids * 2 if rng.random() < 0.1 else ids


def _draw(rng: random.Random, store: Any, operation: str) -> tuple[Any, ...]:
    ids = _draw_ids(rng, store, operation)
    hashes = _hashes([rng.randrange(16) for _ in (ids if rng.random() < 0.97 else range(3))])
    priorities = [rng.choice([50, 50, 50, 0, 100, 101]) for _ in ids]
    return {
        "allocate": (rng.choice([0, 1, 2, 3, 5, -1]),),
        "stage": (ids, hashes, hashes[::-1].copy()),
        "acquire": (ids, hashes),
        "restore": (ids, hashes, hashes, priorities),
        "set_priority": (hashes, rng.choice([0, 50, 63, 64, 100, 101, -1])),
        "drain": (rng.randrange(9),),
        **dict.fromkeys(("register", "release", "discard", "states"), (ids,)),
        **dict.fromkeys(("match", "find", "touch", "remove"), (hashes,)),
    }.get(operation, ())


@pytest.mark.parametrize("policy", [None, LruPolicy, FifoPolicy])
@pytest.mark.parametrize("seed", range(60))
def test_twins_give_equal_answers_and_errors(seed: int, policy: Any) -> None:
    rng = random.Random(seed)

    def make_policy() -> Any:
        return LruPolicy(is_builtin=False) if policy is LruPolicy else policy and policy()

    stores = [load_backend(name).store(NUM_BLOCKS, policy=make_policy(), outbox_capacity=16) for name in BACKENDS]
    for step in range(300):
        operation = rng.choice(OPERATIONS)
        arguments = _draw(rng, stores[0], operation)
        answers = [_answer(store, operation, arguments) for store in stores]
        assert answers[0] == answers[1], (step, operation, arguments)
        for store in stores:
            store.check()


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("release", ("abc",)),
        ("release", ([1.5],)),
        ("release", ([True],)),
        ("release", (np.zeros((2, 2), dtype=np.int32),)),
        ("release", ([2**70],)),
        ("match", (b"short",)),
        ("match", (np.zeros((2, 2), dtype=np.float64),)),
        ("match", (["text"],)),
        ("match", (5,)),
        ("stage", ([0], np.zeros((2, 2), dtype=np.uint64), np.zeros((1, 2), dtype=np.uint64))),
        ("stage", ([0], np.zeros((1, 2), dtype=np.uint64), np.zeros((2, 2), dtype=np.uint64))),
        ("allocate", (2.7,)),
        ("allocate", (-(2**70),)),
        ("set_priority", (_hashes([1]), 50.5)),
        ("set_priority", (_hashes([1]), 2**70)),
        ("restore", ([0], _hashes([1]), _hashes([1]), [2**70])),
        ("restore", ([0], _hashes([1]), _hashes([1]), [50.7])),
        ("drain", (1.5,)),
    ],
)
def test_twins_refuse_bad_arguments_with_equal_texts(operation: str, arguments: tuple[Any, ...]) -> None:
    answers = [_answer(load_backend(name).store(4), operation, arguments) for name in BACKENDS]
    assert answers[0] == answers[1]
    assert isinstance(answers[0][0], type)
    assert issubclass(answers[0][0], Exception)


@pytest.mark.parametrize(
    ("operation", "arguments"), [("allocate", (2**70,)), ("allocate", (True,)), ("drain", (-1,)), ("drain", (2**70,))]
)
def test_twins_take_integers_of_any_size(operation: str, arguments: tuple[Any, ...]) -> None:
    answers = [_answer(load_backend(name).store(4), operation, arguments) for name in BACKENDS]
    assert answers[0] == answers[1]
    assert not isinstance(answers[0], tuple) or not isinstance(answers[0][0], type)


def test_stores_have_an_integer_number_of_blocks() -> None:
    for name in BACKENDS:
        with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
            load_backend(name).store(8.0)  # type: ignore[arg-type]

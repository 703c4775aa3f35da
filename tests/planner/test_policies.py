"""What each offload policy sends down, case by case, and policies from other packages (CONFORMANCE 33)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvbm
from kvbm.config import Config, OffloadConfig
from kvbm.errors import ConfigError
from kvbm.manager import BlockManager
from kvbm.planner.policies import (
    AlwaysPolicy,
    Candidates,
    OffloadPolicy,
    PriorityPolicy,
    SecondUsePolicy,
    TinyLfuPolicy,
    WriteBudget,
)
from kvbm.plugins import load_plugin, plugin_names
from kvbm.testing.offload_policies import OffloadPolicyTests
from kvbm.types import DEFAULT_PRIORITY, Tier


def blocks(names: Sequence[int], priorities: Sequence[int] | None = None) -> Candidates:
    hashes = np.array([[name, name + 1000] for name in names], dtype=np.uint64).reshape(-1, 2)
    given = [DEFAULT_PRIORITY] * len(names) if priorities is None else priorities
    return Candidates(Tier.DEVICE, Tier.HOST, hashes, np.zeros_like(hashes), np.array(given, dtype=np.uint8))


Step = tuple[str, Candidates, list[int]]  # verb, blocks, which of them go down

CASES: dict[str, tuple[OffloadPolicy, list[Step]]] = {
    "always: all, as soon as they are registered, and never again": (
        AlwaysPolicy(),
        [
            ("registered", blocks([1, 2, 3], [0, 50, 100]), [1, 1, 1]),
            ("registered", blocks([1]), [1]),
            ("used", blocks([1, 2]), [0, 0]),
            ("prioritised", blocks([1, 2], [100, 0]), [0, 0]),
            ("registered", blocks([]), []),
        ],
    ),
    "second use: a block that a request finds": (
        SecondUsePolicy(),
        [
            ("registered", blocks([1, 2, 3]), [0, 0, 0]),
            ("used", blocks([2, 3]), [1, 1]),
            ("used", blocks([2]), [1]),
            ("prioritised", blocks([1], [100]), [0]),
            ("registered", blocks([]), []),
        ],
    ),
    "second use: a block that was evicted and is computed again": (
        SecondUsePolicy(),
        [("registered", blocks([1, 2]), [0, 0]), ("registered", blocks([2, 3, 1]), [1, 0, 1])],
    ),
    "second use: twice in one batch": (SecondUsePolicy(), [("registered", blocks([1, 2, 1]), [0, 0, 1])]),
    "second use: found without having been registered here counts as the first": (
        SecondUsePolicy(),
        [("used", blocks([1]), [0]), ("used", blocks([1]), [1])],
    ),
    "second use: what was used longest ago is forgotten": (
        SecondUsePolicy(max_blocks=3),
        [
            ("registered", blocks([1, 2, 3]), [0, 0, 0]),
            ("used", blocks([1]), [1]),
            ("registered", blocks([4]), [0]),  # 2 goes
            ("registered", blocks([1, 3, 4]), [1, 1, 1]),
            ("registered", blocks([2]), [0]),  # 1 goes
            ("registered", blocks([1]), [0]),
        ],
    ),
    "second use: a window of one": (
        SecondUsePolicy(max_blocks=1),
        [
            ("registered", blocks([1, 2]), [0, 0]),
            ("registered", blocks([2]), [1]),
            ("registered", blocks([1]), [0]),
            ("registered", blocks([2]), [0]),
        ],
    ),
    "priority: not what nobody called important": (
        PriorityPolicy(),
        [("registered", blocks([1, 2, 3, 4], [0, DEFAULT_PRIORITY, 51, 100]), [0, 0, 1, 1])],
    ),
    "priority: the threshold is part of it": (
        PriorityPolicy(min_priority=70),
        [
            ("registered", blocks([1, 2, 3], [69, 70, 71]), [0, 1, 1]),
            ("prioritised", blocks([1, 2, 3], [70, 69, 100]), [1, 0, 1]),
            ("used", blocks([1, 2], [100, 100]), [0, 0]),
            ("registered", blocks([]), []),
        ],
    ),
    "priority: zero is all, a hundred the most important only": (
        PriorityPolicy(min_priority=0),
        [("registered", blocks([1, 2], [0, 100]), [1, 1])],
    ),
    "tinylfu: a block that is used again while it is new": (
        TinyLfuPolicy(1000, seed=1),
        [
            ("registered", blocks([1, 2, 3], [0, 50, 100]), [0, 0, 0]),
            ("used", blocks([2, 3]), [1, 1]),
            ("prioritised", blocks([1, 2], [100, 100]), [0, 0]),
            ("registered", blocks([1, 4]), [1, 0]),
            ("registered", blocks([]), []),
        ],
    ),
    "tinylfu: a block that was used more often than any that it would displace": (
        TinyLfuPolicy(8, window_share=0.01, seed=1),
        [
            ("registered", blocks(range(8)), [0] * 8),
            ("used", blocks(range(8)), [1] * 8),
            ("registered", blocks([50]), [0]),
            ("registered", blocks(range(100, 108)), [0] * 8),  # 50 leaves the window
            ("used", blocks([50]), [0]),  # twice, as the others
            ("registered", blocks(range(200, 208)), [0] * 8),
            ("used", blocks([50]), [1]),
        ],
    ),
    "write budget: what its policy chooses": (
        WriteBudget(PriorityPolicy(), 100, nbytes_per_day=1),
        [("registered", blocks([1, 2], [50, 51]), [0, 1]), ("prioritised", blocks([1, 2], [51, 50]), [1, 0])],
    ),
    "priority: a hundred": (PriorityPolicy(min_priority=100), [("registered", blocks([1, 2], [99, 100]), [0, 1])]),
}


@pytest.mark.parametrize(("policy", "steps"), CASES.values(), ids=CASES)
def test_policy_does_what_its_name_says(policy: OffloadPolicy, steps: list[Step]) -> None:
    for verb, candidates, expected in steps:
        mask = getattr(policy, verb)(candidates)
        assert (mask.dtype, mask.shape) == (np.bool_, (len(candidates),))
        assert mask.astype(int).tolist() == expected, verb


class TestAlways(OffloadPolicyTests):
    def make_policy(self) -> OffloadPolicy:
        return AlwaysPolicy()


class TestSecondUse(OffloadPolicyTests):
    def make_policy(self) -> OffloadPolicy:
        return SecondUsePolicy()


class TestPriority(OffloadPolicyTests):
    def make_policy(self) -> OffloadPolicy:
        return PriorityPolicy()


def test_second_use_remembers_no_more_than_its_window_however_large_a_batch_is() -> None:
    policy = SecondUsePolicy(max_blocks=10)
    policy.registered(blocks(range(1000)))
    assert len(policy._seen) == 10
    assert policy.registered(blocks(range(985, 1000))).tolist() == [False] * 5 + [True] * 10


@pytest.mark.parametrize("value", [0, -1])
def test_second_use_needs_a_window(value: int) -> None:
    with pytest.raises(ConfigError, match=f"max_blocks is {value}, give 1 or more"):
        SecondUsePolicy(max_blocks=value)


@pytest.mark.parametrize("value", [-1, 101])
def test_priority_needs_a_priority(value: int) -> None:
    with pytest.raises(ConfigError, match=rf"min_priority is {value}, give 0\.\.100"):
        PriorityPolicy(min_priority=value)


def test_default_of_the_configuration_is_the_policys_own_and_leaves_ordinary_blocks_where_they_are() -> None:
    assert OffloadConfig().min_priority == PriorityPolicy().min_priority == DEFAULT_PRIORITY + 1


class OddPolicy(OffloadPolicy):
    def registered(self, blocks: Candidates) -> Any:
        return blocks.hashes[:, 0] % 2 == 1


def offloaded(policy: str | OffloadPolicy, priorities: dict[int, int], **offload: Any) -> list[bool]:
    """Register blocks 1 to 4 with a manager, give them priorities; tell which reach the host."""
    tree: dict[str, Any] = {
        "model": {"num_layers": 1, "inner_dim": 8, "block_size": 4},
        "device": {"num_blocks": 8},
        "host": {"num_blocks": 8},
        "offload": {"policy": policy, **offload} if isinstance(policy, str) else {},
    }
    given = {} if isinstance(policy, str) else {"offload_policy": policy}
    names = blocks([1, 2, 3, 4]).hashes
    with BlockManager(Config.from_dict(tree), **given) as manager:
        filled = manager.allocate_blocks(4)
        manager.register_blocks(filled.complete(names)).release()
        for name, priority in priorities.items():
            manager.set_priority(blocks([name]).hashes, priority)
        manager.flush(60)
        return (manager.host.lookup(names) >= 0).tolist()


@pytest.mark.parametrize(
    ("policy", "settings", "priorities", "expected"),
    [
        ("always", {}, {2: 0}, [True, True, True, True]),
        ("second_use", {}, {4: 80}, [False, False, False, False]),
        ("tinylfu", {}, {4: 80}, [False, False, False, False]),
        ("priority", {}, {2: 30, 4: 80}, [False, False, False, True]),
        ("priority", {"min_priority": 81}, {4: 80}, [False, False, False, False]),
        ("priority", {"min_priority": DEFAULT_PRIORITY}, {}, [True, True, True, True]),
    ],
)
def test_manager_offloads_what_the_policy_in_its_configuration_chooses(
    policy: str, settings: dict[str, Any], priorities: dict[int, int], expected: list[bool]
) -> None:
    assert offloaded(policy, priorities, **settings) == expected


def test_manager_takes_a_policy_by_hand() -> None:
    assert offloaded(OddPolicy(), {}) == [True, False, True, False]


def test_our_own_policies_are_known_by_name() -> None:
    assert {"always", "second_use", "priority", "tinylfu"} <= set(plugin_names("offload"))
    assert load_plugin("offload", "priority") is PriorityPolicy


OUTSIDE = """
import numpy as np

from kvbm.planner import OffloadPolicy


class EvenPolicy(OffloadPolicy):
    def registered(self, blocks):
        return blocks.hashes[:, 0] % 2 == 0


class NoPolicy:
    pass
"""

ENTRY_POINTS = """
[kvbm.offload]
even = outside_policies:EvenPolicy
none = outside_policies:NoPolicy
gone = outside_policies:GonePolicy
"""

USE = """
import numpy as np

import kvbm
from kvbm.errors import ConfigError, PluginError
from kvbm.plugins import plugin_names

assert {"always", "even", "gone", "none", "priority", "second_use", "tinylfu"} <= set(plugin_names("offload"))
names = np.array([[name, 0] for name in (1, 2, 3, 4)], dtype=np.uint64)
settings = dict(num_layers=1, page_size=4, inner_dim=8, dtype="uint8", device_blocks=8, host_blocks=8)
with kvbm.BlockManager(**settings, offload_policy="even") as manager:
    manager.register_blocks(manager.allocate_blocks(4).complete(names)).release()
    manager.flush(60)
    assert (manager.host.lookup(names) >= 0).tolist() == [False, True, False, True]
for name, error in (("none", ConfigError), ("gone", PluginError), ("unheard_of", (PluginError, ConfigError))):
    try:
        kvbm.BlockManager(**settings, offload_policy=name)
    except error as caught:
        print(name, caught)
    else:
        raise AssertionError(name)
"""


def test_policy_of_another_distribution_is_found_by_its_entry_point(tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "outside_policies-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "outside_policies.py").write_text(OUTSIDE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-policies\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    paths = [site, Path(kvbm.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "NoPolicy, must give an OffloadPolicy" in lines[0]
    assert "outside_policies:GonePolicy) cannot be loaded" in lines[1]
    assert "'unheard_of'" in lines[2]
    assert "even" in lines[2], "the error names those that there are"

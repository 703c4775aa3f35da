"""What goes wrong again and again is said loudly only once in a while."""

from __future__ import annotations

import logging

from kvbm.planner.complaints import Complaints
from kvbm.testing.channels import SteppedClock


def test_the_first_of_a_kind_is_a_warning_and_then_one_in_a_while() -> None:
    clock = SteppedClock()
    complaints = Complaints(clock, every_s=10)
    levels = []
    for kind, seconds in (("a", 0), ("a", 1), ("b", 0), ("a", 8.9), ("a", 0.1), ("a", 0)):
        clock.advance(seconds)
        levels.append(complaints.level(kind))
    warned = [level == logging.WARNING for level in levels]
    assert warned == [True, False, True, False, True, False]

"""Conformance checks, public: `method_checks(MyMethod)` and `allocator_checks(MyAllocator)` in a plug-in's own test, `dfqbench methods check` in a
terminal.
"""

from dfqbench.testing.allocators import allocator_checks, allocator_outcomes
from dfqbench.testing.outcomes import Outcome, check_method, method_checks, outcomes
from dfqbench.testing.trial import BUDGET, StopAfter, Trial, ends_of, small_images, small_task, small_teacher

__all__ = [
    "BUDGET",
    "Outcome",
    "StopAfter",
    "Trial",
    "allocator_checks",
    "allocator_outcomes",
    "check_method",
    "ends_of",
    "method_checks",
    "outcomes",
    "small_images",
    "small_task",
    "small_teacher",
]

"""The benchmark's engine, and the public names that a method's author imports from it.

`from benchmark import Method, TrainingConfig, Phase, Batch, Field, register` is all that a plug-in needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmark.errors import UserError as UserError
    from benchmark.hosting import HostingConfig as HostingConfig
    from benchmark.hosting import HostingMethod as HostingMethod
    from benchmark.method import Batch as Batch
    from benchmark.method import Method as Method
    from benchmark.method import MethodConfig as MethodConfig
    from benchmark.method import Phase as Phase
    from benchmark.method import TrainingConfig as TrainingConfig
    from benchmark.network import Observation as Observation
    from benchmark.network import Teacher as Teacher
    from benchmark.registry import register as register
    from benchmark.settings import Field as Field
    from benchmark.student import Student as Student
    from benchmark.task import Task as Task

_HOME = {
    "Batch": "benchmark.method",
    "Field": "benchmark.settings",
    "Method": "benchmark.method",
    "HostingConfig": "benchmark.hosting",
    "HostingMethod": "benchmark.hosting",
    "MethodConfig": "benchmark.method",
    "Observation": "benchmark.network",
    "Phase": "benchmark.method",
    "Student": "benchmark.student",
    "Task": "benchmark.task",
    "Teacher": "benchmark.network",
    "TrainingConfig": "benchmark.method",
    "UserError": "benchmark.errors",
    "register": "benchmark.registry",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imports on first use: `import benchmark` alone must not cost the seconds that torch takes."""
    if name not in _HOME:
        raise AttributeError(f"module 'benchmark' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)

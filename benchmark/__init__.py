"""A benchmark of data-free quantization, and the public names that a method's author imports from it.

`from dfqbench import Method, TrainingConfig, Phase, Batch, Field, register` is all that a plug-in needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfqbench.analysis.frames import history as history
    from dfqbench.analysis.frames import results as results
    from dfqbench.errors import UserError as UserError
    from dfqbench.export.find import load_student as load_student
    from dfqbench.method.allocation import AllocationProblem as AllocationProblem
    from dfqbench.method.allocator import Allocator as Allocator
    from dfqbench.method.allocator import AllocatorConfig as AllocatorConfig
    from dfqbench.method.allocator import register_allocator as register_allocator
    from dfqbench.method.contract import Batch as Batch
    from dfqbench.method.contract import Method as Method
    from dfqbench.method.contract import Phase as Phase
    from dfqbench.method.contract import stream_seed as stream_seed
    from dfqbench.method.hosting import HostingConfig as HostingConfig
    from dfqbench.method.hosting import HostingMethod as HostingMethod
    from dfqbench.method.registry import register as register
    from dfqbench.method.settings import Field as Field
    from dfqbench.method.settings import InputFile as InputFile
    from dfqbench.method.settings import MethodConfig as MethodConfig
    from dfqbench.method.settings import TrainingConfig as TrainingConfig
    from dfqbench.network.network import Observation as Observation
    from dfqbench.network.network import Teacher as Teacher
    from dfqbench.quantization.student import Student as Student
    from dfqbench.run.quantize import quantize as quantize
    from dfqbench.task import Task as Task
    from dfqbench.tasks.answers import Answers as Answers
    from dfqbench.teachers.weights import read_weights as read_weights

_HOME = {
    "AllocationProblem": "dfqbench.method.allocation",
    "Allocator": "dfqbench.method.allocator",
    "AllocatorConfig": "dfqbench.method.allocator",
    "Answers": "dfqbench.tasks.answers",
    "Batch": "dfqbench.method.contract",
    "Field": "dfqbench.method.settings",
    "Method": "dfqbench.method.contract",
    "HostingConfig": "dfqbench.method.hosting",
    "HostingMethod": "dfqbench.method.hosting",
    "InputFile": "dfqbench.method.settings",
    "MethodConfig": "dfqbench.method.settings",
    "Observation": "dfqbench.network.network",
    "Phase": "dfqbench.method.contract",
    "Student": "dfqbench.quantization.student",
    "Task": "dfqbench.task",
    "Teacher": "dfqbench.network.network",
    "TrainingConfig": "dfqbench.method.settings",
    "UserError": "dfqbench.errors",
    "history": "dfqbench.analysis.frames",
    "load_student": "dfqbench.export.find",
    "quantize": "dfqbench.run.quantize",
    "read_weights": "dfqbench.teachers.weights",
    "register": "dfqbench.method.registry",
    "register_allocator": "dfqbench.method.allocator",
    "results": "dfqbench.analysis.frames",
    "stream_seed": "dfqbench.method.contract",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imports on first use: `import dfqbench` alone must not cost the seconds that torch takes."""
    if name not in _HOME:
        raise AttributeError(f"module 'dfqbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)

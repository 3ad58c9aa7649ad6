"""The names that plug-ins and scripts are written against: each is there, documented and typed. A name that goes away breaks other people's code."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

GUIDE, RESULTS = ((Path(__file__).parents[2] / folder / "README.md").read_text() for folder in ("methods", "results"))

API = {
    "dfqbench": (
        "AllocationProblem Allocator AllocatorConfig Answers Batch Field HostingConfig HostingMethod InputFile Method MethodConfig Observation Phase "
        "Student Task Teacher TrainingConfig UserError history load_student quantize read_weights register register_allocator results stream_seed"
    ),
    "dfqbench.data": "EvaluationSet OwnSet find_set list_sets register_set",
    "dfqbench.testing": "allocator_checks check_method method_checks outcomes Outcome Trial small_task small_teacher ends_of",
    "dfqbench_methods.parts.augment": "crop_and_flip",
    "dfqbench_methods.parts.centers": "ClassCenters",
    "dfqbench_methods.parts.generators": "ClassConditionalBatchNorm Generator LabelledGenerator UpsampleConv",
    "dfqbench_methods.parts.layouts": "at_size draw_labels label_loss",
    "dfqbench_methods.parts.losses": "batch_norm_loss decoupled_loss distillation_loss divergence_loss",
    "dfqbench_methods.parts.pixels": "clip_to_pixels jitter roughness same_class_similarity",
    "dfqbench_methods.parts.attention": "attention_center attention_distance attention_map",
    "dfqbench_methods.parts.stored_images": "StoredImages StoredImagesConfig",
}
MEMBERS = {
    ("dfqbench", "Method"): (
        "Config version ranges batch_norm uses_seed tasks tasks_with needs quick expected_failures "
        "setup phases before_step synthesize distill student_optimizer student_step adversary finish pictures widths "
        "answers random draw_labels draw_noise image_set minimise schedule set_rate log"
    ),
    ("dfqbench", "Student"): "observe quantizers quantized_modules layers set_ranges_from_bn correct_biases full_precision track_ranges",
    ("dfqbench", "Teacher"): "observe batch_statistics batch_norms",
    ("dfqbench", "Observation"): "statistics",
    ("dfqbench", "Task"): "image_shape pixel_range denormalised",
    ("dfqbench.data", "OwnSet"): "class_names load",
    ("dfqbench.export.student_file", "StoredStudent"): "save export",
}
FIELDS = {
    ("dfqbench", "Phase"): "name epochs distill calibration_epochs iterations batch step",
    ("dfqbench", "Batch"): "images labels teacher_logits",
    ("dfqbench", "Observation"): "logits features bn_inputs batch_norms",
    ("dfqbench", "Task"): "classes channels size mean std",
}
OF_RESULTS = ("history", "load_student", "quantize", "results")  # for those who have results, not for authors of methods
NAMES = [(module, name) for module, names in API.items() for name in names.split()]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_is_there_documented_and_typed(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    assert inspect.getdoc(thing), f"{module}.{name} has no docstring"
    if inspect.isfunction(thing):
        assert_typed(thing, f"{module}.{name}")
    elif inspect.isclass(thing):
        for member, value in vars(thing).items():
            if inspect.isfunction(value) and not member.startswith("_"):
                assert_typed(value, f"{module}.{name}.{member}")


def assert_typed(function: Any, name: str) -> None:
    signature = inspect.signature(function)
    missing = [p.name for p in signature.parameters.values() if p.name != "self" and p.annotation is inspect.Parameter.empty]
    assert not missing, f"{name}: {', '.join(missing)} without a type"
    assert signature.return_annotation is not inspect.Signature.empty, f"{name} does not say what it returns"


@pytest.mark.parametrize(("module", "name", "member"), [(*where, member) for where, members in MEMBERS.items() for member in members.split()])
def test_a_public_member_is_there(module: str, name: str, member: str) -> None:
    cls = getattr(importlib.import_module(module), name)
    assert hasattr(cls, member)
    value = inspect.getattr_static(cls, member)
    if inspect.isfunction(value) or isinstance(value, property):
        documented = value.fget if isinstance(value, property) else value
        exempt = name == "Task"  # its fields are told in the class's docstring
        assert inspect.getdoc(documented) or exempt, f"{name}.{member} has no docstring"


@pytest.mark.parametrize(("module", "name"), list(FIELDS))
def test_public_fields_are_there(module: str, name: str) -> None:
    import dataclasses

    cls = getattr(importlib.import_module(module), name)
    wanted = FIELDS[module, name].split()
    assert [field.name for field in dataclasses.fields(cls)][: len(wanted)] == wanted


def test_dfqbench_offers_what_is_listed_here_and_nothing_else() -> None:
    import dfqbench

    assert dfqbench.__all__ == sorted(API["dfqbench"].split())
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        dfqbench.Nothing  # noqa: B018


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_is_on_its_page(module: str, name: str) -> None:
    """As code: called, imported or in backticks. A word that only reads like it is no mention."""
    page, text = ("results", RESULTS) if name in OF_RESULTS and module == "dfqbench" else ("methods", GUIDE)
    assert re.search(rf"\b{name}[`(]|import [^\n]*\b{name}\b", text), f"{module}.{name} is public, but {page}/README.md does not mention it"


@pytest.mark.parametrize("member", MEMBERS["dfqbench", "Method"].split())
def test_a_methods_hook_is_in_the_guide(member: str) -> None:
    assert f"`{member}" in GUIDE or f"self.{member}" in GUIDE or f"def {member}" in GUIDE, f"Method.{member} is not in methods/README.md"

"""Students for pixels and boxes in files: their own, ONNX, and torch.export programs answer as the students do, in the networks' own form."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dfqbench import load_student
from dfqbench.export.export import export
from dfqbench.export.onnx_run import outputs_of
from dfqbench.export.student_file import save_student
from dfqbench.export.torch_program import load_program
from dfqbench.export.verify import Agreement
from dfqbench.network import Teacher
from dfqbench.quantization import Bits, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.task import Task
from dfqbench.teachers import parse_teacher
from dfqbench.teachers.build import build
from dfqbench.teachers.scenes import boxes_of

OUTPUTS = {
    "segment": ["logits (batch x 11 x 64 x 64)"],
    "detect": [
        "class_logits_1 (batch x 10 x 8 x 8)",
        "boxes_1 (batch x 4 x 8 x 8)",
        "class_logits_2 (batch x 10 x 4 x 4)",
        "boxes_2 (batch x 4 x 4 x 4)",
    ],
}


def images_of(task: Task, count: int = 8) -> Tensor:
    return torch.randn(count, *task.image_shape, generator=torch.Generator().manual_seed(0))


def student_of(kind: str, protocol: str, bits: str) -> Student:
    built = build(parse_teacher({"model": f"scenes:{kind}", "weights": "untrained"}))
    torch.manual_seed(0)
    for module in built.network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    student = Student(Teacher(built.network, built.task), find_protocol(protocol), Bits.parse(bits)).to(memory_format=torch.channels_last)
    student.track_ranges(True)
    with torch.no_grad():
        student(images_of(built.task))
    student.track_ranges(False)
    return student


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "protocol", "bits"), [("segment", "lineage", "w4a4"), ("segment", "full", "w8a8"), ("detect", "hardware", "w8a8")])
def test_files_answer_as_the_student_does(kind: str, protocol: str, bits: str, tmp_path: Path) -> None:
    student = student_of(kind, protocol, bits)
    images = images_of(student.task, 3)
    save_student(student, tmp_path / "student.safetensors", {"cell": {"teacher": {"model": f"scenes:{kind}"}}})
    loaded = load_student(tmp_path / "student.safetensors")
    with torch.no_grad():
        answer = loaded(images)
        assert torch.equal(answer, student(images))
    if kind == "detect":
        assert loaded.decode is not None
        assert student.decode is not None
        ours, theirs = loaded.decode(loaded.native(answer), 64, 64), student.decode(student.native(answer), 64, 64)
        assert len(ours[0]["boxes"]) > 0
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(ours, theirs, strict=True))
    for agreement in (*export(loaded, tmp_path / "s.onnx"), *export(loaded, tmp_path / "s.pt2", "torch")):
        assert agreement.passes
    assert outputs_of(tmp_path / "s.onnx") == OUTPUTS[kind]
    native = load_program(tmp_path / "s.pt2")(images)
    if kind == "detect":
        found = onnxruntime.InferenceSession(str(tmp_path / "s.onnx")).run(["boxes_2"], {"images": images.numpy()})[0]
        assert boxes_of(torch.from_numpy(found), 16).shape == (3, 16, 4)
        assert native[1][1].shape == found.shape
    else:
        assert native.shape == answer.shape


def test_one_pixel_that_another_class_wins_is_a_different_answer() -> None:
    task = Task(3, 1, 4, (0.5,), (0.5,), kind="segment")
    student = torch.zeros(2, 3, 4, 4)
    student[:, 1] = 2.0
    file = student.clone()
    assert Agreement.of("x", student, file, task).holds
    file[1, 2, 3, 3] = 5.0
    found = Agreement.of("x", student, file, task)
    assert not found.holds
    assert found.differs.tolist() == [False, True]
    assert found.equal == 1 - 1 / 32
    assert "1 of 2 answers equal (96.875 % of their choices)" in str(found)
    assert "at most 2 apart" in str(found)

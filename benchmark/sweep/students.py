"""Whether a network can be quantized by a protocol at all: found out once for the two, not in every cell."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfqbench.errors import UserError
from dfqbench.files import PACKAGE
from dfqbench.quantization import Bits, Protocol
from dfqbench.quantization.protocol import GRID_WIDTHS
from dfqbench.teachers import UNTRAINED, Question, parse_teacher
from dfqbench.teachers.spec import ZOOS

if TYPE_CHECKING:
    from dfqbench.network import Teacher

ROOMS = ("network", "quantization")


def student_of(protocol: Protocol) -> Question:
    """Asks a teacher for a student: {"refused": why there is none, "ranges": why its BN layers do not say its ranges}, None where all is well; and
    how much of its work is quantized: {"quantized": {"weights": share, "activations": share}, "left_float": names}, None where nobody could count.
    """
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for room in ROOMS for file in sorted((PACKAGE / room).glob("*.py"))]

    def answer(teacher: Teacher) -> dict[str, Any]:
        from dfqbench.quantization.student import Student
        from dfqbench.quantization.work import share_of, work_of

        said: dict[str, Any] = {"refused": None, "ranges": None, "quantized": None, "left_float": []}
        step = "refused"
        try:
            student = Student(teacher, protocol, Bits(GRID_WIDTHS[protocol.weight_grid][1], 8))
            said |= {"left_float": student.left_float, "quantized": share_of(work_of(student))._asdict()}
            step = "ranges"
            student.set_ranges_from_bn(1.0)
        except UserError as error:
            said[step] = str(error)
        except Exception:  # a bug, not the network's fault: its cells fail one by one, each with the traceback
            pass
        return said

    return Question("student", [protocol.fingerprint(), code], answer)


def about_work(teacher: str, protocol: str, student: dict[str, Any]) -> str:
    """How much of a network is quantized, for `plan`; empty where nobody could count, or all of it is."""
    share = student.get("quantized")
    if not share or min(share.values()) >= 0.9999:
        return ""
    weights, activations = (f"{100 * share[what]:.4g} %" for what in ("weights", "activations"))
    float_ones = student["left_float"]
    named = f"; kept in float: {', '.join(float_ones[:3])}{f' and {len(float_ones) - 3} more' if len(float_ones) > 3 else ''}" if float_ones else ""
    shares = f"{weights} of the multiplications by a weight have a quantized one, {activations} of all multiply quantized activations"
    return f"{teacher}: under {protocol}, {shares}{named}"


HEADINGS = ("network", "weights", "activations", "in float, or why not")


@dataclass(frozen=True)
class Checked:
    """What becomes of a network under a protocol: shares of its multiplications in 0..1, None where it is refused; why that, or what stays float."""

    name: str
    weights: float | None
    activations: float | None
    why: str

    @property
    def is_whole(self) -> bool:
        """Whether weights and activations are quantized wherever they are multiplied."""
        return self.weights is not None and self.activations is not None and min(self.weights, self.activations) > 0.9999

    def words(self) -> tuple[str, ...]:
        """By `HEADINGS`; shares in %."""
        return self.name, *("" if share is None else f"{100 * share:.1f}" for share in (self.weights, self.activations)), self.why

    def __str__(self) -> str:
        if self.weights is None or self.activations is None:
            return f"refused: {self.why}"
        shares = "wholly quantized" if self.is_whole else f"weights {100 * self.weights:.1f} %, activations {100 * self.activations:.1f} %"
        return f"{shares}; in float: {self.why}" if self.why else shares


def checked(name: str, protocol: Protocol) -> Checked:
    """Builds the network of a zoo's or a file's name, untrained where it is a zoo's, and quantizes it. Nothing that is wrong with it raises."""
    from dfqbench.network import Teacher
    from dfqbench.teachers.build import build

    try:
        built = build(parse_teacher({"model": name, "weights": UNTRAINED} if name.partition(":")[0] in ZOOS else name))
        student = student_of(protocol).answer(Teacher(built.network, built.task))
    except Exception as error:  # a zoo's network may fail in any way
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Checked(name, None, None, " ".join(text.removeprefix(f"teacher {name!r}: ").split()))
    if student["refused"] or not student["quantized"]:
        return Checked(name, None, None, student["refused"] or "its work could not be counted")
    return Checked(name, **student["quantized"], why=", ".join(student["left_float"]))

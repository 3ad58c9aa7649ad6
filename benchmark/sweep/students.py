"""Whether a network can be quantized by a protocol at all: found out once for the two, not in every cell."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from dfqbench.errors import UserError
from dfqbench.files import PACKAGE
from dfqbench.quantization import Bits, Protocol
from dfqbench.teachers import Question

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
            student = Student(teacher, protocol, Bits(8, 8))
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

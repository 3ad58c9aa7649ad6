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
    """Asks a teacher for a student: {"refused": why there is none, "ranges": why its BN layers do not say its ranges}, None where all is well."""
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for room in ROOMS for file in sorted((PACKAGE / room).glob("*.py"))]

    def answer(teacher: Teacher) -> dict[str, Any]:
        from dfqbench.quantization.student import Student

        said: dict[str, Any] = {"refused": None, "ranges": None}
        step = "refused"
        try:
            student = Student(teacher, protocol, Bits(8, 8))
            step = "ranges"
            student.set_ranges_from_bn(1.0)
        except UserError as error:
            said[step] = str(error)
        except Exception:  # a bug, not the network's fault: its cells fail one by one, each with the traceback
            pass
        return said

    return Question("student", [protocol.fingerprint(), code], answer)

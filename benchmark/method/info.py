"""What is known about a method beside its code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dfqbench.method.plugins import Origin

Fidelity = Literal["code", "paper", "abstract"]
Needs = Literal["statistics", "features", "labels"]
NEEDS: dict[Needs, str] = {
    "statistics": "BN statistics: a teacher without BN layers will not do",
    "features": "stage features (attention, relations, class centres)",
    "labels": "class labels to make images from",
}


def lacking(needs: Iterable[Needs], batch_norms: int | None, stages: int | None) -> list[str]:
    """What a teacher lacks of what a method needs, as `statistics (BN statistics: ...)`. Labels every teacher has: its classes.

    batch_norms: its BN layers with running statistics; stages: of its traced graph; None where nobody counted.
    """
    there = {"statistics": batch_norms, "features": stages}
    return [f"{need} ({NEEDS[need]})" for need in NEEDS if need in set(needs) and there.get(need) == 0]


@dataclass(frozen=True)
class MethodInfo:
    """What is known about a method beside its code. `origin` says where it came from: built in, a package and version, or a file.

    `source` says it in parts; `source_sha256` is of the file, or of all Python files of an installed package.
    """

    name: str
    paper: str
    fidelity: Fidelity
    shares_synthesis: bool
    origin: str
    source_sha256: str
    summary: str
    needs: tuple[Needs, ...]
    source: Origin

"""What is known about a method beside its code."""

from __future__ import annotations

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

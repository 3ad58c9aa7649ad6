"""What is known about a method beside its code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from dfqbench.method.plugins import Origin
from dfqbench.task import Kind

Fidelity = Literal["code", "paper", "abstract", "released"]
FIDELITY: dict[Fidelity, str] = {
    "code": "the authors' code",
    "paper": "the paper",
    "abstract": "an abstract: reconstructed, details of the method are not public",
    "released": "a released checkpoint: trained elsewhere, evaluated here",
}
Needs = Literal["statistics", "features", "labels", "classifier", "ranges", "boxes"]
NEEDS: dict[Needs, str] = {
    "statistics": "BN statistics: a teacher without BN layers will not do",
    "features": "stage features (attention, relations, class centres)",
    "labels": "class labels to make images from",
    "classifier": "a convolution or linear layer with one output per class",
    "boxes": "boxes of all positions: a detector with a function boxes(answer, height, width) beside its decode",
    "ranges": "activation ranges from BN parameters: a BN layer that says how each quantized tensor is distributed",
}


def lacking(needs: Iterable[Needs], offers: Mapping[str, int]) -> list[str]:
    """What a teacher lacks of what a method needs, as `statistics (BN statistics: ...)`. Labels every teacher has: its classes.

    offers: how many of each need its network has (`Network.offers`); nothing is said of what nobody counted.
    """
    return [f"{need} ({NEEDS[need]})" for need in NEEDS if need in set(needs) and offers.get(need) == 0]


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
    tasks: tuple[Kind, ...]
    source: Origin

"""What is known about a teacher without having it in memory, and the teacher itself. Torch is imported once a network has to be built."""

from __future__ import annotations

import errno
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqbench.errors import Notice, UserError
from dfqbench.store.cache import remembered
from dfqbench.task import Task
from dfqbench.teachers.spec import OWN_ZOOS, ZOOS, Built, TeacherSpec, parse_teacher

if TYPE_CHECKING:
    from torch import nn

    from dfqbench.network import Teacher

WEIGHT_FILES = (".safetensors", ".pth", ".pt")
CARD_VERSION = 6  # raised when what a card says changes, so that remembered ones are not used any more


@dataclass(frozen=True)
class TeacherCard:
    """What is known about a teacher without having it in memory; enough for planning, identities and tables.

    `model` names a user's file without its folder, and `weights` (a path, 'zoo' or 'factory') is for people: what identifies the teacher is
    `model`, `weights_sha256` and `source_sha256`. The latter is of the one file that holds the factory; where a user's file imports others from
    beside it, of all of them with their module names; for an installed module, of its package (packages.py). `offers` (`Network.offers`) is for
    planning, and no part of a record; empty where nobody counted. `form` (see `network.trace`) is not 0 where the network had to be rewritten.
    """

    label: str
    model: str
    weights: str
    weights_sha256: str
    source_sha256: str | None
    task: Task
    parameters: int
    form: int = 0
    offers: Mapping[str, int] = field(default_factory=dict, compare=False)

    def as_dict(self) -> dict[str, Any]:
        left_out = {"offers", *(() if self.form else ("form",))}
        return {key: value for key, value in asdict(self).items() if key not in left_out} | {"task": self.task.as_dict()}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> TeacherCard:
        task: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given["task"].items()}
        return cls(**{**given, "task": Task(**task)})


@dataclass(frozen=True)
class Question:
    """What another room wants to know of a traced network. The answer depends on the network and `about` alone; both are what JSON can hold."""

    name: str
    about: Any
    answer: Callable[[Teacher], Any]


@dataclass(frozen=True)
class InMemory:
    """A network that a caller holds, as a teacher (see in_memory.py)."""

    card: TeacherCard
    network: nn.Module
    teacher: Teacher


def describe(spec: TeacherSpec, cache: Path | None = None) -> TeacherCard:
    """The card of a teacher. The first time, the network is built, its weights are loaded, and it is asked about one grey image.

    With `cache` (a folder) the card is remembered for as long as the spec, the files and the zoo's version stay the same.
    Raises UserError for whatever keeps the teacher from being used.
    """
    return examine(spec, cache)[0]


def examine(spec: TeacherSpec | InMemory, cache: Path | None = None, question: Question | None = None) -> tuple[TeacherCard, Any]:
    """The card of a teacher (see `describe`), and the answer to a question about its network, remembered as the card is."""
    if isinstance(spec, InMemory):
        return spec.card, question.answer(spec.teacher) if question else None
    _check_files(spec)
    key = [CARD_VERSION, spec.model_dump(mode="json", exclude={"preset"}), _stamp(spec.weights_file), _stamp(spec.source_file), _zoo_version(spec)]
    traced = functools.cache(lambda: _traced(spec))  # once, whatever is not remembered
    found = remembered(cache, "teacher", key, lambda: _examine(spec, *traced()), _neighbours_are_the_same)
    card = replace(TeacherCard.from_dict(found["card"]), offers=found["offers"])
    if question is None:
        return card, None

    def ask() -> dict[str, Any]:
        built, teacher = traced()
        return {"answer": question.answer(teacher), "neighbours": _stamps(spec, built)}

    return card, remembered(cache, question.name, [*key, question.about], ask, _neighbours_are_the_same)["answer"]


def load(spec: TeacherSpec | InMemory, card: TeacherCard | None = None) -> nn.Module:
    """The network with its weights: float32, on the CPU, in eval mode, without gradients. Takes nothing from torch's global random stream.

    Raises UserError where it is no longer the one that `card` was made of: a file was changed in the meantime.
    """
    if isinstance(spec, InMemory):
        return spec.network
    _check_files(spec)
    from dfqbench.teachers.build import build, check_answer

    built = build(spec)
    if card is not None:
        check_answer(built, f"teacher {spec.model!r}")  # a forward may import, too
        weights, source = _files_sha256(spec, built)
        changed = spec.weights if weights not in (None, card.weights_sha256) else spec.source_file if source != card.source_sha256 else None
        if changed:
            raise UserError(f"teacher {spec.model!r}: {changed}, or what it imports, has changed since the sweep was read: start the command again")
    return built.network


def list_models(pattern: str = "*", cache: Path | None = None) -> list[str]:
    """Every model name of the zoos that matches a wildcard, with or without its zoo: `timm:resnet*`, `resnet18*`.

    `my_nets.py:*` and `my_package.nets:*` list what that file or module defines: functions and classes, any of which may be a factory.
    A zoo whose package is not installed is left out with a warning. Being listed does not promise that the zoo has weights for it.
    With `cache` (a folder) a zoo's names are remembered for as long as its package stays the same.
    """
    place, _, names_wanted = pattern.rpartition(":")
    if place and place not in ZOOS and not any(sign in place for sign in "*?["):
        from dfqbench.teachers.own import factory_names

        spec = parse_teacher(f"{place}:{names_wanted or '*'}")
        return [f"{place}:{name}" for name in factory_names(spec) if fnmatch.fnmatchcase(name, names_wanted or "*")]
    found: list[str] = []
    for zoo in (zoo for zoo in ZOOS if not place or fnmatch.fnmatchcase(zoo, place)):
        try:
            names = _zoo_names(zoo, cache)
        except UserError as error:
            warnings.warn(f"{error}; its models are not listed", Notice, stacklevel=2)
            continue
        found += [f"{zoo}:{name}" for name in names if fnmatch.fnmatchcase(f"{zoo}:{name}", pattern) or fnmatch.fnmatchcase(name, pattern)]
    return found


def _zoo_names(zoo: str, cache: Path | None) -> list[str]:
    def ask() -> dict[str, Any]:
        from dfqbench.teachers.zoo import zoo_names

        return {"names": zoo_names(zoo)}

    here = [
        _sha256(Path(__file__).with_name(name)) for name in ("zoo.py", "cifar.py", "scenes.py", "torchvision_dense.py", "spec.py")
    ]  # they say which of a package's networks are meant
    if zoo in OWN_ZOOS:
        return list(remembered(cache, "zoo", [zoo, here], ask)["names"])
    try:
        version, found = importlib.metadata.version(zoo), importlib.util.find_spec(zoo)
    except (importlib.metadata.PackageNotFoundError, ImportError, ValueError):
        return list(ask()["names"])  # with what is wrong
    return list(remembered(cache, "zoo", [zoo, version, _stamp(Path(found.origin)) if found and found.origin else None, here], ask)["names"])


def _traced(spec: TeacherSpec) -> tuple[Built, Teacher]:
    from dfqbench.network import Teacher
    from dfqbench.teachers.build import build, check_answer

    built = build(spec)
    check_answer(built, f"teacher {spec.model!r}")
    try:
        return built, Teacher(built.network, built.task)
    except UserError as error:
        raise UserError(f"teacher {spec.model!r}: {error}") from error


def _examine(spec: TeacherSpec, built: Built, teacher: Teacher) -> dict[str, Any]:
    """What is remembered: the card, what was counted in the traced network, and the stamps of a user's file's neighbours."""
    import torch

    from dfqbench.teachers.build import build
    from dfqbench.teachers.weights import hash_tensors

    place, name = spec.source
    weights_sha256, source_sha256 = _files_sha256(spec, built)
    if spec.source_file is not None:
        place = spec.source_module or spec.source_file.name
        with torch.random.fork_rng(devices=[]):
            torch.seed()
            again = build(spec).network
        if hash_tensors(again.state_dict().items()) != hash_tensors(built.network.state_dict().items()):
            raise UserError(f"teacher {spec.model!r}: the factory returns other weights each time; let it load trained ones, or give `weights: FILE`")
    card = TeacherCard(
        label=spec.label,
        model=f"{place}:{name}",
        weights=spec.weights or ("zoo" if spec.source_file is None else "factory"),
        weights_sha256=weights_sha256 or hash_tensors(built.network.state_dict().items()),
        source_sha256=source_sha256,
        task=built.task,
        parameters=sum(parameter.numel() for parameter in built.network.parameters()),
        form=teacher.traced.meta["form"],
    )
    return {
        "card": card.as_dict(),
        "offers": teacher.offers,
        "neighbours": _stamps(spec, built),
    }


def _files_sha256(spec: TeacherSpec, built: Built) -> tuple[str | None, str | None]:
    """sha256 of the weights' file and of a user's source, as they are now; None where there is no such file."""
    return _sha256(spec.weights_file) if spec.weights_file else None, _source_sha256(spec.source_file, built.neighbours) if spec.source_file else None


def _stamps(spec: TeacherSpec, built: Built) -> list[Any]:
    """Of a source's files; of an installed module's folders too, to which a file may be added."""
    files = [file for file, _ in built.neighbours.values()]
    return [_stamp(path) for path in (*files, *({file.parent for file in files} if spec.source_module else ()))]


def _source_sha256(file: Path, neighbours: Mapping[str, tuple[Path, str]]) -> str:
    own = _sha256(file)
    if not neighbours:
        return own
    return hashlib.sha256("\n".join([own, *(f"{name} {sha256}" for name, (_, sha256) in sorted(neighbours.items()))]).encode()).hexdigest()


def _neighbours_are_the_same(found: dict[str, Any]) -> bool:
    try:
        return all(_stamp(Path(stamp[0])) == stamp for stamp in found["neighbours"])
    except OSError:
        return False


def _check_files(spec: TeacherSpec) -> None:
    where = f"teacher {spec.model!r}"
    if spec.weights_file is not None and spec.weights_file.suffix not in WEIGHT_FILES:
        raise UserError(f"{where}: weights {spec.weights!r} must be a file that ends with {', '.join(WEIGHT_FILES[:-1])} or {WEIGHT_FILES[-1]}")
    for what, file in (("file", spec.source_file), ("weights file", spec.weights_file)):
        try:
            if file is not None and not file.is_file():
                raise UserError(f"{where}: there is no {what} {file}")
            _stamp(file)
        except OSError as error:
            raise UserError(f"{where}: {file} cannot be read ({error.strerror})") from None


def _stamp(path: Path | None) -> list[Any] | None:
    """What changes when a file changes, without reading it. Raises OSError where it may not be read."""
    if path is None:
        return None
    status = path.stat()
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _zoo_version(spec: TeacherSpec) -> str | None:
    place = spec.source[0]
    if spec.source_module is not None:
        packages = importlib.metadata.packages_distributions().get(place.split(".")[0], [])
        return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages) or None
    if place not in ZOOS or place in OWN_ZOOS:
        return None
    try:
        return importlib.metadata.version(place)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"teacher {spec.model!r} needs the package {place!r}: pip install {place}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

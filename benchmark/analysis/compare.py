"""Two finished cells on one evaluation set, image by image: how far apart, how sure that is, and in what else they differ. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfqbench.analysis.records import Counts, Reading, read_store, said_of, score_of, scored
from dfqbench.analysis.stats import RESAMPLES, Bootstrap, Column, DenseBootstrap, Estimate, McNemar, mcnemar
from dfqbench.errors import UserError, counted
from dfqbench.metrics import DENSE, metric_of
from dfqbench.store import Store
from dfqbench.sweep.cell import leaves, without_data

OF_THE_PLACE = ("host", "slurm_job", "images.seconds")  # of provenance: where it happened to run, and how long that took
Side = tuple[dict[str, Any], NDArray[np.uint8] | Counts]  # a result, and packed bits of the images that it got right, or counts of dense tasks


@dataclass(frozen=True)
class Difference:
    """Something in which two cells differ, with both values as text; None where a cell has no such thing."""

    what: str
    first: str | None
    second: str | None


@dataclass(frozen=True)
class Pair:
    """Two results, compared on the images of their last epoch.

    difference: accuracy of the first minus the second's, in percentage points, over test images alone. both, neither: images that both and that
    none of them got right; `test` counts the rest; all three None and 0 for scores of dense tasks, of which no image is right or wrong. Of two
    cells without data it is the agreement with their teacher, and right is what the teacher says.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    difference: Estimate
    test: McNemar | None
    both: int
    neither: int
    differences: list[Difference]


def compare(store: Store, first: str, second: str, measured: Mapping[str, Side] | None = None) -> Pair:
    """Two cells by their ids or by prefixes that no other id has; or what `measured` says of one that is none, a student's file for example.

    UserError where that is no two finished cells with results on the same images.
    """
    known: dict[str, Any] = {given: (scored(result), images) for given, (result, images) in (measured or {}).items()}
    ids = {given: store.find(given) for given in (first, second) if given not in known}
    if first == second or len(set(ids.values())) < len(ids):
        raise UserError(f"{first} and {second} are the same{f' cell, {ids[first]}' if first in ids else ''}: give two")
    reading = read_store(store, set(ids.values()))
    for given, cell_id in ids.items():
        result = _finished(reading, cell_id)
        known[given] = result, _correct(reading, result)
    (ours, right), (theirs, theirs_right) = known[first], known[second]
    _check_images(ours, theirs)
    metric = metric_of(ours).key
    if metric in DENSE:
        counts: list[Any] = [right, theirs_right]
        bootstrap = DenseBootstrap(lambda cell, times: score_of(counts[cell], times), 2, ours["images"], RESAMPLES)
        return Pair(ours, theirs, Column(bootstrap, [[0], [1]]).difference(0, 1), None, 0, 0, list(_differences(ours, theirs)))
    test, both = mcnemar(right, theirs_right), int(np.bitwise_count(right & theirs_right).sum())
    return Pair(
        first=ours,
        second=theirs,
        difference=Column(Bootstrap(np.stack([right, theirs_right]), ours["images"]), [[0], [1]]).difference(0, 1),
        test=test,
        both=both,
        neither=ours["images"] - both - test.only_first - test.only_second,
        differences=list(_differences(ours, theirs)),
    )


def _check_images(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """UserError where they are not the same; synthetic ones of the same settings differ where rounding does."""
    said, sets = [], []
    for result in (ours, theirs):
        digest, images, blind = result["cell"]["identity"]["evaluation"], result["images"], without_data(result["cell"])
        made = str(result.get("unseen_sha256", "")) if blind else ""
        sets.append((digest, images, made))
        on = f"{images} images, {digest[:8]}" if not blind else f"agreement with its teacher on {images} synthetic images, {(made or digest[5:])[:8]}"
        said.append(f"{result['id']} was tested {'without data' if blind else 'on ' + result['cell']['evaluation']['name']} ({on})")
    if sets[0] != sets[1]:
        raise UserError(f"{' and '.join(said)}: only cells on the same test images can be compared")


def _finished(reading: Reading, cell_id: str) -> dict[str, Any]:
    for result in reading.finished:
        if result["id"] == cell_id:
            return result
    folder = reading.store.folder(cell_id)
    damaged = next((line for line in reading.skipped if line.startswith((f"{folder / 'result.json'}: ", f"{folder}: "))), None)
    failed = next((f"cell {cell_id} {said_of(f)}" for f in reading.failures if f["id"] == cell_id), None)
    raise UserError(damaged or failed or f"cell {cell_id} is not finished: there is no result.json in {folder}")


def _correct(reading: Reading, result: dict[str, Any]) -> Any:
    dense = metric_of(result).key in DENSE
    packed = reading.counts(result) if dense else reading.correct(result)
    if packed is None:
        path = reading.store.folder(result["id"]) / ("per_image.npz" if dense else "correct.npy")
        raise UserError(f"{path}: missing, damaged or not this result's: without it nothing can be compared image by image")
    return packed


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Difference]:
    """Of the cells' identity, then of what they were measured on. A name alone, of a set or protocol of equal content, is no difference."""
    for pair in ((_named(ours), _named(theirs)), (ours["provenance"], theirs["provenance"])):
        first, second = ({name: _short(value) for name, value in leaves(found)} for found in pair)
        for name in dict.fromkeys([*first, *second]):
            if first.get(name) != second.get(name) and name not in OF_THE_PLACE:
                yield Difference(name.removeprefix("config."), first.get(name), second.get(name))


def _named(result: dict[str, Any]) -> dict[str, Any]:
    """The identity in the order in which people ask, with the teacher as tables call it and where the method's code came from."""
    cell, identity = result["cell"], result["cell"]["identity"]
    teacher = {"": cell["teacher"]["label"]} | dict(identity.get("teacher") or {"weights": cell["teacher"]["weights_sha256"]})
    first = {"method": cell["method"], "bits": cell["bits"], "seed": cell["seed"], "teacher": teacher}
    first |= {f"teacher {metric_of(result).name}": result["teacher"]["top1"]} if result["teacher"].get("top1") is not None else {}
    more = {"student steps": result["steps"], "code": cell.get("plugin", "")}
    return first | more | {key: value for key, value in identity.items() if key not in first}


def in_words(pair: Pair) -> Iterator[str]:
    """Lines for a terminal."""
    blind = without_data(pair.first["cell"])
    right, wrong, images = ("agrees", "differs", "synthetic images") if blind else ("right", "wrong", "test images")
    for name, result in (("first", pair.first), ("second", pair.second)):
        cell = result["cell"]
        called = f"{cell['label']} {cell['teacher']['label']} {cell['evaluation']['name']} {cell['bits']} seed {cell['seed']}"
        reached = f"KL {result['kl']:.3g}, agreement {result['agreement']:.2f} %" if blind else f"{result['top1']:.2f} %"
        dense = metric_of(result).key in DENSE
        beside = f"{metric_of(result).name}, {result['images']} images" if dense else f"{result['correct']} of {result['images']}"
        yield f"{name:<7} {result['id']}  {called}: {reached} ({beside})"
    d, test = pair.difference, pair.test
    yield ""
    points = "points of agreement with the teacher" if blind else "points"
    yield f"first - second: {d.value:+.2f} {points}, 95 % interval {d.low:+.2f} to {d.high:+.2f}, p = {d.p:.2g} (paired bootstrap over {images})"
    if test is not None:
        yield f"McNemar's exact test: p = {test.p:.2g}"
    both, them = ("both are", "them") if test is not None else ("this is", "it")
    yield f"{both} about the last epoch of these two runs on these images: what other seeds would give is not in {them}"
    if blind:
        yield "this is no accuracy: the cells have no evaluation set (`evaluate: none`), and how they do on real images is not known"
    yield ""
    if test is None:
        yield from _differences_in_words(pair.differences)
        return
    counts = [[str(n) for n in row] for row in ((pair.both, test.only_first), (test.only_second, pair.neither))]
    heads = f"second {right}", f"second {wrong}"
    wide = max(map(len, heads))
    yield f"{counted(pair.first['images'], 'image'):<14}" + "".join(f"  {head:>{wide}}" for head in heads)
    for name, row in zip((f"first {right}", f"first {wrong}"), counts, strict=True):
        yield f"{name:<14}" + "".join(f"  {n:>{wide}}" for n in row)
    yield ""
    yield from _differences_in_words(pair.differences)


def _differences_in_words(differences: list[Difference]) -> Iterator[str]:
    if not differences:
        yield "they differ in nothing that was recorded"
        return
    yield "they differ in"
    for d in differences:
        if d.first is not None and d.second is not None:
            yield f"  {d.what}: {d.first} | {d.second}"
    for name, mine, other in (("first", "first", "second"), ("second", "second", "first")):
        alone = [f"{d.what} {getattr(d, mine)}" for d in differences if getattr(d, other) is None]
        if alone:
            yield f"  only the {name} has: {', '.join(alone)}"


def _short(value: Any) -> str:
    """Hashes are cut: 12 digits tell them apart."""
    text = str(value)
    return text[:12] if len(text) >= 40 and all(letter in "0123456789abcdef+" for letter in text) else text

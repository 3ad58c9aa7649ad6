"""A store's cells as tables take them: what each says of itself and what was measured, in groups that can be compared. Nothing imports torch."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pandas as pd

from dfqbench.analysis.cost import processor_seconds
from dfqbench.analysis.ledger import METHODS_OWN
from dfqbench.metrics import DENSE, metric_of
from dfqbench.sweep.cell import fingerprint, without_data

Cell = dict[str, Any]  # a line of `load_frame` with what `comparable` adds
KEYS = ("evaluation", "digest", "teacher", "teacher_key", "protocol", "shared_rules", "precision", "yardstick")  # what a block's cells agree in


def load_frame(results: list[Any]) -> pd.DataFrame:
    """One row per cell: accuracies and drop, or agreement, in percent, seconds by the clock (of a GPU: by its events) and of processor time.

    status: done, or diverged or failed, without numbers (see `Reading.unfinished`).
    """
    frame = pd.DataFrame([_under_its_name(_record(result)) for result in results])
    return frame.astype({"steps": "Int64"}) if len(frame) else frame


def _under_its_name(cell: Cell) -> Cell:
    """Scores of dense tasks are called what they are: no column is top-1 accuracy here and mIoU there."""
    key = cell["metric"]
    return {name.replace("top1", key): value for name, value in cell.items()} if key in DENSE else cell


def asked_for(cell: dict[str, Any]) -> Cell:
    """What a cell's record says before anything is measured."""
    identity = cell["identity"]
    return (
        {"method": cell["label"], "plain_method": cell.get("method", cell["label"]), "fidelity": cell["fidelity"]}
        | {"teacher": cell["teacher"]["label"], "weights": cell["teacher"]["weights_sha256"]}
        | {"evaluation": cell["evaluation"]["name"], "digest": identity["evaluation"]}
        | {"protocol": cell["protocol"], "precision": cell["precision"], "bits": cell["bits"], "seed": cell["seed"]}
        | {"batch": int(identity["config"].get("batch_size") or 0), "yardstick": bool(identity["config"].get("yardstick"))}
    )


def _record(r: dict[str, Any]) -> Cell:
    made, seconds = r["provenance"], r["seconds"]
    return (
        {"id": r["id"], "status": r.get("status", "done"), **asked_for(r["cell"]), **_scores(r), "images": r["images"]}
        | {"finished": r.get("finished", 0.0), "evaluations": r["evaluations"]}
        | {"steps": r["steps"], "seconds": round(seconds["own"] + seconds["shared"], 3)}
        | {"cpu_seconds": processor_seconds(r), "device": made["device_name"], "device_kind": made.get("device", "cpu")}
        | {"host": made.get("host"), "threads": made.get("threads"), "commit": made.get("git")}
    )


def _scores(r: dict[str, Any]) -> Cell:
    """What has no accuracy has no column of that name: whatever takes it for one fails."""
    if not without_data(r["cell"]):
        top1, of_teacher = r["top1"], r["teacher"]["top1"]
        return {"metric": metric_of(r).key, "top1": top1, "best": r["best"]["top1"], "teacher_top1": of_teacher, "drop": round(of_teacher - top1, 10)}
    plain = r.get("plain_rounding") or {}
    return {"metric": "agreement", "agreement": r["agreement"], "kl": r["kl"]} | {f"plain_{k}": plain.get(k) for k in ("agreement", "kl")}


def comparable(results: list[Any]) -> dict[tuple[Any, ...], list[Cell]]:
    """Cells by KEYS, under the names that are newest, with what tells rows apart (`settings`) and marks them (`rules`)."""
    cells = [_record(result) | {"result": result} for result in results]
    for cell in cells:
        identity = cell["result"]["cell"]["identity"]
        cell["teacher_key"] = fingerprint([identity.get("teacher"), cell["weights"]])
        cell["rules"] = str(sorted(identity["protocol"].items()))
        cell["shared_rules"] = str(sorted((k, v) for k, v in identity["protocol"].items() if k not in METHODS_OWN))
        cell["plan"] = fingerprint([cell["method"], identity["config"]])
    steps = {cell["plan"]: cell["steps"] for cell in cells if cell["steps"] is not None}  # a failure need not know how many it was to have
    # a set is what its content says, a teacher its weights and task, a protocol its rules: names are only what somebody called them last
    by_age = sorted(cells, key=lambda cell: cell["finished"])
    sets, teachers = ({cell[key]: cell[name] for cell in by_age} for key, name in (("digest", "evaluation"), ("teacher_key", "teacher")))
    for cell in cells:
        cell |= {"evaluation": sets[cell["digest"]], "teacher": teachers[cell["teacher_key"]]}
        cell["steps"] = steps.get(cell["plan"]) if cell["steps"] is None else cell["steps"]
        # what makes two cells the same row is everything in their identity but bits and seed, and what one preset has for each width
        same = {k: v for k, v in cell["result"]["cell"]["identity"].items() if k not in ("bits", "seed")}
        same["config"] = {k: v for k, v in same["config"].items() if k not in cell["result"]["cell"].get("by_width", ())}
        cell["settings"] = fingerprint([cell["method"], same, cell["steps"]])
        cell["block"] = tuple(cell[key] for key in KEYS)
    return {key: list(its) for key, its in groupby(sorted(cells, key=lambda cell: cell["block"]), key=lambda cell: cell["block"])}


def told_apart(key: tuple[Any, ...]) -> str:
    """Behind a title that two tables have."""
    _, digest, _, teacher, _, rules, _, _ = key
    return f" [teacher {teacher[:8]}, images {digest.split()[-1][:8]}, rules {fingerprint(rules)[:8]}]"

"""Weights & Biases: cells as W&B runs, replayed from the store's files, live or later. No torch here (but see students.py).

The store is the truth, W&B a copy of it: a run's id is the cell's id behind the project's name, so that a cell stays one run however often it is
requeued or pushed. While cells run, a process of its own does the talking: it is told of every epoch through a pipe that is never waited for, reads
history.csv, and may hang, fail or die without a cell noticing. Whatever it could not do, `dfqbench wandb sync` does later.

Offline, a cell's folder is written when the cell ends, whole, and replaces an earlier one of the same cell: several offline folders of one id would
not merge when they are uploaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqbench.analysis.records import problem_of
from dfqbench.analysis.warning_signs import read_rows
from dfqbench.files import read_json, write_json
from dfqbench.metrics import metric_of
from dfqbench.store import Store
from dfqbench.sweep.cell import without_data
from dfqbench.sweep.schema import Tracking
from dfqbench.tracking.students import Students, sha256_of, upload

INIT_TIMEOUT_S = 60.0
MARK = "wandb.json"  # in a cell's folder: what was pushed where


@dataclass
class Session:
    """One cell's open W&B run. `logged`: epochs up to and including this one are in it."""

    run: Any
    folder: Path
    logged: int

    def replay(self, finished: bool) -> None:
        """Logs the epochs that are new in history.csv, each at its own step. The newest waits until the cell is finished: it may still get its
        accuracy."""
        rows = read_rows(self.folder / "history.csv")
        for row in rows if finished else rows[:-1]:
            epoch = int(row["epoch"])
            if epoch > self.logged:
                self.run.log(row, step=epoch)
                self.logged = epoch


def open_session(store: Store, cell: dict[str, Any], group: str, tracking: Tracking) -> Session:
    """Starts or resumes the run of one cell (its record, as in cell.json). Raises what wandb raises."""
    import wandb

    folder = store.folder(cell["id"])
    store.root.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        id=tracking.run_id(cell["id"]),
        name=f"{cell['label']} {cell['teacher']['label']} {cell['bits']} seed {cell['seed']}",
        group=group,
        job_type=cell["method"],
        tags=[tag[:64] for tag in (cell["bits"], cell["teacher"]["label"], cell["evaluation"]["name"], cell["protocol"], cell["precision"]) if tag],
        config={"cell": cell["id"], **cell["identity"], "label": cell["label"], "teacher_label": cell["teacher"]["label"]},
        dir=str(store.root),
        mode=tracking.wandb,
        resume="allow",
        reinit="create_new",  # cells in lockstep are runs of their own
        settings=wandb.Settings(
            console="off", silent=True, init_timeout=INIT_TIMEOUT_S, disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True
        ),
    )
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")
    # steps are epochs, from 1 on: a run that W&B already knows begins behind its last one
    return Session(run, folder, max(int(run.starting_step) - 1, 0))


def push(store: Store, result: dict[str, Any], group: str, tracking: Tracking, session: Session | None = None, student: Path | None = None) -> None:
    """Replays a finished cell to its end and closes it: epochs, summary, sample images, a student's file if one is given.

    Leaves a mark, so that each is pushed once.
    """
    import wandb

    earlier = _offline_folders(store, tracking, result["id"]) if session is None and tracking.wandb == "offline" else []
    session = session or open_session(store, result["cell"], group, tracking)
    session.replay(finished=True)
    samples = session.folder / "samples.png"
    if samples.is_file() and session.logged <= result["last_epoch"]:
        session.run.log({"samples": wandb.Image(str(samples)), "epoch": result["last_epoch"]}, step=result["last_epoch"])
    session.run.summary.update(summary_of(result))
    if student is not None:
        upload(session.run, student, result, tracking.wandb == "online")
    address = session.run.url if tracking.wandb == "online" else None
    directory = Path(session.run.dir).parent.name
    session.run.finish()
    for folder in earlier:
        if folder.name != directory:
            shutil.rmtree(folder, ignore_errors=True)
    mark = {**_mark(result, tracking), "url": address, "folder": directory if tracking.wandb == "offline" else None}
    if student is not None or (tracking.wandb == "online" and has_student(store, result, tracking)):
        mark["student"] = sha256_of(result)
    others = [m for m in _marks(session.folder) if (m.get("run"), m.get("entity"), m.get("mode")) != (mark["run"], mark["entity"], mark["mode"])]
    write_json(session.folder / MARK, {"pushed": [*others, mark]})


def summary_of(result: dict[str, Any]) -> dict[str, Any]:
    """The run's last word; a cell without data has agreement and KL divergence there, and no accuracy."""
    if without_data(result["cell"]):
        plain = result.get("plain_rounding") or {}
        scores = {"agreement": result["agreement"], "kl": result["kl"]} | {f"plain_{name}": value for name, value in plain.items()}
    else:
        metric = metric_of(result)
        key, teacher = metric.key, result["teacher"][metric.key]
        scores = {key: result[key], **{name: result.get(name) for name in metric.beside}, f"teacher_{key}": teacher, "drop": teacher - result[key]}
        scores |= {"best_on_test": result["best"][key], "best_epoch": result["best"]["epoch"]}
    return {
        **scores,
        "steps": result["steps"],
        "seconds": result["seconds"]["own"] + result["seconds"]["shared"],
        "cpu_seconds": sum(result["cpu_seconds"].values()) if "cpu_seconds" in result else None,
        "device": result["provenance"]["device_name"],
        "commit": result["provenance"].get("git"),
        "warnings": ", ".join(sign["kind"] for sign in result["warnings"]) if "warnings" in result else None,
    }


def is_pushed(store: Store, result: dict[str, Any], tracking: Tracking) -> bool:
    """Whether exactly this result was pushed to this project before."""
    return bool(_marks_of(store, result, tracking))


def has_student(store: Store, result: dict[str, Any], tracking: Tracking) -> bool:
    """Whether its student was, too."""
    return any(mark.get("student") and mark["student"] == sha256_of(result) for mark in _marks_of(store, result, tracking))


def _marks_of(store: Store, result: dict[str, Any], tracking: Tracking) -> list[dict[str, Any]]:
    """Of this result in this project; offline, as long as its folder is there."""
    wanted = _mark(result, tracking)
    same = [mark for mark in _marks(store.folder(result["id"])) if {k: mark.get(k) for k in wanted} == wanted]
    return [mark for mark in same if not mark.get("folder") or (store.root / "wandb" / mark["folder"]).is_dir()]


def _marks(folder: Path) -> list[dict[str, Any]]:
    """What was pushed where; a damaged file counts as nothing, and is replaced."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found = (read_json(folder / MARK) or {}).get("pushed", [])
        return [mark for mark in found if isinstance(mark, dict)]
    return []


def _mark(result: dict[str, Any], tracking: Tracking) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]
    return {"run": tracking.run_id(result["id"]), "project": tracking.project, "entity": tracking.entity, "mode": tracking.wandb, "result": digest}


def _offline_folders(store: Store, tracking: Tracking, cell_id: str) -> list[Path]:
    """Not those of a project whose name ends like this one's; W&B numbers the folders of one second."""
    its = re.compile(rf"offline-run-\d+_\d+-{re.escape(tracking.run_id(cell_id))}(-\d+)?")
    return sorted(path for path in (store.root / "wandb").glob("offline-run-*") if its.fullmatch(path.name))


def groups(store: Store) -> dict[str, str]:
    """The sweep of every cell, as the last runs noted it."""
    found: dict[str, str] = {}
    for path in sorted((store.root / "sweeps").glob("*.json")):
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            for cell_id in read_json(path)["cells"]:
                found.setdefault(cell_id, path.stem)
    return found


def sync(
    store: Store,
    results: list[dict[str, Any]],
    tracking: Tracking,
    again: bool,
    say: Callable[[str], None],
    students: Students | None = None,
) -> tuple[int, int]:
    """Pushes finished cells, with their students if what becomes of those is to be counted; (pushed, already there). Raises what wandb raises."""
    import wandb

    of_sweep, pushed = groups(store), 0
    try:
        for result in results:
            there, has = is_pushed(store, result, tracking), has_student(store, result, tracking)
            # offline, the new folder replaces the one that has the student
            wanted = students or (Students() if again and has and tracking.wandb == "offline" else None)
            student = wanted.file_of(store, result, has and not again) if wanted else None
            if there and not again and student is None:
                continue
            push(store, result, of_sweep.get(result["id"], "dfqbench"), tracking, student=student)
            pushed += again or not there
            if students and student:
                students.counts["pushed"] += 1
            what = f"{result['cell']['label']} {result['cell']['bits']} seed {result['cell']['seed']}"
            say(f"{result['id']}  {what}" + ", with its student" * (student is not None))
    finally:
        wandb.teardown()  # its helper may still be writing
    return pushed, len(results) - pushed


def checked_result(store: Store, cell_id: str) -> dict[str, Any] | None:
    """A finished cell's result, None where there is none that can be used."""
    result = store.result(cell_id)
    return None if result is None or problem_of(result, cell_id) else result

"""The quantized networks of cells as W&B artifacts. No torch here, until a student's file is checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfqbench.errors import UserError
from dfqbench.export.find import NAME
from dfqbench.store import Store

UPLOAD_TIMEOUT_S = 600  # for one student


@dataclass
class Students:
    """What became of the students of a sync: `pushed`, `already there` or `not kept`; skipped: a line for every other one."""

    counts: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        known = [f"{self.counts[what]} {what}" for what in ("pushed", "already there", "not kept") if self.counts[what] or what == "pushed"]
        return "students: " + ", ".join(known + [f"{len(self.skipped)} skipped"] * bool(self.skipped))

    def file_of(self, store: Store, result: dict[str, Any], there: bool) -> Path | None:
        """The student's file, checked, if it is to be uploaded. there: it was."""
        if (sha256 := sha256_of(result)) is None:
            self.counts["not kept"] += 1
        elif there:
            self.counts["already there"] += 1
        else:
            try:
                return _checked(store.folder(result["id"]) / NAME, sha256)
            except UserError as error:
                self.skipped.append(str(error))
        return None


def sha256_of(result: dict[str, Any]) -> str | None:
    """Of the student's content. None for a cell that kept none: its config said so, it has no form in a file, or an earlier version ran it."""
    student = result.get("student")
    sha256 = student.get("sha256") if isinstance(student, dict) else None
    return sha256 if isinstance(sha256, str) else None


def _checked(path: Path, sha256: str) -> Path:
    from dfqbench.export.student_file import load_student_file

    try:
        found = load_student_file(path).about["sha256"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if found != sha256:
        raise UserError(f"{path} is not the student of this cell's result.json: its content has sha256 {found[:8]}, not {sha256[:8]}")
    return path


def upload(run: Any, path: Path, result: dict[str, Any], online: bool) -> None:
    """Hands the file to an open W&B run, which reads it where it is; online until it is there. Raises what wandb raises."""
    import wandb

    cell = result["cell"]
    about = {"cell": result["id"], "method": cell["label"], "bits": cell["bits"], "protocol": cell["protocol"], "teacher": cell["teacher"]["label"]}
    about |= {"bytes": path.stat().st_size, "sha256": sha256_of(result)}
    artifact = wandb.Artifact(f"student-{result['id']}", type="model", metadata=about)
    artifact.add_file(str(path.resolve()), name=NAME, policy="immutable", skip_cache=True)  # no copy of it is made
    run.log_artifact(artifact)
    if online:
        try:
            artifact.wait(UPLOAD_TIMEOUT_S)
        except ValueError as error:  # the server's refusal
            raise wandb.Error(f"student of {result['id']}: {error}") from error

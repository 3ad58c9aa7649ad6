"""Profiles: small YAML files that say how a cluster wants its jobs. No torch here."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dfqbench.errors import UserError, UserErrors, nearest
from dfqbench.yaml_file import read_yaml

SHIPPED = Path(__file__).parent / "profiles"
# what dfqbench sets itself; a profile that sets it too would break the bookkeeping
OURS = ("array", "output", "error", "signal", "job-name", "open-mode", "requeue", "time", "wrap", "parsable", "test-only", "wait", "dependency")


class Profile(BaseModel):
    """How to run jobs, as opposed to what: nothing here is part of a cell's identity. The defaults suit a cluster of GPU nodes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: int = Field(1, ge=0, description="per job; each runs cells of its own")
    gpu_type: str | None = Field(None, description="as the cluster calls it: a100")
    cpus: int = Field(4, ge=1, description="per job")
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description="per job, like 32G; null: the cluster's default")
    time: int = Field(240, ge=1, description="of one job, in minutes, or like 4h, 90min, 1-12:00:00; longer cells go on in the next job")
    parallel: int = Field(64, ge=1, description="jobs of one sweep that run at once")
    side_by_side: int = Field(1, ge=1, description="cells (or bundles) that share a GPU, or a job without GPUs, in processes of their own")
    chain: int | None = Field(None, ge=1, description="bundles one after the other in one process; null: as many as chain_minutes holds")
    chain_minutes: int = Field(60, ge=1, description="how long a chain of short bundles may take by what was measured before")
    save_seconds: int = Field(120, ge=5, description="how long before its end a job is told to save its state")
    checkpoint_every: float = Field(300.0, ge=0, description="seconds between checkpoints")
    device: str | None = Field(None, description="auto, cpu or cuda; null: cuda where the job has GPUs")
    graphs: bool | None = Field(
        None,
        description="replay steps as CUDA graphs where a method allows it, or run them as they are; null: replay if a short check passes",
    )
    streams: bool = Field(False, description="replay the students of a bundle at the same time; takes more of a GPU's memory")
    requeue: bool = Field(True, description="whether a job at its time limit is put back into the queue; else the next submit goes on")
    array_size: int | None = Field(None, ge=1, description="tasks per job array; null: as the cluster says")
    max_queued: int | None = Field(None, ge=1, description="jobs of yours that may be in the queue at once; the next submit adds more")
    setup: list[str] = Field([], description="shell lines before the job: module load ..., source .../activate")
    sbatch: dict[str, str | int | float | bool] = Field({}, description="any other parameter of sbatch: {reservation: night}")

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, given: Any) -> Any:
        return minutes(given) if isinstance(given, str) else given

    @field_validator("memory", mode="before")
    @classmethod
    def _memory(cls, given: Any) -> Any:
        return re.sub(r"(?<=[KMGT])i?B$", "", str(given).replace(" ", "")) if given is not None else None

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, given: dict[str, Any]) -> dict[str, Any]:
        named = {key.lstrip("-").replace("_", "-"): value for key, value in given.items()}
        taken = [key for key in named if key in OURS]
        if taken:
            raise ValueError(f"{', '.join(taken)} is set by dfqbench itself")
        elsewhere = [key for key in named if key in ("M", "clusters", "cluster-constraint")]
        if elsewhere:  # squeue would not find the jobs again
            raise ValueError(f"{elsewhere[0]}: set the environment variable SLURM_CLUSTERS instead, which status and cancel read too")
        return named

    @property
    def runs_on(self) -> str:
        """The device that workers are told to take."""
        return self.device or ("cuda" if self.gpus else "cpu")

    @property
    def lanes(self) -> int:
        """Worker processes of one job."""
        return max(self.gpus, 1) * self.side_by_side

    @property
    def threads(self) -> int:
        """CPU threads of one worker."""
        return max(self.cpus // self.lanes, 1)


def minutes(text: str) -> int:
    """Minutes, rounded up, of `90`, `4h`, `90min`, `2d`, `30s` or Slurm's own `HH:MM:SS`, `D-HH`, `D-HH:MM:SS`. Raises ValueError."""
    text = text.strip()
    if unit := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|)", text):
        return max(math.ceil(float(unit[1]) * {"s": 1 / 60, "": 1, "m": 1, "min": 1, "h": 60, "d": 1440}[unit[2]]), 1)
    if clock := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text):
        days, *parts = clock.groups()
        numbers = [int(part) for part in parts if part is not None]
        # as Slurm reads them: with days, hours come first; without, two numbers are minutes and seconds
        scales = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
        seconds = int(days or 0) * 86400 + sum(n * scale for n, scale in zip(numbers, scales, strict=False))
        return max(math.ceil(seconds / 60), 1)
    raise ValueError("a time like 240 (minutes), 4h, 90min or 1-12:00:00 is expected")


def shipped() -> dict[str, Path]:
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def find_profile(given: str) -> tuple[str, Profile]:
    """A file by its path, or a shipped profile by its name. Raises UserErrors with all that is wrong with it."""
    path = Path(given)
    if not path.is_file():
        known = shipped()
        if given not in known:
            raise UserError(f"no profile {given!r}: no such file, and {nearest(given, known)}")
        path = known[given]
    content = read_yaml(path, "profile", as_written="sbatch")
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"profile {path}: a mapping with keys like {', '.join(list(Profile.model_fields)[:6])} is expected")
    wrong = [f"{path}: {key}: unknown key: {nearest(key, Profile.model_fields)}" for key in content if key not in Profile.model_fields]
    try:
        profile = Profile(**{key: value for key, value in content.items() if key in Profile.model_fields})
    except ValidationError as error:
        for finding in error.errors():
            key = ".".join(map(str, finding["loc"][:2]))
            message = finding["msg"].removeprefix("Value error, ")
            wrong.append(f"{path}: {key}: {finding['input']!r}: {message[0].lower()}{message[1:]}")
    if wrong:
        raise UserErrors(dict.fromkeys(wrong))
    return path.stem, profile

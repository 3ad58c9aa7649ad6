"""What users have set for other tools does not reach our own processes; what a tool needs to be found does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dfqbench.store import provenance
from dfqbench.store.environment import PYTHON, SLURM, WANDB, environment_without, forget

KEPT = {
    "SLURM_CONF": "/etc/slurm.conf",
    "SLURM_CLUSTERS": "big",
    "WANDB_API_KEY": "k",
    "WANDB_BASE_URL": "https://wandb.example.org",
    "WANDB_HTTPS_PROXY": "http://proxy",
    "WANDB_CACHE_DIR": "/scratch",
    "PYTHONPATH": "/here",
    "HTTPS_PROXY": "http://proxy",
    "RANKING": "mine",
}
DROPPED = ("SLURM_JOB_ID", "SQUEUE_FORMAT2", "SBATCH_NEW_IN_30", "SACCT_FEDERATION", "SRUN_DEBUG", "RANK", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR")
DROPPED += ("WANDB_X_PRIMARY", "WANDB_NEW_SETTING", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONINSPECT")


def test_families_are_dropped_and_what_leads_to_their_tools_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (KEPT | dict.fromkeys(DROPPED, "x")).items():
        monkeypatch.setenv(name, value)
    left = environment_without(SLURM, WANDB, PYTHON)
    assert {name: left.get(name) for name in KEPT} == KEPT
    assert not set(left) & set(DROPPED)
    forget(WANDB)
    assert not {name for name in os.environ if name.startswith("WANDB_")} & set(DROPPED)
    assert os.environ["WANDB_API_KEY"] == "k"
    assert os.environ["SLURM_JOB_ID"] == "x", "only what is asked for"


def test_a_commit_is_that_of_the_code_whatever_git_hook_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    provenance.git_revision.cache_clear()
    expected = provenance.git_revision()
    provenance.git_revision.cache_clear()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert provenance.git_revision() == expected
    provenance.git_revision.cache_clear()

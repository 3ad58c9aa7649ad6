"""The environment in which our own processes and questions start: without what users have set for other tools.

Whole families of variables are dropped, since a tool knows more of them than any list of names. What a family's tool needs to be found and to
know its user stays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Family:
    """Patterns of names, with spaces between: those that are dropped, and those of them that are kept."""

    dropped: str
    kept: str = ""

    def has(self, name: str) -> bool:
        dropped, kept = (any(fnmatchcase(name, pattern) for pattern in patterns.split()) for patterns in (self.dropped, self.kept))
        return dropped and not kept


# defaults of Slurm's commands, an outer job's own settings, what launchers tell their processes; kept: which cluster is meant, and tokens for it
SLURM = Family(
    "SLURM* SBATCH_* SALLOC_* SRUN_* SQUEUE_* SACCT* SCANCEL_* SCONTROL_* SINFO_* SUBMITIT_* PMI_* PMIX_* OMPI_* "
    "MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE",
    "SLURM_CONF* SLURM_CLUSTERS SLURM_JWT SLURM_SACK*",
)
# how somebody wants Python to behave; kept: where its packages are
PYTHON = Family("PYTHON*", "PYTHONPATH PYTHONHOME PYTHONUSERBASE PYTHONNOUSERSITE PYTHONPYCACHEPREFIX PYTHONDONTWRITEBYTECODE PYTHONUTF8")
# runs of another training script; kept: who the user is, where the server is, and how it is reached
WANDB = Family(
    "WANDB_*",
    "WANDB_API_KEY WANDB_IDENTITY_TOKEN_FILE WANDB_CREDENTIALS_FILE WANDB_BASE_URL WANDB_APP_URL WANDB_INSECURE_DISABLE_SSL WANDB_HTTP* "
    "WANDB_*PROXIES WANDB_*EXTRA_HTTP_HEADERS WANDB_CONFIG_DIR WANDB_CACHE_DIR WANDB_DATA_DIR WANDB_SILENT WANDB_ERROR_REPORTING",
)
GIT = Family("GIT_*")


def environment_without(*families: Family) -> dict[str, str]:
    """This process's variables but for those of the families."""
    return {name: value for name, value in os.environ.items() if not any(family.has(name) for family in families)}


def forget(*families: Family) -> None:
    """Drops the variables of the families from this process itself."""
    for name in [name for name in os.environ if any(family.has(name) for family in families)]:
        del os.environ[name]

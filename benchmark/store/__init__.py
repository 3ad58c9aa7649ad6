"""Results as files: cells' folders, the leases that keep two processes off one cell, on what a number was measured (provenance.py),
remembered answers (cache.py)."""

from dfqbench.store.lease import LEASE_EXPIRES_S, Lease, kept_alive, slurm_job
from dfqbench.store.store import Store

__all__ = ["LEASE_EXPIRES_S", "Lease", "Store", "kept_alive", "slurm_job"]

"""Submitting sweeps to Slurm clusters."""

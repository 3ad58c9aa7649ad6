"""Weights & Biases: cells as runs (runs.py), live in a process of its own (process.py)."""

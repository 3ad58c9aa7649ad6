"""Plots: kinds.py lists them, figures.py writes them to files."""

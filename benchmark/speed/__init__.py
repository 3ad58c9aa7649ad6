"""Steps per second (steps.py) beside the device's floor (floor.py), what a run costs besides (overheads.py), expected hours (estimate.py)."""

"""Steps per second next to textbook loops and the device's floor (steps.py), what a run costs beside them (overheads.py), expected hours (estimate.py)."""

"""One bundle in lockstep: its steps, state, checkpoints and evaluation. lockstep.py is the loop."""

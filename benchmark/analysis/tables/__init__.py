"""Tables: what is averaged and compared (blocks, wide), what is printed of it (printed) and how (formats, terminal). Nothing imports torch.

A package without names of its own: pandas takes its time, so that commands import what they need.
"""

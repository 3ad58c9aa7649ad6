"""Allocators: a bit width for each tensor within a budget, one file each. `dfqbench allocators` lists them."""

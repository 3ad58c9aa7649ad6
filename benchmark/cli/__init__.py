"""The command line: a file for each group of commands. Heavy imports happen inside the commands that need them."""

from dfqbench.cli.app import main

__all__ = ["main"]

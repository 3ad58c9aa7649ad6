"""The contract of a method (contract.py), its settings, the registry that finds it, plug-ins, and the scaffold of new ones."""

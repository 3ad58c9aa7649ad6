"""A network as a graph that can be run and observed: traced (network.py), its activation functions, its frozen batch norms."""

from dfqbench.network.network import Network, Observation, Teacher

__all__ = ["Network", "Observation", "Teacher"]

"""Quantization: the protocol and its rules in words (no torch), grids, ranges, where quantizers are inserted, and the student (student.py)."""

from dfqbench.quantization.protocol import PROTOCOLS, Bits, Protocol, find_protocol

__all__ = ["PROTOCOLS", "Bits", "Protocol", "find_protocol"]

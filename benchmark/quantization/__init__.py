"""Fake quantization of any network that torch.fx can trace: grids, ranges, and where they go."""

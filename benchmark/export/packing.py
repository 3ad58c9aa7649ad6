"""Whole numbers of 1 to 8 bits, packed without gaps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pack(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Numbers below 2^bits, of any shape, as a row of bytes: number after number, each with its highest bit first; zeros fill the last byte."""
    planes = np.unpackbits(values.reshape(-1, 1), axis=1)[:, 8 - bits :]
    return np.packbits(planes)


def unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` numbers of `pack`. Raises ValueError where there are not as many bytes as they take."""
    if packed.size != -(-count * bits // 8):
        raise ValueError(f"{count} numbers of {bits} bits take {-(-count * bits // 8)} bytes, not {packed.size}")
    planes = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    return np.packbits(np.pad(planes, ((0, 0), (8 - bits, 0))), axis=1)[:, 0]

"""JPEG files with the bytes that IJG's libjpeg 7 to 9 writes, whichever libjpeg is here: baseline, 4:2:0, the standard Huffman tables.

Since version 7 that library halves chroma inside the transform: it keeps the 8 x 8 lowest frequencies of 16 x 16 pixels. libjpeg-turbo, which is in
today's wheels of Pillow (libjpeg 9 in those of 8.4), averages four pixels, and most small photographs become other files. Luma is the same in both.
What `encode` writes was compared with 761 CIFAR-10 test images, lossless and as the files of results/reference/cifar10-jpeg-study, and its transforms
with those of libjpeg 9d on 28,000 blocks: all is equal.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Ints = npt.NDArray[np.int64]
CONSTANT, EXTRA = 13, 2  # bits behind the binary point of the transforms' constants, and of what is between their two passes
ZIGZAG = np.array(sorted(range(64), key=lambda i: (sum(divmod(i, 8)), i // 8 if sum(divmod(i, 8)) % 2 else i % 8)))
LUMA_PER_MCU = 4  # blocks; then one of Cb and one of Cr
PLACES = 128  # in the order of what is written, for each block: two for each coefficient
# The library's constants are sums of rounded ones, which are here and there one unit off the rounded sum: by row, (column, units).
OFF: dict[int, dict[int, tuple[tuple[int, int], ...]]] = {
    8: {1: ((2, 1),), 3: ((1, 1), (2, 1)), 5: ((0, 1), (1, 1), (2, 1)), 6: ((1, -1), (2, 1))},
    16: {1: ((7, -1),), 5: ((2, 1),), 6: ((3, -1), (4, 1)), 7: ((3, 1), (4, 1))},
}


@dataclass(frozen=True)
class Tables:
    """What stands in a file's header. By component (0: luma, 1: chroma) the quantization table, 64 in zigzag order, and by 0 for DC and 1 for AC
    the Huffman codes and their lengths, 256 each (length 0: no code)."""

    header: bytes
    quantization: dict[int, Ints]
    codes: dict[tuple[int, int], tuple[Ints, Ints]]


def encode(images: npt.NDArray[np.uint8], quality: int = 75) -> list[bytes]:
    """N x H x W x 3 uint8, with H and W multiples of 16, as N JPEG files."""
    count, height, width, _ = images.shape
    if height % 16 or width % 16:
        raise ValueError(f"{height} x {width} pixels: multiples of 16 are needed")
    tables = _tables(height, width, quality)
    luma, *chroma = _planes(images)
    mcus = (count, height // 16, width // 16)
    blocks = luma.reshape(count, mcus[1], 2, 8, mcus[2], 2, 8).transpose(0, 1, 4, 2, 5, 3, 6).reshape(count, -1, LUMA_PER_MCU, 8, 8)
    coded = [_quantized(_transformed(blocks), tables.quantization[0])]
    for plane in chroma:
        blocks = plane.reshape(count, mcus[1], 16, mcus[2], 16).transpose(0, 1, 3, 2, 4).reshape(count, -1, 1, 16, 16)
        coded.append(_quantized(_transformed(blocks), tables.quantization[1]))
    return [tables.header + scan + b"\xff\xd9" for scan in _scans(np.concatenate(coded, axis=2), tables)]


def _tables(height: int, width: int, quality: int) -> Tables:
    """From the header that Pillow writes: its tables are those of the standard (ITU-T T.81, annex K), scaled by IJG's rule for `quality`."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    content, start = file.getvalue(), 2
    quantization: dict[int, Ints] = {}
    codes: dict[tuple[int, int], tuple[Ints, Ints]] = {}
    marker = 0
    while marker != 0xDA:  # up to and with the start of the scan
        marker, length = content[start + 1], int.from_bytes(content[start + 2 : start + 4], "big")
        segment = content[start + 4 : start + 2 + length]
        start += 2 + length
        if marker == 0xDB:
            for at in range(0, len(segment), 65):
                quantization[segment[at]] = np.frombuffer(segment[at + 1 : at + 65], np.uint8).astype(np.int64)
        while marker == 0xC4 and segment:
            counts, kind = list(segment[1:17]), divmod(segment[0], 16)
            symbols, segment = segment[17 : 17 + sum(counts)], segment[17 + sum(counts) :]
            codes[kind[1], kind[0]] = _huffman(counts, symbols)
    return Tables(content[:start], quantization, codes)


def _huffman(counts: list[int], symbols: bytes) -> tuple[Ints, Ints]:
    """Codes and lengths by symbol, from how many codes there are of 1 to 16 bits: counted up, and shifted where codes become longer."""
    codes, lengths = np.zeros(256, np.int64), np.zeros(256, np.int64)
    code, left = 0, iter(symbols)
    for length, number in enumerate(counts, 1):
        code <<= 1
        for _ in range(number):
            symbol = next(left)
            codes[symbol], lengths[symbol], code = code, length, code + 1
    return codes, lengths


def _planes(images: npt.NDArray[np.uint8]) -> Iterator[Ints]:
    """Y, Cb and Cr of JFIF in fixed point with 16 bits, N x H x W each; an exact half of Cb and Cr is rounded down."""
    red, green, blue = np.moveaxis(images.astype(np.int64), -1, 0)
    for weights, offset in (
        ((0.299, 0.587, 0.114), 0x8000),
        ((-0.168735892, -0.331264108, 0.5), 0x807FFF),
        ((0.5, -0.418687589, -0.081312411), 0x807FFF),
    ):
        r, g, b = (round(weight * 65536) for weight in weights)
        yield (r * red + g * green + b * blue + offset) >> 16


def _matrix(points: int) -> npt.NDArray[np.float64]:
    """The 8 lowest frequencies of a cosine transform of 8 or 16 points, times sqrt(8) or 4, as whole numbers: 8 x points."""
    row, column = np.ogrid[:8, :points]
    matrix = np.rint(2**CONSTANT * np.where(row, np.sqrt(2), 1) * np.cos((2 * column + 1) * row * np.pi / (2 * points)))
    for k, entries in OFF[points].items():
        for n, units in entries:
            matrix[k, n] += units
            matrix[k, points - 1 - n] += -units if k % 2 else units
    return np.asarray(matrix, np.float64)


def _transformed(blocks: Ints) -> Ints:
    """... x P x P pixels to ... x 8 x 8 coefficients times 8, with P = 8 or 16; rounded after each of the passes, first along rows."""
    matrix = _matrix(blocks.shape[-1])
    rows = _rounded((blocks - 128.0) @ matrix.T, CONSTANT - EXTRA)
    return _rounded(matrix @ rows, CONSTANT + EXTRA + (2 if blocks.shape[-1] == 16 else 0))


def _rounded(values: npt.NDArray[np.float64], bits: int) -> Ints:
    """Whole numbers below 2^53, so exact, divided by 2^bits; halves go up."""
    return (values.astype(np.int64) + (1 << (bits - 1))) >> bits


def _quantized(coefficients: Ints, table: Ints) -> Ints:
    """... x 8 x 8 to ... x 64 in zigzag order; halves go away from zero."""
    values, steps = coefficients.reshape(*coefficients.shape[:-2], 64)[..., ZIGZAG], 8 * table
    return np.asarray(np.sign(values) * ((np.abs(values) + steps // 2) // steps), np.int64)


def _scans(coded: Ints, tables: Tables) -> list[bytes]:
    """N x MCUs x 6 x 64 (four blocks of luma, Cb, Cr) as N entropy-coded scans."""
    count, mcus, per_mcu, _ = coded.shape
    values = coded.copy()
    for component in (np.s_[:LUMA_PER_MCU], np.s_[LUMA_PER_MCU : LUMA_PER_MCU + 1], np.s_[LUMA_PER_MCU + 1 :]):
        values[:, :, component, 0] = _differences(coded[:, :, component, 0])
    chroma = np.tile(np.arange(per_mcu) >= LUMA_PER_MCU, count * mcus)
    bits, lengths, places = (np.concatenate(parts) for parts in zip(*_symbols(values.reshape(-1, 64), chroma, tables), strict=True))
    order = np.argsort(places, kind="stable")
    return _packed(bits[order], lengths[order], places[order] // (PLACES * mcus * per_mcu), count)


def _packed(bits: Ints, lengths: Ints, image: Ints, count: int) -> list[bytes]:
    """The bits of each image as bytes: the last one filled up with ones, a zero byte after each 255."""
    missing = -np.bincount(image, lengths, count).astype(np.int64) % 8
    ends = np.searchsorted(image, np.arange(count), "right")
    bits, lengths, image = np.insert(bits, ends, (1 << missing) - 1), np.insert(lengths, ends, missing), np.insert(image, ends, np.arange(count))
    which = np.repeat(np.arange(len(bits)), lengths)
    place = np.arange(len(which)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    packed = np.packbits((bits[which] >> (lengths[which] - 1 - place) & 1).astype(np.uint8)).tobytes()
    stops = np.cumsum(np.bincount(image, lengths, count).astype(np.int64) // 8)
    return [packed[start:stop].replace(b"\xff", b"\xff\x00") for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _differences(dc: Ints) -> Ints:
    """Of each block to the one before it in its image; N x ... in the order of the scan."""
    flat = dc.reshape(len(dc), -1)
    return np.diff(flat, axis=1, prepend=0).reshape(dc.shape)


def _symbols(blocks: Ints, chroma: npt.NDArray[np.bool_], tables: Tables) -> Iterator[tuple[Ints, Ints, Ints]]:
    """(bits, how many, where in the order of all) of what is written for B x 64 values, where `chroma` (B) says by which tables."""
    sizes = np.frexp(np.abs(blocks).astype(np.float64))[1].astype(np.int64)  # bits of each value
    extra = np.where(blocks < 0, blocks + (1 << sizes) - 1, blocks)
    for kind in (0, 1):
        mine = np.flatnonzero(chroma == bool(kind))
        (dc, dc_length), (ac, ac_length) = tables.codes[kind, 0], tables.codes[kind, 1]
        size = sizes[mine, 0]
        yield dc[size] << size | extra[mine, 0], dc_length[size] + size, mine * PLACES
        at, position = np.nonzero(blocks[mine, 1:])
        block, position = mine[at], position + 1
        before = np.where(np.diff(at, prepend=-1) == 0, np.roll(position, 1), 0)
        run, size = position - before - 1, sizes[block, position]
        symbol, place = run % 16 << 4 | size, block * PLACES + 2 * position
        yield ac[symbol] << size | extra[block, position], ac_length[symbol] + size, place
        yield _alike(np.repeat(place - 1, run // 16), 0xF0, ac, ac_length)  # sixteen zeros
        yield _alike(mine[blocks[mine, 63] == 0] * PLACES + PLACES - 2, 0x00, ac, ac_length)  # zeros to the end


def _alike(places: Ints, symbol: int, codes: Ints, lengths: Ints) -> tuple[Any, Any, Ints]:
    return np.full(len(places), codes[symbol]), np.full(len(places), lengths[symbol]), places

"""Exact and near copies of images.

An exact copy has the same prepared pixels. A near copy (resized, compressed again, a little brighter) is looked for
by a perceptual hash: the signs of the 63 lowest frequencies of the luma's cosine transform about their median
(Zauner 2010, Implementation and benchmarking of perceptual image hash functions). Hashes that differ in at most d
bits agree in one of d + 1 bands (Norouzi, Punjani & Fleet 2012), so only those are compared. Unlike drawings often
share a hash, so what counts is a second look at thumbnails.

N images, H height, W width, C channels, P pairs, T = 16 pixels a side of a thumbnail.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from handmill.data.corpus import Ints
from handmill.data.decoding import Pixels
from handmill.data.duplicates import Hashes, exact_duplicates

Floats = npt.NDArray[np.float32]

_T, _COLOUR = 16, 8  # pixels a side of the thumbnails of luma and colour
_BLOCK = 1024  # images hashed, and pairs looked at, at once
_BITS = 64
# Measured on emoji and MNIST: 99 % of JPEGs of quality 75 and of resized copies lie within these, no two digits do.
_RESIDUAL = 0.075  # of the contrast, root mean square of what differs once brightness and contrast are matched
_WORST = 20.0  # levels of 255, the same at the worst place
_FAINT = 16.0  # levels, the contrast below which the residual is not measured by it
_HUE = 14.0  # levels, the largest difference of colour at any place
_GAIN = 1.25  # ratio of the contrasts
_BRIGHTER = (0.5, 26.0)  # difference of the means: share of the contrast, levels at most
# Red, green and blue to luma and the two differences of colour, ITU-R BT.601
_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)


@dataclass(frozen=True)
class Signed:
    """What comparing images needs, in memory: 0.6 KB an image."""

    exact: Hashes  # (N, 2) 128 bits of each image's pixels
    hashes: Hashes  # (N,) perceptual
    luma: npt.NDArray[np.float16]  # (N, T^2), contrast 1 about mean 0
    mean: Floats  # (N,) of the luma, levels of 255
    contrast: Floats  # (N,) standard deviation of the luma
    colour: npt.NDArray[np.float16]  # (N, 2 * 8^2), levels; (N, 0) for grey images


@dataclass(frozen=True)
class Copies:
    """Which images are copies of an earlier one that is kept: of[i] is that one, or i itself."""

    of: Ints  # (N,)
    near: npt.NDArray[np.bool_]  # (N,) the copy is a near one, not exact

    @property
    def kept(self) -> Ints:
        return np.flatnonzero(self.of == np.arange(len(self.of)))


def sign(pixels: Pixels, tick: Callable[[int], None] = lambda count: None) -> Signed:
    """Hash and thumbnail every image of (N, H, W, C); `tick` gets the bytes done."""
    assert pixels.shape[3:] in ((1,), (3,)), pixels.shape
    parts = []
    for start in range(0, len(pixels), _BLOCK):
        block = np.ascontiguousarray(pixels[start:start + _BLOCK])
        parts.append(_sign(block))
        tick(block.nbytes)
    return Signed(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _sign(pixels: Pixels) -> tuple[npt.NDArray[np.generic], ...]:
    values = pixels.astype(np.float32)
    luma = values @ _YCC[0] if values.shape[3] == 3 else values[..., 0]  # (N, H, W)
    small = _shrink(luma, _T).reshape(len(luma), -1)  # (N, T^2)
    mean, contrast = small.mean(1), small.std(1)
    plain = (small - mean[:, None]) / np.maximum(contrast, 1e-3)[:, None]
    colour = np.zeros((len(luma), 0), np.float32)
    if values.shape[3] == 3:
        colour = np.concatenate([_shrink(values @ row, _COLOUR).reshape(len(luma), -1) for row in _YCC[1:]], 1)
    digests = [hashlib.blake2b(image.data, digest_size=16).digest() for image in pixels]
    exact = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    return exact, perceptual(luma), plain.astype(np.float16), mean, contrast, colour.astype(np.float16)


def perceptual(luma: Floats) -> Hashes:
    """The perceptual hash of (N, H, W): (N,), 63 bits."""
    across, down = _cosines(luma.shape[2]), _cosines(luma.shape[1])
    frequencies = (down @ luma @ across.T).reshape(len(luma), -1)[:, 1:]  # (N, 63), the mean is left out
    bits = np.zeros((len(luma), _BITS), bool)
    bits[:, 1:] = frequencies > np.median(frequencies, 1, keepdims=True)
    return np.packbits(bits, 1).view(np.uint64)[:, 0]


def _cosines(length: int) -> Floats:
    """The 8 lowest rows of the discrete cosine transform (DCT-II): (8, length)."""
    return np.asarray(np.cos(np.pi * np.arange(8)[:, None] * (np.arange(length) + 0.5) / length), np.float32)


def _shrink(planes: Floats, side: int) -> Floats:
    """Means over the areas of a side x side grid: (N, H, W) to (N, side, side)."""
    return np.asarray(_areas(planes.shape[1], side) @ planes @ _areas(planes.shape[2], side).T, np.float32)


def _areas(length: int, side: int) -> Floats:
    """The share of each of `length` pixels in each of `side` equal parts: (side, length), rows sum to 1."""
    edges, pixels = np.linspace(0, length, side + 1)[:, None], np.arange(length)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (overlap.clip(0) * side / length).astype(np.float32)


def find(signed: Signed, distance: int, fixed: int = 0) -> Copies:
    """The copies among N images whose hashes differ in at most `distance` bits (0: exact copies only).

    The first `fixed` images, an official test split, are all kept; later ones are compared with them too. Every
    copy is one of an image that is kept itself: likeness does not run on from copy to copy.
    """
    count = len(signed.exact)
    first = exact_duplicates(signed.exact)
    of, near = first.copy(), np.zeros(count, bool)
    of[:fixed] = np.arange(fixed)
    if distance:
        alive = np.flatnonzero(of == np.arange(count))
        pairs = [_alike(signed, alive[a], alive[b]) for a, b in candidates(signed.hashes[alive], distance)]
        for a, b in sorted(pair for some in pairs for pair in some):  # by the kept one, so the first copy wins
            if of[a] == a and of[b] == b and b >= fixed:
                of[b], near[b] = a, True
        of, near = of[of], near | near[first]  # an exact copy of what was found a near copy
    return Copies(of, near)


def candidates(hashes: Hashes, distance: int) -> Iterator[tuple[Ints, Ints]]:
    """Pairs (a, b), a < b, of hashes that differ in at most `distance` bits, each once, in blocks."""
    masks = _bands(distance + 1)
    for number, mask in enumerate(masks):
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        ends = np.searchsorted(keys[order], keys[order], side="right")  # (N,) where each bucket ends
        left = np.arange(len(order))
        for step in range(1, len(order)):
            left = left[left + step < ends[left]]
            if not left.size:
                break
            a, b = order[left], order[left + step]
            differ = hashes[a] ^ hashes[b]
            close = np.bitwise_count(differ) <= distance
            for earlier in masks[:number]:  # found in that band already
                close &= (differ & earlier) != 0
            if close.any():
                yield a[close], b[close]


def _bands(count: int) -> list[np.uint64]:
    edges = np.linspace(0, _BITS, count + 1).astype(int).tolist()
    return [np.uint64(((1 << high) - 1) ^ ((1 << low) - 1)) for low, high in pairwise(edges)]


def _alike(signed: Signed, a: Ints, b: Ints) -> list[tuple[int, int]]:
    """The pairs whose thumbnails agree too."""
    same = _coarsely_alike(signed, a, b)
    a, b = a[same], b[same]
    found = []
    for start in range(0, len(a), _BLOCK):
        one, other = a[start:start + _BLOCK], b[start:start + _BLOCK]
        same = _finely_alike(signed, one, other)
        found += list(zip(one[same].tolist(), other[same].tolist(), strict=True))
    return found


def _coarsely_alike(signed: Signed, a: Ints, b: Ints) -> npt.NDArray[np.bool_]:
    """Brightness and contrast: (P,). What brightens an image adds to the mean, or scales it with the contrast."""
    low, high = np.sort([signed.contrast[a], signed.contrast[b]], axis=0)
    share, most = _BRIGHTER
    brighter = np.abs(signed.mean[a] - signed.mean[b])
    scaled = np.abs(signed.mean[a] * signed.contrast[b] - signed.mean[b] * signed.contrast[a]) <= high * low * share / 4
    near = (brighter <= 1 + share * low) | (scaled & (low >= _FAINT / 4))
    return (high + 1 <= _GAIN * (low + 1)) & near & (brighter <= most)


def _finely_alike(signed: Signed, a: Ints, b: Ints) -> npt.NDArray[np.bool_]:
    """Shape and colour: (P,)."""
    contrast = np.sqrt(signed.contrast[a] * signed.contrast[b])  # (P,)
    residual = (signed.luma[a].astype(np.float32) - signed.luma[b]) * contrast[:, None]  # (P, T^2)
    rms = np.sqrt((residual**2).mean(1))
    same = (rms <= _RESIDUAL * np.maximum(contrast, _FAINT)) & (np.abs(residual).max(1) <= _WORST)
    if signed.colour.shape[1]:
        same &= np.abs(signed.colour[a].astype(np.float32) - signed.colour[b]).max(1) <= _HUE
    return same

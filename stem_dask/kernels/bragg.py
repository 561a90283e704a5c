"""Diffracted discs in a mean pattern, and which of them a window keeps."""

import numpy as np
from numpy.typing import NDArray

#: signal to noise, and brightness relative to the surroundings, from which a maximum is a disc
SIGNAL, CONTRAST = 6.0, 2.0


def find_bragg_discs(
    mean: NDArray, n_patterns: int, radius: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find discs of a radius as local maxima of a box filter of half side 0.7 radius.

    A disc is at least twice as bright as the ring around it (radius + 2 … radius + 4 px), by more than 6 times the
    Poisson noise of its counts. Discs closer than a radius count as one.

    Parameters
    ----------
    mean : (ky, kx) mean pattern in counts
    n_patterns : of which it is the mean
    radius : of a disc in px

    Returns
    -------
    (n, 2) centers (y, x) of the discs, brightest first, and (n,) their counts per pattern above the ring

    Examples
    --------
    >>> y, x = np.mgrid[:40, :40]
    >>> mean = sum(n * ((y - a) ** 2 + (x - b) ** 2 <= 9.0) for n, a, b in ((50, 20, 20), (5, 20, 31)))
    >>> find_bragg_discs(mean, 100, 3.0)[0].round(3).tolist()
    [[20.0, 20.0], [20.0, 31.0]]
    """
    from scipy import ndimage

    half = max(1, round(0.7 * radius))
    n_pixels, mean = (2 * half + 1) ** 2, np.asarray(mean, np.float64)
    box = ndimage.uniform_filter(mean, 2 * half + 1, mode="constant")
    around = _ring_mean(mean, radius + 2, radius + 4)
    above = box - around
    noise = np.sqrt(box.clip(0) / n_pixels / max(1, n_patterns))
    found = (above > SIGNAL * noise) & (box > CONTRAST * around)
    found &= box == ndimage.maximum_filter(box, 2 * max(1, round(radius)) + 1)
    places = np.argwhere(found)
    counts = above[found] * n_pixels
    order = np.argsort(-counts, kind="stable")
    kept: list[int] = []
    for i in order:  # equal neighbours are one maximum
        if all(np.hypot(*(places[i] - places[j])) > radius for j in kept):
            kept.append(int(i))
    levels = box[found] - around[found]
    centers = [
        _center(mean - around[tuple(places[i])], places[i], radius, levels[i] / 4) for i in kept
    ]
    return np.array(centers).reshape(-1, 2), counts[kept]


def _center(
    above: NDArray[np.float64], place: NDArray[np.int64], radius: float, cap: float
) -> NDArray[np.float64]:
    """Center of mass of the values near a place, those above the cap as the cap: a bright side of the disc weighs little."""
    reach = int(np.ceil(radius)) + 4
    top, left = (max(0, int(one) - reach) for one in place)
    part = above[top : top + 2 * reach + 1, left : left + 2 * reach + 1].clip(0, cap)
    y, x = np.mgrid[top : top + part.shape[0], left : left + part.shape[1]]
    center = place.astype(np.float64)
    for _ in range(8):
        weight = part * (np.hypot(y - center[0], x - center[1]) <= radius + 1.5)
        if not weight.any():
            return place.astype(np.float64)
        center = np.array([(weight * y).sum(), (weight * x).sum()]) / weight.sum()
    return center


def _ring_mean(image: NDArray[np.float64], inner: float, outer: float) -> NDArray[np.float64]:
    """Mean over the part of a ring about each pixel that lies on the image."""
    reach = int(np.ceil(outer))
    distance = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1])
    ring = np.zeros([n + 2 * reach for n in image.shape])
    ring[: 2 * reach + 1, : 2 * reach + 1] = (distance >= inner) & (distance <= outer)
    spectrum = np.fft.rfft2(ring)
    sums, n = (
        np.fft.irfft2(np.fft.rfft2(one, ring.shape) * spectrum, ring.shape)[reach:-reach, reach:-reach]
        for one in (image, np.ones(image.shape))
    )  # fmt: skip
    means: NDArray[np.float64] = (sums / n.clip(1)).clip(0)
    return means


def mean_about(
    patterns: NDArray, places: NDArray[np.int64], middle: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean of patterns that are moved by whole pixels, so that their own ``places`` (n, 2) come to lie at one pixel.

    What is moved in from outside of the detector, is not finite or negative counts as 0.

    Examples
    --------
    >>> patterns = np.zeros((2, 3, 4)); patterns[0, 1, 1] = 2; patterns[1, 2, 3] = 4
    >>> mean_about(patterns, np.array([[1, 1], [2, 3]]), np.array([1, 2])).tolist()
    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    total = np.zeros(patterns.shape[1:])
    for pattern, moved in zip(patterns, middle - places, strict=True):
        ways = [(n, int(d)) for n, d in zip(patterns.shape[1:], moved.tolist(), strict=True)]
        into = tuple(slice(max(0, d), max(0, n + min(0, d))) for n, d in ways)
        out = tuple(slice(max(0, -d), max(0, n - max(0, d))) for n, d in ways)
        values = pattern[out].astype(np.float64)
        total[into] += np.where(np.isfinite(values), values, 0).clip(0)
    return total / max(1, len(patterns))


def kept_discs(
    places: NDArray,
    radius: float | NDArray[np.float64],
    origin: tuple[int, int],
    shape: tuple[int, int],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which discs lie inside a window, and which are cut through; the others lie outside.

    ``radius`` may differ between y and x, for discs that wander.

    Examples
    --------
    >>> inside, cut = kept_discs(np.array([[20, 20], [20, 31], [20, 38]]), 3.0, (8, 8), (24, 24))
    >>> inside.tolist(), cut.tolist()
    ([True, False, False], [False, True, False])
    """
    first = np.array(origin) - 0.5  # the edges of the outermost pixels
    last = first + np.array(shape)
    inside = ((places - radius >= first) & (places + radius <= last)).all(axis=1)
    apart = np.maximum(first - places, places - last).clip(0)
    touched = ((apart / radius) ** 2).sum(axis=1) <= 1
    return inside, touched & ~inside

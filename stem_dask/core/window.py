"""Arithmetic of windows: sizes, origins, and checks of windows, factors and centers."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.chunks import whole_number
from stem_dask.core.errors import ConfigError
from stem_dask.core.model import Align
from stem_dask.core.text import by, next_multiples


def check_size(
    size: Sequence[int],
    detector: Sequence[int],
    multiple: int,
    *,
    align: Align,
    square: bool,
    given: str,
) -> None:
    """Refuse a window size (height, width) that is no multiple, except on a whole axis, or exceeds the detector (ky, kx).

    An aligned window may exceed the detector: that axis is kept whole. ``square`` refuses two different sizes. ``given`` is what
    the user gave.
    """
    height, width = detector
    for n, full in zip(size, detector, strict=True):
        if n < 1:
            raise ConfigError(f"{given}; expected at least 1 pixel")
        if n > full and align == "fixed":
            raise ConfigError(
                f"{given}, larger than the detector of {height} x {width} pixels; give at most that, or size auto"
            )
        if n < full and n % multiple:
            raise ConfigError(f"{given}; {next_multiples(n, multiple)}")
    kept = [min(n, full) for n, full in zip(size, detector, strict=True)]
    if square and kept[0] != kept[1]:
        raise ConfigError(
            f"{given}, which gives {by(kept)} px, and crop.square is true; give one size of at most {min(detector)}, or "
            "crop.square=false"
        )


def uncropped(name: str, full: int) -> str:
    """Note for an axis that the window covers."""
    return f"{name} is not cropped: the window would reach its {full} pixels"


def covering_radius(radii: NDArray, coverage: float) -> int:
    """Smallest integer R with at least ``ceil(coverage * n)`` of the n radii at or below it."""
    rank = min(max(math.ceil(coverage * radii.size), 1), radii.size) - 1
    return int(np.partition(radii.astype(np.int64), rank)[rank])


def next_multiple(n: int, multiple: int) -> int:
    """Smallest multiple that is not below n."""
    return -(-n // multiple) * multiple


def fft_size(n: int, factor: int) -> int:
    """Smallest size of at least n whose Fourier transform after downsampling by ``factor`` is fast: even, a product of 2, 3, 5 and 7.

    Examples
    --------
    >>> fft_size(44, 1), fft_size(49, 1), fft_size(44, 2)
    (48, 50, 48)
    """
    half = -(-n // (2 * factor))
    while 210 ** half.bit_length() % half:  # another prime number divides it
        half += 1
    return 2 * half * factor


def needed_size(
    center: Sequence[int],
    radius: int,
    detector: Sequence[int],
    larger: Callable[[int], int],
    *,
    align: Align,
    square: bool,
) -> tuple[int, int]:
    """Size (height, width) of the window that holds all within a radius of its center, or whole axes of the detector (ky, kx).

    A fixed window needs no rows outside of the detector. ``larger`` gives the next size that is allowed; an axis with fewer pixels
    than that is kept whole. With ``square``, both sides are the larger one, or ConfigError says that an axis has fewer pixels.

    Examples
    --------
    >>> even = lambda n: next_multiple(n, 2)
    >>> needed_size((3, 20), 8, (64, 30), even, align="fixed", square=False)
    (12, 16)
    >>> needed_size((3, 20), 8, (64, 30), even, align="pattern", square=False)
    (16, 16)
    """
    wanted = [2 * radius, 2 * radius]
    if align == "fixed":
        ends = zip(center, detector, strict=True)
        wanted = [min(middle + radius, full) - max(middle - radius, 0) for middle, full in ends]
    sizes = [larger(n) for n in wanted]
    height, width = map(min, sizes, detector)
    if not square or height == width:
        return height, width
    side = max(sizes)
    if detector[0] == detector[1]:
        side = min(side, detector[0])
    if side > min(detector):
        raise ConfigError(
            f"crop.square is true and the window of {by((height, width))} px becomes {by((side, side))} px, more than the detector "
            f"of {by(detector)} pixels has; lower analyze.target_retention or crop.coverage, give a crop.size of at most "
            f"{min(detector)}, or crop.square=false"
        )
    return side, side


def window_start(center: int, size: int, detector: int, align: Align) -> int:
    """First row of a window with its center at index ``size // 2``; a fixed one is shifted inside the detector.

    A fixed window of the needed size or larger then holds all within the radius.

    Examples
    --------
    >>> [window_start(center, 12, 64, "fixed") for center in (3, 20, 60)]
    [0, 14, 52]
    >>> [window_start(center, 12, 64, "pattern") for center in (3, 20, 60)]
    [-3, 14, 54]
    """
    if size >= detector:
        return 0
    first = center - size // 2
    return min(max(first, 0), detector - size) if align == "fixed" else first


def surplus(n: int) -> int:
    """Pixels on each side of a window of ``n`` that are kept because the final one may need them: 7.5 %, at least 4.

    Examples
    --------
    >>> surplus(20), surplus(100)
    (4, 8)
    """
    return max(4, math.ceil(0.075 * n))


def check_window(window: Sequence[int], detector: Sequence[int]) -> None:
    """Refuse a window [y0, y1, x0, x1] that is empty or leaves the detector (ky, kx)."""
    y0, y1, x0, x1 = window
    if not (0 <= y0 < y1 <= detector[0] and 0 <= x0 < x1 <= detector[1]):
        raise ConfigError(
            f"window {list(window)} does not fit the detector of {detector[0]} x {detector[1]} pixels; "
            "give [y0, y1, x0, x1] with 0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width"
        )


def check_target(target: float) -> None:
    """Refuse a target retention that is no share."""
    if not 0 < target <= 1:
        raise ConfigError(f"target_retention is {target}; expected 0 < target_retention <= 1")


def check_factor(factor: int, detector: Sequence[int]) -> None:
    """Refuse a downsampling of the detector (ky, kx) that is not an integer, or would leave no pixel of an axis."""
    whole_number("downsample factor", factor, "an integer")
    if factor < 1 or factor > min(detector):
        raise ConfigError(
            f"downsample factor is {factor}; expected 1 to {min(detector)}, the shorter detector axis"
        )


def check_center(center: Sequence[float], detector: Sequence[int]) -> None:
    """Refuse a center (y, x) outside of the detector (ky, kx)."""
    y, x = center
    if not (0 <= y <= detector[0] - 1 and 0 <= x <= detector[1] - 1):
        raise ConfigError(
            f"manual_center ({y:g}, {x:g}) lies outside the detector of {detector[0]} x {detector[1]} pixels; "
            "give (y, x) in source pixels"
        )


def common_size(
    wanted: Sequence[Sequence[int]], detectors: Sequence[Sequence[int]], multiple: int
) -> tuple[int, int]:
    """Size of the window that several datasets share: the largest of those that fit together.

    A dataset fits a size that holds its own window and that its detector has. Of all sizes that are the largest of the
    datasets they fit, the one for most datasets is taken; of equals the larger. The order of the datasets does not matter.

    ``wanted`` are the (height, width) of every dataset's own window, ``detectors`` their (ky, kx).

    Examples
    --------
    >>> common_size([(40, 40), (44, 44), (90, 90)], [(64, 64), (64, 64), (256, 256)], 2)
    (44, 44)
    """
    own, full = np.asarray(wanted), np.asarray(detectors)
    rounded = -(-own // multiple) * multiple
    heights, widths = (sorted({*own[:, i].tolist(), *rounded[:, i].tolist()}) for i in (0, 1))
    best = (0, 0, (0, 0))
    for size in itertools.product(heights, widths):
        who = fits(own, full, size, multiple)
        if not who.any():
            continue
        # the smallest that holds all: a multiple, except on an axis that is whole in all datasets that reach it
        largest = own[who].max(axis=0)
        whole = (largest >= full[who]).all(axis=0)
        if size == tuple(np.where(whole, largest, -(-largest // multiple) * multiple).tolist()):
            best = max(best, (int(who.sum()), math.prod(size), size))
    return best[2]


def fits(own: NDArray, full: NDArray, size: Sequence[int], multiple: int) -> NDArray[np.bool_]:
    """Which datasets, by their windows and detectors (n, 2), can be cropped to a size without losing any of their window."""
    here = np.asarray(size)
    cropped = (here < full) & (here % multiple == 0)
    return np.asarray(((own <= here) & (cropped | (here == full))).all(axis=1))


#: scattered counts below which a pattern has no retention radius of its own: their Poisson noise is above 5 %
FEWEST_SCATTERED = 400.0


def radii_for_target(
    profile: NDArray, total: NDArray, target: float, metric: str, exact: bool, *, least: int = 0
) -> NDArray[np.float32]:
    """Retention radius, ``least`` or more, for a target, from stored profiles (…, radius): NaN where the total is 0.

    A profile holds shares rounded down to float32. For integer data (`exact`) with totals below 2**22 the intensity
    inside is recovered exactly; otherwise the radius is never too small, and too large only where the share lies
    within 6e-8 of the target.
    """
    inside = _inside(profile, total, exact)
    radii = _first(inside >= target * total[..., None], metric, least)
    radii[~(total > 0)] = np.nan
    return radii


def scattered_radii(
    profile: NDArray,
    total: NDArray,
    direct: NDArray,
    disc_radius: float,
    target: float,
    metric: str,
    exact: bool,
) -> NDArray[np.float32]:
    """Radius, ``disc_radius + 2.5`` or more, that keeps a share of the intensity outside the direct disc; see `radii_for_target`.

    NaN where fewer than `FEWEST_SCATTERED` counts are outside the disc, or its intensity ``direct`` is NaN.
    """
    scattered = total - direct
    inside = _inside(profile, total, exact) - direct[..., None]
    least = math.ceil(disc_radius + 2.5)
    radii = _first(inside >= target * scattered[..., None], metric, least)
    radii[~(scattered >= FEWEST_SCATTERED)] = np.nan
    return radii


def _inside(profile: NDArray, total: NDArray, exact: bool) -> NDArray[np.float64]:
    """The intensity inside each radius."""
    inside = profile.astype(np.float64) * total[..., None]
    return np.where((total < 2**22)[..., None], np.rint(inside), inside) if exact else inside


def _first(reached: NDArray[np.bool_], metric: str, least: int) -> NDArray[np.float32]:
    """The smallest radius that reaches the target; all are inside the largest."""
    reached[..., : max(least, metric == "square")] = False
    reached[..., -1] = True
    return np.argmax(reached, axis=-1).astype(np.float32)

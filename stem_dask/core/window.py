"""Size of the window, and checks of windows, factors and centers."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.chunks import whole_number
from stem_dask.core.errors import ConfigError


def covering_radius(radii: NDArray, coverage: float) -> int:
    """Smallest integer R with at least ``ceil(coverage * n)`` of the n radii at or below it.

    Examples
    --------
    >>> covering_radius(np.array([3, 9, 4, 5]), 0.75), covering_radius(np.array([3, 9, 4, 5]), 1.0)
    (5, 9)
    """
    rank = min(max(math.ceil(coverage * radii.size), 1), radii.size) - 1
    return int(np.partition(radii.astype(np.int64), rank)[rank])


def axis_window(wanted: int, detector: int, multiple: int) -> tuple[int, bool]:
    """Size of the window on one axis, and whether it crops: (size, cropped).

    ``wanted`` is rounded up to a multiple; a window that would reach the detector's size is the whole axis.

    Examples
    --------
    >>> axis_window(41, 128, 2), axis_window(127, 128, 2)
    ((42, True), (128, False))
    """
    if wanted < 1:
        raise ConfigError(f"a window of {wanted} pixels was asked for; it needs at least 1")
    size = math.ceil(wanted / multiple) * multiple
    return (size, True) if size < detector else (detector, False)


def check_window(window: Sequence[int], detector: Sequence[int]) -> None:
    """Refuse a window [y0, y1, x0, x1] that is empty or leaves the detector (ky, kx).

    Raises
    ------
    ConfigError
        When it does.

    Examples
    --------
    >>> check_window([0, 24, 2, 20], (24, 20))
    """
    y0, y1, x0, x1 = window
    if not (0 <= y0 < y1 <= detector[0] and 0 <= x0 < x1 <= detector[1]):
        raise ConfigError(
            f"window {list(window)} does not fit the detector of {detector[0]} x {detector[1]} pixels; "
            "give [y0, y1, x0, x1] with 0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width"
        )


def check_factor(factor: int, detector: Sequence[int]) -> None:
    """Refuse a downsampling of the detector (ky, kx) that is not an integer, or would leave no pixel of an axis.

    Raises
    ------
    ConfigError
        When it is, or would.

    Examples
    --------
    >>> check_factor(20, (24, 20))
    """
    whole_number("downsample factor", factor, "an integer")
    if factor < 1 or factor > min(detector):
        raise ConfigError(
            f"downsample factor is {factor}; expected 1 to {min(detector)}, the shorter detector axis"
        )


def check_center(center: Sequence[float], detector: Sequence[int]) -> None:
    """Refuse a center (y, x) outside of the detector (ky, kx).

    Raises
    ------
    ConfigError
        When it is.

    Examples
    --------
    >>> check_center((23, 0.5), (24, 20))
    """
    y, x = center
    if not (0 <= y <= detector[0] - 1 and 0 <= x <= detector[1] - 1):
        raise ConfigError(
            f"manual_center ({y:g}, {x:g}) lies outside the detector of {detector[0]} x {detector[1]} pixels; "
            "give (y, x) in source pixels"
        )

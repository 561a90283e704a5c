"""The center of symmetry of an image: Friedel's law makes a diffraction pattern nearly its own mirror image about the beam."""

import numpy as np
from numpy.typing import NDArray

#: of the good pixels, the least that must fall onto good ones for a center to count
OVERLAP = 0.35


def symmetry(image: NDArray, good: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Correlation of an image with its own mirror image about every place of the half-pixel grid.

    Normalized by the variance of the pixels that fall onto good ones (D. Padfield, Masked object registration in the Fourier
    domain, 2012), so from -1 to 1.

    Parameters
    ----------
    image : (ky, kx), finite where good
    good : (ky, kx) False where a pixel does not count, or None when all do

    Returns
    -------
    (2 ky - 1, 2 kx - 1): entry [i, j] is about the center (i / 2, j / 2); -inf where less than 35 % of the good pixels overlap.

    Examples
    --------
    >>> image = np.zeros((7, 9)); image[2:4, 3:6] = [[1, 2, 3], [3, 2, 1]]
    >>> found = symmetry(image)
    >>> [int(i) for i in np.unravel_index(found.argmax(), found.shape)]
    [5, 8]
    """
    from scipy import fft

    weight = np.ones(image.shape) if good is None else good.astype(np.float64)
    n_good = weight.sum()
    values = np.where(weight > 0, image, 0.0)
    values -= weight * (values.sum() / max(n_good, 1))
    shape = tuple(2 * n - 1 for n in image.shape)
    fast = [fft.next_fast_len(n, real=True) for n in shape]
    weights, sums, squares = (fft.rfft2(x, fast) for x in (weight, values, values**2))

    def mirrored(a: NDArray, b: NDArray) -> NDArray[np.float64]:
        """Sum over x of a(x) b(t - x), for every t."""
        return fft.irfft2(a * b, fast)[: shape[0], : shape[1]]

    n = np.rint(mirrored(weights, weights))
    enough = (n >= OVERLAP * n_good) & (n > 1)
    n = np.where(enough, n, 1)
    mean = mirrored(weights, sums) / n
    variance = mirrored(weights, squares) / n - mean**2
    product = mirrored(sums, sums) / n - mean**2
    enough &= variance > 1e-12 * max(float(variance.max()), 1e-300)
    return np.where(enough, product / np.where(enough, variance, 1), -np.inf)


def center_of_symmetry(
    image: NDArray,
    near: tuple[float, float],
    good: NDArray[np.bool_] | None = None,
    *,
    reach: float = 5.0,
) -> tuple[float, float]:
    """Center (y, x) about which an image is most like its mirror image, at most ``reach`` px from ``near`` in y and in x.

    Between the half pixels of `symmetry` a parabola through three of them decides; NaN where too few pixels overlap.

    Examples
    --------
    >>> y, x = np.mgrid[:30, :32]
    >>> image = np.exp(-((y - 14.3) ** 2 + (x - 15.6) ** 2) / 40)
    >>> [round(c, 1) for c in center_of_symmetry(image, (14, 16))]
    [14.3, 15.6]
    """
    found = symmetry(image, good)
    low, high = (
        [min(max(sign * int(np.floor(sign * 2 * (c + sign * reach))), 0), n - 1) for c, n in zip(near, found.shape, strict=True)]
        for sign in (-1, 1)
    )  # fmt: skip
    part = found[low[0] : high[0] + 1, low[1] : high[1] + 1]
    i, j = np.unravel_index(int(part.argmax()), part.shape)
    if not np.isfinite(part[i, j]):
        return np.nan, np.nan
    at = (int(i) + low[0], int(j) + low[1])
    steps = [_vertex(found[:, at[1]], at[0]), _vertex(found[at[0]], at[1])]
    return (at[0] + steps[0]) / 2, (at[1] + steps[1]) / 2


def _vertex(values: NDArray[np.float64], i: int) -> float:
    """Vertex of the parabola through three neighbours, from the middle one; 0 at an end."""
    if not 0 < i < len(values) - 1:
        return 0.0
    before, here, after = values[i - 1 : i + 2]
    bend = before - 2 * here + after
    if not (np.isfinite(bend) and bend < 0):
        return 0.0
    return float(np.clip((before - after) / (2 * bend), -0.5, 0.5))

"""Descan: the smooth surface over the scan that the positions of the beam follow, fitted so that the specimen has no part in it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: polynomial terms of each order: 1; v, u; v v, v u, u u
TERMS = (1, 3, 6)

#: s.d. in px that the center of an evenly lit disc has
NOISE = 0.1

#: an order that is higher by 0, 1, 2 must bring the error of cross-validation down to this share: by 2 at once, where a plane is
#: no better than a constant, it may be the specimen
GAIN = (1, 2 / 3, 1 / 4)

#: error in px below which no higher order is tried
EXACT = 1e-3

#: beams that the cross-validation and the start of the fit use at most, evenly taken; the fit itself uses all
MOST = 2**14

#: beams at once: their terms stay in the cache of a core, and BLAS takes one thread for so few, whose sums are the same everywhere
PIECE = 4096

#: an axis with fewer scan positions is fitted with a constant
FEWEST_POSITIONS = 4


@dataclass(frozen=True, eq=False)
class Descan:
    """A polynomial surface d(v, u) of order 0, 1 or 2, in px on the detector, and how far to trust it.

    ``v`` and ``u`` run from -1 at the first to 1 at the last position of the scan as acquired, along scan_y and scan_x.

    Attributes
    ----------
    coefficients
        (2, terms) float64: y, then x; terms 1, v, u, v v, v u, u u, of which order 0 has one, order 1 three, order 2 six.
    order
        0, 1 or 2.
    s
        Robust s.d. of the beams about the surface, per component, in px; at least 0.02.
    cv
        Error of the cross-validation in px for each order tried; empty if the order was given.
    leverage
        Largest predicted s.d. of a surface of order 2 at the four corners of the scan, in px, whatever the order is; infinite
        where the beams do not determine one. Above 0.25 the surface is extrapolated.

    Examples
    --------
    >>> tilted = Descan(np.array([[60.0, 2, 0], [64, 0, -1]]), order=1, s=0.02)
    >>> tilted.at((3, 2))[:, 0].tolist()
    [[58.0, 65.0], [60.0, 65.0], [62.0, 65.0]]
    """

    coefficients: NDArray[np.float64]
    order: int
    s: float
    cv: dict[int, float] = field(default_factory=dict)
    leverage: float = 0.0

    def at_points(self, v: ArrayLike, u: ArrayLike) -> NDArray[np.float64]:
        """The surface (..., 2) at coordinates that broadcast; a point has the same bytes whatever others are asked for."""
        v, u = np.broadcast_arrays(np.asarray(v, np.float64), np.asarray(u, np.float64))
        out = np.zeros((*v.shape, 2))
        for i, term in enumerate(_terms(self.order, v, u)):
            for component in (0, 1):
                out[..., component] += self.coefficients[component, i] * term
        return out

    def at(self, shape: tuple[int, int]) -> NDArray[np.float64]:
        """The surface (scan_y, scan_x, 2) at all positions of a scan of this shape."""
        v, u = map(scan_coordinates, shape)
        return self.at_points(v[:, None], u)


def scan_coordinates(n: int) -> NDArray[np.float64]:
    """Coordinates -1 to 1 of the n positions of a scan axis as acquired; 0 for a single one.

    Examples
    --------
    >>> scan_coordinates(5)[::2].tolist()
    [-1.0, 0.0, 1.0]
    """
    return np.linspace(-1, 1, n) if n > 1 else np.zeros(n)


def descan_weight(spread: ArrayLike) -> NDArray[np.float64]:
    """Weight in 1/px^2 of a center whose disc is uneven by ``spread`` (px, NaN where not found): 1 / (0.1^2 + spread^2)."""
    return 1 / (NOISE**2 + np.asarray(spread, np.float64) ** 2)


def fit_descan(
    center_y: NDArray,
    center_x: NDArray,
    weight: ArrayLike = 1.0,
    *,
    order: int | str = "auto",
    region: NDArray[np.bool_] | None = None,
    v: ArrayLike | None = None,
    u: ArrayLike | None = None,
) -> Descan:
    """Fit the surface that most of the beams follow.

    A third of the beams may lie elsewhere, if they are spread over the scan, or if their weight says so. Without weights, beams
    that lie together at an edge of the scan, and are all moved alike, turn the surface when they are more than a fifth.

    Both components are fitted together: least squares, then least distances by 30 rounds of reweighting, then Tukey's biweight
    at 4.685 s, s = median distance / 1.1774, until no coefficient moves by 1e-10 px, in at most 60 rounds (P. W. Holland,
    R. E. Welsch, Robust regression using iteratively reweighted least-squares, 1977).

    ``order="auto"`` begins with a constant and takes a higher order if each step brings the median distance of beams that had no
    part in the fit to 2/3 or less, or both steps together to 1/4: a bowl is no better fitted by a plane than by a constant.
    4 x 4 blocks of the scan, or of the rectangle around the region, are left out four at a time, one of each row and column.
    Orders for which too few beams are found are not tried. Above 16,384 beams, these errors and the start of the fit come from
    at most that many, evenly taken.

    Parameters
    ----------
    center_y, center_x
        (scan_y, scan_x), in px on the detector; NaN where no beam was found.
    weight
        (scan_y, scan_x) or one number: `descan_weight` of the spread, or 1 for centers of mass. Beams without weight have no part.
    order
        "auto", 0, 1 or 2.
    region
        (scan_y, scan_x), where to fit; default everywhere.
    v, u
        (scan_y,) and (scan_x,), coordinates of the positions in the scan as acquired, from `scan_coordinates`. With scan_step or
        scan_roi, pass those of the positions that are left, so that the surface remains the same.

    Returns
    -------
    Descan
        An axis with fewer than four positions has no terms. Whether ``s`` is small enough for the disc is for the caller to say.

    Raises
    ------
    ValueError
        If the centers are no scan, or fewer than 3, 9, 18 beams are found for order 0, 1, 2 (0 for "auto"), or those lie so that
        the order is not determined (on one line).

    Examples
    --------
    >>> v, u = scan_coordinates(9)[:, None], scan_coordinates(8)
    >>> y, x = 60 + 2 * v - u, 64 + v * u
    >>> y[3, :4] += 5  # the specimen
    >>> found = fit_descan(y, x)
    >>> found.order, np.abs(found.coefficients[1]).round(6).tolist()
    (2, [64.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    """
    beams = _Beams.found(center_y, center_x, weight, region, v, u)
    # odd, so that all columns of the scan have their turn
    some = beams.every(-(-beams.n // MOST) | 1)
    cv: dict[int, float] = {}
    chosen = 0 if order == "auto" else int(order)
    if order == "auto":
        for tried in range(len(TERMS)):
            error = some.validated(tried) if beams.determine(tried) else None
            if error is None:
                break
            cv[tried] = error
            if error <= GAIN[tried - chosen] * cv[chosen]:
                chosen = tried
            if cv[chosen] < EXACT:
                break
    need = 3 * TERMS[chosen]
    if beams.n < need:
        raise ValueError(
            f"descan.order {order}: {beams.n} beams found, expected at least {need}; "
            + (f"type descan.order={chosen - 1} or " if chosen else "type ")
            + "crop.align=fixed"
        )
    if not beams.determine(chosen):
        raise ValueError(
            f"descan.order {chosen}: the {beams.n} beams found lie in too few rows or columns of the scan to tell; "
            f"enlarge descan.region, or type descan.order={chosen - 1}"
        )
    coefficients, s = beams.biweight(chosen, some.least_distances(chosen))
    return Descan(beams.in_scan(chosen, coefficients), chosen, s, cv, beams.leverage(s))


def fit_constant(
    reference: Descan,
    center_y: NDArray,
    center_x: NDArray,
    weight: ArrayLike = 1.0,
    *,
    region: NDArray[np.bool_] | None = None,
    v: ArrayLike | None = None,
    u: ArrayLike | None = None,
) -> Descan:
    """The surface of a vacuum scan of the same shape and step, moved by a robust constant to where the beams of this scan are.

    Arguments and errors are those of `fit_descan`; ``cv`` and ``leverage`` are those of the reference.

    Examples
    --------
    >>> vacuum = Descan(np.array([[60.0, 2, 0], [64, 0, -1]]), order=1, s=0.02)
    >>> y, x = np.moveaxis(vacuum.at((6, 5)), -1, 0)
    >>> fit_constant(vacuum, y + 3, x).coefficients.tolist()
    [[63.0, 2.0, 0.0], [64.0, 0.0, -1.0]]
    """
    height, width = np.shape(center_y)
    v, u = (
        scan_coordinates(n) if given is None else np.asarray(given, np.float64)
        for n, given in ((height, v), (width, u))
    )
    y, x = np.moveaxis(reference.at_points(v[:, None], u), -1, 0)
    moved = fit_descan(center_y - y, center_x - x, weight, order=0, region=region, v=v, u=u)
    coefficients = reference.coefficients.copy()
    coefficients[:, 0] += moved.coefficients[:, 0]
    return Descan(coefficients, reference.order, moved.s, reference.cv, reference.leverage)


def _terms(order: int, v: NDArray, u: NDArray) -> list[NDArray]:
    """The terms of a polynomial, each of the shape of v and u."""
    lower = [np.ones(v.shape), v, u][: TERMS[order]]
    return lower + ([v * v, v * u, u * u] if order == 2 else [])


@dataclass(frozen=True, eq=False)
class _Beams:
    """The beams found, flat, with coordinates drawn to [-1, 1] over those found: a narrow region is then as well fitted as a wide one."""

    places: NDArray[np.float64]  # (2, n): v, u
    centers: NDArray[np.float64]  # (2, n): y, x
    weight: NDArray[np.float64]  # (n,)
    fold: NDArray[np.int8]  # (n,) 0 to 3
    middle: NDArray[np.float64]  # (2,) v, u
    half: NDArray[np.float64]  # (2,) half the extent; infinite on an axis without terms
    corners: NDArray[np.float64]  # (2, 4) of the scan

    @staticmethod
    def found(
        center_y: NDArray,
        center_x: NDArray,
        weight: ArrayLike,
        region: NDArray[np.bool_] | None,
        v: ArrayLike | None,
        u: ArrayLike | None,
    ) -> "_Beams":
        shape = np.shape(center_y)
        if len(shape) != 2:
            raise ValueError(
                f"centers of shape {shape}, expected (scan_y, scan_x): a list of patterns has no descan; "
                "type crop.align=fixed or crop.align=pattern"
            )
        axes = [
            scan_coordinates(n) if given is None else np.asarray(given, np.float64)
            for n, given in zip(shape, (v, u), strict=True)
        ]
        weight = np.broadcast_to(np.asarray(weight, np.float64), shape)
        usable = np.isfinite(center_y) & np.isfinite(center_x) & (weight > 0) & np.isfinite(weight)
        inside = np.ones(shape, np.bool_) if region is None else np.asarray(region, np.bool_)
        usable &= inside
        at = np.nonzero(usable)
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        blocks = [
            4 * (i - filled[0]) // (filled[-1] + 1 - filled[0]) if filled.size else i
            for i, filled in zip(at, (rows, columns), strict=True)
        ]
        places = np.array([axis[i] for axis, i in zip(axes, at, strict=True)])
        middle, half = np.zeros(2), np.full(2, np.inf)
        for i, place in enumerate(places):
            if place.size and shape[i] >= FEWEST_POSITIONS:
                middle[i], half[i] = (place.max() + place.min()) / 2, np.ptp(place) / 2
        half[half == 0] = 1  # the term is there, and not determined
        ends = [(axis.min(), axis.max()) if axis.size else (0.0, 0.0) for axis in axes]
        corners = np.array([[a, b] for a in ends[0] for b in ends[1]]).T
        return _Beams(
            (places - middle[:, None]) / half[:, None],
            np.array([center_y[at], center_x[at]], np.float64),
            weight[at],
            ((blocks[0] + blocks[1]) % 4).astype(np.int8),
            middle,
            half,
            (corners - middle[:, None]) / half[:, None],
        )

    @property
    def n(self) -> int:
        return self.weight.size

    def part(self, chosen: slice | NDArray[np.bool_]) -> "_Beams":
        return _Beams(
            self.places[:, chosen], self.centers[:, chosen], self.weight[chosen], self.fold[chosen],
            self.middle, self.half, self.corners,
        )  # fmt: skip

    def every(self, step: int) -> "_Beams":
        return self if step == 1 else self.part(slice(None, None, step))

    def pieces(self, order: int) -> Iterator[tuple[slice, NDArray, NDArray]]:
        """Terms (terms, m) and centers (2, m) of a few beams at a time."""
        for start in range(0, self.n, PIECE):
            some = slice(start, start + PIECE)
            yield some, np.array(_terms(order, *self.places[:, some])), self.centers[:, some]

    def least_squares(self, order: int, weight: NDArray) -> NDArray[np.float64]:
        gram, right = np.zeros((TERMS[order],) * 2), np.zeros((TERMS[order], 2))
        for some, terms, centers in self.pieces(order):
            weighted = terms * weight[some]
            gram += weighted @ terms.T
            right += weighted @ centers.T
        return np.asarray(np.linalg.lstsq(gram, right)[0].T)  # axes without terms make it singular

    def distances(self, order: int, coefficients: NDArray) -> NDArray[np.float64]:
        out = np.empty(self.n)
        for some, terms, centers in self.pieces(order):
            off = centers - coefficients @ terms
            off *= off
            np.sqrt(off[0] + off[1], out=out[some])
        return out

    def least_distances(self, order: int) -> NDArray[np.float64]:
        coefficients = self.least_squares(order, self.weight)
        for _ in range(30):
            distance = np.maximum(self.distances(order, coefficients), 0.02)
            coefficients = self.least_squares(order, self.weight / distance)
        return coefficients

    def biweight(self, order: int, coefficients: NDArray) -> tuple[NDArray[np.float64], float]:
        for _ in range(60):
            before, distance = coefficients, self.distances(order, coefficients)
            distance /= 4.685 * _deviation(distance)
            kept = np.maximum(1 - distance * distance, 0)
            coefficients = self.least_squares(order, self.weight * kept * kept)
            if np.abs(coefficients - before).max() < 1e-10:
                break
        return coefficients, _deviation(self.distances(order, coefficients))

    def gram(self, order: int) -> NDArray[np.float64]:
        """X'WX with the largest weight 1, of the terms that the axes of the scan allow."""
        gram = np.zeros((TERMS[order],) * 2)
        for some, terms, _ in self.pieces(order):
            gram += terms * self.weight[some] @ terms.T
        allowed = self.allowed(order)
        return gram[np.ix_(allowed, allowed)] / self.weight.max(initial=1e-300)

    def allowed(self, order: int) -> NDArray[np.bool_]:
        v, u = np.isfinite(self.half)
        return np.array([True, v, u, v, v and u, u])[: TERMS[order]]

    def determine(self, order: int) -> bool:
        return self.n >= 3 * TERMS[order] and bool(np.linalg.cond(self.gram(order)) < 1e10)

    def validated(self, order: int) -> float | None:
        """Weighted median distance of the beams of each fold from the fit to the others; None where that is not determined."""
        distance = np.empty(self.n)
        for fold in np.unique(self.fold):
            held = self.fold == fold
            others, rest = self.part(~held), self.part(held)
            if not others.determine(order):
                return None
            coefficients, _ = others.biweight(order, others.least_distances(order))
            distance[held] = rest.distances(order, coefficients)
        return _weighted_median(distance, self.weight) if self.n else None

    def leverage(self, s: float) -> float:
        gram, allowed = self.gram(2), self.allowed(2)
        if not np.linalg.cond(gram) < 1e10:
            return np.inf
        corners = np.array(_terms(2, *self.corners))[allowed]
        variance = (corners * np.linalg.solve(gram, corners)).sum(0)
        return float(s * np.sqrt(variance.max()))

    def in_scan(self, order: int, coefficients: NDArray) -> NDArray[np.float64]:
        """Coefficients for the coordinates of the scan."""
        (a, c), (b, d) = (0 - self.middle) / self.half, 1 / self.half
        replaced = np.array([
            [1, 0, 0, 0, 0, 0],
            [a, b, 0, 0, 0, 0],
            [c, 0, d, 0, 0, 0],
            [a * a, 2 * a * b, 0, b * b, 0, 0],
            [a * c, b * c, a * d, 0, b * d, 0],
            [c * c, 0, 2 * c * d, 0, 0, d * d],
        ])  # fmt: skip
        n = TERMS[order]
        return coefficients @ replaced[:n, :n]


def _deviation(distance: NDArray) -> float:
    """Robust s.d. per component of distances in the plane: half of a Gaussian lie within 1.1774 of it."""
    return max(float(np.median(distance)) / 1.1774, 0.02)


def _weighted_median(values: NDArray, weight: NDArray) -> float:
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weight[order])
    return float(values[order[np.searchsorted(total, total[-1] / 2)]])

"""Survey of a sample: what has to be known before the one pass over all patterns.

Bad pixels, background, where the direct disc is expected in each pattern, and its radius.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stem_dask.core.errors import ConfigError
from stem_dask.core.patterns import blocks_of, lead_shape
from stem_dask.kernels.descan import descan_weight, fit_descan
from stem_dask.kernels.disc import find_discs, fit_rims
from stem_dask.kernels.intensity import native
from stem_dask.kernels.pixels import (
    DEAD,
    GIVEN,
    HOT,
    NOT_FINITE,
    STOP,
    dead_pixels,
    hot_pixels,
    stop_region,
)
from stem_dask.kernels.symmetry import center_of_symmetry, symmetry
from stem_dask.stages.blocks import patterns_of, sample_positions

if TYPE_CHECKING:
    import xarray as xr

#: names of the kinds of bad pixels
KINDS = {"given": GIVEN, "hot": HOT, "dead": DEAD, "stop": STOP, "not_finite": NOT_FINITE}

#: a disc of a smaller radius has no rim (px)
SMALLEST_RADIUS = 2.0

#: rim and center of mass of a disc lie within so many px of each other; those of overlapping discs and of few electrons do not
AGREES = 0.5

#: patterns at most from which pixelwise medians and areas of discs are taken, and values for the background
SOME, SOME_VALUES = 64, 2**21

Triple = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Survey:
    """What a sample of the patterns tells about all of them; lengths in px of the source, intensities in units of the data.

    Attributes
    ----------
    radius
        Of the direct disc; None where no disc is found.
    why
        Why not, as a clause; empty otherwise.
    start
        (y, x) about which the beam was searched.
    plane
        Where the beam is expected: y, then x, each a0 + a1 v + a2 u, with v and u from -1 at the first to 1 at the last position
        of the scan.
    reach
        How far from the plane a beam can be, in y and in x.
    threshold
        Lowest value that counts.
    pedestal
        Constant that is taken off each pixel for the analysis; 0 without ``background="pedestal"``.
    level, noise
        Median and robust s.d. of the background per pixel; 0 for counted data without a background.
    flags
        (ky, kx) uint8: 1 given, 2 hot, 4 dead, 8 beam stop (only where it is applied), 16 not finite in any pattern of the sample.
    stop
        (ky, kx) bool: a dark region over the center, perhaps a beam stop, or None.
    scan_shape
        Of the whole scan, or (n,) of a list of patterns.
    hot_share
        Share of the intensity of the sample in suspected hot pixels.
    """

    radius: float | None
    why: str
    start: tuple[float, float]
    plane: tuple[Triple, Triple]
    reach: float
    threshold: float
    pedestal: float
    level: float
    noise: float
    flags: NDArray[np.uint8]
    stop: NDArray[np.bool_] | None
    scan_shape: tuple[int, ...]
    hot_share: float = 0.0

    @property
    def good(self) -> NDArray[np.bool_] | None:
        """(ky, kx) False where a pixel does not count, or None when all do."""
        return None if not self.flags.any() else self.flags == 0

    @property
    def suspected(self) -> NDArray[np.int64] | None:
        """(n, 2) [y, x] of the suspected hot and dead pixels, or None without any."""
        found = np.argwhere(self.flags & (HOT | DEAD))
        return found if len(found) else None

    def expected(self, positions: ArrayLike) -> NDArray[np.float64]:
        """Expected beam (n, 2) at scan positions (n, 2), or (n, 1) of a list of patterns.

        Examples
        --------
        >>> flags = np.zeros((8, 8), np.uint8)
        >>> found = Survey(2.5, "", (4, 4), ((4, 1, 0), (3, 0, 0.5)), 3, 0, 0, 0, 0, flags, None, (5, 3))
        >>> found.expected([[0, 0], [2, 1], [4, 1]]).tolist()
        [[3.0, 2.5], [4.0, 3.0], [5.0, 3.0]]
        """
        return _terms(positions, self.scan_shape) @ np.array(self.plane).T

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON holds; bad pixels are lists of [y, x] by kind."""
        plain = asdict(self)
        plain["flags"] = {
            kind: np.argwhere(self.flags & bit).tolist() for kind, bit in KINDS.items()
        }
        plain["stop"] = None if self.stop is None else np.argwhere(self.stop).tolist()
        return plain | {"detector": list(self.flags.shape)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Survey:
        """The survey that `to_dict` described."""
        values = dict(plain)
        detector = tuple(values.pop("detector"))
        flags = np.zeros(detector, np.uint8)
        for kind, pixels in values["flags"].items():
            flags |= np.uint8(KINDS[kind]) * _at(pixels, detector)
        values["flags"] = flags
        values["stop"] = None if values["stop"] is None else _at(values["stop"], detector)
        y, x = values["plane"]
        values |= {"plane": (tuple(y), tuple(x)), "start": tuple(values["start"])}
        return cls(**values | {"scan_shape": tuple(values["scan_shape"])})


def _at(pixels: Any, detector: tuple[int, ...]) -> NDArray[np.bool_]:
    mask = np.zeros(detector, np.bool_)
    mask[tuple(np.array(pixels, np.intp).reshape(-1, 2).T)] = True
    return mask


def _terms(positions: ArrayLike, scan_shape: tuple[int, ...]) -> NDArray[np.float64]:
    """1, v and u (n, 3) of scan positions; v and u are 0 for a list of patterns and for an axis of one position."""
    positions = np.asarray(positions, np.float64)
    terms = np.ones((len(positions), 3))
    if len(scan_shape) != 2:
        terms[:, 1:] = 0
        return terms
    last = np.array(scan_shape) - 1
    terms[:, 1:] = np.where(last > 0, 2 * positions / np.maximum(last, 1) - 1, 0)
    return terms


def survey_of(
    sample: NDArray,
    positions: ArrayLike,
    scan_shape: tuple[int, ...],
    *,
    given_mask: NDArray[np.bool_] | None = None,
    radius: float | None = None,
    start: tuple[float, float] | None = None,
    threshold: float | Literal["auto"] = 0.0,
    background: Literal["none", "pedestal"] = "none",
    find_bad: bool = True,
    find_disc: bool = True,
) -> Survey:
    """Survey a sample of patterns.

    Parameters
    ----------
    sample
        (n, ky, kx) of any real dtype.
    positions
        (n, 2) scan positions of the sample, or (n, 1) for a list of patterns.
    scan_shape
        Of the whole scan, or (n,) of a list of patterns, whose beams are expected at one place.
    given_mask
        (ky, kx) True where a pixel is known to be bad.
    radius
        Of the direct disc in px, if it is known; it is then refused only where fewer than half of the patterns have one.
    start
        (y, x) of the direct disc in px, if it is known.
    threshold
        Lowest value that counts; "auto" is 0 for counts and 4 s.d. above the background for other data.
    background
        "pedestal" takes a constant off each pixel.
    find_bad, find_disc
        Whether to look for hot and dead pixels, and for the disc.

    Returns
    -------
    Survey
        With ``radius`` None and ``why`` where no direct disc is found.

    Examples
    --------
    >>> y, x = np.mgrid[:32, :32]
    >>> disc = 90 * np.clip(5.5 - np.hypot(y - 15, x - 17), 0, 1)
    >>> found = survey_of(np.stack([disc] * 9).astype("u2"), [[i, j] for i in range(3) for j in range(3)], (3, 3))
    >>> round(found.radius), [round(float(c)) for c in found.expected([[1, 1]])[0]]
    (5, [15, 17])
    """
    sample, positions = native(np.asarray(sample)), np.asarray(positions)
    n = len(sample)
    sums, lit, totals, odd = _sums(sample)

    flags = np.where(odd == n, NOT_FINITE, 0).astype(np.uint8)
    if given_mask is not None:
        flags |= np.where(given_mask, GIVEN, 0).astype(np.uint8)
    if find_bad and n:
        good = flags == 0
        hot = hot_pixels(np.where(good, sums, 0) / n, np.where(good, lit, 0), n, n)
        dead = dead_pixels(np.where(good & ~hot, sums, 0), np.where(good & ~hot, lit, 0), n)
        flags |= np.where(hot, HOT, np.where(dead & good, DEAD, 0)).astype(np.uint8)
    good = flags == 0
    if not good.all():
        totals -= [_clean(pattern[~good]).sum() for pattern in sample]

    search = _Search(sample, positions, scan_shape, good, totals, sums / max(n, 1), radius)
    search.background()
    search.find_start(start)
    if find_disc:
        search.find_disc()
    else:
        search.radius = radius
    if search.radius is not None:
        search.background()
    elif search.is_symmetric and start is None:
        # the brightest place is no beam: perhaps the edge of a beam stop
        search.start = search.symmetric = tuple(map(float, search.symmetric))
        search.constant(search.start)
    counted = search.level == 0 and search.noise == 0
    if threshold == "auto":
        threshold = 0.0 if counted else max(0.0, search.level + 4 * search.noise)
    return Survey(
        radius=search.radius,
        why=search.why,
        start=search.start,
        plane=search.plane,
        reach=search.reach,
        threshold=float(threshold),
        pedestal=max(0.0, search.level) if background == "pedestal" else 0.0,
        level=search.level,
        noise=search.noise,
        flags=flags,
        stop=stop_region(search.mean, good, search.symmetric) if find_bad and n else None,
        scan_shape=tuple(int(size) for size in scan_shape),
        hot_share=float(sums[(flags & HOT) > 0].sum() / max(float(sums.sum()), 1e-300)),
    )


def needs_survey(
    *,
    center_method: str,
    threshold: float | str,
    background: str,
    disc_radius: float | None,
    ignore_bad_pixels: bool,
    guess: Sequence[float] | None = None,
) -> bool:
    """Whether options of an analysis depend on a sample of the patterns."""
    finds = center_method in ("auto", "disc", "friedel") or disc_radius is not None
    return finds or threshold == "auto" or background != "none" or ignore_bad_pixels


def survey_sample(
    sample: NDArray,
    where: Sequence[Sequence[int]],
    scan_shape: Sequence[int],
    *,
    center_method: str = "auto",
    threshold: float | Literal["auto"] = 0.0,
    background: Literal["none", "pedestal"] = "none",
    disc_radius: float | None = None,
    ignore_bad_pixels: bool = True,
    guess: tuple[float, float] | None = None,
    given_mask: NDArray[np.bool_] | None = None,
    apply_stop: bool = False,
    device: str = "cpu",
) -> Survey:
    """`survey_of` a sample (…, ky, kx) with the indices of its positions along each scan axis, for the options of an analysis.

    With ``apply_stop`` a dark region over the center counts as a beam stop, whose pixels are bad.
    """
    grid = np.meshgrid(*where, indexing="ij")
    found = survey_of(
        sample.reshape(-1, *sample.shape[-2:]),
        np.stack([one.ravel() for one in grid], axis=-1),
        tuple(scan_shape),
        given_mask=given_mask,
        radius=disc_radius if device == "cpu" else None,
        start=guess,
        threshold=threshold,
        background=background,
        find_bad=ignore_bad_pixels,
        find_disc=device == "cpu" and center_method != "friedel",
    )
    if device != "cpu":
        found = replace(found, why="the GPU does not find discs yet")
    if found.stop is not None:  # its pixels are not dead
        flags = found.flags & ~np.where(found.stop, DEAD, 0).astype(np.uint8)
        flags |= np.where(found.stop, STOP if apply_stop else 0, 0).astype(np.uint8)
        found = replace(found, flags=flags)
    if center_method == "friedel":
        check_friedel(found)
        mean = np.zeros(found.flags.shape)
        for pattern in sample.reshape(-1, *mean.shape):
            mean += _clean(native(pattern[None])[0])
        best = symmetry(mean, found.good)
        y, x = np.unravel_index(int(best.argmax()), best.shape)
        near = guess or (float(y) / 2, float(x) / 2)
        found = replace(found, start=center_of_symmetry(mean, near, found.good))
    return found


def check_friedel(survey: Survey) -> None:
    """Raise ConfigError unless the beam stop is masked."""
    if not (survey.flags & (GIVEN | STOP)).any():
        raise ConfigError(
            "center_method is friedel, and no beam stop is masked: it would count as dark on one side; give input.mask, or "
            "input.mask=stop if the survey finds the stop"
        )


def survey(
    patterns: Any,
    *,
    center_method: str = "auto",
    threshold: float | Literal["auto"] = 0.0,
    background: Literal["none", "pedestal"] = "none",
    disc_radius: float | None = None,
    ignore_bad_pixels: bool = True,
    guess: tuple[float, float] | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> Survey:
    """Read a sample of at most 256 patterns, and find bad pixels, background, direct disc and where to expect it.

    Parameters
    ----------
    patterns : (scan_y, scan_x, ky, kx) or (pattern, ky, kx); see `stem_dask.analyze`
    center_method : of the analysis that follows; ``friedel`` needs a mask
    threshold : in counts, or ``auto``: four standard deviations above the level of the background
    background : ``pedestal`` to subtract that level in the analysis
    disc_radius : of the direct disc in px; None measures it
    ignore_bad_pixels : whether to look for hot and dead pixels
    guess : (y, x) in px near the direct beam
    mask : (ky, kx), True where a pixel is known to be bad

    Returns
    -------
    Survey

    Examples
    --------
    >>> import numpy as np
    >>> y, x = np.mgrid[:32, :32]
    >>> data = np.tile(50 * ((y - 14) ** 2 + (x - 17) ** 2 <= 25), (3, 4, 1, 1)).astype("u2")
    >>> found = survey(data)
    >>> round(found.radius, 1), [round(c) for c in found.start]
    (5.0, [14, 17])
    """
    options: dict[str, Any]
    options = {
        "center_method": center_method,
        "threshold": threshold,
        "background": background,
        "disc_radius": disc_radius,
    }
    options |= {"ignore_bad_pixels": ignore_bad_pixels, "guess": guess, "given_mask": mask}
    return survey_patterns(patterns_of(patterns), **options)


def survey_patterns(patterns: xr.DataArray, **options: Any) -> Survey:
    """`survey_sample` of lazy patterns, of which only the sample is read."""
    import dask

    lead, data = lead_shape(patterns), blocks_of(patterns)
    where = sample_positions(lead)
    picked = [data[tuple(slice(i, i + 1) for i in index)] for index in itertools.product(*where)]
    sample = np.concatenate([np.asarray(one) for one in dask.compute(*picked)])
    return survey_sample(sample, where, lead, **options)


def resolved_method(center_method: str, survey: Survey | None, device: str = "cpu") -> str:
    """The method that ``auto`` stands for: ``disc`` where the survey found a direct disc, else ``centroid``."""
    if center_method != "auto":
        return center_method
    has_disc = survey is not None and survey.radius is not None and survey.stop is None
    return "disc" if has_disc and device == "cpu" else "centroid"


def refuse_no_disc(survey: Survey, center_method: str) -> None:
    """Raise ConfigError if ``disc`` was asked for and the survey found none."""
    if center_method == "disc" and survey.radius is None:
        raise ConfigError(
            f"center_method is disc, and no direct disc is found: {survey.why}; give analyze.disc_radius in px (perhaps "
            "analyze.guess: [y, x]), or use analyze.center_method=centroid"
        )


def _clean(pattern: NDArray) -> NDArray[np.float64]:
    values = pattern.astype(np.float64)
    if pattern.dtype.kind != "u":
        values[~(np.isfinite(values) & (values > 0))] = 0
    return values


def _sums(sample: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Sum of the sample, in how many patterns each pixel is above 0, the patterns' totals, how often each pixel is not finite."""
    detector, totals = sample.shape[1:], np.zeros(len(sample))
    sums, lit, odd = np.zeros(detector), np.zeros(detector, np.int64), np.zeros(detector, np.int64)
    for i, pattern in enumerate(sample):
        values = _clean(pattern)
        sums += values
        lit += values > 0
        totals[i] = values.sum()
        if pattern.dtype.kind == "f":
            odd += ~np.isfinite(pattern)
    return sums, lit, totals, odd


class _Search:
    """The search for the direct disc in a sample, and what is found on the way."""

    def __init__(
        self,
        sample: NDArray,
        positions: NDArray,
        scan_shape: tuple[int, ...],
        good: NDArray[np.bool_],
        totals: NDArray[np.float64],
        mean: NDArray[np.float64],
        radius: float | None,
    ) -> None:
        self.sample, self.positions, self.scan_shape, self.good = (
            sample,
            positions,
            scan_shape,
            good,
        )
        self.totals, self.mean, self.given = totals, mean, radius
        self.filled = totals > 0
        self.radius: float | None = None
        self.why = ""
        self.start = self.symmetric = tuple((n - 1) / 2 for n in good.shape)
        self.constant(self.start)
        self.is_symmetric = False
        self.reach = 3.0 if radius is None else min(3.0, radius)
        self.level = self.noise = 0.0

    def constant(self, center: Any) -> None:
        y, x = (float(c) for c in center)
        self.plane: tuple[Triple, Triple] = ((y, 0.0, 0.0), (x, 0.0, 0.0))

    def expected(self) -> NDArray[np.float64]:
        return _terms(self.positions, self.scan_shape) @ np.array(self.plane).T

    def some(self) -> NDArray[np.intp]:
        """At most `SOME` of the patterns that are not empty, evenly taken."""
        filled = np.flatnonzero(self.filled)
        return filled[:: max(1, -(-len(filled) // SOME))]

    def background(self) -> None:
        """Level and noise of the darker half of the pixels, off the disc."""
        if not self.good.any() or not len(self.sample):
            return
        dark = self.good & (self.mean <= np.median(self.mean[self.good]))
        if self.radius is not None:
            y, x = np.ogrid[: self.good.shape[0], : self.good.shape[1]]
            beam_y, beam_x = self.plane[0][0], self.plane[1][0]
            off = dark & ((y - beam_y) ** 2 + (x - beam_x) ** 2 > (3 * self.radius) ** 2)
            dark = off if off.any() else dark
        step = max(1, -(-len(self.sample) * int(dark.sum()) // SOME_VALUES))
        values = self.sample[::step, dark].ravel()
        if values.dtype.kind == "f":
            values = values[np.isfinite(values)]
        if not values.size:
            return
        level = float(np.median(values))
        if (
            values.dtype.kind != "f"
            and level == 0
            and not (values.dtype.kind == "i" and self.sample.min() < 0)
        ):
            self.level = self.noise = 0.0
            return
        self.level = level
        self.noise = 1.4826 * float(np.median(np.abs(values - np.float64(level))))

    def find_start(self, given: tuple[float, float] | None) -> None:
        """A disc near the center of symmetry of the mean pattern, or the brightest."""
        from scipy import ndimage

        if not self.filled.any():
            self.why = "all patterns of the sample are empty"
            if given is not None:
                self.start = (float(given[0]), float(given[1]))
                self.constant(self.start)
            return
        chosen = self.some()
        shares = np.stack([_clean(self.sample[i]) / self.totals[i] for i in chosen]).astype("f4")
        usual = np.median(shares, axis=0)
        most = 4 * usual + 6 / np.median(self.totals[self.filled])
        mean = np.zeros(self.good.shape)
        for i in np.flatnonzero(self.filled):
            mean += np.minimum(_clean(self.sample[i]) / self.totals[i], most)
        mean[~self.good] = 0
        found = symmetry(np.sqrt(mean), self.good)
        at = np.unravel_index(int(found.argmax()), found.shape)
        self.symmetric, self.is_symmetric = (at[0] / 2, at[1] / 2), bool(found[at] > 0.7)
        filled_in = filled(mean, self.good)
        self.rough = self.given or first_radius(filled_in)
        if given is not None:
            self.start = (float(given[0]), float(given[1]))
        else:
            half = max(1, round(0.7 * self.rough))
            box = ndimage.uniform_filter(filled_in, 2 * half + 1, mode="constant")
            highest = ndimage.maximum_filter(box, 2 * half + 1, mode="constant")
            discs = np.argwhere((box == highest) & (box > box.max() / 4))
            brightest = np.unravel_index(int(box.argmax()), box.shape)
            off = np.hypot(*(discs - np.array(self.symmetric)).T)
            near = off.size and off.min() <= max(2, self.rough / 2) and self.is_symmetric
            self.start = tuple(float(c) for c in (discs[off.argmin()] if near else brightest))
        self.constant(self.start)

    def find_disc(self) -> None:
        """Radius of the disc, plane of the beams and reach; or why not."""
        if not self.filled.any():
            return
        radius = self.given
        if radius is None:
            areas = [
                area_radius(filled(_clean(self.sample[i]), self.good), self.start, self.rough, 2.6 * self.rough + 2)
                for i in self.some()
            ]  # fmt: skip
            radius = self.by_area = float(np.median(areas))
            if not self.big_enough(radius):
                return
        # near the start, where no brighter disc of a crystal is; farther out only if that is too near; then about ever better planes
        _, found = self.fit(radius, radius + 2, 0)
        rounds = [(1, 1.0)] * 6
        if found.sum() < 0.75 * self.filled.sum():
            self.constant(self.start)
            rounds = [(0, 2.6), (1, 2.6), (1, 2.0), (1, 1.3), *rounds]
        for order, factor in rounds:
            s, found = self.fit(radius, factor * radius + 2, order)
            if not found.any():
                break
            if self.given is not None or order == 0:
                continue
            change, _ = self.rims(radius, found)
            radius += change
            if not self.big_enough(radius):
                return
            if factor == 1 and abs(change) < 0.05:
                break
        if not self.believable(radius, found):
            self.constant(self.start)
            return
        self.radius = float(radius)
        self.reach = float(min(max(3, 4 * s), radius))

    def big_enough(self, radius: float) -> bool:
        if radius >= SMALLEST_RADIUS:
            return True
        self.why = (
            f"its radius would be {radius:.1f} px, expected at least {SMALLEST_RADIUS:g}"
            if radius > 0
            else "most patterns have no bright spot near the center"
        )
        return False

    def fit(self, radius: float, reach: float, order: int) -> tuple[float, NDArray[np.bool_]]:
        """Find the beams about the plane and fit it anew; their s.d., and which were found."""
        filled = self.filled
        beams = find_discs(
            self.sample, self.expected(), radius=radius, reach=reach, good=self.good, level=self.level
        )  # fmt: skip
        self.beams = beams.center
        found = filled & np.isfinite(beams.spread)
        if not found.any():
            return 0.0, found
        if len(self.scan_shape) != 2:
            order = 0
        rows = [
            np.unique(self.positions[:, k], return_inverse=True)
            for k in range(self.positions.shape[1])
        ]
        axes, at = [row[0] for row in rows], tuple(row[1] for row in rows)
        if len(axes) == 1:
            axes, at = [np.zeros(1), axes[0]], (np.zeros(len(self.sample), np.intp), at[0])
        grid = np.full((3, len(axes[0]), len(axes[1])), np.nan)
        grid[:, at[0], at[1]] = [*beams.center.T, descan_weight(beams.spread)]
        grid[2, ~np.isfinite(grid[0])] = 0
        if len(self.scan_shape) == 2:
            axes = [
                _terms(np.stack([axis, axis], axis=1), (size, size))[:, 1]
                for axis, size in zip(axes, self.scan_shape, strict=True)
            ]
        for possible in range(order, -1, -1):
            try:
                fit = fit_descan(*grid, order=possible, v=axes[0], u=axes[1])
            except ValueError:
                continue
            y, x = np.zeros((2, 3))
            y[: fit.coefficients.shape[1]], x[: fit.coefficients.shape[1]] = fit.coefficients
            self.plane = (tuple(map(float, y)), tuple(map(float, x)))  # type: ignore[assignment]
            return fit.s, found
        middle = np.median(beams.center[found], axis=0)
        self.constant(middle)
        off = np.hypot(*(beams.center[found] - middle).T)
        return float(np.median(off)) / 1.1774, found

    def rims(self, radius: float, found: NDArray[np.bool_]) -> tuple[float, float]:
        """Median displacement of the rims that are seen in 60 % of the sectors, and the share of the patterns whose rim lies where
        their disc does."""
        if not found.any():
            return 0.0, 0.0
        rims = fit_rims(self.sample[found], self.beams[found], radius, self.good)
        clear = rims[:, 3] >= 0.6 * (32 if radius >= 20 else 16)
        change = float(np.median(rims[clear, 2])) if clear.any() else 0.0
        off = np.hypot(*(rims[:, :2] - self.beams[found]).T)
        agree = clear & (off < AGREES) & (np.abs(rims[:, 2]) < AGREES)
        return change, float(agree.sum() / self.filled.sum())

    def believable(self, radius: float, found: NDArray[np.bool_]) -> bool:
        """Whether half of the patterns have a disc; and unless its radius is given, whether the mean of the patterns, moved onto one place, has
        one of this radius, and half of the patterns have its rim."""
        share = found.sum() / self.filled.sum()
        if share < 0.5:
            self.why = (
                f"{share:.0%} of the patterns have a disc of radius {radius:.1f} px, expected 50%"
            )
        if share < 0.5 or self.given is not None:
            return share >= 0.5
        half = int(4 * radius) + 8
        moved = np.zeros((2, 2 * half + 1, 2 * half + 1))
        places = np.rint(self.expected()).astype(np.intp)
        for i in np.flatnonzero(self.filled):
            top, left = places[i] - half
            to = tuple(
                slice(max(0, -start), max(min(2 * half + 1, size - start), 0))
                for start, size in zip((top, left), self.good.shape, strict=True)
            )
            of = tuple(
                slice(max(0, start), max(0, start) + part.stop - part.start)
                for start, part in zip((top, left), to, strict=True)
            )
            if to[0].start < to[0].stop and to[1].start < to[1].stop:
                moved[0][to] += _clean(self.sample[i][of]) * self.good[of] / self.totals[i]
                moved[1][to] += self.good[of]
        mean = np.divide(moved[0], moved[1], out=np.zeros_like(moved[0]), where=moved[1] > 0)
        together = area_radius(filled(mean, moved[1] > 0), (half, half), radius, radius + 2)
        for each in (self.by_area, radius):
            if abs(each - together) > 0.15 * together:
                self.why = (
                    f"the patterns give a radius of {each:.1f} px, but their mean {together:.1f} px"
                )
                return False
        _, agree = self.rims(radius, found)
        if agree < 0.5:
            self.why = f"{agree:.0%} of the patterns have the rim of a disc of radius {radius:.1f} px, expected 50%"
        return agree >= 0.5


def filled(image: NDArray[np.float64], good: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Bad pixels take the mean of the good ones within 3 px."""
    if good.all():
        return image
    from scipy import ndimage

    share = ndimage.uniform_filter(good.astype(np.float64), 7, mode="constant")
    around = ndimage.uniform_filter(np.where(good, image, 0), 7, mode="constant")
    return np.where(good, image, around / np.maximum(share, 1 / 98))


def first_radius(image: NDArray[np.float64]) -> float:
    """Radius of the brightest disc of an image, from a small box on."""
    radius = 1.0
    for _ in range(4):
        radius = max(1.0, area_radius(image, None, radius, np.inf))
    return radius


def area_radius(
    image: NDArray[np.float64], near: tuple[float, float] | None, radius: float, reach: float
) -> float:
    """sqrt(area / pi) of the connected part above half of the level of the brightest box, at most ``reach`` from ``near``.

    The box has half of the radius as half side; the image is smoothed over 3 x 3 pixels.
    """
    from scipy import ndimage

    half = max(1, round(0.5 * radius))
    if near is not None:
        # no more than can matter
        margin = int(reach + 3 * radius) + 8
        top, left = (max(0, int(c) - margin) for c in near)
        image = image[top : int(near[0]) + margin + 1, left : int(near[1]) + margin + 1]
        near = (near[0] - top, near[1] - left)
    box = ndimage.uniform_filter(image, 2 * half + 1, mode="constant")
    if near is not None:
        y, x = np.ogrid[: image.shape[0], : image.shape[1]]
        box = np.where((abs(y - near[0]) <= reach) & (abs(x - near[1]) <= reach), box, 0)
    at = np.unravel_index(int(box.argmax()), box.shape)
    if not box[at] > 0:
        return 0.0
    parts, _ = ndimage.label(ndimage.uniform_filter(image, 3, mode="constant") > box[at] / 2)
    if parts[at] == 0:
        return 0.0
    part = ndimage.binary_fill_holes(parts == parts[at])
    return float(np.sqrt(part.sum() / np.pi))

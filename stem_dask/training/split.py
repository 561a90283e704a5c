"""Training, validation and test parts of scans: neighbours on a scan look alike, so parts are blocks with a guard between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from stem_dask.core.errors import ConfigError
from stem_dask.core.text import by as times

BY = ("blocks", "rows", "datasets", "random")

#: values of a mask
TRAIN, VAL, TEST, GUARD, LEFT_OUT = 0, 1, 2, 3, 255

#: a share may differ from what was asked by this much of it
SLACK = 0.2

#: blocks that a part consists of by default, if the scan is large enough
BLOCKS = 4

#: random orders of blocks that are tried
TRIES = 20

#: distances and anchors at which correlations are sampled
DISTANCES, ANCHORS = 16, 16

#: validation patterns that are compared with their nearest training pattern
COMPARED = 300

Mask = NDArray[np.uint8]

#: logarithms of the counts of some positions of a scan, (number of the scan, positions row by row) -> (n, pixels)
Logs = Callable[[int, NDArray[np.int64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Split:
    """All that a split depends on besides the data; see `PatternDataset.split`."""

    by: str
    val: float
    test: float
    block: int
    guard: int
    seed: int


def settled(
    kept: Sequence[NDArray[np.bool_]],
    by: str,
    val: float,
    test: float,
    block: int | None,
    guard: int | None,
    seed: int,
    logs: Logs,
    mean: NDArray[np.float64] | None,
) -> Split:
    """A split with a block and a guard, where they are not given; raises ConfigError when the scans are too small for it.

    ``kept`` are the positions of each scan that are yielded.
    """
    if by not in BY:
        raise ConfigError(f"by is {by!r}; expected one of {', '.join(BY)}")
    if not (0 <= val < 1 and 0 <= test < 1 and 0 < val + test < 1):
        raise ConfigError(
            f"val is {val} and test {test}; expected shares of 0 or more that leave a part for training"
        )
    for name, value, least in (("block", block, 1), ("guard", guard, 0), ("seed", seed, 0)):
        if value is not None and (not hasattr(value, "__index__") or value < least):
            raise ConfigError(f"{name} is {value}; expected a whole number, {least} or more")
    if by == "datasets" and len(kept) < 2:
        raise ConfigError("by='datasets' needs several files; there is one: set by='blocks'")
    if by in ("datasets", "random"):
        split = Split(by, val, test, 1, 0, seed)
        if masks(kept, split) is None:
            what = (
                f"{len(kept)} files" if by == "datasets" else f"{sum(map(np.sum, kept)):,} patterns"
            )
            raise ConfigError(f"{what} are too few for val {val:g} and test {test:g} beside a part for training; change val or test")  # fmt: skip
        return split
    largest = max(kept, key=np.size).shape
    shares = [share for share in (val, test) if share]
    sizes = [block] if block is not None else _blocks(largest, min(shares), by)
    distance: int | None = None
    for size in sizes:
        most = max(1, size // 2)
        if guard is None:
            distance = (
                _distance(kept, min(most, DISTANCES), logs, mean) if distance is None else distance
            )
        near = min(distance, most) if guard is None and distance is not None else guard
        split = Split(by, val, test, size, near or 0, seed)
        if masks(kept, split) is not None:
            return split
    tile = f"blocks of {sizes[0] if block is not None else 1} and a guard of {split.guard}"
    other = "rows" if by == "blocks" else "blocks"
    raise ConfigError(
        f"a scan of {times(largest)} positions is too small for {tile} (val {val:g}, test {test:g}); set by='{other}' or by='random', "
        "or other values of block, guard and val"
    )


def _blocks(shape: tuple[int, ...], share: float, by: str) -> list[int]:
    """Sides of a block to try: first such that `BLOCKS` of them are the share, then smaller ones."""
    height, width = shape
    sides = range(max(shape), 0, -1)
    areas = (min(n, height) * (width if by == "rows" else min(n, width)) for n in sides)
    few = (
        n for n, area in zip(sides, areas, strict=True) if BLOCKS * area <= share * height * width
    )
    first = next(few, 1)
    found = [first]
    while found[-1] > 1:
        found.append(max(1, found[-1] * 7 // 10))
    return found


def masks(kept: Sequence[NDArray[np.bool_]], split: Split) -> list[Mask] | None:
    """The mask of each scan; None when no choice of blocks has the shares, or nothing is left for training."""
    labels, n = [], 0
    for one in kept:
        y, x = np.indices(one.shape)
        if split.by == "random":
            label = np.arange(one.size).reshape(one.shape)
        elif split.by == "datasets":
            label = np.zeros(one.shape, np.int64)
        else:
            across = one.shape[1] if split.by == "rows" else split.block
            label = y // split.block * -(-one.shape[1] // across) + x // across
        labels.append(label + n)
        n += int(label.max()) + 1
    counts = np.bincount(
        np.concatenate([a[k] for a, k in zip(labels, kept, strict=True)]), minlength=n
    )
    rng, part_of = np.random.default_rng([split.seed, n]), np.full(n, TRAIN, np.uint8)
    for part, share in ((VAL, split.val), (TEST, split.test)):
        if not share:
            continue
        slack = np.inf if split.by == "datasets" else SLACK  # files are as large as they are
        chosen = _chosen(rng, np.where(part_of == TRAIN, counts, 0), share * counts.sum(), slack)
        if chosen is None:
            return None
        part_of[chosen] = part
    found = [
        np.where(one, part_of[label], LEFT_OUT).astype(np.uint8)
        for label, one in zip(labels, kept, strict=True)
    ]
    for mask in found:
        if split.guard:
            near = ndimage.maximum_filter(
                (mask == VAL) | (mask == TEST), size=2 * split.guard + 1, mode="constant"
            )
            mask[near & (mask == TRAIN)] = GUARD
    return found if any((mask == TRAIN).any() for mask in found) else None


def _chosen(
    rng: np.random.Generator, counts: NDArray, wanted: float, slack: float
) -> NDArray | None:
    """Numbers of blocks that together have about as many patterns as wanted; None if no order of blocks gives that."""
    best, least = None, np.inf
    for _ in range(TRIES):
        order = rng.permutation(np.flatnonzero(counts))
        totals = np.cumsum(counts[order])
        stop = int(np.abs(totals - wanted).argmin()) + 1 if totals.size else 0
        away = abs(float(totals[stop - 1]) - wanted) if stop else np.inf
        if away < least:
            best, least = order[:stop], away
        if least <= SLACK * wanted / 10:
            break
    return best if least <= slack * wanted else None


def _distance(
    kept: Sequence[NDArray[np.bool_]], most: int, logs: Logs, mean: NDArray[np.float64] | None
) -> int:
    """First distance, at most ``most``, at which patterns correlate below 0.5, sampled along both axes of the scan."""
    for distance in range(1, most):
        found = []
        for number, one in enumerate(kept):
            there = np.flatnonzero(one)
            some = np.linspace(0, there.size - 1, min(ANCHORS, there.size)).astype(int)
            anchors = there[some]
            for step in ((distance, 0), (0, distance)):
                y, x = np.unravel_index(anchors, one.shape)
                y, x = y + step[0], x + step[1]
                inside = (y < one.shape[0]) & (x < one.shape[1])
                inside[inside] = one[y[inside], x[inside]]
                other = np.ravel_multi_index((y[inside], x[inside]), one.shape)
                if other.size:
                    found.append(_cosines(logs(number, anchors[inside]), logs(number, other), mean))
        if not found or np.concatenate(found).mean() < 0.5:
            return distance
    return most


def leak(found: Sequence[Mask], logs: Logs, mean: NDArray[np.float64]) -> float | None:
    """Mean cosine of validation patterns with their nearest training pattern in the scan, without the mean pattern.

    At most `COMPARED` evenly spaced validation patterns; None when no scan has both.
    """
    val, train = ([np.argwhere(mask == part) for mask in found] for part in (VAL, TRAIN))
    places = [(i, *place) for i, some in enumerate(val) if len(train[i]) for place in some]
    trees, cosines = [cKDTree(one) if len(one) else None for one in train], []
    for k in np.linspace(0, len(places) - 1, min(COMPARED, len(places))).astype(int):
        number, *place = places[k]
        away, _ = trees[number].query(place)  # the first of those that are equally near
        nearest = train[number][min(trees[number].query_ball_point(place, away + 1e-6))]
        pair = np.ravel_multi_index(tuple(np.transpose([place, nearest])), found[number].shape)
        # one pair at a time, because logarithms of large patterns take memory
        a, b = logs(number, np.asarray(pair))
        cosines.append(_cosines(a[None], b[None], mean))
    return float(np.concatenate(cosines).mean()) if cosines else None


def _cosines(
    a: NDArray[np.float64], b: NDArray[np.float64], mean: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Cosine of each pair of patterns (n, pixels), without the mean pattern if it is given."""
    middle = 0.0 if mean is None else mean.ravel()
    a, b = a - middle, b - middle
    norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)

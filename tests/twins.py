"""Slow, obvious twins of the kernels, written from the definitions: loops and explicit sums, one pattern at a time.

Integers stay Python integers, so their sums are exact; floats are added by ``math.fsum``.
"""

import math

import numpy as np

#: options of an analysis by centers of mass in which every pixel counts: it reads no sample
PLAIN = {"center_method": "centroid", "ignore_bad_pixels": False}


def intensity(pattern, threshold=0.0):
    """What counts of a pattern: NaN, infinite and negative values, and values below the threshold, become 0."""
    kept = np.zeros(pattern.shape, object)
    for at, value in np.ndenumerate(pattern):
        value = value.item()
        if math.isfinite(value) and value >= 0 and value >= threshold:
            kept[at] = int(value) if isinstance(value, bool) else value
    return kept


def odd_pixels(pattern, threshold=0.0):
    """How many are NaN, infinite, negative, and above 0 but below the threshold; and the sum of the negative ones."""
    values = [value.item() for value in pattern.ravel()]
    finite = [value for value in values if math.isfinite(value)]
    negative = [value for value in finite if value < 0]
    counts = [
        sum(math.isnan(value) for value in values),
        sum(math.isinf(value) for value in values),
        len(negative),
        sum(0 < value < threshold for value in finite),
    ]
    return counts, -add(np.array(negative, object))


def add(values):
    """Exact sum of integers; correctly rounded sum of floats."""
    values = list(np.ravel(values))
    return math.fsum(values) if any(isinstance(value, float) for value in values) else sum(values)


def logs(pattern):
    """Mean and standard deviation of log(1 + x) over all pixels; NaN when a value is negative, infinite or NaN."""
    values = [value.item() for value in pattern.ravel()]
    if not all(math.isfinite(value) and value >= 0 for value in values):
        return math.nan, math.nan
    found = [math.log1p(value) for value in values]
    mean = math.fsum(found) / len(found)
    return mean, math.sqrt(math.fsum((one - mean) ** 2 for one in found) / len(found))


def centroid(counted):
    """Center of mass (y, x); NaN when there is no intensity."""
    total = add(counted)
    if total == 0:
        return math.nan, math.nan
    y = add([row * add(counted[row, :]) for row in range(counted.shape[0])])
    x = add([col * add(counted[:, col]) for col in range(counted.shape[1])])
    return y / total, x / total


def window_center(center):
    """Nearest pixel, half to even."""
    return int(np.rint(center[0])), int(np.rint(center[1]))


def within(counted, center, radius, metric):
    """Intensity inside the window of half-size `radius` cut at the detector edge, or inside the disc."""
    ry, rx = center
    if metric == "square":
        top, left = max(ry - radius, 0), max(rx - radius, 0)
        return add(counted[top : max(ry + radius, 0), left : max(rx + radius, 0)])
    y, x = np.indices(counted.shape)
    return add(counted[(y - ry) ** 2 + (x - rx) ** 2 <= radius**2])


def profile(counted, center, n_radii, metric):
    """Share of the intensity inside each radius 0 … n_radii - 1."""
    total = add(counted)
    return [within(counted, center, r, metric) / total for r in range(n_radii)]


def retention_radius(counted, center, target, metric):
    """Smallest radius (from 1 for squares, 0 for circles) that holds at least the target."""
    total = add(counted)
    radius = 1 if metric == "square" else 0
    while not within(counted, center, radius, metric) >= target * total:
        radius += 1
    return radius


def covering_radius(radii, coverage):
    """Smallest integer with at least ceil(coverage * n) radii at or below it."""
    wanted = math.ceil(coverage * len(radii))
    radius = 0
    while sum(r <= radius for r in radii) < wanted:
        radius += 1
    return radius


class Analysis:
    """What is known of a stack of patterns (n, ky, kx), one by one."""

    def __init__(self, patterns, *, target, threshold=0.0, metric="square", given=None):
        self.detector = patterns.shape[1:]
        self.counted = [intensity(pattern, threshold) for pattern in patterns]
        self.totals = [add(counted) for counted in self.counted]
        self.com = [centroid(counted) for counted in self.counted]
        self.centers = self.com if given is None else [given] * len(patterns)
        self.filled = [total > 0 for total in self.totals]
        self.radii = [
            retention_radius(counted, window_center(center), target, metric) if filled else None
            for counted, center, filled in zip(self.counted, self.centers, self.filled, strict=True)
        ]

    def median_center(self):
        """``rint`` of the componentwise median center of the patterns that are not empty."""
        kept = [c for c, filled in zip(self.centers, self.filled, strict=True) if filled]
        return window_center(np.median(np.array(kept), axis=0))

    def global_radius(self, coverage, align):
        """R0: covers the patterns' own windows around themselves, or around the one fixed center."""
        middle = self.median_center()
        needed = []
        for radius, center in zip(self.radii, self.centers, strict=True):
            if radius is not None:
                ry, rx = window_center(center)
                away = max(abs(ry - middle[0]), abs(rx - middle[1]))
                needed.append(radius + away if align == "fixed" else radius)
        return covering_radius(needed, coverage)

    def window(self, radius, align, allowed):
        """(first, end) of the rows and columns of the window at the median center.

        Rows are added one by one until their number is allowed. A fixed window has no rows outside of the detector.
        """
        found = []
        for middle, full in zip(self.median_center(), self.detector, strict=True):
            first, end = middle - radius, middle + radius
            if align == "fixed":
                first, end = max(first, 0), min(end, full)
            at_end = True
            while not allowed(end - first) and end - first < full:
                if align == "fixed" and end == full:
                    at_end = False
                elif align == "fixed" and first == 0:
                    at_end = True
                first, end = (first, end + 1) if at_end else (first - 1, end)
                at_end = not at_end
            found.append((first, end) if end - first < full else (0, full))
        return found

    def origins(self, window, align):
        """First row and column of the window on every pattern."""
        found = []
        for center, filled in zip(self.centers, self.filled, strict=True):
            origin = []
            for i, (first, end) in enumerate(window):
                own = align == "pattern" and filled and end - first < self.detector[i]
                origin.append(window_center(center)[i] - (end - first) // 2 if own else first)
            found.append(tuple(origin))
        return found


def is_fast(n, factor):
    """Whether a size is, after downsampling, even with no prime factor above 7."""
    n, rest = divmod(n, factor)
    even = rest == 0 and n % 2 == 0
    for prime in (2, 3, 5, 7):
        while n > 0 and n % prime == 0:
            n //= prime
    return even and n == 1


def crop(pattern, origin, shape):
    """The window that starts at `origin`; 0 outside the detector."""
    out = np.zeros(shape, pattern.dtype)
    for y in range(shape[0]):
        for x in range(shape[1]):
            row, col = origin[0] + y, origin[1] + x
            if 0 <= row < pattern.shape[0] and 0 <= col < pattern.shape[1]:
                out[y, x] = pattern[row, col]
    return out


def filled_fraction(origin, shape, detector):
    """Share of the window's pixels that lie outside the detector."""
    outside = 0
    for y in range(origin[0], origin[0] + shape[0]):
        for x in range(origin[1], origin[1] + shape[1]):
            outside += not (0 <= y < detector[0] and 0 <= x < detector[1])
    return outside / (shape[0] * shape[1])


def _first(pattern, k):
    height, width = pattern.shape[0] // k, pattern.shape[1] // k
    return pattern[: k * height, : k * width], height, width


def bin_pattern(pattern, k, reduce):
    """Mean or sum of each block of k × k pixels; sums of integers are Python integers."""
    part, height, width = _first(pattern, k)
    out = np.zeros((height, width), object)
    for y in range(height):
        for x in range(width):
            values = [v.item() for v in part[k * y : k * y + k, k * x : k * x + k].ravel()]
            out[y, x] = add(np.array(values, object)) / (k * k if reduce == "mean" else 1)
    return out


def stride_pattern(pattern, k):
    """Every k-th pixel."""
    part, height, width = _first(pattern, k)
    return np.array([[part[k * y, k * x] for x in range(width)] for y in range(height)])


def gauss_pattern(pattern, k, sigma=None):
    """Weighted means with exp(-d² / 2 sigma²) out to 4 sigma, mirrored at the edge, then every k-th."""
    sigma = 0.5 * k if sigma is None else sigma
    part, _, _ = _first(pattern.astype(np.float64), k)
    reach = int(4 * sigma + 0.5)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    mirrored = np.pad(part, reach, mode="symmetric")
    smooth, size = np.empty(part.shape), 2 * reach + 1
    for y, x in np.ndindex(part.shape):
        smooth[y, x] = weights @ mirrored[y : y + size, x : x + size] @ weights
    return stride_pattern(smooth, k)


def fft_pattern(pattern, k):
    """Fourier series with the lowest frequencies only, evaluated at every k-th pixel."""
    part, height, width = _first(pattern.astype(np.float64), k)
    u = np.arange(height) - height // 2
    v = np.arange(width) - width // 2
    y, x = (np.arange(n) for n in part.shape)
    spectrum = (
        np.exp(-2j * np.pi * np.outer(u, y) / part.shape[0])
        @ part
        @ np.exp(-2j * np.pi * np.outer(x, v) / part.shape[1])
    )
    back_y = np.exp(2j * np.pi * np.outer(np.arange(height), u) / height)
    back_x = np.exp(2j * np.pi * np.outer(v, np.arange(width)) / width)
    return (back_y @ spectrum @ back_x).real / (height * width * k * k)


def output_axis(scale, offset, size, origin, *, cropped, align, k=1, method="bin"):
    """(scale, offset) of an output axis: cropped, then downsampled by k."""
    if cropped:
        offset = offset + scale * origin if align == "fixed" else -scale * (size // 2)
    if k > 1 and method == "bin":
        offset = offset + scale * (k - 1) / 2
    return scale * k, offset


def correct(pattern, dark, gain):
    out = np.empty(pattern.shape, np.float32)
    for y, x in np.ndindex(pattern.shape):
        value = float(pattern[y, x]) - (0.0 if dark is None else float(dark[y, x]))
        out[y, x] = np.float32(value) * (np.float32(1) if gain is None else gain[y, x])
    return out


def hot(patterns):
    """Pixels above 6 times the sixth largest neighbour, above the noise of the median one, and lit in half of the patterns."""
    n = len(patterns)
    mean = patterns.sum(0) / n
    out = np.zeros(mean.shape, bool)
    for y, x in np.ndindex(mean.shape):
        around = [
            mean[row, col]
            for row in range(max(y - 2, 0), min(y + 3, mean.shape[0]))
            for col in range(max(x - 2, 0), min(x + 3, mean.shape[1]))
            if (row, col) != (y, x)
        ]
        sides = [
            min(i + 3, size) - max(i - 2, 0) for i, size in zip((y, x), mean.shape, strict=True)
        ]
        also_hot = max(sides)  # 5 but in corners
        if len(around) <= also_hot:
            continue
        median = np.median(around)
        noise = np.sqrt(max(median, 1 / n) / n)
        least = max(6 * sorted(around)[-also_hot - 1], median + 8 * noise)
        out[y, x] = mean[y, x] > least and sum(p[y, x] > 0 for p in patterns) >= n / 2
    return out


def dead(patterns):
    """Never lit, among pixels within 8 px of which half are lit, and nine in ten of these expect more than 12 electrons."""
    n, height, width = patterns.shape
    out = np.zeros((height, width), bool)
    for y, x in np.ndindex(height, width):
        expected, others = [], 0
        for row, col in np.ndindex(height, width):
            if 0 < (row - y) ** 2 + (col - x) ** 2 <= 64:
                others += 1
                values = patterns[:, row, col]
                lit = sum(values > 0)
                if lit:
                    by_lit = -n * math.log(1 - lit / n) if lit < n else math.inf
                    expected.append(min(values.sum(), by_lit))
        if patterns[:, y, x].any() or not expected or len(expected) < others / 2:
            continue
        out[y, x] = sorted(expected)[(len(expected) - 1) // 10] > 12
    return out


def stop(mean, good, center):
    """Grow from the center over dark pixels that lie in a cross of five dark ones; detectors of at most 64 px."""
    (height, width), size = mean.shape, min(mean.shape) // 2
    values = np.where(good, mean, 0)
    edge = np.pad(values, size, mode="symmetric")
    dark = np.zeros(mean.shape, bool)
    for y, x in np.ndindex(mean.shape):
        top, left = y + size - size // 2, x + size - size // 2
        near = np.sort(edge[top : top + size, left : left + size], axis=None)
        dark[y, x] = good[y, x] and values[y, x] < 0.2 * near[near.size * 60 // 100]

    def beside(places, steps):
        reached = set(places)
        for _ in range(steps):
            for y, x in list(reached):
                reached |= {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)}
        return {(y, x) for y, x in reached if 0 <= y < height and 0 <= x < width}

    inner = {
        (y, x)
        for y, x in zip(*np.nonzero(dark), strict=True)
        if 0 < y < height - 1 and 0 < x < width - 1 and all(dark[p] for p in beside([(y, x)], 1))
    }
    left, found = beside(inner, 1), set()
    for start in beside([tuple(np.rint(center).astype(int))], 2) & left:
        region = {start}
        while len(grown := beside(region, 1) & left) > len(region):
            region = grown
        if len(region) > 0.002 * mean.size:
            found |= region
    if not found:
        return None
    out = np.zeros(mean.shape, bool)
    out[tuple(zip(*beside(found, 2), strict=True))] = True
    return out


def fill_median(pattern, mask):
    """Every bad pixel becomes the median of the good pixels in the smallest square around it that has any."""
    out = pattern.copy()
    for y, x in np.argwhere(mask):
        for reach in range(1, max(mask.shape)):
            near = [
                pattern[row, col].item()
                for row in range(max(y - reach, 0), min(y + reach + 1, mask.shape[0]))
                for col in range(max(x - reach, 0), min(x + reach + 1, mask.shape[1]))
                if not mask[row, col]
            ]
            if near:
                median = float(np.median(near))
                out[y, x] = median if pattern.dtype.kind == "f" else round(median)
                break
    return out


def normalize(patterns, method):
    """(f(x) - mean) / std of all values as floats, with the mean and standard deviation; f is log(1 + x), a square root, or nothing."""
    functions = {"none": float, "sqrt": math.sqrt}
    values = [functions.get(method, math.log1p)(value.item()) for value in patterns.ravel()]
    mean, std = 0.0, 1.0
    if method == "log-zscore":
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return np.array([(value - mean) / std for value in values]).reshape(patterns.shape), mean, std


def leak(patterns, mask):
    """Mean cosine of log(1 + counts) of at most 300 validation patterns (mask 1) with the nearest training pattern (mask 0).

    The mean over all patterns that are not left out (mask 255) is taken away before.
    """
    logs = np.log1p(patterns.astype(np.float64))
    logs -= logs[mask != 255].mean(0)
    val, train = np.argwhere(mask == 1), np.argwhere(mask == 0)
    cosines = []
    for i in np.linspace(0, len(val) - 1, min(300, len(val))).astype(int):
        nearest = min(train.tolist(), key=lambda place: math.dist(place, val[i]))
        a, b = logs[tuple(val[i])].ravel(), logs[tuple(nearest)].ravel()
        cosines.append(a @ b / math.sqrt((a @ a) * (b @ b)))
    return math.fsum(cosines) / len(cosines)

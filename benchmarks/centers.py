"""How far centroid, disc and descan are from the true beam, and what the disc costs.

    python -m benchmarks.centers [FOLDER ...]
    python -m benchmarks.centers --speed [--detectors 128 256 512]

FOLDER holds pairs of NAME.hspy and NAME.truth.json, which states `true_beam_centre` [y, x] of each position and perhaps the
`deflection` in it. Without any, discs are drawn. Where no disc can be told, the descan is fitted to the centroids.
``--speed`` compares CPU seconds of one core; compare only the ratios.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

import stem_dask as sd
from benchmarks.kernels import beams, fastest
from stem_dask.core.batches import pieces
from stem_dask.core.errors import ConfigError
from stem_dask.stages.analyze import AnalysisReducer
from stem_dask.stages.survey import survey_of

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
#: radius of the direct disc that is typical for a detector of so many px
RADII = {128: 7.0, 256: 14.0, 512: 30.0}


class Scan(NamedTuple):
    """Patterns with the true beam and descan, (scan_y, scan_x, 2) in px."""

    name: str
    patterns: Any
    beam: NDArray[np.float64]
    descan: NDArray[np.float64]


class Speed(NamedTuple):
    """CPU seconds per pattern of the analysis with the centroid and with the disc, and of a survey of 256 patterns."""

    detector: int
    radius: float
    centroid: float
    disc: float
    survey: float


def main(argv: list[str] | None = None) -> list[Any]:
    """Print a table in Markdown; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--speed", action="store_true", help="measure the cost instead")
    parser.add_argument("--detectors", type=int, nargs="+", default=[*RADII], help="pixels")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args(argv)
    if options.speed:
        print("| detector | radius | centroid, us | disc, us | ratio | survey, s |")
        print("| --- | --- | --- | --- | --- | --- |")
        return [_measured(size, options.repeat) for size in options.detectors]
    folders = options.folders or [SHARED / "trust", SHARED / "sim"]
    print("| median / 95 % / max, px | centroid | disc | descan |\n| --- | --- | --- | --- |")
    return [_compared(scan) for scan in scans(folders)]


def scans(folders: list[Path]) -> Iterator[Scan]:
    """The scans of the folders with a known beam, or drawn ones."""
    paths = [path for folder in folders for path in sorted(folder.glob("*.truth.json"))]
    if not paths:
        yield drawn()
    for path in paths:
        truth, data = json.loads(path.read_text()), Path(str(path).replace(".truth.json", ".hspy"))
        beam = np.array(truth["true_beam_centre"], float)
        if data.exists():
            deflection = np.array(truth.get("deflection", np.zeros(beam.shape)))
            yield Scan(data.stem, sd.open(data), beam, beam - deflection)


def drawn(shape: tuple[int, int] = (16, 14), detector: int = 96) -> Scan:
    """A crystal of uneven direct and Bragg discs on one side, with a descan of a few px and a deflection in one half of it."""
    rng = np.random.default_rng(0)
    v, u = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    descan = detector / 2 + np.stack([2 * v - 0.8 * u, 0.7 * v + 2.5 * u + 0.3 * u * u], -1)
    beam = descan + np.where((v > 0.5) & (u > 0), 1.0, 0.0)[..., None] * [0.8, -0.5]
    radius, y, x = detector / 20, *np.mgrid[:detector, :detector]
    patterns = np.empty((*shape, detector, detector), np.uint16)
    for index in np.ndindex(shape):
        mean = np.full((detector, detector), 0.02)
        for order in range(-1, 4):
            cy, cx = beam[index] + order * radius * np.array([0.9, 3.2])
            dark = 1 - 0.8 * np.exp(-(((x - cx - rng.uniform(-radius, radius)) / 1.5) ** 2))
            inside = np.clip(radius + 0.5 - np.hypot(y - cy, x - cx), 0, 1)
            mean += 60 * (1 if order == 0 else 0.2) * dark * inside
        patterns[index] = rng.poisson(mean)
    return Scan("drawn", patterns, beam, descan)


def _compared(scan: Scan) -> tuple[str, dict[str, NDArray[np.float64]]]:
    """Print the row of a scan; returns its distances from the truth, by method."""
    try:
        analysis = sd.analyze(scan.patterns, center_method="disc").compute()
    except ConfigError:
        analysis = sd.analyze(scan.patterns, center_method="centroid").compute()
    off = {"centroid": _off(analysis, "com", scan.beam)}
    if analysis.attrs["center_method"] == "disc":
        off["disc"] = _off(analysis, "center", scan.beam)
    off["descan"] = _off(sd.fit_descan(analysis), "descan", scan.descan)
    words = (
        " / ".join(f"{n:.2f}" for n in off[name]) if name in off else "–"
        for name in ("centroid", "disc", "descan")
    )
    print(f"| {scan.name} | {' | '.join(words)} |", flush=True)
    return scan.name, off


def _off(analysis: xr.Dataset, name: str, truth: NDArray[np.float64]) -> NDArray[np.float64]:
    found = np.stack([analysis[f"{name}_{axis}"].values for axis in "yx"], -1)
    return np.nanpercentile(np.linalg.norm(found - truth, axis=-1), [50, 95, 100])


def _measured(detector: int, repeat: int) -> Speed:
    """Print the row of a detector."""
    radius = RADII.get(detector, detector / 18)
    n = max(16, 1024 * 128**2 // detector**2)
    sample = beams(256, detector, "uint16", radius, 256)
    block = np.resize(sample, (1, n, detector, detector))
    places = np.stack(np.divmod(np.arange(256), 16), -1)
    seconds, found = 1e9, None
    for _ in range(min(repeat, 3) + 1):  # the first compiles
        start = time.process_time()
        found = survey_of(sample, places, (16, 16))
        seconds = min(seconds, time.process_time() - start)
    assert found is not None
    assert found.radius is not None, found.why
    expected = found.expected(np.zeros((n, 2)))
    disc = {"radius": found.radius, "reach": found.reach, "good": found.good, "level": found.level}
    options: dict[str, Any] = {"target_retention": 0.98, "threshold": 0, "metric": "square", "center": None}  # fmt: skip

    def analyze(*beam: NDArray[np.float64], **more: Any) -> object:
        reducer = AnalysisReducer(
            block, *2 * [np.zeros((1, n), np.bool_)], *beam, device="cpu", **options, **more
        )
        done = 0
        for piece in pieces(block):
            reducer.add(piece, slice(done, done + len(piece)))
            done += len(piece)
        return reducer.result()

    along = [one.reshape(1, n) for one in expected.T]
    # the intensity of the disc is summed about either center
    centroid = fastest(lambda: analyze(disc_radius=found.radius), repeat) / n
    with_disc = fastest(lambda: analyze(*along, disc=disc, disc_radius=found.radius), repeat) / n
    print(
        f"| {detector}² | {radius:g} | {1e6 * centroid:.1f} | {1e6 * with_disc:.1f} | {with_disc / centroid:.2f} | {seconds:.2f} |",
        flush=True,
    )
    return Speed(detector, radius, centroid, with_disc, seconds)


if __name__ == "__main__":
    main()

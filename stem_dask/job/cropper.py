"""Tensor in, tensor out: `DiffractionCropper`, the interface of the earlier cropping script.

As in that script, coverage is 1 and every window is aligned around the center of its own pattern.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from stem_dask.cluster.gpu import chosen_device
from stem_dask.config.options import Cluster
from stem_dask.core.errors import ConfigError
from stem_dask.core.model import DETECTOR_DIMS, LIST_DIMS, Axis
from stem_dask.core.patterns import as_patterns
from stem_dask.core.text import size
from stem_dask.job.summary import results_of, write_json
from stem_dask.kernels.crop import crop_patterns, window_intensity
from stem_dask.kernels.gpu import crop as crop_on_gpu
from stem_dask.stages.analyze import analyze
from stem_dask.stages.crop import choose_window
from stem_dask.stages.validate import FLOAT_SLACK, retention_statistics
from stem_dask.storage.publish import (
    make_folder,
    opened,
    publish,
    refuse_existing,
    refuse_taken,
    temporary,
    temporary_names,
)

_logger = logging.getLogger("stem_dask")


@dataclass
class CroppingConfig:
    """Options of `DiffractionCropper`.

    Parameters
    ----------
    target_retention : share of the intensity to keep, 0 < target <= 1
    min_retention : lowest acceptable share, at most the target
    margin_pixels : added to the radius
    chunk_size : patterns analyzed at a time
    use_gpu : run on the GPU; raises without one instead of using the CPU
    center_method : ``centroid``, ``center`` or ``manual``
    manual_center : (y, x) in pixels, with ``manual``
    visualization : write a figure next to ``save_path``
    verbose : log to standard error

    Raises
    ------
    ConfigError
        (a ValueError) when an option is outside its range.

    Examples
    --------
    >>> CroppingConfig(target_retention=0.99).margin_pixels
    3
    """

    target_retention: float = 0.98
    min_retention: float = 0.95
    margin_pixels: int = 3
    chunk_size: int = 1000
    use_gpu: bool = False
    center_method: Literal["centroid", "center", "manual"] = "centroid"
    manual_center: tuple[float, float] | None = None
    visualization: bool = True
    verbose: bool = True

    def __post_init__(self) -> None:
        for name in ("target_retention", "min_retention"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 < {name} <= 1")
        if self.min_retention > self.target_retention:
            raise ConfigError(
                f"min_retention is {self.min_retention}, above target_retention {self.target_retention}; lower it"
            )
        for name, least in (("margin_pixels", 0), ("chunk_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected >= {least}")
        method = self.center_method
        if method not in ("centroid", "center", "manual"):
            raise ConfigError(f"center_method is {method!r}; expected centroid, center or manual")
        if method == "manual" and self.manual_center is None:
            raise ConfigError("center_method manual needs manual_center: (y, x)")


class DiffractionCropper:
    """Crop a stack of diffraction patterns to the window that keeps their intensity.

    Examples
    --------
    >>> data = create_test_data(20, 64)
    >>> cropper = DiffractionCropper(CroppingConfig(verbose=False))
    >>> cropped, results = cropper.process_dataset(data)
    >>> tuple(cropped.shape) == (20, 1, *results["analysis"]["cropped_shape"])
    True
    """

    def __init__(self, config: CroppingConfig | None = None) -> None:
        self.config = config or CroppingConfig()
        self.device = chosen_device("gpu" if self.config.use_gpu else "cpu", Cluster())[0]

    def process_dataset(
        self, data: Any, save_path: str | os.PathLike[str] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Analyze, crop, validate; with a path also save.

        Parameters
        ----------
        data : tensor or array (N, 1, H, W) or (N, H, W)
        save_path : ``out.pt`` makes ``out.pt`` (the bare tensor), ``out_results.json`` and ``out_visualization.png``

        Returns
        -------
        (cropped, results): cropped has the rank, type and kind of ``data``; results has the parts ``analysis``,
        ``validation``, ``processing_time`` (s) and ``config``
        """
        start = time.perf_counter()
        analysis = self.analyze_patterns(data)
        cropped = self.crop_patterns(data, analysis)
        validation = self.validate_retention(data, cropped, analysis)
        seconds = time.perf_counter() - start
        results = {
            "analysis": analysis,
            "validation": validation,
            "processing_time": seconds,
            "config": self.config,
        }
        self._say(
            f"cropped {analysis['n_patterns']:,} patterns from {analysis['original_shape']} to "
            f"{analysis['cropped_shape']}, retention mean {validation['mean_retention']:.4f}, "
            f"min {validation['min_retention']:.4f}, {seconds:.2f} s"
        )
        if save_path is not None:
            self._save(Path(save_path).expanduser(), data, cropped, results)
        return cropped, results

    def analyze_patterns(self, data: Any) -> dict[str, Any]:
        """Center and radius of every pattern, and the global radius: the part ``analysis`` of the results.

        When the window would reach the detector's size on either axis, both are kept whole: ``global_radius`` is
        then ``min(H, W) // 2`` and ``cropped_shape`` says what comes out.
        """
        patterns, config = _patterns(data), self.config
        n, height, width = patterns.shape
        names = (*LIST_DIMS, *DETECTOR_DIMS)
        axes = [Axis(name, k) for name, k in zip(names, patterns.shape, strict=True)]
        blocks = da.from_array(patterns, chunks=(min(config.chunk_size, n), -1, -1))
        found = analyze(
            as_patterns(blocks, axes),
            center_method=config.center_method,
            manual_center=config.manual_center,
            ignore_bad_pixels=False,
            target_retention=config.target_retention,
            device=self.device,
        ).compute()
        margin = config.margin_pixels
        window = choose_window(found, coverage=1.0, margin_pixels=margin, align="pattern")
        radius = window.global_radius or 0
        shape = (2 * radius, 2 * radius)
        if 2 * radius >= min(height, width):
            shape, radius = (height, width), min(height, width) // 2
            warnings.warn(
                f"the window would reach the detector of {height} x {width} pixels; nothing is cropped",
                UserWarning,
                stacklevel=2,
            )
        self._say(f"global radius {radius} px for {config.target_retention:.1%} of the intensity")
        results = results_of(found, None, (height, width), shape, n, None, listed=n)
        return {**results["analysis"], "global_radius": radius}

    def crop_patterns(self, data: Any, analysis: Mapping[str, Any]) -> Any:
        """Cut every pattern around its own center; (…, 2R, 2R), 0 where a window leaves the detector."""
        patterns, shape = _patterns(data), tuple(analysis["cropped_shape"])
        if shape == patterns.shape[1:]:
            return _like(data, patterns.copy())
        (y, x), size = _origins(analysis).T, (shape[0], shape[1])
        if self.device == "gpu":
            return _like(data, crop_on_gpu.cut_patterns(patterns, y, x, size)[0])
        out = np.empty((len(patterns), *shape), patterns.dtype)
        for part in self._chunks(len(patterns)):
            out[part] = crop_patterns(patterns[part], y[part], x[part], size)
        return _like(data, out)

    def validate_retention(
        self, data: Any, cropped: Any, analysis: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Sum the intensity in the windows again: the part ``validation`` of the results."""
        patterns, config = _patterns(data), self.config
        retention, total = self._retention(patterns, _patterns(cropped))
        slack = FLOAT_SLACK if patterns.dtype.kind == "f" else 0.0
        target, least = config.target_retention, config.min_retention
        found = retention_statistics(retention, total, target, least, slack)
        shape, n = analysis["original_shape"], int(analysis["n_patterns"])
        validation: dict[str, Any]
        validation = results_of(None, found, shape, analysis["cropped_shape"], n, None)[
            "validation"
        ]
        return validation

    def visualize_results(
        self,
        data: Any,
        cropped: Any,
        analysis: Mapping[str, Any],
        save_path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Draw the result: returns a matplotlib Figure, and writes it to ``save_path``; shows nothing."""
        from stem_dask.job.figure import FigureData, build, draw, with_pictures

        patterns, windows = _patterns(data), _patterns(cropped)
        retention, _ = self._retention(patterns, windows)
        height, width = patterns.shape[1:]
        shape = tuple(analysis["cropped_shape"])
        centers = np.asarray(analysis["centers"], np.float64)
        whole = shape == (height, width)
        origins = np.zeros((len(patterns), 2), int) if whole else _origins(analysis)
        shown = patterns
        if patterns.dtype.kind == "f" and not np.isfinite(patterns).all():
            shown = np.nan_to_num(patterns, posinf=0, neginf=0)
        figure_data = FigureData(
            title="DiffractionCropper",
            axes=(Axis("ky", height), Axis("kx", width)),
            scan_axes=(Axis("pattern", len(patterns)),),
            mean_pattern=shown.mean(axis=0, dtype=np.float64),
            output_axes=(Axis("ky", shape[0]), Axis("kx", shape[1])),
            output_mean=np.nan_to_num(windows.mean(axis=0, dtype=np.float64)),
            window_y=origins[:, 0],
            window_x=origins[:, 1],
            window_shape=shape,
            align="pattern",
            center_y=centers[:, 0],
            center_x=centers[:, 1],
            radius=np.asarray(analysis["retention_radii"], np.float64),
            retention=retention,
            target_retention=self.config.target_retention,
            min_retention=self.config.min_retention,
            global_radius=int(analysis["global_radius"]),
        )
        figure_data = with_pictures(figure_data, lambda index: patterns[index])
        if save_path is not None:
            refuse_taken(temporary_names(Path(save_path)))
            draw(figure_data, temporary(Path(save_path)))
            publish(Path(save_path))
        return build(figure_data)

    def _retention(
        self, patterns: NDArray, cropped: NDArray
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Share of each pattern's intensity in its window, and its whole intensity."""
        total, inside = self._intensity(patterns), self._intensity(cropped)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(total > 0, inside / total, np.nan), total

    def _intensity(self, patterns: NDArray) -> NDArray[np.float64]:
        if self.device == "gpu":
            return crop_on_gpu.window_intensity(patterns, threshold=0.0)
        parts = [
            window_intensity(patterns[part], threshold=0.0) for part in self._chunks(len(patterns))
        ]
        return np.concatenate(parts)

    def _chunks(self, n: int) -> Iterator[slice]:
        for start in range(0, n, self.config.chunk_size):
            yield slice(start, min(start + self.config.chunk_size, n))

    def _save(self, path: Path, data: Any, cropped: Any, results: dict[str, Any]) -> None:
        import torch

        stem = path.with_suffix("")
        others = (f"{stem}_results.json", f"{stem}_visualization.png")
        make_folder(path)
        for name in (path, *others):
            refuse_existing(name, overwrite=True)
            refuse_taken(temporary_names(name))
        tensor = cropped if isinstance(cropped, torch.Tensor) else torch.from_numpy(cropped)
        # an open file, because torch stores a file's name in the archive
        with opened(temporary(path), "wb") as file:
            torch.save(tensor, file)
        publish(path)
        write_json(others[0], {**results, "config": asdict(self.config)})
        if self.config.visualization:
            self.visualize_results(data, cropped, results["analysis"], others[1])
        self._say(f"saved {path} ({size(path.stat().st_size)})")

    def _say(self, text: str) -> None:
        if self.config.verbose:
            if not _logger.handlers and not logging.getLogger().handlers:
                _logger.addHandler(logging.StreamHandler(sys.stderr))
                _logger.setLevel(logging.INFO)
            _logger.info(text)


def _patterns(data: Any) -> NDArray:
    """The patterns as an array (N, H, W), without a copy."""
    array = data
    if type(data).__module__.partition(".")[0] == "torch":
        array = data.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":
            raise ConfigError("the tensor is bfloat16, which numpy lacks; pass data.float()")
        array = array.numpy()
    array = np.asarray(array)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3 or 0 in array.shape:
        raise ConfigError(f"data has shape {tuple(data.shape)}; expected (N, 1, H, W) or (N, H, W)")
    if array.dtype.kind not in "buif":
        raise ConfigError(f"data is of type {array.dtype}; expected bool, integer or real numbers")
    return array


def _origins(analysis: Mapping[str, Any]) -> NDArray[np.int64]:
    """First row and column of each window; an empty pattern has the median center of the others."""
    centers = np.asarray(analysis["centers"], np.float64)
    filled = np.isfinite(np.asarray(analysis["retention_radii"], np.float64))[:, None]
    middle = np.rint(np.median(centers[filled[:, 0]], axis=0))
    rounded = np.where(filled, np.rint(centers), middle)
    return (rounded - np.array(analysis["cropped_shape"]) // 2).astype(np.int64)


def _like(data: Any, patterns: NDArray) -> Any:
    """Patterns in the rank and kind of the data."""
    shaped = patterns[:, None] if len(data.shape) == 4 else patterns
    if type(data).__module__.partition(".")[0] != "torch":
        return shaped
    import torch

    return torch.from_numpy(shaped)


def create_test_data(
    n_patterns: int = 100, image_size: int = 256, noise_level: float = 0.1, *, seed: int = 0
) -> Any:
    """Airy discs with varying center and size, for tests and demonstrations.

    Parameters
    ----------
    n_patterns, image_size : N patterns of S × S pixels
    noise_level : the noise has the standard deviation ``noise_level * sqrt(I)``; negative results become 0
    seed : the same seed gives the same data

    Returns
    -------
    tensor (N, 1, S, S) float32, non-negative, 1000 at the center of a disc: ``I = 1000 (2 J1(v) / v)²``, v = 3.8317
    at the first dark ring (M. Born, E. Wolf, Principles of Optics, 8.5.2)

    Examples
    --------
    >>> tuple(create_test_data(3, 16).shape)
    (3, 1, 16, 16)
    """
    import torch
    from scipy.special import j1

    rng = np.random.default_rng(seed)
    pixel = np.arange(image_size, dtype=np.float64)
    out = np.empty((n_patterns, 1, image_size, image_size), np.float32)
    for i in range(n_patterns):
        cy, cx = (image_size - 1) / 2 + rng.uniform(-0.05, 0.05, 2) * image_size
        ring = max(0.8, image_size * rng.uniform(1 / 60, 1 / 40))
        v = 3.8317 / ring * np.hypot(pixel[:, None] - cy, pixel[None, :] - cx)
        v = np.maximum(v, 1e-9)
        intensity = 1000 * (2 * j1(v) / v) ** 2
        noisy = intensity + noise_level * np.sqrt(intensity) * rng.standard_normal(v.shape)
        out[i, 0] = np.maximum(noisy, 0)
    return torch.from_numpy(out)

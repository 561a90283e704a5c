"""Arrays of one value per detector pixel from .npy files: mask, dark and gain reference."""

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from os.path import expanduser

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError

#: options of the input that name such a file
KEYS = ("dark", "gain", "mask")


@dataclass(frozen=True)
class PlaneFile:
    """A reference that each worker reads once, instead of an array in every task.

    ``digest`` is that of the content when the job was prepared; a changed file is refused.
    """

    path: str
    digest: str
    key: str
    detector: tuple[int, int]

    def values(self) -> NDArray[np.float32]:
        """(ky, kx)."""
        return _kept(self)


@functools.lru_cache(maxsize=4)
def _kept(file: PlaneFile) -> NDArray[np.float32]:
    if digest_of(file.path, file.key) != file.digest:
        raise ConfigError(
            f"input.{file.key} {file.path} was changed while it was in use; start again, and leave it as it is"
        )
    return reference(file.path, file.key, file.detector)


def plane(
    given: str | PathLike[str] | NDArray | None, key: str, detector: Sequence[int]
) -> NDArray[np.float32] | PlaneFile | None:
    """A checked reference for the tasks: the name of a file, or an array."""
    if given is None:
        return None
    values = reference(given, key, detector)
    if not isinstance(given, (str, PathLike)):
        return values
    path, shape = os.path.abspath(given), (int(detector[0]), int(detector[1]))
    return PlaneFile(path, digest_of(path, key), key, shape)


def digest_of(path: str | PathLike[str], key: str) -> str:
    """A hash of the content of a file.

    Raises
    ------
    ConfigError
        When it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise _unreadable(path, key, error) from error


def read_plane(path: str | PathLike[str], key: str, detector: Sequence[int]) -> NDArray:
    """The array of a .npy file, which must have the detector's shape; it is checked before it is loaded.

    Raises
    ------
    ConfigError
        When it cannot be read, has another shape or holds no numbers; names the file and both shapes.
    """
    try:
        mapped = np.load(expanduser(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, key, error) from error
    if not isinstance(mapped, np.ndarray):
        raise _unreadable(path, key, "it is an archive of several arrays")
    return np.array(_checked(mapped, key, detector, f" {fspath(path)}"))


def reference(
    given: str | PathLike[str] | NDArray, key: str, detector: Sequence[int]
) -> NDArray[np.float32]:
    """A dark or gain reference, from a .npy file or an array of the detector's shape.

    Raises
    ------
    ConfigError
        When it cannot be used: another shape, no numbers, values that are not finite, or a gain of 0 or less.

    Examples
    --------
    >>> reference(np.array([[1, 2]]), "dark", (1, 2)).dtype
    dtype('float32')
    """
    if isinstance(given, (str, PathLike)):
        name, values = f" {fspath(given)}", read_plane(given, key, detector)
    else:
        name, values = "", _checked(np.asarray(given), key, detector, "")
    with np.errstate(over="ignore"):
        out = values.astype(np.float32)
    bad = ~np.isfinite(out) | (out <= 0 if key == "gain" else False)
    if bad.any():
        y, x = (int(i) for i in np.argwhere(bad)[0])
        expected = "numbers above 0" if key == "gain" else "finite numbers"
        raise ConfigError(
            f"input.{key}{name} is {values[y, x]} at pixel [{y}, {x}] and not usable at {int(bad.sum()):,} of "
            f"{bad.size:,} pixels; expected {expected}: put {1 if key == 'gain' else 0} there and name the pixels in "
            "input.mask"
        )
    return out


def _checked(values: NDArray, key: str, detector: Sequence[int], name: str) -> NDArray:
    if values.shape != tuple(detector):
        raise ConfigError(
            f"input.{key}{name} has shape {values.shape}, the detector {tuple(detector)}; give one value for each "
            "pixel of the detector as it is read, [ky, kx]"
        )
    if values.dtype.kind not in "buif":
        raise ConfigError(
            f"input.{key}{name} holds {values.dtype}; expected bool, integer or real numbers"
        )
    return values


def _unreadable(path: str | PathLike[str], key: str, why: object) -> ConfigError:
    return ConfigError(
        f"input.{key} {fspath(path)} cannot be read: {why}; expected a .npy file of the detector's shape, as "
        "numpy.save writes it"
    )

"""4D-STEM datasets with a known answer, of any size, and a .dm4 written from them.

A pattern is a beam disc, pairs of Bragg discs where the beam meets the particle in the middle of the scan, and weak
diffuse scattering, all of it around a beam position that wanders over the scan (descan) and is known exactly. Every
scan row has its own random numbers, so that rows can be made in any order, and nothing larger than a row is in memory.

The writer of Gatan DM3 and DM4 tags takes trees of plain objects: a dictionary is a group of named tags, a list a group of
unnamed ones, a ``str`` an array of uint16, a numpy array an array of its dtype (structured: an array of structs), a tuple a
struct, a number one value (``int``: uint32, or int64 if needed; numpy scalars keep their type), a `Stream` pixels that are
produced lazily.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stem_dask.core.errors import ConfigError, StoreError
from stem_dask.storage.errors import translate

_DM_CODES = {
    "i2": 1, "f4": 2, "u1": 6, "i4": 7, "i1": 9, "u2": 10, "u4": 11, "f8": 12, "i8": 39, "u8": 40,
}  # fmt: skip

_DIFFUSE_FRACTION = (0.01, 0.05)  # of the electrons, in vacuum and in the thickest part

_BRAGG_FRACTION = 0.4  # of the electrons, in the thickest part

# Spots come in pairs +g and -g of equal intensity, so that they leave the centroid at the beam.
_PAIRS = ((1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2), (2, 1), (1, 2), (2, -1), (1, -2))


@dataclass(frozen=True)
class Synthetic:
    """What a dataset is made of.

    ``scan_shape`` is (scan_y, scan_x), ``detector_shape`` (ky, kx). ``electrons`` are expected per pattern, ``descan``
    is the number of pixels the beam wanders over the scan, ``disc_radius`` is in pixels, ``spots`` counts the Bragg
    discs (in pairs, at most 20). Equal options give equal bytes. The expected centroid of a pattern is the beam, as
    long as no disc leaves the detector: with more than 8 spots, or large discs on a small detector, some do.
    """

    scan_shape: tuple[int, int] = (24, 20)
    detector_shape: tuple[int, int] = (128, 120)
    electrons: float = 20_000
    descan: float = 4.0
    disc_radius: float = 9.0
    spots: int = 8
    seed: int = 0
    dtype: str = "uint16"

    def __post_init__(self) -> None:
        sizes = (*self.scan_shape, *self.detector_shape)
        if len(sizes) != 4 or min(sizes) < 1:
            raise ConfigError(f"scan_shape and detector_shape need two sizes each, not {sizes}")
        if self.spots % 2 or not 0 <= self.spots <= 2 * len(_PAIRS):
            raise ConfigError(f"spots is {self.spots}; it must be even and 0 to {2 * len(_PAIRS)}")
        if self.electrons < 0 or self.disc_radius <= 0:
            raise ConfigError("electrons must be 0 or more and disc_radius more than 0")
        _dm_code(self.dtype)


def _dm_code(dtype: Any) -> int:
    """DM's number for the dtype of an image."""
    name = np.dtype(dtype).str[1:]
    if name not in _DM_CODES:
        raise ConfigError(f"dtype {dtype} has no place in a DM file; use one of {list(_DM_CODES)}")
    return _DM_CODES[name]


def _scan_grid(spec: Synthetic) -> tuple[np.ndarray, np.ndarray]:
    """Scan position from -1 to 1 along y, shape (scan_y, 1), and x, shape (1, scan_x)."""
    v, u = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in spec.scan_shape)
    return v[:, None], u[None, :]


def beam_centers(spec: Synthetic) -> tuple[np.ndarray, np.ndarray]:
    """Where the beam is in every pattern, in pixels: the known answer of a centering.

    Both are (scan_y, scan_x), linear and weakly quadratic in the scan position, at most ``descan / 2`` from the middle.

    Examples
    --------
    >>> cy, cx = beam_centers(Synthetic(scan_shape=(3, 3), detector_shape=(65, 61), descan=4))
    >>> cy.round(2).tolist(), cx.shape
    ([[30.32, 30.4, 30.8], [31.92, 32.0, 32.4], [33.52, 33.6, 34.0]], (3, 3))
    """
    v, u = _scan_grid(spec)
    middle_y, middle_x = ((n - 1) / 2 for n in spec.detector_shape)
    cy = middle_y + spec.descan * (0.40 * v + 0.06 * u + 0.04 * u**2)
    cx = middle_x + spec.descan * (0.40 * u - 0.05 * v + 0.05 * v**2)
    return cy, cx


def thickness(spec: Synthetic) -> np.ndarray:
    """How much of the particle the beam meets, (scan_y, scan_x): 0 in vacuum to 1 in the middle of the scan."""
    v, u = _scan_grid(spec)
    return np.sqrt(np.clip(1 - (u**2 + v**2) / 0.6**2, 0, 1))


def pattern_row(spec: Synthetic, y: int) -> np.ndarray:
    """The patterns (scan_x, ky, kx) of scan row ``y`` in electrons, with Poisson noise.

    Examples
    --------
    >>> row = pattern_row(Synthetic(electrons=1000), 3)
    >>> row.shape, row.dtype.name, 900 < int(row[0].sum()) < 1100
    ((20, 128, 120), 'uint16', True)
    """
    if not 0 <= y < spec.scan_shape[0]:
        raise ConfigError(
            f"there is no scan row {y}: the scan has rows 0 to {spec.scan_shape[0] - 1}"
        )
    rng = np.random.default_rng([spec.seed, y])
    centers = np.stack([center[y] for center in beam_centers(spec)], axis=1)
    # Bragg discs: offsets (spots, 2) from the beam in pixels, and shares (scan_x, spots) of the electrons
    pairs = np.array(_PAIRS[: spec.spots // 2], float).reshape(-1, 2)
    turn = np.deg2rad(12)  # not along the pixels
    lattice = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    offsets = 0.26 * min(spec.detector_shape) * pairs @ lattice
    v, u = _scan_grid(spec)
    phase = 2 * np.pi * (0.7 * v[y] + 1.1 * u[0])[:, None] + np.arange(len(pairs))
    envelope = np.exp(-0.5 * (pairs**2).sum(axis=1))
    strength = envelope * (1 + 0.3 * np.cos(phase)) / max(1.0, 1.3 * envelope.sum())
    shares = _BRAGG_FRACTION / 2 * thickness(spec)[y][:, None] * strength
    offsets, shares = np.concatenate([offsets, -offsets]), np.concatenate([shares, shares], axis=1)
    thin, thick = _DIFFUSE_FRACTION
    diffuse = thin + (thick - thin) * thickness(spec)[y]
    out = np.empty((spec.scan_shape[1], *spec.detector_shape), spec.dtype)
    largest = np.iinfo(out.dtype).max if out.dtype.kind in "iu" else np.inf
    for x, center in enumerate(centers):
        frame = np.zeros(spec.detector_shape, np.int64)
        direct = 1 - diffuse[x] - shares[x].sum()
        _add_disc(frame, center, spec.disc_radius, direct * spec.electrons, rng)
        for offset, share in zip(offsets, shares[x], strict=True):
            _add_disc(frame, center + offset, spec.disc_radius, share * spec.electrons, rng)
        # Gaussian scattering, electron by electron: cheaper than a Poisson number for each pixel
        n = rng.poisson(diffuse[x] * spec.electrons)
        spread = rng.normal(center, 0.12 * min(spec.detector_shape), (n, 2))
        yx = np.rint(spread).astype(np.int64)
        yx = yx[((yx >= 0) & (yx < frame.shape)).all(axis=1)]
        np.add.at(frame, (yx[:, 0], yx[:, 1]), 1)
        if frame.max() > largest:
            raise ConfigError(
                f"a pixel has {frame.max():,} electrons, more than {spec.dtype} holds; "
                "choose a larger dtype or fewer electrons"
            )
        out[x] = frame
    return out


def _add_disc(
    frame: np.ndarray, center: np.ndarray, radius: float, electrons: float, rng: Any
) -> None:
    """Add a disc of Poisson counts, its edge one pixel wide, centered between pixels; in place."""
    reach, (cy, cx) = int(radius) + 2, center
    y0, x0 = max(0, round(cy) - reach), max(0, round(cx) - reach)
    y1 = min(frame.shape[0], round(cy) + reach + 1)
    x1 = min(frame.shape[1], round(cx) + reach + 1)
    if y1 <= y0 or x1 <= x0 or electrons <= 0:
        return
    y, x = np.ogrid[y0:y1, x0:x1]
    inside = np.clip(radius + 0.5 - np.hypot(y - cy, x - cx), 0, 1)
    frame[y0:y1, x0:x1] += rng.poisson(electrons / (np.pi * radius**2) * inside)


ByteOrder = Literal["<", ">"]

_CODES = {
    "i2": 2, "i4": 3, "u2": 4, "u4": 5, "f4": 6, "f8": 7, "b1": 8, "i1": 9, "u1": 10, "i8": 11, "u8": 12,
}  # fmt: skip

_GROUP, _DATA, _STRUCT, _ARRAY = 20, 21, 15, 20


@dataclass(frozen=True)
class Stream:
    """An array of ``length`` elements whose ``pieces`` are produced while the file is written.

    The pieces follow each other in C order; they are converted to ``dtype`` only where that loses nothing.
    """

    dtype: Any
    length: int
    pieces: Iterable[np.ndarray]

    def __len__(self) -> int:
        return self.length * np.dtype(self.dtype).itemsize

    def encoded(self, order: ByteOrder) -> Iterator[bytes]:
        """Bytes of the pieces; refuses a length that differs from its tag."""
        dtype, left = np.dtype(self.dtype).newbyteorder(order), self.length
        for piece in self.pieces:
            left -= piece.size
            if not np.can_cast(piece.dtype, dtype, "safe"):
                raise ConfigError(
                    f"a piece has dtype {piece.dtype}, which {self.dtype} cannot hold"
                )
            if left < 0:
                break
            yield np.ascontiguousarray(piece, dtype).tobytes()
        if left:
            what = f"{-left:,} more" if left < 0 else f"{left:,} fewer"
            raise ConfigError(f"the pieces have {what} elements than the {self.length:,} announced")


def encode_tags(tree: dict[str, Any], *, version: int = 4, order: ByteOrder = "<") -> bytes:
    """The bytes of a DM file.

    Examples
    --------
    >>> data = encode_tags({"Name": "Au", "Sizes": [3, 4], "Scale": 0.5})
    >>> data[:4], len(data)
    (b'\\x00\\x00\\x00\\x04', 229)
    """
    return b"".join(stream_tags(tree, version=version, order=order))


def stream_tags(
    tree: dict[str, Any], *, version: int = 4, order: ByteOrder = "<"
) -> Iterator[bytes]:
    """Yield the bytes of a DM file piece by piece, so that a `Stream` is never in memory as a whole.

    ``version`` is 3 (32-bit counts) or 4 (64-bit counts), ``order`` the byte order of the values.
    """
    if version not in (3, 4):
        raise ConfigError(f"version is {version}; a DM file has version 3 or 4")
    count = "q" if version == 4 else "i"
    parts = _content(tree, count, order)
    # The size counts from behind the byte order up to the eight zeros at the end.
    yield struct.pack(f">i{count}i", version, sum(map(len, parts)), order == "<")
    for part in parts:
        yield from part.encoded(order) if isinstance(part, Stream) else (part,)
    yield bytes(8)


def _content(value: Any, count: str, order: ByteOrder) -> list[bytes | Stream]:
    """A group from its flags on, or a data tag from its delimiter on."""
    if isinstance(value, dict | list):
        items = list(value.items()) if isinstance(value, dict) else [("", one) for one in value]
        parts: list[bytes | Stream] = [struct.pack(f">BB{count}", 1, 0, len(items))]
        for name, inner in items:
            kind = _GROUP if isinstance(inner, dict | list) else _DATA
            content, encoded = _content(inner, count, order), name.encode("utf-8")
            parts.append(struct.pack(">BH", kind, len(encoded)) + encoded)
            if count == "q":  # only DM4 has the size of a tag
                parts.append(struct.pack(">q", sum(map(len, content))))
            parts += content
        return parts
    is_array = isinstance(value, str | np.ndarray | Stream)
    if isinstance(value, str):
        value = np.frombuffer(value.encode("utf-16-le"), "<u2")
    elif isinstance(value, tuple):  # one record of fields f0, f1, ...
        fields = [_number(field) for field in value]
        value = np.array(value, [(f"f{i}", field.dtype) for i, field in enumerate(fields)])
    elif not is_array:
        value = _number(value)
    info = _element(np.dtype(value.dtype))
    if is_array:
        info = (_ARRAY, *info, value.length if isinstance(value, Stream) else value.size)
    head = b"%%%%" + struct.pack(f">{1 + len(info)}{count}", len(info), *info)
    if isinstance(value, Stream):
        return [head, value]
    return [head + value.astype(value.dtype.newbyteorder(order)).tobytes()]


def _number(value: Any) -> np.ndarray:
    """A number with a DM type."""
    if type(value) is int:
        return np.array(value, np.uint32 if 0 <= value < 2**32 else np.int64)
    return np.array(value)


def _element(dtype: np.dtype) -> tuple[int, ...]:
    """The description of one element: a type code, or a struct of them."""
    if dtype.names is not None:
        codes = [_element(dtype[name])[0] for name in dtype.names]
        return (_STRUCT, 0, len(codes), *(n for code in codes for n in (0, code)))
    if dtype.str[1:] not in _CODES:
        raise ConfigError(
            f"a DM file cannot hold {dtype}; convert it to one of {', '.join(_CODES)}"
        )
    return (_CODES[dtype.str[1:]],)


def _image(
    name: str, code: int, sizes: list[int], axes: list[Any], data: Any, tags: dict[str, Any]
) -> dict[str, Any]:
    """An entry of ``ImageList``; ``sizes`` and ``axes`` (origin, scale, units) are fastest first."""
    described = [
        {"Origin": np.float32(origin), "Scale": np.float32(scale), "Units": units}
        for origin, scale, units in [(0, 1, ""), *axes]
    ]
    image_data = {
        "Calibrations": {
            "Brightness": described[0],
            "Dimension": described[1:],
            "DisplayCalibratedUnits": True,
        },
        "Data": data,
        "DataType": code,
        "Dimensions": sizes,
        "PixelDepth": np.dtype(data.dtype).itemsize,
    }
    return {"ImageData": image_data, "ImageTags": tags, "Name": name, "UniqueID": [code, *sizes]}


def write_dm4(
    path: str | os.PathLike[str],
    rows: Iterable[np.ndarray],
    scan_shape: tuple[int, int],
    detector_shape: tuple[int, int],
    dtype: Any,
    *,
    scan_scale_nm: float = 0.5,
    k_scale_inv_nm: float = 0.05,
    name: str = "Diffraction SI",
    survey: np.ndarray | None = None,
    swapped: int | None = 1,
    detector_first: bool = False,
    pad: int = 0,
) -> Path:
    """Write a .dm4 laid out like those of current GMS: a thumbnail, a survey image, the 4D image.

    The file appears under its name when it is complete. ``rows`` has one array (scan_x, ky, kx) a scan row, written as
    it comes and converted to ``dtype`` where that loses nothing. The diffraction axes are zero at pixel ``size // 2``.
    ``survey`` is (scan_y, scan_x). ``swapped`` is the tag ``Data Order Swapped``; None leaves it out, as old files do.
    ``detector_first`` is the older order, detector slowest, that goes with ``swapped=0`` or None: then ``rows`` has one
    array (kx, scan_y, scan_x) a row of the detector.
    ``pad`` puts so many bytes before the images, so that the pixels come to lie at another place in the file.
    """
    path, (ny, nx), (ky, kx) = Path(path), scan_shape, detector_shape

    def checked() -> Iterator[np.ndarray]:
        shape = (kx, ny, nx) if detector_first else (nx, ky, kx)
        for y, row in enumerate(rows):
            if row.shape != shape:
                raise ConfigError(f"row {y} has shape {row.shape}, where {shape} was expected")
            yield row

    counts = Stream(np.dtype(dtype), ny * nx * ky * kx, checked())
    meta: dict[str, Any] = {"Acquisition Mode": "Parallel imaging", "Format": "Diffraction image"}
    meta |= {} if swapped is None else {"Data Order Swapped": np.uint8(swapped)}
    microscope = {"Illumination Mode": "STEM NANOPROBE", "Voltage": 200_000.0}
    tags = {"Meta Data": meta | {"Signal": "Diffraction"}, "Microscope Info": microscope}
    adf = np.zeros(scan_shape) if survey is None else np.broadcast_to(survey, scan_shape)
    grey = np.clip(255 * adf / max(adf.max(), 1e-9), 0, 255).astype(np.uint32)
    scan_axes = [(0, scan_scale_nm, "nm")] * 2
    axes = [(n // 2, k_scale_inv_nm, "1/nm") for n in (kx, ky)] + scan_axes
    sizes = [kx, ky, nx, ny]
    if detector_first:
        axes, sizes = axes[2:] + axes[:2], sizes[2:] + sizes[:2]
    images = [  # the first is RGBA
        _image("", 23, [nx, ny], [(0, 1, "")] * 2, grey * 0x010101 + 0xFF000000, {}),
        _image("Survey", 2, [nx, ny], scan_axes, adf.astype(np.float32), {}),
        _image(name, _dm_code(dtype), sizes, axes, counts, tags),
    ]
    tree: dict[str, Any] = {"Padding": np.zeros(pad, np.uint8)} if pad else {}
    tree |= {"ApplicationBounds": (0, 0, 1080, 1920), "ImageList": images, "InImageMode": True}
    tree |= {"Thumbnails": [{"ImageIndex": 0, "SourceSize_Pixels": (ny, nx)}]}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with translate(StoreError, part), open(part, "wb") as file:
            file.writelines(stream_tags(tree))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_dataset(path: str | os.PathLike[str], spec: Synthetic | None = None) -> Path:
    """Write a dataset as a .dm4 and return its path.

    Examples
    --------
    >>> import tempfile
    >>> from stem_dask.readers.dm import list_dm
    >>> spec = Synthetic(scan_shape=(3, 2), electrons=500)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image = list_dm(write_dataset(f"{folder}/example.dm4", spec))[-1]
    >>> image.name, image.source.shape, [axis.units for axis in image.axes]
    ('image 2 (Diffraction SI)', (3, 2, 128, 120), ['nm', 'nm', '1/nm', '1/nm'])
    """
    spec = spec or Synthetic()
    rows = (pattern_row(spec, y) for y in range(spec.scan_shape[0]))
    shapes = (spec.scan_shape, spec.detector_shape)
    return write_dm4(path, rows, *shapes, spec.dtype, survey=spec.electrons * thickness(spec))

"""EMPAD (first generation): an .xml that names the .raw; patterns of 130 x 128 float32, of which 128 rows are image."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import number, stated
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers.flat import framed
from stem_dask.readers.source import Candidate, calibrated, scan_axes, side_text, stack_axes

_SIZE, _ROWS = 128, 130  # the last two rows hold the camera's own numbers

_SCAN_IN_NAME = re.compile(r"_x(\d+)_y(\d+)\.raw$", re.IGNORECASE)

_NAME = "the name of the .raw"


def list_empad(path: str) -> list[Candidate]:
    """The patterns of the .raw that an EMPAD's .xml names, (n, 128, 128) float32, and the scan as the .xml states it.

    Raises
    ------
    SourceError
        When the .xml is not one of an EMPAD, or the .raw is missing or holds no pattern.
    """
    root = _parse(path)
    named = root.find(".//raw_file")
    name = "" if named is None else (named.get("filename") or named.findtext("filename") or "")
    if not name.strip():
        raise SourceError(f"{path}: not an EMPAD .xml: it names no raw_file")
    # the camera's computer may have written a path of its own
    raw = str(Path(path).with_name(re.split(r"[\\/]", name.strip())[-1]))
    if not Path(raw).is_file():
        raise SourceError(f"{path}: the patterns are in {raw}, which is not there; copy it too")
    f4 = np.dtype("<f4")
    source, notes = framed(raw, 0, _ROWS * _SIZE * f4.itemsize, f4, (_SIZE, _SIZE))
    step = number(root.findtext(".//calibrated_pixelsize"))
    per_nm = step * 1e9 if step is not None else None
    offset = -_SIZE / 2 * (per_nm or 0.0)
    ky, kx = (calibrated(axis, _SIZE, per_nm, offset, "1/nm") for axis in ("ky", "kx"))
    scan, words = None, ""
    if root.find(".//scan_parameters/series_count") is None:  # else patterns at one place
        scan, words = _chosen(_sizes(root, raw), source.shape[0])
    return [
        Candidate(
            "patterns",
            source,
            stack_axes(source.shape[0], ky, kx),
            metadata=_tree(root, 0),
            scan=None if scan is None else _calibrated(root, *scan),
            hint="" if scan is not None else words,
            notes=(
                *notes,
                *((words,) if scan is not None and words else ()),
                f"patterns of {Path(raw).name}; rows 128 and 129 are not image, left out",
            ),
            files=(raw,),
            about=stated("EMPAD", lambda place: (_text(root, place), None)),
        )
    ]


def xml_of_raw(path: str) -> str | None:
    """The EMPAD's .xml that names this .raw: of the same name, or another one in the folder."""
    raw = Path(path)
    for xml in (raw.with_suffix(".xml"), *sorted(raw.parent.glob("*.xml"))[:16]):
        if not xml.is_file():
            continue
        try:
            named = _parse(str(xml)).find(".//raw_file")
        except SourceError:
            continue
        if named is not None and (named.get("filename") or "").strip().endswith(raw.name):
            return str(xml)
    return None


def _parse(path: str) -> ET.Element:
    text = side_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities can expand without bound
        raise SourceError(f"{path}: an .xml with a DOCTYPE or entities is not read")
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise SourceError(f"{path}: not readable XML: {error}") from error


def _sizes(root: ET.Element, raw: str) -> dict[str, tuple[int, int]]:
    """Every (scan_y, scan_x) that is stated, by its place: the .xml has the sizes of both modes, not which was used."""
    stated = {"pix_y and pix_x": (root.findtext("pix_y"), root.findtext("pix_x"))}
    for mode in ("acquire", "search"):
        scan = root.find(f".//scan_parameters[@mode='{mode}']")
        if scan is not None:
            sizes = (scan.findtext("scan_resolution_y"), scan.findtext("scan_resolution_x"))
            stated[f"the mode {mode}"] = sizes
    if in_name := _SCAN_IN_NAME.search(raw):
        stated[_NAME] = (in_name[2], in_name[1])
    axes = ((where, scan_axes(*sizes)) for where, sizes in stated.items())
    return {where: (pair[0].size, pair[1].size) for where, pair in axes if pair is not None}


def _chosen(stated: dict[str, tuple[int, int]], n: int) -> tuple[tuple[int, int] | None, str]:
    """The scan of ``n`` patterns, and a note on other sizes that are stated.

    Of the sizes that fit, the only one, or the one in the name of the .raw that the .xml confirms; None when several
    remain.

    Examples
    --------
    >>> _chosen({"the mode acquire": (4, 1), "the mode search": (1, 4), "the name of the .raw": (1, 4)}, 4)
    ((1, 4), 'the scan is 1 x 4 by the mode search and the name of the .raw, not 4 x 1 by the mode acquire')
    >>> _chosen({"the mode acquire": (4, 1), "the mode search": (1, 4)}, 4)
    (None, '[1, 4] by the mode search or [4, 1] by the mode acquire')
    """
    by_scan: dict[tuple[int, int], list[str]] = {}
    for where, scan in stated.items():
        by_scan.setdefault(scan, []).append(where)
    fitting = [scan for scan in by_scan if scan[0] * scan[1] == n]
    confirmed = [scan for scan in fitting if _NAME in by_scan[scan] and len(by_scan[scan]) > 1]
    left = confirmed or fitting or ([stated[_NAME]] if _NAME in stated else list(by_scan))
    if len(left) != 1:
        words = (f"{list(scan)} by {' and '.join(by_scan[scan])}" for scan in sorted(left))
        return None, " or ".join(words)
    [scan] = left
    others = [
        f"{by(other)} by {' and '.join(where)}" for other, where in by_scan.items() if other != scan
    ]
    if not others:
        return scan, ""
    return (
        scan,
        f"the scan is {by(scan)} by {' and '.join(by_scan[scan])}, not {' or '.join(others)}",
    )


def _calibrated(root: ET.Element, n_y: int, n_x: int) -> tuple[Axis, Axis] | None:
    """The axes of the scan, in nm where the .xml has the field of view."""
    field = root.find(".//optics.get_full_scan_field_of_view")
    if field is not None:
        meters = [number(word) for word in re.findall(r"[-+.\deE]+", field.text or "")]
        if len(meters) == 2 and None not in meters:
            steps = (float(m or 0) * 1e9 / n for m, n in zip(meters, (n_y, n_x), strict=True))
            return scan_axes(n_y, n_x, *steps, units="nm")
    # of the longer side, and multiplied by a factor that belongs to the camera only
    wide = number(root.findtext(".//full_scan_field_of_view/x"))
    factor = number(root.findtext(".//full_scan_field_of_view/scale_factor"))
    if wide and factor:
        step = wide / factor / max(n_y, n_x) * 1e9
        return scan_axes(n_y, n_x, step, step, units="nm")
    return scan_axes(n_y, n_x)


def _text(root: ET.Element, place: str) -> str | None:
    """The text of an element, or its attribute where the last name begins with @."""
    path, _, attribute = place.partition("/@")
    found = root.find(path)
    if found is None:
        return None
    return found.get(attribute) if attribute else found.text


def _tree(element: ET.Element, level: int) -> Any:
    """Elements as nested dictionaries."""
    children = {child.tag: _tree(child, level + 1) for child in element} if level < 12 else {}
    text = (element.text or "").strip()
    if not children and not element.attrib:
        return text
    return {**element.attrib, **children, **({"text": text} if text else {})}

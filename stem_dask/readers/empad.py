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
from stem_dask.readers.source import Candidate, calibrated, scan_axes, side_text, stack

_SIZE, _ROWS = 128, 130  # the last two rows hold the camera's own numbers

_NAME = "the name of the .raw"


def list_empad(path: str) -> list[Candidate]:
    """The patterns of the .raw that an EMPAD's .xml names, (n, 128, 128) float32, and the scan as the .xml states it."""
    root = _parse(path)
    named = root.find(".//raw_file")
    name = "" if named is None else (named.get("filename") or named.findtext("filename") or "")
    if not name.strip():
        raise SourceError(f"{path}: not an EMPAD .xml: it names no raw_file")
    # the camera's computer may have written a path of its own
    raw = str(Path(path).with_name(re.split(r"[\\/]", name.strip())[-1]))
    if not Path(raw).is_file():
        raise SourceError(f"{path}: the patterns are in {raw}, which is not there; copy it too")
    source, notes = framed(raw, 0, _ROWS * _SIZE * 4, np.dtype("<f4"), (_SIZE, _SIZE))
    step = number(root.findtext(".//calibrated_pixelsize"))
    per_nm = step * 1e9 if step is not None else None
    ky, kx = (
        calibrated(axis, _SIZE, per_nm, -_SIZE / 2 * (per_nm or 0.0), "1/nm")
        for axis in ("ky", "kx")
    )
    scan, words = None, ""
    if root.find(".//scan_parameters/series_count") is None:  # else patterns at one place
        scan, words = _scan(root, raw, source.shape[0])

    def lookup(place: str) -> tuple[str | None, None]:
        """The text of an element, or its attribute where the last name begins with @."""
        there, _, attribute = place.partition("/@")
        found = root.find(there)
        if found is None:
            return None, None
        return found.get(attribute) if attribute else found.text, None

    left_out = f"patterns of {Path(raw).name}; rows 128 and 129 are not image, left out"
    notes = (*notes, *((words,) if scan and words else ()), left_out)
    more = {"metadata": _tree(root), "scan": scan, "hint": "" if scan else words, "files": (raw,)}
    return [stack(source, ky, kx, notes=notes, about=stated("EMPAD", lookup), **more)]


def xml_of_raw(path: str) -> str | None:
    """The EMPAD's .xml that names this .raw: of the same name, or another one in the folder."""
    raw = Path(path)
    for xml in (raw.with_suffix(".xml"), *sorted(raw.parent.glob("*.xml"))[:16]):
        try:
            named = _parse(str(xml)).find(".//raw_file") if xml.is_file() else None
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


def _scan(root: ET.Element, raw: str, n: int) -> tuple[tuple[Axis, Axis] | None, str]:
    """The scan of ``n`` patterns in nm, and a note on other sizes that are stated; a hint when several remain.

    The .xml has the sizes of both modes, not which was used. Of the sizes that fit, the scan is the only one, or the one
    in the name of the .raw that the .xml confirms.
    """
    stated = {"pix_y and pix_x": (root.findtext("pix_y"), root.findtext("pix_x"))}
    for mode in ("acquire", "search"):
        scan = root.find(f".//scan_parameters[@mode='{mode}']")
        if scan is not None:
            sizes = (scan.findtext("scan_resolution_y"), scan.findtext("scan_resolution_x"))
            stated[f"the mode {mode}"] = sizes
    if in_name := re.search(r"_x(\d+)_y(\d+)\.raw$", raw, re.IGNORECASE):
        stated[_NAME] = (in_name[2], in_name[1])
    places: dict[tuple[int, int], list[str]] = {}
    for place, (height, width) in stated.items():
        if (axes := scan_axes(height, width)) is not None:
            places.setdefault((axes[0].size, axes[1].size), []).append(place)
    named = [sizes for sizes in places if _NAME in places[sizes]]
    fitting = [sizes for sizes in places if sizes[0] * sizes[1] == n]
    confirmed = [sizes for sizes in fitting if sizes in named and len(places[sizes]) > 1]
    left = confirmed or fitting or named or list(places)
    if len(left) != 1:
        words = (f"{list(sizes)} by {' and '.join(places[sizes])}" for sizes in sorted(left))
        return None, " or ".join(words)
    n_y, n_x = left[0]
    by_place = {sizes: f"{by(sizes)} by {' and '.join(where)}" for sizes, where in places.items()}
    note = f"the scan is {by_place.pop((n_y, n_x))}, not {' or '.join(by_place.values())}"
    steps: list[float] = []
    field = root.find(".//optics.get_full_scan_field_of_view")
    meters = [
        number(word) for word in re.findall(r"[-+.\deE]+", getattr(field, "text", None) or "")
    ]
    # of the longer side, and multiplied by a factor that belongs to the camera only
    wide = number(root.findtext(".//full_scan_field_of_view/x"))
    factor = number(root.findtext(".//full_scan_field_of_view/scale_factor"))
    if len(meters) == 2 and None not in meters:
        steps = [float(m or 0) * 1e9 / size for m, size in zip(meters, (n_y, n_x), strict=True)]
    elif wide and factor:
        steps = [wide / factor / max(n_y, n_x) * 1e9] * 2
    return scan_axes(n_y, n_x, *steps, units="nm"), note if by_place else ""


def _tree(element: ET.Element, level: int = 0) -> Any:
    """Elements as nested dictionaries."""
    children = {child.tag: _tree(child, level + 1) for child in element} if level < 12 else {}
    text = (element.text or "").strip()
    if not children and not element.attrib:
        return text
    return {**element.attrib, **children, **({"text": text} if text else {})}

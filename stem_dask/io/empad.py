"""EMPAD (first generation): an .xml that names the .raw; patterns of 130 x 128 float32, of which 128 rows are image."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.errors import SourceError
from stem_dask.io.candidate import Candidate, calibrated, number, scan_axes, side_text, stack_axes
from stem_dask.io.frames import framed
from stem_dask.io.instrument import stated
from stem_dask.model import Axis

_SIZE, _ROWS = 128, 130  # the last two rows hold the camera's own numbers
_SCAN_IN_NAME = re.compile(r"_x(\d+)_y(\d+)\.raw$", re.IGNORECASE)


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
    return [
        Candidate(
            "patterns",
            source,
            stack_axes(source.shape[0], ky, kx),
            metadata=_tree(root, [2000], 0),
            scan=_scan(root, raw),
            notes=(
                *notes,
                f"patterns of {Path(raw).name}; rows 128 and 129 are not image, left out",
            ),
            files=(raw,),
            about=stated("EMPAD", lambda place: (_text(root, place), None)),
        )
    ]


def xml_beside(path: str) -> str | None:
    """The EMPAD's .xml that names this .raw, of the same name or the only one in the folder that does."""
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
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # could grow without end; EMPAD writes none
        raise SourceError(f"{path}: an .xml with a DOCTYPE or entities is not read")
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise SourceError(f"{path}: not readable XML: {error}") from error


def _scan(root: ET.Element, raw: str) -> tuple[Axis, Axis] | None:
    """By pix_y and pix_x, else by the parameters of the acquisition, else by the name of the .raw."""
    if root.find(".//scan_parameters/series_count") is not None:
        return None  # a series of patterns at one place
    sizes = (root.findtext("pix_y"), root.findtext("pix_x"))
    if None in sizes:
        told = root.find(".//scan_parameters[@mode='acquire']")
        if told is not None:
            sizes = (told.findtext("scan_resolution_y"), told.findtext("scan_resolution_x"))
    if None in sizes and (in_name := _SCAN_IN_NAME.search(raw)):
        sizes = (in_name[2], in_name[1])
    scan = scan_axes(*sizes)
    if scan is None:
        return None
    field = root.find(".//optics.get_full_scan_field_of_view")
    n_y, n_x = scan[0].size, scan[1].size
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
    return scan


def _text(root: ET.Element, place: str) -> str | None:
    """The text of an element, or its attribute where the last name begins with @."""
    path, _, attribute = place.partition("/@")
    found = root.find(path)
    if found is None:
        return None
    return found.get(attribute) if attribute else found.text


def _tree(element: ET.Element, left: list[int], level: int) -> Any:
    """Elements as nested dictionaries, no more than ``left`` of them."""
    children = {}
    for child in element if level < 12 else ():
        left[0] -= 1
        if left[0] > 0:
            children[child.tag] = _tree(child, left, level + 1)
    text = (element.text or "").strip()
    if not children and not element.attrib:
        return text
    return {**element.attrib, **children, **({"text": text} if text else {})}

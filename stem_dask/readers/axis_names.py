"""The order of axes by their names: scan or detector, y or x."""

import re
from collections.abc import Sequence
from typing import Literal

from stem_dask.core.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS

Space = Literal["scan", "detector"]

#: prefixes (or suffixes) of y and x in the names of other programs; case, spaces and punctuation are ignored
_SPACES: dict[Space, str] = {
    "scan": "scan s r rn real realspace nav navigation pos position probe stage sample specimen beam raster step",
    "detector": "k kn q qn d g det detector dif diff diffraction dp cbed pattern camera cam sig signal recip reciprocal "
    "kspace freq theta alpha pix pixel",
}

_LETTERS = {"y": "y row rows slow", "x": "x col cols column columns fast"}

#: every known name -> (space, y or x)
_ROLES: dict[str, tuple[Space, str]] = {
    name: (space, letter)
    for space, words in _SPACES.items()
    for word in words.split()
    for letter, signs in _LETTERS.items()
    for sign in signs.split()
    for name in (word + sign, sign + word)
} | {"y": ("scan", "y"), "x": ("scan", "x"), "v": ("detector", "y"), "u": ("detector", "x")}

#: names that programs give to unnamed axes
_NO_NAME = re.compile(r"((axis|dim|dimension|phonydim)\d+|none|undefined|unnamed|)")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def role(name: str) -> tuple[Space, str] | None:
    """Whether an axis is of the scan or of the detector, and y or x; None for an unknown name.

    Examples
    --------
    >>> role("Q_Ny"), role("scan x"), role("Rx"), role("det_row"), role("energy")
    (('detector', 'y'), ('scan', 'x'), ('scan', 'x'), ('detector', 'y'), None)
    """
    return _ROLES.get(_plain(name))


def order_by(names: Sequence[str]) -> tuple[tuple[int, ...] | None, str]:
    """The positions of scan_y, scan_x, ky and kx (or pattern, ky and kx) in the file by the names of its axes, and a note.

    If x comes before y in both pairs, the order of the file is kept: py4DSTEM and Prismatic call the slower axis x.

    Returns
    -------
    The positions, or None if the names do not tell; a note, or "".

    Examples
    --------
    >>> order_by(["qy", "qx", "ry", "rx"])
    ((2, 3, 0, 1), "the detector's axes come first in the file (qy, qx, ry, rx); reading takes longer")
    >>> order_by(["axis0", "axis1", "axis2", "axis3"])
    (None, '')
    """
    listed = ", ".join(names)
    roles = [role(name) for name in names]
    pairs = {space: [i for i, r in enumerate(roles) if r and r[0] == space] for space in _SPACES}
    letters = {space: [r[1] for r in roles if r and r[0] == space] for space in _SPACES}
    known = [space for space in _SPACES if sorted(letters[space]) == ["x", "y"]]
    if len(names) == 3:
        return _of_list(names, pairs["detector"]) if "detector" in known else (None, "")
    if len(known) == 1 and len(pairs["scan"]) + len(pairs["detector"]) == 2:
        [other] = {*_SPACES} - {*known}  # the other two axes
        pairs[other] = [i for i in range(4) if i not in pairs[known[0]]]
        if pairs["scan"] == [0, 1]:
            return None, ""
    elif len(known) < 2:
        if all(_NO_NAME.fullmatch(_plain(name)) for name in names):
            return None, ""
        return None, f"the axis names {listed} are not recognised and were ignored"
    x_first = [space for space in known if letters[space] == ["x", "y"]]
    own = {*names} == {*SCAN_DIMS, *DETECTOR_DIMS}
    if len(x_first) < len(known) or own:
        for space in x_first:
            pairs[space].reverse()
        x_first = []
    order = (*pairs["scan"], *pairs["detector"])
    notes = []
    if order == (2, 3, 0, 1):
        notes.append(f"the detector's axes come first in the file ({listed}); reading takes longer")
    elif order != (0, 1, 2, 3):
        notes.append(f"the axes of the file are {listed}; they are put in order")
    if x_first:
        slow = " and ".join(names[pairs[space][0]] for space in x_first)
        notes.append(
            f"x comes before y in the axis names {listed}: the slower axis ({slow}) is read as y, as in files of py4DSTEM "
            "and Prismatic, which call it x"
        )
    return order, "; ".join(notes)


def _of_list(names: Sequence[str], detector: Sequence[int]) -> tuple[tuple[int, ...] | None, str]:
    """The order of three axes, given the two of the detector."""
    if {*names} == {*LIST_DIMS, *DETECTOR_DIMS}:
        detector = [names.index(name) for name in DETECTOR_DIMS]
    [first] = {0, 1, 2} - {*detector}
    order = (first, *detector)
    if order == (0, 1, 2):
        return order, ""
    return order, f"the axes of the file are {', '.join(names)}; they are put in order"

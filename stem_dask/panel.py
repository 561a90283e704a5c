"""What surrounds the picture of a panel: its title, the names and numbers of its axes, its scale of colors."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 110
TICK_SIZE, NAME_SIZE, TITLE_SIZE = 9.0, 10.0, 11.0  # points
LETTER, TICK, GAP = (
    0.08,
    0.1,
    0.04,
)  # inches: a digit, a tick and its distance from the number, the least distance
BAR_DISTANCE, BAR_WIDTH, BAR_TIP = 0.07, 0.12, 0.05  # inches; the tip is a part of the height
#: how many letters have room: those of longer texts are smaller, so that no text reaches into another panel
AXIS_LETTERS, BAR_LETTERS, NAME_LETTERS, TITLE_LETTERS = 6, 5, 40, 48
MOST_TICKS = 6


def inches(ax: "Axes") -> NDArray[np.float64]:
    """Width and height of the picture."""
    return np.array([ax.bbox.width, ax.bbox.height]) / DPI


def headline(ax: "Axes", text: str, color: str = "black") -> None:
    """Set the title, of one or two lines."""
    ax.set_title(text, color=color, fontsize=fitting(text, TITLE_LETTERS, TITLE_SIZE))


def mark(axis: Any, name: str, units: str = "", whole: bool = False) -> None:
    """Name an axis whose limits and size are final, and number it in as many round steps as have room."""
    low, high = (float(limit) for limit in np.sort(axis.get_view_interval()))
    across, (width, height) = axis.axis_name == "x", inches(axis.axes)
    power = math.floor(math.log10(max(abs(low), abs(high))))
    power = 0 if -4 < power < 6 else power  # a common factor keeps the numbers short
    if axis.get_scale() == "log":
        power, (ticks, texts) = 0, powers(low, high)
    else:
        ticks, texts = steps(low, high, MOST_TICKS, power, whole)
        for most in range(MOST_TICKS - 1, 0, -1):
            if not across or len(texts) * (LETTER * _longest(texts) + 2 * GAP) <= width:
                break
            ticks, texts = steps(low, high, most, power, whole)
    size = TICK_SIZE if across else fitting("\n".join(texts), AXIS_LETTERS, TICK_SIZE)
    axis.set_ticks(ticks, texts, fontsize=size)
    axis.set_ticks([], minor=True)
    unit = f"1e{power} {units}".strip() if power else units
    text = printable(f"{name} ({unit})" if unit else name)
    axis.set_label_text(text, fontsize=fitting(text, NAME_LETTERS, NAME_SIZE))
    # To find a place of its own for the name, matplotlib measures every number of the axis.
    numbers = 2 * LETTER if across else LETTER * _longest(texts) * size / TICK_SIZE
    away = -(TICK + numbers + GAP)
    axis.set_label_coords(*((0.5, away / height) if across else (away / width, 0.5)))


def color_bar(ax: "Axes", shown: Any, extend: str = "neither") -> None:
    """Add the scale of colors of a picture whose size is final, with a tip ("min", "max", "both") for what is outside.

    It is made of plain artists: matplotlib's own is a second set of axes, which costs more than the picture.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.image import BboxImage
    from matplotlib.lines import Line2D
    from matplotlib.markers import TICKRIGHT
    from matplotlib.patches import Polygon
    from matplotlib.transforms import Affine2D, Bbox, TransformedBbox

    cmap, norm, right = shown.get_cmap(), shown.norm, BAR_WIDTH
    low = BAR_TIP if extend in ("min", "both") else 0.0
    high = 1 - BAR_TIP if extend in ("max", "both") else 1.0
    # Across in inches beside the picture, upwards in parts of its height.
    width, _ = inches(ax)
    place = Affine2D().scale(1 / width, 1).translate(1 + BAR_DISTANCE / width, 0) + ax.transAxes
    look: dict[str, Any] = {"transform": place, "clip_on": False}
    colors = BboxImage(
        TransformedBbox(Bbox([[0, low], [right, high]]), place), cmap=cmap, origin="lower"
    )
    colors.set_data(np.linspace(0, 1, 256)[:, None])
    colors.set_clip_on(False)
    rim = [(0, low), (right / 2, 0), (right, low), (right, high), (right / 2, 1), (0, high)]
    under, over = cmap.get_under(), cmap.get_over()
    scale = powers if isinstance(norm, LogNorm) else steps
    ticks, texts = scale(float(norm.vmin), float(norm.vmax))
    heights = low + (high - low) * np.asarray(norm(ticks))
    dashes: dict[str, Any] = {
        "ls": "",
        "marker": TICKRIGHT,
        "ms": 3.5,
        "mew": 0.8,
        "color": "black",
    }
    for artist in (
        colors,
        Polygon(rim[:3], color=under, lw=0, **look),
        Polygon(rim[3:], color=over, lw=0, **look),
        Polygon(rim, fill=False, lw=0.8, **look),
        Line2D(np.full(len(ticks), right), heights, **dashes, **look),
    ):
        ax.figure.add_artist(artist)
    look |= {"va": "center", "fontsize": fitting("\n".join(texts), BAR_LETTERS, TICK_SIZE)}
    for y, text in zip(heights.tolist(), texts, strict=True):
        ax.text(right + TICK, y, text, **look)


def steps(
    low: float, high: float, most: int = MOST_TICKS, power: int = 0, whole: bool = False
) -> tuple[NDArray[np.float64], list[str]]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart, and their texts in units of 10**power.

    Parameters
    ----------
    low, high : the limits, which differ
    most : the most steps that have room
    power : of ten, by which the texts are divided
    whole : whether numbers between the integers make no sense

    Examples
    --------
    >>> ticks, texts = steps(-0.0125, 0.0125)
    >>> texts
    ['−0.010', '−0.005', '0.000', '0.005', '0.010']
    """
    least = (high - low) / most * (1 - 1e-9)
    digits = math.floor(math.log10(least))
    step = next(n * 10.0**digits for n in (1, 2, 5, 10) if n * 10.0**digits >= least)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = np.arange(first, last + 1, dtype=np.float64) * float(step)
    decimals = max(0, power - math.floor(math.log10(step) + 1e-9))
    return ticks, [f"{tick / 10.0**power:.{decimals}f}".replace("-", "−") for tick in ticks]


def powers(low: float, high: float) -> tuple[NDArray[np.float64], list[str]]:
    """Powers of ten from low to high, with numbers between them where there are few, and their texts.

    Examples
    --------
    >>> powers(3e-5, 8e9)[1]
    ['0.001', '1', '1000', '1e6', '1e9']
    >>> powers(0.4, 80)[1]
    ['1', '3', '10', '30']
    """
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    whole = last - first + (10.0**first >= low)
    between = {0: (1, 2, 5), 1: (1, 2, 5), 2: (1, 3)}.get(whole, (1,))
    step = math.ceil(max(whole, 1) / MOST_TICKS)
    every = (exponent for exponent in range(first, last + 1) if exponent % step == 0)
    ticks = np.array([part * 10.0**exponent for exponent in every for part in between])
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    return ticks, [_short(tick) for tick in ticks.tolist()]


def fitting(text: str, most: int, size: float) -> float:
    """The size at which a text takes no more room than ``most`` letters of ``size`` points.

    Examples
    --------
    >>> fitting("-0.0125", 6, 9.0) < fitting("-0.012", 6, 9.0) == 9.0
    True
    """
    return size * min(1.0, most / max(1, _longest(text.split("\n"))))


def printable(text: str) -> str:
    """Text that the fonts can draw and that is not taken for a formula."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans Mono"))
    known = (c if font.get_char_index(ord(c)) else "?" for c in text.expandtabs())
    return "".join(known).replace("$", r"\$")


def _longest(texts: list[str]) -> int:
    return max(map(len, texts), default=0)


def _short(value: float) -> str:
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}".replace("-", "−")

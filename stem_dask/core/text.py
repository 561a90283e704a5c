"""Numbers for people."""

from collections.abc import Sequence


def size(n_bytes: float) -> str:
    """Bytes for people, in powers of 1000.

    Examples
    --------
    >>> size(2_147_483_648), size(512)
    ('2.15 GB', '512 B')
    """
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def next_multiples(n: int, multiple: int) -> str:
    """What to give instead of a size that is no multiple.

    Examples
    --------
    >>> next_multiples(41, 4), next_multiples(1, 2)
    ('expected a multiple of 4 (size_multiple x downsampling): 40 or 44', 'expected a multiple of 2 (size_multiple x downsampling): 2')
    """
    lower = n // multiple * multiple
    sizes = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
    return f"expected a multiple of {multiple} (size_multiple x downsampling): {sizes}"


def by(shape: Sequence[int]) -> str:
    """Sizes as text.

    Examples
    --------
    >>> by((256, 1024))
    '256 x 1,024'
    """
    return " x ".join(f"{n:,}" for n in shape)

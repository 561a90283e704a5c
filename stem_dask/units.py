"""Numbers for people."""


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

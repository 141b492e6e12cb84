"""Sizes for people."""

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def format_size(size: int) -> str:
    """Bytes in the largest unit that there is one of, such as ``4.0 GB``."""
    for unit, factor in _UNITS:
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"

"""Durations and sizes as people write them. ``parse_…`` and ``format_…`` are inverse."""

import re
from decimal import Decimal

from wave_proxy.image.limit import UNITS_S

_UNITS_B = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
_UNITS_B |= {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B|)")


def parse_duration(text: str) -> float:
    """Seconds; a bare number is that already. Raises ValueError with the rule that is broken."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError('expected a duration such as "500ms", "10s", "15m", "36h" or "2d"')
    return float(match[1]) * UNITS_S[match[2] or "s"]


def format_duration(seconds: float) -> str:
    """In the largest unit that leaves a whole number; parts of a millisecond as a fraction of a second."""
    for unit, unit_s in reversed(UNITS_S.items()) if seconds else ():
        text = f"{seconds / unit_s:.0f}{unit}"
        if parse_duration(text) == seconds:
            return text
    return f"{Decimal(repr(seconds)).normalize():f}s"


def parse_size(text: str) -> int:
    """Bytes; a bare number is that already. Raises ValueError with the rule that is broken."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError('expected a size such as "512MB", "50GB" or "4GiB"')
    return int(Decimal(match[1]) * _UNITS_B[match[2]])


def format_size(size: int) -> str:
    """With the unit that leaves the smallest whole number."""
    count, unit = min((size // unit_b, unit) for unit, unit_b in _UNITS_B.items() if unit and size % unit_b == 0)
    return f"{count}{unit}"

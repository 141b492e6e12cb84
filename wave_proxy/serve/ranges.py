"""The Range header of RFC 9110 §14, for one range of bytes; several ranges may be answered with all, and are."""

import re

from wave_proxy.errors import RangeInvalid, clip

_MAX_CHARS = 200
_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*")


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open span that ``header`` asks for of ``size`` bytes; None when the whole is to be sent.

    Raises RangeInvalid when the span begins behind the end.
    """
    match = _RANGE.fullmatch(header) if header and len(header) <= _MAX_CHARS else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, end = max(size - int(match[2]), 0), size
    else:
        start, end = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None  # reversed: not a valid Range, so it counts as none
    if start >= size:
        raise RangeInvalid(f"the range {clip(header)} is outside of the {size} bytes", size)
    return start, end

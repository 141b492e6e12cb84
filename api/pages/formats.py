"""How pages write times, durations and texts of unknown origin."""

from datetime import datetime
from re import compile as compile_pattern

ABSENT = "-"

# What colours and moves the cursor of a terminal (ECMA-48): control sequences, commands to the system, single shifts.
_ESCAPES = compile_pattern(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-Z\\^-~]")
_LINE_ENDS = compile_pattern(r"\r+\n|\r")
_CONTROLS = compile_pattern(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")


def format_time(time: datetime | None) -> str:
    """``2024-04-09 22:31 (GMT+2)``, in the time's own zone. Source: ``wave.md`` V38."""
    if time is None:
        return ABSENT
    return f"{time:%Y-%m-%d %H:%M} ({_zone(time)})"


def format_duration(duration_s: float | None) -> str:
    """Minutes and seconds, ``m:ss``. Source: ``wave.md`` V38."""
    if duration_s is None:
        return ABSENT
    minutes, seconds = divmod(int(duration_s), 60)
    return f"{minutes}:{seconds:02}"


def readable(text: str) -> str:
    """Text without what a terminal would obey; other control characters, also those that turn the direction of
    writing, show as ``�``.
    """
    return _CONTROLS.sub("\ufffd", _LINE_ENDS.sub("\n", _ESCAPES.sub("", text)))


def _zone(time: datetime) -> str:
    offset = time.utcoffset()
    minutes = int(offset.total_seconds() // 60) if offset else 0
    if not minutes:
        return "GMT"
    hours, rest = divmod(abs(minutes), 60)
    return f"GMT{'+' if minutes > 0 else '-'}{hours}" + (f":{rest:02}" if rest else "")

"""What a quota lets in: so many in any span of so long."""

import re
from dataclasses import dataclass

UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_LIMIT = re.compile(r"(\d{1,15})\s*/\s*(\d{1,15}(?:\.\d{1,15})?)\s*(ms|s|m|h|d)")
_MOST = 10**9
_SHORTEST_S = UNITS_S["ms"]
_LONGEST_S = 366 * UNITS_S["d"]


@dataclass(frozen=True, slots=True)
class Limit:
    """At most ``max`` in any span of ``period_s`` seconds."""

    max: int
    period_s: float

    def __str__(self) -> str:
        name, unit_s = next((n, s) for n, s in reversed(UNITS_S.items()) if self.period_s >= s or n == "ms")
        return f"{self.max}/{self.period_s / unit_s:g}{name}"


def parse_limit(text: str) -> Limit | None:
    """``<max>/<duration>``, such as ``100/1h``; None for ``off``. Raises ValueError with the rule that is broken."""
    if text == "off":
        return None
    match = _LIMIT.fullmatch(text.strip())
    if match is None:
        raise ValueError('expected "<max>/<duration>", such as "100/1h", or "off"')
    limit = Limit(int(match[1]), float(match[2]) * UNITS_S[match[3]])
    if not 0 < limit.max <= _MOST or not _SHORTEST_S <= limit.period_s <= _LONGEST_S:
        raise ValueError(f'expected "<max>/<duration>" with 1 to {_MOST:,}, in a duration from 1ms to 366d')
    return limit

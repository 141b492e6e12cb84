"""Why a job has failed, in the parts that a page shows: what went wrong, which line of the log says so, what to do."""

from dataclasses import dataclass
from re import compile as compile_pattern

from api.pages.formats import readable

_OWN = ">> "  # what begins a line that the builder itself has written, the reason among them
_CUT = "…"
_STEP = compile_pattern(r"(.+) (ended with exit status \d+): (see .+)")
_LAST_LINE = compile_pattern(r"(.+) \((exit status \d+)\)")


@dataclass(frozen=True, slots=True)
class Reason:
    """``what`` is all of it where nothing of it was found in the log; then the others are empty."""

    what: str
    quote: str = ""
    advice: str = ""


def read_reason(text: str, log: str) -> Reason | None:
    """The parts of ``<what>: <line of the log>; <advice>``, and of what the builder says where it knows no advice.

    A long line may be cut. None for no text.
    """
    if not text:
        return None
    parts = _parts(text)
    return parts if parts.quote and _is_in(log, parts.quote.removesuffix(_CUT)) else Reason(text)


def _parts(text: str) -> Reason:
    if match := _STEP.fullmatch(text):
        return Reason(f"a step {match[2]}", match[1], match[3])
    if match := _LAST_LINE.fullmatch(text):
        return Reason(match[2], match[1])
    what, _, rest = text.partition(": ")
    quote, _, advice = rest.rpartition("; ")
    return Reason(what, quote, advice)


def _is_in(log: str, quote: str) -> bool:
    lines = (" ".join(line.split()) for line in readable(log).split("\n"))
    return any(quote in line for line in lines if not line.startswith(_OWN))

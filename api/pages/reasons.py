"""Why a job has failed, in the parts that a page shows: what went wrong, which line of the log says so, what to do."""

from dataclasses import dataclass

from api.pages.formats import readable

_OWN = ">> "  # what begins a line that the builder itself has written, the reason among them
_CUT = "…"


@dataclass(frozen=True, slots=True)
class Reason:
    """``what`` is all of it where nothing of it was found in the log; then the others are empty."""

    what: str
    quote: str = ""
    advice: str = ""


def read_reason(text: str, log: str) -> Reason | None:
    """The parts of ``<what>: <line of the log>; <advice>``; a long line may be cut. None for no text."""
    what, _, rest = text.partition(": ")
    quote, _, advice = rest.rpartition("; ")
    if quote and _is_in(log, quote.removesuffix(_CUT)):
        return Reason(what, quote, advice)
    return Reason(text) if text else None


def _is_in(log: str, quote: str) -> bool:
    lines = (" ".join(line.split()) for line in readable(log).split("\n"))
    return any(quote in line for line in lines if not line.startswith(_OWN))

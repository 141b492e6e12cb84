"""What a client can say of a sliding window: was more let in than the limit, and how much of it.

A client knows of an admission when it sent the request and when it had the answer; the decision was somewhere between,
and for all that it knows anywhere. So it can't name the most decisions in a window, but it can name a number that is
certain:

- Admissions are alike, so only the sorted instants of the decisions matter. Whatever these were, the k-th of them is
  not before the k-th of the sorted ``sent`` and not after the k-th of the sorted ``answered``: each decision lies
  between its own two, and sorting keeps that.
- Under a limit of n the k-th decision is at least one period after the one n places before it. Taking each as early as
  that and ``sent`` allow is the best that can be done, since an earlier one never delays a later one. If one is then
  after its ``answered``, no decisions under that limit explain what was seen: the limit was broken, for certain.

The least limit that does explain it is the figure. It never accuses wrongly; it needs no allowance for latency; and it
sees what single windows don't show, as two windows of which each may be full but not both. What it can't see is an
excess that is shorter than the answers' latencies.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf


def _instants() -> "array[float]":
    return array("d")


@dataclass
class Admissions:
    """The requests that were let in: when each was sent and when its answer was there, in seconds of one clock."""

    sent: "array[float]" = field(default_factory=_instants)
    answered: "array[float]" = field(default_factory=_instants)

    def __len__(self) -> int:
        return len(self.sent)

    def add(self, sent: float, answered: float) -> None:
        """Note one."""
        self.sent.append(sent)
        self.answered.append(answered)

    def merge(self, others: "Admissions") -> None:
        """Note all those of another."""
        self.sent.extend(others.sent)
        self.answered.extend(others.answered)

    def between(self, since: float, until: float) -> int:
        """How many were certainly decided in that span: sent and answered in it."""
        return sum(since <= sent and answered < until for sent, answered in zip(self.sent, self.answered, strict=True))

    def slowest_s(self, since: float = -inf, until: float = inf) -> float:
        """The longest of those that were sent in that span took from request to answer; 0.0 when there is none."""
        pairs = zip(self.sent, self.answered, strict=True)
        return max((answered - sent for sent, answered in pairs if since <= sent < until), default=0.0)


def least_limit(admissions: Admissions, period_s: float) -> int:
    """The least limit under which the admissions are possible: more than the true one means that it was broken."""
    earliest, latest = sorted(admissions.sent), sorted(admissions.answered)
    low, high = 0, len(earliest)
    while low < high:
        middle = (low + high) // 2
        if _is_possible(earliest, latest, period_s, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _is_possible(earliest: Sequence[float], latest: Sequence[float], period_s: float, limit: int) -> bool:
    if limit == 0:
        return not earliest
    decided: list[float] = []
    for number, (sent, answered) in enumerate(zip(earliest, latest, strict=True)):
        at = max(sent, decided[number - limit] + period_s) if number >= limit else sent
        if at > answered:
            return False
        decided.append(at)
    return True


def most_up_to(admissions: Admissions, period_s: float, since: float) -> int:
    """The most that were certainly decided within the period up to an admission that was sent after ``since``, with it.

    For the time after an outage: what was let in meanwhile counts, and may be more than the limit by itself.
    """
    sent, answered = sorted(admissions.sent), sorted(admissions.answered)
    return max(
        (
            # Those answered before this one was sent, without those sent before the window may have begun.
            bisect_left(answered, begin) - bisect_right(sent, end - period_s) + 1
            for begin, end in zip(admissions.sent, admissions.answered, strict=True)
            if begin > since
        ),
        default=0,
    )


def share_admitted(admissions: Admissions, limit: int, period_s: float, periods: int) -> float:
    """What was let in within so many periods from the first admission on, by the most that the limit allows in them.

    Asking must have gone on that long without a pause. Only what was certainly within is counted.
    """
    begins = min(admissions.sent, default=0.0)
    return bisect_left(sorted(admissions.answered), begins + periods * period_s) / (limit * periods)

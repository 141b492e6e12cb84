"""Quota arithmetic of one subject in one process: permits on lease, uses to report, refusals to remember.

Instants are seconds of one monotonic clock, passed in by the caller; they must not go back by more than the quantum.
"""

from typing import final

@final
class Ledger:
    """Permits that were leased, and what became of them.

    A permit may be used until its lease ends. Uses are kept for the report: those within one quantum together, under
    the instant of the last of them, so never earlier than they were. Uses older than the window are forgotten.
    """

    def __init__(self, quantum_s: float, window_s: float) -> None: ...
    @property
    def unused(self) -> int:
        """Permits that were granted and not used, also when their lease has ended."""

    @property
    def deadline(self) -> float:
        """When the lease ends; 0.0 before the first."""

    def take(self, now: float) -> bool:
        """Use a permit; False when none is at hand."""

    def record(self, now: float) -> None:
        """Note a use that had no permit."""

    def settle(self) -> list[tuple[float, int]]:
        """Give up the unused permits and hand over the uses since the last time: (instant, count), oldest first."""

    def grant(self, permits: int, deadline: float, frees: list[tuple[float, int]]) -> None:
        """Begin a lease in place of the last one.

        ``frees`` says when how many more can free, in order of time; empty when there are more to be had at once.
        """

    def delay(self, now: float, position: int) -> float:
        """Seconds in which the permit for whoever stands at ``position`` (0: the first) can't free; 0.0: ask now.

        Beyond what is known it is the time to the last instant that is.
        """

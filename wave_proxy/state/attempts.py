"""How often each address has tried something, so that nobody guesses passwords at speed."""

from collections import OrderedDict
from time import monotonic

from wave_proxy.errors import TooManyRequests
from wave_proxy.state.networks import network_of

_ADDRESSES = 10_000
_MAX_RETRY_AFTER_S = 60  # clients sleep for as long as it says; the true time stands beside it


class Attempts:
    """Attempts in this process by address (IPv6 by /64): at most ``limit`` in ``period_s`` seconds.

    ``what`` says in messages what there is too much of. Of very many addresses those are forgotten that tried nothing
    for longest.
    """

    def __init__(self, what: str, limit: int = 20, period_s: float = 60.0) -> None:
        self._what = what
        self._limit = limit
        self._period_s = period_s
        self._counts: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and when they are forgotten

    def check(self, address: str) -> None:
        """Raises TooManyRequests when that address has no more attempts for now."""
        count, ends = self._counts.get(network_of(address), (0, 0.0))
        left_s = ends - monotonic()
        if left_s > 0 and count >= self._limit:
            again_s = int(left_s) + 1
            raise TooManyRequests(
                f"too many {self._what}; try again in {again_s} s",
                min(again_s, _MAX_RETRY_AFTER_S),
                limit=self._limit,
                remaining=0,
                reset_s=again_s,
            )

    def count(self, address: str, number: int = 1) -> float:
        """So many more; returns until when they count (monotonic)."""
        network, now = network_of(address), monotonic()
        count, ends = self._counts.get(network, (0, 0.0))
        count, ends = (count + number, ends) if now < ends else (number, now + self._period_s)
        self._counts[network] = count, ends
        self._counts.move_to_end(network)
        if len(self._counts) > _ADDRESSES:
            self._counts.popitem(last=False)
        return ends

    def take_back(self, address: str, number: int, until: float) -> None:
        """Count so many no more, of those that count until then."""
        network = network_of(address)
        count, ends = self._counts.get(network, (0, 0.0))
        if ends == until:
            self._counts[network] = count - number, ends

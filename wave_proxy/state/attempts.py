"""How often each address has tried something, so that nobody guesses passwords at speed."""

from collections import OrderedDict
from time import monotonic

from wave_proxy.errors import TooManyRequests
from wave_proxy.state.networks import network_of

_ADDRESSES = 10_000


class Attempts:
    """Attempts in this process by address (IPv6 by /64): at most ``limit`` in ``period_s`` seconds.

    ``what`` names them in messages. Of very many addresses those are forgotten that tried nothing for longest.
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
            raise TooManyRequests(f"too many {self._what} from this address", int(left_s) + 1)

    def count(self, address: str, number: int = 1) -> None:
        """So many more."""
        network, now = network_of(address), monotonic()
        count, ends = self._counts.get(network, (0, 0.0))
        self._counts[network] = (count + number, ends) if now < ends else (number, now + self._period_s)
        self._counts.move_to_end(network)
        if len(self._counts) > _ADDRESSES:
            self._counts.popitem(last=False)

"""What container requests take of the state store, which keeps them in memory: limited for each who asks."""

from collections.abc import Iterator
from contextlib import contextmanager

from wave_proxy.state.attempts import Attempts

_WHAT = "bytes of container requests"
_PERIOD_S = 3600.0
_LEAST_BYTES = 1 << 10  # with what goes with each


class Sizes:
    """Counts bytes in this process: of each address that is not known, and of each known user, in an hour."""

    def __init__(self, *, anonymous: int = 64 * 10**6, identified: int = 512 * 10**6) -> None:
        self._limits = {
            False: Attempts(f"{_WHAT} from this address", anonymous, _PERIOD_S),
            True: Attempts(f"{_WHAT} of this user", identified, _PERIOD_S),
        }

    def check(self, email: str, ip_address: str) -> None:
        """Raises TooManyRequests for who has no more bytes for now."""
        self._limits[bool(email)].check(email or ip_address)

    @contextmanager
    def admitted(self, size: int, email: str, ip_address: str) -> Iterator[None]:
        """Let in so many bytes, which the block has kept; when it raises, nothing is, and nothing counts.

        Raises TooManyRequests.
        """
        self.check(email, ip_address)
        limit, who, size = self._limits[bool(email)], email or ip_address, max(size, _LEAST_BYTES)
        until = limit.count(who, size)
        try:
            yield
        except BaseException:
            limit.take_back(who, size, until)
            raise

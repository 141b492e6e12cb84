"""When to leave a registry alone: circuit breakers, without a clock, a loop or chance of their own.

A registry is *closed* to begin with: everything goes through. When several requests in a row found it unwell (no
connection, silence, 5xx, each after its retries), or when it said 429, it is *open*: nothing goes out, and whoever asks
is told why, and when to come back. When that time is over one request tries, while the others are still told; it closes
the breaker again, or opens it for twice as long. What is about one piece of content (404, 403, a wrong digest) shows a
registry that works; and 5xx for the same thing count once, so that one broken image takes nobody's registry away. So
that it does not keep it away either, what has brought 5xx lets others try first.

Times are seconds of any clock that only goes forward.
"""

from collections import OrderedDict
from math import ceil

import structlog

from wave_proxy.errors import (
    HostUnknown,
    Offline,
    TooManyRequests,
    UpstreamFailing,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaveError,
)

_log = structlog.get_logger()

FAILURES = 3
FIRST_PAUSE_S = 5.0
MAX_PAUSE_S = 60.0

_MAX_PLACES = 1024


class Breaker:
    """The breaker of one registry. Whoever was admitted reports back: succeed(), fail() or give_up()."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._failed: set[str] = set()
        self._reason: WaveError | None = None  # why it is open
        self._until = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._trying = False

    @property
    def is_open(self) -> bool:
        """Whether requests are held back, but for one that tries."""
        return self._reason is not None

    def admit(self, about: str, now: float) -> bool:
        """Let a request for ``about`` go out; True for the one that tries whether the registry is well again.

        Raises what ``check`` raises.
        """
        self.check(about, now)
        self._trying = self.is_open
        return self._trying

    def check(self, about: str, now: float) -> None:
        """Return when a request would be admitted.

        Raises TooManyRequests when a 429 opened it, else UpstreamUnavailable, both with the time to come back.
        """
        if self._reason is None:
            return
        until = self._until
        if now >= until and about in self._failed:
            until += FIRST_PAUSE_S
        if now >= until and not self._trying:
            return
        wait_s = max(ceil(until - now), 1)
        again = f"for another {wait_s} s" if now < until else "while one request tries it again"
        if isinstance(self._reason, TooManyRequests):
            raise TooManyRequests(f"{self._place} limits requests and is left alone {again}: {self._reason}", wait_s)
        raise UpstreamUnavailable(f"{self._place} has failed and is left alone {again}: {self._reason}", wait_s)

    def succeed(self) -> None:
        """A request was answered; that counts also when it went out before the breaker opened."""
        self._failed.clear()
        self._reason = None
        self._pause_s = FIRST_PAUSE_S
        self._trying = False

    def fail(self, err: WaveError, about: str, now: float, *, trial: bool = False, spread: float = 1.0) -> None:
        """A request for ``about`` ended with TooManyRequests, UpstreamUnavailable or UpstreamTimeout.

        ``spread`` (at least 1) stretches the pause, so that not all processes come back at once.
        """
        limited = isinstance(err, TooManyRequests)
        if isinstance(err, UpstreamFailing):
            self._failed.add(about)
        elif not self.is_open:  # no answer came: what was asked for is not to blame
            self._failed.add(f"no answer {len(self._failed)}")
        if trial:
            self._trying = False
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        elif self.is_open and not limited:
            return  # it went out before, and says nothing new of the registry
        if limited or trial or len(self._failed) >= FAILURES:
            pause_s = float(err.retry_after_s or FIRST_PAUSE_S) if limited else self._pause_s
            self._reason = err
            self._until = max(self._until, now + pause_s * spread)

    def give_up(self) -> None:
        """The one that tried ended without a result: another one may try."""
        self._trying = False


class Breakers:
    """The breakers of one process, by registry or host; only those that are not well have one, and none ``spared``."""

    def __init__(self, spared: frozenset[str] = frozenset()) -> None:
        self._spared = spared
        self._breakers: OrderedDict[str, Breaker] = OrderedDict()

    def admit(self, place: str, about: str, now: float) -> bool:
        """Let a request go out, as ``Breaker.admit`` does; settle() has to follow."""
        breaker = self._breakers.get(place)
        return breaker is not None and breaker.admit(about, now)

    def check(self, place: str, about: str, now: float) -> None:
        """Return when a request would be admitted; raises what ``Breaker.check`` raises."""
        breaker = self._breakers.get(place)
        if breaker is not None:
            breaker.check(about, now)

    def settle(
        self, place: str, about: str, err: BaseException | None, now: float, *, trial: bool, spread: float
    ) -> None:
        """How a request ended that was admitted; ``err`` is None for a good answer."""
        if place in self._spared:
            return
        match err:
            case Offline() | HostUnknown():
                self._give_up(place, trial)
            case UpstreamUnavailable() | UpstreamTimeout() | TooManyRequests():
                self._fail(place, about, err, now, trial, spread)
            case None | WaveError():
                breaker = self._breakers.pop(place, None)
                if breaker is not None and breaker.is_open:
                    _log.info("registry is well again", registry=place)
            case _:
                self._give_up(place, trial)

    def is_open(self, place: str) -> bool:
        """Whether requests for that place are held back."""
        breaker = self._breakers.get(place)
        return breaker is not None and breaker.is_open

    def _give_up(self, place: str, trial: bool) -> None:
        breaker = self._breakers.get(place)
        if breaker is not None and trial:
            breaker.give_up()

    def _fail(self, place: str, about: str, err: WaveError, now: float, trial: bool, spread: float) -> None:
        breaker = self._breakers.setdefault(place, Breaker(place))
        was_open = breaker.is_open
        breaker.fail(err, about, now, trial=trial, spread=spread)
        if breaker.is_open and not was_open:
            _log.warning("registry is left alone", registry=place, reason=str(err))
        if len(self._breakers) > _MAX_PLACES:
            self._breakers.popitem(last=False)

"""Since when the api does not answer, and what is said to who asks for it."""

from time import monotonic

_RESTART_S = 10.0  # what a restart may take

_RESTARTING = "the API is restarting; try again in a moment"
_ABSENT = (
    "no API answers here, only pulls are served: start one on this machine with the same settings and data folder, "
    "`wave-proxy api`"
)


class Absence:
    """The api of one worker; from the start on it is awaited."""

    def __init__(self, restart_s: float = _RESTART_S) -> None:
        self._restart_s = restart_s
        self._since: float | None = monotonic()

    def end(self) -> None:
        """The api has answered."""
        self._since = None

    def explain(self) -> str:
        """What to say now that it has not."""
        now = monotonic()
        if self._since is None:
            self._since = now
        return _RESTARTING if now - self._since < self._restart_s else _ABSENT

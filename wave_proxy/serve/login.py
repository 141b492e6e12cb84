"""Who may change local repositories: accounts over Basic authentication, with a limit on guessing."""

from collections import OrderedDict
from time import monotonic

from wave_proxy.errors import TooManyRequests, Unauthorized
from wave_proxy.serve.messages import Request
from wave_proxy.state.accounts import BUILDER, Accounts, parse_basic

CHALLENGE = ("WWW-Authenticate", 'Basic realm="wave-proxy"')

_MAX_FAILURES = 20  # of one address in a period
_PERIOD_S = 60.0
_ADDRESSES = 10_000

ANONYMOUS = "anonymous"


class Logins:
    """The logins at one worker."""

    def __init__(self, accounts: Accounts, *, anonymous: bool) -> None:
        """``anonymous``: everybody may, and nobody is asked."""
        self._accounts = accounts
        self._anonymous = anonymous
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and when they are forgotten

    @property
    def asks(self) -> bool:
        """Whether a login can bring anything: there are accounts, and not everybody may without."""
        return bool(self._accounts) and not self._anonymous

    def check(self, request: Request) -> str:
        """The user who may make changes. Raises Unauthorized, TooManyRequests."""
        if self._anonymous:
            return ANONYMOUS
        authorization = request.header(b"authorization") or ""
        if not parse_basic(authorization)[0]:
            raise Unauthorized("to push to a local repository or to delete from it takes a login of [accounts]")
        return self._check(authorization, request.client)

    def check_given(self, request: Request) -> None:
        """Refuse a wrong login, and let pass who comes without one. Raises Unauthorized, TooManyRequests."""
        authorization = request.header(b"authorization") or ""
        if self.asks and parse_basic(authorization)[0]:
            self._check(authorization, request.client)

    def _check(self, authorization: str, client: str) -> str:
        if parse_basic(authorization)[0] == BUILDER:  # its secret is too long to be guessed, and builds run beside it
            return self._accounts.check(authorization)
        count, ends = self._failures.get(client, (0, 0.0))
        now = monotonic()
        if now >= ends:
            count, ends = 0, now + _PERIOD_S
        if count >= _MAX_FAILURES:
            raise TooManyRequests("too many wrong logins from this address", int(ends - now) + 1)
        try:
            return self._accounts.check(authorization)
        except Unauthorized:
            self._failures[client] = count + 1, ends
            self._failures.move_to_end(client)
            if len(self._failures) > _ADDRESSES:
                self._failures.popitem(last=False)
            raise

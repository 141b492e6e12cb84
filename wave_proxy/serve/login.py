"""Who may change local repositories: accounts over Basic authentication."""

from wave_proxy.errors import Unauthorized
from wave_proxy.serve.messages import Request
from wave_proxy.state.accounts import Accounts, parse_basic

CHALLENGE = ("WWW-Authenticate", 'Basic realm="wave-proxy"')

ANONYMOUS = "anonymous"


class Logins:
    """The logins at one worker."""

    def __init__(self, accounts: Accounts, *, anonymous: bool) -> None:
        """``anonymous``: everybody may, and nobody is asked."""
        self._accounts = accounts
        self._anonymous = anonymous

    @property
    def asks(self) -> bool:
        """Whether a login can bring anything: there are accounts, and not everybody may without."""
        return bool(self._accounts) and not self._anonymous

    async def check(self, request: Request) -> str:
        """The user who may make changes. Raises Unauthorized, TooManyRequests."""
        if self._anonymous:
            return ANONYMOUS
        authorization = request.header(b"authorization") or ""
        if not parse_basic(authorization)[0]:
            raise Unauthorized("to push to a local repository or to delete from it takes a login of [accounts]")
        return await self._accounts.check(authorization, request.client)

    async def check_given(self, request: Request) -> None:
        """Refuse a wrong login, and let pass who comes without one. Raises Unauthorized, TooManyRequests."""
        authorization = request.header(b"authorization") or ""
        if self.asks and parse_basic(authorization)[0]:
            await self._accounts.check(authorization, request.client)

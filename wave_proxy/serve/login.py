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
        return ANONYMOUS if self._anonymous else await self.check_account(request)

    async def check_account(self, request: Request) -> str:
        """The user whose login the request has. Raises Unauthorized, TooManyRequests."""
        authorization = request.header(b"authorization") or ""
        if not parse_basic(authorization)[0]:
            raise Unauthorized(
                "to push to a local repository, to delete from it, or to read a private one takes a login of "
                "[accounts]; Docker sends none here, not even after `docker login`: it takes "
                "[local] anonymous_push = true to push with it"
            )
        return await self._accounts.check(authorization, request.client)

    async def check_given(self, request: Request) -> None:
        """Refuse a wrong login, and let pass who comes without one. Raises Unauthorized, TooManyRequests."""
        authorization = request.header(b"authorization") or ""
        if self.asks and parse_basic(authorization)[0]:
            await self._accounts.check(authorization, request.client)

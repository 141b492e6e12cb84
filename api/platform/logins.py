"""What the proxy workers ask the api: ``GET /internal/login``, for who pulls by a token. No client gets here."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api.platform.platforms import Platforms
from api.replies import json_reply
from wave_proxy.errors import Denied
from wave_proxy.state.tokens import TokenStore


class InternalLogins:
    """Logins that Platforms keep for their users, by the tokens of containers."""

    def __init__(self, tokens: TokenStore, platforms: Platforms) -> None:
        self._tokens = tokens
        self._platforms = platforms
        self.routes = [Route("/internal/login", self.find)]

    async def find(self, request: Request) -> Response:
        """200 with ``username`` and ``password``, 204 when the user has no login for that repository."""
        query = request.query_params
        record = await self._tokens.find_record(query.get("token", ""))
        if record is None or record.deleted:
            raise Denied("there is no such token")
        identity = record.request.identity
        login = None
        if identity.access_token:
            registry, repository = query.get("registry", ""), query.get("repository", "")
            login = await self._platforms.find_login(identity, registry, repository)
        if login is None:
            return Response(status_code=204)
        return json_reply({"username": login.username, "password": login.password})

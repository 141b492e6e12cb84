"""Credentials of registries: whether they work (``wave.md`` §1.11)."""

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from api.body import read_object
from api.callers import client_address
from api.endpoints import ASKING_UPSTREAM, Answer, endpoint, routes_of
from api.schema import Filled, Wire, parse_body
from wave_proxy.state.attempts import Attempts
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.logins import LoginChecks

_GROUP = "Credentials"
_PER_MINUTE = 30
_ANSWERS = {200: Answer("Whether the registry takes them.", bool)} | {
    status: ASKING_UPSTREAM[status] for status in (400, 403, 413, 429)
}


class CredentialsSpec(Wire):
    """A registry, and a user there."""

    user_name: Filled
    password: Filled = Field(repr=False)
    registry: Filled
    """Its host, or its URL."""


class LegacyCredentialsSpec(Wire):
    """The same inside of another object."""

    request: CredentialsSpec


class CredentialChecks:
    """The endpoints that try credentials. No address gets many tries, since it might be guessing."""

    def __init__(self, logins: LoginChecks, *, max_body_bytes: int) -> None:
        self._logins = logins
        self._max_body_bytes = max_body_bytes
        self._attempts = Attempts("checks of credentials from this address", _PER_MINUTE)
        self.routes = routes_of(self)

    @endpoint("POST", "/v1alpha2/validate-creds", _GROUP, _ANSWERS, body=CredentialsSpec)
    async def validate(self, request: Request) -> Response:
        """Try the credentials of a registry.

        They are kept nowhere. A registry that can't be reached takes none, nor does one that lets everybody in. Of
        registries in private networks only those are asked that the operator has opened.
        """
        return await self._answer(
            parse_body(CredentialsSpec, await read_object(request, self._max_body_bytes)), request
        )

    @endpoint("POST", "/validate-creds", _GROUP, _ANSWERS, body=LegacyCredentialsSpec, deprecated=True)
    async def validate_legacy(self, request: Request) -> Response:
        """Try the credentials of a registry, in the older form."""
        body = parse_body(LegacyCredentialsSpec, await read_object(request, self._max_body_bytes))
        return await self._answer(body.request, request)

    async def _answer(self, asked: CredentialsSpec, request: Request) -> Response:
        address = client_address(request)
        self._attempts.check(address)
        self._attempts.count(address)
        takes = await self._logins.check(asked.registry, Login(asked.user_name, asked.password))
        return Response(b"true" if takes else b"false", media_type="application/json")

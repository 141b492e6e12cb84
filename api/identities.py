"""Who asks: from what a request claims of its user to an identity that is known to be true."""

from dataclasses import dataclass, field
from typing import Protocol

from api.schema import Claiming
from wave_proxy.errors import AccessTokenRefused, PairingMissing, RequestInvalid
from wave_proxy.image.platform import DEFAULT_ENDPOINT, known_endpoint
from wave_proxy.image.request import Identity
from wave_proxy.state.identities import AccessToken, AccessTokens, is_ours

HOW_TO_BE_KNOWN = (
    "give one as towerAccessToken or in the header Authorization: Bearer; the operator of this server issues them "
    "with `wave-proxy token create`"
)
_NO_PLATFORM = "the access token is none of this server's, which begin with wpt-, and no Platform is set up here"


@dataclass(frozen=True, slots=True)
class Claims:
    """What a request says of its user; tokens never show in ``repr``. Clients send an endpoint without a token too."""

    access_token: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    endpoint: str = DEFAULT_ENDPOINT
    workspace_id: int | None = None
    workflow_id: str = ""


def claims_of(body: Claiming, workflow_id: str | None = None) -> Claims:
    """The claims in a request's body, with the Platform's endpoint as it is called today."""
    return Claims(
        body.tower_access_token or "",
        body.tower_refresh_token or "",
        known_endpoint(body.tower_endpoint or ""),
        body.tower_workspace_id,
        workflow_id or "",
    )


class PlatformUsers(Protocol):
    """Those who have their access token from a Platform."""

    async def identify(self, claims: Claims, bearer: str) -> Identity:
        """The user whose ``claims.access_token`` it is, with ``access_token`` and ``endpoint`` set.

        ``bearer`` is the token of the request's header, or empty: Nextflow puts a new one there when it has refreshed
        the one that the body still holds. Raises PairingMissing, Unauthorized, and what comes of a Platform out of
        reach.
        """


class Identities:
    """Checks claims: against the operator's own access tokens, or at the Platform that they name, if there is one.

    Without ``anonymous`` everybody has to be known.
    """

    def __init__(self, tokens: AccessTokens, platform: PlatformUsers | None = None, *, anonymous: bool = True) -> None:
        self._tokens = tokens
        self._platform = platform
        self._anonymous = anonymous

    async def identify(self, claims: Claims, authorization: str = "") -> Identity:
        """The identity of who makes these claims; ``authorization`` is the request's header of that name.

        The body's token decides; without one, an access token of ours in the header does, and any other bearer there is
        none of our business: clients send it with every request. A token of ours goes to no Platform.
        Raises AccessTokenRefused; PairingMissing; RequestInvalid for who has to be known and is not; and what the
        Platform raises.
        """
        bearer = bearer_of(authorization)
        token = claims.access_token or (bearer if is_ours(bearer) else "")
        if is_ours(token):
            return _local(await self._tokens.check(token), claims)
        if token:
            if self._platform is None:
                raise PairingMissing(claims.endpoint, _NO_PLATFORM)
            if not (token.isascii() and token.isprintable()):  # a Platform gets it in a header
                raise AccessTokenRefused("no access token has such characters")
            return await self._platform.identify(claims, "" if is_ours(bearer) else bearer)
        if not self._anonymous:
            raise RequestInvalid(f"Missing user access token - {HOW_TO_BE_KNOWN}")
        return Identity(workspace_id=claims.workspace_id, endpoint=claims.endpoint)


def bearer_of(authorization: str) -> str:
    """The token of a bearer header; empty when it is none."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _local(token: AccessToken, claims: Claims) -> Identity:
    return Identity(token.user_id, token.email, claims.workspace_id, endpoint=claims.endpoint)

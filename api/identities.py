"""Who asks: from what a request claims of its user to an identity that is known to be true."""

from dataclasses import dataclass, field
from typing import Protocol

from wave_proxy.image.request import Identity

DEFAULT_ENDPOINT = "https://api.cloud.seqera.io"

# Hosts of former names of the Platform. Source: ``wave.md`` §4.2.
_RENAMED = {"/api.tower.nf": "/api.cloud.seqera.io", "/api.stage-tower.net": "/api.cloud.stage-seqera.io"}


@dataclass(frozen=True, slots=True)
class Claims:
    """What a request says of its user; tokens never show in ``repr``. Clients send an endpoint without a token too."""

    access_token: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    endpoint: str = DEFAULT_ENDPOINT
    workspace_id: int | None = None
    workflow_id: str = ""


class _Claiming(Protocol):
    """A request body that has the members of a claim."""

    @property
    def tower_access_token(self) -> str | None: ...
    @property
    def tower_refresh_token(self) -> str | None: ...
    @property
    def tower_endpoint(self) -> str | None: ...
    @property
    def tower_workspace_id(self) -> int | None: ...


def claims_of(body: _Claiming, workflow_id: str | None = None) -> Claims:
    """The claims in a request's body, with the Platform's endpoint as it is called today."""
    endpoint = body.tower_endpoint or DEFAULT_ENDPOINT
    for old, new in _RENAMED.items():
        endpoint = endpoint.replace(old, new)
    return Claims(
        body.tower_access_token or "",
        body.tower_refresh_token or "",
        endpoint,
        body.tower_workspace_id,
        workflow_id or "",
    )


class Identities:
    """Checks claims."""

    async def identify(self, claims: Claims, authorization: str = "") -> Identity:
        """The identity of who makes these claims; ``authorization`` is the request's header of that name."""
        return Identity(
            workspace_id=claims.workspace_id,
            access_token=claims.access_token,
            refresh_token=claims.refresh_token,
            endpoint=claims.endpoint,
            workflow_id=claims.workflow_id,
        )

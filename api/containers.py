"""Container requests: asked for, described, ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from re import compile as compile_pattern
from time import time

from starlette.requests import Request
from starlette.responses import Response

from api.accounts import Accounts
from api.answers import described, described_legacy, parse_timestamp, status_of, submitted
from api.body import read_object
from api.includes import fetch_layers
from api.locations import OpenHosts
from api.replies import json_reply
from api.rules import check_rules, check_supported
from api.schema import Submission, parse_submission
from wave_proxy.errors import (
    BlobUnknown,
    ContentMismatch,
    Denied,
    HostUnknown,
    ManifestUnknown,
    NameUnknown,
    RequestInvalid,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from wave_proxy.image.oci import LINUX_AMD64, Platform, parse_platforms
from wave_proxy.image.reference import Reference, parse_reference
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Identity, Layer
from wave_proxy.state.tokens import TokenRecord, TokenStore
from wave_proxy.upstream.registry import Registry

DEFAULT_ENDPOINT = "https://api.cloud.seqera.io"
CLIENT_HEADER = "x-wave-client"  # the client's address, from the proxy, which overwrites what clients send

_TOKEN = compile_pattern(r"[0-9a-f]{32}")
# Hosts of former names of the Platform. Source: ``wave.md`` §4.2.
_RENAMED = {"/api.tower.nf": "/api.cloud.seqera.io", "/api.stage-tower.net": "/api.cloud.stage-seqera.io"}


class Containers:
    """The endpoints of container requests.

    ``authority`` is the host and port that image names begin with; ``lifetime_s`` is how long a token can be pulled.
    """

    def __init__(
        self,
        tokens: TokenStore,
        registry: Registry,
        accounts: Accounts,
        hosts: OpenHosts,
        *,
        authority: str,
        lifetime_s: float,
        max_body_bytes: int,
    ) -> None:
        self._tokens = tokens
        self._registry = registry
        self._accounts = accounts
        self._hosts = hosts
        self._authority = authority
        self._lifetime_s = lifetime_s
        self._max_body_bytes = max_body_bytes

    # --- endpoints -----------------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> Response:
        """POST /v1alpha2/container"""
        return await self._submit(request, legacy=False)

    async def submit_legacy(self, request: Request) -> Response:
        """POST /container-token"""
        return await self._submit(request, legacy=True)

    async def describe(self, request: Request) -> Response:
        """GET /v1alpha2/container/{token}"""
        record = await self._find(request.path_params["token"])
        return json_reply(described(record, self._authority)) if record else Response(status_code=404)

    async def status(self, request: Request) -> Response:
        """GET /v1alpha2/container/{token}/status: Nextflow asks several times a second for each waiting task."""
        record, now = await self._find(request.path_params["token"]), time()
        if record is None or not record.is_valid(now):
            return Response(status_code=404)
        return json_reply(status_of(record, now))

    async def describe_legacy(self, request: Request) -> Response:
        """GET /container-token/{token}"""
        token = request.path_params["token"]
        record = await self._find(token)
        return json_reply(described_legacy(record, self._authority)) if record else _missing(token)

    async def delete(self, request: Request) -> Response:
        """DELETE /container-token/{token}"""
        self._accounts.check(request.headers.get("authorization", ""))
        token = request.path_params["token"]
        if not _TOKEN.fullmatch(token) or not await self._tokens.delete(token):
            return _missing(token)
        return Response()

    # --- a request ends up in the store --------------------------------------------------------------------------

    async def _find(self, token: str) -> TokenRecord | None:
        return await self._tokens.find_record(token) if _TOKEN.fullmatch(token) else None

    async def _submit(self, request: Request, *, legacy: bool) -> Response:
        submission = parse_submission(await read_object(request, self._max_body_bytes), self._hosts)
        check_rules(submission, legacy=legacy)
        check_supported(submission)
        wanted = await self._resolve(submission, _client_address(request))
        token = await self._record(wanted)
        return json_reply(submitted(token, wanted, self._authority, legacy=legacy))

    async def _resolve(self, submission: Submission, ip_address: str) -> ContainerRequest:
        """What is recorded for a submission; its images are known to exist."""
        reference = parse_reference(submission.container_image or "")
        platforms = parse_platforms(submission.container_platform) if submission.container_platform else ()
        includes = tuple(submission.container_includes or ())
        if includes and not platforms:
            # Their layers are of one platform, and must not end up in an image of another.
            platforms = (LINUX_AMD64,)
        included = await self._include(includes, platforms)
        with _explained(reference):
            await self._registry.head_manifest(reference.registry, reference.repository, reference.reference)
        now = time()
        return ContainerRequest(
            image=str(reference),
            config=_with_layers(submission.config, included),
            platforms=tuple(str(platform) for platform in platforms),
            identity=_identity(submission),
            fingerprint=submission.fingerprint or "",
            timestamp=_valid_timestamp(submission.timestamp or ""),
            ip_address=ip_address,
            includes=includes,
            dry_run=bool(submission.dry_run),
            created=now,
            expires=now + self._lifetime_s,
        )

    async def _include(self, names: tuple[str, ...], platforms: tuple[Platform, ...]) -> tuple[Layer, ...]:
        layers: tuple[Layer, ...] = ()
        for position, name in enumerate(names):
            try:
                with _explained(parse_reference(name)):
                    layers += await fetch_layers(self._registry, name, platforms[0])
            except RequestInvalid as err:
                raise RequestInvalid(f"containerIncludes[{position}]: {err}") from None
        return layers

    async def _record(self, wanted: ContainerRequest) -> str:
        try:
            return await self._tokens.put(wanted)
        except ContentMismatch as err:  # of an inline layer: the caller's fault, not an upstream's
            raise RequestInvalid(str(err)) from None


@contextmanager
def _explained(image: Reference) -> Iterator[None]:
    """What goes wrong with an upstream image, in the words and statuses of a container request's answer."""
    unknown = f"Container image '{image}' does not exist or access is not authorized"
    try:
        yield
    except (Denied, HostUnknown) as err:
        raise RequestInvalid(f"{unknown} - Cause: {err}") from None
    except (ManifestUnknown, NameUnknown, BlobUnknown):
        raise RequestInvalid(unknown) from None
    except (UpstreamUnavailable, UpstreamTimeout) as err:
        raise UpstreamUnavailable(f"Registry '{image.registry}' is not available, try again later: {err}") from err


def _with_layers(config: ContainerConfig, layers: tuple[Layer, ...]) -> ContainerConfig:
    return replace(config, layers=config.layers + layers)


def _identity(submission: Submission) -> Identity:
    endpoint = submission.tower_endpoint or DEFAULT_ENDPOINT
    for old, new in _RENAMED.items():
        endpoint = endpoint.replace(old, new)
    return Identity(
        workspace_id=submission.tower_workspace_id,
        access_token=submission.tower_access_token or "",
        refresh_token=submission.tower_refresh_token or "",
        endpoint=endpoint,
        workflow_id=submission.workflow_id or "",
    )


def _valid_timestamp(text: str) -> str:
    return text if parse_timestamp(text) else ""


def _client_address(request: Request) -> str:
    return request.headers.get(CLIENT_HEADER) or (request.client.host if request.client else "")


def _missing(token: str) -> Response:
    return json_reply({"message": f"Missing container record for token: {token[:64]}"}, 404)

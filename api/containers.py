"""Container requests: asked for, described, ended."""

from collections.abc import Awaitable
from dataclasses import replace
from functools import partial
from re import compile as compile_pattern
from time import time
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from api.answers import (
    Outcome,
    described,
    described_legacy,
    parse_timestamp,
    submitted,
)
from api.body import read_object
from api.building.includes import fetch_layers
from api.building.planning import wants_build
from api.callers import client_address
from api.endpoints import (
    ASKING_UPSTREAM,
    LOGIN,
    NOT_HERE,
    UNKNOWN,
    Answer,
    endpoint,
    routes_of,
)
from api.identities import Identities, claims_of
from api.images.inspection import explained
from api.images.reading import ImageReader
from api.jobs.statuses import REPEATED_S, container_status
from api.locations import OpenHosts
from api.mirroring import Mirroring
from api.orders import Orders
from api.platform.runs import Runs
from api.registries import Registries
from api.replies import json_reply, repeated
from api.rules import check_known, check_rules, check_supported
from api.scan_orders import ScanOrders
from api.schema import Submission, parse_submission
from api.shapes import Container, ContainerLegacy, ContainerStatus, Message, Submitted, SubmittedLegacy
from api.sizes import Sizes
from wave_proxy.errors import ContentMismatch, RequestInvalid
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.image.oci import LINUX_AMD64, Platform, parse_platforms
from wave_proxy.image.reference import Reference, parse_reference
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Identity, Layer
from wave_proxy.image.scan import Scan
from wave_proxy.state.accounts import Accounts
from wave_proxy.state.tokens import TokenRecord, TokenStore
from wave_proxy.upstream.registry import ManifestHead, Registry

_TOKEN = compile_pattern(r"[0-9a-f]{32}")
_CONDA_FILE_WARNING = {"Warning": '299 - "Attribute `condaFile` is deprecated - use `packages` instead"'}

_GROUP = "Containers"
_EXAMPLE = {"containerImage": "docker.io/library/busybox:latest", "containerConfig": {"env": ["GREETING=hello"]}}
_SUBMIT = {**ASKING_UPSTREAM, 501: NOT_HERE}
_MISSING = Answer("The token is unknown, or its record is not kept any more.", Message)


class Containers:
    """The endpoints of container requests.

    ``public_url`` is the address that image names begin with, scheme included; ``lifetime_s`` is how long a token can
    be pulled, and ``runs`` looks after those of runs.
    """

    def __init__(
        self,
        tokens: TokenStore,
        registries: Registries,
        images: ImageReader,
        identities: Identities,
        accounts: Accounts,
        hosts: OpenHosts,
        orders: Orders,
        scans: ScanOrders,
        mirroring: Mirroring,
        sizes: Sizes,
        *,
        public_url: str,
        lifetime_s: float,
        max_body_bytes: int,
        runs: Runs | None = None,
    ) -> None:
        self._tokens = tokens
        self._registries = registries
        self._images = images
        self._identities = identities
        self._accounts = accounts
        self._hosts = hosts
        self._orders = orders
        self._scans = scans
        self._mirroring = mirroring
        self._public_url = public_url
        self._authority = urlsplit(public_url).netloc
        self._lifetime_s = lifetime_s
        self._runs = runs
        self._sizes = sizes
        self._max_body_bytes = max_body_bytes
        self.routes = routes_of(self)

    # --- endpoints -----------------------------------------------------------------------------------------------

    @endpoint(
        "POST",
        "/v1alpha2/container",
        _GROUP,
        {
            200: Answer(
                "The image to pull. It may still have to be built; a pull waits for it.",
                Submitted,
                headers={"Warning": "What is deprecated in the request."},
            ),
            **_SUBMIT,
        },
        body=Submission,
        example=_EXAMPLE,
        login="token",
    )
    async def submit(self, request: Request) -> Response:
        """Ask for a container.

        It is an existing image (`containerImage`), one that is built from a container file (`containerFile`, base64) or
        from Conda or R packages (`packages`), with the layers and settings of `containerConfig` added. With `mirror` an
        existing image is copied to the registry or repository `buildRepository`, for known users.
        """
        return await self._submit(request, legacy=False)

    @endpoint(
        "POST",
        "/container-token",
        _GROUP,
        {200: Answer("The image to pull.", SubmittedLegacy), **_SUBMIT},
        body=Submission,
        example=_EXAMPLE,
        login="token",
        deprecated=True,
    )
    async def submit_legacy(self, request: Request) -> Response:
        """Ask for a container, in the older form.

        Use `POST /v1alpha2/container`: this one has no `packages`, no `freeze` without a repository, and tells less.
        """
        return await self._submit(request, legacy=True)

    @endpoint("GET", "/v1alpha2/container/{token}", _GROUP, {200: Answer("The request.", Container), 404: UNKNOWN})
    async def describe(self, request: Request) -> Response:
        """A container request as it was recorded.

        It can be looked up for some time after its token has ended.
        """
        record = await self._find(request.path_params["token"])
        if record is None:
            return Response(status_code=404)
        return json_reply(described(record, await self._find_build(record), self._authority))

    @endpoint(
        "GET",
        "/v1alpha2/container/{token}/status",
        _GROUP,
        {
            200: Answer("How far it is.", ContainerStatus),
            404: Answer(
                "The token is unknown or has ended: no body. Or what is waited for has no record any more.",
                Message,
                may_be_empty=True,
            ),
        },
    )
    async def status(self, request: Request) -> Response:
        """How far a container request is.

        To be asked until `status` is `DONE`; this is not limited.
        """
        record, now = await self._find(request.path_params["token"]), time()
        if record is None or not record.is_valid(now):
            return Response(status_code=404)
        build = await self._find_build(record)
        if record.request.build_id and build is None:
            kind, build_id = "mirror" if record.request.mirror else "build", record.request.build_id
            return json_reply({"message": f"Missing container {kind} record with id: {build_id}"}, 404)
        scans = await self._find_scans(record.request, build)
        for scan_id, scan in zip(record.request.scan_ids, scans, strict=False):
            if scan is None:
                return json_reply({"message": f"Missing container scan record with id: {scan_id}"}, 404)
        known = [scan for scan in scans if scan]
        answer = container_status(record, build, known, now=now, public_url=self._public_url)
        jobs = [job.build_id for job in (build, *(scan.record for scan in known)) if job is not None]
        seconds = min(REPEATED_S, record.request.expires - now)
        return json_reply(answer, headers=repeated(seconds, record.token, *jobs))

    @endpoint(
        "GET",
        "/container-token/{token}",
        _GROUP,
        {200: Answer("The request.", ContainerLegacy), 404: _MISSING},
        deprecated=True,
    )
    async def describe_legacy(self, request: Request) -> Response:
        """A container request as it was recorded, in the older form."""
        token = request.path_params["token"]
        record = await self._find(token)
        if record is None:
            return _missing(token)
        return json_reply(described_legacy(record, await self._find_build(record), self._authority))

    @endpoint(
        "DELETE",
        "/container-token/{token}",
        _GROUP,
        {200: Answer("The token has ended."), **LOGIN, 404: _MISSING},
        login="account",
    )
    async def delete(self, request: Request) -> Response:
        """End a token, on every machine at once."""
        await self._accounts.check(request.headers.get("authorization", ""), client_address(request))
        token = request.path_params["token"]
        if not _TOKEN.fullmatch(token) or not await self._tokens.delete(token):
            return _missing(token)
        return Response()

    # --- a request ends up in the store --------------------------------------------------------------------------

    async def _find(self, token: str) -> TokenRecord | None:
        return await self._tokens.find_shown(token) if _TOKEN.fullmatch(token) else None

    async def _find_build(self, record: TokenRecord) -> BuildRecord | None:
        return await self._orders.find(record.request.build_id) if record.request.build_id else None

    async def _find_scans(self, request: ContainerRequest, build: BuildRecord | None) -> list[Scan | None]:
        """Those that decide how the request stands now."""
        is_made = build is None or build.succeeded
        if not (is_made and request.scan_mode == "required" and self._scans.enabled):
            return []
        return await self._scans.find(request.scan_ids)

    async def _submit(self, request: Request, *, legacy: bool) -> Response:
        document = await read_object(request, self._max_body_bytes)
        authorization = request.headers.get("authorization", "")
        answer = await self.order(document, authorization, client_address(request), legacy=legacy)
        return json_reply(answer, headers=_CONDA_FILE_WARNING if document.get("condaFile") and not legacy else None)

    async def order(
        self, document: dict[str, Any], authorization: str, ip_address: str, *, legacy: bool = False
    ) -> dict[str, Any]:
        """The answer to a container request with that body and Authorization header. Raises WaveError."""
        submission = parse_submission(document, self._hosts)
        check_rules(submission, legacy=legacy)
        check_supported(submission, scans=self._scans.enabled)
        claims = claims_of(submission, submission.workflow_id)
        identity = await self._identities.identify(claims, authorization)
        check_known(submission, identity)
        self._sizes.check(identity.email, ip_address)
        wanted = await self._read(submission, identity, ip_address)
        with self._sizes.admitted(await self._tokens.cost(wanted), identity.email, ip_address):
            wanted, built = await self._resolve(submission, wanted)
            token, told = await self._record(wanted)
        return submitted(token, told, self._authority, legacy=legacy, built=built)

    async def _read(self, submission: Submission, identity: Identity, ip_address: str) -> ContainerRequest:
        """What is asked for, with the layers of included images, and the image as it is called there."""
        platforms = parse_platforms(submission.container_platform) if submission.container_platform else ()
        includes, is_built = tuple(submission.container_includes or ()), wants_build(submission)
        if (includes or is_built) and not platforms:
            # Built and included layers are of one platform, and must not end up in an image of another.
            platforms = (LINUX_AMD64,)
        config = _with_layers(submission.config, await self._include(includes, platforms, identity))
        now = time()
        return ContainerRequest(
            image=submission.container_image or "",
            config=config,
            platforms=tuple(str(platform) for platform in platforms),
            identity=identity,
            fingerprint=submission.fingerprint or "",
            timestamp=_valid_timestamp(submission.timestamp or ""),
            ip_address=ip_address,
            includes=includes,
            dry_run=bool(submission.dry_run),
            scan_mode="" if submission.scan_mode in (None, "none") else submission.scan_mode,
            scan_levels=tuple(submission.scan_levels or ()),
            created=now,
            expires=now + self._lifetime_s,
        )

    async def _resolve(
        self, submission: Submission, wanted: ContainerRequest
    ) -> tuple[ContainerRequest, Outcome | None]:
        """What is recorded for a request, its image known to exist or being built; and what came of its build."""
        if submission.mirror:
            return await self._mirror(submission, wanted)
        if wants_build(submission):
            return await self._order(submission, wanted)
        return await self._check_image(wanted), None

    async def _check_image(self, wanted: ContainerRequest) -> ContainerRequest:
        """The same with its image's whole name, which exists."""
        reference = parse_reference(wanted.image)

        def ask(registry: Registry, place: Reference) -> Awaitable[ManifestHead]:
            at_once = place != reference
            return registry.head_manifest(place.registry, place.repository, place.reference, at_once=at_once)

        head = await self._images.read(wanted.identity, reference, ask)
        with explained(reference):
            is_private = bool(wanted.scan_mode) and await self._registries.is_guarded(wanted.identity, reference)
        found = replace(wanted, image=str(reference))
        return replace(found, scan_ids=await self._scans.of_image(found, head.digest, is_private=is_private))

    async def _order(self, submission: Submission, wanted: ContainerRequest) -> tuple[ContainerRequest, Outcome]:
        """The same for the image that is built for it, and how far that is."""
        spec = await self._orders.plan(submission, wanted)
        built = await self._orders.place(spec, dry_run=wanted.dry_run)
        asked = replace(
            wanted,
            image=spec.image,
            config=ContainerConfig() if spec.freeze else wanted.config,
            build_id=built.build_id,
            build_new=bool(built.build_id) and not built.cached,
            freeze=spec.freeze,
            scan_ids=await self._scan(spec, built, submission, wanted),
        )
        return asked, built

    async def _mirror(self, submission: Submission, wanted: ContainerRequest) -> tuple[ContainerRequest, Outcome]:
        """The same for the copy that is made of its image, and how far that is."""
        spec = await self._mirroring.plan(submission, wanted)
        made = await self._mirroring.place(spec, dry_run=wanted.dry_run)
        asked = replace(
            wanted,
            image=spec.image,
            build_id=made.build_id,
            build_new=bool(made.build_id) and not made.cached,
            mirror=True,
            scan_ids=await self._scan(spec, made, submission, wanted) if wanted.scan_mode else (),
        )
        return asked, made

    async def _scan(
        self, spec: BuildSpec, built: Outcome, submission: Submission, wanted: ContainerRequest
    ) -> tuple[str, ...]:
        """The scans of an image that is built, which is scanned unless the request says otherwise."""
        if wanted.dry_run or submission.scan_mode == "none" or built.succeeded is False:
            return ()
        is_cached, asked = built.succeeded is True, bool(wanted.scan_mode)
        return await self._scans.of_job(spec, built.build_id, is_cached=is_cached, asked=asked)

    async def _include(
        self, names: tuple[str, ...], platforms: tuple[Platform, ...], identity: Identity
    ) -> tuple[Layer, ...]:
        layers: tuple[Layer, ...] = ()
        for position, name in enumerate(names):
            try:
                reference = parse_reference(name)
                ask = partial(fetch_layers, image=reference, platform=platforms[0])
                layers += await self._images.read(identity, reference, ask)
            except RequestInvalid as err:
                raise RequestInvalid(f"containerIncludes[{position}]: {err}") from None
        return layers

    async def _record(self, wanted: ContainerRequest) -> tuple[str, ContainerRequest]:
        """The token, and the request as clients are told of it."""
        try:
            if self._runs is None:
                return await self._tokens.put(wanted), wanted
            return await self._runs.record(wanted, self._tokens.put)
        except ContentMismatch as err:  # of an inline layer: the caller's fault, not an upstream's
            raise RequestInvalid(str(err)) from None


def _with_layers(config: ContainerConfig, layers: tuple[Layer, ...]) -> ContainerConfig:
    return replace(config, layers=config.layers + layers)


def _valid_timestamp(text: str) -> str:
    return text if parse_timestamp(text) else ""


def _missing(token: str) -> Response:
    return json_reply({"message": f"Missing container record for token: {token[:64]}"}, 404)

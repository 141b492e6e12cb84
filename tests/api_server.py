"""Runs the REST application in this process, on a loopback port and a thread of its own."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from socket import socket
from threading import Thread
from types import TracebackType
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette

from api.app import create_app
from api.building.planning import BuildDefaults, Planner
from api.containers import Containers
from api.credentials import CredentialChecks
from api.identities import Identities
from api.images.inspections import Inspections
from api.images.own_images import OwnImages
from api.images.reading import ImageReader
from api.jobs.builds import Builds
from api.jobs.job_logs import JobLogs
from api.jobs.mirrors import Mirrors
from api.jobs.scans import Scans
from api.locations import OpenHosts, address_of
from api.metrics import UsageMetrics
from api.mirroring import Mirroring, MirrorPlaces
from api.orders import Orders
from api.pages.site import Site
from api.registries import Registries
from api.scan_orders import ScanOrders
from api.sizes import Sizes
from tests.documented import check_answer
from tests.patience import PATIENCE_S
from tests.servers import Response, http_request
from wave_proxy.image.limit import Limit
from wave_proxy.state.accounts import Accounts
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.identities import AccessTokens
from wave_proxy.state.quota import Quotas
from wave_proxy.state.redis import check, connect
from wave_proxy.state.scans import ScanReports
from wave_proxy.state.tokens import TokenStore
from wave_proxy.state.usage import Usage
from wave_proxy.upstream.aws import Ecr
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.egress import Egress, endpoint_for
from wave_proxy.upstream.logins import LoginChecks
from wave_proxy.upstream.registry import Registry

AUTHORITY = "wave.example:9090"


class ApiServer:
    """A context manager. ``upstreams`` are addresses that the configuration opens, ``logins`` those of private ones;
    registries are asked once.

    Builds are enabled with a ``build_repository`` for those whose request names none; nobody builds them here.
    ``users`` restricts logins; ``own_url`` is what answers for our own images.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        upstreams: Iterable[str] = (),
        logins: Mapping[str, Login] | None = None,
        accounts: Mapping[str, str] | None = None,
        max_body_bytes: int = 1_000_000,
        lifetime_s: float = 3600.0,
        build_repository: str = "",
        quotas: Mapping[tuple[str, bool], Limit | None] | None = None,
        anonymous: bool = True,
        scans: bool = False,
        users: Mapping[str, Sequence[str]] | None = None,
        own_url: str = "",
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self._redis_url = redis_url
        self._endpoints = {host: endpoint_for(host, insecure=True, allow_private=True) for host in upstreams}
        if own_url:
            self._endpoints[AUTHORITY] = endpoint_for(AUTHORITY, url=own_url, insecure=True, allow_private=True)
        self._credentials = Credentials(logins or {}, users)
        self._accounts = Accounts(accounts or {})
        self._max_body_bytes = max_body_bytes
        self._lifetime_s = lifetime_s
        self._build_repository = build_repository
        self._builds = bool(build_repository)
        self._quotas = quotas or {}
        self._anonymous = anonymous
        self._scans = scans
        self._sizes = sizes or {}
        self._server: uvicorn.Server | None = None
        self.app: Starlette = None  # type: ignore[assignment]  # set before it answers
        self._thread = Thread(target=lambda: asyncio.run(self._serve()), name="api")
        self._listener = socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    async def _serve(self) -> None:
        async with AsyncExitStack() as stack:
            self.app = self._compose(stack)
            config = uvicorn.Config(self.app, lifespan="off", log_config=None, access_log=False, proxy_headers=False)
            self._server = uvicorn.Server(config)
            await self._server.serve([self._listener])

    def _compose(self, stack: AsyncExitStack) -> Starlette:
        redis = connect(self._redis_url)
        egress = Egress(self._endpoints, response_timeout_s=PATIENCE_S)
        registry = Registry(egress, Credentials({}), attempts=1)
        registries = Registries(registry, self._credentials, f"{AUTHORITY}/local")
        identities = Identities(AccessTokens(redis), anonymous=self._anonymous)
        for close in (redis.aclose, egress.close, registry.close):
            stack.push_async_callback(close)
        hosts = OpenHosts(
            frozenset(self._endpoints), frozenset(address_of(endpoint.url) for endpoint in self._endpoints.values())
        )
        tokens, builds = TokenStore(redis), BuildStore(redis, BuildLimits(4))
        usage, quotas, sizes = Usage(redis), Quotas(redis, self._quotas, wait_s=0.0), Sizes(**self._sizes)
        stack.push_async_callback(usage.close)
        stack.push_async_callback(quotas.close)
        own_images = OwnImages(tokens, AUTHORITY)
        images = ImageReader(registries, own_images)
        planner = Planner(registries, images, tokens, BuildDefaults(self._build_repository, f"{AUTHORITY}/local"))
        reports = ScanReports(redis)
        scans = ScanOrders(builds, reports, usage, enabled=self._scans)
        containers = Containers(
            tokens,
            registries,
            images,
            identities,
            self._accounts,
            hosts,
            Orders(builds, planner, quotas, usage, sizes, enabled=self._builds),
            scans,
            Mirroring(builds, registries, usage, MirrorPlaces(AUTHORITY, (self._build_repository,)), timeout_s=60.0),
            sizes,
            public_url=f"http://{AUTHORITY}",
            lifetime_s=self._lifetime_s,
            max_body_bytes=self._max_body_bytes,
        )
        logs = JobLogs(builds, beat_s=0.05)
        stack.push_async_callback(logs.close)
        jobs = (Builds(builds, self._accounts, scans, logs), Mirrors(builds, self._accounts, scans, logs))
        inspections = Inspections(
            registries,
            identities,
            own_images,
            images,
            self._endpoints,
            public_url=f"http://{AUTHORITY}",
            max_body_bytes=self._max_body_bytes,
        )
        scan_endpoints = Scans(builds, reports, enabled=self._scans)
        login_checks = LoginChecks(egress, self._endpoints, Ecr(egress))
        checks = CredentialChecks(login_checks, max_body_bytes=self._max_body_bytes)
        others = (*jobs, scan_endpoints, inspections, checks, UsageMetrics(usage, self._accounts))
        pages = Site(tokens, builds, reports, scans, containers, inspections, AUTHORITY)
        return create_app(containers, (*others, pages), partial(check, redis), f"http://{AUTHORITY}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None, "it never began to serve"
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the api's thread does not end"

    def request(self, method: str, path: str, **arguments: Any) -> Response:
        """One request; ``body`` and ``headers`` as for http_request. The endpoint must say it has that answer."""
        answer = http_request(self.address, method, path, **arguments)
        check_answer(self.app, method, path, answer)
        return answer

    def post(self, path: str = "/v1alpha2/container", **attributes: Any) -> Response:
        """A container request."""
        return self.request("POST", path, body=attributes)

    def submit(self, path: str = "/v1alpha2/container", **attributes: Any) -> dict[str, Any]:
        """The answer to a container request. Raises AssertionError unless it is granted."""
        answer = self.post(path, **attributes)
        assert answer.status == 200, f"{answer.status} {answer.body!r}"
        document: dict[str, Any] = answer.json()
        return document

    def refuse(self, path: str = "/v1alpha2/container", **attributes: Any) -> tuple[int, str]:
        """Status and message of the answer to a container request. Raises AssertionError when it is granted."""
        answer = self.post(path, **attributes)
        assert answer.status >= 400, f"{answer.status} {answer.body!r}"
        document = answer.json()
        assert list(document) == ["message"]
        return answer.status, document["message"]

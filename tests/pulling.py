"""For tests of the pull path: one worker's port with everything behind it, in this process, over a real Redis."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

from bench.images import Layer as MadeLayer
from bench.upstream import Upstream
from tests.cached import AUTHORITY, Worker, worker
from tests.servers import PulledImage, Response, http_request, pull
from wave_proxy.cache.uploads import Uploads
from wave_proxy.image.limit import Limit
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Layer
from wave_proxy.serve.absence import Absence
from wave_proxy.serve.access import Access
from wave_proxy.serve.app import App
from wave_proxy.serve.augment import Augmenter
from wave_proxy.serve.forward import Forwarder
from wave_proxy.serve.hold import Holds
from wave_proxy.serve.http import Limits, Server
from wave_proxy.serve.layers import Layers
from wave_proxy.serve.lifetimes import Lifetimes
from wave_proxy.serve.login import Logins
from wave_proxy.serve.origin import ClientAddress
from wave_proxy.serve.platform_logins import PlatformLogins
from wave_proxy.serve.pull import Puller
from wave_proxy.serve.push import Pusher
from wave_proxy.serve.ready import ReadyReplies
from wave_proxy.serve.resolve import Resolver
from wave_proxy.serve.stats import RequestStats
from wave_proxy.serve.tunnel import Tunnels
from wave_proxy.state.accounts import Accounts
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.quota import Quotas
from wave_proxy.state.redis import cancel, connect
from wave_proxy.state.tokens import TokenStore
from wave_proxy.state.usage import Usage
from wave_proxy.upstream.credentials import Credentials
from wave_proxy.upstream.egress import unix_session


@dataclass
class Port:
    """A worker that answers."""

    address: str
    worker: Worker
    tokens: TokenStore
    augmenter: Augmenter
    usage: Usage
    stats: RequestStats

    async def request(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> Response:
        return await asyncio.to_thread(http_request, self.address, method, path, headers=headers)

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Response:
        return await self.request("GET", path, headers)

    async def pull(self, repository: str, reference: str) -> PulledImage:
        """Everything of an image, each digest and size checked."""
        return await asyncio.to_thread(pull, self.address, repository, reference)

    async def submit(
        self, image: str, config: ContainerConfig | None = None, *platforms: str, lifetime_s: float = 600
    ) -> str:
        """A new token for that image; returns what its repository begins with."""
        now = time()
        request = ContainerRequest(image, config or ContainerConfig(), platforms, created=now, expires=now + lifetime_s)
        return f"wt/{await self.tokens.put(request)}"


@asynccontextmanager
async def port(
    root: Path,
    redis_url: str,
    *upstreams: Upstream,
    ttl_s: float = 60.0,
    response_timeout_s: float = 30.0,
    limits: Mapping[tuple[str, bool], Limit | None] | None = None,
    wait_s: float = 0.0,
    trusted: Sequence[str] = (),
    credentials: Credentials | None = None,
    permission_ttl_s: float = 300.0,
    lifetime_s: float = 0.0,
) -> AsyncIterator[Port]:
    """A worker over ``root``; when the test is through with it, nothing of it may be left.

    A token that is pulled has its end moved on by ``lifetime_s``, unless that is 0.
    """
    async with AsyncExitStack() as stack:
        redis = connect(redis_url)
        stack.push_async_callback(redis.aclose)
        tokens = TokenStore(redis)
        one = await stack.enter_async_context(
            worker(
                root,
                *upstreams,
                ttl_s=ttl_s,
                response_timeout_s=response_timeout_s,
                permission_ttl_s=permission_ttl_s,
            )
        )
        quotas, usage, stats = Quotas(redis, limits or {}, wait_s=wait_s), Usage(redis), RequestStats()
        ready = ReadyReplies(quotas, usage, stats, one.local.changes)
        platform_logins = PlatformLogins(unix_session(str(root / "no-api.sock")))
        stack.push_async_callback(platform_logins.close)
        access = Access(credentials or Credentials({}), platform_logins, AUTHORITY)
        augmenter, resolver = Augmenter(one.repositories, tokens), Resolver(tokens, ready, access, AUTHORITY)
        stack.push_async_callback(augmenter.close)
        stack.push_async_callback(resolver.close)
        layers = Layers(one.repositories, one.registry, one.blobs, tokens, access)
        holds = Holds(BuildStore(redis, BuildLimits(4)), 1.0)
        stack.push_async_callback(holds.close)
        uploads = Uploads(root, one.local, one.evictor, None)
        stack.callback(uploads.close)
        pusher = Pusher(one.local, uploads, Logins(Accounts({}), anonymous=True))
        lifetimes = Lifetimes(tokens, lifetime_s)
        puller = Puller(resolver, one.repositories, augmenter, layers, tokens, quotas, usage, holds, pusher, lifetimes)
        path, absence = str(root / "no-api.sock"), Absence()
        forwarder = Forwarder(unix_session(path), Tunnels(path, absence), absence)
        stack.push_async_callback(forwarder.close)
        background = [asyncio.create_task(work) for work in (quotas.run(), usage.run(), resolver.follow_deletions())]
        server = Server(App(puller, forwarder, stats, "none"), Limits(), ClientAddress(trusted), ready)
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        number = listener.sockets[0].getsockname()[1]
        try:
            yield Port(f"127.0.0.1:{number}", one, tokens, augmenter, usage, stats)
        finally:
            listener.close()
            await server.shut_down(grace_s=1)
            await cancel(*background)
            await quotas.close()
            await usage.close()


def inline(layer: MadeLayer) -> Layer:
    """The layer as a request carries it."""
    return Layer(layer.inline()["location"], layer.digest, layer.size, layer.diff_id)


def at(location: str, layer: MadeLayer) -> Layer:
    """The layer as a request names it elsewhere."""
    return Layer(location, layer.digest, layer.size, layer.diff_id)


def error_of(answer: Response) -> tuple[int, str, str]:
    """Status, code and message of an error in the distribution spec's shape."""
    assert answer.headers["Content-Type"] == "application/json"
    errors: list[dict[str, Any]] = json.loads(answer.body)["errors"]
    assert len(errors) == 1
    return answer.status, errors[0]["code"], errors[0]["message"]

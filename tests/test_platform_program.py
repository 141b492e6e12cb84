"""The whole program with a Platform: its users, their quotas, counters and logins, and what goes on without it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench.images import image, layer, random_blob
from bench.upstream import Upstream
from tests.platform.process import StandIn
from tests.servers import WaveProxy

ENDPOINT = "https://platform.example/api"
PRIVATE = image([layer({"secret.bin": random_blob(50_000, seed=5)})], env=("A=1",))
ANA = {"id": 7, "userName": "ana", "email": "ana@lab.org"}
BOB = {"id": 8, "userName": "bob", "email": "bob@uni.edu"}

Wave = Callable[..., WaveProxy]
Registry = Callable[..., Upstream]


@pytest.fixture
def platform() -> Iterator[StandIn]:
    with StandIn(ENDPOINT) as started:
        started.tell(users={"tok-ana": ANA, "tok-bob": BOB})
        yield started


@pytest.fixture
def registry(upstream: Registry, platform: StandIn) -> Upstream:
    """A private registry to which Ana has a login, at the Platform, in workspace 12."""
    started = upstream(auth="bearer", username="ana-7", password="s3cret")
    started.add("lab/app", PRIVATE, "v1")
    secret = {"discriminator": "container-reg", "userName": "ana-7", "password": "s3cret"}
    entry = {"id": "c1", "user": 7, "workspace": 12, "provider": "container-reg", "registry": started.address}
    platform.tell(credentials={"c1": {**entry, "secret": secret}})
    return started


def asking(token: str, **more: Any) -> dict[str, Any]:
    return {"towerAccessToken": token, "towerEndpoint": ENDPOINT, **more}


def submit(proxy: WaveProxy, registry: Upstream, token: str = "tok-ana", **more: Any) -> tuple[int, dict[str, Any]]:
    body = asking(token, containerImage=f"{registry.address}/lab/app:v1", towerWorkspaceId=12, **more)
    answer = proxy.request("POST", "/v1alpha2/container", body=body)
    return answer.status, answer.json() if answer.body else {}


def test_a_private_image_is_pulled_with_the_platforms_credentials(
    platform: StandIn, registry: Upstream, wave: Wave
) -> None:
    proxy = wave(workers=2, upstreams=[registry.address], config=platform.config)
    status, refused = submit(proxy, registry)
    assert (status, refused) == (400, {"message": f"Missing pairing record for Tower endpoint '{ENDPOINT}'"})
    platform.pair(proxy)
    status, granted = submit(proxy, registry)
    assert status == 200, granted
    for _ in range(4):
        proxy.pull(granted["targetImage"])
    # Bob, whom the Platform knows as well, has no login there; nobody has one without a token.
    for token in ("tok-bob", ""):
        status, refused = submit(proxy, registry, token)
        assert status in (400, 403), refused
    assert submit(proxy, registry, "tok-nobody") == (401, {})
    assert "s3cret" not in proxy.stderr
    assert "tok-ana" not in proxy.stderr
    assert platform.seen("keys") == [line for line in platform.seen("keys") if line.startswith("tok-ana ")]

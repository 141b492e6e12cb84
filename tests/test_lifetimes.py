"""Tokens that are in use live on, up to a limit; others end, and say so."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import time

import pytest

from bench.images import image, layer
from bench.upstream import Upstream
from tests.patience import PATIENCE_S
from tests.pulling import Port, error_of, inline, port
from tests.servers import WaveProxy
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Identity
from wave_proxy.serve.lifetimes import Lifetimes
from wave_proxy.serve.resolve import Target
from wave_proxy.state.redis import Redis, connect
from wave_proxy.state.tokens import TokenStore

HOUR_S = 3600.0
REPOSITORY = "lib/tool"
TOOL = image([layer({"bin/tool": "x"})], env=["PATH=/bin"])
EXTRA = layer({"extra.txt": "inline"})


@asynccontextmanager
async def redis_at(url: str) -> AsyncIterator[Redis]:
    redis = connect(url)
    try:
        yield redis
    finally:
        await redis.aclose()


def asked(age_s: float, life_s: float, **members: object) -> ContainerRequest:
    request = ContainerRequest("docker.io/library/ubuntu:latest", created=time() - age_s, expires=time() + life_s)
    return replace(request, **members)  # type: ignore[arg-type]


# --- the store -------------------------------------------------------------------------------------------------------


async def test_an_end_is_moved_on_and_never_back(redis_url: str) -> None:
    async with redis_at(redis_url) as redis:
        store = TokenStore(redis, retention_s=1000, max_lifetime_s=10 * HOUR_S)
        request = asked(2 * HOUR_S, HOUR_S)
        token = await store.put(request)
        until = time() + 5 * HOUR_S
        assert await store.extend(token, until) == until
        for earlier in (time(), until - 1, until):
            assert await store.extend(token, earlier) == until
        record = await store.find_record(token)
        assert record is not None
        assert record.request.expires == until
        assert replace(record.request, expires=request.expires) == request
        assert 5 * HOUR_S + 1000 - PATIENCE_S < await redis.ttl(f"wave:token:{token}") <= 5 * HOUR_S + 1000


async def test_no_token_lives_longer_than_tokens_may(redis_url: str) -> None:
    async with redis_at(redis_url) as redis:
        store = TokenStore(redis, max_lifetime_s=10 * HOUR_S)
        request = asked(2 * HOUR_S, HOUR_S)
        assert await store.extend(await store.put(request), time() + 100 * HOUR_S) == request.created + 10 * HOUR_S
        long = asked(2 * HOUR_S, 20 * HOUR_S)  # of before the limit was lowered
        assert await store.extend(await store.put(long), time() + 100 * HOUR_S) == long.expires


async def test_what_does_not_work_is_not_brought_back(redis_url: str) -> None:
    async with redis_at(redis_url) as redis:
        store = TokenStore(redis)
        ended, deleted = await store.put(asked(HOUR_S, -1)), await store.put(asked(0, HOUR_S))
        await store.delete(deleted)
        for token in (ended, deleted, "f" * 32):
            assert await store.extend(token, time() + HOUR_S) == 0.0
        assert not await redis.exists(f"wave:token:{'f' * 32}")


async def test_what_a_token_needs_lives_with_it(redis_url: str) -> None:
    async with redis_at(redis_url) as redis:
        store = TokenStore(redis, retention_s=10)
        token = await store.put(asked(0, HOUR_S, config=ContainerConfig(layers=(inline(EXTRA),))))
        await store.record_made(token, {"sha256:a": "sha256:b"}, HOUR_S)
        await store.extend(token, time() + 20 * HOUR_S)
        for key in (f"wave:token:{token}", f"wave:layer:{EXTRA.digest}", f"wave:made:{token}"):
            assert await redis.ttl(key) > 19.9 * HOUR_S, key


# --- who is in use ---------------------------------------------------------------------------------------------------

PLATFORM = Identity(1, access_token="x", endpoint="https://platform.example", workflow_id="w")


@pytest.mark.parametrize(
    ("request_", "extended"),
    [
        pytest.param(asked(20 * HOUR_S, 16 * HOUR_S), True, id="late"),
        pytest.param(asked(10 * HOUR_S, 26 * HOUR_S), False, id="early"),
        pytest.param(asked(20 * HOUR_S, 16 * HOUR_S, uncounted=True), False, id="of a builder"),
        pytest.param(asked(0, 0.3 * HOUR_S, identity=PLATFORM), False, id="of a workflow"),
        pytest.param(asked(20 * HOUR_S, 16 * HOUR_S, identity=replace(PLATFORM, workflow_id="")), True, id="Platform"),
    ],
)
async def test_a_late_pull_prolongs(redis_url: str, request_: ContainerRequest, *, extended: bool) -> None:
    async with redis_at(redis_url) as redis:
        store = TokenStore(redis)
        token = await store.put(request_)
        lifetimes = Lifetimes(store, 36 * HOUR_S)
        for _ in range(3):
            await lifetimes.prolong(Target("docker.io", "library/ubuntu", "latest", token, request_))
        record = await store.find_record(token)
        assert record is not None
        assert (abs(record.request.expires - time() - 36 * HOUR_S) < 60) is extended
        assert (record.request.expires == request_.expires) is not extended
        assert len(lifetimes._tried) == extended


async def test_a_direct_pull_prolongs_nothing(redis_url: str) -> None:
    async with redis_at(redis_url) as redis:
        await Lifetimes(TokenStore(redis), HOUR_S).prolong(Target("docker.io", "library/ubuntu", "latest"))


async def test_pulls_go_on_without_redis() -> None:
    async with redis_at("unix:///nonexistent/redis.sock") as redis:
        target = Target("docker.io", "library/ubuntu", "latest", "a" * 32, asked(HOUR_S, 1))
        await Lifetimes(TokenStore(redis), HOUR_S).prolong(target)


# --- over the port ---------------------------------------------------------------------------------------------------


async def test_a_token_in_use_does_not_end(upstream: Callable[..., Upstream], tmp_path: Path, redis_url: str) -> None:
    server = upstream()
    server.add(REPOSITORY, TOOL, "1.0")
    name = f"{server.address}/{REPOSITORY}:1.0"
    async with port(tmp_path, redis_url, server, ttl_s=0.1, lifetime_s=6.0) as place:
        used, idle = await place.submit(name, lifetime_s=3.0), await place.submit(name, lifetime_s=3.0)
        ended = time() + 3.5
        while time() < ended:
            assert (await place.get(f"/v2/{used}/{REPOSITORY}/manifests/1.0")).status == 200
            await asyncio.sleep(0.05)
        await _still_works(place, used)
        status, code, message = error_of(await place.get(f"/v2/{idle}/{REPOSITORY}/manifests/1.0"))
        assert (status, code) == (404, "NAME_UNKNOWN")
        assert "has expired: it ended on " in message


async def _still_works(place: Port, token: str) -> None:
    for path in ("manifests/1.0", f"blobs/{TOOL.blobs[0].digest}"):
        assert (await place.get(f"/v2/{token}/{REPOSITORY}/{path}")).status == 200


def test_all_workers_and_the_record_know_the_new_end(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy]
) -> None:
    server = upstream()
    server.add(REPOSITORY, TOOL, "1.0")
    config = '[tokens]\nlifetime = "4s"\n[cache]\ntag_ttl = "100ms"\n'
    proxy = wave(upstreams=[server.address], config=config, workers=2)
    answer = proxy.submit(containerImage=f"{server.address}/{REPOSITORY}:1.0")
    before = proxy.request("GET", f"/v1alpha2/container/{answer['containerToken']}").json()["expiration"]
    ended = time() + 5.0
    while time() < ended:
        proxy.pull(answer["targetImage"])
    after = proxy.request("GET", f"/v1alpha2/container/{answer['containerToken']}").json()["expiration"]
    assert after > before

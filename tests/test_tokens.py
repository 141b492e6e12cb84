"""Tokens in a real Redis: what is kept, for how long, and who hears of a deletion."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import time
from typing import Any, cast

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from bench.images import layer
from tests.patience import PATIENCE_S, eventually, patience
from tests.servers import redis_server
from wave_proxy.errors import DigestMismatch, NameUnknown, RequestInvalid, SizeMismatch, StateUnavailable
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Identity, Layer
from wave_proxy.serve import resolve
from wave_proxy.serve.access import Access
from wave_proxy.serve.platform_logins import PlatformLogins
from wave_proxy.serve.ready import ReadyReplies
from wave_proxy.serve.resolve import Resolver
from wave_proxy.serve.route import parse_route
from wave_proxy.serve.stats import RequestStats
from wave_proxy.state import redis as redis_module
from wave_proxy.state import tokens as tokens_module
from wave_proxy.state.quota import Quotas
from wave_proxy.state.redis import Redis, connect
from wave_proxy.state.tokens import TokenStore
from wave_proxy.state.usage import Usage
from wave_proxy.upstream.credentials import Credentials
from wave_proxy.upstream.egress import unix_session

TOOL = layer({"bin/tool": "x" * 1000})
OTHER = layer({"bin/other": "y"})
DIGESTS = [f"sha256:{digit * 64}" for digit in "abc"]


def inline(content: Any = TOOL, form: str = "data", **changes: Any) -> Layer:
    text = content.inline(form)["location"]
    return replace(Layer(text, content.digest, content.size, content.diff_id), **changes)


def asked(**changes: Any) -> ContainerRequest:
    now = time()
    return replace(ContainerRequest("docker.io/library/ubuntu:latest", created=now, expires=now + 3600), **changes)


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Redis]:
    redis = connect(url)
    try:
        yield redis
    finally:
        await redis.aclose()


@asynccontextmanager
async def store(url: str, retention_s: float = 600) -> AsyncIterator[TokenStore]:
    async with client(url) as redis:
        yield TokenStore(redis, retention_s)


async def keys(url: str) -> dict[str, int]:
    """All keys with the seconds that they have left."""
    async with client(url) as redis:
        return {key.decode(): await redis.ttl(key) for key in cast(list[bytes], await redis.keys("*"))}


# --- put and find ------------------------------------------------------------------------------------------------


async def test_request_is_found_as_it_was(redis_url: str) -> None:
    request = asked(
        config=ContainerConfig(("a", "b"), ("c",), ("X=é",), "/w", (replace(inline(), location="https://a/b"),)),
        platforms=("linux/amd64", "linux/arm64"),
        identity=Identity(7, "a@b.c", 9, "access", "refresh", "https://tower", "wf"),
        fingerprint="f",
        timestamp="2024-01-01T00:00:00Z",
        ip_address="10.0.0.1",
        includes=("docker.io/a",),
        dry_run=True,
    )
    async with store(redis_url) as one, store(redis_url) as other:
        token = await one.put(request)
        assert len(token) == 32
        assert set(token) <= set("0123456789abcdef")
        record = await other.find_record(token)
    assert record is not None
    assert (record.token, record.request) == (token, request)
    assert (record.source_digest, record.wave_digest, record.deleted) == ("", "", False)
    assert "access" not in repr(record)
    assert "refresh" not in repr(record)


async def test_equal_requests_have_tokens_of_their_own(redis_url: str) -> None:
    request = asked()
    async with store(redis_url) as tokens:
        assert len({await tokens.put(request) for _ in range(50)}) == 50


async def test_unknown_token(redis_url: str) -> None:
    async with store(redis_url) as tokens:
        assert await tokens.find_record("0" * 32) is None
        await tokens.record_pull("0" * 32, DIGESTS[0], DIGESTS[1])
        assert await tokens.find_record("0" * 32) is None


async def test_expired_token_is_found_and_not_valid(redis_url: str) -> None:
    now = time()
    async with store(redis_url) as tokens:
        record = await tokens.find_record(await tokens.put(asked(created=now - 10, expires=now + 1)))
    assert record is not None
    assert record.is_valid(now)
    assert not record.is_valid(now + 1)


async def test_keys_are_kept_for_lifetime_and_retention(redis_url: str) -> None:
    async with store(redis_url, retention_s=600) as tokens:
        token = await tokens.put(asked(config=ContainerConfig(layers=(inline(),)), expires=time() + 100))
        left = await keys(redis_url)
        assert left == pytest.approx({f"wave:token:{token}": 700, f"wave:layer:{TOOL.digest}": 100 + 3600}, abs=60)
        await tokens.record_pull(token, *DIGESTS[:2])
        assert await keys(redis_url) == pytest.approx(left, abs=60)


PLATFORM_USER = Identity(7, "ana@lab.org", 9, "tok-secret", "ref-secret", "https://tower", "wf")
FORGOTTEN = Identity(7, "", 9, "", "", "https://tower", "wf")


async def contents(url: str) -> dict[str, str]:
    """All hashes and texts in Redis."""
    async with client(url) as redis:
        names = [key.decode() for key in cast(list[bytes], await redis.keys("*"))]
        return {
            name: str(await (redis.hgetall(name) if await redis.type(name) == b"hash" else redis.get(name)))
            for name in names
        }


async def test_what_proves_a_user_to_his_platform_is_kept_as_long_as_the_token_works(redis_url: str) -> None:
    now = time()
    async with store(redis_url) as tokens:
        token = await tokens.put(asked(identity=PLATFORM_USER, created=now, expires=now + 100))
        record = await tokens.find_record(token)
        assert record is not None
        assert record.request.identity == PLATFORM_USER
        held = await contents(redis_url)
        assert [key for key, text in held.items() if "-secret" in text or "lab.org" in text] == [f"wave:user:{token}"]
        left = await keys(redis_url)
        assert left == pytest.approx({f"wave:token:{token}": 700, f"wave:user:{token}": 160}, abs=3)
        await tokens.extend(token, now + 1000)
        assert await keys(redis_url) == pytest.approx({key: left_s + 900 for key, left_s in left.items()}, abs=3)


async def test_records_of_ended_tokens_tell_nothing_of_who_could_use_them(redis_url: str) -> None:
    async with store(redis_url) as tokens, client(redis_url) as redis:
        ended, deleted = [await tokens.put(asked(identity=PLATFORM_USER)) for _ in range(2)]
        await redis.delete(f"wave:user:{ended}")  # as Redis does by itself
        await tokens.delete(deleted)
        for token in (ended, deleted):
            record = await tokens.find_record(token)
            assert record is not None
            assert record.request.identity == FORGOTTEN
            assert (record.request.identity.key, record.request.identity.local_email) == ("", "")
        durable = await tokens.find_record(await tokens.put(asked(identity=PLATFORM_USER, freeze=True)))
        assert durable is not None
        assert durable.request.identity == FORGOTTEN
        lent = await tokens.lend(asked(identity=PLATFORM_USER), 60)
        assert f"wave:user:{lent}" in await keys(redis_url)
        await tokens.take_back(lent)
        assert sorted(await keys(redis_url)) == sorted(
            f"wave:token:{token}" for token in (ended, deleted, durable.token)
        )


async def test_records_of_users_of_ours_hold_no_secret_and_stay(redis_url: str) -> None:
    ours = Identity(7, "ada@example.org", endpoint="https://tower")
    async with store(redis_url) as tokens:
        token = await tokens.put(asked(identity=ours))
        record = await tokens.find_record(token)
        assert record is not None
        assert record.request.identity == ours
        assert list(await keys(redis_url)) == [f"wave:token:{token}"]


async def test_what_is_not_here_of_the_layers_that_a_request_carries(redis_url: str) -> None:
    linked = replace(inline(), location="https://host.test/layer")
    async with store(redis_url) as tokens:
        assert await tokens.missing_bytes(()) == 0
        assert await tokens.missing_bytes((linked,)) == 0
        assert await tokens.missing_bytes((inline(), inline(), linked)) == TOOL.size
        await tokens.put(asked(config=ContainerConfig(layers=(inline(),))))
        assert await tokens.missing_bytes((inline(),)) == 0


async def test_layer_is_kept_as_long_as_its_longest_request(redis_url: str) -> None:
    request = asked(config=ContainerConfig(layers=(inline(),)), expires=time() + 1000)
    async with store(redis_url, retention_s=1) as tokens:
        await tokens.put(request)
        await tokens.put(replace(request, expires=time() + 10))
        assert (await keys(redis_url))[f"wave:layer:{TOOL.digest}"] > 900


async def test_a_recorded_request_is_lent_with_its_layers(redis_url: str) -> None:
    async with store(redis_url) as tokens:
        request = asked(config=ContainerConfig(env=("A=1",), layers=(inline(),)), identity=Identity(1, "a@b.c"))
        first = await tokens.find_record(await tokens.put(request))
        assert first is not None
        token = await tokens.lend(first.request, 3600.0)
        lent = await tokens.find_record(token)
        assert lent is not None
        kept: dict[str, Any] = {"created": request.created, "expires": request.expires, "uncounted": False}
        assert lent.request.uncounted
        assert 3600 - PATIENCE_S < lent.request.expires - time() <= 3600
        assert replace(lent.request, **kept) == replace(first.request, **kept)
        assert await tokens.find_shown(token) is None
        assert await tokens.find_shown(first.token) == first
        assert (await keys(redis_url))[f"wave:token:{token}"] <= 3601


async def test_of_a_lent_token_nothing_is_left(redis_url: str) -> None:
    async with store(redis_url) as tokens, patience():
        heard = tokens.deletions()
        assert await anext(heard) == ""
        token = await tokens.lend(asked(), 60.0)
        await tokens.record_made(token, {DIGESTS[0]: DIGESTS[1]}, 60.0)
        await tokens.take_back(token)
        assert await anext(heard) == token
        await tokens.record_pull(token, *DIGESTS[:2])
        await heard.aclose()  # type: ignore[attr-defined]
    assert await keys(redis_url) == {}


async def test_pull_is_recorded_the_first_time(redis_url: str) -> None:
    async with store(redis_url) as tokens:
        token = await tokens.put(asked())
        await tokens.record_pull(token, DIGESTS[0], DIGESTS[1])
        await tokens.record_pull(token, DIGESTS[2], DIGESTS[2])
        record = await tokens.find_record(token)
    assert record is not None
    assert (record.source_digest, record.wave_digest) == (DIGESTS[0], DIGESTS[1])


# --- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["data", "gzip"])
async def test_inline_layers_are_kept_apart(redis_url: str, form: str) -> None:
    linked = Layer("https://a/b", OTHER.digest, OTHER.size, OTHER.diff_id)
    config = ContainerConfig(layers=(inline(form=form), linked, inline(OTHER)))
    async with store(redis_url) as tokens:
        record = await tokens.find_record(await tokens.put(asked(config=config)))
        assert record is not None
        first, second, third = record.request.config.layers
        assert (first.location, second, third.location) == ("data:", linked, "data:")
        assert (first.gzip_digest, first.gzip_size, first.tar_digest) == (TOOL.digest, TOOL.size, TOOL.diff_id)
        assert await tokens.find_layer(TOOL.digest) == TOOL.content
        assert await tokens.find_layer(OTHER.digest) == OTHER.content
        assert await tokens.find_layer(DIGESTS[0]) is None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"gzip_digest": DIGESTS[0]}, DigestMismatch),
        ({"tar_digest": DIGESTS[0]}, DigestMismatch),
        ({"gzip_size": TOOL.size + 1}, SizeMismatch),
        ({"location": "data:!"}, RequestInvalid),
        ({"location": "gzip:eJw="}, RequestInvalid),
    ],
)
async def test_wrong_layer_leaves_nothing(redis_url: str, changes: dict[str, Any], error: type[Exception]) -> None:
    async with store(redis_url) as tokens:
        with pytest.raises(error):
            await tokens.put(asked(config=ContainerConfig(layers=(inline(OTHER), inline(**changes)))))
    assert await keys(redis_url) == {}


@pytest.mark.parametrize("position", [0, 1])
async def test_error_says_which_layer_is_wrong(redis_url: str, position: int) -> None:
    layers = [inline(), inline(OTHER)]
    layers[position] = replace(layers[position], gzip_size=1)
    async with store(redis_url) as tokens:
        with pytest.raises(SizeMismatch, match=rf"^containerConfig\.layers\[{position}\]: gzipSize is 1 and "):
            await tokens.put(asked(config=ContainerConfig(layers=tuple(layers))))


async def test_inline_layers_share_limits(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ContainerConfig(layers=(inline(), inline(OTHER)))
    async with store(redis_url) as tokens:
        for name, size, message in (
            ("MAX_TARS_BYTES", 11_000, r"the layer unpacks to more than \d{2,4} bytes"),
            ("MAX_INLINE_BYTES", TOOL.size + OTHER.size - 1, "all inline layers together may have"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(tokens_module, name, size)
                await tokens.put(asked(config=replace(both, layers=both.layers[:1])))
                with pytest.raises(RequestInvalid, match=rf"^containerConfig\.layers\[1\]: {message}"):
                    await tokens.put(asked(config=both))
        await tokens.put(asked(config=both))
    assert tokens_module.MAX_INLINE_BYTES == 64 << 20


async def test_record_has_a_limit(redis_url: str) -> None:
    async with store(redis_url) as tokens:
        with pytest.raises(RequestInvalid, match=r"has 1048\d{3} bytes .* may have 1048576 bytes"):
            await tokens.put(asked(config=ContainerConfig(env=(f"A={'x' * (1 << 20)}",))))
        assert await keys(redis_url) == {}
        assert await tokens.put(asked(config=ContainerConfig(env=(f"A={'x' * 1_000_000}",))))


# --- what was made -----------------------------------------------------------------------------------------------


async def test_made_content_is_found_by_any_worker(redis_url: str) -> None:
    async with store(redis_url) as one, store(redis_url) as other:
        token, stranger = await one.put(asked()), await one.put(asked())
        await one.record_made(token, {DIGESTS[0]: DIGESTS[1]}, 100)
        await one.record_made(token, {DIGESTS[2]: DIGESTS[1]}, 100)
        assert [await other.find_made(token, digest) for digest in DIGESTS] == [DIGESTS[1], None, DIGESTS[1]]
        assert await other.find_made(stranger, DIGESTS[0]) is None
        assert 90 < (await keys(redis_url))[f"wave:made:{token}"] <= 100


# --- deletion ----------------------------------------------------------------------------------------------------


async def test_deletion(redis_url: str) -> None:
    async with store(redis_url) as tokens:
        token = await tokens.put(asked())
        await tokens.record_made(token, {DIGESTS[0]: DIGESTS[1]}, 100)
        assert await tokens.delete(token) is True
        assert await tokens.delete(token) is False
        assert await tokens.delete("0" * 32) is False
        record = await tokens.find_record(token)
        assert record is not None
        assert record.deleted
        assert not record.is_valid(time())
        assert await tokens.find_made(token, DIGESTS[0]) is None


async def test_expired_token_can_not_be_deleted(redis_url: str) -> None:
    async with store(redis_url) as tokens:
        assert await tokens.delete(await tokens.put(asked(expires=time() - 1))) is False


async def listen(tokens: TokenStore, heard: list[str]) -> None:
    async for token in tokens.deletions():
        heard += [token]


@asynccontextmanager
async def listening(tokens: TokenStore) -> AsyncIterator[list[str]]:
    """What is announced, as it comes; returns when listening has begun."""
    heard: list[str] = []

    task = asyncio.create_task(listen(tokens, heard))
    try:
        await eventually(lambda: heard == [""])
        yield heard
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_deletions_are_heard_by_other_clients(redis_url: str) -> None:
    async with store(redis_url) as one, store(redis_url) as other, listening(other) as heard:
        first, second = await one.put(asked()), await one.put(asked())
        await one.delete(first)
        await one.delete(second)
        await eventually(lambda: len(heard) == 3)
        assert heard == ["", first, second]


async def test_quiet_channel_is_no_lost_connection(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_module, "TIMEOUT_S", 0.4)
    monkeypatch.setattr(tokens_module, "_ROUND_S", 0.2)
    async with store(redis_url) as one, store(redis_url) as other, listening(other) as heard:
        await asyncio.sleep(2.0)  # many times what a silent answer may take
        token = await one.put(asked())
        await one.delete(token)
        await eventually(lambda: len(heard) > 1)
        assert heard == ["", token]


async def test_break_is_told(redis_url: str) -> None:
    async with store(redis_url) as one, store(redis_url) as other, listening(other) as heard:
        async with client(redis_url) as operator:
            assert await cast(Any, operator).execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1
        await eventually(lambda: heard == ["", ""])
        token = await one.put(asked())
        await one.delete(token)
        await eventually(lambda: heard == ["", "", token])


async def test_end_of_redis_ends_listening(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        async with client(url) as redis:
            heard: list[str] = []

            task = asyncio.create_task(listen(TokenStore(redis), heard))
            await eventually(lambda: heard == [""])
            async with client(url) as operator:
                with pytest.raises(RedisConnectionError):  # instead of an answer
                    await cast(Any, operator).execute_command("SHUTDOWN", "NOSAVE")
            with pytest.raises(StateUnavailable):
                await task


# --- what workers remember ---------------------------------------------------------------------------------------


def no_replies(tokens: TokenStore) -> ReadyReplies:
    return ReadyReplies(Quotas(tokens._redis, {}, wait_s=0), Usage(tokens._redis), RequestStats())


@asynccontextmanager
async def nobodys_logins() -> AsyncIterator[Access]:
    platform = PlatformLogins(unix_session("no-api.sock"))
    try:
        yield Access(Credentials({}), platform)
    finally:
        await platform.close()


@asynccontextmanager
async def following(url: str) -> AsyncIterator[Resolver]:
    async with store(url) as tokens, nobodys_logins() as access:
        resolver = Resolver(tokens, no_replies(tokens), access)
        task = asyncio.create_task(resolver.follow_deletions())
        try:
            yield resolver
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await resolver.close()


async def test_workers_forget_deleted_tokens(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_RECONNECT_S", 0.01)
    async with store(redis_url) as one, following(redis_url) as resolver, following(redis_url) as other:
        kept, ended = await one.put(asked()), await one.put(asked())
        async with client(redis_url) as operator:
            await until_subscribed(operator, 2)
        for worker in (resolver, other):
            for token in (kept, ended):
                target = await worker.resolve(parse_route("GET", f"/v2/wt/{token}/library/ubuntu/manifests/latest"))
                assert (target.registry, target.repository, target.token) == ("docker.io", "library/ubuntu", token)
        assert await one.delete(ended)
        for worker in (resolver, other):
            await eventually(lambda worker=worker: ended not in worker._memory)  # type: ignore[misc]
            assert kept in worker._memory
            with pytest.raises(NameUnknown):
                await worker.resolve(parse_route("GET", f"/v2/wt/{ended}/library/ubuntu/manifests/latest"))


async def until_subscribed(redis: Redis, count: int) -> None:
    async with patience():
        while dict(cast(list[tuple[bytes, int]], await redis.pubsub_numsub("wave:token-deleted"))) != {
            b"wave:token-deleted": count
        }:
            await asyncio.sleep(0.002)


async def test_memory_is_bounded_and_keeps_what_is_used(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with store(redis_url) as one, nobodys_logins() as access:
        used, *others = [await one.put(asked()) for _ in range(20)]
        record = await one.find_record(used)
        assert record is not None
        monkeypatch.setattr(resolve, "_MEMORY_BYTES", 5 * (record.size + resolve._KNOWN_BYTES) + 99)
        resolver = Resolver(one, no_replies(one), access)
        for token in others:
            for asked_for in (used, token):
                await resolver.resolve(parse_route("GET", f"/v2/wt/{asked_for}/library/ubuntu/manifests/latest"))
        assert list(resolver._memory) == [*others[-4:-1], used, others[-1]]
        assert resolver._bytes == sum(known.size for known in resolver._memory.values())


async def test_a_plain_record_is_small(redis_url: str) -> None:
    async with store(redis_url) as one:
        token = await one.put(asked(ip_address="10.0.0.1"))
        record = await one.find_record(token)
    assert record is not None
    assert record.size < 150  # image, address, two instants: no member without a value


async def test_workers_look_tokens_up_again_after_a_break(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_RECONNECT_S", 0.01)
    async with store(redis_url) as one, following(redis_url) as resolver, client(redis_url) as operator:
        await until_subscribed(operator, 1)
        token = await one.put(asked())
        path = f"/v2/wt/{token}/library/ubuntu/manifests/latest"
        await resolver.resolve(parse_route("GET", path))
        async with operator.pipeline(transaction=True) as pipe:  # nobody listens when it is announced
            pipe.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            pipe.hset(f"wave:token:{token}", "deleted", "1")
            pipe.publish("wave:token-deleted", token)
            assert (await pipe.execute())[2] == 0
        await eventually(lambda: token not in resolver._memory)
        with pytest.raises(NameUnknown):
            await resolver.resolve(parse_route("GET", path))


async def test_without_redis_errors_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with store(f"unix://{tmp_path}/nobody.sock") as tokens:
        calls: list[Callable[[], Any]] = [
            lambda: tokens.put(asked()),
            lambda: tokens.find_record("0" * 32),
            lambda: tokens.delete("0" * 32),
            lambda: tokens.find_layer(DIGESTS[0]),
            lambda: tokens.record_made("0" * 32, {DIGESTS[0]: DIGESTS[1]}, 1),
            lambda: tokens.record_pull("0" * 32, DIGESTS[0], DIGESTS[1]),
            lambda: tokens.find_made("0" * 32, DIGESTS[0]),
            lambda: anext(tokens.deletions()),
        ]
        ends = await asyncio.gather(*(call() for call in calls), return_exceptions=True)
    assert [type(end) for end in ends] == [StateUnavailable] * len(calls)
    assert {str(end) for end in ends} == {"the state store (Redis) does not answer; try again in a moment"}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("MISCONF Redis can't persist", "the state store (Redis) refuses: MISCONF Redis can't persist"),
        (
            "Command # 1 (HSET wave:token:01 request {}) of pipeline caused error: NOPERM no access to wave:token:01",
            "the state store (Redis) refuses: NOPERM no access to",
        ),
    ],
)
async def test_what_redis_says_is_shown_without_keys(said: str, message: str) -> None:
    with pytest.raises(StateUnavailable) as caught, redis_module.translated():
        raise ResponseError(said)
    assert str(caught.value) == message


async def test_at_the_start_it_says_where_redis_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_module, "_START_S", 0.0)
    async with client(f"unix://{tmp_path}/nobody.sock") as redis:
        with pytest.raises(StateUnavailable, match=f"{tmp_path}/nobody.sock"):
            await redis_module.wait_until_up(redis)

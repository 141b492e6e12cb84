"""Challenges, and bearer tokens: where the password goes, and that one fetch serves everybody who waits."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from bench.upstream import Upstream
from tests.outgoing import LOGIN, answer, egress_to, opened, scripted
from wave_proxy.errors import AddressRefused, TokenRefused, TooManyRequests, UpstreamError, UpstreamFailing
from wave_proxy.upstream.bearer import BearerTokens, Challenge, Scope, choose_challenge
from wave_proxy.upstream.egress import Egress

Start = Callable[..., Upstream]

PASSWORD = "Basic dXNlcjpzZWNyZXQ="


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (
            ['Bearer realm="https://quay.io/v2/auth",service="quay.io"'],
            Challenge("bearer", "https://quay.io/v2/auth", "quay.io"),
        ),
        (
            ['Bearer realm="https://a/token",service="a",scope="repository:x/y:pull,push"'],
            Challenge("bearer", "https://a/token", "a"),
        ),
        (['bearer service=a , REALM = "https://a/t?x=1,2"'], Challenge("bearer", "https://a/t?x=1,2", "a")),
        ([r'Bearer realm="https://a/\"t\""'], Challenge("bearer", 'https://a/"t"')),
        (['Basic realm="http://foo"'], Challenge("basic")),
        (["Basic"], Challenge("basic")),
        (["Negotiate, Basic realm=x"], Challenge("basic")),
        (["Negotiate YWJj==, Bearer realm=https://a/t"], Challenge("bearer", "https://a/t")),
        (['Basic realm="x", Bearer realm="https://a/t"'], Challenge("bearer", "https://a/t")),
        (['Basic realm="x"', 'Bearer realm="https://a/t"'], Challenge("bearer", "https://a/t")),
        (['Bearer service="x"'], None),
        (['Bearer realm="unclosed'], None),
        (["foo"], None),
        (['realm="https://a/t"'], None),
        ([""], None),
        ([], None),
        (['Bearer realm="https://a/t",service="\udcff"'], Challenge("bearer", "https://a/t", "\ufffd")),
        (["=,=" * 2000 + '"' + "\\" * 2000], None),
    ],
)
def test_challenges(headers: list[str], expected: Challenge | None) -> None:
    assert choose_challenge(headers) == expected


@asynccontextmanager
async def tokens_of(egress: Egress) -> AsyncIterator[BearerTokens]:
    tokens = BearerTokens(egress)
    try:
        yield tokens
    finally:
        await tokens.close()


def token_service(**document: object) -> bytes:
    return answer(body=json.dumps(document).encode(), Content_Type="application/json")


def realm_at(port: int, host: str = "127.0.0.1") -> Challenge:
    return Challenge("bearer", f"http://{host}:{port}/token", "registry")


async def test_token_is_asked_for_once(upstream: Start) -> None:
    server = upstream(auth="bearer")
    endpoint = opened(server.address)[server.address]
    challenge = Challenge("bearer", f"{server.url}/token", server.address)
    async with egress_to(server.address) as egress, tokens_of(egress) as tokens:
        first = await tokens.get(challenge, Scope("lib/tool"), LOGIN, endpoint)
        assert await tokens.get(challenge, Scope("lib/tool"), LOGIN, endpoint) == first
        other = await tokens.get(challenge, Scope("lib/other"), LOGIN, endpoint)
        fresh = await tokens.get(challenge, Scope("lib/tool"), LOGIN, endpoint, stale=first)
    assert len({first, other, fresh}) == 3
    service = server.address.replace(":", "%3A")
    asked = [request.path.replace(server.address, service) for request in server.log]
    assert asked == [
        f"/token?service={service}&scope=repository:{name}:pull" for name in ("lib/tool", "lib/other", "lib/tool")
    ]


async def test_token_is_not_shared_between_users(upstream: Start) -> None:
    server = upstream(auth="bearer")
    endpoint = opened(server.address)[server.address]
    challenge = Challenge("bearer", f"{server.url}/token")
    async with egress_to(server.address) as egress, tokens_of(egress) as tokens:
        await tokens.get(challenge, Scope("lib/tool"), LOGIN, endpoint)
        with pytest.raises(TokenRefused, match="incorrect username or password"):
            await tokens.get(challenge, Scope("lib/tool"), None, endpoint)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"token": "t"}, "t"),
        ({"access_token": "a"}, "a"),
        ({"token": "", "access_token": "a", "expires_in": None}, "a"),
    ],
)
async def test_token_document(document: dict[str, object], expected: str) -> None:
    async with scripted(token_service(**document)) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress, tokens_of(egress) as tokens:
            token = await tokens.get(realm_at(server.port), Scope("lib/tool"), None, opened(address)[address])
    assert token == expected


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (token_service(), UpstreamError),
        (token_service(token=7), UpstreamError),
        (token_service(token="a\r\nX: y"), UpstreamError),
        (answer(body=b"<html>sign in</html>"), UpstreamError),
        (answer(body=b"[]"), UpstreamError),
        (answer(body=b'{"token":"' + b"x" * (300 << 10) + b'"}'), UpstreamError),
        (answer("403 Forbidden"), TokenRefused),
        (answer("429 Slow", Retry_After="3"), TooManyRequests),
        (answer("502 Bad"), UpstreamFailing),
        (answer("302 Found", Location="http://127.0.0.1:1/"), AddressRefused),
    ],
)
async def test_token_service_that_gives_none(reply: bytes, kind: type[Exception]) -> None:
    async with scripted(reply) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress, tokens_of(egress) as tokens:
            with pytest.raises(kind) as caught:
                await tokens.get(realm_at(server.port), Scope("lib/tool"), LOGIN, opened(address)[address])
    assert type(caught.value) is kind
    assert len(server.heads) == 1


async def test_short_lived_token_is_not_kept_for_long() -> None:
    async with scripted(token_service(token="t", expires_in=1e-9)) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress, tokens_of(egress) as tokens:
            for _ in range(2):
                await tokens.get(realm_at(server.port), Scope("lib/tool"), None, opened(address)[address])
    assert len(server.heads) == 2


# --- who gets the password ---------------------------------------------------------------------------------------


async def test_password_goes_to_the_registrys_own_host() -> None:
    async with scripted(token_service(token="t")) as server:
        registry = "127.0.0.1:1"  # another port of the same host
        async with egress_to(registry, f"127.0.0.1:{server.port}") as egress, tokens_of(egress) as tokens:
            await tokens.get(realm_at(server.port), Scope("lib/tool"), LOGIN, egress.endpoint(registry))
    assert PASSWORD in server.heads[0]


@pytest.mark.parametrize("registry_url", ["http://127.0.0.1:1", "https://localhost:1"])
async def test_password_does_not_go_to_other_hosts_or_down_to_http(registry_url: str) -> None:
    async with scripted(token_service(token="t")) as server:
        realm = realm_at(server.port, "localhost")
        async with egress_to(f"localhost:{server.port}") as egress, tokens_of(egress) as tokens:
            registry = opened("registry")["registry"]
            endpoint = type(registry)(registry.registry, registry_url)
            assert await tokens.get(realm, Scope("lib/tool"), LOGIN, endpoint) == "t"
    assert "Authorization" not in server.heads[0]


async def test_password_does_not_cross_a_redirect() -> None:
    async with scripted(token_service(token="t")) as target:
        redirect = answer("307 Elsewhere", Location=f"http://127.0.0.1:{target.port}/token")
        async with scripted(redirect) as server:
            addresses = [f"127.0.0.1:{port}" for port in (server.port, target.port)]
            async with egress_to(*addresses) as egress, tokens_of(egress) as tokens:
                await tokens.get(realm_at(server.port), Scope("lib/tool"), LOGIN, egress.endpoint(addresses[0]))
    assert PASSWORD in server.heads[0]
    assert "Authorization" not in target.heads[0]


@pytest.mark.parametrize("realm", ["ftp://127.0.0.1/", "http://user:pass@127.0.0.1/", "token", "http:///token"])
async def test_realm_that_is_no_address(realm: str) -> None:
    async with egress_to() as egress, tokens_of(egress) as tokens:
        with pytest.raises(UpstreamError, match="not an http"):
            await tokens.get(Challenge("bearer", realm), Scope("lib/tool"), LOGIN, opened("r")["r"])


async def test_realm_at_a_private_address_is_refused() -> None:
    reply = token_service(token="t")
    async with scripted(reply) as server, egress_to("127.0.0.1:1") as egress, tokens_of(egress) as tokens:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(AddressRefused):
                await tokens.get(realm_at(server.port, host), Scope("lib/tool"), LOGIN, egress.endpoint("127.0.0.1:1"))
    assert server.heads == []


# --- one fetch for everybody -------------------------------------------------------------------------------------


async def test_one_fetch_serves_all_even_when_the_first_gives_up() -> None:
    arrived, go = asyncio.Event(), asyncio.Event()

    async def reply(_: str) -> bytes:
        arrived.set()
        await go.wait()
        return token_service(token="shared")

    async with scripted(reply) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress, tokens_of(egress) as tokens:
            challenge, endpoint = realm_at(server.port), egress.endpoint(address)
            callers = [
                asyncio.create_task(tokens.get(challenge, Scope("lib/tool"), LOGIN, endpoint)) for _ in range(20)
            ]
            await arrived.wait()
            callers[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await callers[0]
            go.set()
            assert await asyncio.gather(*callers[1:]) == ["shared"] * 19
    assert len(server.heads) == 1


async def test_a_failure_is_everybodys_and_is_not_kept() -> None:
    replies = [answer("503 Busy"), token_service(token="later")]
    go = asyncio.Event()

    async def reply(_: str) -> bytes:
        await go.wait()
        return replies.pop(0)

    async with scripted(reply) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress, tokens_of(egress) as tokens:
            challenge, endpoint = realm_at(server.port), egress.endpoint(address)
            callers = [asyncio.create_task(tokens.get(challenge, Scope("lib/tool"), LOGIN, endpoint)) for _ in range(5)]
            await asyncio.sleep(0.01)
            go.set()
            results = await asyncio.gather(*callers, return_exceptions=True)
            assert [type(result) for result in results] == [UpstreamFailing] * 5
            assert await tokens.get(challenge, Scope("lib/tool"), LOGIN, endpoint) == "later"
    assert len(server.heads) == 2


async def test_close_ends_a_fetch_that_nobody_waits_for() -> None:
    arrived = asyncio.Event()

    async def reply(_: str) -> bytes:
        arrived.set()
        await asyncio.Event().wait()
        return b""

    before = asyncio.all_tasks()
    async with scripted(reply) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress:
            tokens = BearerTokens(egress)
            caller = asyncio.create_task(
                tokens.get(realm_at(server.port), Scope("lib/tool"), LOGIN, egress.endpoint(address))
            )
            await arrived.wait()
            caller.cancel()
            await tokens.close()
            await asyncio.wait([caller])
            assert not [task for task in asyncio.all_tasks() - before if "_fetch" in repr(task.get_coro())]

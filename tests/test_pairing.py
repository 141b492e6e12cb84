"""Pairing as Platforms do it: over a WebSocket through the port, refused unless the operator allows it."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from tests.patience import patience, until
from tests.platform.process import StandIn
from tests.servers import WaveProxy
from wave_proxy.image.platform import pairing_key
from wave_proxy.state.redis import Redis, connect

ENDPOINT = "https://platform.example/api"
CONFIG = (
    f'[platform]\nenabled = true\nendpoints = ["{ENDPOINT}", "https://*.lab.example"]\npairing_token = "licence-7"\n'
)
KEY = f"wave:pairing:{pairing_key('tower', ENDPOINT)}"

Wave = Callable[..., WaveProxy]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WaveProxy]:
    with WaveProxy(tmp_path_factory.mktemp("pairing") / "data", config=CONFIG) as started:
        yield started


@asynccontextmanager
async def connected(
    proxy: WaveProxy, endpoint: str = ENDPOINT, token: str = "licence-7", service: str = "tower"
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A session as a Platform opens it."""
    address = (
        f"ws://{proxy.address}/pairing/{service}/token/{quote(token, safe='')}?endpoint={quote(endpoint, safe='')}"
    )
    async with patience(), aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
        yield socket


@asynccontextmanager
async def redis_of(proxy: WaveProxy) -> AsyncIterator[Redis]:
    redis = connect(proxy.redis_url)
    try:
        yield redis
    finally:
        await redis.aclose()


async def pairing(socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    """The first message."""
    message: dict[str, Any] = await socket.receive_json()
    assert message["@type"] == "pairing-response"
    return message


async def closing(socket: aiohttp.ClientWebSocketResponse) -> tuple[int, str]:
    """Code and reason of the end that comes next."""
    message = await socket.receive()
    assert message.type == aiohttp.WSMsgType.CLOSE, message
    return message.data, message.extra or ""


async def test_a_platform_gets_a_key_and_its_heartbeats_back(proxy: WaveProxy) -> None:
    async with connected(proxy) as socket, connected(proxy) as second:
        message = await pairing(socket)
        assert set(message) == {"@type", "msgId", "pairingId", "publicKey"}
        assert int(message["pairingId"]) < 1 << 48
        again = await pairing(second)
        assert (again["pairingId"], again["publicKey"]) == (message["pairingId"], message["publicKey"])
        for name in ("a", "b"):
            await socket.send_json({"@type": "pairing-heartbeat", "msgId": name})
            assert await socket.receive_json() == {"@type": "pairing-heartbeat", "msgId": name}


async def test_another_pairing_is_made_when_the_lease_is_over(proxy: WaveProxy) -> None:
    async with redis_of(proxy) as redis:
        async with connected(proxy) as socket:
            first = await pairing(socket)
        await redis.hset(KEY, "expires", "1.0")
        async with connected(proxy) as socket:
            second = await pairing(socket)
        assert second["pairingId"] != first["pairingId"]
        assert second["publicKey"] != first["publicKey"]
        assert 29 * 86400 < await redis.ttl(KEY) <= 30 * 86400


async def test_a_session_whose_pairing_is_gone_is_ended_so_that_it_pairs_again(proxy: WaveProxy) -> None:
    async with redis_of(proxy) as redis, connected(proxy) as socket:
        await pairing(socket)
        await redis.delete(KEY)
        await socket.send_json({"@type": "pairing-heartbeat", "msgId": "a"})
        assert (await closing(socket))[0] == 1001


def until_logged(proxy: WaveProxy, text: str) -> None:
    """Return when the program has logged that; its standard error is read by another thread."""
    until(lambda: text in proxy.stderr, lambda: proxy.stderr)


REFUSED = {
    "service": ({"service": "other"}, "the service 'other' is not known"),
    "token": ({"token": "licence-8"}, "the token is not [platform] pairing_token"),
    "token-of-other-letters": ({"token": "lizenz-ä"}, "the token is not [platform] pairing_token"),
    "endpoint": ({"endpoint": "https://evil.example/api"}, "is not in [platform] endpoints"),
    "endpoint-that-begins-alike": ({"endpoint": f"{ENDPOINT}.evil.example"}, "is not in [platform] endpoints"),
    "endpoint-with-a-user": ({"endpoint": "https://x@a.lab.example"}, "is no http(s) address"),
    "no-endpoint": ({"endpoint": ""}, "is no http(s) address"),
    "no-address": ({"endpoint": "platform.example"}, "is no http(s) address"),
}


@pytest.mark.parametrize(("what", "why"), REFUSED.values(), ids=REFUSED)
async def test_who_must_not_pair_is_told_why_and_so_is_the_log(
    what: dict[str, str], why: str, proxy: WaveProxy
) -> None:
    async with connected(proxy, **what) as socket:
        code, reason = await closing(socket)
    assert code == 1008
    assert why in reason
    until_logged(proxy, why)
    assert "licence-" not in proxy.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\0"])
async def test_what_is_no_message_ends_the_session(text: str, proxy: WaveProxy) -> None:
    async with connected(proxy) as socket:
        await pairing(socket)
        await socket.send_str(text)
        assert (await closing(socket))[0] == 1007


async def test_bytes_end_the_session_and_unknown_messages_do_not(proxy: WaveProxy) -> None:
    async with connected(proxy) as socket:
        await pairing(socket)
        for message in ({}, {"@type": "news"}, {"@type": 3}, {"@type": "proxy-http-response", "msgId": "x"}):
            await socket.send_json(message)
        await socket.send_json({"@type": "pairing-heartbeat"})
        assert await socket.receive_json() == {"@type": "pairing-heartbeat", "msgId": None}
        await socket.send_bytes(b"{}")
        assert (await closing(socket))[0] == 1007


async def test_without_a_websocket_there_is_nothing(proxy: WaveProxy) -> None:
    answer = proxy.request("GET", "/pairing/tower/token/licence-7?endpoint=x")
    assert answer.status == 404
    assert "licence" not in proxy.stderr


def test_it_is_off_unless_the_operator_wants_it(wave: Wave) -> None:
    with StandIn(ENDPOINT) as platform:
        proxy = wave()
        platform.tell(pair=f"ws://{proxy.address}/pairing/tower/token/licence-7")
        platform.wait_for(lambda sessions: "1008" in sessions)
        until_logged(proxy, "this server pairs with no Platform: [platform] enabled is false")


def test_a_platform_pairs_again_when_the_program_comes_back(wave: Wave) -> None:
    with StandIn(ENDPOINT) as platform:
        proxy = wave(config=platform.config)
        platform.pair(proxy)
        assert proxy.stop() == 0
        platform.wait_for(lambda sessions: len(sessions) == 2)
        proxy.start()
        platform.wait_for(lambda sessions: sessions.count("paired") == 2)

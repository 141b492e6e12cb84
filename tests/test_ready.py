"""Ready-made replies: a warm answer is the first one over again, is counted each time, and ends when it has to."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.images import blob, image, index, layer, random_blob
from bench.upstream import Upstream
from tests.patience import PATIENCE_S, eventually, patience
from tests.pulling import Port, error_of, port
from tests.servers import http_request
from wave_proxy.cache.tags import TagAnswer
from wave_proxy.image.limit import Limit
from wave_proxy.image.request import ContainerConfig
from wave_proxy.serve import ready
from wave_proxy.serve.http import Limits, Server
from wave_proxy.serve.messages import Body, Reply, Request, Terms
from wave_proxy.serve.ready import ReadyReplies, Wire
from wave_proxy.serve.stats import RequestStats
from wave_proxy.state.quota import Quotas
from wave_proxy.state.redis import connect
from wave_proxy.state.usage import Usage

Start = Callable[..., Upstream]

REPOSITORY = "lib/tool"
TOOL = image([layer({"bin/tool": "x"})], env=["PATH=/bin"])
OTHER = image([layer({"bin/other": "y"})], env=["PATH=/bin"])
SMALL = blob(random_blob(5_000, seed=51))


class Client:
    """One connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self._writer.write(part)

    async def read(self, *, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers by lower-case name, body."""
        status, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        body = b"" if head_only else await self._reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), headers, body

    async def get(self, path: str, extra: str = "") -> tuple[int, dict[str, str], bytes]:
        self.send(head(path, extra))
        return await self.read()

    async def is_closed(self) -> bool:
        return await self._reader.read() == b""


def head(path: str, extra: str = "", *, method: str = "GET", version: str = "1.1") -> bytes:
    return f"{method} {path} HTTP/{version}\r\nHost: wave\r\n{extra}\r\n".encode()


@asynccontextmanager
async def client(place: Port, source: str = "127.0.0.1") -> AsyncIterator[Client]:
    host, _, number = place.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(number), local_addr=(source, 0))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


def serving(upstream: Start) -> Upstream:
    server = upstream()
    server.add(REPOSITORY, TOOL, "1.0")
    server.add_blob(REPOSITORY, SMALL)
    return server


def manifest_path(server: Upstream, reference: str = "1.0") -> str:
    return f"/v2/{server.address}/{REPOSITORY}/manifests/{reference}"


def steady(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in ("date", "age", "x-cache")}


def warm(place: Port) -> int:
    """How many manifests were counted as hits."""
    return sum(
        count for (kind, state, _), count in place.stats.requests.items() if (kind, state) == ("manifest", "hit")
    )


# --- the same answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_warm_answer_is_the_first_one(upstream: Start, tmp_path: Path, redis_url: str, method: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        answers = []
        for _ in range(4):
            one.send(head(manifest_path(server), method=method))
            answers.append(await one.read(head_only=method == "HEAD"))
        assert [status for status, _, _ in answers] == [200] * 4
        assert {body for _, _, body in answers} == {TOOL.manifest if method == "GET" else b""}
        assert all(steady(headers) == steady(answers[0][1]) for _, headers, _ in answers)
        assert [headers["x-cache"] for _, headers, _ in answers] == ["miss", "hit", "hit", "hit"]
        assert all(int(headers["age"]) < 60 for _, headers, _ in answers)
        assert len([asked for asked in server.log if asked.path.endswith("/manifests/1.0")]) == 1


async def test_a_small_blob_is_answered_from_memory(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    path = f"/v2/{server.address}/{REPOSITORY}/blobs/{SMALL.digest}"
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        assert (await one.get(path))[2] == SMALL.content
        await eventually(lambda: place.worker.blobs.path(SMALL.digest).exists())
        assert (await one.get(path))[2] == SMALL.content
        place.worker.blobs.path(SMALL.digest).unlink()
        for _ in range(3):
            status, headers, body = await one.get(path)
            assert (status, headers["x-cache"], body) == (200, "hit", SMALL.content)
        status, headers, body = await one.get(path, "Range: bytes=10-19\r\n")
        assert (status, body) == (206, SMALL.content[10:20])


async def test_a_new_tag_is_seen_when_the_old_answer_ends(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server, ttl_s=0.3) as place, client(place) as one:
        for _ in range(3):
            assert (await one.get(manifest_path(server)))[2] == TOOL.manifest
        server.add(REPOSITORY, OTHER, "1.0")

        async def sees_the_new_one() -> bool:
            return (await one.get(manifest_path(server)))[2] == OTHER.manifest

        async with patience():
            while not await sees_the_new_one():
                await asyncio.sleep(0.02)


async def test_a_deleted_token_is_answered_no_more(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        token = await place.submit(f"{server.address}/{REPOSITORY}:1.0", ContainerConfig(env=("A=1",)))
        path = f"/v2/{token}/{REPOSITORY}/manifests/1.0"
        for _ in range(3):
            assert (await one.get(path))[0] == 200
        assert await place.tokens.delete(token.removeprefix("wt/"))
        async with patience():
            while (await one.get(path))[0] == 200:
                await asyncio.sleep(0.01)
        assert (await one.get(path))[0] == 404


async def test_a_token_deleted_while_it_is_answered(
    upstream: Start, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        token, other = [await place.submit(f"{server.address}/{REPOSITORY}:1.0") for _ in range(2)]
        path = f"/v2/{token}/{REPOSITORY}/manifests/1.0"
        find_tag, asked, go_on = place.worker.repositories.find_tag, asyncio.Event(), asyncio.Event()

        async def find_slowly(*name: str) -> TagAnswer:
            answer = await find_tag(*name)
            asked.set()
            await go_on.wait()
            return answer

        monkeypatch.setattr(place.worker.repositories, "find_tag", find_slowly)
        async with client(place) as slow:
            slow.send(head(path))
            await asked.wait()
            assert await place.tokens.delete(token.removeprefix("wt/"))
            async with patience():
                while (await one.get(f"/v2/{token}/{REPOSITORY}/blobs/{SMALL.digest}"))[0] != 404:
                    await asyncio.sleep(0.01)  # the worker has not heard of it
            go_on.set()
            assert (await slow.read())[0] == 200
        assert (await one.get(path))[0] == 404
        assert (await one.get(path.replace(token, other)))[0] == 200


async def test_a_token_ends_in_time(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        token = await place.submit(f"{server.address}/{REPOSITORY}:1.0", lifetime_s=4.0)
        path = f"/v2/{token}/{REPOSITORY}/manifests/1.0"
        for _ in range(3):
            assert (await one.get(path))[0] == 200
        async with patience():
            while (await one.get(path))[0] == 200:
                await asyncio.sleep(0.05)
        assert (await one.get(path))[0] == 404


# --- the wire ----------------------------------------------------------------------------------------------------


async def test_a_client_may_end_the_connection(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    path = manifest_path(server)
    async with port(tmp_path, redis_url, server) as place:
        for _ in range(4):
            async with client(place) as one:
                status, headers, body = await one.get(path, "Connection: close\r\n")
                assert (status, headers["connection"], body) == (200, "close", TOOL.manifest)
                assert await one.is_closed()
        async with client(place) as one:
            one.send(head(path, version="1.0"))
            assert (await one.read())[2] == TOOL.manifest
            assert await one.is_closed()
        await eventually(lambda: warm(place) == 4)


async def test_requests_in_pieces_and_in_a_row(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    path = manifest_path(server)
    missing = head(manifest_path(server, "none"))
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        for _ in range(3):
            await one.get(path)
        request = head(path)
        one.send(request[:20])
        await asyncio.sleep(0.02)
        one.send(request[20:])
        assert (await one.read())[2] == TOOL.manifest
        one.send(request * 5 + missing + request * 2)
        answers = [await one.read() for _ in range(8)]
        assert [status for status, _, _ in answers] == [200] * 5 + [404] + [200] * 2
        one.send(request + b"GARBAGE\r\n\r\n")
        assert (await one.read())[2] == TOOL.manifest
        assert (await one.read())[0] == 400
        assert await one.is_closed()


@pytest.mark.parametrize("reference", ["1.0", "none"], ids=["warm", "cold"])
async def test_half_a_request_behind_a_whole_one(
    upstream: Start, tmp_path: Path, redis_url: str, reference: str
) -> None:
    server = serving(upstream)
    missing, known = manifest_path(server, "none"), head(manifest_path(server))
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        for _ in range(3):
            await one.get(manifest_path(server))
        one.send(head(manifest_path(server, reference)) + f"GET {missing} HTTP/1.1\r\nX-Note: ".encode())
        assert (await one.read())[0] == (200 if reference == "1.0" else 404)
        one.send(known)  # a note, and the end of the other's head
        assert (await one.read())[0] == 404
        one.send(known)
        assert (await one.read())[2] == TOOL.manifest


async def test_what_follows_a_wish_to_upgrade_is_answered_each_time(
    upstream: Start, tmp_path: Path, redis_url: str
) -> None:
    server = serving(upstream)
    path = manifest_path(server)
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        for _ in range(3):
            await one.get(path)
        for _ in range(3):
            one.send(head(path, "Connection: upgrade\r\nUpgrade: h2c\r\n") + head(path))
            async with patience():
                assert [(await one.read())[2] for _ in range(2)] == [TOOL.manifest] * 2


@pytest.mark.parametrize("seed", range(8))
async def test_however_requests_are_cut_up_each_gets_its_answer(redis_url: str, seed: int) -> None:
    chance = random.Random(seed)

    async def answering(request: Request) -> Reply:
        size = sum([len(chunk) async for chunk in request.body.chunks()])
        await asyncio.sleep(chance.choice((0, 0.001)))
        terms = Terms(until=float("inf"), token="", kind="manifest", state="hit") if size == 0 else None
        return Reply(200, [], f"{request.method} {request.target} {size}".encode(), terms=terms)

    async with replies(redis_url) as kept:
        server = Server(answering, Limits(), ready=kept)
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        for _ in range(30):
            requests, wanted = zip(*(_some_request(chance) for _ in range(6)), strict=True)
            sent = b"".join(requests)
            ends = [match.end() for match in re.finditer(rb"\r\n\r\n|(?=GET /)", sent)]
            cuts = sorted({*chance.sample(ends, len(ends) // 2), *chance.sample(range(len(sent)), 2), len(sent)})
            for begin, end in pairwise([0, *cuts]):
                writer.write(sent[begin:end])
                await asyncio.sleep(chance.choice((0, 0.002)))
            for body in wanted:
                async with patience():
                    answer = await reader.readuntil(b"\r\n\r\n")
                    assert await reader.readexactly(len(body)) == body
                assert answer.startswith(b"HTTP/1.1 200 ")
        writer.close()
        listener.close()
        await server.shut_down(grace_s=1)
        assert kept._requests


def _some_request(chance: random.Random) -> tuple[bytes, bytes]:
    """A request, and the body of its answer; it may hold another one that is well known."""
    path = f"/{chance.randrange(3)}"
    known = head(f"/{chance.randrange(3)}")
    upgrade = "Connection: upgrade\r\nUpgrade: h2c\r\n" if chance.random() < 0.2 else ""
    match chance.randrange(5):
        case 0:
            return head(path, upgrade)[:-2] + b"X-Note: " + known, f"GET {path} 0".encode()
        case 1:
            sized = f"{upgrade}Content-Length: {len(known)}\r\n"
            return head(path, sized, method="POST") + known, f"POST {path} {len(known)}".encode()
        case 2:
            chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(known), known)
            chunked = f"{upgrade}Transfer-Encoding: chunked\r\n"
            return head(path, chunked, method="POST") + chunk, f"POST {path} {len(known)}".encode()
        case _:
            return head(path, upgrade), f"GET {path} 0".encode()


async def test_a_body_is_no_part_of_what_is_remembered(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    path = manifest_path(server)
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        for _ in range(3):
            await one.get(path)
        for _ in range(3):
            one.send(head(path, "Content-Length: 4\r\n") + b"GET ")
            assert (await one.read())[2] == TOOL.manifest
        assert (await one.get(path))[2] == TOOL.manifest


async def test_a_client_that_does_not_read_is_not_buffered_for(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    server.add_blob(REPOSITORY, content := blob(random_blob(60_000, seed=52)))
    path = f"/v2/{server.address}/{REPOSITORY}/blobs/{content.digest}"
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        await one.get(path)
        await eventually(lambda: place.worker.blobs.path(content.digest).exists())
        await one.get(path)
        await one.get(path)
        for _ in range(2000):  # 120 MB, if all were answered at once
            one.send(head(path))
        async with client(place) as other:
            assert (await other.get(path))[2] == content.content
        for _ in range(2000):
            assert (await one.read())[2] == content.content


# --- counting ----------------------------------------------------------------------------------------------------


async def test_each_warm_pull_is_counted(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place, client(place) as one:
        for _ in range(50):
            await one.get(manifest_path(server))
            one.send(head(manifest_path(server), method="HEAD"))
            await one.read(head_only=True)
        await place.usage.close()
        today = next(iter([day async for day in _days(redis_url)]))
        counted = await place.usage.read("pulls", today)
        assert counted.count == 50
        assert warm(place) == 99  # but for the first GET


async def _days(url: str) -> AsyncIterator[str]:
    async with connect(url) as redis:
        async for key in redis.scan_iter("wave:{usage}:pulls:*"):
            yield key.decode().rpartition(":")[2]


async def test_the_quota_holds_for_warm_pulls(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    server.add(REPOSITORY, index([TOOL, image([layer({"bin/tool": "y"})], platform="linux/arm64")]), "all")
    limits = {("pull", False): Limit(20, 3600.0)}
    async with port(tmp_path, redis_url, server, limits=limits) as place, client(place, "127.0.0.40") as one:
        for reference in ("all", "all", "all"):
            assert (await one.get(manifest_path(server, reference)))[0] == 200
        for _ in range(30):
            one.send(head(manifest_path(server), method="HEAD"))
            assert (await one.read(head_only=True))[0] == 200
        answers = [await one.get(manifest_path(server)) for _ in range(30)]
        assert [status for status, _, _ in answers] == [200] * 20 + [429] * 10
        _, headers, body = answers[-1]
        assert headers["ratelimit-limit"] == "20"
        assert headers["ratelimit-remaining"] == "0"
        assert 0 < int(headers["retry-after"]) <= int(headers["ratelimit-reset"]) <= 3610
        assert b'"TOOMANYREQUESTS"' in body
        assert b"IP 127.0.0.40" in body
        assert b"20/1h" in body
        async with client(place, "127.0.0.41") as other:
            assert (await other.get(manifest_path(server)))[0] == 200
            # What anybody may claim decides nothing.
            status, _, _ = await one.get(manifest_path(server), "X-Forwarded-For: 127.0.0.41\r\n")
            assert status == 429


async def test_a_trusted_proxy_tells_the_address(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    limits = {("pull", False): Limit(5, 3600.0)}
    async with port(tmp_path, redis_url, server, limits=limits, trusted=["127.0.0.1"]) as place, client(place) as one:
        for address in ("192.0.2.1", "2001:db8::1"):
            got = [
                (await one.get(manifest_path(server), f"X-Forwarded-For: 8.8.8.8, {address}\r\n"))[0] for _ in range(8)
            ]
            assert got == [200] * 5 + [429] * 3
        status, _, body = await one.get(manifest_path(server), "X-Forwarded-For: 2001:db8::2\r\n")
        assert status == 429, "the same network"
        assert b"2001:db8::/64" in body
        assert error_of(
            await asyncio.to_thread(
                http_request, place.address, "GET", manifest_path(server), headers={"X-Forwarded-For": "192.0.2.1"}
            )
        )[:2] == (429, "TOOMANYREQUESTS")


async def test_a_held_pull_gets_its_turn(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    limits = {("pull", False): Limit(5, 0.5)}
    async with port(tmp_path, redis_url, server, limits=limits, wait_s=PATIENCE_S) as place, client(place) as one:
        assert [(await one.get(manifest_path(server)))[0] for _ in range(20)] == [200] * 20


# --- memory ------------------------------------------------------------------------------------------------------


def asked(number: int, *, body: bytes = b"x" * 1000, token: str = "") -> tuple[Request, Reply]:
    request = Request("GET", f"/v2/{number}", [], Body(None, 0, 0, False), "192.0.2.1", True, False)  # type: ignore[arg-type]
    terms = Terms(until=float("inf"), token=token, kind="manifest", state="hit")
    return request, Reply(200, [("Content-Type", "text/plain")], body, terms=terms)


@asynccontextmanager
async def replies(redis_url: str) -> AsyncIterator[ReadyReplies]:
    async with connect(redis_url) as redis:
        yield ReadyReplies(Quotas(redis, {}, wait_s=0), Usage(redis), RequestStats())


async def test_memory_is_bounded(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "_REPLIES_BYTES", 100_000)
    monkeypatch.setattr(ready, "_REQUESTS_BYTES", 50_000)
    async with replies(redis_url) as kept:
        for number in range(1000):
            request, reply = asked(number, token=f"{number:032x}")
            kept.keep(request, reply, kept.endings)
            wire = kept.answer(request)
            assert wire is not None
            assert wire.content.endswith(b"x" * 1000)
            for variant in range(3):
                kept.remember(f"{number} {variant}".encode(), wire)
        assert len(kept._replies) == len(kept._by_name) == 100_000 // (3 * 1000 + 2000 + len("/v2/999"))
        assert len(kept._requests) <= 50
        assert kept.answer(asked(0)[0]) is None
        kept.clear()
        assert (kept._bytes, kept._replies, kept._by_name) == (0, {}, {})


def keep_and_remember(kept: ReadyReplies) -> tuple[Request, Wire]:
    """A reply of the token "aaa…" is kept, and known by ``b"the same bytes"``."""
    request, reply = asked(1, token="a" * 32)
    kept.keep(request, reply, kept.endings)
    wire = kept.answer(request)
    assert wire is not None
    kept.remember(b"the same bytes", wire)
    return request, wire


async def test_what_was_dropped_is_kept_alive_by_nothing(redis_url: str) -> None:
    async with replies(redis_url) as kept:
        _, wire = keep_and_remember(kept)
        kept.forget("a" * 32)
        assert (wire.content, wire.ready.body, wire.ready.reply.body) == (b"", b"", b"")


async def test_long_targets_and_bodies_that_are_not_sent_take_no_more_memory(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "_REPLIES_BYTES", 100_000)
    async with replies(redis_url) as kept:
        for number in range(100):
            request, reply = asked(number)
            request.target += "?" + "x" * 40_000
            kept.keep(request, reply, kept.endings)
        assert len(kept._replies) == 2
        request, reply = asked(1, body=b"x" * 60_000)
        request.method = "HEAD"
        kept.keep(request, reply, kept.endings)
        wire = kept.answer(request)
        assert wire is not None
        assert b"\r\nContent-Length: 60000\r\n" in wire.content
        assert (wire.ready.body, wire.ready.reply.body) == (b"", b"")


async def test_what_was_dropped_is_not_found_by_its_bytes(redis_url: str) -> None:
    async with replies(redis_url) as kept:
        request, wire = keep_and_remember(kept)
        assert kept.answer_bytes(b"the same bytes", "192.0.2.1") is wire
        kept.forget("b" * 32)
        assert kept.answer_bytes(b"the same bytes", "192.0.2.1") is wire
        kept.forget("a" * 32)
        assert kept.answer_bytes(b"the same bytes", "192.0.2.1") is None
        assert kept.answer(request) is None


async def test_a_date_is_not_older_than_a_second(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now: dict[str, Any] = {"now": 1000.0}
    monkeypatch.setattr(ready, "monotonic", lambda: now["now"])
    monkeypatch.setattr(ready, "time", lambda: now["now"])
    async with replies(redis_url) as kept:
        request, reply = asked(1)
        assert reply.terms is not None
        reply.terms = Terms(until=2000.0, token="", kind="manifest", state="hit", confirmed=990.0)
        kept.keep(request, reply, kept.endings)
        ages = []
        for seconds in (0, 0.5, 1.0, 5.0):
            now["now"] = 1000.0 + seconds
            wire = kept.answer(request)
            assert wire is not None
            found = re.search(rb"\r\nAge: (\d+)\r\n", wire.content)
            assert found is not None
            ages.append(int(found[1]))
        assert ages == [10, 10, 11, 15]
        now["now"] = 2000.0
        assert kept.answer(request) is None

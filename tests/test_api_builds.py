"""Builds over the wire: what is told of them, their logs while they grow and after, cancelling. The test builds."""

import asyncio
import json
import re
from asyncio.subprocess import PIPE
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from http.client import HTTPConnection
from random import Random
from time import time
from typing import Any

import pytest
from starlette.applications import Starlette

from api.jobs.tails import WINDOW_BYTES
from tests.api_server import ApiServer
from tests.patience import PATIENCE_S, patience
from tests.redis_faults import durable_redis
from tests.servers import WaveProxy, redis_server
from wave_proxy.image.build import BuildSpec, Compression
from wave_proxy.image.request import Identity
from wave_proxy.state.builds import BuildCancelled, BuildLimits, BuildStore, Claim, LeaseLost
from wave_proxy.state.redis import connect

ADMIN = {"Authorization": f"Basic {b64encode(b'admin:hunter2').decode()}"}
ACCOUNTS = {"admin": f"sha256:{sha256(b'hunter2').hexdigest()}"}
EVENTS = {"Accept": "text/event-stream"}
DIGEST = f"sha256:{'d' * 64}"


class Server(ApiServer):
    """One whose event loop tests look at."""

    loop: asyncio.AbstractEventLoop

    def _compose(self, stack: AsyncExitStack) -> Starlette:
        self.loop = asyncio.get_running_loop()
        return super()._compose(stack)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for the module."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def api(redis: str) -> Iterator[Server]:
    """One server for the module."""
    with Server(redis, accounts=ACCOUNTS) as server:
        yield server


@dataclass
class Builder:
    """A builder, and an api that takes builds."""

    store: BuildStore
    random: Random = field(default_factory=Random)
    claims: list[Claim] = field(default_factory=list)

    async def submit(self, **changes: Any) -> str:
        """The id of a new build."""

        async def admit() -> None:
            pass

        container_id = self.random.randbytes(8).hex()
        spec = BuildSpec(container_id, f"127.0.0.1:1/local/build:{container_id}", "FROM scratch\n")
        record, is_new = await self.store.submit(replace(spec, **changes), admit)
        assert is_new
        return record.build_id

    async def start(self, **changes: Any) -> Claim:
        """A build that runs, in this builder's hands."""
        build_id = await self.submit(**changes)
        claim = await self.claim()
        assert claim.record.build_id == build_id
        return claim

    async def claim(self) -> Claim:
        """The build whose turn it is, in this builder's hands."""
        claim = await self.store.claim("test", PATIENCE_S)
        assert claim is not None
        self.claims.append(claim)
        return claim

    async def leave(self) -> None:
        """Finish what has been begun."""
        for claim in self.claims:
            with suppress(LeaseLost):
                await self.store.finish(claim, exit_status=1, reason="left over")
        self.claims.clear()

    async def build(self, log: bytes = b"built\n", **changes: Any) -> str:
        """The id of a build that has succeeded."""
        claim = await self.start(**changes)
        await self.store.append_log(claim, log)
        await self.store.finish(claim, exit_status=0, digest=DIGEST)
        return claim.record.build_id


@asynccontextmanager
async def building(redis: str) -> AsyncIterator[Builder]:
    """A builder, that leaves no builds to others."""
    client = connect(redis)
    try:
        builder = Builder(BuildStore(client, BuildLimits(1000), lease_s=600.0))
        yield builder
        await builder.leave()
        while (await builder.store.queue_length()) != (0, 0):
            await builder.claim()
            await builder.leave()
    finally:
        await client.aclose()


@pytest.fixture
async def builder(redis: str) -> AsyncIterator[Builder]:
    async with building(redis) as one:
        yield one


def get(api: Server, build_id: str, what: str = "", **headers: str) -> tuple[int, Any]:
    """Status and document, or text, of an answer."""
    answer = api.request("GET", f"/v1alpha1/builds/{build_id}{what}", headers=headers)
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status, answer.json() if is_json else answer.body


# --- what is told of a build -----------------------------------------------------------------------------------------


async def test_a_build_is_described_from_request_to_end(api: Server, builder: Builder) -> None:
    before = time()
    changes = {
        "conda_file": "dependencies: [bwa]\n",
        "template": "conda/micromamba:v2",
        "compression": Compression("zstd", 3, True),
        "platform": "linux/arm64",
        "identity": Identity(user_id=7, email="ann@example.com"),
        "ip_address": "192.0.2.7",
    }
    claim = await builder.start(**changes)
    build_id, spec = claim.record.build_id, claim.record.spec
    status, told = get(api, build_id)
    started = datetime.fromisoformat(told.pop("startTime"))
    assert before - 1e-3 <= started.timestamp() <= time()
    expected = {
        "buildId": build_id,
        "dockerFile": "FROM scratch\n",
        "condaFile": "dependencies: [bwa]\n",
        "targetImage": spec.target_image,
        "userId": 7,
        "offsetId": "Z",
        "platform": "linux/arm64",
        "format": "DOCKER",
        "compression": {"mode": "zstd", "level": 3, "force": True},
        "buildTemplate": "conda/micromamba:v2",
    }
    assert (status, told) == (200, expected)
    await builder.store.finish(claim, exit_status=0, digest=DIGEST)
    told = get(api, build_id)[1]
    duration = told.pop("duration")
    assert 0 < duration <= time() - before + 1e-3
    assert datetime.fromisoformat(told.pop("startTime")) == started
    assert told == {**expected, "exitStatus": 0, "digest": DIGEST}


async def test_a_failed_build_says_why(api: Server, builder: Builder) -> None:
    claim = await builder.start(format="sif")
    await builder.store.finish(claim, exit_status=137, reason="out of memory: the build used its limit of 4.0 GB")
    told = get(api, claim.record.build_id)[1]
    assert told["exitStatus"] == 137
    assert told["reason"] == "out of memory: the build used its limit of 4.0 GB"
    assert told["format"] == "SINGULARITY"
    assert told["targetImage"] == f"oras://{claim.record.spec.target_image}"
    assert not {"digest", "compression", "condaFile", "buildTemplate", "userId"} & told.keys()


@pytest.mark.parametrize("exit_status", [0, 1])
async def test_status(api: Server, builder: Builder, exit_status: int) -> None:
    build_id = await builder.submit()
    started = get(api, build_id)[1]["startTime"]
    assert get(api, build_id, "/status") == (200, {"id": build_id, "status": "PENDING", "startTime": started})
    claim = await builder.claim()
    assert get(api, build_id, "/status")[1]["status"] == "PENDING"
    await builder.store.finish(claim, exit_status=exit_status, reason="broken" if exit_status else "")
    answer = api.request("GET", f"/v1alpha1/builds/{build_id}/status")
    # Clients take a number without a point for nanoseconds.
    assert re.search(rb'"duration":[0-9]+\.[0-9]{9}[,}]', answer.body)
    told = answer.json()
    assert told.pop("duration") > 0
    reason = {"reason": "broken"} if exit_status else {}
    expected = {"id": build_id, "status": "COMPLETED", "startTime": started, "succeeded": exit_status == 0}
    assert told == {**expected, **reason}


async def test_an_id_may_leave_out_what_all_ids_begin_with_and_the_number(api: Server, builder: Builder) -> None:
    first = await builder.build()
    container_id = first[3:19]
    gone = await builder.store.find(first)
    assert gone is not None

    async def admit() -> None:
        pass

    second, _ = await builder.store.submit(gone.spec, admit, gone=first)
    assert second.build_id == f"bd-{container_id}_2"
    for text, found in (
        (first, first),
        (first[3:], first),
        (f"{container_id}_2", second.build_id),
        (container_id, second.build_id),
        (f"bd-{container_id}", second.build_id),
    ):
        assert get(api, text)[1]["buildId"] == found
        assert get(api, text, "/status")[1]["id"] == found
        # The newest may be another one at any time, so that what is told of it is for once.
        repeated = api.request("GET", f"/v1alpha1/builds/{text}/status").headers["X-Wave-Repeat"]
        assert repeated == (f"15.000 {found}" if "_" in text else None)


async def test_an_id_of_digits_alone_is_an_id_like_any_other(api: Server, builder: Builder) -> None:
    assert await builder.build(container_id="1234567890123456") == "bd-1234567890123456_1"
    assert get(api, "bd-1234567890123456")[1]["buildId"] == "bd-1234567890123456_1"
    assert get(api, "1234567890123456", "/logs") == (200, b"built\n")


@pytest.mark.parametrize(
    "text",
    [
        "bd-0123456789abcdef_1",
        "0123456789abcdef",
        "bd-0123456789abcdef_",
        "bd-0123456789ABCDEF_1",
        "bd-0123456789abcdef-1",
        "0123456789abcde",
        "1234567890",
        "bd-",
        "x" * 300,
        "..%2F..%2Fx",
        "bd-0123456789abcdef_1%0A",
        "bd-0123456789abcdef_%D9%A1",
        "%F0%9F%90%8B",
        "%FF%FE",
        "*",
    ],
)
@pytest.mark.parametrize("what", ["", "/status", "/logs", "/logs?follow=1", "/condalock"])
def test_what_is_no_build(api: Server, text: str, what: str) -> None:
    answer = api.request("GET", f"/v1alpha1/builds/{text}{what}")
    assert answer.status == 404
    assert answer.body == b"" or "%2F" in text  # which is another path, and no build's


async def test_the_conda_lock(api: Server, builder: Builder) -> None:
    claim = await builder.start()
    build_id = claim.record.build_id
    assert get(api, build_id, "/condalock") == (404, b"")
    await builder.store.finish(claim, exit_status=0, lock=b"@EXPLICIT\nhttps://x/y.conda\n")
    answer = api.request("GET", f"/v1alpha1/builds/{build_id}/condalock")
    assert answer.status == 200
    assert answer.body == b"@EXPLICIT\nhttps://x/y.conda\n"
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert get(api, await builder.build(), "/condalock") == (404, b"")


# --- logs ------------------------------------------------------------------------------------------------------------


async def test_a_log_before_while_and_after_it_grows(api: Server, builder: Builder) -> None:
    claim = await builder.start()
    path = f"/v1alpha1/builds/{claim.record.build_id}/logs"
    assert get(api, claim.record.build_id, "/logs") == (404, b"")
    await builder.store.append_log(claim, "größer\n".encode())
    part = api.request("GET", path)
    assert (part.status, part.body) == (200, "größer\n".encode())
    assert part.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert part.headers["X-Build-Status"] == "PENDING"
    await builder.store.append_log(claim, b"no line end")
    assert api.request("GET", f"{path}?offset=9").body == b"no line end"
    await builder.store.finish(claim, exit_status=0)
    whole = api.request("GET", path)
    assert whole.body == "größer\nno line end".encode()
    assert whole.headers["X-Build-Status"] == "COMPLETED"
    assert api.request("GET", f"{path}?follow=1&offset=9").body == b"no line end"
    assert api.request("GET", f"{path}?offset=9999").body == b""


@pytest.mark.parametrize("offset", ["-1", "x", "", "1e3", "9" * 16])
async def test_an_offset_that_is_none(api: Server, builder: Builder, offset: str) -> None:
    status, told = get(api, await builder.build(), f"/logs?offset={offset}")
    assert status == 400
    assert told == {"message": f"offset: '{offset}' is not a number of bytes"}


@pytest.mark.parametrize("query", ["follow=0", "follow=false", ""])
async def test_to_follow_has_to_be_asked_for(api: Server, builder: Builder, query: str) -> None:
    claim = await builder.start()
    await builder.store.append_log(claim, b"1\n")
    assert get(api, claim.record.build_id, f"/logs?{query}") == (200, b"1\n")


async def test_head_of_a_log_that_grows_ends(api: Server, builder: Builder) -> None:
    claim = await builder.start()
    await builder.store.append_log(claim, b"1\n")
    answer = api.request("HEAD", f"/v1alpha1/builds/{claim.record.build_id}/logs?follow=1")
    assert (answer.status, answer.body) == (200, b"")


@asynccontextmanager
async def curl(url: str, *options: str) -> AsyncIterator[asyncio.StreamReader]:
    """What curl prints, unbuffered; it has to end by itself, with success, unless the test closes it before."""
    process = await asyncio.create_subprocess_exec("curl", "-sSN", "--fail", *options, url, stdout=PIPE, stderr=PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with patience():
            yield process.stdout
            assert await process.wait() == 0, (await process.stderr.read()).decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def follow_live(address: str, builder: Builder) -> None:
    """A line arrives before the next is written, and in the end all is there."""
    claim = await builder.start()
    url = f"http://{address}/v1alpha1/builds/{claim.record.build_id}/logs"
    seen = b""
    async with curl(f"{url}?follow=1") as output:
        for number in range(5):
            line = f"STEP {number}: größer\n".encode()
            await builder.store.append_log(claim, line)
            assert await output.readline() == line
            seen += line
        await builder.store.append_log(claim, b"in parts, ")
        assert await output.readexactly(10) == b"in parts, "
        await builder.store.append_log(claim, b"and without an end")
        await builder.store.finish(claim, exit_status=0, digest=DIGEST)
        seen += b"in parts, " + await output.read()
    async with curl(url) as output:
        assert await output.read() == seen


async def test_a_log_is_followed_live(api: Server, builder: Builder) -> None:
    await follow_live(api.address, builder)


async def test_a_log_is_followed_live_through_the_port(
    redis: str, builder: Builder, wave: Callable[..., WaveProxy]
) -> None:
    proxy = wave(
        redis=redis, config='[build]\nengine = "none"\n[http]\nwrite_timeout = "100ms"\nidle_timeout = "100ms"'
    )
    await follow_live(proxy.address, builder)


async def test_a_log_is_followed_before_the_build_begins(api: Server, builder: Builder) -> None:
    build_id = await builder.submit()
    async with curl(f"http://{api.address}/v1alpha1/builds/{build_id}/logs?follow=1", "-D", "-") as output:
        assert await output.readline() == b"HTTP/1.1 200 OK\r\n"
        head = (await output.readuntil(b"\r\n\r\n")).decode().lower()
        assert "x-accel-buffering: no" in head
        assert "x-build-status: pending" in head
        claim = await builder.claim()
        await builder.store.append_log(claim, b"begun\n")
        assert await output.readline() == b"begun\n"
        await builder.store.finish(claim, exit_status=1)
        assert await output.read() == b""


async def test_whoever_comes_late_or_reads_slowly_gets_every_byte_once(api: Server, builder: Builder) -> None:
    claim = await builder.start()
    url = f"http://{api.address}/v1alpha1/builds/{claim.record.build_id}/logs?follow=1"
    pieces = [b"%d %b\n" % (number, builder.random.randbytes(20_000).hex().encode()) for number in range(40)]
    size = sum(map(len, pieces))
    assert size > 4 * WINDOW_BYTES
    async with AsyncExitStack() as stack:
        outputs = [(0, await stack.enter_async_context(curl(url, "--limit-rate", "1M")))]
        for number, piece in enumerate(pieces):
            await builder.store.append_log(claim, piece)
            if number % 10 == 5:
                offset = builder.random.randrange(size)
                outputs.append((offset, await stack.enter_async_context(curl(f"{url}&offset={offset}"))))
                outputs.append((0, await stack.enter_async_context(curl(url))))
        reading = [asyncio.create_task(output.read()) for _, output in outputs]
        await builder.store.finish(claim, exit_status=0)
        for (offset, _), task in zip(outputs, reading, strict=True):
            assert await task == b"".join(pieces)[offset:], f"from {offset}"


async def connections_to(redis: str) -> int:
    async with connect(redis) as client:
        return int((await client.info("clients"))["connected_clients"])


async def test_many_followers_share_what_they_need_and_leave_nothing(redis: str, api: Server, builder: Builder) -> None:
    claim = await builder.start()
    await builder.store.append_log(claim, b"first\n")
    assert get(api, claim.record.build_id, "/logs")[0] == 200
    tasks_before = len(asyncio.all_tasks(api.loop))
    target = f"/v1alpha1/builds/{claim.record.build_id}/logs?follow=1"
    request = f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    host, port = api.address.split(":")
    followers = []
    async with patience():
        for _ in range(500):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request)
            followers.append((reader, writer))
        for reader, _ in followers:
            await reader.readuntil(b"first\n")
        assert await connections_to(redis) < 100  # pools of 32
        await builder.store.append_log(claim, b"second\n")
        for reader, writer in followers:
            await reader.readuntil(b"second\n")
            writer.close()
        while len(asyncio.all_tasks(api.loop)) > tasks_before:
            await asyncio.sleep(0.01)


async def test_a_follower_does_not_notice_that_redis_restarts() -> None:
    async with durable_redis() as durable, building(durable.url) as builder:
        with Server(durable.url) as server:
            claim = await builder.start()
            url = f"http://{server.address}/v1alpha1/builds/{claim.record.build_id}/logs?follow=1"
            async with curl(url) as output:
                await builder.store.append_log(claim, b"before\n")
                assert await output.readline() == b"before\n"
                durable.stop()
                await asyncio.sleep(0.15)
                await durable.start()
                await builder.store.append_log(claim, b"after\n")
                assert await output.readline() == b"after\n"
                await builder.store.finish(claim, exit_status=0)
                assert await output.read() == b""


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass
class Event:
    """An event as a browser sees it."""

    name: str
    id: str
    data: str


def parse_events(text: str) -> list[Event]:
    """The events of a whole stream. Source: HTML standard §9.2.6."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = [line.partition(": ")[::2] for line in block.split("\n") if not line.startswith(":")]
        if fields:
            named = dict(fields)
            data = "\n".join(value for name, value in fields if name == "data")
            found.append(Event(named["event"], named["id"], data))
    return found


async def test_events_bring_the_log_and_then_the_status(api: Server, builder: Builder) -> None:
    claim = await builder.start()
    path = f"/v1alpha1/builds/{claim.record.build_id}/logs"
    async with curl(f"http://{api.address}{path}", "-H", "Accept: text/event-stream") as output:
        await builder.store.append_log(claim, "eins\r\nzw€i\n\ndrei: ".encode())
        event = (await output.readuntil(b"\n\n")).decode()
        while event.startswith(":"):
            event = (await output.readuntil(b"\n\n")).decode()
        assert parse_events(event) == [Event("log", "14", "eins\nzw€i\n")]
        assert (await output.readuntil(b"\n\n")).startswith(b": ")
        await builder.store.append_log(claim, b"a\rb\nno end")
        await builder.store.finish(claim, exit_status=1, reason="broken")
        log, rest, end = parse_events((await output.read()).decode())
    assert log == Event("log", "24", "drei: a\nb")
    assert rest == Event("log", "30", "no end")
    assert end.name == "end"
    told = json.loads(end.data)
    assert told == get(api, claim.record.build_id, "/status")[1]
    assert told["succeeded"] is False


async def test_events_go_on_where_the_client_was(api: Server, builder: Builder) -> None:
    claim = await builder.start()
    path = f"/v1alpha1/builds/{claim.record.build_id}/logs"
    for line in (b"1\n", b"22\n"):
        await builder.store.append_log(claim, line)
    with closing(HTTPConnection(api.address, timeout=PATIENCE_S)) as connection:
        connection.request("GET", f"{path}?offset=5", headers={**EVENTS, "Last-Event-ID": "2"})
        answer = connection.getresponse()
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert b"".join(answer.readline() for _ in range(4)) == b"event: log\nid: 5\ndata: 22\n\n"
    await builder.store.append_log(claim, b"333\n")
    await builder.store.finish(claim, exit_status=0)
    for last, expected in (("0", ["1\n22\n333", ""]), ("5", ["333", ""]), ("9", [""]), ("junk", ["1\n22\n333", ""])):
        events = parse_events(api.request("GET", path, headers={**EVENTS, "Last-Event-ID": last}).body.decode())
        assert [event.data if event.name == "log" else "" for event in events] == expected
    again = api.request("GET", path, headers={**EVENTS, "Last-Event-ID": events[-1].id})
    assert (again.status, again.body) == (204, b"")  # a browser comes back after every end, unless it is told this


async def test_a_line_without_end_comes_in_parts(api: Server, builder: Builder) -> None:
    build_id = await builder.build("€".encode() * 100_000)
    events = parse_events(api.request("GET", f"/v1alpha1/builds/{build_id}/logs", headers=EVENTS).body.decode())
    assert "".join(event.data for event in events[:-1]) == "€" * 100_000


# --- cancelling ------------------------------------------------------------------------------------------------------


async def test_a_waiting_build_ends_at_once(api: Server, builder: Builder) -> None:
    build_id = await builder.submit()
    answer = api.request("DELETE", f"/v1alpha1/builds/{build_id}", headers=ADMIN)
    assert answer.status == 202
    told = answer.json()
    assert told["status"] == "COMPLETED"
    assert told["succeeded"] is False
    assert told["reason"] == "cancelled"
    assert await builder.store.queue_length() == (0, 0)


async def test_a_running_build_is_ended_by_its_builder(api: Server, builder: Builder) -> None:
    claim = await builder.start()
    answer = api.request("DELETE", f"/v1alpha1/builds/{claim.record.build_id}", headers=ADMIN)
    assert (answer.status, answer.json()["status"]) == (202, "PENDING")
    with pytest.raises(BuildCancelled, match="cancelled"):
        await builder.store.renew(claim)
    await builder.store.finish(claim, exit_status=1, reason="cancelled")
    answer = api.request("DELETE", f"/v1alpha1/builds/{claim.record.build_id}", headers=ADMIN)
    assert answer.status == 409
    assert answer.json() == {"message": f"Build '{claim.record.build_id}' is already completed"}


@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Basic {b64encode(b'admin:no').decode()}"}])
async def test_only_accounts_may_cancel(api: Server, builder: Builder, headers: dict[str, str]) -> None:
    build_id = await builder.submit()
    answer = api.request("DELETE", f"/v1alpha1/builds/{build_id}", headers=headers)
    assert (answer.status, answer.body) == (401, b"")
    assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
    assert get(api, build_id, "/status")[1]["status"] == "PENDING"


def test_what_is_no_build_is_not_cancelled(api: Server) -> None:
    for text in ("bd-0123456789abcdef_1", "0123456789abcdef", "x"):
        answer = api.request("DELETE", f"/v1alpha1/builds/{text}", headers=ADMIN)
        assert (answer.status, answer.body) == (404, b"")


def test_other_methods(api: Server) -> None:
    answer = api.request("POST", "/v1alpha1/builds/bd-0123456789abcdef_1", body=b"", headers=ADMIN)
    assert answer.status == 405
    assert answer.headers["Allow"] == "DELETE, GET, HEAD"

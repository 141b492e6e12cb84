"""Circuit breakers: the states by themselves, and in front of a real registry that misbehaves on command."""

import asyncio
from collections.abc import Callable
from time import monotonic

import pytest

from bench.images import image, layer
from bench.upstream import Upstream
from tests.outgoing import egress_to, registry_at, scripted
from tests.patience import PATIENCE_S, eventually, patience
from wave_proxy.errors import (
    BlobUnknown,
    Denied,
    DigestMismatch,
    HostUnknown,
    ManifestUnknown,
    Offline,
    TooManyRequests,
    UpstreamError,
    UpstreamFailing,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaveError,
)
from wave_proxy.image.oci import digest_of
from wave_proxy.upstream import breaker as breaker_module
from wave_proxy.upstream.breaker import FAILURES, FIRST_PAUSE_S, MAX_PAUSE_S, Breaker, Breakers
from wave_proxy.upstream.credentials import Credentials
from wave_proxy.upstream.egress import Egress
from wave_proxy.upstream.limits import Limit, Limits
from wave_proxy.upstream.registry import FetchedManifest, Registry

Start = Callable[..., Upstream]

TOOL = image([layer({"bin/tool": "x"})])
DOWN = UpstreamUnavailable("no answer from quay.io")
NAME = "lib/tool"


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker("quay.io")
    for _ in range(FAILURES):
        assert breaker.admit("a:1", now) is False
        breaker.fail(DOWN, "a:1", now)
    return breaker


def test_opens_after_failures_in_a_row_and_says_why() -> None:
    breaker = Breaker("quay.io")
    for number in range(FAILURES - 1):
        breaker.fail(DOWN, f"a:{number}", 0)
    breaker.succeed()
    for number in range(FAILURES - 1):
        breaker.fail(DOWN, f"a:{number}", 0)
    assert not breaker.is_open
    breaker.fail(UpstreamTimeout("quay.io did not answer"), "a:1", 0)
    with pytest.raises(
        UpstreamUnavailable, match=r"quay.io has failed.* another 4 s: quay.io did not answer"
    ) as caught:
        breaker.admit("a:1", 1.5)
    assert caught.value.retry_after_s == 4


def test_one_tries_while_the_others_are_told() -> None:
    breaker = opened()
    assert breaker.admit("a:1", FIRST_PAUSE_S) is True
    with pytest.raises(UpstreamUnavailable, match="while one request tries it again") as caught:
        breaker.admit("a:1", FIRST_PAUSE_S)
    assert caught.value.retry_after_s == 1
    breaker.succeed()
    assert breaker.admit("a:1", FIRST_PAUSE_S) is False
    assert not breaker.is_open


def test_each_vain_try_doubles_the_pause_up_to_a_limit() -> None:
    breaker, now = opened(), 0.0
    for pause_s in (5, 10, 20, 40, 60, 60):
        with pytest.raises(UpstreamUnavailable):
            breaker.admit("a:1", now + pause_s - 0.1)
        now += pause_s
        assert breaker.admit("a:1", now) is True
        breaker.fail(DOWN, "a:1", now, trial=True)
    assert now + MAX_PAUSE_S == breaker._until
    breaker.succeed()
    for _ in range(FAILURES):
        breaker.fail(DOWN, "a:1", now)
    assert breaker._until == now + MAX_PAUSE_S  # a pause is never shortened...
    assert opened(now + 100)._until == now + 100 + FIRST_PAUSE_S  # ...and begins small


def test_try_that_is_given_up_is_for_another() -> None:
    breaker = opened()
    assert breaker.admit("a:1", 6) is True
    breaker.give_up()
    assert breaker.admit("a:1", 6) is True


def test_requests_that_went_out_before_say_nothing_new_when_they_fail() -> None:
    breaker = opened()
    until = breaker._until
    breaker.fail(DOWN, "a:1", 4.9)
    assert breaker._until == until
    assert breaker.admit("a:1", until) is True
    breaker.fail(DOWN, "a:1", until)
    with pytest.raises(UpstreamUnavailable, match="tries it again"):
        breaker.admit("a:1", until)


@pytest.mark.parametrize(("retry_after_s", "pause_s"), [(30, 30), (None, FIRST_PAUSE_S)])
def test_limit_opens_for_as_long_as_it_says(retry_after_s: int | None, pause_s: float) -> None:
    breaker = Breaker("docker.io")
    breaker.fail(TooManyRequests("slow down", retry_after_s), "a:1", 100)
    with pytest.raises(TooManyRequests, match=f"docker.io limits requests .* {pause_s:g} s: slow down") as caught:
        breaker.admit("a:1", 100)
    assert caught.value.retry_after_s == pause_s
    assert breaker.admit("a:1", 100 + pause_s) is True


def test_spread_stretches_the_pause() -> None:
    breaker = Breaker("docker.io")
    breaker.fail(TooManyRequests("slow down", 20), "a:1", 0, spread=1.25)
    assert breaker._until == 25


def test_one_thing_that_always_fails_takes_nothing_else_away() -> None:
    breaker = Breaker("quay.io")
    for _ in range(10):
        breaker.fail(UpstreamFailing("500"), "lib/broken:1", 0)
    assert not breaker.is_open
    for number in range(FAILURES - 1):
        breaker.fail(UpstreamFailing("500"), f"lib/other:{number}", 0)
    assert breaker.is_open


def test_what_is_broken_lets_others_try_first() -> None:
    breaker = Breaker("quay.io")
    for number in range(FAILURES):
        breaker.fail(UpstreamFailing("500"), f"lib/broken:{number}", 0)
    for broken in ("lib/broken:0", "lib/broken:3", "lib/broken:3"):
        now = breaker._until
        if broken in breaker._failed:
            with pytest.raises(UpstreamUnavailable, match="for another 5 s"):
                breaker.admit(broken, now)
            now += FIRST_PAUSE_S
        assert breaker.admit(broken, now) is True  # nobody else came
        breaker.fail(UpstreamFailing("500"), broken, now, trial=True)
    with pytest.raises(UpstreamUnavailable):
        breaker.admit("lib/broken:3", breaker._until)
    assert breaker.admit("lib/tool:1", breaker._until) is True


@pytest.mark.parametrize(
    "err",
    [
        None,
        ManifestUnknown("404"),
        BlobUnknown("404"),
        Denied("403"),
        DigestMismatch("other bytes"),
        UpstreamError("418"),
    ],
    ids=lambda err: type(err).__name__,
)
def test_what_is_about_one_thing_shows_a_registry_that_works(err: WaveError | None) -> None:
    breakers = Breakers()
    for _ in range(3 * FAILURES):
        breakers.settle("quay.io", "a:1", err, 0, trial=False, spread=1)
        breakers.settle("quay.io", "a:1", DOWN, 0, trial=False, spread=1)
    assert not breakers.is_open("quay.io")
    for _ in range(FAILURES):
        breakers.settle("quay.io", "a:1", DOWN, 0, trial=False, spread=1)
    assert breakers.is_open("quay.io")
    assert breakers.admit("quay.io", "a:1", 6) is True
    breakers.settle("quay.io", "a:1", err, 6, trial=True, spread=1)
    assert not breakers.is_open("quay.io")


@pytest.mark.parametrize(
    "err", [asyncio.CancelledError(), Offline("offline"), HostUnknown("typo"), ZeroDivisionError()], ids=repr
)
def test_what_is_no_answer_leaves_the_try_to_another(err: BaseException) -> None:
    breakers = Breakers()
    for _ in range(FAILURES):
        breakers.settle("quay.io", "a:1", DOWN, 0, trial=False, spread=1)
    assert breakers.admit("quay.io", "a:1", 6) is True
    breakers.settle("quay.io", "a:1", err, 6, trial=True, spread=1)
    assert breakers.is_open("quay.io")
    assert breakers.admit("quay.io", "a:1", 6) is True


def test_places_are_apart_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker_module, "_MAX_PLACES", 10)
    breakers = Breakers()
    for number in range(30):
        breakers.settle(f"host{number}", "a:1", TooManyRequests("429", 60), 0, trial=False, spread=1)
    assert breakers.admit("quay.io", "a:1", 0) is False
    assert breakers.is_open("host29")
    assert len(breakers._breakers) == 10


# --- in front of a registry --------------------------------------------------------------------------------------


async def fail(registry: Registry, server: Upstream, times: int = FAILURES) -> None:
    for number in range(times):
        with pytest.raises((UpstreamUnavailable, UpstreamTimeout)):
            await registry.fetch_manifest(server.address, NAME, f"v{number}")


def serving(upstream: Start) -> Upstream:
    server = upstream()
    server.add(NAME, TOOL, "1.0", *(f"v{number}" for number in range(10)))
    return server


@pytest.mark.parametrize("fault", ["down", "500", "silent"])
async def test_registry_that_is_not_well_is_left_alone(
    upstream: Start, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(breaker_module, "FIRST_PAUSE_S", 30.0)
    server = serving(upstream)
    timeout_s = 0.05 if fault == "silent" else PATIENCE_S
    async with registry_at(server, attempts=1, response_timeout_s=timeout_s) as registry:
        if fault == "down":
            await asyncio.to_thread(server.stop)
        elif fault == "500":
            server.faults.status = {"/manifests/": 500}
        else:
            server.faults.only, server.faults.stall_at = "/manifests/", -1
        await fail(registry, server)
        requests = len(server.log)
        server.faults.status, server.faults.stall_at = {}, None
        for ask in (
            lambda: registry.fetch_manifest(server.address, NAME, "1.0"),
            lambda: registry.head_manifest(server.address, NAME, "1.0"),
            lambda: registry.head_blob(server.address, NAME, TOOL.blobs[0].digest),
            lambda: registry.fetch_tags(server.address, NAME, ""),
            lambda: registry.open_blob(server.address, NAME, TOOL.blobs[0].digest).__aenter__(),
        ):
            with pytest.raises(UpstreamUnavailable, match=f"{server.address} has failed") as caught:
                await ask()
            assert caught.value.retry_after_s in range(1, 39)
        assert len(server.log) == requests


async def test_registry_that_is_well_again(upstream: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server, clock = serving(upstream), [monotonic()]
    monkeypatch.setattr("wave_proxy.upstream.registry.monotonic", lambda: clock[0])
    async with registry_at(server, attempts=4) as registry:
        server.faults.status = {"/manifests/": 429}
        with pytest.raises(TooManyRequests, match="failing on command"):
            await registry.fetch_manifest(server.address, NAME, "1.0")
        with pytest.raises(TooManyRequests, match="left alone"):
            await registry.fetch_manifest(server.address, NAME, "1.0")
        clock[0] += 1.3 * FIRST_PAUSE_S
        with pytest.raises(TooManyRequests, match="failing on command"):  # the try, without a second one
            await registry.fetch_manifest(server.address, NAME, "1.0")
        server.faults.status = {}
        clock[0] += 1.3 * 2 * FIRST_PAUSE_S
        assert (await registry.fetch_manifest(server.address, NAME, "1.0")).digest == TOOL.digest
        assert (await registry.fetch_manifest(server.address, NAME, "v1")).digest == TOOL.digest
    assert [request.status for request in server.log] == [429, 429, 200, 200]


async def test_no_retries_while_it_is_left_alone(upstream: Start) -> None:
    server = serving(upstream)
    server.faults.status, server.faults.retry_after = {"/manifests/": 503, "/tags/": 429}, "60"
    async with registry_at(server, attempts=10) as registry:
        asking = asyncio.create_task(registry.fetch_manifest(server.address, NAME, "1.0"))
        await eventually(lambda: server.log)
        with pytest.raises(TooManyRequests):
            await registry.fetch_tags(server.address, NAME, "")
        with pytest.raises((TooManyRequests, UpstreamUnavailable)):
            await asking
    assert len([request for request in server.log if "/manifests/" in request.path]) <= 2


async def stalled_try(server: Upstream, registry: Registry) -> "asyncio.Task[FetchedManifest]":
    """The breaker was opened, and its pause (of 0.01 s) is over: one request tries, and gets no answer."""
    server.faults.status = {"/manifests/": 429}
    with pytest.raises(TooManyRequests):
        await registry.fetch_manifest(server.address, NAME, "1.0")
    server.faults.status, server.faults.only, server.faults.stall_at = {}, "/manifests/", -1
    await asyncio.sleep(0.02)
    trying = asyncio.create_task(registry.fetch_manifest(server.address, NAME, "1.0"))
    await eventually(lambda: registry._breakers._breakers[server.address]._trying)
    return trying


async def test_nobody_waits_for_the_connection_of_the_one_that_tries(
    upstream: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker_module, "FIRST_PAUSE_S", 0.01)
    server = serving(upstream)
    async with registry_at(server, attempts=1, response_timeout_s=3600.0) as registry:
        registry._limits = Limits(default=Limit(connections=1))
        trying = await stalled_try(server, registry)
        async with patience():
            for ask in (
                lambda: registry.fetch_manifest(server.address, NAME, "1.0"),
                lambda: registry.head_manifest(server.address, NAME, "1.0"),
                lambda: registry.fetch_tags(server.address, NAME, ""),
            ):
                with pytest.raises(TooManyRequests, match="while one request tries"):
                    await ask()
        assert not trying.done()
        trying.cancel()
        await asyncio.gather(trying, return_exceptions=True)


async def test_missing_and_denied_things_leave_it_closed(upstream: Start) -> None:
    server = serving(upstream)
    server.faults.status = {"/manifests/secret": 403}
    async with registry_at(server) as registry:
        for number in range(2 * FAILURES):
            with pytest.raises(ManifestUnknown):
                await registry.fetch_manifest(server.address, NAME, f"none{number}")
            with pytest.raises(Denied):
                await registry.fetch_manifest(server.address, NAME, "secret")
            with pytest.raises(BlobUnknown):
                await registry.head_blob(server.address, NAME, digest_of(f"{number}".encode()))
        assert (await registry.fetch_manifest(server.address, NAME, "1.0")).digest == TOOL.digest


async def test_cancelled_try_is_for_another(upstream: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker_module, "FIRST_PAUSE_S", 0.01)
    server = serving(upstream)
    async with registry_at(server, attempts=1) as registry:
        trying = await stalled_try(server, registry)
        with pytest.raises(TooManyRequests, match="while one request tries"):
            await registry.fetch_manifest(server.address, NAME, "1.0")
        trying.cancel()
        await asyncio.gather(trying, return_exceptions=True)
        server.faults.stall_at = None
        assert (await registry.fetch_manifest(server.address, NAME, "1.0")).digest == TOOL.digest


async def test_linked_layers_have_breakers_of_their_hosts() -> None:
    async def busy(_: str) -> bytes:
        return b"HTTP/1.1 429 Busy\r\nContent-Length: 0\r\nRetry-After: 30\r\n\r\n"

    async with scripted(busy) as told, egress_to(f"127.0.0.1:{told.port}") as egress:
        registry = Registry(egress, Credentials({}))
        for path in ("a", "b"):
            with pytest.raises(TooManyRequests):
                async with registry.open_url(f"http://127.0.0.1:{told.port}/{path}"):
                    pass
        assert len(told.heads) == 1
        with pytest.raises(TooManyRequests, match="limits requests, 127"):  # the registry there was not asked yet
            await registry.head_manifest(f"127.0.0.1:{told.port}", NAME, "1.0")
        assert len(told.heads) == 2


async def test_offline_opens_no_connection(upstream: Start) -> None:
    server = serving(upstream)
    egress = Egress({}, offline=True)
    registry = Registry(egress, Credentials({}), attempts=10)
    for ask in (
        lambda: registry.fetch_manifest(server.address, NAME, "1.0"),
        lambda: registry.head_blob("docker.io", NAME, TOOL.blobs[0].digest),
        lambda: registry.open_url(f"{server.url}/layer").__aenter__(),
    ):
        with pytest.raises(Offline, match=r"this proxy is offline \(\[upstream\] offline = true\)") as caught:
            await ask()
        assert caught.value.retry_after_s is None
    assert server.log == []
    assert egress._sessions == {}
    await egress.close()

"""Users and logins of Platforms: what is asked, what is remembered, and what happens while a Platform is away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import time
from typing import Any

import pytest

from api.identities import Claims
from api.platform import remembered
from api.platform.platforms import Platforms, choose
from api.platform.remembered import Remembered
from api.registries import Registries
from tests.patience import PATIENCE_S, eventually, patience
from tests.platform.world import World
from wave_proxy.errors import PlatformError, RequestInvalid, Unauthorized, UpstreamError
from wave_proxy.image.platform import CredentialsEntry, PlatformCall, PlatformReply, TokenPair
from wave_proxy.image.reference import parse_reference
from wave_proxy.image.request import Identity
from wave_proxy.state.answers import Answers
from wave_proxy.state.jwts import TokenPairs
from wave_proxy.state.pairing import Pairings
from wave_proxy.state.redis import Redis, connect
from wave_proxy.upstream.aws import Ecr
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.egress import Egress
from wave_proxy.upstream.platform import PlatformClient
from wave_proxy.upstream.registry import Registry

ENDPOINT = "https://platform.example/api"
ANA = {"id": 7, "userName": "ana", "email": "ana@lab.org"}
CLAIMS = Claims("tok-1", "", ENDPOINT)


@dataclass
class Wire:
    """The transport: gives calls to a world, unless it is cut; ``slow_s`` is what a call takes."""

    world: World
    cut: bool = False
    late: bool = False
    slow_s: float = 0.0
    tried: int = 0
    uris: list[str] = field(default_factory=list)

    async def call(self, endpoint: str, call: PlatformCall) -> PlatformReply:
        self.tried += 1
        await asyncio.sleep(self.slow_s)
        if self.cut:
            raise ConnectionError("no way there")
        if self.late:
            raise TimeoutError
        self.uris.append(call.uri)
        status, headers, body = self.world.answer(call.method, call.uri, call.authorization, call.body)
        return PlatformReply(status, body, {name: tuple(values) for name, values in headers.items()})


@dataclass
class Stage:
    """One process with a Platform that is paired."""

    platforms: Platforms
    wire: Wire
    world: World
    redis: Redis
    pairs: TokenPairs

    async def make_stale(self) -> None:
        """Have all that is remembered be old."""
        for key in await self.redis.keys("wave:answer:*"):
            content: Any = await self.redis.get(key)
            await self.redis.set(key, b"[0.0," + content.partition(b",")[2])

    async def login(self, registry: str, repository: str = "a/b", **claims: Any) -> Login | None:
        identity = await self.platforms.identify(Claims("tok-1", "", ENDPOINT, **claims), "")
        return await self.platforms.find_login(identity, registry, repository)


@asynccontextmanager
async def stage(url: str, *, patience_s: float = 0.0, endpoints: tuple[str, ...] = (ENDPOINT,)) -> AsyncIterator[Stage]:
    redis, egress = connect(url), Egress({})
    world = World("/api", users={"tok-1": ANA})
    wire, pairs, pairings = Wire(world), TokenPairs(redis), Pairings(redis)
    answers = Remembered(Answers(redis, 3600.0), patience_s)
    record = await pairings.obtain("tower", ENDPOINT, time())
    world.public_keys[record.pairing_id] = record.public_key
    platforms = Platforms(
        endpoints, pairings, PlatformClient(wire, pairs, endpoints), pairs, answers, Ecr(egress), own=["wave.example"]
    )
    try:
        yield Stage(platforms, wire, world, redis, pairs)
    finally:
        await answers.close()
        await egress.close()
        await redis.aclose()


def registry_entry(name: str, registry: str | None, workspace: int | None = None, **more: Any) -> dict[str, Any]:
    secret = {"discriminator": "container-reg", "userName": f"u-{name}", "password": f"p-{name}", "registry": registry}
    shown = {"id": name, "user": 7, "workspace": workspace, "provider": "container-reg", "registry": registry}
    return {name: shown | {"secret": secret} | more}


# --- who asks ----------------------------------------------------------------------------------------------------


async def test_a_user_is_asked_for_once_and_keeps_his_workspace_and_run(redis_url: str) -> None:
    async with stage(redis_url) as place:
        claims = Claims("tok-1", "", f"{ENDPOINT}/", 12, "run-1")
        place.wire.slow_s = 0.05
        found = await asyncio.gather(*(place.platforms.identify(claims, "") for _ in range(50)))
        assert set(found) == {Identity(7, "ana@lab.org", 12, "tok-1", "", ENDPOINT, "run-1")}
        assert place.world.seen == ["tok-1 GET /user-info"]
        assert "tok-1" not in repr(found[0])


async def test_without_a_pairing_the_endpoint_is_named(redis_url: str) -> None:
    async with stage(redis_url) as place:
        with pytest.raises(RequestInvalid) as refused:
            await place.platforms.identify(Claims("tok-1", "", "https://other.example"), "")
        assert str(refused.value) == "Missing pairing record for Tower endpoint 'https://other.example'"


async def test_a_platform_that_may_pair_no_more_is_not_asked(redis_url: str) -> None:
    async with stage(redis_url, endpoints=("https://new.example",)) as place:
        with pytest.raises(RequestInvalid, match="Missing pairing record"):
            await place.platforms.identify(CLAIMS, "")
        assert place.wire.tried == 0


async def test_who_the_platform_does_not_know_is_refused_and_not_remembered(redis_url: str) -> None:
    async with stage(redis_url) as place:
        for _ in range(2):
            with pytest.raises(Unauthorized):
                await place.platforms.identify(Claims("tok-2", "", ENDPOINT), "")
        place.world.users["tok-2"] = ANA
        assert (await place.platforms.identify(Claims("tok-2", "", ENDPOINT), "")).user_id == 7
        place.world.users["tok-3"] = {"email": "no-id@lab.org"}
        with pytest.raises(Unauthorized):
            await place.platforms.identify(Claims("tok-3", "", ENDPOINT), "")


FAILURES = {
    "not-found": ({"status": 404}, 404, "Tower resource not found: https://platform.example/api/user-info", "-"),
    "teapot": (
        {"status": 418},
        418,
        "Unexpected status code 418 while accessing Tower resource: https://platform.example/api/user-info",
        "-",
    ),
    "no-status": (
        {"status": 9999},
        502,
        "Unexpected status code 9999 while accessing Tower resource: https://platform.example/api/user-info",
        "-",
    ),
    "cut": (
        {"cut": True},
        503,
        "Unexpected I/O error while accessing Tower resource: https://platform.example/api/user-info "
        "- cause: no way there",
        "-",
    ),
    "late": ({"late": True}, 408, "Timeout error connecting to 'https://platform.example/api'", "-"),
}


@pytest.mark.parametrize(("switches", "status", "text", "body"), FAILURES.values(), ids=FAILURES)
async def test_failures_are_told_in_the_services_words(
    switches: dict[str, Any], status: int, text: str, body: str, redis_url: str
) -> None:
    async with stage(redis_url) as place:
        for name, value in switches.items():
            setattr(place.world if name == "status" else place.wire, name, value)
        with pytest.raises(PlatformError) as failed:
            await place.platforms.identify(CLAIMS, "")
        assert failed.value.status == status
        assert str(failed.value) == f"{text} - HTTP status={status} - response={body}"


async def test_only_what_got_no_answer_is_asked_again(redis_url: str) -> None:
    async with stage(redis_url, patience_s=PATIENCE_S) as place:
        place.world.status = 500
        with pytest.raises(PlatformError):
            await place.platforms.identify(CLAIMS, "")
        assert place.wire.tried == 1
        place.world.status, place.wire.cut = 0, True
        asked = asyncio.create_task(place.platforms.identify(CLAIMS, ""))
        await eventually(lambda: place.wire.tried >= 3)
        place.wire.cut = False
        assert (await asked).user_id == 7


# --- tokens that expire ------------------------------------------------------------------------------------------


async def test_an_expired_token_is_refreshed_once_for_all_who_come_with_it(redis_url: str) -> None:
    async with stage(redis_url) as place, stage(redis_url) as other:
        place.world.users = other.world.users = {"jwt-2": ANA}
        place.world.refresh = other.world.refresh = {"ref-1": ["jwt-2", "ref-2"]}
        place.wire.slow_s = other.wire.slow_s = 0.02
        claims = Claims("jwt-1", "ref-1", ENDPOINT)
        both = [one.platforms.identify(claims, "") for one in (place, other) for _ in range(20)]
        assert {found.user_id for found in await asyncio.gather(*both)} == {7}
        seen = place.world.seen + other.world.seen
        assert len([line for line in seen if "oauth" in line]) == 1
        # Its new form is used from then on, whatever the client still says.
        assert await place.platforms.find_login(await place.platforms.identify(claims, ""), "quay.io", "a") is None
        assert place.world.seen[-1] == "jwt-2 GET /credentials"


async def test_the_old_refresh_token_goes_on_when_no_new_one_comes(redis_url: str) -> None:
    async with stage(redis_url) as place:
        place.world.users, place.world.refresh = {"jwt-2": ANA}, {"ref-1": ["jwt-2"]}
        await place.platforms.identify(Claims("jwt-1", "ref-1", ENDPOINT), "")
        pair = await place.pairs.find(ENDPOINT, "jwt-1")
        assert pair is not None
        assert (pair.access, pair.refresh) == ("jwt-2", "ref-1")


@pytest.mark.parametrize(
    ("refresh", "status", "text"),
    [
        ({}, 400, "Unexpected Tower response refreshing JWT token: https://platform.example/api/oauth/access_token"),
        ({"ref-1": [""]}, 412, "Missing JWT token in Tower client response"),
        ({"ref-1": ["jwt-9"]}, None, ""),
    ],
    ids=["refused", "no-cookie", "new-one-is-no-good"],
)
async def test_a_refresh_that_fails_is_not_repeated(
    refresh: dict[str, list[str]], status: int | None, text: str, redis_url: str
) -> None:
    async with stage(redis_url) as place:
        place.world.users, place.world.refresh = {}, refresh
        with pytest.raises(PlatformError if status else Unauthorized) as failed:
            await place.platforms.identify(Claims("jwt-1", "ref-1", ENDPOINT), "")
        if status:
            assert str(failed.value) == f"{text} - HTTP status={status} - response=-"
        assert len([line for line in place.world.seen if "oauth" in line]) == 1


async def test_the_headers_token_helps_when_the_bodys_has_expired(redis_url: str) -> None:
    async with stage(redis_url) as place:
        place.world.users = {"jwt-2": ANA}
        identity = await place.platforms.identify(Claims("jwt-1", "", ENDPOINT), "jwt-2")
        assert (identity.user_id, identity.access_token) == (7, "jwt-1")
        assert await place.platforms.find_login(identity, "quay.io", "a") is None
        assert place.world.seen[-1] == "jwt-2 GET /credentials"


async def test_pairs_are_due_every_hour_for_a_day_and_a_half(redis_url: str) -> None:
    redis = connect(redis_url)
    pairs, now = TokenPairs(redis), time()
    await pairs.put_if_absent(ENDPOINT, "jwt-1", TokenPair("jwt-1", "ref-1"))
    await pairs.put_if_absent(ENDPOINT, "jwt-1", TokenPair("jwt-0", "ref-0"))
    assert await pairs.claim_due(now, 10) == []
    for hours in (1.1, 2.2, 35.0):
        due = await pairs.claim_due(now + hours * 3600, 10)
        assert [(kept.token, kept.pair.access) for kept in due] == [("jwt-1", "jwt-1")]
        assert await pairs.claim_due(now + hours * 3600, 10) == []
    assert await pairs.claim_due(now + 37 * 3600, 10) == []
    assert await redis.zcard("wave:jwts") == 0
    await redis.aclose()


# --- logins ------------------------------------------------------------------------------------------------------


async def test_a_login_is_decrypted_and_asked_for_once_a_minute(redis_url: str) -> None:
    async with stage(redis_url) as place:
        place.world.credentials = registry_entry("c1", "quay.io", 12)
        assert await place.login("quay.io", workspace_id=12) == Login("u-c1", "p-c1")
        assert await place.login("quay.io", workspace_id=12) == Login("u-c1", "p-c1")
        pairing_id = next(iter(place.world.public_keys))
        assert place.wire.uris == [
            f"{ENDPOINT}/user-info",
            f"{ENDPOINT}/credentials?workspaceId=12",
            f"{ENDPOINT}/credentials/c1/keys?pairingId={pairing_id}&workspaceId=12",
        ]
        assert await place.login("quay.io") is None
        assert await place.login("docker.io", workspace_id=12) is None
        assert await place.login("wave.example", workspace_id=12) is None


CHOICES = {
    "host": (["quay.io"], "quay.io", "a/b", "quay.io"),
    "another-host": (["quay.io"], "ghcr.io", "a/b", None),
    "none-is-docker-hub": ([""], "docker.io", "a/b", ""),
    "docker-hub-by-its-index": (["https://index.docker.io/v1/"], "docker.io", "a/b", "https://index.docker.io/v1/"),
    "first-of-equals": (["quay.io", "https://quay.io/"], "quay.io", "a/b", "quay.io"),
    "longest-path": (["quay.io", "quay.io/a", "quay.io/a/b"], "quay.io", "a/b", "quay.io/a/b"),
    "path-of-another": (["quay.io/a/c", "quay.io/ab"], "quay.io", "a/b", None),
    "path-is-whole-segments": (["quay.io/a", "quay.io/a/b"], "quay.io", "a/bc", "quay.io/a"),
    "port": (["localhost:5000"], "localhost:5000", "a", "localhost:5000"),
    "case": (["Quay.IO"], "quay.io", "a", "Quay.IO"),
}


@pytest.mark.parametrize(("places", "registry", "repository", "chosen"), CHOICES.values(), ids=CHOICES)
def test_the_entry_for_a_repository(places: list[str], registry: str, repository: str, chosen: str | None) -> None:
    entries = [CredentialsEntry(place, "container-reg", place) for place in places]
    entries.insert(0, CredentialsEntry("other", "aws", registry))
    found = choose(entries, registry, repository)
    assert (found.name if found else None) == chosen


async def test_a_runs_batch_environment_opens_ecr_and_nothing_else(redis_url: str) -> None:
    async with stage(redis_url) as place:
        entry = registry_entry("aws-1", None, provider="aws")
        entry["aws-1"]["secret"] = {"discriminator": "container-reg", "userName": "AWS", "password": "pw"}
        place.world.credentials = entry
        place.world.workflows = {
            "run-1": {"status": "RUNNING", "computeEnv": {"platform": "aws-batch", "credentialsId": "aws-1"}},
            "run-2": {"status": "RUNNING", "computeEnv": {"platform": "k8s", "credentialsId": "aws-1"}},
        }
        registry = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
        assert await place.login(registry, workflow_id="run-1") == Login("AWS", "pw")
        assert await place.login(registry, workflow_id="run-2") is None
        assert await place.login(registry) is None
        assert await place.login("quay.io", workflow_id="run-1") is None


async def test_credentials_that_can_not_be_read_are_an_error(redis_url: str) -> None:
    async with stage(redis_url) as place:
        place.world.credentials = registry_entry("c1", "quay.io", secret={"discriminator": "ssh"})
        with pytest.raises(UpstreamError, match="'ssh' are no login"):
            await place.login("quay.io")


async def test_a_users_own_login_goes_before_the_configured_one_and_jobs_get_his_alone(redis_url: str) -> None:
    async with stage(redis_url) as place:
        place.world.credentials = registry_entry("c1", "quay.io") | registry_entry("c2", "ghcr.io/lab")
        egress = Egress({})
        registry, ours = Registry(egress, Credentials({})), Login("site", "s")
        configured = Credentials({"quay.io": ours, "docker.io": ours}, {"docker.io": ["*"]})
        registries = Registries(registry, configured, "wave.example/local", place.platforms)
        ana, nobody = await place.platforms.identify(CLAIMS, ""), Identity()
        assert await registries.find_login(ana, "quay.io", "a") == Login("u-c1", "p-c1")
        assert await registries.find_login(nobody, "quay.io", "a") == ours
        # What is configured for known users is for those whom this server itself knows.
        assert await registries.find_login(ana, "docker.io", "a") is None
        images = [
            parse_reference(name) for name in ("quay.io/a", "ghcr.io/lab/b", "docker.io/c", "wave.example/local/d")
        ]
        assert await registries.logins_for(ana, *images) == (("quay.io", "u-c1", "p-c1"), ("ghcr.io", "u-c2", "p-c2"))
        assert await registries.logins_for(nobody, *images) == ()
        await registry.close()
        await egress.close()


# --- a Platform that is away -------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [{"cut": True}, {"late": True}, {"status": 502}], ids=["cut", "late", "502"])
async def test_what_is_known_is_used_on_while_the_platform_does_not_answer(
    switches: dict[str, Any], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(redis_url, patience_s=3600.0) as place:
        place.world.credentials = registry_entry("c1", "quay.io") | registry_entry("c2", "ghcr.io")
        known = await place.login("quay.io")
        await place.make_stale()
        before = place.wire.tried
        for name, value in switches.items():
            setattr(place.world if name == "status" else place.wire, name, value)
        async with patience():
            assert [await place.login("quay.io") for _ in range(20)] == [known] * 20
        assert place.wire.tried - before <= 2, "it is left alone for a while"
        monkeypatch.setattr(remembered, "_REST_S", 0.0)
        place.wire.cut = place.wire.late = False
        place.world.status = 0
        place.platforms._remembered._resting.clear()
        place.world.credentials["c1"]["secret"]["password"] = "new"
        await place.make_stale()
        assert await place.login("quay.io") == Login("u-c1", "new")


async def test_what_the_platform_refuses_is_not_used_on(redis_url: str) -> None:
    async with stage(redis_url) as place:
        place.world.credentials = registry_entry("c1", "quay.io")
        assert await place.login("quay.io")
        await place.make_stale()
        place.world.users = {}
        with pytest.raises(Unauthorized):
            await place.login("quay.io")
        place.wire.cut = True
        with pytest.raises(PlatformError):
            await place.login("quay.io")

"""Builds of private images: only for who may read those, and where nobody else can pull what comes out."""

import asyncio
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from time import time
from typing import Any

import pytest

from bench.images import image, layer
from bench.upstream import Upstream
from tests.api_server import AUTHORITY, ApiServer
from tests.identified import issue
from tests.servers import Response, WaveProxy, pull, push
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Identity, Layer
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import connect
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.credentials import Login

USER, PASSWORD = "user", "secret"
ALICE, MALLORY = "alice@acme.org", "mallory@else.org"
SECRET = layer({"secret.txt": "the eagle flies at midnight"})
BASE = image([SECRET], env=("API_KEY=hunter2",))
LAYER = layer({"bin/tool": "x"})
TOOL = image([LAYER], env=("PATH=/bin",))


@dataclass
class Site:
    """The api of a site with a private registry, and the access tokens of two of its users."""

    api: ApiServer
    vault: str
    redis_url: str
    tokens: dict[str, str]

    def build(self, user: str, file: str, **attributes: Any) -> Response:
        """The answer to a request for a build by that user, or by nobody."""
        asked: dict[str, Any] = {"containerFile": b64encode(file.encode()).decode(), **attributes}
        if user:
            asked["towerAccessToken"] = self.tokens[user]
        return self.api.post(**asked)

    def target(self, user: str, file: str, **attributes: Any) -> str:
        """Where the image of such a build is pushed."""
        answer = self.build(user, file, **attributes)
        assert answer.status == 200, answer.body
        return asyncio.run(self._image_of(str(answer.json()["containerToken"])))

    async def _image_of(self, token: str) -> str:
        redis = connect(self.redis_url)
        try:
            record = await TokenStore(redis).find_record(token)
        finally:
            await redis.aclose()
        assert record is not None
        return record.request.image


@pytest.fixture
def site(upstream: Callable[..., Upstream], redis_url: str) -> Iterator[Site]:
    vault, own = upstream(auth="basic", username=USER, password=PASSWORD), upstream()
    vault.add("acme/base", BASE, "1")
    vault.add("acme/open", TOOL, "1")
    login = Login(USER, PASSWORD)
    with ApiServer(
        redis_url,
        upstreams=[vault.address],
        logins={f"{vault.address}/acme/base": login, f"{vault.address}/acme/open": login},
        users={f"{vault.address}/acme/base": ["*@acme.org"]},
        build_repository=f"{AUTHORITY}/local/build",
        own_url=own.url,
    ) as api:
        yield Site(api, vault.address, redis_url, {user: issue(redis_url, user) for user in (ALICE, MALLORY)})


def key_of(user: str) -> str:
    return Identity(email=user).key


def test_a_private_base_image_makes_a_private_image(site: Site) -> None:
    file = f"FROM {site.vault}/acme/base:1\n"
    name = site.target(ALICE, file)
    assert name.startswith(f"{AUTHORITY}/local/private/{key_of(ALICE)}/build:")
    assert site.target(ALICE, file) == name  # joined


def test_who_may_not_read_the_base_image_gets_no_build(site: Site) -> None:
    file = f"FROM {site.vault}/acme/base:1\n"
    site.target(ALICE, file, buildRepository=f"{site.vault}/acme/open")
    for user in (MALLORY, ""):
        for more in ({}, {"buildRepository": f"{site.vault}/acme/open"}, {"dryRun": True}):
            answer = site.build(user, file, **more)
            assert answer.status == 400, answer.body
            assert "does not exist or access is not authorized" in answer.json()["message"]


@pytest.mark.parametrize(
    "file",
    [
        "FROM {vault}/acme/open:1\nCOPY --from={vault}/acme/base:1 / /x\n",
        "FROM {vault}/acme/open:1\nRUN --mount=from={vault}/acme/base:1,target=/x true\n",
        "ARG BASE={vault}/acme/base\nFROM ${{BASE}}:1\n",
        "FROM {vault}/acme/open:1 AS one\nFROM {vault}/acme/base@{digest}\n",
    ],
)
def test_wherever_the_base_image_is_named(site: Site, file: str) -> None:
    text = file.format(vault=site.vault, digest=BASE.digest)
    assert f"/local/private/{key_of(ALICE)}/" in site.target(ALICE, text)
    assert site.build(MALLORY, text).status == 400


def test_public_base_images_make_images_for_everybody(site: Site) -> None:
    file = f"FROM {site.vault}/acme/open:1\n"  # with a login that is everybody's
    names = {site.target(user, file) for user in (ALICE, MALLORY, "")}
    assert len(names) == 1
    assert names.pop().startswith(f"{AUTHORITY}/local/build:")


def test_a_private_image_of_ones_own_as_a_base(site: Site) -> None:
    own = f"{AUTHORITY}/local/private/{key_of(ALICE)}/build:x"
    answer = site.build(MALLORY, f"FROM {own}\n")
    assert (answer.status, "not authorized" in answer.json()["message"]) == (400, True)


def test_a_token_of_another_user_as_a_base(site: Site) -> None:
    async def recorded() -> str:
        redis, now = connect(site.redis_url), time()
        try:
            request = ContainerRequest(
                f"{site.vault}/acme/base:1", identity=Identity(1, ALICE), created=now, expires=now + 600
            )
            return await TokenStore(redis).put(request)
        finally:
            await redis.aclose()

    file = f"FROM {AUTHORITY}/wt/{asyncio.run(recorded())}/acme/base:1\n"
    assert site.build(MALLORY, file).status == 400
    assert f"/local/private/{key_of(ALICE)}/" in site.target(ALICE, file)


def test_layers_of_a_private_image_in_a_frozen_one(site: Site) -> None:
    where = f"docker://{site.vault}/v2/acme/base/blobs/{SECRET.digest}"
    added = {
        "location": where,
        "gzipDigest": SECRET.digest,
        "gzipSize": SECRET.size,
        "tarDigest": SECRET.diff_id,
    }
    asked: dict[str, Any] = {
        "containerImage": f"{site.vault}/acme/open:1",
        "freeze": True,
        "containerConfig": {"layers": [added]},
    }
    public, own = f"{AUTHORITY}/local/build", f"{AUTHORITY}/local/private/{key_of(ALICE)}/build"
    for repository, user, status in ((public, ALICE, 400), (own, ALICE, 200), (public, MALLORY, 400)):
        answer = site.api.post(**asked, buildRepository=repository, towerAccessToken=site.tokens[user])
        assert answer.status == status, answer.body


def test_a_build_context_out_of_a_private_image(site: Site) -> None:
    context = {
        "location": f"docker://{site.vault}/v2/acme/base/blobs/{SECRET.digest}",
        "gzipDigest": SECRET.digest,
        "gzipSize": SECRET.size,
        "tarDigest": SECRET.diff_id,
    }
    file = f"FROM {site.vault}/acme/open:1\nCOPY . /\n"
    assert f"/local/private/{key_of(ALICE)}/" in site.target(ALICE, file, buildContext=context)
    for user in (MALLORY, ""):
        answer = site.build(user, file, buildContext=context)
        assert (answer.status, "not authorized" in answer.json()["message"]) == (400, True)


def test_nobody_builds_into_what_is_anothers(site: Site) -> None:
    theirs = f"{AUTHORITY}/local/private/{key_of(ALICE)}/build"
    answer = site.build(MALLORY, f"FROM {site.vault}/acme/open:1\n", buildRepository=theirs)
    assert answer.status == 400
    assert "private images of another user" in answer.json()["message"]


def test_layers_of_private_builds_are_kept_for_nobody(site: Site) -> None:
    async def cache_of(build_id: str) -> str:
        redis = connect(site.redis_url)
        try:
            record = await BuildStore(redis, BuildLimits(1)).find(build_id)
        finally:
            await redis.aclose()
        assert record is not None
        return record.spec.cache_repository

    for base, kept in (("base", ""), ("open", f"{AUTHORITY}/local/cache/x")):
        file = f"FROM {site.vault}/acme/{base}:1\n"
        answer = site.build(ALICE, file, cacheRepository=f"{AUTHORITY}/local/cache/x")
        assert answer.status == 200, answer.body
        assert asyncio.run(cache_of(answer.json()["buildId"])) == kept


# --- pulling what was built ------------------------------------------------------------------------------------------


def test_private_local_repositories(wave: Callable[..., WaveProxy], redis_url: str) -> None:
    proxy = wave(config=f'[accounts]\nadmin = "sha256:{sha256(b"pass").hexdigest()}"\n', redis=redis_url, workers=2)
    account = {"Authorization": f"Basic {b64encode(b'admin:pass').decode()}"}
    name = f"local/private/{key_of(ALICE)}/build"
    push(proxy.address, name, TOOL, "1", headers=account)
    authority = f"localhost:{proxy.port}"

    def token(identity: Identity, image: str, config: ContainerConfig | None = None) -> str:
        async def put() -> str:
            redis, now = connect(redis_url), time()
            try:
                request = ContainerRequest(
                    image, config or ContainerConfig(), identity=identity, created=now, expires=now + 600
                )
                return await TokenStore(redis).put(request)
            finally:
                await redis.aclose()

        return f"wt/{asyncio.run(put())}"

    image_name = f"{authority}/{name}:1"
    alice, mallory, nobody = Identity(1, ALICE), Identity(2, MALLORY), Identity()
    changes = ContainerConfig(env=("A=1",))
    for config in (None, changes):
        for _ in range(3):
            pulled = pull(proxy.address, f"{token(alice, image_name, config)}/{name}", "1")
            assert pulled.layers == (LAYER.content,)
    blobs = [f"blobs/{blob.digest}" for blob in TOOL.blobs]
    paths = ["manifests/1", f"manifests/{TOOL.digest}", "tags/list", *blobs, f"referrers/{TOOL.digest}"]
    layers = (Layer(f"docker://{authority}/v2/{name}/blobs/{LAYER.digest}", LAYER.digest, 1, ""),)
    prefixes = [f"{token(who, image_name, config)}/{name}" for who in (mallory, nobody) for config in (None, changes)]
    prefixes += [name, f"{authority}/{name}"]
    for prefix in prefixes:
        for path in paths:
            for method in ("GET", "HEAD"):
                answer = proxy.request(method, f"/v2/{prefix}/{path}")
                assert answer.status in (400, 401, 403, 404), (prefix, path, answer)
    borrowed = token(mallory, f"{authority}/local/x:1", ContainerConfig(layers=layers))
    answer = proxy.request("GET", f"/v2/{borrowed}/local/x/blobs/{LAYER.digest}")
    assert answer.status == 403
    for path in paths:  # an account may, and what it was given is given to nobody else
        for _ in range(3):
            assert proxy.request("GET", f"/v2/{name}/{path}", headers=account).status == 200
            assert proxy.request("GET", f"/v2/{name}/{path}").status == 401

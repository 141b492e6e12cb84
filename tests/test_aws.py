"""Logins for Amazon's registries: the signature by AWS's own vector, the exchange with a stand-in on loopback."""

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from bench.images import image, layer
from bench.upstream import Upstream
from wave_proxy.errors import Denied, RequestInvalid, UpstreamError
from wave_proxy.upstream.aws import AwsKeys, Ecr, EcrLogins, is_ecr, signature
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.egress import Egress, endpoint_for
from wave_proxy.upstream.registry import Registry

NOW = 1_440_938_160.0  # 2015-08-30T12:36:00Z
REGISTRY = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
ROLE = "arn:aws:iam::123456789012:role/pull"


def test_the_signature_is_that_of_the_vector() -> None:
    keys = AwsKeys("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
    assert signature("https://example.amazonaws.com/", {}, b"", keys, "service", "us-east-1", NOW) == {
        "X-Amz-Date": "20150830T123600Z",
        "Authorization": "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, "
        "SignedHeaders=host;x-amz-date, Signature=5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
    }


@dataclass
class Amazon:
    """ECR and STS: takes one access key, gives one token, and role keys for one role."""

    url: str = ""
    status: int = 200
    body: str = ""
    seen: list[tuple[str, str, str]] = field(default_factory=list)  # host, access key with scope, body

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.text()
        scope = request.headers["Authorization"].partition("Credential=")[2].partition(", ")[0]
        self.seen.append((request.headers["Host"], scope, body))
        if self.status != 200 or self.body:
            return web.Response(status=self.status, text=self.body)
        if request.headers["Host"].startswith("sts."):
            return web.Response(
                text="<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>ASIA1</AccessKeyId>"
                "<SecretAccessKey>s2</SecretAccessKey><SessionToken>t3</SessionToken>"
                "<Expiration>2015-08-30T13:36:00Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"
            )
        token = b64encode(b"AWS:pw-" + scope.partition("/")[0].encode()).decode()
        found: object = {"authorizationToken": token}
        if "Spencer" not in request.headers["X-Amz-Target"]:
            found = [found]
        return web.Response(text=json.dumps({"authorizationData": found}))


@asynccontextmanager
async def amazon(own: AwsKeys | None = None) -> AsyncIterator[tuple[Amazon, Ecr]]:
    stand_in, app, egress = Amazon(), web.Application(), Egress({})
    app.router.add_route("*", "/{path:.*}", stand_in.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    stand_in.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield stand_in, Ecr(egress, url=stand_in.url, own=own)
    finally:
        await egress.close()
        await runner.cleanup()


@pytest.mark.parametrize(
    ("registry", "host", "scope"),
    [
        (REGISTRY, "api.ecr.eu-west-1.amazonaws.com", "AKIA7/20150830/eu-west-1/ecr/aws4_request"),
        (
            "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn",
            "api.ecr.cn-north-1.amazonaws.com.cn",
            "AKIA7/20150830/cn-north-1/ecr/aws4_request",
        ),
        (
            "public.ecr.aws",
            "api.ecr-public.us-east-1.amazonaws.com",
            "AKIA7/20150830/us-east-1/ecr-public/aws4_request",
        ),
    ],
    ids=["private", "china", "public"],
)
async def test_an_access_key_is_exchanged_in_the_registrys_region(registry: str, host: str, scope: str) -> None:
    async with amazon() as (there, ecr):
        found = await ecr.login(registry, "AKIA7", "secret", NOW)
        assert (found.login, found.lasts_s) == (Login("AWS", "pw-AKIA7"), 3 * 3600)
        assert there.seen == [(host, scope, "{}")]


async def test_a_role_is_taken_on_with_our_own_keys_first() -> None:
    async with amazon(AwsKeys("AKIAOWN", "s")) as (there, ecr):
        found = await ecr.login(REGISTRY, ROLE, "ext", NOW)
        assert found.login == Login("AWS", "pw-ASIA1")
        assert found.lasts_s == 55 * 60
        (sts, by, body), (_, then, _) = there.seen
        assert sts == "sts.eu-west-1.amazonaws.com"
        assert by.startswith("AKIAOWN/")
        assert "Action=AssumeRole" in body
        assert "ExternalId=ext" in body
        assert then.startswith("ASIA1/")


async def test_without_keys_of_our_own_no_role_is_taken_on() -> None:
    async with amazon() as (there, ecr):
        with pytest.raises(RequestInvalid, match="takes on no AWS roles"):
            await ecr.login(REGISTRY, ROLE, "", NOW)
        assert there.seen == []


async def test_refused_keys_and_odd_answers_are_told_without_the_secret() -> None:
    async with amazon() as (there, ecr):
        there.status = 400
        with pytest.raises(Denied, match="Unable to acquire AWS ECR authorization token") as refused:
            await ecr.login(REGISTRY, "AKIA7", "secret-1", NOW)
        assert "secret-1" not in str(refused.value)
        there.status, there.body = 200, "{}"
        with pytest.raises(UpstreamError, match="Unable to acquire"):
            await ecr.login(REGISTRY, "AKIA7", "secret-1", NOW)


@pytest.mark.parametrize(
    ("registry", "is_one"),
    [
        (REGISTRY, True),
        ("public.ecr.aws", True),
        ("quay.io", False),
        (f"{REGISTRY}.evil.com", False),
        ("ecr.aws", False),
    ],
)
def test_amazons_registries_are_known_by_name(registry: str, is_one: bool) -> None:
    assert is_ecr(registry) is is_one


@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_configured_keys_open_their_registry_and_are_exchanged_once(auth: Any) -> None:
    with Upstream(auth=auth, username="AWS", password="pw-AKIA7") as private:
        private.add("lab/app", image([layer({"a": "b"})]), "v1")
        egress = Egress({REGISTRY: endpoint_for(REGISTRY, url=private.url)})
        async with amazon() as (there, _):
            credentials = Credentials({REGISTRY: Login("AKIA7", "secret")})
            registry = Registry(egress, credentials, attempts=1, ecr=Ecr(egress, url=there.url))
            heads = [registry.head_manifest(REGISTRY, "lab/app", "v1") for _ in range(20)]
            assert len({head.digest for head in await asyncio.gather(*heads)}) == 1
            assert len(there.seen) == 1
            await registry.close()
        await egress.close()


async def test_other_logins_are_used_as_they_are() -> None:
    async with amazon() as (there, ecr):
        logins = EcrLogins(ecr)
        for registry, login in (("quay.io", Login("AKIA7", "s")), (REGISTRY, Login("AWS", "t")), (REGISTRY, None)):
            assert await logins.exchanged(registry, login) is login
        assert there.seen == []
        await logins.close()

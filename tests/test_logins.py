"""Trying logins at registries: basic and bearer, whom a password is told, and which addresses are asked."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.upstream import Faults, Upstream
from tests.outgoing import LOGIN, answer, egress_to, opened, scripted
from tests.patience import PATIENCE_S, patience
from tests.servers import distribution, has_distribution
from tests.test_aws import REGISTRY, amazon
from wave_proxy.errors import Offline, RequestInvalid
from wave_proxy.upstream.aws import Ecr
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.egress import Egress, endpoint_for
from wave_proxy.upstream.logins import LoginChecks

# "secret" for "user".
HTPASSWD = "user:$2y$04$cSIOXkV5cVUjymeJJ4gY0O4Okw1h57wlg4Vz6NQXjVMUvutr8t.vu\n"
SENT = "dXNlcjpzZWNyZXQ="  # that login in a header

Start = Callable[..., Upstream]


@asynccontextmanager
async def checks_at(*addresses: str, limit_s: float = PATIENCE_S, **options: Any) -> AsyncIterator[LoginChecks]:
    """What asks these registries, which an operator has opened."""
    async with egress_to(*addresses, **options) as egress:
        yield LoginChecks(egress, opened(*addresses), Ecr(egress), limit_s=limit_s)


@pytest.mark.parametrize("auth", ["basic", "bearer"])
@pytest.mark.parametrize(
    ("login", "taken"),
    [
        pytest.param(LOGIN, True, id="right"),
        pytest.param(Login("user", "wrong"), False, id="wrong password"),
        pytest.param(Login("other", "secret"), False, id="wrong user"),
        pytest.param(Login("us:er", "secret"), False, id="a user that no header can hold"),
    ],
)
async def test_what_a_registry_says(upstream: Start, auth: str, login: Login, taken: bool) -> None:
    server = upstream(auth=auth)
    async with checks_at(server.address) as checks:
        for name in (server.address, f"http://{server.address}", f" {server.url}/v2/ ", f"{server.address}/team/tool"):
            assert await checks.check(name, login) is taken


@pytest.mark.skipif(not has_distribution(), reason="needs docker-registry")
async def test_a_real_registry(tmp_path: Path) -> None:
    with distribution(tmp_path, htpasswd=HTPASSWD) as address:
        async with checks_at(address) as checks:
            assert await checks.check(address, LOGIN)
            assert not await checks.check(address, Login("user", "Secret"))


@pytest.mark.parametrize("auth", ["basic", "bearer"])
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param({"status": {"/v2/": 500}}, id="fails"),
        pytest.param({"status": {"/v2/": 429}}, id="too many requests"),
        pytest.param({"status": {"/v2/": 404}}, id="no registry"),
        pytest.param({"bearer_loop": True}, id="never satisfied"),
        pytest.param({"html_login": True}, id="a page"),
    ],
)
async def test_a_registry_that_is_ill_takes_none(upstream: Start, auth: str, faults: dict[str, Any]) -> None:
    server = upstream(auth=auth, faults=Faults(**faults))
    async with checks_at(server.address) as checks:
        taken = await checks.check(server.address, LOGIN)
    # A token service that gives a token has taken the login, whatever the registry then does with the token.
    assert taken is (auth == "bearer" and "bearer_loop" in faults)


async def test_one_that_lets_everybody_in_takes_none(upstream: Start) -> None:
    server = upstream()
    async with checks_at(server.address) as checks:
        assert not await checks.check(server.address, LOGIN)
        assert [SENT in str(dict(request.headers)) for request in server.log] == [False]


async def test_one_that_is_not_there_takes_none(upstream: Start) -> None:
    server = upstream()
    server.stop()
    async with checks_at(server.address) as checks:
        assert not await checks.check(server.address, LOGIN)


async def test_a_registry_that_never_answers_is_given_up(upstream: Start) -> None:
    server = upstream(faults=Faults(only="/v2/", stall_at=-1))
    async with patience(), checks_at(server.address, limit_s=0.2, response_timeout_s=3600.0) as checks:
        assert not await checks.check(server.address, LOGIN)
    server.faults.release.set()


async def test_the_password_is_told_nobody_but_the_registry_and_its_token_service() -> None:
    """Neither where a redirect leads, nor a token service at a private address, nor one without TLS elsewhere."""
    async with scripted(answer("200 OK", b'{"token": "x"}')) as other:
        elsewhere = f"http://127.0.0.1:{other.port}/token"

        async def redirect(head: str) -> bytes:
            if "Authorization" in head:
                return answer("302 Found", Location=elsewhere)
            return answer("401 Unauthorized", WWW_Authenticate='Basic realm="x"')

        realm = answer("401 Unauthorized", WWW_Authenticate=f'Bearer realm="{elsewhere}"')
        secure = answer("401 Unauthorized", WWW_Authenticate=f'Bearer realm="https://127.0.0.1:{other.port}/token"')
        for reply, are_opened in ((redirect, True), (realm, False), (secure, False)):
            async with scripted(reply) as registry:
                address = f"127.0.0.1:{registry.port}"
                others = [f"127.0.0.1:{other.port}"] if are_opened else []
                async with checks_at(address, *others) as checks:
                    assert not await checks.check(address, LOGIN)
        assert not any(SENT in head for head in other.heads)


async def test_a_token_service_of_another_host_needs_tls(upstream: Start) -> None:
    server = upstream(auth="bearer", host="127.0.0.2")
    realm = answer("401 Unauthorized", WWW_Authenticate=f'Bearer realm="{server.url}/token"')
    async with scripted(realm) as registry:
        address = f"127.0.0.1:{registry.port}"
        async with checks_at(address, server.address) as checks:
            assert not await checks.check(address, LOGIN)
    assert server.log == []


async def test_the_service_is_named_to_the_token_service(upstream: Start) -> None:
    server = upstream(auth="bearer")
    async with checks_at(server.address) as checks:
        assert await checks.check(server.address, LOGIN)
    asked = server.log[-1]
    assert asked.path.startswith("/token?service=127.0.0.1")
    assert "scope" not in asked.path


@pytest.mark.parametrize(
    ("registry", "message"),
    [
        ("localhost", "Access to localhost is not allowed: localhost"),
        ("LocalHost:5000", "Access to localhost is not allowed: localhost"),
        ("http://localhost/v2/", "Access to localhost is not allowed: localhost"),
        ("localhost.localdomain", "Access to localhost is not allowed: localhost.localdomain"),
        ("https://0.0.0.0:5000", "Access to localhost is not allowed: 0.0.0.0"),
        ("::1", "Access to localhost is not allowed: ::1"),
        ("[::1]:5000", "Access to localhost is not allowed: ::1"),
        ("0:0:0:0:0:0:0:1", "Access to localhost is not allowed: 0:0:0:0:0:0:0:1"),
        ("nosuch.invalid", "Unable to resolve host: nosuch.invalid"),
        ("nosuch.invalid:5000", "Unable to resolve host: nosuch.invalid"),
        ("169.254.169.254", "Invalid registry hostname"),
        ("169.254.170.2", "Invalid registry hostname"),
        ("[fd00:ec2::254]", "Invalid registry hostname"),
        ("127.0.0.1:5000", "Invalid registry hostname"),
        ("127.1", "Invalid registry hostname"),
        ("2130706433", "Invalid registry hostname"),
        ("10.0.0.1", "Invalid registry hostname"),
        ("172.16.3.4:80", "Invalid registry hostname"),
        ("192.168.1.1", "Invalid registry hostname"),
        ("[fe80::1]", "Invalid registry hostname"),
        ("[::ffff:10.0.0.1]", "Invalid registry hostname"),
        ("ftp://quay.io", "Invalid registry hostname"),
        ("http://", "Invalid registry hostname"),
        ("user:pass@quay.io", "Invalid registry hostname"),
        ("quay io", "Invalid registry hostname"),
        ("quay.io:99999", "Invalid registry hostname"),
        ("\0", "Invalid registry hostname"),
        ("[]@", "Invalid registry hostname"),
    ],
)
async def test_what_is_not_asked(registry: str, message: str) -> None:
    async with checks_at() as checks:
        with pytest.raises(RequestInvalid) as refused:
            await checks.check(registry, LOGIN)
    assert str(refused.value) == message


async def test_a_table_that_opens_nothing_opens_nothing(upstream: Start) -> None:
    server = upstream(auth="basic")
    endpoints = {server.address: endpoint_for(server.address, insecure=True)}
    egress = Egress(endpoints)
    with pytest.raises(RequestInvalid, match=r"^Invalid registry hostname$"):
        await LoginChecks(egress, endpoints, Ecr(egress)).check(server.address, LOGIN)
    await egress.close()
    assert server.log == []


@pytest.mark.parametrize(
    ("login", "taken"),
    [
        pytest.param(Login("AKIA1", "s1"), True, id="an access key"),
        pytest.param(Login("AKIA2", "s2"), False, id="one of somebody else"),
        pytest.param(Login("AWS", "pw-AKIA1"), True, id="what was got for one"),
    ],
)
async def test_a_registry_of_amazon(upstream: Start, login: Login, taken: bool) -> None:
    server = upstream(auth="basic", username="AWS", password="pw-AKIA1")
    endpoints = {REGISTRY: endpoint_for(REGISTRY, url=server.url)}
    egress = Egress(endpoints)
    async with amazon() as (_, ecr):
        checks = LoginChecks(egress, endpoints, ecr)
        assert await checks.check(REGISTRY, login) is taken
        with pytest.raises(RequestInvalid, match="userName: an access key can be tried"):
            await checks.check(REGISTRY, Login("arn:aws:iam::123456789012:role/pull", "x"))
    await egress.close()


async def test_keys_that_amazon_refuses(upstream: Start) -> None:
    server = upstream(auth="basic", username="AWS", password="pw-AKIA1")
    endpoints = {REGISTRY: endpoint_for(REGISTRY, url=server.url)}
    egress = Egress(endpoints)
    async with amazon() as (stand_in, ecr):
        stand_in.status = 403
        assert not await LoginChecks(egress, endpoints, ecr).check(REGISTRY, Login("AKIA1", "s1"))
    await egress.close()


async def test_offline_is_said(upstream: Start) -> None:
    server = upstream(auth="basic")
    async with checks_at(server.address, offline=True) as checks:
        with pytest.raises(Offline):
            await checks.check(server.address, LOGIN)

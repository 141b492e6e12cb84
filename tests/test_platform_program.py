"""The whole program with a Platform: its users, their quotas, counters and logins, and what goes on without it."""

import asyncio
import os
import signal
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any

import pytest

from bench.images import image, layer, random_blob
from bench.upstream import Upstream
from tests.patience import until
from tests.platform.process import StandIn
from tests.servers import Response, WaveProxy, distribution, has_distribution, http_request, split_image
from tests.test_aws import REGISTRY as ECR
from tests.test_aws import amazon
from wave_proxy.image.oci import ACCEPT_MANIFESTS
from wave_proxy.state.accounts import hash_password
from wave_proxy.state.redis import connect

ENDPOINT = "https://platform.example/api"
USER, PASSWORD = "ana-7", "s3cret-of-ana"
HTPASSWD = "user:$2y$04$cSIOXkV5cVUjymeJJ4gY0O4Okw1h57wlg4Vz6NQXjVMUvutr8t.vu\n"  # the password is `secret`

# By access token. A token of a name alone is nobody's.
USERS = {
    f"tok-{name}": {"id": number, "userName": name, "email": f"{name}@{domain}"}
    for number, (name, domain) in enumerate(
        [("ana", "lab.org"), ("bob", "uni.edu"), ("eve", "quota.org"), ("fay", "quota.edu"), ("gil", "push.org")], 7
    )
}
ANA, GIL = 7, 11

CONFIG = f"""
[accounts]
admin = "{hash_password("correct horse")}"
[quota]
pull_anonymous = "1/1h"
pull_identified = "40/1h"
wait = "0s"
[build]
engine = "none"
[log]
requests = "all"
level = "debug"
"""


RUN_LIFETIME_S = 6.0
RUNS = f'run_lifetime = "{RUN_LIFETIME_S}s"\nrun_check = "300ms"\n'
ANSWER_S = 5.0  # so long an answer of the Platform is waited for


def private_image(seed: int) -> Any:
    return image([layer({"secret.bin": random_blob(50_000, seed=seed)})], env=(f"A={seed}",))


@dataclass
class Scene:
    """``private`` wants a login, which Ana has at the Platform in workspace 12; ``public`` wants none.

    ``target`` is where Gil may push to, empty where no registry can be had that takes anything.
    """

    wave: WaveProxy
    platform: StandIn
    private: Upstream
    public: Upstream
    target: str

    def post(self, token: str, name: str, **attributes: Any) -> Response:
        """A request for an image of the private registry, or of the public one when its name begins with ``lib``."""
        registry = self.public if name.startswith("lib/") else self.private
        body = {"towerEndpoint": ENDPOINT, "towerWorkspaceId": 12, "containerImage": f"{registry.address}/{name}"}
        body |= {"towerAccessToken": token} if token else {}
        return self.wave.request("POST", "/v1alpha2/container", body={**body, **attributes})

    def granted(self, token: str, name: str, **attributes: Any) -> str:
        """The name to pull. Raises AssertionError unless the request is granted."""
        answer = self.post(token, name, **attributes)
        assert answer.status == 200, f"{answer.status} {answer.body!r}"
        return str(answer.json()["targetImage"])

    def status_of_pull(self, target: str, method: str = "GET") -> int:
        """One pull: of the manifest. A HEAD does not count."""
        repository, tag = split_image(target)
        headers = {"Accept": ACCEPT_MANIFESTS}
        return http_request(self.wave.address, method, f"/v2/{repository}/manifests/{tag}", headers=headers).status

    def count(self, what: str, **query: str) -> dict[str, Any]:
        login = b64encode(b"admin:correct horse").decode()
        path = f"/v1alpha3/metrics/{what}?" + "&".join(f"{name}={value}" for name, value in query.items())
        document: dict[str, Any] = self.wave.request("GET", path, headers={"Authorization": f"Basic {login}"}).json()
        return document

    def make_answers_old(self) -> None:
        """Let a day pass for what is remembered of the Platform's answers."""

        async def age() -> None:
            redis = connect(self.wave.redis_url)
            for key in await redis.keys("wave:answer:*"):
                content: Any = await redis.get(key)
                await redis.set(key, b"[0.0," + content.partition(b",")[2])
            await redis.aclose()

        asyncio.run(age())

    def restart_api(self) -> None:
        """End the api's process, and wait for the one that takes its place."""
        before = self.wave.api_pid()
        os.kill(before, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{before}").exists(), "the api does not end")
        until(lambda: self.wave.request("GET", "/service-info").status == 200, "the api does not come back")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with ExitStack() as stack:
        platform = stack.enter_context(StandIn(ENDPOINT))
        private = stack.enter_context(Upstream(auth="bearer", username=USER, password=PASSWORD))
        public = stack.enter_context(Upstream())
        for number, name in enumerate(("lab/app", "lab/tool", "lab/late", "lab/old"), 1):
            private.add(name, private_image(number), "v1")
        public.add("lib/app", private_image(9), "v1")
        secret = {"discriminator": "container-reg", "userName": USER, "password": PASSWORD}
        entry = {"id": "c1", "user": ANA, "workspace": 12, "provider": "container-reg", "registry": private.address}
        platform.tell(users=USERS, credentials={"c1": {**entry, "secret": secret}})
        folder = tmp_path_factory.mktemp("platform")
        target = stack.enter_context(distribution(folder, htpasswd=HTPASSWD)) if has_distribution() else ""
        config = f'{CONFIG}{platform.config}timeout = "{ANSWER_S}s"\npatience = "1s"\n{RUNS}'
        upstreams = [address for address in (private.address, public.address, target) if address]
        wave = stack.enter_context(WaveProxy(folder / "data", workers=2, config=config, upstreams=upstreams))
        platform.pair(wave)
        yield Scene(wave, platform, private, public, target)


def test_a_private_image_is_pulled_with_the_users_own_credentials(scene: Scene) -> None:
    target = scene.granted("tok-ana", "lab/app:v1")
    for _ in range(4):  # both workers
        assert scene.wave.pull(target).config["config"]["Env"] == ["A=1"]
    # Bob, whom the Platform knows as well, has no login there, and neither has who does not say who he is.
    for token in ("tok-bob", ""):
        refused = scene.post(token, "lab/app:v1")
        assert refused.status == 400
        assert "access" in refused.json()["message"] or "lab/app" in refused.json()["message"]
    # The same user, in a workspace without credentials.
    assert scene.post("tok-ana", "lab/app:v1", towerWorkspaceId=13).status == 400
    assert all(line.startswith("tok-ana ") for line in scene.platform.seen("/keys"))


def test_a_request_tells_whose_it_is_and_none_of_his_secrets(scene: Scene) -> None:
    answer = scene.post("tok-ana", "lab/app:v1", towerRefreshToken="ref-9")
    told = scene.wave.request("GET", f"/v1alpha2/container/{answer.json()['requestId']}")
    asked = told.json()
    assert (asked["user"], asked["workspaceId"], asked["towerEndpoint"]) == ({"id": ANA}, 12, ENDPOINT)
    for secret in (b"tok-ana", b"ref-9", b"ana@lab.org", PASSWORD.encode()):
        assert secret not in told.body


def test_a_private_image_is_inspected_with_the_users_own_credentials(scene: Scene) -> None:
    asked = {"containerImage": f"{scene.private.address}/lab/app:v1", "towerWorkspaceId": 12}
    statuses = {}
    for token in ("tok-ana", "tok-bob"):
        body = {**asked, "towerAccessToken": token, "towerEndpoint": ENDPOINT}
        statuses[token] = scene.wave.request("POST", "/v1alpha1/inspect", body=body).status
    assert statuses == {"tok-ana": 200, "tok-bob": 400}


def test_who_is_not_known_there_is_refused_with_an_empty_body(scene: Scene) -> None:
    refused = scene.post("tok-nobody", "lib/app:v1")
    assert (refused.status, refused.body) == (401, b"")


@pytest.mark.parametrize("token", ["tok-ana\r\nX-User: 8", "tok-ana\x00", "tok-ana\x7f", "tok-\u00e4na"], ids=ascii)
def test_no_platform_is_shown_what_does_not_fit_into_a_header(scene: Scene, token: str) -> None:
    before = len(scene.platform.seen())
    refused = scene.post(token, "lib/app:v1")
    assert (refused.status, refused.body) == (401, b"")
    assert "no access token has such characters" in refused.headers["WWW-Authenticate"]
    assert len(scene.platform.seen()) == before


def test_an_expired_token_is_refreshed_and_its_user_goes_on(scene: Scene) -> None:
    scene.platform.tell(
        users={"jwt-2": {"id": ANA, "userName": "ana", "email": "ana@lab.org"}},
        refresh={"ref-1": ["jwt-2", "ref-2"]},
    )
    before = len(scene.platform.seen("oauth"))
    target = scene.granted("jwt-1", "lab/tool:v1", towerRefreshToken="ref-1")
    scene.wave.pull(target)
    # What the client still holds is the old one, the next time too.
    scene.wave.pull(scene.granted("jwt-1", "lab/tool:v1", towerRefreshToken="ref-1"))
    assert len(scene.platform.seen("oauth")) == before + 1
    assert scene.platform.seen("jwt-2 GET /credentials/c1/keys")


def test_users_are_limited_each_by_himself_and_counted_by_organisation(scene: Scene) -> None:
    targets = {token: scene.granted(token, "lib/app:v1") for token in ("tok-eve", "tok-fay", "")}
    pulls = {
        token: [scene.status_of_pull(targets[token]) for _ in range(count)]
        for token, count in (("tok-eve", 43), ("tok-fay", 5), ("", 2))
    }
    assert pulls["tok-eve"] == [200] * 40 + [429] * 3
    assert pulls["tok-fay"] == [200] * 5
    assert sorted(pulls[""]) == [200, 429]

    def counted() -> dict[str, int]:
        """Of organisations nothing is told until there is something to tell; counters are written twice a second."""
        orgs: dict[str, int] = scene.count("pulls").get("orgs", {})
        return orgs

    until(lambda: counted().items() >= {"quota.org": 40, "quota.edu": 5}.items(), lambda: str(counted()))


def test_what_is_begun_goes_on_without_the_platform(scene: Scene) -> None:
    scene.wave.pull(scene.granted("tok-ana", "lab/app:v1"))
    late = scene.granted("tok-ana", "lab/late:v1")  # not pulled yet: its blobs are only upstream
    scene.platform.cut_off()
    try:
        scene.make_answers_old()
        scene.restart_api()
        assert scene.wave.pull(late).config["config"]["Env"] == ["A=3"]
        # Who was here before goes on asking, also for what nobody has asked for yet.
        scene.wave.pull(scene.granted("tok-ana", "lab/old:v1"))
        # Who was not is told why that can't be.
        refused = scene.post("tok-new", "lib/app:v1")
        assert refused.status == 503
        told = refused.json()["message"]
        assert told.startswith(f"Unexpected I/O error while accessing Tower resource: {ENDPOINT}/user-info - cause: ")
        assert told.endswith(" - HTTP status=503 - response=-")
        assert int(refused.headers["Retry-After"]) > 0
        # Who needs no Platform notices nothing.
        assert scene.post("", "lib/app:v1").status == 200
    finally:
        scene.platform.pair(scene.wave)
    assert scene.post("tok-bob", "lib/app:v1", towerWorkspaceId=99).status == 200


def test_a_platform_that_is_slow_holds_up_nobody_whom_it_has_known(scene: Scene) -> None:
    target = scene.granted("tok-ana", "lab/late:v1")
    delay_s = 8 * ANSWER_S
    scene.platform.tell(delay_s=delay_s)
    try:
        scene.make_answers_old()
        before = scene.platform.state()["sessions"].count("paired")
        scene.restart_api()
        scene.platform.wait_for(lambda sessions: sessions.count("paired") > before)
        began = monotonic()
        scene.wave.pull(target)
        scene.wave.pull(scene.granted("tok-ana", "lab/app:v1"))
        assert monotonic() - began < delay_s / 2, "more than one answer was waited for"
        refused = scene.post("tok-new", "lib/app:v1")
        told = {"message": f"Timeout error connecting to '{ENDPOINT}' - HTTP status=408 - response=-"}
        assert (refused.status, refused.json()) == (408, told)
    finally:
        scene.platform.tell(delay_s=0.0)


def test_a_token_of_a_run_ends_soon_after_it(scene: Scene) -> None:
    scene.platform.tell(workflows={"run-7": {"status": "RUNNING", "computeEnv": {}}})
    answer = scene.post("tok-ana", "lab/tool:v1", workflowId="run-7")
    ends = datetime.fromisoformat(answer.json()["expiration"]).timestamp()
    assert 2 * 86400 - 60 < ends - time() < 2 * 86400 + 60, "what clients are told is for the whole run"
    target, began = answer.json()["targetImage"], monotonic()
    while monotonic() - began < 1.5 * RUN_LIFETIME_S:
        assert scene.status_of_pull(target, "HEAD") == 200
        sleep(0.3)
    scene.platform.tell(workflows={"run-7": {"status": "SUCCEEDED", "computeEnv": {}}})
    until(lambda: scene.status_of_pull(target, "HEAD") != 200, "it does not end")
    assert scene.status_of_pull(target, "HEAD") == 404


@pytest.mark.skipif(not has_distribution(), reason="needs the program docker-registry")
def test_a_private_image_is_mirrored_with_the_users_own_credentials_at_both_ends(scene: Scene) -> None:
    secret = {"discriminator": "container-reg", "userName": "user", "password": "secret"}
    entry = {"id": "c2", "user": GIL, "workspace": 12, "provider": "container-reg", "registry": scene.target}
    private = {"discriminator": "container-reg", "userName": USER, "password": PASSWORD}
    source = {**entry, "id": "c3", "registry": scene.private.address, "secret": private}
    scene.platform.tell(credentials={"c2": {**entry, "secret": secret}, "c3": source})
    answer = scene.post("tok-gil", "lab/app:v1", mirror=True, buildRepository=f"{scene.target}/mirrors")
    assert answer.status == 200, answer.body
    path = f"/v1alpha1/mirrors/{answer.json()['buildId']}"
    until(
        lambda: scene.wave.request("GET", path).json()["status"] == "COMPLETED",
        lambda: str(scene.wave.request("GET", path).json()),
    )
    record = scene.wave.request("GET", path).json()
    assert record["exitCode"] == 0, record["logs"]


SPELLINGS = [
    "/internal/login",
    "//internal/login",
    "/./internal/login",
    "/x/../internal/login",
    "/%69nternal/login",
    "/%2569nternal/login",
    "/internal%2flogin",
    "/INTERNAL/login",
    "/internal/./login",
    "/internal//login",
    "/pairing/../internal/login",
    "/pairing/%2e%2e/internal/login",
    "/\\internal/login",
    "http://api/internal/login",
]


@pytest.mark.parametrize("upgrade", [{}, {"Connection": "Upgrade", "Upgrade": "websocket"}], ids=["", "upgrade"])
@pytest.mark.parametrize("path", SPELLINGS)
def test_nobody_gets_logins_from_the_port(scene: Scene, path: str, upgrade: dict[str, str]) -> None:
    token = split_image(scene.granted("tok-ana", "lab/app:v1"))[0].split("/")[1]
    query = f"?token={token}&registry={scene.private.address}&repository=lab/app"
    answer = http_request(scene.wave.address, "GET", path + query, headers=upgrade)
    assert answer.status >= 400
    assert PASSWORD.encode() not in answer.body


def test_neither_tokens_nor_passwords_nor_licences_are_logged(scene: Scene) -> None:
    logged = scene.wave.stderr
    assert '"request"' in logged
    for secret in (*USERS, "jwt-1", "jwt-2", "ref-1", "ref-2", "ref-9", PASSWORD, "licence-7"):
        assert secret not in logged, secret


def test_a_platform_can_be_asked_with_requests_of_our_own(tmp_path: Path, wave: Callable[..., WaveProxy]) -> None:
    with StandIn() as platform, Upstream(auth="bearer", username=USER, password=PASSWORD) as private:
        private.add("lab/app", private_image(1), "v1")
        secret = {"discriminator": "container-reg", "userName": USER, "password": PASSWORD}
        entry = {"id": "c1", "user": ANA, "workspace": None, "provider": "container-reg", "registry": private.address}
        platform.tell(users=USERS, credentials={"c1": {**entry, "secret": secret}})
        direct = "direct = true\nallow_private = true\n"
        proxy = wave(upstreams=[private.address], config=platform.config + direct)
        body = {"towerEndpoint": platform.endpoint, "containerImage": f"{private.address}/lab/app:v1"}
        answer = proxy.request("POST", "/v1alpha2/container", body={**body, "towerAccessToken": "tok-ana"})
        missing = {"message": f"Missing pairing record for Tower endpoint '{platform.endpoint}'"}
        assert (answer.status, answer.json()) == (400, missing)
        platform.pair(proxy)
        platform.cut_off()
        proxy.pull(proxy.submit(**body, towerAccessToken="tok-ana")["targetImage"])


async def test_an_amazon_registry_opens_with_the_keys_of_the_run(tmp_path: Path) -> None:
    def pull_by_keys(amazon_url: str) -> None:
        with StandIn(ENDPOINT) as platform, Upstream(auth="basic", username="AWS", password="pw-AKIA7") as private:
            private.add("lab/app", private_image(1), "v1")
            secret = {"discriminator": "aws", "accessKey": "AKIA7", "secretKey": PASSWORD}
            entry = {"id": "aws-1", "user": ANA, "workspace": 12, "provider": "aws", "registry": None, "secret": secret}
            batch = {"status": "RUNNING", "computeEnv": {"platform": "aws-batch", "credentialsId": "aws-1"}}
            platform.tell(users=USERS, credentials={"aws-1": entry}, workflows={"run-1": batch})
            config = f'{platform.config}[aws]\nurl = "{amazon_url}"\n[registries."{ECR}"]\nendpoint = "{private.url}"\n'
            with WaveProxy(tmp_path / "data", config=config) as proxy:
                platform.pair(proxy)
                body = {"towerEndpoint": ENDPOINT, "towerWorkspaceId": 12, "containerImage": f"{ECR}/lab/app:v1"}
                body |= {"towerAccessToken": "tok-ana"}
                answer = proxy.request("POST", "/v1alpha2/container", body=body)
                assert answer.status == 400, "without a run there is nothing that opens it"
                proxy.pull(proxy.submit(**body, workflowId="run-1")["targetImage"])

    async with amazon() as (there, _):
        await asyncio.to_thread(pull_by_keys, there.url)
        assert [host for host, _, _ in there.seen] == ["api.ecr.eu-west-1.amazonaws.com"]
